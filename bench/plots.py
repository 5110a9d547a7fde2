"""The pictures of docs/benchmarks.md, from the lines of bench/run. One function a picture; each returns
False when the lines hold nothing for it. Needs Debian's python3-matplotlib (tools/setup --bench)."""
import os

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "unmoor"  # the same file from the same lines
import matplotlib.pyplot as plt  # noqa: E402

MIB = 1 << 20
# Ours in blues and greens, the others in warm colours; the same in all pictures.
LOOKS = {"direct": ("#1f5fa8", "o"), "prefetch": ("#17a2b8", "D"), "lazy": ("#2e8b57", "s"),
         "eager": ("#7a5fc0", "^"), "stock": ("#c0392b", "v"), "stock-lazy": ("#e08e0b", "x"), "never": ("#777777", "P")}
PEERS = ["#8d6e63", "#ad1457", "#5d4037", "#6a1b9a"]


def look(name, names):
    if name in LOOKS:
        return LOOKS[name]
    others = [n for n in names if n not in LOOKS]
    return PEERS[others.index(name) % len(PEERS)], "*"


def size(mib):
    return "0" if mib == 0 else f"{mib} MiB" if mib < 1024 else f"{mib // 1024} GiB"


def save(figure, folder, name):
    os.makedirs(folder, exist_ok=True)
    for kind in ("png", "svg"):
        figure.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=110,
                       metadata={"Date": None} if kind == "svg" else {"Software": None})
    plt.close(figure)
    return True


def restore_by_size(results, labels, folder):
    sizes = [mib for mib in results.distinct("restore", "mib", cache="warm") if mib > 0]
    names = [n for n in labels if results.values("restore", "wall_ms", way=n, cache="warm")]
    if not sizes or not names:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, key, title in ((axes[0], "wall_ms", "until the program runs"),
                             (axes[1], "ready_ms", "until it owes the image nothing")):
        for name in names:
            color, marker = look(name, names)
            points = [(mib, results.values("restore", key, way=name, mib=mib, cache="warm")) for mib in sizes]
            points = [(mib, values) for mib, values in points if values]
            medians = [results.middle(values) for _, values in points]
            spread = [[m - min(v) for m, (_, v) in zip(medians, points)],
                      [max(v) - m for m, (_, v) in zip(medians, points)]]
            axis.errorbar([mib for mib, _ in points], medians, yerr=spread, color=color, marker=marker,
                          capsize=2, linewidth=1.6, markersize=5, label=labels[name])
        null = results.median("restore", "wall_ms", mib=0, way="stock", cache="warm")
        if null:
            axis.axhline(null, color="#999999", linestyle=":", linewidth=1.2)
            axis.annotate("CRIU, an empty process", (sizes[0], null), xytext=(0, -11), textcoords="offset points",
                          fontsize=8, color="#666666")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [size(mib) for mib in sizes])
        axis.minorticks_off()
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.grid(alpha=0.25)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("heap")
    axes[0].set_ylabel("ms, page cache warm")
    axes[0].legend(fontsize=8, loc="upper left")
    return save(figure, folder, "restore")


def first_answers(results, labels, folder):
    programs = [(p, c) for p in results.distinct("served", "program") for c in ("cold", "warm")
                if results.values("served", "first_ms", program=p, cache=c)]
    if not programs:
        return False
    names = [n for n in labels if results.values("served", "first_ms", way=n)]
    figure, axes = plt.subplots(1, len(programs), figsize=(3.1 * len(programs), 3.8), layout="constrained", squeeze=False)
    for axis, (program, cache) in zip(axes[0], programs):
        for i, name in enumerate(names):
            where = {"program": program, "cache": cache, "way": name}
            runs, first, some = (results.median("served", k, **where) for k in ("wall_ms", "first_ms", "some_ms"))
            if first is None:
                continue
            color, _ = look(name, names)
            at = len(names) - i
            axis.barh(at, some, color=color, alpha=0.25)
            axis.barh(at, first, color=color, alpha=0.6)
            axis.barh(at, runs, color=color)
            axis.text(some, at, f" {first:.0f} / {some:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names), 0, -1), [labels[n] for n in names] if axis is axes[0][0] else [""] * len(names),
                        fontsize=8)
        mib = results.distinct("served", "mib", program=program)[0]
        axis.set_title(f"{program}, {size(mib)}, {cache}", fontsize=10)
        axis.set_xlim(0, axis.get_xlim()[1] * 1.4)
        axis.set_ylim(0.4, len(names) + 0.6)
        axis.set_xlabel("ms")
        axis.grid(axis="x", alpha=0.25)
    figure.supxlabel("dark: it runs; middle: first answer; light: a little work more", fontsize=9, color="#555555")
    return save(figure, folder, "first-answer")


def throughput(results, _, folder):
    lines = [line for line in results.lines if line["case"] == "pause-series"]
    if not lines:
        return False
    threads = sorted({line["threads"] for line in lines})
    figure, axes = plt.subplots(1, len(threads), figsize=(5 * len(threads), 3.8), layout="constrained", squeeze=False)
    for axis, count in zip(axes[0], threads):
        for way, color, label in (("null", "#c0392b", "left mapped: copied on write"), ("remap", "#1f5fa8", "remapped by unmoor")):
            line = next((x for x in lines if x["threads"] == count and x["way"] == way), None)
            if line is None:
                continue
            step = line["bin_ms"]
            axis.plot([i * step for i in range(len(line["pages"]))],
                      [p / step / 1e3 for p in line["pages"]], color=color, linewidth=1.2, label=label)
            if way == "remap":
                axis.axvline(line["ready_ms"], color=color, linestyle=":", linewidth=1.2)
                axis.annotate("READY", (line["ready_ms"], 0), xytext=(3, 3), textcoords="offset points", fontsize=8, color=color)
                axis.axhline(line["before"] / 1e6, color="#777777", linestyle="--", linewidth=1.2, label="before the dump")
        pause = results.spread("pause", "own_longest_pause_ms", 1, 2, threads=count, way="remap")
        axis.set_title(f"{count} writing thread{'s' if count > 1 else ''}; longest pause {pause} ms", fontsize=10)
        axis.set_xlabel("ms since it runs again")
        axis.set_ylim(0, axis.get_ylim()[1] * 1.25)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("million pages checked and written, a second")
    axes[0][0].legend(fontsize=8, loc="upper right")
    return save(figure, folder, "throughput")


def paging(results, labels, folder):
    patterns = [p for p in ("sequential", "random", "hot set", "recorded") if results.values("paging", "p50_ns", pattern=p)]
    names = [n for n in labels if results.values("paging", "p50_ns", way=n)]
    if not patterns:
        return False
    figure, axes = plt.subplots(1, len(patterns), figsize=(2.7 * len(patterns), 3.8), sharey=True, layout="constrained", squeeze=False)
    keys = ("p50_ns", "p99_ns", "p999_ns", "longest_ns")
    for axis, pattern in zip(axes[0], patterns):
        for name in names:
            color, marker = look(name, names)
            values = [results.median("paging", key, way=name, pattern=pattern, threads=1) for key in keys]
            if values[0] is not None:
                axis.plot(range(len(keys)), [v / 1e3 for v in values], color=color, marker=marker, label=labels[name])
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda us, _: f"{us:g}"))
        axis.set_xticks(range(len(keys)), ["p50", "p99", "p99.9", "longest"])
        axis.set_title(pattern, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("µs a touch, page cache warm, 1 thread")
    axes[0][0].legend(fontsize=8)
    return save(figure, folder, "paging")


def all_of(results, labels, folder):
    """Names of the pictures made."""
    made = (("restore", restore_by_size), ("first-answer", first_answers), ("throughput", throughput), ("paging", paging))
    return {name for name, make in made if make(results, labels, folder)}

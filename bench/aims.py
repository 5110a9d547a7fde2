"""The aims of the project beside what a run found: one table, the missed ones with what limits them."""

# What limits a figure that misses its aim, measured: see docs/decisions.md for the numbers in brackets.
LIMITS = {
    "direct": "when processes that hand over to each other get onto a core [49]",
    "eager": "first touches of fresh memory in huge pages, of which the host has taken some; compare the least of both [70]",
    "dump": "the image's pages in the page cache are such first touches too; 0.26 to 0.30 s for 1 GiB where they are not [70]",
    "lazy": "a block of 64 KiB is read, checked and placed: 29 µs of UFFDIO_COPY alone [55]",
    "drain": "UFFDIO_COPY, some 2.2 GB/s a thread [55]",
    "unpack": "LZ4, hashes and two copies through the page cache share two CPUs; reading and writing the pages alone, by one thread, was slower",
    "remap": "reading through the page cache and hashing what is read; the best loop does neither [60]",
    "gap": "one scheduler tick of 4 ms for each turn of another busy thread on the core: a program at rest has it too [65]",
    "frozen": "criu's own parasite, tree and namespaces, 10 ms and more, are in it whatever changed [47]",
    "prefetch": "the rest of the restore: criu and the binaries' own pages, cold [50]",
    "links": "criu itself reads what changed since [61]",
}


def add(rows, what, value, aim, unit, least=False, limit=""):
    """`least`: the figure has to be at least the aim, not at most."""
    if value is None:
        return
    met = value >= aim if least else value <= aim
    digits = 0 if abs(value) >= 100 or unit == "%" else 1 if abs(value) >= 10 else 2
    sign = "≥" if least else "≤"
    rows.append([what, f"{value:.{digits}f} {unit}".strip(), f"{sign} {aim:g} {unit}".strip(),
                 "met" if met else "missed", "" if met else LIMITS.get(limit, limit)])


def quotient(a, b):
    return a / b if a is not None and b else None


def worst(values, least=False):
    found = [value for value in values if value is not None]
    return (min if least else max)(found) if found else None


def drain_rate(results, **where):
    """The heap by the time from running to independent, in GB/s; None where that is no time."""
    rates = [line["mib"] * (1 << 20) / (line["ready_ms"] - line["wall_ms"]) / 1e6 for line in results.lines
             if line["case"] == "restore" and all(line.get(k) == v for k, v in where.items()) and
             line["ready_ms"] - line["wall_ms"] > 5]
    return results.middle(rates) if rates else None


def best_loop(results):
    """Bytes per second and name of the best way of copying and moving; None: not measured."""
    rates = [(results.median("loop", "bytes_per_second", variant=v), v) for v in "ABCG"]
    return max((rate for rate in rates if rate[0] is not None), default=(None, None))


def price_of_verifying(results):
    """What it adds to the time of a remap, in percent."""
    ratio = quotient(*(results.median(case, "elapsed_ms") for case in ("remap", "remap-unverified")))
    return None if ratio is None else 100 * (ratio - 1)


def of_null(share):
    """What the same program keeps where nothing is remapped: each page is copied on write, and the copying takes place elsewhere."""
    return "" if share is None else f"with nothing remapped: {100 * share:.0f} %"


def null_of(results, mib, case="restore"):
    """Stock CRIU restoring an empty process, in the rounds of that size (in older results: in those of size 0)."""
    null = results.median(case, "wall_ms", way="null", mib=mib)
    return null if null is not None else results.median("restore", "wall_ms", way="stock", mib=0, cache="warm")


def of_restores(results, rows):
    def wall(way, mib, case="restore"):
        return results.median(case, "wall_ms", way=way, mib=mib, cache="warm")
    sizes = [mib for mib in results.distinct("restore", "mib") if mib > 0]
    all_sizes = [("restore", mib) for mib in sizes] + [("sparse", mib) for mib in results.distinct("sparse", "mib")]
    add(rows, "direct restore ÷ CRIU's of an empty process, the worst size",
        worst(quotient(wall("direct", m, case), null_of(results, m, case)) for case, m in all_sizes), 1.1, "", limit="direct")
    add(rows, "direct restore ÷ CRIU's of an empty process, each the only one in a second, the worst size",
        worst(quotient(wall("direct", m, "alone"), wall("null", m, "alone")) for m in results.distinct("alone", "mib")), 1.1, "")
    add(rows, "of it outside criu, the worst size",
        worst(results.median(case, "own_ms", way="direct", mib=m, cache="warm") for case, m in all_sizes), 3, "ms", limit="direct")
    for mib in (1024, 4096):
        add(rows, f"eager: stock CRIU's time ÷ its, {mib // 1024} GiB",
            quotient(wall("stock", mib), wall("eager", mib)), 2, "", True, "eager")
    for key, aim, name in (("p50_ns", 6, "p50"), ("p99_ns", 15, "p99")):
        value = results.median("paging", key, way="lazy", pattern="random", threads=1)
        add(rows, f"lazy: a touch at random, {name}", None if value is None else value / 1e3, aim, "µs", limit="lazy")
    drained = {way: worst((drain_rate(results, way=way, mib=mib, cache="warm") for mib in sizes if mib >= 1024), True)
               for way in ("lazy", "stock-lazy")}
    add(rows, "lazy: drain, warm, heaps from 1 GiB, the worst", drained["lazy"], 2.5, "GB/s", True, "drain")
    add(rows, "lazy: drain ÷ CRIU's lazy pages'", quotient(drained["lazy"], drained["stock-lazy"]), 2, "", True, "drain")
    first = {way: results.median("served", "first_ms", program="redis", cache="cold", way=way) for way in ("prefetch", "direct", "stock-lazy")}
    for way, name in (("stock-lazy", "CRIU's lazy pages"), ("direct", "plainly mapped")):
        add(rows, f"cold redis, first answer: {name} ÷ with prefetch", quotient(first[way], first["prefetch"]), 3, "", True, "prefetch")
    for program in ("touch", "redis"):
        never = results.median("after", "per_second", program=f"{program}-fresh")
        shares = [quotient(results.median("after", "per_second", program=program, way=way), never) for way in ("direct", "lazy", "eager")]
        low = worst(shares, True)
        add(rows, f"{program}: speed afterwards ÷ never checkpointed, the worst way", None if low is None else 100 * low, 97, "%", True)


def of_remaps(results, rows):
    rate = results.median("remap", "bytes_per_second")
    share = quotient(rate, best_loop(results)[0])
    add(rows, "remap, verified, ÷ the best loop", None if share is None else 100 * share, 90, "%", True, "remap")
    add(rows, "what verifying costs the remap", price_of_verifying(results), 10, "%")
    for threads in results.distinct("pause", "threads", way="remap"):
        who = f"all rewritten meanwhile by {threads} thread{'s' if threads > 1 else ''}"
        where = {"way": "remap", "threads": threads}
        add(rows, f"{who}: longest pause", results.median("pause", "own_longest_pause_ms", **where), 2, "ms", limit="gap")
        kept, null = (quotient(results.median("pause", "during", threads=threads, way=way),
                               results.median("pause", "before", threads=threads, way=way)) for way in ("remap", "null"))
        add(rows, f"{who}: its speed meanwhile ÷ before", None if kept is None else 100 * kept, 70, "%", True, of_null(null))
    for guard in ("freeze", "fault"):
        none = quotient(results.median("guards", "gb_per_s", pattern="none", way=guard),
                        results.median("guards", "gb_per_s", pattern="none", way="moved"))
        add(rows, f"library, {guard}, undisturbed ÷ loop G", None if none is None else 100 * none, 90, "%", True, "remap")
        cases = [{"pattern": p, "writers": w, "way": guard} for p in ("clean", "hot", "uniform") for w in (1, 2)]
        stall = worst(results.median("guards", "stall_p999_ns", **case) for case in cases)
        add(rows, f"library, {guard}: a store's stall, p99.9, the worst case", None if stall is None else stall / 1e6, 1, "ms")
        for pattern in ("clean", "hot", "uniform"):
            for writers in (1, 2):
                case = {"pattern": pattern, "writers": writers}
                kept, null = (quotient(results.median("guards", "stores_during", way=way, **case),
                                       results.median("guards", "stores_before", way=way, **case)) for way in (guard, "null"))
                add(rows, f"library, {guard}, {pattern}, {writers}: stores meanwhile ÷ before", None if kept is None else 100 * kept,
                    70, "%", True, of_null(null))


def of_dumps(results, rows):
    for mib in results.distinct("dump", "mib"):
        add(rows, f"full dump of {mib} MiB: frozen ÷ stock CRIU's",
            quotient(results.median("dump", "frozen_ms", mib=mib, way="unmoor"), results.median("dump", "frozen_ms", mib=mib, way="stock")), 1, "",
            limit="dump" if mib >= 1024 else "")
    for mib in results.distinct("chain-dump", "mib"):
        def of(way, key, mib=mib):
            return results.median("chain-dump", key, mib=mib, dirty_thousandths=10, way=way)
        for way, name in (("full", "a full dump's"), ("stock", "stock CRIU's")):
            add(rows, f"{mib} MiB, 1 % dirty: {name} frozen time ÷ with --track-mem", quotient(of(way, "frozen_ms"), of("tracked", "frozen_ms")), 20, "", True, "frozen")
        add(rows, f"{mib} MiB, 1 % dirty: bytes written ÷ dirty", quotient(of("delta", "written_bytes"), of("delta", "changed_bytes")), 1.1, "")
    for links in ("1", "8", "64"):
        add(rows, f"restore of a chain of {links} ÷ a full image", quotient(results.median("chain-restore", "wall_ms", way=links),
                                                                         results.median("chain-restore", "wall_ms", way="full")), 1.2, "", limit="links")
    for heap in results.distinct("pack", "heap"):
        rate = results.median("pack", "unpack_rate", heap=heap, compression="lz4")
        add(rows, f"unpack lz4, {heap}", None if rate is None else rate / 1e9, 2.5, "GB/s", True, "unpack")


def all_of(results):
    """Rows: what, figure, aim, met or missed, what limits it."""
    rows = []
    of_restores(results, rows)
    of_remaps(results, rows)
    of_dumps(results, rows)
    return rows

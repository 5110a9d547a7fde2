#!/usr/bin/env -S python3 -B
"""Packed image directories: the same checkpoint in less space, from packing to the restored program."""
import os
import shutil

from harness import USER_MISTAKE, demand, main, tree_bytes
from store import DAMAGED, data_ranges, flip, layer_files, reader, restore_by_stock_criu, verify


def only_packed(image):
    names = sorted(name.split(".")[1] for name in os.listdir(os.path.join(image, "layers")))
    return names == ["index", "packed"]


def flip_at(path, part):
    flip(path, int(os.path.getsize(path) * part))


def mended(story, image, source, parts):
    repaired = verify(story, image, "--repair-from", source)["repaired"]
    demand(len(repaired) == parts, f"{parts} parts were mended: {repaired}")
    demand(all(d["places"] for d in repaired if "offset" in d), f"told with task and addresses: {repaired}")
    verify(story, image, "--deep")


def caches(story):
    return [n for n in os.listdir(story.folder) if ".unpacked-" in n]


def packed_file(image):
    layers = os.path.join(image, "layers")
    name, = (n for n in os.listdir(layers) if n.endswith(".packed"))
    return os.path.join(layers, name)


def churn_in(story, image, *options):
    churn = story.start("churn", "--mib", 32, "--threads", 2)
    churn.await_sweep()
    return churn, story.dump(churn, image, *options)


def packed_and_restored(story):
    """Packed in place, restored from there twice, unpacked again: each time the same program."""
    churn, image = churn_in(story, "image")
    before = reader("list", image).stdout
    report = story.unmoor("pack", image, "--json").json()
    demand(only_packed(image) and report["pages_bytes"] >= 32 << 20, f"it is packed: {report}")
    demand(tree_bytes(image) < report["packed_bytes"] + (4 << 20), "the pages are gone")
    demand(reader("verify", image).stdout == b"sound\n", "the reader that is not ours agrees")
    demand(reader("list", image).stdout == before, "the same checkpoint")
    for options in ((), ("--quick",), ("--deep",)):
        verify(story, image, *options)
    shown = story.unmoor("show", "-D", image, "--json").json()
    demand(shown["layers"][0]["packed"] == "lz4", f"show tells: {shown['layers']}")
    demand("packed" in story.unmoor("log", image).out, "and log")
    for turn, word in enumerate(("unpacked", "restored from")):
        outcome = story.restore(churn, image)
        demand(word in outcome.err and len(caches(story)) == 1, f"says what it does: {outcome}")
        story.wait_ready(churn)
        churn.await_sweep()
        # What it came from is plain, so the next dump compares with it, and may share it.
        outcome = story.unmoor("dump", "-t", churn.pid, "-D", story.path(f"next{turn}"))
        demand(caches(story)[0] in outcome.out + outcome.err, f"the cache is the parent: {outcome}")
        churn.await_gone()
        story.await_no_orphan()
    story.unmoor("unpack", image)
    demand(not only_packed(image), "it is unpacked")
    items = story.unmoor("gc", story.folder, "--json").json()["items"]
    demand(not caches(story) and any(".unpacked-" in i["path"] for i in items), f"gc removes the cache: {items}")
    outcome = story.restore(churn, image)
    demand("packed" not in outcome.err and not caches(story), f"nothing to unpack: {outcome}")
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def over_one_another(story):
    """A dump over a packed image, a packed one over a plain one: what is there is always restorable."""
    churn, image = churn_in(story, "image", "--compress", "zstd:1")
    demand(only_packed(image), "dumped packed")
    verify(story, image, "--deep")
    story.restore(churn, image)
    story.wait_ready(churn)
    for options in ((), ("--compress", "lz4", "--full"), ("--full",)):
        story.dump(churn, "image", *options)
        demand(only_packed(image) == bool(options[:1] == ("--compress",)), f"as asked for: {options}")
        verify(story, image)
        story.restore(churn, image)
        story.wait_ready(churn)
        churn.await_sweep()
    churn.end()
    other = story.path("other")
    story.unmoor("pack", image, other)
    story.unmoor("pack", image)
    story.unmoor("unpack", other, image)
    demand(not only_packed(image) and only_packed(other), "each replaced by the other form")
    churn.await_gone()
    story.restore(churn, other)
    churn.await_sweep()
    story.unmoor("rm", other)
    demand(not [n for n in caches(story) if n.startswith(".other.")], "rm takes the cache with it, and the program that maps it does not mind")
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def what_needs_pages_says_so(story):
    """Commands that cannot work on a packed image name the one that unpacks it; damage is told."""
    churn, image = churn_in(story, "image")
    story.unmoor("pack", image, "--compress", "zstd")
    copy = story.path("copy")
    shutil.copytree(image, copy)
    outcome = story.unmoor("export", image, story.path("plain"), expect=USER_MISTAKE)
    demand("unmoor unpack" in outcome.err, f"export: {outcome}")
    other = story.start("churn", "--mib", 8)
    outcome = story.unmoor("dump", "-t", other.pid, "-D", story.path("next"), "-R", "--prev-images-dir", image,
                           expect=USER_MISTAKE)
    demand("unmoor unpack" in outcome.err, f"dump: {outcome}")
    other.end()
    for again in (("pack", image), ("unpack", image, image), ("pack", image, "--compress", "gzip")):
        story.unmoor(*again, expect=USER_MISTAKE if again[0] == "pack" else 0)
    story.unmoor("unpack", image, expect=USER_MISTAKE)

    packed = packed_file(copy)
    place = os.path.getsize(packed) // 2
    flip(packed, place)
    damage, = verify(story, copy, expect=DAMAGED)["damages"]
    demand(damage["file"] == packed and damage["offset"] <= place < damage["offset"] + damage["size_bytes"] and
           damage["places"][0]["vpid"] == churn.pid, f"told with task and addresses: {damage}")
    demand(b"damaged" in reader("verify", copy, code=2).stderr, "the other reader finds it too")
    for command in (("unpack", copy), ("restore", "-D", copy, "-d")):
        outcome = story.unmoor(*command, expect=USER_MISTAKE)
        demand("damaged" in outcome.err and packed in outcome.err, f"refused: {outcome}")
    demand(not [n for n in os.listdir(story.folder) if "partial" in n or ".unpacked-" in n], "nothing is left")
    plain = story.path("plain")
    story.unmoor("export", image, plain)
    restore_by_stock_criu(story, churn, plain)


def repaired(story):
    """Damage in a packed layer is mended from a plain or a packed copy, and the reverse, frame by frame."""
    churn, plain = churn_in(story, "plain")
    packed, other = story.path("packed"), story.path("other")
    for where, form in ((packed, "zstd:1"), (other, "lz4")):
        story.unmoor("pack", plain, where, "--compress", form)
    flip_at(packed_file(packed), 0.3)
    flip_at(packed_file(packed), 0.7)
    mended(story, packed, plain, 2)
    demand(story.unmoor("show", "-D", packed, "--json").json()["layers"][0]["packed"].startswith("zstd"),
           "packed as it was")
    flip_at(packed_file(packed), 0.2)
    flip_at(packed_file(other), 0.8)
    mended(story, packed, other, 1)
    mended(story, other, packed, 1)
    os.truncate(packed_file(packed), os.path.getsize(packed_file(packed)) - 5)
    index = packed_file(packed).replace(".packed", ".index")
    os.remove(index)  # shared with the others by hard link
    with open(index, "wb") as file:
        file.write(b"UNMOOR")
    mended(story, packed, other, 2)
    pages = layer_files(plain)[0]
    begin, end = max(data_ranges(pages), key=lambda r: r[1] - r[0])
    flip(pages, (begin + end) // 2)
    mended(story, plain, packed, 1)

    flip_at(packed_file(packed), 0.5)
    flip_at(packed_file(other), 0.5)
    before = os.stat(packed_file(packed)).st_ino
    outcome = verify(story, packed, "--repair-from", other, expect=DAMAGED)
    demand(os.stat(packed_file(packed)).st_ino == before and any("too" in d["what"] for d in outcome["damages"]),
           f"what neither has is told, and left as it was: {outcome}")
    demand(not [n for n in os.listdir(os.path.join(packed, "layers")) if "repair" in n], "nothing is left")
    mended(story, packed, plain, 1)
    story.restore(churn, packed)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def disk_full(story):
    """A disk too small for both forms: a clear error, and what was there is still there."""
    churn, image = churn_in(story, "image")
    small = story.mount_tmpfs("small", 48)
    inside = os.path.join(small, "image")
    shutil.copytree(image, inside, copy_function=lambda a, b: os.system(f"cp --sparse=always '{a}' '{b}'"))
    outcome = story.unmoor("pack", inside, expect=1)
    demand("No space left" in outcome.err, f"pack says why: {outcome}")
    verify(story, inside)
    shutil.rmtree(inside)
    story.unmoor("pack", image)
    shutil.copytree(image, inside)
    with open(os.path.join(small, "filler"), "wb") as filler:
        filler.write(bytes(8 << 20))
    for command in (("unpack", inside), ("restore", "-D", inside, "-d")):
        outcome = story.unmoor(*command, expect=1)
        demand("No space left" in outcome.err, f"says why: {outcome}")
        demand(sorted(os.listdir(small)) == ["filler", "image"], f"nothing is left: {os.listdir(small)}")
    verify(story, inside, "--deep")
    # Packing behind a dump that ended the program: the image is kept plain.
    story.restore(churn, image)
    story.wait_ready(churn)
    shutil.rmtree(inside)
    os.remove(os.path.join(small, "filler"))
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", inside, "--full", "--compress", "lz4")
    demand("not packed" in outcome.err and not only_packed(inside), f"kept plain: {outcome}")
    churn.await_gone()
    story.await_no_orphan()
    story.restore(churn, inside)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


if __name__ == "__main__":
    main({f.__name__: f for f in (packed_and_restored, over_one_another, what_needs_pages_says_so, repaired, disk_full)})

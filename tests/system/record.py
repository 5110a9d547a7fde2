#!/usr/bin/env -S python3 -B
"""Working sets: what a restored program touches is recorded, kept with the image, and read first by the
next restore. It is a hint only: damaged, or left by a killed recorder, it costs nothing but time."""
import ctypes
import fcntl
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess

from harness import LATER, SOURCE, USER_MISTAKE, Busy, Skip, demand, is_alive, main, poll

# Verifies all of its memory at its end, and touches little before.
TOUCHES_LITTLE = ("--threads", 1, "--mib", 256, "--rate", 50, "--sweep-ms", 100000000)
DAMAGED = 3


def working_set(image):
    """(layer id, offset, length) of each range, as docs/format.md says."""
    with open(os.path.join(image, "working_set"), "rb") as file:
        data = file.read()
    demand(data[:8] == b"unmoorWS", data[:8])
    layers, ranges = struct.unpack_from("<QQ", data, 16)
    ids = [data[48 + 16 * i:64 + 16 * i].hex() for i in range(layers)]
    table = 48 + 16 * layers
    found = [struct.unpack_from("<QQQ", data, table + 24 * i) for i in range(ranges)]
    return [(ids[layer], offset, length) for layer, offset, length in found]


def read_image(*words):
    """What tools/read_image.py says, on stdout or stderr."""
    outcome = subprocess.run([os.path.join(SOURCE, "tools", "read_image.py"), *words], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, check=False)
    return outcome.stdout


def drop_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path):
    """Which pages of a file are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = (ctypes.c_ubyte * (size // 4096))()
    demand(libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), pages) == 0, "mincore failed")
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return pages


def record(story, churn, image, *options):
    story.restore(churn, image, "--record", *options)
    churn.await_progress("works while it is recorded")
    status = story.status(churn, expect=LATER)
    demand("mapped" in status.out or "to go" in status.out, f"it is not remapped while it is recorded: {status}")
    return story.unmoor("record", "-t", churn.pid, "--stop", "--json").json()


def recorded_and_read_first(story):
    """What was touched is recorded; the next restore reads that, and nothing else, before criu has begun."""
    churn = story.start("churn", *TOUCHES_LITTLE)
    image = story.dump(churn, "image")
    told = record(story, churn, image)
    demand(told["directory"] == image, told)
    story.wait_ready(churn)
    story.demand_no_agent()
    ranges = working_set(image)
    size = sum(length for _, _, length in ranges)
    demand(size == told["working_set_bytes"] and 0 < size < 128 << 20, f"{size >> 20} MiB are recorded of a program that touched little")
    story.unmoor("verify", image)
    churn.end()
    churn.await_gone()

    pages = {layer: os.path.join(image, "layers", f"{layer}.pages") for layer, _, _ in ranges}
    for path in pages.values():
        drop_cache(path)
    # criu never comes to run, so all that is in the page cache then was read ahead.
    story.unmoor("restore", "-D", image, "-d", "--criu", "/bin/false", expect=1)

    def all_there():
        there = {layer: resident(path) for layer, path in pages.items()}
        return all(all(there[layer][offset // 4096:(offset + length) // 4096]) for layer, offset, length in ranges)
    poll(all_there, "the working set to be read", timeout=20)
    cached = sum(page & 1 for path in pages.values() for page in resident(path)) * 4096
    demand(cached < size + (128 << 20), f"{cached >> 20} MiB are read for a working set of {size >> 20}")

    outcome = story.restore(churn, image, "--json")
    demand(outcome.json()["prefetched_bytes"] == size, outcome.out)
    churn.await_progress("works after its working set was read")
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    outcome = story.restore(churn, image, "--no-prefetch", "--json")
    demand(outcome.json()["prefetched_bytes"] == 0, outcome.out)
    churn.end()


def kept_with_the_image(story):
    """Packed and unpacked it stays, flattened or replaced it goes; damaged it is found, and harmless."""
    churn = story.start("churn", "--threads", 1, "--mib", 32)
    image = story.dump(churn, "image")
    record(story, churn, image)
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    before = working_set(image)
    first = [line.split()[1:] for line in read_image("list", image).splitlines() if line.startswith("first ")]
    demand(first == [[f"{layer}@{offset:x}", str(length)] for layer, offset, length in before],
           "tools/read_image.py, written from docs/format.md alone, reads it too")
    story.unmoor("pack", image)
    demand(working_set(image) == before, "it is packed with the image")
    story.unmoor("unpack", image)
    demand(working_set(image) == before, "and unpacked")
    story.unmoor("verify", image)

    path = os.path.join(image, "working_set")
    with open(path, "rb") as file:
        good = file.read()
    for at in (0, 9, 20, 50, len(good) // 2, len(good) - 1):
        with open(path, "wb") as file:
            file.write(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        outcome = story.unmoor("verify", image, "--quick", expect=DAMAGED)
        demand("working_set" in outcome.out + outcome.err, f"byte {at}: {outcome}")
        demand("working_set" in read_image("verify", image), f"byte {at}: the independent reader finds it")
    with open(path, "wb") as file:
        file.write(good[:-1])
    outcome = story.restore(churn, image)
    demand("working_set" in outcome.err and "nothing is read ahead" in outcome.err, f"it says so: {outcome}")
    churn.await_progress("runs from an image with a damaged working set")
    # The one that is recorded next replaces it.
    story.wait_ready(churn)
    again = story.path("again")
    story.unmoor("dump", "-t", churn.pid, "-D", again, "--full")
    churn.await_gone()
    record(story, churn, again)
    story.wait_ready(churn)
    demand(os.path.exists(os.path.join(again, "working_set")), "recorded")
    story.unmoor("dump", "-t", churn.pid, "-D", again, "-R")
    demand(not os.path.exists(os.path.join(again, "working_set")), "a new checkpoint has no working set yet")
    story.unmoor("rm", image)
    demand(not os.path.exists(image), "removed with it")
    churn.await_sweep()
    churn.end()


def nothing_touched(story):
    """A recording that ends before anything was touched leaves the good one in its place, and says so."""
    churn = story.start("churn", "--threads", 1, "--mib", 32)
    os.kill(churn.pid, signal.SIGSTOP)  # it stays so when it is restored
    image = story.dump(churn, "image")
    churn.await_gone()
    story.restore(churn, image, "--record")
    os.kill(churn.pid, signal.SIGCONT)
    churn.await_progress("works while it is recorded")
    story.unmoor("record", "-t", churn.pid, "--stop")
    good = working_set(image)
    demand(good, "a good one")
    os.kill(churn.pid, signal.SIGKILL)
    churn.await_gone()
    story.restore(churn, image, "--record")
    told = story.unmoor("record", "-t", churn.pid, "--stop", "--json").json()
    demand(told["kept_earlier"] and told["ranges"] == len(good), told)
    demand(working_set(image) == good, "the good one stays")
    os.kill(churn.pid, signal.SIGCONT)
    churn.await_progress("runs on")
    churn.end()


def recorder_killed(story):
    """Whoever is killed, the program runs on and can be remapped; what cannot be recorded is refused."""
    churn = story.start("churn", "--threads", 2, "--mib", 64)
    image = story.dump(churn, "image")
    for options in (("--record", "--mode", "lazy"), ("--record-time", "1s"), ("--record", "--record-time", "soon")):
        outcome = story.unmoor("restore", "-D", image, "-d", *options, expect=USER_MISTAKE)
        demand(outcome.err.startswith("unmoor: "), f"one clear line: {outcome}")
    story.restore(churn, image, "--record")
    with open(os.path.join(story.runtime, f"{churn.pid}.record")) as file:
        recorder = json.load(file)["recorder"]
    story.unmoor("record", "-t", churn.pid, expect=USER_MISTAKE)  # one at a time
    os.kill(recorder, signal.SIGKILL)
    poll(lambda: not is_alive(recorder), "the recorder to be gone")
    outcome = story.unmoor("record", "-t", churn.pid, "--stop", expect=1)
    demand("killed" in outcome.err, f"it says what became of it: {outcome}")
    demand(not os.path.exists(os.path.join(image, "working_set")), "nothing half is kept")
    churn.await_progress("runs on")
    # In the foreground, for a time.
    told = story.unmoor("record", "-t", churn.pid, "--until-time", "100ms", "--json").json()
    demand(told["working_set_bytes"] > 0 and told["elapsed_ns"] >= 100_000_000, told)
    story.unmoor("remap", "-t", churn.pid)
    outcome = story.unmoor("record", "-t", churn.pid, expect=USER_MISTAKE)
    demand("maps no image" in outcome.err, f"why not: {outcome}")
    story.unmoor("record", "-t", churn.pid, "--stop", expect=USER_MISTAKE)
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    churn.end()


def layer_files(image):
    """Device and inode of each pages file, by name."""
    folder = os.path.join(image, "layers")
    infos = {name: os.stat(os.path.join(folder, name)) for name in os.listdir(folder) if name.endswith(".pages")}
    return {name: (info.st_dev, info.st_ino) for name, info in infos.items()}


def reordered(story):
    """A recorded working set is put next to itself on the disk: fewer pieces there, the same memory; whoever shares the
    layer, or maps it, keeps the old file."""
    churn = story.start("churn", *TOUCHES_LITTLE)
    first = story.path("first")
    story.unmoor("dump", "-t", churn.pid, "-D", first, "-R")
    image = story.dump(churn, "image", "--prev-images-dir", first)
    record(story, churn, image)
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    before = layer_files(image)
    shared = {name: file for name, file in layer_files(first).items() if before.get(name) == file}
    demand(shared, "the two images share a layer")
    old = layer_files(first)

    # A program that maps the old file all the while.
    story.restore(churn, image, "--remap", "off")
    plan = story.unmoor("reorder", image, "--dry-run", "--json").json()
    demand(layer_files(image) == before and plan["dry_run"] and plan["written_layers"] > 0, f"a plan only: {plan}")
    told = story.unmoor("reorder", image, "--json").json()
    size = sum(length for _, _, length in working_set(image))
    demand(told["working_set_bytes"] == size <= told["placed_bytes"] + (1 << 20), f"{size}: {told}")
    demand(told["written_bytes"] == plan["written_bytes"] and told["written_layers"] > 0, f"{plan}, {told}")
    demand(layer_files(first) == old and layer_files(image) != before, "only this image has the new file")
    churn.await_progress("works on while the file it maps is replaced")
    for each in (image, first):
        story.unmoor("verify", each, "--deep")
    after = story.path("after")
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", after, "-R", "--while-mapped", "--prev-images-dir", image, "--json")
    report = outcome.json()
    demand(report["remapped_first"] and not report["still_mapped"], f"it maps another file than its parent has: {report}")
    demand(report["written_bytes"] < 128 << 20, f"but the pages are the same, and are shared: {report}")
    churn.await_progress("goes on")
    churn.end()  # and verifies all of its memory
    churn.await_gone()
    for each in (first, image, after):
        story.restore(churn, each, "--json")
        churn.await_progress("works")
        story.wait_ready(churn)
        churn.end()
        churn.await_gone()
    if told["extents_before"] is None:
        raise Skip("this file system does not tell where files lie (FIEMAP); all else was tested")
    story.say(f"{told['placed_bytes'] >> 10} KiB in {told['extents_before']} pieces, then in {told['extents_after']}")
    if told["extents_after"] >= told["extents_before"] / 2:
        raise Busy(f"a disk that had but small holes just then: {told}")
    again = story.unmoor("reorder", image, "--json").json()
    demand(again["extents_before"] == told["extents_after"] >= again["extents_after"], f"it stays so: {told}, {again}")


def not_reordered(story):
    """What cannot be reordered is refused in one line, and a full disk leaves everything as it was."""
    churn = story.start("churn", "--threads", 1, "--mib", 32)
    image = story.dump(churn, "image")
    outcome = story.unmoor("reorder", image, expect=USER_MISTAKE)
    demand("--record" in outcome.err, f"it says how to record: {outcome}")
    story.unmoor("reorder", story.path("nothing"), expect=USER_MISTAKE)
    record(story, churn, image)
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    held = os.open(image, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    outcome = story.unmoor("reorder", image, expect=USER_MISTAKE)
    demand(str(os.getpid()) in outcome.err, f"it says who has it: {outcome}")
    story.unmoor("reorder", image, "--dry-run")
    os.close(held)

    small = story.mount_tmpfs("small", 48)
    inside = os.path.join(small, "image")
    shutil.copytree(image, inside, copy_function=lambda a, b: subprocess.run(["cp", "--sparse=always", a, b], check=True))
    files = layer_files(inside)
    outcome = story.unmoor("reorder", inside, expect=1)
    demand("No space left" in outcome.err, f"it says why: {outcome}")
    demand(layer_files(inside) == files and len(os.listdir(os.path.join(inside, "layers"))) == 2 * len(files), "nothing is left")
    story.unmoor("verify", inside, "--deep")
    story.restore(churn, inside)
    churn.await_sweep()
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()

    story.unmoor("pack", image)
    outcome = story.unmoor("reorder", image, expect=USER_MISTAKE)
    demand("unpack" in outcome.err, f"a packed image has to be unpacked: {outcome}")


if __name__ == "__main__":
    main({f.__name__: f for f in (recorded_and_read_first, kept_with_the_image, nothing_touched, recorder_killed,
                                  reordered, not_reordered)})

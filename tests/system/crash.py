#!/usr/bin/env -S python3 -B
"""Every named fault point of the commands that write: unmoor is killed there as by kill -9, and then the
old or the new image is there whole, a program that was left running goes on, and the next command
removes what was left."""
import ctypes
import os
import re
import shutil
import signal
import struct
import subprocess
import time

from harness import SOURCE, Busy, demand, exists, main, poll, reap
from store import DAMAGED, data_ranges, flip, layer_files, verify

KILLED = -signal.SIGKILL
PUBLISH = ("publish.before_sync", "publish.before_rename", "publish.after_rename")
POINTS = {
    "dump": ("dump.link", "dump.open", "dump.pages", "dump.close", "dump.complete", "layer.write", "layer.before_sync",
             *PUBLISH),
    # Behind its rounds it is a dump like any: publishing is the same.
    "pre_dump": ("dump.round", "dump.written_ahead", "dump.pages", "dump.complete", "layer.before_sync"),
    "flatten": ("layer.write", "layer.before_sync", "flatten.pages_written", "flatten.before_publish", *PUBLISH),
    "import": ("layer.write", "layer.before_sync", "import.pages_written", *PUBLISH),
    "export": PUBLISH,
    "rm": ("rm.after_rename",),
    "gc": ("gc.before_remove",),
    "repair": ("repair.before_rename",),
    "reorder": ("reorder.set_written", "reorder.before_rename", "reorder.after_rename"),
    "restore": ("restore.before_criu", "restore.before_agent"),
    "remap": ("remap.before_swap",),
}
ELSEWHERE = {  # made to fail, or killed at, by the tests named
    "fill.piece": "tests/system/modes.py, eager_restore_killed",
    "agent.begin_again": "tests/system/faults.py, worker_fails",
    "agent.start_worker": "tests/system/faults.py, worker_cannot_start",
    "kernel.collapse": "tests/system/churn.py, without_huge_pages",
    "kernel.uffdio_move": "tests/system/churn.py, without_uffdio_move",
    "pack.frame": "tests/unit/image/packed_test.cpp",
    "pack.table": "tests/unit/image/packed_test.cpp",
    "unpack.frame": "tests/unit/image/packed_test.cpp",
    "unpack.end": "tests/unit/image/packed_test.cpp",
    "lazy.bring": "tests/system/lazy.py: holds back what nobody waits for",
    "lazy.bring_rest": "tests/system/lazy.py, working_set_first",
    "lazy.event_read": "tests/system/lazy.py, killed_between_reading_and_recording",
    "restore.program_runs": "tests/system/faults.py, restore_killed_when_all_is_done",
    "local.before_swap": "tests/unit/remap_local/limits_test.cpp",
}


def points_in_the_source():
    found = set()
    for folder, _, names in os.walk(os.path.join(SOURCE, "src")):
        for name in names:
            with open(os.path.join(folder, name), errors="replace") as file:
                found |= set(re.findall(r'FaultPoint\("([a-z_.]+)"\)', file.read()))
    return found


def entries(folder):
    return sorted(os.listdir(folder))


class Bench:
    """A churn that runs, an image of it with a delta, and the folder all of it is in."""

    def __init__(self, story):
        self.story = story
        self.store = story.path("store")
        os.mkdir(self.store)
        self.churn = story.start("churn", "--mib", 4, "--threads", 1, "--regions", 2)
        self.churn.await_progress()
        first = os.path.join(self.store, "first")
        self.image = os.path.join(self.store, "image")
        story.unmoor("dump", "-t", self.churn.pid, "-D", first, "-R")
        self.churn.await_progress(amount=200)
        story.unmoor("dump", "-t", self.churn.pid, "-D", self.image, "-R", "--prev-images-dir", first)
        story.unmoor("rm", first)

    def killed(self, point, *words):
        outcome = self.story.unmoor(*words, expect=None, environment={"UNMOOR_FAULT": f"{point}:kill"})
        demand(outcome.code == KILLED, f"{words[0]} passes {point}: {outcome}")

    def clean(self, *more):
        demand(entries(self.store) == sorted(["image", *more]), f"left over: {entries(self.store)}")
        verify(self.story, self.image)


def dump(bench, point, *how):
    how = how or ("--prev-images-dir", bench.image)
    words = ("dump", "-t", bench.churn.pid, "-D", bench.image, "-R", *how)
    bench.killed(point, *words)
    verify(bench.story, bench.image)
    bench.churn.await_progress("goes on after unmoor was killed")
    # criu, left alone, may not have let go of the program yet.
    poll(lambda: bench.story.unmoor(*words, expect=None).code == 0, "the next dump works", 60, 0.2)
    bench.clean()


def pre_dump(bench, point):
    dump(bench, point, "--pre-dump", "--full")
    bench.story.wait_ready(bench.churn)


def flatten(bench, point):
    bench.churn.await_progress(amount=200)
    bench.story.unmoor("dump", "-t", bench.churn.pid, "-D", bench.image, "-R", "--prev-images-dir", bench.image)
    bench.killed(point, "flatten", bench.image)
    verify(bench.story, bench.image)
    bench.story.unmoor("flatten", bench.image)
    bench.clean()


def criu_directory(bench):
    folder = bench.story.path("stock")
    if not os.path.exists(folder):
        bench.story.unmoor("export", bench.image, folder)
    return folder


def import_(bench, point):
    out = os.path.join(bench.store, "imported")
    bench.killed(point, "import", criu_directory(bench), out)
    if os.path.exists(out):
        demand(point == "publish.after_rename", "it appears complete")
        verify(bench.story, out)
        bench.story.unmoor("gc", bench.store)
    else:
        bench.story.unmoor("import", criu_directory(bench), out)
        verify(bench.story, out)
    bench.clean("imported")
    bench.story.unmoor("rm", out)


def export(bench, point):
    out = os.path.join(bench.store, "plain")
    bench.killed(point, "export", bench.image, out)
    if not os.path.exists(out):
        bench.story.unmoor("export", bench.image, out)
    bench.clean("plain")
    demand(entries(out) == entries(criu_directory(bench)), "all of it is there")
    shutil.rmtree(out)


def copy(bench):
    out = os.path.join(bench.store, "copy")
    bench.story.unmoor("flatten", bench.image, out)
    return out


def rm(bench, point):
    bench.killed(point, "rm", copy(bench))
    bench.story.unmoor("gc", bench.store)
    bench.clean()


def gc(bench, point):
    os.rename(copy(bench), os.path.join(bench.store, "copy.partial-AbC123"))
    bench.killed(point, "gc", bench.store)
    bench.story.unmoor("gc", bench.store)
    bench.clean()


def repair(bench, point):
    sound = copy(bench)
    pages, _ = layer_files(sound)
    damaged = os.path.join(bench.store, "damaged")
    subprocess.run(["cp", "-a", sound, damaged], check=True)  # holes stay holes
    pages = pages.replace(sound, damaged)
    flip(pages, max(data_ranges(pages), key=lambda part: part[1] - part[0])[0])
    bench.killed(point, "verify", damaged, "--repair-from", sound)
    verify(bench.story, damaged, expect=DAMAGED)
    verify(bench.story, damaged, "--repair-from", sound)
    demand(not [name for name in os.listdir(os.path.dirname(pages)) if "repair" in name], "nothing is left of the first")
    verify(bench.story, damaged)
    for name in ("damaged", "copy"):
        bench.story.unmoor("rm", os.path.join(bench.store, name))
    bench.clean()


def xxh3(data):
    library = ctypes.CDLL("libxxhash.so.0")
    library.XXH3_64bits.restype = ctypes.c_uint64
    library.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    return library.XXH3_64bits(data, len(data))


def write_working_set(image, ranges):
    """Of the only layer: (offset, length) in the order in which they are to be read; docs/format.md, "Working set"."""
    pages, _ = layer_files(image)
    identity = bytes.fromhex(os.path.basename(pages)[:-len(".pages")])
    data = struct.pack("<8sIIQQQQ", b"unmoorWS", 1, 48, 1, len(ranges), sum(length for _, length in ranges), 0) + identity
    data += b"".join(struct.pack("<QQQ", 0, offset, length) for offset, length in ranges)
    with open(os.path.join(image, "working_set"), "wb") as file:
        file.write(data + struct.pack("<Q", xxh3(data)))


def reorder(bench, point):
    # Where the disk has nothing but small holes just then, nothing lies better and the file stays.
    for _ in range(8):
        image = copy(bench)
        pages, _ = layer_files(image)
        parts = [(at, 64 << 10) for begin, end_ in data_ranges(pages)
                 for at in range(begin, end_ - (64 << 10), 256 << 10)]
        write_working_set(image, parts[::-1])
        before = os.stat(pages).st_ino
        outcome = bench.story.unmoor("reorder", image, expect=None, environment={"UNMOOR_FAULT": f"{point}:kill"})
        if outcome.code == KILLED:
            break
        demand(outcome.code == 0, f"reorder passes {point}: {outcome}")
        bench.story.unmoor("rm", image)
    else:
        raise Busy(f"the file system never placed it better: {outcome}")
    verify(bench.story, image)
    demand((os.stat(pages).st_ino == before) == (point != "reorder.after_rename"), "the old file or the new one")
    told = bench.story.unmoor("reorder", image, "--json").json()
    demand(len(entries(os.path.dirname(pages))) == 2, f"nothing is left of the first: {entries(os.path.dirname(pages))}")
    # Before the rename nothing had been done. Behind it there may be nothing to do.
    no_better = told["extents_after"] == told["extents_before"]
    demand(told["written_layers"] == 1 or no_better or point == "reorder.after_rename", f"it is done now: {told}")
    verify(bench.story, image)
    bench.story.unmoor("rm", image)
    bench.clean()


def end(churn):
    if exists(churn.pid):
        os.kill(churn.pid, signal.SIGKILL)
        churn.await_gone()


def remap(bench, point):
    """The agent's workers are killed there, one after the other; others take over from the agent."""
    churn = bench.churn
    end(churn)
    bench.story.restore(churn, bench.image, environment={"UNMOOR_FAULT": f"{point}:kill"})
    churn.await_progress("works while its agents are killed")

    def pauses():
        before = bench.story.agents()
        time.sleep(1)
        return before and before == bench.story.agents()
    poll(pauses, "the pause before one more worker")  # in which no thread is borrowed
    for pid in bench.story.agents():
        os.kill(pid, signal.SIGKILL)
    poll(lambda: bench.story.unmoor("remap", "-t", churn.pid, expect=None).code == 0, "a remap of another agent's", 60, 0.2)
    bench.story.wait_ready(churn)
    churn.await_sweep()
    bench.clean()


def restore(bench, point):
    churn = bench.churn
    end(churn)

    def nothing_left():
        reap(churn.pid)
        return not exists(churn.pid) and not bench.story.marked("churn")
    for _ in range(5):  # criu may be done, or not quite
        bench.killed(point, "restore", "-D", bench.image, "-d")
        poll(nothing_left, "nothing of the program is left")
    bench.story.restore(churn, bench.image)
    bench.story.wait_ready(churn)
    churn.await_progress("works")
    bench.clean()


def every_fault_point(story):
    known = set(ELSEWHERE).union(*POINTS.values())
    found = points_in_the_source()
    demand(known <= found, f"points that are gone: {known - found}")
    demand(found <= known, f"points that nobody kills at: {found - known}")
    story.say(f"points of other tests: {sorted(found - set().union(*POINTS.values()))}")
    bench = Bench(story)
    for command, points in POINTS.items():
        function = {"import": import_}.get(command) or globals()[command]
        for point in points:
            function(bench, point)
        story.say(f"{command}: killed at {', '.join(points)}")
    bench.churn.await_sweep()
    bench.churn.end()


if __name__ == "__main__":
    main({"every_fault_point": every_fault_point})

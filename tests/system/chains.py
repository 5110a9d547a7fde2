#!/usr/bin/env -S python3 -B
"""Incremental dumps: chains of directories, each complete by itself, whatever becomes of the others.

Programs verify their own memory, so a page that shows a parent's old bytes, or misses a change, is
found by the program. Bytes are exact, so they may be demanded; times are not.
"""
import json
import os
import random
import shutil
import signal
import sys

from harness import UNMOOR, Program, children, demand, is_alive, main, poll, state, vmas
from redis import Redis, Writer
from tree import Tree

PAGE = 4096


def dump(story, program, name, *arguments):
    """Like story.dump, but returns the folder and what the dump said."""
    folder = story.path(name)
    outcome = story.unmoor("dump", "-t", program.pid, "-D", folder, "--json", *arguments)
    report = outcome.json()
    if outcome.err:
        story.say(outcome.err.strip())
    story.say(f"{name}: {report['written_bytes'] >> 10} KiB written, {report['layer_bytes'] >> 10} KiB in "
              f"layers, parent {report['parent'] and os.path.basename(report['parent'])}, "
              f"{report['elapsed_ns'] / 1e6:.0f} ms")
    return folder, report


def snapshot(pid):
    """The contents of all private anonymous memory of a stopped process: page address -> bytes, pages of
    zeros left out."""
    pages = {}
    zero = bytes(PAGE)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for vma in vmas(pid):
            if vma.inode or vma.protection[3] != "p" or vma.name in ("[stack]", "[vvar]", "[vdso]", "[vsyscall]",
                                                                    "[vvar_vclock]"):
                continue
            if "r" not in vma.protection:
                continue
            memory.seek(vma.begin)
            data = memory.read(vma.end - vma.begin)
            for at in range(0, len(data), PAGE):
                if data[at:at + PAGE] != zero:
                    pages[vma.begin + at] = data[at:at + PAGE]
    return pages


def stop(program):
    os.kill(program.pid, signal.SIGSTOP)
    poll(lambda: state(program.pid) == "T", "the program stops")


# The generations of programs that verify themselves.

def six_generations(story):
    """Generations of churn with every way to change memory, their parents chosen and deleted at random."""
    chance = random.Random(5)
    churn = story.start("churn", "--threads", 2, "--mib", 48, "--sparse", "--dontneed", "--remapper",
                        "--brk", "--mprotect", "--munmap", "--hazard-mib", 4, "--rate", 1000)
    churn.await_progress()
    there = []
    shared = 0
    for generation in range(6):
        options = []
        if there and chance.random() < 0.4:
            options = ["--prev-images-dir", chance.choice(there)]
        folder, report = dump(story, churn, f"generation-{generation}", *options)
        shared += report["parent"] is not None
        churn.await_gone()
        story.await_no_orphan()
        there.append(folder)
        # The parents go, some before, some after the restore.
        for old in [f for f in there[:-1] if chance.random() < 0.5]:
            shutil.rmtree(old)
            there.remove(old)
        story.restore(churn, folder)
        churn.await_progress("works while direct-mapped or being remapped")
        story.wait_ready(churn)
        churn.await_sweep()
        story.demand_no_agent()
    demand(shared >= 3, f"only {shared} of 6 generations used a parent")
    # An older one, if one is left, is as good as on its first day.
    churn.end()
    churn.await_gone()
    for folder in there:
        story.restore(churn, folder)
        story.wait_ready(churn)
        churn.await_sweep()
        churn.end()
        churn.await_gone()


def bytes_follow_what_changed(story):
    """At about 1 % dirty the delta holds at most 1.1 times the pages that changed, whether its parent is named or
    known from the dump before."""
    churn = story.start("churn", "--threads", 1, "--mib", 64, "--rate", 300, "--sweep-ms", 3000)
    churn.await_progress("fills its memory", "sweeps", 1)
    parent = None
    for generation in range(4):
        stop(churn)
        now = snapshot(churn.pid)
        options = ["-R"] + (["--full"] if not parent else [] if generation == 2 else ["--prev-images-dir", parent])
        folder, report = dump(story, churn, f"generation-{generation}", *options)
        if parent:
            changed = sum(now.get(page) != before.get(page) for page in now.keys() | before.keys())
            share = changed / len(now)
            story.say(f"{changed} pages changed, {100 * share:.2f} %; {report['written_bytes'] // PAGE} written")
            demand(report["written_bytes"] <= 1.1 * changed * PAGE,
                   f"{report['written_bytes']} bytes for {changed} changed pages")
            demand(0 < share < 0.1, "the test wants a few pages to change")
            shown = story.unmoor("show", "-D", folder, "--json").json()
            demand(any(vma.get("deltas") for task in shown["tasks"] for vma in task["vmas"]),
                   "show tells no deltas")
            shutil.rmtree(parent)
        parent, before = folder, now
        os.kill(churn.pid, signal.SIGCONT)
        churn.await_progress(amount=200)
    os.kill(churn.pid, signal.SIGKILL)
    churn.await_gone()
    story.restore(churn, parent)
    os.kill(churn.pid, signal.SIGCONT)  # it was stopped when dumped
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def redis_generations(story):
    """redis, three generations, the digest equal each time, the parent deleted before the restore."""
    redis = Redis(story)
    redis.populate()
    previous = None
    for generation in range(3):
        digest = redis.digest()
        folder, report = dump(story, redis.program, f"generation-{generation}")
        redis.program.await_gone()
        story.await_no_orphan()
        if previous:
            demand(report["parent"] == previous, f"its parent is {report['parent']}, not {previous}")
            demand(report["written_bytes"] < report["layer_bytes"] / 4,
                   f"{report['written_bytes']} of {report['layer_bytes']} bytes were written anew")
            shutil.rmtree(previous)
        previous = folder
        story.restore(redis.program, folder)
        demand(redis.digest() == digest, f"other data after restore {generation}")
        writer = Writer(redis.port, generation)
        writer.start()
        poll(lambda: len(writer.acknowledged) >= 1000 or writer.error, "redis to take 1000 writes")
        redis.expected.update(writer.finish())
        story.wait_ready(redis.program)
        redis.demand_own_writes()
    os.kill(redis.program.pid, signal.SIGKILL)
    redis.program.await_gone()


def superseded(story, program, previous, folder):
    """The program has been dumped into `folder` and ended; the directory of before goes. Returns `folder`."""
    program.await_gone()
    story.await_no_orphan()
    if previous:
        shutil.rmtree(previous)
    return folder


def tree_generations(story):
    """A parent and two forked children; each member's memory is compared with its own."""
    tree = Tree(story, "--mib", 32)
    previous = None
    for generation in range(3):
        folder, report = dump(story, tree.parent, f"generation-{generation}")
        previous = superseded(story, tree, previous, folder)
        story.restore(tree.parent, folder)
        for member in tree.members:
            story.wait_ready(member)
        tree.await_rounds("works after the remap")


# A program of which it is known what it does with each page.

SCRIPTED = r'''
import ctypes, json, mmap, os, sys, time
report, command = sys.argv[1:]
MIB = 1 << 20
def content(page, seed):
    return (b"%016x" % (page * 1000003 + seed)) * 256
class Area:
    def __init__(self, mib):
        self.memory = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.seeds = [None] * (mib * 256)      # None: zeros
    def fill(self, begin, end, seed):
        for page in range(begin, end):
            self.memory[page * 4096:(page + 1) * 4096] = content(page, seed)
            self.seeds[page] = seed
    def zero(self, begin, end):
        self.memory[begin * 4096:end * 4096] = bytes((end - begin) * 4096)
        self.seeds[begin:end] = [None] * (end - begin)
    def drop(self, begin, end):
        self.memory.madvise(mmap.MADV_DONTNEED, begin * 4096, (end - begin) * 4096)
        self.seeds[begin:end] = [None] * (end - begin)
    def resize(self, pages):
        self.memory.resize(pages * 4096)
        self.seeds = self.seeds[:pages] + [None] * (pages - len(self.seeds))
    def check(self):
        for page, seed in enumerate(self.seeds):
            want = bytes(4096) if seed is None else content(page, seed)
            if self.memory[page * 4096:(page + 1) * 4096] != want:
                return f"page {page} of {len(self.seeds)} is not what was written ({seed})"
def protect(area, begin, end, protection):
    view = ctypes.c_char.from_buffer(area.memory)
    at = ctypes.c_void_p(ctypes.addressof(view) + begin * 4096)
    del view
    if ctypes.CDLL(None).mprotect(at, ctypes.c_size_t((end - begin) * 4096), protection):
        raise OSError("mprotect")
areas = {}
children = []
def tell(**more):
    with open(report + ".new", "w") as file:
        json.dump({"ready": True, "pid": os.getpid(), **more}, file)
    os.rename(report + ".new", report)
last = 0
tell(done=0)
while True:
    try:
        number, code = json.load(open(command))
    except (OSError, ValueError):
        number, code = last, ""
    if number != last:
        last = number
        error = ""
        try:
            exec(code)
            for name, area in areas.items():
                error = error or (area.check() and f"{name}: {area.check()}") or ""
        except Exception as failure:
            error = repr(failure)
        tell(done=last, errors=1 if error else 0, error=error)
    time.sleep(0.005)
'''


class Scripted(Program):
    """Does what it is told, and checks all its memory afterwards."""

    def __init__(self, story):
        report, self.command = story.path("scripted.json"), story.path("command.json")
        with open(story.path("scripted.py"), "w") as file:
            file.write(SCRIPTED)
        popen = story.popen([sys.executable, "-B", story.path("scripted.py"), report, self.command])
        super().__init__(story, popen.pid, report, popen)
        self.number = 0
        poll(lambda: self.report().get("ready"), "the scripted program is ready")

    def do(self, code="pass"):
        self.number += 1
        with open(self.command + ".new", "w") as file:
            json.dump([self.number, code], file)
        os.rename(self.command + ".new", self.command)
        poll(lambda: self.report().get("done") == self.number or not is_alive(self.pid), f"it does {code}")
        self.demand_alive(f"after {code}")

    def next_generation(self, name, *arguments, growing=()):
        """Dumps it, restores it from there, verifies all while direct-mapped, does `growing` meanwhile,
        and once more after the remap; the parent is gone by then."""
        folder, report = dump(self.story, self, name, *arguments)
        self.await_gone()
        self.story.await_no_orphan()
        if report["parent"]:
            shutil.rmtree(report["parent"])
        self.story.restore(self, folder, "--remap", "off")
        self.do()
        for code in growing:
            self.do(code)
        self.story.unmoor("remap", "-t", self.pid)
        demand(self.story.status(self).code == 0, "READY after the remap")
        self.do()
        return folder, report


def vanished_pages(story):
    """Pages given back, and pages overwritten by zeros, read zero after the restore and not what the
    parent had there; and so in the generation after that."""
    program = Scripted(story)
    program.do("areas['a'] = Area(8); areas['a'].fill(0, 2048, 1)")
    program.next_generation("first")
    program.do("a = areas['a']; a.drop(100, 200); a.zero(300, 310); a.fill(2000, 2001, 2)")
    _, report = program.next_generation("second")
    demand(report["parent"] and report["written_bytes"] < 4 << 20, f"no delta: {report}")
    program.do("a.fill(150, 160, 3); a.drop(2040, 2048); a.drop(0, 8)")
    _, report = program.next_generation("third", growing=["a.drop(400, 500)", "a.fill(410, 420, 4)"])
    demand(report["parent"] and report["written_bytes"] < 4 << 20, f"no delta: {report}")


def changed_vmas(story):
    """VMAs that grew, shrank, moved, were re-protected, vanished or are new."""
    program = Scripted(story)
    program.do("for name in 'abcde': areas[name] = Area(8); areas[name].fill(0, 2048, 1)")
    program.next_generation("first")
    program.do("areas['a'].resize(2600); areas['a'].fill(2300, 2310, 2)\n"
               "areas['b'].resize(1000)\n"
               "areas.pop('c').memory.close()\n"
               "areas['d'].resize(20000)\n"
               "areas['f'] = Area(8); areas['f'].fill(5, 2040, 3)")
    _, report = program.next_generation("second", growing=[
        # What shrank before must grow into zeros, not into what the parent had there.
        "areas['b'].resize(1800)", "areas['a'].resize(3000)", "areas['a'].fill(2900, 2910, 4)"])
    demand(report["parent"], "nothing of the parent was used")
    program.do("areas['e'].resize(2000); areas['f'].drop(0, 1000)")
    program.next_generation("third", growing=["areas['e'].resize(2048)"])


def forks(story):
    """A child made after the parent checkpoint has memory of its own in the next one."""
    program = Scripted(story)
    program.do("areas['a'] = Area(8); areas['a'].fill(0, 2048, 1)")
    program.next_generation("first")
    program.do("pid = os.fork()\n"
               "if pid == 0:\n"
               "    report += '.child'; command += '.child'; last = 0; a = areas['a']\n"
               "    a.fill(0, 100, 7); tell(done=0)\n"
               "else: areas['a'].fill(50, 60, 8)")
    child = poll(lambda: children(program.pid), "the child")[0]
    inner = Program(story, child, program.report_path + ".child")
    poll(lambda: inner.report().get("ready"), "the child is ready")
    for name in ("second", "third"):
        folder, report = dump(story, program, name)
        program.await_gone()
        story.await_no_orphan()
        shutil.rmtree(report["parent"])
        story.restore(program, folder)
        program.do()
        with open(program.command + ".child", "w") as file:
            json.dump([program.number, "areas['a'].fill(1000, 1010, 9)"], file)
        poll(lambda: inner.report().get("done") == program.number, "the child verified its memory")
        for member in (program, inner):
            story.wait_ready(member)


def parent_must_be_usable(story):
    """A parent that was asked for and cannot be used is an error before the program is touched; one only
    known of is left out, aloud when it is damaged; another program's is of no use and does no harm."""
    program = Scripted(story)
    program.do("areas['a'] = Area(8); areas['a'].fill(0, 2048, 1)")
    target = story.path("image")
    for parent in (story.path("absent"), story.folder):
        outcome = story.unmoor("dump", "-t", program.pid, "-D", target, "--prev-images-dir", parent,
                               expect=2)
        demand("--prev-images-dir" in outcome.err and parent in outcome.err, f"unclear: {outcome}")
        demand(not os.path.exists(target), "something was written")
        program.do()
    other = story.start("churn", "--mib", 8)
    foreign, _ = dump(story, other, "foreign", "-R")
    outcome = story.unmoor("dump", "-t", program.pid, "-D", target, "--prev-images-dir", foreign, "-R")
    demand("in full" in outcome.err, f"it is not said that the dump is a full one: {outcome}")
    program.do()
    # The image just made is known now, and damaged.
    manifest = os.path.join(target, "manifest.json")
    with open(manifest, "r+b") as file:
        file.seek(100)
        file.write(b"#")
    outcome = story.unmoor("dump", "-t", program.pid, "-D", story.path("second"), "-R")
    demand("damaged" in outcome.err and "in full" in outcome.err, f"not said aloud: {outcome}")
    _, report = dump(story, program, "third")
    demand(report["parent"] == story.path("second"), f"its own last dump is not its parent: {report}")
    program.await_gone()
    story.await_no_orphan()
    story.restore(program, story.path("third"))
    story.wait_ready(program)
    program.do()
    _, report = dump(story, program, "fourth", "--full", "-R")
    demand(report["parent"] is None and report["written_bytes"] == report["layer_bytes"], "--full shares")


def other_file_system(story):
    """Layers that cannot be linked are copied, and it is said."""
    mount = story.mount_tmpfs("elsewhere", 200)
    program = Scripted(story)
    program.do("areas['a'] = Area(8); areas['a'].fill(0, 2048, 1)")
    program.next_generation("first")
    folder = os.path.join(mount, "image")
    outcome = story.unmoor("dump", "-t", program.pid, "-D", folder)
    demand("copied" in outcome.err, f"the copy is not mentioned: {outcome}")
    program.await_gone()
    story.await_no_orphan()
    shutil.rmtree(story.path("first"))
    story.restore(program, folder)
    story.wait_ready(program)
    program.do()
    # Over the directory it came from.
    folder, report = dump(story, program, "elsewhere/image")
    demand(report["parent"] == folder, f"not its own parent: {report}")
    program.await_gone()
    story.await_no_orphan()
    story.restore(program, folder)
    story.wait_ready(program)
    program.do()
    os.kill(program.pid, signal.SIGKILL)
    program.await_gone()


def layers_of(story, image):
    return len(story.unmoor("show", "-D", image, "--json").json()["layers"])


def flatten_of_a_mapped_chain(story):
    """A chain is flattened while a program maps its layers; and by a dump, once it is long."""
    program = Scripted(story)
    program.do("areas['a'] = Area(8); areas['a'].fill(0, 2048, 1)")
    first, _ = dump(story, program, "first", "-R")
    program.do("areas['a'].fill(10, 20, 2); areas['a'].drop(100, 200)")
    second, _ = dump(story, program, "second", "--prev-images-dir", first)
    program.await_gone()
    story.await_no_orphan()
    shutil.rmtree(first)
    story.restore(program, second, "--remap", "off")
    program.do()
    demand(layers_of(story, second) > 1, "it is a chain")
    story.unmoor("flatten", second)
    demand(layers_of(story, second) == 1, "it is none any more")
    again = story.unmoor("flatten", second, "--json").json()
    demand(again["was_flat"] and again["written_bytes"] == 0, f"nothing is left to do: {again}")
    program.do("areas['a'].drop(30, 40)")
    story.unmoor("remap", "-t", program.pid)
    program.do("areas['a'].fill(300, 310, 3)")
    # Its parent is the flat one: the same checkpoint.
    third, report = dump(story, program, "third")
    demand(report["parent"] == second and not report["flattened"], f"a delta: {report}")
    program.await_gone()
    story.await_no_orphan()
    story.restore(program, third)
    story.wait_ready(program)
    program.do("areas['a'].fill(500, 510, 4)")
    fourth, report = dump(story, program, "fourth", "--flatten-after", "2")
    demand(report["flattened"] and layers_of(story, fourth) == 1, f"flattened by itself: {report}")
    for image in (third, fourth):
        story.unmoor("verify", image)
    program.await_gone()
    story.await_no_orphan()
    story.restore(program, fourth)
    program.do()
    story.wait_ready(program)
    shares = [g["dirty_share"] for g in story.unmoor("log", story.folder, "--json").json()["generations"]]
    demand(max(shares[-2:]) < 0.5, f"log tells what the dumps wrote: {shares}")


def flatten_while_it_is_remapped(story):
    """A chain is flattened while the agent moves its program off the old layers: neither minds the other."""
    churn = story.start("churn", "--threads", 2, "--mib", 40, "--dontneed", "--rate", 1000)
    churn.await_sweep()
    first, _ = dump(story, churn, "first", "-R")
    churn.await_sweep()
    image, _ = dump(story, churn, "image0", "--prev-images-dir", first)
    churn.await_gone()
    story.await_no_orphan()
    shutil.rmtree(first)
    for turn in range(2):
        demand(layers_of(story, image) > 1, "it is a chain")
        story.restore(churn, image, "--remap", "off")
        kept = story.path(f"kept{turn}")
        shutil.copytree(image, kept, copy_function=os.link)
        flatten = story.popen([UNMOOR, "flatten", image])
        story.unmoor("remap", "-t", churn.pid)
        demand(flatten.wait(60) == 0, "the flatten went through")
        demand(layers_of(story, image) == 1, "it is no chain any more")
        story.unmoor("gc", story.folder)
        churn.await_sweep()
        shutil.rmtree(image)
        image, report = dump(story, churn, f"image{turn + 1}", "--prev-images-dir", kept)
        demand(report["parent"] == kept, f"the same checkpoint as a chain: {report}")
        shutil.rmtree(kept)
        churn.await_gone()
        story.await_no_orphan()
    story.unmoor("verify", image)
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


if __name__ == "__main__":
    main({f.__name__: f for f in (
        six_generations, bytes_follow_what_changed, redis_generations, tree_generations, vanished_pages,
        changed_vmas, forks, parent_must_be_usable, other_file_system,
        flatten_of_a_mapped_chain, flatten_while_it_is_remapped)})

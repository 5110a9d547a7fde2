#!/usr/bin/env -S python3 -B
"""Dumps of programs that still map their image, in whole or in part: only what was written since is read,
and what the layer shows stays in the layer.

Programs verify their own memory; the parent is deleted before each restore.
"""
import contextlib
import json
import os
import random
import shutil
import signal
import time

import chains
from chains import Scripted
from harness import UNMOOR, Late, Program, children, demand, main, poll, read_proc, vmas
from redis import Redis, Writer
from store import CRIU
from tree import Tree


def dump(story, program, name, *arguments):
    return chains.dump(story, program, name, "--while-mapped", *arguments)


def live_to_the_end(story, churn, folder):
    """Dumped into `folder` last of all: restored, remapped, all of its memory checked, ended."""
    churn.await_gone()
    story.await_no_orphan()
    story.restore(churn, folder)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def mapped_bytes(pid):
    return sum(v.end - v.begin for v in vmas(pid) if "/layers/" in v.name)


class Mapped(Scripted):
    """A scripted program that is restored, changed and dumped again without ever being remapped."""

    def begin(self, code):
        self.do(code)
        folder, _ = dump(self.story, self, "generation-0")
        self.await_gone()
        self.story.await_no_orphan()
        self.generation, self.folder = 0, folder
        self.story.restore(self, folder, "--remap", "off")
        self.do()

    def again(self, code, *arguments, most=None, remapped_first=False):
        """The next generation; at most so many bytes may be written for it."""
        self.do(code)
        self.generation += 1
        folder, report = dump(self.story, self, f"generation-{self.generation}", *arguments)
        demand(report["still_mapped"] != remapped_first, f"remapped first: {report}")
        demand(most is None or report["written_bytes"] <= most, f"more than {most} bytes: {report}")
        self.await_gone()
        self.story.await_no_orphan()
        shutil.rmtree(self.folder)
        self.folder = folder
        self.story.restore(self, folder, "--remap", "off")
        self.do()
        return report

    def finish(self):
        self.story.unmoor("verify", self.folder)
        plain = self.story.path("plain-mapped")
        self.story.unmoor("export", self.folder, plain)
        self.story.unmoor("remap", "-t", self.pid)
        demand(self.story.status(self).code == 0, "READY after the remap")
        self.do()
        # In the end it is as if it had never been mapped.
        _, report = dump(self.story, self, "last")
        demand(not report["still_mapped"], f"{report}")
        self.await_gone()
        self.story.await_no_orphan()
        # And the one made while it was mapped is plain anonymous memory for stock criu.
        restored = self.story.popen([CRIU, "restore", "-D", plain, "-d", "-o", self.story.path("criu.log")])
        demand(restored.wait(60) == 0, "stock criu restores the exported image")
        demand(mapped_bytes(self.pid) == 0, "it maps nothing of an image")
        self.popen = None
        self.do()


def written_pages_only(story):
    """Pages written, overwritten by zeros, given back, and given back and written again."""
    program = Mapped(story)
    program.begin("areas['a'] = Area(16); areas['a'].fill(0, 4096, 1); areas['b'] = Area(16); areas['b'].fill(0, 4000, 2)")
    program.again("pass", most=1 << 20)
    program.again("a = areas['a']; a.fill(100, 200, 3); a.zero(300, 310)", most=2 << 20)
    program.again("a.drop(1000, 1500); a.drop(150, 160); a.drop(0, 8)", most=4 << 20)
    program.again("a.fill(1200, 1210, 4); a.drop(1100, 1300); a.fill(1250, 1260, 5)", most=2 << 20)
    program.again("b = areas['b']; b.drop(0, 4096)", most=20 << 20)
    program.again("b.fill(5, 4090, 6)")
    program.again("pass", most=1 << 20)
    program.finish()


def changed_vmas(story):
    """VMAs that grew, shrank, moved, were re-protected, vanished or are new, all while mapped."""
    program = Mapped(story)
    program.begin("for name in 'abcdefg': areas[name] = Area(4); areas[name].fill(0, 1024, 1)")
    program.again("areas['a'].resize(1300); areas['a'].fill(1200, 1210, 2)\n"
                  "areas['b'].resize(500)\n"
                  "areas.pop('c').memory.close()\n"
                  "areas['d'].resize(20000)\n"
                  "areas['h'] = Area(4); areas['h'].fill(5, 1020, 3)\n"
                  "protect(areas['e'], 100, 300, 1)")
    program.again("areas['b'].resize(900); areas['b'].fill(800, 810, 4)\n"
                  "areas['f'].drop(500, 1024); areas['f'].resize(600)\n"
                  "protect(areas['e'], 50, 150, 1); protect(areas['g'], 0, 1024, 1)\n"
                  "areas['h'].drop(0, 300); areas['a'].drop(1000, 1205)")
    program.again("protect(areas['e'], 0, 1024, 3); areas['e'].fill(90, 110, 5)\n"
                  "areas['f'].resize(1500); protect(areas['g'], 0, 1024, 3); areas['g'].fill(0, 1, 6)")
    program.again("areas['d'].drop(0, 1000); areas['d'].resize(900)")
    program.finish()


def half_remapped(story):
    """churn dumped at any moment of its remap, with every way to change memory, the parents deleted."""
    chance = random.Random(7)
    churn = story.start("churn", "--threads", 2, "--mib", 96, "--sparse", "--remapper", "--brk",
                        "--mprotect", "--munmap", "--hazard-mib", 4, "--rate", 1000)
    churn.await_progress()
    previous, mapped = None, 0
    for generation in range(6):
        folder, report = dump(story, churn, f"generation-{generation}")
        mapped += report["still_mapped"]
        previous = chains.superseded(story, churn, previous, folder)
        story.restore(churn, folder)
        churn.await_progress("works while direct-mapped or being remapped")
        time.sleep(chance.random() * 0.1)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()
    demand(mapped >= 1, "not one dump found it mapped still")


def left_running(story):
    """Dumped while mapped and left running: its agent comes back and finishes, the image is not needed."""
    program = Mapped(story)
    program.begin("areas['a'] = Area(32); areas['a'].fill(0, 8192, 1)")
    folders = []
    for generation in range(3):
        program.do(f"areas['a'].fill({generation * 100}, {generation * 100 + 50}, 2); areas['a'].drop({generation * 100 + 60}, {generation * 100 + 70})")
        folder, report = dump(story, program, f"left-{generation}", "-R")
        demand(report["still_mapped"] and report["written_bytes"] < 2 << 20, f"{report}")
        folders.append(folder)
        program.do("areas['a'].drop(5000, 5010); areas['a'].fill(6000, 6010, 7)")
    story.unmoor("remap", "-t", program.pid)
    demand(story.status(program).code == 0, "READY after the remap")
    shutil.rmtree(program.folder)
    program.do()
    story.demand_no_agent()
    os.kill(program.pid, signal.SIGKILL)
    program.await_gone()
    for folder in folders[:2]:
        shutil.rmtree(folder)
    story.unmoor("verify", folders[2])


def again_at_once(story):
    """Each dump begins as its agent is just on its way back in from the one before; a thread gives memory back all the time."""
    churn = story.start("churn", "--threads", 2, "--mib", 32, "--sparse", "--dontneed", "--hazard-mib", 4)
    churn.await_progress()
    folder, _ = dump(story, churn, "first")
    churn.await_gone()
    story.await_no_orphan()
    story.restore(churn, folder, "--remap", "off")
    for attempt in range(20):
        outcome = story.unmoor("dump", "--while-mapped", "-t", churn.pid, "-D", story.path("again"), "-R", "--json",
                               "--prev-images-dir", folder)
        churn.demand_alive(f"after dump {attempt}: {outcome}")
        if outcome.json()["remapped_first"]:
            break  # it gave memory back each time; nothing is mapped any more
    churn.await_sweep()
    churn.end()


def killed_midway(story):
    """kill -9 of the dump at any moment: the program goes on, its agent comes back, and the next dump works."""
    chance = random.Random(11)
    churn = story.start("churn", "--threads", 2, "--mib", 64, "--sparse", "--dontneed", "--hazard-mib", 4)
    churn.await_progress()
    folder, _ = dump(story, churn, "first")
    churn.await_gone()
    story.await_no_orphan()
    story.restore(churn, folder, "--remap", "off")
    for attempt in range(5):
        churn.await_progress()
        victim = story.popen([UNMOOR, "dump", "--while-mapped", "-t", str(churn.pid), "-D",
                              story.path("killed"), "-R"])
        time.sleep(chance.random() * 0.15)
        victim.kill()
        victim.wait()
        churn.await_progress("goes on after the dump was killed", amount=100)
    story.unmoor("remap", "-t", churn.pid)
    demand(story.status(churn).code == 0, "READY in the end")
    churn.await_sweep()
    story.dump(churn, "last")
    story.restore(churn, story.path("last"))
    story.wait_ready(churn)
    churn.end()
    story.demand_no_agent()


def moved_image(story):
    """The image was moved, or deleted while another directory has its layers; without any of them the
    remap is finished first, which is said."""
    program = Mapped(story)
    program.begin("areas['a'] = Area(16); areas['a'].fill(0, 4096, 1)")
    moved = story.path("moved")
    os.rename(program.folder, moved)
    program.folder = moved
    program.again("areas['a'].fill(10, 20, 2)", "--prev-images-dir", moved, most=1 << 20)
    # Its layers live on in the new directory, whose file the program does not map by name.
    copy = story.path("copy")
    program.do("areas['a'].fill(30, 40, 3)")
    _, report = dump(story, program, "copy", "-R")
    demand(report["still_mapped"], f"{report}")
    shutil.rmtree(program.folder)
    program.folder = copy
    program.again("areas['a'].fill(50, 60, 4)", "--prev-images-dir", copy, most=1 << 20)
    shutil.rmtree(program.folder)
    outcome = story.unmoor("dump", "--while-mapped", "-t", program.pid, "-D", story.path("after"), "--json")
    report = outcome.json()
    demand(not report["still_mapped"] and report["remapped_first"], f"{report}")
    demand("finishing the remap first" in outcome.err, f"not said: {outcome}")
    program.await_gone()
    story.await_no_orphan()
    story.restore(program, story.path("after"))
    story.wait_ready(program)
    program.do()


def forks(story):
    """A child forked while its parent is mapped, both dumped while mapped."""
    program = Mapped(story)
    program.begin("areas['a'] = Area(16); areas['a'].fill(0, 4096, 1)")
    program.do("pid = os.fork()\n"
               "if pid == 0:\n"
               "    report += '.child'; command += '.child'; last = 0; a = areas['a']\n"
               "    a.fill(0, 100, 7); a.drop(200, 210); tell(done=0)\n"
               "else: areas['a'].fill(50, 60, 8)")
    child = poll(lambda: children_of(program.pid), "the child")[0]
    inner = Program(story, child, program.report_path + ".child")
    poll(lambda: inner.report().get("ready"), "the child is ready")
    for name in ("second", "third"):
        folder, report = dump(story, program, name)
        demand(report["still_mapped"], f"{report}")
        program.await_gone()
        story.await_no_orphan()
        shutil.rmtree(program.folder)
        program.folder = folder
        story.restore(program, folder, "--remap", "off")
        program.do()
        with open(program.command + ".child", "w") as file:
            json.dump([program.number, "areas['a'].fill(1000, 1010, 9); areas['a'].drop(2000, 2010)"], file)
        poll(lambda: inner.report().get("done") == program.number, "the child verified its memory")
    for member in (program, inner):
        story.unmoor("remap", "-t", member.pid)
    program.do()


def track(story, program, name, *arguments):
    return chains.dump(story, program, name, "--track-mem", *arguments)


def tracked(story):
    """A program that is independent of its image: what it did not change is not read while it stands still."""
    program = Scripted(story)
    program.do("for name in 'abcde': areas[name] = Area(8); areas[name].fill(0, 2000, 1)")
    previous, _ = track(story, program, "generation-0", "-R")
    changes = (
        ("pass", 4 << 20),
        ("a = areas['a']; a.fill(100, 150, 2); a.zero(300, 310); a.drop(500, 520); areas['b'].fill(2010, 2020, 3)", 6 << 20),
        ("areas['b'].drop(0, 1000); areas['c'].fill(0, 2048, 4)", 20 << 20),
        ("areas.pop('d').memory.close(); areas['e'].resize(3000); areas['e'].fill(2500, 2510, 5)\n"
         "areas['f'] = Area(8); areas['f'].fill(0, 700, 6); protect(areas['a'], 0, 64, 1)", None),
        ("protect(areas['a'], 0, 64, 3); areas['a'].fill(0, 64, 7); areas['e'].resize(900)", None))
    for number, (change, most) in enumerate(changes, 1):
        program.do(change)
        folder, report = track(story, program, f"generation-{number}", "-R", "--prev-images-dir", previous)
        demand(report["still_mapped"] and (most is None or report["read_bytes"] <= most), f"more than {most} bytes were read: {report}")
        # At once, while its agent comes back and remaps it; and independent again.
        program.do("areas['a'].fill(1000, 1004, 8); areas['b'].drop(1100, 1110); areas['c'].drop(3, 5)")
        story.wait_ready(program)
        program.do()
        shutil.rmtree(previous)
        previous = folder
    last, _ = track(story, program, "last", "--prev-images-dir", previous)
    program.await_gone()
    story.await_no_orphan()
    story.unmoor("verify", last)
    shutil.rmtree(previous)
    story.restore(program, last)
    story.wait_ready(program)
    program.do()


def tracked_churn(story):
    """Threads that change memory in every way while it is put back on its layers, over and over."""
    churn = story.start("churn", "--threads", 2, "--mib", 128, "--dontneed", "--remapper", "--mprotect",
                        "--munmap", "--hazard-mib", 4, "--rate", 100)
    churn.await_progress()
    previous, _ = track(story, churn, "generation-0", "-R")
    mapped = 0
    for number in range(1, 6):
        churn.await_progress(amount=20)
        folder, report = track(story, churn, f"generation-{number}", "-R", "--prev-images-dir", previous)
        story.say(f"{report['read_bytes'] >> 20} MiB read, mapped: {report['still_mapped']}")
        mapped += report["still_mapped"] and report["read_bytes"] < 64 << 20
        churn.await_sweep()
        story.wait_ready(churn)
        shutil.rmtree(previous)
        previous = folder
    demand(mapped >= 1, "it was never put back")
    folder, _ = track(story, churn, "last", "--prev-images-dir", previous)
    live_to_the_end(story, churn, folder)
    story.demand_no_agent()


def stays_one(story):
    """What is changed in part is one VMA throughout: mremap of all of it never fails with EFAULT."""
    program = Scripted(story)
    program.do("areas['a'] = Area(6); areas['a'].fill(0, 1536, 1)")
    previous, _ = track(story, program, "generation-0", "-R")
    # Grown in place to where no memory can be: refused for that, once it is known to be one.
    program.do("import errno, threading\n"
               "areas['a'].fill(0, 600, 2)\n"
               "view = ctypes.c_char.from_buffer(areas['a'].memory)\n"
               "at, refusals, at_work = ctypes.addressof(view), set(), True\n"
               "mremap = ctypes.CDLL(None, use_errno=True).mremap\n"
               "mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]\n"
               "def grow():\n"
               "    while at_work:\n"
               "        mremap(at, 6 << 20, 1 << 46, 0)\n"
               "        refusals.add(errno.errorcode[ctypes.get_errno()])\n"
               "thread = threading.Thread(target=grow)\n"
               "thread.start()")
    for number in range(1, 4):
        folder, report = track(story, program, f"generation-{number}", "-R", "--prev-images-dir", previous)
        demand(report["still_mapped"], f"it was put back: {report}")
        story.wait_ready(program)
        shutil.rmtree(previous)
        previous = folder
    program.do("at_work = False; thread.join(); del view\n"
               "if refusals != {'ENOMEM'}: raise OSError(str(refusals))")


def given_back_meanwhile(story):
    """A thread gives pages back, one by one, while the rest of their blocks is put back on its layer."""
    program = Scripted(story)
    program.do("areas['a'] = Area(32); areas['a'].fill(0, 8192, 1)")
    previous, _ = track(story, program, "generation-0", "-R")
    put_back = 0
    for number in range(1, 5):
        # Out of reach of the checks, for as long as the thread is at work on it.
        program.do("import random, threading\n"
                   "hidden, at_work = areas.pop('a'), True\n"
                   "def give_back():\n"
                   "    while at_work:\n"
                   "        page = random.randrange(8192)\n"
                   "        hidden.drop(page, page + 1)\n"
                   "        time.sleep(0.003)\n"
                   "thread = threading.Thread(target=give_back)\n"
                   "thread.start()")
        folder, report = track(story, program, f"generation-{number}", "-R", "--prev-images-dir", previous)
        put_back += report["still_mapped"] or report["remapped_first"]
        program.do("at_work = False; thread.join(); areas['a'] = hidden")
        story.wait_ready(program)
        program.do()
        shutil.rmtree(previous)
        previous = folder
    if put_back == 0:  # its memory was right; but on this machine, this time, nothing was tried
        raise Late("it was never put back")


def agents(story):
    return [pid for pid in story.agents() if read_proc(pid, "comm").strip() == "unmoor-agent"]


def tracker_killed(story):
    """kill -9 of the agent while it compares and puts back: the program's memory is right, and so is the dump's."""
    killed = 0
    churn = story.start("churn", "--threads", 2, "--mib", 64, "--sparse", "--dontneed", "--hazard-mib", 4)
    churn.await_progress()
    base, _ = track(story, churn, "base", "-R")
    chance = random.Random(5)
    for attempt in range(5):
        outcome = story.popen([UNMOOR, "dump", "--track-mem", "-R", "-t", str(churn.pid), "-D", story.path("tracked"),
                               "--prev-images-dir", base])
        # Not while the program's own thread is borrowed for a moment: docs/guarantees.md, what is not held.
        poll(lambda: children(churn.pid) or outcome.poll() is not None, "its helper", interval=0.001)
        time.sleep(chance.random() * 0.1)
        for agent in agents(story):
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
                killed += 1
        outcome.wait()
        churn.await_progress("goes on after its agent was killed", amount=100)
    demand(killed, "no agent was killed")
    story.unmoor("remap", "-t", churn.pid)
    churn.await_sweep()
    folder, _ = track(story, churn, "last", "--prev-images-dir", base)
    live_to_the_end(story, churn, folder)


def children_of(pid):
    """Without helpers of an agent."""
    return [child for child in children(pid) if not read_proc(child, "comm").startswith("unmoor")]


def trees_and_redis(story):
    """A tree and redis, dumped right after the restore."""
    tree = Tree(story, "--mib", 24)
    previous = None
    for generation in range(3):
        folder, report = dump(story, tree.parent, f"tree-{generation}")
        previous = chains.superseded(story, tree, previous, folder)
        story.restore(tree.parent, folder, "--remap", "off")
        tree.await_rounds("works while mapped")
    demand(report["still_mapped"], f"{report}")
    for member in tree.members:
        story.unmoor("remap", "-t", member.pid)
    tree.await_rounds("works after the remap")
    redis = Redis(story)
    redis.populate()
    previous = None
    for generation in range(3):
        digest = redis.digest()
        folder, report = dump(story, redis.program, f"redis-{generation}")
        demand(report["still_mapped"] == (generation > 0), f"{report}")
        previous = chains.superseded(story, redis.program, previous, folder)
        story.restore(redis.program, folder, "--remap", "off")
        demand(redis.digest() == digest, f"other data after restore {generation}")
        writer = Writer(redis.port, generation)
        writer.start()
        time.sleep(0.3)
        redis.expected.update(writer.finish())
    story.unmoor("remap", "-t", redis.program.pid)
    redis.demand_own_writes()
    os.kill(redis.program.pid, signal.SIGKILL)
    redis.program.await_gone()


if __name__ == "__main__":
    main({f.__name__: f for f in (
        written_pages_only, changed_vmas, half_remapped, left_running, again_at_once, killed_midway, moved_image, forks,
        tracked, tracked_churn, stays_one, given_back_meanwhile,
        tracker_killed, trees_and_redis)})

#!/usr/bin/env -S python3 -B
"""Memory written before the freeze (`dump --pre-dump`): what a program changes meanwhile, in whatever way,
is in the checkpoint as it was when the program stood still.

Programs verify their own memory after the restore and go on.
"""
import os
import random
import shutil
import signal
import time

import chains
from chains import Scripted
from harness import UNMOOR, demand, main, poll
from interchange import mostly_shared_pair
from mapped import live_to_the_end
from redis import Redis, Writer
from tree import Tree

MIB = 1 << 20


def dump(story, program, name, *arguments):
    return chains.dump(story, program, name, "--pre-dump", *arguments)


def only_the_rest_is_read(story):
    """Left running: what lay still is not read while the program stands still. Twice more, the second time
    against a parent; then ended, and restored from what that left."""
    program = Scripted(story)
    program.do("areas['a'] = Area(32); areas['a'].fill(0, 8000, 1); areas['b'] = Area(8); areas['b'].fill(5, 2000, 2)")
    folder, report = dump(story, program, "first", "-R")
    demand(report["still_mapped"] and report["pre_dump_rounds"] >= 1, f"not written before: {report}")
    demand(report["read_bytes"] < 8 * MIB, f"too much was read: {report}")
    demand(report["written_bytes"] < 56 * MIB and report["parent"] is None, f"written twice: {report}")
    program.do("areas['a'].fill(100, 110, 3); areas['a'].drop(200, 210); areas['b'].drop(0, 30)")
    story.wait_ready(program)
    program.do()
    second, report = dump(story, program, "second", "-R", "--prev-images-dir", folder)
    demand(report["written_bytes"] < 4 * MIB and report["parent"], f"{report}")
    shutil.rmtree(folder)
    story.wait_ready(program)
    # Most of it is other than in the parent: written anew, and before the freeze.
    program.do("areas['a'].fill(0, 8000, 9)")
    third, report = dump(story, program, "third", "--prev-images-dir", second)
    program.await_gone()
    story.await_no_orphan()
    shutil.rmtree(second)
    story.unmoor("verify", third)
    story.restore(program, third)
    program.do()
    story.wait_ready(program)
    program.do()


def churns(story, mib=24, hazard_mib=2):
    """Threads that change memory in every way all the while, left running and ended."""
    churn = story.start("churn", "--threads", 2, "--mib", mib, "--dontneed", "--remapper", "--brk", "--mprotect",
                        "--munmap", "--hazard-mib", hazard_mib, "--rate", 300)
    churn.await_progress()
    folder, report = dump(story, churn, "left", "-R", "--full")
    story.say(f"{report['pre_dump_rounds']} rounds, {report['read_bytes'] >> 20} MiB read after them")
    churn.await_sweep()
    story.wait_ready(churn)
    story.unmoor("verify", folder)
    folder, _ = dump(story, churn, "last", "--full")
    live_to_the_end(story, churn, folder)
    story.demand_no_agent()


def churns_large(story):
    churns(story, 64, 4)


def vmas_change_between_rounds(story):
    """Areas that come, go, grow, shrink, move and are given back while rounds are written."""
    program = Scripted(story)
    program.do("for name in 'abcd': areas[name] = Area(16); areas[name].fill(0, 4096, 1)")
    for number in range(2):
        # Out of reach of the checks, for as long as the thread is at work on them.
        program.do("import random, threading\n"
                   "hidden, at_work = {name: areas.pop(name) for name in 'abc'}, True\n"
                   "def change():\n"
                   "    turn = 0\n"
                   "    while at_work:\n"
                   "        turn += 1\n"
                   "        hidden['a'].resize(random.randrange(2000, 6000))\n"
                   "        hidden['b'].drop(turn * 64 % 4096, turn * 64 % 4096 + 64)\n"
                   "        hidden['b'].fill(turn * 8 % 4096, turn * 8 % 4096 + 8, turn)\n"
                   "        hidden.pop('c').memory.close()\n"
                   "        hidden['c'] = Area(16); hidden['c'].fill(0, 500, turn)\n"
                   "        time.sleep(0.002)\n"
                   "thread = threading.Thread(target=change)\n"
                   "thread.start()")
        folder, report = dump(story, program, f"generation-{number}", "--full")
        story.say(f"{report['pre_dump_rounds']} rounds, mapped: {report['still_mapped']}")
        program.await_gone()
        story.await_no_orphan()
        story.unmoor("verify", folder)
        story.restore(program, folder)
        program.do("at_work = False; thread.join(); areas.update(hidden)")
        story.wait_ready(program)
        program.do()


def tree(story):
    """Members that all write."""
    members = Tree(story, "--mib", 24)
    folder, _ = dump(story, members.parent, "image", "--full")
    members.await_gone()
    story.await_no_orphan()
    story.restore(members.parent, folder)
    members.await_rounds("works while mapped or being remapped")
    for member in members.members:
        story.wait_ready(member)
    members.await_rounds("works after the remap")
    members.parent.end()
    members.await_gone()


def forked_pages_are_written_once(story):
    """What a child has from its parent is in the image once, as without rounds."""
    program, child, child_does = mostly_shared_pair(story)
    folder, report = dump(story, program, "image", "--full")
    demand(report["still_mapped"] and report["written_bytes"] < 40 * MIB, f"{report}")
    for member in (program, child):
        member.await_gone()
    story.await_no_orphan()
    story.unmoor("verify", folder)
    story.restore(program, folder)
    program.do()
    child_does()
    for member in (program, child):
        story.wait_ready(member)
    program.do()
    child_does()


def start_dump(story, program, folder, *arguments):
    return story.popen([UNMOOR, "dump", "--pre-dump", "-t", str(program.pid), "-D", folder, *arguments])


def nothing_is_left(story, store, *more):
    demand(sorted(os.listdir(store)) == sorted(more), f"left over: {os.listdir(store)}")


def ends_meanwhile(story):
    """The program ends, or the dump is interrupted or killed, at any moment of it."""
    chance = random.Random(3)
    store = story.path("store")
    os.mkdir(store)
    for how in ("ended", "interrupted", "killed"):
        churn = story.start("churn", "--threads", 2, "--mib", 64, "--dontneed", "--hazard-mib", 4)
        churn.await_progress()
        command = start_dump(story, churn, os.path.join(store, "image"), "-R")
        time.sleep(0.02 + chance.random() * 0.3)
        if how == "ended":
            os.kill(churn.pid, signal.SIGKILL)
        else:
            command.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
        command.wait(60)
        story.say(f"{how}: exit code {command.returncode}")
        if how == "ended":
            churn.await_gone()
        else:
            churn.await_progress("goes on", amount=200)
            if how == "killed":  # the next command removes what is left
                poll(lambda: story.unmoor("dump", "-t", churn.pid, "-D", os.path.join(store, "image"), "-R",
                                          expect=None).code == 0, "the next dump works", 60, 0.2)
            story.unmoor("remap", "-t", churn.pid)
            churn.await_sweep()
            churn.end()
            churn.await_gone()
        nothing_is_left(story, store, *(["image"] if os.path.exists(os.path.join(store, "image")) else []))
        shutil.rmtree(os.path.join(store, "image"), ignore_errors=True)
    story.demand_no_agent()


def disk_full(story):
    """Too little room for the rounds, or for what comes after them: said, nothing is left, it runs on."""
    churn = story.start("churn", "--threads", 2, "--mib", 40)
    churn.await_progress()
    for mib in (16, 44):
        small = story.mount_tmpfs(f"small-{mib}", mib)
        outcome = story.unmoor("dump", "--pre-dump", "-t", churn.pid, "-D", os.path.join(small, "image"), expect=1)
        demand("space" in outcome.err.lower(), f"the message says what is short: {outcome}")
        nothing_is_left(story, small)
        churn.await_sweep()
    story.unmoor("remap", "-t", churn.pid)
    folder, _ = dump(story, churn, "image")
    live_to_the_end(story, churn, folder)


def redis(story):
    """redis with a writer all the while, left running and then ended; every acknowledged write is there."""
    server = Redis(story)
    server.populate()
    writer = Writer(server.port, 1)
    writer.start()
    _, report = dump(story, server.program, "first", "-R", "--full", "--", "--tcp-established", "--network-lock",
                     "skip")
    server.expected.update(writer.finish())
    demand(report["still_mapped"], f"{report}")
    story.say(f"{report['pre_dump_rounds']} rounds, {report['read_bytes'] >> 20} MiB read while it was frozen for "
              f"{report['frozen_ns'] / 1e6:.0f} ms")
    server.demand_own_writes()
    story.wait_ready(server.program)
    digest = server.digest()
    folder, _ = dump(story, server.program, "second", "--full")
    server.program.await_gone()
    story.await_no_orphan()
    story.restore(server.program, folder)
    demand(server.digest() == digest, "other data after the restore")
    server.demand_own_writes()
    os.kill(server.program.pid, signal.SIGKILL)
    server.program.await_gone()


if __name__ == "__main__":
    main({f.__name__: f for f in (only_the_rest_is_read, churns, churns_large, vmas_change_between_rounds, tree,
                                  forked_pages_are_written_once, ends_meanwhile,
                                  disk_full, redis)})

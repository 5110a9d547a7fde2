#!/usr/bin/env -S python3 -B
"""restore --mode lazy: memory is anonymous from the start and comes page by page, whatever the
program does meanwhile and whichever process of ours dies."""
import glob
import json
import os
import re
import shutil
import signal

from churn import two_generations
from harness import (LATER, READY, USER_MISTAKE, demand, footprint, is_alive, main, poll, smaps_total,
                     state)
from hazards import HAZARDS, await_hazards, end_with_children
from tree import Tree

LAZY = ("--mode", "lazy")
# Pages come only when they are touched, until `unmoor remap` asks for the rest (agent/lazy_server.cpp).
TOUCHES_LITTLE = ("--rate", 50, "--sweep-ms", 100000000)  # verifies all of its memory at its end
HELD = {"UNMOOR_FAULT": "lazy.bring:error@*"}


def progress(story, pid):
    with open(os.path.join(story.runtime, f"{pid}.json")) as file:
        return json.load(file)


def server_and_keeper(story, churn):
    found = progress(story, churn.pid)
    return found["worker"], found["supervisor"]


def two_churns(story):
    """Two generations, the second of a program that was restored lazily."""
    two_generations(story, "--threads", 4, "--mib", 256, arguments=LAZY)


def listing(image):
    """All files of an image: what they are called, their size, and when they were written."""
    return {path: (os.stat(path).st_ino, os.stat(path).st_size, os.stat(path).st_mtime_ns)
            for folder, _, names in os.walk(image) for path in (os.path.join(folder, name) for name in names)}


def demand_still_packed(story, image, before):
    """Nothing was unpacked, neither there nor beside it."""
    demand(listing(image) == before, f"{image} is as it was: {listing(image)}, before {before}")
    demand([name for name in before if name.endswith(".packed")], f"it is packed: {list(before)}")
    caches = [name for name in os.listdir(story.folder) if "unpacked" in name]
    demand(not caches, f"no unpacked copy: {caches}")


def packed(how):
    """Two generations, each from packed layers."""
    def story(story):
        churn = story.start("churn", "--threads", 2, "--mib", 128)
        for name in ("image", "second"):
            churn.await_sweep()
            image = story.dump(churn, name, "--compress", how)
            before = listing(image)
            outcome = story.restore(churn, image, *LAZY)
            demand("unpack" not in outcome.err, f"nothing is unpacked: {outcome}")
            churn.await_progress("works while its memory comes")
            story.wait_ready(churn)
            demand_still_packed(story, image, before)
            shutil.rmtree(image)
            churn.await_sweep()
        churn.end()
        story.demand_no_agent()
    return story


def packed_lz4(story):
    packed("lz4")(story)


def packed_zstd(story):
    packed("zstd")(story)


def packed_on_demand(story):
    """A touch brings the 2 MiB that are decompressed for it, and no more."""
    churn = story.start("churn", "--threads", 1, "--mib", 256, "--rate", 10, *TOUCHES_LITTLE[2:])
    image = story.dump(churn, "image", "--compress", "lz4")
    before = listing(image)
    story.restore(churn, image, *LAZY, environment=HELD)
    churn.await_progress("works with what it touched")
    there = smaps_total(churn.pid, "Rss")
    demand(there < 128 << 20, f"{there >> 20} MiB are there though nobody touched them")
    demand(story.status(churn).code == LATER, "LATER: pages are still to come")
    story.unmoor("remap", "-t", churn.pid)
    demand(story.status(churn).code == READY, "READY when all has come")
    demand_still_packed(story, image, before)
    shutil.rmtree(image)
    churn.end()
    story.demand_no_agent()


def hazard(name):
    options, counters = HAZARDS[name]

    def story(story):
        churn = story.start("churn", "--threads", 2, "--mib", 64, "--hazard-us", 300, *options)
        await_hazards(churn, counters, "at the start")
        image = story.dump(churn, "image")
        story.restore(churn, image, *LAZY, environment=HELD)
        await_hazards(churn, counters, "while its pages come on demand")
        story.unmoor("remap", "-t", churn.pid)
        shutil.rmtree(image)
        churn.await_sweep()
        # The second time all comes in the background.
        image = story.dump(churn, "second")
        story.restore(churn, image, *LAZY)
        await_hazards(churn, counters, "while its pages come in the background")
        story.wait_ready(churn)
        shutil.rmtree(image)
        churn.await_sweep()
        end_with_children(churn)
        story.demand_no_agent()
    story.__name__ = f"hazard_{name}"
    return story


def tree(story):
    family = Tree(story, "--mib", 64)
    before = [footprint(member.pid) for member in family.members]
    image = story.dump(family.parent, "image")
    family.await_gone()
    story.restore(family.parent, image, *LAZY)
    family.await_rounds("works while its memory comes")
    for member in family.members:
        story.wait_ready(member)
    family.outlives(image, before)


def nothing_is_mapped_and_little_is_there(story):
    """On demand only: what nobody touches is not there, and the status says so."""
    churn = story.start("churn", "--threads", 1, "--mib", 256, *TOUCHES_LITTLE)
    image = story.dump(churn, "image")
    story.restore(churn, image, *LAZY, environment=HELD)
    churn.await_progress("works with what it touched")
    with open(f"/proc/{churn.pid}/maps") as file:
        demand(image not in file.read(), "nothing maps the image")
    there = smaps_total(churn.pid, "Rss")
    demand(there < 128 << 20, f"{there >> 20} MiB are there though nobody touched them")
    status = story.status(churn)
    demand(status.code == LATER and "to come" in status.out, f"LATER, and how much: {status}")
    story.unmoor("remap", "-t", churn.pid)
    demand(story.status(churn).code == READY, "READY when all has come")
    shutil.rmtree(image)
    churn.end()
    story.demand_no_agent()


def dumped_while_pages_come(story):
    """What has not come yet is missing in the pagemap: a dump waits for it, whatever it was asked for."""
    churn = story.start("churn", "--threads", 2, "--mib", 128, *TOUCHES_LITTLE)
    image = story.dump(churn, "image")
    for name in ("second", "third"):
        story.restore(churn, image, *LAZY, environment=HELD)
        churn.await_progress("works")
        demand(story.status(churn).code == LATER, "LATER while pages are still to come")
        # The third: as one that is still mapped, which it is not.
        image = story.dump(churn, name, *(["--while-mapped"] if name == "third" else []))
        story.demand_no_agent()
    story.restore(churn, image, *LAZY)
    story.wait_ready(churn)
    churn.end()


def killed(victims, *form):
    """Kills the processes that victims(server, keeper) names, one after the other's replacement."""
    def story(story):
        churn = story.start("churn", "--threads", 2, "--mib", 256, *TOUCHES_LITTLE, "--dontneed", "--remapper",
                            "--munmap", "--hazard-us", 300)
        counters = ["dontneed", "remapper", "munmap"]
        await_hazards(churn, counters, "at the start")
        image = story.dump(churn, "image", *form)
        story.restore(churn, image, *LAZY, environment=HELD)
        for _ in range(4):
            for victim in victims:
                pair = server_and_keeper(story, churn)
                # While it stands it has read nothing that it has not recorded.
                await_quiet(story, pair[0])
                os.kill(pair[victim], signal.SIGKILL)
                os.kill(pair[0], signal.SIGCONT)
                poll(lambda: is_new_pair(story, churn, pair, victim), "the other to replace it", 30)
                await_hazards(churn, counters, "after the kill", amount=5)
        demand(story.status(churn).code == LATER, "LATER: pages are still to come")
        story.unmoor("remap", "-t", churn.pid)
        shutil.rmtree(image)
        churn.end()
        story.demand_no_agent()
    return story


def await_quiet(story, pid):
    """Stops `pid` where it sleeps in poll, not between two system calls of its own."""
    def stands_in_poll():
        os.kill(pid, signal.SIGSTOP)
        poll(lambda: state(pid) == "T", lambda: f"{pid} to stop (it is {state(pid)})", 10, 0.001)
        if read(f"/proc/{pid}/syscall").split()[0] in ("7", "219"):
            return True
        os.kill(pid, signal.SIGCONT)
        return False
    poll(stands_in_poll, "the server to wait", 30, 0.001)


def read(path):
    with open(path) as file:
        return file.read()


def is_new_pair(story, churn, old, victim):
    server, keeper = server_and_keeper(story, churn)
    return old[victim] not in (server, keeper) and is_alive(server) and is_alive(keeper)


def killed_between_reading_and_recording(story):
    """What it had read is lost with it: the program is ended, and it is said why."""
    churn = story.start("churn", "--threads", 2, "--mib", 64, "--dontneed", "--hazard-us", 300)
    await_hazards(churn, ["dontneed"], "at the start")
    image = story.dump(churn, "image")
    story.restore(churn, image, *LAZY,
                  environment={"UNMOOR_FAULT": "lazy.bring:error@*,lazy.event_read:kill"})
    churn.await_gone()
    why = story.status(churn)
    demand("was ended: the server of its memory died" in why.err, f"the reason is told: {why}")
    story.demand_no_agent()


def working_set_first(story):
    """Of a program that touches nothing the working set comes by itself, before all else."""
    churn = story.start("churn", "--threads", 1, "--mib", 128, *TOUCHES_LITTLE)
    os.kill(churn.pid, signal.SIGSTOP)  # restored, it stands still until told to go on
    image = story.dump(churn, "image")
    story.restore(churn, image, "--record")
    os.kill(churn.pid, signal.SIGCONT)
    churn.await_progress("works while it is recorded")
    recorded = json.loads(story.unmoor("record", "-t", churn.pid, "--stop", "--json").out)["working_set_bytes"]
    story.wait_ready(churn)
    churn.end()
    churn.await_gone()
    story.restore(churn, image, *LAZY, environment={"UNMOOR_FAULT": "lazy.bring_rest:error@*"})
    poll(lambda: progress(story, churn.pid)["done"] >= recorded, "the working set to come", 10)
    come = progress(story, churn.pid)["done"]
    demand(come < recorded + (32 << 20), f"{come >> 20} MiB came, of which {recorded >> 20} were recorded")
    demand(story.status(churn).code == LATER, "LATER: the rest is still to come")
    os.kill(churn.pid, signal.SIGCONT)
    story.unmoor("remap", "-t", churn.pid)
    shutil.rmtree(image)
    churn.end()
    story.demand_no_agent()


def damage(story, image, how):
    """Damages the middle of the layer's data."""
    path, = glob.glob(os.path.join(image, "layers", "*.pages"))
    with open(path, "r+b") as file:
        at = file.seek(64 << 20, os.SEEK_DATA)
        how(file, at)


def flip(file, at):
    file.seek(at)
    byte = file.read(1)[0]
    file.seek(at)
    file.write(bytes([byte ^ 1]))


def damage_packed(story, image, how):
    """Damages more frames than the server keeps."""
    path, = glob.glob(os.path.join(image, "layers", "*.packed"))
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        for part in range(12):
            how(file, size * (part + 4) // 20)


def damaged(how, damage=damage, form=(), suffix=r"\.pages"):
    def story(story):
        # Of a packed layer each touch brings 2 MiB.
        churn = story.start("churn", "--threads", 1, "--mib", 128, "--rate", 10 if form else 50, *TOUCHES_LITTLE[2:])
        image = story.dump(churn, "image", *form)
        log = story.path("agent.log")
        story.restore(churn, image, *LAZY, "--agent-log", log, environment=HELD)
        churn.await_progress("works")
        os.kill(churn.pid, signal.SIGSTOP)  # it touches nothing for now
        poll(lambda: state(churn.pid) == "T", "the program to stop")
        damage(story, image, how)
        server, _ = server_and_keeper(story, churn)
        os.kill(server, signal.SIGUSR1)  # brings the rest, as `unmoor remap` asks for
        poll(lambda: progress(story, churn.pid)["problem"], "the damage to be found")
        status = story.status(churn)
        demand(status.code == LATER and re.search(suffix + ".*(damaged|truncated|short|end)", status.out),
               f"the damage is told: {status}")
        # It verifies all of its memory, and must not see anything but what it wrote.
        os.kill(churn.pid, signal.SIGTERM)
        os.kill(churn.pid, signal.SIGCONT)
        churn.await_gone()
        churn.report()
        why = story.status(churn)
        demand("was ended:" in why.err and re.search(suffix, why.err), f"the reason is told: {why}")
        demand("the program is ended" in read(log), "and logged")
        story.demand_no_agent()
    return story


def damaged_block(story):
    damaged(flip)(story)


def truncated_layer(story):
    damaged(lambda file, at: file.truncate(at))(story)


def damaged_frames(story):
    damaged(flip, damage_packed, ("--compress", "zstd"), r"\.packed")(story)


def truncated_packed_layer(story):
    damaged(lambda file, at: file.truncate(min(at, os.fstat(file.fileno()).st_size)), damage_packed,
            ("--compress", "lz4"), r"\.packed")(story)


def foreground_tells_why_it_ended(story):
    churn = story.start("churn", "--threads", 2, "--mib", 64, "--sweep-ms", 200)
    image = story.dump(churn, "image")
    damage(story, image, flip)
    outcome = story.unmoor("restore", "-D", image, *LAZY, expect=None)
    demand(outcome.code in (137, 1) and ".pages" in outcome.err, f"why it ended: {outcome}")
    story.demand_no_agent()


def what_contradicts_it(story):
    outcome = story.unmoor("restore", "-D", story.folder, *LAZY, "--remap", "off", expect=USER_MISTAKE)
    demand("--mode lazy" in outcome.err, f"said so: {outcome}")


def server_killed(story):
    killed([0])(story)


def keeper_killed(story):
    killed([1])(story)


def both_in_turn(story):
    killed([0, 1, 1, 0])(story)


def packed_and_killed(story):
    killed([0, 1], "--compress", "lz4")(story)


if __name__ == "__main__":
    stories = [two_churns, tree, nothing_is_mapped_and_little_is_there, dumped_while_pages_come,
               server_killed, keeper_killed, both_in_turn, killed_between_reading_and_recording,
               working_set_first, damaged_block, truncated_layer, packed_lz4, packed_zstd, packed_on_demand,
               packed_and_killed, damaged_frames, truncated_packed_layer, foreground_tells_why_it_ended, what_contradicts_it]
    stories += [hazard(name) for name in ("dontneed", "mremap", "munmap", "fork", "all_at_once")]
    main({f.__name__: f for f in stories})

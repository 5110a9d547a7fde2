#!/usr/bin/env -S python3 -B
"""What programs do with their memory while it is direct-mapped and while it is remapped.

Each hazard of churn runs through: direct-mapped with no remap for a while (anonymous semantics must
hold from the first instruction), then the remap under it, then a second checkpoint.
"""
import os
import shutil
import signal
import sys

from harness import children, demand, is_alive, main, poll, reap

# Story name: churn's options, and the counters of its report that must move.
HAZARDS = {
    "dontneed": (["--dontneed"], ["dontneed"]),
    "madv_free": (["--madv-free"], ["madv_free"]),
    "mremap": (["--remapper"], ["remapper"]),
    "brk": (["--brk"], ["brk"]),
    "mprotect": (["--mprotect"], ["mprotect"]),
    "mmap_over": (["--mmap-over"], ["mmap_over"]),
    "munmap": (["--munmap"], ["munmap"]),
    "fork": (["--fork"], ["fork"]),
    "spawn": (["--spawn"], ["spawn"]),
    "threads_churn": (["--threads-churn"], ["threads_churn"]),
    "syscalls": (["--syscalls"], ["syscalls"]),
    "all_at_once": (["--dontneed", "--remapper", "--brk", "--mprotect", "--mmap-over", "--munmap",
                     "--fork", "--spawn", "--threads-churn", "--syscalls", "--hazard-mib", "8"],
                    ["dontneed", "remapper", "brk", "mprotect", "mmap_over", "munmap", "fork",
                     "spawn", "threads_churn", "syscalls"]),
}


def await_hazards(churn, counters, what, amount=20):
    def counts():
        return churn.report().get("hazards", {})
    first = counts()
    least = {name: 3 if name == "fork" else amount for name in counters}

    def moved():
        demand(is_alive(churn.pid), f"churn ended {what}; report: {churn.report()}")
        now = counts()
        return now and all(now[name] >= first.get(name, 0) + least[name] for name in counters)
    poll(moved, lambda: f"churn's {', '.join(counters)} {what}; first {first}, last {counts()}", 120)


def end_with_children(churn):
    """A churn that forks has children; they end by themselves."""
    descendants = children(churn.pid)
    churn.end()
    for pid in descendants:
        poll(lambda pid=pid: reap(pid) is not None or not is_alive(pid), "a forked child ends", 60)


def hazard(options, counters):
    def story(story):
        churn = story.start("churn", "--threads", 2, "--mib", 64, "--hazard-us", 300, *options)
        await_hazards(churn, counters, "at the start")
        image = story.dump(churn, "first")
        story.restore(churn, image, "--remap", "off")
        await_hazards(churn, counters, "while direct-mapped")
        story.unmoor("remap", "-t", churn.pid)
        shutil.rmtree(image)
        await_hazards(churn, counters, "after the remap")
        churn.await_sweep()
        # The second time the remap begins with the restore, in the background.
        image = story.dump(churn, "second")
        story.restore(churn, image)
        await_hazards(churn, counters, "during the remap in the background")
        story.wait_ready(churn)
        shutil.rmtree(image)
        churn.await_sweep()
        story.demand_no_agent()
        end_with_children(churn)
    return story


def exec_during_remap(story):
    churn = story.start("churn", "--threads", 2, "--mib", 256)
    image = story.dump(churn, "image")
    story.restore(churn, image)
    os.kill(churn.pid, signal.SIGUSR2)
    poll(lambda: churn.report().get("executions") == 1, "churn executes itself anew")
    churn.await_progress("works after exec")
    story.wait_ready(churn)
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    churn.end()


def exec_while_direct_mapped(story):
    churn = story.start("churn", "--threads", 2, "--mib", 64)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")
    os.kill(churn.pid, signal.SIGUSR2)
    poll(lambda: churn.report().get("executions") == 1, "churn executes itself anew")
    churn.await_sweep()
    story.wait_ready(churn)
    shutil.rmtree(image)
    story.demand_no_agent()
    churn.end()


def exit_during_remap(story):
    churn = story.start("churn", "--threads", 2, "--mib", 512)
    image = story.dump(churn, "image")
    story.restore(churn, image)
    churn.end()
    story.demand_no_agent()


def killed_during_remap(story):
    churn = story.start("churn", "--threads", 2, "--mib", 512)
    image = story.dump(churn, "image")
    story.restore(churn, image)
    os.kill(churn.pid, signal.SIGKILL)
    churn.await_gone()
    story.demand_no_agent()


def stopped_during_remap(story):
    """A program that job control stops is remapped all the same, and stays stopped until SIGCONT."""
    churn = story.start("churn", "--threads", 2, "--mib", 256)
    image = story.dump(churn, "image")
    story.restore(churn, image)
    os.kill(churn.pid, signal.SIGSTOP)
    story.wait_ready(churn)
    story.demand_no_agent()
    with open(f"/proc/{churn.pid}/stat") as file:
        stopped = file.read().rsplit(")", 1)[1].split()[0]
    demand(stopped == "T", f"the program is to be stopped still, its state is {stopped}")
    shutil.rmtree(image)
    os.kill(churn.pid, signal.SIGCONT)
    churn.await_sweep()
    churn.end()


STORIES = {name: hazard(*what) for name, what in HAZARDS.items()}
for function in (exec_during_remap, exec_while_direct_mapped, exit_during_remap, killed_during_remap,
                 stopped_during_remap):
    STORIES[function.__name__] = function
for name, function in STORIES.items():
    function.__name__ = name

if __name__ == "__main__":
    sys.exit(main(STORIES))

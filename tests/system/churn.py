#!/usr/bin/env -S python3 -B
"""churn through two checkpoints: its own verifier sees every lost or torn write."""
import shutil

from harness import Skip, demand, footprint, is_alive, main, smaps_total, thp_setting


def two_generations(story, *options, between=None, arguments=(), **restoring):
    """Dump, direct-mapped restore, remap under writes, dump again with the first image deleted."""
    churn = story.start("churn", *options)
    churn.await_progress()
    before = footprint(churn.pid)
    first = story.dump(churn, "first")

    story.restore(churn, first, *arguments, **restoring)
    churn.await_progress("works while direct-mapped or being remapped")
    churn.reset_stall()
    story.wait_ready(churn)
    stall = churn.report()["stall_ns"]
    story.say(f"longest gap between two writes of a thread since the restore: {stall / 1e6:.2f} ms")
    churn.await_sweep()
    story.demand_no_agent()
    story.demand_untouched(churn, before)
    if between:
        between(churn)

    second = story.dump(churn, "second")
    shutil.rmtree(first)
    story.restore(churn, second, *arguments, **restoring)
    churn.await_progress("works after the second restore")
    story.wait_ready(churn)
    shutil.rmtree(second)
    churn.await_sweep()
    story.demand_no_agent()
    story.demand_untouched(churn, before)
    return churn.end()


def one_thread_64(story):
    two_generations(story, "--threads", 1, "--mib", 64)


def eight_threads_64(story):
    two_generations(story, "--threads", 8, "--mib", 64)


def one_thread_512(story):
    two_generations(story, "--threads", 1, "--mib", 512, "--regions", 2)


def eight_threads_512(story):
    two_generations(story, "--threads", 8, "--mib", 512)


def sparse(story):
    two_generations(story, "--threads", 2, "--mib", 256, "--sparse")


def hot(story):
    two_generations(story, "--threads", 2, "--mib", 256, "--pattern", "hot")


def sequential(story):
    two_generations(story, "--threads", 1, "--mib", 256, "--pattern", "seq")


def small_pages_only(story):
    churn = story.start("churn", "--threads", 2, "--mib", 128)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--thp", "never")
    story.wait_ready(churn)
    shutil.rmtree(image)
    churn.await_sweep()
    churn.end()


def without(story, abilities, huge):
    """The ways around what an older kernel lacks (src/base/fault_point.h): the same promises hold."""
    log = story.path("agent.log")

    def looked_at(churn):
        with open(log) as file:
            if "no UFFDIO_MOVE here" not in file.read():
                raise Skip("built without fault points")
        found = smaps_total(churn.pid, "AnonHugePages")
        demand(found >= 16 << 20 if huge else found == 0 or thp_setting() == "always",
               f"{found >> 20} MiB are in huge pages")
        story.say(f"{found >> 20} MiB in huge pages")
    if huge and thp_setting() == "never":
        raise Skip("this machine has no huge pages (transparent_hugepage/enabled is never)")
    faults = ",".join(f"kernel.{ability}:error@*" for ability in abilities)
    two_generations(story, "--threads", 4, "--mib", 96, "--sweep-ms", 200, between=looked_at, arguments=("--agent-log", log),
                    environment={"UNMOOR_FAULT": faults})


def without_uffdio_move(story):
    """Method C (docs/decisions.md): blocks are collapsed in the mirror."""
    without(story, ["uffdio_move"], huge=True)


def without_huge_pages(story):
    """Method B: neither UFFDIO_MOVE nor MADV_COLLAPSE; small pages."""
    without(story, ["uffdio_move", "collapse"], huge=False)


def eager(story):
    """--mode eager: anonymous before the program runs, so the image can go at once."""
    churn = story.start("churn", "--threads", 2, "--mib", 128)
    before = footprint(churn.pid)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--mode", "eager")
    demand(story.status(churn).code == 0, "an eagerly restored program must be READY at once")
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    story.demand_untouched(churn, before)
    churn.end()


def leave_running(story):
    """dump -R: the program runs on, and the image is as good."""
    churn = story.start("churn", "--threads", 2, "--mib", 64)
    image = story.path("image")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    demand(is_alive(churn.pid), "the program ended")
    churn.await_sweep()
    churn.end()
    churn.await_gone()
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def two_gib(story):
    two_generations(story, "--threads", 1, "--mib", 2048, "--regions", 2, "--sweep-ms", 4000)


def two_gib_eight_threads(story):
    two_generations(story, "--threads", 8, "--mib", 2048, "--sweep-ms", 4000)


if __name__ == "__main__":
    main({f.__name__: f for f in (
        one_thread_64, eight_threads_64, one_thread_512, eight_threads_512, sparse, hot, sequential,
        small_pages_only, without_uffdio_move, without_huge_pages, eager, leave_running, two_gib, two_gib_eight_threads)})

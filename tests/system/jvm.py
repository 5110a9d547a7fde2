#!/usr/bin/env -S python3 -B
"""A JVM with a live heap of several hundred MB: two checkpoints, remapped while it allocates."""
import os
import shutil

from harness import PROGRAMS, Program, Skip, demand, footprint, main, need_program, poll

MIB = 400


def start(story, collector):
    java = need_program("java")
    if not os.path.exists(os.path.join(PROGRAMS, "HeapChurn.class")):
        raise Skip("HeapChurn.class is not built: no javac when CMake was run")
    report = story.path("heap.json")
    # No shared performance file: CRIU would have to find it again in /tmp.
    popen = story.popen([java, collector, "-Xms1g", "-Xmx1g", "-XX:-UsePerfData", "-Xlog:disable",
                         "-cp", PROGRAMS, "HeapChurn", report, str(MIB), "2"])
    program = Program(story, popen.pid, report, popen)
    poll(lambda: popen.poll() is not None or program.report().get("operations", 0) > 20_000,
         "the JVM is warm", 150)
    demand(popen.poll() is None, f"the JVM ended at its start with {popen.returncode}")
    return program


def end(program):
    """HeapChurn checks its whole heap and ends."""
    with open(program.report_path + ".stop", "w"):
        pass
    poll(lambda: program.report().get("final"), "HeapChurn's last check", 150)
    program.await_gone(60)


def two_checkpoints(story, collector):
    jvm = start(story, collector)
    before = footprint(jvm.pid)
    story.say(f"{len(before.threads)} threads, {len(before.vmas)} VMAs")
    previous = None
    for name in ("first", "second"):
        image = story.dump(jvm, name)
        if previous:
            shutil.rmtree(previous)
        previous = image
        story.restore(jvm, image)
        jvm.await_progress("works while direct-mapped or being remapped", amount=2000)
        story.wait_ready(jvm)
        jvm.await_progress("works after the remap", amount=20_000)
        story.demand_no_agent()
        demand(jvm.pid not in story.agents(), "the JVM is itself")
    shutil.rmtree(previous)
    jvm.await_progress("works without any image", amount=50_000)
    end(jvm)


def g1(story):
    two_checkpoints(story, "-XX:+UseG1GC")


def serial(story):
    two_checkpoints(story, "-XX:+UseSerialGC")


def parallel(story):
    two_checkpoints(story, "-XX:+UseParallelGC")


if __name__ == "__main__":
    main({f.__name__: f for f in (g1, serial, parallel)})

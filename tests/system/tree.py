#!/usr/bin/env -S python3 -B
"""Trees of processes: copied-on-write memory shared by three, and a PID namespace."""
import json
import os
import shutil
import signal

from harness import (PROGRAMS, Failed, Program, children, demand, footprint, is_alive, main, poll,
                     status_field)


class Tree:
    """The three members of `tree`, parent first."""

    def __init__(self, story, *options):
        self.story = story
        self.parent = story.start("tree", *options)
        pids = poll(lambda: len(found := children(self.parent.pid)) == 2 and found,
                    "tree has two children")
        self.members = [self.parent]
        for number in (1, 2):
            report = f"{self.parent.report_path}.{number}"

            def ready(report=report):
                try:
                    with open(report) as file:
                        return json.load(file).get("pid") in pids
                except (OSError, ValueError):
                    return False
            poll(ready, f"child {number} of tree reports")
            with open(report) as file:
                self.members.append(Program(story, json.load(file)["pid"], report))

    def await_rounds(self, what):
        for member in self.members:
            member.await_progress(what, "rounds", 3)

    def await_gone(self):
        for member in self.members:
            member.await_gone()

    def outlives(self, image, before):
        """Its image goes; it works on, as its footprints were, and ends well."""
        shutil.rmtree(image)
        self.await_rounds("works without the image")
        self.story.demand_no_agent()
        for member, old in zip(self.members, before):
            self.story.demand_untouched(member, old)
        self.parent.end()
        self.await_gone()


def generations(story, mib=24):
    tree = Tree(story, "--mib", mib)
    before = [footprint(member.pid) for member in tree.members]
    previous = None
    for name in ("first", "second"):
        image = story.dump(tree.parent, name)
        tree.await_gone()
        if previous:
            shutil.rmtree(previous)
        previous = image
        story.restore(tree.parent, image)
        tree.await_rounds("works while direct-mapped or being remapped")
        for member in tree.members:
            story.wait_ready(member)
        tree.await_rounds("works after the remap")
        story.demand_no_agent()
        for member, old in zip(tree.members, before):
            story.demand_untouched(member, old)
    shutil.rmtree(previous)
    tree.await_rounds("works without any image")
    tree.parent.end()
    tree.await_gone()


def generations_large(story):
    generations(story, 128)


def direct_mapped_members_are_apart(story):
    """While all three map the same layer, each one's writes stay its own."""
    tree = Tree(story, "--mib", 32)
    image = story.dump(tree.parent, "image")
    tree.await_gone()
    story.restore(tree.parent, image, "--remap", "off")
    tree.await_rounds("works while direct-mapped")
    for member in reversed(tree.members):
        story.unmoor("remap", "-t", member.pid)
    shutil.rmtree(image)
    tree.await_rounds("works after the remap")
    story.demand_no_agent()
    tree.parent.end()


def pid_namespace(story):
    """The program is PID 1 of a PID namespace of its own. (With a mount namespace of its own as well
    stock CRIU does not restore it without a root file system, so that is left out.)"""
    report = story.path("churn.json")
    program = os.path.join(PROGRAMS, "churn")
    popen = story.popen(["unshare", "--pid", "--fork", "setsid", program,
                         "--report", report, "--mib", "48", "--threads", "2"])
    outer = poll(lambda: popen.poll() is not None or children(popen.pid), "unshare starts churn")
    if popen.poll() is not None:
        raise Failed("unshare --pid --fork failed")
    churn = Program(story, outer[0], report)
    poll(lambda: churn.report().get("ready"), "churn to be ready")
    demand(status_field(churn.pid, "NSpid").split()[-1] == "1", "churn is PID 1 of its namespace")
    previous = None
    for name in ("first", "second"):
        image = story.path(name)
        story.unmoor("dump", "-t", churn.pid, "-D", image)
        churn.await_gone()
        if previous is None:
            popen.wait(30)
        else:
            shutil.rmtree(previous)
        previous = image
        churn = Program(story, story.restore_root(image)[0], report)
        demand(status_field(churn.pid, "NSpid").split()[-1] == "1", "restored as PID 1")
        churn.await_progress("works while direct-mapped or being remapped")
        story.wait_ready(churn)
        churn.await_sweep()
        story.demand_no_agent()
    shutil.rmtree(previous)
    churn.await_sweep()
    os.kill(churn.pid, signal.SIGTERM)
    poll(lambda: not is_alive(churn.pid), "churn ends")
    demand(churn.report().get("final"), "the last verification is reported")


if __name__ == "__main__":
    main({f.__name__: f for f in (generations, generations_large, direct_mapped_members_are_apart, pid_namespace)})

#!/usr/bin/env -S python3 -B
"""Fidelity: each kind of mapping is after dump, restore and remap what it was, and safe meanwhile."""
import shutil

from harness import READY, Failed, demand, differences, footprint, main, page_protections, vmas


def start(story):
    zoo = story.start("zoo")
    for kind, place in sorted(zoo.report()["kinds"].items()):
        if not place.startswith("0x"):
            story.say(f"kind {kind} is left out: {place}")
    zoo.await_progress("verifies", "verified", 2)
    return zoo


def demand_equal_protections(before, zoo, when):
    """Each page the program had has the protection it had. (While it is direct-mapped the agent has a
    little memory of its own inside, where the program has none.)"""
    protection = {}
    for begin, end, what in page_protections(vmas(zoo.pid)):
        protection.update(dict.fromkeys(range(begin, end, 4096), what[:3]))
    for begin, end, what in page_protections(before):
        for page in range(begin, end, 4096):
            demand(protection.get(page) == what[:3],
                   f"page {page:x} of {begin:x}-{end:x} was {what}, is {protection.get(page)} {when}")


def maps_equal_after_remap(story):
    zoo = start(story)
    before = footprint(zoo.pid)
    image = story.dump(zoo, "image")
    story.restore(zoo, image)
    story.wait_ready(zoo)
    story.demand_no_agent()
    zoo.await_progress("verifies", "verified", 2)
    story.demand_untouched(zoo, before)
    # The same once more, from the remapped program.
    second = story.dump(zoo, "second")
    shutil.rmtree(image)
    story.restore(zoo, second)
    story.wait_ready(zoo)
    story.demand_no_agent()
    zoo.await_progress("verifies", "verified", 2)
    story.demand_untouched(zoo, before)
    zoo.end()


def protections_equal_while_direct_mapped(story):
    zoo = start(story)
    before = footprint(zoo.pid)
    image = story.dump(zoo, "image")
    story.restore(zoo, image, "--remap", "off")
    demand_equal_protections(before.vmas, zoo, "while direct-mapped")
    zoo.await_progress("verifies while direct-mapped", "verified", 3)
    demand_equal_protections(before.vmas, zoo, "while direct-mapped, later")
    story.unmoor("remap", "-t", zoo.pid)
    demand(story.status(zoo).code == READY, "READY after `unmoor remap`")
    shutil.rmtree(image)
    zoo.await_progress("verifies after the remap", "verified", 2)
    story.demand_no_agent()
    story.demand_untouched(zoo, before)
    zoo.end()


def stock_criu_keeps_the_rest(story):
    """What this test leaves out of the comparison is what CRIU itself does not keep; tell it."""
    zoo = start(story)
    before = vmas(zoo.pid)
    image = story.dump(zoo, "image")
    story.restore(zoo, image, "--mode", "eager")
    # It also lets the kernel join anonymous neighbours that became alike.
    lines = differences(before, vmas(zoo.pid), join_anonymous=True)
    if lines:
        raise Failed("an eager restore differs:\n  " + "\n  ".join(lines))
    zoo.end()


if __name__ == "__main__":
    main({f.__name__: f for f in (
        maps_equal_after_remap, protections_equal_while_direct_mapped, stock_criu_keeps_the_rest)})

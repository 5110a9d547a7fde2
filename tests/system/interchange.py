#!/usr/bin/env -S python3 -B
"""Stock CRIU's own directories: restored by unmoor, imported, chains of them resolved."""
import json
import os
import shutil
import signal
import struct

from chains import Scripted, dump
from harness import Program, Skip, children, demand, main, poll, smaps_total, vmas
from stock_unmoor import CRIU
from tree import Tree

PAGE = 4096
PE_PARENT, PE_PRESENT = 1, 4


def stock_dump(story, program, name):
    folder = story.path(name)
    os.mkdir(folder)
    dumping = story.popen([CRIU, "dump", "-t", str(program.pid), "-D", folder, "-o", "dump.log"])
    if dumping.wait(60) != 0:
        raise Skip("stock criu cannot dump here")
    program.await_gone()
    story.await_no_orphan()
    return folder


def stock_directory_is_restored(story):
    """`restore -D` of a plain CRIU directory: imported beside it once, mapped, remapped, dumped again."""
    churn = story.start("churn", "--mib", 32, "--threads", 2)
    churn.await_progress()
    folder = stock_dump(story, churn, "stock")
    before = sorted(os.listdir(folder))
    for again in (False, True):
        outcome = story.restore(churn, folder, "--remap", "off")
        demand(("imported" in outcome.err) == (not again), f"it is said once: {outcome}")
        demand(any(folder + ".unmoor-import/layers" in v.name for v in vmas(churn.pid)), "it is mapped")
        demand(sorted(os.listdir(folder)) == before, "the stock directory is left as it was")
        if not again:
            os.kill(churn.pid, signal.SIGKILL)
            churn.await_gone()
    churn.await_progress("works while mapped")
    story.unmoor("remap", "-t", churn.pid)
    shutil.rmtree(folder)
    shutil.rmtree(folder + ".unmoor-import")
    churn.await_sweep()
    story.demand_no_agent()
    image = story.dump(churn, "image")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def a_changed_stock_directory_is_imported_anew(story):
    """The copy beside a stock directory is used only for what it was made of."""
    for round in range(2):
        churn = story.start("churn", "--mib", 8 * (round + 1))
        churn.await_progress()
        shutil.rmtree(story.path("stock"), ignore_errors=True)
        folder = stock_dump(story, churn, "stock")
        outcome = story.restore(churn, folder)
        demand("imported" in outcome.err, f"imported anew: {outcome}")
        story.wait_ready(churn)
        churn.await_sweep()
        churn.end()


def import_of_a_tree(story):
    """Several tasks and shared memory; what was imported is an image like any, and stands alone."""
    tree = Tree(story, "--mib", 32)
    folder = stock_dump(story, tree.parent, "stock")
    tree.await_gone()
    image = story.path("image")
    report = story.unmoor("import", folder, image, "--json").json()
    demand(report["tasks"] == 3 and report["generations"] == 1, f"three tasks: {report}")
    shutil.rmtree(folder)
    story.unmoor("verify", image)
    story.restore(tree.parent, image)
    for member in tree.members:
        story.wait_ready(member)
    tree.await_rounds("works after the remap")
    second = story.path("second")
    outcome = story.unmoor("dump", "-t", tree.parent.pid, "-D", second, "--json").json()
    demand(outcome["parent"] == image, f"its parent is the import: {outcome}")
    tree.await_gone()


# A chain as `criu dump --prev-images-dir` leaves it. There is no soft-dirty on all machines to make one
# by, so it is made from one dump: pages move to a parent directory, and the pagemap says so.

def varint(value):
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7f | 0x80])
        value >>= 7
    return out + bytes([value])


def read_pagemap(path):
    with open(path, "rb") as file:
        data = file.read()
    at, messages = 8, []
    while at < len(data):
        size, = struct.unpack_from("<I", data, at)
        end, at, fields = at + 4 + size, at + 4, {}

        def number():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 0x7f) << shift
                shift += 7
                if byte < 0x80:
                    return value
        while at < end:
            key = number()
            fields[key >> 3] = number()
        messages.append(fields)
    return data[:8], messages[0][1], [(m[1], m.get(5) or m.get(2), m.get(4, PE_PRESENT)) for m in messages[1:]]


def write_pagemap(path, magic, pages_id, entries):
    def message(*fields):
        body = b"".join(varint(number << 3) + varint(value) for number, value in fields)
        return struct.pack("<I", len(body)) + body
    with open(path, "wb") as file:
        file.write(magic + message((1, pages_id)))
        for at, count, flags in entries:
            file.write(message((1, at), (2, count), (4, flags), (5, count)))


def split_off_parent(folder, parent, pid, keep, garbage):
    """Moves pages for which keep(number) is false to `parent`; there also lies garbage where the younger
    dump has pages of its own, and a hole, as `criu dedup` makes them."""
    os.mkdir(parent)
    name = f"pagemap-{pid}.img"
    magic, pages_id, entries = read_pagemap(os.path.join(folder, name))
    pages_path = os.path.join(folder, f"pages-{pages_id}.img")
    with open(pages_path, "rb") as file:
        data = file.read()
    young, old, young_data, old_data, at, number = [], [], b"", b"", 0, 0
    for address, count, flags in entries:
        if not flags & PE_PRESENT:
            young.append((address, count, flags))
            continue
        for i in range(count):
            page, at, number = data[at:at + PAGE], at + PAGE, number + 1
            here = (address + i * PAGE, 1)
            if keep(number):
                young.append((*here, PE_PRESENT))
                young_data += page
                if number % 5 == 0:
                    old.append((*here, PE_PRESENT))
                    old_data += garbage
            else:
                young.append((*here, PE_PARENT))
                old.append((*here, PE_PRESENT))
                old_data += page
    write_pagemap(os.path.join(folder, name), magic, pages_id, young)
    with open(pages_path, "wb") as file:
        file.write(young_data)
    write_pagemap(os.path.join(parent, name), magic, pages_id, old)
    with open(os.path.join(parent, f"pages-{pages_id}.img"), "wb") as file:
        file.write(old_data)
    os.symlink(os.path.relpath(parent, folder), os.path.join(folder, "parent"))


def chain_of_stock_directories(story):
    """Pages marked as being in the parent are taken from there, through two parents; a chain that is not
    complete, or a pages file of another length, is refused."""
    churn = story.start("churn", "--mib", 8)
    churn.await_progress()
    folder = stock_dump(story, churn, "stock")
    parent, oldest = story.path("parent"), story.path("oldest")
    split_off_parent(folder, parent, churn.pid, lambda number: number % 3 == 0, b"\xa5" * PAGE)
    split_off_parent(parent, oldest, churn.pid, lambda number: number % 2 == 0, b"\x5a" * PAGE)
    image = story.path("image")
    report = story.unmoor("import", folder, image, "--json").json()
    demand(report["generations"] == 3, f"three directories: {report}")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    os.kill(churn.pid, signal.SIGKILL)
    churn.await_gone()

    broken = story.path("broken")
    os.rename(oldest, oldest + ".away")
    outcome = story.unmoor("import", folder, broken, expect=2)
    demand("parent" in outcome.err, f"says what is missing: {outcome}")
    os.rename(oldest + ".away", oldest)
    pages = next(n for n in os.listdir(parent) if n.startswith("pages-"))
    os.truncate(os.path.join(parent, pages), os.path.getsize(os.path.join(parent, pages)) - PAGE)
    outcome = story.unmoor("import", folder, broken, expect=2)
    demand(pages in outcome.err, f"says which file: {outcome}")
    demand(not [n for n in os.listdir(story.folder) if n.startswith("broken")], "nothing is left")


def fork_of(program):
    """Makes the scripted program fork; the child is another that does as it is told."""
    program.do("pid = os.fork()\n"
               "if pid == 0:\n"
               "    report += '.child'; command += '.child'; last = 0; a = areas['a']; tell(done=0)")
    pid, = poll(lambda: children(program.pid), "the child")
    child = Program(program.story, pid, program.report_path + ".child")
    poll(lambda: child.report().get("ready"), "the child is ready")

    def do(code="pass"):
        with open(program.command + ".child", "w") as file:
            json.dump([program.number, code], file)
        poll(lambda: child.report().get("done") == program.number, f"the child does {code}")
    return child, do


def mostly_shared_pair(story):
    """A program, its child, and what lets the child do something: of their 24 MiB few pages differ."""
    program = Scripted(story)
    program.do("areas['a'] = Area(24); areas['a'].fill(0, 6144, 1)")
    child, child_does = fork_of(program)
    program.do("areas['a'].fill(50, 60, 8)")
    child_does("a.fill(0, 100, 7); a.drop(300, 310); a.zero(400, 410)")
    return program, child, child_does


def forked_pages_are_shared(story):
    """What a child has from its parent is in the layer once, and mapped from one place by both."""
    program, child, child_does = mostly_shared_pair(story)
    image, report = dump(story, program, "image")
    demand(report["written_bytes"] < 36 << 20, f"shared pages were written twice: {report}")
    for flat in (False, True):
        for member in (program, child):
            member.await_gone()
        story.await_no_orphan()
        if flat:
            image = story.path("flat")
            flat_report = story.unmoor("flatten", story.path("image"), image, "--json").json()
            demand(flat_report["written_bytes"] <= report["written_bytes"], f"{flat_report}")
        story.unmoor("verify", image)
        story.restore(program, image, "--remap", "off")
        program.do()
        child_does()  # both have read every page by now
        areas = []
        for member in (program, child):
            area, = [v for v in vmas(member.pid) if v.name.endswith(".pages") and v.end - v.begin >= 24 << 20]
            areas.append((area.begin, area.inode, area.offset))
        demand(areas[0] == areas[1], f"both map one place of one file: {areas}")
        proportional, resident = smaps_total(child.pid, "Pss"), smaps_total(child.pid, "Rss")
        story.say(f"the child has {resident >> 20} MiB, its share of them is {proportional >> 20} MiB")
        demand(proportional < 0.75 * resident, "pages are in memory once")
        if not flat:
            for member in (child, program):
                os.kill(member.pid, signal.SIGKILL)
    for member in (program, child):
        story.unmoor("remap", "-t", member.pid)
    program.do("areas['a'].fill(0, 20, 9)")
    child_does("a.fill(1000, 1010, 9)")
    # A generation after that: each has a base of its own, which is the same one.
    second, report = dump(story, program, "second", "--prev-images-dir", image)
    demand(report["written_bytes"] < 12 << 20, f"only what changed: {report}")
    for member in (program, child):
        member.await_gone()
    story.await_no_orphan()
    shutil.rmtree(image)
    story.restore(program, second)
    program.do()
    child_does()
    for member in (program, child):
        story.wait_ready(member)


if __name__ == "__main__":
    main({f.__name__: f for f in (
        stock_directory_is_restored, a_changed_stock_directory_is_imported_anew, import_of_a_tree,
        chain_of_stock_directories, forked_pages_are_shared)})

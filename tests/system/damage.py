#!/usr/bin/env -S python3 -B
"""A layer is damaged while a program maps it: the remap from outside finds it before anything of it
is made the program's own, says where it is, and touches nothing else."""
import contextlib
import glob
import json
import os
import signal
import subprocess
import time

from harness import NEVER, READY, UNMOOR, USER_MISTAKE, Program, demand, main, poll, state, vmas

PAGE = 4096
BLOCK = 64 << 10
PAGES = 16384  # 64 MiB
# Does what the file it is told says, and says what it found: it touches nothing unasked.
PROGRAM = r"""
import ctypes, mmap, os, sys, time
pages, folder = int(sys.argv[1]), sys.argv[2]
m = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
def content(n, tag):
    return (n + 1 + tag * (1 << 32)).to_bytes(8, "little") * 512
for n in range(pages):
    m[n * 4096:(n + 1) * 4096] = content(n, 0)
tags = {}
def answer(text):
    with open(folder + "/answer.new", "w") as file:
        file.write(text)
    os.rename(folder + "/answer.new", folder + "/answer")
answer(str(ctypes.addressof(ctypes.c_char.from_buffer(m))))
while True:
    time.sleep(0.005)
    try:
        with open(folder + "/order") as file:
            what, begin, end = file.read().split()
    except (FileNotFoundError, ValueError):
        continue
    os.remove(folder + "/order")
    begin, end = int(begin), int(end)
    if what == "verify":
        wrong = [n for n in range(begin, end)
                 if m[n * 4096:(n + 1) * 4096] != (bytes(4096) if tags.get(n) == "none" else content(n, tags.get(n, 0)))]
        answer("wrong %s" % wrong[:8] if wrong else "right")
    if what == "write":
        for n in range(begin, end):
            tags[n] = 7
            m[n * 4096:(n + 1) * 4096] = content(n, 7)
        answer("written")
    if what == "give_back":
        m.madvise(mmap.MADV_DONTNEED, begin * 4096, (end - begin) * 4096)
        for n in range(begin, end):
            tags[n] = "none"
        answer("given back")
"""


class Obedient:
    def __init__(self, story, pages=PAGES):
        self.story = story
        self.pages = pages
        # Its own memory is the heap, so that the pages come last in the layer.
        self.process = story.popen(["python3", "-c", PROGRAM, str(pages), story.folder],
                                   env=story.environment | {"PYTHONMALLOC": "malloc",
                                                            "MALLOC_MMAP_THRESHOLD_": "1000000000"})
        self.address = int(self.answer())
        self.program = Program(story, self.process.pid, story.path("no report"), self.process)
        self.pid = self.process.pid
        self.image = story.dump(self.program, "image")
        self.layer, = glob.glob(os.path.join(self.image, "layers", "*.pages"))
        with open(os.path.join(self.image, "manifest.json")) as file:
            task, = json.load(file)["tasks"]
        vma, = [v for v in task["vmas"]
                if int(v["start"], 16) <= self.address and self.address + pages * PAGE <= int(v["end"], 16)]
        self.vma = (int(vma["start"], 16), int(vma["end"], 16))
        self.offset = vma["offset"] + self.address - self.vma[0]

    def answer(self):
        def read():
            with contextlib.suppress(FileNotFoundError), open(self.story.path("answer")) as file:
                text = file.read()
                os.remove(self.story.path("answer"))
                return text
        return poll(read, "the program to answer", 60)

    def do(self, what, begin, end):
        with open(self.story.path("order.new"), "w") as file:
            file.write(f"{what} {begin} {end}")
        os.rename(self.story.path("order.new"), self.story.path("order"))
        return self.answer()

    def restore(self, *arguments):
        self.story.restore(self.program, self.image, *arguments)

    def offset_of(self, page):
        return self.offset + page * PAGE

    def block_of(self, page):
        """The pages of the 64 KiB of the file that a page lies in."""
        first = (self.offset_of(page) & ~(BLOCK - 1)) - self.offset
        return first // PAGE, first // PAGE + BLOCK // PAGE

    def flip(self, page):
        with open(self.layer, "r+b") as file:
            file.seek(self.offset_of(page) + 1234)
            byte = file.read(1)[0]
            file.seek(self.offset_of(page) + 1234)
            file.write(bytes([byte ^ 16]))

    def verify(self, begin, end):
        if begin >= end:
            return
        answer = self.do("verify", begin, end)
        demand(answer == "right", f"pages {begin} to {end}: {answer}")

    def mapped(self):
        """Pages still mapped from the layer, as ranges."""
        return [((v.begin - self.address) // PAGE, (v.end - self.address) // PAGE)
                for v in vmas(self.pid) if v.name.startswith(self.layer) and v.begin < self.address + self.pages * PAGE
                and v.end > self.address]

    def status(self, *arguments):
        return self.story.unmoor("status", "-t", self.pid, *arguments, expect=None)

    def await_never(self, *words):
        outcome = self.story.unmoor("wait", "-t", self.pid, "--timeout", 60, expect=NEVER)
        for word in (self.layer, *words):
            demand(str(word) in outcome.out, f"{word} is said: {outcome}")
        demand(self.status().out == outcome.out, f"status says the same: {self.status()}")
        found = self.status("--json").json()
        demand(found["status"] == "NEVER" and self.layer in found["reason"], f"in JSON too: {found}")
        return found

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        self.program.await_gone()
        self.story.demand_no_agent()


def damaged_block(story):
    """Only those 64 KiB stay mapped; what the program wrote is not held against the image."""
    it = Obedient(story)
    it.restore("--remap", "off")
    first, last = it.block_of(5000)
    it.flip(5000)
    written = it.block_of(9000)  # of these nothing comes from the layer
    it.do("write", *written)
    it.flip(9000)
    outcome = story.unmoor("remap", "-t", it.pid, expect=USER_MISTAKE)
    at = it.offset_of(first)
    memory = f"{it.address + first * PAGE:x}-{it.address + last * PAGE:x}"
    for word in (it.layer, f"offset {at}", memory, str(it.pid), f"{it.vma[0]:x}-{it.vma[1]:x}"):
        demand(word in outcome.err, f"{word} is said: {outcome}")
    demand(len(outcome.err.strip().splitlines()) == 1, f"in one line: {outcome}")
    found = it.await_never(f"offset {at}", memory)
    demand(it.mapped() == [(first, last)], f"the rest is anonymous: {it.mapped()}, not {(first, last)}")
    demand(found["direct_mapped_bytes"] == BLOCK and "agent" in found, f"and watched: {found}")
    demand(found["progress"]["verified_bytes"] > (PAGES - 100) * PAGE, f"all was held against its hash: {found}")
    it.verify(0, first)
    it.verify(last, PAGES)
    refused = story.unmoor("dump", "-t", it.pid, "-D", story.path("second"), expect=USER_MISTAKE)
    demand(it.layer in refused.err, f"a dump tells the reason: {refused}")

    # Another worker says the same, and finds it.
    def progress():
        with open(os.path.join(story.runtime, f"{it.pid}.json")) as file:
            return json.load(file)
    worker = progress()["worker"]
    os.kill(worker, signal.SIGKILL)
    poll(lambda: progress().get("worker") != worker, "another worker")
    it.await_never(f"offset {at}", memory)

    # What the program does with that memory is as ever; without it there is nothing left to refuse.
    it.do("write", 5001, 5002)
    it.verify(5001, 5002)
    it.do("give_back", first, last)
    it.verify(0, PAGES)
    story.unmoor("remap", "-t", it.pid)  # the new worker was not asked yet
    demand(it.status().code == READY, f"READY, it is {it.status()}")
    story.demand_no_agent()
    it.verify(0, PAGES)
    it.end()


def found_in_the_background(story):
    """A restore does not read the pages; its agent does, small pages or huge ones."""
    it = Obedient(story)
    it.flip(PAGES - 20)
    first, last = it.block_of(PAGES - 20)
    for options in ((), ("--thp", "never"), ("--guard", "fault")):
        it.restore(*options)
        it.await_never(f"offset {it.offset_of(first)}")
        demand(it.mapped() == [(first, last)], f"{options}: the rest is anonymous: {it.mapped()}")
        it.verify(0, first)
        it.end()


def truncated_layer(story):
    """What lies behind the file's end is not made zeros of; touching it is the program's own end."""
    it = Obedient(story)
    it.restore("--remap", "off")
    cut = it.block_of(8000)[0]
    os.truncate(it.layer, it.offset_of(cut) + 100)
    outcome = story.unmoor("remap", "-t", it.pid, expect=USER_MISTAKE)
    demand("truncated" in outcome.err and it.layer in outcome.err, f"it is said: {outcome}")
    it.await_never("truncated")
    demand([begin for begin, _ in it.mapped()] == [cut], f"mapped from {cut} on: {it.mapped()}")
    it.verify(0, cut)
    with open(story.path("order"), "w") as file:
        file.write("verify %d %d" % (cut + 32, cut + 33))
    poll(lambda: state(it.pid) in ("", "Z"), "SIGBUS to end the program")
    it.program.await_gone()
    story.demand_no_agent()


def truncated_anywhere(story):
    """Inside the first block, inside the last, at a limit of blocks, at 0; before the remap and during it."""
    it = Obedient(story, pages=4096)
    good = it.layer + ".good"
    subprocess.run(["cp", "--sparse=always", it.layer, good], check=True)
    behind = it.offset + it.pages * PAGE
    limit = it.offset_of(it.block_of(2000)[0])
    for name, cut in (("in the first block", it.offset_of(0) + 100), ("in the last block", behind - 5 * PAGE + 1),
                      ("in the last page", behind - PAGE + 1), ("at a limit of blocks", limit), ("at 0", 0)):
        for during in (False, True):
            it.restore("--remap", "off")
            if cut == 0:  # its own memory is gone with the file
                os.kill(it.pid, signal.SIGSTOP)
            remap = story.popen([UNMOOR, "remap", "-t", str(it.pid)]) if during else None
            os.truncate(it.layer, cut)
            if remap:
                demand(remap.wait(60) in (0, USER_MISTAKE), f"{name}: remap ends with {remap.returncode}")
            # One that was quicker than the truncation has nothing left to say.
            if not during or it.status().code != READY:
                outcome = story.unmoor("remap", "-t", it.pid, expect=USER_MISTAKE)
                words = ("truncated", it.layer, f"process {it.pid}", f"offset {cut}")
                first = max(0, ((cut & ~(BLOCK - 1)) - it.offset) // PAGE)
                if cut and not during:  # else of what was looked at first
                    words += (f"{it.address + first * PAGE:x}-", f"{it.vma[0]:x}-{it.vma[1]:x}")
                for word in words:
                    demand(word in outcome.err, f"{name}, during {during}: {word} is said: {outcome}")
                it.await_never(*words[:2], words[3])
                it.verify(0, first)
            it.end()
            subprocess.run(["cp", "--sparse=always", good, it.layer], check=True)


def lost_pages(story):
    """A hole where there was data reads as zeros: only the index tells."""
    it = Obedient(story)
    it.restore("--remap", "off")
    first, last = it.block_of(3000)[0], it.block_of(3300)[1]
    written = it.block_of(12000)
    it.do("write", *written)
    for begin, end in ((first, last), written):
        subprocess.run(["fallocate", "--punch-hole", "--offset", str(it.offset_of(begin)), "--length",
                        str((end - begin) * PAGE), it.layer], check=True)
    story.unmoor("remap", "-t", it.pid, expect=USER_MISTAKE)
    it.await_never("hash", f"offset {it.offset_of(first)}")
    demand(it.mapped() == [(first, last)], f"the hole stays mapped: {it.mapped()}, not {(first, last)}")
    it.verify(0, first)
    it.verify(last, PAGES)
    it.end()


def damage_everywhere(story):
    """Not a mapping for every damaged block: after many the rest of that memory stays as it is."""
    it = Obedient(story)
    for page in range(100, PAGES, 80):
        it.flip(page)
    it.restore()
    found = it.await_never("more)")
    mapped = it.mapped()
    demand(20 < len(mapped) < 80 and mapped[-1][1] >= PAGES, f"{len(mapped)} pieces: {mapped}")
    demand(found["direct_mapped_bytes"] < it.vma[1] - it.vma[0], f"some of it is remapped: {found}")
    good = [page for begin, end in zip([0] + [e for _, e in mapped], [b for b, _ in mapped])
            for page in range(begin, end)]
    it.verify(good[0], mapped[0][0])
    it.end()


def unverified_on_request(story):
    it = Obedient(story)
    it.restore("--remap", "off")
    time.sleep(0.5)  # watched for so long
    remap = story.unmoor("remap", "-t", it.pid, "--json")
    report = remap.json()
    demand(report["verified_bytes"] >= PAGES * PAGE, f"all is verified: {report}")
    demand(report["elapsed_ns"] < remap.seconds * 1e9, f"the watch before it does not count: {report}, {remap}")
    it.verify(0, PAGES)
    it.end()
    it.flip(777)
    it.restore("--no-verify")
    story.wait_ready(it.program)
    demand(it.status("--json").json()["progress"]["verified_bytes"] == 0, "nothing is verified")
    answer = it.do("verify", 0, PAGES)
    demand("777" in answer, f"the damage is the program's now: {answer}")
    it.end()


if __name__ == "__main__":
    main({f.__name__: f for f in (damaged_block, found_in_the_background, truncated_layer, truncated_anywhere,
                                  lost_pages,
                                  damage_everywhere, unverified_on_request)})

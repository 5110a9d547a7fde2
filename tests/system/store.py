#!/usr/bin/env -S python3 -B
"""Image directories kept, checked and mended: what the commands that need no running program do."""
import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess

from harness import PROGRAMS, SOURCE, UNMOOR, USER_MISTAKE, Skip, demand, main, poll, read_proc, threads, vmas
from stock_unmoor import CRIU

DAMAGED = 3
READER = os.path.join(SOURCE, "tools", "read_image.py")


def image_of_churn(story, *options):
    """A checkpoint of a churn that has ended since, and the churn."""
    churn = story.start("churn", *(options or ("--mib", 32, "--threads", 2)))
    churn.await_sweep()
    return churn, story.dump(churn, "image")


def layer_files(image):
    layers = os.path.join(image, "layers")
    pages, = (n for n in os.listdir(layers) if n.endswith(".pages"))
    return os.path.join(layers, pages), os.path.join(layers, pages[:-6] + ".index")


def data_ranges(path):
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 0
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                return
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            yield begin, at


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x40]))


def verify(story, image, *options, expect=0):
    report = story.unmoor("verify", image, "--json", *options, expect=expect).json()
    demand(report["sound"] == (expect == 0), f"`sound` fits the exit code: {report}")
    return report


def verify_finds_all_damage(story):
    """Every damage is told, with the file, the offset, the task, the VMA and the address."""
    churn, image = image_of_churn(story)
    sound = verify(story, image)
    demand(sound["checked_bytes"] >= 32 << 20, f"the pages are read: {sound}")
    pages, index = layer_files(image)
    ranges = list(data_ranges(pages))
    places = sorted({ranges[0][0], ranges[-1][1] - 1, (ranges[0][0] + ranges[0][1]) // 2})
    for place in places:
        flip(pages, place)
    demand(not verify(story, image, "--quick")["damages"], "--quick does not read pages")
    found = verify(story, image, expect=DAMAGED)["damages"]
    shown = story.unmoor("show", "-D", image, "--json").json()
    for place in places:
        hits = [d for d in found if d["offset"] <= place < d["offset"] + d["size_bytes"]]
        demand(len(hits) == 1 and hits[0]["file"] == pages, f"{place} is told once: {found}")
        at, = hits[0]["places"]
        vma, = (v for t in shown["tasks"] for v in t["vmas"] if f"{v['begin']}-{v['end']}" == at["vma"])
        address = int(vma["begin"], 16) + place - vma["offset"]
        demand(at["vpid"] == churn.pid and at["task"] == "churn" and
               int(at["begin"], 16) <= address < int(at["end"], 16),
               f"byte {place} is address {address:x}: {at}")
    text = story.unmoor("verify", image, expect=DAMAGED).out
    demand(text.count("damaged: ") == len(found) and f"task {churn.pid} (churn)" in text, text)

    flip(os.path.join(image, "manifest.json"), 100)
    found = verify(story, image, expect=DAMAGED)["damages"]
    demand(any(d["file"].endswith("manifest.json") for d in found) and
           any(d["file"] == pages for d in found), f"a damaged manifest hides nothing: {found}")
    flip(os.path.join(image, "manifest.json"), 100)
    os.truncate(index, 100)
    os.truncate(pages, 4096)
    criu_pages = os.path.join(image, "criu", "pages-1.img")
    os.truncate(criu_pages, os.path.getsize(criu_pages) - 4096)
    found = {d["file"] for d in verify(story, image, expect=DAMAGED)["damages"]}
    demand(criu_pages in found, f"CRIU's pages are too few: {found}")
    os.truncate(os.path.join(image, "criu", "pstree.img"), 9)
    found = {d["file"] for d in verify(story, image, expect=DAMAGED)["damages"]}
    demand(index in found and os.path.join(image, "criu") in found, f"all parts are told: {found}")
    for nothing in (story.path("absent"), story.folder):
        story.unmoor("verify", nothing, expect=USER_MISTAKE)


def repair(story):
    """Two copies damaged in different places make a whole one; what neither has stays told."""
    churn, image = image_of_churn(story)
    copy = story.path("copy")
    shutil.copytree(image, copy, copy_function=lambda a, b: os.system(f"cp --sparse=always '{a}' '{b}'"))
    pages, index = layer_files(image)
    copied, _ = layer_files(copy)
    begin, end = max(data_ranges(pages), key=lambda r: r[1] - r[0])
    block = (begin + end) // 2 & ~0xffff
    flip(pages, begin)
    flip(pages, block)
    flip(copied, begin + 65536)
    os.truncate(index, 100)
    linked = story.path("linked")
    os.link(pages, linked)
    report = verify(story, image, "--repair-from", copy)
    demand(len(report["repaired"]) == 3, f"index and two blocks were mended: {report['repaired']}")
    verify(story, image)
    demand(os.stat(linked).st_ino != os.stat(pages).st_ino, "a new file: a mapped one is not written")

    flip(pages, block)
    flip(copied, block)
    before = os.stat(pages)
    outcome = verify(story, image, "--repair-from", copy, expect=DAMAGED)
    demand(os.stat(pages).st_ino == before.st_ino, "what cannot be mended is left as it was")
    demand(any(str(block) in d["what"] for d in outcome["damages"]), f"the block is named: {outcome}")
    demand(not [n for n in os.listdir(os.path.dirname(pages)) if "repair" in n], "nothing is left")
    flip(copied, block)
    verify(story, image, "--repair-from", copy)
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def await_stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    poll(lambda: all(read_proc(pid, f"task/{t}/stat").rsplit(")", 1)[1].split()[0] == "T" for t in threads(pid)),
         "all threads to be stopped")


def reader(*words, code=0):
    done = subprocess.run([READER, *map(str, words)], capture_output=True)
    if "No module named 'xxhash'" in done.stderr.decode():
        raise Skip("python3-xxhash is not installed (tools/setup installs it)")
    demand(done.returncode == code, f"{words}: {done.returncode} {done.stderr.decode()[-500:]}")
    return done


def compare_by_reader(story, image, pid):
    """The memory of the stopped process is what tools/read_image.py reads; bytes compared, by kind."""
    shown, = story.unmoor("show", "-D", image, "--json").json()["tasks"]
    listed = reader("list", image).stdout.decode()
    compared = dict.fromkeys(("mapped", "criu"), 0)
    with open(f"/proc/{pid}/mem", "rb") as memory, open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        for vma in shown["vmas"]:
            if vma["kind"] not in compared or "sh" in vma["flags"] or vma["protection"][0] != "r":
                continue
            begin, end = int(vma["begin"], 16), int(vma["end"], 16)
            demand(f"{begin:x}-{end:x}" in listed, f"{begin:x} is listed")
            ours = reader("read", image, pid, f"{begin:x}", f"{end:x}").stdout
            demand(len(ours) == end - begin, f"{len(ours)} bytes of {vma}")
            memory.seek(begin)
            theirs = memory.read(end - begin)
            pagemap.seek(begin // 4096 * 8)
            entries = struct.unpack(f"<{len(theirs) // 4096}Q", pagemap.read(len(theirs) // 512))
            for page, entry in enumerate(entries):
                # A page of the file that a private mapping maps is not in the image.
                if entry >> 61 & 1:
                    continue
                at = slice(page * 4096, page * 4096 + 4096)
                if ours[at] != theirs[at]:
                    # A thread's rseq area, which the kernel writes whenever the thread gets to another CPU.
                    places = [i for i in range(4096) if ours[at][i] != theirs[at][i]]
                    demand(vma["kind"] == "criu" and places[-1] - places[0] < 32,
                           f"page {begin + page * 4096:x} of {vma}: bytes {places[:40]}")
            compared[vma["kind"]] += len(ours)
    demand(compared["mapped"] >= 32 << 20 and compared["criu"] > 0, f"much was compared: {compared}")


def python_reader_agrees(story):
    """tools/read_image.py, written from docs/format.md alone, reads the memory of the running program."""
    churn = story.start("churn", "--mib", 32, "--threads", 2)
    churn.await_progress()
    await_stopped(churn.pid)  # so that memory stays as it is when dumped
    image = story.path("image")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    demand(f"task {churn.pid} churn" in reader("list", image).stdout.decode(), "the task is listed")
    demand(reader("verify", image).stdout == b"sound\n", "sound")
    compare_by_reader(story, image, churn.pid)
    pages, _ = layer_files(image)
    flip(pages, max(data_ranges(pages), key=lambda r: r[1] - r[0])[0])
    demand(b"block at" in reader("verify", image, code=2).stderr, "the damaged block is named")
    os.kill(churn.pid, signal.SIGCONT)
    churn.end()


def python_reader_resolves_deltas(story):
    """A page comes from the topmost layer that has it, also when read without unmoor; verify agrees."""
    churn = story.start("churn", "--mib", 32, "--threads", 2, "--pattern", "hot")
    images = [story.path(f"image{i}") for i in range(3)]
    for i, image in enumerate(images):
        churn.await_progress(amount=2000)
        await_stopped(churn.pid)
        story.unmoor("dump", "-t", churn.pid, "-D", image, "-R", *(("--prev-images-dir", images[i - 1]) if i else ()))
        demand(reader("verify", image).stdout == b"sound\n", "sound")
        compare_by_reader(story, image, churn.pid)
        os.kill(churn.pid, signal.SIGCONT)
    demand(" + " in reader("list", images[2]).stdout.decode(), "there are deltas")
    for image in images:
        verify(story, image)
    log = story.unmoor("log", story.folder, "--json").json()["generations"]
    demand([g.get("parent_directory") for g in log] == [None, *images[:2]], f"the chain is told: {log}")
    churn.end()
    churn.await_gone()
    # All of them as one plain directory.
    plain = story.path("plain")
    story.unmoor("export", images[2], plain)
    for image in images:
        story.unmoor("rm", image)
    restore_by_stock_criu(story, churn, plain)


def one_command_at_a_time(story):
    """A directory that is read is not replaced meanwhile, and the message says by whom it is in use."""
    churn = story.start("churn", "--mib", 16)
    image = story.path("image")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    fd = os.open(image, os.O_RDONLY)
    for lock, refused in ((fcntl.LOCK_SH, ("dump", "rm")), (fcntl.LOCK_EX, ("dump", "rm", "verify", "restore"))):
        fcntl.flock(fd, lock)
        for command in refused:
            words = {"dump": ("dump", "-t", churn.pid, "-D", image, "-R"), "rm": ("rm", image),
                     "verify": ("verify", image), "restore": ("restore", "-D", image, "-d")}[command]
            outcome = story.unmoor(*words, expect=USER_MISTAKE)
            demand(f"process {os.getpid()}" in outcome.err and image in outcome.err, f"says by whom: {outcome}")
        if lock == fcntl.LOCK_SH:
            verify(story, image)
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
    churn.await_sweep()
    churn = story_ends(churn)
    # The lock is gone once the program runs, though the agent and the command may still be there.
    story.restore(churn, image, "--remap", "off")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    churn.await_sweep()
    churn.end()


def together(story, *commands):
    """Starts all of them, then waits for each: exit code and what it said on stderr."""
    running = []
    for number, words in enumerate(commands):
        err = story.path(f"together-{number}.err")
        with open(err, "w") as file:
            running.append((story.popen([UNMOOR, *map(str, words)], stderr=file), err))
    outcomes = []
    for process, err in running:
        process.wait(120)
        with open(err) as file:
            outcomes.append((process.returncode, file.read()))
    return outcomes


def two_dumps_at_once(story):
    """Of two programs, into directories beside one another: neither knows of the other."""
    churns = [story.start("churn", "--mib", 64) for _ in range(2)]
    images = [story.path(f"image{i}") for i in range(2)]
    outcomes = together(story, *(("dump", "-t", churn.pid, "-D", image) for churn, image in zip(churns, images)))
    demand([code for code, _ in outcomes] == [0, 0], f"both succeed: {outcomes}")
    for churn in churns:
        churn.await_gone()
    for churn, image in zip(churns, images):
        verify(story, image)
        story.restore(churn, image)
    for churn in churns:
        churn.await_sweep()
        churn.end()


def two_dumps_into_one(story):
    """One is told that the other is at work; the directory is one of the two, whole, and both programs run on."""
    churns = [story.start("churn", "--mib", 128) for _ in range(2)]
    image = story.path("image")
    for over_an_older in (False, True):
        outcomes = together(story, *(("dump", "-t", churn.pid, "-D", image, "-R", "--full") for churn in churns))
        codes = sorted(code for code, _ in outcomes)
        demand(codes in ([0, 0], [0, USER_MISTAKE]), f"over an older one {over_an_older}: {outcomes}")
        for code, err in outcomes:
            busy = "another command is writing a checkpoint to" in err or "is in use by" in err
            demand(code == 0 or busy and image in err and len(err.strip().splitlines()) == 1, f"it says so: {err}")
        verify(story, image)
        for churn in churns:
            churn.await_sweep()
    demand([name for name in os.listdir(story.folder) if ".partial-" in name] == [], "nothing is left beside it")
    for churn in churns:
        churn.end()


def story_ends(churn):
    churn.end()
    churn.await_gone()
    return churn


def restore_by_stock_criu(story, churn, plain):
    log = story.path("criu.log")
    done = story.popen([CRIU, "restore", "-D", plain, "-d", "-o", log])
    demand(done.wait(60) == 0, f"criu restore failed, its log: {log}")
    churn.popen = None
    demand(not [v for v in vmas(churn.pid) if story.folder in v.name], "it maps nothing of an image")
    os.kill(churn.pid, signal.SIGCONT)  # some were stopped when dumped
    churn.await_sweep()
    churn.end()


def export_is_restored_by_stock_criu(story):
    """What `export` writes is a plain CRIU directory: stock criu restores it, with none of unmoor's help."""
    churn, image = image_of_churn(story)
    plain = story.path("plain")
    report = story.unmoor("export", image, plain, "--json").json()
    demand(report["pages_bytes"] >= 32 << 20, f"all pages are there: {report}")
    demand("layers" not in os.listdir(plain) and "manifest.json" not in os.listdir(plain), "nothing of ours")
    story.unmoor("export", image, plain, expect=USER_MISTAKE)
    shutil.rmtree(image)
    restore_by_stock_criu(story, churn, plain)


def a_damaged_image_is_not_exported(story):
    _, image = image_of_churn(story, "--mib", 16)
    pages, _ = layer_files(image)
    flip(pages, max(data_ranges(pages), key=lambda r: r[1] - r[0])[0])
    outcome = story.unmoor("export", image, story.path("plain"), expect=USER_MISTAKE)
    demand("damaged" in outcome.err and pages in outcome.err, f"says what: {outcome}")
    demand(not [n for n in os.listdir(story.folder) if n.startswith("plain")], "nothing is left")


def log_rm_gc(story):
    """A store of several images: what is told of it, and what is removed, is what is there."""
    store = story.path("store")
    os.mkdir(store)
    images = [os.path.join(store, f"image{i}") for i in range(3)]
    for image in images:
        churn = story.start("churn", "--mib", 16)
        churn.await_progress()
        story.dump(churn, image)
    log = story.unmoor("log", store, "--json").json()["generations"]
    demand([g["directory"] for g in log] == images, f"oldest first: {log}")
    demand(all(g["written_bytes"] >= 16 << 20 and 0.9 < g["dirty_share"] < 1.1 for g in log), f"full ones: {log}")
    demand(story.unmoor("log", store).out.count("written of") == 3, "as text")

    # What image1 shares with image2 by hard links frees nothing.
    pages, index = layer_files(images[1])
    foreign = os.path.join(images[2], "layers", os.path.basename(pages))
    os.link(pages, foreign)
    report = story.unmoor("rm", images[1], "--json").json()
    demand(not os.path.exists(images[1]), "it is gone")
    demand(report["freed_bytes"] < 8 << 20, f"the pages stay: {report}")
    report = story.unmoor("rm", images[0], "--json").json()
    demand(report["freed_bytes"] > 16 << 20, f"the pages are freed: {report}")
    for wrong in (story.path("absent"), store, PROGRAMS):
        story.unmoor("rm", wrong, expect=USER_MISTAKE)
    demand(os.path.isdir(PROGRAMS) and os.path.isdir(store), "nothing else is removed")

    left = images[0] + ".partial-AbC123"
    os.makedirs(os.path.join(left, "layers"))
    held = images[0] + ".partial-held00"
    os.mkdir(held)
    strange = os.path.join(store, "photos.partial-abcdef")
    os.makedirs(os.path.join(strange, "holiday"))
    fd = os.open(held, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    dry = story.unmoor("gc", store, "--dry-run", "--json").json()
    demand(sorted(i["path"] for i in dry["items"]) == sorted([left, foreign]), f"these two: {dry}")
    demand(os.path.exists(left) and os.path.exists(foreign), "--dry-run removes nothing")
    kept = {item["path"]: item for item in dry["kept"]}
    demand(set(kept) == {images[2], held}, f"reachable is the image, in use the other: {kept}")
    with open(os.path.join(images[2], "manifest.json"), encoding="utf-8") as file:
        ids = [layer["id"] for layer in json.load(file)["layers"]]
    demand(kept[images[2]]["layers"] == ids, f"its layers: {kept}")
    text = story.unmoor("gc", store, "--dry-run").out
    demand(f"kept {images[2]}: an image of 1 layer\n" in text and f"would remove {left}" in text, text)
    done = story.unmoor("gc", store, "--json").json()
    demand(done["items"] == dry["items"] and done["freed_bytes"] == dry["freed_bytes"] > 16 << 20, f"{done}")
    demand(not os.path.exists(left) and not os.path.exists(foreign), "they are gone")
    demand(os.path.exists(held) and os.path.exists(strange), "what is in use or somebody else's stays")
    os.close(fd)
    verify(story, images[2])


if __name__ == "__main__":
    main({f.__name__: f for f in (
        verify_finds_all_damage, repair, python_reader_agrees,
        python_reader_resolves_deltas, one_command_at_a_time, two_dumps_at_once, two_dumps_into_one, log_rm_gc,
        export_is_restored_by_stock_criu, a_damaged_image_is_not_exported)})

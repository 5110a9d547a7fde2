#!/usr/bin/env -S python3 -B
"""Each way to restore, with the programs people have, on the storage and under the limits they have.

Where a story is about all three modes they come one after the other, from the same image: what differs
between them is then the mode alone.
"""
import contextlib
import ctypes
import glob
import mmap
import os
import re
import resource
import shutil
import signal
import struct
import subprocess

import jvm as java
from churn import two_generations
from harness import (LATER, READY, UNMOOR, Skip, demand, descriptors, footprint, is_alive, main, poll, read_proc,
                     smaps_total, state, thp_setting, vmas)
from lazy import demand_still_packed, flip, listing
from redis import Redis, Writer
from tree import Tree
from zoo import start as start_zoo

MODES = ("direct", "lazy", "eager")
LITTLE = ("--threads", 2, "--mib", 32, "--sweep-ms", 100)


def mode(name):
    return ("--mode", name)


def kill(program):
    os.kill(program.pid, signal.SIGKILL)
    program.await_gone()


def demand_nothing_left(story, program, when):
    """Of a restore that failed."""
    poll(lambda: not is_alive(program.pid), f"nothing of the program to be left ({when})")
    program.await_gone()
    story.demand_no_agent()
    left = [name for name in os.listdir(story.folder) if name.startswith("unmoor-")]
    demand(not [name for name in left if os.path.isdir(story.path(name))], f"left behind ({when}): {left}")


# Programs.

def churn_eager(story):
    two_generations(story, "--threads", 4, "--mib", 256, arguments=mode("eager"))


def huge_pages_eager(story):
    """Blocks all of whose pages are in use are huge pages before the program runs; no VMA shows it."""
    if thp_setting() == "never":
        raise Skip("this machine has no huge pages (transparent_hugepage/enabled is never)")
    churn = story.start("churn", "--threads", 1, "--mib", 64)
    before = footprint(churn.pid)
    image = story.dump(churn, "image")
    for options, huge in (((), True), (("--thp", "never"), False)):
        story.restore(churn, image, *mode("eager"), *options)
        found = smaps_total(churn.pid, "AnonHugePages")
        demand(found >= 48 << 20 if huge else found == 0 or thp_setting() == "always",
               f"{found >> 20} MiB are in huge pages with {options}")
        churn.await_sweep()
        story.demand_untouched(churn, before)
        if huge:
            kill(churn)
    churn.end()


def has_huge_file_pages(folder):
    """Whether a file written 2 MiB at a time is mapped by huge pages here."""
    path = os.path.join(folder, "huge")
    size = 8 << 20
    with open(path, "w+b", buffering=0) as file:
        for at in range(0, size, 2 << 20):
            os.pwrite(file.fileno(), bytes([1]) * (2 << 20), at)
        with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory:
            memory.find(b"\0")
            found = smaps_total("self", "FilePmdMapped")
    os.remove(path)
    return found > 0


def huge_pages_direct(story):
    """What the page cache has in huge pages since the dump, the program maps by them; a recorded restore does not."""
    if not has_huge_file_pages(story.folder):
        raise Skip("files have no huge pages in the page cache here")
    churn = story.start("churn", "--threads", 1, "--mib", 64, "--write-share", 0)
    image = story.dump(churn, "image")
    for options, huge in ((("--remap", "off"), True), (("--record",), False)):
        story.restore(churn, image, *options)
        churn.await_sweep()
        found = smaps_total(churn.pid, "FilePmdMapped")
        demand(found >= 32 << 20 if huge else found == 0, f"{found >> 20} MiB are mapped by huge pages with {options}")
        if huge:
            kill(churn)
            story.await_no_orphan()
    story.unmoor("record", "-t", churn.pid, "--stop")
    story.wait_ready(churn)
    churn.end()


def tree_eager(story):
    family = Tree(story, "--mib", 64)
    before = [footprint(member.pid) for member in family.members]
    image = story.dump(family.parent, "image")
    family.await_gone()
    story.restore(family.parent, image, *mode("eager"))
    for member in family.members:
        demand(story.status(member).code == READY, "READY at once")
    family.outlives(image, before)


def zoo_lazy(story):
    zoo = start_zoo(story)
    before = footprint(zoo.pid)
    image = story.dump(zoo, "image")
    story.restore(zoo, image, *mode("lazy"))
    story.wait_ready(zoo)
    shutil.rmtree(image)
    zoo.await_progress("verifies", "verified", 2)
    story.demand_no_agent()
    story.demand_untouched(zoo, before, join_anonymous=True)
    zoo.end()


def start_redis(story):
    """With some 40 MB and no client; the server and the digest of its keys."""
    server = Redis(story)
    client = server.client()
    client("DEBUG", "POPULATE", 40_000, "key", 800)
    client.close()
    digest = server.digest()
    server.disconnected()
    return server, digest


def redis(how, *form):
    def story(story):
        server, digest = start_redis(story)
        before = footprint(server.program.pid)
        image = story.dump(server.program, "image", *form)
        story.restore(server.program, image, *mode(how))
        writer = Writer(server.port, 1)
        demand(server.digest() == digest, "the digest differs after the restore")
        writer.start()
        saved = server.save_in_background()
        story.wait_ready(server.program)
        server.expected.update(writer.finish())
        shutil.rmtree(image)
        compared = server.demand_own_writes()
        story.say(f"{compared} own writes compared, BGSAVE of {saved >> 20} MiB")
        story.demand_no_agent()
        after = footprint(server.program.pid)
        demand(after.threads == before.threads and after.children == [] and after.tracer == "0",
               f"threads, children or tracer differ: {after[:4]}")
        kill(server.program)
    return story


def redis_lazy(story):
    redis("lazy")(story)


def redis_eager(story):
    redis("eager")(story)


def redis_packed_lazy(story):
    redis("lazy", "--compress", "lz4")(story)


def redis_packed_eager(story):
    redis("eager", "--compress", "zstd")(story)


def jvm(how):
    def story(story):
        program = java.start(story, "-XX:+UseG1GC")
        for name in ("first", "second"):
            image = story.dump(program, name)
            story.restore(program, image, *mode(how))
            program.await_progress("works after the restore", amount=2000)
            story.wait_ready(program)
            shutil.rmtree(image)
            program.await_progress("works without the image", amount=20_000)
            story.demand_no_agent()
        java.end(program)
    return story


def jvm_lazy(story):
    jvm("lazy")(story)


def jvm_eager(story):
    jvm("eager")(story)


def maps_stay(story, program):
    """Stopped, so that the program itself changes nothing: the map list in each mode is that of the dump."""
    os.kill(program.pid, signal.SIGSTOP)
    poll(lambda: state(program.pid) == "T", "the program is stopped")
    before = footprint(program.pid)
    image = story.dump(program, "image")
    for how in MODES:
        story.restore(program, image, *mode(how))
        story.wait_ready(program)
        story.demand_no_agent()
        # Pipes and sockets are made anew by CRIU, with other numbers.
        story.demand_untouched(program, before._replace(descriptors=descriptors(program.pid)))
        if how != MODES[-1]:
            kill(program)
            story.await_no_orphan()
    shutil.rmtree(image)
    os.kill(program.pid, signal.SIGCONT)
    story.say(f"{len(before.vmas)} VMAs, the same in each mode")


def maps_of_redis(story):
    server, digest = start_redis(story)
    maps_stay(story, server.program)
    demand(server.digest() == digest, "the digest differs")
    kill(server.program)


def maps_of_jvm(story):
    program = java.start(story, "-XX:+UseG1GC")
    maps_stay(story, program)
    program.await_progress("works after all", amount=2000)
    java.end(program)


def maps_of_churn(story):
    churn = story.start("churn", "--threads", 3, "--mib", 96)
    maps_stay(story, churn)
    churn.await_sweep()
    churn.end()


# Endings.

def eager_restore_killed(story):
    """kill -9 of the command while it fills the memory, and of criu before: nothing is left half running."""
    churn = story.start("churn", *LITTLE)
    image = story.dump(churn, "image")
    churn.popen = None
    outcome = story.unmoor("restore", "-D", image, "-d", *mode("eager"), expect=None,
                           environment={"UNMOOR_FAULT": "fill.piece:kill@2"})
    if outcome.code == 0:
        raise Skip("built without fault points")
    demand(outcome.code == -signal.SIGKILL, f"it was killed: {outcome}")
    demand_nothing_left(story, churn, "after a kill -9 of the command")
    outcome = story.unmoor("restore", "-D", image, "-d", *mode("eager"), expect=1,
                           environment={"UNMOOR_FAULT": "fill.piece:error@2"})
    demand("nothing was restored" in outcome.err, f"it says what became of it: {outcome}")
    demand_nothing_left(story, churn, "after an error")
    story.restore(churn, image, *mode("eager"))
    churn.await_sweep()
    churn.end()


def criu_killed(story):
    """Under each mode: nothing of the program is left, the image is good."""
    churn = story.start("churn", *LITTLE)
    image = story.dump(churn, "image")
    for how in MODES:
        restore = story.popen([UNMOOR, "restore", "-D", image, "-d", *mode(how)])

        def criu():
            found = [pid for pid in story.marked("criu")]
            return found or restore.poll() is not None
        found = poll(criu, "criu runs", interval=0)
        for pid in found if found is not True else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if restore.wait(60) == 0:
            story.say(f"{how}: killed too late")
            kill(churn)
        demand_nothing_left(story, churn, how)
    churn.popen = None
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def damaged_eager(story):
    """A flipped bit and a short file: nothing runs, and the message says where and whose it is."""
    churn = story.start("churn", "--threads", 1, "--mib", 32)
    image = story.dump(churn, "image")
    folder = os.path.join(image, "layers")
    path, = (os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".pages"))
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        at = file.seek(0, os.SEEK_DATA) + (1 << 20)
        at = file.seek(at, os.SEEK_DATA)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    outcome = story.unmoor("restore", "-D", image, "-d", *mode("eager"), expect=None)
    demand(outcome.code in (1, 2) and "nothing was restored" in outcome.err, f"refused: {outcome}")
    told = re.search(r"(\S+\.pages): the \d+ bytes at offset (\d+) .*task (\d+) \(churn\) has this at 0x", outcome.err)
    demand(told and told[1] == path and int(told[2]) <= at < int(told[2]) + (64 << 10) and
           int(told[3]) == churn.pid, f"file, offset, task and address are told: {outcome}")
    demand_nothing_left(story, churn, "damaged")
    with open(path, "r+b") as file:
        file.truncate(size - (2 << 20))
    for how in MODES:
        outcome = story.unmoor("restore", "-D", image, "-d", *mode(how), expect=None)
        demand(outcome.code in (1, 2) and path in outcome.err, f"{how}: truncated, refused: {outcome}")
        demand_nothing_left(story, churn, "truncated")


# Packed images.

def packed_eager(story):
    """Decompressed into the program's memory: nothing of it is on the disk meanwhile or afterwards."""
    churn = story.start("churn", "--threads", 2, "--mib", 96)
    before = footprint(churn.pid)
    for how in ("lz4", "zstd"):
        churn.await_sweep()
        image = story.dump(churn, how, "--compress", how)
        files = listing(image)
        story.restore(churn, image, *mode("eager"))
        demand(story.status(churn).code == READY, "READY at once")
        demand_still_packed(story, image, files)
        shutil.rmtree(image)
        churn.await_sweep()
        story.demand_untouched(churn, before)
    churn.end()
    story.demand_no_agent()


def packed_damaged_eager(story):
    churn = story.start("churn", "--threads", 1, "--mib", 32)
    image = story.dump(churn, "image", "--compress", "zstd")
    path, = glob.glob(os.path.join(image, "layers", "*.packed"))
    at = os.path.getsize(path) // 2
    with open(path, "r+b") as file:
        flip(file, at)
    outcome = story.unmoor("restore", "-D", image, "-d", *mode("eager"), expect=None)
    told = re.search(r"(\S+\.packed) is damaged.* at offset (\d+) .*task (\d+) \(churn\) has this at 0x", outcome.err)
    demand(outcome.code in (1, 2) and told and told[1] == path and at - (2 << 20) < int(told[2]) <= at and
           int(told[3]) == churn.pid, f"refused, with file, offset, task and address: {outcome}")
    demand_nothing_left(story, churn, "damaged")
    os.truncate(path, at)
    for how in MODES:
        outcome = story.unmoor("restore", "-D", image, "-d", *mode(how), expect=None)
        demand(outcome.code in (1, 2) and path in outcome.err, f"{how}: truncated, refused: {outcome}")
        demand_nothing_left(story, churn, "truncated")


def packed_chain(story):
    """Chains of which the base, or what lies over it, is packed, or both, in each mode that maps nothing."""
    churn = story.start("churn", "--threads", 2, "--mib", 96, "--rate", 2000)
    base = story.dump(churn, "base")
    story.restore(churn, base)
    story.wait_ready(churn)
    plain = story.dump(churn, "plain", "--prev-images-dir", base)
    both = story.path("both")
    story.unmoor("pack", plain, both, "--compress", "zstd")
    kept = {os.path.basename(path)[:32] for path in glob.glob(os.path.join(base, "layers", "*.pages"))}
    layers = {os.path.basename(path)[:32] for path in glob.glob(os.path.join(plain, "layers", "*.pages"))}
    demand(kept < layers, f"a chain of {layers} over {kept}")
    for name, packed in (("both", layers), ("base packed", kept), ("delta packed", layers - kept)):
        image = story.path(name.replace(" ", "-"))
        if name != "both":
            shutil.copytree(plain, image, copy_function=os.link)
            for layer in packed:
                os.remove(os.path.join(image, "layers", layer + ".pages"))
                shutil.copy(os.path.join(both, "layers", layer + ".packed"), os.path.join(image, "layers"))
        files = listing(image)
        for how in ("lazy", "eager"):
            story.restore(churn, image, *mode(how))
            story.wait_ready(churn)
            churn.await_sweep()
            demand_still_packed(story, image, files)
            story.say(f"{name}: right, {how}")
            kill(churn)
            story.await_no_orphan()
    story.restore(churn, both)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def packed_auto(story):
    """Left to unmoor, a packed image is not unpacked, unless somebody has done that already."""
    churn = story.start("churn", *LITTLE)
    image = story.dump(churn, "image", "--compress", "lz4")
    for how, expected in (("auto", "lazy"), ("direct", "direct"), ("auto", "direct")):
        found = story.unmoor("restore", "-D", image, "-d", *mode(how), "--json").json()
        demand(found["mode"] == expected, f"{how} is {expected}: {found}")
        demand(how != "auto" or expected == "direct" or "packed" in found["mode_reason"], f"and why: {found}")
        churn.popen = None
        story.wait_ready(churn)
        churn.await_sweep()
        kill(churn)
        story.await_no_orphan()


# Limits.

@contextlib.contextmanager
def limited_group(mib):
    """A memory control group with a limit, as its directory."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split() for line in file]
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1]
        unified = kind == "cgroup2"
        if unified or (kind == "cgroup" and "memory" in options.split(",")):
            folder = os.path.join(mount[4], f"unmoor-story-{os.getpid()}")
            limit = os.path.join(folder, "memory.max" if unified else "memory.limit_in_bytes")
            try:
                os.mkdir(folder)
            except OSError:
                continue
            try:
                if not os.path.exists(limit):
                    continue
                with open(limit, "w") as file:
                    file.write(str(mib << 20))
                yield folder, limit
                return
            finally:
                def emptied():
                    with contextlib.suppress(OSError):
                        os.rmdir(folder)
                    return not os.path.exists(folder)
                poll(emptied, f"{folder} to be empty", 20)
    raise Skip("no memory control group can be made here")


def enter(folder):
    with open(os.path.join(folder, "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))


def memory_limit(story):
    """A program that does not fit its control group is not killed: eager says so before it runs, the others
    go on as they are, LATER with the reason, and finish once there is room."""
    churn = story.start("churn", "--threads", 1, "--mib", 160, "--rate", 50, "--sweep-ms", 100000000)
    image = story.dump(churn, "image")
    with limited_group(96) as (folder, limit):
        def restore(how, expect):
            return story.unmoor("restore", "-D", image, "-d", *mode(how), expect=expect,
                                preexec_fn=lambda: enter(folder))
        outcome = restore("eager", 1)
        demand("of memory to spare" in outcome.err and "nothing was restored" in outcome.err,
               f"the reason is told: {outcome}")
        demand_nothing_left(story, churn, "no memory")
        for how in ("direct", "lazy"):
            with open(limit, "w") as file:
                file.write(str(96 << 20))
            restore(how, 0)
            churn.popen = None
            later = poll(lambda: re.search("of memory", (outcome := story.status(churn)).out) and outcome,
                         "the reason to be told", 30)
            demand(later.code == LATER, f"LATER with the reason: {later}")
            demand(is_alive(churn.pid), "the program lives")
            with open(limit, "w") as file:
                file.write(str(512 << 20))
            story.wait_ready(churn)
            churn.end()
            churn.await_gone()
            story.demand_no_agent()


def address_space_limit(story):
    """RLIMIT_AS leaves no room for a mirror; lazy and eager need none. No program ends of it."""
    churn = story.start("churn", *LITTLE)
    with open(f"/proc/{churn.pid}/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * 4096 + (4 << 20)
    resource.prlimit(churn.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    image = story.dump(churn, "image")
    for how in MODES:
        story.restore(churn, image, *mode(how))
        if how == "direct":
            later = poll(lambda: re.search("staging|address space", (outcome := story.status(churn)).out) and outcome,
                         "the reason to be told", 30)
            demand(later.code == LATER, f"LATER with the reason: {later}")
            resource.prlimit(churn.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        story.wait_ready(churn)
        churn.await_sweep()
        story.demand_no_agent()
        kill(churn)


def locked_memory(story):
    """mlockall: the memory is there and locked again, whatever the mode."""
    churn = story.start("churn", *LITTLE, "--lock")
    before = footprint(churn.pid)
    locked = int(re.search(r"VmLck:\s+(\d+)", open(f"/proc/{churn.pid}/status").read())[1])
    image = story.dump(churn, "image")
    for how in MODES:
        story.restore(churn, image, *mode(how))
        story.wait_ready(churn)
        churn.await_sweep()
        story.demand_no_agent()
        now = int(re.search(r"VmLck:\s+(\d+)", open(f"/proc/{churn.pid}/status").read())[1])
        demand(now == locked, f"{how}: {now} kB are locked, it was {locked}")
        story.demand_untouched(churn, before)
        kill(churn)


@contextlib.contextmanager
def swap_space(story, mib):
    """A swap file of the story's own; other programs' memory may get there, too, and comes back."""
    path = story.path("swap")
    with open(path, "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        os.posix_fallocate(file.fileno(), 0, mib << 20)
    for command in (["mkswap", path], ["swapon", path]):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise Skip(f"no swap can be made here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", path], check=True)
        os.remove(path)


def page_out(pid):
    """Asks the kernel to swap out all that is the program's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    process_madvise, pageout = 440, 21
    pidfd = os.pidfd_open(pid)
    try:
        for vma in vmas(pid):
            if "w" not in vma.protection or vma.name.startswith("[v"):
                continue
            piece = struct.pack("QQ", vma.begin, vma.end - vma.begin)
            libc.syscall(process_madvise, pidfd, piece, ctypes.c_size_t(1), pageout, 0)
    finally:
        os.close(pidfd)


def swapped_out(story):
    """Memory that is in swap when it is dumped, and again and again while its restore goes on."""
    with swap_space(story, 512):
        churn = story.start("churn", "--threads", 2, "--mib", 64, "--rate", 2000, "--sweep-ms", 500)

        def paged_out():
            """MiB. A page that is being written, or is just used, stays: not all of them at every try."""
            page_out(churn.pid)
            return int(re.search(r"VmSwap:\s+(\d+)", read_proc(churn.pid, "status"))[1]) >> 10
        poll(lambda: paged_out() >= 16, "16 MiB to be in swap")
        image = story.dump(churn, "image")
        for how in MODES:
            story.restore(churn, image, *mode(how))
            most = 0
            while story.status(churn).code != READY:
                most = max(most, paged_out())
            most = max(most, poll(paged_out, f"something to be swapped out ({how})"))
            story.say(f"up to {most} MiB in swap after the restore ({how})")
            churn.await_sweep()
            story.demand_no_agent()
            if how != MODES[-1]:
                kill(churn)
        next_image = story.dump(churn, "next")
        story.restore(churn, next_image)
        story.wait_ready(churn)
        churn.await_sweep()
        churn.end()


# Storage.

def restored_in_each_mode(story, churn, image):
    for how in MODES:
        story.restore(churn, image, *mode(how))
        churn.await_progress(f"works ({how})")
        story.wait_ready(churn)
        churn.await_sweep()
        story.demand_no_agent()
        kill(churn)


def on_tmpfs(story):
    folder = story.mount_tmpfs("memory", 256)
    churn = story.start("churn", *LITTLE)
    image = story.dump(churn, os.path.join(folder, "image"))
    restored_in_each_mode(story, churn, image)


def on_overlay(story):
    """The image in the lower layer of an overlay, as in a container's image; another in its upper."""
    base = story.mount_tmpfs("base", 256)
    lower, upper, work, merged = (os.path.join(base, name) for name in ("lower", "upper", "work", "merged"))
    for folder in (lower, upper, work, merged):
        os.mkdir(folder)
    churn = story.start("churn", *LITTLE)
    story.dump(churn, os.path.join(lower, "image"))
    if subprocess.run(["mount", "-t", "overlay", "overlay", "-o",
                       f"lowerdir={lower},upperdir={upper},workdir={work}", merged],
                      stderr=subprocess.DEVNULL).returncode != 0:
        raise Skip("cannot mount an overlay here")
    story.mounts.append(merged)
    restored_in_each_mode(story, churn, os.path.join(merged, "image"))


if __name__ == "__main__":
    main({f.__name__: f for f in (
        churn_eager, huge_pages_eager, huge_pages_direct, tree_eager, zoo_lazy, redis_lazy, redis_eager, redis_packed_lazy,
        redis_packed_eager, jvm_lazy, jvm_eager, maps_of_redis, maps_of_jvm, maps_of_churn,
        eager_restore_killed, criu_killed, damaged_eager, packed_eager, packed_damaged_eager,
        packed_chain, packed_auto, memory_limit, address_space_limit, locked_memory,
        swapped_out, on_tmpfs, on_overlay)})

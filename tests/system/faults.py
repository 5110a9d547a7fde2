#!/usr/bin/env -S python3 -B
"""Faults in the middle: whatever of unmoor or of the machine fails, the program keeps its memory."""
import contextlib
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time

from chains import Scripted
from harness import (LATER, READY, UNMOOR, USER_MISTAKE, Program, children, demand, differences, footprint, is_alive,
                     main, poll, read_proc, state, tree_bytes)

# Not so fast that it keeps from the CPU what is tested.
MODEST = ("--threads", 2, "--rate", 20000)
BIG = (*MODEST, "--mib", 384, "--sweep-ms", 500)


def parent_of(pid):
    return int(read_proc(pid, "stat").rsplit(")", 1)[1].split()[1])


def workers_and_supervisors(story):
    """unmoor's processes: those with a parent among them, and the others."""
    agents = story.agents()
    workers = []
    for pid in agents:
        try:
            if parent_of(pid) in agents:
                workers.append(pid)
        except OSError:
            continue
    return workers, [pid for pid in agents if pid not in workers]


def helpers(churn):
    """What unmoor started inside the program: churn itself has no children here."""
    return children(churn.pid)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def finish(story, churn, before, image):
    """After a fault: the program is unhurt, `unmoor remap` completes, nothing is left."""
    churn.demand_alive("after the fault")
    churn.await_progress("works after the fault")
    story.unmoor("remap", "-t", churn.pid)
    demand(story.status(churn).code == READY, "READY after `unmoor remap`")
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    story.demand_untouched(churn, before, join_anonymous=True)
    churn.end()


def killed_during_remap(victims):
    """Restores again and again, and kills victims(story, churn) at another moment each time."""
    def story(story):
        rng = random.Random(7)
        hits = 0
        for attempt in range(6):
            churn = story.start("churn", *BIG)
            before = footprint(churn.pid)
            image = story.dump(churn, f"image-{attempt}")
            story.restore(churn, image)
            delay = rng.uniform(0, 0.25)
            until = time.monotonic() + delay
            while time.monotonic() < until:
                pass
            # Any moment will do; one where there is somebody to kill counts.
            deadline = time.monotonic() + 5
            found = []
            while not found and time.monotonic() < deadline and story.status(churn).code == LATER:
                found = [pid for pid in victims(story, churn) if kill(pid)]
            hits += bool(found)
            story.say(f"killed {found} after {delay * 1000:.0f} ms, status then: "
                      f"{story.status(churn).out.strip()[:100]}")
            finish(story, churn, before, image)
            if hits >= 3:
                return
        demand(hits > 0, "never was there anybody to kill: the memory is too small for this machine")
    return story


worker_killed = killed_during_remap(lambda story, churn: workers_and_supervisors(story)[0])
supervisor_killed = killed_during_remap(lambda story, churn: workers_and_supervisors(story)[1])
all_agents_killed = killed_during_remap(lambda story, churn: story.agents())
helper_killed = killed_during_remap(lambda story, churn: helpers(churn))


def worker_killed_semantics_kept(story):
    """With one worker dead MADV_DONTNEED still gives zeros: the supervisor holds what it takes."""
    churn = story.start("churn", "--threads", 2, "--mib", 512, "--dontneed")
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")
    for _ in range(3):
        for pid in workers_and_supervisors(story)[0]:
            kill(pid)
        churn.await_progress("works after a worker's death", amount=5000)
    story.unmoor("remap", "-t", churn.pid)
    shutil.rmtree(image)
    churn.await_sweep()
    story.demand_no_agent()
    churn.end()


def worker_fails(story):
    """Where no worker can begin again, who gives memory back waits, and sees no old bytes."""
    churn = story.start("churn", "--threads", 2, "--mib", 64, "--dontneed")
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off", environment={"UNMOOR_FAULT": "agent.begin_again:error@*"})
    churn.await_progress("works while watched", amount=5000)
    for pid in workers_and_supervisors(story)[0]:
        kill(pid)

    def stands():
        before = churn.report()["operations"]
        time.sleep(1)
        return churn.report()["operations"] == before
    poll(stands, "both threads to wait")
    demand(story.agents(), "the supervisor holds what they wait for")
    churn.demand_alive("while it waits")
    kill(churn.pid)
    churn.await_gone()
    poll(lambda: not story.agents(), "the agent to end with its program")


def worker_cannot_start(story):
    """No process to be had for the worker of a forked child, nor for a dead worker's successor: who gives memory
    back waits until there is one, and reads zeros then."""
    program = Scripted(story)
    program.do("areas['a'] = Area(16); areas['a'].fill(0, 4096, 1)")
    image = story.dump(program, "image")
    passages = [*range(2, 60), *range(62, 120)]
    story.restore(program, image, "--remap", "off",
                  environment={"UNMOOR_FAULT": ",".join(f"agent.start_worker:error@{i}" for i in passages)})
    program.do("pid = os.fork()\n"
               "if pid == 0:\n"
               "    report += '.child'; command += '.child'; last = 0; a = areas['a']\n"
               "    a.drop(200, 210); tell(done=0)\n"
               "else: areas['a'].fill(50, 60, 8)")
    inner = Program(story, program.pid, program.report_path + ".child")
    poll(lambda: "errors" in inner.report(), "the child has given memory back and verified all")
    inner.pid = inner.report()["pid"]
    for pid in workers_and_supervisors(story)[0]:
        kill(pid)
    program.do("areas['a'].drop(300, 310)")
    for member in (program, inner):
        story.unmoor("remap", "-t", member.pid)
    shutil.rmtree(image)
    program.do()


def interrupted_remap(sign):
    """`unmoor remap` in the foreground meets Ctrl-C (or kill -9) at several moments."""
    def story(story):
        churn = story.start("churn", *BIG)
        before = footprint(churn.pid)
        image = story.dump(churn, "image")
        story.restore(churn, image, "--remap", "off")
        for delay in (0.005, 0.03, 0.08, 0.15, 0.25):
            remap = story.popen([UNMOOR, "remap", "-t", str(churn.pid)])
            time.sleep(delay)
            if remap.poll() is None:
                os.killpg(remap.pid, sign)
            code = remap.wait(60)
            churn.demand_alive(f"after signal {sign} to remap")
            churn.await_progress("works after the signal")
            story.say(f"remap after {delay * 1000:.0f} ms: exit code {code}, status "
                      f"{story.status(churn).out.strip()[:100]}")
        finish(story, churn, before, image)
    return story


def interrupted_dump(sign, whole_group):
    """Ctrl-C (a signal to the whole group), or a signal to unmoor alone, at several moments of a dump."""
    def story(story):
        churn = story.start("churn", *BIG)
        before = footprint(churn.pid)
        image = story.path("image")
        for delay in (0.002, 0.02, 0.05, 0.1, 0.2, 0.35):
            # -R: where the dump is quicker than the signal, the program is there all the same.
            dump = story.popen([UNMOOR, "dump", "-t", str(churn.pid), "-D", image, "-R"])
            time.sleep(delay)
            if dump.poll() is None:
                (os.killpg if whole_group else os.kill)(dump.pid, sign)
            code = dump.wait(60)
            poll(lambda: state(churn.pid) not in "tT", "the program runs")
            churn.demand_alive(f"after signal {sign} to dump")
            churn.await_progress("works after the signal")
            story.say(f"dump after {delay * 1000:.0f} ms: exit code {code}")
            if sign == signal.SIGINT:
                left = [n for n in os.listdir(story.folder) if n.startswith("image.")]
                demand(not left, f"a partial directory is left: {left}")
                demand(code == 0 or not os.path.exists(image), "no checkpoint after an interrupted dump")
            shutil.rmtree(image, ignore_errors=True)
        churn.await_sweep()
        story.demand_untouched(churn, before)
        story.dump(churn, "image")
        left = [n for n in os.listdir(story.folder) if n.startswith("image.")]
        demand(not left, f"the next dump clears what a killed one left: {left}")
        story.restore(churn, image)
        story.wait_ready(churn)
        churn.await_sweep()
        churn.end()
    return story


def criu_below(command):
    """The criu that a command of unmoor has started; None before, and once it has ended."""
    try:
        return next((pid for pid in children(command.pid) if "--log-file" in read_proc(pid, "cmdline").split("\0")),
                    None)
    except OSError:
        return None


def failed_by_criu(story, command, err, what):
    """The command failed in one line that says so, and where criu's whole log is."""
    code = command.wait(60)
    with open(err) as file:
        text = file.read()
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"unmoor: dump: +\d+ %", line)]
    demand(code == 1 and len(lines) == 1 and f"criu {what} was killed by signal 9" in text,
           f"exit code 1 and one clear line are wanted: {code}, {text!r}")
    log = re.search(r"its whole log: (\S+criu\.log)", text)
    demand(log and os.path.exists(log[1]), f"criu's log is kept: {text!r}")
    shutil.rmtree(os.path.dirname(log[1]))
    return text


def kill_while_waited_for(dump, churn):
    """Kills criu while its code in the program waits for the next command, as it does most of the time. While it
    makes a thread execute something the program would die of it, with stock CRIU too (docs/guarantees.md)."""
    while dump.poll() is None:
        criu = criu_below(dump)
        try:
            os.kill(criu, signal.SIGSTOP)
            poll(lambda: state(criu) in "TZ", "criu stops")
            if state(churn.pid) == "S" and read_proc(churn.pid, "syscall").startswith("45 "):  # recvfrom
                return kill(criu)
            os.kill(criu, signal.SIGCONT)
        except (TypeError, OSError):
            pass
        time.sleep(0.001)
    return False


def criu_killed_at_dump(story):
    """criu dies of kill -9 while it hands over pages: the program runs on, nothing is written."""
    churn = story.start("churn", *MODEST, "--mib", 384)
    before = footprint(churn.pid)
    image, err = story.path("image"), story.path("err")
    for mib in (16, 128):
        def written():
            return sum(tree_bytes(story.path(name)) for name in os.listdir(story.folder) if name.startswith("image"))
        with open(err, "w") as file:
            dump = story.popen([UNMOOR, "dump", "-t", str(churn.pid), "-D", image], stderr=file)
        poll(lambda: written() >= mib << 20 or dump.poll() is not None, f"{mib} MiB are written", interval=0.002)
        demand(kill_while_waited_for(dump, churn), "the dump ended before criu could be killed")
        text = failed_by_criu(story, dump, err, "dump")
        demand(f"process {churn.pid} (churn) runs on" in text, f"it says what became of the program: {text!r}")
        demand(not written(), f"nothing is written: {os.listdir(story.folder)}")
        poll(lambda: state(churn.pid) not in "tT", "the program runs")
        churn.await_progress("works after criu was killed")
        # CRIU cannot take its own code out of the program any more (docs/guarantees.md).
        after = footprint(churn.pid)
        demand(after[:4] == before[:4], f"was {before[:4]}, is {after[:4]}")
        lines = differences(before.vmas, [vma for vma in after.vmas if not vma.name.startswith("/memfd:CRIUMFD")])
        demand(not lines, "the map list is not as it was:\n  " + "\n  ".join(lines))
    churn.await_sweep()
    story.dump(churn, "image")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def criu_killed_at_restore(story):
    """criu dies of kill -9 at several moments of a restore: nothing of the program is left, the image is good."""
    churn = story.start("churn", "--threads", 2, "--mib", 64)
    image, err = story.path("image"), story.path("err")
    story.dump(churn, "image")
    killed = 0
    for delay in (0, 0.002, 0.004, 0.008, 0.012, 0.016):
        with open(err, "w") as file:
            restore = story.popen([UNMOOR, "restore", "-D", image, "-d"], stderr=file)
        criu = poll(lambda: criu_below(restore) or restore.poll() is not None, "criu runs", interval=0.0005)
        time.sleep(delay)
        if criu is not True and kill(criu) and restore.wait(60) != 0:
            killed += 1
            text = failed_by_criu(story, restore, err, "restore")
            demand("nothing was restored" in text, f"it says what became of the program: {text!r}")
            poll(lambda: not story.marked("churn"), "nothing of the program is left")
        else:  # too late: it runs
            demand(restore.wait(60) == 0, f"exit code {restore.returncode}: {open(err).read()}")
            churn.await_progress("works after a restore that the signal met too late")
            kill(churn.pid)
        churn.await_gone()
        story.demand_no_agent()
        left = [name for name in os.listdir(story.folder) if name.startswith("unmoor-")]
        demand(not left, f"left behind: {left}")
    demand(killed > 0, "criu was never killed")
    story.say(f"killed {killed} of 6 times")
    churn.popen = None
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def interrupted_restore(story):
    """Ctrl-C during `restore -d`: either the program runs, or nothing of it is left; the image is good."""
    churn = story.start("churn", *BIG)
    image = story.dump(churn, "image")
    for delay in (0.005, 0.02, 0.04, 0.06, 0.1):
        with tempfile.TemporaryFile("w+") as err:
            restore = story.popen([UNMOOR, "restore", "-D", image, "-d"], stderr=err)
            time.sleep(delay)
            if restore.poll() is None:
                os.killpg(restore.pid, signal.SIGINT)
            code = restore.wait(60)
            err.seek(0)
            said = err.read().strip()
        demand(code == 0 or not said or ("interrupted" in said and len(said.splitlines()) == 1),
               f"exit code {code}: one line that says it was interrupted: {said!r}")
        # Either it came too late and the program runs, on its way to READY, or nothing is left.
        poll(lambda: state(churn.pid) not in ("T", "t"), f"nothing stays stopped (exit code {code})")
        if is_alive(churn.pid):
            churn.await_progress("works after a restore that the signal met too late")
            story.wait_ready(churn)
            kill(churn.pid)
        else:
            demand(code != 0, "exit code 0 without a program")
        churn.await_gone()
        story.demand_no_agent()
        story.say(f"restore after {delay * 1000:.0f} ms: exit code {code}")
    churn.popen = None
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def criu_processes(story):
    """The criu that restores, and those below it that are not yet what they will be."""
    found = []
    for pid in story.marked():
        with contextlib.suppress(OSError):
            words = read_proc(pid, "cmdline").split("\0")
            if "restore" in words and any(word.endswith("/criu") for word in words) and is_alive(pid):
                found.append(pid)
    return found


def demand_nothing_restored(story, churn):
    """What a restore that was killed leaves: no process, no view."""
    def criu_does():
        return {pid: [state(pid)] + [read_proc(pid, name) for name in ("syscall", "wchan", "cmdline")]
                for pid in criu_processes(story)}
    poll(lambda: not criu_processes(story), lambda: f"criu to end: {criu_does()}")
    poll(lambda: state(churn.pid) not in ("T", "t"), "nothing to stay stopped")
    views = os.path.join(story.folder, "unmoor-restore-*")
    def left():
        return {view: [os.path.relpath(os.path.join(folder, name), view)
                       for folder, _, names in os.walk(view) for name in names] for view in glob.glob(views)}
    def why():
        logs = [open(log, errors="replace").read()[-1000:] for log in glob.glob(os.path.join(views, "criu.log"))]
        return f"the view to be gone: {left()}, agents {story.agents()}, {logs}"
    poll(lambda: not left(), why)


def restore_killed(story):
    """kill -9 of `restore -d` at any moment: the program runs, or nothing of it is left."""
    churn = story.start("churn", "--threads", 2, "--mib", 32)
    image = story.dump(churn, "image")
    churn.popen = None
    whole = story.restore(churn, image).seconds
    kill(churn.pid)
    churn.await_gone()
    story.demand_no_agent()
    ran = 0
    for attempt in range(10):
        restore = story.popen([UNMOOR, "restore", "-D", image, "-d"])
        time.sleep(attempt / 8 * whole)
        if restore.poll() is None:
            os.kill(restore.pid, signal.SIGKILL)
        code = restore.wait(60)
        demand(code in (0, -signal.SIGKILL), f"exit code {code} of a restore that nobody killed")
        demand_nothing_restored(story, churn)
        # It may have been killed and not have ended yet.
        worked = churn.report()["operations"]
        poll(lambda: not is_alive(churn.pid) or churn.report()["operations"] > worked, "the program to work or end")
        if churn.report()["operations"] > worked:
            ran += 1
            churn.await_progress("works after a restore that was killed too late")
            story.wait_ready(churn)
            kill(churn.pid)
        churn.await_gone()
        story.await_no_orphan()  # our helper in it may have come to us
        story.demand_no_agent()
    story.say(f"{ran} of 10 were killed too late")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def id_of_a_group(story):
    """An id is taken while a process, be it a zombie, is in the group or session of that id."""
    churn = story.start("churn", "--mib", 8, before="(sleep 1000 &)")
    image = story.dump(churn, "image", orphans=1)
    churn.popen = None
    sleep, = children(os.getpid())
    outcome = story.unmoor("restore", "-D", image, "-d", expect=USER_MISTAKE)
    demand(f"process id {churn.pid} is still the process group of sleep (process {sleep}); end that process first"
           in outcome.err, outcome)
    restore = story.popen([UNMOOR, "restore", "-D", image, "-d"])
    kill(sleep)
    time.sleep(1)
    demand(restore.poll() is None, "the restore waits for the zombie to be reaped")
    os.waitpid(sleep, 0)
    demand(restore.wait(60) == 0, "the restore succeeds then")
    story.wait_ready(churn)
    churn.end()

    of_its_own_group = "(python3 -c 'import os, time; os.setpgid(0, 0); time.sleep(1000)' &)"
    churn = story.start("churn", "--mib", 8, before=of_its_own_group)
    image = story.dump(churn, "of-a-session", orphans=1)
    sleep, = children(os.getpid())
    outcome = story.unmoor("restore", "-D", image, "-d", expect=1)
    demand("File exists" in outcome.err and f"process id {churn.pid} is still the session of python3 (process {sleep})"
           in outcome.err, outcome)
    kill(sleep)
    os.waitpid(sleep, 0)
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.end()


def restore_killed_when_all_is_done(story):
    """The program runs, and its agent has nothing left to do, before the command removes its view."""
    churn = story.start("churn", "--threads", 1, "--mib", 4)
    image = story.dump(churn, "image")
    for mode in ("direct", "lazy"):
        churn.popen = None
        restore = story.popen([UNMOOR, "restore", "-D", image, "-d", "--mode", mode],
                              env=story.environment | {"UNMOOR_FAULT": "restore.program_runs:stop"})
        poll(lambda: state(restore.pid) == "T", "the command to be stopped there")
        story.wait_ready(churn)
        churn.await_progress("works")
        demand(glob.glob(os.path.join(story.folder, "unmoor-restore-*")), "the view is there")
        restore.kill()
        restore.wait(60)
        demand_nothing_restored(story, churn)
        story.demand_no_agent()
        churn.await_sweep()
        kill(churn.pid)
        churn.await_gone()


def restore_killed_while_criu_waits(story):
    """criu is started before its images are ready. With nobody left to make them it ends."""
    churn = story.start("churn", "--threads", 1, "--mib", 16)
    image = story.dump(churn, "image")
    held = 0
    for _ in range(20):
        restore = story.popen([UNMOOR, "restore", "-D", image, "-d"])
        poll(lambda: criu_processes(story) or restore.poll() is not None, "criu", interval=0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(restore.pid, signal.SIGSTOP)
        waiting = criu_processes(story)
        # Until it sleeps, wherever: in the read of the tree, or, let go on before, at its end.
        for pid in waiting:
            poll(lambda: state(pid) not in ("R", "D"), "criu to sleep or end")
            with contextlib.suppress(OSError):
                held += read_proc(pid, "syscall").startswith("0 ")
        restore.kill()
        restore.wait(60)
        demand_nothing_restored(story, churn)
        if is_alive(churn.pid):
            kill(churn.pid)
        churn.await_gone()
        story.demand_no_agent()
        if held >= 3:
            break
    story.say(f"criu waited {held} times")
    demand(held > 0, "criu never was seen to wait for its images")
    churn.popen = None
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.end()


def foreground_restore(story):
    """Without -d restore stays and returns what the program returns."""
    churn = story.start("churn", "--mib", 64)
    image = story.dump(churn, "image")
    restore = story.popen([UNMOOR, "restore", "-D", image])
    poll(lambda: is_alive(churn.pid) or restore.poll() is not None, "the program runs")
    churn.await_progress("works")
    poll(lambda: story.status(churn).code == READY, "READY", 60)
    demand(restore.poll() is None, "restore stays as long as the program runs")
    shutil.rmtree(image)
    churn.await_sweep()
    os.kill(churn.pid, signal.SIGTERM)
    demand(restore.wait(60) == 0, "restore returns the program's exit code 0")
    # And a failure's.
    churn = story.start("churn", "--mib", 16)
    image = story.dump(churn, "image")
    restore = story.popen([UNMOOR, "restore", "-D", image])
    poll(lambda: is_alive(churn.pid) or restore.poll() is not None, "the program runs")
    churn.await_progress("works")
    poll(lambda: story.status(churn).code == READY, "READY", 60)
    os.kill(churn.pid, signal.SIGKILL)
    code = restore.wait(60)
    demand(code == 128 + signal.SIGKILL, f"restore returned {code} of a program that was killed")
    story.demand_no_agent()


def disk_full_at_dump(story):
    churn = story.start("churn", *MODEST, "--mib", 256)
    before = footprint(churn.pid)
    small = story.mount_tmpfs("small", 64)
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", os.path.join(small, "image"), expect=1)
    demand("space" in outcome.err.lower(), f"the message says what is short: {outcome}")
    demand(small in outcome.err and len(outcome.err.strip().splitlines()) == 1, f"one line that says where: {outcome}")
    demand(not os.listdir(small), f"nothing is left on the full disk: {os.listdir(small)}")
    churn.await_sweep()
    story.demand_untouched(churn, before)
    image = story.dump(churn, "image")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def disk_full_keeps_the_old_checkpoint(story):
    """The directory that is to be replaced stays what it was when its successor does not fit."""
    churn = story.start("churn", "--threads", 1, "--mib", 64)
    small = story.mount_tmpfs("small", 100)
    image = os.path.join(small, "image")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    shown = story.unmoor("show", "-D", image, "--json").json()
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R", expect=1)
    demand(story.unmoor("show", "-D", image, "--json").json() == shown, "the old checkpoint is as it was")
    demand(os.listdir(small) == ["image"], f"nothing else is left: {os.listdir(small)}")
    churn.await_sweep()
    churn.end()
    churn.await_gone()
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def dump_while_direct_mapped(story):
    """The dump finishes the remap first and says so; the first image is not needed afterwards."""
    churn = story.start("churn", *MODEST, "--mib", 256)
    first = story.dump(churn, "first")
    story.restore(churn, first, "--remap", "off")
    churn.await_progress("works while direct-mapped")
    outcome = story.unmoor("dump", "-t", churn.pid, "-D", story.path("second"))
    demand("remap" in (outcome.out + outcome.err).lower(), f"it says that it remapped first: {outcome}")
    churn.await_gone()
    story.await_no_orphan()
    shutil.rmtree(first)
    story.restore(churn, story.path("second"))
    story.wait_ready(churn)
    churn.await_sweep()
    story.demand_no_agent()
    churn.end()


def dump_during_remap(story):
    """At once after the restore: the dump waits for the agent at work."""
    churn = story.start("churn", *BIG)
    previous = story.dump(churn, "image-0")
    for number in (1, 2, 3):
        story.restore(churn, previous)
        image = story.dump(churn, f"image-{number}")
        shutil.rmtree(previous)
        previous = image
    story.restore(churn, previous)
    story.wait_ready(churn)
    shutil.rmtree(previous)
    churn.await_sweep()
    churn.end()


def dump_into_its_own_directory(story):
    """The directory that the program is mapped from is replaced by its new checkpoint, safely."""
    churn = story.start("churn", *MODEST, "--mib", 256)
    image = story.dump(churn, "image")
    for mode in (("--remap", "off"), ()):
        story.restore(churn, image, *mode)
        churn.await_progress("works")
        story.dump(churn, "image")
    # Left running, it goes on from what was replaced.
    story.restore(churn, image, "--remap", "off")
    story.unmoor("dump", "-t", churn.pid, "-D", image, "-R")
    churn.await_sweep()
    churn.end()
    churn.await_gone()
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def image_moved_while_mapped(story):
    """The directory may be renamed while a program is mapped from it."""
    churn = story.start("churn", *MODEST, "--mib", 256)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")
    os.rename(image, story.path("elsewhere"))
    churn.await_progress("works")
    story.unmoor("remap", "-t", churn.pid)
    demand(story.status(churn).code == READY, "READY")
    shutil.rmtree(story.path("elsewhere"))
    churn.await_sweep()
    churn.end()


def image_deleted_while_mapped(story):
    """Deleting it too early loses nothing as long as the program lives: the file is only unlinked."""
    churn = story.start("churn", *MODEST, "--mib", 256)
    image = story.dump(churn, "image")
    story.restore(churn, image, "--remap", "off")
    shutil.rmtree(image)
    churn.await_progress("works")
    story.unmoor("remap", "-t", churn.pid)
    churn.await_sweep()
    image = story.dump(churn, "second")
    story.restore(churn, image)
    story.wait_ready(churn)
    churn.await_sweep()
    churn.end()


def mapped_by_another_tool(story):
    """status and remap go by the truth in /proc, so they serve a program that unmoor did not restore."""
    page = 4096
    path = story.path("pages-1.img")
    with open(path, "wb") as file:
        for number in range(4096):
            file.write(number.to_bytes(8, "little") * (page // 8))
    program = ("import ctypes,mmap,os,sys,time\n"
               "f=os.open(sys.argv[1],os.O_RDONLY)\n"
               "m=mmap.mmap(f,0,flags=mmap.MAP_PRIVATE,prot=mmap.PROT_READ|mmap.PROT_WRITE)\n"
               "os.close(f)\n"
               "m[0:8]=b'changed!'\n"
               "print('ready',flush=True)\n"
               "for line in sys.stdin:\n"
               "    right=m[0:8]==b'changed!' and all(\n"
               "        m[n*4096+8:n*4096+4096]==n.to_bytes(8,'little')*511 for n in range(4096))\n"
               "    print('right' if right else 'wrong',flush=True)\n")
    process = story.popen(["python3", "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def verify():
        process.stdin.write("verify\n")
        process.stdin.flush()
        return process.stdout.readline().strip()
    process.stdout.readline()
    status = story.unmoor("status", "-t", process.pid, "--json", expect=LATER).json()
    demand(status["direct_mapped_bytes"] == 4096 * page and status["images"] == [path] and "agent" not in status and
           "unmoor remap" in status["reason"], f"LATER, and what to do: {status}")
    report = story.unmoor("remap", "-t", process.pid, "--json").json()
    demand(report["ready"] and report["done_bytes"] == 4096 * page, f"all of it is remapped: {report}")
    demand(story.unmoor("status", "-t", process.pid).out.strip() == "READY", "READY")
    os.truncate(path, 0)
    demand(verify() == "right", "its memory is what it was")
    process.stdin.close()
    demand(process.wait(30) == 0, "it ends by itself")


def dumped_while_it_faults(story):
    """Threads that take faults without pause are frozen in the middle of one sooner or later: CRIU alone would give
    up then, and the program die of a SIGTRAP."""
    program = story.start("faulter", "--threads", 2)
    for number in range(25):
        image = story.path(f"image-{number}")
        story.unmoor("dump", "-t", program.pid, "-D", image, "-R")
        shutil.rmtree(image)
        program.await_progress("works after the dump", amount=1000)
    image = story.dump(program, "image")
    story.restore(program, image)
    story.wait_ready(program)
    program.await_progress("works after the restore", amount=1000)
    program.end()


STORIES = {
    "worker_killed": worker_killed,
    "supervisor_killed": supervisor_killed,
    "all_agents_killed": all_agents_killed,
    "helper_killed": helper_killed,
    "remap_interrupted": interrupted_remap(signal.SIGINT),
    "remap_killed": interrupted_remap(signal.SIGKILL),
    "dump_interrupted": interrupted_dump(signal.SIGINT, True),
    "dump_interrupted_alone": interrupted_dump(signal.SIGINT, False),
    "dump_killed": interrupted_dump(signal.SIGKILL, False),
}
for function in (worker_killed_semantics_kept, worker_fails, worker_cannot_start, criu_killed_at_dump, criu_killed_at_restore,
                 interrupted_restore, restore_killed, id_of_a_group, restore_killed_when_all_is_done,
                 restore_killed_while_criu_waits, foreground_restore,
                 disk_full_at_dump, disk_full_keeps_the_old_checkpoint, dump_while_direct_mapped,
                 dump_during_remap, dump_into_its_own_directory, image_moved_while_mapped,
                 image_deleted_while_mapped, mapped_by_another_tool, dumped_while_it_faults):
    STORIES[function.__name__] = function
for name, function in STORIES.items():
    function.__name__ = name

if __name__ == "__main__":
    main(STORIES)

"""What the system tests share: starting programs, calling unmoor, looking at processes, tidying up.

A story is a function of one argument, the Story; a script lists its stories and calls main(). Every
story has a temporary folder of its own and a mark in the environment of all it starts, which restored
programs and the agents beside them carry too: when it ends, however it ends, whatever bears the mark
is ended and the folder is removed.

A story fails by raising (Failed, or anything else), and is skipped by raising Skip.

Environment: UNMOOR (the program under test; default build/dev/tools/unmoor/unmoor), UNMOOR_PROGRAMS
(the folder of churn, zoo, tree and HeapChurn.class), UNMOOR_GUARD (freeze, fault: the guard of every
remap), UNMOOR_CRIU as for unmoor itself.
"""
import collections
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid

SOURCE = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
UNMOOR = os.environ.get("UNMOOR", os.path.join(SOURCE, "build/dev/tools/unmoor/unmoor"))
PROGRAMS = os.environ.get("UNMOOR_PROGRAMS", os.path.join(SOURCE, "build/dev/tests/programs"))
GUARD = os.environ.get("UNMOOR_GUARD", "")
READY, LATER, NEVER = 0, 1, 2
USER_MISTAKE = 2
PR_SET_CHILD_SUBREAPER = 36
SKIPPED = 77


# unmoor's words, and criu's of a thread's id.
PID_TAKEN = r"process id \d+ is in use by|process id \d+ is still t|File exists|-17\b"


class Failed(Exception):
    """Something that must hold does not."""


class Late(Failed):
    """Something that must come has not come yet: a hang, or a machine too busy. tests/summary.py knows it
    by the words "ran out of patience"; it says nothing about memory, which a Failed of another kind does."""


class Busy(Late):
    """What was to be seen did not happen on a machine this busy; seen alone, it must."""


class Skip(Exception):
    """This machine lacks something the story needs."""


def demand(condition, message):
    if not condition:
        raise Failed(message)


def poll(condition, what, timeout=60.0, interval=0.01):
    """Waits until condition() is true and returns its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Late(f"waited {timeout:g} s in vain: {what() if callable(what) else what}")
        time.sleep(interval)


# Processes, as /proc shows them.

def exists(pid):
    return os.path.exists(f"/proc/{pid}")


def read_proc(pid, name):
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read().decode(errors="replace")


def status_field(pid, field):
    for line in read_proc(pid, "status").splitlines():
        if line.startswith(field + ":"):
            return line.split(":", 1)[1].strip()
    return ""


def state(pid):
    """'R', 'S', 'T', 'Z' …; '' when there is no such process."""
    try:
        return read_proc(pid, "stat").rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def is_alive(pid):
    return state(pid) not in ("", "Z", "X")


def threads(pid):
    return sorted(int(t) for t in os.listdir(f"/proc/{pid}/task"))


def children(pid):
    found = []
    for thread in threads(pid):
        with contextlib.suppress(OSError):
            found += [int(c) for c in read_proc(pid, f"task/{thread}/children").split()]
    return sorted(found)


def descriptors(pid):
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


Vma = collections.namedtuple("Vma", "begin end protection offset device inode name flags")


def vmas(pid):
    """The map list, each VMA with its VmFlags."""
    found = []
    for line in read_proc(pid, "smaps").splitlines():
        fields = line.split(None, 5)
        if len(fields) >= 5 and "-" in fields[0] and not fields[0].endswith(":"):
            begin, end = (int(x, 16) for x in fields[0].split("-"))
            name = fields[5] if len(fields) > 5 else ""
            found.append(Vma(begin, end, fields[1], int(fields[2], 16), fields[3], int(fields[4]),
                             name, frozenset()))
        elif line.startswith("VmFlags:"):
            found[-1] = found[-1]._replace(flags=frozenset(line.split()[1:]))
    return found


def smaps_total(pid, field):
    """Bytes of one field over all of the process's memory."""
    for line in read_proc(pid, "smaps_rollup").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def thp_setting():
    """always, madvise or never."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
            text = file.read()
    except OSError:
        return "never"
    return text[text.index("[") + 1:text.index("]")]


def show_vma(vma):
    return (f"{vma.begin:x}-{vma.end:x} {vma.protection} {vma.offset:x} {vma.name} "
            f"[{' '.join(sorted(vma.flags))}]")


# Flags that say how the kernel or CRIU handles a VMA, not what the program asked for: "ac" (accounted)
# follows from when it became writable, "sd" (soft-dirty) from history.
VOLATILE_FLAGS = frozenset(("sd", "ac", "nr"))


def fidelity(vma):
    """What of a VMA a checkpoint, a restore and a remap must leave as it was."""
    if vma.name.endswith("/dev/zero (deleted)"):  # shared anonymous memory: CRIU makes a memfd of it
        vma = vma._replace(inode=0, name="shared")
    offset = vma.offset if vma.inode else 0
    return (vma.begin, vma.end, vma.protection, offset, vma.inode, vma.name,
            vma.flags - VOLATILE_FLAGS)


def join(found, joins):
    """A restore lets the kernel join neighbours that differ in volatile flags only: such that map the
    same file, and of anonymous memory those that joins(address between them) allows."""
    joined = []
    for vma in found:
        last = joined[-1] if joined else None
        if (last and last.end == vma.begin and (vma.inode or joins(vma.begin)) and
                (not vma.inode or last.offset + (last.end - last.begin) == vma.offset) and
                fidelity(last)[2:3] + fidelity(last)[4:] == fidelity(vma)[2:3] + fidelity(vma)[4:]):
            joined[-1] = last._replace(end=vma.end)
        else:
            joined.append(vma)
    return joined


def differences(before, after, join_anonymous=False):
    """Lines that tell two map lists apart; empty when they are equal. Anonymous neighbours that a program
    had made alike may have become one (the kernel keeps such apart by what it knows of their past). That
    what was one is one again after a remap is ours to achieve; but where one agent was killed and another
    went on, their parts stay two: join_anonymous."""
    limits = {v.begin for v in after}
    old = {fidelity(v): v for v in join(before, lambda at: join_anonymous or at not in limits)}
    new = {fidelity(v): v for v in join(after, lambda at: join_anonymous)}
    lines = [f"- {show_vma(old[k])}" for k in sorted(old.keys() - new.keys(), key=lambda k: k[0])]
    return lines + [f"+ {show_vma(new[k])}" for k in sorted(new.keys() - old.keys(), key=lambda k: k[0])]


def page_protections(found, ignore=("[vvar]", "[vdso]", "[vsyscall]", "[vvar_vclock]")):
    """Ranges and their protections, neighbours with equal ones joined: the program's view, however
    many VMAs it takes."""
    joined = []
    for vma in found:
        if vma.name in ignore:
            continue
        if joined and joined[-1][1] == vma.begin and joined[-1][2] == vma.protection:
            joined[-1] = (joined[-1][0], vma.end, vma.protection)
        else:
            joined.append((vma.begin, vma.end, vma.protection))
    return joined


Footprint = collections.namedtuple("Footprint", "descriptors threads children tracer state vmas")


def footprint(pid):
    """All that something that was inside a process could have left there."""
    return Footprint(descriptors(pid), threads(pid), children(pid), status_field(pid, "TracerPid"),
                     state(pid), vmas(pid))


def tree_bytes(folder):
    """Bytes allocated on disk below a folder; a file linked twice counts once."""
    seen = {}
    for path, _, names in os.walk(folder):
        for name in names:
            info = os.lstat(os.path.join(path, name))
            seen[info.st_ino] = info.st_blocks * 512
    return sum(seen.values())


class Outcome(collections.namedtuple("Outcome", "code out err seconds command")):
    """What a command of unmoor did."""

    def __str__(self):
        return (f"`{self.command}` gave exit code {self.code} after {self.seconds:.2f} s\n"
                f"  stdout: {self.out.strip()[-1500:]}\n  stderr: {self.err.strip()[-3000:]}")

    def json(self):
        try:
            return json.loads(self.out)
        except ValueError as error:
            raise Failed(f"not one JSON object on stdout ({error}): {self}") from None


class Program:
    """A program under test. Its pid stays the same from restore to restore."""

    def __init__(self, story, pid, report=None, popen=None):
        self.story = story
        self.pid = pid
        self.report_path = report
        self.popen = popen
        story.programs.append(self)

    def last_words(self):
        """What is known of it when its story has failed."""
        status = reap(self.pid)
        words = f"process {self.pid}: " + ("alive" if is_alive(self.pid) else "gone")
        if status is not None:
            words = f"process {self.pid} ended with wait status {status:#x}"
        try:
            with open(self.report_path) as file:
                return f"{words}; report: {file.read().strip()}"
        except (OSError, TypeError):
            return words

    def report(self):
        """Its last report, {} when there is none yet. A report of an error fails the story."""
        try:
            with open(self.report_path) as file:
                content = json.load(file)
        except (OSError, ValueError):
            return {}
        if content.get("errors"):
            raise Failed(f"the program found wrong memory: {content['error']}"
                         + self._told_by_child())
        return content

    def _told_by_child(self):
        try:
            with open(self.report_path + ".child") as file:
                return f" ({json.load(file)['error']})"
        except (OSError, ValueError):
            return ""

    def demand_alive(self, when):
        self.report()
        demand(is_alive(self.pid), f"the program ended ({when}); report: {self.report()}")

    def await_progress(self, what="works", field="operations", amount=1, timeout=120):
        """Waits until the program did something after this call, as its own report tells."""
        first = self.report().get(field)

        def moved():
            now = self.report().get(field)
            if not is_alive(self.pid):
                self.report()
                raise Failed(f"the program ended while it was expected that it {what}")
            return now is not None and (first is None or now >= first + amount)
        poll(moved, lambda: f"the program {what} ({field} was {first}); report: {self.report()}", timeout)

    def await_sweep(self):
        """Waits until all of the memory was verified at least once from now on."""
        self.await_progress("verifies all its memory", "sweeps", 2, timeout=180)

    def reset_stall(self):
        """Begins new stall figures."""
        before = self.report().get("resets", 0)
        os.kill(self.pid, signal.SIGUSR1)
        poll(lambda: self.report().get("resets", 0) > before, "the stall figures begin anew")

    def await_gone(self, timeout=60):
        """Waits for the pid to be free again, so that a restore can take it."""
        def gone():
            if self.popen is not None:
                self.popen.poll()
            reap(self.pid)
            return not exists(self.pid)

        def who():
            lines = read_proc(self.pid, "status").splitlines()
            told = [" ".join(line.split()) for line in lines if line.split(":")[0] in ("State", "PPid", "TracerPid")]
            return f"process {self.pid} to be gone: {', '.join(told)}; agents {self.story.agents()}"
        poll(gone, who, timeout)

    def end(self, timeout=120):
        """Asks it to verify everything and end; returns its last report."""
        os.kill(self.pid, signal.SIGTERM)
        status = {}

        def ended():
            if self.popen is not None and self.popen.poll() is not None:
                status["code"] = self.popen.returncode
            reaped = reap(self.pid)
            if reaped is not None:
                status["code"] = os.waitstatus_to_exitcode(reaped)
            return not exists(self.pid)
        poll(ended, "the program ends after SIGTERM", timeout)
        last = self.report()
        demand(status.get("code", 0) == 0, f"the program ended with {status}; report: {last}")
        return last


def reap(pid):
    """The wait status of a child of ours that ended, else None. Restored programs are our children,
    since we are the subreaper."""
    try:
        reaped, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return status if reaped == pid else None


class Story:
    def __init__(self, name):
        self.name = name
        self.mark = uuid.uuid4().hex
        self.folder = tempfile.mkdtemp(prefix="unmoor-story.")
        self.runtime = os.path.join(self.folder, "runtime")
        os.mkdir(self.runtime)
        # TMPDIR: criu's logs that unmoor keeps after a failure go there, and with the story.
        self.environment = dict(os.environ, UNMOOR_STORY=self.mark, UNMOOR_RUNTIME_DIR=self.runtime,
                                TMPDIR=self.folder)
        self.popens = []
        self.programs = []
        self.windows = self.guarded_windows = 0
        self.mounts = []
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise Failed("cannot become a subreaper")

    def path(self, name):
        return os.path.join(self.folder, name)

    def say(self, text):
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    # Programs.

    def popen(self, command, **options):
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
                   "stderr": subprocess.DEVNULL, "start_new_session": True,
                   "cwd": self.folder, "env": self.environment} | options
        process = subprocess.Popen(command, **options)
        self.popens.append(process)
        return process

    def start(self, program, *arguments, timeout=60, before=""):
        """Starts one of tests/programs and waits until it is ready. `before`: of a shell, in its process."""
        path = os.path.join(PROGRAMS, program)
        if not os.path.exists(path):
            raise Failed(f"{path} is not built")
        report = self.path(f"{program}-{len(self.popens)}.json")
        command = [path, "--report", report, *map(str, arguments)]
        if before:
            command = ["sh", "-c", before + '; exec "$@"', "sh", *command]
        popen = self.popen(command)
        started = Program(self, popen.pid, report, popen)
        poll(lambda: started.report().get("ready") or popen.poll() is not None,
             f"{program} to be ready", timeout)
        demand(popen.poll() is None, f"{program} ended at its start with {popen.returncode}")
        return started

    # unmoor.

    def unmoor(self, *arguments, expect=0, timeout=120, environment=None, **options):
        """Runs `unmoor arguments…` to its end. `expect`: the exit code, or None for any."""
        command = [UNMOOR, *map(str, arguments)]
        if GUARD and arguments[0] in ("restore", "remap") and "--guard" not in arguments:
            command[2:2] = ["--guard", GUARD]
        begun = time.monotonic()
        # Files, not pipes: a detached agent may keep them open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = self.popen(command, stdout=out, stderr=err,
                                 env=self.environment | (environment or {}), **options)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                err.seek(0)
                text = err.read().decode(errors="replace")
                raise Late(f"`{' '.join(command)}` still runs after {timeout} s: {text[-500:]}") from None
            seconds = time.monotonic() - begun
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        outcome = Outcome(process.returncode, *texts, seconds, " ".join(command[1:]))
        if expect is not None and outcome.code != expect:
            raise Failed(f"expected exit code {expect}: {outcome}{self.criu_log(arguments)}")
        return outcome

    def criu_log(self, arguments):
        """The end of CRIU's logs below the directory that a command was about."""
        text = ""
        if "-D" in arguments:
            folder = str(arguments[arguments.index("-D") + 1])
            parent, name = os.path.split(folder.rstrip("/"))
            for place in os.listdir(parent) if os.path.isdir(parent) else []:
                if not place.startswith(name):
                    continue
                for path, _, names in os.walk(os.path.join(parent, place)):
                    for log in (n for n in names if n.endswith(".log")):
                        with open(os.path.join(path, log), errors="replace") as file:
                            lines = file.read().splitlines()
                        text += f"\n  {os.path.join(path, log)}:\n    " + "\n    ".join(lines[-15:])
        return text

    def dump(self, program, name, *arguments, orphans=0, **options):
        """Checkpoints a program into folder/name; the program is gone afterwards."""
        folder = self.path(name)
        outcome = self.unmoor("dump", "-t", program.pid, "-D", folder, *arguments, **options)
        program.await_gone()
        self.await_no_orphan(orphans)
        self.say(f"dumped into {name} in {outcome.seconds:.2f} s, "
                 f"{tree_bytes(folder) >> 20} MiB on disk")
        return folder

    def await_no_orphan(self, but=0):
        """Children that a dumped program leaves behind come to us; their pids must become free, `but` so many."""
        def few_left():
            known = {process.pid for process in self.popens} | set(self.agents())
            orphans = [pid for pid in children(os.getpid()) if pid not in known]
            for pid in orphans:
                reap(pid)
            return len([pid for pid in orphans if exists(pid)]) <= but
        poll(few_left, "the dumped program's children to be gone")

    def restore_root(self, folder, *arguments, **options):
        """Restores `folder`, detached; returns the root's pid and the command's outcome."""
        pidfile = self.path("pidfile")
        with contextlib.suppress(FileNotFoundError):
            os.remove(pidfile)
        # Another process of the machine may have been given an id that the program had: where ids go
        # round at 32768 that happens. It ends soon, or there is nothing to be done.
        for attempt in range(20):
            outcome = self.unmoor("restore", "-D", folder, "-d", "--pidfile", pidfile, *arguments,
                                  expect=None, **options)
            if outcome.code == 0 or not re.search(PID_TAKEN, outcome.err):
                break
            self.say(f"restore {attempt + 1} failed, since an id is taken: {outcome.err.strip()}")
            time.sleep(0.5)
        if outcome.code != 0:
            raise Failed(f"expected exit code 0: {outcome}{self.criu_log(('-D', folder))}")
        self.say(f"restored from {os.path.basename(folder)} in {outcome.seconds * 1000:.0f} ms")
        with open(pidfile) as file:
            return int(file.read()), outcome

    def restore(self, program, folder, *arguments, **options):
        """Restores a program from `folder`, under the pid it had."""
        pid, outcome = self.restore_root(folder, *arguments, **options)
        demand(pid == program.pid, f"restored as {pid}, it was {program.pid}")
        program.popen = None
        return outcome

    def wait_ready(self, program, timeout=120):
        outcome = self.unmoor("wait", "-t", program.pid, "--timeout", timeout, timeout=timeout + 10)
        self.say(f"ready after {outcome.seconds:.2f} s more")
        self.count_windows(program)
        return outcome

    def count_windows(self, program):
        """Of the remap that has just ended; see demand_guarded."""
        progress = self.unmoor("status", "-t", program.pid, "--json", expect=None).json().get("progress", {})
        self.windows += progress.get("windows", 0)
        self.guarded_windows += progress.get("guarded_windows", 0)

    def status(self, program, expect=None):
        return self.unmoor("status", "-t", program.pid, expect=expect)

    def demand_guarded(self):
        """Under UNMOOR_GUARD=fault: the guard was used. A window falls back to freezing by itself where the
        guard would not be safe, so a story of such windows only would say nothing of it."""
        if GUARD == "fault" and self.windows >= 20:
            self.say(f"{self.guarded_windows} of {self.windows} windows were guarded")
            if not self.guarded_windows:  # the watch needs a core before the remap is over
                raise Busy(f"none of {self.windows} windows was guarded: threads stood still in all")

    # What belongs to this story.

    def marked(self, name=None):
        """Processes that bear this story's mark; with `name`, only those that run that program."""
        mark = f"UNMOOR_STORY={self.mark}".encode()
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if mark not in file.read().split(b"\0"):
                        continue
                if name is None or os.path.basename(os.readlink(f"/proc/{entry}/exe")) == name:
                    found.append(int(entry))
            except OSError:
                continue
        return found

    def agents(self):
        """unmoor's own processes that still run."""
        return [pid for pid in self.marked(os.path.basename(os.path.realpath(UNMOOR)))
                if is_alive(pid)]

    def demand_no_agent(self, timeout=60):
        """No process of unmoor is left, soon after READY. What it did stays to be read in the
        progress file of the process (`unmoor status`), and which image it came from, for as long as
        that lives; nothing else does."""
        def running():
            for pid in self.agents():
                reap(pid)
            return self.agents()
        poll(lambda: not running(), lambda: f"the agent to end itself, running: {running()}", timeout)
        left = [n for n in os.listdir(self.runtime) if not (n.endswith((".json", ".image")) and n.split(".")[0].isdigit())]
        demand(not left, f"runtime files are left: {left}")

    def demand_untouched(self, program, before, timeout=60, join_anonymous=False):
        """Nothing was left inside the program: all as in the footprint taken before."""
        def unequal():
            now = footprint(program.pid)
            return [f"{field}: was {old}, is {new}"
                    for field, old, new in zip(Footprint._fields[:4], before, now) if old != new]
        poll(lambda: not unequal(), lambda: f"the program to be as it was: {unequal()}", timeout)
        lines = differences(before.vmas, vmas(program.pid), join_anonymous)
        demand(not lines, "the map list is not as it was:\n  " + "\n  ".join(lines))

    def mount_tmpfs(self, name, mib):
        folder = self.path(name)
        os.mkdir(folder)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder],
                          stderr=subprocess.DEVNULL).returncode != 0:
            raise Skip("cannot mount a tmpfs here")
        self.mounts.append(folder)
        return folder

    def close(self):
        def kill_marked():
            # A program may overwrite its environment, as redis does: what descends from us comes to us in the end.
            for pid in {*self.marked(), *children(os.getpid())}:
                if pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            for process in self.popens:
                process.poll()
            try:
                while os.waitpid(-1, os.WNOHANG)[0] != 0:
                    pass
                return False  # a child of ours is still to end: all that descends from us becomes one
            except ChildProcessError:
                return not [pid for pid in self.marked() if pid != os.getpid()]
        poll(kill_marked, "what the story started to end", 60)
        for folder in reversed(self.mounts):
            poll(lambda: subprocess.run(["umount", folder]).returncode == 0, f"umount {folder}", 10, 0.2)
        shutil.rmtree(self.folder)


def free_port():
    """Below those that the kernel hands out: nobody gets it by chance, also while its program is a mere image."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def need_program(name):
    path = shutil.which(name)
    if path is None:
        raise Skip(f"{name} is not installed (tools/setup installs it)")
    return path


def run(function, arguments):
    """Runs one story to its exit code."""
    def stop(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    story = None
    try:
        if os.geteuid() != 0:
            raise Skip("needs root: CRIU here does")
        if not os.path.exists(UNMOOR):
            raise Failed(f"{UNMOOR} is not built")
        story = Story(function.__name__)
        function(story, *arguments)
        story.demand_guarded()
        print(f"{function.__name__}: held")
        return 0
    except Skip as reason:
        print(f"skipped: {reason}")
        return SKIPPED
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    except Exception as error:
        if not isinstance(error, Failed):
            traceback.print_exc(file=sys.stdout)
        print(f"{function.__name__} FAILED: {error}")
        programs = story.programs if story is not None else []
        for program in programs:
            print(f"  {program.last_words()}")
        if isinstance(error, Busy) or (isinstance(error, Late) and all(is_alive(program.pid) for program in programs)):
            print("ran out of patience")
        return 1
    finally:
        if story is not None:
            if os.environ.get("UNMOOR_KEEP"):
                print(f"kept: {story.folder}")
            else:
                story.close()


def main(stories):
    """stories: functions by their names on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in stories:
        print(f"usage: {sys.argv[0]} STORY; stories: {' '.join(stories)}")
        sys.exit(2)
    sys.exit(run(stories[sys.argv[1]], sys.argv[2:]))

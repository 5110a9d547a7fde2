"""What bench/run and tools/demo share: a stage on which programs are dumped and restored.

A Stage has a temporary folder of its own and is the subreaper of all it starts, so restored programs
and the agents beside them are its children: closing it ends exactly these, removes the folder, and
leaves nothing else behind. Commands run in process groups of their own: a Ctrl-C reaches the stage,
which ends the command in its own time.

Stock CRIU is run as a user would run it. CRIU keeps its kernel probes in /run/criu.kdat where /run is
a tmpfs, and asks the kernel anew at each start (20 to 40 ms) where it is not; StockProbeCache gives
it that file for the length of one run, so that both cases can be measured.

Environment: UNMOOR (the binary, default build/release), UNMOOR_CRIU as for unmoor itself.
"""
import contextlib
import ctypes
import glob
import json
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time

SOURCE = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
PR_SET_CHILD_SUBREAPER = 36
TMPFS_MAGIC = 0x01021994
MADV_POPULATE_WRITE = 23
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Failed(Exception):
    """Something did not go as it must; the message says what."""


def poll(condition, what, timeout=60.0, interval=0.002):
    """Waits until condition() is true and returns its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:g} s in vain for {what}")
        time.sleep(interval)


def listens(path):
    """Whether somebody does at a UNIX socket; its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def have_memory(mib):
    """Has so much of what is free here be there. A host that takes what a machine has free (decision 70) gives it back
    page by page, at ten times the price of a first touch, to whoever comes first."""
    with mmap.mmap(-1, max(mib, 1) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
            memory.madvise(MADV_POPULATE_WRITE)


def find_unmoor():
    path = os.environ.get("UNMOOR", os.path.join(SOURCE, "build/release/tools/unmoor/unmoor"))
    if not os.access(path, os.X_OK):
        raise Failed(f"{path} is not there; build it: cmake --preset release && "
                     "cmake --build --preset release")
    return path


def find_criu():
    """The criu that unmoor uses too."""
    private = os.path.join(SOURCE, ".prefix/criu/criu")
    named = os.environ.get("UNMOOR_CRIU")
    path = named or (private if os.path.exists(private) else shutil.which("criu"))
    if not path or not os.access(path, os.X_OK):
        raise Failed(f"no criu{f' at {path}' if path else ''}; run tools/setup")
    return path


def criu_words(criu):
    """How to start it: the private prefix has a shell wrapper (0.8 ms), which unmoor passes by too."""
    folder = os.path.dirname(criu)
    loader = os.path.join(folder, "usr/lib64/ld-linux-x86-64.so.2")
    binary = os.path.join(folder, "usr/sbin/criu")
    if os.path.exists(loader) and os.path.exists(binary):
        return [loader, "--library-path", os.path.join(folder, "usr/lib/x86_64-linux-gnu"), binary]
    return [criu]


def criu_version(criu):
    text = subprocess.run([criu, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split()[1]


# Processes, as /proc shows them.

def state(pid):
    """'R', 'S', 'T', 'Z' …; '' when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def is_alive(pid):
    return state(pid) not in ("", "Z", "X")


def children(pid):
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
    return found


def reap(pid):
    """True once `pid`, a child of ours that ended, is gone for good."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not os.path.exists(f"/proc/{pid}")


def memory(pid, field):
    """A field of /proc/PID/status, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def tree_bytes(folder):
    """Bytes allocated on disk below a folder; a file linked twice counts once."""
    seen = {}
    for path, _, names in os.walk(folder):
        for name in names:
            info = os.lstat(os.path.join(path, name))
            seen[info.st_ino] = info.st_blocks * 512
    return sum(seen.values())


# CRIU's stats-dump image: two magics, a length, then one StatsEntry of nested varints.

def _fields(data):
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
    while at < len(data):
        key = varint()
        if key & 7 == 2:
            length = varint()
            yield key >> 3, data[at:at + length]
            at += length
        else:
            yield key >> 3, varint()


def dump_times(images):
    """What CRIU says of the dump in that folder: frozen and written, in seconds, and pages."""
    with open(os.path.join(images, "stats-dump"), "rb") as file:
        data = file.read()
    for number, entry in _fields(data[12:12 + int.from_bytes(data[8:12], "little")]):
        if number == 1:
            values = dict(_fields(entry))
            return {"freezing": values.get(1, 0) / 1e6, "frozen": values.get(2, 0) / 1e6,
                    "memdump": values.get(3, 0) / 1e6, "memwrite": values.get(4, 0) / 1e6,
                    "pages": values.get(7, 0)}
    raise Failed(f"{images}/stats-dump holds no figures of a dump")


def run_is_tmpfs():
    class Statfs(ctypes.Structure):
        _fields_ = [("type", ctypes.c_long), ("rest", ctypes.c_char * 256)]
    result = Statfs()
    ctypes.CDLL(None).statfs(b"/run", ctypes.byref(result))
    return result.type == TMPFS_MAGIC


class StockProbeCache:
    """CRIU's kernel probes for one run of stock CRIU: `with cache: run criu`.

    Where /run is a tmpfs CRIU keeps them itself and this does nothing. Elsewhere they are made once,
    by `criu check` with a tmpfs on /run in a mount namespace of its own.
    """
    FILE = "/run/criu.kdat"
    SCRIPT = ("mount -t tmpfs -o mode=700 tmpfs /run && { \"$@\" check >/dev/null 2>&1; "
              "exec cat /run/criu.kdat; } 2>/dev/null")

    def __init__(self, criu):
        self.content = b""
        self.mine = None
        if not run_is_tmpfs():
            self.content = subprocess.run(["unshare", "--mount", "--propagation", "private", "sh",
                                           "-c", self.SCRIPT, "sh", criu],
                                          stdout=subprocess.PIPE).stdout

    def __enter__(self):
        self.mine = None
        if self.content:
            with contextlib.suppress(FileExistsError):
                fd = os.open(self.FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(fd, self.content)
                self.mine = os.fstat(fd).st_ino
                os.close(fd)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(FileNotFoundError):
            if self.mine is not None and os.stat(self.FILE).st_ino == self.mine:
                os.remove(self.FILE)


class BreakpointsAtHand:
    """While this is open, setting a breakpoint costs stock CRIU nothing; else each restore and dump waits for RCU
    (10 ms and more), unless there was one in the second before. To the kernel a breakpoint is a performance event,
    and what the first of them has to switch on stays on while there is any (kernel/events/core.c, account_event)."""
    PERF_EVENT_OPEN, SOFTWARE, DUMMY, SIZE = 298, 1, 9, 64
    SWITCHED_OFF_AFTER = 1.2

    def __init__(self):
        attributes = struct.pack("<IIQ", self.SOFTWARE, self.SIZE, self.DUMMY).ljust(self.SIZE, b"\0")
        self.fd = ctypes.CDLL(None, use_errno=True).syscall(self.PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)
        if self.fd < 0:
            raise Failed(f"perf_event_open: {os.strerror(ctypes.get_errno())}")

    def close(self):
        os.close(self.fd)


class Outcome:
    """What a command did."""

    def __init__(self, command, code, out, err, seconds):
        self.command, self.code, self.out, self.err = command, code, out, err
        self.seconds = seconds

    def json(self):
        try:
            return json.loads(self.out)
        except ValueError:
            raise Failed(f"not one JSON object on stdout: {self}") from None

    def __str__(self):
        text = "\n  ".join((self.out + self.err).strip().splitlines()[-12:])
        return f"`{' '.join(self.command)}` ended with {self.code}\n  {text}"


class Stage:
    PROBES = "/run/unmoor-criu-*.kdat"

    def __init__(self, prefix, parent=None):
        # CRIU's kernel probes, which unmoor keeps in /run until the next boot: here only meanwhile.
        self.probes_before = set(glob.glob(self.PROBES))
        self.unmoor_path = find_unmoor()
        self.criu_path = find_criu()
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise Failed("cannot become a subreaper")
        self.stock_cache = StockProbeCache(self.criu_path)
        self.prefix, self.parent = prefix, parent
        self.folder = self.shared = None
        self.current = None
        self.breakpoints = None

    def keep_breakpoints_at_hand(self):
        """So that what stock CRIU takes does not depend on who ran before; alone() is without."""
        self.breakpoints = BreakpointsAtHand()

    @contextlib.contextmanager
    def alone(self):
        """A command as the only one in a while, as its user runs it."""
        self.breakpoints.close()
        time.sleep(BreakpointsAtHand.SWITCHED_OFF_AFTER)
        try:
            yield
        finally:
            self.keep_breakpoints_at_hand()

    def open(self):
        """Makes the folder. From here on close() is needed, however this ends."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
        self.folder = tempfile.mkdtemp(prefix=self.prefix, dir=self.parent)
        # Files that programs keep mapped while they are measured.
        in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else self.folder
        self.shared = tempfile.mkdtemp(prefix=self.prefix, dir=in_memory)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self.runtime = self.path("runtime")
        os.mkdir(self.runtime)
        self.environment = dict(os.environ, UNMOOR_RUNTIME_DIR=self.runtime,
                                UNMOOR_CRIU=self.criu_path)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def spawn(self, command, **options):
        """Starts a program in a session of its own, as CRIU likes it: no terminal, no pipes."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
                   "stderr": subprocess.DEVNULL, "start_new_session": True, "cwd": self.folder,
                   "env": self.environment} | options
        return subprocess.Popen([str(word) for word in command], **options)

    def run(self, command, expect=0, environment=None):
        """Runs a command to its end. `expect`: its exit code, or None for any."""
        command = [str(word) for word in command]
        # Files, not pipes: a detached agent keeps them open.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            began = time.monotonic()
            self.current = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                                            stderr=err, process_group=0, cwd=self.folder,
                                            env=self.environment | (environment or {}))
            code = self.current.wait()
            seconds = time.monotonic() - began
            self.current = None
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        outcome = Outcome(command, code, *texts, seconds)
        if expect is not None and code != expect:
            raise Failed(str(outcome) + self._criu_log(command))
        return outcome

    @staticmethod
    def _criu_log(command):
        if "--log-file" not in command:
            return ""
        with contextlib.suppress(OSError):
            with open(command[command.index("--log-file") + 1], errors="replace") as file:
                return "\n  " + "\n  ".join(file.read().splitlines()[-12:])
        return ""

    def unmoor(self, *arguments, **options):
        return self.run([self.unmoor_path, *arguments], **options)

    def stock_dump(self, pid, folder, *arguments):
        os.makedirs(folder, exist_ok=True)
        with self.stock_cache:
            return self.run([self.criu_path, "dump", "-t", pid, "-D", folder, "--log-file",
                             os.path.join(folder, "dump.log"), *arguments])

    def stock_restore(self, folder, cached=True, pidfile=None):
        command = [*criu_words(self.criu_path), "restore", "-d", "-D", folder, "--log-file",
                   os.path.join(folder, "restore.log")]
        if pidfile:
            command += ["--pidfile", pidfile]
        with self.stock_cache if cached else contextlib.nullcontext():
            return self.run(command)

    def await_gone(self, pid):
        """Waits until the pid is free, so that a restore can take it."""
        poll(lambda: reap(pid), f"process {pid} to be gone")

    def kill(self, pid):
        """Ends a program, and waits for its agent to follow: the next restore needs the pid."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.await_gone(pid)
        self.await_no_agent()

    def agents(self):
        def is_agent(pid):
            try:
                with open(f"/proc/{pid}/comm") as file:
                    return file.read().startswith("unmoor")
            except OSError:
                return False
        return [pid for pid in children(os.getpid()) if is_agent(pid)]

    def await_no_agent(self):
        def none_left():
            return all([reap(pid) for pid in self.agents()])
        poll(none_left, "the agent to end itself", timeout=30)

    def close(self):
        """Ends what was started or restored here and removes the folder. Not to be interrupted."""
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.current is not None and self.current.poll() is None:
            # criu and unmoor clean up after themselves when asked politely.
            self.current.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.current.wait(10)
        self.current = None

        def all_gone():
            for pid in children(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                reap(pid)
            return not children(os.getpid())  # their own children come to us next
        poll(all_gone, "what was started to end", timeout=20)
        self.stock_cache.__exit__()
        for probes in set(glob.glob(self.PROBES)) - self.probes_before:
            os.remove(probes)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.shared, ignore_errors=True)

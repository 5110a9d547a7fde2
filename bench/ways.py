"""The ways to restore a program that bench/run and its reports compare.

A way knows how to dump a running program into a folder (leaving it running), how to restore it from
there, and how to tell when the program owes the image nothing any more. Ways that unmoor does not
offer (`unmoor restore --help` says) are left out by themselves.

A peer is `NAME=COMMAND`, any other tool: `COMMAND dump PID DIR` writes the program to the empty
folder DIR and leaves it running; `COMMAND restore DIR` returns 0 once the program runs again, with
the process id it had.
"""
import contextlib
import os
import shlex
import stat
import subprocess
import threading
import time

from stage import Failed, criu_words, poll


class Running:
    """A restore that has returned. `ready()`: until independent, in seconds since `began`."""

    def __init__(self, began, seconds, values=None, ready=None):
        self.began, self.seconds, self.values = began, seconds, values or {}
        self._ready_at = None if ready else seconds
        self._error = None
        self._thread = None
        if ready:
            def wait():
                try:
                    ready()
                except Exception as error:  # told by ready()
                    self._error = error
                self._ready_at = time.monotonic() - began
            self._thread = threading.Thread(target=wait, daemon=True)
            self._thread.start()

    def ready(self):
        if self._thread:
            self._thread.join()
        if self._error:
            raise self._error
        return self._ready_at


class Way:
    def __init__(self, stage, name, label, image):
        self.stage, self.name, self.label, self.image = stage, name, label, image

    def dump(self, pid, folder):
        raise NotImplementedError

    def start(self, folder, pid):
        """Begins a restore; the result is given to finish(). Between the two others may begin."""
        raise NotImplementedError


def popen(stage, command):
    return subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
                            cwd=stage.folder, env=stage.environment)


class Unmoor(Way):
    def __init__(self, stage, name, label, *options, waits=True):
        super().__init__(stage, name, label, "unmoor")
        self.options, self.waits = options, waits

    def dump(self, pid, folder):
        self.stage.unmoor("dump", "-t", pid, "-D", folder, "-R", "--full", "--json")

    def command(self, folder):
        return [self.stage.unmoor_path, "restore", "-d", "--json", "-D", folder, *self.options]

    def restore(self, folder, pid):
        began = time.monotonic()
        outcome = self.stage.run(self.command(folder))
        report = outcome.json()
        values = {"criu_ms": report["criu_ns"] / 1e6, "resumed_ms": report["elapsed_ns"] / 1e6,
                  # criu_ns: from criu's start until its tasks were ready. What unmoor does meanwhile
                  # costs nothing, unless criu had to wait for it (criu_waited).
                  "own_ms": outcome.seconds * 1e3 - report["criu_ns"] / 1e6,
                  "criu_waited": report["criu_waited"], "mapped_bytes": report["mapped_bytes"]}
        return Running(began, outcome.seconds, values, self.waiter(pid))

    def waiter(self, pid):
        if not self.waits:
            return None

        def wait():
            process = popen(self.stage, [self.stage.unmoor_path, "wait", "-t", pid, "--timeout", "120"])
            if process.wait() != 0:
                raise Failed(f"process {pid} did not become READY: unmoor wait ended with {process.returncode}")
        return wait


class Stock(Way):
    def __init__(self, stage, name, label, probing=False):
        super().__init__(stage, name, label, "stock")
        self.probing = probing

    def dump(self, pid, folder):
        self.stage.stock_dump(pid, folder, "--leave-running")

    def command(self, folder, *options):
        return [*criu_words(self.stage.criu_path), "restore", "-d", "-D", folder, "--log-file",
                os.path.join(folder, "restore.log"), *options]

    def restore(self, folder, _pid):
        with contextlib.nullcontext() if self.probing else self.stage.stock_cache:
            began = time.monotonic()
            outcome = self.stage.run(self.command(folder))
        return Running(began, outcome.seconds)

    def waiter(self, _pid):
        return None


class StockLazy(Stock):
    """`criu lazy-pages` beside `criu restore --lazy-pages`: both started by the user, so both count."""

    def restore(self, folder, _pid):
        socket = os.path.join(folder, "lazy-pages.socket")
        with contextlib.suppress(FileNotFoundError):
            os.remove(socket)
        with self.stage.stock_cache:
            began = time.monotonic()
            server = popen(self.stage, [*criu_words(self.stage.criu_path), "lazy-pages", "-D", folder,
                                        "--log-file", os.path.join(folder, "lazy.log")])
            poll(lambda: os.path.exists(socket) or server.poll() is not None, "criu lazy-pages to listen",
                 interval=0.0005)
            self.stage.run(self.command(folder, "--lazy-pages"))
            seconds = time.monotonic() - began

        def ready():
            if server.wait() != 0:
                raise Failed(f"criu lazy-pages ended with {server.returncode}, see its log")
        return Running(began, seconds, ready=ready)


class Peer(Way):
    def __init__(self, stage, spec):
        name, _, command = spec.partition("=")
        if not name or not command:
            raise Failed(f"--peer is NAME=COMMAND, not {spec}")
        super().__init__(stage, name, name, f"peer-{name}")
        self.words = shlex.split(command)

    def dump(self, pid, folder):
        os.makedirs(folder, exist_ok=True)
        self.stage.run([*self.words, "dump", pid, folder])

    def command(self, folder):
        return [*self.words, "restore", folder]

    def restore(self, folder, _pid):
        began = time.monotonic()
        outcome = self.stage.run(self.command(folder))
        return Running(began, outcome.seconds)

    def waiter(self, _pid):
        return None


def all_ways(stage, peers=()):
    """By name, in the order of the tables."""
    offered = stage.run([stage.unmoor_path, "restore", "--help"]).out
    plain = ("--no-prefetch",) if "--no-prefetch" in offered else ()
    ways = [Unmoor(stage, "direct", "unmoor direct", *plain)]
    if plain:
        ways.append(Unmoor(stage, "prefetch", "unmoor direct + prefetch"))
    if "lazy" in offered:
        ways.append(Unmoor(stage, "lazy", "unmoor lazy", "--mode", "lazy", *plain))
    if "eager" in offered:
        ways.append(Unmoor(stage, "eager", "unmoor eager", "--mode", "eager", *plain))
    ways += [Stock(stage, "stock", "stock CRIU"), StockLazy(stage, "stock-lazy", "CRIU lazy-pages")]
    ways += [Peer(stage, peer) for peer in peers]
    return {way.name: way for way in ways}


def files_of(folder):
    paths = [os.path.join(path, name) for path, _, names in os.walk(folder) for name in names]
    return [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]


def make_cold(folder):
    """Drops an image's pages from the page cache; binaries stay in it. Says so if some pages stay."""
    files = files_of(folder)
    for path in files:
        with open(path, "rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    told = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES", *files],
                          capture_output=True, text=True, check=True).stdout
    left = sum(int(line) for line in told.split())
    if left > 1 << 20:
        raise Failed(f"{left} bytes of {folder} stay in the page cache: is something using it?")


def make_warm(folder):
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            at, size = 0, os.fstat(file.fileno()).st_size
            while at < size:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                while at < end:
                    at += len(os.pread(file.fileno(), min(4 << 20, end - at), at))


def read_bytes():
    """Read from disks so far, by everybody."""
    with open("/proc/vmstat") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("pgpgin "))

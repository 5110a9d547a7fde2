"""The programs whose restore is measured up to their first answer: each can be asked one thing, asked
a little work, and verified.

  Touch   bench_touch: reads the first word of its heap, touches pages by a pattern, reads at random
  Redis   GETs over a UNIX socket
  Jvm     a small HTTP server (programs/Answers.java)

Each answer is compared with what it must be; a wrong one ends the run.
"""
import contextlib
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import time

from stage import SOURCE, Failed, is_alive, listens, poll

MIB = 1 << 20
BUILD = os.path.join(SOURCE, "build/release")


def faults(pid):
    """Minor and major faults of a process since its restore."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return int(fields[7]), int(fields[9])


def smaps(pid, *fields):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if "kB" in line}
    return [found[field] for field in fields]


def until_answered(ask, what, pid, timeout=120):
    """Asks until somebody listens: a restored program's socket is there a moment after it runs."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return ask()
        except OSError as error:
            if time.monotonic() > deadline or not is_alive(pid):
                raise Failed(f"{what} does not answer: {error}") from None
            time.sleep(0.0005)


class Touch:
    SEQUENTIAL, RANDOM, HOT = 0, 1, 2
    TOUCH, VERIFY, READS = 0, 1, 2
    HEAD = struct.Struct("<10Q")
    BYTES = HEAD.size + 4 * (1 << 20)

    def __init__(self, stage, name, mib, of=1):
        self.stage, self.mib, self.name = stage, mib, name
        self.bytes = mib * MIB // of
        board = os.path.join(stage.shared, f"{name}.board")
        with contextlib.suppress(FileNotFoundError):
            os.remove(board)  # an earlier program's, which says ready
        self.process = stage.spawn([os.path.join(BUILD, "bench/bench_touch"), "--mib", mib, "--of", of, "--board", board])
        self.pid = self.process.pid
        poll(lambda: os.path.exists(board) and os.path.getsize(board) == self.BYTES, f"{name} to begin")
        with open(board, "r+b") as file:
            self.board = mmap.mmap(file.fileno(), self.BYTES)
        poll(lambda: self._told()[5], f"{name} to be ready", 120)

    def _told(self):
        return self.HEAD.unpack_from(self.board)

    def ask(self, work, pattern=0, threads=1, count=0, seed=1, timeout=120):
        """Returns (nanoseconds, latencies noted)."""
        done = self._told()[9]
        struct.pack_into("<5Q", self.board, 0, work, pattern, threads, count, seed)
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + timeout
        while self._told()[9] == done:
            if not is_alive(self.pid) or time.monotonic() > deadline:
                raise Failed(f"the program with the {self.mib} MiB heap "
                             f"{'does not answer' if is_alive(self.pid) else 'is gone'}")
            time.sleep(0.0002)
        _, _, _, _, _, _, elapsed, wrong, noted, _ = self._told()
        if wrong:
            raise Failed(f"WRONG MEMORY in the {self.mib} MiB heap: {wrong} words")
        return elapsed, noted

    def latencies(self, noted):
        return sorted(struct.unpack_from(f"<{noted}I", self.board, self.HEAD.size))

    def first(self):
        self.ask(self.TOUCH, count=1)

    def some(self, _):
        """What a request may touch: 256 pages here and there, the same ones each time."""
        self.ask(self.TOUCH, self.RANDOM, count=256, seed=11)

    def verify(self, _thorough=True):
        self.ask(self.VERIFY, threads=2)

    def another(self):
        return Touch(self.stage, f"{self.name}-fresh", self.mib)


class Redis:
    KEYS_PER_MIB, VALUE = 250, 4000
    HOT = 2000

    def __init__(self, stage, mib, name="redis"):
        self.stage, self.mib, self.name = stage, mib, name
        self.bytes = mib * MIB
        self.place = stage.path(f"{name}.sock")
        self.keys = mib * self.KEYS_PER_MIB
        self.process = stage.spawn(["redis-server", "--port", "0", "--unixsocket", self.place, "--save", "",
                                    "--appendonly", "no", "--enable-debug-command", "yes"])
        self.pid = self.process.pid
        poll(lambda: listens(self.place), "redis to listen")
        self.told(b"DEBUG", b"POPULATE", b"%d" % self.keys, b"k", b"%d" % self.VALUE)
        self.digest = self.told(b"DEBUG", b"DIGEST")
        self.hot = random.Random(5).sample(range(self.keys), self.HOT)

    @staticmethod
    @contextlib.contextmanager
    def _connection(place):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(120)
            connection.connect(place)
            yield connection

    @staticmethod
    def _command(*words):
        return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)

    @staticmethod
    def _answer(connection, buffered=b""):
        data = buffered
        while b"\r\n" not in data:
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError("closed")
            data += part
        line, rest = data.split(b"\r\n", 1)
        if line[:1] != b"$" or line == b"$-1":
            return line
        length = int(line[1:])
        while len(rest) < length + 2:
            part = connection.recv(1 << 16)
            if not part:
                raise ConnectionError("closed")
            rest += part
        return rest[:length]

    def told(self, *words):
        with self._connection(self.place) as connection:
            connection.sendall(self._command(*words))
            return self._answer(connection)

    def _get(self, connection, number):
        connection.sendall(self._command(b"GET", b"k:%d" % number))
        if self._answer(connection).rstrip(b"\0") != b"value:%d" % number:
            raise Failed(f"WRONG MEMORY in redis: key k:{number}")

    def first(self, number=0):
        def ask():
            with self._connection(self.place) as connection:
                self._get(connection, self.hot[number])
        until_answered(ask, "redis", self.pid)

    def some(self, seed):
        """1000 requests for keys of a hot set, others each time."""
        source = random.Random(seed)
        with self._connection(self.place) as connection:
            for _ in range(1000):
                self._get(connection, source.choice(self.hot))

    def verify(self, thorough=True):
        if thorough:
            if self.told(b"DEBUG", b"DIGEST") != self.digest:
                raise Failed("WRONG MEMORY in redis: another digest")
            return
        with self._connection(self.place) as connection:
            for number in random.sample(range(self.keys), 3000):
                self._get(connection, number)

    def another(self):
        return Redis(self.stage, self.mib, f"{self.name}-fresh")

    def requests_per_second(self):
        # Its own client; the pipe keeps the client from being what is measured.
        outcome = self.stage.run(["redis-benchmark", "-s", self.place, "-t", "get", "-n", "300000", "-P", "16",
                                  "-c", "8", "-r", str(self.keys), "--csv"])
        for line in outcome.out.splitlines():
            if line.startswith('"GET"'):
                return float(line.split(",")[1].strip('"'))
        raise Failed(f"redis-benchmark told no figure: {outcome}")


class Jvm:
    def __init__(self, stage, mib):
        self.stage, self.mib, self.name = stage, mib, "jvm"
        self.bytes = mib * MIB
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = stage.spawn(["java", f"-Xmx{mib * 2 + 256}m", "-XX:-UsePerfData",
                                    os.path.join(SOURCE, "bench/programs/Answers.java"), mib, self.port])
        self.pid = self.process.pid
        self.expected = {number: until_answered(lambda: self._get(f"/record?{number}"), "the JVM", self.pid)
                         for number in (7, 77_777)}
        self.sum = self._get("/sum")
        for _ in range(200):  # it is compiled by then
            self._get("/record?7")

    def _get(self, path):
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: bench\r\n\r\n".encode())
            data = b""
            while part := connection.recv(1 << 16):
                data += part
        head, _, body = data.partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise ConnectionError(f"answered {head[:40]!r}")
        return body

    def _compare(self, number):
        if self._get(f"/record?{number}") != self.expected[number]:
            raise Failed(f"WRONG MEMORY in the JVM: record {number}")

    def first(self, number=7):
        until_answered(lambda: self._compare(number), "the JVM", self.pid)

    def some(self, _):
        for _ in range(50):
            self._compare(77_777)

    def verify(self, thorough=True):
        if thorough and self._get("/sum") != self.sum:
            raise Failed("WRONG MEMORY in the JVM: another sum")
        self._compare(7)


def have(program):
    return {"redis": shutil.which("redis-server"), "jvm": shutil.which("java")}.get(program, True)

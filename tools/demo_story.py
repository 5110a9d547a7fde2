"""The story tools/demo tells; see there. Run by it, with UNMOOR naming the binary.

One process tells the story and is the subreaper of all others (bench/stage.py). A second one, the
writer, plays the clients: it sets keys, a few at a time, while redis is dumped, restored and remapped,
remembers what was acknowledged and how long each answer took, and reads it all back when told to.
Any digest that differs raises Failed; whatever happens, the stage is cleared.
"""
import argparse
import collections
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "bench"))
from stage import (ENDING_SIGNALS, Failed, Stage, criu_version, dump_times,  # noqa: E402
                   is_alive, memory, poll, run_is_tmpfs, tree_bytes)

VALUE_BYTES = 800
BATCH = 8  # commands the writing client sends at a time
BYTES_A_KEY = 970  # what redis needs in memory for one such key
MIB = 1 << 20


class Connection:
    """A client of redis: one command at a time."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")

    def __call__(self, *words):
        return self.pipeline([words])[0]

    def pipeline(self, commands):
        """Sends all commands, then receives all answers."""
        parts = []
        for words in commands:
            parts.append(b"*%d\r\n" % len(words))
            for word in words:
                word = word if isinstance(word, bytes) else str(word).encode()
                parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.socket.sendall(b"".join(parts))
        return [self._receive() for _ in commands]

    def _receive(self):
        line = self.file.readline()
        if not line:
            raise ConnectionError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise Failed("redis says " + rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == b"-1" else self.file.read(int(rest) + 2)[:-2]
        if kind == b"*":
            return [self._receive() for _ in range(int(rest))]
        return rest.decode()

    def close(self):
        self.file.close()
        self.socket.close()


def connect(path, give_up=lambda: None, interval=0.0002):
    """A connection as soon as there is somebody to connect to."""
    def connected():
        give_up()
        try:
            return Connection(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
    return poll(connected, "redis to accept a connection", timeout=120, interval=interval)


def populated(key):
    """What DEBUG POPULATE gave to key:N."""
    return f"value:{key.split(':')[1]}".encode().ljust(VALUE_BYTES, b"\0")


# The writer: a process of its own. Commands are lines on stdin, its reports lines on stdout.

def writer(path, keys):
    """`write` until `pause`; `mark`; `verify`; `undo` all since the mark; ends with stdin."""
    os.set_blocking(0, False)
    acknowledged = {}
    marked = {}
    pending = b""
    number = 0
    connection = None
    times = []

    def tell(**what):
        print(json.dumps(what), flush=True)

    while True:
        try:
            chunk = os.read(0, 4096)
            if not chunk:
                return
            pending += chunk
        except BlockingIOError:
            pass
        while b"\n" in pending:
            word, pending = pending.split(b"\n", 1)
            if word == b"write":
                times = []
                connection = connect(path)
                tell(connected=time.monotonic())
            elif word == b"pause":
                connection.close()
                connection = None
                tell(times=times, keys=len(acknowledged))
            elif word == b"mark":
                marked = dict(acknowledged)
                tell(keys=len(marked))
            elif word == b"undo":
                undoing = connect(path)
                changed = [key for key, value in acknowledged.items() if marked.get(key) != value]
                for key in changed:
                    undoing("SET", key, marked.get(key) or populated(key))
                undoing.close()
                acknowledged = dict(marked)
                tell(undone=len(changed))
            elif word == b"verify":
                reader = connect(path)
                wrong = sum(reader("GET", key) != value for key, value in acknowledged.items())
                reader.close()
                tell(wrong=wrong, compared=len(acknowledged))
        if connection is None:
            time.sleep(0.001)
            continue
        batch = {}
        for number in range(number + 1, number + 1 + BATCH):
            batch[f"key:{number * 7919 % keys}"] = f"written {number} ".ljust(VALUE_BYTES, ".").encode()
        began = time.monotonic()
        connection.pipeline([("SET", key, value) for key, value in batch.items()])
        times.append((began, time.monotonic()))
        acknowledged.update(batch)


class Writer:
    def __init__(self, stage, path, keys):
        into, self.out = os.pipe()
        self.file, outof = os.pipe()
        self.process = stage.spawn([sys.executable, "-B", os.path.abspath(__file__), "--writer",
                                    path, str(keys)], stdin=into, stdout=outof,
                                   stderr=None)
        os.close(into)
        os.close(outof)
        self.file = os.fdopen(self.file)

    def tell(self, word):
        os.write(self.out, word.encode() + b"\n")

    def hear(self):
        line = self.file.readline()
        if not line:
            raise Failed("the writing client ended, see above")
        return json.loads(line)

    def ask(self, word):
        self.tell(word)
        return self.hear()


# What is seen.

class Screen:
    def __init__(self):
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and \
            os.environ.get("TERM") != "dumb"
        self.clear = "\x1b[K" if self.terminal else ""
        self.step_number = 0

    def paint(self, text, *codes):
        if not self.colour:
            return text
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m"

    def step(self, text):
        self.step_number += 1
        print("\n" + self.paint(f"{self.step_number:2}  {text}", 1), flush=True)

    def say(self, text):
        self._print(text)

    def good(self, text):
        self._print(self.paint("✓", 32) + " " + text)

    def busy(self, text):
        """What goes on right now, on a terminal; the next line takes its place."""
        if self.terminal:
            print(f"\r{self.clear}    {self.paint(text + ' …', 2)}", end="", flush=True)

    def _print(self, text):
        print(("\r" + self.clear if self.terminal else "") + "    " + text, flush=True)

    def bar(self, share, text, final=False):
        """One line that grows on a terminal; elsewhere only its last state."""
        if not self.terminal and not final:
            return
        room = shutil.get_terminal_size((100, 24)).columns - len(text) - 14
        width = max(10, min(30, room))
        full = int(share * width)
        line = f"    {self.paint('█' * full, 36)}{'░' * (width - full)} {share * 100:3.0f} %  {text}"
        if self.terminal:
            line = f"\r{self.clear}{line}"
        print(line, end="\n" if final else "", flush=True)


def mib(size):
    return f"{size / MIB:.0f} MiB"


def ms(seconds):
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def per_second(times, begin, end):
    return BATCH * sum(begin <= t[1] < end for t in times) / (end - begin) if end > begin else 0.0


class Redis:
    """redis-server on a socket in the stage's folder, with nothing of the system's configuration."""

    def __init__(self, stage):
        self.stage = stage
        self.socket = stage.path("redis.sock")
        program = shutil.which("redis-server")
        if not program:
            raise Failed("redis-server is not there; run tools/setup")
        log = stage.path("redis.log")
        self.process = stage.spawn(
            [program, "--port", "0", "--unixsocket", self.socket, "--save", "", "--appendonly",
             "no", "--enable-debug-command", "yes", "--dir", stage.folder, "--logfile", log])
        self.pid = self.process.pid

        def give_up():
            if self.process.poll() is not None:
                with open(log) as file:
                    raise Failed("redis-server ended:\n" + file.read())
        connect(self.socket, give_up).close()

    def call(self, *words):
        connection = connect(self.socket, self._demand_alive)
        answer = connection(*words)
        connection.close()
        return answer

    def _demand_alive(self):
        if not is_alive(self.pid):
            raise Failed("redis is gone")

    def digest(self):
        return self.call("DEBUG", "DIGEST")

    def await_no_client(self):
        """Redis has noticed that its clients left: a connection is no part of this story."""
        def no_socket_left():
            sockets = 0
            for fd in os.listdir(f"/proc/{self.pid}/fd"):
                try:
                    sockets += os.readlink(f"/proc/{self.pid}/fd/{fd}").startswith("socket:")
                except OSError:
                    pass
            return sockets <= 1
        poll(no_socket_left, "redis to close its connections")


Restore = collections.namedtuple("Restore", "seconds first_answer")


class Story:
    def __init__(self, stage, screen, arguments):
        self.stage, self.screen, self.arguments = stage, screen, arguments
        self.keys = arguments.mib * MIB // BYTES_A_KEY
        self.first, self.second = stage.path("image-1"), stage.path("image-2")
        self.stock = stage.path("image-stock")
        self.reference = self.first_digest = None
        self.digests = 0
        self.stock_rounds, self.direct_rounds = [], []
        self.figures = {}

    # Pieces.

    def demand_digest(self, when):
        began = time.monotonic()
        self.screen.busy("redis takes the digest of all keys")
        digest = self.redis.digest()
        if self.reference is None:
            self.reference = digest
            self.screen.say(f"digest of all keys {digest[:16]}…, taken by redis in "
                            f"{time.monotonic() - began:.1f} s; the reference from now on")
            return
        self.digests += 1
        if digest != self.reference:
            raise Failed(f"DIGEST DIFFERS {when}: {digest}, it was {self.reference}")
        self.screen.good(f"digest {digest[:16]}… equal {when}")

    def restore(self, way, folder):
        self.stage.await_gone(self.redis.pid)
        began = time.monotonic()
        if way == "stock":
            outcome = self.stage.stock_restore(folder)
        else:
            outcome = self.stage.unmoor("restore", "-D", folder, "-d", "--json")
            report = outcome.json()
            if report["pid"] != self.redis.pid:
                raise Failed(f"restored as {report['pid']}, it was {self.redis.pid}")
            self.figures["criu"] = report["criu_ns"] / 1e9
        self.redis.call("PING")
        return Restore(outcome.seconds, time.monotonic() - began)

    def dump(self, folder):
        self.redis.await_no_client()
        self.screen.busy(f"unmoor dump -t {self.redis.pid}")
        outcome = self.stage.unmoor("dump", "-t", self.redis.pid, "-D", folder, "--json")
        self.stage.await_gone(self.redis.pid)
        size = tree_bytes(folder)
        self.screen.say(f"unmoor dump -t {self.redis.pid} -D {os.path.basename(folder)}: "
                        f"{mib(size)} on disk in {outcome.seconds:.2f} s; redis is gone")
        return outcome, size

    def status(self):
        outcome = self.stage.unmoor("status", "-t", self.redis.pid, "--json", expect=None)
        if outcome.code > 2:
            raise Failed(str(outcome))
        return outcome.json()

    def watch_remap(self):
        """Until READY, with a bar. Returns the last status and when it was."""
        began = time.monotonic()
        while True:
            status = self.status()
            now = time.monotonic()
            progress = status.get("progress", {})
            total = progress.get("total_bytes", 0)
            done = progress.get("done_bytes", 0) + progress.get("dropped_bytes", 0)
            ready = status["status"] == "READY"
            text = (f"{mib(done)} of {mib(total)}, longest pause "
                    f"{ms(progress.get('longest_pause_ns', 0) / 1e9)}")
            self.screen.bar(done / total if total else float(ready), text, final=ready)
            if ready:
                return status, now
            if status["status"] == "NEVER" or now - began > 120:
                raise Failed(f"the remap does not end: {status}")
            time.sleep(0.02)

    # The story, step by step.

    def start_redis(self):
        self.screen.step(f"redis with {self.keys:,} keys")
        self.redis = Redis(self.stage)
        self.writer = Writer(self.stage, self.redis.socket, self.keys)
        self.screen.busy(f"DEBUG POPULATE {self.keys}")
        self.redis.call("DEBUG", "POPULATE", self.keys, "key", VALUE_BYTES)
        self.screen.say(f"redis-server, pid {self.redis.pid}: DEBUG POPULATE {self.keys} makes "
                        f"{mib(memory(self.redis.pid, 'VmRSS'))} of memory")
        self.writer.ask("write")
        time.sleep(1)
        began = time.monotonic() - 0.9
        times = self.writer.ask("pause")["times"]
        self.figures["before"] = per_second(times, began, began + 0.8)
        self.screen.say(f"one client writes without pause, {self.figures['before']:,.0f} a second; "
                        "its answers are remembered")
        self.writer.ask("mark")
        self.demand_digest("before the first dump")
        self.first_digest = self.reference

    def dump_first(self):
        self.screen.step("dumped: by stock CRIU, left running; then by unmoor, ended")
        self.redis.await_no_client()
        self.screen.busy(f"criu dump -t {self.redis.pid}")
        outcome = self.stage.stock_dump(self.redis.pid, self.stock, "--leave-running")
        self.figures["stock size"] = tree_bytes(self.stock)
        self.figures["stock frozen"] = dump_times(self.stock)["frozen"]
        self.screen.say(f"criu dump -t {self.redis.pid} --leave-running: "
                        f"{mib(self.figures['stock size'])} on disk in {outcome.seconds:.2f} s")
        _, self.figures["size"] = self.dump(self.first)
        self.figures["frozen"] = dump_times(os.path.join(self.first, "criu"))["frozen"]

    def time_restores(self):
        rounds = self.arguments.rounds
        self.screen.step(f"restored {rounds} × each way, in turns; images in the page cache")
        if not run_is_tmpfs():
            self.screen.say("/run is no tmpfs here, so criu cannot keep its kernel probes; in both "
                            "cases")
            self.screen.say("it is given them (without, its restore takes some 30 ms longer)")
        for number in range(rounds):
            for way, folder, found in (("stock", self.stock, self.stock_rounds),
                                       ("direct", self.first, self.direct_rounds)):
                found.append(self.restore(way, folder))
                name = "criu restore  " if way == "stock" else "unmoor restore"
                self.screen.say(f"{name} {ms(found[-1].seconds):>9}, first answer after "
                                f"{ms(found[-1].first_answer):>9}")
                self.demand_digest(f"after {'stock' if way == 'stock' else 'direct'} restore "
                                   f"{number + 1}")
                self.stage.kill(self.redis.pid)

    def remap_under_load(self):
        self.screen.step("restored by mapping once more, and written to while it is remapped")
        self.writer.tell("write")  # it waits at the door
        restored = self.restore("direct", self.first)
        self.direct_rounds.append(restored)
        begin = time.monotonic()
        self.screen.say(f"unmoor restore -d {ms(restored.seconds):>9}; redis runs on mapped memory")
        self.writer.hear()
        status, end = self.watch_remap()
        progress = status.get("progress", {})
        self.figures["rate"] = progress.get("bytes_per_second", 0)
        self.figures["remapped"] = progress.get("done_bytes", 0)
        self.figures["pause"] = progress.get("longest_pause_ns", 0) / 1e9
        self.figures["remap"] = progress.get("elapsed_ns", 0) / 1e9
        if status["direct_mapped_bytes"]:
            raise Failed(f"READY, yet {status['direct_mapped_bytes']} bytes are mapped")
        self.screen.good("READY: no byte of redis comes from the image any more")
        time.sleep(1)
        told = self.writer.ask("pause")
        times = told["times"]
        if not times:
            raise Failed("the client got no write through")
        self.figures["during"] = per_second(times, begin, end)
        self.figures["after"] = per_second(times, end + 0.1, end + 0.9)
        self.figures["stall"] = max(t[1] - t[0] for t in times)
        during = BATCH * sum(t[1] < end for t in times)
        after = BATCH * len(times) - during
        self.screen.say(f"{during:,} writes during the remap, {after:,} after it; "
                        f"the longest wait for an answer {ms(self.figures['stall'])}")
        self.verify_writes()
        self.reference = None
        self.demand_digest("")

    def verify_writes(self):
        self.screen.busy("the client reads its writes back")
        told = self.writer.ask("verify")
        if told["wrong"]:
            raise Failed(f"{told['wrong']} of {told['compared']} acknowledged writes are wrong")
        self.screen.good(f"all {told['compared']:,} keys the client wrote hold what it wrote")

    def second_generation(self):
        self.screen.step("dumped again; the first image is deleted; restored from the second")
        self.dump(self.second)
        shutil.rmtree(self.first)
        shutil.rmtree(self.stock)
        self.screen.say("image-1 deleted (and stock CRIU's)")
        restored = self.restore("direct", self.second)
        self.direct_rounds.append(restored)
        self.screen.say(f"unmoor restore -d {ms(restored.seconds):>9}, first answer after "
                        f"{ms(restored.first_answer):>9}")
        self.demand_digest("after the restore of the second generation")
        self.verify_writes()
        self.watch_remap()
        shutil.rmtree(self.second)
        self.screen.say("READY; image-2 deleted too")
        self.demand_digest("with no image left at all")
        self.screen.busy("the client puts back what its writes replaced")
        undone = self.writer.ask("undo")["undone"]
        self.reference = self.first_digest
        self.demand_digest(f"to the very first one, {undone:,} old values put back")
        self.stage.kill(self.redis.pid)

    def table(self):
        figures = self.figures
        stock = statistics.median(r.seconds for r in self.stock_rounds)
        direct = statistics.median(r.seconds for r in self.direct_rounds)
        stock_first = statistics.median(r.first_answer for r in self.stock_rounds)
        direct_first = statistics.median(r.first_answer for r in self.direct_rounds)
        rows = [
            ("restore, median", ms(stock), ms(direct), f"{stock / direct:.1f} × faster"),
            ("first answer, median", ms(stock_first), ms(direct_first),
             f"{stock_first / direct_first:.1f} × sooner"),
            ("frozen by the dump", ms(figures["stock frozen"]), ms(figures["frozen"]), ""),
            ("image on disk", mib(figures["stock size"]), mib(figures["size"]), ""),
        ]
        screen = self.screen
        print()
        print("    " + screen.paint(f"{'':22}{'stock CRIU':>12}{'unmoor':>12}", 1))
        for name, left, right, note in rows:
            print(f"    {name:22}{left:>12}{screen.paint(f'{right:>12}', 1)}   "
                  f"{screen.paint(note, 32)}".rstrip())
        print()
        rate = figures["rate"] / (1 << 30)
        print(f"    remap                 {mib(figures['remapped'])} in {ms(figures['remap'])}, "
              f"copying at {rate:.1f} GiB/s")
        print(f"    longest pause         {ms(figures['pause'])} (limit asked for: 1 ms); longest wait of "
              f"a client {ms(figures['stall'])}")
        print(f"    writes a second       {figures['before']:,.0f} before, {figures['during']:,.0f} "
              f"during, {figures['after']:,.0f} after the remap")
        print(f"    digests               {self.digests} compared, all equal")
        print(f"    with                  criu {criu_version(self.stage.criu_path)}, kernel "
              f"{os.uname().release}, {len(os.sched_getaffinity(0))} CPUs", flush=True)

    def tell(self):
        self.start_redis()
        self.dump_first()
        self.time_restores()
        self.remap_under_load()
        self.second_generation()
        self.table()


def demand_room(folder, size):
    free = shutil.disk_usage(folder).free
    if free < 4 * size:
        raise Failed(f"{folder} has {mib(free)} free, the demo needs {mib(4 * size)}; "
                     "free some, set TMPDIR to another place, or use --mib")


def parse_arguments():
    parser = argparse.ArgumentParser(prog="tools/demo")
    parser.add_argument("--mib", type=int, default=500, help="redis' memory, about")
    parser.add_argument("--rounds", type=int, default=3, help="timed restores each way")
    arguments = parser.parse_args()
    if arguments.mib < 8 or arguments.rounds < 1:
        parser.error("--mib is at least 8, --rounds at least 1")
    return arguments


def stop(number, _):
    raise SystemExit(128 + number)


def main():
    arguments = parse_arguments()
    screen = Screen()
    # /tmp may be in memory; half a gigabyte of image, four times, is not for there.
    parent = os.environ.get("TMPDIR", "/var/tmp")
    for number in ENDING_SIGNALS:
        signal.signal(number, stop)
    stage = None
    code = 0
    try:
        demand_room(parent, arguments.mib * MIB)
        stage = Stage("unmoor-demo.", parent)
        stage.open()
        Story(stage, screen, arguments).tell()
    except (Failed, OSError) as error:
        sys.stdout.flush()
        print(f"\r{screen.clear}    {screen.paint('✗', 31)} {error}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as interrupted:
        print(f"\r{screen.clear}    interrupted; tidying up", file=sys.stderr, flush=True)
        code = interrupted.code
    finally:
        if stage is not None:
            stage.close()
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["--writer"]:
        writer(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(main())

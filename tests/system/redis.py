#!/usr/bin/env -S python3 -B
"""redis through three generations, each earlier directory gone before the next restore.

Clients talk by TCP. Before a dump they go (a connection is the business of CRIU's own options); after
a restore they come again, and write while the remap is at work. Every key is compared: DEBUG DIGEST
before the dump and after the restore; during the remap, which goes on under a BGSAVE, each key that
nobody wrote, and an own copy of every write that was acknowledged.
"""
import concurrent.futures
import os
import shutil
import socket
import threading
import time

from harness import (Program, children, demand, footprint, free_port, is_alive, main, need_program,
                     poll)

KEYS = 200_000  # about 190 MB
VALUE_BYTES = 800


class Client:
    """A client of the redis protocol: one connection, one command at a time."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self.file = self.socket.makefile("rb")

    def send(self, *words):
        parts = [f"*{len(words)}\r\n".encode()]
        for word in words:
            word = word if isinstance(word, bytes) else str(word).encode()
            parts.append(b"$%d\r\n%s\r\n" % (len(word), word))
        self.socket.sendall(b"".join(parts))

    def receive(self):
        line = self.file.readline()
        if not line:
            raise ConnectionError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RuntimeError(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else self.file.read(length + 2)[:-2]
        if kind == b"*":
            return [self.receive() for _ in range(int(rest))]
        return rest.decode()

    def __call__(self, *words):
        self.send(*words)
        return self.receive()

    def close(self):
        self.file.close()
        self.socket.close()


class Writer(threading.Thread):
    """Writes without pause and remembers what redis acknowledged."""

    def __init__(self, port, generation):
        super().__init__(daemon=True)
        self.port = port
        self.generation = generation
        self.acknowledged = {}
        self.longest = 0.0
        self.stopping = threading.Event()
        self.error = None

    def run(self):
        try:
            client = Client(self.port)
            number = 0
            while not self.stopping.is_set():
                # Old keys too: pages that the image holds are written anew.
                key = f"key:{number * 7919 % KEYS}" if number % 2 else f"new:{self.generation}:{number}"
                value = f"{self.generation}:{number}:".ljust(64 + number % 900, "x")
                begun = time.monotonic()
                client("SET", key, value)
                self.longest = max(self.longest, time.monotonic() - begun)
                self.acknowledged[key] = value
                number += 1
            client.close()
        except (OSError, RuntimeError) as error:
            self.error = error

    def finish(self):
        self.stopping.set()
        self.join(60)
        demand(self.error is None and not self.is_alive(), f"the writing client failed: {self.error}")
        return self.acknowledged


class Redis:
    def __init__(self, story):
        self.story = story
        self.port = free_port()
        popen = story.popen([need_program("redis-server"), "--port", str(self.port), "--bind",
                             "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", story.folder,
                             "--enable-debug-command", "yes", "--daemonize", "no", "--logfile",
                             "/dev/null"])
        self.program = Program(story, popen.pid, "/nonexistent", popen)
        self.expected = {}

    def client(self):
        def connected():
            try:
                return Client(self.port)
            except OSError:
                demand(is_alive(self.program.pid), "redis ended")
                return None
        return poll(connected, "a client connects")

    def populate(self):
        client = self.client()
        client("DEBUG", "POPULATE", KEYS, "key", VALUE_BYTES)
        demand(client("DBSIZE") == KEYS, "redis holds the keys")
        client.close()

    def digest(self):
        client = self.client()
        digest = client("DEBUG", "DIGEST")
        client.close()
        return digest

    def value_digests(self):
        """Of every key it was populated with, in their order."""
        client = self.client()
        digests = []
        step = 2000
        for first in range(0, KEYS, step):
            keys = [f"key:{number}" for number in range(first, min(first + step, KEYS))]
            digests += client("DEBUG", "DIGEST-VALUE", *keys)
        client.close()
        return digests

    def demand_untouched(self, before, written):
        """Every key that nobody wrote is what it was."""
        for number, (old, new) in enumerate(zip(before, self.value_digests(), strict=True)):
            demand(old == new or f"key:{number}" in written,
                   f"key:{number}, which nobody wrote, is not what it was")

    def demand_own_writes(self):
        """Every acknowledged write is there."""
        client = self.client()
        items = list(self.expected.items())
        for start in range(0, len(items), 1000):
            batch = items[start:start + 1000]
            values = client("MGET", *(key for key, _ in batch))
            for (key, value), found in zip(batch, values):
                demand(found == value.encode(), f"{key} holds {found!r:.80}, written was {value!r:.80}")
        client.close()
        return len(items)

    def save_in_background(self):
        """BGSAVE forks; the child reads all memory and writes it out. Returns the bytes saved."""
        client = self.client()
        client("BGSAVE")
        def saved():
            info = client("INFO", "persistence")
            return b"rdb_bgsave_in_progress:0" in info and info
        info = poll(saved, "BGSAVE is done", 120)
        demand(b"rdb_last_bgsave_status:ok" in info, "BGSAVE failed: " + info.decode())
        client.close()
        path = self.story.path("dump.rdb")
        size = os.path.getsize(path)
        os.remove(path)
        return size

    def is_saving(self):
        def name(pid):
            try:
                with open(f"/proc/{pid}/comm") as file:
                    return file.read()
            except OSError:
                return ""
        return any(name(pid).startswith("redis") for pid in children(self.program.pid))

    def disconnected(self):
        """All clients are gone from redis's own point of view."""
        def alone():
            client = Client(self.port)
            count = len([l for l in client("CLIENT", "LIST").splitlines() if l])
            client.close()
            return count == 1
        poll(alone, "redis has no other client")
        pid = self.program.pid
        poll(lambda: sum(1 for fd in os.listdir(f"/proc/{pid}/fd")
                         if self._is_socket(pid, fd)) <= 1, "redis has closed its connections")

    @staticmethod
    def _is_socket(pid, fd):
        try:
            return os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:")
        except OSError:
            return False


def three_generations(story):
    redis = Redis(story)
    redis.populate()
    redis.disconnected()
    before = footprint(redis.program.pid)
    previous = None
    for generation in (1, 2, 3):
        digest = redis.digest()
        redis.disconnected()
        image = story.dump(redis.program, f"generation-{generation}")
        if previous:
            shutil.rmtree(previous)
        previous = image
        story.restore(redis.program, image, "--remap", "off")
        # Nothing has written yet: the digest tells whether every key is what it was.
        demand(redis.digest() == digest, f"the digest differs after restore {generation}")
        values = redis.value_digests()
        writer = Writer(redis.port, generation)
        writer.start()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            saving = pool.submit(redis.save_in_background)
            poll(lambda: redis.is_saving() or saving.done(), "BGSAVE has forked")
            demand(not saving.done(), "BGSAVE is to go on during the remap")
            outcome = story.unmoor("remap", "-t", redis.program.pid)
            story.count_windows(redis.program)
            saved = saving.result()
        written = writer.finish()
        redis.demand_untouched(values, written)
        redis.expected.update(written)
        compared = redis.demand_own_writes()
        story.say(f"generation {generation}: {compared} own writes compared, BGSAVE of {saved >> 20} "
                  f"MiB, slowest write {writer.longest * 1000:.1f} ms, {outcome.out.strip()[-200:]}")
        story.demand_no_agent()
        redis.disconnected()
    shutil.rmtree(previous)
    redis.demand_own_writes()
    after = footprint(redis.program.pid)
    demand(after.threads == before.threads and after.children == [] and after.tracer == "0",
           f"threads, children or tracer differ: {after[:4]}")
    redis.program.popen = None
    client = redis.client()
    client.send("SHUTDOWN", "NOSAVE")
    client.close()
    redis.program.await_gone()


def three_generations_of_500_mb(story):
    global KEYS
    KEYS = 500_000
    three_generations(story)


def reads_are_right_while_direct_mapped(story):
    """No remap: redis works on its page image, frees memory (DONTNEED by jemalloc) and takes it again."""
    redis = Redis(story)
    redis.populate()
    digest = redis.digest()
    redis.disconnected()
    image = story.dump(redis.program, "image")
    story.restore(redis.program, image, "--remap", "off")
    demand(redis.digest() == digest, "the digest differs while direct-mapped")
    client = redis.client()
    for key in range(0, KEYS, 2):
        client.send("DEL", f"key:{key}")
    for key in range(0, KEYS, 2):
        demand(client.receive() == 1, f"key:{key} was there")
    client("MEMORY", "PURGE")
    client("DEBUG", "POPULATE", KEYS, "key", VALUE_BYTES)
    demand(client("DBSIZE") == KEYS, "all keys are there again")
    demand(redis.digest() == digest, "the digest differs after deleting and making half the keys")
    story.unmoor("remap", "-t", redis.program.pid)
    shutil.rmtree(image)
    demand(redis.digest() == digest, "the digest differs after the remap")
    client.send("SHUTDOWN", "NOSAVE")
    client.close()
    redis.program.await_gone()


if __name__ == "__main__":
    main({f.__name__: f for f in (three_generations, three_generations_of_500_mb, reads_are_right_while_direct_mapped)})

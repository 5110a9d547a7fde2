"""The cases of bench/run that compare the ways to restore (ways.py) on programs that answer (served.py).

  restore    heaps by size, cold and warm: until it runs, until the first answer, until it is independent
  alone      restores, and first dumps, of which each is the only one for a second
  served     redis and a JVM: the same, up to their first answers
  together   eight programs restored at the same time
  paging     what each touch of a page costs after a restore, by pattern and threads
  after      a program's speed once it is independent, beside one that was never checkpointed
"""
import contextlib
import os
import shutil
import statistics
import time

from served import Jvm, Redis, Touch, faults, have, smaps
from stage import Failed, dump_times
from ways import Stock, all_ways, make_cold, make_warm, popen, read_bytes


def percentile(ordered, share):
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class RestoreCases:
    """What Bench needs for them; `stage`, `quick`, `rounds`, `peers`, `emit`, `each_round` are Bench's."""

    def ways(self, without=()):
        if self.known_ways is None:
            self.known_ways = all_ways(self.stage, self.peers)
        return {name: way for name, way in self.known_ways.items() if name not in without}

    # Images of a program: one for each kind that the ways need, then the program ends.

    def dump_all(self, program, ways):
        folders = {}
        for way in ways.values():
            if way.image not in folders:
                folders[way.image] = self.fresh(f"{program.name}-{way.image}")
                way.dump(program.pid, folders[way.image])
        self.stage.kill(program.pid)
        if "prefetch" in ways:
            self.record(program, folders["unmoor"])
        os.sync()
        return folders

    def record(self, program, folder):
        """Restores it once so that its working set is noted: up to a first answer and a little work."""
        self.stage.unmoor("restore", "-d", "-D", folder, "--record")
        program.first()
        program.some(1)
        self.stage.unmoor("record", "-t", program.pid, "--stop")
        self.wait_ready(program.pid)
        self.stage.kill(program.pid)

    def prepare_cache(self, folder, cache):
        make_cold(folder) if cache == "cold" else make_warm(folder)

    def restore_measured(self, case, program, way, folder, cache, number, rss=False, thorough=True, beside=None, **told):
        """One restore up to a verified, independent program; the line it gives. `beside`: counts for that size."""
        self.prepare_cache(folder, cache)
        before = read_bytes()
        with self.stage.alone() if case == "alone" else contextlib.nullcontext():
            running = way.restore(folder, program.pid)
        values = dict(running.values)
        program.first()
        values["first_ms"] = (time.monotonic() - running.began) * 1e3
        values["first_minor"], values["first_major"] = faults(program.pid)
        values["first_read_bytes"] = read_bytes() - before
        if case == "served":
            program.some(1000 + number)
            values["some_ms"] = (time.monotonic() - running.began) * 1e3
        if rss:
            time.sleep(max(0, running.began + running.seconds + 1 - time.monotonic()))
            values["rss_1s"], values["pss_1s"] = smaps(program.pid, "Rss", "Pss")
        if number % 2 == 0:  # in turns: while it is still being made independent, and afterwards
            program.verify(thorough)
        values["ready_ms"] = running.ready() * 1e3
        if number % 2 == 1:
            program.verify(thorough)
        values["ready_read_bytes"] = read_bytes() - before
        self.stage.kill(program.pid)
        self.emit(case, program=program.name, mib=program.mib if beside is None else beside, way=way.name, cache=cache,
                  round=number, wall_ms=round(running.seconds * 1e3, 3), **told,
                  **{k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}, verified=True)

    def remove_all(self, folders):
        for folder in folders.values():
            shutil.rmtree(folder)

    # Heaps by size.

    def restore(self):
        """Rounds are as many as the time allows: small heaps in all of them, the largest in few."""
        plan = ([(0, 5, 0, 5), (1, 5, 0, 5), (64, 3, 2, 10), (256, 2, 0, 10)] if self.quick else
                [(0, 30, 0, 15), (1, 30, 5, 40), (256, 10, 5, 70), (1024, 5, 3, 100), (4096, 3, 0, 130)])
        # What is compared with every size in that size's own rounds: the machine is not the same in all of them.
        null = self.dump_null()
        for mib, warm, cold, seconds in plan:
            warm, cold = self.rounds or warm, (self.rounds if cold else 0) or cold
            ways = self.ways(without=() if mib else ("prefetch", "lazy", "eager", "stock-lazy"))
            program = Touch(self.stage, "touch", mib)
            folders = self.dump_all(program, ways)
            contestants = [(name, "warm") for name in ["null", *ways]] + [(name, "cold") for name in ways if cold]
            if mib >= 256:  # few rounds
                contestants += 2 * [("null", "warm"), ("direct", "warm")]
            probing = "stock-probing" if mib <= 1 else None
            if probing:
                contestants.append((probing, "warm"))
            for number, (name, cache) in self.each_round(max(warm, cold), contestants, seconds):
                if number >= (warm if cache == "warm" else cold):
                    continue
                if name == "null":
                    self.restore_measured("restore", *null, cache, number, beside=mib)
                else:
                    way = self.probing_way() if name == probing else ways[name]
                    self.restore_measured("restore", program, way, folders[way.image], cache, number,
                                          rss=number == 0 and mib >= 64)
            self.remove_all(folders)
        self.restore_sparse(null)
        shutil.rmtree(null[2])

    def dump_null(self):
        """What everything is compared with: an empty process, the way to restore it and its image."""
        program = Touch(self.stage, "touch-null", 0)
        way = Stock(self.stage, "null", "stock CRIU, an empty process")
        folder, = self.dump_all(program, {way.name: way}).values()
        return program, way, folder

    def beside_null(self, case, program, ways, null, rounds, seconds):
        folders = self.dump_all(program, ways)
        for number, name in self.each_round(self.rounds or rounds, ["null", *ways], seconds):
            if name == "null":
                self.restore_measured(case, *null, "warm", number, beside=program.mib)
            else:
                self.restore_measured(case, program, ways[name], folders[ways[name].image], "warm", number)
        self.remove_all(folders)

    def restore_sparse(self, null):
        """As large as few machines have memory and disk for: one page of each 2 MiB is there."""
        mib, rounds, seconds = (4096, 2, 5) if self.quick else (16384, 8, 40)
        program = Touch(self.stage, "sparse", mib, of=512)
        ways = {name: way for name, way in self.ways().items() if name in ("direct", "stock")}
        self.beside_null("sparse", program, ways, null, rounds, seconds)

    # Commands as their users run them: none other of CRIU's in the second before.

    def alone(self):
        sizes, rounds = ((0, 64), 2) if self.quick else ((0, 1, 256, 1024, 4096), 10)
        null = self.dump_null()
        ways = {name: way for name, way in self.ways().items() if name in ("direct", "stock")}
        for mib in sizes:
            self.beside_null("alone", Touch(self.stage, "touch", mib), {"direct": ways["direct"]}, null, rounds, 20)
        shutil.rmtree(null[2])
        for number, name in self.each_round(self.rounds or rounds, ways, 20):
            self.first_dump(number, ways[name], 1)

    def first_dump(self, number, way, mib):
        """How long a program stands still that nobody has dumped before."""
        program = Touch(self.stage, "touch", mib)
        folder = self.fresh("dumped")
        with self.stage.alone():
            way.dump(program.pid, folder)
        times = dump_times(os.path.join(folder, "criu") if way.image == "unmoor" else folder)
        program.verify()
        self.stage.kill(program.pid)
        self.emit("first-dump", mib=mib, way=way.name, round=number, frozen_ms=round(times["frozen"] * 1e3, 3), verified=True)

    def probing_way(self):
        return Stock(self.stage, "stock-probing", "stock CRIU, asking the kernel", probing=True)

    # Real programs, up to their answers.

    def served(self):
        plan = ([(Redis, 128, 2, 10)] if self.quick else [(Redis, 1024, 6, 150), (Jvm, 256, 6, 60)])
        for kind, mib, rounds, seconds in plan:
            if not have(kind.__name__.lower()):
                self.tell(f"no {kind.__name__.lower()}: not measured")
                continue
            program = kind(self.stage, mib)
            ways = self.ways()
            folders = self.dump_all(program, ways)
            contestants = [(name, cache) for name in ways for cache in ("cold", "warm")]
            rounds = self.rounds or rounds
            for number, (name, cache) in self.each_round(rounds, contestants, seconds):
                way = ways[name]
                self.restore_measured("served", program, way, folders[way.image], cache, number,
                                      rss=number == 0, thorough=number < 2)
            self.remove_all(folders)

    # Eight at once.

    def together(self):
        count, mib, rounds = (8, 16, 1) if self.quick else (8, 64, 3)
        ways = self.ways(without=("stock-lazy",))
        programs = [Touch(self.stage, f"touch-{i}", mib) for i in range(count)]
        images = [self.dump_all(program, ways) for program in programs]
        caches = ("warm",) if self.quick else ("cold", "warm")
        contestants = [(name, cache) for name in ways for cache in caches]
        for number, (name, cache) in self.each_round(self.rounds or rounds, contestants, 50):
            self.together_once(number, ways[name], cache, programs, images)
        for folders in images:
            self.remove_all(folders)

    def together_once(self, number, way, cache, programs, images):
        folders = [folders[way.image] for folders in images]
        for folder in folders:
            self.prepare_cache(folder, cache)
        before = read_bytes()
        with self.stage.stock_cache:
            began = time.monotonic()
            commands = [popen(self.stage, way.command(folder)) for folder in folders]
            ended = [None] * len(commands)
            while None in ended:
                for i, command in enumerate(commands):
                    if ended[i] is None and command.poll() is not None:
                        ended[i] = (time.monotonic() - began) * 1e3
                        if command.returncode != 0:
                            raise Failed(f"{way.name}: {len(commands)} at once: a restore ended with {command.returncode}")
                time.sleep(0.0005)
        for program in programs:
            program.first()
        first = (time.monotonic() - began) * 1e3
        for program in programs:
            wait = way.waiter(program.pid)
            if wait:
                wait()
        ready = (time.monotonic() - began) * 1e3 if way.waiter(0) else max(ended)
        for program in programs:
            program.verify()
        pss = sum(smaps(program.pid, "Pss")[0] for program in programs)
        for program in programs:
            self.stage.kill(program.pid)
        self.emit("together", count=len(programs), mib=programs[0].mib, way=way.name, cache=cache, round=number,
                  wall_ms=round(max(ended), 3), each_ms=round(statistics.median(ended), 3), first_ms=round(first, 3),
                  ready_ms=round(ready, 3), read_bytes=read_bytes() - before, pss_ready=pss, verified=True)

    # What a touch costs while pages still have to come.

    def paging(self):
        mib, rounds = (64, 1) if self.quick else (256, 3)
        ways = self.ways(without=("eager", "stock"))
        program = Touch(self.stage, "touch", mib)
        folders = self.dump_all(program, ways)
        pages = mib * 256
        patterns = {"sequential": (Touch.SEQUENTIAL, pages // 4), "random": (Touch.RANDOM, pages // 4),
                    "hot set": (Touch.HOT, pages // 2), "recorded": (Touch.RANDOM, 256)}
        contestants = [(name, pattern, threads) for name in ways for pattern in patterns
                       for threads in ((1,) if pattern == "recorded" or self.quick else (1, 4))]
        for number, (name, pattern, threads) in self.each_round(self.rounds or rounds, contestants):
            way = ways[name]
            self.prepare_cache(folders[way.image], "warm")
            running = way.restore(folders[way.image], program.pid)
            kind, count = patterns[pattern]
            # "recorded": what the working set was made of.
            seed = 11 if pattern == "recorded" else 100 + number
            elapsed, noted = program.ask(Touch.TOUCH, kind, threads, count, seed)
            found = program.latencies(noted)
            ready = running.ready()
            program.verify()
            self.stage.kill(program.pid)
            self.emit("paging", mib=mib, way=name, pattern=pattern, threads=threads, round=number, touches=noted,
                      p50_ns=percentile(found, 0.5), p99_ns=percentile(found, 0.99),
                      p999_ns=percentile(found, 0.999), longest_ns=found[-1], elapsed_ms=elapsed / 1e6,
                      ready_ms=round(ready * 1e3, 3), verified=True)
        self.remove_all(folders)

    # Afterwards.

    def after(self):
        mib, rounds = (64, 1) if self.quick else (512, 3)
        reads = 5_000_000 if self.quick else 20_000_000
        ways = self.ways(without=("prefetch",))

        def speed_of_touch(program):
            elapsed, _ = program.ask(Touch.READS, count=reads, seed=3)
            return reads / elapsed * 1e9
        self.after_of(Touch(self.stage, "touch", mib), ways, rounds, speed_of_touch)
        if have("redis") and shutil.which("redis-benchmark"):
            self.after_of(Redis(self.stage, mib // 2), ways, rounds, Redis.requests_per_second)

    def after_of(self, program, ways, rounds, speed):
        def measure(program, name, number):
            speed(program)  # caches and the CPU's clock: the first one does not count
            rate = speed(program)
            huge, rss = smaps(program.pid, "AnonHugePages", "Rss")
            program.verify()
            self.emit("after", program=program.name, mib=program.mib, way=name, round=number, per_second=round(rate),
                      huge_bytes=huge, rss=rss, verified=True)
        fresh = program.another()
        folders = self.dump_all(program, ways)
        for number, name in self.each_round(self.rounds or rounds, ["never", *ways], 45):
            if name == "never":
                measure(fresh, name, number)
                continue
            way = ways[name]
            running = way.restore(folders[way.image], program.pid)
            program.first()
            running.ready()
            measure(program, name, number)
            self.stage.kill(program.pid)
        self.stage.kill(fresh.pid)
        self.remove_all(folders)

#!/usr/bin/env -S python3 -B
"""Many generations: random changes, earlier directories removed in random order, flatten and gc in
between, and every second restore by stock CRIU from what `export` wrote. The program knows each page
it wrote, and looks at all of them after each restore.

A dump that follows a restore by stock CRIU is told its parent; the others find it by themselves.
"""
import os
import random
import shutil
import signal

from chains import Scripted, dump
from harness import Failed, demand, main, poll, vmas
from redis import Redis, Writer
from stock_unmoor import CRIU

PAGES = 2048  # of an area


def random_changes(chance, areas):
    """Python for the program: a few changes, each of a kind a program makes. `areas`: name -> pages."""
    lines = []
    for _ in range(chance.randrange(2, 7)):
        name = chance.choice(sorted(areas))
        pages = areas[name]
        begin = chance.randrange(pages)
        end = min(pages, begin + chance.choice((1, 2, 16, 64)))
        kind = chance.choice(("fill", "fill", "fill", "drop", "zero", "resize", "new", "close"))
        if kind in ("fill", "drop", "zero"):
            seed = f", {chance.randrange(1, 1 << 30)}" if kind == "fill" else ""
            lines.append(f"areas['{name}'].{kind}({begin}, {end}{seed})")
        elif kind == "resize":
            areas[name] = max(32, pages + chance.choice((-300, -16, 16, 500)))
            lines.append(f"areas['{name}'].resize({areas[name]})")
        elif kind == "new" and len(areas) < 8:
            name = chr(ord(max(areas)) + 1) if max(areas) < "z" else "a"
            if name not in areas:
                areas[name] = 512
                lines.append(f"areas['{name}'] = Area(2); areas['{name}'].fill(0, 500, {chance.randrange(1 << 30)})")
        elif kind == "close" and len(areas) > 3:
            del areas[name]
            lines.append(f"areas.pop('{name}').memory.close()")
    return "\n".join(lines)


def tidy(story, chance, store, newest):
    """What somebody does with a store of many generations; the newest stays."""
    others = [os.path.join(store, n) for n in sorted(os.listdir(store)) if os.path.join(store, n) != newest]
    chance.shuffle(others)
    for image in others[4:] + [i for i in others[:4] if chance.random() < 0.3]:
        if chance.random() < 0.5:
            shutil.rmtree(image)
        else:
            story.unmoor("rm", image)
    if chance.random() < 0.25:
        there = [os.path.join(store, n) for n in sorted(os.listdir(store))]
        story.unmoor("flatten", chance.choice(there))
    if chance.random() < 0.3:
        items = story.unmoor("gc", store, "--json").json()["items"]
        demand(not items, f"nothing was killed, so nothing is garbage: {items}")


def restore_by_stock(story, program, image):
    plain = story.path("plain")
    story.unmoor("export", image, plain)
    log = story.path("restore.log")
    if story.popen([CRIU, "restore", "-D", plain, "-d", "-o", log]).wait(120) != 0:
        with open(log, errors="replace") as file:
            raise Failed("criu restore failed:\n" + "".join(file.readlines()[-15:]))
    program.popen = None
    shutil.rmtree(plain)
    demand(not [v for v in vmas(program.pid) if story.folder in v.name and "layers" in v.name],
           "it maps nothing of an image")


def generations(count, seed):
    def story(story):
        chance = random.Random(seed)
        store = story.path("store")
        os.mkdir(store)
        program = Scripted(story)
        areas = dict.fromkeys("abc", PAGES)
        program.do("for name in 'abc': areas[name] = Area(8); areas[name].fill(0, 2000, 1)")
        parents = shared = written = pages = 0
        newest = None
        for generation in range(count):
            options = []
            if newest and (generation % 2 == 0 or chance.random() < 0.2):  # the last restore was criu's
                options = ["--prev-images-dir", newest]
            newest, report = dump(story, program, f"store/{generation:03}", *options)
            program.await_gone()
            story.await_no_orphan()
            parents += report["parent"] is not None
            written += report["written_bytes"]
            pages += report["layer_bytes"]
            tidy(story, chance, store, newest)
            if generation % 8 == 7:
                story.unmoor("verify", newest)
            if generation % 2:
                restore_by_stock(story, program, newest)
                program.do()
            else:
                story.restore(program, newest)
                program.do()  # while mapped or being remapped
                story.wait_ready(program)
            program.do(random_changes(chance, areas))
        story.say(f"{count} generations: {parents} with a parent, {written >> 20} MiB written of "
                  f"{pages >> 20} MiB in their layers")
        demand(parents >= count * 3 // 4, f"only {parents} of {count} had a parent")
        demand(written < pages / 2, f"{written} bytes written for {pages}")
        os.kill(program.pid, signal.SIGKILL)
        program.await_gone()
    return story


def redis_generations(count, seed):
    def story(story):
        chance = random.Random(seed)
        store = story.path("store")
        os.mkdir(store)
        redis = Redis(story)
        redis.populate()
        newest = None
        written = pages = 0
        for generation in range(count):
            digest = redis.digest()
            options = ["--prev-images-dir", newest] if newest else []
            newest, report = dump(story, redis.program, f"store/{generation:03}", *options)
            written += report["written_bytes"]
            pages += report["layer_bytes"]
            redis.program.await_gone()
            story.await_no_orphan()
            tidy(story, chance, store, newest)
            if generation % 2:
                restore_by_stock(story, redis.program, newest)
            else:
                story.restore(redis.program, newest)
            demand(redis.digest() == digest, f"other data after generation {generation}")
            writer = Writer(redis.port, generation)
            writer.start()
            poll(lambda: len(writer.acknowledged) > 500, "some writes")
            redis.expected.update(writer.finish())
            story.wait_ready(redis.program)
            redis.demand_own_writes()
        story.say(f"{count} generations: {written >> 20} MiB written of {pages >> 20} MiB in their layers")
        os.kill(redis.program.pid, signal.SIGKILL)
        redis.program.await_gone()
    return story


if __name__ == "__main__":
    main({"eight": generations(8, 8), "sixty_four": generations(64, 64),
          "redis_sixty_four": redis_generations(64, 65)})

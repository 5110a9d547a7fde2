#!/usr/bin/env -S python3 -B
"""The story of tools/demo, small: that it ends well, that a wrong digest fails it, that Ctrl-C leaves nothing."""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

from harness import SOURCE, UNMOOR, Skip, demand, main, poll

DEMO = [sys.executable, "-B", os.path.join(SOURCE, "tools", "demo_story.py"), "--mib", "16", "--rounds", "1"]

# Stands in for unmoor: changes a key of redis after a restore, as memory that came back wrong would.
FORGER = """#!/bin/sh
{unmoor} "$@" || exit
if [ "$1" = restore ]; then redis-cli -s "$(echo {folder}/unmoor-demo.*/redis.sock)" SET key:1 forged >/dev/null; fi
"""


def start(story, unmoor=UNMOOR):
    if not shutil.which("redis-server"):
        raise Skip("redis-server is not installed")
    out = tempfile.TemporaryFile()
    process = story.popen(DEMO, stdout=out, stderr=out, env=story.environment | {"UNMOOR": unmoor})

    def text():
        return os.pread(out.fileno(), 1 << 20, 0).decode()  # the offset is the demo's
    return process, text


def demand_nothing_left(story, text):
    left = [name for name in os.listdir(story.folder) if name.startswith("unmoor-demo")]
    demand(not left, f"the demo left {left} behind:\n{text}")
    with open("/proc/self/mountinfo") as file:
        demand("unmoor-demo" not in file.read(), "the demo left a mount behind")
    # redis writes over its environment, so it is told by its name.
    redis = subprocess.run(["pgrep", "-f", f"redis-server.*{story.folder}"], capture_output=True, text=True).stdout
    demand(not story.marked() and not redis, f"the demo left processes behind: {story.marked()} {redis}")


def whole(story):
    process, text = start(story)
    code = process.wait(120)
    demand(code == 0 and re.search(r"digests +\d+ compared, all equal", text()), f"exit code {code}:\n{text()}")
    for row in ("restore, median", "longest pause", "remap  ", "image on disk"):
        demand(row in text(), f"the closing table has no {row!r}:\n{text()}")
    demand_nothing_left(story, text())


def another_digest(story):
    forger = story.path("forger")
    with open(forger, "w") as file:
        file.write(FORGER.format(unmoor=UNMOOR, folder=story.folder))
    os.chmod(forger, 0o755)
    process, text = start(story, forger)
    code = process.wait(120)
    demand(code == 1 and "DIGEST DIFFERS after direct restore" in text(), f"exit code {code}:\n{text()}")
    demand_nothing_left(story, text())


def interrupted(story):
    for moment in ("DEBUG POPULATE", "stock restore 1", "redis runs on mapped memory"):
        process, text = start(story)
        poll(lambda: moment in text() or process.poll() is not None, f"the demo to say {moment!r}")
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
        demand(code == 130 and "interrupted; tidying up" in text(), f"at {moment!r}: exit code {code}:\n{text()}")
        demand_nothing_left(story, text())


if __name__ == "__main__":
    main({story.__name__: story for story in (whole, another_digest, interrupted)})

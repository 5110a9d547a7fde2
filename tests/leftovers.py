#!/usr/bin/env python3
"""Says what a test run left behind: processes, mounts, swap files, temporary files.

  leftovers.py snapshot FILE   before the run: what there is already
  leftovers.py check TMPDIR    after it: one line for each thing left, exit code 1 if any
  leftovers.py clean TMPDIR    ends, unmounts and takes out of use what is left

A process is of the run when UNMOOR_TEST_MARK in its environment is ours; programs that CRIU restored
and the agents beside them have it as well. A zombie has no environment: it counts when it was started
after the snapshot and has the name of a program that the tests start. It may take PID 1 a moment to
reap it. Mounts are of the run below its temporary folder, and wherever criu in the path says so: the
machine may make some of its own meanwhile.
"""
import json
import os
import signal
import sys
import time

ZOMBIE_NAMES = ("churn", "zoo", "tree", "faulter", "unmoor", "criu", "redis-server", "java")
PATIENCE_SECONDS = 15


def mounts():
    with open("/proc/self/mountinfo") as file:
        return sorted(line.split()[4] for line in file)


def swaps(folder):
    """Swap files in use below it."""
    with open("/proc/swaps") as file:
        return [line.split()[0] for line in file if line.startswith(folder)]


def ticks_since_boot():
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def zombies(since):
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                text = file.read()
        except OSError:
            continue
        name = text[text.index("(") + 1:text.rindex(")")]
        state = text[text.rindex(")") + 2]
        started = int(text[text.rindex(")") + 2:].split()[19])  # in ticks since boot
        if state == "Z" and name.startswith(ZOMBIE_NAMES) and started >= since:
            found.append(f"{entry} {name}")
    return found


def marked_processes():
    mark = ("UNMOOR_TEST_MARK=" + os.environ["UNMOOR_TEST_MARK"]).encode()
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if mark not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command = file.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        found.append((int(entry), command))
    return found


def leftovers(tmpdir):
    with open(os.path.join(tmpdir, "before.json")) as file:
        before = json.load(file)
    found = [f"process {pid}: {command}" for pid, command in marked_processes()]
    found += [f"zombie {entry}" for entry in zombies(before["ticks"])]
    # A mount may be there several times, so lists and not sets.
    old = list(before["mounts"])
    for mount in mounts():
        if mount in old:
            old.remove(mount)
        elif mount.startswith(tmpdir) or "criu" in mount:
            found.append(f"mount {mount}")
    found += [f"swap {path}" for path in swaps(tmpdir)]
    for name in sorted(os.listdir(tmpdir)):
        if name not in ("before.json", "runtime"):
            found.append(f"temporary file {os.path.join(tmpdir, name)}")
    runtime = os.path.join(tmpdir, "runtime")
    found += [f"runtime file {os.path.join(runtime, name)}" for name in sorted(os.listdir(runtime))]
    return found


def check(tmpdir):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := leftovers(tmpdir)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for line in found:
        print(f"left behind: {line}")
    return 1 if found else 0


def clean(tmpdir):
    with open(os.path.join(tmpdir, "before.json")) as file:
        old = json.load(file)["mounts"]
    for pid, _ in marked_processes():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for mount in reversed(mounts()):
        if mount not in old and mount.startswith(tmpdir):
            os.system(f"umount '{mount}'")
    for path in swaps(tmpdir):
        os.system(f"swapoff '{path}'")
    return 0


def main():
    action, path = sys.argv[1:]
    if action == "snapshot":
        with open(path, "w") as file:
            json.dump({"mounts": mounts(), "ticks": ticks_since_boot()}, file)
        return 0
    return {"check": check, "clean": clean}[action](path)


if __name__ == "__main__":
    sys.exit(main())

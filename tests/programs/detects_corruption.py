#!/usr/bin/env python3
"""A program under test must see wrong memory: detects_corruption.py churn|zoo|tree PROGRAM

Writes wrong bytes into the running program's memory from outside, and expects it to end with an
error. What is tried: a changed byte, a page set to zero, and a page set back to what it held before.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

PAGE = 4096
PATIENCE_SECONDS = 120
ARGUMENTS = {"churn": ["--mib", "16", "--regions", "1", "--rate", "20000"], "zoo": [],
             "tree": ["--mib", "16"]}


def largest_private_range(pid):
    best = (0, 0)
    with open(f"/proc/{pid}/maps") as file:
        for line in file:
            fields = line.split()
            if fields[1] == "rw-p" and len(fields) == 5:
                begin, end = (int(x, 16) for x in fields[0].split("-"))
                if end - begin > best[1] - best[0]:
                    best = (begin, end)
    return best


def progress(report):
    """How far the program is; 0 before its first report."""
    try:
        with open(report) as file:
            content = json.load(file)
    except (OSError, ValueError):
        return 0
    return content.get("operations") or content.get("rounds") or content.get("verified") or 0


def flip_byte(memory, begin, end, _):
    place = begin + (end - begin) // 2 // PAGE * PAGE + 1234
    memory.seek(place)
    byte = memory.read(1)[0]
    memory.seek(place)
    memory.write(bytes([byte ^ 1]))


def zero_page(memory, begin, end, _):
    memory.seek(begin + (end - begin) // 3 // PAGE * PAGE)
    memory.write(bytes(PAGE))


def set_back(memory, begin, end, report):
    """All of it, as a remap that lost every write since its copy would."""
    length = min(end - begin, 16 << 20)
    memory.seek(begin)
    old = memory.read(length)
    first = progress(report)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while progress(report) < first + 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)
    memory.seek(begin)
    memory.write(old)


def attempt(kind, program, damage):
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report")
        process = subprocess.Popen([program, "--report", report, *ARGUMENTS[kind]],
                                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not progress(report):
                if process.poll() is not None:
                    return "ended before it was ready"
                time.sleep(0.02)
            begin, end = largest_private_range(process.pid)
            with open(f"/proc/{process.pid}/mem", "r+b", buffering=0) as memory:
                try:
                    damage(memory, begin, end, report)
                except OSError:
                    pass  # it ended meanwhile
            status = process.wait(timeout=PATIENCE_SECONDS)
            with open(report) as file:
                content = json.load(file)
        except subprocess.TimeoutExpired:
            return "did not notice"
        finally:
            process.kill()
            process.wait()
            for line in os.popen(f"pgrep -f -- '--report {report}'"):
                try:
                    os.kill(int(line), 9)
                except ProcessLookupError:
                    pass  # it ended meanwhile
    if status == 0 or content["errors"] == 0:
        return f"exit code {status}, report {content}"
    print(f"{kind}, {damage.__name__}: {content['error']}")
    return None


def main():
    kind, program = sys.argv[1:]
    damages = [flip_byte, zero_page] + ([] if kind == "zoo" else [set_back])
    flaws = [f"{damage.__name__}: {why}" for damage in damages if (why := attempt(kind, program, damage))]
    print("\n".join(flaws) or "all seen")
    return 1 if flaws else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env -S python3 -B
"""A control: unmoor's command line with stock CRIU behind it, and nothing to remap.

UNMOOR=tests/system/stock_unmoor.py tests/system/churn.py … tells whether a story fails because of
unmoor or fails with stock CRIU as well.
"""
import os
import subprocess
import sys

SOURCE = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
PRIVATE = os.path.join(SOURCE, ".prefix/criu/criu")
CRIU = os.environ.get("UNMOOR_CRIU", PRIVATE if os.path.exists(PRIVATE) else "criu")


def main():
    command, arguments = sys.argv[1], sys.argv[2:]
    if command in ("status", "wait", "remap"):
        print("READY")
        return 0
    if command not in ("dump", "restore"):
        return 2
    passed, skip = [], False
    for argument in arguments:
        if skip or argument == "--":
            skip = False
        elif argument in ("--mode", "--remap", "--max-pause", "--thp", "--guard", "--criu"):
            skip = True
        else:
            passed.append(argument)
    if command == "dump":
        os.makedirs(passed[passed.index("-D") + 1], exist_ok=True)
    result = subprocess.run([CRIU, command, "-o", command + ".log", "-v1", *passed])
    return 1 if result.returncode else 0


if __name__ == "__main__":
    sys.exit(main())

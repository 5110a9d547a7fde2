#!/usr/bin/env python3
"""Holds the source tree to the two rules of its layout.

  1. Includes point one way: a room of src/ includes only the rooms listed for it below (the table
     "Rooms" of the design), include/unmoor includes nothing of ours.
  2. System calls are made in src/os only. A file that runs inside another process cannot link
     against it; such a file says "Freestanding" in its first 15 lines and is let through.

check_includes.py [ROOT]     one line for each breach, exit code 1 if any
check_includes.py --self-test   makes trees with one breach each and expects it to be found
"""
import os
import re
import sys
import tempfile

LOW = {"base", "os", "image"}
ROOMS = {
    "base": set(),
    "os": {"base"},
    "image": {"base", "os"},
    "remap": LOW,
    "library": LOW | {"remap"},
    "lazy": LOW,
    "agent": LOW | {"remap", "lazy"},
    "criu": LOW,
    "store": LOW | {"criu"},
    "checkpoint": LOW | {"remap", "agent", "criu"},
    "restore": LOW | {"remap", "lazy", "agent", "criu"},
}
SOURCE_SUFFIXES = (".h", ".hpp", ".c", ".cc", ".cpp", ".inc", ".S")
FREESTANDING_LINES = 15

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.MULTILINE)
SYSTEM_CALL = re.compile(
    r"(?<![\w.>])(?:::)?(mmap|mmap64|munmap|mprotect|mremap|madvise|ptrace|ioctl|syscall"
    r"|process_vm_readv|process_vm_writev|process_madvise|userfaultfd|pidfd_\w+)\s*\(")
COMMENT_OR_STRING = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def source_files(folder):
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith(SOURCE_SUFFIXES):
                yield os.path.join(path, name)


def blank(match):
    return re.sub(r"[^\n]", " ", match.group())


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def check_include(root, room, path, target):
    """Why file `path` of `room` must not include "target"; None when it may."""
    first = target.split("/")[0]
    if ".." in target.split("/"):
        return "includes by a relative path; name it from src/"
    if first == "unmoor":
        return None
    if "/" not in target or os.path.exists(os.path.join(os.path.dirname(path), target)):
        return None  # a neighbour, or generated into the room's own build folder
    if first not in ROOMS:
        if os.path.isdir(os.path.join(root, "src", first)):
            return f'room "{first}" is not in the table of tests/check_includes.py'
        return None
    if first != room and first not in ROOMS[room]:
        return f'room "{room}" may not include room "{first}"'
    return None


def check_file(root, room, path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    relative = os.path.relpath(path, root)
    breaches = []
    for match in INCLUDE.finditer(text):
        if room is None or room in ROOMS:
            quote, target = match.groups()
            if room is None:  # include/unmoor
                ours = target.split("/")[0] in ROOMS
                why = f'the public API includes "{target}"' if ours else None
            else:
                # System headers are in angle brackets; ours could be as well.
                ours = quote == '"' or target.split("/")[0] in ROOMS
                why = check_include(root, room, path, target) if ours else None
            if why:
                breaches.append(f"{relative}:{line_of(text, match.start())}: {why} ({target})")
    if room == "os" or "Freestanding" in "\n".join(text.split("\n")[:FREESTANDING_LINES]):
        return breaches
    code = COMMENT_OR_STRING.sub(blank, text)
    for match in SYSTEM_CALL.finditer(code):
        breaches.append(f"{relative}:{line_of(code, match.start())}: {match.group(1)}() outside "
                        "src/os: add it there and call that")
    return breaches


def check_tree(root):
    breaches = []
    for room in sorted(next(os.walk(os.path.join(root, "src")), (0, [], 0))[1]):
        if room not in ROOMS:
            breaches.append(f"src/{room}: no such room in the table of tests/check_includes.py")
            continue
        for path in source_files(os.path.join(root, "src", room)):
            breaches += check_file(root, room, path)
    for path in source_files(os.path.join(root, "include")):
        breaches += check_file(root, None, path)
    for path in source_files(os.path.join(root, "tools")):
        breaches += check_file(root, "tools", path)
    return breaches


def self_test():
    bad = {
        "UpwardInclude": ("src/base/a.h", '#include "os/fd.h"\n'),
        "SidewaysInclude": ("src/criu/a.cpp", '#include "remap/plan.h"\n'),
        "UseCasesApart": ("src/restore/a.cpp", '  #  include "checkpoint/plan.h"\n'),
        "AngleBrackets": ("src/image/a.h", "#include <criu/codec.h>\n"),
        "RelativePath": ("src/image/a.h", '#include "../agent/agent.h"\n'),
        "UnknownRoom": ("src/misc/a.h", "\n"),
        "PublicApiIncludesRoom": ("include/unmoor/a.h", '#include "base/result.h"\n'),
        "SystemCall": ("src/agent/a.cpp", "void F() { void* p = ::mremap(0, 0, 0, 0); }\n"),
        "SystemCallInTools": ("tools/unmoor/a.cpp", "int x = ioctl (3, 4);\n"),
        "FreestandingTooLate": ("src/remap/a.cpp", "\n" * 20 + "// Freestanding\nlong r = syscall(9);\n"),
    }
    good = {
        "DownwardInclude": ("src/agent/a.cpp", '#include "remap/plan.h"\n#include "base/log.h"\n'),
        "Neighbour": ("src/criu/a.cpp", '#include "images.pb.h"\n#include "criu/codec.h"\n'),
        "CallInOs": ("src/os/a.cpp", "void* p = mmap(0, 1, 2, 3, 4, 5);\n"),
        "Freestanding": ("src/remap/a.cpp", "// Freestanding: runs elsewhere.\nlong r = syscall(9);\n"),
        "NotACall": ("src/criu/a.cpp",
                     '// mmap(x)\nauto s = "ptrace(";\nint my_mmap(int);\nx.ioctl(1); y->mremap(2);\n'),
    }
    failures = 0
    for expected, trees in ((1, bad), (0, good)):
        for name, (path, text) in trees.items():
            with tempfile.TemporaryDirectory() as root:
                for room in ROOMS:
                    os.makedirs(os.path.join(root, "src", room))
                path = os.path.join(root, path)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w") as file:
                    file.write(text)
                breaches = check_tree(root)
            if len(breaches) != expected:
                failures += 1
                print(f"self-test {name}: {len(breaches)} breaches, expected {expected}: {breaches}")
    print(f"self-test: {len(bad) + len(good) - failures} of {len(bad) + len(good)} as expected")
    return failures


def main():
    if sys.argv[1:] == ["--self-test"]:
        return 1 if self_test() else 0
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..")
    breaches = check_tree(os.path.abspath(root))
    print("\n".join(breaches) if breaches else "includes and system calls are where they belong")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())

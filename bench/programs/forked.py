"""A program with a heap, and two children forked from it that each wrote a twentieth of it anew.

  forked.py MIB REPORT     REPORT.0 .1 .2: "PID CHECKS", a check of all the memory after each SIGUSR1
"""
import mmap
import os
import random
import signal
import sys
import zlib

mib, report = int(sys.argv[1]), sys.argv[2]
heap = mmap.mmap(-1, mib << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
source = random.Random(1)
for at in range(0, len(heap), 1 << 20):
    heap[at:at + (1 << 20)] = source.randbytes(1 << 20)
member = 0
if (first := os.fork()) == 0:
    member = 1
elif os.fork() == 0:
    member = 2
if member:
    source = random.Random(member)
    for page in range(0, len(heap), 20 * 4096):
        heap[page:page + 4096] = source.randbytes(4096)
total, checks = zlib.crc32(heap), 0
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
while True:
    with open(f"{report}.{member}.new", "w") as file:
        file.write(f"{os.getpid()} {checks}")
    os.rename(f"{report}.{member}.new", f"{report}.{member}")
    signal.sigwait([signal.SIGUSR1])
    checks = checks + 1 if zlib.crc32(heap) == total else -1000

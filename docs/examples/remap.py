"""Memory as an image, mapped, written while it is remapped, and made into an image again: by ctypes.
remap.py DIRECTORY, in which the two images are made. Needs libunmoor.so where ld.so finds it."""
import ctypes as c
import mmap
import os
import shutil
import sys

unmoor = c.CDLL("libunmoor.so.0")


class Error(c.Structure):
    _fields_ = [("size", c.c_size_t), ("code", c.c_int32), ("errnum", c.c_int32), ("message", c.c_char * 1024)]


class Memory(c.Structure):
    _fields_ = [("begin", c.c_void_p), ("length", c.c_size_t)]


class Options(c.Structure):
    _fields_ = [("size", c.c_size_t), ("flags", c.c_uint32), ("base", c.c_void_p), ("tracker", c.c_void_p),
                ("user_data", c.c_void_p), ("user_data_length", c.c_size_t)]


def must(function, *arguments):
    error = Error(c.sizeof(Error))
    if function(*arguments, c.byref(error)) != 0:
        sys.exit(error.message.decode())


libc, size = c.CDLL(None), 64 << 20
libc.mmap.restype = c.c_void_p
at = libc.mmap(None, c.c_size_t(size), mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, c.c_long(0))
memory, heap = Memory(at, size), (c.c_uint8 * size).from_address(at)
first, second = (os.path.join(sys.argv[1], name).encode() for name in ("first", "second"))
heap[:] = os.urandom(size // 64) * 64
must(unmoor.unmoor_checkpoint, c.byref(memory), c.c_size_t(1), first, None, None)
libc.munmap(c.c_void_p(at), c.c_size_t(size))

image, mapped, remapper, again = c.c_void_p(), c.c_void_p(), c.c_void_p(), c.c_void_p()
must(unmoor.unmoor_image_open, first, 0, c.byref(image))
must(unmoor.unmoor_map_create, image, 0, c.byref(mapped))  # back at its address; nothing was read
must(unmoor.unmoor_remapper_start, mapped, None, c.byref(remapper))
for i in range(100000):  # use the memory meanwhile
    heap[i * 4099 % size] = i & 255
must(unmoor.unmoor_remapper_wait, remapper, c.c_int64(-1))

options = Options(c.sizeof(Options), 0, image, None, None, 0)  # only what changed is written
must(unmoor.unmoor_checkpoint, c.byref(memory), c.c_size_t(1), second, c.byref(options), None)
before = bytes(heap)
shutil.rmtree(first)  # the second needs nothing of it
unmoor.unmoor_remapper_destroy(remapper)
unmoor.unmoor_map_destroy(mapped)
must(unmoor.unmoor_image_open, second, 0, c.byref(image))
must(unmoor.unmoor_map_create, image, 0, c.byref(again))
print("equal" if bytes(heap) == before else "WRONG")

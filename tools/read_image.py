#!/usr/bin/python3 -B
"""Reads image directories of unmoor. Written from docs/format.md alone, with none of unmoor's code, so
that what is on disk stays readable without it; the tests hold the two against each other.

  read_image.py list DIR                        tasks, their VMAs, and where their pages are; the
                                                working set, in its order
  read_image.py read DIR TASK BEGIN END [FILE]  that task's memory (addresses in hexadecimal), to FILE
                                                or stdout; what is in no image reads as zeros
  read_image.py verify DIR                      every checksum and hash

Exit codes: 0, 2 when the directory is damaged or not an image. Needs Debian's python3-xxhash; for packed
layers python3-lz4 or python3-zstandard, or the commands lz4 and zstd.
"""
import bisect
import json
import os
import re
import struct
import subprocess
import sys

import xxhash

PAGE = 4096
BLOCK = 65536
HUGE = 2 << 20
HEADER = struct.Struct("<8sIIII16sQQQQQQQ24sQ")
PACKED_HEADER = struct.Struct("<8sIIIi16sQQQQ48sQ")
FRAME_HEAD = struct.Struct("<QIIQQ")
TRAILER = struct.Struct("<QQ8sQ")
WORKING_SET_HEADER = struct.Struct("<8sIIQQQQ")
LZ4, ZSTD = 1, 2
PAGES_ARE_HERE, PAGES_ARE_IN_PARENT = 4, 1


class Damaged(Exception):
    pass


def demand(condition, message):
    if not condition:
        raise Damaged(message)


def xxh3(data):
    return xxhash.xxh3_64_intdigest(data)


def filtered(command, data):
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


def expand_lz4(data, size):
    """One LZ4 block."""
    try:
        import lz4.block
        return lz4.block.decompress(data, uncompressed_size=size)
    except ImportError:
        # As a frame, which the command reads: no checksums, one block of at most 4 MiB, of known size.
        descriptor = b"\x68\x70" + struct.pack("<Q", size)
        check = xxhash.xxh32_intdigest(descriptor) >> 8 & 0xff
        return filtered(["lz4", "-d", "-c"], struct.pack("<I", 0x184D2204) + descriptor + bytes([check]) +
                        struct.pack("<I", len(data)) + data + bytes(4))


def expand_zstd(data, size):
    try:
        import zstandard
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
    except ImportError:
        return filtered(["zstd", "-d", "-c"], data)


class PackedPages:
    """The pages of a packed layer, read as if they were a page image."""

    def __init__(self, path, layer, identity, index_checksum):
        self.path, self.cached = path, (None, b"")
        self.file = os.open(path, os.O_RDONLY)
        size = os.fstat(self.file).st_size
        demand(size >= PACKED_HEADER.size + TRAILER.size, f"{path}: {size} bytes")
        header = os.pread(self.file, PACKED_HEADER.size, 0)
        (magic, version, header_size, self.codec, _, of_layer, of_index, pages_size, data_bytes, frames,
         reserved, checksum) = PACKED_HEADER.unpack(header)
        demand(magic == b"unmoorPK" and version == 1, f"{path}: not a packed layer")
        demand(checksum == xxh3(header[:120]), f"{path}: the header does not match its checksum")
        demand(header_size == 128 and reserved == bytes(48) and self.codec in (LZ4, ZSTD), f"{path}: bad header")
        demand((of_layer, of_index, pages_size, data_bytes) ==
               (identity, index_checksum, layer.size, layer.data_bytes), f"{path}: not the index's")
        pieces = {}  # number: runs of pages, from the index
        for begin, end in layer.segments:
            while begin < end:
                stop = min(end, (begin // HUGE + 1) * HUGE)
                pieces.setdefault(begin // HUGE, []).append((begin, stop))
                begin = stop
        demand(frames == len(pieces), f"{path}: {frames} frames")
        trailer = os.pread(self.file, TRAILER.size, size - TRAILER.size)
        place, table_checksum, magic, checksum = TRAILER.unpack(trailer)
        demand(magic == b"unmoorPE" and checksum == xxh3(trailer[:24]), f"{path}: bad trailer")
        demand(place + FRAME_HEAD.size * frames + TRAILER.size == size, f"{path}: the table is misplaced")
        table = os.pread(self.file, FRAME_HEAD.size * frames, place)
        demand(xxh3(table) == table_checksum, f"{path}: the table is damaged")
        self.frames, following = {}, PACKED_HEADER.size
        for (number, runs), head in zip(pieces.items(), FRAME_HEAD.iter_unpack(table)):
            content = sum(end - begin for begin, end in runs)
            demand(head[:2] == (number, content) and 0 < head[2] <= content and head[4] == following,
                   f"{path}: bad frame of piece {number}")
            following += FRAME_HEAD.size + head[2]
            self.frames[number] = head, runs
        demand(following == place, f"{path}: the frames do not fill it")

    def piece(self, number):
        """2 MiB of pages."""
        if self.cached[0] == number:
            return self.cached[1]
        image = bytearray(HUGE)
        if number in self.frames:
            head, runs = self.frames[number]
            _, size, stored, checksum, place = head
            data = os.pread(self.file, FRAME_HEAD.size + stored, place)
            demand(data[:FRAME_HEAD.size] == FRAME_HEAD.pack(*head), f"{self.path}: head at {place} differs")
            data = data[FRAME_HEAD.size:]
            demand(xxh3(data) == checksum, f"{self.path}: frame at {place} is damaged")
            if stored < size:
                data = (expand_lz4 if self.codec == LZ4 else expand_zstd)(data, size)
            demand(len(data) == size, f"{self.path}: frame at {place} has {len(data)} bytes")
            at = 0
            for begin, end in runs:
                image[begin % HUGE:begin % HUGE + end - begin] = data[at:at + end - begin]
                at += end - begin
        self.cached = number, bytes(image)
        return self.cached[1]

    def read(self, size, offset):
        parts = []
        while size:
            part = self.piece(offset // HUGE)[offset % HUGE:][:size]
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return b"".join(parts)


class Layer:
    """One layer: its index, checked, and pages on demand."""

    def __init__(self, directory, entry):
        stem = os.path.join(directory, "layers", entry["id"])
        self.stem, self.index_path, self.pages_path = stem, stem + ".index", stem + ".pages"
        with open(self.index_path, "rb") as file:
            data = file.read()
        name = self.index_path
        demand(len(data) >= HEADER.size, f"{name}: shorter than its header")
        (magic, version, header_size, page_size, block_size, identity, self.size, self.data_bytes,
         extents, segments, hashes, hash_checksum, table_checksum, reserved,
         checksum) = HEADER.unpack_from(data)
        demand(magic == b"unmoorIX", f"{name}: bad magic")
        demand(version == 1, f"{name}: version {version}")
        demand(checksum == xxh3(data[:120]), f"{name}: the header does not match its checksum")
        demand((header_size, page_size, block_size, reserved) == (128, PAGE, BLOCK, bytes(24)),
               f"{name}: bad header")
        demand(identity.hex() == entry["id"], f"{name}: is of layer {identity.hex()}")
        demand(f"{checksum:016x}" == entry["index_checksum"], f"{name}: not the manifest's")
        demand(self.size == entry["pages_size"] and self.size % HUGE == 0, f"{name}: bad size")
        table_end = 128 + 32 * extents + 16 * segments
        demand(len(data) == table_end + 8 * hashes, f"{name}: {len(data)} bytes")
        demand(table_checksum == xxh3(data[128:table_end]), f"{name}: the tables are damaged")
        demand(hash_checksum == xxh3(data[table_end:]), f"{name}: the hashes are damaged")
        self.hashes = [h for h, in struct.iter_unpack("<Q", data[table_end:])]
        self.extents = []   # (task, address, length, offset), ascending by offset
        self.segments = []  # (offset, end), ascending
        at = 128 + 32 * extents
        end = 0
        for task, count, address, length, offset in struct.iter_unpack("<IIQQQ", data[128:at]):
            demand(task and length and address % PAGE == 0 and length % PAGE == 0 and
                   offset % HUGE == address % HUGE and offset >= end + (HUGE if self.extents else 0) and
                   offset + length + HUGE <= self.size, f"{name}: extent at {offset} is impossible")
            end = offset + length
            self.extents.append((task, address, length, offset))
            last = offset - 1
            for begin, size in struct.iter_unpack("<QQ", data[at:at + 16 * count]):
                demand(begin % PAGE == 0 and size % PAGE == 0 and size and last < begin and
                       begin >= offset and begin + size <= end, f"{name}: segment at {begin}")
                last = begin + size
                self.segments.append((begin, last))
            at += 16 * count
        demand(at == table_end, f"{name}: segment counts do not add up")
        demand(sum(e - b for b, e in self.segments) == self.data_bytes == entry["data_bytes"],
               f"{name}: data bytes do not add up")
        self.ends = [e for _, e in self.segments]
        if os.path.exists(stem + ".packed") and not os.path.exists(self.pages_path):
            self.pages, self.pages_path = None, stem + ".packed"
            self.read = PackedPages(self.pages_path, self, identity, checksum).read
        else:
            self.pages = os.open(self.pages_path, os.O_RDONLY)
            self.read = lambda size, offset: os.pread(self.pages, size, offset)
            demand(os.fstat(self.pages).st_size == self.size, f"{self.pages_path}: wrong size")

    def blocks(self):
        """The blocks that segments touch, in the order of their hashes."""
        following = 0
        for begin, end in self.segments:
            following = max(following, begin // BLOCK)
            while following * BLOCK < end:
                yield following
                following += 1

    def verify(self):
        hashed = list(self.blocks())
        demand(len(hashed) == len(self.hashes), f"{self.index_path}: {len(self.hashes)} hashes")
        for block, expected in zip(hashed, self.hashes):
            data = self.read(BLOCK, block * BLOCK)
            demand(xxh3(data) == expected, f"{self.pages_path}: block at {block * BLOCK} is damaged")
        if self.pages is None:
            return
        known = set(hashed)
        at = 0
        while at < self.size:
            try:
                at = os.lseek(self.pages, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(self.pages, at, os.SEEK_HOLE)
            for block in range(at // BLOCK, (end + BLOCK - 1) // BLOCK):
                demand(block in known or not any(os.pread(self.pages, BLOCK, block * BLOCK)),
                       f"{self.pages_path}: data at {block * BLOCK} where there is none")
            at = end

    def fits(self, begin, end, offset):
        """Whether these addresses at this offset touch one extent, at the same distance."""
        touched = [e for e in self.extents if e[3] < offset + end - begin and offset < e[3] + e[2]]
        return len(touched) == 1 and touched[0][3] - touched[0][1] == offset - begin

    def overlay(self, memory, offset):
        """Writes what segments hold from `offset` on over `memory`."""
        end = offset + len(memory)
        for begin, stop in self.segments[bisect.bisect_right(self.ends, offset):]:
            if begin >= end:
                break
            begin, stop = max(begin, offset), min(stop, end)
            memory[begin - offset:stop - offset] = self.read(stop - begin, begin)


def read_manifest(directory):
    path = os.path.join(directory, "manifest.json")
    with open(path, "rb") as file:
        text = file.read()
    manifest = json.loads(text)
    demand(manifest.get("format") == "unmoor checkpoint", f"{path}: not a manifest")
    demand(manifest["format_version"] == 1, f"{path}: version {manifest['format_version']}")
    ending = re.fullmatch(rb'  "checksum": "([0-9a-f]{32})"\n}\n', text[-51:])
    demand(ending and ending[1].decode() == xxhash.xxh3_128_hexdigest(text[:-51]),
           f"{path}: does not match its checksum")
    return manifest


def messages(path):
    """The protobuf messages of one of CRIU's containers, each as {field: value of varints}."""
    with open(path, "rb") as file:
        data = file.read()
    demand(data[:4] == struct.pack("<I", 0x54564319), f"{path}: not CRIU's")
    at = 8
    while at < len(data):
        size, = struct.unpack_from("<I", data, at)
        fields, end, at = {}, at + 4 + size, at + 4
        demand(end <= len(data), f"{path}: truncated")

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 0x7f) << shift
                shift += 7
                if byte < 0x80:
                    return value
        while at < end:
            key = varint()
            demand(key & 7 == 0, f"{path}: field {key >> 3} is no number")
            fields[key >> 3] = varint()
        yield fields


class Image:
    def __init__(self, directory):
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.layers = [Layer(directory, entry) for entry in self.manifest["layers"]]
        self.tasks = {task["vpid"]: task for task in self.manifest["tasks"]}
        for task in self.tasks.values():
            for vma in task["vmas"]:
                vma["begin"], vma["stop"] = int(vma["start"], 16), int(vma["end"], 16)
                for place in self.places(vma):
                    layer = self.layers[place["layer"]]
                    demand(layer.fits(vma["begin"], vma["stop"], place["offset"]),
                           f"{layer.index_path} and the manifest differ about {vma['start']}")

    @staticmethod
    def places(vma):
        """Layers of a VMA, lowest first."""
        return [vma, *vma.get("deltas", [])] if vma["kind"] == "mapped" else []

    def read(self, vpid, begin, end):
        memory = bytearray(end - begin)
        for vma in self.tasks[vpid]["vmas"]:
            first, last = max(begin, vma["begin"]), min(end, vma["stop"])
            if first >= last:
                continue
            part = bytearray(last - first)
            for place in self.places(vma):
                self.layers[place["layer"]].overlay(part, place["offset"] + first - vma["begin"])
            if vma["kind"] == "criu":
                self.read_criu(vpid, first, part)
            memory[first - begin:last - begin] = part
        return memory

    def read_criu(self, vpid, begin, memory):
        """Pages that stayed with CRIU, over `memory`, which begins at `begin`."""
        folder = os.path.join(self.directory, "criu")
        head, *entries = messages(os.path.join(folder, f"pagemap-{vpid}.img"))
        with open(os.path.join(folder, f"pages-{head[1]}.img"), "rb") as pages:
            offset = 0
            for entry in entries:
                size = (entry.get(5) or entry[2]) * PAGE
                if not entry.get(4, PAGES_ARE_HERE) & PAGES_ARE_HERE:
                    continue
                first, last = max(begin, entry[1]), min(begin + len(memory), entry[1] + size)
                if first < last:
                    pages.seek(offset + first - entry[1])
                    memory[first - begin:last - begin] = pages.read(last - first)
                offset += size

    def working_set(self):
        """Its ranges as (layer, offset, length), in the order in which they are to be read; None: there is none."""
        path = os.path.join(self.directory, "working_set")
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            data = file.read()
        demand(len(data) >= WORKING_SET_HEADER.size + 8, f"{path}: {len(data)} bytes")
        magic, version, header_size, layers, ranges, size, reserved = WORKING_SET_HEADER.unpack_from(data)
        demand(magic == b"unmoorWS" and version == 1, f"{path}: not a working set")
        demand(struct.unpack("<Q", data[-8:])[0] == xxh3(data[:-8]), f"{path}: does not match its checksum")
        demand(header_size == 48 and reserved == 0 and layers <= 1000 and ranges <= 1 << 20, f"{path}: bad header")
        table = WORKING_SET_HEADER.size + 16 * layers
        demand(len(data) == table + 24 * ranges + 8, f"{path}: {len(data)} bytes")
        known = {layer.stem[-32:]: layer for layer in self.layers}
        ids = [data[at:at + 16].hex() for at in range(WORKING_SET_HEADER.size, table, 16)]
        demand(set(ids) <= set(known), f"{path}: a layer the manifest does not name")
        found = list(struct.iter_unpack("<QQQ", data[table:-8]))
        for number, offset, length in found:
            demand(number < layers and offset % PAGE == length % PAGE == 0 and length and
                   offset + length <= known[ids[number]].size, f"{path}: range at {offset} is impossible")
        demand(sum(length for _, _, length in found) == size, f"{path}: the ranges do not add up")
        return [(known[ids[number]], offset, length) for number, offset, length in found]

    def verify(self):
        for layer in self.layers:
            layer.verify()
        self.working_set()
        user = self.manifest.get("user_data")
        if user:
            with open(os.path.join(self.directory, "user_data"), "rb") as file:
                data = file.read()
            demand(len(data) == user["bytes"] and f"{xxh3(data):016x}" == user["xxh3"],
                   f"{self.directory}/user_data does not match its hash")


def show(image):
    for task in image.tasks.values():
        print(f"task {task['vpid']} {task['comm']} {task['state']}")
        for vma in task["vmas"]:
            places = " + ".join(f"{image.layers[p['layer']].stem[-32:]}@{p['offset']:x}"
                                for p in image.places(vma))
            print(f"  {vma['begin']:x}-{vma['stop']:x} {vma['prot']} {vma['kind']} "
                  f"{vma['data_bytes']} {places or '-'} {vma['name']}".rstrip())
    for layer, offset, length in image.working_set() or []:
        print(f"first {layer.stem[-32:]}@{offset:x} {length}")


def main(words):
    if len(words) == 2 and words[0] == "list":
        show(Image(words[1]))
    elif len(words) == 2 and words[0] == "verify":
        Image(words[1]).verify()
        print("sound")
    elif len(words) in (5, 6) and words[0] == "read":
        image, vpid = Image(words[1]), int(words[2])
        begin, end = int(words[3], 16), int(words[4], 16)
        demand(vpid in image.tasks, f"{words[1]} has no task {vpid}")
        with open(words[5], "wb") if len(words) == 6 else sys.stdout.buffer as out:
            for at in range(begin, end, 64 << 20):
                out.write(image.read(vpid, at, min(end, at + (64 << 20))))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Damaged, OSError, ValueError, KeyError, IndexError, TypeError, struct.error,
            subprocess.CalledProcessError, RuntimeError) as error:
        print(f"read_image.py: {error or type(error).__name__}", file=sys.stderr)
        sys.exit(2)

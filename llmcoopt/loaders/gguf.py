"""Reads the container of GGUF files (versions 2 and 3): typed metadata and the directory of tensors, every length checked against the file.

What the metadata and names mean for a model is said in gguf_model.py.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError, UnsupportedError
from .safetensors import looks_like, map_file

# Tensor types: number -> (name, values per block, bytes per block).
BLOCKS = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
# Metadata types: number -> little-endian NumPy type. 7 is bool, 8 string, 9 array.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT32, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9
_LEAST_ENTRY = 8 + 4 + 1  # bytes of the smallest metadata entry: empty key, type, one byte
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes of the smallest directory entry: empty name, rank 0, type, offset
_NESTING = 4
_LONGEST_NAME = 1024


@dataclass(frozen=True, slots=True, eq=False)
class GgufTensor:
    """One entry of the directory. `shape` is row-major (the file's order reversed); `data` the raw bytes, a view of the mapped file."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def type_name(self) -> str:
        return BLOCKS[self.type][0]


def read_metadata(path) -> dict:
    """The metadata of a GGUF file. Strings are str (bytes that are not UTF-8 as surrogate escapes), numbers int and float, arrays of
    numbers NumPy arrays, arrays of strings lists. Raises FormatError naming the file and the key."""
    return _Reader(path).metadata()


def read_gguf(path) -> tuple[dict, dict[str, GgufTensor]]:
    """Metadata as `read_metadata` gives it, and the tensors by name in file order. Raises FormatError naming file and tensor."""
    reader = _Reader(path)
    metadata = reader.metadata()
    return metadata, reader.tensors(metadata)


class _Reader:
    """A cursor over the mapped file. Every read is checked against the end of the file."""

    def __init__(self, path):
        self.path = Path(path)
        self.mapped = map_file(path)
        self.bytes = memoryview(self.mapped)
        self.at, self.size = 0, len(self.mapped)
        self.what = "the file header"
        start = self.mapped[:512].tobytes()
        if start[:4] != b"GGUF":
            self.refuse(start)
        self.at = 4
        version = self.unsigned(4)
        if version & 0xFFFF == 0 and version:
            raise UnsupportedError(f"{path}: a big-endian GGUF file; little-endian ones load")
        if version not in (2, 3):
            raise UnsupportedError(f"{path}: GGUF version {version}; versions 2 and 3 load")
        self.n_tensors, self.n_entries = self.unsigned(8), self.unsigned(8)
        self.check_count(self.n_entries, _LEAST_ENTRY, "metadata entries")
        self.check_count(self.n_tensors, _LEAST_TENSOR, "tensors")

    def refuse(self, start):
        old = {b"lmgg": "ggml", b"tjgg": "ggjt", b"algg": "ggla", b"fmgg": "ggmf"}.get(start[:4])
        seems = f"it has the older {old} format: convert it to GGUF" if old else looks_like(start)
        raise FormatError(f"{self.path}: not a GGUF file: it begins with {start[:4]!r}, expected b'GGUF'" + (f"; {seems}" if seems else ""))

    def fail(self, problem):
        raise FormatError(f"{self.path}: {problem}")

    def check_count(self, count, least_bytes, things):
        if count * least_bytes > self.size - self.at:
            self.fail(f"{self.what} promises {count} {things}, but only {self.size - self.at} bytes follow: truncated or damaged")

    def skip(self, n):
        """The place of the next n bytes, which are then behind."""
        if n > self.size - self.at:
            self.fail(f"truncated in {self.what}: {n} bytes expected at {self.at}, the file ends at {self.size}")
        self.at += n
        return self.at - n

    def unsigned(self, n):
        at = self.skip(n)
        return int.from_bytes(self.bytes[at : at + n], "little")

    def string(self, errors="surrogateescape"):
        n = self.unsigned(8)
        at = self.skip(n)
        return str(self.bytes[at : at + n], "utf-8", errors)

    def name(self, things):
        """A key or tensor name: UTF-8, not empty, not absurdly long."""
        before = self.what
        at = self.at
        try:
            name = self.string("strict")
        except UnicodeDecodeError:
            self.fail(f"{things} after {before}, at {at}: its name is not UTF-8")
        if not name or len(name) > _LONGEST_NAME:
            self.fail(f"{things} after {before}, at {at}: its name has {len(name)} characters; expected 1 to {_LONGEST_NAME}")
        return name

    def metadata(self):
        found = {}
        for _ in range(self.n_entries):
            key = self.name("a metadata key")
            self.what = f"metadata '{key}'"
            if key in found:
                self.fail(f"{self.what} occurs twice")
            found[key] = self.value(self.unsigned(4))
        return found

    def value(self, kind, depth=0):
        if kind in _SCALARS:
            number = self.numbers(kind, 1)[0]
            return float(str(number)) if kind == _FLOAT32 else number.item()  # the shortest decimal: 1e-05, not 9.99999974e-06
        if kind == _BOOL:
            return bool(self.booleans(1)[0])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.fail(f"{self.what} has the unknown type {kind}; expected 0 to 12")
        if depth == _NESTING:
            self.fail(f"{self.what} nests arrays more than {_NESTING} deep")
        kind, count = self.unsigned(4), self.unsigned(8)
        if kind in _SCALARS:
            return self.numbers(kind, count)
        if kind == _BOOL:
            return self.booleans(count)
        self.check_count(count, 8, "array elements")
        return self.strings(count) if kind == _STRING else [self.value(kind, depth + 1) for _ in range(count)]

    def numbers(self, kind, count):
        item = np.dtype(_SCALARS[kind])
        at = self.skip(count * item.itemsize)
        return np.frombuffer(self.mapped[at : self.at].tobytes(), item)

    def booleans(self, count):
        flags = self.numbers(0, count)
        if flags.size and flags.max() > 1:
            self.fail(f"{self.what} holds the byte {flags.max()} as a truth value; expected 0 or 1")
        return flags.astype(bool)

    def strings(self, count):
        """Vocabularies have hundreds of thousands: one loop without calls into the other readers."""
        data, at, size, found, length_of = self.bytes, self.at, self.size, [], struct.Struct("<Q").unpack_from
        for _ in range(count):
            if size - at < 8:
                break
            (n,) = length_of(data, at)
            at += 8
            if n > size - at:
                break
            found.append(str(data[at : at + n], "utf-8", "surrogateescape"))
            at += n
        if len(found) < count:
            self.fail(f"truncated in {self.what}: element {len(found)} of {count} passes the end of the file at {size}")
        self.at = at
        return found

    def tensors(self, metadata):
        """The directory, then the bytes of each tensor: aligned, inside the file, without overlap."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            self.fail(f"metadata 'general.alignment' is {alignment!r:.100}; expected a power of two up to 2^20")
        entries = {}
        self.what = "the metadata"
        for _ in range(self.n_tensors):
            name = self.name("a tensor")
            self.what = f"the directory entry of tensor '{name}'"
            if name in entries:
                self.fail(f"tensor '{name}' occurs twice")
            entries[name] = self.entry(name, alignment)
        begin = -(-self.at // alignment) * alignment
        self.check_layout(entries, begin)
        return {
            name: GgufTensor(name, kind, shape, self.mapped[begin + offset : begin + offset + nbytes])
            for name, (kind, shape, offset, nbytes) in entries.items()
        }

    def entry(self, name, alignment):
        rank = self.unsigned(4)
        if rank > 4:
            self.fail(f"tensor '{name}' has {rank} dimensions; expected at most 4")
        shape = tuple(self.unsigned(8) for _ in range(rank))[::-1]
        kind, offset = self.unsigned(4), self.unsigned(8)
        if kind not in BLOCKS:
            raise UnsupportedError(f"{self.path}: tensor '{name}' has the unknown type {kind}")
        type_name, block_values, block_bytes = BLOCKS[kind]
        count = 1
        for n in shape:
            count *= n
            if n < 1 or count >= 2**62:
                self.fail(f"tensor '{name}' has shape {list(shape)}; expected positive sizes and fewer than 2^62 values")
        if (shape[-1] if shape else 1) % block_values:
            self.fail(f"tensor '{name}' has rows of {shape[-1] if shape else 1} values; {type_name} needs a multiple of {block_values}")
        if offset % alignment:
            self.fail(f"tensor '{name}' begins at {offset}; expected a multiple of the alignment {alignment}")
        return kind, shape, offset, count // block_values * block_bytes

    def check_layout(self, entries, begin):
        room, at, before = max(0, self.size - begin), 0, None
        for name, (_, _, offset, nbytes) in sorted(entries.items(), key=lambda item: item[1][2]):
            if offset < at:
                self.fail(f"tensor '{name}' begins at {offset}, inside tensor '{before}', which ends at {at}")
            if nbytes > room - offset:
                self.fail(f"truncated: tensor '{name}' ends at {offset + nbytes}, but the file has only {room} bytes of tensor data")
            at, before = offset + nbytes, name

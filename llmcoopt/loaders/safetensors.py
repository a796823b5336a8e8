"""Reads safetensors files by the format's own rules, memory-mapped.

A file is an 8-byte little-endian header length, that many bytes of JSON, then the tensors' bytes. Everything the format promises is checked
before a tensor is handed out: a truncated, overlapping or padded file is an error that names the file and the tensor, never wrong numbers.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FormatError, MissingFileError

HEADER_LIMIT = 100_000_000
# element type -> bits per element
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
WEIGHT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named array of a checkpoint. `data` is uint8 [nbytes], read-only, aligned to the element size; usually part of the mapped file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    file: str

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numpy(self) -> np.ndarray:
        """The values without a copy: float32, float16, or uint16 holding bfloat16 bits."""
        numpy_types = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
        if self.dtype not in numpy_types:
            raise FormatError(f"{self.file}: tensor '{self.name}' is {self.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")
        return self.data.view(numpy_types[self.dtype]).reshape(self.shape)

    def __repr__(self):
        return f"Tensor({self.name!r}, {self.dtype}, {list(self.shape)})"


def map_file(path) -> np.ndarray:
    """The whole file as uint8 [size], mapped read-only; the mapping lives as long as any view of it."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise FormatError(f"{path}: the file is empty")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error


def release_pages(data: np.ndarray) -> None:
    """Lets the system forget which pages of `data`, part of a mapped file, this process has read; they are read again when they are asked for.
    Without this a file that is read once would count as memory of the process. Arrays that are no part of a mapping are left alone."""
    owner = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        return
    offset = data.ctypes.data - np.frombuffer(owner, np.uint8, 1).ctypes.data
    begin, end = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, (offset + data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        owner.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def looks_like(start: bytes) -> str | None:
    """What a file that is no model file seems to be, in words that end a sentence; None when unknown."""
    text = start[:512].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer: fetch the real file with 'git lfs pull'"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is an HTML or XML page, probably a login or error page saved by a download"
    if start.startswith(b"\x1f\x8b"):
        return "it is gzip-compressed: unpack it first"
    if start.startswith(b"PK\x03\x04"):
        return "it is a ZIP archive, as torch.save writes: convert the checkpoint to safetensors"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "it is a Python pickle: convert the checkpoint to safetensors"
    if start.startswith(b"GGUF"):
        return "it is a GGUF file: name it *.gguf"
    if start[8:9] == b"{":
        return "it is a safetensors file: name it *.safetensors"
    if text.startswith((b"{", b"[")):
        return "it is JSON text"
    return None


def read_safetensors(path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file in file order, and its metadata. Raises FormatError naming file and tensor."""
    mapped = map_file(path)
    header, start = _read_header(path, mapped)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is {metadata!r:.100}; expected an object of strings")
    entries = sorted((_entry(path, name, info) for name, info in header.items()), key=lambda e: (e[3], e[4]))
    _check_layout(path, entries, len(mapped) - start)
    return {e[0]: _tensor(path, mapped, start, *e) for e in entries}, metadata


def _read_header(path, mapped):
    """The header object, and where the tensors' bytes begin."""
    begin = mapped[: 8 + 512].tobytes()
    length = int.from_bytes(begin[:8], "little")
    room = len(mapped) - 8
    problem = None
    if room < 2:
        problem = f"the file has {len(mapped)} bytes; expected an 8-byte length and a header"
    elif length > HEADER_LIMIT:
        problem = f"the header would have {length} bytes; at most {HEADER_LIMIT} are allowed"
    elif length > room:
        problem = f"the header would have {length} bytes, but only {room} follow: truncated, or no safetensors file"
    elif begin[8:9] != b"{" or length < 2:
        problem = f"the header begins with {begin[8:9]!r}; expected '{{'"
    if problem:
        seems = looks_like(begin) if begin[8:9] != b"{" else None
        raise FormatError(f"{path}: not a safetensors file: {problem}" + (f"; {seems}" if seems else ""))
    raw = mapped[8 : 8 + length].tobytes().rstrip(b" ")
    if raw[-1:] != b"}":
        raise FormatError(f"{path}: the header ends with {raw[-1:]!r}; expected '}}', then at most spaces")
    return parse_json(raw, f"{path}: header"), 8 + length


def parse_json(raw: bytes, where: str) -> dict:
    """A JSON object, strictly: UTF-8, no duplicate keys, no NaN or infinity. Raises FormatError beginning with `where`."""

    def pairs(items):
        found = {}
        for key, value in items:
            if key in found:
                raise FormatError(f"{where}: the key {key!r} occurs twice")
            found[key] = value
        return found

    def constant(name):
        raise FormatError(f"{where}: {name} is no JSON number")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8: byte {error.object[error.start]:#04x} at {error.start}") from None
    except RecursionError:
        raise FormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where}: found a JSON {type(found).__name__}, expected an object")
    return found


def _entry(path, name, info):
    """(name, dtype, shape, begin, end) of one tensor, checked by itself."""

    def fail(problem):
        raise FormatError(f"{path}: tensor '{name}': {problem}")

    if not name.isprintable():
        raise FormatError(f"{path}: a tensor is named {name!r:.100}; expected printable characters")
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        fail(f"found {info!r:.100}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        fail(f"dtype is {dtype!r}; known: {', '.join(sorted(BITS))}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        fail(f"shape is {shape!r:.100}; expected a list of whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
        fail(f"data_offsets is {offsets!r:.100}; expected [begin, end)")
    begin, end = offsets
    if begin > end:
        fail(f"data_offsets is {offsets}: begins after its end")
    count = 1
    for n in shape:
        count *= n
        if count >= 2**63:
            fail(f"shape {shape!s:.100} has 2^63 elements or more")
    bits = count * BITS[dtype]
    if bits % 8 or bits // 8 != end - begin:
        fail(f"data_offsets {offsets} span {end - begin} bytes; shape {shape} of {dtype} needs {bits / 8:.10g}")
    return name, dtype, tuple(shape), begin, end


def _check_layout(path, entries, size):
    """Tensors fill the bytes after the header exactly: no overlap, no hole, nothing behind the last."""
    at, before = 0, None
    for name, _, _, begin, end in entries:
        if begin < at:
            raise FormatError(f"{path}: tensor '{name}' begins at {begin}, inside tensor '{before}', which ends at {at}")
        if begin > at:
            after = f"tensor '{before}', which ends" if before else "the data, which begins"
            raise FormatError(f"{path}: tensor '{name}' begins at {begin}, leaving a hole after {after} at {at}")
        if end > size:
            raise FormatError(f"{path}: truncated: tensor '{name}' ends at {end}, but the file has only {size} bytes of tensor data")
        at, before = end, name
    if at != size:
        raise FormatError(f"{path}: {size - at} bytes follow the last tensor '{before}'; expected none")


def _tensor(path, mapped, start, name, dtype, shape, begin, end):
    return make_tensor(name, dtype, shape, mapped[start + begin : start + end], str(path))


def make_tensor(name, dtype, shape, data, file) -> Tensor:
    """A Tensor over `data`, copied only when its address is no multiple of the element size (the format promises no alignment)."""
    if data.size and data.ctypes.data % max(1, BITS[dtype] // 8):
        data = data.copy()
    data.flags.writeable = False
    return Tensor(name, dtype, tuple(shape), data, file)

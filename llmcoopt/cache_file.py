"""Caches in files: what KVCache.save writes and KVCache.load reads.

A safetensors file. Tensors: `pages` [n, page_bytes], bytes as they lie in memory, a page that sequences share once; `crc32` of each; for sequence i
`ids.i` and `table.i` (rows of `pages`, -1: left the window) as int32, and `tail.i`, the write buffer; `firsts`, the first tokens in 16 bit beside the
pages that sequences begin with, in the order in which the tables name these. The metadata has the version, what the cache is
like, the model's fingerprint, and the CRC-32 of all but the pages.
"""

import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .errors import ArgumentError, FormatError
from .loaders.safetensors import read_safetensors

FORMAT, VERSION = "llmcoopt key/value cache", 2
SAMPLES, SAMPLE = 16, 256  # of each tensor in a fingerprint: so many pieces of so many bytes
BAR = 1 << 30  # bytes of pages from which on a bar is shown


def fingerprint(config, tensors) -> str:
    """Of a model: its configuration, the names, types and shapes of its tensors, and samples of their bytes, evenly spread."""
    digest = hashlib.sha256(repr(config).encode())
    for tensor in sorted(tensors, key=lambda t: t.name):
        digest.update(f"{tensor.name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = np.frombuffer(tensor.data, np.uint8)
        for at in np.linspace(0, max(0, len(data) - SAMPLE), SAMPLES, dtype=np.int64):
            digest.update(data[at : at + SAMPLE].tobytes())
    return digest.hexdigest()[:32]


def describe(cache) -> dict:
    config = cache.model.config
    return {
        "model": cache.model.fingerprint,
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "dtypes": list(cache.layer_dtypes),
        "page_size": cache.page_size,
        "page_bytes": cache.stats()["page_bytes"],
        "write_buffer": cache.write_buffer,
        "residual_length": cache.residual_length,
        "sink_length": cache.sink_length,
        "turn_keys": cache.turn_keys,
        "kv_scales": cache.kv_scales,
        "window": cache.attention_window,
        "sinks": cache.attention_sinks,
    }


def _beginnings(tables) -> list[int]:
    """Pages that sequences begin with, each once."""
    return list(dict.fromkeys(int(table[0]) for table in tables if len(table) and table[0] >= 0))


def save(cache, sequences, path) -> None:
    path, images = Path(path), [sequence._core.image() for sequence in sequences]
    tables = [np.frombuffer(image[4], np.int32) for image in images]
    pages = list(dict.fromkeys(int(page) for table in tables for page in table if page >= 0))
    place, about = {page: i for i, page in enumerate(pages)} | {-1: -1}, describe(cache)
    size, small = about["page_bytes"], {}
    for i, (image, table) in enumerate(zip(images, tables, strict=True)):
        small[f"ids.{i}"] = ("I32", image[3])
        small[f"table.{i}"] = ("I32", np.array([place[int(page)] for page in table], np.int32).tobytes())
        small[f"tail.{i}"] = ("U8", image[5])
    beginnings = [bytearray(cache._first_bytes) for _ in _beginnings(tables)]
    for page, buffer in zip(_beginnings(tables), beginnings, strict=True):
        cache._core.first_out(page, buffer)
    small["firsts"] = ("U8", b"".join(beginnings))
    about |= {"sequences": [image[:3] for image in images]}
    checks, rest = np.zeros(len(pages), np.uint32), json.dumps(about).encode() + b"".join(raw for _, raw in small.values())
    metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about), "crc32": f"{zlib.crc32(rest):08x}"}
    entries, at = {"pages": {"dtype": "U8", "shape": [len(pages), size], "data_offsets": [0, len(pages) * size]}}, len(pages) * size
    for name, (dtype, raw) in (small | {"crc32": ("U32", checks.tobytes())}).items():
        entries[name] = {"dtype": dtype, "shape": [len(raw) // (1 if dtype == "U8" else 4)], "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    header = json.dumps({"__metadata__": metadata} | entries).encode()
    header += b" " * (-len(header) % 8)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            buffer = bytearray(size)
            for i, page in enumerate(tqdm(pages, f"saving {path.name}", unit="page", disable=len(pages) * size < BAR)):
                cache._core.page_out(page, buffer)
                checks[i] = zlib.crc32(buffer)
                file.write(buffer)
            for _, raw in small.values():
                file.write(raw)
            file.write(checks.tobytes())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class CacheFile:
    """An opened file: `about` it, checked but for its pages, which are checked as they are read. options: of a cache like the one that was saved."""

    def __init__(self, path):
        self.path = Path(path)
        tensors, metadata = read_safetensors(self.path)
        if metadata.get("format") != FORMAT:
            raise FormatError(f"{self.path}: no saved cache (its format is {metadata.get('format')!r}, expected {FORMAT!r})")
        if metadata.get("version") != str(VERSION):
            raise FormatError(f"{self.path}: version {metadata.get('version')!r} of the format, this package reads {VERSION}")
        try:
            self.about = json.loads(metadata["about"])
            count, size = len(self.about["sequences"]), int(self.about["page_bytes"])
            names = [f"{part}.{i}" for i in range(count) for part in ("ids", "table", "tail")] + ["firsts"]
            raw = {name: np.frombuffer(tensors[name].data, np.uint8).tobytes() for name in names}
            rest = metadata["about"].encode() + b"".join(raw.values())
            names = ("page_size", "write_buffer", "sink_length", "turn_keys", "kv_scales")
            self.options = {name: self.about[name] for name in names} | {"residual_length": self.about["residual_length"] or None}
            self.options |= {
                "dtype": self.about["dtypes"],
                "attention_window": self.about["window"],
                "attention_sinks": self.about["sinks"],
            }
            self.pages = np.frombuffer(tensors["pages"].data, np.uint8).reshape(-1, size)
            self.checks = np.frombuffer(np.frombuffer(tensors["crc32"].data, np.uint8).tobytes(), np.uint32)
            self.images = [tuple(int(np.int64(n)) for n in s) for s in self.about["sequences"]]
            self.firsts = raw["firsts"]
            ids, tables = ([np.frombuffer(raw[f"{part}.{i}"], np.int32) for i in range(count)] for part in ("ids", "table"))
            self.parts = [(ids[i], tables[i], raw[f"tail.{i}"]) for i in range(count)]
            if len(self.checks) != len(self.pages) or any(len(image) != 3 for image in self.images):
                raise ValueError(f"{len(self.checks)} checksums of {len(self.pages)} pages, sequences {self.images}")
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"{self.path}: its parts are not those of a saved cache ({type(error).__name__}: {error})") from error
        if f"{zlib.crc32(rest):08x}" != metadata.get("crc32"):
            raise FormatError(
                f"{self.path}: damaged: the checksum of its tables is {zlib.crc32(rest):08x}, expected {metadata.get('crc32')}"
            )

    def check_fits(self, cache) -> None:
        here = describe(cache)
        for name, expected in here.items():
            if self.about.get(name) != expected:
                what = "it belongs to another model: fingerprint" if name == "model" else name
                raise ArgumentError(f"{self.path}: {what} {self.about.get(name)!r}, the cache has {expected!r}")

    def load(self, cache) -> list:
        """Core sequences; nothing is left in the cache when one fails."""
        self.check_fits(cache)
        core, size, numbers, made = cache._core, self.about["page_bytes"], [], []
        try:
            bar = tqdm(self.pages, f"loading {self.path.name}", unit="page", disable=len(self.pages) * size < BAR)
            for i, page in enumerate(bar):
                if zlib.crc32(page) != self.checks[i]:
                    raise FormatError(f"{self.path}: page {i} is damaged{self._whose(i)}: its checksum is not {self.checks[i]:08x}")
                numbers.append(core.page_in(page))
            tables = [table for _, table, _ in self.parts]
            for rows in tables:
                if len(rows) and not (rows.min() >= -1 and rows.max() < len(numbers)):
                    raise FormatError(f"{self.path}: a table names pages {rows.min()} to {rows.max()} of {len(numbers)}")
            beginnings, each = _beginnings(tables), cache._first_bytes
            if len(self.firsts) != len(beginnings) * each:
                raise FormatError(
                    f"{self.path}: first tokens in {len(self.firsts)} bytes, expected {each} for each of {len(beginnings)} pages"
                )
            for i, row in enumerate(beginnings):
                core.first_in(numbers[row], self.firsts[i * each : (i + 1) * each])
            for image, rows, (ids, _, tail) in zip(self.images, tables, self.parts, strict=True):
                table = np.array([numbers[row] if row >= 0 else -1 for row in rows], np.int32).tobytes()
                made.append(core.restore(*image, ids, table, tail))
        except BaseException:
            for sequence in made:
                sequence.free()
            raise
        finally:
            for number in numbers:
                core.page_drop(number)
        return made

    def _whose(self, page) -> str:
        for i, (_, table, _) in enumerate(self.parts):
            at = np.flatnonzero(table == page)
            if len(at):
                first = int(at[0]) * self.about["page_size"]
                return f" (tokens {first} to {first + self.about['page_size'] - 1} of sequence {i})"
        return ""

"""Writes safetensors files, one or several with an index, each whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np

from ..errors import StorageError
from .hf import INDEX, SINGLE

SHARD_BYTES = 4 << 30

Entry = tuple[str, tuple[int, ...], np.ndarray]  # safetensors' dtype, shape, contiguous data of any type


def write_safetensors(path, entries: dict[str, Entry], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name, in this order. The file appears under its name when it is complete. Raises StorageError."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in entries.values():
            file.write(memoryview(data.reshape(-1).view(np.uint8)))

    write_file(path, write, at)


def write_json(path, content: dict) -> None:
    write_file(path, lambda file: file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"))


def write_file(path, write, nbytes: int = 0) -> None:
    """Calls write(file) with a new file, which takes the name `path` when all is written. nbytes: about its size, for the message of a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            size = f" ({nbytes:,} bytes)" if nbytes else ""
            raise StorageError(f"{path}: cannot be written{size}: {error.strerror or error}") from error
        raise


def write_weights(folder: Path, entries: dict[str, Entry], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or shards of at most `shard_bytes` (a larger tensor has its own) with model.safetensors.index.json."""
    shards, size = [{}], 0
    for name, entry in entries.items():
        if shards[-1] and size + entry[2].nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry[2].nbytes
    metadata = {"format": "pt"}  # transformers wants it
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, shards[0], metadata)
        return
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, metadata)
        places |= dict.fromkeys(shard, file)
    total = sum(data.nbytes for _, _, data in entries.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})

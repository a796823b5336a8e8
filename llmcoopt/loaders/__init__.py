"""From a path or a model name to named arrays: Hugging Face folders and GGUF files. All parsing of files lives in this package."""

from dataclasses import replace

import numpy as np

from .._core import convert
from ..errors import ArgumentError, NumericError
from . import smollm2
from .checkpoint import LoadedCheckpoint, in_threads
from .gguf import read_metadata
from .gguf_model import load_gguf
from .hf import load_folder
from .hub import resolve
from .safetensors import BITS, Tensor, read_safetensors

__all__ = ["LoadedCheckpoint", "Tensor", "load", "read_metadata", "read_safetensors", "resolve", "smollm2"]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def load(path, dtype: str = "auto", tie_word_embeddings: bool | None = None, revision: str | None = None) -> LoadedCheckpoint:
    """Loads a model: a Hugging Face folder, a .gguf file, "tiny", or a hub id (see `resolve`).

    dtype "auto" keeps 16- and 32-bit weights as they lie in the mapped file and decodes quantised GGUF tensors to bfloat16. "float32",
    "float16" and "bfloat16" convert every matrix; vectors (norms, biases) stay as stored. `tie_word_embeddings` overrides the config.

    Raises ArgumentError, MissingFileError, FormatError, UnsupportedError, and NumericError when float16 cannot hold a weight."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in _DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; expected 'auto' or one of {', '.join(_DTYPES)}")
    wanted = _DTYPES.get(name)
    place = resolve(path, revision)
    if place.is_dir():
        checkpoint = load_folder(place, tie_word_embeddings)
    elif place.suffix == ".safetensors":
        raise ArgumentError(f"{place}: one file of weights; pass its folder {place.parent}, which holds config.json too")
    else:
        checkpoint = load_gguf(place, wanted or "BF16", tie_word_embeddings)
    if wanted is None:
        return checkpoint
    converted = in_threads(lambda tensor: _convert(tensor, wanted), checkpoint.tensors.values())
    return replace(checkpoint, tensors={tensor.name: tensor for tensor in converted})


def _convert(tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype == dtype or len(tensor.shape) < 2:
        return tensor
    out = np.empty(tensor.nbytes * BITS[dtype] // BITS[tensor.dtype], np.uint8)
    lost = convert(tensor.data, tensor.dtype, out, dtype)
    if lost:
        raise NumericError(f"{tensor.file}: tensor '{tensor.name}' holds {lost} values that are NaN, infinite or too large for {dtype}")
    out.flags.writeable = False
    return replace(tensor, dtype=dtype, data=out)

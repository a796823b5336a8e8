"""From a path or a model name to named arrays: Hugging Face folders and GGUF files. All parsing of files lives in this package."""

from dataclasses import replace

import numpy as np

from .._core import convert
from ..errors import ArgumentError, NumericError
from . import smollm2
from .checkpoint import LoadedCheckpoint, in_threads
from .gguf import read_metadata
from .gguf_model import load_gguf
from .hf import EMBEDDING, HEAD, load_folder, read_json
from .hub import resolve
from .lint import lint
from .lint import to_json as finding_to_json
from .packing import QUANTIZED, layout_of, pack, quantize_rows, why_not
from .quantized import QuantizedWeight, with_progress
from .safetensors import BITS, Tensor, read_safetensors
from .stored import Stored, of_quantized, row_text, summary

__all__ = [
    "QUANTIZED",
    "LoadedCheckpoint",
    "QuantizedWeight",
    "Tensor",
    "finding_to_json",
    "lint",
    "load",
    "load_folder",
    "read_json",
    "read_metadata",
    "read_safetensors",
    "resolve",
    "row_text",
    "smollm2",
    "summary",
]

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {short: name for name, short in _DTYPES.items()}


def load(
    path,
    dtype: str = "auto",
    tie_word_embeddings: bool | None = None,
    revision: str | None = None,
    quantization_config: dict | None = None,
    quantized: bool = False,
    head_bits: int | None = None,
) -> LoadedCheckpoint:
    """Loads a model: a Hugging Face folder, a .gguf file, "tiny", or a hub id (see `resolve`).

    dtype "auto" keeps 16- and 32-bit weights as they lie in the mapped file and decodes quantised ones to 16 bit: GGUF tensors to
    bfloat16, GPTQ, AWQ and compressed-tensors to float16 where the config's torch_dtype is that, else to bfloat16. "float32", "float16" and
    "bfloat16" convert every matrix; vectors (norms, biases) stay as stored. `tie_word_embeddings` overrides the config, and so do the keys
    of `quantization_config` (quant_method, bits, group_size, sym, checkpoint_format, dynamic) what the files say of their quantisation.
    `quantized` keeps quantised weights in their bits, as tensors of dtype "QUANTIZED" for the kernels; what their layout does not express is
    decoded all the same. It needs dtype "auto". `head_bits=8` rounds the output matrix to 8 bits, where it is not quantised; a tied one becomes a
    matrix of its own.

    Raises ArgumentError, MissingFileError, FormatError, UnsupportedError, and NumericError when float16 cannot hold a weight."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in _DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; expected 'auto' or one of {', '.join(_DTYPES)}")
    wanted = _DTYPES.get(name)
    if quantized and wanted is not None:
        raise ArgumentError(f"dtype is {dtype!r} and weights are to stay quantised; expected dtype='auto'")
    place = resolve(path, revision)
    if place.is_dir():
        checkpoint = load_folder(place, tie_word_embeddings, quantization_config)
    elif place.suffix == ".safetensors":
        raise ArgumentError(f"{place}: one file of weights; pass its folder {place.parent}, which holds config.json too")
    elif quantization_config is not None:
        raise ArgumentError(f"{place}: a GGUF file says itself how its weights are quantised; expected quantization_config=None")
    else:
        checkpoint = load_gguf(place, wanted or "BF16", tie_word_embeddings, quantized)
    if checkpoint.quantized:
        checkpoint = _settle_quantized(checkpoint, wanted or checkpoint.decode_dtype, quantized)
    if wanted is not None:
        converted = in_threads(lambda tensor: _convert(tensor, wanted), checkpoint.tensors.values())
        checkpoint = replace(checkpoint, tensors={tensor.name: tensor for tensor in converted})
    return _round_head(checkpoint) if head_bits == 8 else checkpoint


def _round_head(checkpoint: LoadedCheckpoint) -> LoadedCheckpoint:
    """The checkpoint with an output matrix of 8 bits."""
    head = checkpoint.tensors[EMBEDDING if checkpoint.config.tie_word_embeddings else HEAD]
    if head.dtype == QUANTIZED:
        return checkpoint
    tensors = checkpoint.tensors | {HEAD: quantize_rows(HEAD, head)}
    stored = checkpoint.stored | {HEAD: Stored(head.dtype, BITS[head.dtype], head.nbytes, kept="8 bits")}
    config = replace(checkpoint.config, tie_word_embeddings=False)
    return replace(checkpoint, config=config, tensors=tensors, stored=stored)


def _settle_quantized(checkpoint: LoadedCheckpoint, dtype: str, keep: bool) -> LoadedCheckpoint:
    """The checkpoint with its quantised weights among the tensors: in their bits where `keep` and the layout allow it, else decoded."""

    def settle(weight, done):
        return pack(weight, done) if keep and why_not(weight) is None else weight.dequantize(dtype, done)

    tensors, stored = dict(checkpoint.tensors), dict(checkpoint.stored)
    for tensor in with_progress(settle, list(checkpoint.quantized.values())):
        weight = checkpoint.quantized[tensor.name.removesuffix(".weight")]
        reason = f" ({why_not(weight)})" if keep and tensor.dtype != QUANTIZED else ""
        kept = f"{layout_of(tensor)[0]} bits" if tensor.dtype == QUANTIZED else f"{_NAMES[dtype]}{reason}"
        tensors[tensor.name], stored[tensor.name] = tensor, replace(of_quantized(weight), kept=kept)
    return replace(checkpoint, tensors=tensors, stored=stored)


def _convert(tensor: Tensor, dtype: str) -> Tensor:
    if tensor.dtype == dtype or len(tensor.shape) < 2:
        return tensor
    out = np.empty(tensor.nbytes * BITS[dtype] // BITS[tensor.dtype], np.uint8)
    lost = convert(tensor.data, tensor.dtype, out, dtype)
    if lost:
        raise NumericError(f"{tensor.file}: tensor '{tensor.name}' holds {lost} values that are NaN, infinite or too large for {dtype}")
    out.flags.writeable = False
    return replace(tensor, dtype=dtype, data=out)

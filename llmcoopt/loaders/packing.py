"""Quantised weights kept in their bits: from a file's form to the layout that kernels read (csrc/base/qweight.h).

Codes are moved, never rounded: 2 and 3 bits widen to 4, the 5 and 6 bits of GGUF to 8. What no block of the layout expresses stays out of it,
and `why_not` says why."""

import numpy as np

from .._core import block_codes, pack_begin, pack_rows, pack_size
from ..errors import NumericError
from .checkpoint import in_threads
from .findings import Finding, FoundError
from .gguf import GgufTensor
from .quantized import QuantizedWeight
from .safetensors import Tensor, release_pages

QUANTIZED = "QUANTIZED"  # the dtype of a Tensor in the layout
HEAD_GROUP = 64  # inputs that share a scale where a plain matrix is rounded to 8 bits
LARGEST_BLOCK = 128  # inputs that share a scale in the layout
WORD_ROWS, ROWS = 512, 64  # outputs packed at a time, from GPTQ's words and from codes in bytes
# GGUF type -> (bits of the layout, added to codes, offsets, type of scales that holds them exactly)
GGUF_KINDS = {
    "Q4_0": (4, 0, "none", "float16"),
    "Q4_1": (4, 0, "floats", "float16"),
    "Q5_0": (8, 112, "none", "float16"),
    "Q5_1": (8, 0, "floats", "float16"),
    "Q8_0": (8, 0, "none", "float16"),
    "Q4_K": (4, 0, "floats", "float32"),
    "Q5_K": (8, 0, "floats", "float32"),
    "Q6_K": (8, 96, "none", "float32"),
}


def why_not(weight: QuantizedWeight) -> str | None:
    """Why the layout does not express a weight; None when it does."""
    if _block(weight.group_size, weight.in_features) is None:
        return f"groups of {weight.group_size}, expected a multiple of 8"
    if weight.g_idx is not None:
        counts = np.bincount(weight.g_idx, minlength=weight.groups)
        if (counts[:-1] != weight.group_size).any() or counts[-1] > weight.group_size:
            return "groups of different sizes"
    return None


def pack(weight: QuantizedWeight, done=lambda nbytes: None) -> Tensor:
    """A weight that `why_not` has nothing against, in the layout; done(bytes of the file) is called after each part. Raises FoundError when a
    scale is not finite."""
    n, k, bits = weight.out_features, weight.in_features, 4 if weight.bits <= 4 else 8
    block, shift = _block(weight.group_size, k), 2 ** (bits - 1) - 2 ** (weight.bits - 1)
    order = None if weight.g_idx is None else np.argsort(weight.g_idx, kind="stable").astype(np.int32)
    scales, dtype = _scales(weight.scales)
    zeros = None if weight.zeros is None else np.ascontiguousarray(weight.zeros) + np.int16(shift)
    kind = (bits, block, dtype, "none" if zeros is None else "zeros")
    out = _begin(n, k, kind, order)
    groups = (0, n, weight.groups, -(-weight.group_size // block) * block)
    words = weight.codes.words if _are_rows_of_words(weight) else None
    step, lost = WORD_ROWS if words is not None else ROWS, 0
    for begin in range(0, n, step):
        end = min(begin + step, n)
        codes = words if words is not None else weight.rows(begin, end)
        lost += pack_rows(out, codes, 0 if words is None else n, shift, (begin, end - begin), scales, dtype, zeros, None, groups)
        done(weight.nbytes * end // n - weight.nbytes * begin // n)
    release_pages(weight.codes.words)
    if lost:
        found = f"{lost} scales are NaN or infinite"
        raise FoundError(Finding("scales", weight.file, weight.name, found, "finite numbers", "llmcoopt lint tells where they are"))
    return _tensor(f"{weight.name}.weight", (n, k), out, weight.file)


def can_pack_gguf(tensor: GgufTensor) -> bool:
    return tensor.type_name in GGUF_KINDS and len(tensor.shape) == 2


def pack_gguf(name: str, tensor: GgufTensor, data: np.ndarray, file: str) -> tuple[Tensor, int]:
    """A matrix of GGUF blocks, `data` being its bytes, in the layout, and how many scales and offsets are not finite."""
    (n, k), (bits, shift, offsets, dtype) = tensor.shape, GGUF_KINDS[tensor.type_name]
    group = 16 if tensor.type_name == "Q6_K" else 32
    out = _begin(n, k, (bits, group, dtype, offsets), None)
    row_bytes, lost = data.nbytes // n, 0
    codes = np.empty((ROWS, k), np.uint8)
    for begin in range(0, n, ROWS):
        rows = min(ROWS, n - begin)
        scales = np.empty((k // group, rows), np.float32)
        shifts = np.empty_like(scales) if offsets == "floats" else None
        block_codes(data[begin * row_bytes : (begin + rows) * row_bytes], tensor.type, rows, codes[:rows], scales, shifts)
        where = (begin, rows, k // group, group)
        lost += pack_rows(out, codes[:rows], 0, shift, (begin, rows), scales, "float32", None, shifts, where)
    release_pages(tensor.data)
    return _tensor(name, (n, k), out, file), lost


def quantize_rows(name: str, tensor: Tensor) -> Tensor:
    """A plain matrix rounded to 8 bits, for each output and HEAD_GROUP inputs to multiples of their largest magnitude / 127, as `name`."""
    (n, k), groups = tensor.shape, -(-tensor.shape[1] // HEAD_GROUP)
    out = _begin(n, k, (8, HEAD_GROUP, "bfloat16", "none"), None)
    values = tensor.numpy()

    def quantize(begin):
        rows = min(WORD_ROWS, n - begin)
        part = values[begin : begin + rows]
        x = np.zeros((rows, groups, HEAD_GROUP), np.float32)
        floats = (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else part.astype(np.float32)
        x.reshape(rows, -1)[:, :k] = floats
        scales = ((np.abs(x).max(axis=2) / np.float32(127)).view(np.uint32) + 0xFFFF >> 16).astype(np.uint16)  # bfloat16, rounded up
        steps = np.maximum((scales.astype(np.uint32) << 16).view(np.float32), np.finfo(np.float32).tiny)
        np.rint(np.divide(x, steps[:, :, None], out=x), out=x)
        codes = np.ascontiguousarray((np.clip(x, -127, 127) + 128).astype(np.uint8).reshape(rows, -1)[:, :k])
        where = (begin, rows, groups, HEAD_GROUP)
        return pack_rows(out, codes, 0, 0, (begin, rows), np.ascontiguousarray(scales.T), "bfloat16", None, None, where)

    with np.errstate(invalid="ignore", over="ignore"):
        lost = sum(in_threads(quantize, range(0, n, WORD_ROWS)))
    if lost:
        raise NumericError(f"{tensor.file}: tensor '{tensor.name}' holds values that are NaN or infinite, which 8 bits do not")
    return _tensor(name, (n, k), out, tensor.file)


def _block(group, inputs):
    """Inputs of a block for groups of `group`: the largest divisor that is a multiple of 8 and at most 128; None when there is none."""
    if group >= inputs:
        return min(LARGEST_BLOCK, -(-inputs // 8) * 8)
    return next((block for block in range(LARGEST_BLOCK, 0, -8) if group % block == 0), None)


def _scales(scales):
    """Contiguous [groups, outputs] as stored, and the smallest type that holds them exactly."""
    scales = np.ascontiguousarray(scales)
    if scales.dtype == np.float32:
        with np.errstate(over="ignore"):
            half = scales.astype(np.float16)
        exact = np.array_equal(half.astype(np.float32), scales)
        return (half, "float16") if exact else (scales, "float32")
    return scales, "bfloat16" if scales.dtype == np.uint16 else "float16"


def _are_rows_of_words(weight):
    """Whether codes are words of GPTQ's 4 bits, which the layout has too."""
    return weight.codes.bits == 4 and weight.codes.kind == "stream" and weight.codes.strides == (1, weight.out_features)


def _begin(n, k, kind, order):
    size = pack_size(n, k, *kind, order is not None)
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + size]
    pack_begin(out, n, k, *kind, order)
    return out


def _tensor(name, shape, out, file):
    out.flags.writeable = False
    return Tensor(name, QUANTIZED, shape, out, file)


def layout_of(tensor: Tensor) -> tuple[int, int]:
    """(bits, inputs that share a scale) of a tensor in the layout."""
    return int(tensor.data[4]), int(tensor.data[6])

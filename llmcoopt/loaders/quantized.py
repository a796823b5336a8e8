"""Quantised weights in one form, whatever the file has: integer codes, scales and zero points, and which input belongs to which group.

Nothing is decoded before it is asked for: codes stay packed in the mapped file. `reference_quant.py` is the specification of the packings.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._core import dequantize_groups, unpack
from .checkpoint import in_threads
from .findings import Finding, FoundError
from .safetensors import BITS, Tensor

ROWS = 64  # outputs decoded at a time: their words and codes stay in cache
PROGRESS_BYTES = 1 << 28  # packed bytes from which a bar is shown
_KINDS = {"stream": 0, "whole": 1, "awq": 2}  # lco_pack_kind in csrc/model/unpack.h


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A matrix of small integers in 32-bit words: `lines` runs of `values` values, packed along the axis of the values.

    words: uint32, flat, a view of the mapped file. strides: words from line to line, and from word to word of a line. The table in
    csrc/model/unpack.h has them for every tensor of every format."""

    words: np.ndarray
    bits: int
    kind: str  # "stream", "whole" or "awq"
    lines: int
    values: int
    strides: tuple[int, int]

    def lines_of(self, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin, values]."""
        out = np.empty((end - begin, self.values), np.uint8)
        unpack(self.words, self.bits, _KINDS[self.kind], self.strides, (begin, end - begin, 0, self.values), False, out)
        return out

    def columns_of(self, begin: int, end: int) -> np.ndarray:
        """Values [begin, end) of all lines, as uint8 [end - begin, lines]."""
        out = np.empty((end - begin, self.lines), np.uint8)
        unpack(self.words, self.bits, _KINDS[self.kind], self.strides, (0, self.lines, begin, end - begin), True, out)
        return out


def pack_words(count: int, bits: int, kind: str) -> int:
    """How many words hold `count` values."""
    return -(-count * bits // 32) if kind == "stream" else -(-count // (32 // bits))


def words_of(tensor: Tensor) -> np.ndarray:
    return tensor.data.view(np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """One quantised matrix: W[n, k] = scales[g, n] * (codes[n, k] - zeros[g, n]), where g = g_idx[k], or k // group_size without g_idx."""

    name: str  # the module: "model.layers.0.mlp.up_proj"
    file: str
    format: str  # "gptq", "awq" or "compressed-tensors"
    out_features: int
    in_features: int
    bits: int
    group_size: int  # at most in_features
    codes: Packed
    outputs_are_lines: bool  # of the packed codes; else the inputs are
    scales: np.ndarray  # [groups, out], float16, float32, or uint16 holding bfloat16 bits; a view
    zeros: np.ndarray | None  # int16 [groups, out]; None: 2^(bits - 1) everywhere (symmetric)
    g_idx: np.ndarray | None  # int32 [in]; None: groups lie in order
    nbytes: int  # of the tensors in the file

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Codes of outputs [begin, end): uint8 [end - begin, in]."""
        return self.codes.lines_of(begin, end) if self.outputs_are_lines else self.codes.columns_of(begin, end)

    def float_scales(self, begin: int, end: int) -> np.ndarray:
        """Scales of outputs [begin, end): float32 [end - begin, groups]."""
        part = np.ascontiguousarray(self.scales[:, begin:end].T)
        return (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else part.astype(np.float32)

    def zero_points(self, begin: int, end: int) -> np.ndarray:
        """Zeros of outputs [begin, end): int16 [end - begin, groups]."""
        if self.zeros is None:
            return np.full((end - begin, self.groups), 2 ** (self.bits - 1), np.int16)
        return np.ascontiguousarray(self.zeros[:, begin:end].T)

    def dequantize(self, dtype: str = "F32", done: Callable[[int], None] = lambda nbytes: None) -> Tensor:
        """The matrix [out, in] as F32, F16 or BF16, a block of rows after the other; done(bytes of the file) is called after each.

        The product is computed in float32, where it is exact for 16-bit scales, and rounded once to nearest even. Raises FoundError when
        the type cannot hold a value."""
        out = np.empty((self.out_features, self.in_features * BITS[dtype] // 8), np.uint8)
        lost = 0
        for begin in range(0, self.out_features, ROWS):
            end = min(begin + ROWS, self.out_features)
            block = out[begin:end].reshape(-1)
            scales, zeros = self.float_scales(begin, end), self.zero_points(begin, end)
            lost += dequantize_groups(self.rows(begin, end), self.in_features, scales, zeros, self.g_idx, self.group_size, block, dtype)
            done(self.nbytes * end // self.out_features - self.nbytes * begin // self.out_features)
        if lost:
            found = f"{lost} of its weights are NaN, infinite or too large for {dtype}"
            raise FoundError(Finding("scales", self.file, self.name, found, "finite numbers", "llmcoopt lint tells where they are"))
        out.flags.writeable = False
        return Tensor(f"{self.name}.weight", dtype, (self.out_features, self.in_features), out.reshape(-1), self.file)

    def __repr__(self):
        order = "act-order" if self.g_idx is not None else "in order"
        return (
            f"QuantizedWeight({self.name!r}, {self.format}, [{self.out_features}, {self.in_features}], {self.bits} bits, "
            f"groups of {self.group_size} {order})"
        )


def with_progress(run: Callable[[QuantizedWeight, Callable[[int], None]], Tensor], weights: list[QuantizedWeight]) -> list[Tensor]:
    """[run(weight, done) for weight in weights] on all threads, where `run` calls done(bytes of the file) as it goes, with a progress bar on a
    terminal when there is much to read."""
    from tqdm.auto import tqdm

    total = sum(weight.nbytes for weight in weights)
    quiet = None if total >= PROGRESS_BYTES else True  # None: a bar on a terminal only
    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading quantised weights", disable=quiet) as bar:

        def done(nbytes):
            with lock:
                bar.update(nbytes)

        return in_threads(lambda weight: run(weight, done), weights)

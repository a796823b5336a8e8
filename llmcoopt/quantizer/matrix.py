"""One matrix to integers: GPTQ or rounding to nearest, by the steps of csrc/quant, and its tensors as GPTQ files have them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._core import dequantize_groups
from ..errors import NumericError
from ..loaders.safetensors import BITS
from .options import Options

BLOCK = 128  # columns of one step: LCO_QUANT_BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """W[n, k] = scales[n, g_idx[k]] * (codes[n, k] - zeros[n, g_idx[k]])."""

    codes: np.ndarray  # uint8 [out, in]
    scales: np.ndarray  # float32 [out, groups], numbers that float16 has
    zeros: np.ndarray  # uint8 [out, groups]
    g_idx: np.ndarray  # int32 [in]
    loss: float  # squared error of the outputs over the calibration tokens, damping included; 0 for rounding to nearest

    def decode(self, dtype: str) -> np.ndarray:
        """The matrix as loading decodes it: float32, float16, or uint16 holding bfloat16 bits, [out, in]."""
        out = np.empty((*self.codes.shape, BITS[dtype] // 8), np.uint8)
        dequantize_groups(self.codes, self.codes.shape[1], self.scales, self.zeros.astype(np.int16), self.g_idx, 1, out.reshape(-1), dtype)
        return out.view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])[..., 0]


class Hessian:
    """The sums over calibration tokens that GPTQ needs of a matrix's inputs, and the order and factor that follow from them."""

    def __init__(self, context, inputs: int):
        self.context, self.sums, self.rows = context, np.zeros((inputs, inputs)), 0
        self._factors: dict[tuple[bytes, float], np.ndarray] = {}

    def add(self, rows: np.ndarray) -> None:
        """rows: float32 [tokens, inputs]."""
        self.context.hessian_add(self.sums, rows)
        self.rows += len(rows)

    @property
    def diagonal(self) -> np.ndarray:
        return np.diagonal(self.sums)

    def check(self, where: str) -> None:
        if not np.isfinite(self.diagonal).all():
            bad = int(np.flatnonzero(~np.isfinite(self.diagonal))[0])
            raise NumericError(f"{where}: its input {bad} is NaN or infinite, or its square too large, for some of the calibration text")

    def factor(self, columns: np.ndarray, damp: float, where: str) -> np.ndarray:
        """As inverse_factor gives it, for columns in this order; kept, as several matrices share their inputs."""
        key = columns.tobytes(), damp
        if key not in self._factors:
            live = self.diagonal[self.diagonal > 0]
            factor = np.empty(self.sums.shape, np.float32)
            added = damp * float(live.mean()) if len(live) else 0.0
            if not self.context.inverse_factor(factor, self.sums, columns, added):
                raise NumericError(
                    f"{where}: {self.rows} rows of calibration inputs do not determine its {len(columns)} inputs: "
                    f"expected more text, or a damp above {damp:g}"
                )
            self._factors[key] = factor
        return self._factors[key]


def sweep_order(diagonal: np.ndarray | None, inputs: int, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The columns in the order in which they are rounded, and the group of each in that order; int32 both."""
    size = inputs if options.group == -1 else min(options.group, inputs)
    own = np.arange(inputs, dtype=np.int32) // size
    if options.order == "none" or diagonal is None:
        return np.arange(inputs, dtype=np.int32), own
    by_size = np.argsort(-diagonal, kind="stable").astype(np.int32)
    if options.order == "columns":
        return by_size, own
    if options.order == "static":
        return by_size, own[by_size]
    sums = np.add.reduceat(diagonal, np.arange(0, inputs, size))
    rank = np.empty(len(sums), np.int32)
    rank[np.argsort(-sums, kind="stable")] = np.arange(len(sums), dtype=np.int32)
    columns = by_size[np.argsort(rank[own[by_size]], kind="stable")]
    return columns, own[columns]


def blocks(group_of: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of at most 128 columns. A group that a range does not begin with lies in it whole, so that its scale comes from weights that make
    up for all columns before it."""
    edges = [0, *(np.flatnonzero(np.diff(group_of)) + 1).tolist(), len(group_of)]
    found, begin = [], 0
    for start, end in itertools.pairwise(edges):
        if end - begin <= BLOCK:
            continue
        if start > begin:
            found.append((begin, start))
        begin = start
        while end - begin > BLOCK:
            found.append((begin, begin + BLOCK))
            begin += BLOCK
        if begin > start:
            found.append((begin, end))
            begin = end
    return found + ([(begin, len(group_of))] if begin < len(group_of) else [])


def quantize_matrix(
    context, weight: np.ndarray, hessian: Hessian | None, options: Options, where: str = "", step: Callable[[int], None] = lambda n: None
) -> Quantized:
    """weight: float32 [out, in], finite. hessian: of its inputs; None: round to nearest. step(columns) is called as they are done."""
    outputs, inputs = weight.shape
    diagonal = None if hessian is None else hessian.diagonal
    columns, group_of = sweep_order(diagonal, inputs, options)
    least_zero = int(options.format == "gptq" and not options.sym)
    how = {"bits": options.bits, "sym": options.sym, "least_zero": least_zero, "exponent": options.mse}
    w = np.ascontiguousarray(weight[:, columns])
    if hessian is not None:
        w[:, diagonal[columns] == 0] = 0  # these never had an input: 0 is as good as any and costs the others nothing
    groups = int(group_of.max()) + 1
    codes, scales = np.empty(w.shape, np.uint8), np.empty((outputs, groups), np.float32)
    zeros, loss = np.empty((outputs, groups), np.uint8), np.zeros(outputs)

    def sweep(w, factor, group_of, find=True):
        for begin, end in blocks(group_of) if find else steps(inputs):
            if not context.sweep_block(w, factor, codes, scales, zeros, loss, group_of, (begin, end), find=find, **how):
                raise NumericError(f"{where}: weights are too large: a scale is beyond float16's 65,504")
            step(end - begin)

    factor = None if hessian is None else hessian.factor(columns, options.damp, where)
    found_before = hessian is not None and options.order == "static"
    if found_before:
        placed = np.empty_like(w)
        placed[:, columns] = w
        sweep(placed, None, np.sort(group_of))
    sweep(w, factor, group_of, find=not found_before)
    ordered, g_idx = np.empty_like(codes), np.empty(inputs, np.int32)
    ordered[:, columns], g_idx[columns] = codes, group_of
    return Quantized(ordered, scales, zeros, g_idx, float(loss.sum()))


def steps(inputs: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, inputs)) for begin in range(0, inputs, BLOCK)]


# ---------------------------------------------------------------- GPTQ's tensors


def pack(lines: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [lines, n] -> uint32 [lines, ceil(n * bits / 32)]: one run of bits a line, lowest first, zeros at its end."""
    n, words = lines.shape[1], -(-lines.shape[1] * bits // 32)
    if bits == 8:
        padded = np.zeros((len(lines), words * 4), np.uint8)
        padded[:, :n] = lines
        return padded.view("<u4")
    each = np.zeros((len(lines), words * 32), np.uint8)
    run = each[:, : n * bits].reshape(len(lines), n, bits)
    for bit in range(bits):
        run[:, :, bit] = lines >> bit & 1
    return np.packbits(each, axis=1, bitorder="little").view("<u4")


def pack_zeros(zeros: np.ndarray, bits: int, v1: bool) -> np.ndarray:
    """uint8 [groups, out] -> uint32 [groups, words]. Version 1 stores one less; zeros are 1 or more there, so no field borrows."""
    return pack(zeros - 1 if v1 else zeros, bits)


def gptq_tensors(found: Quantized, options: Options) -> dict[str, tuple[str, np.ndarray]]:
    """The module's tensors by last name: (safetensors' dtype, array)."""
    rows = 512  # packed at a time: a byte a bit is needed on the way
    words = [pack(found.codes[at : at + rows], options.bits) for at in range(0, len(found.codes), rows)]
    qweight = np.ascontiguousarray(np.concatenate(words).T).view(np.int32)
    qzeros = pack_zeros(np.ascontiguousarray(found.zeros.T), options.bits, options.format == "gptq").view(np.int32)
    scales = np.ascontiguousarray(found.scales.T.astype(np.float16))
    return {"qweight": ("I32", qweight), "qzeros": ("I32", qzeros), "scales": ("F16", scales), "g_idx": ("I32", found.g_idx)}

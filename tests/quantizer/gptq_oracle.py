"""GPTQ of one matrix in float64 NumPy, column by column, without blocks: what csrc/quant must compute.

weight [N, K], Hessian [K, K] = sum over tokens of x x^T (any factor: it cancels), codes [N, K], scales and zeros [G, N], g_idx [K]."""

import numpy as np


def scale_and_zero(part, bits, sym, least_zero=0, exponent=0.0):
    """(scale, zero) of weights [N, n] that share them: float16 scales as float64 [N], zeros [N].

    exponent > 0: of 80 ranges, from the whole one down to a fifth, the one whose sum of |error|^exponent is least."""
    low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
    if sym:
        high = np.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = np.where(empty, -1.0, low), np.where(empty, 1.0, high)
    best = candidate(low, high, bits, sym, least_zero)
    if exponent <= 0:
        return best
    lost = range_error(part, *best, bits, exponent)
    for i in range(1, 80):
        shrink = float(np.float32(1) - np.float32(i) / np.float32(100))
        scale, zero = candidate(low * shrink, high * shrink, bits, sym, least_zero)
        now = range_error(part, scale, zero, bits, exponent)
        better = now < lost
        best = np.where(better, scale, best[0]), np.where(better, zero, best[1])
        lost = np.where(better, now, lost)
    return best


def candidate(low, high, bits, sym, least_zero):
    top = 2**bits - 1
    scale = float16_scale((high - low) / top)
    if sym:
        return scale, np.full(scale.shape, 2.0 ** (bits - 1))
    zero = np.clip(np.round(-low / scale), 0, top)
    raised = zero < least_zero  # the range below 0 loses nothing by it, that above is one code shorter
    return np.where(raised, float16_scale((high - low) / (top - least_zero)), scale), np.where(raised, least_zero, zero)


def float16_scale(scale):
    return np.maximum(np.asarray(scale, np.float32).astype(np.float16).astype(np.float64), 2.0**-24)


def range_error(part, scale, zero, bits, exponent):
    return (np.abs(part - values_of(round_to(part, scale, zero, bits), scale, zero)) ** exponent).sum(axis=1)


def round_to(x, scale, zero, bits):
    """Codes of columns x [N, n] under one scale and zero a row."""
    return np.clip(np.round(x / scale[:, None]) + zero[:, None], 0, 2**bits - 1)


def values_of(codes, scale, zero):
    return scale[:, None] * (codes - zero[:, None])


def sweep_order(diagonal, group, order):
    """(columns in the order in which they are rounded, group of each column in that order, whether groups are found before the sweep).

    order: "none", "columns" (by the Hessian's diagonal), "static" (the same, with groups as the columns lie) or "groups" (whole groups by the
    sum of their diagonal, and columns within a group by theirs)."""
    k = len(diagonal)
    size = k if group == -1 else min(group, k)
    own = np.arange(k) // size
    if order == "none":
        return np.arange(k), own, False
    by_size = np.argsort(-diagonal, kind="stable")
    if order == "columns":
        return by_size, own, False
    if order == "static":
        return by_size, own[by_size], True
    sums = np.add.reduceat(diagonal, np.arange(0, k, size))
    ranked = np.argsort(-sums, kind="stable")
    columns = np.concatenate([by_size[own[by_size] == g] for g in ranked])
    return columns, own[columns], False


def factor(hessian, damp):
    """Upper triangular U with (H + damp * mean(diag H) of inputs that are not always 0)^-1 = U^T U."""
    h, diagonal = hessian.copy(), np.diag(hessian)
    live = diagonal > 0
    h[np.diag_indices_from(h)] += damp * (diagonal[live].mean() if live.any() else 0)
    h[~live, ~live] += 1.0
    return np.linalg.cholesky(np.linalg.inv(h)).T


def gptq(weight, hessian, bits=4, group=128, sym=True, order="none", damp=0.01, least_zero=0, exponent=0.0):
    """(codes, scales, zeros, g_idx, loss [N]): by GPTQ, or by rounding to nearest when hessian is None."""
    run = Sweep(weight, hessian, bits, group, sym, order, damp, least_zero, exponent)
    for i in range(weight.shape[1]):
        g = run.group_of[i]
        if run.begins(i):
            run.scales[g], run.zeros[g] = run.grid(i)
        run.take(i, round_to(run.w[:, i : i + 1], run.scales[g], run.zeros[g], bits)[:, 0])
    codes, g_idx = np.empty(weight.shape, np.int64), np.empty(weight.shape[1], np.int64)
    codes[:, run.columns], g_idx[run.columns] = run.codes, run.group_of
    return codes, run.scales, run.zeros.astype(np.int64), g_idx, run.loss


def verify(found, weight, hessian, bits=4, group=128, sym=True, order="none", damp=0.01, least_zero=0, exponent=0.0):
    """Whether codes, scales and zeros that another computed are those of GPTQ but for its rounding: each is taken as it is, and compared with what
    would have been taken there. (One code that rounds to the other side of a tie changes all that come after it in its row.)

    found: codes [N, K], scales [G, N], zeros [G, N], g_idx [K]. Returns (by how many steps the worst code is farther than half a step from its
    weight, the largest relative difference of a scale, the largest difference of a zero, loss [N], whether g_idx is right)."""
    codes, scales, zeros, g_idx = found
    run = Sweep(weight, hessian, bits, group, sym, order, damp, least_zero, exponent)
    drift = scale_off = zero_off = 0.0
    for i in range(weight.shape[1]):
        g = run.group_of[i]
        if run.begins(i):
            scale, zero = run.grid(i)
            if exponent > 0:  # ranges whose errors are nearly the same: either will do
                part = run.w[:, run.group_of == g]
                errors = [range_error(part, s, z, bits, exponent) for s, z in ((scales[g], zeros[g]), (scale, zero))]
                scale_off = max(scale_off, float(((errors[0] - errors[1]) / np.maximum(errors[1], 1e-30)).max()))
            else:
                scale_off = max(scale_off, float(np.abs(scales[g] / scale - 1).max()))
                zero_off = max(zero_off, float(np.abs(zeros[g] - zero).max()))
            run.scales[g], run.zeros[g] = scales[g], zeros[g]
        steps = np.clip(run.w[:, i] / run.scales[g] + run.zeros[g], 0, 2**bits - 1)
        given = codes[:, run.columns[i]]
        drift = max(drift, float((np.abs(steps - given) - 0.5).max()))
        run.take(i, given)
    return drift, scale_off, zero_off, run.loss, bool((g_idx[run.columns] == run.group_of).all())


class Sweep:
    """The state of GPTQ on its way, columns in the order of the sweep."""

    def __init__(self, weight, hessian, bits, group, sym, order, damp, least_zero, exponent):
        n, k = weight.shape
        self.how = (bits, sym, least_zero, exponent)
        diagonal = np.ones(k) if hessian is None else np.diag(hessian)
        self.columns, self.group_of, self.static = sweep_order(diagonal, group, order)
        self.w = np.where(diagonal[self.columns] > 0, weight[:, self.columns], 0).astype(np.float64)
        self.first = self.w.copy()
        self.u = None if hessian is None else factor(hessian[np.ix_(self.columns, self.columns)], damp)
        self.scales, self.zeros = np.zeros((2, int(self.group_of.max()) + 1, n))
        self.codes, self.loss = np.zeros((n, k)), np.zeros(n)

    def begins(self, i):
        """Whether column i is the first of its group."""
        return not (self.group_of[:i] == self.group_of[i]).any()

    def grid(self, i):
        """Scale and zero of column i's group: from the weights as they are when it is met, or, static, as they were at first."""
        return scale_and_zero((self.first if self.static else self.w)[:, self.group_of == self.group_of[i]], *self.how)

    def take(self, i, codes):
        """Column i gets these codes, and the columns after it make up for its error."""
        g = self.group_of[i]
        self.codes[:, i] = codes
        if self.u is not None:
            error = (self.w[:, i] - values_of(codes[:, None], self.scales[g], self.zeros[g])[:, 0]) / self.u[i, i]
            self.loss += error**2
            self.w[:, i + 1 :] -= error[:, None] * self.u[i, i + 1 :]

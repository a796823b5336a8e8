"""GPTQ of one matrix in float64 NumPy, column by column, without blocks: what csrc/quant must compute. Also packing as files have it.

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


def gptq(weight, hessian, bits=4, group=128, sym=True, order="none", damp=0.01, least_zero=0, exponent=0.0, forced=None):
    """(codes, scales, zeros, g_idx, loss [N], drift): by GPTQ, or by rounding to nearest when hessian is None.

    forced: codes to take in place of the nearest ones. drift is then the largest distance, in steps, of a weight as it was when its turn came
    from the nearest point that its forced code stands for, beyond the half step that rounding may lose: 0 but for rounding of the other side."""
    n, k = weight.shape
    diagonal = np.ones(k) if hessian is None else np.diag(hessian)
    columns, group_of, static = sweep_order(diagonal, group, order)
    w = np.where(diagonal[columns] > 0, weight[:, columns], 0).astype(np.float64)
    u = None if hessian is None else factor(hessian[np.ix_(columns, columns)], damp)
    groups = int(group_of.max()) + 1
    scales, zeros, codes = np.zeros((groups, n)), np.zeros((groups, n)), np.zeros((n, k))
    if static:
        whole = np.where(diagonal > 0, weight, 0).astype(np.float64)
        for g in range(groups):
            scales[g], zeros[g] = scale_and_zero(whole[:, columns[group_of == g]], bits, sym, least_zero, exponent)
    loss, drift = np.zeros(n), 0.0
    for i in range(k):
        g = group_of[i]
        if not static and (i == 0 or group_of[i - 1] != g):
            scales[g], zeros[g] = scale_and_zero(w[:, group_of == g], bits, sym, least_zero, exponent)
        codes[:, i] = round_to(w[:, i : i + 1], scales[g], zeros[g], bits)[:, 0]
        if forced is not None:
            steps = np.clip(w[:, i] / scales[g] + zeros[g], 0, 2**bits - 1)
            codes[:, i] = forced[:, columns[i]]
            drift = max(drift, float((np.abs(steps - codes[:, i]) - 0.5).max()))
        if u is not None:
            error = (w[:, i] - values_of(codes[:, i : i + 1], scales[g], zeros[g])[:, 0]) / u[i, i]
            loss += error**2
            w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
    found, g_idx = np.zeros((n, k), np.int64), np.zeros(k, np.int64)
    found[:, columns], g_idx[columns] = codes, group_of
    return found, scales, zeros.astype(np.int64), g_idx, loss, drift

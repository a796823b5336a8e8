"""The specification of quantised weights, in NumPy: how small integers are packed into 32-bit words, and what number each stands for.

A weight is stored as a small integer (a *code*) with `bits` bits. Consecutive inputs share a *group*, and each group has a scale and a zero
point for every output:

    W[n, k] = scales[g, n] * (q[n, k] - zeros[g, n])        n: output, k: input, g = g_idx[k]

Ordinarily g = k // group_size. Quantisers that order inputs by importance (act-order, "desc_act") store g_idx instead.

Everything else is packing. Words are unsigned and little-endian; the first value has the lowest bits. Shapes stand in comments: N outputs,
K inputs, G groups, b bits.
"""

import numpy as np

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an AWQ word holds this one of its eight columns


def unpack_stream(words, bits, count):
    """[lines, words] -> [lines, count]: value i is bits [i * b, (i + 1) * b) of the line. 3-bit values straddle words. GPTQ packs so."""
    words = np.ascontiguousarray(words).view(np.uint32)
    stream = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1  # [lines, words, 32]
    stream = stream.reshape(len(words), -1)[:, : count * bits].reshape(len(words), count, bits)
    return (stream << np.arange(bits, dtype=np.uint32)).sum(axis=2)


def unpack_whole(words, bits, count):
    """[lines, words] -> [lines, count]: 32 // b values a word, the bits that are left over on top. compressed-tensors packs so."""
    words = np.ascontiguousarray(words).view(np.uint32)
    places = bits * np.arange(32 // bits, dtype=np.uint32)
    return ((words[:, :, None] >> places) & (2**bits - 1)).reshape(len(words), -1)[:, :count]


def unpack_awq(words, count):
    """[lines, words] -> [lines, count]: eight nibbles a word, for the columns AWQ_COLUMNS."""
    nibbles = unpack_whole(words, 4, 8 * np.shape(words)[1]).reshape(len(words), -1, 8)
    values = np.empty_like(nibbles)
    values[:, :, AWQ_COLUMNS] = nibbles
    return values.reshape(len(words), -1)[:, :count]


def gptq_zeros(qzeros, bits, outputs, v1):
    """Effective zeros [G, N] of GPTQ's qzeros [G, N * b / 32].

    Version 2 stores the zeros. Version 1 stores one less, subtracted from whole words, so that a zero of 0 borrows from its neighbour: adding
    one to every field of the word at once, modulo 2^32, undoes that. 3-bit fields cross words and are stored one less each, modulo 8."""
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    if v1 and bits != 3:
        ones = sum(1 << at for at in range(0, 32, bits))
        words = words + np.uint32(ones)  # wraps
    zeros = unpack_stream(words, bits, outputs)
    return (zeros + 1) % 8 if v1 and bits == 3 else zeros


def dequantize(codes, scales, zeros, g_idx):
    """float64 [N, K]: the formula on top. codes [N, K], scales and zeros [G, N], g_idx [K]."""
    scales, zeros = np.asarray(scales, np.float64), np.asarray(zeros, np.int64)
    return scales[g_idx].T * (np.asarray(codes, np.int64) - zeros[g_idx].T)


def gptq(qweight, qzeros, scales, g_idx, bits, v1):
    """float64 [N, K] of a GPTQ linear: qweight [K * b / 32, N] is packed along its rows, qzeros along its columns."""
    codes = unpack_stream(np.asarray(qweight).T, bits, len(g_idx))
    return dequantize(codes, scales, gptq_zeros(qzeros, bits, np.shape(scales)[1], v1), g_idx)


def awq(qweight, qzeros, scales):
    """float64 [N, K] of an AWQ ("gemm") linear: qweight [K, N / 8] and qzeros [G, N / 8] are packed along the outputs, 4 bits."""
    inputs, outputs = np.shape(qweight)[0], np.shape(scales)[1]
    g_idx = np.arange(inputs) // (inputs // len(scales))
    return dequantize(unpack_awq(qweight, outputs).T, scales, unpack_awq(qzeros, outputs), g_idx)


def compressed(weight_packed, weight_scale, weight_zero_point, g_idx, bits, shape):
    """float64 [N, K] of a compressed-tensors "pack-quantized" linear: weight_packed [N, K / p] holds signed values plus 2^(b-1), weight_scale
    is [N, G], and weight_zero_point [N / p, G] (None: symmetric) is packed along the outputs, with the same addition. p = 32 // b."""
    codes = unpack_whole(weight_packed, bits, shape[1])
    scales = np.asarray(weight_scale).T
    if weight_zero_point is None:
        zeros = np.full(scales.shape, 2 ** (bits - 1))
    else:
        zeros = unpack_whole(np.asarray(weight_zero_point).T, bits, shape[0])
    return dequantize(codes, scales, zeros, g_idx)

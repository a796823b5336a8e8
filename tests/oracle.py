"""What every operator must compute, in NumPy float64, and a paged cache to compute it on. The one oracle of the operator tests."""

import numpy as np

from llmcoopt import _core

EPS = 2.0**-24  # half a unit in the last place of float32 at 1
DTYPES = ("float32", "float16", "bfloat16")
SCALED = ("fp8_e4m3", "fp8_e5m2", "int8")  # one byte and a scale: csrc/base/codes.h
BLOCK = 16  # tokens that share a scale


def encode(x, dtype):
    """float32 values as stored: float32, or the uint16 bits of float16 (saturating) or bfloat16, nearest even."""
    x = np.asarray(x, np.float32)
    if dtype == "float32":
        return x.copy()
    if dtype == "float16":
        return np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
    u = x.view(np.uint32).astype(np.uint64)
    rounded = (u + 0x7FFF + (u >> 16 & 1)) >> 16
    return np.where(np.isnan(x), u >> 16 | 0x40, rounded).astype(np.uint16)


def decode(codes, dtype):
    """Stored elements as float32."""
    if dtype == "float32":
        return codes.astype(np.float32)
    if dtype == "float16":
        return codes.view(np.float16).astype(np.float32)
    return (codes.astype(np.uint32) << 16).view(np.float32)


def code_values(dtype):
    """What each of the 256 codes of a one-byte type means, without its scale. A NaN code is NaN; e5m2's infinities are never written."""
    code = np.arange(256)
    if dtype == "int8":
        return code.astype(np.uint8).view(np.int8).astype(np.float64)
    mantissa, bias = {"fp8_e4m3": (3, 7), "fp8_e5m2": (2, 15)}[dtype]
    exponent, fraction = (code & 127) >> mantissa, code & ((1 << mantissa) - 1)
    magnitude = np.where(exponent > 0, fraction + (1 << mantissa), fraction) * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa)
    magnitude = np.where((code & 127) > {"fp8_e4m3": 0x7E, "fp8_e5m2": 0x7B}[dtype], np.nan, magnitude)
    return np.where(code < 128, magnitude, -magnitude)


def block_scale(largest, dtype):
    """The scale for values up to `largest`: float32, of any shape. NaN for NaN and infinity."""
    largest = np.asarray(largest, np.float64)
    if dtype == "int8":
        scale = np.maximum(largest.astype(np.float32) / np.float32(127), np.float32(2.0**-126))
    else:
        top = np.nanmax(code_values(dtype))
        with np.errstate(invalid="ignore"):
            mantissa, exponent = np.frexp(largest / top)  # in [0.5, 1) * 2^exponent
        scale = np.where(largest == 0, 0, np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent)))
    return np.where(np.isfinite(largest), np.maximum(scale, 2.0**-126), np.nan).astype(np.float32)


def encode_scaled(x, scale, dtype):
    """The nearest codes, ties to even, saturating, of float32 values under float32 scales. NaN codes: 0x7F (int8: 0)."""
    with np.errstate(all="ignore"):
        x = x.astype(np.float32) / scale.astype(np.float32)
    values = code_values(dtype)
    if dtype == "int8":
        return np.where(np.isnan(x), 0, np.rint(np.clip(x, -127, 127))).astype(np.int8).view(np.uint8)
    finite = values[:128][np.isfinite(values[:128])]
    middle = (finite[:-1] + finite[1:]) / 2
    magnitude = np.abs(x).astype(np.float64)
    below, above = np.searchsorted(middle, magnitude, "left"), np.searchsorted(middle, magnitude, "right")  # they differ at a tie
    code = np.where(below % 2 == 0, below, above) | np.where(np.signbit(x), 0x80, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def embed(ids, table, dtype):
    return decode(table, dtype)[ids]


def rmsnorm(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def linear(x, w, dtype, bias=None):
    y = x.astype(np.float64) @ decode(w, dtype).astype(np.float64).T
    return y if bias is None else y + bias


def swiglu(gate, up):
    gate = gate.astype(np.float64)
    return gate / (1 + np.exp(-gate)) * up


def rope(x, cos, sin):
    """x[m, heads, d] rotated by cos, sin [m, d/2]: pairs i and i + d/2."""
    a, b = np.split(x.astype(np.float64), 2, axis=-1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(q, k, v, pos, scale, window=0, sinks=0):
    """Rows q[m, heads, d] at positions pos.. over k, v [tokens, kv_heads, d] of one sequence: (out[m, heads, d], bound[m, heads, d]).

    bound is the rounding model: an error of `bound` is one of EPS in every score's largest product sum and in every weight."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
    q = q.astype(np.float64)
    scores = np.einsum("mhd,thd->hmt", q, k) * scale
    magnitude = np.einsum("mhd,thd->hmt", np.abs(q), np.abs(k)) * abs(scale)
    t, own = np.arange(len(k)), pos + np.arange(len(q))[:, None]
    visible = (t <= own) & ((window == 0) | (t > own - window) | (t < sinks))
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("hmt,thd->mhd", p, v)
    worst = np.where(visible, magnitude, 0).max(-1).T[..., None]
    return out, EPS * (1 + worst) * np.einsum("hmt,thd->mhd", p, np.abs(v))


def attention_buffered(q, coded, own, pos, scale, window=0, sinks=0, residual=BLOCK, n_first=0):
    """attention() where a row reads the stretch of `residual` positions that it is in, and the first n_first, from `own` (k, v), all others from
    `coded` (k, v)."""
    parts, end = [], pos + len(q)
    for begin in range(pos // residual * residual, end, residual):
        first, stop, few = max(begin, pos), min(begin + residual, end), min(begin, n_first)
        k, v = (np.concatenate([b[:few], a[few:begin], b[begin:stop]]) for a, b in zip(coded, own, strict=True))
        parts.append(attention(q[first - pos : stop - pos], k, v, first, scale, window, sinks))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def turn(x, key):
    """Rows [..., head_dim] as csrc/base/hadamard.h turns them, float32 sum by float32 sum; float64 rows by the matrix itself."""
    n, d = x.shape[-1] & -x.shape[-1], x.shape[-1]
    bits = n.bit_length() - 1
    x = (x * 0.5 ** ((bits + key) // 2)).astype(x.dtype).reshape(-1, d // n, n)
    if x.dtype == np.float64:
        i = np.arange(n)
        return (x @ (-1.0) ** np.vectorize(lambda v: int(v).bit_count())(i[:, None] & i)).reshape(-1, d)
    h = 1
    while h < n:
        pairs = x.reshape(-1, d // n, n // (2 * h), 2, h)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(-1, d // n, n)
        h *= 2
    return x.reshape(-1, d)


def widest(page_size):
    """The longest stretch that a cache with such pages can have: what KVCache takes unless told otherwise."""
    return max(n for n in range(BLOCK, 65, BLOCK) if page_size % n == 0)


class Pages:
    """A cache of whole pages as csrc/base/formats.h lays them out, poisoned with NaN until written."""

    def __init__(self, n_pages, n_layers, n_kv_heads, head_dim, page_size, dtype):
        self.shape = n_layers, 2, n_kv_heads, page_size, head_dim
        self.n_layers, self.n_kv_heads, self.head_dim, self.page_size, self.dtype = n_layers, n_kv_heads, head_dim, page_size, dtype
        self.element = np.dtype({"float32": np.float32, "float16": np.uint16, "bfloat16": np.uint16}.get(dtype, np.uint8))
        self.scale_shape = n_layers, 2, n_kv_heads, page_size // BLOCK if self.element.itemsize == 1 else 0
        used = int(np.prod(self.shape[1:])) * self.element.itemsize + 4 * int(np.prod(self.scale_shape[1:]))
        self.slice_bytes = -(-used // 64) * 64
        self.page_bytes = n_layers * self.slice_bytes
        self.data = np.full(n_pages * self.page_bytes, 0xFF, np.uint8)

    def page(self, number):
        """Codes of a page, [layer, k|v, kv_head, token, head_dim], writable."""
        return self.part(number, 0, self.element, self.shape)

    def part(self, number, start, element, shape):
        """An array [layer, ...] that begins at byte `start` of every slice of a page, writable."""
        strides = (self.slice_bytes, *np.empty(shape[1:], element).strides)
        return np.ndarray(shape, element, self.data, number * self.page_bytes + start, strides)

    def write(self, table, layer, k, v, start=0):
        """k, v [tokens, kv_heads, d] to positions start.. of the sequence with this page table."""
        for t in range(len(k)):
            page = self.page(table[(start + t) // self.page_size])
            page[layer, 0, :, (start + t) % self.page_size] = encode(k[t], self.dtype)
            page[layer, 1, :, (start + t) % self.page_size] = encode(v[t], self.dtype)

    def read(self, table, layer, tokens):
        """(k, v) as float32, [tokens, kv_heads, d]."""
        pages = np.stack([self.page(p)[layer] for p in table[: -(-tokens // self.page_size)]])
        k, v = (decode(np.ascontiguousarray(pages[:, i].transpose(0, 2, 1, 3)), self.dtype) for i in (0, 1))
        return tuple(a.reshape(-1, self.n_kv_heads, self.head_dim)[:tokens] for a in (k, v))

    @property
    def where(self):
        """Arguments of rope_append and attention that describe the cache."""
        return {"cache": self.data, "dtype": self.dtype, "page_size": self.page_size, "n_layers": self.n_layers}


class CodedPages(Pages):
    """Pages of one-byte codes and scales. Rows are given from position 0 on, for what a block's codes are depends on all of its rows."""

    def __init__(self, n_pages, n_layers, n_kv_heads, head_dim, page_size, dtype, residual=BLOCK, n_first=0):
        super().__init__(n_pages, n_layers, n_kv_heads, head_dim, page_size, dtype)
        self.made = n_pages, n_layers, n_kv_heads, head_dim, page_size, dtype, residual, n_first
        self.residual, self.n_first = residual, n_first
        self.tail_shape = n_layers, 2, n_kv_heads, residual, head_dim
        self.firsts = np.full((n_pages, n_layers, 2, n_kv_heads, n_first, head_dim), 0xFFFF, np.uint16)

    @property
    def where(self):
        return super().where | {"buffer": (self.residual, self.firsts.reshape(len(self.firsts), -1).view(np.uint8))}

    def scales(self, number):
        """Scales of a page, [layer, k|v, kv_head, block], writable."""
        return self.part(number, int(np.prod(self.shape[1:])), np.float32, self.scale_shape)

    def blank(self):
        """A cache of the same shape, all poison."""
        return CodedPages(*self.made)

    def new_tail(self, blocks=0):
        """A poisoned tail, uint16 [layer, k|v, kv_head, residual, head_dim]; with `blocks`: of so many layers."""
        return np.full((blocks or self.n_layers, *self.tail_shape[1:]), 0xFFFF, np.uint16)

    def block(self, table, layer, which, position):
        """Codes [kv_head, 16, head_dim] of the block of a position, and a view [kv_head] of its scales."""
        page, at = table[position // self.page_size], position % self.page_size // BLOCK
        return self.page(page)[layer, which, :, at * BLOCK : (at + 1) * BLOCK], self.scales(page)[layer, which, :, at]

    def write(self, table, layer, k, v):
        """k, v [tokens, kv_heads, d]: every whole block as a cache with a write buffer quantises it. The rest is the tail's."""
        for which, rows in enumerate((k, v)):
            rows = decode(encode(rows, "bfloat16"), "bfloat16").transpose(1, 0, 2)
            self.firsts[table[0], layer, which, :, : rows.shape[1]] = encode(rows[:, : self.n_first], "bfloat16")
            for begin in range(0, rows.shape[1] - BLOCK + 1, BLOCK):
                values = rows[:, begin : begin + BLOCK]
                codes, scales = self.block(table, layer, which, begin)
                scales[:] = block_scale(np.abs(values).max((1, 2)), self.dtype)
                codes[:] = encode_scaled(values, scales[:, None, None], self.dtype)

    def write_widened(self, table, layer, k, v):
        """k, v [tokens, kv_heads, d]: each row quantised at once; one larger than those before it in its block rescales their codes."""
        n = len(k)
        for which, rows in enumerate((k, v)):
            padded = np.zeros((-(-n // BLOCK) * BLOCK, *k.shape[1:]), np.float32)
            padded[:n] = decode(encode(rows, "bfloat16"), "bfloat16")
            rows = padded.reshape(-1, BLOCK, *k.shape[1:]).transpose(1, 0, 2, 3)  # [16, block, head, d]: all blocks and heads at once
            codes, scales = np.zeros(rows.shape, np.uint8), np.zeros(rows.shape[1:3], np.float32)
            for at in range(min(BLOCK, n)):
                own = block_scale(np.abs(rows[at]).max(-1), self.dtype)
                wider = (own > scales) | np.isnan(own) | (at == 0)
                wider[-1] &= (len(scales) - 1) * BLOCK + at < n  # the last block may end here
                if at:
                    old = (code_values(self.dtype)[codes[:at]] * scales[..., None]).astype(np.float32)
                    codes[:at] = np.where(wider[..., None], encode_scaled(old, own[..., None], self.dtype), codes[:at])
                scales = np.where(wider, own, scales)
                codes[at] = encode_scaled(rows[at], scales[..., None], self.dtype)
            for begin in range(0, n, BLOCK):
                place, place_scales = self.block(table, layer, which, begin)
                place[:, : n - begin] = codes[: n - begin, begin // BLOCK].transpose(1, 0, 2)
                place_scales[:] = scales[begin // BLOCK]

    def read(self, table, layer, tokens):
        """(k, v) as float64, [tokens, kv_heads, d]."""
        values, result = code_values(self.dtype), []
        for which in (0, 1):
            blocks = [self.block(table, layer, which, t) for t in range(0, tokens, BLOCK)]
            rows = [values[codes] * scales.astype(np.float64)[:, None, None] for codes, scales in blocks]
            result.append(np.concatenate([r.transpose(1, 0, 2) for r in rows])[:tokens])
        return tuple(result)


def assert_close(found, expected, bound):
    """|found - expected| <= bound everywhere; says where it is worst, in units of the bound."""
    error = np.abs(found.astype(np.float64) - expected)
    ratio = error / np.maximum(bound, np.finfo(np.float64).tiny)
    if not (error <= bound).all():
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
        raise AssertionError(
            f"at {at}: found {found[at]}, expected {expected[at]}, {ratio[at]:.3g} times the bound of {np.broadcast_to(bound, ratio.shape)[at]:.3g}"
        )


def key_bounds(pages, layer):
    """[pages, kv_heads, 2, d] bfloat16 bits: the least and the largest key of each channel of every page, rounded outward; infinite where a key is
    not finite."""
    result = np.empty((len(pages.data) // pages.page_bytes, pages.n_kv_heads, 2, pages.head_dim), np.uint16)
    for number in range(len(result)):
        keys = pages.read([number], layer, pages.page_size)[0].astype(np.float32)
        for which, (end, sign) in enumerate(((keys.min(0), -1), (keys.max(0), 1))):
            end = np.where(np.isfinite(keys).all((0, 2))[:, None], end, np.float32(sign * np.inf))
            bits = end.view(np.uint32)
            result[number, :, which] = (bits >> 16) + ((bits & 0xFFFF != 0) & (np.signbit(end) == (sign < 0)))
    return result


def weights(q, k, scale, seen):
    """Attention weights of rows' heads q [heads, d] over keys k [tokens, kv_heads, d] where `seen` [tokens]: float64 [heads, tokens]."""
    scores = np.einsum("hd,thd->ht", q.astype(np.float64), np.repeat(k.astype(np.float64), len(q) // k.shape[1], 1)) * scale
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def aligned(size):
    """Zeroed uint8 [size] at a multiple of 64 bytes."""
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


class Quantized:
    """A random quantised weight [n, k]: codes, scales and zeros or offsets as arrays, `values` float64 by the formula, and `packed` for operators.

    group: inputs that share a scale; offsets: "none", "zeros" or "floats"; shuffled: groups are of inputs in any order."""

    def __init__(self, rng, n, k, bits=4, group=32, offsets="none", scale_dtype="float16", shuffled=False):
        self.bits, self.offsets, self.scale_dtype = bits, offsets, scale_dtype
        self.block = next(b for b in range(min(128, -(-group // 8) * 8), 0, -8) if group % b == 0 or group >= k)
        group = group if group % self.block == 0 else -(-k // self.block) * self.block
        self.groups, self.group, neutral = -(-k // group), group, 2 ** (bits - 1)
        self.codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
        self.scales = encode(rng.uniform(0.002, 0.02, (self.groups, n)), scale_dtype)
        self.zeros = rng.integers(0, 2**bits, (self.groups, n)).astype(np.int16) if offsets == "zeros" else None
        self.shifts = encode(rng.uniform(-0.2, 0.1, (self.groups, n)), scale_dtype) if offsets == "floats" else None
        self.order = rng.permutation(k).astype(np.int32) if shuffled else None
        self.g_idx = np.empty(k, np.int64)
        self.g_idx[np.arange(k) if self.order is None else self.order] = np.arange(k) // group
        scales = decode(self.scales, scale_dtype).astype(np.float64)[self.g_idx].T
        if offsets == "zeros":
            self.values = scales * (self.codes - self.zeros[self.g_idx].T.astype(np.int64))
        elif offsets == "floats":
            self.values = scales * self.codes + decode(self.shifts, scale_dtype).astype(np.float64)[self.g_idx].T
        else:
            self.values = scales * (self.codes.astype(np.int64) - neutral)
        # What a kernel sums: products with codes less neutral, and offsets.
        self.magnitude = scales * np.abs(self.codes - (0.0 if offsets == "floats" else neutral)) + np.abs(
            self.values - scales * (self.codes - (0.0 if offsets == "floats" else neutral))
        )
        kind = (bits, self.block, scale_dtype, offsets)
        self.packed = aligned(_core.pack_size(n, k, *kind, shuffled))
        _core.pack_begin(self.packed, n, k, *kind, self.order)
        where = (0, n, self.groups, group)
        assert _core.pack_rows(self.packed, self.codes, 0, 0, (0, n), self.scales, scale_dtype, self.zeros, self.shifts, where) == 0

    def rounding(self, x, int8=False):
        """What rounding x to integers may change in a product, at most: [m, n]."""
        k = x.shape[1]
        order = np.arange(k) if self.order is None else self.order
        largest, bound = 127 if int8 else 32639, np.zeros((len(x), len(self.codes)))
        for start in range(0, k, self.block):
            inputs = order[start : start + self.block]
            step = np.maximum(np.abs(x[:, inputs]).max(axis=1), 1e-30) / largest
            bound += 0.5001 * step[:, None] * np.abs(self.values[:, inputs]).sum(axis=1)
        return bound

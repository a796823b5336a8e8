"""What every operator must compute, in NumPy float64, and a paged cache to compute it on. The one oracle of the operator tests."""

import numpy as np

EPS = 2.0**-24  # half a unit in the last place of float32 at 1
DTYPES = ("float32", "float16", "bfloat16")


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


def attention(q, k, v, pos, scale, window=0):
    """Rows q[m, heads, d] at positions pos.. over k, v [tokens, kv_heads, d] of one sequence: (out[m, heads, d], bound[m, heads, d]).

    bound is the rounding model: an error of `bound` is one of EPS in every score's largest product sum and in every weight."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, axis=1) for a in (k, v))
    q = q.astype(np.float64)
    scores = np.einsum("mhd,thd->hmt", q, k) * scale
    magnitude = np.einsum("mhd,thd->hmt", np.abs(q), np.abs(k)) * abs(scale)
    t, own = np.arange(len(k)), pos + np.arange(len(q))[:, None]
    visible = (t <= own) & ((window == 0) | (t > own - window))
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("hmt,thd->mhd", p, v)
    worst = np.where(visible, magnitude, 0).max(-1).T[..., None]
    return out, EPS * (1 + worst) * np.einsum("hmt,thd->mhd", p, np.abs(v))


class Pages:
    """A cache of whole pages as csrc/base/formats.h lays them out, poisoned with NaN until written."""

    def __init__(self, n_pages, n_layers, n_kv_heads, head_dim, page_size, dtype):
        self.shape = n_layers, 2, n_kv_heads, page_size, head_dim
        self.n_layers, self.n_kv_heads, self.head_dim, self.page_size, self.dtype = n_layers, n_kv_heads, head_dim, page_size, dtype
        self.element = np.dtype(np.float32 if dtype == "float32" else np.uint16)
        self.used = int(np.prod(self.shape)) * self.element.itemsize
        self.page_bytes = -(-self.used // 64) * 64
        self.data = np.full(n_pages * self.page_bytes, 0xFF, np.uint8)

    def page(self, number):
        """Codes of a page, [layer, k|v, kv_head, token, head_dim], writable."""
        start = number * self.page_bytes
        return self.data[start : start + self.used].view(self.element).reshape(self.shape)

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


def assert_close(found, expected, bound):
    """|found - expected| <= bound everywhere; says where it is worst, in units of the bound."""
    error = np.abs(found.astype(np.float64) - expected)
    ratio = error / np.maximum(bound, np.finfo(np.float64).tiny)
    if not (error <= bound).all():
        at = np.unravel_index(np.nanargmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
        raise AssertionError(
            f"at {at}: found {found[at]}, expected {expected[at]}, {ratio[at]:.3g} times the bound of {np.broadcast_to(bound, ratio.shape)[at]:.3g}"
        )

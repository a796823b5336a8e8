"""fp8_e4m3 under scales that a checkpoint gives: the codes to the bit, and attention over them, on every instruction set."""

import numpy as np
import oracle
import pytest

BLOCK, BOUND = oracle.BLOCK, 8  # as in test_codes.py
SCALES = np.array([[0.0123, 1.7], [3.1e-5, 0.4]], np.float32)  # [k|v, kv_head]; the third saturates nearly everything


def written(ctx, k, v, pages, tails, pieces, scales=SCALES):
    """Rows k and v in pieces to layer 1. tails: two, or none in a cache without a write buffer."""
    table, at = np.arange(len(k) // pages.page_size + 1, dtype=np.int32), 0
    for m in pieces:
        own = [pages.new_tail((at + m - 1) // BLOCK - at // BLOCK + 1)] if tails else []
        item = (table, 0, m, at, m > 1, *(a.reshape(-1).view(np.uint8) for a in (*tails, *own)))
        one, zero = np.ones((m, k.shape[2] // 2), np.float32), np.zeros((m, k.shape[2] // 2), np.float32)
        rows = k[at : at + m].copy()
        ctx.rope_append(rows.copy(), rows, v[at : at + m], one, zero, **pages.where, layer=1, items=[item], scales=scales)
        if (at + m) // BLOCK > at // BLOCK:
            tails.reverse()
        at += m
    return table, item


def right_codes(x):
    """The specification: value times the reciprocal of the scale, both in float32, to the nearest code, saturating."""
    rounded = oracle.decode(oracle.encode(x, "bfloat16"), "bfloat16")
    return lambda scale: oracle.encode_scaled(rounded * (np.float32(1) / scale), np.float32(1), "fp8_e4m3")


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("pieces", [[112], [5, 40, *[1] * 20, 47]], ids=["whole", "pieces"])
def test_codes(ctx, rng, buffered, pieces):
    n, heads, d = 112, 2, 24
    k, v = (rng.standard_normal((n, heads, d)).astype(np.float32) * np.float32(size) for size in (3, 0.2))
    k[20, 0, 3], v[70, 1, 2] = 1e6, -0.0
    pages = oracle.CodedPages(n // 48 + 2, 2, heads, d, 48, "fp8_e4m3")
    table, _ = written(ctx, k, v, pages, [pages.new_tail(), pages.new_tail()] if buffered else [], pieces)
    for which, x in enumerate((k, v)):
        for head in range(heads):
            expected = right_codes(x[:, head])(SCALES[which, head])
            for begin in range(0, n, BLOCK):
                codes, scales = pages.block(table, 1, which, begin)
                assert scales[head] == SCALES[which, head]
                assert np.array_equal(codes[head], expected[begin : begin + BLOCK]), (which, head, begin)
    assert (pages.block(table, 1, 0, 20)[0][0, 4, 3] & 127) == 0x7E, "saturates at 448"


@pytest.mark.parametrize("scale", [0.0123, 1 / 3, 7.77e-5, 2.0**-100, 1.9e4])
def test_decoded_values_keep_their_codes(ctx, scale):
    """Also under a scale that is no power of two, and rounded to bfloat16: a block that comes back to the tail is quantised to the same again."""
    values = oracle.code_values("fp8_e4m3")
    codes = np.flatnonzero(np.isfinite(values)).astype(np.uint8)
    codes = np.resize(codes, 256)  # 16 rows of 16
    k = (values[codes] * np.float64(np.float32(scale))).astype(np.float32).reshape(16, 1, 16)
    pages = oracle.CodedPages(2, 2, 1, 16, 48, "fp8_e4m3")
    table, _ = written(ctx, k, k, pages, [pages.new_tail(), pages.new_tail()], [16], np.full((2, 1), scale, np.float32))
    for which in (0, 1):
        found = pages.block(table, 1, which, 0)[0].ravel()
        assert np.array_equal(values[found], values[codes])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_value_still_shows(ctx, rng, bad):
    """A block that holds NaN or infinity has NaN as its scale, fixed or not."""
    k, v = (rng.standard_normal((48, 2, 8)).astype(np.float32) for _ in range(2))
    k[17, 1, 0] = bad
    pages = oracle.CodedPages(2, 2, 2, 8, 48, "fp8_e4m3")
    table, _ = written(ctx, k, v, pages, [pages.new_tail(), pages.new_tail()], [48])
    scales = np.array([[pages.block(table, 1, which, t)[1] for t in (0, 16, 32)] for which in (0, 1)])
    assert np.argwhere(np.isnan(scales)).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("length, prompt", [(40, True), (1, False)])
def test_attention(ctx, rng, length, prompt):
    """Scales that are no powers of two."""
    n, heads, d = 131, 2, 64
    k, v = (rng.standard_normal((n, heads, d)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((length, 6, d)).astype(np.float32)
    scales = np.array([[0.0123, 0.0071], [0.00931, 0.3]], np.float32)
    pages = oracle.CodedPages(n // 48 + 2, 2, heads, d, 48, "fp8_e4m3")
    table, item = written(ctx, k, v, pages, [pages.new_tail(), pages.new_tail()], [n - length, length], scales)
    out = np.empty_like(q)
    ctx.attention(out, q, **pages.where, n_kv_heads=heads, layer=1, items=[item], scale=d**-0.5)
    own = tuple(oracle.decode(oracle.encode(x, "bfloat16"), "bfloat16") for x in (k, v))
    right, bound = oracle.attention_buffered(q, pages.read(table, 1, n // BLOCK * BLOCK), own, n - length, d**-0.5)
    oracle.assert_close(out, right, BOUND * bound)


def test_bad_arguments(ctx, rng):
    pages = oracle.CodedPages(2, 2, 2, 8, 48, "fp8_e4m3")
    k = rng.standard_normal((16, 2, 8)).astype(np.float32)
    for scales, text in (
        (SCALES[:1], "axis 0 of scales is 1"),
        (SCALES[:, :1], "axis 1 of scales"),
        (SCALES.astype(np.float64), "scales holds"),
    ):
        with pytest.raises(ValueError, match=text):
            written(ctx, k, k, pages, [pages.new_tail(), pages.new_tail()], [16], scales)

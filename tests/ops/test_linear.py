import ctypes
import mmap

import numpy as np
import oracle
import pytest

from llmcoopt import _core

# Rounding model: a lane's chain of fused multiply-adds rounds each step, so that the error is at most (length of the longest chain) EPS times the
# sum of |x w|; roundings fall either way, so a few EPS are what is seen. Observed: 4.9 at k = 1000, 1.0 with ref.
BOUND = 12
K = [1, 2, 7, 15, 16, 31, 33, 64, 100, 255, 577, 1056, 2500]


def rounded(x, ctx, dtype, m_prompt):
    """x as the op multiplies it: where the unit multiplies bfloat16, prompt rows are rounded to it for bfloat16 weights."""
    x = x.copy()
    if dtype == "bfloat16" and ("BF16" in ctx.detail or "bf16" in ctx.detail):
        x[:m_prompt] = oracle.decode(oracle.encode(x[:m_prompt], "bfloat16"), "bfloat16")
    return x


def bound(x, w, dtype, *added):
    magnitude = np.abs(x).astype(np.float64) @ np.abs(oracle.decode(w, dtype)).astype(np.float64).T
    return BOUND * oracle.EPS * (magnitude + sum(np.abs(a) for a in added)) + np.finfo(np.float32).tiny


def make(rng, m, n, k, dtype):
    return rng.standard_normal((m, k)).astype(np.float32), oracle.encode(rng.standard_normal((n, k)), dtype)


def run(ctx, x, w, dtype, m_prompt=0, bias=None):
    out = np.full((len(x), len(w)), np.nan, np.float32)
    ctx.linear(x, [(out, w, dtype, bias)], m_prompt=m_prompt)
    return out


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", K)
def test_against_oracle(ctx, rng, k, dtype):
    for i, m in enumerate((1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 50, 97)):
        for n in ((1, 8, 33), (3, 17, 67))[i % 2]:
            m_prompt = [0, m, m // 2][(m + k + n) % 3]
            x, w = make(rng, m, n, k, dtype)
            seen = rounded(x, ctx, dtype, m_prompt)
            oracle.assert_close(run(ctx, x, w, dtype, m_prompt), oracle.linear(seen, w, dtype), bound(seen, w, dtype))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("m, m_prompt", [(1, 0), (6, 0), (20, 20), (40, 37)])
def test_bias_and_accumulate_with_strided_rows(ctx, rng, m, m_prompt, dtype):
    n, k = 45, 130
    wide_x, w = make(rng, m, n, k + 19, dtype)
    w = np.ascontiguousarray(w[:, :k])
    x, bias = wide_x[:, 5 : 5 + k], rng.standard_normal(n).astype(np.float32)
    wide_out = rng.standard_normal((m, n + 11)).astype(np.float32)
    before = wide_out.copy()
    out = wide_out[:, 3 : 3 + n]
    seen = rounded(np.ascontiguousarray(x), ctx, dtype, m_prompt)
    expected = oracle.linear(seen, w, dtype, bias)
    ctx.linear(x, [(out, w, dtype, bias)], m_prompt=m_prompt)
    oracle.assert_close(out, expected, bound(seen, w, dtype, bias))
    out[:] = before[:, 3 : 3 + n]
    ctx.linear(x, [(out, w, dtype, bias)], m_prompt=m_prompt, accumulate=True)
    oracle.assert_close(out, expected + before[:, 3 : 3 + n], bound(seen, w, dtype, bias, before[:, 3 : 3 + n]))
    assert np.array_equal(wide_out[:, :3], before[:, :3]) and np.array_equal(wide_out[:, 3 + n :], before[:, 3 + n :])


@pytest.mark.parametrize("m, m_prompt", [(1, 0), (3, 0), (24, 24), (30, 24)])
def test_parts_of_any_kind_share_x(ctx, rng, m, m_prompt):
    k = 72
    x = rng.standard_normal((m, k)).astype(np.float32)
    parts = []
    for n, dtype in ((130, "bfloat16"), (7, "float16"), (66, "float32")):
        parts.append((np.empty((m, n), np.float32), oracle.encode(rng.standard_normal((n, k)), dtype), dtype, None))
    ctx.linear(x, parts, m_prompt=m_prompt)
    for out, w, dtype, _ in parts:
        seen = rounded(x, ctx, dtype, m_prompt)
        oracle.assert_close(out, oracle.linear(seen, w, dtype), bound(seen, w, dtype))
        assert np.array_equal(out, run(ctx, x, w, dtype, m_prompt))


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("k", [1, 70, 576, 1500])
def test_a_row_does_not_depend_on_the_others(isa, ctx, one_thread, rng, k, dtype):
    """Bit for bit: whatever m, the row's place in the batch, the number of threads, and the rows of weights beside."""
    if isa == "ref":
        pytest.skip("ref sums each output alone, in order")
    n, many = 150, 200
    x, w = make(rng, many, n, k, dtype)
    for m_prompt in (0, many):
        together = run(ctx, x, w, dtype, m_prompt)
        assert np.array_equal(together, run(one_thread, x, w, dtype, m_prompt))
        for m in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 49, 96):
            start = int(rng.integers(0, many - m))
            alone = run(ctx, x[start : start + m], w, dtype, min(m, m_prompt))
            assert np.array_equal(alone, together[start : start + m]), f"m = {m}, m_prompt = {m_prompt}"
        for rows in (slice(0, 1), slice(3, 8), slice(77, 150)):
            assert np.array_equal(run(ctx, x[:40], w[rows], dtype, min(40, m_prompt)), together[:40, rows])
    mixed = run(ctx, x, w, dtype, 123)
    assert np.array_equal(mixed[:123], together[:123]) and np.array_equal(mixed[123:], run(ctx, x, w, dtype, 0)[123:])


def test_many_prompt_rows_are_cut_into_passes(ctx, rng):
    x, w = make(rng, 1500, 24, 96, "bfloat16")
    seen = rounded(x, ctx, "bfloat16", len(x))
    together = run(ctx, x, w, "bfloat16", len(x))
    oracle.assert_close(together, oracle.linear(seen, w, "bfloat16"), bound(seen, w, "bfloat16"))
    assert np.array_equal(run(ctx, x[700:800], w, "bfloat16", 100), together[700:800])


@pytest.mark.parametrize("m_prompt", [0, 3, 40])
@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_not_a_number_and_infinity_stay_where_they_are(ctx, rng, dtype, m_prompt):
    m, n, k = 40, 37, 75
    x, w = make(rng, m, n, k, dtype)
    x[5, 3], x[39, 74] = np.nan, np.inf
    w[36, 74] = oracle.encode(np.float32(np.nan), dtype)
    out = run(ctx, x, w, dtype, m_prompt)
    assert np.isnan(out[5]).all() and np.isnan(out[:, 36]).all() and not np.isfinite(out[39]).any()
    clean = np.delete(np.delete(out, [5, 39], axis=0), 36, axis=1)
    assert np.isfinite(clean).all()


@pytest.fixture
def guarded():
    """A function that copies an array to the end of a page whose neighbour is not readable, and a call that undoes all."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    held = []

    def place(array):
        size = -(-array.nbytes // page) * page
        area = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        copy = np.frombuffer(area, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
        copy[...] = array
        assert libc.mprotect(start + size, page, mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
        held.append((start + size, page))
        return copy

    yield place
    for start, size in held:
        libc.mprotect(start, size, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 7), (5, 33), (17, 100), (33, 577), (70, 290)])
def test_nothing_is_read_past_an_array(ctx, rng, guarded, n, k, dtype):
    for m, m_prompt in ((1, 0), (5, 0), (1, 1), (3, 3), (40, 40)):
        x, w = make(rng, m, n, k, dtype)
        expected = run(ctx, x, w, dtype, m_prompt)
        out, bias = guarded(np.zeros((m, n), np.float32)), guarded(np.zeros(n, np.float32))
        ctx.linear(guarded(x), [(out, guarded(w), dtype, bias)], m_prompt=m_prompt)
        assert np.array_equal(out, expected)


def test_scratch_that_cannot_be_had(isa, rng):
    x, w = make(rng, 2000, 3, 400, "float32")
    live = _core.mem_live()
    ctx = _core.OpContext(isa=isa, threads=1)
    if isa == "ref":
        x, w = make(rng, 2, 3, 300_000, "float32")
    _core.mem_fail_at(1)
    try:
        with pytest.raises(MemoryError, match="scratch"):
            run(ctx, x, w, "float32", len(x))
    finally:
        _core.mem_fail_at(0)
    assert np.isfinite(run(ctx, x, w, "float32", len(x))).all()
    del ctx
    assert _core.mem_live() == live


def test_refusals(ctx):
    x, w, out = np.zeros((2, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="axis 1 of w is 8, expected 7"):
        ctx.linear(x[:, :7], [(out, w, "float32", None)])
    with pytest.raises(ValueError, match="axis 1 of out is 2, expected 3"):
        ctx.linear(x, [(out[:, :2], w, "float32", None)])
    with pytest.raises(ValueError, match="axis 0 of bias is 2, expected 3"):
        ctx.linear(x, [(out, w, "float32", np.zeros(2, np.float32))])
    with pytest.raises(ValueError, match="m_prompt is 3, expected 0 to the rows of x"):
        ctx.linear(x, [(out, w, "float32", None)], m_prompt=3)
    with pytest.raises(ValueError, match="the length of parts is 4, expected 1 to 3"):
        ctx.linear(x, [(out, w, "float32", None)] * 4)
    with pytest.raises(ValueError, match="w holds elements of buffer format 'f', expected 'H'"):
        ctx.linear(x, [(out, w, "bfloat16", None)])

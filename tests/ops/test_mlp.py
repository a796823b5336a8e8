"""mlp against the three ops that it joins, to the bit; those are held against the oracle by their own tests."""

import numpy as np
import oracle
import pytest

from llmcoopt import _core

BF16 = ("bfloat16", "bfloat16", "bfloat16")


def weights(rng, k, n, dtypes=BF16, biased=False):
    """gate, up [n, k] and down [k, n] with dtype and bias, as parts without out."""
    sizes = ((n, k), (n, k), (k, n))
    return [
        (oracle.encode(rng.standard_normal(size) * 0.3, dtype), dtype, rng.standard_normal(size[0]).astype(np.float32) if biased else None)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]


def run(ctx, x, parts, m_prompt, out=None):
    (gate, *_), (up, *_), (down, *_) = parts
    scratch = [np.full((len(x), len(w)), np.nan, np.float32) for w in (gate, up)]
    result = np.full((len(x), len(down)), np.nan, np.float32) if out is None else out.copy()
    ctx.mlp(x, (scratch[0], *parts[0]), (scratch[1], *parts[1]), (result, *parts[2]), m_prompt=m_prompt, accumulate=out is not None)
    return result


def apart(ctx, x, parts, m_prompt, out=None):
    (w_gate, *_), (w_up, *_), (down, *_) = parts
    gate, up = np.empty((len(x), len(w_gate)), np.float32), np.empty((len(x), len(w_up)), np.float32)
    result = np.empty((len(x), len(down)), np.float32) if out is None else out.copy()
    ctx.linear(x, [(gate, *parts[0]), (up, *parts[1])], m_prompt=m_prompt)
    ctx.swiglu(gate, gate, up)
    ctx.linear(gate, [(result, *parts[2])], m_prompt=m_prompt, accumulate=out is not None)
    return result


@pytest.mark.parametrize("k, n", [(1, 1), (33, 31), (64, 32), (70, 37), (100, 650), (577, 96), (576, 1536), (1300, 1000)])
def test_the_same_bits_as_three_ops(ctx, one_thread, rng, k, n):
    for i, (m, m_prompt) in enumerate(((1, 0), (1, 1), (32, 32), (33, 33), (47, 40), (100, 100))):
        x, out = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((m, k)).astype(np.float32)
        parts = weights(rng, k, n, biased=i % 2 == 1)
        for before in (None, out):
            expected = apart(ctx, x, parts, m_prompt, before)
            assert np.isfinite(expected).all()
            assert np.array_equal(run(ctx, x, parts, m_prompt, before), expected), f"m = {m}, m_prompt = {m_prompt}"
            assert np.array_equal(run(one_thread, x, parts, m_prompt, before), expected), f"one thread, m = {m}, m_prompt = {m_prompt}"


@pytest.mark.parametrize("other", range(3))
def test_weights_of_another_type(ctx, rng, other):
    dtypes = [*BF16]
    dtypes[other] = "float16"
    parts, x = weights(rng, 72, 90, dtypes), rng.standard_normal((50, 72)).astype(np.float32)
    assert np.array_equal(run(ctx, x, parts, 40), apart(ctx, x, parts, 40))


def test_many_rows_are_cut_into_passes(ctx, rng):
    parts, x = weights(rng, 64, 70), rng.standard_normal((1100, 64)).astype(np.float32)
    assert np.array_equal(run(ctx, x, parts, 1090), apart(ctx, x, parts, 1090))


def test_strided_rows_and_numbers_that_are_not_finite(ctx, rng):
    parts, wide = weights(rng, 64, 70), rng.standard_normal((40, 90)).astype(np.float32)
    x = wide[:, 9:73]
    x[3, 5], x[39, 1] = np.nan, np.inf
    found = run(ctx, x, parts, 40)
    assert np.array_equal(found, apart(ctx, x, parts, 40), equal_nan=True)
    assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, [3, 39], axis=0)).all()


def test_scratch_that_cannot_be_had(isa, rng):
    if isa == "ref":
        pytest.skip("ref needs so little that it lies in the first piece")
    parts, x = weights(rng, 400, 400), rng.standard_normal((600, 400)).astype(np.float32)
    live = _core.mem_live()
    ctx = _core.OpContext(isa=isa, threads=1)
    _core.mem_fail_at(1)
    try:
        with pytest.raises(MemoryError, match="scratch"):
            run(ctx, x, parts, len(x))
    finally:
        _core.mem_fail_at(0)
    assert np.isfinite(run(ctx, x, parts, len(x))).all()
    del ctx
    assert _core.mem_live() == live


def test_refusals(ctx):
    x, w, out = np.zeros((2, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((2, 3), np.float32)
    part, down = (out, w, "float32", None), (np.zeros((2, 8), np.float32), np.zeros((8, 3), np.float32), "float32", None)
    with pytest.raises(ValueError, match="the width of up is 2, expected the width of gate"):
        ctx.mlp(x, part, (np.zeros((2, 2), np.float32), w[:2], "float32", None), down)
    with pytest.raises(ValueError, match="contiguous rows of gate and up"):
        ctx.mlp(x, (np.zeros((2, 9), np.float32)[:, :3], w, "float32", None), part, down)
    with pytest.raises(ValueError, match="axis 1 of w is 8, expected 3"):
        ctx.mlp(x, part, part, part)
    with pytest.raises(ValueError, match="m_prompt is 3, expected 0 to the rows of x"):
        ctx.mlp(x, part, part, down, m_prompt=3)

import numpy as np
import oracle
import pytest

# Rounding model in EPS of the result: 4 for root, quotient and products, and the sum's, which grow with the additions in a lane
# (k / 32, halved by the root, mostly cancelling). Observed: 0.8 of it, 0.25 for ref.
BOUND = 4


def bound(expected, k):
    return oracle.EPS * (BOUND + k / 512) * np.abs(expected)


@pytest.mark.parametrize("m, k", [(1, 5120), (3, 64), (7, 1), (2, 17), (5, 288), (300, 130)])
def test_against_oracle(ctx, rng, m, k):
    x = rng.standard_normal((m, k)).astype(np.float32) * 10
    weight = rng.standard_normal(k).astype(np.float32)
    out = np.empty_like(x)
    ctx.rmsnorm(out, x, weight, 1e-5)
    expected = oracle.rmsnorm(x, weight, 1e-5)
    oracle.assert_close(out, expected, bound(expected, k))


def test_in_place_and_strided(ctx, rng):
    wide = rng.standard_normal((9, 100)).astype(np.float32)
    before, weight = wide.copy(), rng.standard_normal(77).astype(np.float32)
    expected = oracle.rmsnorm(wide[:, 10:87], weight, 1e-6)
    ctx.rmsnorm(wide[:, 10:87], wide[:, 10:87], weight, 1e-6)
    oracle.assert_close(wide[:, 10:87], expected, bound(expected, 77))
    assert np.array_equal(wide[:, :10], before[:, :10]) and np.array_equal(wide[:, 87:], before[:, 87:])


def test_a_row_does_not_depend_on_the_others(ctx, one_thread, rng):
    x, weight = rng.standard_normal((200, 333)).astype(np.float32), rng.standard_normal(333).astype(np.float32)
    together, alone = np.empty_like(x), np.empty_like(x)
    ctx.rmsnorm(together, x, weight, 1e-5)
    for i in range(len(x)):
        one_thread.rmsnorm(alone[i : i + 1], x[i : i + 1], weight, 1e-5)
    assert np.array_equal(together, alone)


def test_eps_rules_where_x_is_small(ctx):
    x, weight, out = np.full((1, 16), 1e-4, np.float32), np.ones(16, np.float32), np.empty((1, 16), np.float32)
    ctx.rmsnorm(out, x, weight, 1e-5)
    assert np.allclose(out, 1e-4 / np.sqrt(1e-8 + 1e-5), rtol=1e-6)
    ctx.rmsnorm(out, x * 0, weight, 1e-5)
    assert not out.any()


def test_refusals(ctx):
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="axis 0 of weight is 7, expected 8"):
        ctx.rmsnorm(x, x, np.zeros(7, np.float32), 1e-5)
    with pytest.raises(ValueError, match="axis 0 of out is 1, expected 2"):
        ctx.rmsnorm(x[:1], x, np.zeros(8, np.float32), 1e-5)
    with pytest.raises(ValueError, match="x has strides"):
        ctx.rmsnorm(x, np.zeros((8, 2), np.float32).T, np.zeros(8, np.float32), 1e-5)
    read_only = np.zeros((2, 8), np.float32)
    read_only.flags.writeable = False
    with pytest.raises((BufferError, ValueError), match="read-only"):
        ctx.rmsnorm(read_only, x, np.zeros(8, np.float32), 1e-5)

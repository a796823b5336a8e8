"""Sinks and a window: rows read the positions below `sinks` and the newest `window`, on every instruction set and element type."""

import numpy as np
import oracle
import pytest
import test_attention
import test_codes

TYPES = [*oracle.DTYPES, *oracle.SCALED]


def make(rng, tokens, heads, kv_heads, head_dim, page_size, dtype, buffered=True):
    if dtype in oracle.SCALED:
        return test_codes.Case(rng, tokens, heads, kv_heads, head_dim, page_size, dtype, buffered)
    return test_attention.Case(rng, tokens, heads, kv_heads, head_dim, page_size, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sinks, window", [(1, 1), (2, 9), (4, 70), (16, 64), (23, 100), (50, 17), (130, 40)])
def test_against_oracle(ctx, rng, sinks, window, dtype):
    case = make(rng, 260, 6, 2, 40, 32, dtype)
    case.sinks = sinks
    for pos in (0, sinks, sinks + window - 1, sinks + window, 143, 144, 259):
        case.check(ctx, pos, 1, False, window)
    case.check(ctx, 0, 260, True, window)
    case.check(ctx, 150, 71, True, window)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("page_size", [16, 48, 64, 112, 512])
@pytest.mark.parametrize("sinks", [5, 60])
def test_page_sizes(ctx, rng, page_size, sinks, dtype):
    case = make(rng, 1000, 3, 1, 64, page_size, dtype)
    case.sinks = sinks
    for pos in (300, 511, 999):
        case.check(ctx, pos, 1, False, 530)
        case.check(ctx, pos, 1, False, 33)
    case.check(ctx, 640, 130, True, 530)
    case.check(ctx, 640, 130, True, 33)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e5m2"])
@pytest.mark.parametrize("sinks, window", [(3, 5), (12, 3), (30, 40)])
def test_without_a_write_buffer(ctx, rng, sinks, window, dtype):
    case = make(rng, 120, 4, 2, 24, 16, dtype, buffered=False)
    case.sinks = sinks
    case.check(ctx, 119, 1, False, window)
    case.check(ctx, 0, 120, True, window)


@pytest.mark.parametrize("dtype", TYPES)
def test_sinks_that_reach_the_window_are_no_window(ctx, rng, dtype):
    """To the bit: a row for which sinks and window are one run reads as without either."""
    case = make(rng, 300, 4, 2, 32, 32, dtype)
    full = [case.rows(ctx, pos, n, prompt) for pos, n, prompt in ((0, 200, True), (199, 1, False))]
    case.sinks = 100
    cut = [case.rows(ctx, pos, n, prompt, 100) for pos, n, prompt in ((0, 200, True), (199, 1, False))]
    assert all(np.array_equal(a, b) for a, b in zip(full, cut, strict=True))
    assert not np.array_equal(case.rows(ctx, 280, 1, False, 100), case.rows(ctx, 280, 1, False))
    case.sinks = 0
    assert not np.array_equal(case.rows(ctx, 199, 1, False, 100), cut[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "fp8_e4m3"])
def test_positions_between_are_not_read(ctx, rng, dtype):
    """NaN there does not reach a row."""
    case = make(rng, 400, 3, 1, 64, 16, dtype)
    case.sinks, window = 21, 70
    items = [(380, 20, True), (399, 1, False)]
    clean = [case.rows(ctx, *item, window) for item in items]
    first, end = 32 if dtype in oracle.SCALED else 21, 380 - window + 1
    for t in range(first, end // 16 * 16):
        page = case.pages.page(case.table[t // 16])
        page[1, :, :, t % 16] = np.iinfo(page.dtype).max  # NaN, but of int8
        if dtype in oracle.SCALED:
            case.pages.scales(case.table[t // 16])[1] = np.nan
    assert all(np.array_equal(case.rows(ctx, *item, window), rows) for item, rows in zip(items, clean, strict=True))
    case.sinks = 40
    assert np.isnan(case.rows(ctx, 399, 1, False, window)).any(), "the poison is there"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rows_depend_on_nothing_else(ctx, one_thread, rng, dtype):
    """Chunks, threads, neighbours."""
    case = make(rng, 1500, 4, 2, 24, 48, dtype)
    case.sinks, window = 13, 75
    whole = case.rows(ctx, 0, 333, True, window)
    assert np.array_equal(case.rows(one_thread, 0, 333, True, window), whole)
    for step in (1, 7, 64):
        pieces = [case.rows(ctx, pos, min(step, 333 - pos), True, window) for pos in range(0, 333, step)]
        assert np.array_equal(np.concatenate(pieces), whole), f"chunks of {step}"
    shapes = [(40, 100, True), (1499, 1, False), (600, 1, False)]
    q = np.concatenate([case.q[pos : pos + n] for pos, n, _ in shapes])
    items = [case.item(row, n, pos, prompt) for row, (pos, n, prompt) in zip((0, 100, 101), shapes, strict=True)]
    together = case.run(ctx, q, items, window)
    assert np.array_equal(together[:100], whole[40:140])
    for row, (pos, n, prompt) in list(zip((0, 100, 101), shapes, strict=True))[1:]:
        assert np.array_equal(case.rows(one_thread, pos, n, prompt, window), together[row : row + n])


def test_refusals(ctx, rng):
    case = make(rng, 20, 3, 1, 64, 16, "float32")
    case.sinks = -1
    with pytest.raises(ValueError, match="sinks is -1, expected 0"):
        case.rows(ctx, 19, 1, False, 5)

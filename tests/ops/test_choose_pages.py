"""Choice of pages: what is left out weighs no more than is said, and what is said is within the tolerance, on every instruction set."""

import numpy as np
import oracle
import pytest
import test_attention
import test_codes

TYPES = [*oracle.DTYPES, *oracle.SCALED]
TOLERANCES = [1e-4, 0.01, 0.3]


class Case:
    """A sequence whose pages hold keys of a direction of their own, and queries that look for some of these directions."""

    def __init__(self, rng, tokens, heads, kv_heads, head_dim, page_size, dtype, buffered=True, peak=25.0):
        kind = test_codes.Case if dtype in oracle.SCALED else test_attention.Case
        options = {"buffered": buffered} if dtype in oracle.SCALED else {}
        self.inner = inner = kind(rng, tokens, heads, kv_heads, head_dim, page_size, dtype, **options)
        n = len(inner.table)
        centre = rng.standard_normal((n, kv_heads, head_dim))
        k = np.repeat(centre, page_size, 0)[:tokens] + 0.15 * rng.standard_normal((tokens, kv_heads, head_dim))
        v = rng.standard_normal((tokens, kv_heads, head_dim))
        k, v = k.astype(np.float32), v.astype(np.float32)
        self.pages, self.table = inner.pages, inner.table
        if dtype in oracle.SCALED:
            (self.pages.write if buffered else self.pages.write_widened)(self.table, 1, k, v)
            inner.bits = [oracle.encode(a, "bfloat16") for a in (k, v)]
            inner.k, inner.v = (oracle.decode(a, "bfloat16") for a in inner.bits)
            inner.coded = self.pages.read(self.table, 1, tokens)
        else:
            self.pages.write(self.table, 1, k, v)
            inner.k, inner.v = self.pages.read(self.table, 1, tokens)
        self.heads, self.group, self.scale, self.dtype, self.buffered = heads, heads // kv_heads, head_dim**-0.5, dtype, buffered
        looked_for = centre[rng.integers(0, n, (tokens, heads)), np.arange(heads) // self.group]
        inner.q = ((peak * looked_for + rng.standard_normal((tokens, heads, head_dim))) / np.sqrt(head_dim)).astype(np.float32)

    def read(self, pos):
        """(k, v) as the row at `pos` reads them."""
        inner, end = self.inner, pos + 1
        if self.dtype not in oracle.SCALED:
            return inner.k[:end], inner.v[:end]
        if not self.buffered:
            return [a[:end] for a in inner.coded]
        own, few = pos // self.pages.residual * self.pages.residual, self.pages.n_first
        return [np.concatenate([b[:few], a[few:own], b[own:end]]) for a, b in zip(inner.coded, (inner.k, inner.v), strict=True)]

    def choose(self, ctx, positions, tolerance, window=0, sinks=0):
        """(chosen, counts, masses) of decode rows at these positions, and their items."""
        items = [self.inner.item(i, 1, pos, False) for i, pos in enumerate(positions)]
        shape = len(items), self.pages.n_kv_heads
        chosen = np.zeros((*shape, max(positions) // self.pages.page_size // 64 + 1), np.uint64)
        counts, masses = np.full((*shape, 2), -1), np.full(shape, np.nan, np.float32)
        bounds = oracle.key_bounds(self.pages, 1)
        how = {"n_kv_heads": shape[1], "layer": 1, "items": items, "scale": self.scale, "tolerance": tolerance}
        q = self.inner.q[positions].copy()
        ctx.choose_pages(chosen, counts, masses, q, bounds, **self.pages.where, **how, window=window, sinks=sinks)
        return chosen, counts, masses, items

    def attend(self, ctx, positions, items, chosen, window=0, sinks=0):
        q = self.inner.q[positions].copy()
        out = np.full_like(q, np.nan)
        how = {"layer": 1, "items": items, "scale": self.scale, "window": window, "sinks": sinks, "chosen": chosen}
        ctx.attention(out, q, n_kv_heads=self.pages.n_kv_heads, **self.pages.where, **how)
        return out

    def check(self, ctx, pos, tolerance, window=0, sinks=0):
        """The guarantee, for every head of a row. Returns how many pages were left out."""
        chosen, counts, masses, items = self.choose(ctx, [pos], tolerance, window, sinks)
        out = self.attend(ctx, [pos], items, chosen, window, sinks)[0]
        exact = self.attend(ctx, [pos], items, None, window, sinks)[0]
        k, v = self.read(pos)
        t = np.arange(pos + 1)
        seen = (t > pos - window) | (t < sinks) if window else t >= 0
        page, q = t // self.pages.page_size, self.inner.q[pos]
        for head in range(self.pages.n_kv_heads):
            read = (chosen[0, head, page // 64] >> (page % 64).astype(np.uint64) & np.uint64(1)).astype(bool)
            assert len(set(page[seen & read])) == counts[0, head, 0] and len(set(page[seen & ~read])) == counts[0, head, 1]
            assert read[page == 0].all() and read[page >= page[-1] - 1].all()
            rows = slice(head * self.group, (head + 1) * self.group)
            key, value = k[:, head : head + 1], v[:, head : head + 1]
            left_out = oracle.weights(q[rows], key, self.scale, seen)[:, ~read].sum(-1)
            assert left_out.max() <= masses[0, head] <= tolerance * 1.00001 and (counts[0, head, 1] > 0) == (masses[0, head] > 0)
            p = oracle.weights(q[rows], key, self.scale, seen & read)
            bound = 8 * oracle.EPS * (1 + np.abs(q[rows] * self.scale) @ np.abs(key[:, 0]).T.max(-1))[:, None] * (p @ np.abs(value[:, 0]))
            oracle.assert_close(out[rows], p @ value[:, 0].astype(np.float64), bound)
            error = np.abs(out[rows].astype(np.float64) - exact[rows])
            assert (error <= 2 * masses[0, head] * np.abs(value[seen]).max() + 2 * bound).all()
        if not counts[0, :, 1].any():
            assert np.array_equal(out, exact)
        return counts[0, :, 1].sum()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 64), (6, 2, 40), (5, 1, 128), (8, 2, 6)])
def test_the_guarantee(ctx, rng, heads, kv_heads, head_dim, dtype):
    case = Case(rng, 900, heads, kv_heads, head_dim, 32, dtype)
    left_out = [case.check(ctx, pos, tolerance) for pos in (160, 500, 511, 512, 899) for tolerance in TOLERANCES]
    assert sum(left_out) > 20 or head_dim == 6, "some pages are left out here"


@pytest.mark.parametrize("peak", [0.0, 10.0, 40.0])
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_flat_and_peaked(ctx, rng, page_size, peak):
    case = Case(rng, 1200, 4, 2, 32, page_size, "float16", peak=peak)
    left_out = [case.check(ctx, pos, tolerance) for pos in (777, 1199) for tolerance in TOLERANCES]
    assert (sum(left_out) > 4) == (peak > 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window, sinks", [(300, 0), (301, 40), (64, 200), (5, 3), (1199, 1)])
def test_windows(ctx, rng, window, sinks, dtype):
    case = Case(rng, 1200, 4, 2, 64, 16, dtype)
    assert sum(case.check(ctx, pos, 0.05, window, sinks) for pos in (500, 1103, 1199)) > 0 or window in (5, 64)


@pytest.mark.parametrize("dtype", oracle.SCALED)
def test_without_a_write_buffer(ctx, rng, dtype):
    case = Case(rng, 600, 4, 2, 64, 16, dtype, buffered=False)
    assert sum(case.check(ctx, pos, 0.05) for pos in (500, 599)) > 0


@pytest.mark.parametrize("dtype", ["float32", "fp8_e4m3"])
def test_all_pages_chosen_is_exact_to_the_bit(ctx, rng, dtype):
    case = Case(rng, 3000, 6, 2, 64, 32, dtype)
    for positions in ([2999], [40, 700, 2999]):
        chosen, counts, masses, items = case.choose(ctx, positions, 1e-30)
        assert not counts[..., 1].any() and not masses.any() and (chosen == np.uint64(2**64 - 1)).all()
        assert counts[..., 0].tolist() == [[pos // 32 + 1] * 2 for pos in positions]
        assert np.array_equal(case.attend(ctx, positions, items, chosen), case.attend(ctx, positions, items, None))


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e5m2"])
def test_rows_depend_on_nothing_else(ctx, one_thread, rng, dtype):
    case = Case(rng, 2600, 4, 2, 24, 16, dtype)
    positions = [2599, 100, 1700, 20]
    chosen, counts, masses, items = case.choose(ctx, positions, 0.02)
    together = case.attend(ctx, positions, items, chosen)
    assert counts[..., 1].sum() > 100
    for i, pos in enumerate(positions):
        alone, *rest, item = case.choose(one_thread, [pos], 0.02)
        assert np.array_equal(rest[0][0], counts[i]) and np.array_equal(rest[1][0], masses[i])
        assert np.array_equal(alone[0], chosen[i, :, : alone.shape[2]])
        assert np.array_equal(case.attend(one_thread, [pos], item, alone)[0], together[i])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_read(ctx, rng, bad):
    case = Case(rng, 600, 2, 2, 64, 16, "bfloat16")
    clean = case.choose(ctx, [599], 0.05)[1]
    assert (clean[0, :, 1] > 10).all()
    page = case.pages.page(case.table[20])
    page[1, 0, 0, 5, 7] = oracle.encode(np.float32(bad), "bfloat16")
    chosen, counts, _, items = case.choose(ctx, [599], 0.05)
    assert chosen[0, 0, 0] >> np.uint64(20) & np.uint64(1) == 1
    assert np.array_equal(counts[0, 1], clean[0, 1]), "the other head goes on"
    if np.isnan(bad):
        assert np.isnan(case.attend(ctx, [599], items, chosen)[0, 0]).all()


def test_no_more_pages_than_needed(ctx, rng):
    """Against the same rule in float64: pages by their bound, until what is left is within the tolerance of what is known."""
    case = Case(rng, 1000, 1, 1, 64, 16, "float32", peak=40.0)
    bounds = oracle.decode(oracle.key_bounds(case.pages, 1), "bfloat16").astype(np.float64)
    for pos, tolerance in ((999, 0.01), (800, 0.1), (640, 0.001)):
        q, k = case.inner.q[pos, 0].astype(np.float64), case.read(pos)[0][:, 0].astype(np.float64)
        scores, last = k @ q * case.scale, pos // 16
        known = [t for t in range(pos + 1) if t // 16 in (0, last, last - 1)]
        upper = {p: np.maximum(*(bounds[case.table[p], 0] * q)).sum() * case.scale for p in range(1, last - 1)}
        order, taken = sorted(upper, key=upper.get, reverse=True), 0
        while sum(16 * np.exp(upper[p]) for p in order[taken:]) > tolerance / (1 - tolerance) * np.exp(scores[known]).sum():
            if taken < 2:
                known += range(order[taken] * 16, order[taken] * 16 + 16)
            taken += 1
        found = case.choose(ctx, [pos], tolerance)[1][0, 0]
        assert found[1] == len(order) - taken and len(order) - taken > 4


def test_prompt_rows_read_everything(ctx, rng):
    case = Case(rng, 300, 2, 1, 32, 16, "float32")
    items = [case.inner.item(0, 40, 200, True)]
    q = case.inner.q[200:240].copy()
    out, plain = np.empty_like(q), np.empty_like(q)
    how = {"n_kv_heads": 1, **case.pages.where, "layer": 1, "items": items, "scale": case.scale}
    ctx.attention(out, q, **how, chosen=np.zeros((1, 1, 1), np.uint64))
    ctx.attention(plain, q, **how)
    assert np.array_equal(out, plain)


def test_refusals_and_scratch(isa, ctx, rng):
    from llmcoopt import _core

    case = Case(rng, 300, 2, 1, 32, 16, "float32")
    with pytest.raises(ValueError, match="axis 0 of chosen is 2, expected 1"):
        case.attend(ctx, [299], [case.inner.item(0, 1, 299, False)], np.zeros((2, 1, 1), np.uint64))
    right = case.choose(ctx, [299], 0.1)[0]
    for nth in range(1, 10):
        fresh = _core.OpContext(isa=isa)
        _core.mem_fail_at(nth)
        try:
            assert np.array_equal(case.choose(fresh, [299], 0.1)[0], right)
            break
        except MemoryError as error:
            assert "scratch memory" in str(error)
        finally:
            _core.mem_fail_at(0)
    else:
        pytest.fail("it never came to an end")

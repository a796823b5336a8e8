import numpy as np
import oracle
import pytest

# In units of oracle.attention's bound. Observed: 1.8 at most over all cases below (0.2 for ref).
BOUND = 8
# Prompt rows over a bfloat16 cache with AMX: q and the weights are rounded to bfloat16, each by 2^-8 of itself at most. The oracle gets the
# rounded q. A weight off by a factor 1 + e moves the result by p * e * (v - result); errors fall either way, so their root sum of squares is the
# unit here. Observed: 2.1 (of 2 million rows of random shapes).
ROUNDED = 4
RATIOS = [(2, 2), (4, 2), (3, 1), (10, 2), (7, 1), (8, 1), (23, 1)]


def expect(ctx, q, k, v, pos, scale, window=0, rounds=False, sinks=0):
    """What rows q at positions pos.. come to, and the error allowed. rounds: they are prompt rows over a bfloat16 cache."""
    if not (rounds and "AMX" in ctx.detail):
        out, bound = oracle.attention(q, k, v, pos, scale, window, sinks)
        return out, BOUND * bound
    log2_e = np.float32(1.44269504)
    q = oracle.decode(oracle.encode(q * (np.float32(scale) * log2_e), "bfloat16"), "bfloat16")
    out, bound = oracle.attention(q, k, v, pos, np.log(2), window, sinks)
    one_each = np.broadcast_to(np.eye(len(k))[:, None], (len(k), k.shape[1], len(k)))
    p = oracle.attention(q, k, one_each, pos, np.log(2), window, sinks)[0]
    v = np.repeat(v.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    squares = [np.einsum("mht,thd->mhd", p * p, v**n) for n in (2, 1, 0)]
    moved = np.sqrt(np.maximum(squares[0] - 2 * out * squares[1] + out * out * squares[2], 0))
    return out, BOUND * bound + ROUNDED * 2.0**-8 * moved


class Case:
    """One sequence of `tokens` in randomly placed pages of a NaN-poisoned cache, layer 1 of 2, and queries for every position."""

    def __init__(self, rng, tokens, heads=4, kv_heads=2, head_dim=64, page_size=64, dtype="bfloat16", spread=1.0):
        n = -(-tokens // page_size)
        self.pages = oracle.Pages(n + 3, 2, kv_heads, head_dim, page_size, dtype)
        self.table = rng.permutation(n + 3)[:n].astype(np.int32)
        k, v = (rng.standard_normal((tokens, kv_heads, head_dim)).astype(np.float32) for _ in range(2))
        self.pages.write(self.table, 1, k, v)
        self.k, self.v = self.pages.read(self.table, 1, tokens)
        self.q = rng.standard_normal((tokens, heads, head_dim)).astype(np.float32) * np.float32(spread)
        self.scale, self.sinks = head_dim**-0.5, 0

    def item(self, row, length, pos, prompt):
        return self.table[: -(-(pos + length) // self.pages.page_size)].copy(), row, length, pos, prompt

    def run(self, ctx, q, items, window=0, scale=None):
        out = np.full_like(q, np.nan)
        scale = self.scale if scale is None else scale
        how = {"scale": scale, "window": window, "sinks": self.sinks}
        ctx.attention(out, q, n_kv_heads=self.pages.n_kv_heads, **self.pages.where, layer=1, items=items, **how)
        return out

    def rows(self, ctx, pos, length, prompt, window=0):
        """Output of the rows at positions pos.., as one item."""
        return self.run(ctx, self.q[pos : pos + length].copy(), [self.item(0, length, pos, prompt)], window)

    def check(self, ctx, pos, length, prompt, window=0):
        end = pos + length
        rounds = prompt and self.pages.dtype == "bfloat16"
        expected, bound = expect(ctx, self.q[pos:end], self.k[:end], self.v[:end], pos, self.scale, window, rounds, self.sinks)
        oracle.assert_close(self.rows(ctx, pos, length, prompt, window), expected, bound)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("heads, kv_heads", RATIOS)
def test_head_ratios(ctx, rng, heads, kv_heads, dtype):
    case = Case(rng, 150, heads, kv_heads, dtype=dtype)
    case.check(ctx, 149, 1, prompt=False)
    case.check(ctx, 0, 150, prompt=True)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 40, 64, 80, 100, 128, 256])
def test_head_sizes(ctx, rng, head_dim, dtype):
    case = Case(rng, 100, 3, 1, head_dim, 48, dtype)
    case.check(ctx, 99, 1, prompt=False)
    case.check(ctx, 30, 70, prompt=True)


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 80, 112, 512])
def test_page_sizes(ctx, rng, page_size):
    case = Case(rng, 1200, page_size=page_size)
    for pos in (0, 15, 16, 511, 512, 1199):
        case.check(ctx, pos, 1, prompt=False)
    case.check(ctx, 1000, 130, prompt=True)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 599, 600, 10_000])
def test_window(ctx, rng, window):
    case = Case(rng, 700, page_size=32)
    for pos in (0, 98, 99, 100, 599, 699):
        case.check(ctx, pos, 1, False, window)
    case.check(ctx, 0, 300, True, window)
    case.check(ctx, 550, 150, True, window)


def test_positions_outside_the_window_are_not_read(ctx, rng):
    window, tokens = 70, 400
    case = Case(rng, tokens, page_size=16)
    decode, prompt = case.rows(ctx, tokens - 1, 1, False, window), case.rows(ctx, 380, 20, True, window)
    nan = np.full((380 - window + 1, 2, 64), np.nan, np.float32)
    case.pages.write(case.table, 1, nan, nan)
    assert np.array_equal(case.rows(ctx, 380, 20, True, window), prompt)
    nan = np.full((tokens - window, 2, 64), np.nan, np.float32)
    case.pages.write(case.table, 1, nan, nan)
    assert np.array_equal(case.rows(ctx, tokens - 1, 1, False, window), decode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_outside_the_window_may_be_gone(isa, run_script, tmp_path, dtype):
    """Their memory is a cut-off file here: one read would end the process."""
    run_script(
        """
import mmap, os, sys
import numpy as np, oracle
from llmcoopt import _core
path, isa, dtype = sys.argv[1:]
pages = oracle.Pages(25, 1, 2, 64, 16, dtype)
assert pages.page_bytes % mmap.PAGESIZE == 0
rng = np.random.default_rng(0)
k, v, q = (rng.standard_normal((400, 2, 64)).astype(np.float32) for _ in range(3))
table = np.array([*range(6, 25), *range(6)], np.int32)  # positions from 304 on lie in pages 0..5
pages.write(table, 0, k, v)
with open(path, "w+b") as file:
    file.write(pages.data)
    file.flush()
    cache = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    outs = []
    for size in (len(cache), 6 * pages.page_bytes):
        os.ftruncate(file.fileno(), size)
        out = np.empty((21, 2, 64), np.float32)
        items = [(table, 0, 20, 380, True), (table, 20, 1, 399, False)]
        _core.OpContext(isa=isa, threads=2).attention(out, q[379:], cache, dtype, 16, 1, 2, 0, items, 0.125, 70)
        outs.append(out)
assert np.array_equal(*outs)
""",
        tmp_path / "cache",
        isa,
        dtype,
    )


def test_a_row_reads_nothing_past_its_position(ctx, rng):
    """NaN keys and values of later tokens of the same prompt do not reach a row, though they share its tiles."""
    case = Case(rng, 90, 3, 1)
    clean = case.rows(ctx, 0, 90, True)
    nan = np.full((5, 1, 64), np.nan, np.float32)
    for k, v in ((nan, case.v[85:]), (case.k[85:], nan), (nan, nan)):
        case.pages.write(case.table, 1, k, v, start=85)
        poisoned = case.rows(ctx, 0, 90, True)
        assert np.array_equal(poisoned[:85], clean[:85])
        assert np.isnan(poisoned[85:]).all(), "a NaN in the cache must show"
        assert np.isnan(case.rows(ctx, 89, 1, False)).all()


def test_an_infinite_value_reaches_the_rows_that_see_it(ctx, rng):
    case = Case(rng, 150, 3, 1)
    clean = case.rows(ctx, 0, 150, True, window=50)
    v = case.v[70:71].copy()
    v[0, 0, 3] = np.inf
    case.pages.write(case.table, 1, case.k[70:71], v, start=70)
    found = case.rows(ctx, 0, 150, True, window=50)
    assert (found[70:120, :, 3] == np.inf).all()
    clean[70:120, :, 3] = np.inf
    assert np.array_equal(found, clean)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (2, 2), (5, 1)])
def test_prompt_rows_do_not_depend_on_chunks_or_threads(ctx, one_thread, rng, heads, kv_heads, window, dtype):
    tokens = 333
    case = Case(rng, tokens, heads, kv_heads, page_size=48, dtype=dtype)
    whole = case.rows(ctx, 0, tokens, True, window)
    assert np.array_equal(case.rows(one_thread, 0, tokens, True, window), whole)
    for step in (1, 7, 64):
        pieces = [case.rows(ctx, pos, min(step, tokens - pos), True, window) for pos in range(0, tokens, step)]
        assert np.array_equal(np.concatenate(pieces), whole), f"chunks of {step}"


@pytest.mark.parametrize("heads, kv_heads", [(5, 5), (8, 2), (7, 1)])
def test_rows_do_not_depend_on_the_batch(ctx, one_thread, rng, heads, kv_heads):
    """Two prompts and decode rows of several lengths in one call, in one cache, against each item alone on one thread."""
    case = Case(rng, 2600, heads, kv_heads, 32, 16, "bfloat16")
    shapes = [(40, 100, True), (0, 33, True), (2599, 1, False), (513, 1, False), (0, 1, False), (1700, 1, False)]
    q = np.concatenate([case.q[pos : pos + length] for pos, length, _ in shapes])
    row, items, slices = 0, [], []
    for pos, length, prompt in shapes:
        items.append(case.item(row, length, pos, prompt))
        slices.append(slice(row, row + length))
        row += length
    for window in (0, 900):
        together = case.run(ctx, q, items, window)
        for (pos, length, prompt), rows in zip(shapes, slices, strict=True):
            assert np.array_equal(case.rows(one_thread, pos, length, prompt, window), together[rows]), (pos, length, prompt)


def test_long_context(ctx, rng):
    """More tokens than one split each: 16 splits, merged."""
    case = Case(rng, 9000, 6, 3, 32, 64, "float16", spread=3)
    for pos in (511, 512, 1023, 8191, 8999):
        case.check(ctx, pos, 1, prompt=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0.02, 0.007, -0.02])
def test_scores_that_grow(ctx, rng, step, dtype):
    """Every block, or every other one, dwarfs what was summed before it; or none does."""
    case = Case(rng, 400, 6, 2, page_size=32, dtype=dtype)
    k = case.k * np.float32(0.2) + np.arange(400, dtype=np.float32)[:, None, None] * np.float32(step)
    case.pages.write(case.table, 1, k, case.v)
    case.k, case.v = case.pages.read(case.table, 1, 400)
    case.q += 1
    case.check(ctx, 0, 400, prompt=True)
    case.check(ctx, 399, 1, prompt=False)


@pytest.mark.parametrize("dtype, step", [("float32", 2.0**-12), ("bfloat16", 2.0**-7)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("prompt", [False, True])
def test_large_scores(ctx, rng, sign, prompt, dtype, step):
    """Scores of about 60,000 of either sign: a finite stand-in for minus infinity would win over them."""
    case = Case(rng, 130, dtype=dtype)
    case.q[:] = sign * 60_000 / 8
    k = np.abs(case.k) * 0 + 1 + rng.integers(0, 3, case.k.shape) * np.float32(step)
    case.pages.write(case.table, 1, k, case.v)
    case.k, case.v = case.pages.read(case.table, 1, 130)
    out = case.rows(ctx, 100, 30 if prompt else 1, prompt)
    assert np.isfinite(out).all()
    end, rounds = 100 + len(out), prompt and dtype == "bfloat16"
    expected, bound = expect(ctx, case.q[100:end], case.k[:end], case.v[:end], 100, case.scale, rounds=rounds)
    assert abs(expected).max() < 5
    oracle.assert_close(out, expected, bound)


def test_strided_rows(ctx, rng):
    case = Case(rng, 80, 4, 2)
    joint = np.full((10, 8, 64), 7, np.float32)
    joint[:, 2:6] = case.q[70:]
    out = np.full((10, 6, 64), -1, np.float32)
    items = [case.item(0, 9, 70, True), case.item(9, 1, 79, False)]
    ctx.attention(out[:, 1:5], joint[:, 2:6], n_kv_heads=2, **case.pages.where, layer=1, items=items, scale=case.scale)
    assert np.array_equal(out[:9, 1:5], case.rows(ctx, 70, 9, True))
    assert np.array_equal(out[9:, 1:5], case.rows(ctx, 79, 1, False))
    assert (out[:, 0] == -1).all() and (out[:, 5] == -1).all()


@pytest.mark.parametrize("prompt", [False, True])
def test_pages_beyond_four_gib(ctx, rng, prompt, tmp_path):
    d, layers, n_pages = 128, 40, 3300  # 1,310,720 bytes a page
    pool = oracle.Pages(1, layers, 1, d, 64, "bfloat16")
    pool.data = data = np.memmap(tmp_path / "sparse", np.uint8, "w+", shape=n_pages * pool.page_bytes)
    table = np.array([n_pages - 1, 5], np.int32)
    k, v = (oracle.encode(rng.standard_normal((70, 1, d)), "bfloat16") for _ in range(2))
    for t in range(70):
        page = pool.page(int(table[t // 64]))
        page[-1, 0, :, t % 64], page[-1, 1, :, t % 64] = k[t], v[t]
    q = rng.standard_normal((1, 2, d)).astype(np.float32)
    out = np.empty_like(q)
    ctx.attention(out, q, data, "bfloat16", 64, layers, 1, layers - 1, [(table, 0, 1, 69, prompt)], 0.1)
    expected, bound = expect(ctx, q, oracle.decode(k, "bfloat16"), oracle.decode(v, "bfloat16"), 69, 0.1, rounds=prompt)
    oracle.assert_close(out, expected, bound)


def test_amx_changes_only_prompts_of_bfloat16_caches(isa, rng):
    if isa != "amx":
        pytest.skip("about the tables amx and avx512")
    from llmcoopt import _core

    amx, avx512 = (_core.OpContext(isa=name, threads=2) for name in ("amx", "avx512"))
    for dtype in oracle.DTYPES:
        case = Case(rng, 700, 6, 2, dtype=dtype)
        assert np.array_equal(case.rows(amx, 699, 1, False), case.rows(avx512, 699, 1, False))
        assert np.array_equal(case.rows(amx, 0, 100, True), case.rows(avx512, 0, 100, True)) == (dtype != "bfloat16")


def test_refusals(ctx, rng):
    case = Case(rng, 20, 3, 1)
    out = np.empty_like(case.q)
    with pytest.raises(ValueError, match="n_kv_heads is 2, expected a divisor of the heads of q"):
        ctx.attention(out, case.q, n_kv_heads=2, **case.pages.where, layer=0, items=[], scale=1.0)
    with pytest.raises(ValueError, match="axis 0 of out is 19, expected 20"):
        ctx.attention(out[:19], case.q, n_kv_heads=1, **case.pages.where, layer=0, items=[], scale=1.0)
    with pytest.raises(ValueError, match="window is -1"):
        ctx.attention(out, case.q, n_kv_heads=1, **case.pages.where, layer=0, items=[], scale=1.0, window=-1)


def test_scratch_that_cannot_be_had(isa, rng):
    from llmcoopt import _core

    case = Case(rng, 700)
    items = [case.item(0, 699, 0, True), case.item(699, 1, 699, False)]
    right = case.run(_core.OpContext(isa=isa), case.q, items)
    for nth in range(1, 20):
        ctx = _core.OpContext(isa=isa)
        _core.mem_fail_at(nth)
        try:
            assert np.array_equal(case.run(ctx, case.q, items), right)
            break
        except MemoryError as error:
            assert "scratch memory" in str(error)
        finally:
            _core.mem_fail_at(0)
        assert np.array_equal(case.run(ctx, case.q, items), right), "the context can be used again"
    assert 1 < nth < 19


def test_one_context_refuses_two_threads_at_once(isa, rng):
    """Either both calls run one after the other, or one is refused; never a crash or a wrong result."""
    import threading

    from llmcoopt import _core

    case, shared, refused = Case(rng, 600), _core.OpContext(isa=isa, threads=2), []
    right = case.rows(_core.OpContext(isa=isa), 0, 600, True)

    def work():
        try:
            assert np.array_equal(case.rows(shared, 0, 600, True), right)
        except RuntimeError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("at work in another thread" in text for text in refused)

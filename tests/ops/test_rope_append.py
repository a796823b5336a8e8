import numpy as np
import oracle
import pytest

SHAPES = [(4, 2, 64), (3, 1, 6), (5, 5, 40), (2, 1, 80), (2, 2, 256)]


def angles(rng, m, head_dim):
    angle = rng.uniform(0, 1000, (m, head_dim // 2))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def inputs(rng, m, heads, kv_heads, head_dim):
    return [rng.standard_normal((m, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", SHAPES)
def test_against_oracle(ctx, rng, dtype, heads, kv_heads, head_dim):
    m, layer = 60, 1
    q, k, v = inputs(rng, m, heads, kv_heads, head_dim)
    cos, sin = angles(rng, m, head_dim)
    pages = oracle.Pages(9, 3, kv_heads, head_dim, 16, dtype)
    tables = [np.array(t, np.int32) for t in ([7, 2, 5, 1], [3, 0], [8, 6, 4])]
    items = [(tables[0], 0, 50, 3, True), (tables[1], 50, 9, 15, True), (tables[2], 59, 1, 47, False)]
    wanted_q, wanted_k, size = oracle.rope(q, cos, sin), oracle.rope(k, cos, sin), oracle.rope(np.abs(k), np.abs(cos), -np.abs(sin))
    size_q = oracle.rope(np.abs(q), np.abs(cos), -np.abs(sin))
    ctx.rope_append(q, k, v, cos, sin, **pages.where, layer=layer, items=items)
    oracle.assert_close(q, wanted_q, 2 * oracle.EPS * np.maximum(size_q, np.abs(wanted_q)) + 3 * oracle.EPS * np.abs(q).max())
    oracle.assert_close(k, wanted_k, 2 * oracle.EPS * np.maximum(size, np.abs(wanted_k)) + 3 * oracle.EPS * np.abs(k).max())
    before = oracle.Pages(9, 3, kv_heads, head_dim, 16, dtype)  # what else the cache may hold: nothing written
    for table, row, length, pos, _ in items:
        before.write(table, layer, k[row : row + length], v[row : row + length], pos)
    assert np.array_equal(pages.data, before.data)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_all_instruction_sets_store_the_same(ctx, rng, dtype):
    from llmcoopt import _core

    results = []
    for context in (ctx, _core.OpContext(isa="ref")):
        local = np.random.default_rng(1)
        q, k, v = inputs(local, 33, 6, 2, 80)
        cos, sin = angles(local, 33, 80)
        pages = oracle.Pages(1, 1, 2, 80, 48, dtype)
        context.rope_append(q, k, v, cos, sin, **pages.where, layer=0, items=[(np.zeros(1, np.int32), 0, 33, 0, True)])
        results.append((q, k, pages.data))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


def halves():
    """Every half, and every midpoint between neighbours, a step to either side of it: all roundings there are."""
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (values[:-1] + values[1:]) / 2
    steps = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    rest = np.array([65504, 65519.996, 65520, 1e6, np.inf, np.nan, 1e-8, 2.0**-25, 2.0**-24], np.float32)
    x = np.concatenate([values, *steps, rest])
    return np.concatenate([x, -x])


def bfloats():
    codes = np.arange(65536, dtype=np.uint32) << 16
    return np.concatenate([codes | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)


@pytest.mark.parametrize("dtype, values", [("float16", halves()), ("bfloat16", bfloats())], ids=["float16", "bfloat16"])
def test_every_rounding(ctx, dtype, values):
    head_dim = 62
    tokens = -(-len(values) // head_dim)
    v = np.zeros((tokens, 1, head_dim), np.float32)
    v.reshape(-1).view(np.uint32)[: len(values)] = values.view(np.uint32)  # as bits: NaN payloads too
    pages = oracle.Pages(-(-tokens // 512), 1, 1, head_dim, 512, dtype)
    zero, one = np.zeros((tokens, head_dim // 2), np.float32), np.ones((tokens, head_dim // 2), np.float32)
    table = np.arange(-(-tokens // 512), dtype=np.int32)
    ctx.rope_append(np.zeros_like(v), np.zeros_like(v), v, one, zero, **pages.where, layer=0, items=[(table, 0, tokens, 0, True)])
    stored = np.concatenate([pages.page(p)[0, 1, 0] for p in table]).reshape(-1)[: len(values)]
    expected, nan = oracle.encode(values, dtype), np.isnan(values)
    assert np.array_equal(stored[~nan], expected[~nan])
    assert np.isnan(oracle.decode(stored, dtype)[nan]).all()
    if dtype == "float16":
        assert np.isfinite(oracle.decode(stored, dtype)[~nan]).all()


def test_strided_rows(ctx, rng):
    heads, kv_heads, d, m = 4, 2, 16, 5
    joint = rng.standard_normal((m, heads + 2 * kv_heads, d)).astype(np.float32)
    untouched = joint[:, -kv_heads:].copy()
    q, k, v = joint[:, :heads], joint[:, heads:-kv_heads], joint[:, -kv_heads:]
    cos, sin = angles(rng, m, d)
    apart = [a.copy() for a in (q, k, v)]
    item = [(np.zeros(1, np.int32), 0, m, 2, True)]
    one, other = (oracle.Pages(1, 1, kv_heads, d, 16, "float32") for _ in range(2))
    ctx.rope_append(*apart, cos, sin, **one.where, layer=0, items=item)
    ctx.rope_append(q, k, v, cos, sin, **other.where, layer=0, items=item)
    assert np.array_equal(q, apart[0]) and np.array_equal(k, apart[1]) and np.array_equal(v, untouched)
    assert np.array_equal(one.data, other.data)


def test_page_beyond_four_gib(ctx, rng, tmp_path):
    d, layers, pages = 128, 40, 3300  # 1,310,720 bytes a page
    pool = oracle.Pages(1, layers, 1, d, 64, "bfloat16")
    pool.data = data = np.memmap(tmp_path / "sparse", np.uint8, "w+", shape=pages * pool.page_bytes)
    q, k, v = inputs(rng, 1, 1, 1, d)
    cos, sin = angles(rng, 1, d)
    ctx.rope_append(q, k, v, cos, sin, data, "bfloat16", 64, layers, layers - 1, [(np.array([pages - 1], np.int32), 0, 1, 63, False)])
    page = pool.page(pages - 1)
    assert np.array_equal(page[-1, 0, 0, -1], oracle.encode(k[0, 0], "bfloat16"))
    assert np.array_equal(page[-1, 1, 0, -1], oracle.encode(v[0, 0], "bfloat16"))
    assert not data[: pool.page_bytes].any(), "page 0 was written"


def test_refusals(ctx, rng):
    q, k, v = inputs(rng, 2, 2, 1, 16)
    cos, sin = angles(rng, 2, 16)
    pages = oracle.Pages(2, 1, 1, 16, 16, "float32")
    table = np.zeros(1, np.int32)

    def call(items, layer=0, **change):
        ctx.rope_append(**({"q": q, "k": k, "v": v, "cos": cos, "sin": sin, **pages.where} | change), layer=layer, items=items)

    for item, message in [
        ((table, 1, 2, 0, True), "row of an item is 1"),
        ((table, 0, 2, 15, True), "the length of an item's table is 1, expected a page for every position"),
        ((table + 2, 0, 1, 0, True), "a page of an item's table is 2, expected a page of the cache"),
        ((table - 1, 0, 1, 0, True), "a page of an item's table is -1"),
        ((table, 0, 2, 0, False), "len of a decode item is 2, expected 1"),
        ((table, 0, 1, -1, True), "pos of an item is -1"),
        ((table.astype(np.int64), 0, 1, 0, True), "table of an item is not a vector of int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            call([item])
    with pytest.raises(ValueError, match="layer is 1, expected 0 to n_layers - 1"):
        call([(table, 0, 1, 0, True)], layer=1)
    with pytest.raises(ValueError, match="axis 1 of cos is 7, expected 8"):
        call([], cos=np.ascontiguousarray(cos[:, :7]))
    with pytest.raises(ValueError, match="page_size is 17, expected 16 to 512, a multiple of 16"):
        call([], page_size=17)


@pytest.mark.parametrize("head_dim", [2, 6, 8, 24, 40, 64, 80, 96, 128, 256])
def test_turned(ctx, rng, head_dim):
    """To the bit what the specification says; the matrix is right; dot products stay."""
    q, k, v = inputs(rng, 20, 4, 2, head_dim)
    q[3], k[5] = 0, -0.0
    cos, sin = angles(rng, 20, head_dim)
    results = []
    for turned in (False, True):
        pool = oracle.Pages(2, 1, 2, head_dim, 16, "bfloat16")
        one, other = q.copy(), k.copy()
        where = {"dtype": "bfloat16", "page_size": 16, "n_layers": 1, "layer": 0}
        items = [(np.array([0, 1], np.int32), 0, 20, 0, True)]
        ctx.rope_append(one, other, v, cos, sin, pool.data, items=items, turned=turned, **where)
        results.append((one, other))
        assert np.array_equal(pool.read([0, 1], 0, 20)[0], oracle.decode(oracle.encode(other, "bfloat16"), "bfloat16"))
    for i, key in enumerate((False, True)):
        before, after = results[0][i].reshape(-1, head_dim), results[1][i].reshape(-1, head_dim)
        assert after.tobytes() == oracle.turn(before, key).tobytes()
        assert np.allclose(after, oracle.turn(before.astype(np.float64), key), atol=1e-4)
    exact, found = (np.einsum("thd,tgd->thg", *(a.astype(np.float64) for a in pair)) for pair in results)
    assert np.allclose(found, exact, atol=1e-4 * head_dim)

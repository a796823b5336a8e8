import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcoopt import _core

# Rounding model: x is rounded to integers (Quantized.rounding says by how much); the rest is a chain of two roundings a block and those of scales
# and integer sums, each EPS of the sum of magnitudes. Observed: 0.6 of the first where it rules.
BOUND = 12
KINDS = [(bits, offsets) for bits in (4, 8) for offsets in ("none", "zeros", "floats")]


def run(ctx, x, weight, bias=None, **options):
    out = np.full((len(x), len(weight.codes)), np.nan, np.float32)
    ctx.linear_quantized(x, [(out, weight.packed, "quantized", bias)], **options)
    return out


def bound(ctx, x, weight, x_int8=False):
    magnitude = np.abs(x.astype(np.float64)) @ weight.magnitude.T
    rounding = 0 if ctx.name == "ref" else weight.rounding(x, x_int8)
    return rounding + BOUND * oracle.EPS * magnitude + np.finfo(np.float32).tiny


def check(ctx, x, weight, **options):
    expected = x.astype(np.float64) @ weight.values.T
    oracle.assert_close(run(ctx, x, weight, **options), expected, bound(ctx, x, weight, options.get("x_int8", False)))


@pytest.mark.parametrize("bits, offsets", KINDS)
@pytest.mark.parametrize("group", [8, 16, 24, 32, 64, 96, 128, 256, 10**9])
def test_against_oracle(ctx, rng, bits, offsets, group):
    for i, k in enumerate((192, 100, 8, 1, 576, 401)):
        n, m = (48, 8, 33, 1, 70, 64)[i], (1, 2, 3, 5, 7, 13)[i]
        scale = ("float16", "bfloat16", "float32")[(i + group) % 3]
        weight = oracle.Quantized(rng, n, k, bits, group, offsets, scale, shuffled=i % 2 == 1)
        x = rng.standard_normal((m, k)).astype(np.float32)
        check(ctx, x, weight)
        check(ctx, x, weight, x_int8=True)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3 * 32 + 5),
    st.integers(1, 600),
    st.sampled_from(KINDS),
    st.sampled_from([8, 32, 40, 64, 128, 384, 10**9]),
    st.sampled_from(oracle.DTYPES),
    st.booleans(),
    st.sampled_from([1, 2, 3, 4, 5, 6, 7, 12, 14, 33, 70]),
    st.integers(0, 2**31),
)
def test_any_shape(n, k, kind, group, scale_dtype, shuffled, m, seed):
    rng = np.random.default_rng(seed)
    weight = oracle.Quantized(rng, n, k, *kind[:1], group, kind[1], scale_dtype, shuffled)
    x = (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    contexts = [_core.OpContext(isa=isa, threads=2) for isa in _core.isas()]
    for x_int8 in (False, True):
        found = [run(ctx, x, weight, x_int8=x_int8) for ctx in contexts[1:]]
        for ctx in contexts:
            check(ctx, x, weight, x_int8=x_int8)
        assert all(np.array_equal(one, found[0]) for one in found), "the instruction sets differ"


@pytest.mark.parametrize("bits, offsets", KINDS)
def test_layout(rng, bits, offsets):
    """The bytes are as csrc/base/qweight.h draws them."""
    n, k, block = 45, 100, 24
    weight = oracle.Quantized(rng, n, k, bits, block, offsets, "float16", shuffled=True)
    blocks, rows = 5, 32
    head = weight.packed[:64].view(np.uint16)
    assert bytes(weight.packed[:4]) == b"LOQ1" and head[2] == bits and head[3] == block
    assert list(weight.packed[16:32].view(np.int64)) == [n, k]
    assert np.array_equal(weight.packed[64:464].view(np.int32), weight.order)
    size, code_bytes = {"none": 0, "zeros": 1, "floats": 2}[offsets], block * rows * bits // 8
    panels = weight.packed[64 + 448 :].reshape(2, blocks, code_bytes + -(-rows * (2 + size) // 64) * 64)
    scales = np.zeros((64, blocks), np.uint16)
    scales[:n] = weight.scales.T
    found = np.ascontiguousarray(panels[:, :, code_bytes : code_bytes + 2 * rows]).view(np.uint16)
    assert np.array_equal(found, scales.reshape(2, rows, blocks).swapaxes(1, 2))
    if offsets == "zeros":
        zeros = panels[1, :, code_bytes + 2 * rows : code_bytes + 3 * rows].view(np.int8)
        assert np.array_equal(zeros[:, : n - 32], weight.zeros[:, 32:] - 2 ** (bits - 1)) and not zeros[:, n - 32 :].any()
    # [panel][8 inputs][part][half][row][4 bytes]
    codes = panels[:, :, :code_bytes].reshape(2, blocks * block // 8, 1 if bits == 4 else 2, 2, 16, 4)
    shuffled = np.zeros((64, blocks * block), np.uint8)
    shuffled[:n, :k] = weight.codes[:, weight.order]
    wanted = shuffled.reshape(2, 2, 16, -1, 4, 2).transpose(0, 3, 5, 1, 2, 4)  # [panel][8 inputs][even, odd][half][row][4]
    if bits == 4:
        wanted = (wanted[:, :, :1] | wanted[:, :, 1:] << 4).astype(np.uint8)
    assert np.array_equal(codes, wanted)


def test_rows_are_decoded(rng):
    for bits, offsets in KINDS:
        weight = oracle.Quantized(rng, 37, 70, bits, 16, offsets, "bfloat16", shuffled=True)
        out = np.empty((30, 70), np.float32)
        _core.unpack_rows(weight.packed, 5, out)
        assert np.allclose(out, weight.values[5:35], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("group", [32, 128])
def test_words_of_gptq_are_moved(rng, group):
    for shuffled in (False, True):
        for n, k in ((48, 192), (300, 256), (8, 104)):
            weight = oracle.Quantized(rng, n, k, 4, group, "zeros", "float16", shuffled)
            nibbles = np.zeros((-(-k // 8), 8, n), np.uint32)
            nibbles.reshape(-1, n)[:k] = weight.codes.T
            words = (nibbles << 4 * np.arange(8, dtype=np.uint32)[:, None]).sum(axis=1, dtype=np.uint32)
            out = oracle.aligned(weight.packed.size)
            _core.pack_begin(out, n, k, 4, weight.block, "float16", "zeros", weight.order)
            for row in range(0, n, 96):
                part = (row, min(96, n - row))
                groups = (0, n, weight.groups, weight.group)
                assert _core.pack_rows(out, words, n, 0, part, weight.scales, "float16", weight.zeros, None, groups) == 0
            assert np.array_equal(out, weight.packed)


def test_scales_that_are_not_exact_are_counted(rng):
    weight = oracle.Quantized(rng, 8, 32, scale_dtype="float32")
    out = oracle.aligned(_core.pack_size(8, 32, 4, 32, "float16", "none", False))
    _core.pack_begin(out, 8, 32, 4, 32, "float16", "none", None)
    assert _core.pack_rows(out, weight.codes, 0, 0, (0, 8), weight.scales, "float32", None, None, (0, 8, 1, 32)) == 8
    assert _core.pack_rows(out, weight.codes, 0, 0, (0, 8), np.full((1, 8), 0.25, np.float32), "float32", None, None, (0, 8, 1, 32)) == 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("x_int8", [False, True])
def test_a_row_does_not_depend_on_the_others(isa, ctx, one_thread, rng, bits, x_int8):
    """Bit for bit: whatever m, the row's kind and place in the batch, the number of threads, and the rows of weights beside."""
    if isa == "ref":
        pytest.skip("ref sums each output alone, in order")
    weight, x = oracle.Quantized(rng, 150, 320, bits, 64, "zeros"), rng.standard_normal((40, 320)).astype(np.float32)
    together = run(ctx, x, weight, x_int8=x_int8)
    assert np.array_equal(together, run(one_thread, x, weight, m_prompt=40, x_int8=x_int8))
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 19):
        start = int(rng.integers(0, 40 - m))
        assert np.array_equal(run(ctx, x[start : start + m], weight, x_int8=x_int8), together[start : start + m]), f"m = {m}"


def test_bias_accumulate_parts_and_strided_rows(ctx, rng):
    m, k = 7, 130
    x = rng.standard_normal((m, k + 9)).astype(np.float32)[:, 4 : 4 + k]
    shuffled = oracle.Quantized(rng, 45, k, shuffled=True)
    weights = [oracle.Quantized(rng, 100, k, group=128, offsets="zeros"), shuffled, shuffled]
    outs, biases = (
        [rng.standard_normal((m, n + 11)).astype(np.float32) for n in (100, 45, 45)],
        [rng.standard_normal(100).astype("f"), None, None],
    )
    before = [out.copy() for out in outs]
    parts = [(out[:, 3 : 3 + len(w.codes)], w.packed, "quantized", bias) for out, w, bias in zip(outs, weights, biases, strict=True)]
    ctx.linear_quantized(x, parts, accumulate=True)
    for out, old, weight, bias in zip(outs, before, weights, biases, strict=True):
        n = len(weight.codes)
        expected = x.astype(np.float64) @ weight.values.T + old[:, 3 : 3 + n] + (0 if bias is None else bias)
        limit = bound(ctx, np.ascontiguousarray(x), weight) + 4 * oracle.EPS * (np.abs(expected) + np.abs(old[:, 3 : 3 + n]) + 4)
        oracle.assert_close(out[:, 3 : 3 + n], expected, limit)
        assert np.array_equal(out[:, :3], old[:, :3]) and np.array_equal(out[:, 3 + n :], old[:, 3 + n :])


def test_extreme_rows(ctx, rng):
    weight, x = oracle.Quantized(rng, 40, 96, offsets="zeros"), rng.standard_normal((8, 96)).astype(np.float32)
    x[1, 5], x[2, 90], x[3] = np.nan, -np.inf, 0
    x[4] *= 1e-36
    x[5] *= 1e25
    x[6, 3] = 3e4
    out = run(ctx, x, weight)
    assert np.isnan(out[1]).all() and not np.isfinite(out[2]).any() and not out[3].any()
    assert np.abs(out[4]).max() < 1e-30
    good = [0, 5, 6, 7]
    oracle.assert_close(out[good], x[good].astype(np.float64) @ weight.values.T, bound(ctx, x[good], weight))


def test_largest_sums_do_not_overflow(ctx):
    """All codes, zeros and activations at their ends."""
    for bits in (4, 8):
        for code, zero in ((0, 2**bits - 1), (2**bits - 1, 0), (2**bits - 1, 2 ** (bits - 1))):
            k, one = 256, np.ones((1, 32), np.float32)
            packed = oracle.aligned(_core.pack_size(32, k, bits, 128, "float32", "zeros", False))
            _core.pack_begin(packed, 32, k, bits, 128, "float32", "zeros", None)
            codes = np.full((32, k), code, np.uint8)
            _core.pack_rows(packed, codes, 0, 0, (0, 32), one, "float32", (one * zero).astype(np.int16), None, (0, 32, 1, 256))
            for sign in (1, -1):
                out = np.empty((1, 32), np.float32)
                ctx.linear_quantized(np.full((1, k), sign, np.float32), [(out, packed, "quantized", None)])
                assert np.allclose(out, sign * k * (code - zero), rtol=1e-6, atol=1e-2)


def test_scratch_that_cannot_be_had(isa, rng):
    weight, x = oracle.Quantized(rng, 8, 4096, group=128), rng.standard_normal((500, 4096)).astype(np.float32)
    if isa == "ref":
        weight, x = oracle.Quantized(rng, 2, 300_000, group=128), rng.standard_normal((1, 300_000)).astype(np.float32)
    live = _core.mem_live()
    ctx = _core.OpContext(isa=isa, threads=1)
    _core.mem_fail_at(1)
    try:
        with pytest.raises(MemoryError, match="scratch"):
            run(ctx, x, weight)
    finally:
        _core.mem_fail_at(0)
    assert np.isfinite(run(ctx, x, weight)).all()
    del ctx
    assert _core.mem_live() == live


def test_embed_from_a_quantised_table(ctx, rng):
    weight, ids = oracle.Quantized(rng, 50, 72, 8, 24, "floats"), np.array([49, 0, 7], np.int32)
    out = np.empty((3, 72), np.float32)
    ctx.embed(out, ids, weight.packed, "quantized")
    assert np.allclose(out, weight.values[ids], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="an element of ids is 50, expected a row of table"):
        ctx.embed(out, ids + 1, weight.packed, "quantized")


def test_refusals(ctx, rng):
    weight, x = oracle.Quantized(rng, 6, 40, shuffled=True), np.zeros((2, 40), np.float32)
    out = np.zeros((2, 6), np.float32)

    def call(packed, x=x, dtype="quantized"):
        ctx.linear_quantized(x, [(out, packed, dtype, None)])

    with pytest.raises(ValueError, match="axis 1 of w is 40, expected 39"):
        call(weight.packed, x[:, :39])
    with pytest.raises(ValueError, match="dtype = 'float32', expected quantized"):
        call(np.zeros((6, 40), np.float32), dtype="float32")
    with pytest.raises(ValueError, match="dtype = 'quantized', expected float32, float16 or bfloat16"):
        ctx.linear(x, [(out, weight.packed, "quantized", None)])
    with pytest.raises(ValueError, match=f"has {weight.packed.size - 64} bytes, expected {weight.packed.size}"):
        call(weight.packed[:-64])
    with pytest.raises(ValueError, match="at a multiple of 64"):
        call(np.concatenate([np.zeros(1, np.uint8), weight.packed])[1:] if weight.packed.ctypes.data % 64 else weight.packed[1:])
    for at, value, text in ((0, 0, "begins with"), (4, 5, "5 bits"), (6, 7, "blocks of 7"), (8, 3, "scales of type 3"), (9, 3, "kind 3")):
        bad = oracle.aligned(weight.packed.size)
        bad[:] = weight.packed
        bad[at] = value
        with pytest.raises(ValueError, match=text):
            call(bad)
    bad = oracle.aligned(weight.packed.size)
    bad[:] = weight.packed
    bad[64:72] = 0
    with pytest.raises(ValueError, match="order\\[1\\] of a quantised weight is 0"):
        call(bad)

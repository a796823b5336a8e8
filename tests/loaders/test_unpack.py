"""Unpacking in C and in the specification, against packers written from the formats' descriptions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_writers import as_float32, awq, compressed, gptq, groups_of, pack_awq, pack_stream, pack_whole, v1_words

from llmcoopt import reference_quant as spec
from llmcoopt._core import dequantize_groups, unpack

KINDS = {"stream": 0, "whole": 1, "awq": 2}
PACKERS = {"stream": pack_stream, "whole": pack_whole, "awq": lambda lines, bits: pack_awq(lines)}
UNPACKERS = {"stream": spec.unpack_stream, "whole": spec.unpack_whole, "awq": lambda words, bits, n: spec.unpack_awq(words, n)}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([("stream", b) for b in (2, 3, 4, 8)] + [("whole", b) for b in (2, 3, 4, 8)] + [("awq", 4)]),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
    st.data(),
)
def test_unpack(how, lines, eighths, columns, data):
    """Any part of a matrix packed along its rows or columns, both ways round."""
    kind, bits = how
    count = 8 * eighths if kind == "awq" else 7 * eighths
    values = np.random.default_rng([bits, lines, count]).integers(0, 2**bits, (lines, count))
    words = PACKERS[kind](values, bits)
    np.testing.assert_array_equal(UNPACKERS[kind](words, bits, count), values)
    laid = np.ascontiguousarray(words.T if columns else words)
    strides = (1, lines) if columns else (words.shape[1], 1)
    line = data.draw(st.integers(0, lines - 1))
    begin = data.draw(st.integers(0, count - 1))
    n_lines, n = data.draw(st.integers(0, lines - line)), data.draw(st.integers(0, count - begin))
    part, expected = (line, n_lines, begin, n), values[line : line + n_lines, begin : begin + n]
    for transposed in (False, True):
        out = np.empty((n, n_lines) if transposed else (n_lines, n), np.uint8)
        unpack(laid, bits, KINDS[kind], strides, part, transposed, out)
        np.testing.assert_array_equal(out, expected.T if transposed else expected)


def test_published_words():
    """Facts of the formats: 3 bits straddle at values 10 and 21, and the words of symmetric zeros."""
    codes = np.arange(32)[None] % 8
    word = sum(int(code) << (3 * i) for i, code in enumerate(codes[0]))
    assert [word >> 32 * w & 0xFFFFFFFF for w in range(3)] == pack_stream(codes, 3)[0].tolist()
    out = np.empty((1, 32), np.uint8)
    unpack(pack_stream(codes, 3), 3, 0, (3, 1), (0, 1, 0, 32), False, out)
    assert out[0, 10] == 2 and out[0, 21] == 5 and (out == codes).all()
    unpack(np.full(3, 2**32 - 1, np.uint32), 3, 0, (3, 1), (0, 1, 0, 32), False, out)
    assert (out == 7).all()
    words = {2: (0x55555555, 0xAAAAAAAA), 4: (0x77777777, 0x88888888), 8: (0x7F7F7F7F, 0x80808080)}
    for bits, (v1, v2) in words.items():
        zeros = np.full((1, 32), 2 ** (bits - 1))
        assert (v1_words(zeros, bits) == v1).all() and (pack_stream(zeros, bits) == v2).all()
    assert v1_words(np.full((1, 32), 4), 3)[0].tolist() == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]
    assert pack_stream(np.full((1, 32), 4), 3)[0].tolist() == [0x24924924, 0x49249249, 0x92492492]


OUTSIDE = [((0, 2, 0, 9), (2, 1), 3), ((1, 1, 0, 8), (2, 1), 2), ((-1, 1, 0, 8), (1, 1), 4), ((0, 1, -8, 8), (1, 1), 4)]
OUTSIDE += [((0, 1, 0, 8), (-1, 1), 4), ((0, 1, 2**62, 8), (1, 1), 4), ((2**62, 8, 0, 1), (2**62, 1), 4), ((0, 1, 0, 33), (1, 1), 4)]


@pytest.mark.parametrize("part, strides, n_words", OUTSIDE)
def test_parts_outside_the_words_are_refused(part, strides, n_words):
    out = np.zeros((max(0, part[1]), max(0, part[3])), np.uint8)
    with pytest.raises(ValueError):
        unpack(np.zeros(n_words, np.uint32), 4, 0, strides, part, False, out)


@pytest.mark.parametrize("bits, kind, size", [(5, 0, 8), (0, 0, 8), (8, 2, 8), (4, 3, 8), (4, -1, 8), (4, 0, 7)])
def test_unknown_packings_and_wrong_sizes_are_refused(bits, kind, size):
    with pytest.raises(ValueError):
        unpack(np.zeros(4, np.uint32), bits, kind, (1, 1), (0, 1, 0, 8), False, np.zeros(size, np.uint8))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 700), st.integers(1, 300), st.booleans(), st.sampled_from(["F32", "F16", "BF16"]), st.integers(0, 99)
)
def test_dequantize_groups(rows, k, size, shuffled, dtype, seed):
    rng = np.random.default_rng(seed)
    g_idx = groups_of(k, size, rng if shuffled else None)
    groups = int(g_idx.max()) + 1
    codes = rng.integers(0, 256, (rows, k), dtype=np.uint8)
    scales, zeros = rng.random((rows, groups), np.float32) / 8, rng.integers(0, 256, (rows, groups), dtype=np.int16)
    out = np.empty((rows, k), {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])
    assert dequantize_groups(codes, k, scales, zeros, g_idx if shuffled else None, size, out, dtype) == 0
    exact = spec.dequantize(codes, scales.T, zeros.T, g_idx).astype(np.float32)
    if dtype == "BF16":
        bits = exact.view(np.uint32)
        exact = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(out, exact.astype(out.dtype))


def test_dequantize_counts_what_is_lost():
    codes, zeros, out = np.full((1, 4), 200, np.uint8), np.zeros((1, 2), np.int16), np.empty((1, 4), np.float16)
    for scale in (np.nan, np.inf, -np.inf, 400.0):
        assert dequantize_groups(codes, 4, np.array([[1, scale]], np.float32), zeros, None, 2, out, "F16") == 2


@pytest.mark.parametrize("g_idx, size", [([0, 0, 0, 2], 2), ([0, -1, 0, 0], 2), (None, 1), (None, 0), (None, -1), ([0, 0], 2)])
def test_columns_without_a_group_are_refused(g_idx, size):
    arrays = np.zeros((1, 4), np.uint8), 4, np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int16)
    order = None if g_idx is None else np.array(g_idx, np.int32)
    with pytest.raises(ValueError):
        dequantize_groups(*arrays, order, size, np.empty((1, 4), np.float32), "F32")


def test_the_specification_decodes_whole_modules():
    """Every layout's writer and the specification agree, so either can be trusted as the expected value."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((48, 96)).astype(np.float32)
    for bits in (2, 3, 4, 8):
        for version in ("v1", "v2"):
            t, meant = gptq(weight, bits, 32, False, rng, version)
            np.testing.assert_array_equal(spec.gptq(t["qweight"], t["qzeros"], t["scales"], t["g_idx"], bits, version == "v1"), meant)
        t, meant = compressed(weight, bits, 32, False, rng)
        scale = as_float32(t["weight_scale"])
        found = spec.compressed(t["weight_packed"], scale, t["weight_zero_point"], t["weight_g_idx"], bits, weight.shape)
        np.testing.assert_array_equal(found, meant)
    t, meant = awq(weight)
    np.testing.assert_array_equal(spec.awq(t["qweight"], t["qzeros"], t["scales"]), meant)


@pytest.mark.parity
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_packs_alike(bits):
    """The package's own packer, where it is installed: new versions write 3 bits as a stream, older ones in whole words."""
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = np.random.default_rng(bits).integers(0, 2**bits, (40, 72))
    signed = torch.tensor((values - 2 ** (bits - 1)).astype(np.int8))
    np.testing.assert_array_equal(helpers.pack_to_int32(signed, bits).numpy().view(np.uint32), pack_stream(values, bits))
    packed = helpers.pack_to_int32(signed.T.contiguous(), bits, packed_dim=0)
    np.testing.assert_array_equal(packed.numpy().view(np.uint32), pack_stream(values, bits).T)

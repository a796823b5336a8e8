"""One matrix: the steps of csrc/quant and what is made of them, against the float64 oracle."""

import itertools

import gptq_oracle as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcoopt import reference_quant
from llmcoopt._core import OpContext, isas
from llmcoopt.errors import NumericError
from llmcoopt.quantizer.matrix import BLOCK, Hessian, blocks, gptq_tensors, pack, quantize_matrix
from llmcoopt.quantizer.options import Options


def activations(k, tokens=400, seed=0):
    """Inputs of very different size, some of which go together; one is always 0."""
    rng = np.random.default_rng([k, tokens, seed])
    x = rng.standard_normal((tokens, k)) * np.exp(rng.standard_normal(k))
    x[:, 1:] += 0.7 * x[:, :-1]
    x[:, k // 3] = 0
    return x.astype(np.float32)


def weights(n, k, seed=0):
    return (np.random.default_rng([n, k, seed]).standard_normal((n, k)) * 0.05).astype(np.float32)


def exact(x):
    return x.astype(np.float64).T @ x.astype(np.float64)


def hessian_of(context, x, piece=150):
    hessian = Hessian(context, x.shape[1])
    for at in range(0, len(x), piece):
        hessian.add(x[at : at + piece])
    return hessian


@pytest.mark.parametrize(("m", "k"), [(1, 8), (37, 30), (256, 576), (100, 1100)])
def test_hessian(isa, m, k):
    x = activations(k, m)
    context, h = OpContext(isa, 2), np.full((k, k), 0.5)
    context.hessian_add(h, x[:, :])
    size = np.sqrt(np.outer(np.diag(exact(x)), np.diag(exact(x))))
    assert (np.abs(np.tril(h - 0.5 - exact(x))) <= 1e-6 * size + 1e-12).all()
    assert (h[np.triu_indices(k, 1)] == 0.5).all()  # not touched


def test_hessian_takes_rows_of_a_wider_array(isa):
    x = activations(64, 90)
    context, h, g = OpContext(isa, 2), np.zeros((40, 40)), np.zeros((40, 40))
    context.hessian_add(h, x[:, 8:48])
    context.hessian_add(g, np.ascontiguousarray(x[:, 8:48]))
    assert np.array_equal(h, g)


@pytest.mark.parametrize("k", [1, 5, 128, 130, 576, 1000])
def test_factor(isa, k):
    x = activations(k, 2 * k + 20)
    x[:, k // 3] += 0 if k > 5 else 1
    context, h = OpContext(isa, 2), exact(x)
    order = np.random.default_rng(k).permutation(k).astype(np.int32)
    live = np.diag(h)[np.diag(h) > 0].mean()
    found = np.empty((k, k), np.float32)
    assert context.inverse_factor(found, np.tril(h), order, 0.01 * live)
    right = oracle.factor(h[np.ix_(order, order)], 0.01)
    u = np.triu(found[::-1, ::-1].T)
    dead = np.flatnonzero(np.diag(h)[order] == 0)  # any positive number: nothing depends on it
    u[dead, dead] = right[dead, dead]
    assert np.abs(u - right).max() <= 2e-4 * np.abs(right).max()  # float32, of a matrix whose condition is about 1e5
    assert (np.abs(np.diag(u) / np.diag(right) - 1) <= 2e-4).all()


def test_factor_says_when_there_is_none(isa):
    x = activations(64, 20)  # 20 tokens do not determine 64 inputs
    context = OpContext(isa, 1)
    assert not context.inverse_factor(np.empty((64, 64), np.float32), -exact(x), np.arange(64, dtype=np.int32), 0.0)


SHAPES = [(48, 192), (8, 192), (8, 32), (16, 200), (24, 300), (5, 129), (16, 33), (8, 704)]


def check(isa, n, k, options, seed=0, threads=2):
    """quantize_matrix against the oracle."""
    context, x, w = OpContext(isa, threads), activations(k, seed=seed), weights(n, k, seed)
    rtn = options.method == "rtn"
    found = quantize_matrix(context, w, None if rtn else hessian_of(context, x), options, "m")
    least_zero = int(options.format == "gptq" and not options.sym)
    how = (options.bits, options.group, options.sym, options.order, options.damp, least_zero, options.mse)
    given_codes = (found.codes.astype(np.int64), found.scales.T.astype(np.float64), found.zeros.T.astype(np.int64), found.g_idx)
    drift, scale_off, zero_off, loss, same_groups = oracle.verify(given_codes, w, None if rtn else exact(x), *how)
    assert same_groups
    assert drift <= 2e-3  # of a step: float32 against float64 over all columns before
    assert scale_off <= 2**-10 and zero_off <= 1  # the last bit of a float16; a tie of the zero
    if not rtn:
        assert found.loss == pytest.approx(loss.sum(), rel=2e-3)
    assert found.zeros.min() >= least_zero and found.codes.max() < 2**options.bits
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(isas()),
    st.sampled_from(SHAPES),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([-1, 32, 64, 128, 48, 96, 192, 300]),
    st.booleans(),
    st.sampled_from(["none", "columns", "static", "groups"]),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.sampled_from([0.0, 0.0, 2.4]),
    st.integers(0, 3),
)
def test_matrices_against_the_oracle(isa, shape, bits, group, sym, order, format, mse, seed):
    check(isa, *shape, Options(bits, group, sym, "gptq", format, order, mse=mse), seed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_round_to_nearest(isa, bits, sym):
    found = check(isa, 24, 300, Options(bits, 128, sym, "rtn"))
    w = weights(24, 300)
    step = found.scales[:, found.g_idx]
    assert (np.abs(found.decode("F32") - w) <= (0.5 + 2**bits * 2**-11) * step).all()  # the scale is off by 2^-11 at most


def test_the_same_codes_as_the_oracle():
    """No code happens to lie near a tie here, so that all are equal; a scale may differ in the last bit of its float16."""
    context, x, w = OpContext(None, 2), activations(192), weights(48, 192)
    for order in ("none", "columns", "static", "groups"):
        found = quantize_matrix(context, w, hessian_of(context, x), Options(4, 64, False, order=order, format="gptq_v2"), "m")
        codes, scales, zeros, g_idx, _ = oracle.gptq(w, exact(x), 4, 64, False, order)
        assert np.array_equal(found.codes, codes) and np.array_equal(found.zeros.T, zeros)
        assert np.abs(found.scales.T / scales - 1).max() <= 2**-10 and np.array_equal(found.g_idx, g_idx)


def test_gptq_loses_less_than_rounding():
    context, x, w = OpContext(None, 2), activations(256, 3000), weights(64, 256)
    lost = {}
    for name, options in {"rtn": Options(method="rtn"), "gptq": Options(), "order": Options(order="columns")}.items():
        found = quantize_matrix(context, w, None if name == "rtn" else hessian_of(context, x), options, "m")
        error = (found.decode("F32") - w).astype(np.float64) @ x.T
        lost[name] = (error**2).sum()
    assert max(lost["gptq"], lost["order"]) < 0.7 * lost["rtn"]


def test_a_search_of_the_range_loses_less():
    context, w = OpContext(None, 2), weights(64, 256)
    w[:, 7] *= 6  # outliers, which the whole range is made for
    plain, searched = (quantize_matrix(context, w, None, Options(3, method="rtn", mse=mse), "m").decode("F32") for mse in (0.0, 2.4))
    assert (np.abs(searched - w) ** 2.4).sum() < 0.9 * (np.abs(plain - w) ** 2.4).sum()


def test_the_same_bits_on_any_number_of_threads(isa):
    x, w = activations(300), weights(40, 300)
    found = []
    for threads in (1, 2, 3):
        context = OpContext(isa, threads)
        found.append(quantize_matrix(context, w, hessian_of(context, x), Options(order="columns", group=64), "m"))
    for other in found[1:]:
        assert np.array_equal(found[0].codes, other.codes) and np.array_equal(found[0].scales, other.scales)
        assert found[0].loss == other.loss


# ---------------------------------------------------------------- ranges


def grid(row, **options):
    w = np.array([row], np.float32)
    return quantize_matrix(OpContext(None, 1), w, None, Options(4, -1, method="rtn", **options), "m")


def test_symmetric_ranges_are_mirrored():
    found = grid([0.5, 1.0], sym=True)
    assert found.zeros[0, 0] == 8 and found.scales[0, 0] == pytest.approx(2 / 15, rel=1e-3)
    assert np.abs(found.decode("F32") - [0.5, 1.0]).max() <= found.scales[0, 0] / 2 * 1.01


def test_zero_points_at_the_end_of_the_range():
    positive = [0.25, 0.5, 1.0, 0.75]
    v2, v1 = grid(positive, sym=False, format="gptq_v2"), grid(positive, sym=False, format="gptq")
    assert v2.zeros[0, 0] == 0 and v2.scales[0, 0] == pytest.approx(1 / 15, rel=1e-3)
    assert v1.zeros[0, 0] == 1 and v1.scales[0, 0] == pytest.approx(
        1 / 14, rel=1e-3
    )  # a stored field of -1 would borrow from its neighbour
    for found in (v1, v2):
        assert np.abs(found.decode("F32") - positive).max() <= found.scales[0, 0] / 2 * 1.01
    negative = grid([-0.25, -1.0], sym=False)
    assert negative.zeros[0, 0] == 15 and np.isfinite(negative.decode("F32")).all()


def test_groups_of_zeros():
    for sym in (True, False):
        found = grid([0.0, 0.0], sym=sym)
        assert (found.decode("F32") == 0).all() and found.scales[0, 0] > 0


def test_tiny_and_huge_weights():
    tiny = grid([1e-9, -1e-9])
    assert tiny.scales[0, 0] == 2.0**-24 and (tiny.decode("F32") == 0).all()
    with pytest.raises(NumericError, match=r"m: weights are too large: a scale is beyond float16's 65,504"):
        grid([1e6, -1e6])


def test_inputs_that_never_occur_get_zeros():
    context, x, w = OpContext(None, 1), activations(96), weights(8, 96)
    found = quantize_matrix(context, w, hessian_of(context, x), Options(group=32), "m")
    assert (found.decode("F32")[:, 96 // 3] == 0).all()


# ---------------------------------------------------------------- faults


def test_activations_that_are_no_numbers():
    x = activations(32)
    x[5, 3] = np.nan
    with pytest.raises(NumericError, match=r"^mlp.down_proj: its input 3 is NaN or infinite"):
        hessian_of(OpContext(None, 1), x).check("mlp.down_proj")


def test_too_little_text_without_damping():
    context = OpContext(None, 1)
    x = np.ones((20, 64), np.float32)
    hessian = hessian_of(context, x)
    with pytest.raises(
        NumericError, match=r"^m: 20 rows of calibration inputs do not determine its 64 inputs: expected more text, or a damp above 0"
    ):
        quantize_matrix(context, weights(8, 64), hessian, Options(damp=0.0), "m")
    quantize_matrix(context, weights(8, 64), hessian, Options(damp=0.01), "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": (0, 129)}, "the number of columns is 129, expected at most 128"),
        ({"columns": (130, 130)}, "the first of columns is 130"),
        ({"columns": (0, 301)}, "the first of columns is 0"),
        ({"bits": 9}, "bits is 9, expected 2 to 8"),
        ({"least_zero": 2}, "least_zero is 2"),
        ({"group_of": np.full(300, 3, np.int32)}, "an element of group_of is 3"),
        ({"codes": np.empty((4, 299), np.uint8)}, "axis 1 of codes is 299, expected 300"),
        ({"factor": np.empty((300, 200), np.float32)}, "axis 1 of factor is 200"),
        ({"loss": np.empty(4, np.float32)}, "loss holds elements of buffer format 'f', expected 'd'"),
    ],
)
def test_wrong_arguments_of_a_sweep(change, message):
    arguments = {"w": weights(4, 300), "factor": None, "codes": np.empty((4, 300), np.uint8), "scales": np.empty((4, 3), np.float32)}
    arguments |= {"zeros": np.empty((4, 3), np.uint8), "loss": np.zeros(4), "group_of": (np.arange(300) // 128).astype(np.int32)}
    arguments |= {"columns": (0, 128), "bits": 4} | change
    with pytest.raises(ValueError, match=message):
        OpContext(None, 1).sweep_block(**arguments)


def test_wrong_arguments_of_a_factor():
    square, context = np.eye(4), OpContext(None, 1)
    for order, message in (([0, 1, 2, 4], "an element of order is 4"), ([0, 1, 2], "axis 0 of factor is 4, expected 3")):
        with pytest.raises(ValueError, match=message):
            context.inverse_factor(np.empty((4, 4), np.float32), square, np.array(order, np.int32), 0.0)
    with pytest.raises(ValueError, match="axis 0 of h is 4, expected 5"):
        context.hessian_add(square, np.ones((2, 5), np.float32))


# ---------------------------------------------------------------- blocks and packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_blocks(sizes):
    """They cover all columns in order, and a group that begins inside a block ends inside it."""
    group_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    found = blocks(group_of)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == len(group_of)
    edges = np.cumsum([0, *sizes])
    for begin, end in found:
        assert 0 < end - begin <= BLOCK
        for a, b in itertools.pairwise(edges):
            assert not begin < a < end < b


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 150), st.integers(1, 70), st.booleans(), st.integers(0, 2**32))
def test_packing(bits, k, n, v1, seed):
    """What the specification unpacks is what was packed, also where words end with unused bits."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (n, k)).astype(np.uint8)
    assert np.array_equal(reference_quant.unpack_stream(pack(codes, bits), bits, k), codes)
    options = Options(bits, 16, sym=False, format="gptq" if v1 else "gptq_v2", method="rtn")
    w = rng.standard_normal((n, k)).astype(np.float32)
    found = quantize_matrix(OpContext(None, 1), w, None, options, "m")
    tensors = {name: array for name, (_, array) in gptq_tensors(found, options).items()}
    decoded = reference_quant.gptq(tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], bits, v1)
    assert np.array_equal(decoded, found.decode("F32").astype(np.float64))


def test_words_of_symmetric_zeros():
    """The fingerprints by which loaders know the version."""
    for bits, version, words in (
        (2, "gptq", [0x55555555]),
        (3, "gptq", [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
        (4, "gptq", [0x77777777]),
        (8, "gptq", [0x7F7F7F7F]),
        (3, "gptq_v2", [0x24924924, 0x49249249, 0x92492492]),
        (4, "gptq_v2", [0x88888888]),
    ):
        options = Options(bits, 32, method="rtn", format=version)
        tensors = gptq_tensors(quantize_matrix(OpContext(None, 1), weights(32, 64), None, options, "m"), options)
        found = tensors["qzeros"][1].view(np.uint32)
        assert np.array_equal(found[0][: len(words)], words)

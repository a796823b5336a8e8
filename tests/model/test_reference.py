"""The specification itself: against published logits, and against what each part must do by its definition."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import bfloat16_bits, make, prompt, read

from llmcoopt import reference

FIXTURES = ["llama", "mistral", "qwen2", "qwen3", "smollm2"]


def rope(kind="default", **fields):
    base = {"theta": 10000.0, "factor": 4.0, "original_max": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "beta_fast": 32.0}
    base |= {"beta_slow": 1.0, "truncate": True, "attention_factor": 1.0, "short_factor": None, "long_factor": None}
    return SimpleNamespace(kind=kind, **{**base, **fields})


@pytest.mark.parametrize("name", FIXTURES)
def test_published_logits(data, tmp_path, name):
    """Observed: 1.6e-8, the decimals of the file."""
    folder = data / "models" / "hf-tiny-logits"
    (tmp_path / "config.json").write_bytes((folder / f"tiny_{name}_config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / f"tiny_{name}.safetensors").read_bytes())
    config, weights = read(tmp_path)
    cases = json.loads((folder / f"tiny_{name}_logits.json").read_text())
    for ids, logits in zip(cases["sequences"], cases["logits"], strict=True):
        np.testing.assert_allclose(reference.forward(config, weights, ids), logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family, fields", [("llama", {}), ("mistral", {"sliding_window": 5}), ("qwen3", {"head_dim": 10})])
def test_pieces_equal_whole(tmp_path, family, fields):
    make(tmp_path, family, **fields)
    config, weights = read(tmp_path)
    ids = prompt(23)
    whole = reference.forward(config, weights, ids)
    cache, pieces = reference.Cache(config), []
    for begin, end in [(0, 1), (1, 9), (9, 10), (10, 23)]:
        pieces.append(reference.forward(config, weights, ids[begin:end], cache))
    assert len(cache) == 23
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-12)
    cache.truncate(9)
    np.testing.assert_allclose(reference.forward(config, weights, ids[9:], cache), whole[9:], rtol=0, atol=1e-12)


def test_later_tokens_do_not_change_earlier_logits(tmp_path):
    make(tmp_path)
    config, weights = read(tmp_path)
    ids = prompt(12)
    a = reference.forward(config, weights, ids)
    b = reference.forward(config, weights, [*ids[:7], *(1 + i for i in ids[7:11])])
    np.testing.assert_allclose(b[:7], a[:7], rtol=0, atol=1e-12)
    assert np.abs(b[7:11] - a[7:11]).max() > 0.1


def test_window_counts_the_token_itself():
    """A window of 1 sees the token alone, so attention returns its value; a window of 2 with equal scores the mean of two."""
    q, keys, values = np.zeros((4, 2, 2)), np.ones((4, 1, 2)), np.arange(8.0).reshape(4, 1, 2)
    positions = np.arange(4)
    np.testing.assert_array_equal(reference.attend(q, keys, values, positions, 1), np.repeat(values, 2, axis=1))
    mean = np.repeat((values[1:] + values[:-1]) / 2, 2, axis=1)
    np.testing.assert_array_equal(reference.attend(q, keys, values, positions, 2)[1:], mean)
    np.testing.assert_array_equal(reference.attend(q, keys, values, positions, 0)[3, 0], values.mean(axis=0)[0])


def test_query_heads_of_a_group_are_neighbours():
    """Heads 0, 1, 2 read key/value head 0 and 3, 4, 5 head 1 (not alternating)."""
    values = np.stack([np.ones((1, 2)), np.full((1, 2), 2.0)], axis=1)
    out = reference.attend(np.zeros((1, 6, 2)), np.zeros((1, 2, 2)), values, np.arange(1), 0)
    np.testing.assert_array_equal(out[0, :, 0], [1, 1, 1, 2, 2, 2])


# ---------------------------------------------------------------- rope


def test_rotation_keeps_length_and_sees_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 10))

    def at(x, position):
        return reference.rotate(x, *reference.rope_tables(rope(), 10, [position], 1))[0, 0]

    assert np.linalg.norm(at(q, 77)) == pytest.approx(np.linalg.norm(q), rel=1e-12)
    # Angles are rounded to float32: 100 * 2^-24 radians and a little more.
    assert at(q, 3) @ at(k, 1) == pytest.approx(at(q, 103) @ at(k, 101), abs=1e-5)


def test_rotation_pairs_halves():
    """At position 1 the first pair, elements 0 and d/2, turns by one radian."""
    x = np.zeros((1, 1, 6))
    x[0, 0, 0] = 1.0
    y = reference.rotate(x, *reference.rope_tables(rope(), 6, [1], 1))[0, 0]
    np.testing.assert_allclose(y, [np.cos(1), 0, 0, np.sin(1), 0, 0], atol=1e-15)


def test_plain_frequencies():
    np.testing.assert_array_equal(reference.inverse_frequencies(rope(), 4, 1), np.float32([1.0, 0.01]))


def test_linear_divides_positions():
    plain = reference.inverse_frequencies(rope(), 8, 1)
    np.testing.assert_array_equal(reference.inverse_frequencies(rope("linear"), 8, 1), plain / 4)


def test_dynamic_begins_past_the_trained_length():
    plain = reference.inverse_frequencies(rope(), 8, 1)
    for length in (1, 63, 64):
        np.testing.assert_array_equal(reference.inverse_frequencies(rope("dynamic"), 8, length), plain)
    # factor 4, length 128 of 64: stretch 4 * 2 - 3 = 5, theta 10000 * 5^(8/6).
    theta = 10000.0 * 5.0 ** (8 / 6)
    np.testing.assert_array_equal(reference.inverse_frequencies(rope("dynamic"), 8, 128), np.float32(theta ** (-np.arange(4) / 4)))


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    plain = reference.inverse_frequencies(rope(), 64, 1)
    yarn = reference.inverse_frequencies(rope("yarn", original_max=2048), 64, 1)
    assert yarn[0] == plain[0]
    assert yarn[-1] == plain[-1] / 4
    assert (np.diff(plain / yarn) >= -1e-6).all()
    exact = reference.inverse_frequencies(rope("yarn", original_max=2048, truncate=False), 64, 1)
    assert np.abs(exact - yarn).max() > 1e-4
    sharp = reference.inverse_frequencies(rope("yarn", original_max=2048, beta_fast=8.0, beta_slow=8.0, truncate=False), 64, 1)
    assert set(np.round(plain / sharp)) == {1, 4}


def test_attention_factor_scales_cos_and_sin():
    cos, sin = reference.rope_tables(rope("yarn", attention_factor=1.5), 4, [0, 3], 4)
    np.testing.assert_allclose(cos**2 + sin**2, 2.25, rtol=1e-14)


def test_llama3_by_wavelength():
    """Over 8192 positions: more than 4 turns stay, less than 1 turn is divided by the factor, between them a line in turns."""
    plain = reference.inverse_frequencies(rope(), 64, 1).astype(np.float64)
    scaled = reference.inverse_frequencies(rope("llama3", original_max=8192), 64, 1)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], np.float32(plain)[turns > 4])
    np.testing.assert_array_equal(scaled[turns < 1], np.float32(plain / 4)[turns < 1])
    between = (turns > 1) & (turns < 4)
    assert between.any()
    fast = (turns[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], plain[between] * (fast + (1 - fast) / 4), rtol=2e-7)


def test_longrope_switches_after_the_trained_length():
    kind = rope("longrope", short_factor=[1.0, 2.0], long_factor=[4.0, 8.0])
    plain = reference.inverse_frequencies(rope(), 4, 1)
    np.testing.assert_array_equal(plain / reference.inverse_frequencies(kind, 4, 64), [1, 2])
    np.testing.assert_array_equal(plain / reference.inverse_frequencies(kind, 4, 65), [4, 8])


def test_angles_are_float32_products():
    """The 24-bit product, not the exact one: 1234567 * fl(10000^(-1/3)) differs between the two by up to 2^-8."""
    cos, _ = reference.rope_tables(rope(), 6, [1234567], 1)
    inv = np.float32(10000.0 ** (-1 / 3))
    assert cos[0, 1] == np.cos(np.float64(np.float32(1234567) * inv))
    assert abs(cos[0, 1] - np.cos(1234567 * np.float64(inv))) > 1e-6


def test_unknown_rope_kind():
    with pytest.raises(ValueError, match="unknown rope kind 'spiral'"):
        reference.inverse_frequencies(rope("spiral"), 4, 1)


# ---------------------------------------------------------------- numbers


def test_bfloat16_bits_are_read():
    x = np.float32([1.0, -2.5, 3.140625, 0.0])
    np.testing.assert_array_equal(reference.float64(bfloat16_bits(x)), x)


def test_softmax_and_silu_of_large_numbers():
    np.testing.assert_array_equal(reference.softmax(np.array([1e5, 0.0, -np.inf])), [1, 0, 0])
    np.testing.assert_allclose(reference.silu(np.array([-1e4, 0.0, 1e4])), [0, 0, 1e4])
    x = np.linspace(-20, 20, 41)
    np.testing.assert_allclose(reference.silu(x), x / (1 + np.exp(-x)), rtol=1e-9)


# ---------------------------------------------------------------- generation and sampling


def test_greedy(tmp_path):
    make(tmp_path)
    config, weights = read(tmp_path)
    ids = prompt(5)
    new = reference.generate(config, weights, ids, 8)
    assert len(new) == 8
    whole = reference.forward(config, weights, [*ids, *new])
    assert whole[4:-1].argmax(axis=1).tolist() == new
    assert reference.generate(config, weights, ids, 8, eos={new[3]}) == new[: new.index(new[3]) + 1]
    assert reference.generate(config, weights, ids, 0) == []


HALVES = np.log([0.5, 0.375, 0.125])


@pytest.mark.parametrize("p, kept", [(0.25, 1), (0.5, 1), (0.75, 2), (0.9, 3), (1.0, 3)])
def test_top_p_keeps_the_crossing_token(p, kept):
    assert np.count_nonzero(reference.probabilities(HALVES, top_p=p)) == kept


def test_top_p_border_is_exact():
    """Powers of two, so that the sums are exact: the mass reached at p itself is enough."""
    logits = np.array([1.0, 0.0, 0.0]) * np.log(2.0)
    assert reference.softmax(logits).tolist() == [0.5, 0.25, 0.25]
    assert np.count_nonzero(reference.keep_top_p(logits, 0.5) > -np.inf) == 1
    assert np.count_nonzero(reference.keep_top_p(logits, 0.75) > -np.inf) == 2


def test_top_k():
    logits = np.array([1.0, 3.0, 2.0, 3.0])
    assert np.flatnonzero(reference.probabilities(logits, top_k=1)).tolist() == [1]
    assert np.flatnonzero(reference.probabilities(logits, top_k=3)).tolist() == [1, 2, 3]
    for all_of_them in (0, 4, 100):
        np.testing.assert_array_equal(reference.probabilities(logits, top_k=all_of_them), reference.softmax(logits))


def test_min_p():
    assert np.count_nonzero(reference.probabilities(HALVES, min_p=0.5)) == 2
    assert np.count_nonzero(reference.probabilities(HALVES, min_p=0.8)) == 1
    assert np.count_nonzero(reference.probabilities(HALVES, min_p=1.0)) == 1


def test_repetition_penalty_once_per_id_and_away_from_zero():
    logits = np.array([-1.0, -2.0, 4.0, 1.0])
    np.testing.assert_array_equal(reference.penalize(logits, [0, 2, 2, 0, 2], 2.0), [-2, -2, 2, 1])
    np.testing.assert_array_equal(logits, [-1, -2, 4, 1])


def test_order_of_processors():
    """Each line would differ if two steps changed places."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    # Temperature before top_p: at 0.5 the squares are 16 9 4 1 of 30, so 0.8 is reached by two tokens and not by three.
    assert np.count_nonzero(reference.probabilities(logits, temperature=0.5, top_p=0.8)) == 2
    assert np.count_nonzero(reference.probabilities(logits, top_p=0.8)) == 3
    # top_k before top_p: of the two left the first has 4/7.
    assert np.count_nonzero(reference.probabilities(logits, top_k=2, top_p=0.55)) == 1
    # The penalty comes first: id 0 falls behind and top_k drops it.
    assert np.flatnonzero(reference.probabilities(logits, seen=[0], repetition_penalty=3.0, top_k=1)).tolist() == [1]


def test_uniform():
    """Philox 4x32-10 of zero counter and zero key begins with 6627e8d5 e169c58d (the known answer of its authors)."""
    assert reference.uniform(0, 0) == (0x6627E8D5E169C58D >> 11) / 2**53
    u = np.array([reference.uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(2000)])
    assert u.min() >= 0 and u.max() < 1
    assert len(np.unique(u)) == 6000
    counts = np.histogram(u, 10, (0, 1))[0]
    assert (np.abs(counts - 600) < 5 * np.sqrt(600 * 0.9)).all()


def test_draw():
    p = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [reference.draw(p, u) for u in (0.0, 0.2499, 0.25, 0.9999, 1.0)] == [1, 1, 3, 3, 3]


def test_sampling_depends_on_seed_and_place(tmp_path):
    make(tmp_path)
    config, weights = read(tmp_path)
    ids = prompt(4)

    def run(**how):
        return reference.generate(config, weights, ids, 12, do_sample=True, **how)

    assert run(seed=1) == run(seed=1) != run(seed=2)
    assert run(seed=1, top_k=1) == reference.generate(config, weights, ids, 12)
    assert run(seed=1)[3:] == reference.generate(config, weights, ids + run(seed=1)[:3], 9, do_sample=True, seed=1)

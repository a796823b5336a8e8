"""Choice of pages in the whole model. Keys here say which token they belong to and hardly where it stands, and prompts repeat each token for a
while: so pages differ, and it can be proven that most of them don't matter."""

import numpy as np
import pytest
from checkpoints import make

import llmcoopt
from llmcoopt.errors import ArgumentError

CONTEXT = 800
DTYPES = ["float32", "bfloat16", "fp8_e4m3", "int8"]
IDS = np.repeat(np.random.default_rng(5).permutation(53)[:40], 17)[:640].tolist()
NEXT = np.random.default_rng(6).integers(0, 53, 60).tolist()


@pytest.fixture(scope="module", params=["ref", "best"])
def model(request, tmp_path_factory):
    def edit(weights):
        for name, w in weights.items():
            if "k_proj" in name:
                w.reshape(2, 6, -1)[:, [0, 3]] = 0  # the pair that turns fastest
            if "q_proj" in name:
                w *= 12

    folder = tmp_path_factory.mktemp("repeats")
    make(folder, edit=edit, num_hidden_layers=2, rope_theta=1e12, max_position_embeddings=CONTEXT)
    with llmcoopt.Model.from_pretrained(folder, threads=2, isa="ref" if request.param == "ref" else None) as model:
        yield model


def cache_of(model, dtype, tolerance, **options):
    return llmcoopt.KVCache(model, dtype, **{"page_size": 16, "max_tokens": 4096, "page_tolerance": tolerance} | options)


def decode(model, seq, ids=NEXT):
    return np.stack([model.forward([i], seq)[0] for i in ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_are_left_out_within_the_tolerance(model, dtype):
    with cache_of(model, dtype, None) as exact, cache_of(model, dtype, 0.001) as cut, cache_of(model, dtype, 0.3) as coarse:
        sequences = [c.sequence() for c in (exact, cut, coarse)]
        right, found, far = ((model.forward(IDS, seq, last_only=True), decode(model, seq)) for seq in sequences)
        assert np.array_equal(right[0], found[0]), "prompt rows read everything"
        stats, loose = cut.stats(), coarse.stats()
        assert 0 < stats["largest_mass_left_out"] <= 0.001001 and stats["pages_left_out"] > 1000
        assert loose["pages_left_out"] > stats["pages_left_out"] and 0.01 < loose["largest_mass_left_out"] <= 0.3001
        pages = 2 * 2 * sum(pos // 16 + 1 for pos in range(640, 700))
        assert stats["pages_read"] + stats["pages_left_out"] == pages
        errors = [np.abs(a[1] - right[1]).max() / np.abs(right[1]).max() for a in (found, far)]
        assert 0 < errors[0] < 0.05, "not with a larger tolerance: queries 12 times their size may turn to another page"
        assert exact.stats()["pages_read"] == exact.stats()["largest_mass_left_out"] == exact.stats()["bounds_bytes"] == 0
        assert stats["bounds_bytes"] == 44 * 2 * 2 * 2 * 6 * 2
        cut.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pages_read_is_exact_to_the_bit(model, dtype):
    with cache_of(model, dtype, None) as exact, cache_of(model, dtype, 1e-300) as cut:
        right, found = ([model.forward(IDS, seq), decode(model, seq)] for seq in (exact.sequence(), cut.sequence()))
        assert all(np.array_equal(a, b) for a, b in zip(right, found, strict=True))
        assert cut.stats()["pages_left_out"] == 0 < cut.stats()["pages_read"]


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3"])
def test_neighbours_forks_and_recycled_pages_change_nothing(model, dtype):
    """Requests one at a time in a fresh cache each, against all at once in a cache that is full of something else's remains."""
    prompts = [IDS[17 * i :][: 300 + 11 * i] for i in range(4)]
    alone = []
    for prompt in prompts:
        with cache_of(model, dtype, 0.02) as cache:
            alone.append(llmcoopt.generate(model, prompt, cache=cache, max_new_tokens=40, ignore_eos=True).run())
            assert cache.stats()["pages_left_out"] > 100
    with cache_of(model, dtype, 0.02, max_tokens=1600) as cache:
        for i in range(2):
            seq = cache.sequence()
            model.forward(IDS[::-1][i * 10 :], seq, last_only=True)
            fork = seq.fork()
            fork.truncate(200 + i)
            model.forward(NEXT, fork)
            cache.check()
            seq.free()
            fork.free()
        base = cache.sequence()
        model.forward(prompts[1][:250], base, last_only=True)
        found = llmcoopt.generate(model, prompts[1][250:], sequence=base.fork(), max_new_tokens=40, ignore_eos=True).run()
        assert found.ids == alone[1].ids
        base.free()
        engine, events = llmcoopt._core.Engine(cache._core, 8, 100), []
        for prompt in prompts:
            engine.add(np.array(prompt, np.int32), 40, np.array([], np.int32), True, 0, False, 1.0, 0, 1.0, 0.0, 1.0, 0, None)
        while engine.stats()["waiting"] + engine.stats()["running"]:
            engine.step(events)
            engine.check()
        engine.close()
        for i, right in enumerate(alone):
            assert [token for request, token, *_ in events if request == i] == right.ids


def test_pages_in_a_file(model, tmp_path):
    """What is left out is not read from there either."""
    with cache_of(model, "fp8_e4m3", 0.01) as cache:
        seq = cache.sequence()
        model.forward(IDS, seq, last_only=True)
        right, size, counts = decode(model, seq), cache.stats()["page_bytes"], cache.stats()
    fetched = []
    for tolerance in (None, 0.01):
        with cache_of(model, "fp8_e4m3", tolerance, host_bytes=6 * size, spill_path=tmp_path) as cache:
            seq = cache.sequence()
            model.forward(IDS, seq, last_only=True)
            before = cache.stats()["bytes_fetched"]
            assert np.array_equal(decode(model, seq), right) == bool(tolerance)
            stats = cache.stats()
            fetched.append(stats["bytes_fetched"] - before)
            assert stats["pages_away"] > 20
            cache.check()
    assert stats["pages_left_out"] == counts["pages_left_out"]
    assert fetched[1] < 0.95 * fetched[0]


def test_with_a_window(model):
    with cache_of(model, "fp8_e4m3", 0.01, attention_window=400, attention_sinks=20) as cache:
        seq = cache.sequence()
        model.forward(IDS, seq, last_only=True)
        decode(model, seq)
        stats = cache.stats()
        assert stats["pages_left_out"] > 500 and stats["pages_released"] > 10
        assert stats["pages_read"] + stats["pages_left_out"] <= 2 * 2 * 60 * (400 // 16 + 4)
        cache.check()


def test_what_is_said(model):
    cache = cache_of(model, "auto", 0.01)
    assert "approximate: pages left out up to 0.01 of the weights" in repr(cache) and "pages left out" in cache._repr_html_()
    assert "approximate" not in repr(cache_of(model, "auto", 0))
    for bad in (-0.1, 1.0, 1, True, "0.1", float("nan")):
        with pytest.raises(ArgumentError, match=r"page_tolerance = .*, expected a number from 0 to less than 1"):
            cache_of(model, "auto", bad)

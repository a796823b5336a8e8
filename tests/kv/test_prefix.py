"""The prefix index: prompts that begin alike share pages, and nothing of that shows in what they say."""

import numpy as np
import pytest
from checkpoints import make

import llmcoopt
from llmcoopt.cache import DTYPES, SCALED

PAGE = 16
IDS = np.random.default_rng(11).integers(0, 2048, 600).tolist()
OTHER = np.random.default_rng(12).integers(0, 2048, 600).tolist()
OPTIONS = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    with llmcoopt.Model.from_pretrained("tiny", threads=2) as model:
        yield model


def cache_of(model, dtype="fp8_e4m3", on=True, pages=64, **options):
    return llmcoopt.KVCache(model, dtype, page_size=PAGE, max_tokens=pages * PAGE, prefix_cache=on, **options)


def say(model, cache, prompts):
    found = model.generate(prompts, cache=cache, return_dict_in_generate=True, **OPTIONS)
    cache.check()
    return found.new_ids, found.logprobs


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_prompt_again(model, dtype):
    """Also where its length is a multiple of the page: one token is left to compute."""
    with cache_of(model, dtype, on=False) as plain, cache_of(model, dtype) as cache:
        for n in (1, 15, 16, 17, 32, 33, 100):
            expected = say(model, plain, [IDS[:n]])
            assert say(model, cache, [IDS[:n]]) == expected
            before = cache.stats()["writes_skipped"]["prefix"]
            assert say(model, cache, [IDS[:n]]) == expected
            assert cache.stats()["writes_skipped"]["prefix"] - before == (n - 1) // PAGE * PAGE
        stats = cache.stats()
        assert stats["pages_cached"] == 6 and stats["pages_free"] == stats["pages_total"] and stats["tokens_held"] == 0


@pytest.mark.parametrize("shared", [6, 16, 17, 40, 64])
def test_prompts_that_begin_alike(model, shared):
    one, other = IDS[:90], [*IDS[:shared], *OTHER[:50]]
    with cache_of(model, on=False) as plain, cache_of(model) as cache:
        expected = say(model, plain, [one]), say(model, plain, [other])
        assert say(model, cache, [one]) == expected[0]
        assert say(model, cache, [other]) == expected[1]
        assert cache.stats()["writes_skipped"]["prefix"] == shared // PAGE * PAGE


def test_a_batch(model):
    prompts = [[*IDS[: 20 * i], *OTHER[:30]] for i in range(6)] * 2
    with cache_of(model, on=False) as plain, cache_of(model) as cache:
        expected = say(model, plain, prompts)
        assert say(model, cache, prompts) == expected
        assert say(model, cache, prompts) == expected
        assert cache.stats()["writes_skipped"]["prefix"] >= len(prompts) * 16


def test_pages_go_when_others_need_them(model):
    """Fill, give up, use again with another text: the old text must not be found in the new pages."""
    with cache_of(model, on=False, pages=12) as plain, cache_of(model, pages=12) as cache:
        for text in (IDS, OTHER, IDS, IDS[100:], OTHER, IDS):
            assert say(model, cache, [text[:150]]) == say(model, plain, [text[:150]])
        stats = cache.stats()
        assert stats["pages_cached"] >= 9 and stats["pages_free"] == 12
        cache.forget_prefixes()
        cache.check()
        assert cache.stats()["pages_cached"] == 0 and cache.stats()["resident_bytes"] == 0
        assert say(model, cache, [IDS[:150]]) == say(model, plain, [IDS[:150]])


def test_preempted_requests(model):
    prompts = [[*IDS[i : i + 40]] for i in range(0, 160, 40)]
    with cache_of(model, on=False) as plain, cache_of(model, pages=8) as cache:
        assert say(model, cache, prompts) == say(model, plain, prompts)


@pytest.mark.parametrize("on", [True, False], ids=["index", "none"])
def test_cached_tokens_of_a_generation(model, on):
    """As many as a plain look at what was said before tells; also while it runs, and after its end."""
    with cache_of(model, on=on) as cache:
        said = []
        for prompt in (IDS[:50], IDS[:50], IDS[:48], IDS[:49], [*IDS[:20], *OTHER[:70]], OTHER[:90], IDS[:5]):
            like = [sum(np.cumprod([a == b for a, b in zip(old, prompt, strict=False)])) for old in said]
            expected = max(min(n, len(prompt) - 1) // PAGE * PAGE for n in [0, *like]) if on else 0
            generation = llmcoopt.generate(model, prompt, cache=cache, **OPTIONS)
            assert generation.stats["cached_tokens"] == 0  # nothing was looked for yet
            next(generation)
            assert generation.stats["cached_tokens"] == expected
            stats = generation.run().stats
            assert (stats["cached_tokens"], stats["prompt_tokens"]) == (expected, len(prompt))
            assert stats["engine"]["prompt_tokens"] == len(prompt) - expected  # computed
            said.append(prompt)


def test_cached_tokens_of_a_sequence_and_a_batch(model):
    with cache_of(model) as cache:
        say(model, cache, [IDS[:40]])
        sequence = cache.sequence()
        first = llmcoopt.generate(model, IDS[:40], sequence=sequence, **OPTIONS).run()
        assert first.stats["cached_tokens"] == 32
        second = llmcoopt.generate(model, IDS[:40], sequence=sequence, **OPTIONS).run()
        assert second.stats["cached_tokens"] == 0  # what a sequence holds already was not looked for
        prompts = [IDS[:40], OTHER[:40], [*IDS[:16], *OTHER[:40]]]
        found = model.generate(prompts, cache=cache, return_dict_in_generate=True, **OPTIONS)
        assert found.stats["engine"]["cached_tokens"] == 32 + 0 + 16


def test_cached_tokens_of_preempted_requests(model):
    """A request finds its own pages again when it comes back; they were never there before it."""
    shared = IDS[:32]
    prompts = [[*shared, *OTHER[10 * i : 10 * i + 3]] for i in range(4)]
    options = {**OPTIONS, "max_new_tokens": 60}
    with cache_of(model, pages=14) as cache:
        say(model, cache, [[*shared, 0]])
        cache.reset_stats()
        found = model.generate(prompts, cache=cache, return_dict_in_generate=True, **options)
        assert found.errors == [None] * 4
        engine = found.stats["engine"]
        assert engine["preemptions"] >= 1 and engine["cached_tokens"] == 4 * 32
        assert cache.stats()["writes_skipped"]["prefix"] > 4 * 32  # found again, too


def test_forward(model):
    with cache_of(model, on=False) as plain, cache_of(model) as cache:
        expected = model.forward(IDS[:70], plain.sequence(), last_only=True)
        for _ in range(2):
            assert np.array_equal(model.forward(IDS[:70], cache.sequence(), last_only=True), expected)
        assert cache.stats()["writes_skipped"]["prefix"] == 64
        sequence = cache.sequence()
        assert model.forward(IDS[:70], sequence).shape[0] == 70  # all rows were asked: all are computed
        assert sequence.ids == IDS[:70]


def test_only_what_a_prompt_computes_is_kept(model):
    """Rows of single tokens are rounded otherwise; a block that came back from codes holds other numbers."""
    with cache_of(model) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:20], sequence)
        for i in IDS[20:40]:
            model.forward([i], sequence)
        say(model, cache, [IDS[:41]])
        assert cache.stats()["writes_skipped"]["prefix"] == 16
    for dtype in SCALED:
        for buffered in (True, False):
            with cache_of(model, dtype, write_buffer=buffered) as cache:
                sequence = cache.sequence()
                model.forward([*IDS[:40], *OTHER[:10]], sequence)
                sequence.truncate(24)  # into a block that has its codes
                model.forward(OTHER[:40], sequence)
                say(model, cache, [[*IDS[:24], *OTHER[:40]]])
                assert cache.stats()["writes_skipped"]["prefix"] == 16
                cache.check()


@pytest.mark.parametrize("residual", [16, 32, 64])
@pytest.mark.parametrize("cut", [0, 40, 48, 64, 79, 80, 96, 128, 129])
def test_stretches_that_came_back_from_codes_are_not_kept(model, cut, residual):
    """Tokens after a cut inside a full stretch attend to codes where a prompt's attend to 16 bit."""
    text = [*IDS[:cut], *OTHER[:100]]
    options = {"page_size": 64, "max_tokens": 2048, "residual_length": residual}
    with llmcoopt.KVCache(model, **options) as plain, llmcoopt.KVCache(model, prefix_cache=True, **options) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:130], sequence)
        sequence.truncate(cut)
        model.forward(OTHER[:100], sequence)
        assert say(model, cache, [text]) == say(model, plain, [text])
        exact = cut % residual == 0 or cut // residual == 130 // residual
        assert cache.stats()["writes_skipped"]["prefix"] == ((len(text) - 1) // 64 * 64 if exact else cut // 64 * 64)


def test_with_a_spill_file(model, tmp_path):
    with cache_of(model, on=False) as plain:
        size = plain.stats()["page_bytes"]
        with cache_of(model, host_bytes=6 * size, spill_path=tmp_path) as cache:
            for text in (IDS, OTHER, IDS, OTHER):
                assert say(model, cache, [text[:150]]) == say(model, plain, [text[:150]])
            assert cache.stats()["writes_skipped"]["prefix"] == 2 * 144 and cache.stats()["pages_away"] > 0


def test_rotations_that_depend_on_the_length_share_nothing(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0}
    make(tmp_path, rope_scaling=rope, max_position_embeddings=64)
    prompt = [i % 50 for i in range(40)]
    with llmcoopt.Model.from_pretrained(tmp_path) as model, cache_of(model) as cache:
        say(model, cache, [prompt])
        say(model, cache, [prompt])
        model.forward(prompt, cache.sequence(), last_only=True)
        assert cache.stats()["writes_skipped"]["prefix"] == 0 and cache.stats()["pages_cached"] == 0


def test_keep_and_other_skipped_writes(model):
    with cache_of(model, "bfloat16") as cache:
        sequence = cache.sequence()
        model.forward(IDS[:50], sequence)
        assert sequence.keep([*IDS[:30], *OTHER[:10]]) == 30 and len(sequence) == 30
        assert sequence.keep(IDS[:30]) == 29 and len(sequence) == 29
        assert sequence.keep(IDS[:200]) == 29 and sequence.keep([]) == 0 and len(sequence) == 0
        padded = np.array([[0, 0, 0, *IDS[:5]], IDS[:8]])
        model.generate(padded, attention_mask=padded != 0, cache=cache, **OPTIONS)
        assert cache.stats()["writes_skipped"] == {"padding": 3, "duplicate": 88, "prefix": 0}
        assert cache.stats()["bytes_written"] == cache.stats()["tokens_appended"] * cache.stats()["bytes_per_token"]
        cache.reset_stats()
        stats = cache.stats()
        assert stats["writes_skipped"] == {"padding": 0, "duplicate": 0, "prefix": 0} and stats["bytes_written"] == 0


def test_bytes_written_are_counted_as_blocks_go(model):
    with cache_of(model, "int8") as cache:
        sequence = cache.sequence()
        model.forward(IDS[:15], sequence)
        assert cache.stats()["bytes_written"] == 0
        model.forward(IDS[:2], sequence)
        assert cache.stats()["bytes_written"] == 16 * cache.stats()["bytes_per_token"]


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    make(folder, "mistral", sliding_window=40, max_position_embeddings=500)
    with llmcoopt.Model.from_pretrained(folder, threads=2, isa="ref") as model:
        yield model


@pytest.mark.parametrize("lengths", [[200], [30, 170], [10, 190]], ids=str)
def test_pages_that_left_a_window(mistral, lengths):
    """The index keeps them, and who takes them over gives back those that no row to come sees. A call of many tokens leaves pages behind before
    the index is told of them: then it knows none of those after."""
    ids = [i % 53 for i in IDS[:200]]
    with cache_of(mistral, on=False) as plain, cache_of(mistral) as cache:
        expected = mistral.forward(ids, plain.sequence(), last_only=True)
        for _ in range(3):
            sequence, done = cache.sequence(), 0
            for n in lengths:
                found = mistral.forward(ids[done : done + n], sequence, last_only=True)
                cache.check()
                done += n
            stats = cache.stats()
            assert np.array_equal(found, expected)
            assert stats["pages_total"] - stats["pages_free"] <= 9 and stats["pages_released"] > 0
            sequence.free()
            cache.check()


def test_generations_with_a_window(mistral):
    """In chunks smaller than the window all pages are told of before they go: the second time nearly nothing is computed."""
    prompts = [[i % 53 for i in IDS[:300]], [i % 53 for i in [*IDS[:150], *OTHER[:90]]]]
    with cache_of(mistral, on=False) as plain, cache_of(mistral) as cache:
        expected = say(mistral, plain, prompts)
        for _ in range(2):
            engine, events, tokens = llmcoopt._core.Engine(cache._core, 2, 32), [], [[], []]
            for prompt in prompts:
                engine.add(np.array(prompt, np.int32), 12, np.array([], np.int32), True, 0, False, 1.0, 0, 1.0, 0.0, 1.0, 0, None)
            while engine.stats()["waiting"] + engine.stats()["running"]:
                engine.step(events)
                engine.check()
            for request, token, *_ in events:
                tokens[request].append(token)
            computed = engine.stats()["prompt_tokens"]
            engine.close()
            assert tokens == expected[0]
        assert computed <= 2 * PAGE and cache.stats()["pages_free"] == cache.stats()["pages_total"]

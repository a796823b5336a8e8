"""Pages that left the window are released, and nothing else changes. The plain cache here has pages so large that none ever leaves it."""

import numpy as np
import pytest
from checkpoints import make, steps

import llmcoopt
from llmcoopt.errors import ArgumentError, OutOfPagesError

WINDOW, CONTEXT = 40, 500
IDS = np.random.default_rng(3).integers(0, 53, CONTEXT).tolist()
DTYPES = ["float32", "bfloat16", "fp8_e4m3"]


@pytest.fixture(scope="module", params=["ref", "best"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    make(folder, "mistral", sliding_window=WINDOW, max_position_embeddings=CONTEXT)
    with llmcoopt.Model.from_pretrained(folder, threads=2, isa="ref" if request.param == "ref" else None) as model:
        yield model


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A model without windows of its own."""
    folder = tmp_path_factory.mktemp("llama")
    make(folder, max_position_embeddings=CONTEXT)
    with llmcoopt.Model.from_pretrained(folder, threads=2, isa="ref") as model:
        yield model


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def page_size(model):
    """Small pages where results may not depend on their size; else pages that end where those of the plain cache have their blocks."""
    return 16 if model.isa == "ref" else 64


def pages_used(cache):
    stats = cache.stats()
    return stats["pages_total"] - stats["pages_free"]


def most_pages(cache, window=WINDOW, sinks=0, prompt=False):
    """A sequence's between steps: the window, a page for going back, the one being filled, and the sinks. After a prompt also what was seen
    where it began."""
    pages = -(-(window + cache.page_size) // cache.page_size) + 1 + -(-sinks // cache.page_size)
    return pages + (-(-window // cache.page_size) + 1) * prompt


def plain(model, dtype, **options):
    return llmcoopt.KVCache(model, dtype, page_size=512, max_tokens=8192, residual_length=page_size(model), **options)


@pytest.mark.parametrize("sight", [{}, {"attention_window": 21, "attention_sinks": 5}], ids=["window", "sinks"])
def test_memory_is_bounded_and_logits_are_the_same(model, dtype, sight):
    window, sinks = sight.get("attention_window", WINDOW), sight.get("attention_sinks", 0)
    with plain(model, dtype, **sight) as all_pages, llmcoopt.KVCache(model, dtype, page_size(model), 2048, **sight) as cache:
        lengths = [30, 1, 1, 90, *[1] * 200]
        seq = cache.sequence()
        expected = steps(model, all_pages.sequence(), IDS[:400], *lengths)
        found, at = [], 0
        for n in [*lengths, 400 - sum(lengths)]:
            found.append(model.forward(IDS[at : at + n], seq))
            at += n
            cache.check()
            assert pages_used(cache) <= most_pages(cache, window, sinks, n > 1), at
        assert np.array_equal(np.concatenate(found), expected)
        assert cache.stats()["pages_released"] >= 400 // cache.page_size - most_pages(cache, window, sinks, True)
        assert all_pages.stats()["pages_released"] == 0
        assert len(seq) == 400 and seq.ids == IDS[:400]
        assert cache.stats()["resident_bytes"] <= (most_pages(cache, window, sinks, True) + 1) * cache.stats()["page_bytes"] + 8192


def test_generation_longer_than_the_cache(model, dtype):
    size = page_size(model)
    with plain(model, dtype) as all_pages:
        right = llmcoopt.generate(model, IDS[:150], cache=all_pages, max_new_tokens=300, ignore_eos=True).run()
    tokens = WINDOW + 4 * size
    with llmcoopt.KVCache(model, dtype, size, tokens) as cache:
        found = llmcoopt.generate(model, IDS[:150], cache=cache, max_new_tokens=300, ignore_eos=True).run()
        assert found.ids == right.ids and found.logprobs == right.logprobs
        assert cache.stats()["pages_free"] == cache.stats()["pages_total"]
    with llmcoopt.KVCache(model, dtype, size, WINDOW) as cache, pytest.raises(OutOfPagesError, match="make it with max_tokens of at least"):
        llmcoopt.generate(model, IDS[:150], cache=cache, max_new_tokens=300, ignore_eos=True)


@pytest.mark.parametrize("held", [0, 37, 170])
def test_preempted_requests_start_again(model, dtype, held):
    """Several at once where there are pages for about two; one goes on with a sequence that has left pages behind already."""
    size = page_size(model)
    prompts = [IDS[i * 20 : i * 20 + 12 + 7 * i] for i in range(5)]
    with plain(model, dtype) as all_pages:
        alone = []
        for i, prompt in enumerate(prompts):
            seq = all_pages.sequence()
            if i == 4 and held:
                model.forward(IDS[:held], seq)
            alone.append(llmcoopt.generate(model, prompt, sequence=seq, max_new_tokens=120, ignore_eos=True).run())
    with llmcoopt.KVCache(model, dtype, size, 12 * size) as cache:
        seq = cache.sequence()
        if held:
            model.forward(IDS[:held], seq)
        engine = llmcoopt._core.Engine(cache._core, 8, 48)
        eos = np.array([], np.int32)
        for i, prompt in enumerate(prompts):
            engine.add(np.array(prompt, np.int32), 120, eos, True, 0, False, 1.0, 0, 1.0, 0.0, 1.0, 0, seq._core if i == 4 else None)
        tokens, events = [[] for _ in prompts], []
        while engine.stats()["waiting"] + engine.stats()["running"]:
            engine.step(events)
            engine.check()
        for request, token, _, _, error in events:
            assert error is None, error
            tokens[request].append(token)
        assert engine.stats()["preemptions"] > 0
        engine.close()
        assert tokens == [a.ids for a in alone]
        assert len(seq) == held + len(prompts[4]) + 119
        assert pages_used(cache) <= most_pages(cache)
        cache.check()


@pytest.mark.parametrize("length", [100, 160, 203])
def test_forks(model, dtype, length):
    with plain(model, dtype) as all_pages, llmcoopt.KVCache(model, dtype, page_size(model), 4096) as cache:
        right = all_pages.sequence()
        steps(model, right, IDS[:length], 60, 70)
        first = cache.sequence()
        steps(model, first, IDS[:length], 60, 70)
        forks = [first.fork(), first.fork()]
        for i, seq in enumerate(forks):
            rest = IDS[200 + 50 * i :][:120]
            assert np.array_equal(steps(model, seq, rest, 1, 1, 50), steps(model, right.fork(), rest, 1, 1, 50))
            cache.check()
        first.free()
        cache.check()
        assert pages_used(cache) <= 2 * most_pages(cache, prompt=True)


def test_a_page_back_is_always_there(model, dtype):
    with plain(model, dtype) as all_pages, llmcoopt.KVCache(model, dtype, page_size(model), 4096) as cache:
        for length in range(200, 200 + cache.page_size, 5):
            seq, right = cache.sequence(), all_pages.sequence()
            for each in (seq, right):
                model.forward(IDS[:length], each)
                each.truncate(length - cache.page_size)
            assert np.array_equal(steps(model, seq, IDS[300:400], 1), steps(model, right, IDS[300:400], 1)), length
            cache.check()


def test_further_back_is_refused(model, dtype):
    with llmcoopt.KVCache(model, dtype, page_size(model), 4096) as cache:
        seq = cache.sequence()
        steps(model, seq, IDS[:400], 100, 100, 100)
        fork = seq.fork()
        with pytest.raises(
            ArgumentError, match=r"have left the window of 40 and were released; truncate to (\d+) or more, or free"
        ) as caught:
            seq.truncate(200)
        least = int(str(caught.value).split("truncate to ")[2].split()[0])
        assert len(seq) == 400 and 200 < least <= 400 - cache.page_size
        with pytest.raises(ArgumentError, match="left the window"):
            seq.truncate(least - 1)
        seq.truncate(least)
        cache.check()
        fork.truncate(0)
        assert np.array_equal(
            model.forward(IDS[:90], fork), model.forward(IDS[:90]) if dtype == "float32" else steps(model, cache.sequence(), IDS[:90])
        )
        cache.check()


def test_keep_what_can_be_kept(model, dtype):
    """A conversation that is taken up far back, where pages are gone, is computed again; one that goes on is not."""
    with llmcoopt.KVCache(model, dtype, page_size(model), 4096) as cache:
        seq = cache.sequence()
        model.forward(IDS[:400], seq, last_only=True)
        assert seq.keep(IDS[:410]) == 400 and len(seq) == 400
        assert seq.keep([*IDS[:100], 1, 2]) == 0 and len(seq) == 0
        cache.check()
        seq.free()
        with pytest.raises(ArgumentError, match="freed"):
            seq.keep(IDS[:9])


@pytest.mark.parametrize("held", [1, 130, 144])
def test_a_failed_call_goes_back(model, dtype, held):
    """Over several chunks, far past the window: the sequence is as it was before."""
    size = page_size(model)
    with llmcoopt.KVCache(model, dtype, size, 4096) as cache:
        seq = cache.sequence()
        model.forward(IDS[:held], seq)
        used = pages_used(cache)
        core, left = model._core, 3

        class Failing:
            def __getattr__(self, name):
                return getattr(core, name)

            def forward(self, *args, **kwargs):
                nonlocal left
                left -= 1
                if not left:
                    raise KeyboardInterrupt
                core.forward(*args, **kwargs)

        seq.cache._core, real = Chunked(seq.cache._core, 64), seq.cache._core
        model._core = Failing()
        try:
            with pytest.raises(KeyboardInterrupt):
                model.forward(IDS[:300], seq)
        finally:
            model._core, seq.cache._core = core, real
        cache.check()
        assert len(seq) == held and pages_used(cache) <= used
        lone = cache.sequence()
        model.forward(IDS[:held], lone)
        assert np.array_equal(steps(model, seq, IDS[200:300], 1, 30), steps(model, lone, IDS[200:300], 1, 30))


class Chunked:
    """Stands for a cache's core: forward() takes so many tokens at once."""

    def __init__(self, core, n):
        self.core, self.n = core, n

    def __getattr__(self, name):
        return getattr(self.core, name)

    def step_tokens(self):
        return self.n


def test_released_rows_read_as_nan(model):
    with llmcoopt.KVCache(model, "float32", page_size(model), 4096) as cache:
        seq = cache.sequence()
        model.forward(IDS[:300], seq)
        keys, values = seq.kv(1)
        gone = np.isnan(keys).all((1, 2))
        assert gone.any() and not gone[300 - WINDOW :].any() and np.array_equal(gone, np.isnan(values).all((1, 2)))


def test_mixed_windows_keep_all(tmp_path):
    make(tmp_path, "qwen2", use_sliding_window=True, sliding_window=20, max_window_layers=1, max_position_embeddings=CONTEXT)
    with (
        llmcoopt.Model.from_pretrained(tmp_path, isa="ref") as model,
        llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=4096) as cache,
    ):
        seq = cache.sequence()
        model.forward(IDS[:300], seq)
        assert cache.stats()["pages_released"] == 0
        seq.truncate(7)
        cut = llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=4096, attention_window=60)
        model.forward(IDS[:300], cut.sequence())
        assert cut.stats()["pages_released"] > 8


def test_the_shorter_window_holds(model, dtype):
    """Of a model's own and the cache's."""
    sights = {}, {"attention_window": 400, "attention_sinks": 9}, {"attention_window": 20}
    found = [steps(model, plain(model, dtype, **sight).sequence(), IDS[:120], 100) for sight in sights]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0][:20], found[2][:20]) and not np.array_equal(found[0], found[2])


def test_sinks_and_window_wide_enough_are_exact(full, dtype):
    with plain(full, dtype) as exact, plain(full, dtype, attention_window=90, attention_sinks=30) as cut:
        right, found = (steps(full, cache.sequence(), IDS[:200], 180) for cache in (exact, cut))
    assert np.array_equal(right[:120], found[:120])
    assert not np.array_equal(right[120:], found[120:])


def test_what_is_said(full):
    with llmcoopt.KVCache(full, attention_window=90, attention_sinks=4) as cache:
        assert "approximate: window 90, 4 sinks" in repr(cache) and "window 90" in cache._repr_html_()
    assert "approximate" not in repr(llmcoopt.KVCache(full))
    for options, text in (
        ({"attention_window": 0}, "attention_window = 0, expected a whole number from 1 to"),
        ({"attention_sinks": 3}, "attention_sinks = 3, expected 0 to .* without an attention_window"),
        ({"attention_window": 2**40}, "attention_window = 1099511627776, expected 1 to"),
    ):
        with pytest.raises(ArgumentError, match=text):
            llmcoopt.KVCache(full, **options)

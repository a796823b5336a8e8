"""Taps show what the specification computes at each point, on every instruction set, and change nothing."""

import numpy as np
import pytest
from checkpoints import error, make, prompt, read

import llmcoopt
from llmcoopt import Tap, reference, taps
from llmcoopt.errors import ArgumentError

BOUND = 2e-5  # float32 sums in another order, relative to a row's largest value. Observed: 7e-7


class Notes:
    """A look that keeps everything."""

    def __init__(self):
        self.seen = []

    def __call__(self, point, layer, rows):
        self.seen.append((point, layer, rows))

    def whole(self):
        """(point, layer) -> rows of all chunks."""
        places = list(dict.fromkeys((point, layer) for point, layer, _ in self.seen))
        return {place: np.concatenate([r for *p, r in self.seen if tuple(p) == place]) for place in places}


def expected(config, weights, ids, monkeypatch):
    """(point, layer) -> rows of the specification."""
    rows, layers = {}, []
    names = {"q_proj": "attention_input", "o_proj": "attended", "gate_proj": "mlp_input", "down_proj": "down_input", "lm_head": "hidden"}
    linear, attend = reference.linear, reference.attend

    def seen_linear(x, weights, name):
        if (point := names.get(name.rsplit(".")[-1])) is not None:
            rows[point, config.n_layers if point == "hidden" else int(name.split(".")[2])] = x
        return linear(x, weights, name)

    def seen_attend(q, keys, values, positions, window):
        for point, x in {"q": q, "k": keys, "v": values}.items():
            rows[point, len(layers)] = x.reshape(len(ids), -1)
        layers.append(len(layers))
        return attend(q, keys, values, positions, window)

    monkeypatch.setattr(reference, "linear", seen_linear)
    monkeypatch.setattr(reference, "attend", seen_attend)
    reference.forward(config, weights, ids)
    return rows


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_point_against_the_specification(tmp_path, isa, monkeypatch, family):
    make(tmp_path, family, head_dim=10, tie_word_embeddings=False)
    config, weights = read(tmp_path)
    ids, notes = prompt(40), Notes()
    right = expected(config, weights, ids, monkeypatch)
    with llmcoopt.Model.from_pretrained(tmp_path, isa=isa, threads=2) as model, llmcoopt.KVCache(model, "float32") as cache:
        model.forward(ids, cache.sequence(), last_only=True, tap=Tap(taps.POINTS, notes))
    assert [place for *place, _ in notes.seen] == [
        [point, layer] for layer in range(config.n_layers) for point in taps.POINTS if point != "hidden"
    ] + [["hidden", config.n_layers]]
    found = notes.whole()
    assert set(found) == set(right)
    for place, rows in right.items():
        assert found[place].dtype == np.float32
        assert error(found[place], rows) < BOUND, place


def test_turned_keys_and_queries_are_shown_as_they_were(model):
    """A cache that has them turned shows the same but for rounding; layer 0, whose input is exact."""
    ids, seen = prompt(60, model.config.vocab_size), []
    for turn_keys in (True, False):
        with llmcoopt.KVCache(model, "int8", turn_keys=turn_keys) as cache:
            seen.append(Notes())
            model.forward(ids, cache.sequence(), tap=Tap(["q", "k", "v"], seen[-1], layers=[0]))
    for (point, _, turned), (_, _, plain) in zip(*(notes.seen for notes in seen), strict=True):
        assert error(turned, plain) < 1e-6, point
        assert (point == "v") == np.array_equal(turned, plain)


def test_nothing_else_changes(model):
    """Logits and the cache, with chunks cut shorter, all logits or the last, prompt and single tokens."""
    rng = np.random.default_rng(0)
    with llmcoopt.KVCache(model, "fp8") as cache:
        plain, tapped, notes = cache.sequence(), cache.sequence(), Notes()
        for n in (700, 1, 30, 1):
            ids = rng.integers(0, model.config.vocab_size, n)
            right = model.forward(ids, plain)
            fork = tapped.fork()
            assert np.array_equal(model.forward(ids, tapped, tap=Tap(taps.POINTS, notes)), right)
            assert np.array_equal(model.forward(ids, fork, last_only=True, tap=Tap("hidden", notes)), right[-1])
        assert tapped.ids == plain.ids


def test_long_prompts_keep_to_the_room(model, monkeypatch):
    ids = prompt(500, model.config.vocab_size)
    whole, pieces = Notes(), Notes()
    right = model.forward(ids, tap=Tap(["k", "hidden"], whole))
    c = model.config
    row = 4 * (c.num_hidden_layers * c.num_key_value_heads * c.head_dim + c.hidden_size)
    monkeypatch.setattr(taps, "ROOM", 37 * row + 3)
    assert np.array_equal(model.forward(ids, tap=Tap(["k", "hidden"], pieces)), right)
    assert {len(rows) for *_, rows in pieces.seen} == {37, 500 % 37}
    for place, rows in whole.whole().items():
        assert np.array_equal(pieces.whole()[place], rows), place


def test_layers(model):
    notes, n = Notes(), model.config.num_hidden_layers
    model.forward([1, 2, 3], tap=Tap("v", notes, layers=[-1, 0, n - 1]))
    assert [place for *place, _ in notes.seen] == [["v", 0], ["v", n - 1]]


@pytest.mark.parametrize("exception", [ZeroDivisionError, KeyboardInterrupt])
def test_an_exception_leaves_no_trace(model, exception):
    ids = prompt(800, model.config.vocab_size)
    calls = []

    def look(point, layer, rows):
        calls.append(len(rows))
        if len(calls) > model.config.num_hidden_layers:  # in the second chunk
            raise exception

    with llmcoopt.KVCache(model, "fp8") as cache:
        seq, lone = cache.sequence(), cache.sequence()
        for each in (seq, lone):
            model.forward(ids[:21], each)
        with pytest.raises(exception):
            model.forward(ids, seq, tap=Tap("q", look))
        assert calls[-1] == 800 - 512 and seq.ids == ids[:21]
        cache.check()
        assert np.array_equal(model.forward(ids[:50], seq), model.forward(ids[:50], lone))


def test_the_function_may_use_the_model(model):
    """Also the very sequence: it holds the chunk by then."""
    with llmcoopt.KVCache(model, "auto") as cache:
        seq, held = cache.sequence(), []
        model.forward([5, 6, 7], seq, tap=Tap("hidden", lambda *_: held.append((len(seq), model.forward([5, 6, 7]).shape))))
    assert held == [(3, (3, model.config.vocab_size))]


def test_bad_taps(model):
    def look(*_):
        raise AssertionError

    n = model.config.num_hidden_layers
    with pytest.raises(ArgumentError, match="'scores', expected some of attention_input, q,"):
        Tap(["q", "scores"], look)
    with pytest.raises(ArgumentError, match="none given"):
        Tap([], look)
    with pytest.raises(ArgumentError, match="found int"):
        Tap("q", 3)
    with pytest.raises(ArgumentError, match=f"expected numbers from -{n} to {n - 1}"):
        model.forward([1, 2], tap=Tap("q", look, layers=[n]))
    with pytest.raises(ArgumentError, match="found str, expected a Tap"):
        model.forward([1, 2], tap="q")


def test_bad_arrays_for_the_core(model):
    """The extension checks what it is given: names, layers, sizes, types."""
    ids, n = np.array([1, 2], np.int32), model.config.num_hidden_layers
    good = np.empty((2, model.config.hidden_size), np.float32)
    cases = {
        "no point 'scores'": ("scores", 0, good),
        f"'mlp_input' of layer {n}; the model has {n} layers": ("mlp_input", n, good),
        "'hidden' of layer 0": ("hidden", 0, good),
        "expected 2 rows of": ("hidden", n, good[:1]),
        "is not float32": ("hidden", n, good.astype(np.float64)),
    }
    with llmcoopt.KVCache(model, "auto") as cache:
        seq = cache.sequence()
        for text, place in cases.items():
            with pytest.raises(ArgumentError, match=text):
                model._core.forward(seq._core, ids, taps=[("hidden", n, good), place])
            assert len(seq) == 0
        with pytest.raises(TypeError, match="tuples"):
            model._core.forward(seq._core, ids, taps=[3])
        cache.check()

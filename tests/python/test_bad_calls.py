"""Wrong arguments and broken numbers: a typed error that names the argument, and the objects stay usable."""

import numpy as np
import pytest
from checkpoints import SMALL, make, prompt

import llmcoopt
from llmcoopt.errors import ArgumentError, NumericError, OutOfPagesError

VOCAB = SMALL["vocab_size"]


@pytest.fixture
def model(tmp_path):
    make(tmp_path, max_position_embeddings=64)
    return llmcoopt.Model.from_pretrained(tmp_path)


@pytest.fixture
def seq(model):
    return llmcoopt.KVCache(model, dtype="float32").sequence()


@pytest.mark.parametrize("bad", [-1, VOCAB, 2**31 - 1, 2**31, 2**40, -(2**40)])
def test_ids_outside_the_vocabulary(model, seq, bad):
    with pytest.raises(ArgumentError, match=str(bad)):
        model.forward([1, bad, 2], seq)
    assert len(seq) == 0
    with pytest.raises(ArgumentError, match=str(bad)):
        list(llmcoopt.generate(model, [1, bad], max_new_tokens=2))
    with pytest.raises(ArgumentError, match=str(bad)):
        model.generate([[1, 2], [bad]], max_new_tokens=2)
    assert model.forward([1, 2], seq).shape == (2, VOCAB)


@pytest.mark.parametrize("bad", ["text", [1.5], [[1, 2], [3, 4]], None, 7, ["a"], [None], np.zeros(3)])
def test_ids_of_a_wrong_kind(model, seq, bad):
    with pytest.raises((ArgumentError, TypeError), match="ids"):
        model.forward(bad, seq)
    assert len(seq) == 0


@pytest.mark.parametrize(
    "kind", [list, tuple, lambda x: np.array(x, np.int32), lambda x: np.array(x, np.int64), lambda x: np.array(x, np.uint16)]
)
def test_ids_of_any_integer_kind(model, kind):
    ids = prompt(9)
    a, b = (model.forward(x, llmcoopt.KVCache(model, "auto").sequence()) for x in (ids, kind(ids)))
    np.testing.assert_array_equal(a, b)


def test_empty_prompt(model, seq):
    for call in (
        lambda: model.forward([], seq),
        lambda: list(llmcoopt.generate(model, [], max_new_tokens=2)),
        lambda: model.generate([[1], []], max_new_tokens=2),
    ):
        with pytest.raises(ArgumentError, match=r"empty|at least"):
            call()


def test_longer_than_the_context(model, seq):
    with pytest.raises(ArgumentError, match=r"65.*64"):
        model.forward([1] * 65, seq)
    model.forward([1] * 60, seq)
    with pytest.raises(ArgumentError, match="64"):
        model.forward([1] * 5, seq)
    assert len(seq) == 60
    assert model.forward([1] * 4, seq).shape == (4, VOCAB)
    with pytest.raises(ArgumentError, match="64"):
        list(llmcoopt.generate(model, [1] * 65, max_new_tokens=2))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"max_new_tokens": -1},
    ],
    ids=str,
)
def test_generation_arguments(model, fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        list(llmcoopt.generate(model, [1, 2], **{"max_new_tokens": 2, "do_sample": True, **fields}))


def test_unknown_argument(model):
    with pytest.raises(TypeError, match="temprature"):
        llmcoopt.generate(model, [1], max_new_tokens=1, temprature=1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"dtype": "float7"}, "float7"),
        ({"page_size": 17}, "17"),
        ({"page_size": 0}, "page_size"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**62}, "max_tokens"),
    ],
    ids=str,
)
def test_cache_arguments(model, fields, message):
    with pytest.raises(llmcoopt.Error, match=message):
        llmcoopt.KVCache(model, **fields)


def test_model_arguments(tmp_path):
    make(tmp_path)
    with pytest.raises(ArgumentError, match="mmx"):
        llmcoopt.Model.from_pretrained(tmp_path, isa="mmx")
    with pytest.raises(ArgumentError, match="threads"):
        llmcoopt.Model.from_pretrained(tmp_path, threads=-1)
    with pytest.raises(llmcoopt.Error, match="float7"):
        llmcoopt.Model.from_pretrained(tmp_path, dtype="float7")


def test_full_cache(model):
    """All or nothing: the sequence keeps its length, and goes on once there is room."""
    cache = llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=32)
    a, b = cache.sequence(), cache.sequence()
    model.forward([1] * 16, a)
    with pytest.raises(OutOfPagesError, match="max_tokens"):
        model.forward([1] * 17, b)
    assert (len(a), len(b)) == (16, 0)
    a.free()
    model.forward([1] * 17, b)
    cache.check()


def test_objects_of_another_model(model, seq, tmp_path):
    make(tmp_path / "other")
    other = llmcoopt.Model.from_pretrained(tmp_path / "other")
    with pytest.raises(ArgumentError, match="another model"):
        other.forward([1], seq)
    with pytest.raises((ArgumentError, TypeError)):
        model.forward([1], "seq")


def test_closed_model_and_freed_sequence(model, seq):
    seq.free()
    with pytest.raises(ArgumentError, match="free"):
        model.forward([1], seq)
    model.close()
    with pytest.raises(ArgumentError, match="closed"):
        model.generate([[1]], max_new_tokens=1)
    model.close()


@pytest.mark.parametrize("place", ["mlp.down_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, isa, value, place):
    """Wherever they stand: no maximum or exponential on the way may swallow a NaN."""

    def edit(weights):
        weights[f"model.layers.1.{place}.weight"][3, 5] = value

    make(tmp_path, edit=edit)
    model = llmcoopt.Model.from_pretrained(tmp_path, isa=isa)
    seq = llmcoopt.KVCache(model, "auto").sequence()
    with pytest.raises(NumericError, match=r"(?i)nan"):
        model.forward([1, 2, 3], seq)
    assert len(seq) == 0
    with pytest.raises(NumericError, match=r"(?i)nan"):
        list(llmcoopt.generate(model, [1, 2, 3], max_new_tokens=3))
    with pytest.raises(NumericError, match=r"(?i)nan"):
        model.generate([[1, 2, 3], [4]], max_new_tokens=3)

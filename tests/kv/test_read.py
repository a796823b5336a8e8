"""Sequence.kv: what is in the cache, as numbers."""

import numpy as np
import oracle
import pytest
from checkpoints import make

import llmcoopt
from llmcoopt.cache import SCALED
from llmcoopt.errors import ArgumentError

IDS = np.random.default_rng(3).integers(0, 53, 90).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    make(folder, num_hidden_layers=1)  # the keys of a first layer don't depend on how others are stored
    with llmcoopt.Model.from_pretrained(folder, threads=1, isa="ref") as model:
        yield model


def held(model, n, dtype, **options):
    with llmcoopt.KVCache(model, dtype, page_size=32, max_tokens=256, **options) as cache:
        sequence = cache.sequence()
        if n:
            model.forward(IDS[:n], sequence)
        return sequence.kv(0)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 63, 64, 90])
def test_as_the_next_token_reads_them(model, n):
    exact = held(model, n, "float32")
    assert exact[0].shape == (n, 2, 6) and exact[0].dtype == np.float32
    for dtype in ("float16", "bfloat16"):
        for found, truth in zip(held(model, n, dtype), exact, strict=True):
            assert np.array_equal(found, oracle.decode(oracle.encode(truth, dtype), dtype))
    for dtype in SCALED:
        whole, few = n // 32 * 32, 4
        pages = oracle.CodedPages(3, 1, 2, 6, 32, dtype)
        pages.write([0, 1, 2], 0, *exact)
        coded = pages.read([0, 1, 2], 0, whole) if whole else (exact[0][:0],) * 2
        for found, truth, code in zip(held(model, n, dtype, turn_keys=False), exact, coded, strict=True):
            exact_rows = oracle.decode(oracle.encode(truth, "bfloat16"), "bfloat16")
            assert np.array_equal(found[few:whole], code[few:].astype(np.float32))
            assert np.array_equal(found[:few], exact_rows[:few]) and np.array_equal(found[whole:], exact_rows[whole:])


def test_without_a_write_buffer_all_are_codes(model):
    coded, exact = held(model, 20, "int8", write_buffer=False, turn_keys=False), held(model, 20, "float32")
    assert not np.array_equal(coded[0][16:], exact[0][16:]) and np.abs(coded[0] - exact[0]).max() < np.abs(exact[0]).max() / 100


@pytest.mark.parametrize("dtype", SCALED)
def test_turned_keys_are_turned_back(model, dtype):
    keys, _ = held(model, 90, "float32")
    turned, plain = held(model, 90, dtype), held(model, 90, dtype, turn_keys=False)
    assert np.array_equal(turned[1], plain[1]) and not np.array_equal(turned[0], plain[0])
    for found in (turned[0], plain[0]):
        assert np.abs(found - keys).max() < 0.1 * np.abs(keys).max()


def test_read_only_and_dlpack(model):
    keys, values = held(model, 5, "bfloat16")
    with pytest.raises(ValueError, match="read-only"):
        keys[0] = 0
    assert np.array_equal(np.from_dlpack(values.copy()), values)


def test_bad_layers(model):
    with llmcoopt.KVCache(model, "auto", max_tokens=64) as cache:
        for layer in (-1, 1, True, 0.0, "0", None):
            with pytest.raises(ArgumentError, match=r"layer = .*expected a whole number from 0 to 0"):
                cache.sequence().kv(layer)

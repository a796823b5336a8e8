"""A call over several steps that fails leaves a one-byte sequence exactly as it was, also inside a block of 16 tokens."""

import numpy as np
import pytest

import llmcoopt
from llmcoopt.cache import SCALED
from llmcoopt.errors import OutOfPagesError


@pytest.fixture(scope="module")
def model():
    return llmcoopt.Model.from_pretrained("tiny")


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("length", [21, 31, 32])
def test_a_prompt_that_runs_out_of_pages(model, dtype, length):
    ids = np.random.default_rng(0).integers(1, model.config.vocab_size, 700).tolist()
    logits = []
    for fails in (False, True):
        with llmcoopt.KVCache(model, dtype=dtype, page_size=16, max_tokens=560) as cache:
            sequence = cache.sequence()
            model.forward(ids[:length], sequence)
            if fails:
                with pytest.raises(OutOfPagesError):
                    model.forward(ids[:600], sequence)  # two chunks: the second finds no pages
                cache.check()
                assert len(sequence) == length
            logits.append(model.forward(ids[length : length + 39], sequence))
    assert np.array_equal(*logits)


def test_a_huge_cache_costs_nothing_before_it_is_written(model):
    with llmcoopt.KVCache(model, dtype="fp8", max_tokens=5_000_000_000) as cache:
        sequence = cache.sequence()
        model.forward(list(range(1, 1001)), sequence)
        stats = cache.stats()
        assert stats["reserved_bytes"] > 1e12
        assert 1000 * stats["bytes_per_token"] <= stats["resident_bytes"] <= 1000 * stats["bytes_per_token"] + 2 * stats["page_bytes"]
        cache.check()

"""Address space is reserved, memory is used as tokens are written."""

import llmcoopt


def test_a_huge_cache_costs_nothing_before_it_is_written(model):
    with llmcoopt.KVCache(model, dtype="fp8", max_tokens=5_000_000_000) as cache:
        sequence = cache.sequence()
        model.forward(list(range(1, 1001)), sequence)
        stats = cache.stats()
        assert stats["reserved_bytes"] > 1e12
        assert 1000 * stats["bytes_per_token"] <= stats["resident_bytes"] <= 1000 * stats["bytes_per_token"] + 2 * stats["page_bytes"]
        cache.check()

"""generate, Model.generate and sequences: what users rely on. The embedded model is the test model: it has a tokenizer."""

import gc

import numpy as np
import pytest

import llmcoopt
from llmcoopt.errors import ArgumentError, OutOfPagesError

PROMPT = "Once upon a time, there was a little girl named"


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(PROMPT)


def test_iterator(model, ids):
    generation = llmcoopt.generate(model, ids, max_new_tokens=12)
    tokens = list(generation)
    assert tokens == generation.ids and len(tokens) == 12
    assert generation.finish_reason == "length"
    assert len(generation.logprobs) == 12 and all(p <= 0 for p in generation.logprobs)
    assert next(generation, None) is None
    assert "12 new tokens" in repr(generation)


def test_greedy_is_the_largest_logit_and_its_logprob(model, ids):
    generation = llmcoopt.generate(model, ids, max_new_tokens=1).run()
    logits = model.forward(ids, last_only=True).astype(np.float64)
    assert generation.ids == [int(logits.argmax())]
    expected = logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert generation.logprobs[0] == pytest.approx(expected, abs=2e-6)  # observed 2e-7


def test_text_and_pieces_agree(model, tokenizer):
    generation = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=40, seed=3, temperature=0.8)
    pieces = list(generation.pieces())
    assert "".join(pieces) == generation.text
    assert PROMPT + generation.text == tokenizer.decode(generation.prompt + generation.ids, skip_special_tokens=True)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_stop_strings_are_cut_and_end_generation(model, tokenizer, length):
    whole = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=40).run().text
    at = 20
    stop = whole[at : at + length]
    first = whole.index(stop)
    generation = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=40, stop_strings=stop)
    pieces = list(generation.pieces())
    assert generation.text == "".join(pieces) == whole[:first]
    assert generation.finish_reason == "stop"


def test_stop_strings_need_a_tokenizer(model, ids):
    with pytest.raises(ArgumentError, match="tokenizer"):
        llmcoopt.generate(model, ids, stop_strings="x")
    with pytest.raises(ArgumentError, match="tokenizer"):
        llmcoopt.generate(model, PROMPT)


def test_seed_decides_and_is_told(model, ids):
    first = llmcoopt.generate(model, ids, temperature=1.2, max_new_tokens=20)
    assert first.seed is not None
    again = llmcoopt.generate(model, ids, temperature=1.2, max_new_tokens=20, seed=first.seed).run()
    assert again.ids == first.run().ids
    others = {tuple(llmcoopt.generate(model, ids, temperature=1.2, max_new_tokens=20, seed=s).run().ids) for s in range(5)}
    assert len(others) > 1


def test_temperature_zero_is_greedy(model, ids):
    assert (
        llmcoopt.generate(model, ids, temperature=0, max_new_tokens=8).run().ids
        == llmcoopt.generate(model, ids, max_new_tokens=8).run().ids
    )


def test_eos_list_ends_at_the_first(model, ids):
    tokens = llmcoopt.generate(model, ids, max_new_tokens=20, ignore_eos=True).run().ids
    unused = next(i for i in range(model.config.vocab_size) if i not in tokens)
    stop = tokens[7]
    generation = llmcoopt.generate(model, ids, max_new_tokens=20, eos_token_id=[unused, stop]).run()
    assert generation.finish_reason == "eos"
    assert generation.ids == tokens[: tokens.index(stop) + 1]
    delayed = llmcoopt.generate(model, ids, max_new_tokens=20, eos_token_id=stop, min_new_tokens=12).run()
    assert len(delayed.ids) >= 12


def test_sequence_goes_on_where_it_stopped(model, ids):
    whole = llmcoopt.generate(model, ids, max_new_tokens=16, ignore_eos=True).run().ids
    sequence = llmcoopt.KVCache(model, "auto").sequence()
    first = llmcoopt.generate(model, ids, max_new_tokens=8, ignore_eos=True, sequence=sequence).run()
    assert sequence.ids == ids + first.ids[:-1]
    second = llmcoopt.generate(model, first.ids[-1:], max_new_tokens=8, ignore_eos=True, sequence=sequence).run()
    assert first.ids + second.ids == whole
    sequence.cache.check()


def test_fork_and_truncate(model, ids):
    cache = llmcoopt.KVCache(model, "auto", max_tokens=1024)
    sequence = cache.sequence()
    model.forward(ids, sequence)
    expected = model.forward([5, 6, 7], sequence.fork())
    fork = sequence.fork()
    assert np.array_equal(model.forward([5, 6, 7], fork), expected)
    assert len(sequence) == len(ids) and len(fork) == len(ids) + 3
    fork.truncate(len(ids))
    assert fork.ids == sequence.ids
    assert np.array_equal(model.forward([5, 6, 7], fork), expected)
    assert cache.stats()["pages_copied"] >= 2
    fork.free()
    with pytest.raises(ArgumentError, match="freed"):
        model.forward([1], fork)
    with pytest.raises(ArgumentError, match="truncate"):
        sequence.truncate(len(ids) + 1)
    cache.check()


def test_pages_return(model, ids):
    cache = llmcoopt.KVCache(model, "auto", max_tokens=2048)
    for close in (lambda g: g.close(), lambda g: [next(g), g.close()], lambda g: g.run(), lambda g: None):
        generation = llmcoopt.generate(model, ids, cache=cache, max_new_tokens=30)
        close(generation)
        del generation
        gc.collect()
        assert cache.stats()["pages_free"] == cache.stats()["pages_total"]
        cache.check()


def test_a_sequence_in_use_is_guarded(model, ids):
    sequence = llmcoopt.KVCache(model, "auto").sequence()
    generation = llmcoopt.generate(model, ids, sequence=sequence, max_new_tokens=10)
    next(generation)
    for use in (lambda: sequence.truncate(0), sequence.free, sequence.fork, lambda: model.forward([1], sequence), sequence.cache.close):
        with pytest.raises(ArgumentError, match=r"in use|uses it"):
            use()
    with pytest.raises(ArgumentError, match="uses it"):
        llmcoopt.generate(model, ids, sequence=sequence)
    generation.close()
    assert len(sequence) >= len(ids)
    sequence.truncate(3)


def test_batch(model, ids):
    prompts = [ids, ids[:3], ids[:1]]
    rows = model.generate(prompts, max_new_tokens=6)
    assert [row[: len(p)] for row, p in zip(rows, prompts, strict=True)] == prompts
    new = model.generate(prompts, max_new_tokens=6, return_full=False)
    assert [p + n for p, n in zip(prompts, new, strict=True)] == rows
    for p, n in zip(prompts, new, strict=True):
        assert llmcoopt.generate(model, p, max_new_tokens=6).run().ids == n
    few = model.generate(prompts, max_new_tokens=6, max_batch=1, progress=False)
    assert few == rows


def test_padded_batch(model, ids):
    width = len(ids) + 2
    padded = np.array([[0, 0, *ids], [0] * (width - 3) + ids[:3]])
    mask = np.array([[0, 0] + [1] * len(ids), [0] * (width - 3) + [1] * 3])
    assert model.generate(padded, attention_mask=mask, max_new_tokens=4) == model.generate([ids, ids[:3]], max_new_tokens=4)
    with pytest.raises(ArgumentError, match="attention_mask"):
        model.generate(padded, attention_mask=mask[:, 1:], max_new_tokens=4)


def test_seeds_of_a_batch(model, ids):
    rows = model.generate([ids, ids, ids], seed=[1, None, 1], max_new_tokens=12, return_full=False, temperature=1.0)
    alone = llmcoopt.generate(model, ids, seed=1, max_new_tokens=12, temperature=1.0).run().ids
    assert rows[0] == rows[2] == alone


def test_result_object(model, ids):
    result = model.generate([ids, ids[:2]], max_new_tokens=5, return_dict_in_generate=True)
    assert result.finish_reasons == ["length", "length"] and result.errors == [None, None]
    assert [len(x) for x in result.logprobs] == [5, 5]
    assert result.stats["engine"]["decode_tokens"] >= 8


def test_out_of_pages_is_said_with_the_option_to_raise(model, ids):
    cache = llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=16)
    with pytest.raises(OutOfPagesError, match="max_tokens"):
        llmcoopt.generate(model, ids, cache=cache, max_new_tokens=40).run()
    assert cache.stats()["pages_free"] == cache.stats()["pages_total"]


def test_model_close_ends_everything(ids):
    model = llmcoopt.Model.from_pretrained("tiny")
    cache = llmcoopt.KVCache(model, "auto")
    sequence = cache.sequence()
    generation = llmcoopt.generate(model, ids, max_new_tokens=100)
    next(generation)
    model.close()
    assert generation.finish_reason == "cancelled"
    for use in (lambda: model.forward(ids), lambda: llmcoopt.KVCache(model, "auto"), lambda: len(sequence), cache.stats):
        with pytest.raises(ArgumentError, match="closed"):
            use()
    assert "closed" in repr(cache)


def test_reprs(model):
    cache = llmcoopt.KVCache(model, "auto")
    assert "M parameters" in repr(model) and "<table>" in model._repr_html_()
    assert "0 tokens in 0 sequences" in repr(cache) and "<table>" in cache._repr_html_()

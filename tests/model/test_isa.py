"""Every instruction set of this CPU against the specification: all weight and cache types, sizes on and off the vector width.

The specification is given the same rounding of the cache, so what is left is float32 arithmetic in another order, and here and there a key
or value that falls on the other side of a rounding border."""

import numpy as np
import pytest
from checkpoints import bfloat16_bits, error, make, prompt, read

import llmcoopt
from llmcoopt import reference

SHAPES = {
    "odd": ("llama", {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 35, "head_dim": 6, "vocab_size": 53}),
    "vector": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 32, "intermediate_size": 192}),
    "wide": ("qwen3", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 72, "head_dim": 80, "num_hidden_layers": 2}),
    "window": ("mistral", {"sliding_window": 20, "attention_bias": False, "intermediate_size": 67}),
    "biases": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 97}),
}
DTYPES = ["float32", "float16", "bfloat16"]
# max |error| / max |logit| of a row. float32: sums in another order. 16-bit caches: a key off by 2^-24 rounds the other way once in 2^13 or
# 2^16 numbers, which moves it by 2^-11 or 2^-8 of itself; a head averages that over its dimension and the tokens it looks at.
CACHE_BOUND = {"float32": 2e-5, "float16": 2e-4, "bfloat16": 2e-3}
PROMPT_BF16_BOUND = 2e-2  # rows of a prompt round activations to bfloat16: see test_parity_transformers.py


class RoundedCache(reference.Cache):
    """The specification's cache, with keys and values rounded to the cache's type."""

    def __init__(self, config, dtype):
        super().__init__(config)
        self.dtype = dtype

    def append(self, layer, k, v):
        return super().append(layer, self.rounded(k), self.rounded(v))

    def rounded(self, x):
        x = x.astype(np.float32)
        return reference.float64(bfloat16_bits(x) if self.dtype == "bfloat16" else x.astype(self.dtype))


def run(model, ids, pieces, cache_dtype="float32"):
    seq, at, rows = llmcoopt.KVCache(model, dtype=cache_dtype).sequence(), 0, []
    for n in pieces:
        rows.append(model.forward(ids[at : at + n], seq))
        at += n
    return np.concatenate(rows)


def rounds_activations(isa, dtype):
    return dtype == "bfloat16" and isa in ("avx512", "amx")


@pytest.mark.parametrize("cache_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_reference(tmp_path, isa, shape, dtype, cache_dtype):
    family, fields = SHAPES[shape]
    make(tmp_path, family, dtype=dtype, **fields)
    config, weights = read(tmp_path)
    model = llmcoopt.Model.from_pretrained(tmp_path, isa=isa)
    ids = prompt(83, config.vocab_size)
    expected = reference.forward(config, weights, ids, RoundedCache(config, cache_dtype))
    got = run(model, ids, [70, *[1] * 13], cache_dtype)
    assert error(got, expected) < (PROMPT_BF16_BOUND if rounds_activations(isa, dtype) else CACHE_BOUND[cache_dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(tmp_path, isa, dtype):
    make(tmp_path, dtype=dtype, hidden_size=96, num_attention_heads=6, intermediate_size=200)
    ids = prompt(90)
    runs = [run(llmcoopt.Model.from_pretrained(tmp_path, isa=isa, threads=n), ids, [77, *[1] * 13]) for n in (1, 2, 3)]
    np.testing.assert_array_equal(runs[1], runs[0])
    np.testing.assert_array_equal(runs[2], runs[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_the_reference(tmp_path, isa, family):
    make(tmp_path, family, **({"sliding_window": 12} if family == "mistral" else {}))
    config, weights = read(tmp_path)
    ids = prompt(11)
    model = llmcoopt.Model.from_pretrained(tmp_path, isa=isa)
    assert list(llmcoopt.generate(model, ids, max_new_tokens=48)) == reference.generate(config, weights, ids, 48)


def test_environment_forces_an_instruction_set(tmp_path, isa, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("LLMCOOPT_ISA", isa)
    assert llmcoopt.Model.from_pretrained(tmp_path).isa == isa
    monkeypatch.setenv("LLMCOOPT_ISA", "mmx")
    with pytest.raises(llmcoopt.errors.ArgumentError, match="mmx"):
        llmcoopt.Model.from_pretrained(tmp_path)


def test_reference_is_always_there():
    assert llmcoopt.isas()[0] == "ref"

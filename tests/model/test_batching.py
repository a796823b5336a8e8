"""A request's tokens depend on its own ids, parameters and seed, and on nothing else in the batch."""

import pytest
from checkpoints import make, prompt, read

import llmcoopt
from llmcoopt import reference

LENGTHS = [3, 70, 1, 17, 128, 9, 33, 64]
SAMPLING = {"do_sample": True, "temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def model(request, tmp_path, isa):
    make(tmp_path, dtype=request.param, seed=3)
    return llmcoopt.Model.from_pretrained(tmp_path, isa=isa)


@pytest.fixture
def prompts():
    return [prompt(n, seed=i) for i, n in enumerate(LENGTHS)]


def test_greedy(model, prompts):
    together = model.generate(prompts, max_new_tokens=24)
    for ids, out in zip(prompts, together, strict=True):
        assert out[: len(ids)] == ids
        assert len(out) == len(ids) + 24
        assert model.generate([ids], max_new_tokens=24) == [out]
    assert model.generate(prompts[::-1], max_new_tokens=24) == together[::-1]
    assert model.generate(prompts, max_new_tokens=24, return_full=False) == [
        out[len(ids) :] for ids, out in zip(prompts, together, strict=True)
    ]


def test_sampled_with_seeds(model, prompts):
    seeds = [5, 1, 2, 1, 0, 2**63, 77, 3]
    together = model.generate(prompts, max_new_tokens=24, seed=seeds, **SAMPLING)
    for ids, seed, out in zip(prompts, seeds, together, strict=True):
        assert model.generate([ids], max_new_tokens=24, seed=seed, **SAMPLING) == [out]
        assert ids + list(llmcoopt.generate(model, ids, max_new_tokens=24, seed=seed, **SAMPLING)) == out
    assert together != model.generate(prompts, max_new_tokens=24, seed=[s + 1 for s in seeds], **SAMPLING)


def test_one_seed_serves_equal_prompts_alike(model):
    ids = prompt(7)
    a, b, c = model.generate([ids, prompt(40), ids], max_new_tokens=16, seed=[9, 4, 9], **SAMPLING)
    assert a == c != b


def test_eos_ends_one_request_only(model, prompts):
    free = model.generate(prompts, max_new_tokens=24, return_full=False)
    eos = free[3][5]
    for out, whole in zip(model.generate(prompts, max_new_tokens=24, eos_token_id=eos, return_full=False), free, strict=True):
        assert out == (whole[: whole.index(eos) + 1] if eos in whole else whole)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 1.5}, SAMPLING]
)
def test_sampled_tokens_are_those_of_the_specification(tmp_path, sampling):
    make(tmp_path)
    (config, weights), model, sampling = read(tmp_path), llmcoopt.Model.from_pretrained(tmp_path), {**sampling, "do_sample": True}
    for seed in (0, 7, 2**63 + 5):
        ids = prompt(5, seed=seed)
        new = model.generate([ids], max_new_tokens=24, seed=seed, return_full=False, **sampling)
        assert new == [reference.generate(config, weights, ids, 24, seed=seed, **sampling)]

"""A trained model, llama2.c's stories260K: its published story, and the greedy ids of an independent computation in double precision."""

import json
import shutil

import pytest
from checkpoints import read
from llama2c import convert

import llmcoopt
from llmcoopt import reference


@pytest.fixture(scope="module")
def source(data):
    return data / "models" / "stories260K"


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = convert(source / "stories260K.bin", tmp_path_factory.mktemp("stories260K"))
    shutil.copy(source / "tok512.model", path / "tokenizer.model")
    return path


@pytest.fixture(scope="module")
def expected(source):
    return json.loads((source / "greedy_made_here.json").read_text())


def test_greedy_ids(folder, expected, isa):
    model, ids = llmcoopt.Model.from_pretrained(folder, isa=isa), expected["token_ids"]
    run = llmcoopt.generate(model, ids[:1], max_new_tokens=len(ids) - 1)
    assert list(run) == ids[1:]
    assert run.finish_reason == "length"
    # 256 log-probabilities, each off by a few float32 roundings of logits near 10
    assert sum(run.logprobs) == pytest.approx(expected["sum_logprob_of_greedy_tokens"], abs=1e-3)


def test_first_logits(folder, expected):
    model = llmcoopt.Model.from_pretrained(folder)
    logits = model.forward(expected["token_ids"][:1], llmcoopt.KVCache(model).sequence(), last_only=True)
    assert logits[:16].tolist() == pytest.approx(expected["first_position_logits_0_15"], abs=1e-5)


def test_reference_ids(folder, expected):
    config, weights = read(folder)
    ids = expected["token_ids"]
    weights = {name: reference.float64(w) for name, w in weights.items()}
    assert reference.generate(config, weights, ids[:1], 60) == ids[1:61]
    assert reference.forward(config, weights, ids)[:-1].argmax(axis=1).tolist() == ids[1:]


def test_published_story(folder, source):
    model, tokenizer = llmcoopt.Model.from_pretrained(folder), llmcoopt.Tokenizer.from_pretrained(folder)
    story = (source / "published_greedy.txt").read_text().strip()
    new = list(llmcoopt.generate(model, [tokenizer.bos_token_id], max_new_tokens=256))
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == story

"""A trained model, llama2.c's stories260K: its published story, and the greedy ids of an independent computation in double precision."""

import json
import shutil

import pytest
from checkpoints import read
from llama2c import convert

import llmcoopt
from llmcoopt import reference
from llmcoopt.cli import main


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
    logits = model.forward(expected["token_ids"][:1], llmcoopt.KVCache(model, "auto").sequence(), last_only=True)
    assert logits[:16].tolist() == pytest.approx(expected["first_position_logits_0_15"], abs=1e-5)


def test_reference_ids(folder, expected):
    config, weights = read(folder)
    ids = expected["token_ids"]
    weights = {name: reference.float64(w) for name, w in weights.items()}
    assert reference.generate(config, weights, ids[:1], 60) == ids[1:61]
    assert reference.forward(config, weights, ids)[:-1].argmax(axis=1).tolist() == ids[1:]


@pytest.fixture(scope="module")
def pair(folder):
    return llmcoopt.Model.from_pretrained(folder), llmcoopt.Tokenizer.from_pretrained(folder)


def test_published_story(pair, source):
    model, tokenizer = pair
    story = (source / "published_greedy.txt").read_text().removesuffix("\n")
    generation = llmcoopt.generate(model, [tokenizer.bos_token_id], tokenizer=tokenizer, max_new_tokens=256).run()
    assert tokenizer.decode(generation.ids, skip_special_tokens=True) == generation.text == story


PROMPT = "Once upon a time, there was a little"


def test_the_story_goes_on_with_its_blank(pair, source):
    """Cut after any word, the prompt and the new text are the published story."""
    model, tokenizer = pair
    story = (source / "published_greedy.txt").read_text()
    assert story.startswith(PROMPT + " girl named")
    for n_words in range(1, 12):
        prompt = " ".join(story.split(" ")[:n_words])
        generation = llmcoopt.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=40)
        text = "".join(generation.pieces())
        assert text == generation.text and text.startswith(" ")
        assert tokenizer.decode(generation.prompt + generation.ids, skip_special_tokens=True) == prompt + text
        if n_words >= 4:  # after fewer words the likeliest story is another one
            assert story.startswith(prompt + text)


@pytest.mark.parametrize("stop", [" girl", " g", " girl named", "l named"])
def test_stop_strings_with_blanks(pair, stop):
    model, tokenizer = pair
    options = {"tokenizer": tokenizer, "max_new_tokens": 12, "stop_strings": [stop]}
    expected = " girl named"[: " girl named".index(stop)]
    generation = llmcoopt.generate(model, PROMPT, **options).run()
    assert (generation.text, generation.finish_reason) == (expected, "stop")
    result = model.generate(tokenizer([PROMPT, "Once upon"]), return_dict_in_generate=True, **options)
    assert (result.texts[0], result.finish_reasons[0], result.new_ids[0]) == (expected, "stop", generation.ids)


def test_the_command_line_prints_the_story(folder, capsys):
    assert main(["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT + " girl named Lily. She")

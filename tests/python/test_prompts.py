"""Prompts in whatever form users have them: what tokenizers return, tensors, masks; and options of a wrong kind."""

from collections import UserDict

import numpy as np
import pytest

import llmcoopt
from llmcoopt.errors import ArgumentError

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def expected(model, ids):
    return model.generate([ids], max_new_tokens=3)


def test_what_the_tokenizer_returns_for_one_text(model, tokenizer, expected):
    assert model.generate(**tokenizer(TEXT), max_new_tokens=3) == expected
    assert model.generate(tokenizer(TEXT), max_new_tokens=3) == expected
    assert model.generate(tokenizer(TEXT, return_tensors="np"), max_new_tokens=3) == expected
    assert model.generate(UserDict(tokenizer(TEXT)), max_new_tokens=3) == expected


def test_what_the_tokenizer_returns_for_several(model, tokenizer, expected):
    texts = [TEXT, "Lily and her mom went to the"]
    rows = model.generate(tokenizer(texts), max_new_tokens=3)
    assert rows[:1] == expected
    for padded in (tokenizer(texts, padding=True), tokenizer(texts, padding=True, return_tensors="np")):
        assert model.generate(padded, max_new_tokens=3) == model.generate(**padded, max_new_tokens=3) == rows
        assert model.generate(UserDict(padded), max_new_tokens=3) == rows
    assert model.generate([tokenizer(text) for text in texts], max_new_tokens=3) == rows


def test_one_flat_row(model, ids, expected):
    mask = [1] * len(ids)
    for row in (ids, tuple(ids), np.array(ids), iter(ids), [np.int64(i) for i in ids], [np.array(i) for i in ids]):
        assert model.generate(row, max_new_tokens=3) == expected
    for m in (mask, np.array(mask), [mask], np.array([mask]), np.array(mask, bool), [True] * len(ids), np.array(mask, np.float32)):
        assert model.generate(ids, attention_mask=m, max_new_tokens=3) == expected
        assert model.generate(np.array([ids]), attention_mask=m, max_new_tokens=3) == expected
    assert model.generate([0, 0, *ids], attention_mask=[0, 0, *mask], max_new_tokens=3) == expected


def test_a_mask_of_one_padded_prompt_is_heeded(model, ids, expected):
    padded = {"input_ids": [[0, 0, *ids]], "attention_mask": [[0, 0] + [1] * len(ids)]}
    for form in (padded, UserDict(padded)):
        run = llmcoopt.generate(model, form, max_new_tokens=3).run()
        assert [run.prompt + run.ids] == expected
        assert np.array_equal(model.forward(form), model.forward(ids))


@pytest.mark.parametrize(
    "form, mask, says",
    [
        ("text", None, "found a string"),
        (["a", "b"], None, r"input_ids\[0\]: found a string"),
        (None, None, "no prompt"),
        ([], None, "no prompt"),
        (np.zeros((0, 3), int), None, "no prompt"),
        (7, None, "0 dimensions"),
        ([1.5, 2.5], None, "whole numbers"),
        ([None], None, "whole numbers"),
        (np.zeros((2, 2, 2), int), None, "3 dimensions"),
        ([[1, 2], []], None, r"input_ids\[1\]: empty"),
        ({"attention_mask": [1]}, None, "without 'input_ids'"),
        ([1, 2], [1], "attention_mask: expected the shape"),
        ([1, 2], 1, "attention_mask: "),
        ([1, 2], ["a", "b"], "attention_mask: "),
        ([[1, 2], [3]], [1, 1], "attention_mask: expected the shape"),
        ([1, 2], [[[1, 1], [1, 1]]], "attention_mask: "),
        ([1, 2], [0, 0], "empty"),
    ],
    ids=str,
)
def test_wrong_forms(model, form, mask, says):
    with pytest.raises(ArgumentError, match=says):
        model.generate(form, attention_mask=mask, max_new_tokens=1)


def test_one_prompt_where_one_is_wanted(model, ids):
    with pytest.raises(ArgumentError, match=r"found 2 prompts, expected one; Model\.generate"):
        llmcoopt.generate(model, {"input_ids": [ids, ids]}, max_new_tokens=1)


@pytest.mark.parity
def test_tensors(model, ids, expected):
    torch = pytest.importorskip("torch")
    row, mask = torch.tensor(ids), torch.ones(len(ids), dtype=torch.int64)
    padded, kept = torch.cat([torch.zeros(2, dtype=torch.int64), row]), torch.cat([torch.zeros(2, dtype=torch.int64), mask])
    for form in (row, row[None], [row], list(row)):
        assert model.generate(form, max_new_tokens=3) == expected
        assert model.generate(form, attention_mask=mask, max_new_tokens=3) == expected
        run = llmcoopt.generate(model, form, max_new_tokens=3).run()
        assert [run.prompt + run.ids] == expected
    assert model.generate(padded, attention_mask=kept, max_new_tokens=3) == expected
    assert model.generate(padded[None], attention_mask=kept[None], max_new_tokens=3) == expected
    with pytest.raises(ArgumentError, match="NumPy cannot read"):
        model.generate(torch.zeros(1, 3, device="meta", dtype=torch.int64), max_new_tokens=1)


@pytest.mark.parity
def test_batch_encodings_of_transformers(model, tokenizer, ids, expected):
    pytest.importorskip("torch")
    encoding = pytest.importorskip("transformers").BatchEncoding
    texts = [TEXT, "Lily and her mom went to the"]
    rows = model.generate(tokenizer(texts), max_new_tokens=3)
    one, several = tokenizer(TEXT), tokenizer(texts, padding=True)
    assert model.generate(encoding(one), max_new_tokens=3) == model.generate(**encoding(one), max_new_tokens=3) == expected
    assert model.generate(encoding(several, tensor_type="pt"), max_new_tokens=3) == rows
    assert model.generate(**encoding(several, tensor_type="pt"), max_new_tokens=3) == rows
    run = llmcoopt.generate(model, encoding(one, tensor_type="pt", prepend_batch_axis=True), max_new_tokens=3).run()
    assert [run.prompt + run.ids] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"ignore_eos": "no"},
        {"ignore_eos": None},
        {"eos_token_id": 1.5},
        {"eos_token_id": "2"},
        {"eos_token_id": True},
        {"eos_token_id": [1.5]},
    ],
    ids=str,
)
def test_options_of_a_wrong_kind(model, ids, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        llmcoopt.generate(model, ids, max_new_tokens=1, **options)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        model.generate([ids], max_new_tokens=1, **options)


def test_options_of_several_right_kinds(model, ids):
    greedy = llmcoopt.generate(model, ids, max_new_tokens=6, do_sample=np.bool_(False), ignore_eos=np.bool_(True)).run().ids
    end = greedy[2]
    for form in (end, np.int64(end), np.array(end), [end], (end,), {end}, np.array([end])):
        run = llmcoopt.generate(model, ids, max_new_tokens=6, eos_token_id=form).run()
        assert (run.ids, run.finish_reason) == (greedy[: greedy.index(end) + 1], "eos")

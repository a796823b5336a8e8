"""Text that goes on from a prompt, and where it ends: first blanks, end tokens that only the tokenizer knows, stop strings in batches."""

import json
import random

import pytest
from checkpoints import make

import llmcoopt
from llmcoopt import cli
from llmcoopt.chat_session import ChatSession
from llmcoopt.errors import ArgumentError
from llmcoopt.streaming import TextStream

SIZE = 60
PROMPT = [11, 12, 13]


def words(end_of_turn=4):
    """A SentencePiece vocabulary of SIZE words "▁w5", with <unk>, <s>, </s>, <|endoftext|> (its eos), and <|im_end|> as `end_of_turn`."""
    special = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|endoftext|>", end_of_turn: "<|im_end|>"}
    return llmcoopt.Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [special.get(i, f"\u2581w{i}") for i in range(SIZE)],
            "tokenizer.ggml.scores": [0.0] * SIZE,
            "tokenizer.ggml.token_type": [2 if i == 0 else 3 if i in special else 1 for i in range(SIZE)],
            "tokenizer.ggml.eos_token_id": 3,
            "tokenizer.chat_template": "{% for m in messages %}<s>{{ m.content }}{% endfor %}",
        }
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    make(folder, vocab_size=SIZE, eos_token_id=3)
    return llmcoopt.Model.from_pretrained(folder)


@pytest.fixture(scope="module")
def greedy(model):
    """Twelve new ids after PROMPT, all of them words."""
    ids = llmcoopt.generate(model, PROMPT, max_new_tokens=12, ignore_eos=True).run().ids
    assert min(ids) > 4
    return ids


def text_of(ids):
    return "".join(f" w{i}" for i in ids)


# --- the first blank ---


@pytest.mark.parametrize(
    "path",
    [
        "tokenizers/llama2.tokenizer.model",
        "models/stories260K/tok512.model",
        "gguf-vocab/ggml-vocab-llama-spm.gguf",
        "tokenizers/gpt2.tokenizer.json",
        *(f"tokenizers/hf-tiny-cases/tiny_{name}" for name in ("unigram_tokenizer.json", "wordpiece_tokenizer.json", "spm.model")),
        "tokenizers/hf-tiny-cases/tiny_bpe_metaspace_tokenizer.json",
    ],
)
def test_prompt_and_pieces_join_to_the_whole_text(data, path):
    """Wherever ordinary text is cut into prompt and new ids."""
    tokenizer = llmcoopt.Tokenizer.from_pretrained(data / path)
    ids = tokenizer.encode("once upon a time, there was  a little girl named lily")
    for cut in range(len(ids)):
        stream = TextStream(tokenizer, after=ids[:cut])
        pieces = [stream.put(i) for i in ids[cut:]] + [stream.finish()]
        prompt = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        assert prompt + "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), cut


def test_prompt_and_pieces_join_for_random_ids(data):
    """An unfinished character at the end of the prompt comes whole with the new text."""
    tokenizer = llmcoopt.Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model")
    rng = random.Random(3)
    for top in (len(tokenizer), 262):
        for n in range(300):
            ids = [rng.randrange(top) for _ in range(rng.randrange(1, 20 if n < 250 else 600))]
            cut = rng.randrange(len(ids))
            before = TextStream(tokenizer)
            prompt = "".join(before.put(i) for i in ids[:cut])
            stream = TextStream(tokenizer, after=ids[:cut])
            pieces = [stream.put(i) for i in ids[cut:]] + [stream.finish()]
            assert prompt + "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), (ids, cut)


def test_the_first_word_keeps_its_blank(model, greedy):
    tokenizer = words()
    generation = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=12)
    assert "".join(generation.pieces()) == generation.text == text_of(greedy)
    assert tokenizer.decode(PROMPT) + generation.text == tokenizer.decode(PROMPT + greedy)


def test_a_stop_string_with_a_blank_fires_on_the_first_word(model, greedy):
    generation = llmcoopt.generate(model, PROMPT, tokenizer=words(), max_new_tokens=12, stop_strings=[f" w{greedy[0]}"]).run()
    assert (generation.ids, generation.text, generation.finish_reason) == (greedy[:1], "", "stop")


def test_a_text_from_nothing_begins_without_blank(model):
    generation = llmcoopt.generate(model, [1], tokenizer=words(), max_new_tokens=3, ignore_eos=True).run()
    assert generation.text == text_of(generation.ids).removeprefix(" ")


def test_a_sequence_goes_on_with_its_blank(model, greedy):
    tokenizer = words()
    sequence = llmcoopt.KVCache(model, "auto").sequence()
    first = llmcoopt.generate(model, PROMPT, sequence=sequence, max_new_tokens=5).run()
    second = llmcoopt.generate(model, first.ids[-1:], sequence=sequence, tokenizer=tokenizer, max_new_tokens=7).run()
    assert second.text == text_of(greedy[5:])
    sequence.truncate(len(PROMPT))
    model.forward([1], sequence)
    again = llmcoopt.generate(model, [1], sequence=sequence, tokenizer=tokenizer, max_new_tokens=2, ignore_eos=True).run()
    assert again.text == text_of(again.ids)  # the text before is in the sequence, not in the prompt


def test_a_text_of_its_own(model, greedy):
    generation = llmcoopt.generate(model, PROMPT, tokenizer=words(), max_new_tokens=12, continues=False).run()
    assert generation.text == text_of(greedy).removeprefix(" ")
    with pytest.raises(ArgumentError, match="continues"):
        llmcoopt.generate(model, PROMPT, continues="no")


def test_an_answer_is_a_text_of_its_own(model):
    tokenizer = words()
    answer = ChatSession(model, tokenizer, max_new_tokens=4, ignore_eos=True).ask("hello").run()
    assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True) and not answer.text.startswith(" ")


# --- end tokens ---


def test_the_end_tokens_of_the_tokenizer_end_a_generation(model, greedy):
    stop = greedy[3]
    first = greedy.index(stop)
    tokenizer = words(stop)
    assert model.config.eos_token_ids == (3,) and stop in tokenizer.eos_token_ids
    generation = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=12).run()
    assert (generation.ids, generation.finish_reason) == (greedy[: first + 1], "eos")
    assert generation.text == text_of(greedy[:first])
    result = model.generate([PROMPT, PROMPT[:1]], tokenizer=tokenizer, max_new_tokens=12, return_dict_in_generate=True)
    assert (result.new_ids[0], result.finish_reasons[0], result.texts[0]) == (greedy[: first + 1], "eos", text_of(greedy[:first]))
    for options in ({"ignore_eos": True}, {"eos_token_id": 3}, {"eos_token_id": []}, {"min_new_tokens": 12}):
        longer = llmcoopt.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=12, **options).run()
        assert len(longer.ids) == 12, options
    assert model.generate([PROMPT], max_new_tokens=12, return_full=False) == [greedy]


def test_ids_that_the_model_lacks_are_no_end(tmp_path):
    make(tmp_path, vocab_size=20)
    with llmcoopt.Model.from_pretrained(tmp_path) as small:
        generation = llmcoopt.generate(small, [5], tokenizer=words(50), max_new_tokens=2, min_new_tokens=2).run()
    assert len(generation.ids) == 2


def test_chat_and_the_command_line_end_at_the_end_of_a_turn(model, capsys, monkeypatch):
    """A file whose eos is <|endoftext|>, and a chat that ends its turns with <|im_end|>."""
    plain = ChatSession(model, words(), max_new_tokens=12, ignore_eos=True).ask("hello").run()
    tokenizer = words(plain.ids[2])
    first = plain.ids.index(plain.ids[2])
    session = ChatSession(model, tokenizer, max_new_tokens=12)
    answer = session.ask("hello").run()
    assert (answer.ids, answer.finish_reason) == (plain.ids[: first + 1], "eos")
    for command in ("chat", "generate"):
        monkeypatch.setattr(cli, "_load", lambda args: (model, tokenizer))
        assert cli.main([command, "words", "--prompt", "hello", "--max-new-tokens", "12", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["finish_reason"], result["ids"][-1]) == ("eos", plain.ids[2]), command


# --- stop strings in a batch ---


def test_stop_strings_of_a_batch(model, greedy):
    """Every row ends as it would alone, whether it waited or not, and the cache is whole."""
    tokenizer = words()
    prompts = [PROMPT, [20, 21], [1], [30] * 7, PROMPT]
    stops = [f" w{greedy[4]}", f"w{greedy[7]} w{greedy[8]}", "never there"]
    options = {"tokenizer": tokenizer, "stop_strings": stops, "max_new_tokens": 12, "ignore_eos": True}
    alone = [llmcoopt.generate(model, prompt, **options).run() for prompt in prompts]
    assert alone[0].finish_reason == "stop"
    for max_batch in (64, 2):
        cache = llmcoopt.KVCache(model, "auto", max_tokens=1024)
        result = model.generate(prompts, cache=cache, max_batch=max_batch, return_dict_in_generate=True, **options)
        assert result.new_ids == [g.ids for g in alone]
        assert result.logprobs == [g.logprobs for g in alone]
        assert result.texts == [g.text for g in alone]
        assert result.finish_reasons == [g.finish_reason for g in alone]
        cache.check()
        assert cache.stats()["pages_free"] == cache.stats()["pages_total"]
    assert model.generate(prompts, **options) == [p + g.ids for p, g in zip(prompts, alone, strict=True)]


def test_a_stop_string_on_the_last_token_counts_as_stop(model, greedy):
    options = {"tokenizer": words(), "stop_strings": f" w{greedy[0]}", "max_new_tokens": 1}
    result = model.generate([PROMPT], return_dict_in_generate=True, **options)
    assert (result.finish_reasons, result.texts) == (["stop"], [""])
    assert llmcoopt.generate(model, PROMPT, **options).run().finish_reason == "stop"


def test_texts_need_a_tokenizer(model):
    assert model.generate([PROMPT], max_new_tokens=1, return_dict_in_generate=True).texts is None
    with pytest.raises(ArgumentError, match="stop_strings need text: pass tokenizer="):
        model.generate([PROMPT], stop_strings="x", max_new_tokens=1)
    for call in (lambda **options: model.generate([PROMPT], **options), lambda **options: llmcoopt.generate(model, PROMPT, **options)):
        for stops, text in ((7, "stop_strings is int"), ([""], r"stop_strings\[0\]"), (b"x", "stop_strings is bytes")):
            with pytest.raises(ArgumentError, match=text):
                call(tokenizer=words(), stop_strings=stops, max_new_tokens=1)
        with pytest.raises(ArgumentError, match=r"tokenizer: expected an llmcoopt\.Tokenizer, found str"):
            call(tokenizer="tiny", max_new_tokens=1)

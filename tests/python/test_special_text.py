"""Special tokens that a text spells out: cut out of it as Hugging Face's tokenizers do, whatever names them; plain text where asked for."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from test_tokenizer import added, byte_level_json, small_metadata, write_folder

from llmcoopt import Tokenizer

PIECES = ["<unk>", "<s>", "</s>", "<pad>", "<x>", " ", "  ", "ab", "a", "<", "unk", ">", "<unk", "unk>", "\n", "\u00e9", "\u65e5", "."]


def spelled(count, seed=3):
    rng = random.Random(seed)
    return ["".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 8))) for _ in range(count)]


def unknown_json():
    """byte_level_json with <unk> and two more in the vocabulary that added_tokens doesn't list."""
    content = byte_level_json()
    content["model"]["vocab"] |= {"<s>": 257, "</s>": 258, "<|eot|>": 259, "<unk>": 260, "<pad>": 261, "<x>": 262}
    content["model"]["unk_token"] = "<unk>"
    return content


NAMED = {
    "nothing": ({}, {}, set()),
    "config": ({"unk_token": "<unk>", "pad_token": "<pad>"}, {}, {"<unk>", "<pad>"}),
    "map": ({}, {"unk_token": {"content": "<unk>", "rstrip": True}}, {"<unk>"}),
    "both": ({"unk_token": "<unk>"}, {"unk_token": {"content": "<unk>", "rstrip": True}}, {"<unk>"}),
    "more": ({"additional_special_tokens": ["<x>", {"__type": "AddedToken", "content": "<pad>", "lstrip": True}]}, {}, {"<x>", "<pad>"}),
    "extra": ({"extra_special_tokens": ["<x>"]}, {}, {"<x>"}),
}


@pytest.mark.parametrize("name", NAMED)
def test_tokens_that_the_config_names(tmp_path, name):
    """The reference: the tokenizers library with these tokens added."""
    tokenizers = pytest.importorskip("tokenizers")
    config, mapped, cut = NAMED[name]
    folder = write_folder(tmp_path / "m", unknown_json(), tokenizer_config_json=config, special_tokens_map_json=mapped)
    tokenizer = Tokenizer.from_pretrained(folder)
    reference = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text())
    reference.no_truncation()
    flags = {"<unk>": {"rstrip": name in ("map", "both")}, "<pad>": {"lstrip": name == "more"}}
    reference.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False, **flags.get(t, {})) for t in sorted(cut)])
    assert len(tokenizer) == reference.get_vocab_size() == 263
    for text in spelled(500):
        assert tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False).ids, text
        plain = tokenizer.encode(text, False, parse_special=False)
        assert max(plain, default=0) <= 256 and tokenizer.decode(plain) == text
    ids = tokenizer.convert_tokens_to_ids(["<unk>", "<pad>", "<x>"])
    assert {t for t, i in zip(["<unk>", "<pad>", "<x>"], ids, strict=True) if i in tokenizer.all_special_ids} == cut


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMED)
def test_equal_to_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    config, mapped, _ = NAMED[name]
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(tmp_path / "m", unknown_json(), tokenizer_config_json=config, special_tokens_map_json=mapped)
    tokenizer, reference = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in spelled(500):
        assert tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False), text


def cut_and_encoded(reference, text, ids):
    """SentencePiece for each stretch between special tokens."""
    out = []
    for part in re.split(f"({'|'.join(map(re.escape, ids))})", text):
        out += [ids[part]] if part in ids else reference.encode(part)
    return out


def test_sentencepiece_files(tmp_path, data):
    """The unknown token is special too, named or not: <unk> in a text is its id, as in transformers and llama.cpp."""
    path = data / "tokenizers" / "llama2.tokenizer.model"
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    shutil.copy(path, tmp_path / "tokenizer.model")
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for config in ({}, {"unk_token": "<unk>"}, {"pad_token": "\u65e5"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        expected = special | ({"\u65e5": reference.piece_to_id("\u65e5")} if "pad_token" in config else {})
        assert tokenizer.all_special_ids == set(expected.values())
        for text in spelled(500):
            assert tokenizer.encode(text, False) == cut_and_encoded(reference, text, expected), text
            assert tokenizer.encode(text, False, parse_special=False) == reference.encode(text), text
    assert tokenizer.decode([0, 306], skip_special_tokens=True) == "I"


def test_gguf_files(data):
    """Tokens of type unknown are cut out, in both kinds of vocabulary."""
    tokenizer = Tokenizer.from_gguf_metadata(small_metadata())
    assert tokenizer.encode("a<unk>ab", False) == [3, 4, 0, 7] and tokenizer.all_special_ids == {0, 1, 2}
    assert tokenizer.encode("a<unk>", False, parse_special=False) == [3, 4, 0]  # one for a run that has no piece
    content = byte_level_json()
    vocabulary = content["model"]["vocab"] | {"<unk>": 257}
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.get),
        "tokenizer.ggml.token_type": np.array([1] * 257 + [2], np.int32),
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("ab<unk>ab", False) == [256, 257, 256] and tokenizer.all_special_ids == {257}
    assert 257 not in tokenizer.encode("ab<unk>ab", False, parse_special=False)


@pytest.mark.parametrize(
    "flags", [{}, {"single_word": True}, {"lstrip": True}, {"single_word": True, "lstrip": True, "rstrip": True}], ids=str
)
def test_flags_of_added_tokens(tmp_path, data, flags):
    """A SentencePiece folder cuts a text where the tokenizers library does."""
    tokenizers = pytest.importorskip("tokenizers")
    shutil.copy(data / "tokenizers" / "llama2.tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"32000": added(32000, "unk", **flags)}}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    library.add_special_tokens([tokenizers.AddedToken("unk", normalized=False, **flags)])
    for text in spelled(500):
        text = re.sub("<unk>|</?s>", "_", text)  # which this library here doesn't know
        whole = library.encode(text)
        cuts = [span for i, span in zip(whole.ids, whole.offsets, strict=True) if i == library.token_to_id("unk")]
        expected, at = [], 0
        for begin, end in [*cuts, (len(text), len(text))]:
            expected += tokenizer.encode(text[at:begin], False, parse_special=False) + [32000] * (begin < end)
            at = end
        assert tokenizer.encode(text, False) == expected, text

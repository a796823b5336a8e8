"""The vocabulary of a GGUF file as the files of a Hugging Face folder."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmcoopt import Tokenizer
from llmcoopt.quantizer.folder import gguf_tokenizer, tokenizer_files


def written(files, folder):
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Tokenizer.from_pretrained(folder)


def checkpoint_of(path):
    return SimpleNamespace(tokenizer_source=path, config=SimpleNamespace(max_positions=1024))


def test_the_same_ids(data, tmp_path):
    path = data / "gguf-vocab" / "ggml-vocab-gpt-2.gguf"
    first, second = Tokenizer.from_pretrained(path), written(tokenizer_files(checkpoint_of(path)), tmp_path)
    texts = (data / "gguf-vocab" / "ggml-vocab-gpt-2.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert len(texts) > 20
    for text in texts:
        assert second.encode(text) == first.encode(text), text
    assert second.special_tokens_map == first.special_tokens_map and second.eos_token_ids == first.eos_token_ids


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_tokens_around_a_text(tmp_path, before, after):
    tokens = ["<s>", "</s>", "a", "b", "ab", "\u0120", "\u0120a"]
    metadata = {"model": "gpt2", "tokens": tokens, "token_type": np.array([3, 3, 1, 1, 1, 1, 1], np.int32), "merges": ["a b", "\u0120 a"]}
    metadata |= {"pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": before, "add_eos_token": after}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()} | {"tokenizer.chat_template": "{{ messages }}"}
    first = Tokenizer.from_gguf_metadata(metadata)
    second = written(gguf_tokenizer(first, 64), tmp_path)
    assert first.encode("ab a") == [0] * before + [4, 6] + [1] * after
    assert second.encode("ab a") == first.encode("ab a")
    assert second.chat_template == "{{ messages }}" and second.eos_token_ids == [1]


def test_sentencepiece_vocabularies_are_left_out(data):
    path = data / "gguf-vocab" / "ggml-vocab-llama-spm.gguf"
    with pytest.warns(UserWarning, match=r"its SentencePiece vocabulary cannot be written as tokenizer\.json; put the tokenizer\.model"):
        assert tokenizer_files(checkpoint_of(path)) == {}

"""Damaged tokenizers: metadata and JSON files of any content load or raise llmcoopt.Error naming the file; odd pieces do no harm."""

import json
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fuzz_files import JSON

from llmcoopt import Tokenizer
from llmcoopt.errors import Error, FormatError, MissingFileError
from llmcoopt.text.segmenters import UnigramSegmenter
from llmcoopt.text.spm_file import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

KEY = "tokenizer.ggml."
IDS = [f"{name}_token_id" for name in ("bos", "eos", "unknown", "padding", "seperator", "mask", "eot", "eom")]
FLAGS = ["add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"]
PIECES = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a"]


def metadata(model, /, **changes):
    tokens = {"llama": PIECES, "gpt2": ["<|endoftext|>", "a", "b", "ab", "\u0120", "\u0120a"]}[model]
    values = {"model": model, "tokens": tokens, "token_type": np.array([NORMAL] * len(tokens), np.int32)}
    if model == "llama":
        values |= {"scores": np.arange(len(tokens), dtype=np.float32), "token_type": np.array([UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 5)}
    else:
        values |= {"merges": ["a b", "\u0120 a"], "pre": "gpt-2"}
    return {KEY + name: value for name, value in (values | changes).items()}


def use(make):
    """The tokenizer works, or the error is ours and names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = make()
            tokenizer.decode(tokenizer.encode("ab <s> a\u00e9"))
            assert repr(tokenizer) and tokenizer.eos_token_ids is not None
        except Error as error:
            assert str(error)
            return str(error)
    return None


NUMPY = st.sampled_from(
    [
        np.array([], np.int32),
        np.array([1, 2], np.int32),
        np.array([1.5, np.nan], np.float32),
        np.array([True]),
        np.float32(1),
        np.uint32(2),
        np.bool_(True),
    ]
)


@settings(max_examples=500, deadline=None)
@given(
    model=st.sampled_from(["llama", "gpt2"]),
    changes=st.dictionaries(
        st.sampled_from([*IDS, *FLAGS, "model", "pre", "tokens", "scores", "token_type", "merges"]), JSON | NUMPY, min_size=1, max_size=2
    ),
    template=st.none() | JSON,
)
def test_gguf_metadata_of_any_type(model, changes, template):
    content = metadata(model, **changes)
    if template is not None:
        content["tokenizer.chat_template"] = template
    said = use(lambda: Tokenizer.from_gguf_metadata(content, "some.gguf"))
    assert said is None or "some.gguf" in said


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, value) for name in IDS for value in ("x", "1", 1.5, float("nan"), float("inf"), True, [1], np.array([1, 2]))),
        *((name, value) for name in FLAGS for value in ("x", 2, 1.0, [], np.array([True]), np.array([1, 0]))),
        *(("pre", value) for value in (3, ["a"], np.array([1]))),
        *(("model", value) for value in (3, ["llama"], np.array([1, 2]))),
        *(("scores", value) for value in (3, "abcdefgh", [10**400] * 8, [float("nan")] * 8, [True] * 8, np.zeros((8, 1)))),
        *(("token_type", value) for value in ([True] * 8, [1.0] * 8, "abcdefgh", 1)),
        *(("tokens", value) for value in ({"a": 1}, [1], np.array([1]), "abc")),
    ],
)
def test_gguf_metadata_of_a_wrong_type(name, value):
    content = metadata("gpt2" if name == "pre" else "llama", **{name: value})
    with pytest.raises(FormatError, match=rf"^some\.gguf: tokenizer\.ggml\.{name}"):
        Tokenizer.from_gguf_metadata(content, "some.gguf")


def test_gguf_flags_may_be_numbers():
    """NumPy's scalars and 0 and 1 count, as before."""
    for flag in (1, True, np.bool_(True), np.uint8(1)):
        ids = {"eos_token_id": np.uint32(2), "add_eos_token": flag, "add_bos_token": 0}
        assert Tokenizer.from_gguf_metadata(metadata("llama", **ids), "x").encode("a") == [7, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return folder


@settings(max_examples=300, deadline=None)
@given(
    file=st.sampled_from(["added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "chat_template.json", "config.json"]),
    content=st.dictionaries(
        st.sampled_from(["<x>", "", "added_tokens_decoder", "bos_token", "eos_token", "chat_template", "padding_side", "eos_token_id"]),
        JSON,
    ),
)
def test_json_files_of_any_content(folder, file, content):
    path = folder / file
    path.write_text(json.dumps(content))
    try:
        use(lambda: Tokenizer.from_pretrained(folder))
    finally:
        path.unlink()


@pytest.mark.parametrize("number", [[], [1], {}, {"a": 1}, "3", 1.0, True, None, -1, 2**24, 10**400])
def test_ids_of_added_tokens(tmp_path, folder, number):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": number}))
    with pytest.raises(FormatError, match=r"added_tokens\.json: the added token '<x>' has id .*; expected text and an id from 0 on"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", ["\u00b2", "\u0663", "-1", "x", "", "9" * 5000])
def test_ids_of_the_added_tokens_decoder(tmp_path, folder, number):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {number: {"content": "<x>"}}}))
    with pytest.raises(FormatError, match=r"tokenizer_config\.json: added_tokens_decoder: the added token '<x>' has id"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_folder_in_place_of_a_template(tmp_path, folder):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(MissingFileError, match=r"chat_template\.jinja: cannot be read"):
        Tokenizer.from_pretrained(tmp_path)


def test_an_empty_user_defined_token():
    pieces, types = [*PIECES, ""], [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 5 + [USER_DEFINED]
    content = metadata("llama", tokens=pieces, scores=[0.0] * 9, token_type=types)
    tokenizer = Tokenizer.from_gguf_metadata(content, "x")
    without = Tokenizer.from_gguf_metadata(metadata("llama", scores=[0.0] * 8), "x")
    for text in ("ab ab", "a", " ", "ba"):
        assert tokenizer.encode(text) == without.encode(text)


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, wire, value):
    return varint(number << 3 | wire) + (varint(len(value)) + value if wire == 2 else value)


def spm_model(pieces, kind):
    """The bytes of a SentencePiece model: pieces are (text, score, type)."""
    raw = b""
    for text, score, type_number in pieces:
        raw += field(1, 2, field(1, 2, text.encode()) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(type_number)))
    normalizer = field(3, 0, varint(1)) + field(4, 0, varint(0))  # add_dummy_prefix, remove_extra_whitespaces
    return raw + field(2, 2, field(3, 0, varint(kind))) + field(3, 2, normalizer)


SPECIAL = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]


@pytest.mark.parametrize("kind", [1, 2], ids=["unigram", "bpe"])
def test_a_user_defined_piece_that_begins_with_a_blank(tmp_path, kind):
    """Only the space mark goes at the start of a text."""
    extra = [
        (" x", 0.0, USER_DEFINED),
        ("\u2581y", 0.0, USER_DEFINED),
        ("\u2581a", -1.0, NORMAL),
        ("a", -2.0, NORMAL),
        ("\u2581", -3.0, NORMAL),
    ]
    raw = spm_model([*SPECIAL, *extra], kind)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([3, 5]) == " x a" and tokenizer.decode([4, 3]) == "y x" and tokenizer.decode([5, 3]) == "a x"
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_proto=raw)
    for ids in ([3], [3, 5], [4, 3], [5, 3], [7, 3], [3, 3, 6], [1, 3]):
        stream = tokenizer.stream_decoder()
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids), ids
        assert "".join(map(stream.put, ids)) + stream.finish() == tokenizer.decode(ids), ids


def test_scores_beyond_single_precision():
    """Sums that overflow are infinite, as in C, and no error."""
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    for score in (-largest, largest):
        pieces, types = ["<unk>", "a", "b"], [UNKNOWN, NORMAL, NORMAL]
        segment = UnigramSegmenter(pieces, [0.0, score, score], types, 0, False)
        assert segment("abab") == [1, 2, 1, 2] and segment("axb")[0] == 1


def test_scores_beyond_single_precision_equal_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    raw = spm_model([*SPECIAL, ("a", -largest, NORMAL), ("b", -largest, NORMAL), ("\u2581", -1.0, NORMAL), ("ab", -2.0, NORMAL)], 1)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    reference = sentencepiece.SentencePieceProcessor(model_proto=raw)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in ("ab", "ba", "aabb ba", "bbbb"):
        assert tokenizer.encode(text, False) == reference.encode(text), text

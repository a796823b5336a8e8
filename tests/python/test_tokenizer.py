"""Tokenizers against their references: published cases, GGUF test vectors, the sentencepiece library, and broken files."""

import gzip
import io
import json
import random
import shutil
import struct
import warnings

import numpy as np
import pytest

from llmcoopt import Tokenizer, errors
from llmcoopt.text.pretokenizers import EXPRESSIONS
from llmcoopt.text.spm_file import parse_spm

CASE_FILES = {
    "byte_level": "tiny_bpe_bytelevel_tokenizer.json",
    "metaspace": "tiny_bpe_metaspace_tokenizer.json",
    "wordpiece": "tiny_wordpiece_tokenizer.json",
    "split_qwen2": "tiny_bpe_split_qwen2_tokenizer.json",
    "split_cl100k": "tiny_bpe_split_cl100k_tokenizer.json",
    "metaspace_pretok": "tiny_bpe_metaspace_pretok_tokenizer.json",
    "unigram": "tiny_unigram_tokenizer.json",
    "spm_model": "tiny_spm.model",
    "split_deepseek": "tiny_bpe_split_deepseek_tokenizer.json",
    "bytelevel_noregex": "tiny_bpe_bytelevel_noregex_tokenizer.json",
    "split_o200k": "tiny_bpe_split_o200k_tokenizer.json",
    "spm_bytefallback": "tiny_spm_bytefallback.model",
    "spm_bpe_model": "tiny_spm_bpe.model",
    "digits_bytelevel": "tiny_bpe_digits_bytelevel_tokenizer.json",
    "falcon_seq": "tiny_bpe_falcon_seq_tokenizer.json",
    "split_o200k_harmony": "tiny_bpe_split_o200k_harmony_tokenizer.json",
    "split_qwen35": "tiny_bpe_split_qwen35_tokenizer.json",
    "split_qwen35_ascii": "tiny_bpe_split_qwen35_ascii_tokenizer.json",
}
ODD = ["", " ", "   ", "\u2581", " \u2581a", "a ", " a", "Q: ", "\n\n \t", "e\u0301\ufb01\uff21", "\U0001f600x", "\x00\x07", "a" * 300]
ALPHABET = [
    "a",
    "b",
    "the",
    " ",
    "  ",
    "\u00e9",
    "e\u0301",
    "\uff46\uff55",
    "\u2460",
    "\ufb01",
    "\t",
    "\n",
    "\u3000",
    "\u4f60",
    "\U0001f600",
]
ALPHABET += [
    "\u2581",
    "<sep>",
    "@@",
    "<s>",
    "\u200b",
    "\u00a0",
    "ABC",
    "ing ",
    "ed ",
    "\r\n",
    "\uac00",
    "\u1100\u1161",
    "\uff76\uff9e",
    "\x01",
]


def jumbles(count, seed=7, longest=14):
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(longest))) for _ in range(count)]


def write_folder(folder, tokenizer_json, **files):
    """A Hugging Face folder; files are JSON objects by name with _ for the dot, or text for chat_template_jinja."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json) if isinstance(tokenizer_json, dict) else tokenizer_json)
    for name, value in files.items():
        stem, suffix = name.rsplit("_", 1)
        (folder / f"{stem}.{suffix}").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def added(number, content, **flags):
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | flags


def byte_level_json(extra=(), post=None):
    """A byte-level BPE with the 256 bytes, the piece "ab" and special tokens after them."""
    from llmcoopt.text.detokenizer import BYTE_ALPHABET

    vocabulary = {char: byte for char, byte in BYTE_ALPHABET.items()} | {"ab": 256}
    tokens = [added(257, "<s>"), added(258, "</s>"), added(259, "<|eot|>"), *extra]
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": tokens,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": None},
    }


BOS_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
}


# --- against references ---


@pytest.mark.parametrize("group", CASE_FILES)
def test_published_cases(data, group):
    """The decoded text of the JSON groups was made without special tokens, that of the .model groups by sentencepiece."""
    folder = data / "tokenizers" / "hf-tiny-cases"
    cases = json.loads((folder / "hf_tokenizer_cases.json").read_text())
    assert set(cases) == set(CASE_FILES)
    assert cases[group]["tokenizer"] == CASE_FILES[group]
    tokenizer = Tokenizer.from_pretrained(folder / CASE_FILES[group])
    for case in cases[group]["cases"]:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        skip = CASE_FILES[group].endswith(".json")
        assert tokenizer.decode(case["ids"], skip_special_tokens=skip) == case["decoded"], case["text"]


def read_vectors(data, name):
    folder = data / "gguf-vocab"
    with open(folder / f"{name}.gguf.inp", newline="", encoding="utf-8") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    rows = [list(map(int, line.split())) for line in (folder / f"{name}.gguf.out").read_text().splitlines()]
    assert len(rows) == 46
    return list(zip(texts, rows, strict=False))


@pytest.mark.parametrize("name", ["ggml-vocab-llama-spm", "ggml-vocab-gpt-2"])
def test_gguf_vectors(data, name):
    tokenizer = Tokenizer.from_pretrained(data / "gguf-vocab" / f"{name}.gguf")
    for text, ids in read_vectors(data, name):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text


def llama3_metadata(data):
    folder = data / "tokenizers"
    vocabulary = json.loads(gzip.decompress((folder / "llama3.2.encoder.json.gz").read_bytes()))
    lines = gzip.decompress((folder / "llama3.2.vocab.bpe.gz").read_bytes()).decode("utf-8").split("\n")
    tokens = sorted(vocabulary, key=vocabulary.get)
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    special = [f"<|special_{i}|>" for i in range(3)] + ["<|eot_id|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens + special,
        "tokenizer.ggml.token_type": np.array([1] * len(tokens) + [3] * len(special), np.int32),
        "tokenizer.ggml.merges": [line for line in lines if line and not line.startswith("#version")],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


def test_llama3_vectors(data):
    tokenizer = Tokenizer.from_gguf_metadata(llama3_metadata(data))
    for text, ids in read_vectors(data, "ggml-vocab-llama-bpe"):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id  # this kind adds it where the file does not say
    assert tokenizer.eos_token_ids == [tokenizer.eos_token_id, len(tokenizer) - 1]  # <|eot_id|> ends a turn
    assert tokenizer.encode("x<|eot_id|>", add_special_tokens=False) == [tokenizer.encode("x", False)[0], len(tokenizer) - 1]
    assert len(tokenizer.encode("<|eot_id|>", False, parse_special=False)) > 1


@pytest.mark.parametrize(
    "pre, group",
    [
        ("qwen2", "split_qwen2"),
        ("llama-bpe", "split_cl100k"),
        ("gpt-4o", "split_o200k_harmony"),
        ("gpt-2", "byte_level"),
        ("qwen35", "split_qwen35_ascii"),
        ("smollm", "digits_bytelevel"),
    ],
)
def test_gguf_splits_as_the_json_file(data, pre, group):
    """The same vocabulary from tokenizer.json and as GGUF metadata gives the same ids: the name's expressions are the file's."""
    path = data / "tokenizers" / "hf-tiny-cases" / CASE_FILES[group]
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in content["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
    }
    one, two = Tokenizer.from_pretrained(path), Tokenizer.from_gguf_metadata(metadata)
    texts = [case["text"] for case in json.loads((path.parent / "hf_tokenizer_cases.json").read_text())[group]["cases"]]
    for text in texts + ODD + jumbles(200):
        if pre == "smollm" and any("\u2460" <= char <= "\u24ff" for char in text):
            continue  # Digits is what Unicode calls numeric, \p{N} the number categories: both take a circled digit, in different ways
        assert one.encode(text, False) == two.encode(text, False), text


def test_every_split_expression_compiles():
    from tokenizers import Regex

    for expressions in EXPRESSIONS.values():
        for expression in expressions:
            Regex(expression)


@pytest.mark.parametrize(
    "path",
    ["tokenizers/llama2.tokenizer.model", "models/stories260K/tok512.model"]
    + [f"tokenizers/hf-tiny-cases/{name}.model" for name in ("tiny_spm", "tiny_spm_bytefallback", "tiny_spm_bpe")],
)
def test_model_files_equal_sentencepiece(data, path):
    reference = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(data / path))
    tokenizer = Tokenizer.from_pretrained(data / path)
    lines = (data / "wikitext-2-raw" / "wiki.test.raw").read_text().split("\n")[:200]
    for text in lines + ODD + jumbles(500):
        ids = reference.encode(text)
        assert tokenizer.encode(text, False, parse_special=False) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids), text
    rng = random.Random(5)
    for top in (len(tokenizer), min(len(tokenizer), 259)):
        for _ in range(300):
            ids = [rng.randrange(3, top) for _ in range(rng.randrange(12))]
            assert tokenizer.decode(ids) == reference.decode(ids), ids


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity", "nmt_nfkc_cf"])
@pytest.mark.parametrize("fixed", [[], ["<sep>", "@@", "\u2581\u2581", "the"]])
def test_trained_models_equal_sentencepiece(data, tmp_path, kind, rule, fixed):
    """Every switch of the normaliser, with and without user-defined pieces and byte fallback."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [line for line in (data / "wikitext-2-raw" / "wiki.valid.raw").read_text().split("\n") if len(line) > 20][:120]
    for number, (trim, prefix, fallback, suffix) in enumerate([(1, 1, 1, 0), (0, 1, 0, 0), (1, 0, 0, 1), (0, 1, 1, 1), (0, 0, 0, 0)]):
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=350,
            model_type=kind,
            normalization_rule_name=rule,
            remove_extra_whitespaces=bool(trim),
            add_dummy_prefix=bool(prefix),
            byte_fallback=bool(fallback),
            treat_whitespace_as_suffix=bool(suffix),
            user_defined_symbols=fixed,
            split_by_whitespace=number % 2 == 0,
            hard_vocab_limit=False,
            character_coverage=0.999,
            minloglevel=3,
        )
        (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
        reference = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        for text in lines[:20] + ODD + jumbles(150):
            ids = reference.encode(text)
            assert tokenizer.encode(text, False, parse_special=False) == ids, (number, text)
            assert tokenizer.decode(ids) == reference.decode(ids), (number, text)


def test_unused_pieces_come_apart(data, tmp_path):
    """Every third merged piece of a BPE model marked as unused: merging goes through them, the result does not contain them."""
    sentencepiece = pytest.importorskip("sentencepiece")
    raw = (data / "tokenizers" / "hf-tiny-cases" / "tiny_spm_bpe.model").read_bytes()
    model, parts, at = parse_spm(raw, "x"), [], 0
    for i, (text, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
        score = struct.pack("<f", model.scores[i])
        parts.append(piece(text.encode(), score, 5 if kind == 1 and len(text) > 1 and i % 3 == 0 else kind))
        at += 2 + raw[at + 1]  # each piece of this file is shorter than 128 bytes
    changed = b"".join(parts) + raw[at:]
    (tmp_path / "tokenizer.model").write_bytes(changed)
    reference = sentencepiece.SentencePieceProcessor(model_proto=changed)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in ["the cat sat on the mat", "running and jumping", "nation station", *ODD, *jumbles(200)]:
        assert tokenizer.encode(text, False, parse_special=False) == reference.encode(text), text


@pytest.mark.parametrize("name", ["gpt2.tokenizer.json", "gpt-neox-20b.tokenizer.json.gz", "hf-tiny-cases/tiny_wordpiece_tokenizer.json"])
def test_json_files_equal_the_tokenizers_library(data, tmp_path, name):
    from tokenizers import Tokenizer as Reference

    path = data / "tokenizers" / name
    if path.suffix == ".gz":
        unpacked = tmp_path / path.stem
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        path = unpacked
    tokenizer, reference = Tokenizer.from_pretrained(path), Reference.from_file(str(path))
    rng = random.Random(3)
    for text in ODD + jumbles(200):
        assert tokenizer.encode(text) == reference.encode(text).ids, text
        assert tokenizer.encode(text, False) == reference.encode(text, add_special_tokens=False).ids
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(20))]
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_added_tokens_without_flags_and_beyond_a_gap(data):
    """The library alone refuses these files; with the flags filled in it would give the added tokens of the first the ids 262 and 263."""
    tokenizer = Tokenizer.from_pretrained(data / "tokenizers" / "mini_llama3.tokenizer.json")
    assert tokenizer.encode("<|begin_of_text|>", False) == [128000]
    assert tokenizer.decode([128000, 128001]) == "<|begin_of_text|><|end_of_text|>"
    for text in ODD + jumbles(100):
        assert tokenizer.decode(tokenizer.encode(text, False)) == text
    toy = Tokenizer.from_pretrained(data / "tokenizers" / "toy_bpe22.tokenizer.json")
    assert toy.convert_ids_to_tokens(toy.encode("<s>hello")) == ["<s>", "hello"]


def test_gguf_and_model_file_agree(data):
    one = Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model")
    two = Tokenizer.from_pretrained(data / "gguf-vocab" / "ggml-vocab-llama-spm.gguf")
    for text in [*ODD, "<s>[INST] hi [/INST] yes </s><s>[INST] so", *jumbles(200)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert one.encode(text) == two.encode(text), text


# --- traps ---


def test_t1_one_beginning_token(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json(), tokenizer_config_json=config))
    assert tokenizer.encode("ab") == [257, 256]
    with pytest.warns(UserWarning, match="'<s>' already"):
        assert tokenizer.encode("<s>ab") == [257, 256]
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], chat_template=template) == [257, 256]


def test_t2_pieces_join_to_the_whole(data):
    tokenizer = Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model")
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    stream = tokenizer.stream_decoder()
    assert [stream.put(i) for i in ids] == ["Hello", " world"]
    assert tokenizer.decode(ids) == "Hello world"
    assert tokenizer.decode(tokenizer.encode("  two blanks", add_special_tokens=False)) == "  two blanks"


def test_t5_byte_tokens_become_characters(data):
    for path in ("tokenizers/llama2.tokenizer.model", "gguf-vocab/ggml-vocab-llama-spm.gguf"):
        tokenizer = Tokenizer.from_pretrained(data / path)
        ids = tokenizer.convert_tokens_to_ids(["<0xE2>", "<0x82>", "<0xAC>"])
        assert tokenizer.decode(ids) == "\u20ac"
        assert b"".join(map(tokenizer.id_to_bytes, ids)) == "\u20ac".encode()
        assert tokenizer.decode(ids[:2]) == "\ufffd\ufffd"  # SentencePiece: one for each byte
        assert tokenizer.decode([*ids, ids[0]]) == "\u20ac\ufffd"  # whole characters stay


def test_t7_every_end_id(tmp_path):
    folder = write_folder(
        tmp_path / "m",
        byte_level_json(),
        tokenizer_config_json={"eos_token": "</s>"},
        generation_config_json={"eos_token_id": [258, 259]},
        config_json={"eos_token_id": 258},
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids) == (258, [258, 259])
    shutil.rmtree(folder)
    tokenizer = Tokenizer.from_pretrained(write_folder(folder, byte_level_json(), config_json={"eos_token_id": 259, "bos_token_id": 257}))
    assert (tokenizer.eos_token, tokenizer.eos_token_ids, tokenizer.bos_token_id) == ("<|eot|>", [259], 257)


@pytest.mark.parametrize("path", ["gpt2.tokenizer.json", "llama2.tokenizer.model"])
def test_t8_nothing_is_stripped(data, path):
    tokenizer = Tokenizer.from_pretrained(data / "tokenizers" / path)
    for text in ("Q: ", " Q:", "Q:\n", "\n Q: \n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("Q: ", False) != tokenizer.encode("Q:", False)


# --- facts of a folder ---


def test_beginning_and_end_tokens_follow_the_config(tmp_path):
    def load(post, **config):
        return Tokenizer.from_pretrained(
            write_folder(
                tmp_path / "m", byte_level_json(post=post), tokenizer_config_json={"bos_token": "<s>", "eos_token": "</s>"} | config
            )
        )

    assert load(None).encode("ab") == [256]
    assert load(BOS_TEMPLATE).encode("ab") == [257, 256]
    assert load(BOS_TEMPLATE).encode("ab", add_special_tokens=False) == [256]
    assert load(BOS_TEMPLATE, add_bos_token=False).encode("ab") == [256]
    assert load(BOS_TEMPLATE, add_bos_token=True, add_eos_token=True).encode("ab") == [257, 256, 258]
    assert load(None, add_bos_token=True).encode("") == [257]


def test_truncation_in_the_file_is_off(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json()))
    assert len(tokenizer.encode("x" * 100)) == 100


def test_special_tokens_from_the_map_and_added_tokens(tmp_path):
    folder = write_folder(
        tmp_path / "m",
        byte_level_json(),
        special_tokens_map_json={"bos_token": {"content": "<s>"}, "pad_token": "</s>", "unk_token": "<none>"},
        added_tokens_json={"<tool>": 260},
        tokenizer_config_json={"added_tokens_decoder": {"261": {"content": "<think>", "special": False}}},
    )
    with pytest.warns(UserWarning, match="unk_token is '<none>', which the vocabulary lacks"):
        tokenizer = Tokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (257, 258, None)
    assert tokenizer.encode("<tool>ab<think>") == [260, 256, 261]
    assert tokenizer.decode([260, 256, 261], skip_special_tokens=True) == "ab<think>"
    assert (tokenizer.vocab_size, len(tokenizer)) == (257, 262)


def test_special_text_can_be_taken_as_plain_text(tmp_path, data):
    for tokenizer in (
        Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json())),
        Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model"),
    ):
        special = tokenizer.convert_tokens_to_ids("</s>")
        assert special in tokenizer.encode("x</s>", False)
        plain = tokenizer.encode("x</s>", False, parse_special=False)
        assert special not in plain
        assert tokenizer.decode(plain) == "x</s>"


def test_chat_templates_of_a_folder(tmp_path):
    several = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    folder = write_folder(tmp_path / "m", byte_level_json(), tokenizer_config_json={"chat_template": several})
    tokenizer = Tokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "one"
    assert tokenizer.apply_chat_template(messages, tokenize=False, tools=[{"type": "function"}]) == "two"
    assert tokenizer.apply_chat_template(messages, tokenize=False, chat_template="tool_use") == "two"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_pretrained(folder).chat_template == "file"


def test_sentencepiece_folder_with_added_tokens(tmp_path, data):
    shutil.copy(data / "tokenizers" / "llama2.tokenizer.model", tmp_path / "tokenizer.model")
    decoder = {"32000": {"content": "<|end|>", "special": True, "rstrip": True}, "1": {"content": "<s>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "legacy": False}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (len(tokenizer), tokenizer.vocab_size) == (32001, 32000)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello<|end|>  world")) == ["<s>", "\u2581Hello", "<|end|>", "world"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    legacy = Tokenizer.from_pretrained(tmp_path)
    assert legacy.convert_ids_to_tokens(legacy.encode("Hello<|end|>  world")) == ["<s>", "\u2581Hello", "<|end|>", "\u2581world"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"5": {"content": "<|end|>"}}}))
    with pytest.raises(errors.FormatError, match=r"'<\|end\|>' has id 5, which .* gives to '<0x02>'"):
        Tokenizer.from_pretrained(tmp_path)


# --- calls ---


def test_call_pads_and_truncates(tmp_path):
    config = {"pad_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json(), tokenizer_config_json=config))
    assert tokenizer("ab") == {"input_ids": [257, 256], "attention_mask": [1, 1]}
    found = tokenizer(["ab", "abx"], padding=True, return_tensors="np")
    assert found["input_ids"].tolist() == [[258, 257, 256], [257, 256, 120]]
    assert found["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    tokenizer.padding_side = "right"
    assert tokenizer(["ab", "abx"], padding=True)["input_ids"] == [[257, 256, 258], [257, 256, 120]]
    assert tokenizer("abxxx", truncation=True, max_length=3)["input_ids"] == [257, 256, 120]
    with pytest.raises(errors.ArgumentError, match="different numbers of ids"):
        tokenizer(["ab", "abx"], return_tensors="np")
    with pytest.raises(errors.ArgumentError, match="truncation needs a number"):
        tokenizer("ab", truncation=True)


def test_conversions_and_repr(tmp_path):
    config = {"bos_token": "<s>", "chat_template": "x"}
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json(), tokenizer_config_json=config))
    assert tokenizer.convert_ids_to_tokens([256, 257]) == ["ab", "<s>"]
    assert tokenizer.convert_ids_to_tokens(256) == "ab"
    assert tokenizer.convert_tokens_to_ids(["ab", "nothing"]) == [256, None]
    assert tokenizer.get_vocab()["ab"] == 256
    assert tokenizer.decode(np.array([256, 120])) == "abx"
    assert tokenizer.decode(np.int64(256)) == "ab"
    assert tokenizer.batch_decode(np.array([[256], [120]])) == ["ab", "x"]
    assert "260 tokens" in repr(tokenizer) and "bos='<s>'" in repr(tokenizer) and "chat template" in repr(tokenizer)


def test_wrong_arguments(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "m", byte_level_json()))
    for ids, text in (([260], "id 260 is outside the vocabulary of 260"), ([-1], "id -1 is outside"), ([1.5], "id 1.5 is float")):
        with pytest.raises(errors.ArgumentError, match=text):
            tokenizer.decode(ids)
    for ids in ("ab", None, [True], [[1]], [2**70]):
        with pytest.raises(errors.ArgumentError):
            tokenizer.decode(ids)
    with pytest.raises(errors.ArgumentError, match=r"text is 7 \(int\); expected str"):
        tokenizer.encode(7)
    with pytest.raises(errors.ArgumentError, match="half of a surrogate pair"):
        tokenizer.encode("x\ud800")
    with pytest.raises(errors.ArgumentError, match="expected a list of str"):
        tokenizer.encode_batch("ab")


# --- broken files ---


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b'{"version": "1.0", "model": ', "not valid JSON"),
        (b'{"version": "1.0", "model": {"type": "Nothing"}}', "tokenizers library cannot use it"),
        (b"\xff\xfe\x00\x01 no text", "not UTF-8"),
        (b"[1, 2]", "JSON text|tokenizers library cannot use it"),
    ],
)
def test_broken_tokenizer_json(tmp_path, content, text):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(errors.FormatError, match=text) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 7}', "bos_token is 7; expected text"),
        ("tokenizer_config.json", '{"chat_template": 7}', "chat_template is '7'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "has id 'x'"),
        ("added_tokens.json", '{"<tool>": "260"}', "has id '260'"),
        ("special_tokens_map.json", "[]", "expected an object"),
    ],
)
def test_broken_files_beside_it(tmp_path, name, content, text):
    write_folder(tmp_path / "m", byte_level_json())
    (tmp_path / "m" / name).write_text(content)
    with pytest.raises(errors.FormatError, match=text) as caught:
        Tokenizer.from_pretrained(tmp_path / "m")
    assert name in str(caught.value)


def test_missing_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.MissingFileError, match=r"no tokenizer.json and no tokenizer.model; the folder holds config.json"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(errors.MissingFileError):
        Tokenizer.from_pretrained(tmp_path / "nothing" / "here")


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, wire, value):
    return varint(number << 3 | wire) + (varint(len(value)) + value if wire == 2 else value)


def piece(text, score=b"\x00\x00\x80\xbf", kind=1):
    return field(1, 2, field(1, 2, text) + field(2, 5, score) + field(3, 0, varint(kind)))


UNKNOWN_PIECE = piece(b"<unk>", kind=2)


@pytest.mark.parametrize(
    "raw, error, text",
    [
        (b"\x0a", errors.FormatError, "does not end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", errors.FormatError, "truncated file"),
        (b"\x0a" + b"\xff" * 20, errors.FormatError, "does not end"),
        (b"\x0b", errors.FormatError, "wire type 3"),
        (b"\x02\x00", errors.FormatError, "field number 0"),
        (UNKNOWN_PIECE + piece(b""), errors.FormatError, "piece 1: the piece is empty"),
        (UNKNOWN_PIECE + piece(b"\xff"), errors.FormatError, "not UTF-8"),
        (UNKNOWN_PIECE + piece(b"a", kind=9), errors.FormatError, "type 9"),
        (UNKNOWN_PIECE + piece(b"a", score=b"\x00\x00\xc0\x7f"), errors.FormatError, "NaN"),
        (piece(b"a"), errors.FormatError, "0 pieces of type unknown"),
        (field(2, 2, field(3, 0, b"\x02")), errors.FormatError, "no pieces"),
        (UNKNOWN_PIECE + field(2, 2, field(3, 0, b"\x03")), errors.UnsupportedError, "model type word"),
        (UNKNOWN_PIECE + field(2, 0, b"\x01"), errors.FormatError, "wire type 0; expected 2"),
        (UNKNOWN_PIECE + field(3, 2, field(2, 2, b"\xff\xff\xff\xff\x00\x00")), errors.FormatError, "precompiled_charsmap"),
    ],
)
def test_broken_sentencepiece_model(tmp_path, raw, error, text):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(error, match=text) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.model" in str(caught.value)


def test_damaged_sentencepiece_models_never_crash(data):
    """Every cut, and single changed bytes: a model or a typed error."""
    raw = (data / "tokenizers" / "hf-tiny-cases" / "tiny_spm.model").read_bytes()
    rng = random.Random(1)
    damaged = [raw[:n] for n in range(len(raw))]
    for _ in range(2000):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] = rng.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        try:
            parse_spm(content, "x.model")
        except errors.Error:
            refused += 1
    assert refused > len(raw) // 2


def small_metadata(**changes):
    """A GGUF 'llama' vocabulary of 8 tokens; keys without the prefix, None removes one."""
    values = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"],
        "scores": np.array([0, 0, 0, -1, -2, -3, -4, -5], np.float32),
        "token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def test_gguf_switches():
    assert Tokenizer.from_gguf_metadata(small_metadata()).encode("ab") == [1, 7]
    assert Tokenizer.from_gguf_metadata(small_metadata(add_space_prefix=False)).encode("ab") == [1, 6]
    assert Tokenizer.from_gguf_metadata(small_metadata(add_bos_token=False, add_eos_token=True)).encode("ab") == [7, 2]
    assert Tokenizer.from_gguf_metadata(small_metadata()).encode("ac") == [1, 3, 4, 0]
    named = small_metadata() | {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    assert Tokenizer.from_gguf_metadata(named).chat_templates == {"default": "one", "tool_use": "two"}
    with pytest.warns(UserWarning, match="eos_token_id is 99, but there are 8 tokens"):
        assert Tokenizer.from_gguf_metadata(small_metadata(eos_token_id=99)).eos_token_id is None


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"model": None}, errors.FormatError, "no key tokenizer.ggml.model"),
        ({"model": "t5"}, errors.UnsupportedError, "is 't5'; expected 'llama' or 'gpt2'"),
        ({"tokens": None}, errors.FormatError, "tokens is missing or empty"),
        ({"tokens": 5}, errors.FormatError, "tokens is 5; expected an array"),
        ({"scores": np.zeros(7, np.float32)}, errors.FormatError, "scores has 7 entries; expected 8"),
        ({"scores": None}, errors.FormatError, "scores is missing"),
        ({"token_type": ["x"] * 8}, errors.FormatError, r"token_type\[0\] is 'x'"),
        ({"model": "gpt2"}, errors.FormatError, "merges is missing"),
        ({"model": "gpt2", "merges": ["ab"]}, errors.FormatError, r"merges\[0\] is 'ab'; expected two pieces"),
    ],
)
def test_broken_gguf_metadata(changes, error, text):
    with pytest.raises(error, match=text) as caught:
        Tokenizer.from_gguf_metadata(small_metadata(**changes), "m.gguf")
    assert "m.gguf" in str(caught.value)


@pytest.mark.parametrize("kind", [1, 2], ids=["unigram", "bpe"])
def test_hand_made_models_equal_sentencepiece(tmp_path, kind):
    """No piece for the space mark: runs of unknown text across words are one id. A user-defined piece that wins narrowly over two others."""
    sentencepiece = pytest.importorskip("sentencepiece")
    scores = {"a": -0.5, "b": -1.0, "c": -2.0, "bc": -1.42, "d": -2.1, "bd": -1.42}
    raw = UNKNOWN_PIECE + piece(b"<s>", kind=3) + piece(b"</s>", kind=3) + piece(b"ab", kind=4)
    raw += b"".join(piece(text.encode(), struct.pack("<f", score)) for text, score in scores.items())
    raw += field(2, 2, field(3, 0, varint(kind)))
    (tmp_path / "tokenizer.model").write_bytes(raw)
    reference = sentencepiece.SentencePieceProcessor(model_proto=raw)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for text in ["abc", "abd", "x y", "x  y z a", " x", "abcabdab b", "aab x abd"]:
        assert tokenizer.encode(text, False, parse_special=False) == reference.encode(text), text


def test_broken_merges_and_unknown_pre():
    metadata = small_metadata(model="gpt2", merges=["a zz"], pre="default")
    with pytest.raises(errors.FormatError, match="tokenizers library cannot use it"):
        Tokenizer.from_gguf_metadata(metadata, "m.gguf")
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre 'nothing' is not known"):
        tokenizer = Tokenizer.from_gguf_metadata(small_metadata(model="gpt2", merges=["a b"], pre="nothing"), "m.gguf")
    assert tokenizer.encode("ab", False) == [6]
    with pytest.warns(UserWarning, match="m.gguf: 3 bytes of the text have no token"):
        assert tokenizer.encode("a\u00e9b!", False) == [6]


def test_a_gguf_file_without_scores(data):
    with pytest.raises(errors.FormatError, match=r"tiny_llama_f32\.gguf: tokenizer\.ggml\.scores is missing"):
        Tokenizer.from_pretrained(data / "models" / "hf-tiny-logits" / "tiny_llama_f32.gguf")

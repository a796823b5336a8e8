"""TextStream: the pieces join to the whole text, and stop strings never leak."""

import gzip
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcoopt import Tokenizer, errors
from llmcoopt.streaming import TextStream, first_stop, held_back


def fragments(*texts):
    """A tokenizer whose token i is texts[i], by bytes; texts may be bytes."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    from llmcoopt.text.detokenizer import BYTE_ALPHABET
    from llmcoopt.text.facts import TokenizerFacts
    from llmcoopt.text.rust import RustEncoder

    char_of = {byte: char for char, byte in BYTE_ALPHABET.items()}
    tokens = ["".join(char_of[b] for b in (text if isinstance(text, bytes) else text.encode())) for text in texts]
    inner = Inner(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(RustEncoder(inner, tokens), TokenizerFacts("fragments"))


def run(tokenizer, ids, **options):
    stream = TextStream(tokenizer, **options)
    pieces = [stream.put(i) for i in ids]
    return [*pieces, stream.finish()], stream


NAMES = ["tiny_bpe_bytelevel_tokenizer.json", "tiny_bpe_metaspace_tokenizer.json", "tiny_bpe_metaspace_pretok_tokenizer.json"]
NAMES += [
    "tiny_unigram_tokenizer.json",
    "tiny_wordpiece_tokenizer.json",
    "tiny_spm.model",
    "tiny_spm_bytefallback.model",
    "tiny_spm_bpe.model",
]
PATHS = [f"tokenizers/hf-tiny-cases/{name}" for name in NAMES] + ["models/stories260K/tok512.model", "gguf-vocab/ggml-vocab-llama-spm.gguf"]


@pytest.mark.parametrize("path", [*PATHS, "tokenizers/gpt2.tokenizer.json", "tokenizers/gpt-neox-20b.tokenizer.json.gz"])
def test_pieces_join_to_the_whole_text(data, tmp_path, path):
    """Random ids (so random bytes too), with and without special tokens, and the same with byte tokens alone."""
    path = data / path
    if path.suffix == ".gz":
        (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(path.read_bytes()))
        path = tmp_path
    tokenizer = Tokenizer.from_pretrained(path)
    rng = random.Random(11)
    for top in (len(tokenizer), min(len(tokenizer), 262)):
        for _ in range(300):
            ids = [rng.randrange(top) for _ in range(rng.randrange(30))]
            for skip in (True, False):
                pieces, _ = run(tokenizer, ids, skip_special_tokens=skip)
                assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("path", ["tokenizers/gpt2.tokenizer.json", "tokenizers/llama2.tokenizer.model"])
def test_text_comes_as_whole_characters(data, path):
    tokenizer = Tokenizer.from_pretrained(data / path)
    text = "a\u00e9\u20ac\u4f60\U0001f600\U0001f468\u200d\U0001f469 \u1793 z"
    pieces, _ = run(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces[:-1]  # something was waited for
    assert pieces[-1] == ""


def test_unfinished_and_broken_bytes():
    tokenizer = fragments(b"\xe2", b"\x82", b"\xac", "x", b"\xff")
    assert run(tokenizer, [0, 1, 2, 3])[0] == ["", "", "\u20ac", "x", ""]
    assert run(tokenizer, [0, 1])[0] == ["", "", "\ufffd"]
    assert run(tokenizer, [0, 3])[0] == ["", "\ufffdx", ""]
    assert run(tokenizer, [3, 4, 3])[0] == ["x", "\ufffd", "x", ""]


def test_t3_stop_between_blanks(data):
    tokenizer = Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model")
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert run(tokenizer, ids)[0] == ["a", " b", ""]
    pieces, stream = run(tokenizer, ids, stop=" b")
    assert ("".join(pieces), stream.stop_string) == ("a", " b")
    assert run(tokenizer, ids[:1])[0] == ["a", ""]
    assert run(tokenizer, [1, *ids, 2])[0] == ["", "a", " b", "", ""]  # special tokens give nothing and cost no blank


def test_stop_string_across_tokens():
    tokenizer = fragments("E", "ND", "x", "EN", "xEND")
    assert run(tokenizer, [2, 0, 1, 2], stop="END")[0] == ["x", "", "", "", ""]
    assert run(tokenizer, [0, 2], stop=["END"])[0] == ["", "Ex", ""]
    assert run(tokenizer, [2, 0], stop=["END"])[0] == ["x", "", "E"]
    pieces, stream = run(tokenizer, [4, 2], stop=["END"])
    assert pieces == ["x", "", ""]
    assert (stream.stopped, stream.stop_string, stream.text) == (True, "END", "x")
    assert run(tokenizer, [3, 3, 1], stop=["END"])[0][:2] == ["", "EN"]  # the first EN is no beginning any more


def test_overlapping_stop_strings():
    """The one complete first wins; of two that end together, the longer."""
    tokenizer = fragments("a", "b", "c", "abc", "x")
    for ids in ([4, 0, 1, 2], [4, 3]):
        assert run(tokenizer, ids, stop=["abc", "ab"])[1].text == "x"
        assert run(tokenizer, ids, stop=["abc", "b"])[1].text == "xa"
        assert run(tokenizer, ids, stop=["bc", "abc"])[1].text == "x"
        assert run(tokenizer, ids, stop=["abcd", "c"])[1].text == "xab"
    assert run(tokenizer, [0, 0, 0, 1], stop=["aab"])[1].text == "a"


def test_a_stop_string_of_several_bytes_and_at_the_end():
    tokenizer = fragments(b"\xe2", b"\x82\xac", "x", b"\xe2\x82")
    assert run(tokenizer, [2, 0, 1, 2], stop="\u20ac")[1].text == "x"
    assert run(tokenizer, [2, 3], stop="\ufffd")[1].text == "x"  # found when finish() gives up on the bytes


def reference_stop(text, stops):
    """Character by character: the text before the first stop that is complete."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("abE", min_size=1, max_size=3), min_size=1, max_size=12), st.lists(st.text("abE", min_size=1, max_size=4), max_size=3)
)
def test_any_cut_into_tokens_gives_the_same_text(parts, stops):
    tokenizer = fragments(*dict.fromkeys(parts))
    order = list(dict.fromkeys(parts))
    pieces, stream = run(tokenizer, [order.index(part) for part in parts], stop=stops)
    expected = reference_stop("".join(parts), stops)
    assert "".join(pieces) == expected == stream.text
    assert stream.stopped == any(stop in "".join(parts) for stop in stops)


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_only_possible_beginnings_are_held(text, stops):
    size = held_back(text, stops)
    possible = [n for n in range(len(text) + 1) for stop in stops if 0 < n < len(stop) and text.endswith(stop[:n])]
    assert size == max(possible, default=0)


def test_first_stop_prefers_the_earliest_end():
    assert first_stop("xabcab", ["ab", "abc"]) == (1, "ab")
    assert first_stop("xabc", ["c", "bc"]) == (2, "bc")
    assert first_stop("xyz", ["ab"]) is None


def test_ids_beyond_the_vocabulary_give_no_text():
    """Models pad their vocabulary, and may sample what the tokenizer does not know."""
    tokenizer = fragments("a", "b")
    assert run(tokenizer, [0, 5, 1])[0] == ["a", "", "b", ""]


def test_a_special_or_missing_token_first_costs_no_blank(data):
    tokenizer = Tokenizer.from_pretrained(data / "tokenizers" / "llama2.tokenizer.model")
    ids = tokenizer.encode("a b", add_special_tokens=False)
    assert run(tokenizer, [99999, 1, *ids])[0] == ["", "", "a", " b", ""]


def test_characters_of_a_decoder_that_is_no_rule_of_bytes(data, tmp_path):
    """A decoder with a regular expression goes through the library, token by token."""
    content = json.loads((data / "tokenizers" / "hf-tiny-cases" / "tiny_bpe_metaspace_tokenizer.json").read_text())
    content["decoder"]["decoders"][0]["pattern"] = {"Regex": "\u2581"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("a \u20ac\u4f60 b\U0001f600", add_special_tokens=False)
    pieces, _ = run(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "a \u20ac\u4f60 b\U0001f600"
    assert "\ufffd" not in "".join(pieces)
    assert run(tokenizer, ids[:-1])[0][-1] == "\ufffd" * 3


def test_wrong_arguments():
    tokenizer = fragments("a", "b")
    for stop, text in (("", r"stop\[0\] is ''"), (["a", 3], r"stop\[1\] is 3"), (7, "stop is int"), (b"a", "stop is bytes")):
        with pytest.raises(errors.ArgumentError, match=text):
            TextStream(tokenizer, stop=stop)
    stream = TextStream(tokenizer, stop=["ab"])
    for bad in (-1, "a", True, 1.0):
        with pytest.raises(errors.ArgumentError):
            stream.put(bad)
    assert repr(stream) == "TextStream(stop=['ab'], holds '')"
    stream.put(0)
    assert stream.finish() == "a"
    assert stream.finish() == ""
    with pytest.raises(errors.ArgumentError, match="after finish"):
        stream.put(0)


@pytest.mark.parametrize("path", ["tokenizers/gpt2.tokenizer.json", "tokenizers/hf-tiny-cases/tiny_wordpiece_tokenizer.json"])
def test_a_token_costs_the_same_late_as_early(data, path):
    """20,000 tokens: the last quarter takes no longer than the first (the best of three tries, factor 4 for noise; a quadratic stream needs 7)."""
    tokenizer = Tokenizer.from_pretrained(data / path)
    ids = [300 % len(tokenizer), 40, 50, 60] * 5000
    ratios = []
    for _ in range(3):
        stream = TextStream(tokenizer, stop=["never there"])
        quarters = []
        for quarter in range(4):
            started = time.perf_counter()
            for i in ids[quarter * 5000 : (quarter + 1) * 5000]:
                stream.put(i)
            quarters.append(time.perf_counter() - started)
        ratios.append(quarters[3] / quarters[0])
    assert min(ratios) < 4, ratios

"""Caches saved to a file and loaded again: the same bits, and damaged files told as such."""

import json
import re

import numpy as np
import pytest
from checkpoints import make

import llmcoopt
from llmcoopt.cache import DTYPES
from llmcoopt.errors import ArgumentError, Error, FormatError, OutOfPagesError

IDS = np.random.default_rng(21).integers(0, 2048, 400).tolist()


@pytest.fixture(scope="module")
def model():
    with llmcoopt.Model.from_pretrained("tiny", threads=2) as model:
        yield model


def goes_on(model, sequence):
    return np.concatenate([model.forward(IDS[300:340], sequence), model.forward(IDS[340:341], sequence)])


@pytest.mark.parametrize("n", [0, 1, 16, 37, 64, 101])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits(model, tmp_path, dtype, n):
    with llmcoopt.KVCache(model, dtype, page_size=32, max_tokens=1024) as cache:
        sequence = cache.sequence()
        if n:
            model.forward(IDS[:n], sequence)
        cache.save(tmp_path / "a.safetensors", sequence)
        (other,) = cache.load(tmp_path / "a.safetensors")
        assert other.ids == IDS[:n] and len(other) == n
        cache.check()
        expected = goes_on(model, sequence)
        assert np.array_equal(goes_on(model, other), expected)
    cache, (again,) = llmcoopt.KVCache.from_file(model, tmp_path / "a.safetensors", max_tokens=512)
    assert list(cache.layer_dtypes) == [dtype] * 4
    assert np.array_equal(goes_on(model, again), expected)
    cache.close()


def test_forks_stay_forks(model, tmp_path):
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=2048) as cache:
        first = cache.sequence()
        model.forward(IDS[:100], first)
        second = first.fork()
        model.forward(IDS[100:130], second)
        cache.save(tmp_path / "a")
        expected = [goes_on(model, sequence.fork()) for sequence in (first, second)]
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=2048) as cache:
        loaded = cache.load(tmp_path / "a")
        stats = cache.stats()
        assert stats["pages_shared"] == 6 and stats["pages_total"] - stats["pages_free"] == 7 + 3
        assert [np.array_equal(goes_on(model, s), right) for s, right in zip(loaded, expected, strict=True)] == [True, True]
        cache.check()


def test_from_and_to_a_spill_file(model, tmp_path):
    with llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=1024) as plain:
        sequence = plain.sequence()
        model.forward(IDS[:250], sequence)
        size = plain.stats()["page_bytes"]
        with llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=1024, host_bytes=5 * size, spill_path=tmp_path) as cache:
            one = cache.sequence()
            model.forward(IDS[:250], one)
            cache.save(tmp_path / "a", one)
            (two,) = cache.load(tmp_path / "a")
            cache.check()
            right = goes_on(model, sequence)
            assert np.array_equal(goes_on(model, two), right) and np.array_equal(goes_on(model, one), right)


def test_windows_and_prefixes(model, tmp_path):
    options = {"page_size": 16, "max_tokens": 1024, "attention_window": 40, "prefix_cache": True}
    with llmcoopt.KVCache(model, "fp8_e4m3", **options) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:200], sequence, last_only=True)
        cache.save(tmp_path / "a", sequence)
        (other,) = cache.load(tmp_path / "a")
        assert np.array_equal(goes_on(model, other), goes_on(model, sequence))
        cache.check()
        assert np.isnan(other.kv(0)[0][0]).all()


def refused(model, path, error, text, **options):
    options = {"page_size": 16, "max_tokens": 512} | options
    with llmcoopt.KVCache(model, options.pop("dtype", "int8"), **options) as cache:
        with pytest.raises(error, match=text):
            cache.load(path)
        cache.check()
        stats = cache.stats()
        assert stats["sequences"] == 0 and stats["pages_free"] == stats["pages_total"]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=512) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:50], sequence)
        cache.save(path)
    return path


def test_other_caches_are_refused(model, saved, tmp_path):
    refused(model, saved, ArgumentError, r"page_size 16, the cache has 32", page_size=32)
    refused(model, saved, ArgumentError, r"dtypes \['int8'.*the cache has \['bfloat16'", dtype="bfloat16")
    refused(model, saved, ArgumentError, r"write_buffer True, the cache has False", write_buffer=False)
    refused(model, saved, ArgumentError, r"turn_keys True, the cache has False", turn_keys=False)
    refused(model, saved, ArgumentError, r"window None, the cache has 40", attention_window=40)
    refused(model, saved, OutOfPagesError, r"the cache is full: all of its 3 pages.*raise max_tokens", max_tokens=48)
    make(tmp_path / "other", hidden_size=256, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=4, vocab_size=2048)
    with llmcoopt.Model.from_pretrained(tmp_path / "other") as other:
        refused(other, saved, ArgumentError, r"it belongs to another model: fingerprint '\w+', the cache has '\w+'")


def test_files_that_are_none(model, tmp_path, saved):
    for name, raw in {"empty": b"", "text": b"a saved cache", "weights": None}.items():
        path = tmp_path / name
        if raw is None:
            make(tmp_path / "model")
            path = tmp_path / "model" / "model.safetensors"
        else:
            path.write_bytes(raw)
        refused(model, path, FormatError, re.escape(str(path)))
    whole = saved.read_bytes()
    version = tmp_path / "version"
    version.write_bytes(whole.replace(b'"version": "2"', b'"version": "9"'))
    refused(model, version, FormatError, "version '9' of the format, this package reads 2")


def test_damage_is_found(model, saved, tmp_path):
    """Every header byte changed, every page byte region changed, every length: an error, never a crash nor a wrong sequence."""
    whole, path, rng = saved.read_bytes(), tmp_path / "damaged", np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    size = json.loads(whole[8:header])["pages"]["shape"][1]
    assert (len(whole) - header) > 4 * size
    places = [*range(0, header, 7), *rng.integers(header, len(whole), 60), header + size + 5]
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=512) as cache:
        for at in places:
            raw = bytearray(whole)
            raw[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(raw)
            with pytest.raises(Error):
                cache.load(path)
        for length in rng.integers(0, len(whole), 40):
            path.write_bytes(whole[:length])
            with pytest.raises(Error):
                cache.load(path)
        cache.check()
        assert cache.stats()["sequences"] == 0
        raw = bytearray(whole)
        raw[header + size + 5] ^= 1
        path.write_bytes(raw)
        with pytest.raises(FormatError, match=r"page 1 is damaged \(tokens 16 to 31 of sequence 0\)"):
            cache.load(path)


def test_nothing_half_written(model, saved, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"before")
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=512) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:50], sequence)
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            cache.save(path, sequence)
        with pytest.raises(ArgumentError, match="expected sequences of this cache"):
            cache.save(path, [1])
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_numbers_of_no_page(model):
    with llmcoopt.KVCache(model, "auto", page_size=16, max_tokens=64) as cache:
        size = cache.stats()["page_bytes"]
        for number in (-1, 0, 3, 10**6):
            with pytest.raises(ArgumentError, match=f"page {number}, expected one that is held"):
                cache._core.page_drop(number)
            with pytest.raises(ArgumentError, match=f"page {number}, expected one that is held"):
                cache._core.page_out(number, bytearray(size))
        with pytest.raises(ArgumentError, match=r"a buffer of 5 bytes"):
            cache._core.page_in(b"short")
        with pytest.raises(FormatError, match=r"page 0 of a sequence is number 7, which is none"):
            cache._core.restore(3, 3, 0, np.zeros(3, np.int32).tobytes(), np.array([7], np.int32).tobytes(), b"")
        cache.check()

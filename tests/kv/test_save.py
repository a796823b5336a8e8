"""Caches saved to a file and loaded again: the same bits, and damaged files told as such."""

import json
import re
import zlib

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


def test_bounds_of_pages_that_go_to_the_spill_file(model, tmp_path):
    """The first page of the second sequence leaves memory as it is loaded."""
    path = tmp_path / "a"
    with llmcoopt.KVCache(model, "fp8", page_size=16, max_tokens=1024) as plain:
        sequences = [plain.sequence() for _ in range(2)]
        for i, sequence in enumerate(sequences):
            model.forward(IDS[150 * i : 150 * i + 150], sequence)
        plain.save(path)
        expected = goes_on(model, sequences[1])
        size = plain.stats()["page_bytes"]
    with llmcoopt.KVCache(model, "fp8", 16, 1024, host_bytes=8 * size, spill_path=tmp_path, page_tolerance=1e-300) as cache:
        first, second = cache.load(path)
        first.free()
        assert np.array_equal(goes_on(model, second), expected)
        second.truncate(64)
        model.forward(IDS[:1], second)  # all its pages come back
        assert cache.stats()["pages_away"] == 0
        cache.check()


def rewritten(source, path, edit):
    """Writes the file again with what edit(about, tensors) made of it, and with checksums that are right. tensors: [dtype, bytes] of each."""
    raw = source.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = [entry["dtype"], raw[start + begin : start + end], entry["shape"]]
    about = json.loads(metadata["about"])
    edit(about, tensors)
    parts = [f"{part}.{i}" for i in range(len(about["sequences"])) for part in ("ids", "table", "tail")] + ["firsts"]
    metadata["about"] = json.dumps(about)
    metadata["crc32"] = f"{zlib.crc32(metadata['about'].encode() + b''.join(tensors[name][1] for name in parts if name in tensors)):08x}"
    entries, at = {"__metadata__": metadata}, 0
    for name, (dtype, data, shape) in tensors.items():
        shape = shape if name == "pages" else [len(data) // (1 if dtype == "U8" else 4)]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, data, _ in tensors.values()))


def numbers_of(name, **changed):
    """An edit: numbers of an int32 tensor by their index."""

    def edit(about, tensors):
        values = np.frombuffer(tensors[name][1], np.int32).copy()
        for at, value in changed.items():
            values[int(at[1:])] = value
        tensors[name][1] = values.tobytes()

    return edit


def sequence_of(at, value):
    def edit(about, tensors):
        about["sequences"][0][at] = value

    return edit


def bytes_of(name, change):
    def edit(about, tensors):
        tensors[name][:2] = "U8", change(tensors[name][1])

    return edit


@pytest.mark.parametrize(
    "edit, text",
    [
        (lambda about, tensors: None, None),
        (numbers_of("ids.0", n3=2**30), r"id 1073741824 of a sequence, expected one in \[0, 2048\)"),
        (numbers_of("ids.0", n3=2048), r"id 2048 of a sequence"),
        (numbers_of("ids.0", n39=-2), r"id -2 of a sequence"),
        (numbers_of("table.0", n0=-5), "a table names pages -5 to 2 of 3"),
        (numbers_of("table.0", n2=3), "a table names pages 0 to 3 of 3"),
        (numbers_of("table.0", n0=-1), "page 0 of a sequence is number -1, which is none"),
        (numbers_of("table.0", n1=0), r"page 1 of a sequence is number \d+, which a text begins with"),
        (numbers_of("table.1", n0=1, n1=0), "first tokens in .* bytes, expected .* for each of 2 pages"),
        (sequence_of(0, 2**70), "its parts are not those of a saved cache"),
        (sequence_of(0, float("inf")), "its parts are not those of a saved cache"),
        (sequence_of(0, 41), "41 tokens with 40 ids"),
        (sequence_of(1, 41), "of which 41 tokens are exact"),
        (sequence_of(2, 4), "and 4 pages unseen"),
        (sequence_of(2, -1), "and -1 pages unseen"),
        (bytes_of("ids.0", lambda raw: raw + b"x"), "its parts are not those of a saved cache"),
        (bytes_of("table.0", lambda raw: raw[:-1]), "its parts are not those of a saved cache"),
        (bytes_of("table.0", lambda raw: raw[:-4]), "a sequence of 40 tokens in 2 pages"),
        (bytes_of("tail.0", lambda raw: raw[:-1]), "a write buffer of .* bytes, expected"),
        (bytes_of("firsts", lambda raw: raw[:-1]), "first tokens in .* bytes, expected .* for each of 1 pages"),
        (bytes_of("tail.0", lambda raw: raw + b"x"), "a write buffer of .* bytes, expected"),
        (bytes_of("firsts", lambda raw: raw + b"x"), "first tokens in .* bytes, expected .* for each of 1 pages"),
        (bytes_of("crc32", lambda raw: raw[:-4]), "2 checksums of 3 pages"),
        (lambda about, tensors: tensors.pop("firsts"), "its parts are not those of a saved cache"),
        (lambda about, tensors: about.update(page_bytes=1), "its parts are not those of a saved cache"),
        (lambda about, tensors: about.update(sequences=[[1], [2]]), "its parts are not those of a saved cache"),
    ],
)
def test_files_made_to_harm(model, tmp_path, edit, text):
    """Checksums that are right, and contents that no cache has: an error before any of it is used."""
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=1024) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:40], sequence)
        cache.save(tmp_path / "a", [sequence, sequence.fork()])
        rewritten(tmp_path / "a", tmp_path / "b", edit)
        if text is None:
            assert cache.load(tmp_path / "b")[0].ids == IDS[:40]
            return
        with pytest.raises(FormatError, match=text):
            cache.load(tmp_path / "b")
        cache.check()
        assert cache.stats()["sequences"] == 1


@pytest.mark.parametrize("options", [{"residual_length": 16, "sink_length": 9}, {"write_buffer": False}, {"dtype": "bfloat16"}])
def test_caches_made_by_files(model, tmp_path, options):
    with llmcoopt.KVCache(model, **{"page_size": np.int64(32), "max_tokens": np.int64(640)} | options) as cache:
        sequence = cache.sequence()
        model.forward(IDS[:40], sequence)
        cache.save(tmp_path / "a")
        expected = goes_on(model, sequence)
    again, (sequence,) = llmcoopt.KVCache.from_file(model, tmp_path / "a")
    with again:
        assert all(getattr(again, name) == getattr(cache, name) for name in ("residual_length", "sink_length", "write_buffer", "page_size"))
        assert np.array_equal(goes_on(model, sequence), expected)
    rewritten(tmp_path / "a", tmp_path / "b", lambda about, tensors: about.pop("sink_length"))
    with pytest.raises(FormatError, match=r"its parts are not those of a saved cache .KeyError: 'sink_length'"):
        llmcoopt.KVCache.from_file(model, tmp_path / "b")


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


def test_first_tokens_of_pages_that_begin_no_text(model):
    with llmcoopt.KVCache(model, "int8", page_size=16, max_tokens=64) as cache:
        core, (_, each) = cache._core, cache._core.buffer()
        page, ids = core.page_in(bytes(cache.stats()["page_bytes"])), np.zeros(16, np.int32).tobytes()
        table = np.array([page], np.int32).tobytes()
        with pytest.raises(ArgumentError, match=f"page {page}, expected one that a text begins with"):
            core.first_out(page, bytearray(each))
        with pytest.raises(FormatError, match=f"page 0 of a sequence is number {page}, which no text begins with"):
            core.restore(16, 16, 0, ids, table, b"")
        for size in (each - 1, each + 1):
            with pytest.raises(FormatError, match=f"first tokens of a text in {size} bytes, expected {each}"):
                core.first_in(page, bytes(size))
            with pytest.raises(FormatError, match=f"first tokens of a text in {size} bytes, expected {each}"):
                core.first_out(page, bytearray(size))
        with pytest.raises(ArgumentError, match="page 3, expected one that is held"):
            core.first_in(3, bytes(each))
        core.first_in(page, bytes(range(256)) * (each // 256))
        found = bytearray(each)
        core.first_out(page, found)
        assert found == bytes(range(256)) * (each // 256) and each > 0
        core.restore(16, 16, 0, ids, table, b"").free()
        core.page_drop(page)
        cache.check()

"""The container: metadata of every type, the directory of tensors, and damage of every kind."""

import struct

import numpy as np
import pytest
from writers import gguf_string, gguf_value, raw_gguf

from llmcoopt.errors import FormatError, UnsupportedError
from llmcoopt.loaders import read_metadata
from llmcoopt.loaders.gguf import read_gguf

EVERY_TYPE = {
    "a.u8": ("u8", 200),
    "a.i8": ("i8", -100),
    "a.u16": ("u16", 60000),
    "a.i16": ("i16", -30000),
    "a.u32": ("u32", 4_000_000_000),
    "a.i32": ("i32", -2_000_000_000),
    "a.u64": ("u64", 2**63 + 1),
    "a.i64": ("i64", -(2**62)),
    "a.f32": ("f32", 1e-5),
    "a.f64": ("f64", 0.1),
    "a.bool": ("bool", 1),
    "a.string": ("string", "grün €"),
    "a.strings": ("[string]", ["", "a", "ä"]),
    "a.numbers": ("[i32]", [1, -2, 3]),
    "a.floats": ("[f32]", [0.5, -1.0]),
    "a.flags": ("[bool]", [1, 0]),
    "a.nested": ("[[u8]]", [[1, 2], [3]]),
    "a.empty": ("[string]", []),
}
TENSORS = {"one": ("F32", (2, 3), bytes(24)), "two": ("F16", (5,), bytes(10)), "three": ("Q4_0", (2, 32), bytes(36))}


def read(tmp_path, raw):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def refused(tmp_path, raw, *parts, error=FormatError):
    with pytest.raises(error) as caught:
        read(tmp_path, raw)
    message = str(caught.value)
    assert "model.gguf" in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(tmp_path, version):
    metadata, tensors = read(tmp_path, raw_gguf(EVERY_TYPE, {}, version))
    assert not tensors
    assert list(metadata) == list(EVERY_TYPE)
    for key, (kind, value) in EVERY_TYPE.items():
        found = metadata[key]
        if isinstance(found, np.ndarray):
            assert found.tolist() == value and found.ndim == 1
        elif key == "a.nested":
            assert [part.tolist() for part in found] == value
        else:
            assert found == value and type(found) is {"bool": bool, "f32": float, "f64": float, "string": str}.get(kind, type(value)), key
    assert read_metadata(tmp_path / "model.gguf")["a.string"] == "grün €"


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path):
    metadata, _ = read(tmp_path, raw_gguf({"k": ("string", b"\xff\x80a"), "ks": ("[string]", [b"\xfe", b"b"])}, {}))
    assert metadata["k"].encode("utf-8", "surrogateescape") == b"\xff\x80a"
    assert metadata["ks"][0].encode("utf-8", "surrogateescape") == b"\xfe"


@pytest.mark.parametrize("alignment", [1, 8, 32, 64])
def test_tensors(tmp_path, alignment):
    values = {"one": np.arange(6, dtype=np.float32), "two": np.arange(5, dtype=np.float16)}
    tensors = {name: (kind, shape, values[name].tobytes() if name in values else raw) for name, (kind, shape, raw) in TENSORS.items()}
    _, found = read(tmp_path, raw_gguf({"general.alignment": ("u32", alignment)}, tensors, alignment=alignment))
    assert list(found) == list(TENSORS)
    for name, (kind, shape, raw) in tensors.items():
        assert (found[name].type_name, found[name].shape, found[name].data.tobytes()) == (kind, shape, raw)


def test_the_vocabulary_files(data):
    metadata, tensors = read_gguf(data / "gguf-vocab/ggml-vocab-gpt-2.gguf")
    assert not tensors and len(metadata["tokenizer.ggml.tokens"]) == 50257 and len(metadata["tokenizer.ggml.merges"]) == 50000
    assert metadata["tokenizer.ggml.tokens"][:3] == ["!", '"', "#"]
    metadata, _ = read_gguf(data / "gguf-vocab/ggml-vocab-llama-spm.gguf")
    assert len(metadata["tokenizer.ggml.scores"]) == 32000 and metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-5


def test_every_truncation_is_an_error(tmp_path):
    raw = raw_gguf(EVERY_TYPE, TENSORS)
    padding = -len(TENSORS["three"][2]) % 32  # behind the last tensor: not needed
    for size in range(len(raw) - padding):
        refused(tmp_path, raw[:size])
    read(tmp_path, raw[: len(raw) - padding])


@pytest.mark.parametrize("value", [("string", "abc"), ("[string]", ["a", "bcd"]), ("[u16]", [1, 2]), ("f64", 1.0)], ids=str)
def test_truncation_of_the_last_value(tmp_path, value):
    """Without tensors nothing follows that would fail instead."""
    raw = raw_gguf({"k": value}, {}, alignment=1)
    read(tmp_path, raw)
    refused(tmp_path, raw[:-1], "metadata 'k'")


def test_truncation_names_the_tensor(tmp_path):
    raw = raw_gguf({}, TENSORS)
    refused(tmp_path, raw[:-64], "truncated", "tensor 'three'", "64 bytes")


def test_other_files(tmp_path):
    refused(tmp_path, b"GGML" + bytes(100), "not a GGUF file", "b'GGML'")
    refused(tmp_path, b"lmgg" + bytes(100), "older ggml format")
    refused(tmp_path, b"tjgg" + bytes(100), "older ggjt format")
    refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer")
    refused(tmp_path, b"<html>", "HTML")
    refused(tmp_path, b"", "empty")
    refused(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", error=UnsupportedError)
    refused(tmp_path, b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1", error=UnsupportedError)
    refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4", error=UnsupportedError)


def test_huge_counts(tmp_path):
    def head(n_tensors, n_entries, rest=b""):
        return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_entries) + rest

    refused(tmp_path, head(2**63, 0), f"{2**63} tensors")
    refused(tmp_path, head(0, 2**64 - 1), "metadata entries")
    refused(tmp_path, head(0, 1, struct.pack("<Q", 2**60) + bytes(20)), str(2**60))
    key = gguf_string("k")
    refused(tmp_path, head(0, 1, key + struct.pack("<IIQ", 9, 8, 2**40) + bytes(64)), "metadata 'k'", f"{2**40} array elements")
    refused(tmp_path, head(0, 1, key + struct.pack("<IIQ", 9, 4, 2**62) + bytes(64)), "metadata 'k'")
    refused(tmp_path, head(0, 1, key + struct.pack("<IIQQ", 9, 8, 2, 2**63) + bytes(64)), "metadata 'k'", "element 0 of 2")
    refused(tmp_path, head(0, 1, key + struct.pack("<IQ", 8, 2**63) + bytes(64)), "metadata 'k'")


def test_bad_metadata(tmp_path):
    def one(raw_value, key=b"k"):
        return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + gguf_string(key) + raw_value + bytes(64)

    refused(tmp_path, one(struct.pack("<I", 13)), "metadata 'k'", "unknown type 13")
    refused(tmp_path, one(struct.pack("<IIQ", 9, 99, 1)), "metadata 'k'", "unknown type 99")
    refused(tmp_path, one(gguf_value("u8", 1), key=b"\xff"), "not UTF-8")
    refused(tmp_path, one(gguf_value("u8", 1), key=b""), "0 characters")
    refused(tmp_path, one(struct.pack("<IB", 7, 2)), "truth value")
    refused(tmp_path, one(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6), "nests arrays")
    twice = gguf_string("k") + gguf_value("u8", 1)
    refused(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + twice * 2, "metadata 'k' occurs twice")
    for alignment in (("u32", 0), ("u32", 12), ("u32", 2**31), ("string", "32"), ("[u32]", [32])):
        refused(tmp_path, raw_gguf({"general.alignment": alignment}, {}), "general.alignment")


def test_bad_directory(tmp_path):
    def two(**offsets):
        return raw_gguf({}, TENSORS, offsets=offsets)

    refused(tmp_path, two(two=0), "tensor 'two' begins at 0", "inside tensor 'one'")
    refused(tmp_path, two(two=33), "tensor 'two' begins at 33", "alignment 32")
    refused(tmp_path, two(three=2**62), "truncated: tensor 'three'")
    refused(tmp_path, raw_gguf({}, {"t": ("F32", (1, 1, 1, 1, 1), bytes(4))}), "tensor 't' has 5 dimensions")
    refused(tmp_path, raw_gguf({}, {"t": ("F32", (0, 2), b"")}), "tensor 't' has shape [0, 2]")
    refused(tmp_path, raw_gguf({}, {"t": ("F32", (2**40, 2**40), b"")}), "fewer than 2^62")
    refused(tmp_path, raw_gguf({}, {"t": ("Q4_0", (2, 31), b"")}), "tensor 't' has rows of 31", "multiple of 32")
    refused(tmp_path, raw_gguf({}, {"t": (77, (2, 31), b"")}), "tensor 't' has the unknown type 77", error=UnsupportedError)
    twice = raw_gguf({}, {"one": ("F32", (1,), bytes(4)), "two": ("F32", (1,), bytes(4))}).replace(b"two", b"one")
    refused(tmp_path, twice, "tensor 'one' occurs twice")

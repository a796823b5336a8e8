"""Every rule of the format, each broken once: the error names the file, the tensor, what was found and what was expected."""

import gzip
import json
import pickle

import checkpoints
import numpy as np
import pytest
from writers import entry, raw_safetensors

from llmcoopt.errors import Error, FormatError, MissingFileError
from llmcoopt.loaders.safetensors import read_safetensors, release_pages

TWO = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


def read(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    return read_safetensors(path)


def refused(tmp_path, raw, *parts):
    """The message of the FormatError, which has the file's name and every one of `parts`."""
    with pytest.raises(FormatError) as caught:
        read(tmp_path, raw)
    message = str(caught.value)
    assert "model.safetensors" in message
    for part in parts:
        assert part in message, message
    return message


def test_values_shapes_and_metadata(tmp_path):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = np.array([0x3F80, 0x4000, 0xBF80, 0x7F80], np.uint16)
    header = {"__metadata__": {"format": "pt"}, **TWO, "scalar": entry("F16", [], 32, 34), "none": entry("I64", [0, 7], 34, 34)}
    tensors, metadata = read(tmp_path, raw_safetensors(header, a.tobytes() + b.tobytes() + np.float16(1.5).tobytes()))
    assert metadata == {"format": "pt"}
    assert np.array_equal(tensors["a"].numpy(), a) and tensors["a"].dtype == "F32" and tensors["a"].shape == (2, 3)
    assert np.array_equal(tensors["b"].numpy(), b)
    assert tensors["scalar"].numpy() == 1.5 and tensors["scalar"].shape == ()
    assert tensors["none"].shape == (0, 7) and tensors["none"].nbytes == 0
    assert tensors["a"].file.endswith("model.safetensors")


def test_order_in_the_header_is_free_and_spaces_may_follow(tmp_path):
    header = json.dumps({"b": TWO["b"], "a": TWO["a"]}).encode() + b"   "
    tensors, _ = read(tmp_path, raw_safetensors(header, bytes(32)))
    assert list(tensors) == ["a", "b"]


def test_data_is_mapped_and_read_only(tmp_path):
    text = json.dumps(TWO).encode()
    tensors, _ = read(tmp_path, raw_safetensors(text + b" " * (-len(text) % 8), bytes(32)))
    assert tensors["a"].data.base is not None
    assert not tensors["a"].data.flags.writeable and not tensors["a"].numpy().flags.writeable
    assert tensors["b"].data.ctypes.data - tensors["a"].data.ctypes.data == 24, "both lie in one mapping"


@pytest.mark.parametrize("shift", range(8))
def test_tensors_off_alignment_are_copied(tmp_path, shift):
    text = json.dumps(TWO).encode()
    text += b" " * (-len(text) % 8 + shift)
    values = np.arange(6, dtype=np.float32)
    tensors, _ = read(tmp_path, raw_safetensors(text, values.tobytes() + bytes(8)))
    assert np.array_equal(tensors["a"].numpy().ravel(), values)
    assert tensors["a"].data.ctypes.data % 4 == 0 and tensors["b"].data.ctypes.data % 2 == 0
    is_view = tensors["b"].data.ctypes.data - tensors["a"].data.ctypes.data == 24
    assert is_view == (shift % 4 == 0)


def test_the_reference_files(data):
    for stem in ("fp8", "gptq"):
        path = data / f"quant-ref/safetensors/{stem}.safetensors"
        expected = json.loads(path.with_suffix(".expected.json").read_text())
        tensors, metadata = read_safetensors(path)
        assert metadata == expected["metadata"]
        assert len(tensors) == len(expected["tensors"])
        content = path.read_bytes()[8 + expected["header_size"] :]
        for wanted in expected["tensors"]:
            tensor, (begin, end) = tensors[wanted["name"]], wanted["data_offsets"]
            assert (tensor.dtype, list(tensor.shape)) == (wanted["dtype"], wanted["shape"])
            assert tensor.data.tobytes() == content[begin:end]


def test_layout_errors(tmp_path):
    def two(a=(0, 24), b=(24, 32), size=32):
        return raw_safetensors({"a": entry("F32", [2, 3], *a), "b": entry("BF16", [4], *b)}, bytes(size))

    refused(tmp_path, two(b=(20, 28)), "tensor 'b' begins at 20", "inside tensor 'a'", "ends at 24")
    refused(tmp_path, two(b=(26, 34), size=34), "tensor 'b' begins at 26", "hole", "'a'", "24")
    refused(tmp_path, two(a=(4, 28), b=(28, 36), size=36), "tensor 'a' begins at 4", "hole")
    refused(tmp_path, two(size=39), "7 bytes follow the last tensor 'b'")
    refused(tmp_path, two(a=(24, 0)), "tensor 'a'", "begins after its end")
    refused(tmp_path, two(a=(0, 20)), "tensor 'a'", "span 20 bytes", "needs 24")
    refused(tmp_path, raw_safetensors({}, bytes(5)), "5 bytes follow")


@pytest.mark.parametrize(("size", "first"), [(31, "b"), (24, "b"), (23, "a"), (0, "a")])
def test_truncation_names_the_first_tensor_cut(tmp_path, size, first):
    refused(tmp_path, raw_safetensors(TWO, bytes(size)), "truncated", f"tensor '{first}'", f"only {size} bytes")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"dtype": "F33"}, ["dtype is 'F33'", "BF16"]),
        ({"dtype": ["F32"]}, ["dtype is ['F32']"]),
        ({"shape": [2, -3]}, ["shape is [2, -3]"]),
        ({"shape": [2, 3.0]}, ["shape is [2, 3.0]"]),
        ({"shape": [True, 6]}, ["shape is [True, 6]"]),
        ({"shape": 6}, ["shape is 6"]),
        ({"shape": [2**32, 2**32]}, ["2^63 elements"]),
        ({"shape": [2**62] * 100_000}, ["2^63 elements"]),
        ({"data_offsets": [0]}, ["data_offsets is [0]"]),
        ({"data_offsets": [-8, 16]}, ["data_offsets is [-8, 16]"]),
        ({"data_offsets": [0, 10**30]}, ["data_offsets is [0, 1000"]),
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}, ["span 2 bytes", "needs 1.5"]),
        (None, ["found None"]),
    ],
)
def test_bad_entries_name_the_tensor(tmp_path, change, parts):
    info = None if change is None else {**entry("F32", [2, 3], 0, 24), **change}
    refused(tmp_path, raw_safetensors({"the.tensor": info}, bytes(24)), "tensor 'the.tensor'", *parts)


def test_bad_headers(tmp_path):
    refused(tmp_path, raw_safetensors(b"{}", length=10**18), "1000000000000000000 bytes", "100000000")
    refused(tmp_path, raw_safetensors(b"{}", length=100), "100 bytes", "only 2 follow")
    refused(tmp_path, b"1234567", "7 bytes")
    refused(tmp_path, b"", "empty")
    refused(tmp_path, raw_safetensors(b' {"a": 1}'), "begins with b' '")
    refused(tmp_path, raw_safetensors(b'{"a": 1}\n'), "ends with b'\\n'")
    refused(tmp_path, raw_safetensors(b'{"a": 1'), "expected '}'")
    refused(tmp_path, raw_safetensors(b'{"a": \xff}'), "UTF-8", "0xff")
    refused(tmp_path, raw_safetensors(b'{"a": NaN}'), "NaN")
    refused(tmp_path, raw_safetensors(b'{"a": 1, "a": 1}'), "'a' occurs twice")
    refused(tmp_path, raw_safetensors(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' occurs twice")
    refused(tmp_path, raw_safetensors(b'{"a": ' + b"[" * 100_000 + b"}"), "nested too deeply")
    refused(tmp_path, raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__", "strings")
    refused(tmp_path, raw_safetensors({"a\0b": entry("U8", [0], 0, 0)}), "a\\x00b", "printable")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git-lfs pointer"),
        (b"<!DOCTYPE html>\n<html><body>Not found</body></html>", "HTML"),
        (b"  <html>" + bytes(100), "HTML"),
        (gzip.compress(bytes(1000)), "gzip"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "ZIP"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    ],
)
def test_other_files_in_place_of_weights(tmp_path, raw, says):
    refused(tmp_path, raw, "not a safetensors file", says)


def test_missing_and_unreadable(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        read_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(MissingFileError, match="cannot be read"):
        read_safetensors(tmp_path)
    assert issubclass(MissingFileError, FileNotFoundError) and issubclass(FormatError, ValueError) and issubclass(FormatError, Error)


def test_pages_that_are_released_are_read_again(tmp_path):
    """Parts of a mapped file keep their bytes; arrays in memory are left alone."""
    values = np.random.default_rng(0).standard_normal((300, 1000)).astype(np.float32)
    checkpoints.write_safetensors(tmp_path / "x.safetensors", {"a": values, "b": values + 1})
    tensors, _ = read_safetensors(tmp_path / "x.safetensors")
    for data in (tensors["a"].data, tensors["b"].data[5:], tensors["a"].data.view(np.float32), values):
        release_pages(data)
    assert np.array_equal(tensors["a"].numpy(), values) and np.array_equal(tensors["b"].numpy(), values + 1)

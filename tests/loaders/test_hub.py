"""Names of models: paths, "tiny", hub ids in the cache, downloads, and what is said when nothing fits."""

import builtins
import json
import sys
import types
from pathlib import Path

import pytest

from llmcoopt.errors import ArgumentError, MissingFileError
from llmcoopt.loaders import resolve


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A hub cache of this test's own, and no network behind it."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    return tmp_path / "hf" / "hub"


def snapshot(cache, name="org--name", commit="abc123", revision="main", files=("config.json", "model.safetensors", "tokenizer.json")):
    folder = cache / f"models--{name}" / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    if revision:
        reference = cache / f"models--{name}" / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(commit)
    return folder


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model.gguf") == tmp_path / "model.gguf"


def test_tiny():
    path = resolve("tiny")
    assert path.parts[-3:] == ("llmcoopt", "models", "tiny")


def test_a_local_folder_named_tiny_wins(tmp_path):
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path("tiny")


@pytest.mark.parametrize("value", [None, 3, "", [], b"x"])
def test_not_a_name(value):
    with pytest.raises(ArgumentError, match="expected a folder"):
        resolve(value)


def test_cached_snapshot(empty_cache):
    folder = snapshot(empty_cache)
    other = snapshot(empty_cache, commit="def456", revision="v2")
    assert resolve("org/name") == folder
    assert resolve("org/name", revision="v2") == other
    assert resolve("org/name", revision="def456") == other


@pytest.mark.parametrize("files", [(), ("config.json",), ("model.safetensors",)])
def test_incomplete_snapshots_do_not_count(empty_cache, files):
    snapshot(empty_cache, files=files)
    with pytest.raises(MissingFileError, match="pip install huggingface_hub"):
        resolve("org/name")


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(cache, files):
    folder = snapshot(cache, files=("config.json", "tokenizer.json", INDEX, *files))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}))
    return folder


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A hub library whose downloads are counted here."""
    calls = []

    def snapshot_download(name, **options):
        calls.append(name)
        return str(tmp_path / "downloaded")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return calls


def test_a_sharded_snapshot(empty_cache, downloads):
    assert resolve("org/name") == Path.cwd() / "downloaded" and downloads == ["org/name"]
    folder = sharded(empty_cache, SHARDS)
    assert resolve("org/name") == folder and len(downloads) == 1


@pytest.mark.parametrize("shards", [(), SHARDS[:1], SHARDS[1:]])
def test_a_cut_off_download_is_taken_up_again(empty_cache, downloads, shards):
    sharded(empty_cache, shards)
    assert resolve("org/name") == Path.cwd() / "downloaded" and downloads == ["org/name"]


@pytest.mark.parametrize(
    "files",
    [
        ("config.json", "model.safetensors"),  # no tokenizer yet
        ("model.safetensors", "tokenizer.json"),
        ("config.json", "tokenizer.json", SHARDS[0]),  # a shard came before the index
        ("config.json", "tokenizer.json", *SHARDS),
        ("config.json", "tokenizer.json", INDEX, *SHARDS),  # an index that says nothing
    ],
)
def test_other_cut_off_downloads(empty_cache, downloads, files):
    snapshot(empty_cache, files=files)
    assert resolve("org/name") == Path.cwd() / "downloaded" and downloads == ["org/name"]


def test_a_link_to_a_file_that_is_gone(empty_cache, downloads):
    folder = snapshot(empty_cache, files=("config.json", "tokenizer.json"))
    (folder / "model.safetensors").symlink_to(folder / "blob")
    assert resolve("org/name") == Path.cwd() / "downloaded"
    (folder / "blob").write_text("{}")
    assert resolve("org/name") == folder


def test_other_weights_files_that_stand_alone(empty_cache):
    folder = snapshot(empty_cache, files=("config.json", "weights.safetensors", "tokenizer.model"))
    assert resolve("org/name") == folder


def test_a_part_without_a_library_or_network(empty_cache):
    sharded(empty_cache, SHARDS[:1])
    with pytest.raises(
        MissingFileError, match=r"the cache holds only a part of it, without model-00002-of-00002\.safetensors; .*pip install"
    ):
        resolve("org/name")


def test_a_download_that_brings_nothing(empty_cache, monkeypatch):
    """Without a network the library returns the folder that it has, complete or not."""
    folder = sharded(empty_cache, SHARDS[:1])
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=lambda name, **options: str(folder)))
    with pytest.raises(MissingFileError, match=r"brought nothing .*only a part of it, without model-00002-of-00002\.safetensors"):
        resolve("org/name")
    (folder / SHARDS[1]).write_text("{}")
    (folder / "tokenizer.json").unlink()
    assert resolve("org/name") == folder


def test_a_model_without_a_tokenizer_serves_where_nothing_can_be_downloaded(empty_cache):
    folder = snapshot(empty_cache, files=("config.json", "model.safetensors"))
    assert resolve("org/name") == folder


@pytest.mark.parametrize("revision", ["", "/etc", "../x", "a//b", "a\0b", "x" * 5000, 3, b"main", "a/../b"])
def test_bad_revisions(revision):
    with pytest.raises(ArgumentError, match="expected a branch, tag or commit"):
        resolve("org/name", revision=revision)


def test_odd_names_and_caches(empty_cache, tmp_path):
    with pytest.raises(MissingFileError):
        resolve("org/" + "x" * 5000)

    class Bytes:
        def __fspath__(self):
            return b"x"

    with pytest.raises(ArgumentError, match="not bytes"):
        resolve(Bytes())
    folder = snapshot(empty_cache)
    (empty_cache / "models--org--name" / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(MissingFileError, match="not in the hub cache"):
        resolve("org/name")
    assert resolve("org/name", revision="abc123") == folder


def test_without_the_hub_library():
    with pytest.raises(
        MissingFileError, match=r"org/name: no such folder, and not in the hub cache .*hf/hub; .*'pip install huggingface_hub'"
    ):
        resolve("org/name")


def test_download(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(name, **options):
        calls.append((name, options))
        return str(tmp_path / "downloaded")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("org/name", revision="v1") == tmp_path / "downloaded"
    (name, options) = calls[0]
    assert name == "org/name" and options["revision"] == "v1"
    patterns = options["allow_patterns"]
    assert "*.json" in patterns and "*.safetensors" in patterns and not any("bin" in p or p == "*" for p in patterns)


def test_failed_download(monkeypatch):
    def snapshot_download(name, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(MissingFileError, match=r"org/name: could not be downloaded \(ConnectionError: no route\)"):
        resolve("org/name")


def test_near_names(tmp_path):
    (tmp_path / "models" / "llama-7b").mkdir(parents=True)
    with pytest.raises(MissingFileError, match=r"'llama-7' is not in .*models; did you mean llama-7b\?"):
        resolve(tmp_path / "models" / "llama-7")
    with pytest.raises(MissingFileError, match=r"did you mean llama-7b"):
        resolve("models/llama-7")  # looks like a hub id, but the folder is there
    with pytest.raises(MissingFileError, match="did you mean tiny"):
        resolve("tinny")
    with pytest.raises(MissingFileError, match=r"'nowhere' is not in /"):
        resolve("/nowhere/at/all.gguf")
    with pytest.raises(MissingFileError, match=r"org/model\.gguf: no such file"):
        resolve("org/model.gguf")
    with pytest.raises(MissingFileError):
        resolve("x" * 10_000)
    with pytest.raises(MissingFileError):
        resolve("a\0b")


def test_import_needs_no_hub_library(run_script):
    script = (
        "import builtins\nreal = builtins.__import__\n"
        "def guarded(name, *rest, **more):\n"
        "    assert not name.startswith(('huggingface_hub', 'torch', 'transformers')), name\n"
        "    return real(name, *rest, **more)\n"
        "builtins.__import__ = guarded\nimport llmcoopt.loaders\n"
    )
    assert builtins.__import__ and run_script(script) == ""

"""Names of models: paths, "tiny", hub ids in the cache, downloads, and what is said when nothing fits."""

import builtins
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


def snapshot(cache, name="org--name", commit="abc123", revision="main", files=("config.json", "model.safetensors")):
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

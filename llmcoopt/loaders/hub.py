"""From what a user types to a folder or file: paths, "tiny", and ids of the Hugging Face hub."""

import difflib
import os
import re
from pathlib import Path

from ..errors import ArgumentError, MissingFileError

BUNDLED = {"tiny": Path(__file__).parent.parent / "models" / "tiny"}
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# Everything a model and its tokenizer need, and no weights in other formats.
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]


def resolve(name_or_path, revision: str | None = None) -> Path:
    """The folder or file that `name_or_path` means: an existing path; "tiny", the model inside this package; or a hub id ("org/name").

    A hub id is looked for in the local cache first, then downloaded when huggingface_hub is installed. `revision` (branch, tag or commit)
    applies to hub ids. Raises MissingFileError saying what to install or pass."""
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise ArgumentError(f"the model is {name_or_path!r}; expected a folder, a .gguf file, 'tiny' or a hub id like 'org/name'")
    text = os.fspath(name_or_path)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return path
    if text in BUNDLED:
        if not BUNDLED[text].exists():
            raise MissingFileError(f"{BUNDLED[text]}: the model '{text}' is missing from this installation; install llmcoopt again")
        return BUNDLED[text]
    if HUB_ID.fullmatch(text) and path.suffix != ".gguf" and not os.path.isdir(path.parent):
        return _cached(text, revision) or _download(text, revision)
    raise MissingFileError(_not_found(text, path))


def _not_found(text, path):
    """The sentence for a path that does not exist, with what lies nearby."""
    folder = path.parent
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    missing = path.relative_to(folder).parts[0]
    names = sorted(p.name for p in folder.iterdir()) if os.access(folder, os.R_OK) else []
    near = difflib.get_close_matches(missing, [*names, *BUNDLED], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{text}: no such file or folder: '{missing}' is not in {folder.resolve()}{hint}"


def _cache_root():
    """Where the hub's own library keeps its downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def _cached(hub_id, revision):
    """The snapshot of a hub id in the local cache, if it holds a config and weights."""
    folder = _cache_root() / f"models--{hub_id.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if not commit:
        return None
    snapshot = folder / "snapshots" / commit
    complete = (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors"))
    return snapshot if complete else None


def _download(hub_id, revision):
    try:
        import huggingface_hub
    except ImportError:
        raise MissingFileError(
            f"{hub_id}: no such folder, and not in the hub cache {_cache_root()}; to download it, 'pip install huggingface_hub', "
            f"or pass the path of a folder or .gguf file"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # the library raises many kinds: no network, no such model, no permission
        raise MissingFileError(
            f"{hub_id}: could not be downloaded ({type(error).__name__}: {error!s:.300}); pass the path of a folder"
        ) from error

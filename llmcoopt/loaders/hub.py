"""From what a user types to a folder or file: paths, "tiny", and ids of the Hugging Face hub."""

import difflib
import os
import re
from pathlib import Path

from ..errors import ArgumentError, FormatError, MissingFileError
from .hf import INDEX, SINGLE
from .safetensors import parse_json

BUNDLED = {"tiny": Path(__file__).parent.parent / "models" / "tiny"}
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_SHARD = re.compile(r".*-[0-9]+-of-[0-9]+\.safetensors")
# Everything a model and its tokenizer need, and no weights in other formats.
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]


def resolve(name_or_path, revision: str | None = None) -> Path:
    """The folder or file that `name_or_path` means: an existing path; "tiny", the model inside this package; or a hub id ("org/name").

    A hub id is looked for in the local cache first, then downloaded when huggingface_hub is installed. `revision` (branch, tag or commit)
    applies to hub ids. Raises MissingFileError saying what to install or pass."""
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise ArgumentError(f"the model is {name_or_path!r}; expected a folder, a .gguf file, 'tiny' or a hub id like 'org/name'")
    text = os.fspath(name_or_path)
    if not isinstance(text, str):
        raise ArgumentError(f"the model is {text!r:.100}; expected text, not bytes")
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return path
    if text in BUNDLED:
        if not BUNDLED[text].exists():
            raise MissingFileError(f"{BUNDLED[text]}: the model '{text}' is missing from this installation; install llmcoopt again")
        return BUNDLED[text]
    if HUB_ID.fullmatch(text) and path.suffix != ".gguf" and not os.path.isdir(path.parent):
        return _from_hub(text, revision)
    raise MissingFileError(_not_found(text, path))


def _not_found(text, path):
    """The sentence for a path that does not exist, with what lies nearby."""
    folder = path.parent
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    missing = path.relative_to(folder).parts[0]
    names = sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else []
    near = difflib.get_close_matches(missing, [*names, *BUNDLED], n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{text}: no such file or folder: '{missing}' is not in {folder.resolve()}{hint}"


def _cache_root():
    """Where the hub's own library keeps its downloads."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def _from_hub(hub_id, revision):
    """The snapshot in the cache where it is complete, else downloaded. One that lacks only a tokenizer serves where nothing comes: some models
    have none."""
    _check_revision(revision)
    snapshot = _cached(hub_id, revision)
    lacking = _lacking(snapshot) if snapshot else []
    if snapshot and not lacking:
        return snapshot
    note = f"; the cache holds only a part of it, without {lacking[0]}" if snapshot else ""
    bare = lacking == [TOKENIZERS[0]]
    try:
        place = _download(hub_id, revision, note)
    except MissingFileError:
        if bare:
            return snapshot
        raise
    if place == snapshot and not bare and _lacking(place) == lacking:  # what the library gives without a network
        raise MissingFileError(
            f"{hub_id}: the download brought nothing (no network, or the hub has no more){note}; pass the path of a folder"
        )
    return place


def _check_revision(revision):
    if revision is None:
        return
    parts = revision.split("/") if isinstance(revision, str) else [""]
    if not all(parts) or {".", ".."} & {*parts} or not revision.isprintable() or len(revision) > 200:
        raise ArgumentError(f"revision is {revision!r:.100}; expected a branch, tag or commit")


def _cached(hub_id, revision):
    """The snapshot of a hub id in the local cache, complete or not."""
    folder = _cache_root() / f"models--{hub_id.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = revision
    if os.path.isfile(reference):
        try:
            commit = reference.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):  # damaged or closed: as if it were not there
            return None
    snapshot = folder / "snapshots" / commit if commit and "/" not in commit else None
    return snapshot if snapshot and os.path.isdir(snapshot) else None


def _lacking(snapshot) -> list[str]:
    """What a snapshot lacks of a model: a config, every file of weights (a download may have been cut off), a tokenizer."""
    lacking = [] if os.path.exists(snapshot / "config.json") else ["config.json"]
    files = sorted(path.name for path in snapshot.glob("*.safetensors") if os.path.exists(path))  # no links to what is gone
    if SINGLE not in files:
        if os.path.exists(snapshot / INDEX):
            lacking += [name for name in _shards(snapshot / INDEX) if name not in files]
        elif len(files) != 1 or _SHARD.fullmatch(files[0]):  # one shard alone is not the model
            lacking.append(INDEX if files else SINGLE)
    if not any(os.path.exists(snapshot / name) for name in TOKENIZERS):
        lacking.append(TOKENIZERS[0])
    return lacking


def _shards(index) -> list[str]:
    """The files that an index names; the index itself where it cannot be read, so that it is fetched again."""
    try:
        places = parse_json(index.read_bytes(), str(index)).get("weight_map")
    except (OSError, FormatError):
        return [index.name]
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        return [index.name]
    return sorted(set(places.values()))


def _download(hub_id, revision, note=""):
    try:
        import huggingface_hub
    except ImportError:
        raise MissingFileError(
            f"{hub_id}: no such folder, and not in the hub cache {_cache_root()}{note}; to download it, 'pip install huggingface_hub', "
            f"or pass the path of a folder or .gguf file"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=WANTED))
    except Exception as error:  # the library raises many kinds: no network, no such model, no permission
        raise MissingFileError(
            f"{hub_id}: could not be downloaded ({type(error).__name__}: {error!s:.300}){note}; pass the path of a folder"
        ) from error

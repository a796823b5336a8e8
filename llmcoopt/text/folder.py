"""The tokenizer in a Hugging Face folder: tokenizer.json or tokenizer.model, and the facts in the JSON files beside it."""

import os
import re
import reprlib
import warnings
from pathlib import Path

from tokenizers import AddedToken as RustAdded

from ..errors import FormatError, MissingFileError
from ..loaders.hf import read_json
from ..loaders.safetensors import looks_like
from .facts import SPECIAL_NAMES, TokenizerFacts, surround
from .normalizer import Charsmap, Normalizer
from .rust import from_json
from .segmenters import BpeSegmenter, UnigramSegmenter
from .sentencepiece import ALWAYS, FIRST, NEVER, AddedToken, SentencePieceEncoder
from .spm_file import BPE, USER_DEFINED, parse_spm

JSON, MODEL = "tokenizer.json", "tokenizer.model"


def load_folder(folder: Path):
    """(encoder, facts) of a folder."""
    for name in (JSON, MODEL):
        if os.path.exists(folder / name):
            return load_file(folder / name)
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise MissingFileError(f"{folder}: cannot be read: {error.strerror or error}") from error
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    ggufs = [name for name in names if name.endswith(".gguf")]
    advice = f"; pass the GGUF file itself: {folder / ggufs[0]}" if ggufs else ""
    raise MissingFileError(f"{folder}: no {JSON} and no {MODEL}; the folder holds {shown}{advice}")


def load_file(path: Path):
    """(encoder, facts) of a tokenizer.json or a SentencePiece model, with the facts from the files beside it."""
    raw = _read(path)
    files = _Files(path.parent)
    if path.suffix == ".model":
        encoder, before, after = _sentencepiece(raw, str(path), files)
        add_bos, add_eos = files.config.get("add_bos_token", True), files.config.get("add_eos_token", False)
    else:
        encoder, before, after = _json(raw, str(path), files)
        add_bos, add_eos = files.config.get("add_bos_token"), files.config.get("add_eos_token")
    special = files.special(encoder)
    for name in ("unk_token",) if "unk_token" not in special else ():
        unknown = _unknown(encoder)
        if unknown is not None:
            special[name] = unknown
    bos, eos = (encoder.id(special[name]) if name in special else None for name in ("bos_token", "eos_token"))
    before, after = surround(before, after, bos, eos, add_bos, add_eos)
    ends = list(dict.fromkeys([*([eos] if eos is not None else []), *files.end_ids(encoder)]))
    side = files.config.get("padding_side", "left")
    return encoder, TokenizerFacts(
        str(path), special, before, after, ends, files.templates(), side if side in ("left", "right") else "left"
    )


def _read(path):
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not raw:
        raise FormatError(f"{path}: the file is empty")
    seems = looks_like(raw[:512])
    if seems and not (path.suffix == ".json" and raw.lstrip()[:1] == b"{") and not (path.suffix == ".model" and raw[:1] == b"\n"):
        raise FormatError(f"{path}: no tokenizer file: {seems}")
    return raw


def _unknown(encoder):
    if isinstance(encoder, SentencePieceEncoder):
        return encoder.unk_token
    return getattr(encoder.inner.model, "unk_token", None)


def _json(raw, where, files):
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8: byte {raw[error.start]:#04x} at {error.start}") from None
    encoder = from_json(text, where)
    for entry in files.added():
        if encoder.id(entry["content"]) is not None:
            continue
        got = encoder.add(RustAdded(entry["content"], **{key: entry[key] for key in _FLAGS}))
        if got != entry["id"]:
            warnings.warn(
                f"{where}: the added token {entry['content']!r} has id {got}, but {entry['where']} says {entry['id']}", stacklevel=4
            )
    known = {token.content for token in encoder.inner.get_added_tokens_decoder().values()}
    for content, flags in files.named().items():
        if content not in known and encoder.id(content) is not None:
            encoder.add(RustAdded(content, **flags))
    encoder.refresh()
    before, after = encoder.template()
    return encoder, before, after


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_MORE_NAMES = ("additional_special_tokens", "extra_special_tokens")


def _sentencepiece(raw, where, files):
    model = parse_spm(raw, where)
    segmenter = (BpeSegmenter if model.kind == BPE else UnigramSegmenter)(
        model.pieces, model.scores, model.types, model.unk_id, model.byte_fallback
    )
    normalizer = Normalizer(
        charsmap=Charsmap(model.charsmap, where) if model.charsmap else None,
        fixed=[piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == USER_DEFINED],
        remove_extra_spaces=model.remove_extra_whitespaces,
        escape_spaces=model.escape_whitespaces,
        suffix_space=model.suffix_space,
    )
    dummy = (ALWAYS if files.config.get("legacy", True) else FIRST) if model.add_dummy_prefix else NEVER
    added = {i: AddedToken(model.pieces[i], i) for i in [*model.control_ids(), model.unk_id] if model.pieces[i]}
    named = files.named()
    added |= {i: _added(piece, i, named[piece]) for i, piece in enumerate(model.pieces) if piece in named}
    for entry in files.added():
        if entry["id"] < len(model.pieces) and model.pieces[entry["id"]] != entry["content"]:
            raise FormatError(
                f"{entry['where']}: the added token {entry['content']!r} has id {entry['id']}, which {where} gives to {model.pieces[entry['id']]!r}"
            )
        added[entry["id"]] = _added(entry["content"], entry["id"], entry)
    encoder = SentencePieceEncoder(
        model.pieces, model.types, segmenter, normalizer, dummy=dummy, added=list(added.values()), unk_surface=model.unk_surface
    )
    named = {"bos_token": model.bos_id, "eos_token": model.eos_id, "pad_token": model.pad_id}
    files.defaults = {name: model.pieces[i] for name, i in named.items() if 0 <= i < len(model.pieces)}
    return encoder, [], []


def _added(content, number, flags):
    return AddedToken(content, number, flags["special"], flags["lstrip"], flags["rstrip"], flags["single_word"])


class _Files:
    """The JSON files of a folder, read once. A file that is not there counts as empty."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, dict] = {}
        self.config = self._json("tokenizer_config.json")
        self.map = self._json("special_tokens_map.json")
        self.defaults: dict[str, str] = {}

    def _json(self, name):
        if name not in self._read:
            path = self.folder / name
            self._read[name] = read_json(path) if path.exists() else {}
        return self._read[name]

    def added(self) -> list[dict]:
        """Added tokens in order of their ids: id, content, where, and the flags."""
        found = {}
        where = str(self.folder / "added_tokens.json")
        for content, number in self._json("added_tokens.json").items():
            found[_checked_id(number, content, where)] = {"id": number, "content": content, "where": where, **_FLAGS}
        where = str(self.folder / "tokenizer_config.json") + ": added_tokens_decoder"
        decoder = self.config.get("added_tokens_decoder", {})
        if not isinstance(decoder, dict):
            raise FormatError(f"{where}: found {type(decoder).__name__}, expected an object")
        for number, entry in decoder.items():
            content = entry.get("content") if isinstance(entry, dict) else entry
            flags = {key: bool(entry.get(key, plain)) for key, plain in _FLAGS.items()} if isinstance(entry, dict) else _FLAGS
            number = _checked_id(int(number) if _DIGITS.fullmatch(number) else number, content, where)
            found[number] = {"id": number, "content": content, "where": where, **flags}
        return [found[number] for number in sorted(found)]

    def named(self) -> dict[str, dict]:
        """Special tokens that tokenizer_config.json or special_tokens_map.json names, and their flags: cut out of a text as added tokens are."""
        found = {}
        for file in (self.config, self.map):  # flags of the map win, as in transformers
            values = [file.get(name) for name in SPECIAL_NAMES]
            values += [value for name in _MORE_NAMES if isinstance(file.get(name), list) for value in file[name]]
            for value in values:
                content = value.get("content") if isinstance(value, dict) else value
                if isinstance(content, str) and content:
                    flags = {key: bool(value.get(key, plain)) for key, plain in _FLAGS.items()} if isinstance(value, dict) else _FLAGS
                    found[content] = flags | {"special": True}
        return found

    def special(self, encoder) -> dict[str, str]:
        """Special tokens by name: tokenizer_config.json, else special_tokens_map.json, else the ids in (generation_)config.json."""
        found = {}
        for name in SPECIAL_NAMES:
            source = "tokenizer_config.json" if self.config.get(name) is not None else "special_tokens_map.json"
            value = self.config.get(name) if source == "tokenizer_config.json" else self.map.get(name)
            if value is None:
                value = self.defaults.get(name) or self._by_id(encoder, name)
            if isinstance(value, dict):
                value = value.get("content")
            if value is None:
                continue
            if not isinstance(value, str):
                raise FormatError(f"{self.folder / source}: {name} is {value!r}; expected text or an object with 'content'")
            if encoder.id(value) is None:
                warnings.warn(f"{self.folder / source}: {name} is {value!r}, which the vocabulary lacks; ignored", stacklevel=5)
                continue
            found[name] = value
        return found

    def _by_id(self, encoder, name):
        for file in ("generation_config.json", "config.json"):
            value = self._json(file).get(name + "_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < encoder.size:
                return encoder.token(value)
        return None

    def end_ids(self, encoder) -> list[int]:
        """eos_token_id of generation_config.json and config.json, a number or a list."""
        found = []
        for file in ("generation_config.json", "config.json"):
            value = self._json(file).get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            found += [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
        return found

    def templates(self) -> dict[str, str]:
        """Chat templates by name. chat_template.jinja wins over chat_template.json, that over the key in tokenizer_config.json."""
        where = self.folder / "tokenizer_config.json"
        found = _named(self.config.get("chat_template"), where)
        found |= _named(self._json("chat_template.json").get("chat_template"), self.folder / "chat_template.json")
        single = self.folder / "chat_template.jinja"
        several = sorted((self.folder / "additional_chat_templates").glob("*.jinja"))
        for path in ([single] if single.exists() else []) + several:
            try:
                found["default" if path == single else path.stem] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None
            except OSError as error:
                raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error
        return found


_DIGITS = re.compile("[0-9]{1,9}")


def _checked_id(number, content, where):
    """`number`, if an added token can have it and `content`."""
    if type(number) is not int or not 0 <= number < 2**24 or not isinstance(content, str) or not content:
        raise FormatError(
            f"{where}: the added token {reprlib.repr(content)} has id {reprlib.repr(number)}; expected text and an id from 0 on"
        )
    return number


def _named(value, where):
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return dict(value)
    if isinstance(value, list) and all(
        isinstance(v, dict) and isinstance(v.get("name"), str) and isinstance(v.get("template"), str) for v in value
    ):
        return {v["name"]: v["template"] for v in value}
    raise FormatError(f"{where}: chat_template is {str(value)[:60]!r}; expected text or a list of {{name, template}}")

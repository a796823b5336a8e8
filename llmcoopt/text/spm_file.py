"""Reads a SentencePiece model file (tokenizer.model): a protobuf message ModelProto, of which only the fields used here are kept.

The reader checks every length against what is left of the file, skips unknown fields, and refuses groups."""

import struct
from dataclasses import dataclass, field

from ..errors import FormatError, UnsupportedError

# piece types, with the numbers of the file format; GGUF's tokenizer.ggml.token_type has the same numbers
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class SpmModel:
    """A SentencePiece model: pieces in order of their ids, and the switches of training and normalisation."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    kind: int = UNIGRAM
    byte_fallback: bool = False
    suffix_space: bool = False  # treat_whitespace_as_suffix
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    unk_surface: str = " \u2047 "
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    def control_ids(self) -> list[int]:
        return [i for i, kind in enumerate(self.types) if kind == CONTROL]


def parse_spm(raw: bytes, where: str) -> SpmModel:
    """The model in the bytes of a .model file. `where` begins each error message."""
    model = SpmModel()
    for number, kind, value in _fields(raw, where):
        if number == 1:
            _piece(model, _need(value, kind, _BYTES, f"{where}: piece {len(model.pieces)}"), where)
        elif number == 2:
            _settings(model, _need(value, kind, _BYTES, f"{where}: trainer_spec"), _TRAINER, f"{where}: trainer_spec")
        elif number == 3:
            _settings(model, _need(value, kind, _BYTES, f"{where}: normalizer_spec"), _NORMALIZER, f"{where}: normalizer_spec")
    _check(model, where)
    return model


# field number -> (attribute, wire type, conversion)
_TRAINER = {
    3: ("kind", _VARINT, int),
    24: ("suffix_space", _VARINT, bool),
    35: ("byte_fallback", _VARINT, bool),
    40: ("unk_id", _VARINT, int),
    41: ("bos_id", _VARINT, int),
    42: ("eos_id", _VARINT, int),
    43: ("pad_id", _VARINT, int),
    44: ("unk_surface", _BYTES, str),
}
_NORMALIZER = {
    2: ("charsmap", _BYTES, bytes),
    3: ("add_dummy_prefix", _VARINT, bool),
    4: ("remove_extra_whitespaces", _VARINT, bool),
    5: ("escape_whitespaces", _VARINT, bool),
}


def _settings(model, raw, table, where):
    for number, kind, value in _fields(raw, where):
        if number not in table:
            continue
        name, expected, convert = table[number]
        value = _need(value, kind, expected, f"{where}: {name}")
        if convert is int:
            value = value - 2**64 if value >= 2**63 else value
        setattr(model, name, _text(value, f"{where}: {name}") if convert is str else convert(value))


def _piece(model, raw, where):
    where = f"{where}: piece {len(model.pieces)}"
    text, score, kind = None, 0.0, NORMAL
    for number, wire, value in _fields(raw, where):
        if number == 1:
            text = _text(_need(value, wire, _BYTES, where), where)
        elif number == 2:
            score = struct.unpack("<f", _need(value, wire, _FIXED32, where))[0]
        elif number == 3:
            kind = _need(value, wire, _VARINT, where)
    if not text:
        raise FormatError(f"{where}: the piece is empty")
    if not NORMAL <= kind <= BYTE:
        raise FormatError(f"{where} ({text!r}): type {kind}; expected {NORMAL} to {BYTE}")
    if score != score:
        raise FormatError(f"{where} ({text!r}): the score is NaN")
    model.pieces.append(text)
    model.scores.append(score)
    model.types.append(kind)


def _check(model, where):
    if not model.pieces:
        raise FormatError(f"{where}: no pieces found; this is no SentencePiece model")
    if model.kind not in (UNIGRAM, BPE):
        names = {WORD: "word", CHAR: "char"}
        raise UnsupportedError(f"{where}: model type {names.get(model.kind, model.kind)}; expected unigram or bpe")
    unknown = [i for i, kind in enumerate(model.types) if kind == UNKNOWN]
    if len(unknown) != 1:
        raise FormatError(f"{where}: {len(unknown)} pieces of type unknown; expected exactly 1")
    model.unk_id = unknown[0]


def _need(value, wire, expected, where):
    if wire != expected:
        raise FormatError(f"{where}: protobuf wire type {wire}; expected {expected}")
    return value


def _text(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: {raw[:32]!r} is not UTF-8") from None


def _varint(raw, at, where):
    value = shift = 0
    while at < len(raw) and shift < 70:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (2**64 - 1), at
        shift += 7
    raise FormatError(f"{where}: a number at byte {at} does not end: the file is truncated or no protobuf")


def _fields(raw, where):
    """(field number, wire type, value) of each field of a message."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at, where)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise FormatError(f"{where}: field number 0 at byte {at}: no protobuf")
        if wire == _VARINT:
            value, at = _varint(raw, at, where)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(raw, at, where)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise FormatError(f"{where}: wire type {wire} at byte {at}: no protobuf of a SentencePiece model")
        if size > len(raw) - at:
            raise FormatError(f"{where}: field {number} would take {size} bytes at byte {at}, but {len(raw) - at} are left: truncated file")
        yield number, wire, raw[at : at + size]
        at += size

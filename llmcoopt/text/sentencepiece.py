"""The encoder for SentencePiece vocabularies, from tokenizer.model files and from GGUF metadata."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .detokenizer import EACH_BYTE, Detokenizer, byte_of_token
from .normalizer import SPACE, Normalizer, alternation
from .segmenters import BpeSegmenter, UnigramSegmenter
from .spm_file import BYTE, CONTROL, UNKNOWN

_BEGINS_WORD, _ENDS_WORD = re.compile(r"\w"), re.compile(r"\w\Z")
ALWAYS, FIRST, NEVER = "always", "first", "never"  # where the dummy space goes: before each stretch of text, only at the start, nowhere


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is cut out of the text before anything else. lstrip and rstrip take the blanks beside it along; single_word leaves it alone
    inside a word."""

    token: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class SentencePieceEncoder:
    """Text to ids and ids to pieces for a SentencePiece vocabulary."""

    lost_bytes = b""  # every character has at least the unknown token

    def __init__(
        self,
        pieces: Sequence[str],
        types: Sequence[int],
        segmenter: BpeSegmenter | UnigramSegmenter,
        normalizer: Normalizer,
        *,
        dummy: str = ALWAYS,
        added: Sequence[AddedToken] = (),
        unk_surface: str | None = None,
    ):
        self.kind = "SentencePiece " + ("BPE" if isinstance(segmenter, BpeSegmenter) else "Unigram")
        self.base_size = len(pieces)
        self._tokens = [*pieces]
        self._ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
        for extra in added:
            self._tokens.extend([None] * (extra.id + 1 - len(self._tokens)))
            self._tokens[extra.id] = extra.token
            self._ids.setdefault(extra.token, extra.id)
        self.size = len(self._tokens)
        self._types = types
        self.unk_token = next((piece for piece, kind in zip(pieces, types, strict=True) if kind == UNKNOWN), None)
        self._segment = segmenter
        self._normalize = normalizer
        self._dummy = dummy
        self._added = {a.token: a for a in added}
        self.special_ids = frozenset([i for i, kind in enumerate(types) if kind == CONTROL] + [a.id for a in added if a.special])
        self._cut = alternation(self._added)
        self._cut_plain = alternation([a.token for a in added if not a.special])
        self.detokenizer = self._detokenizer(unk_surface)

    def token(self, token_id: int) -> str | None:
        return self._tokens[token_id] if token_id < self.size else None

    def id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        cut = self._cut if parse_special else self._cut_plain
        out: list[int] = []
        at = 0
        for match in cut.finditer(text) if cut else ():
            if match.start() < at:
                continue  # lies in blanks that the token before took along
            found = self._added[match[0]]
            if found.single_word and (_ENDS_WORD.search(text[: match.start()]) or _BEGINS_WORD.match(text[match.end() :])):
                continue
            before = text[at : match.start()]
            self._stretch(before.rstrip() if found.lstrip else before, at == 0, out)
            out.append(found.id)
            at = match.end()
            while found.rstrip and at < len(text) and text[at].isspace():
                at += 1
        self._stretch(text[at:], at == 0, out)
        return out

    def _stretch(self, text, is_first, out):
        if text:
            out.extend(self._segment(self._normalize(text, self._dummy == ALWAYS or (self._dummy == FIRST and is_first))))

    def _detokenizer(self, unk_surface):
        surfaces: Mapping[int, str] = {i: unk_surface for i, kind in enumerate(self._types) if kind == UNKNOWN and unk_surface is not None}
        added = {a.id for a in self._added.values()}

        def is_text(token_id):
            return token_id < self.base_size and token_id not in added and self._types[token_id] not in (BYTE, CONTROL, UNKNOWN)

        def piece(token_id):
            if token_id in surfaces:
                return surfaces[token_id].encode("utf-8")
            token = self.token(token_id) or ""
            if is_text(token_id):
                return token.replace(SPACE, " ").encode("utf-8", "surrogateescape")
            byte = byte_of_token(token) if token_id < self.base_size and self._types[token_id] == BYTE else None
            return token.encode("utf-8", "surrogateescape") if byte is None else bytes([byte])

        def head_piece(token_id):
            """Without its space mark; a blank that a user-defined piece begins with stays, as in SentencePiece."""
            marked = is_text(token_id) and self.token(token_id).startswith(SPACE)
            return piece(token_id).removeprefix(b" ") if marked else piece(token_id)

        if self._normalize.remove_extra_spaces:
            return Detokenizer(piece, head_piece, "text", EACH_BYTE)
        if self._dummy != NEVER:
            return Detokenizer(piece, head_piece, "piece", EACH_BYTE)
        return Detokenizer(piece, errors=EACH_BYTE)

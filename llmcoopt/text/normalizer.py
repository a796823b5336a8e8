"""SentencePiece's normalisation: character map, extra spaces, dummy prefix, and the visible space mark."""

import re
import struct
from collections.abc import Sequence

from ..errors import FormatError

SPACE = "▁"


class Charsmap:
    """A precompiled character map: a double-array trie over UTF-8 bytes whose values are offsets of NUL-ended replacements."""

    def __init__(self, raw: bytes, where: str):
        size = int.from_bytes(raw[:4], "little")
        if len(raw) < 5 or size < 4 or size % 4 or size > len(raw) - 5:
            raise FormatError(f"{where}: precompiled_charsmap of {len(raw)} bytes says its trie has {size} bytes")
        self._units = struct.unpack(f"<{size // 4}I", raw[4 : 4 + size])
        self._texts = raw[4 + size :]
        self._where = where

    def longest(self, data: bytes, at: int) -> tuple[bytes, int] | None:
        """(replacement, bytes taken) of the longest key that begins at data[at], or None."""
        units, found = self._units, None
        node = _offset(units[0])
        for end in range(at, len(data)):
            node ^= data[end]
            if node >= len(units) or units[node] & 0x800000FF != data[end]:
                break
            unit = units[node]
            node ^= _offset(unit)
            if unit & 0x100 and node < len(units):
                found = (units[node] & 0x7FFFFFFF, end + 1 - at)
        if found is None:
            return None
        stop = self._texts.find(b"\0", found[0])
        if stop < 0:
            raise FormatError(f"{self._where}: precompiled_charsmap points to {found[0]} of {len(self._texts)} bytes")
        return self._texts[found[0] : stop], found[1]


def _offset(unit):
    return (unit >> 10) << ((unit & 0x200) >> 6)


class Normalizer:
    """text -> text with visible spaces. `fixed` are user-defined pieces, which pass through unchanged."""

    def __init__(
        self,
        *,
        charsmap: Charsmap | None = None,
        fixed: Sequence[str] = (),
        remove_extra_spaces: bool = False,
        escape_spaces: bool = True,
        suffix_space: bool = False,
    ):
        self.charsmap = charsmap
        self.fixed = alternation(fixed)
        self.remove_extra_spaces = remove_extra_spaces
        self.space = SPACE if escape_spaces else " "
        self.suffix_space = suffix_space

    def __call__(self, text: str, dummy: bool) -> str:
        """`dummy` adds the space mark in front (or at the end, where the model was trained so)."""
        if self.remove_extra_spaces:
            text = self._strip(text)
        if not text:
            return ""
        if self.charsmap or (self.fixed and self.remove_extra_spaces):
            body = self._by_prefix(text)
        else:
            body = re.sub(" +", " ", text) if self.remove_extra_spaces else text
        body = body.replace(" ", self.space)
        if dummy and not self.suffix_space:
            body = self.space + body
        if self.remove_extra_spaces:
            body = body.rstrip(self.space)
        if dummy and self.suffix_space:
            body += self.space
        return body

    def _strip(self, text):
        """Without what normalises to exactly one space at the front."""
        at = 0
        while at < len(text):
            piece, size = self._next(text, at)
            if piece != " ":
                break
            at += size
        return text[at:]

    def _by_prefix(self, text):
        parts, at, after_space = [], 0, self.remove_extra_spaces
        while at < len(text):
            piece, size = self._next(text, at)
            at += size
            if after_space:
                piece = piece.lstrip(" ")
            if piece:
                parts.append(piece)
                after_space = self.remove_extra_spaces and piece.endswith(" ")
        return "".join(parts)

    def _next(self, text, at):
        """The normal form of what begins at text[at], and the characters it takes."""
        match = self.fixed.match(text, at) if self.fixed else None
        if match:
            return match[0], match.end() - at
        if self.charsmap:
            data = text[at : at + 64].encode("utf-8")
            found = self.charsmap.longest(data, 0)
            if found:
                return found[0].decode("utf-8", "replace"), max(1, len(data[: found[1]].decode("utf-8", "ignore")))
        return text[at], 1


def alternation(texts: Sequence[str]) -> re.Pattern | None:
    """Matches any of the texts, the longest first; None for no texts. An empty text is left out: it would match everywhere."""
    ordered = sorted(set(texts) - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None

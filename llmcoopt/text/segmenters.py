"""The two SentencePiece models: merging by score (BPE) and the most probable path (Unigram). Both map normalised text to ids.

BPE runs on words: where no piece joins a non-space to a following space mark, no merge can cross that border, so words are independent and
their ids are kept in a table. That makes Python fast enough without changing any result."""

import heapq
import math
import re
import struct
from collections.abc import Sequence

from .normalizer import SPACE, alternation
from .spm_file import BYTE, NORMAL, UNUSED, USER_DEFINED

_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_JOINS_WORDS = re.compile(f"[^{SPACE}]{SPACE}")
_WORD_TABLE, _LONGEST_WORD = 1 << 16, 64


class _Vocabulary:
    """What both models share: the pieces that text can become, and what happens to text that has none."""

    def __init__(self, pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], unk_id: int, byte_fallback: bool):
        self.ids = {piece: i for i, piece in enumerate(pieces) if types[i] in (NORMAL, USER_DEFINED, UNUSED)}
        self.scores = scores
        self.types = types
        self.unk_id = unk_id
        self.byte_ids = None
        if byte_fallback:
            by_name = {piece: i for i, piece in enumerate(pieces) if types[i] == BYTE}
            self.byte_ids = [by_name.get(f"<0x{b:02X}>", unk_id) for b in range(256)]

    def unknown(self, char: str, out: list[int]):
        """Bytes where the model has them, else one unknown id for a run of unknown characters."""
        if self.byte_ids is not None:
            out.extend(self.byte_ids[b] for b in char.encode("utf-8"))
        elif not out or out[-1] != self.unk_id:
            out.append(self.unk_id)


class BpeSegmenter(_Vocabulary):
    """Merges the neighbouring symbols whose joined piece has the highest score, the leftmost first among equals, until none is a piece."""

    def __init__(self, pieces, scores, types, unk_id, byte_fallback):
        super().__init__(pieces, scores, types, unk_id, byte_fallback)
        self.fixed = alternation([piece for piece, i in self.ids.items() if types[i] == USER_DEFINED])
        merged = [piece for piece, i in self.ids.items() if types[i] != USER_DEFINED]
        self.by_words = not any(_JOINS_WORDS.search(piece) for piece in merged)
        self.table: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        out: list[int] = []
        at = 0
        for match in self.fixed.finditer(text) if self.fixed else ():
            self._free(text[at : match.start()], out)
            out.append(self.ids[match[0]])
            at = match.end()
        self._free(text[at:], out)
        return out

    def _free(self, text, out):
        """Text without user-defined pieces."""
        for word in _WORD.findall(text) if self.by_words else [text] if text else ():
            ids = self.table.get(word)
            if ids is None:
                ids = self._merge(word)
                if len(word) <= _LONGEST_WORD:
                    if len(self.table) >= _WORD_TABLE:
                        self.table.clear()
                    self.table[word] = ids
            if self.byte_ids is None and out and ids[0] == self.unk_id == out[-1]:
                ids = ids[1:]
            out.extend(ids)

    def _merge(self, word):
        symbols: list[str | None] = list(word)
        left, right = list(range(-1, len(word) - 1)), list(range(1, len(word) + 1))
        right[-1] = -1
        queue: list = []
        parts: dict[str, tuple[str, str]] = {}  # of unused pieces: they can be merged through, but must come apart in the end

        def offer(a, b):
            if a < 0 or b < 0:
                return
            joined = symbols[a] + symbols[b]
            found = self.ids.get(joined)
            if found is not None:
                heapq.heappush(queue, (-self.scores[found], a, b, len(joined)))
                if self.types[found] == UNUSED:
                    parts[joined] = (symbols[a], symbols[b])

        for i in range(len(word) - 1):
            offer(i, i + 1)
        while queue:
            _, a, b, size = heapq.heappop(queue)
            if symbols[a] is None or symbols[b] is None or len(symbols[a]) + len(symbols[b]) != size:
                continue
            symbols[a] += symbols[b]
            symbols[b] = None
            right[a] = right[b]
            if right[a] >= 0:
                left[right[a]] = a
            offer(left[a], a)
            offer(a, right[a])
        out: list[int] = []
        for symbol in symbols:
            if symbol is not None:
                self._settle(symbol, parts, out)
        return out

    def _settle(self, symbol, parts, out):
        found = self.ids.get(symbol)
        if found is None:
            self.unknown(symbol, out)
        elif self.types[found] == UNUSED and symbol in parts:
            for part in parts[symbol]:
                self._settle(part, parts, out)
        else:
            out.append(found)


class UnigramSegmenter(_Vocabulary):
    """The path of pieces with the greatest sum of scores, summed in single precision and with SentencePiece's order among equals, so that
    near-ties come out the same."""

    UNKNOWN_PENALTY = 10.0
    FIXED_BONUS = 0.1  # score of a user-defined piece for each byte after the first; found by comparison with SentencePiece 0.2.3

    def __init__(self, pieces, scores, types, unk_id, byte_fallback):
        super().__init__(pieces, scores, types, unk_id, byte_fallback)
        normal = [scores[i] for i in range(len(pieces)) if types[i] == NORMAL] or [0.0]
        self.unknown_score = _single(min(normal) - self.UNKNOWN_PENALTY)
        self.usable = {
            piece: (i, _single((len(piece.encode("utf-8")) - 1) * self.FIXED_BONUS) if types[i] == USER_DEFINED else scores[i])
            for piece, i in self.ids.items()
            if types[i] != UNUSED
        }
        self.prefixes = {piece[:n] for piece in self.usable for n in range(1, len(piece) + 1)}

    def __call__(self, text: str) -> list[int]:
        size = len(text)
        best: list = [-math.inf] * (size + 1)  # score of the best path that ends here
        via: list = [None] * (size + 1)  # its last piece: (id or None for unknown, where it begins)
        best[0] = 0.0
        for start in range(size):
            here, single, end = best[start], False, start + 1
            while end <= size and (key := text[start:end]) in self.prefixes:
                found = self.usable.get(key)
                if found:
                    score = _single(here + found[1])
                    if score > best[end] or via[end] is None:
                        best[end], via[end] = score, (found[0], start)
                    single = single or end == start + 1
                end += 1
            if not single:
                score = _single(here + self.unknown_score)
                if score > best[start + 1] or via[start + 1] is None:
                    best[start + 1], via[start + 1] = score, (None, start)
        return self._ids_of_path(text, via)

    def _ids_of_path(self, text, via):
        path, at = [], len(text)
        while at:
            path.append((via[at][0], text[via[at][1] : at]))
            at = via[at][1]
        out: list[int] = []
        for found, piece in reversed(path):
            if found is None:
                self.unknown(piece, out)
            else:
                out.append(found)
        return out


_SINGLE = struct.Struct("f")


def _single(value: float) -> float:
    """The nearest single-precision number; infinity beyond the largest, which packing in native mode gives without an error."""
    return _SINGLE.unpack(_SINGLE.pack(value))[0]

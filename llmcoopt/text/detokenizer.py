"""Ids to text, by bytes: every token is a fixed run of bytes, except that the first may lose the space that encoding put in front.

Whole decoding and streaming share this one rule, so a stream's pieces always join to the whole text."""

import codecs
import re
from collections.abc import Callable, Iterable

REPLACEMENT = "\ufffd"
# Bytes that are not UTF-8 become U+FFFD: one for each broken sequence ("replace", as byte-level tokenizers do), or one for each byte
# (EACH_BYTE, as SentencePiece does).
EACH_BYTE = "llmcoopt.each_byte"
codecs.register_error(EACH_BYTE, lambda error: (REPLACEMENT * (error.end - error.start), error.end))

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_token(token: str) -> int | None:
    """0xNN of a byte-fallback token "<0xNN>", None for any other token."""
    match = BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level tokenizers use for the 256 byte values."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with characters outside the alphabet stands for itself."""
    try:
        return bytes([BYTE_ALPHABET[char] for char in token])
    except KeyError:
        return token.encode("utf-8", "surrogateescape")


class Detokenizer:
    """piece(id) -> bytes of a token inside a text. head_piece(id) -> bytes of a token at the start of a text; the start ends after the first
    token ("token"), after the first token whose piece is not empty ("piece"), or after the first token that gave text ("text")."""

    def __init__(
        self,
        piece: Callable[[int], bytes],
        head_piece: Callable[[int], bytes] | None = None,
        head_ends: str = "token",
        errors: str = "replace",
    ):
        self._make = piece
        self._known: dict[int, bytes] = {}
        self.head_piece = head_piece
        self.head_ends = head_ends
        self.errors = errors

    def piece(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._make(token_id)
        return found

    def at_head(self, token_id: int) -> tuple[bytes, bool]:
        """The bytes of a token at the start, and whether the next one is still at the start."""
        if self.head_piece is None:
            return self.piece(token_id), False
        found = self.head_piece(token_id)
        still = {"token": False, "piece": not self.piece(token_id), "text": not found}[self.head_ends]
        return found, still

    def join(self, ids: Iterable[int]) -> bytes:
        rest = iter(ids)
        found = []
        for token_id in rest:
            piece, still = self.at_head(token_id)
            found.append(piece)
            if not still:
                break
        found.extend(map(self.piece, rest))
        return b"".join(found)

    def decode(self, ids: Iterable[int]) -> str:
        return self.join(ids).decode("utf-8", self.errors)

    def stream(self) -> "ByteStream":
        return ByteStream(self)


class ByteStream:
    """Detokenizer.decode one token at a time: `put` returns the text that is certain, `finish` what was held of an unfinished character."""

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        self._head = True

    def put(self, token_id: int) -> str:
        if self._head:
            piece, self._head = self._detokenizer.at_head(token_id)
        else:
            piece = self._detokenizer.piece(token_id)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


class WindowStream:
    """The same for decoders that are not a rule of bytes: decodes a window of the newest tokens with and without the last one.

    Text that ends in U+FFFD waits, as the character may be unfinished."""

    LIMIT = 32  # tokens that may wait; more are no unfinished character

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # the window: tokens shown already, then those that wait
        self._shown = 0

    def put(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._shown < self.LIMIT:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        before = self._decode(self._ids[: self._shown]) if self._shown else ""
        fresh = text[len(before) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return fresh


def from_decoder(decoder: dict | None, token: Callable[[int], str | None]) -> Detokenizer | None:
    """The byte rule of a tokenizer.json decoder section, or None where it is none (WordPiece and other joins that look at neighbours)."""
    if decoder is None:
        return None
    if decoder.get("type") == "ByteLevel":
        return Detokenizer(lambda i: byte_level_bytes(token(i) or ""))
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
    rule = _Steps()
    if not steps or not all(rule.take(step) for step in steps):
        return None
    return rule.detokenizer(token)


class _Steps:
    """Reads a sequence of the steps Replace, Metaspace, ByteFallback, Fuse, Strip, as far as they make a rule of bytes."""

    def __init__(self):
        self.replace: list[tuple[str, str]] = []
        self.marker = None  # a Metaspace step whose marker vanishes from the first token
        self.bytes = self.fused = self.strip = False

    def take(self, step: dict) -> bool:
        kind = step.get("type")
        if kind == "Fuse":
            self.fused = True
            return True
        if kind == "Strip":
            usable = self.fused and not self.strip and (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)
            self.strip = usable
            return usable
        if self.bytes or self.fused:
            return False
        if kind == "ByteFallback":
            self.bytes = True
            return True
        if kind == "Replace" and isinstance(step.get("pattern"), dict) and "String" in step["pattern"]:
            self.replace.append((step["pattern"]["String"], step.get("content", "")))
            return True
        if kind == "Metaspace" and not self.replace:
            marker = step.get("replacement", "▁")
            if step.get("prepend_scheme", "always") != "never":
                self.marker = marker
            self.replace.append((marker, " "))
            return True
        return False

    def detokenizer(self, token: Callable[[int], str | None]) -> Detokenizer | None:
        def plain(text: str) -> bytes:
            for old, new in self.replace:
                text = text.replace(old, new)
            byte = byte_of_token(text) if self.bytes else None
            return text.encode("utf-8", "surrogateescape") if byte is None else bytes([byte])

        def piece(token_id: int) -> bytes:
            return plain(token(token_id) or "")

        if self.marker is not None and self.strip:
            return None
        if self.marker is not None:
            return Detokenizer(piece, lambda i: plain((token(i) or "").replace(self.marker, "")), "token", EACH_BYTE)
        if self.strip:
            return Detokenizer(piece, lambda i: piece(i).removeprefix(b" "), "piece", EACH_BYTE)
        return Detokenizer(piece, errors=EACH_BYTE)

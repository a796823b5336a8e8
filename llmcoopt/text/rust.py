"""The encoder for everything that the `tokenizers` library runs: tokenizer.json files, and byte-level BPE from GGUF metadata."""

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from ..errors import ArgumentError, FormatError
from .detokenizer import BYTE_ALPHABET, from_decoder

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def from_json(text: str, where: str) -> "RustEncoder":
    """The encoder of a tokenizer.json text. Truncation and padding that the file may ask for are off: an encoding is the whole text.

    Flags that an added token lacks count as false, and added tokens keep the ids that the file says, also beyond a gap; the library alone
    refuses the one and renumbers the other."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    added = content.get("added_tokens") if isinstance(content, dict) else None
    added = [token for token in added or () if isinstance(token, dict)] if isinstance(added, list | None) else []
    if any(_FLAGS.keys() - token.keys() for token in added):
        for token in added:
            token |= {key: value for key, value in _FLAGS.items() if key not in token}
        text = json.dumps(content)
    inner = guarded(lambda: Tokenizer.from_str(text), where)
    if any(inner.token_to_id(token["content"]) != token["id"] for token in added):
        inner = guarded(lambda: Tokenizer.from_str(_with_gaps(content, added)), where)
    for token in added:
        got = inner.token_to_id(token["content"])
        if got != token["id"]:
            raise FormatError(f"{where}: the added token {token['content']!r} says id {token['id']}, but the vocabulary gives it {got}")
    inner.no_truncation()
    inner.no_padding()
    return RustEncoder(inner)


def _with_gaps(content: dict, added: list[dict]) -> str:
    """The same file with the added tokens in the vocabulary, where ids may have gaps."""
    vocabulary = content.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        taken = set(vocabulary.values())
        for token in added:
            if token["id"] not in taken:
                vocabulary.setdefault(token["content"], token["id"])
    return json.dumps(content)


def guarded(make, where: str):
    """make(), with whatever the library throws, panics included, as FormatError."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FormatError(f"{where}: the tokenizers library cannot use it: {error}") from None
        raise


class RustEncoder:
    """Text to ids and ids to pieces over a `tokenizers.Tokenizer`. `tokens` overrides the id -> piece table (GGUF may repeat pieces)."""

    def __init__(self, inner: Tokenizer, tokens: Sequence[str] | None = None):
        self.inner = inner
        self.kind = type(inner.model).__name__
        self._tokens = tokens
        self._plain: Tokenizer | None = None
        self._decoder = json.loads(inner.decoder.__getstate__()) if inner.decoder is not None else None
        self.refresh()

    def refresh(self):
        """Reads the sizes and the added tokens anew, after tokens were added."""
        self.base_size = self.inner.get_vocab_size(with_added_tokens=False)
        added = self.inner.get_added_tokens_decoder()
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        self.size = max(len(self._tokens or ()), *(i + 1 for i in vocabulary.values()), 0)
        byte_level = (self._decoder or {}).get("type") == "ByteLevel"
        # Byte values without a token; the library leaves them out of the ids without a word.
        self.lost_bytes = bytes(byte for char, byte in BYTE_ALPHABET.items() if byte_level and char not in vocabulary)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.detokenizer = from_decoder(self._decoder, self.token)

    def token(self, token_id: int) -> str | None:
        if self._tokens is not None and token_id < len(self._tokens):
            return self._tokens[token_id]
        return self.inner.id_to_token(token_id)

    def id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def add(self, token: AddedToken) -> int | None:
        """Adds a token, and returns its id."""
        (self.inner.add_special_tokens if token.special else self.inner.add_tokens)([token])
        return self.inner.token_to_id(token.content)

    def encode(self, text: str, parse_special: bool = True) -> list[int]:
        inner = self.inner if parse_special else self._without_special()
        try:
            return inner.encode(text, add_special_tokens=False).ids
        except Exception as error:
            raise ArgumentError(f"the tokenizer cannot encode {text[:40]!r}: {error}") from error

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def template(self) -> tuple[list[int], list[int]]:
        """The ids that the file's post-processor puts before and after a text."""
        inside = self.inner.encode("a", add_special_tokens=False).ids
        whole = self.inner.encode("a", add_special_tokens=True).ids
        extra = len(whole) - len(inside)
        for before in range(extra + 1):
            if whole[before : before + len(inside)] == inside:
                return whole[:before], whole[before + len(inside) :]
        return [], []

    def _without_special(self):
        if self._plain is None:
            plain = Tokenizer.from_str(self.inner.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain

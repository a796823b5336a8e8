"""Text while it is generated: whole characters only, and stop strings held back until it is certain that they are none."""

import reprlib
from collections.abc import Iterable, Sequence

from .errors import ArgumentError

_TAIL = 64  # tokens at the end of a prompt that may be part of an unfinished character, or that a decoder looks back on


class TextStream:
    """Turns ids into text one at a time.

    stream = TextStream(tokenizer, stop=["END"])
    for token_id in ids:
        print(stream.put(token_id), end="")
        if stream.stopped:
            break
    print(stream.finish(), end="")

    The pieces join to `tokenizer.decode(ids, skip_special_tokens)`, cut before the stop string that is complete first (of several that end on
    the same character, before the one that begins first). How the text is cut into tokens makes no difference. The stop string is no part of
    the text. A token costs the same however long the text has become.

    after: ids that stand before, a prompt's. Their text is not returned, and stop strings are not looked for in it, but the new text goes on
    from it: where the pieces of a text of their own would lose their first blank, they keep it. The prompt's text and the pieces join to
    `decode(prompt + ids)`.

    stopped: a stop string was found; put and finish return "" from then on.  stop_string: which one, else None.
    text: everything returned so far."""

    def __init__(self, tokenizer, stop: str | Sequence[str] | None = None, skip_special_tokens: bool = True, *, after: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.stop = check_stop(stop)
        self.stop_string: str | None = None
        self._skip = skip_special_tokens
        self._decoder = tokenizer.stream_decoder()
        special = tokenizer.all_special_ids if skip_special_tokens else ()
        self._open([token_id for token_id in after if token_id not in special])
        self._held = ""  # may be the beginning of a stop string
        self._parts: list[str] = []
        self._finished = False

    def _open(self, ids):
        """Brings the decoder to where it is after `ids`: what begins a text, then what the next character may need; nothing between matters."""
        for at, token_id in enumerate(ids):
            if self._decoder.put(token_id):
                for last in ids[max(at + 1, len(ids) - _TAIL) :]:
                    self._decoder.put(last)
                return

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def put(self, token_id: int) -> str:
        """The text that became certain with this token; "" while it is held back, and after a stop."""
        if self._finished:
            raise ArgumentError("TextStream.put after finish(); make a new TextStream for a new text")
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            token_id = self.tokenizer.check_id(token_id)
        if self.stopped or (self._skip and token_id in self.tokenizer.all_special_ids):
            return ""
        return self._take(self._decoder.put(token_id), last=False)

    def finish(self) -> str:
        """The rest: what was held back, and U+FFFD for bytes that never became a character."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        return self._take(self._decoder.finish(), last=True)

    def _take(self, fresh, last):
        text = self._held + fresh
        self._held = ""
        found = first_stop(text, self.stop)
        if found:
            at, self.stop_string = found
            text = text[:at]
        elif not last and (size := held_back(text, self.stop)):
            text, self._held = text[:-size], text[-size:]
        if text:
            self._parts.append(text)
        return text

    def __repr__(self):
        state = (
            f"stopped by {self.stop_string!r}" if self.stopped else "finished" if self._finished else f"holds {reprlib.repr(self._held)}"
        )
        return f"TextStream(stop={list(self.stop)!r}, {state})"


def check_stop(stop, name: str = "stop") -> tuple[str, ...]:
    """Stop strings as a tuple; None is none. Raises ArgumentError for other types and for empty strings."""
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or isinstance(stops, bytes):
        raise ArgumentError(f"{name} is {type(stop).__name__}; expected text or a list of texts")
    for i, text in enumerate(stops):
        if not isinstance(text, str) or not text:
            raise ArgumentError(f"{name}[{i}] is {text!r}; expected text that is not empty")
    return tuple(dict.fromkeys(stops))


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """(where it begins, which) of the stop string that is complete first in `text`; the longest of several that end together."""
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if not found:
        return None
    _, at, stop = min(found)
    return at, stop


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest

"""Token ids in whatever form users have them, as checked int32 arrays; sizes and tables for people."""

from collections.abc import Iterable
from html import escape

import numpy as np

from .errors import ArgumentError


def as_ids(ids, vocab_size: int, what: str = "ids") -> np.ndarray:
    """A contiguous int32 vector of token ids in [0, vocab_size).

    Accepts lists, tuples, NumPy arrays and anything that NumPy can read; a tokenizer's output dict gives its 'input_ids'. One row of a batch of
    one is taken as that row. Raises ArgumentError for an empty list, a wrong type, more dimensions or an id out of range."""
    if isinstance(ids, str):
        raise ArgumentError(f"{what}: found a string, expected token ids; encode it first: Tokenizer.from_pretrained(path).encode(text)")
    if isinstance(ids, dict) and "input_ids" in ids:
        ids = ids["input_ids"]
    try:
        array = np.asarray(ids if not isinstance(ids, Iterable) or hasattr(ids, "__array__") else list(ids))
    except ValueError as error:
        raise ArgumentError(f"{what}: expected a flat list of token ids, found rows of unequal length") from error
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise ArgumentError(f"{what}: expected a flat list of token ids, found {array.ndim} dimensions")
    if array.size == 0:
        raise ArgumentError(f"{what}: empty; at least one token is needed (for a text from nothing, pass the tokenizer's bos_token_id)")
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"{what}: expected whole numbers, found {array.dtype}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        at = int(np.flatnonzero(array == bad)[0])
        raise ArgumentError(f"{what}[{at}] = {bad} is outside the vocabulary of {vocab_size}")
    return np.ascontiguousarray(array, dtype=np.int32)


def bytes_text(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def html_table(title: str, rows: dict) -> str:
    """A two-column table for notebooks."""
    cells = "".join(f"<tr><td>{escape(str(k))}</td><td style='text-align:left'>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<b>{escape(title)}</b><table>{cells}</table>"

"""Token ids in whatever form users have them, as checked int32 arrays; sizes and tables for people."""

from collections.abc import Iterable, Mapping
from html import escape

import numpy as np

from .errors import ArgumentError


def as_ids(ids, vocab_size: int, what: str = "ids") -> np.ndarray:
    """A contiguous int32 vector of token ids in [0, vocab_size).

    Accepts lists, tuples, NumPy arrays and anything that NumPy can read; a tokenizer's output gives its 'input_ids' where its 'attention_mask'
    is not 0. One row of a batch of one is taken as that row. Raises ArgumentError for an empty list, a wrong type, more dimensions or an id
    out of range."""
    if isinstance(ids, Mapping):
        rows = as_prompts(ids, None, vocab_size, what)
        if len(rows) != 1:
            raise ArgumentError(f"{what}: found {len(rows)} prompts, expected one; Model.generate takes several")
        return rows[0]
    array = _array(ids, what)
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


def as_prompts(ids, mask, vocab_size: int, what: str = "input_ids") -> list[np.ndarray]:
    """The prompts of a batch, each as `as_ids` gives it: from rows of any lengths, one flat row, an array [n, length], or a tokenizer's output
    (a mapping). mask: has the shape of `ids`; ids where it is 0 are left out. None: the mapping's 'attention_mask', if it has one."""
    if isinstance(ids, Mapping):
        if "input_ids" not in ids:
            raise ArgumentError(f"{what}: found a mapping without 'input_ids' (it has {', '.join(map(repr, ids)) or 'nothing'})")
        mask = ids.get("attention_mask") if mask is None else mask
        ids = ids["input_ids"]
    rows = _rows(ids, what)
    if not rows:
        raise ArgumentError(f"{what}: no prompt")
    if mask is not None:
        masks = [_flat(row, "attention_mask") for row in _rows(mask, "attention_mask")]
        rows = [_flat(row, f"{what}[{i}]") for i, row in enumerate(rows)]
        if [len(row) for row in masks] != [len(row) for row in rows]:
            raise ArgumentError(f"attention_mask: expected the shape of {what}")
        rows = [row[_kept(kept)] for row, kept in zip(rows, masks, strict=True)]
    return [as_ids(row, vocab_size, f"{what}[{i}]") for i, row in enumerate(rows)]


def _rows(values, what) -> list:
    """The rows of a batch; a flat row is a batch of one."""
    if values is None:
        return []
    if isinstance(values, str) or hasattr(values, "__array__") or not isinstance(values, Iterable):
        array = _array(values, what)
        if array.ndim not in (1, 2):
            raise ArgumentError(f"{what}: expected rows of token ids, found {array.ndim} dimensions")
        return list(array) if array.ndim == 2 else [array] if array.size else []
    rows = list(values)
    return [rows] if rows and _is_number(rows[0]) else rows


def _is_number(value) -> bool:
    """Also an array or a tensor without dimensions."""
    return getattr(value, "ndim", None) == 0 or not isinstance(value, Iterable)


def _flat(values, what) -> np.ndarray:
    array = _array(values, what)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise ArgumentError(f"{what}: expected a flat row, found {array.ndim} dimensions")
    return array


def _kept(mask) -> np.ndarray:
    if mask.dtype.kind not in "biuf":
        raise ArgumentError(f"attention_mask: expected numbers or truth values, found {mask.dtype}")
    return mask.astype(bool)


def _array(values, what) -> np.ndarray:
    if isinstance(values, str):
        raise ArgumentError(f"{what}: found a string, expected token ids; encode it first: Tokenizer.from_pretrained(path).encode(text)")
    try:
        return np.asarray(values if not isinstance(values, Iterable) or hasattr(values, "__array__") else list(values))
    except ValueError as error:
        raise ArgumentError(f"{what}: expected a flat list of token ids, found rows of unequal length") from error
    except (TypeError, RuntimeError) as error:  # a tensor on a GPU, for one
        raise ArgumentError(f"{what}: NumPy cannot read this {type(values).__name__}: {error}") from error


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

"""Calibration text: windows of token ids that a layer's inputs are computed from."""

import os
from pathlib import Path

import numpy as np

from .._arrays import as_ids
from ..errors import ArgumentError, MissingFileError

LEAST = 256  # tokens without which there is nothing to calibrate on
SHORTEST = 32  # tokens of a window: what is left over at the end of a text counts from here on
NEEDED = "GPTQ needs text like what the model will read: about 128 windows of 2,048 tokens, 1 MB of English"


def calibration_windows(calib, tokenizer, config, samples: int, length: int | None, seed: int) -> list[np.ndarray]:
    """At most `samples` windows of `length` tokens (None: 2,048, or the model's context), int32.

    calib: a text, a Path of a text file, token ids, or a list of these, which are joined. Where there are more windows, the seed says which ones
    are taken. Raises ArgumentError when there is too little, MissingFileError."""
    if calib is None or (not isinstance(calib, str | os.PathLike) and len(calib) == 0):
        raise ArgumentError(f"calib: none given. {NEEDED}; method='rtn' needs none")
    limit = config.max_positions
    length = min(2048, limit) if length is None else length
    if type(length) is not int or not SHORTEST <= length <= limit:
        raise ArgumentError(f"length: found {length!r}, expected {SHORTEST} to {limit}, the model's context")
    if type(samples) is not int or samples < 1:
        raise ArgumentError(f"samples: found {samples!r}, expected a number of windows from 1")
    single = isinstance(calib, str | os.PathLike) or isinstance(calib[0], int | np.integer)
    texts = [calib] if single else list(calib)
    ids = np.concatenate([_ids(text, tokenizer, config, i) for i, text in enumerate(texts)])
    if len(ids) < LEAST:
        shown = f" ({texts[0]!r:.60})" if isinstance(texts[0], str) else ""
        raise ArgumentError(f"calib: found {len(ids)} tokens{shown}, expected at least {LEAST}. {NEEDED}")
    windows = [ids[at : at + length] for at in range(0, len(ids), length)]
    full = [window for window in windows if len(window) == length]
    if len(full) > samples:
        chosen = np.random.default_rng(seed).choice(len(full), samples, replace=False)
        return [full[i] for i in sorted(chosen)]
    return [window for window in windows[:samples] if len(window) >= SHORTEST]


def _ids(text, tokenizer, config, index):
    if isinstance(text, os.PathLike):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"calib: {text} is not UTF-8 at byte {error.start}; expected a text file") from None
        except OSError as error:
            raise MissingFileError(f"calib: {text}: cannot be read: {error.strerror or error}") from error
    ids = tokenizer().encode(text) if isinstance(text, str) else text
    return as_ids(ids, config.vocab_size, f"calib[{index}]") if len(ids) else np.empty(0, np.int32)

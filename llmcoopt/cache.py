"""KVCache and Sequence: the paged key/value cache, seen from Python."""

import itertools
import os
import weakref
from array import array

import numpy as np

from . import _core, _limits
from ._arrays import bytes_text, html_table
from .errors import ArgumentError
from .layer_types import BYTES, DTYPES, SCALED, layer_types, types_text

__all__ = ["DTYPES", "SCALED", "KVCache", "Sequence", "of_model"]


SINK_LENGTH = 4  # tokens at the beginning kept in 16 bit, unless told otherwise


class KVCache:
    """A pool of pages for the keys and values of one model.

    A page holds `page_size` tokens of all layers. Address space for `max_tokens` is reserved at once; memory is used page by page as tokens are
    written, and given back when sequences are freed.

    Args:
        model: the Model whose shape the cache takes.
        dtype: element type of keys and values: "fp8_e4m3" (also "fp8"), "fp8_e5m2", "int8": one byte and a scale for each block of 16 tokens, kv
            head, and K or V; "float16", "bfloat16", "float32"; "auto" is the model's own, and what `generate` takes when it is given no cache. A
            list has the type of each layer; a dict has types of single layers, and as "default" that of all others:
            {"default": "fp8_e4m3", 0: "bfloat16", -1: "bfloat16"}.
        write_buffer: one-byte types only: keep the newest tokens of a sequence in 16 bit and quantise them once, 16 at a time, with the scale of
            their largest value. False: quantise every token as it comes.
        residual_length: with write_buffer: how many tokens that are. A token attends in 16 bit to those from the last multiple of residual_length on,
            in one byte to those before. A multiple of 16, at most 64, that divides page_size; None: the largest.
        sink_length: with write_buffer: the first tokens of a sequence that stay in 16 bit for good, 0 to 16. Most tokens attend to the very first
            one; rounding it costs more than rounding any other. None: 4.
        turn_keys: one-byte types only: turn keys and queries by a Walsh-Hadamard matrix, which changes no dot product and spreads large channels, so
            that rounding to one byte loses less. (With a page_tolerance False may leave out more pages: bounds of single channels are narrower.)
        kv_scales: "block": scales come from the data, one for each block. "checkpoint": layers of fp8_e4m3 take k_scale and v_scale from the files
            of the model for all blocks, as their author calibrated them, and keys are not turned; what is larger than 448 times the scale saturates.
        page_size: tokens of a page, a multiple of 16 from 16 to 512.
        calibration: with dtype="auto": texts (strings, or lists of token ids) on which `choose_cache_dtype` chooses the type of each layer, fp8_e4m3
            where it does no harm, so that the damage stays within `tolerance`; `tokenizer` is for strings (None: the model's own).
        max_tokens: tokens over all sequences. None: what fits in half of this machine's memory, at most 64 contexts of the model.
        host_bytes: the most memory for pages. None: no bound but max_tokens; with spill_path half of this machine's memory.
        spill_path: a folder, or the name of a file to make there: pages beyond host_bytes lie in that file, the oldest tokens of a sequence first,
            and are read from there as attention needs them. Results are the same to the bit. The file goes with the cache.
        attention_window: approximate: a token attends to the newest `attention_window` tokens (itself included) and to the first
            `attention_sinks` of its sequence only; where a layer of the model has a shorter window of its own, that one holds. None: as the model
            was trained. Pages that no token to come attends to are released.
        attention_sinks: tokens at the beginning that stay visible; only with attention_window.
        page_tolerance: approximate: a token computed alone (not as part of a prompt) may leave out pages whose attention weights sum to at most this
            (of 1) for each head, which is proven from the least and largest keys of each page; those are kept beside the pages, 2 numbers of
            16 bit a channel. Where nearly all pages are needed it reads all. stats() counts. None or 0: exact.

        prefix_cache: keep full pages of prompts when their sequences go, and find them again for prompts that begin alike. Results are the same to
            the bit. Such pages count as free and are given up when others need them, longest unused first.

    Attributes: dtype is the type that most layers have, layer_dtypes has that of each; choice is the CacheChoice made on `calibration`, or None.

    Raises ArgumentError for a wrong option, OutOfMemoryError when the address space can't be had, StorageError when the file can't be made.
    """

    def __init__(
        self,
        model,
        dtype: str | list | dict = "fp8_e4m3",
        page_size: int = 64,
        max_tokens: int | None = None,
        write_buffer: bool = True,
        host_bytes: int | None = None,
        spill_path: str | os.PathLike | None = None,
        prefix_cache: bool = False,
        turn_keys: bool = True,
        *,
        kv_scales: str = "block",
        calibration=None,
        tolerance: float = 0.001,
        tokenizer=None,
        attention_window: int | None = None,
        attention_sinks: int = 0,
        page_tolerance: float | None = None,
        residual_length: int | None = None,
        sink_length: int | None = None,
    ):
        self.model = model
        self.choice = None
        if calibration is not None:
            if dtype != "auto":
                raise ArgumentError(f"calibration: dtype is {dtype!r}, expected 'auto': otherwise there is nothing to choose")
            if kv_scales != "block":
                raise ArgumentError(f"calibration: kv_scales is {kv_scales!r}, expected 'block': that is what is measured")
            from .dtype_choice import choose_cache_dtype

            self.choice = choose_cache_dtype(
                *(model, calibration, tolerance),
                tokenizer=tokenizer,
                write_buffer=write_buffer,
                turn_keys=turn_keys,
                residual_length=residual_length,
                sink_length=sink_length,
                page_size=page_size,
            )
            dtype = self.choice.dtypes
        self.layer_dtypes = layer_types(dtype, model.config.num_hidden_layers, model.dtype)
        self.dtype = max(self.layer_dtypes, key=self.layer_dtypes.count)
        if max_tokens is None:
            max_tokens = _default_tokens(model.config, self.layer_dtypes)
        max_tokens, self.page_size = _whole("max_tokens", max_tokens, 1), _whole("page_size", page_size, 16, 512)
        self.kv_scales = kv_scales
        scales = checkpoint_scales(model, self.layer_dtypes, kv_scales)
        coded = any(name in SCALED for name in self.layer_dtypes)
        self.write_buffer = bool(write_buffer) and coded
        residual = 0 if residual_length is None else _whole("residual_length", residual_length, 16, 64)
        sinks = SINK_LENGTH * bool(write_buffer) if sink_length is None else _whole("sink_length", sink_length, 0, 16)
        self.sink_length = sinks if coded else 0
        if host_bytes is None and spill_path is not None:
            host_bytes = _limits.memory_bytes() // 2
        host_bytes = None if host_bytes is None else _whole("host_bytes", host_bytes, 1)
        path = os.fspath(spill_path) if spill_path is not None else None
        self.host_bytes, self.spill_path = host_bytes, spill_path
        self.attention_window = None if attention_window is None else _whole("attention_window", attention_window, 1)
        self.attention_sinks = _whole("attention_sinks", attention_sinks, 0)
        self.page_tolerance = _share("page_tolerance", page_tolerance or 0.0)
        self.prefix_cache = bool(prefix_cache)
        self.turn_keys = bool(turn_keys) and kv_scales == "block" and coded
        self._skipped = {"padding": 0, "duplicate": 0}
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._core = _core.KVCache(
            *(model._core, self.dtype, self.page_size, max_tokens, self.write_buffer, host_bytes or 0, path, self.prefix_cache),
            turn_keys=self.turn_keys,
            layer_dtypes=list(self.layer_dtypes),
            fixed_scales=scales,
            window=self.attention_window or 0,
            sinks=self.attention_sinks,
            page_tolerance=self.page_tolerance,
            residual=residual if coded else 0,
            n_first=self.sink_length,
        )
        self.residual_length, self._first_bytes = self._core.buffer()
        model._caches.add(self)

    def sequence(self) -> "Sequence":
        """A new, empty sequence."""
        return Sequence(self, self._core.sequence())

    def stats(self) -> dict:
        """Exact counters: pages_total, pages_free, pages_shared, pages_away (in the spill file and not in memory), sequences, tokens_held,
        page_bytes, bytes_per_token, reserved_bytes (address space), resident_bytes (memory in use now, as the system counts it), tail_bytes and
        first_bytes (beside the pages: write buffers of all sequences, and first tokens in 16 bit), and since the cache was made tokens_appended,
        blocks_quantised (16 tokens of all layers and heads), pages_copied, pages_spilled (sent away) and pages_restored, slices_fetched and
        bytes_fetched (a slice: a layer of a page that is away, read for attention), prefetches_issued and prefetches_used (reads announced to the
        system ahead), bytes_written (codes, scales and 16-bit rows that went to pages), and writes_skipped: tokens not computed and written, by
        reason: "padding" (masked out), "prefix" (found in the prefix index), "duplicate" (the sequence held them already: `Sequence.keep`).
        pages_cached: held by the prefix index alone. pages_released: left the window. pages_read and pages_left_out, largest_mass_left_out,
        step_mass_left_out, bounds_bytes: of page_tolerance (docs/cache.md)."""
        stats = self._core.stats()
        return stats | {"writes_skipped": self._skipped | {"prefix": stats.pop("tokens_found")}}

    def reset_stats(self) -> None:
        """Sets the counters that count since the cache was made to zero."""
        self._core.reset_counters()
        self._skipped = dict.fromkeys(self._skipped, 0)

    def forget_prefixes(self) -> None:
        """Empties the prefix index; pages that nobody else holds are free."""
        self._core.forget_prefixes()

    def save(self, path, sequences=None) -> None:
        """Writes sequences of this cache to a file, from which `load` brings them back to the bit.

        sequences: a Sequence or a list of them; pages that they share are written once. None: all that are alive (`load` gives them in the order in
        which they were made). The file is complete or not there: it is written beside `path` and then moved. Raises ArgumentError for
        sequences of another cache or in use, StorageError and OSError."""
        from .cache_file import save

        if sequences is None:
            sequences = sorted(self._sequences, key=lambda sequence: sequence._number)
        sequences = [sequences] if isinstance(sequences, Sequence) else list(sequences)
        for sequence in sequences:
            if not isinstance(sequence, Sequence) or sequence.cache is not self:
                raise ArgumentError(f"sequences: found {sequence!r}, expected sequences of this cache")
        save(self, sequences, path)

    def load(self, path) -> list["Sequence"]:
        """The sequences of a file that `save` wrote, as new sequences of this cache, which must be like the one that they came from: element types,
        page_size, write_buffer, residual_length, sink_length, turn_keys, kv_scales, window and sinks, and above all the model; ArgumentError says
        what differs. FormatError for damaged files (every page has a checksum), OutOfPagesError; then the cache is as it was."""
        from .cache_file import CacheFile

        return [Sequence(self, core) for core in CacheFile(path).load(self)]

    @classmethod
    def from_file(cls, model, path, **options) -> tuple["KVCache", list["Sequence"]]:
        """(cache, sequences): a cache like the one that was saved, with its sequences. options: as for KVCache, where the file does not say."""
        from .cache_file import CacheFile

        file = CacheFile(path)
        cache = cls(model, **(file.options | options))
        try:
            return cache, [Sequence(cache, core) for core in file.load(cache)]
        except BaseException:
            cache.close()
            raise

    def check(self) -> None:
        """Proves the cache's invariants (no page lost, none counted twice); FormatError names the first that fails."""
        self._core.check()

    def close(self) -> None:
        """Gives all memory back. Sequences of this cache can't be used any more. Refused while a generation runs on it."""
        self._core.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        try:
            s = self.stats()
        except ArgumentError:
            return "KVCache(closed)"
        return (
            f"KVCache({types_text(self.layer_dtypes)}, {s['tokens_held']} tokens in {_sequences(s)}, "
            f"{s['pages_total'] - s['pages_free']} of {s['pages_total']} pages of {self.page_size}, {bytes_text(s['resident_bytes'])} in memory"
            f"{self._away(s)}{self._approximations()})"
        )

    def _approximations(self) -> str:
        """What makes results differ from the model's, for repr: "" when nothing does."""
        own = self.model.config.window or (0,)
        said = []
        if self.attention_window and any(w == 0 or w > self.attention_window for w in own):
            said.append(f"window {self.attention_window}, {self.attention_sinks} sinks")
        if self.page_tolerance:
            said.append(f"pages left out up to {self.page_tolerance:g} of the weights")
        return f", approximate: {', '.join(said)}" if said else ""

    def _away(self, stats: dict) -> str:
        if self.spill_path is None:
            return ""
        return f", {bytes_text(stats['pages_away'] * stats['page_bytes'])} in {os.fspath(self.spill_path)}"

    def _exact_text(self, stats: dict) -> str:
        if not self.write_buffer:
            return "nothing" if any(name in SCALED for name in self.layer_dtypes) else "all"
        newest = f"the newest {self.residual_length} tokens at most ({bytes_text(stats['tail_bytes'])})"
        return newest + (f", the first {self.sink_length} ({bytes_text(stats['first_bytes'])})" if self.sink_length else "")

    def _repr_html_(self):
        s = self.stats()
        used = s["pages_total"] - s["pages_free"]
        rows = {
            "element type": types_text(self.layer_dtypes),
            "tokens held": f"{s['tokens_held']} in {_sequences(s)}",
            "pages": f"{used} of {s['pages_total']}, {self.page_size} tokens each, {s['pages_shared']} shared",
            "memory": f"{bytes_text(s['resident_bytes'])} resident, {bytes_text(s['reserved_bytes'])} reserved",
            "spilled": f"{s['pages_away']} pages{self._away(s)}" if self.spill_path is not None else "no spill file",
            "pages left out": f"{s['pages_left_out']:,} of {s['pages_read'] + s['pages_left_out']:,}, at most {s['largest_mass_left_out']:.2g}",
            "attention": self._approximations().removeprefix(", ") or "exact",
            "bytes per token": f"{s['bytes_per_token']:,}",
            "in 16 bit": self._exact_text(s),
        }
        return html_table("KVCache", rows)


class Sequence:
    """The tokens of one text in a KVCache. Made by KVCache.sequence() and Sequence.fork(); len() is the number of tokens held."""

    def __init__(self, cache: KVCache, core):
        self.cache = cache
        self._core = core
        self._number = next(cache._numbers)
        cache._sequences.add(self)

    @property
    def ids(self) -> list[int]:
        """The token ids held, in order."""
        return array("i", self._core.ids()).tolist()

    def __len__(self):
        return self._core.length()

    def kv(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys (rotated by their position) and values of a layer, as the next token's attention reads them: float32 [tokens, kv_heads, head_dim],
        read-only copies (DLPack consumers that may write want a `.copy()`). ArgumentError for a layer that the model hasn't."""
        config = self.cache.model.config
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < config.num_hidden_layers:
            raise ArgumentError(f"layer = {layer!r}, expected a whole number from 0 to {config.num_hidden_layers - 1}")
        shape = len(self), config.num_key_value_heads, config.head_dim
        keys, values = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._core.read(int(layer), keys, values)
        keys.flags.writeable = values.flags.writeable = False
        return keys, values

    def fork(self) -> "Sequence":
        """A second sequence with the same tokens. Pages are shared until one of the two writes to them."""
        return Sequence(self.cache, self._core.fork())

    def keep(self, ids) -> int:
        """Keeps as much as `ids` begins with, and leaves at least one id to compute. Returns how many ids are held: go on with ids[n:]. None when
        tokens that the next one attends to have left the window."""
        held = self.ids
        n = next((i for i, (a, b) in enumerate(zip(held, ids[:-1], strict=False)) if a != b), min(len(held), max(0, len(ids) - 1)))
        try:
            self.truncate(n)
        except ArgumentError:  # the window moved on, or the sequence can't be used, which the next call says again
            n = 0
            self.truncate(n)
        self.cache._skipped["duplicate"] += n
        return n

    def truncate(self, length: int) -> None:
        """Keeps the first `length` tokens. ArgumentError when there are fewer."""
        self._core.truncate(length)

    def free(self) -> None:
        """Returns the pages at once (otherwise they return when the object goes)."""
        self._core.free()
        self.cache._sequences.discard(self)

    def __repr__(self):
        try:
            return f"Sequence({len(self)} tokens)"
        except ArgumentError as error:
            return f"Sequence({error})"


def of_model(item, kind: type, model, what: str):
    """`item`, when it is a KVCache or Sequence (`kind`) of `model`; ArgumentError otherwise."""
    if not isinstance(item, kind):
        raise ArgumentError(f"{what}: expected a {kind.__name__}, found {type(item).__name__}")
    owner = item if kind is KVCache else item.cache
    if owner.model is not model:
        raise ArgumentError(f"{what}: its cache belongs to another model, {owner.model!r}")
    return item


def _whole(name: str, value, least: int, most: int = 2**63 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ArgumentError(f"{name} = {value!r}, expected a whole number from {least} to {most}")
    return int(value)


def _share(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating) or not 0 <= value < 1:
        raise ArgumentError(f"{name} = {value!r}, expected a number from 0 to less than 1")
    return float(value)


def _sequences(stats: dict) -> str:
    return "1 sequence" if stats["sequences"] == 1 else f"{stats['sequences']} sequences"


def checkpoint_scales(model, types, kv_scales: str) -> np.ndarray | None:
    """float32 [layers, k|v, kv heads] for the core, or None: scales come from the data. ArgumentError when a layer that needs them has none."""
    if kv_scales not in ("block", "checkpoint"):
        raise ArgumentError(f"kv_scales = {kv_scales!r}, expected 'block' or 'checkpoint'")
    if kv_scales == "block":
        return None
    coded = [i for i, name in enumerate(types) if name in SCALED]
    wrong = next((i for i in coded if types[i] != "fp8_e4m3"), None)
    if wrong is not None or not coded:
        found = types[wrong] if coded else types[0]
        raise ArgumentError(f"kv_scales = 'checkpoint' is for layers of fp8_e4m3, which such scales are made for; found {found}")
    if model.cache_scales is None:
        raise ArgumentError(f"kv_scales = 'checkpoint': the files of {model.name!r} have no k_scale and v_scale")
    bare = next((i for i in coded if np.isnan(model.cache_scales[i]).any()), None)
    if bare is not None:
        raise ArgumentError(f"kv_scales = 'checkpoint': layer {bare} has no k_scale and v_scale in the files of {model.name!r}")
    return np.where(np.isnan(model.cache_scales), np.float32(1), model.cache_scales)  # the other layers' are not used


def _default_tokens(config, types) -> int:
    per_token = 2 * config.num_key_value_heads * config.head_dim * sum(BYTES[name] for name in types)
    return max(1, min(64 * config.max_positions, _limits.memory_bytes() // 2 // per_token))

"""cache_report: what a cache's element types do to keys, values and attention, per layer and kv head, on texts of the caller."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from . import _core
from ._arrays import as_ids
from .cache import KVCache, checkpoint_scales
from .errors import ArgumentError, NumericError, UnsupportedError
from .layer_types import BYTES, SCALED, layer_types, types_text
from .taps import Tap
from .tokenizer import Tokenizer

BLOCK = 16  # tokens that share a scale (csrc/base/formats.h)
ROOM = 1 << 30  # bytes of queries, keys and values held at once; a text runs again for the layers that do not fit
# What is larger than the first would be rounded to more than the largest code; codes below the second have fewer bits of precision.
RANGES = {"float16": (65520.0, 2.0**-14), "fp8_e4m3": (464.0, 2.0**-6), "fp8_e5m2": (61440.0, 2.0**-14), "int8": (127.5, 0.0)}
ERRORS = {"key_error": "K", "value_error": "V", "attention_error": "attention"}
SHARES = {"saturated": "saturated", "subnormal": "subnormal", "zeroed": "zeroed"}


def text_windows(model, texts, tokenizer=None, window: int | None = None) -> list[np.ndarray]:
    """Texts as rows of at most `window` token ids (None: 2,048 or the model's context), none of which is shorter than two blocks of 16.

    texts: a string, token ids, or a list of either. Strings need a tokenizer; None takes the model's own. Each text is cut by itself; its last row is
    left out when it is shorter than 32 tokens. Raises ArgumentError when nothing is left."""
    limit = model.config.max_positions
    window = min(2048, limit) if window is None else window
    if not 2 * BLOCK <= window <= limit:
        raise ArgumentError(f"window = {window}, expected {2 * BLOCK} to {limit}, the model's context")
    if isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int | np.integer)):
        texts = [texts]
    if tokenizer is None and any(isinstance(text, str) for text in texts):
        tokenizer = Tokenizer.from_pretrained(model.tokenizer_source)
    rows = []
    for i, text in enumerate(texts):
        ids = as_ids(tokenizer.encode(text) if isinstance(text, str) else text, model.config.vocab_size, f"texts[{i}]")
        rows += [ids[at : at + window] for at in range(0, len(ids), window)]
    rows = [row for row in rows if len(row) >= 2 * BLOCK]
    if not rows:
        raise ArgumentError(f"texts: nothing to measure on, found no text of {2 * BLOCK} tokens or more")
    return rows


@dataclass(frozen=True, eq=False)
class KVCacheReport:
    """What coded keys and values lose against the model's own float32 numbers. Arrays are float64 [layers, kv heads].

    key_error, value_error: root of the mean square of the error, relative to that of the values, over all full blocks of 16.
    attention_error: the same of what attention gives to this head's group of query heads, with the same queries over exact keys and values and over
        a cache as it is read: the block of a token's own position in 16 bit, earlier blocks as codes.
    saturated: share of the keys and values that were clipped, as they lie beyond the largest number that their code and scale can mean.
    subnormal, zeroed: share that fell below the smallest normal number of their code, with fewer bits of precision, or became 0 without being it.

    tokens: measured. dtypes: of each layer. bytes_per_token: of all layers, scales included.
    """

    model: str
    dtypes: tuple[str, ...]
    tokens: int
    bytes_per_token: float
    sums: dict = field(repr=False)  # name -> [layers, kv heads]: sums of squares of errors and values, and counts

    def _relative(self, name, axis=()):
        with np.errstate(invalid="ignore"):
            ratio = self.sums[name].sum(axis) / self.sums[f"{name} of"].sum(axis)
        return np.sqrt(np.nan_to_num(ratio))

    def _share(self, name, axis=()):
        return self.sums[name].sum(axis) / self.sums["count"].sum(axis)

    @property
    def key_error(self) -> np.ndarray:
        return self._relative("key_error")

    @property
    def value_error(self) -> np.ndarray:
        return self._relative("value_error")

    @property
    def attention_error(self) -> np.ndarray:
        return self._relative("attention_error")

    @property
    def saturated(self) -> np.ndarray:
        return self._share("saturated")

    @property
    def subnormal(self) -> np.ndarray:
        return self._share("subnormal")

    @property
    def zeroed(self) -> np.ndarray:
        return self._share("zeroed")

    def layer(self, name: str) -> np.ndarray:
        """An error or share, by its attribute's name, over all heads of each layer: float64 [layers]."""
        return self._over(name, 1)

    def total(self, name: str) -> float:
        """An error or share over the whole model."""
        return float(self._over(name, None))

    def worst(self, name: str = "attention_error") -> tuple[int, int]:
        """(layer, kv head) where it is largest."""
        layer, head = np.unravel_index(int(getattr(self, name).argmax()), getattr(self, name).shape)
        return int(layer), int(head)

    def _over(self, name, axis):
        if name not in ERRORS | SHARES:
            raise ArgumentError(f"found {name!r}, expected one of {', '.join(ERRORS | SHARES)}")
        return self._relative(name, axis) if name in ERRORS else self._share(name, axis)

    def to_dict(self) -> dict:
        """All figures as numbers and lists."""
        names = [*ERRORS, *SHARES]
        return {
            "model": self.model,
            "dtypes": list(self.dtypes),
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "total": {name: self.total(name) for name in names},
            "worst": {name: dict(zip(("layer", "kv_head"), self.worst(name), strict=True)) for name in ERRORS},
            "layers": {name: self.layer(name).tolist() for name in names},
            "heads": {name: getattr(self, name).tolist() for name in names},
        }

    def to_json(self, **options) -> str:
        return json.dumps(self.to_dict(), **options)

    def _rows(self):
        """The table: titles, then a row for each layer, then the totals; all strings."""
        kinds = len(set(self.dtypes)) > 1
        yield ["layer", *(["type"] if kinds else []), *ERRORS.values(), "worst head", *SHARES.values()]
        for i, dtype in enumerate(self.dtypes):
            worst = int(self.attention_error[i].argmax())
            errors = [_percent(self.layer(name)[i]) for name in ERRORS]
            shares = [_percent(self.layer(name)[i]) for name in SHARES]
            yield [str(i), *([dtype] if kinds else []), *errors, f"{worst}: {_percent(self.attention_error[i, worst])}", *shares]
        layer, head = self.worst()
        place = f"{layer}.{head}: {_percent(self.attention_error[layer, head])}"
        totals = [_percent(self.total(name)) for name in ERRORS], [_percent(self.total(name)) for name in SHARES]
        yield ["all", *([""] if kinds else []), *totals[0], place, *totals[1]]

    def _title(self):
        return (
            f"KVCacheReport({self.model!r}, {types_text(self.dtypes)}, {self.tokens} tokens, {self.bytes_per_token:,.0f} bytes per token); "
            "errors: root mean square, relative"
        )

    def __repr__(self):
        rows = list(self._rows())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self):
        first, *rest = self._rows()
        head = "".join(f"<th>{cell}</th>" for cell in first)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rest)
        return f"<b>{self._title()}</b><table><tr>{head}</tr>{body}</table>"

    def plot(self, path=None):
        """Three heat maps, layers by kv heads, of the errors of K, V and attention output. Writes an image file when `path` is given.

        Returns matplotlib's Figure. Raises UnsupportedError when matplotlib is not installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UnsupportedError("plot() needs matplotlib: pip install matplotlib; to_dict() has the same figures") from None
        layers, heads = self.key_error.shape
        figure = Figure(figsize=(min(4 + 0.35 * 3 * heads, 16), min(2.5 + 0.18 * layers, 14)), layout="constrained")
        figure.suptitle(f"{self.model}: {types_text(self.dtypes)}, {self.tokens} tokens", fontsize=11)
        for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), ERRORS.items(), strict=True):
            image = axes.imshow(100 * getattr(self, name), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
            axes.set(title=title, xlabel="kv head")
            axes.xaxis.get_major_locator().set_params(integer=True)
            figure.colorbar(image, ax=axes, label="relative error, %" if name == "attention_error" else None)
        figure.axes[0].set_ylabel("layer")
        figure.axes[0].yaxis.get_major_locator().set_params(integer=True)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _percent(share):
    return "0" if share == 0 else f"{100 * share:.3g} %" if share >= 1e-5 else "< 0.001 %"


def cache_report(
    model,
    texts,
    dtype="fp8_e4m3",
    *,
    tokenizer=None,
    window: int | None = None,
    write_buffer: bool = True,
    turn_keys: bool = True,
    kv_scales: str = "block",
    residual_length: int | None = None,
    sink_length: int | None = None,
    page_size: int = 64,
    progress: bool = True,
) -> KVCacheReport:
    """Measures what a cache of these element types does to keys, values and attention, layer by layer and head by head.

    The texts run through the model with a cache of its own type; each layer's queries, keys and values are then coded and attended to beside it, so
    that the error of one layer does not show in the next.

    Args:
        texts: a string, token ids, or a list of either.
        dtype: as in KVCache: a name, a list of a name for each layer, or a dict.
        tokenizer: for strings; None: the model's own.
        window: tokens that see each other; longer texts are cut. None: 2,048 or the model's context.
        write_buffer, turn_keys, kv_scales, residual_length, sink_length, page_size: as in KVCache.
        progress: a bar on stderr.

    Raises ArgumentError, and NumericError when keys or values are NaN or infinite.
    """
    types = layer_types(dtype, model.config.num_hidden_layers, model.dtype)
    windows = text_windows(model, texts, tokenizer, window)
    config, context, sums = model.config, _core.OpContext(model.isa, model.threads), {}
    scales = checkpoint_scales(model, types, kv_scales)
    buffer = {"write_buffer": write_buffer, "residual_length": residual_length, "sink_length": sink_length, "page_size": page_size}
    with KVCache(model, list(types), max_tokens=1, **buffer) as cache:
        per_token, buffer = cache.stats()["bytes_per_token"], (page_size, cache.residual_length, cache.sink_length)
    row = 4 * config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    for ids in tqdm(windows, "cache report", unit="text", disable=not progress):
        at_once = max(1, ROOM // (row * len(ids)))
        for first in range(0, len(types), at_once):
            layers = {
                i: _Layer(context, config, i, types[i], buffer, turn_keys, scales) for i in range(first, min(first + at_once, len(types)))
            }
            tap = Tap(["q", "k", "v"], lambda point, layer, rows, layers=layers: layers[layer].add(point, rows), layers)
            with KVCache(model, "auto", max_tokens=len(ids)) as cache:
                model.forward(ids, cache.sequence(), last_only=True, tap=tap)
            for i, layer in layers.items():
                for name, heads in layer.measure().items():
                    sums.setdefault(name, np.zeros((len(types), config.num_key_value_heads)))[i] += heads
    return KVCacheReport(model.name, types, sum(map(len, windows)), per_token, sums)


class _Layer:
    """One layer's queries, keys and values of one text."""

    def __init__(self, context, config, index, dtype, buffer, turn_keys, scales):
        self.context, self.config, self.index, self.dtype, self.buffer = context, config, index, dtype, buffer
        self.scales = scales[index] if scales is not None and dtype in SCALED else None
        self.turned = turn_keys and dtype in SCALED and scales is None
        self.parts = {"q": [], "k": [], "v": []}

    def add(self, point, rows):
        self.parts[point].append(rows)

    def measure(self):
        """name -> [kv heads]: sums over this text."""
        q, k, v = (np.concatenate(self.parts[p]) for p in ("q", "k", "v"))
        if not all(np.isfinite(x).all() for x in (q, k, v)):
            raise NumericError(f"layer {self.index}: queries, keys or values are NaN or infinite")
        q, k, v = (x.reshape(len(x), -1, self.config.head_dim) for x in (q, k, v))
        exact, coded = (_Pages(self.config, dtype, len(q), *self.buffer) for dtype in ("float32", self.dtype))
        right, _ = exact.attend(self.context, q, k, v, self.index)
        found, k = coded.attend(self.context, q, k, v, self.index, turned=self.turned, scales=self.scales)
        groups = len(q), self.config.num_key_value_heads, -1
        sums = {"attention_error": _squares((found - right).reshape(groups)), "attention_error of": _squares(right.reshape(groups))}
        full = len(q) // BLOCK * BLOCK
        for which, (name, x) in enumerate({"key_error": k, "value_error": v}.items()):
            values, scales = coded.read(which, full)
            sums[name], sums[f"{name} of"] = _squares(values - x[:full]), _squares(x[:full])
            for share, heads in _shares(x[:full], values, scales, self.dtype).items():
                sums[share] = sums.get(share, 0) + heads
        return sums


class _Pages:
    """The pages of one layer of one text, as csrc/base/formats.h lays them out."""

    def __init__(self, config, dtype, tokens, page_size, residual, sinks):
        self.config, self.dtype, self.page_size = config, dtype, page_size
        heads, d = config.num_key_value_heads, config.head_dim
        self.n = -(-tokens // page_size)
        self.codes = 2 * heads * page_size * d * BYTES[dtype]
        self.scales = 2 * heads * (page_size // BLOCK) * 4 if dtype in SCALED else 0
        self.data = np.zeros(self.n * (-(-(self.codes + self.scales) // 64) * 64), np.uint8)
        self.residual, row = residual if dtype in SCALED else 0, 2 * 2 * heads * d
        self.tail, self.firsts = self.residual * row, np.zeros((self.n, sinks * row), np.uint8)

    def attend(self, context, q, k, v, layer, **how):
        """Writes k and v [tokens, kv heads, head_dim]. Returns float32 attention of q over them, [tokens, heads, head_dim], and the keys as they were
        written but for rounding: turned ones stay turned, relative errors are the same."""
        n, c, d = len(q), self.config, self.config.head_dim
        tails = [np.zeros(size * self.tail, np.uint8) for size in (1, 1, -(-n // self.residual))] if self.tail else []
        items = [(np.arange(self.n, dtype=np.int32), 0, n, 0, True, *tails)]
        where = {"cache": self.data, "dtype": self.dtype, "page_size": self.page_size, "n_layers": 1, "layer": 0, "items": items}
        where |= {"buffer": (self.residual, self.firsts)} if tails else {}
        still, out = (np.ones((n, d // 2), np.float32), np.zeros((n, d // 2), np.float32)), np.empty_like(q)
        q, k = q.copy(), k.copy()
        context.rope_append(q, k, v, *still, **where, **how)  # they are rotated already
        window = c.window[layer] if c.window else 0
        context.attention(out, q, **where, n_kv_heads=c.num_key_value_heads, scale=d**-0.5, window=window)
        return out, k

    def read(self, which, tokens):
        """(values, scales) of the first tokens' keys (0) or values (1): float32 [tokens, kv heads, head_dim] and [tokens, kv heads, 1]."""
        heads, d = self.config.num_key_value_heads, self.config.head_dim
        pages = self.data.reshape(self.n, -1)
        codes = (
            pages[:, : self.codes]
            .reshape(self.n, 2, heads, self.page_size, -1)[:, which]
            .swapaxes(1, 2)
            .reshape(-1, heads, d * BYTES[self.dtype])
        )
        scales = np.ones((tokens, heads, 1), np.float32)
        if self.scales:
            blocks = np.ascontiguousarray(pages[:, self.codes : self.codes + self.scales]).view(np.float32)
            blocks = blocks.reshape(self.n, 2, heads, -1)[:, which].swapaxes(1, 2).reshape(-1, heads, 1)
            scales = blocks.repeat(BLOCK, axis=0)[:tokens]
        return decode(np.ascontiguousarray(codes[:tokens]), self.dtype).reshape(tokens, heads, d) * scales, scales


def decode(raw, dtype):
    """Stored elements (bytes along the last axis) as float32, without their scales. NaN codes are not looked for: finite values have none."""
    if dtype == "int8":
        return raw.view(np.int8).astype(np.float32)
    if dtype == "fp8_e4m3":  # as a float16 the same bits mean 2^-8 of it
        return ((raw & 0x80).astype(np.uint16) << 8 | (raw & 0x7F).astype(np.uint16) << 7).view(np.float16).astype(np.float32) * 256
    if dtype == "fp8_e5m2":
        return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def _squares(x):
    return np.square(x, dtype=np.float64).sum(axis=(0, 2))


def _shares(x, values, scales, dtype):
    """How many of x [tokens, kv heads, head_dim] met which end of the code's range, and how many there are: [kv heads] each."""
    most, smallest = RANGES.get(dtype, (math.inf, 0.0))
    size = np.abs(x)
    return {
        "saturated": (size > most * scales).sum(axis=(0, 2)),
        "subnormal": ((np.abs(values) < smallest * scales) & (values != 0)).sum(axis=(0, 2)),
        "zeroed": ((values == 0) & (x != 0)).sum(axis=(0, 2)),
        "count": np.full(x.shape[1], x.shape[0] * x.shape[2]),
    }

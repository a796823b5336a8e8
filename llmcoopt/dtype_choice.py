"""choose_cache_dtype: which layers keep 16 bit so that a cache of one-byte codes stays within a tolerance, measured on texts of the caller."""

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .cache import KVCache
from .damage import KVCacheReport, cache_report, text_windows
from .errors import ArgumentError
from .layer_types import layer_types, types_text

WINDOW = 1024  # the reference's logits of one window are held: 200 MB at a vocabulary of 49,152
PIECE = 128  # rows of logits of the coded cache at a time
RANKED = 1024  # tokens that layers are ranked on


@dataclass(frozen=True)
class Measured:
    """What one cache does to the predictions on a text.

    damage: exp(mean of KL(reference || coded)) - 1: by how much perplexity grows on texts that follow the reference's own predictions. It is never
        negative, and needs far fewer tokens than the next two, whose sign is chance when differences are small.
    loss_change: of the mean negative log-likelihood of these texts' tokens, in nats; perplexity grows by exp(loss_change) - 1.
    loss_error: the standard error of loss_change, from token to token.
    """

    kept: int
    damage: float
    loss_change: float
    loss_error: float


@dataclass(frozen=True, eq=False)
class CacheChoice:
    """What choose_cache_dtype decided, and why.

    dtypes: the element type of each layer, for KVCache(model, dtype=choice.dtypes).
    measured: of the cache that was chosen; steps has all that were tried.
    order: layers from the most to the least sensitive; sensitivity: float64 [layers], by `rank_by`.
    report: cache_report of a cache that is all `base`.
    bytes_per_token: of the choice; of a cache all of base and all of keep: bytes_of_base, bytes_of_keep.
    """

    model: str
    base: str
    keep: str
    tolerance: float
    tokens: int
    dtypes: list[str]
    measured: Measured
    steps: list[Measured]
    rank_by: str
    order: list[int]
    sensitivity: np.ndarray
    report: KVCacheReport
    bytes_per_token: float
    bytes_of_base: float
    bytes_of_keep: float

    @property
    def kept(self) -> list[int]:
        """The layers that keep 16 bit."""
        return sorted(self.order[: self.measured.kept])

    def to_dict(self) -> dict:
        """All of it as numbers and lists."""
        names = ["model", "base", "keep", "tolerance", "tokens", "dtypes", "kept", "rank_by", "order", "bytes_per_token"]
        rest = {"bytes_of_base": self.bytes_of_base, "bytes_of_keep": self.bytes_of_keep, "sensitivity": self.sensitivity.tolist()}
        steps = {"measured": vars(self.measured), "steps": [vars(step) for step in self.steps]}
        return {**{name: getattr(self, name) for name in names}, **rest, **steps, "report": self.report.to_dict()}

    def _lines(self):
        share = self.bytes_per_token / self.bytes_of_keep
        layers = f"layers {', '.join(map(str, self.kept))} in {self.keep}" if self.kept else f"no layer in {self.keep}"
        yield f"CacheChoice({self.model!r}, {types_text(self.dtypes)})"
        yield f"tolerance {self.tolerance:.3%}, measured on {self.tokens} tokens: {layers}"
        yield f"bytes per token: {self.bytes_per_token:,.0f}, {share:.1%} of {self.keep} (all {self.base}: {self.bytes_of_base:,.0f})"
        yield f"layers by sensitivity ({self.rank_by}): {', '.join(map(str, self.order))}"
        for step in self.steps:
            mark = " <- chosen" if step is self.measured else ""
            yield (
                f"{step.kept:4} kept: damage {step.damage:.4%}, loss {step.loss_change:+.5f} +- {step.loss_error:.5f}"
                f"{'' if step.damage <= self.tolerance else ', above the tolerance'}{mark}"
            )

    def __repr__(self):
        return "\n  ".join(self._lines())


def choose_cache_dtype(
    model,
    texts,
    tolerance: float = 0.001,
    base: str = "fp8_e4m3",
    *,
    keep: str = "auto",
    tokenizer=None,
    window: int | None = None,
    rank_by: str = "damage",
    write_buffer: bool = True,
    turn_keys: bool = True,
    residual_length: int | None = None,
    sink_length: int | None = None,
    page_size: int = 64,
    progress: bool = True,
) -> CacheChoice:
    """Chooses the element type of each layer: `base`, but `keep` in the most sensitive layers, as few as bring the damage within the tolerance.

    Damage (`Measured.damage`) is measured by running the model over the texts through such caches and comparing its predictions with those through
    a cache that is all `keep`. Layers are kept in the order of their sensitivity, and how many is found by bisection.

    Args:
        texts: a string, token ids, or a list of either: the kind of text that the model will see.
        tolerance: the largest damage; 0.001 means that perplexity grows by 0.1 %.
        base: the type of the layers that bear it.
        keep: the type of the others; "auto" is the model's own.
        tokenizer: for strings; None: the model's own.
        window: tokens that see each other; longer texts are cut. None: 1,024 or the model's context. The logits of a window are held in memory.
        rank_by: "damage" measures each layer alone on the first 1,024 tokens, which takes as many runs as there are layers; "attention" takes the
            error of attention output of `cache_report`, one run, and may keep some layers more.
        write_buffer, turn_keys, residual_length, sink_length, page_size: as in KVCache.
        progress: a bar on stderr.

    Raises ArgumentError, and NumericError when logits, keys or values are NaN.
    """
    n = model.config.num_hidden_layers
    base, keep = (layer_types(name, 1, model.dtype)[0] if isinstance(name, str) else _bad(name) for name in (base, keep))
    if not isinstance(tolerance, int | float) or not 0 < tolerance < math.inf:
        raise ArgumentError(f"tolerance = {tolerance!r}, expected a number above 0, as 0.001 for 0.1 %")
    if rank_by not in ("damage", "attention"):
        raise ArgumentError(f"rank_by = {rank_by!r}, expected 'damage' or 'attention'")
    windows = text_windows(model, texts, tokenizer, min(WINDOW, model.config.max_positions) if window is None else window)
    how = {"write_buffer": write_buffer, "turn_keys": turn_keys, "page_size": page_size}
    how |= {"residual_length": residual_length, "sink_length": sink_length}
    report = cache_report(model, windows, base, window=max(map(len, windows)), **how, progress=progress)

    def types(kept):
        return [keep if layer in kept else base for layer in range(n)]

    def run(candidates, windows, title):
        return measure(model, candidates, windows, keep, title if progress else None, **how)

    if rank_by == "attention":
        sensitivity = report.layer("attention_error")
    else:
        lengths = np.cumsum([len(ids) for ids in windows])
        few = windows[: 1 + int(np.searchsorted(lengths, RANKED))]
        alone = run([types(set(range(n)) - {layer}) for layer in range(n)], few, "layers alone")
        sensitivity = np.array([damage for damage, _, _ in alone])
    order = np.argsort(-sensitivity, kind="stable").tolist()
    steps = {n: Measured(n, 0.0, 0.0, 0.0)}  # all kept: the reference itself
    low, high = 0, n  # `high` is known to be within the tolerance, all below `low` are not
    while low < high:
        kept = (low + high) // 2 if steps.keys() - {n} else 0  # none first: often that is enough
        steps[kept] = Measured(kept, *run([types(order[:kept])], windows, f"{kept} layers kept")[0])
        low, high = (low, kept) if steps[kept].damage <= tolerance else (kept + 1, high)
    sizes = []
    for dtypes in (types(order[:high]), [base] * n, [keep] * n):
        with KVCache(model, dtypes, max_tokens=1, **how) as cache:
            sizes.append(cache.stats()["bytes_per_token"])
    tried = [steps[kept] for kept in sorted(steps)]
    return CacheChoice(
        *(model.name, base, keep, float(tolerance), sum(map(len, windows)), types(order[:high]), steps[high], tried, rank_by, order),
        *(sensitivity, report, *sizes),
    )


def _bad(name):
    raise ArgumentError(f"found {name!r}, expected the name of an element type: the layers' types are what is chosen here")


def measure(model, candidates, windows, reference: str = "auto", title: str | None = None, **how):
    """(damage, loss_change, loss_error), as `Measured` has them, of each of the lists of layer types against a cache that is all `reference`, over
    all tokens of the windows (lists of token ids). title: of a progress bar. how: options of the caches."""
    windows = [np.asarray(ids) for ids in windows]
    rows = [[] for _ in candidates]
    with tqdm(total=len(windows) * (1 + len(candidates)), desc=title, unit="run", disable=title is None) as bar:
        for ids in windows:
            with KVCache(model, reference, max_tokens=len(ids)) as cache:
                right = model.forward(ids, cache.sequence())
            bar.update()
            for found, dtypes in zip(rows, candidates, strict=True):
                with KVCache(model, dtypes, max_tokens=len(ids), **how) as cache:
                    sequence = cache.sequence()
                    for piece in _pieces(len(ids)):
                        logits, targets = model.forward(ids[piece], sequence), ids[piece.start + 1 : piece.stop + 1]
                        found.append(compare(right[piece], logits, targets))
                bar.update()
    return [_summary(*map(np.concatenate, zip(*found, strict=True))) for found in rows]


def _summary(divergence, loss):
    return float(np.expm1(divergence.mean())), float(loss.mean()), float(loss.std() / math.sqrt(len(loss)))


def _pieces(n):
    """Slices of PIECE rows; none of a single row, which would be computed as a decode row."""
    starts = list(range(0, max(n - 1, 1), PIECE))
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], n], strict=True)]


def compare(right, found, targets):
    """KL(right || found) of float32 logits [rows, vocabulary], and the change of the loss of `targets`, one for each row or one fewer:
    (float64 [rows], float64 [targets])."""
    log_right, weights = _log_sum_exp(right)
    shift = _log_sum_exp(found)[0] - log_right
    difference = right - found
    divergence = (weights * difference).sum(axis=1, dtype=np.float64) / weights.sum(axis=1, dtype=np.float64) + shift
    n = len(targets)
    return np.maximum(divergence, 0), difference[np.arange(n), targets] + shift[:n]


def _log_sum_exp(logits):
    """float64 [rows], and exp(logits - the row's largest)."""
    largest = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - largest)
    return largest[:, 0] + np.log(weights.sum(axis=1, dtype=np.float64)), weights

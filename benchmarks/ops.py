"""Every operator of csrc/ops/ops.h on every instruction set, at the shapes of two models: time, GB/s, GFLOP/s and the share of the roofline.

`python benchmarks/ops.py` prints a table and writes results/ops_<date>.csv. The share is the time that the slower of the two limits (bytes over read
bandwidth, operations over peak) allows, divided by the time taken; both limits are measured in the same run (roofline.py). Weights and caches
rotate through 384 MB so that the last-level cache does not flatter; activations stay in the cache, as they do in a model, so shares of rmsnorm
and swiglu may pass 100 %. One thread is timed by its own CPU time, which other programs on the machine disturb less; several by the clock.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import roofline
from table import write_csv

from llmcoopt import _core

ROTATE_BYTES = 384 << 20
SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1}  # bytes of an element
PAGE = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model that operators see."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = (
    Shape("smollm2-135m", 576, 1536, 9, 3, 64, 49152),
    Shape("llama-7b", 4096, 11008, 32, 32, 128, 32000),
    Shape("llama-13b", 5120, 13824, 40, 40, 128, 32000),
)


@dataclasses.dataclass
class Case:
    """One row of the table: `call` runs the operator once; bytes and flops are what it must read (or write) and compute."""

    op: str
    what: str
    call: Callable[[], None]
    bytes: float
    flops: float
    unit: str = ""  # of roofline.UNITS, "": the float32 unit of the instruction set


def prompt_unit(isa: str, detail: str, dtype: str) -> str:
    """The unit of roofline.UNITS that products of a prompt run on, "" for the float32 unit."""
    if dtype != "bfloat16" or "bf16" not in detail.lower():
        return ""
    return "amx bf16" if isa == "amx" else "avx512 bf16"


class Bench:
    """Cases of one instruction set and thread count, over shared rotating memory."""

    def __init__(self, isa: str, threads: int, memory: np.ndarray):
        self.ctx = _core.OpContext(isa=isa, threads=threads)
        self.isa, self.memory, self.rng = isa, memory, np.random.default_rng(0)

    def floats(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def rotation(self, rows: int, k: int, dtype: str) -> Iterator[np.ndarray]:
        """Weight matrices [rows, k], each at another place of the memory."""
        element = np.dtype(np.float32 if dtype == "float32" else np.uint16)
        count = rows * k
        pool = self.memory.view(element)
        return itertools.cycle([pool[i * count : (i + 1) * count].reshape(rows, k) for i in range(max(1, len(pool) // count))])

    def linear(self, shape: Shape, m: int, prompt: bool, dtype: str) -> Iterator[Case]:
        h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        kind = "prompt" if prompt else "decode"
        unit = prompt_unit(self.isa, self.ctx.detail, dtype) if prompt else ""
        for name, k, outputs in (
            ("qkv", h, (q, kv, kv)),
            ("o", q, (h,)),
            ("gate+up", h, (shape.ffn, shape.ffn)),
            ("down", shape.ffn, (h,)),
        ):
            total, x = sum(outputs), self.floats(m, k)
            weights = self.rotation(total, k, dtype)
            outs = [np.empty((m, n), np.float32) for n in outputs]
            ends = list(itertools.accumulate(outputs))

            def call(x=x, weights=weights, outs=outs, ends=ends):
                w = next(weights)
                parts = [(out, w[end - out.shape[1] : end], dtype, None) for out, end in zip(outs, ends, strict=True)]
                self.ctx.linear(x, parts, m_prompt=len(x) if prompt else 0)

            yield Case("linear", f"{kind} {name} {total}x{k} m{m} {dtype}", call, total * k * SIZE[dtype], 2.0 * m * total * k, unit)

    def linear_quantized(self, shape: Shape, m: int, bits: int, group: int, int8: bool) -> Iterator[Case]:
        """Weights of 4 or 8 bits with float16 scales; integer products run at twice the rate of bfloat16's, of two bytes of x for each or one."""
        h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for name, k, outputs in (("qkv", h, (q, kv, kv)), ("o", q, (h,)), ("gate+up", h, (shape.ffn,) * 2), ("down", shape.ffn, (h,))):
            x, kind = self.floats(m, k), (bits, group, "float16", "none")
            outs = [np.empty((m, n), np.float32) for n in outputs]
            sizes = [_core.pack_size(n, k, *kind, False) for n in outputs]
            memory = self.memory.view(np.uint8)[-self.memory.ctypes.data % 64 :]
            sets = []
            for i in range(max(1, len(memory) // sum(sizes))):
                ends = [i * sum(sizes) + end for end in itertools.accumulate(sizes)]
                sets.append([memory[end - size : end] for end, size in zip(ends, sizes, strict=True)])
                for w, n in zip(sets[-1], outputs, strict=True):
                    _core.pack_begin(w, n, k, *kind, None)
            weights = itertools.cycle(sets)

            def call(x=x, weights=weights, outs=outs):
                parts = [(out, w, "quantized", None) for out, w in zip(outs, next(weights), strict=True)]
                self.ctx.linear_quantized(x, parts, x_int8=int8)

            what = f"{name} {sum(outputs)}x{k} m{m} int{bits} g{group}{' x int8' if int8 else ''}"
            unit = "" if self.isa == "avx2" else "avx512 bf16"
            yield Case("linear_quantized", what, call, sum(sizes), 2.0 * m * sum(outputs) * k, unit)

    def mlp(self, shape: Shape, m: int, dtype: str) -> Iterator[Case]:
        """gate, up, swiglu and down of a prompt in one."""
        h, f = shape.hidden, shape.ffn
        x, out, middle, weights = (
            self.floats(m, h),
            np.empty((m, h), np.float32),
            np.empty((2, m, f), np.float32),
            self.rotation(3 * f, h, dtype),
        )
        unit = prompt_unit(self.isa, self.ctx.detail, dtype)

        def call():
            w = next(weights)
            gate, up = ((middle[i], w[i * f : (i + 1) * f], dtype, None) for i in range(2))
            self.ctx.mlp(x, gate, up, (out, w[2 * f :].reshape(h, f), dtype, None), m_prompt=m)

        yield Case("mlp", f"prompt {f}x{h} m{m} {dtype}", call, 3 * f * h * SIZE[dtype], 6.0 * m * f * h, unit)

    def small(self, shape: Shape, m: int) -> Iterator[Case]:
        """embed, rmsnorm, swiglu."""
        h, f = shape.hidden, shape.ffn
        ids = self.rng.integers(0, shape.vocab, m).astype(np.int32)
        tables, out, x, weight = self.rotation(shape.vocab, h, "bfloat16"), np.empty((m, h), np.float32), self.floats(m, h), self.floats(h)
        yield Case("embed", f"{h} m{m} bfloat16", lambda: self.ctx.embed(out, ids, next(tables), "bfloat16"), m * h * (2 + 4), 0)
        yield Case("rmsnorm", f"{h} m{m}", lambda: self.ctx.rmsnorm(out, x, weight, 1e-5), m * h * 8, 4.0 * m * h)
        gate, up, product = self.floats(m, f), self.floats(m, f), np.empty((m, f), np.float32)
        yield Case("swiglu", f"{f} m{m}", lambda: self.ctx.swiglu(product, gate, up), m * f * 12, 12.0 * m * f)

    def caches(self, shape: Shape, tokens: int, dtype: str) -> Iterator[np.ndarray]:
        """Caches of one layer and sequence, each at another place of the memory (one cache of all of it when that is smaller)."""
        pool, page = self.memory.view(np.uint8), page_bytes(shape, dtype)
        size = min(-(-tokens // PAGE), len(pool) // page) * page
        return itertools.cycle([pool[i * size : (i + 1) * size] for i in range(max(1, len(pool) // size))])

    def cache_ops(self, shape: Shape, m: int, context: int, dtype: str) -> Iterator[Case]:
        """rope_append and attention of one sequence: m prompt rows after `context` tokens, or one decode row when m is 1."""
        h, g, d, tokens = shape.heads, shape.kv_heads, shape.head_dim, context + m
        where = {"dtype": dtype, "page_size": PAGE, "n_layers": 1, "layer": 0}
        table = np.arange(-(-tokens // PAGE)) % (ROTATE_BYTES // page_bytes(shape, dtype))
        item = (table.astype(np.int32), 0, m, context, m > 1)
        if SIZE[dtype] == 1:  # the blocks that the rows are in, in 16 bit
            tail = [np.zeros(blocks * 2 * 2 * 16 * g * d, np.uint8) for blocks in (1, 1, m // 16 + 2)]
            item = (*item, *tail)
        items = [item]
        q, k, v, out = self.floats(m, h, d), self.floats(m, g, d), self.floats(m, g, d), np.empty((m, h, d), np.float32)
        angle = self.floats(m, d // 2)
        cos, sin = np.cos(angle), np.sin(angle)
        caches = self.caches(shape, tokens, dtype)
        what = f"{h}/{g} heads {d} m{m} context {tokens} {dtype}"
        moved = m * d * (8 * h + (8 + 4 + 2 * SIZE[dtype]) * g)
        yield Case(
            "rope_append",
            what,
            lambda: self.ctx.rope_append(q, k, v, cos, sin, cache=next(caches), items=items, **where),
            moved,
            6.0 * m * d * h,
        )
        pairs = m * context + m * (m + 1) / 2
        yield Case(
            "attention",
            what,
            lambda: self.ctx.attention(out, q, cache=next(caches), n_kv_heads=g, items=items, scale=d**-0.5, **where),
            2.0 * tokens * g * d * SIZE[dtype],
            4.0 * pairs * h * d,
        )
        if m == 1:
            yield self.choice(shape, where | {"items": items, "n_kv_heads": g}, q, what)

    def choice(self, shape: Shape, where: dict, q: np.ndarray, what: str) -> Case:
        """choose_pages where few pages can be left out: the bounds are all alike."""
        table, _, _, context, *_ = where["items"][0]
        g, d, cache = shape.kv_heads, shape.head_dim, self.memory.view(np.uint8)
        chosen, counts, masses = (
            np.zeros((1, g, context // PAGE // 64 + 1), np.uint64),
            np.zeros((1, g, 2), np.int64),
            np.zeros((1, g), "f"),
        )
        bounds = np.full((len(cache) // page_bytes(shape, where["dtype"]), g, 2, d), 0x3F80, np.uint16)

        def call():
            self.ctx.choose_pages(chosen, counts, masses, q, bounds, cache, scale=d**-0.5, tolerance=0.01, **where)

        return Case("choose_pages", what, call, len(table) * g * 4.0 * d, 4.0 * len(table) * shape.heads * d)

    def cases(self, shape: Shape, ops: list[str], dtypes: list[str], cache_dtypes: list[str]) -> Iterator[Case]:
        every = []
        if "linear" in ops:
            every += [
                self.linear(shape, m, prompt, t)
                for t in dtypes
                for m, prompt in ((1, False), (4, False), (4, True), (64, True), (512, True))
            ]
        if "linear_quantized" in ops:
            kinds = [(m, 4, 128, False) for m in (1, 2, 4, 8, 64, 512)]
            kinds += [(1, 4, 32, False), (1, 8, 32, False), (512, 4, 32, False), (512, 4, 128, True)]
            every += [self.linear_quantized(shape, *kind) for kind in kinds]
        if "mlp" in ops:
            every += [self.mlp(shape, m, t) for t in dtypes for m in (64, 512)]
        if {"embed", "rmsnorm", "swiglu"} & set(ops):
            every += [self.small(shape, m) for m in (1, 512)]
        if {"rope_append", "attention", "choose_pages"} & set(ops):
            steps = ((1, 1023), (1, 8191), (1, 16383), (1, 65535), (512, 0), (512, 2048))
            every += [self.cache_ops(shape, m, context, t) for m, context in steps for t in cache_dtypes]
        for case in itertools.chain.from_iterable(every):
            if case.op in ops:
                yield case


def page_bytes(shape: Shape, dtype: str) -> int:
    """Bytes of a cache page of one layer. Scales are read from the noise too: bfloat16 noise is float32 noise."""
    scales = 2 * shape.kv_heads * PAGE // 16 * 4 if SIZE[dtype] == 1 else 0
    return -(-(2 * PAGE * shape.kv_heads * shape.head_dim * SIZE[dtype] + scales) // 64) * 64


def measure(call: Callable[[], None], seconds: float, clock: Callable[[], float]) -> float:
    """Median seconds of a call by `clock`, over about `seconds` in all and at least three."""
    call()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times)


def normal_bfloat16(size: int) -> np.ndarray:
    """`size` bytes of bfloat16 normal numbers (any float type reads them as ordinary numbers)."""
    block = (np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.resize(block, size // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["linear", "linear_quantized", "embed", "rmsnorm", "swiglu", "rope_append", "attention", "choose_pages"]
    parser.add_argument("--ops", nargs="*", default=known, choices=known)
    parser.add_argument("--isa", nargs="*", default=[isa for isa in _core.isas() if isa != "ref"], choices=_core.isas())
    parser.add_argument("--shapes", nargs="*", default=[s.name for s in SHAPES[:2]], choices=[s.name for s in SHAPES])
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], choices=list(SIZE)[:3], help="of the weights (default: bfloat16)")
    parser.add_argument("--cache-dtypes", nargs="*", default=["bfloat16", "fp8_e4m3"], choices=list(SIZE), help="of keys and values")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, roofline.cpu_count()}))
    parser.add_argument("--seconds", type=float, default=0.2, help="for each row")
    parser.add_argument("--csv", type=Path, help="file to write (default: results/ops_<date>.csv)")
    options = parser.parse_args()
    limits = roofline.measure(options.threads)
    memory = normal_bfloat16(ROTATE_BYTES)
    rows = []
    print(f"{'isa':<8}{'thr':>4}  {'shape':<14}{'op':<18}{'what':<44}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'share':>8}")
    for threads, isa in itertools.product(options.threads, options.isa):
        bench = Bench(isa, threads, memory)
        read, peaks = limits["read_best"][str(threads)], limits["flops"][str(threads)]
        for shape in (s for s in SHAPES if s.name in options.shapes):
            for case in bench.cases(shape, options.ops, options.dtypes, options.cache_dtypes):
                seconds = measure(case.call, options.seconds, time.thread_time if threads == 1 else time.perf_counter)
                unit = case.unit or ("avx2 f32" if isa in ("avx2", "ref") else "avx512 f32")
                floor = max(case.bytes / read, case.flops / peaks[unit] if unit in peaks else 0)
                row = {"isa": isa, "detail": bench.ctx.detail, "threads": threads, "shape": shape.name, "op": case.op, "what": case.what}
                row |= {"ms": round(seconds * 1e3, 5), "gb_s": round(case.bytes / seconds / 1e9, 2)}
                row |= {"gflop_s": round(case.flops / seconds / 1e9, 1), "share": round(floor / seconds, 3)}
                row |= {"read_gb_s": round(read / 1e9, 1), "peak_gflop_s": round(peaks.get(unit, 0) / 1e9, 1)}
                rows.append(row)
                print(
                    f"{isa:<8}{threads:>4}  {shape.name:<14}{case.op:<18}{case.what:<44}{row['ms']:>10.4f}{row['gb_s']:>8.1f}"
                    f"{row['gflop_s']:>9.1f}{row['share']:>8.1%}",
                    flush=True,
                )
    write_csv(rows, "ops", options.csv)


if __name__ == "__main__":
    main()

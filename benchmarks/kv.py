"""What the cache itself costs: opening room for millions of tokens, memory held, forks, and appending as one-byte codes.

`python benchmarks/kv.py` prints a table and writes results/kv_<date>.csv. Times are medians. The cost of appending is a decode step's with one-byte
codes less one's with bfloat16, taken by the operator alone (`ops.py --ops rope_append` at a position that completes a block, the dearest there is),
times the layers, over the step it is part of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from ops import Bench, Shape, measure
from random_models import SHAPES, write_folder
from table import write_csv

import llmcoopt

LONG = 65_576  # tokens of the sequence that is forked: inside a stretch of the write buffer, which a fork copies
TINY = (64, 32, 64, 1, 1, 1, True)  # as SHAPES: so small that LONG tokens are computed in seconds


def median_of(call, repeats: int = 21) -> float:
    """Median seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def load(folder: Path, shape: tuple, positions: int = 8192) -> llmcoopt.Model:
    write_folder(folder, shape)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return llmcoopt.Model.from_pretrained(folder)


def opening(model: llmcoopt.Model, dtype: str):
    """Room for ten million tokens, and the memory of a thousand."""
    yield "open, max_tokens 10,000,000", median_of(lambda: llmcoopt.KVCache(model, dtype, max_tokens=10_000_000).close()) * 1e3, "ms"
    with llmcoopt.KVCache(model, dtype, max_tokens=10_000_000) as cache:
        yield "memory before the first token", cache.stats()["resident_bytes"], "bytes"
        sequence = cache.sequence()
        model.forward(np.arange(1000) % 64, sequence, last_only=True)
        stats = cache.stats()
        yield "memory of 1,000 tokens", stats["resident_bytes"] / (1000 * stats["bytes_per_token"]), "of 1,000 tokens' bytes"
        yield "tails beside it", stats["tail_bytes"], "bytes"
        yield "bytes a token", stats["bytes_per_token"] / llmcoopt.KVCache(model, "bfloat16").stats()["bytes_per_token"], "of bfloat16's"


def forks(folder: Path, dtype: str):
    with load(folder, TINY, LONG + 8) as model, llmcoopt.KVCache(model, dtype, max_tokens=2 * LONG) as cache:
        sequence = cache.sequence()
        model.forward(np.arange(LONG) % 64, sequence, last_only=True)
        before = cache.stats()
        fork = sequence.fork()
        after = cache.stats()
        assert before["pages_free"] == after["pages_free"]
        yield f"fork, {LONG:,} tokens", median_of(lambda: sequence.fork().free(), 101) * 1e6, "us"
        yield "memory that a fork takes", after["tail_bytes"] - before["tail_bytes"], "bytes (tails)"
        model.forward([1], fork)
        yield "pages after a token more on the fork", before["pages_free"] - cache.stats()["pages_free"], "pages"


def appending(model: llmcoopt.Model, dtype: str):
    c = model.config
    shape = Shape("", c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.vocab_size)
    bench = Bench(model.isa, model.threads, np.zeros(64 << 20, np.uint8))
    seconds = {}
    for name in ("bfloat16", dtype):
        case = next(case for case in bench.cache_ops(shape, 1, 1023, name) if case.op == "rope_append")
        seconds[name] = measure(case.call, 0.5, time.perf_counter)
    with llmcoopt.KVCache(model, dtype, max_tokens=2048) as cache:
        sequence = cache.sequence()
        model.forward(np.arange(1000) % 64, sequence, last_only=True)
        step = median_of(lambda: model.forward([1], sequence), 31)
    yield (
        "append as codes, step that completes a block",
        (seconds[dtype] - seconds["bfloat16"]) * c.num_hidden_layers / step * 100,
        "% of the step",
    )


def plain_reads(folder: Path, total: int, run: int, threads: int) -> float:
    """Seconds to read a file of `total` bytes once, in runs of `run` bytes, by `threads`."""
    path = folder / "plain"
    with path.open("wb") as file:
        for at in range(0, total, 1 << 24):
            file.write(os.urandom(min(1 << 24, total - at)))
    file = os.open(path, os.O_RDONLY)

    def read(part: int) -> None:
        buffer = bytearray(run)
        for at in range(part * run, total, threads * run):
            os.preadv(file, [buffer], at)

    try:
        with ThreadPoolExecutor(threads) as pool:
            return median_of(lambda: list(pool.map(read, range(threads))), 5)
    finally:
        os.close(file)
        path.unlink()


def tiers(model: llmcoopt.Model, dtype: str, context: int):
    """A context ten times the memory for pages, against all in memory and against reading the file once."""
    ids = np.arange(context) % 64
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        pages = -(-(context + 64) // 64)
        with llmcoopt.KVCache(model, dtype, max_tokens=64) as cache:
            size = cache.stats()["page_bytes"]
        for name, options in {"memory": {}, "file": {"host_bytes": pages // 10 * size, "spill_path": folder}}.items():
            with llmcoopt.KVCache(model, dtype, max_tokens=pages * 64, **options) as cache:
                sequence = cache.sequence()
                model.forward(ids, sequence, last_only=True)
                before = cache.stats()
                seconds[name] = median_of(lambda sequence=sequence: model.forward([1], sequence), 9)
                after = cache.stats()
        fetched = (after["bytes_fetched"] - before["bytes_fetched"]) / 9
        plain = plain_reads(Path(folder), int(fetched), size // model.config.num_hidden_layers, model.threads)
    yield f"decode step at {context:,} tokens, all in memory", seconds["memory"] * 1e3, "ms"
    yield "a tenth of the pages in memory", seconds["file"] * 1e3, "ms"
    yield "read from the file for it", fetched / 1e6, "MB"
    yield "plain reads of as much, in the same runs", plain * 1e3, "ms"
    yield "share of the plain reads' speed", plain / (seconds["file"] - seconds["memory"] * (1 - fetched / (pages * size))) * 100, "%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="fp8_e4m3", choices=llmcoopt.cache.SCALED)
    parser.add_argument("--context", type=int, default=8192, help="tokens of the sequence of which a tenth is in memory")
    parser.add_argument("--csv", type=Path, help="file to write (default: results/kv_<date>.csv)")
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        load(Path(one), SHAPES["smollm2-135m"], options.context + 64) as model,
    ):
        found = [*opening(model, options.dtype), *appending(model, options.dtype), *forks(Path(other), options.dtype)]
        found += tiers(model, options.dtype, options.context)
        for what, value, unit in found:
            rows.append(
                {"isa": model.isa_detail, "threads": model.threads, "dtype": options.dtype, "what": what, "value": value, "unit": unit}
            )
            print(f"{what:46} {value:12,.4g} {unit}")
    write_csv(rows, "kv", options.csv)


if __name__ == "__main__":
    main()

"""Whole steps of a model: prompt tokens per second and the share of the machine's arithmetic they reach, milliseconds a decode step (median and
95th percentile) and the share of the read bandwidth, and what the engine and the sampler cost.

`python benchmarks/decode.py` times models with random bfloat16 weights in shapes of random_models.py; a folder or .gguf file times that model.
A decode step must read every weight matrix once (of the embedding only rows, unless it is the head too) and the cache of every sequence; the
share is these bytes over the step time, divided by the read bandwidth (roofline.py). Machines are noisy, so steps and probes of the machine
alternate: every few steps the bandwidth is measured again, the arithmetic before and after every prompt (a prompt's share is of the mean of
both), and shares are medians over these rounds. Steps are timed from Python, so they include all there is. Writes results/decode_<date>.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import roofline
from random_models import SHAPES, write_folder
from table import write_csv

import llmcoopt
from llmcoopt import _core
from llmcoopt.generation import Options

CHUNK = 512  # prompt tokens of a step
ROUND = 6  # decode steps between two probes of the bandwidth
PROMPTS = 9  # prompts timed


def step_bytes(model: llmcoopt.Model, tokens: float, bytes_per_token: int) -> float:
    """What a decode step must read: weights, and the cache of `tokens` tokens over all sequences."""
    embedding = (
        0 if model.config.tie_word_embeddings else next(row["memory"] for row in model.stored if row["modules"].endswith("embed_tokens"))
    )
    return model.weight_bytes - embedding + tokens * bytes_per_token


def prompt_flops(model: llmcoopt.Model, prompt: int) -> float:
    """Operations of a prompt's products, and of causal attention. The head, and in the last layer all that follows attention, is computed for one
    token alone."""
    c = model.config
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    before, after = d * (q + 2 * kv), d * q + 3 * d * c.intermediate_size
    matrices = prompt * (c.num_hidden_layers * before + (c.num_hidden_layers - 1) * after) + after + c.vocab_size * d
    return 2.0 * matrices + c.num_hidden_layers * 2.0 * q * prompt * (prompt + 1)


def peak_unit(model: llmcoopt.Model) -> str:
    """The unit of roofline.UNITS that the model's prompt products can use."""
    bfloat16 = model.dtype == "bfloat16" or any(row["kept"] for row in model.stored)
    if model.isa == "amx" and bfloat16:
        return "amx bf16"
    if model.isa in ("amx", "avx512"):
        return "avx512 bf16" if bfloat16 and "BF16" in model.isa_detail else "avx512 f32"
    return "avx2 f32"


class Probe:
    """Measures the machine, on the threads that the model uses."""

    def __init__(self, model: llmcoopt.Model):
        self.data, self.threads, self.unit = np.ones(roofline.READ_BYTES // 8), model.threads, peak_unit(model)
        rates = {ahead: roofline.read_bandwidth(self.data, self.threads, ahead, 3) for ahead in roofline.AHEAD}
        self.ahead = sorted(rates, key=rates.get)[-2:]  # the loops that are worth repeating

    def read(self) -> float:
        return max(roofline.read_bandwidth(self.data, self.threads, ahead, 1) for ahead in self.ahead)

    def peak(self) -> float:
        return roofline.peak_flops(self.unit, self.threads, 1)


def time_prompts(model: llmcoopt.Model, prompt: int, probe: Probe) -> dict:
    """One prompt of one sequence, several times, each between two probes."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, prompt).astype(np.int32)
    seconds, peaks = [], [probe.peak()]
    with llmcoopt.KVCache(model, "auto", max_tokens=prompt) as cache:
        for _ in range(PROMPTS):
            sequence = cache.sequence()
            began = time.perf_counter()
            model.forward(ids, sequence, last_only=True)
            seconds.append(time.perf_counter() - began)
            sequence.free()
            peaks.append(probe.peak())
    median, flops = float(np.median(seconds)), prompt_flops(model, prompt)
    shares = [flops / s / ((before + after) / 2) for s, before, after in zip(seconds, peaks, peaks[1:], strict=False)]
    return {
        "prompt": prompt,
        "prompt_tok_s": prompt / median,
        "prompt_gflop_s": flops / median / 1e9,
        "of_peak": float(np.median(shares)),
    }


def time_decode(model: llmcoopt.Model, batch: int, prompt: int, new: int, sampling: dict, probe: Probe) -> dict:
    """`batch` sequences that hold `prompt` tokens decode `new` steps, in rounds of a probe and some steps."""
    rng = np.random.default_rng(1)
    most = new + -(-batch * prompt // CHUNK)  # the first sequences decode while the last prompts are computed
    with llmcoopt.KVCache(model, "auto", max_tokens=batch * (prompt + most + 64)) as cache:
        engine = _core.Engine(cache._core, batch, CHUNK)
        options = Options(max_new_tokens=most, ignore_eos=True, **sampling)
        waiting = {
            engine.add(**options.request(rng.integers(0, model.config.vocab_size, prompt).astype(np.int32), model)) for _ in range(batch)
        }
        while waiting:  # for the first token of every prompt
            events = []
            engine.step(events)
            waiting -= {event[0] for event in events}
        before, steps, shares = engine.stats(), [], []
        need = step_bytes(model, batch * (prompt + new / 2), cache.stats()["bytes_per_token"])
        while engine.stats()["running"] == batch:
            read = probe.read()
            for _ in range(ROUND):
                began = time.perf_counter()
                engine.step([])
                steps.append(time.perf_counter() - began)
            shares.append(need / float(np.median(steps[-ROUND:])) / read)
        after = engine.stats()
        engine.close()
    spent = {k: after[k] - before[k] for k in ("forward_seconds", "sample_seconds", "other_seconds")}
    total, median = sum(steps), float(np.median(steps))
    return {
        "batch": batch,
        "new": new,
        "decode_tok_s": batch / median,
        "step_ms": median * 1e3,
        "step_p95_ms": float(np.percentile(steps, 95)) * 1e3,
        "gb_s": need / median / 1e9,
        "of_read": float(np.median(shares)),
        "sample_share": spent["sample_seconds"] / total,
        "engine_share": (total - spent["forward_seconds"] - spent["sample_seconds"]) / total,  # Python's part of a step included
    }


# title, width, key of a row, format
COLUMNS = (
    ("model", -16, "model", ""),
    ("isa", -22, "isa", ""),
    ("thr", 4, "threads", ""),
    ("batch", 6, "batch", ""),
    ("prompt t/s", 12, "prompt_tok_s", ".1f"),
    ("of peak", 8, "of_peak", ".1%"),
    ("decode t/s", 12, "decode_tok_s", ".1f"),
    ("ms/step", 9, "step_ms", ".2f"),
    ("p95", 8, "step_p95_ms", ".2f"),
    ("GB/s", 7, "gb_s", ".1f"),
    ("of read", 9, "of_read", ".1%"),
    ("sampler", 9, "sample_share", ".2%"),
    ("engine", 8, "engine_share", ".2%"),
)


def line(cell) -> str:
    """One line of the table; `cell` gives each column's text."""
    return "".join(f"{cell(title, key, form):{'<' if width < 0 else '>'}{abs(width)}}" for title, width, key, form in COLUMNS)


def bench(path, name: str, isa: str | None, options: argparse.Namespace) -> list[dict]:
    """Rows of one model on one instruction set, printed as they come."""
    sampling = {} if options.temperature is None else {"temperature": options.temperature, "top_p": 0.95, "seed": 1}
    rows = []
    with llmcoopt.Model.from_pretrained(path, isa=isa, threads=options.threads, weights=options.weights) as model:
        model.forward(list(range(8)), last_only=True)  # maps the file, grows the scratch
        probe = Probe(model)
        prompts = time_prompts(model, options.prompt, probe)
        for batch in options.batch:
            row = {"model": name, "isa": model.isa_detail, "threads": model.threads, **prompts}
            row |= time_decode(model, batch, options.prompt, options.new, sampling, probe)
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
            print(line(lambda _, key, form, row=row: format(row[key], form)), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2-135m", "llama-1b"], help=f"folder, .gguf file or one of {', '.join(SHAPES)}")
    parser.add_argument("--isa", nargs="*", default=[None], help="instruction sets (default: the best)")
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--weights", default="auto", help="dequantized: quantised weights are decoded to 16 bit")
    parser.add_argument("--temperature", type=float, help="sample with it and top_p 0.95 (default: greedy)")
    parser.add_argument("--csv", type=Path, help="file to write (default: results/decode_<date>.csv)")
    options = parser.parse_args()
    if options.new < 3 or options.prompt < 1 or min(options.batch) < 1:
        parser.error("--new must be at least 3, --prompt and --batch at least 1")
    rows = []
    print(line(lambda title, key, form: title))
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            if name in SHAPES:
                write_folder(Path(folder), SHAPES[name])
            for isa in options.isa:
                rows += bench(folder if name in SHAPES else name, name if name in SHAPES else Path(name).stem, isa, options)
    write_csv(rows, "decode", options.csv)


if __name__ == "__main__":
    main()

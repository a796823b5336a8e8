"""llmcoopt beside llama.cpp on 4-bit weights of one shape, alternating on the same threads.

    python benchmarks/random_models.py /tmp/g --shape llama-13b --layers 4
    python benchmarks/random_models.py /tmp/q4_0.gguf --shape llama-13b --layers 4 --format q4_0
    python benchmarks/llama_cpp_peer.py /tmp/g /tmp/q4_0.gguf

Needs llama-cpp-python (build it on the machine, so that it uses what the machine has). Each round computes a prompt and then decodes, one library
after the other; medians over the rounds, and the fastest. llmcoopt runs the first model, which may be a GPTQ folder or the .gguf file too, and the
.gguf file with `--same`. One thread is timed by its own processor time, which other programs on the machine disturb less; several by the clock,
on an idle machine only: llama.cpp's threads wait for each other by spinning. Writes results/llama_cpp_<date>.csv.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import roofline
from table import write_csv

import llmcoopt


def clock_of(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


class LlamaCpp:
    """llama.cpp by its C interface, on token ids."""

    def __init__(self, path: Path, threads: int, context: int, batch: int):
        self.clock = clock_of(threads)
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, batch, batch
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {path}")

    def run(self, ids: list[int]) -> float:
        """Seconds to compute ids after what is held."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        begun = self.clock()
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self.context)
        return self.clock() - begun

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


class Llmcoopt:
    def __init__(self, path: Path, threads: int, context: int, **options):
        self.clock = clock_of(threads)
        self.model = llmcoopt.Model.from_pretrained(path, threads=threads, **options)
        self.cache = llmcoopt.KVCache(self.model, max_tokens=context)
        self.sequence = self.cache.sequence()

    def run(self, ids: list[int]) -> float:
        begun = self.clock()
        self.model.forward(ids, self.sequence, last_only=True)
        return self.clock() - begun

    def clear(self) -> None:
        self.sequence.truncate(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="for llmcoopt")
    parser.add_argument("gguf", type=Path, help="for llama.cpp")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=roofline.cpu_count())
    parser.add_argument("--same", action="store_true", help="llmcoopt runs the .gguf file too")
    parser.add_argument("--int8", action="store_true", help="llmcoopt runs with activations of 8 bits too")
    parser.add_argument("--csv", type=Path, help="file to write (default: results/llama_cpp_<date>.csv)")
    options = parser.parse_args()
    quiet = llama_cpp.llama_log_callback(lambda level, text, user: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    context = options.prompt + options.steps + 64
    runs = {
        "llmcoopt": Llmcoopt(options.model, options.threads, context),
        "llama.cpp": LlamaCpp(options.gguf, options.threads, context, options.prompt),
    }
    if options.same:
        runs["llmcoopt, same file"] = Llmcoopt(options.gguf, options.threads, context)
    if options.int8:
        runs["llmcoopt, int8 activations"] = Llmcoopt(options.model, options.threads, context, activations="int8")
    ids = np.random.default_rng(1).integers(0, 32000, options.prompt).tolist()
    prompts, steps = {name: [] for name in runs}, {name: [] for name in runs}
    for one in runs.values():  # maps the files, grows the scratch
        one.run(ids[:8])
    for _ in range(options.rounds):
        for name, one in runs.items():
            one.clear()
            prompts[name].append(one.run(ids))
            steps[name] += [one.run([7]) for _ in range(options.steps)]
    rows = []
    load = os.getloadavg()[0]
    for name in runs:
        row = {"library": name, "model": options.gguf.name if name != "llmcoopt" else options.model.name, "threads": options.threads}
        row |= {"prompt_tok_s": round(options.prompt / statistics.median(prompts[name]), 1)}
        row |= {"prompt_best": round(options.prompt / min(prompts[name]), 1), "decode_tok_s": round(1 / statistics.median(steps[name]), 2)}
        row |= {"decode_best": round(1 / min(steps[name]), 2), "load": round(load, 1), "llama_cpp_python": llama_cpp.__version__}
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    write_csv(rows, "llama_cpp", options.csv)


if __name__ == "__main__":
    main()

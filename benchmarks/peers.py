"""llmcoopt beside other libraries, on one machine with the same weights, threads and number type (bfloat16).

`python benchmarks/peers.py` takes SmolLM2-135M (fetched once; MODEL names another .gguf file or folder of a Llama). All libraries get the same
arrays, so nothing differs but the code that computes. Runs alternate, one of each library in turn, so that a change of the machine's load
meets all; the table gives medians and the slowest and fastest run. Before the clock starts, the logits of the prompt are compared.

prefill: PREFILL tokens at once, logits of the last. decode: STEPS tokens one by one, greedy, contexts from CONTEXT - STEPS / 2 to CONTEXT +
STEPS / 2; for a peer this is a bare loop over its forward, less work than its own generate() does. A library that is not installed is skipped
with a message. Writes results/peers_<date>.csv. Run it on an idle machine: threads that wait for each other by spinning, as PyTorch's do, lose far
more than others when something else takes a CPU from them; the load at the start is in the results.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from table import write_csv

import llmcoopt
from llmcoopt import loaders
from llmcoopt.loaders import smollm2

CONTEXT, STEPS, PREFILL = 128, 64, 512
PAUSE = 0.3  # seconds between runs: the threads of the library before stop spinning
GOALS = {"decode": 2.0, "prefill": 1.5}  # llmcoopt over a peer


class Llmcoopt:
    """The package under test."""

    name, version = "llmcoopt", llmcoopt.__version__

    def __init__(self, checkpoint, threads: int):
        self.model = llmcoopt.Model(checkpoint, threads=threads)

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [vocab]: the logits after `ids`."""
        return self.model.forward(ids, last_only=True)

    def prefill(self, ids: list[int]) -> float:
        """Seconds to compute `ids` from an empty cache."""
        with llmcoopt.KVCache(self.model, "auto", max_tokens=len(ids)) as cache:
            sequence, begun = cache.sequence(), time.perf_counter()
            self.model.forward(ids, sequence, last_only=True)
            return time.perf_counter() - begun

    def decode(self, ids: list[int], steps: int) -> float:
        """Seconds for `steps` greedy tokens, the first of them (which computes the prompt) not counted."""
        with llmcoopt.generate(self.model, ids, max_new_tokens=steps + 1, temperature=0, ignore_eos=True) as generation:
            next(generation)
            begun = time.perf_counter()
            count = sum(1 for _ in generation)
            seconds = time.perf_counter() - begun
        if count != steps:
            raise RuntimeError(f"llmcoopt made {count} tokens after the first, expected {steps}")
        return seconds


class Transformers:
    """Hugging Face transformers on PyTorch, eager mode with its default attention (sdpa); the same methods."""

    name = "transformers"

    def __init__(self, checkpoint, threads: int):
        import torch
        import transformers

        self.torch, self.version = torch, f"{transformers.__version__} (torch {torch.__version__})"
        config = checkpoint.config
        if config.model_type != "llama" or config.rope.kind != "default":
            raise ValueError(f"model_type {config.model_type!r} with {config.rope.kind!r} rope: this benchmark runs plain Llamas")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias")
        shape = {name: getattr(config, name) for name in names}
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**shape, rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta})
            )
        weights = {name: self.tensor(tensor) for name, tensor in checkpoint.tensors.items()}
        model.load_state_dict(weights, strict=False, assign=True)
        model.tie_weights()
        missing = [name for name, weight in model.named_parameters() if weight.is_meta]
        if missing:
            raise ValueError(f"{checkpoint.path}: no weights for {', '.join(missing[:3])} of transformers' model")
        # Its rope buffers are not weights, so they are on no real device yet.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        self.model = model.eval()
        self.new_cache = transformers.DynamicCache
        known = inspect.signature(model.forward).parameters
        self.cache_argument = "past_key_values" if "past_key_values" in known else "cache"  # renamed in 5.x

    def tensor(self, tensor):
        """A loaded tensor as bfloat16; the copy leaves the file's mapping, which is read-only, to llmcoopt."""
        array, torch = tensor.numpy(), self.torch
        if array.dtype == np.uint16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(array.copy()).to(torch.bfloat16)

    def step(self, ids, cache):
        """Logits [1, 1, vocab] after `ids` [1, n]."""
        return self.model(ids, use_cache=True, logits_to_keep=1, **{self.cache_argument: cache}).logits

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.step(self.torch.tensor([ids]), self.new_cache())[0, -1].float().numpy()

    def prefill(self, ids: list[int]) -> float:
        ids, cache = self.torch.tensor([ids]), self.new_cache()
        begun = time.perf_counter()
        self.step(ids, cache)
        return time.perf_counter() - begun

    def decode(self, ids: list[int], steps: int) -> float:
        cache = self.new_cache()
        token = self.step(self.torch.tensor([ids]), cache).argmax(-1)
        begun = time.perf_counter()
        for _ in range(steps):
            token = self.step(token, cache).argmax(-1)
        return time.perf_counter() - begun


PEERS = {"transformers": Transformers}


def load_peers(names: list[str], checkpoint, threads: int) -> list:
    loaded = []
    for name in names:
        try:
            loaded.append(PEERS[name](checkpoint, threads))
        except ImportError as error:
            print(f"{name} is skipped: {error}; 'pip install llmcoopt[parity]' brings it", file=sys.stderr)
    return loaded


def bfloat16_checkpoint(path):
    """The checkpoint with its matrices in bfloat16, also where the file has another type."""
    return loaders.load(path, dtype="bfloat16")


def compare(libraries: list, ids: list[int]) -> dict[str, float]:
    """Relative distance of each peer's logits from the first library's; SystemExit when they are those of another model."""
    first = libraries[0].logits(ids)
    distances = {}
    for peer in libraries[1:]:
        logits = peer.logits(ids)
        distances[peer.name] = float(np.linalg.norm(logits - first) / np.linalg.norm(first))
        if not distances[peer.name] < 0.05:
            sys.exit(f"{peer.name}: logits differ from llmcoopt's by {distances[peer.name]:.3g} of their size; expected under 0.05")
    return distances


def measure(libraries: list, ids: list[int], rounds: int) -> dict[str, dict[str, list[float]]]:
    """{"prefill" | "decode": {library: tokens/s of each round}}, after one round for warming up."""
    prompt = ids[: CONTEXT - STEPS // 2]
    works: dict[str, tuple[int, Callable]] = {
        "prefill": (PREFILL, lambda library: library.prefill(ids[:PREFILL])),
        "decode": (STEPS, lambda library: library.decode(prompt, STEPS)),
    }
    rates = {work: {library.name: [] for library in libraries} for work in works}
    for turn in range(rounds + 1):
        for work, (tokens, run) in works.items():
            # The order turns as well: whoever runs first finds the machine as the one before left it.
            for library in libraries if turn % 2 else libraries[::-1]:
                time.sleep(PAUSE)
                seconds = run(library)
                print(f"round {turn} of {rounds}: {work}, {library.name}: {tokens / seconds:.1f} tokens/s", file=sys.stderr, flush=True)
                if turn:
                    rates[work][library.name].append(tokens / seconds)
    return rates


def rows_of(rates: dict, libraries: list, facts: dict) -> list[dict]:
    rows = []
    for work, of_library in rates.items():
        own = statistics.median(of_library[libraries[0].name])
        for library in libraries:
            runs = of_library[library.name]
            median = statistics.median(runs)
            rows.append(
                {
                    "work": work,
                    "library": library.name,
                    "version": library.version,
                    "tokens_per_second": round(median, 2),
                    "slowest": round(min(runs), 2),
                    "fastest": round(max(runs), 2),
                    "runs": len(runs),
                    "llmcoopt_is_times": round(own / median, 2),
                    **facts,
                }
            )
    return rows


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def print_table(rows: list[dict]) -> None:
    print(f"{'work':<9}{'library':<15}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}{'llmcoopt is':>14}{'goal':>8}")
    for row in rows:
        is_peer = row["library"] != Llmcoopt.name
        ratio = f"{row['llmcoopt_is_times']:.2f} x" if is_peer else ""
        goal = f"{GOALS[row['work']]:.1f} x" if is_peer else ""
        speeds = "".join(f"{row[key]:>10.1f}" for key in ("tokens_per_second", "slowest", "fastest"))
        print(f"{row['work']:<9}{row['library']:<15}{speeds}{ratio:>14}{goal:>8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a .gguf file or a folder (default: SmolLM2-135M, 93 MB, fetched once)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="for all libraries (default: %(default)s, all CPUs)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each library (%(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--csv", type=Path, help="file to write (default: results/peers_<date>.csv)")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    path = options.model or smollm2.fetch()
    checkpoint = bfloat16_checkpoint(path)
    peers = load_peers(options.peers, checkpoint, options.threads)
    if not peers:
        sys.exit("no peer is installed, so there is nothing to compare with")
    libraries = [Llmcoopt(checkpoint, options.threads), *peers]
    # Random ids are as good as text for timing, and need no tokenizer. Id 0 up to 2 are often special.
    ids = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, PREFILL).tolist()
    distances = compare(libraries, ids[:CONTEXT])
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): with more than one thread these figures say little", file=sys.stderr)
    facts = {
        "model": Path(path).name,
        "dtype": "bfloat16",
        "threads": options.threads,
        "isa": libraries[0].model.isa_detail,
        "cpu": cpu_name(),
        "load_at_start": round(load, 1),
        "date": datetime.date.today().isoformat(),
    }
    rows = rows_of(measure(libraries, ids, options.rounds), libraries, facts)
    if options.json:
        print(json.dumps({"rows": rows, "logits_distance": distances}, indent=1))
    else:
        print(f"{facts['model']}, bfloat16, {facts['threads']} threads, {facts['cpu']} ({facts['isa']})")
        print(
            f"prefill {PREFILL} tokens; decode {STEPS} tokens around a context of {CONTEXT}; medians of {options.rounds} alternating runs\n"
        )
        print_table(rows)
        print("\n" + "\n".join(f"{name}: logits within {distance:.1e} of llmcoopt's" for name, distance in distances.items()))
    write_csv(rows, "peers", options.csv)


if __name__ == "__main__":
    main()

"""What caches of several kinds do to a model's quality: perplexity of a text in windows, and accuracy on LAMBADA.

    python benchmarks/quality.py MODEL --text wiki.test.raw --lambada lambada_test.jsonl --caches bfloat16 fp8_e4m3 int8,turn_keys=False

The first cache is what the others are compared with, window by window: the change of perplexity and its standard error. Perplexity is that of tokens
(exp of the mean negative log likelihood), windows do not overlap, no token is put before them, the first token of each is not scored. A passage of
LAMBADA (openai form) counts when every token of its last word is the likeliest.
"""

import argparse
import ast
import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import llmcoopt

CHUNK = 512  # rows of logits held at once


def cache_options(text: str) -> tuple[str, dict]:
    """'int8,turn_keys=False' -> ('int8', {'turn_keys': False})."""
    dtype, *options = text.split(",")
    return dtype, {name: ast.literal_eval(value) for name, value in (option.split("=") for option in options)}


def window_nll(model, ids, cache: str) -> float:
    """The mean negative log likelihood of ids[1:]."""
    dtype, options = cache_options(cache)
    total = 0.0
    with llmcoopt.KVCache(model, dtype, max_tokens=len(ids), **options) as kv:
        sequence = kv.sequence()
        for at in range(0, len(ids), CHUNK):
            logits = model.forward(ids[at : at + CHUNK], sequence)
            targets = ids[at + 1 : at + 1 + len(logits)]
            rows = logits[: len(targets)]
            top = rows.max(1, keepdims=True)
            log_sums = np.log(np.exp(rows - top).sum(1)) + top[:, 0]
            total += float((log_sums - rows[np.arange(len(targets)), targets]).sum(dtype=np.float64))
    return total / (len(ids) - 1)


def perplexities(model, windows, caches) -> list[dict]:
    nll = np.array([[window_nll(model, ids, cache) for cache in caches] for ids in tqdm(windows, "perplexity", unit="window")])
    rows = []
    for i, cache in enumerate(caches):
        change = nll[:, i] - nll[:, 0]
        error = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        rows.append({"cache": cache, "windows": len(windows), "perplexity": f"{math.exp(nll[:, i].mean()):.4f}"})
        rows[-1] |= {"change_percent": f"{100 * math.expm1(change.mean()):+.3f}", "standard_error": f"{100 * error:.3f}"}
    return rows


def last_word_is_right(model, kv, prompt, word) -> bool:
    sequence = kv.sequence()
    logits = model.forward([*prompt, *word[:-1]], sequence)[-len(word) :]
    sequence.free()
    return logits.argmax(1).tolist() == word


def accuracies(model, passages, caches) -> list[float]:
    """Percent of the passages, (tokens before, tokens of the last word), for each cache."""
    right = []
    for cache in caches:
        dtype, options = cache_options(cache)
        with llmcoopt.KVCache(model, dtype, max_tokens=1024, **options) as kv:
            hits = [last_word_is_right(model, kv, *passage) for passage in tqdm(passages, f"LAMBADA {cache}", unit="passage")]
        right.append(100 * sum(hits) / len(hits))
    return right


def read_passages(path, tokenizer, skip, count):
    texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()[skip:][:count]]
    for text in texts:
        before, word = text.rsplit(" ", 1)
        yield tokenizer.encode(before, add_special_tokens=False), tokenizer.encode(" " + word, add_special_tokens=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", help="perplexity of this file")
    parser.add_argument("--window", type=int, default=2048, help="tokens that see each other")
    parser.add_argument("--windows", type=int, help="so many (default: all whole ones)")
    parser.add_argument("--skip", type=int, default=0, help="windows at the beginning left out")
    parser.add_argument("--lambada", help="accuracy on this file: JSON lines with `text`")
    parser.add_argument("--passages", type=int, help="so many (default: all)")
    parser.add_argument("--skip-passages", type=int, default=0, help="passages at the beginning left out")
    parser.add_argument("--caches", nargs="+", default=["bfloat16", "fp8_e4m3", "int8"], help="dtype, or dtype,option=value,...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    parser.add_argument("--csv", type=argparse.FileType("w"), default=sys.stdout)
    args = parser.parse_args()
    model = llmcoopt.Model.from_pretrained(args.model, threads=args.threads, isa=args.isa)
    tokenizer = llmcoopt.Tokenizer.from_pretrained(args.model)
    rows = [{"cache": cache} for cache in args.caches]
    if args.text:
        ids = tokenizer.encode(Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False)
        windows = [ids[at : at + args.window] for at in range(0, len(ids) - args.window + 1, args.window)][args.skip :][: args.windows]
        rows = perplexities(model, windows, args.caches)
        print(*rows, sep="\n", file=sys.stderr)
    if args.lambada:
        passages = list(read_passages(args.lambada, tokenizer, args.skip_passages, args.passages))
        for row, right in zip(rows, accuracies(model, passages, args.caches), strict=True):
            row |= {"passages": len(passages), "lambada_percent": f"{right:.2f}"}
    writer = csv.DictWriter(args.csv, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()

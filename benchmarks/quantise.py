"""Perplexity of a model in 16 bit and quantised in several ways, and how long quantising takes.

    python benchmarks/quantise.py MODEL --calib FILE --test FILE --out FOLDER [--ways 16bit rtn gptq order:columns ...]

A way is "16bit", or options joined by commas: "rtn", "gptq", "asym", "order:columns", "group:32", "bits:3", "mse:2.4". Each quantised folder stays
under --out and is taken from there when it exists. Perplexity: exp of the mean loss over the first --windows windows of --length tokens of the test
text, each by itself. Quality does not depend on how busy the machine is; seconds do."""

import argparse
import math
import time
from pathlib import Path

import numpy as np
from quality import window_nll

import llmcoopt as lc

PLAIN = {"rtn": {"method": "rtn"}, "gptq": {}, "asym": {"sym": False}}


def options_of(way):
    found = {}
    for part in way.split(","):
        name, _, value = part.partition(":")
        number = float(value) if "." in value else int(value) if value.lstrip("-").isdigit() else value
        found |= PLAIN[name] if not value else {name: number}
    return found


def perplexity(model, windows):
    return math.exp(np.mean([window_nll(model, ids, model.dtype) for ids in windows]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=["16bit", "rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    ids = lc.Tokenizer.from_pretrained(lc.loaders.resolve(args.model)).encode(args.test.read_text())
    windows = [ids[at : at + args.length] for at in range(0, args.windows * args.length, args.length)]
    windows = [np.array(window, np.int32) for window in windows if len(window) > 1]
    args.out.mkdir(parents=True, exist_ok=True)
    for way in args.ways:
        source, seconds = args.model, ""
        if way != "16bit":
            source = args.out / way.replace(":", "-").replace(",", "_")
            if not (source / "config.json").exists():
                how = options_of(way) | {"samples": args.samples, "length": args.length, "threads": args.threads}
                report = lc.quantize(args.model, source, args.calib, progress=False, **how)
                seconds = f"quantised in {report.seconds:.0f} s ({report.tokens:,} tokens), "
        begun = time.monotonic()
        with lc.Model.from_pretrained(source, threads=args.threads) as model:
            found = perplexity(model, windows)
        print(f"{way:24} perplexity {found:.4f}   {seconds}measured in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()

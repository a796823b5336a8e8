"""What cache element types do to a model: errors by layer, and which layers must keep 16 bit for a tolerance.

    python benchmarks/damage.py MODEL TEXT --dtypes fp8_e4m3 int8 --tolerances 0.001 0.003 --out damage.csv

TEXT is a file; its first --tokens tokens are measured, and the next ones tell how well a choice holds on text that it was not made on. Quality only:
the figures do not depend on how busy the machine is."""

import argparse
import csv
from pathlib import Path

import llmcoopt as lc
from llmcoopt.dtype_choice import measure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["fp8_e4m3", "int8"])
    parser.add_argument("--tolerances", nargs="*", type=float, default=[])
    parser.add_argument("--rank-by", choices=["damage", "attention"], default="damage")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV of the errors by layer")
    options = parser.parse_args()

    model = lc.Model.from_pretrained(options.model, threads=options.threads)
    text = options.text.read_text()[: 12 * options.tokens]
    ids = lc.Tokenizer.from_pretrained(model.tokenizer_source).encode(text)
    windows = [ids[at : at + options.window] for at in range(0, 2 * options.tokens, options.window)]
    texts, others = windows[: len(windows) // 2], windows[len(windows) // 2 :]
    print(model)
    reports = [lc.cache_report(model, texts, dtype, window=options.window) for dtype in options.dtypes]
    for report in reports:
        print(report)
    if options.out:
        with open(options.out, "w", newline="") as file:
            write = csv.writer(file, lineterminator="\n")
            write.writerow(["dtype", "layer", "key_error", "value_error", "attention_error"])
            for dtype, report in zip(options.dtypes, reports, strict=True):
                rows = zip(*(report.layer(name) for name in ("key_error", "value_error", "attention_error")), strict=True)
                write.writerows([dtype, layer, *(f"{x:.5f}" for x in row)] for layer, row in enumerate(rows))
    for dtype in options.dtypes:
        for tolerance in options.tolerances:
            choice = lc.choose_cache_dtype(model, texts, tolerance, dtype, rank_by=options.rank_by, window=options.window)
            print(choice)
            damage, loss, error = measure(model, [choice.dtypes], others)[0]
            print(f"  on the next {sum(map(len, others))} tokens: damage {damage:.4%}, loss {loss:+.5f} +- {error:.5f}")


if __name__ == "__main__":
    main()

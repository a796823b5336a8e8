"""The command line: llmcoopt demo | info | lint | quantize | generate | chat."""

import argparse
import json
import os
import sys
from pathlib import Path

from ._version import __version__
from .errors import ArgumentError, Error


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 after an error (said in one line on stderr), 130 after Ctrl-C; argparse exits with 2 on wrong usage.
    `lint` returns 1 when it finds something and 2 when there is nothing to look at."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except Error as error:
        print(f"llmcoopt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nllmcoopt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmcoopt", description="Run Llama-family language models.")
    parser.add_argument("--version", action="version", version=f"llmcoopt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    model_help = "a Hugging Face folder, a .gguf file, 'tiny' (inside this package), 'smollm2' (fetched once, 93 MB) or a hub id"

    demo = commands.add_parser("demo", help="write a short story (or chat with --model smollm2) and show speed and memory")
    demo.add_argument("--model", default="tiny", help=f"{model_help}; default tiny")
    demo.add_argument("--prompt", help="how the story begins, or the question to a chat model")
    _add_options(demo, max_new_tokens=200)
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what a model is: shape, bytes, cache size, instruction set")
    info.add_argument("model", metavar="MODEL", help=model_help)
    _add_common(info)
    info.set_defaults(run=_info)

    lint = commands.add_parser(
        "lint", help="check a model's files: exit status 0 when all is well, 1 with findings, 2 when there is no model"
    )
    lint.add_argument("path", metavar="PATH", help="a Hugging Face folder or a .gguf file")
    lint.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    lint.set_defaults(run=_lint)

    quantize = commands.add_parser("quantize", help="write a copy of a model with weights of 2, 3, 4 or 8 bits, in GPTQ's format")
    quantize.add_argument("model", metavar="MODEL", help=model_help)
    quantize.add_argument("out", metavar="OUT", help="the folder to make, or one that an interrupted run left, which is gone on with")
    _add_quantize_options(quantize)
    quantize.set_defaults(run=_quantize)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("model", metavar="MODEL", help=model_help)
    generate.add_argument("--prompt", required=True, help="the text to continue; '-' reads it from standard input")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end when this text appears; may be given several times"
    )
    _add_options(generate, max_new_tokens=128)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a model that has a chat template")
    chat.add_argument("model", metavar="MODEL", help=model_help)
    chat.add_argument("--system", help="the system message")
    chat.add_argument("--prompt", help="ask this one question and end")
    _add_options(chat, max_new_tokens=512)
    chat.set_defaults(run=_chat, refuse=chat.error)
    return parser


def _add_common(parser):
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--threads", type=int, default=0, help="default: all CPUs this process may use")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    parser.add_argument("--weights", default="auto", help="auto: quantised weights stay in their bits; dequantized: decoded to 16 bit")
    parser.add_argument("--activations", default="int16", help="in products with quantised weights: int16, or int8 (faster, less exact)")


def _add_quantize_options(parser):
    add = parser.add_argument
    add(
        "--calib",
        action="append",
        metavar="FILE",
        help="text that GPTQ learns from (a file, or the text itself); may be given several times",
    )
    add("--bits", type=int, default=4, help="2, 3, 4 or 8; default 4")
    add("--group", type=int, default=128, metavar="N", help="inputs that share a scale; -1: all of a row; default 128")
    add("--asym", action="store_true", help="zero points where the weights ask for them; else in the middle")
    add("--method", default="gptq", help="gptq, or rtn: round to nearest, which needs no text; default gptq")
    add("--format", help="how zero points are stored: gptq (less one) or gptq_v2; default gptq, with --asym gptq_v2")
    add("--desc-act", action="store_true", help="act-order: --order columns")
    add("--order", help="none, columns, static or groups: in which order columns are rounded (docs/quantization.md)")
    add("--damp", type=float, default=0.01, help="share of the Hessian's mean diagonal that is added to it; default 0.01")
    add(
        "--mse",
        type=float,
        default=0.0,
        metavar="P",
        help="search the range of each group for the smallest sum of |error|^P (2.4 is usual)",
    )
    add("--sink", type=float, default=1 / 16, metavar="S", help="share of a window that its first token counts as; default 0.0625")
    add("--samples", type=int, default=128, help="windows of text; default 128")
    add("--length", type=int, metavar="N", help="tokens of a window; default 2048, or the model's context")
    add("--seed", type=int, default=0, help="which windows are taken where the text has more; default 0")
    add("--threads", type=int, default=0, help="default: all CPUs this process may use")
    add("--restart", action="store_true", help="do not go on with what an interrupted run left in OUT")
    add("--json", action="store_true", help="print one JSON object instead of text")


def _add_options(parser, max_new_tokens):
    _add_common(parser)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--seed", type=int)


def _options(args) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(args, name) for name in names}


def _path(args):
    from . import loaders

    return loaders.smollm2.fetch() if args.model == "smollm2" else args.model


def _load(args):
    from .model import Model
    from .tokenizer import Tokenizer

    model = Model.from_pretrained(_path(args), dtype=args.dtype, threads=args.threads, weights=args.weights, activations=args.activations)
    return model, Tokenizer.from_pretrained(model.tokenizer_source)


def _demo(args):
    from . import demo

    model, tokenizer = _load(args)
    demo.run(model, tokenizer, args.prompt, _options(args), as_json=args.json)


def _info(args):
    from ._arrays import bytes_text

    model, tokenizer = _load(args)
    facts = {**model.facts(), "tokenizer": repr(tokenizer), "chat_template": tokenizer.chat_template is not None}
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    facts["parameters"] = f"{facts['parameters']:,}"
    facts["weight_bytes"] = bytes_text(facts["weight_bytes"])
    facts["cache_bytes_per_token"] = (
        f"{bytes_text(facts['cache_bytes_per_token'])} ({bytes_text(facts['cache_bytes_per_token'] * facts['context'])} at full context)"
    )
    width = max(map(len, facts))
    facts["stored"] = f"\n{'':{width}}  ".join(model.stored_lines())
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):{width}}  {value}")


def _lint(args):
    from . import loaders

    try:
        findings = loaders.lint(args.path)
    except Error as error:
        print(f"llmcoopt: {error}", file=sys.stderr)
        return 2
    errors = sum(finding.error for finding in findings)
    if args.json:
        rows = [loaders.finding_to_json(finding) for finding in findings]
        print(json.dumps({"path": args.path, "errors": errors, "warnings": len(findings) - errors, "findings": rows}, indent=2))
    else:
        for finding in findings:
            print(f"{'error' if finding.error else 'warning'}: {finding}")
        print(f"{args.path}: {errors} errors, {len(findings) - errors} warnings")
    return 1 if findings else 0


def _quantize(args):
    from ._arrays import bytes_text
    from .quantizer import quantize

    if args.desc_act and args.order not in (None, "columns"):
        raise ArgumentError(f"--desc-act means --order columns, but --order is {args.order!r}; expected one of them")
    names = ("bits", "group", "method", "format", "damp", "mse", "sink", "samples", "length", "seed", "threads")
    options = {name: getattr(args, name) for name in names}
    options |= {"sym": not args.asym, "order": args.order or ("columns" if args.desc_act else "none"), "resume": not args.restart}
    calib = [Path(text) if os.path.exists(text) else text for text in args.calib or ()]
    try:
        report = quantize(_path(args), args.out, calib, **options)
    except KeyboardInterrupt:
        print("\nllmcoopt: finished layers are kept: the same command goes on after them", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    groups = "rows" if args.group == -1 else f"groups of {args.group}"
    print(
        f"{args.out}: {report.matrices} matrices of {args.bits} bits in {groups}; "
        f"{bytes_text(report.source_bytes)} became {bytes_text(report.bytes)} in {report.seconds:.0f} s"
    )


def _generate(args):
    from .generation import generate

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    model, tokenizer = _load(args)
    generation = generate(model, prompt, tokenizer=tokenizer, stop_strings=args.stop, **_options(args))
    if args.json:
        _print_json(generation.run())
        return
    print(prompt, end="", flush=True)
    for piece in generation.pieces():
        print(piece, end="", flush=True)
    print()


def _chat(args):
    from .chat_session import ChatSession

    if args.json and args.prompt is None:
        args.refuse("--json needs --prompt: a conversation is not one JSON object")
    model, tokenizer = _load(args)
    session = ChatSession(model, tokenizer, system=args.system, **_options(args))
    if args.prompt is not None:
        generation = session.ask(args.prompt)
        if args.json:
            _print_json(generation.run())
        else:
            _stream(generation)
        return
    print(f"{model!r}\nAsk something. An empty line or Ctrl-D ends; Ctrl-C stops an answer.")
    while True:
        try:
            question = input("\n> ")
        except EOFError:
            print()
            return
        if not question.strip():
            return
        try:
            _stream(session.ask(question))
        except KeyboardInterrupt:
            print(" [stopped]")


def _stream(generation):
    with generation:
        for piece in generation.pieces():
            print(piece, end="", flush=True)
        print()


def _print_json(generation):
    print(
        json.dumps(
            {
                "text": generation.text,
                "prompt_ids": generation.prompt,
                "ids": generation.ids,
                "logprobs": generation.logprobs,
                "finish_reason": generation.finish_reason,
                "seed": generation.seed,
                "stats": generation.stats,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())

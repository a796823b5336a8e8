"""`llmcoopt demo`: a short story (or an answer) and what it cost, in a form that people like to read."""

import json
import resource
import shutil
import sys
import time

from ._arrays import bytes_text
from .chat_session import ChatSession
from .generation import generate

STORY = "Once upon a time, there was a little"
QUESTION = "Give me three tips for staying healthy."


class _Wrapped:
    """Prints words as they come, wrapped to the terminal."""

    def __init__(self, width: int, indent: str = "  "):
        self.width, self.indent, self.column, self.word = width, indent, 0, ""

    def put(self, text: str) -> None:
        for char in text:
            if char not in " \n":
                self.word += char
                continue
            self.flush()
            if char == "\n":
                print(flush=True)
                self.column = 0
            elif self.column:
                print(" ", end="", flush=True)
                self.column += 1

    def flush(self) -> None:
        if not self.word:
            return
        if self.column and self.column + len(self.word) > self.width:
            print()
            self.column = 0
        if self.column == 0:
            print(self.indent, end="")
            self.column = len(self.indent)
        print(self.word, end="", flush=True)
        self.column += len(self.word)
        self.word = ""


def run(model, tokenizer, prompt: str | None, options: dict, as_json: bool = False) -> None:
    """Generates with the model's own recommended sampling (generation_config.json) where `options` leaves it open."""
    is_chat = tokenizer.chat_template is not None
    prompt = prompt or (QUESTION if is_chat else STORY)
    advice = model.generation_config if options.get("temperature") is None else {}
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if advice.get("do_sample") and advice.get(name) is not None and options.get(name) in (None, 1.0):
            options[name] = advice[name]
    if options.get("seed") is None and not is_chat:
        options["seed"] = 1  # the same story every time
    started = time.perf_counter()
    if is_chat:
        generation = ChatSession(model, tokenizer, **options).ask(prompt)
    else:
        generation = generate(model, prompt, tokenizer=tokenizer, **options)
    if as_json:
        generation.run()
    else:
        _tell(model, prompt, generation, is_chat)
    seconds = time.perf_counter() - started
    facts = _facts(model, generation, seconds)
    if as_json:
        print(json.dumps({"model": model.facts(), "prompt": prompt, "text": generation.text, **facts}, indent=2))
    else:
        _table(facts)


def _tell(model, prompt, generation, is_chat):
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    print(f"{model!r}\n")
    paper = _Wrapped(width)
    if is_chat:
        print(f"> {prompt}\n")
    else:
        paper.put(prompt)
    for piece in generation.pieces():
        paper.put(piece)
    paper.flush()
    print("\n")
    sys.stdout.flush()


def _facts(model, generation, seconds) -> dict:
    stats = generation.stats
    cache = stats["cache"]
    engine = stats["engine"]
    total = engine["forward_seconds"] + engine["sample_seconds"] + engine["other_seconds"]
    return {
        "prompt_tokens": stats["prompt_tokens"],
        "new_tokens": stats["new_tokens"],
        "seconds": seconds,
        "time_to_first_token": stats["time_to_first_token"],
        "decode_tokens_per_second": stats["decode_tokens_per_second"],
        "engine_overhead": engine["other_seconds"] / total if total else None,
        "cache_tokens": stats["prompt_tokens"] + max(0, stats["new_tokens"] - 1),
        "cache_pages": cache["pages_total"] - cache["pages_free"],
        "cache_bytes": cache["resident_bytes"],
        "cache_bytes_per_token": cache["bytes_per_token"],
        "cache_dtype": generation.cache.dtype,
        "weight_bytes": model.weight_bytes,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "finish_reason": generation.finish_reason,
    }


def _table(facts):
    speed, first = facts["decode_tokens_per_second"], facts["time_to_first_token"]
    cache, element = bytes_text(facts["cache_bytes"]), facts["cache_dtype"]
    weights, peak = bytes_text(facts["weight_bytes"]), bytes_text(facts["peak_memory_bytes"])
    rows = {
        "tokens": f"{facts['prompt_tokens']} prompt + {facts['new_tokens']} new ({facts['finish_reason']})",
        "speed": f"{speed:.1f} tokens/s, {1e3 / speed:.2f} ms a token, first after {first * 1e3:.0f} ms"
        if speed
        else "one token is too few to tell",
        "cache": f"{facts['cache_tokens']} tokens in {facts['cache_pages']} pages, {cache} ({element})",
        "memory": f"{weights} of weights; {peak} at the peak of this process",
    }
    for name, text in rows.items():
        print(f"  {name:8} {text}")

"""Text generation: options, the iterator over one sequence, and whole batches.

Scores are processed in this order: repetition_penalty over prompt and output -> (eos banned before min_new_tokens) -> temperature -> top_k ->
top_p -> min_p -> one draw. The draw is a function of the request's seed and the position alone, so a request gives the same tokens whatever
runs beside it. (llama.cpp applies temperature last; Hugging Face has this order.)
"""

import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from . import _core
from ._arrays import as_ids, as_prompts
from .cache import KVCache, Sequence, of_model
from .errors import ArgumentError
from .streaming import TextStream, check_stop

_EMPTY = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Options:
    """How to generate, with Hugging Face's names.

    max_new_tokens: None: as far as the context goes. max_length: prompt + new, an alternative to max_new_tokens.
    min_new_tokens: no eos before. do_sample: None samples when temperature, top_k, top_p, min_p or seed is given.
    temperature: 0 means greedy. top_k: 0 off. top_p: 1 off. min_p: 0 off. repetition_penalty: 1 off.
    seed: None draws one (Generation.seed tells it). eos_token_id: an id or a list; None: the model's own and, with a tokenizer, the
    tokenizer's; [] or ignore_eos: none.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    eos_token_id: int | list[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self):
        if self.do_sample is not None:
            _flag("do_sample", self.do_sample)
        _flag("ignore_eos", self.ignore_eos)

    def sampling(self) -> bool:
        if self.do_sample is not None:
            return bool(self.do_sample) and self.temperature != 0
        given = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
        return self.temperature != 0 and any(value is not None for value in given)

    def new_tokens(self, n_prompt: int, held: int, context: int) -> int:
        """How many tokens may be generated after `held` + n_prompt."""
        room = context - held - n_prompt
        if room < 0:
            raise ArgumentError(
                f"the prompt of {n_prompt} tokens{f' after {held} held' if held else ''} is longer than the context of {context}"
            )
        if self.max_new_tokens is not None:
            return _whole("max_new_tokens", self.max_new_tokens)
        if self.max_length is not None:
            if _whole("max_length", self.max_length) < held + n_prompt:
                raise ArgumentError(
                    f"max_length = {self.max_length} is less than the prompt's {held + n_prompt} tokens; use max_new_tokens"
                )
            return self.max_length - held - n_prompt
        return room

    def request(self, prompt, model, sequence: Sequence | None = None, tokenizer=None) -> dict:
        """The arguments of _core.Engine.add."""
        held = len(sequence) if sequence is not None else 0
        sampling = self.sampling()
        return {
            "prompt": prompt,
            "max_new_tokens": self.new_tokens(len(prompt), held, model.config.max_positions),
            "eos": self._eos(model, tokenizer),
            "ignore_eos": bool(self.ignore_eos),
            "min_new_tokens": _whole("min_new_tokens", self.min_new_tokens),
            "do_sample": sampling,
            "temperature": 1.0 if self.temperature is None or not sampling else _number("temperature", self.temperature),
            "top_k": 0 if self.top_k is None else _whole("top_k", self.top_k),
            "top_p": 1.0 if self.top_p is None else _number("top_p", self.top_p),
            "min_p": 0.0 if self.min_p is None else _number("min_p", self.min_p),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty),
            "seed": _whole("seed", self.seed if self.seed is not None else secrets.randbits(63), 2**64 - 1),
            "sequence": sequence._core if sequence is not None else None,
        }

    def _eos(self, model, tokenizer) -> np.ndarray:
        size = model.config.vocab_size
        if self.eos_token_id is None:  # a GGUF file may name the end of a text alone, and its tokenizer know the end of a turn
            known = [i for i in tokenizer.eos_token_ids if i < size] if tokenizer is not None else []
            ids = list(dict.fromkeys([*model.config.eos_token_ids, *known]))
        else:
            many = isinstance(self.eos_token_id, Iterable) and getattr(self.eos_token_id, "ndim", 1) > 0
            ids = list(self.eos_token_id) if many else [self.eos_token_id]
        return as_ids(ids, size, "eos_token_id") if ids else _EMPTY


def _flag(name: str, value) -> None:
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name} = {value!r}, expected True or False")


def _whole(name: str, value, most: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= most:
        raise ArgumentError(f"{name} = {value!r}, expected a whole number from 0 to {most}")
    return int(value)


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ArgumentError(f"{name} = {value!r}, expected a number")
    return float(value)


class Generation:
    """An iterator over new token ids; made by `generate`.

    Attributes: ids (new tokens so far), logprobs (of each under the model's raw distribution), finish_reason (None while running, then "eos",
    "length", "stop", "cancelled" or "error", whose exception was raised), text (with a tokenizer; stop strings cut off), seed, stats. Iterate
    it, or call run(), or pieces() for text as it comes. After Ctrl-C it can go on: no token is lost. close() ends it early and returns its
    pages; so does a `with` block.
    """

    # The core puts events into _events before it returns; all else is derived from them, so an interrupt at any point leaves this consistent.

    def __init__(self, model, prompt, options: Options, cache, sequence, tokenizer, stop_strings, continues: bool):
        self.model, self.tokenizer = model, tokenizer
        self.finish_reason: str | None = None
        self._events: list[tuple] = []
        self._given = 0  # events that were handed out
        self._sequence = sequence
        request = options.request(prompt, model, sequence, tokenizer)
        self.prompt = prompt.tolist()
        before = [*(sequence.ids if sequence is not None else []), *self.prompt] if continues else []
        self._text = _Text(tokenizer, stop_strings, before) if tokenizer is not None else None
        self.seed = request["seed"] if request["do_sample"] else None
        self._own_cache = cache is None and sequence is None
        if self._own_cache:
            cache = KVCache(model, "auto", max_tokens=len(prompt) + max(1, request["max_new_tokens"]))
        self.cache = cache if sequence is None else sequence.cache
        if sequence is None:  # held until close(), so that stats can tell what the cache held
            request["sequence"] = self._core_sequence = self.cache._core.sequence()
        self._engine = _core.Engine(self.cache._core, max_batch=1)
        self._started, self._first, self._last = time.perf_counter(), None, None
        self._final_stats: dict = {}
        self._closed = False
        self._closing = threading.RLock()  # close() in two threads, or in a signal handler while it runs
        try:
            self._engine.add(**request)
        except BaseException:
            self.close()
            raise
        model._generations.add(self)

    def __iter__(self):
        return self

    def __next__(self) -> int:
        while self._given == len(self._events):
            if self.finish_reason is not None:
                raise StopIteration
            self._engine.step(self._events)
        _, token, _, finish, error = self._events[self._given]
        self._last = time.perf_counter()
        self._first = self._first or self._last
        if error is not None:
            self._finish("error")
            raise error
        if self._text is not None and self._text.feed(self._events).stopped:
            finish = "stop"
        if finish is not None:
            self._finish(finish)
        self._given += 1
        if token < 0:
            raise StopIteration
        return token

    @property
    def ids(self) -> list[int]:
        return [event[1] for event in self._events if event[1] >= 0]

    @property
    def logprobs(self) -> list[float]:
        return [event[2] for event in self._events if event[1] >= 0]

    def _finish(self, reason: str) -> None:
        if self._text is not None:
            self._text.feed(self._events, last=True)
        self.finish_reason = self.finish_reason or reason
        self.close()

    def pieces(self):
        """Text as it comes: yields strings whose concatenation is `text`. Needs a tokenizer."""
        if self._text is None:
            raise ArgumentError("pieces() needs text: pass tokenizer= to generate")
        shown = 0
        for _ in self:
            pieces = self._text.pieces
            new, shown = "".join(pieces[shown:]), len(pieces)
            if new:
                yield new

    def run(self) -> "Generation":
        """Generates to the end; returns self."""
        for _ in self:
            pass
        return self

    @property
    def text(self) -> str:
        """The new text so far, whole characters only, without what may be the beginning of a stop string."""
        return "".join(self._text.feed(self._events, last=self._closed).pieces) if self._text is not None else ""

    @property
    def stats(self) -> dict:
        """prompt_tokens, cached_tokens (those of them that were found in the cache's prefix index and not computed; of a preempted request, the
        first time), new_tokens, seconds to the first token, decode_tokens_per_second, cache (its stats), engine (steps and seconds)."""
        first, last, n = self._first, self._last, len(self.ids)
        with self._closing:
            core = self._final_stats or self._core_stats()
        return {
            "prompt_tokens": len(self.prompt),
            "cached_tokens": core["engine"]["cached_tokens"],
            "new_tokens": n,
            "time_to_first_token": first - self._started if first else None,
            "prompt_tokens_per_second": len(self.prompt) / (first - self._started) if first else None,
            "decode_tokens_per_second": (n - 1) / (last - first) if n > 1 and last > first else None,
            **core,
        }

    def _core_stats(self) -> dict:
        return {"cache": self.cache.stats(), "engine": self._engine.stats()}

    def close(self) -> None:
        """Ends the generation and returns its pages (a sequence that was passed keeps its tokens). Any thread may call it, several at once too:
        when it returns, the pages are back."""
        with self._closing:
            if self._closed:
                return
            self.finish_reason = self.finish_reason or "cancelled"
            self._final_stats = self._final_stats or self._core_stats()
            self._engine.close()
            if self._sequence is None:
                self._core_sequence.free()
            if self._own_cache:
                self.cache.close()
            self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        state = self.finish_reason or "running"
        return f"Generation({len(self.prompt)} prompt + {len(self.ids)} new tokens, {state})"


class _Text:
    """The text of a growing list of events after the ids `before`, in pieces. Begins again when an interrupt came into the middle of its
    work."""

    def __init__(self, tokenizer, stop_strings, before: list[int]):
        self._make = lambda: TextStream(tokenizer, stop=stop_strings, after=before)
        self._begin()

    def _begin(self):
        self._stream = self._make()
        self.pieces: list[str] = []
        self._fed, self._ended, self._busy = 0, False, False

    def feed(self, events: list[tuple], last: bool = False) -> "_Text":
        if self._busy:
            self._begin()
        self._busy = True
        while self._fed < len(events) and not self.stopped:
            _, token, _, finish, _ = events[self._fed]
            if token >= 0 and finish != "eos":
                self.pieces.append(self._stream.put(token))
            self._fed += 1
        if last and not self._ended and not self.stopped:
            self.pieces.append(self._stream.finish())
            self._ended = True
        self._busy = False
        return self

    @property
    def stopped(self) -> bool:
        return self._stream.stopped


def generate(
    model, ids, *, tokenizer=None, stop_strings=None, cache=None, sequence: Sequence | None = None, continues: bool = True, **options
) -> Generation:
    """Generates from one prompt; returns an iterator over the new token ids.

    Args:
        model: a Model.
        ids: the prompt's token ids (or a string, with a tokenizer).
        tokenizer: gives the result `.text` and allows stop_strings; its end tokens end the generation too.
        stop_strings: a string or list; generation ends when one appears in the new text, also across tokens. They are cut from `.text`.
        cache: a KVCache to take pages from; None: one of its own, as large as needed.
        sequence: a Sequence to go on with; the prompt is appended to what it holds, and it keeps prompt and output afterwards (the last token
            is not computed yet, so not held).
        continues: the prompt's text and `.text` join to the text of all ids: a blank between them is kept. False: `.text` is a text of its own,
            as a chat's answer is; vocabularies that put a blank before every text (SentencePiece) lose their first one.
        **options: the fields of `Options`: max_new_tokens, temperature, top_p, seed, ...

    Raises ArgumentError for a wrong option, OutOfPagesError, NumericError.
    """
    if isinstance(ids, str):
        if tokenizer is None:
            raise ArgumentError("ids: found a string; pass tokenizer= too, or token ids")
        ids = tokenizer.encode(ids)
    stop = _stops(stop_strings, tokenizer)
    _flag("continues", continues)
    if cache is not None:
        of_model(cache, KVCache, model, "cache")
    if sequence is not None:
        of_model(sequence, Sequence, model, "sequence")
        if cache is not None and sequence.cache is not cache:
            raise ArgumentError("sequence: it belongs to another cache than the one passed")
    return Generation(model, as_ids(ids, model.config.vocab_size), _options(options), cache, sequence, tokenizer, stop, continues)


def _stops(stop_strings, tokenizer) -> tuple[str, ...]:
    """Stop strings, checked; the tokenizer that they need, too."""
    if tokenizer is not None and not hasattr(tokenizer, "stream_decoder"):
        raise ArgumentError(f"tokenizer: expected an llmcoopt.Tokenizer, found {type(tokenizer).__name__}")
    if isinstance(stop_strings, Iterable) and not isinstance(stop_strings, str | bytes):
        stop_strings = list(stop_strings)
    stops = check_stop(stop_strings, "stop_strings")
    if stops and tokenizer is None:
        raise ArgumentError("stop_strings need text: pass tokenizer=")
    return stops


def _options(options: dict) -> Options:
    unknown = options.keys() - Options.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; known: {', '.join(Options.__dataclass_fields__)}")
    return Options(**options)


@dataclass
class GenerationOutput:
    """Result of generate_batch(return_dict_in_generate=True), a row per prompt."""

    sequences: list[list[int]]  # prompt + new ids
    new_ids: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    errors: list[Exception | None]
    stats: dict = field(default_factory=dict)
    texts: list[str] | None = None  # of the new ids, stop strings cut off; None without a tokenizer


def generate_batch(
    model,
    input_ids,
    *,
    attention_mask=None,
    tokenizer=None,
    stop_strings=None,
    cache=None,
    max_batch: int = 64,
    return_full: bool = True,
    return_dict_in_generate: bool = False,
    progress: bool = False,
    **options,
):
    """Generates for many prompts at once.

    Args:
        input_ids: a list of lists of token ids, of any lengths, or an array [n, length] (then attention_mask tells padding: 0), or what a
            tokenizer returned.
        tokenizer: gives the GenerationOutput texts and allows stop_strings; its end tokens end a row too.
        stop_strings: a string or list; a row ends when one appears in its new text. The ids of the row include it, the text does not.
        max_batch: sequences computed at once; the others wait.
        return_full: rows are prompt + new ids, as Hugging Face returns them; False: new ids alone.
        return_dict_in_generate: a GenerationOutput instead, where a row that failed has its error and the others their result.
        progress: a bar over the prompts.
        **options: the fields of `Options`; `seed` may be a list, a seed per prompt. With one seed every row draws as it would alone.

    Returns a list of lists. Without return_dict_in_generate the first error of any row is raised, after the others were stopped.
    """
    stops = _stops(stop_strings, tokenizer)
    prompts = as_prompts(input_ids, attention_mask, model.config.vocab_size)
    seeds = options.pop("seed", None)
    seeds = list(seeds) if isinstance(seeds, list | tuple | np.ndarray) else [seeds] * len(prompts)
    if len(seeds) != len(prompts):
        raise ArgumentError(f"seed: {len(seeds)} seeds for {len(prompts)} prompts")
    requests = [
        _options({**options, "seed": seed}).request(prompt, model, tokenizer=tokenizer) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    texts = [_Text(tokenizer, stops, prompt.tolist()) for prompt in prompts] if tokenizer is not None else None
    if any(seed is not None for seed in seeds) and options.get("do_sample") is None and options.get("temperature") != 0:
        for request in requests:  # one seeded row makes the whole batch sample
            request["do_sample"] = True
    own = cache is None
    if not own:
        of_model(cache, KVCache, model, "cache")
        given = input_ids["input_ids"] if isinstance(input_ids, Mapping) else input_ids
        cache._skipped["padding"] += sum(np.size(row) for row in given) - sum(map(len, prompts))
    else:
        longest = sorted((len(r["prompt"]) + r["max_new_tokens"] for r in requests), reverse=True)[:max_batch]
        cache = KVCache(model, "auto", max_tokens=max(1, sum(-(-n // 64) * 64 for n in longest)))
    try:
        output = _run_batch(cache, requests, texts, max_batch, return_dict_in_generate, progress)
    finally:
        if own:
            cache.close()
    if return_dict_in_generate:
        return output
    return output.sequences if return_full else output.new_ids


def _run_batch(cache, requests, texts, max_batch, keep_errors, progress) -> GenerationOutput:
    n = len(requests)
    told: list[list[tuple]] = [[] for _ in range(n)]  # the events of each row
    output = GenerationOutput([], [[] for _ in range(n)], [[] for _ in range(n)], [""] * n, [None] * n)
    engine = _core.Engine(cache._core, max_batch=max(1, min(max_batch, n)))
    try:
        rows = {engine.add(**request): i for i, request in enumerate(requests)}
        with tqdm(total=n, unit="prompt", disable=not progress) as bar:
            while rows:
                events = []
                engine.step(events)
                for event in events:
                    request, token, logprob, finish, error = event
                    i = rows[request]
                    if error is not None and not keep_errors:
                        raise error
                    if token >= 0:
                        output.new_ids[i].append(token)
                        output.logprobs[i].append(logprob)
                    told[i].append(event)
                    if texts is not None and texts[i].feed(told[i]).stopped:
                        if finish is None:
                            engine.cancel(request)
                        finish = "stop"
                    if finish is not None:
                        output.finish_reasons[i], output.errors[i] = finish, error
                        del rows[request]
                        bar.update()
        output.stats = {"cache": cache.stats(), "engine": engine.stats()}
    finally:
        engine.close()
    if texts is not None:
        output.texts = ["".join(text.feed(events, last=True).pieces) for text, events in zip(texts, told, strict=True)]
    output.sequences = [request["prompt"].tolist() + new for request, new in zip(requests, output.new_ids, strict=True)]
    return output

"""Closing in one thread what other threads use: they get an error that says so, nothing crashes, and closing does not wait long.

Scripts run in an interpreter of their own, as a failure is a crash or a hang."""

import pytest
from checkpoints import make

BEGIN = """
import sys, threading, time
import llmcoopt
from llmcoopt import _core
from llmcoopt.errors import ArgumentError

model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=1)
ids = [i % 53 for i in range(400)]
errors = []

def start(work, *args):
    '''Runs work(*args) again and again in a thread until it raises; anything but "closed" is noted in errors.'''
    def run():
        try:
            while True:
                work(*args)
        except ArgumentError as error:
            if "closed" not in str(error) and "freed" not in str(error):
                errors.append(error)
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread

def join(*threads):
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors, errors

def rounds(seconds):
    '''Numbers a round after the other; the rest of it varies with the number.'''
    end = time.monotonic() + seconds
    n = 0
    while time.monotonic() < end:
        yield n
        n += 1

def keep_busy(model):
    '''Holds the model's lock nearly all the time, so that other calls wait for it.'''
    cache = llmcoopt.KVCache(model, "auto", max_tokens=4096)
    def work():
        seq = cache.sequence()
        model.forward(ids, seq, last_only=True)
        seq.free()
    return [start(work) for _ in range(2)]
"""


@pytest.fixture
def folder(tmp_path):
    make(tmp_path, hidden_size=96, intermediate_size=200, max_position_embeddings=1024)
    return tmp_path


def test_generation_closed_while_another_thread_iterates_it(folder, run_script):
    run_script(
        BEGIN
        + """
busy = keep_busy(model)
for n in rounds(4):
    run = llmcoopt.generate(model, [1, 2, 3], max_new_tokens=500, ignore_eos=True)
    thread = start(lambda: next(run))
    time.sleep(0.002 * (n % 5))
    run.close()
    thread.join(20)
    assert not thread.is_alive()
assert all(isinstance(e, StopIteration) for e in errors), errors  # finished before the close
errors.clear()
model.close()
join(*busy)
""",
        folder,
    )


def test_generation_closed_by_several_threads(folder, run_script):
    """None of them fails or waits for ever, the pages are back when any of them returns, and what it said and counted can be asked for."""
    run_script(
        BEGIN
        + """
sys.setswitchinterval(1e-6)
shared = llmcoopt.KVCache(model, "auto", max_tokens=4096)
for n in rounds(4):
    cache = shared if n % 2 else None
    run = llmcoopt.generate(model, [1, 2, 3], cache=cache, max_new_tokens=500, ignore_eos=True)
    tokens = [next(run) for _ in range(n % 3)]
    barrier = threading.Barrier(4)
    def work(call):
        try:
            barrier.wait()
            call()
            if call == run.close and cache is not None:
                assert cache.stats()["tokens_held"] == 0, "pages are not back"
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=work, args=(call,)) for call in (run.close, run.close, run.close, lambda: run.stats)]
    [t.start() for t in threads]
    join(*threads)
    assert run.finish_reason == "cancelled" and run.ids == tokens
    assert run.stats["new_tokens"] == len(tokens) and run.stats["engine"]["prompt_tokens"] == (3 if tokens else 0)
    shared.check()
    run.close()
model.close()
""",
        folder,
    )


def test_engine_calls_while_it_is_closed(folder, run_script):
    run_script(
        BEGIN
        + """
import numpy as np
busy = keep_busy(model)
cache = llmcoopt.KVCache(model, "auto", max_tokens=1 << 16)
prompt, none = np.arange(20, dtype=np.int32), np.zeros(0, dtype=np.int32)
for n in rounds(4):
    engine = _core.Engine(cache._core, max_batch=4)
    def add():
        engine.add(prompt, 8, none, True, 0, False, 1.0, 0, 1.0, 0.0, 1.0, 0, cache._core.sequence())
    threads = [start(add), start(engine.step, []), start(engine.check), start(engine.stats), start(engine.cancel, 3)]
    time.sleep(0.002 * (n % 5))
    engine.close()
    join(*threads)
    assert cache.stats()["tokens_held"] == 0
    cache.check()
cache.close()
model.close()
join(*busy)
""",
        folder,
    )


def test_cache_closed_while_other_threads_use_it(folder, run_script):
    run_script(
        BEGIN
        + """
busy = keep_busy(model)
for n in rounds(4):
    cache = llmcoopt.KVCache(model, "auto", max_tokens=8192)
    a, b, c = (cache.sequence() for _ in range(3))
    model.forward(ids[:40], a)
    def forward():
        model.forward([1], c)
        c.truncate(0)
    def generate():
        llmcoopt.generate(model, [1], cache=cache).close()
    threads = [start(cache.stats), start(cache.check), start(cache.sequence), start(len, a), start(a.fork), start(b.truncate, 0),
               start(forward), start(generate)]
    time.sleep(0.002 * (n % 5))
    while True:
        try:
            cache.close()
            break
        except ArgumentError as error:
            assert "running generation" in str(error), error
    join(*threads)
    del threads, a, b, c
model.close()
join(*busy)
""",
        folder,
    )


def test_a_sequence_is_not_freed_under_a_call(folder, run_script):
    """Truncated, freed or given to a generation by another thread while a call on it waits: one of the two is refused."""
    run_script(
        BEGIN
        + """
busy = keep_busy(model)
cache = llmcoopt.KVCache(model, "auto", max_tokens=8192)
refused = []
def work(call):
    try:
        call()
    except ArgumentError as error:
        refused.append(str(error))
def run(seq):
    run = llmcoopt.generate(model, [1, 2], sequence=seq, max_new_tokens=3)
    run._engine.check()
    next(run)
    run._engine.check()
    run.close()
for n in rounds(3):
    seq = cache.sequence()
    model.forward(ids[:40], seq)
    calls = [lambda: run(seq), lambda: seq.truncate(5), seq.fork, seq.free, lambda: run(seq)]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    [t.start() for t in threads]
    join(*threads)
    cache.check()
assert all("use" in text or "freed" in text for text in refused), set(refused)
model.close()
join(*busy)
""",
        folder,
    )


def test_core_model_closed_while_other_threads_use_it(folder, run_script):
    run_script(
        BEGIN
        + """
import numpy as np
model.close()
for n in rounds(4):
    model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=1)
    cache = llmcoopt.KVCache(model, "auto")
    logits = np.zeros(53, np.float32)
    def forward():
        seq = cache._core.sequence()
        model._core.forward(seq, np.array(ids, np.int32), logits, True)
    def engine():
        _core.Engine(cache._core).close()
    threads = [start(llmcoopt.KVCache, model, "auto", 64, 64), start(model._core.info), start(forward), start(engine)]
    time.sleep(0.002 * (n % 5))
    model._core.close()
    join(*threads)
""",
        folder,
    )


def test_model_close_ends_the_calls_of_other_threads(folder, run_script):
    """Whatever they run, and whoever made the cache; close() takes a step or two, not until they are done, and all memory is back."""
    run_script(
        BEGIN
        + """
import gc
model.close()
long = [i % 53 for i in range(1000)]
before = _core.mem_live()
for n in rounds(6):
    model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=1)
    cache = llmcoopt.KVCache(model, "auto")
    seq = cache.sequence()
    def batch(cache):
        model.generate([[1, 2]] * 3, max_new_tokens=900, cache=cache, ignore_eos=True)
    def generation():
        llmcoopt.generate(model, [1], max_new_tokens=900, ignore_eos=True).run()
    def forward():
        model.forward([1], seq)
        seq.truncate(0)
    threads = [start(model.forward, long), start(batch, None), start(batch, cache), start(generation), start(forward)]
    time.sleep(0.02 + 0.003 * (n % 5))
    begin = time.monotonic()
    model.close()
    took = time.monotonic() - begin
    assert took < 2, took
    join(*threads)
    try:
        cache.stats()
        raise AssertionError("the cache is open")
    except ArgumentError as error:
        assert "closed" in str(error)
    del threads, cache, seq
    gc.collect()
    assert _core.mem_live() == before, (_core.mem_live(), before)
""",
        folder,
    )


def test_closing_does_not_wait_for_a_loop_of_steps(folder, run_script):
    """The lock is not fair; a thread that steps in a loop ends at its next step all the same."""
    run_script(
        BEGIN
        + """
for n in rounds(3):
    run = llmcoopt.generate(model, [1, 2, 3], max_new_tokens=1000, ignore_eos=True)
    next(run)
    thread = start(lambda: next(run))
    time.sleep(0.005)
    run._engine.close()
    assert len(run.ids) < 1000
    join(thread)
    run = None
""",
        folder,
    )

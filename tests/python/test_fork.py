"""Processes and threads: what import does not do, what fork() may and may not do, and two threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from checkpoints import make, prompt

import llmcoopt


def test_import_starts_no_thread_and_opens_no_file(run_script):
    run_script(
        """
import os
import numpy  # its linear algebra library starts threads of its own

def state():
    return len(os.listdir("/proc/self/task")), sorted(os.listdir("/proc/self/fd"))

before = state()
import llmcoopt
assert state() == before, (before, state())
"""
    )


FORK = """
import os, sys, traceback
import llmcoopt

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


def test_fork_after_import(tmp_path, run_script):
    """The child loads and runs a model; so does the parent, after it."""
    make(tmp_path)
    run_script(
        FORK
        + """
def run():
    model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
    assert len(list(llmcoopt.generate(model, [1, 2, 3], max_new_tokens=8))) == 8

in_child(run)
run()
in_child(run)
""",
        tmp_path,
    )


def test_use_after_fork_says_so(tmp_path, run_script):
    """Every object of the parent refuses to work in the child, and may be dropped there; the parent goes on."""
    make(tmp_path)
    run_script(
        FORK
        + """
import gc
model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
cache = llmcoopt.KVCache(model, "auto")
seq = cache.sequence()
model.forward([1, 2, 3], seq)
running = llmcoopt.generate(model, [1, 2, 3], max_new_tokens=8)
first = next(running)

def refused(call):
    try:
        call()
    except llmcoopt.errors.ForkError as error:
        assert "fork" in str(error), error
    else:
        raise AssertionError("no ForkError")

def child():
    global model, cache, seq, running
    refused(lambda: model.forward([4], seq))
    refused(lambda: next(running))
    refused(lambda: model.generate([[1, 2]], max_new_tokens=2))
    refused(lambda: next(llmcoopt.generate(model, [1], max_new_tokens=2)))
    del model, cache, seq, running
    gc.collect()
    fresh = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
    assert fresh.generate([[1, 2, 3]], max_new_tokens=1)[0][-1] == first

in_child(child)
assert len(list(running)) == 7
model.forward([4], seq)
assert len(seq) == 4
""",
        tmp_path,
    )


def test_child_exits_cleanly_with_objects_of_the_parent(tmp_path, run_script):
    """A child that leaves by the ordinary way tears down modules and objects that it never used."""
    make(tmp_path)
    run_script(
        """
import os, sys
import llmcoopt
model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
running = llmcoopt.generate(model, [1, 2, 3], max_new_tokens=8)
next(running)
pid = os.fork()
if pid == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert len(list(running)) == 7
""",
        tmp_path,
    )


BUSY = """
import threading, time
model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=1)
cache = llmcoopt.KVCache(model, "auto")
seq = cache.sequence()
running = llmcoopt.generate(model, [1, 2, 3], max_new_tokens=8)
next(running)
stop = False

def busy():
    while not stop:
        model.forward([i % 53 for i in range(250)], last_only=True)

thread = threading.Thread(target=busy)
thread.start()
time.sleep(0.05)
"""


def test_use_after_fork_with_a_busy_parent_says_so(tmp_path, run_script):
    """A thread of the parent holds the model's lock when it forks; in the child nobody will ever give it back."""
    make(tmp_path, hidden_size=192, intermediate_size=768)
    run_script(
        FORK
        + BUSY
        + """
import gc
import numpy as np
none = np.zeros(0, np.int32)

def child():
    global model, cache, seq, running
    calls = [
        lambda: model.forward([4], seq), lambda: model.forward([4]), model._core.info, lambda: llmcoopt.KVCache(model, "auto"), cache.sequence,
        cache.stats, cache.check, lambda: len(seq), seq.fork, lambda: seq.truncate(0), lambda: next(running), running._engine.stats,
        running._engine.check, lambda: running._engine.cancel(0), lambda: llmcoopt._core.Engine(cache._core),
        lambda: running._engine.add(none, 8, none, True, 0, False, 1.0, 0, 1.0, 0.0, 1.0, 0, None),
        lambda: model.generate([[1, 2]], max_new_tokens=2), lambda: llmcoopt.generate(model, [1], cache=cache),
    ]
    for i, call in enumerate(calls):
        try:
            call()
        except llmcoopt.errors.ForkError as error:
            assert "fork" in str(error), error
        else:
            raise AssertionError(f"call {i}: no ForkError")
    how = i_round % 3
    if how == 0:
        model.close()
    if how == 1:
        seq.free(), running._engine.close(), cache.close(), running.cache.close()
    calls.clear()
    del model, cache, seq, running, call
    gc.collect()
    fresh = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
    assert len(fresh.generate([[1, 2, 3]], max_new_tokens=2)[0]) == 5

for i_round in range(6):
    in_child(child)
stop = True
thread.join()
assert len(list(running)) == 7
model.forward([4], seq)
cache.check()
""",
        tmp_path,
        timeout=60,
    )


def test_child_of_a_busy_parent_exits_cleanly(tmp_path, run_script):
    make(tmp_path, hidden_size=192, intermediate_size=768)
    run_script(
        FORK
        + BUSY
        + """
for _ in range(6):
    pid = os.fork()
    if pid == 0:
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
stop = True
thread.join()
""",
        tmp_path,
        timeout=60,
    )


def test_two_threads_one_model(tmp_path):
    """Each with its own sequence: calls take turns, results are those of one thread."""
    make(tmp_path)
    model = llmcoopt.Model.from_pretrained(tmp_path)
    cache = llmcoopt.KVCache(model, dtype="float32")

    def work(i):
        ids, seq = prompt(60, seed=i), cache.sequence()
        return np.concatenate([model.forward(ids[:20], seq), *(model.forward([t], seq) for t in ids[20:])])

    alone = [work(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for together, expected in zip(pool.map(work, range(6)), alone, strict=True):
            np.testing.assert_array_equal(together, expected)


def test_two_threads_two_models(tmp_path):
    make(tmp_path)
    models = [llmcoopt.Model.from_pretrained(tmp_path, threads=2) for _ in range(2)]

    def work(i):
        return models[i].generate([prompt(n, seed=i) for n in (5, 30)], max_new_tokens=32)

    alone = [work(0), work(1)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            assert list(pool.map(work, range(2))) == alone


def test_generations_in_threads_share_a_model(tmp_path):
    make(tmp_path)
    model = llmcoopt.Model.from_pretrained(tmp_path)

    def work(i):
        return list(llmcoopt.generate(model, prompt(9, seed=i), max_new_tokens=24))

    alone = [work(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == alone

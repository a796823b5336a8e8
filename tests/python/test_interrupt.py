"""Ctrl-C: in a long prompt and in decoding it raises KeyboardInterrupt soon, and the cache holds whole steps and can be used on."""

import pytest
from checkpoints import make

BEGIN = """
import os, signal, sys, threading, time
import numpy as np
import llmcoopt

model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=1)
ids = np.random.default_rng(0).integers(0, 53, 30000).tolist()

def interrupted(call, after):
    '''Runs call, sends SIGINT after some seconds, and returns how long the exception took.'''
    sent = []
    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(after, send)
    timer.start()
    try:
        call()
    except KeyboardInterrupt:
        return time.monotonic() - sent[0]
    finally:
        timer.cancel()
    raise AssertionError("finished without KeyboardInterrupt: the work is too short for this machine")
"""


@pytest.fixture
def folder(tmp_path):
    make(tmp_path, hidden_size=192, intermediate_size=768, num_attention_heads=6, num_hidden_layers=4, max_position_embeddings=65536)
    return tmp_path


def test_forward_of_a_long_prompt(folder, run_script):
    run_script(
        BEGIN
        + """
cache = llmcoopt.KVCache(model, dtype="float32")
seq = cache.sequence()
begin = time.monotonic()
before = model.forward(ids[:600], seq)
chunk = time.monotonic() - begin
late = interrupted(lambda: model.forward(ids, seq, last_only=True), 1.0)
assert late < 10 * chunk + 0.5, (late, chunk)  # a later chunk looks back on more tokens
assert len(seq) == 600 and seq.ids == ids[:600]
cache.check()
assert cache.stats()["tokens_held"] == 600
other = cache.sequence()
np.testing.assert_array_equal(model.forward(ids[:600], other), before)
np.testing.assert_array_equal(model.forward([1, 2, 3], seq), model.forward([1, 2, 3], other))
""",
        folder,
    )


def test_generate_in_the_prompt(folder, run_script):
    run_script(
        BEGIN
        + """
late = interrupted(lambda: list(llmcoopt.generate(model, ids, max_new_tokens=4)), 1.0)
assert late < 2.0, late
assert len(list(llmcoopt.generate(model, ids[:100], max_new_tokens=4))) == 4
""",
        folder,
    )


def test_generate_while_decoding(folder, run_script):
    run_script(
        BEGIN
        + """
run = llmcoopt.generate(model, ids[:10], max_new_tokens=50000)
late = interrupted(lambda: list(run), 1.0)
assert late < 1.0, late
held = len(run.ids)
assert 0 < held < 50000
again = llmcoopt.generate(model, ids[:10], max_new_tokens=20)
assert list(again) == list(run.ids)[:20]
""",
        folder,
    )


def test_batch_generate(folder, run_script):
    run_script(
        BEGIN
        + """
batch = [ids[:10], ids[5:200], ids[7:9]]
late = interrupted(lambda: model.generate(batch, max_new_tokens=50000), 1.0)
assert late < 1.0, late
assert [len(out) for out in model.generate(batch, max_new_tokens=5)] == [15, 200, 7]
""",
        folder,
    )


def test_generation_goes_on_where_it_was_interrupted(folder, run_script):
    """No token is lost: the iterator goes on, and a sequence's ids are those that its cache holds."""
    run_script(
        BEGIN
        + """
how = {"max_new_tokens": 2000, "do_sample": True, "seed": 5}
expected = list(llmcoopt.generate(model, ids[:10], **how))
cache = llmcoopt.KVCache(model, "auto")
for _ in range(3):
    seq = cache.sequence()
    run = llmcoopt.generate(model, ids[:10], sequence=seq, **how)
    interrupted(lambda: list(run), 0.1)
    for _ in range(5):
        next(run)
    assert run.ids == expected[: len(run.ids)]
    run.close()
    assert seq.ids == (ids[:10] + expected)[: len(seq)]
""",
        folder,
    )

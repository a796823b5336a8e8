"""Loading and freeing a model gives back what it took: memory, files, threads."""

import pytest
from checkpoints import make

import llmcoopt

# Prints resident bytes, open files and threads after each round. The last rounds must look like the third: allocators settle in two.
ROUNDS = """
import gc, os, sys
import llmcoopt

def state():
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

for i in range(20):
    model = llmcoopt.Model.from_pretrained(sys.argv[1], threads=2)
    cache = llmcoopt.KVCache(model, "auto", max_tokens=4096)
    seq = cache.sequence()
    model.forward(list(range(300)), seq)
    assert len(list(llmcoopt.generate(model, [1, 2, 3], max_new_tokens=4))) == 4
    if sys.argv[2] == "close":
        model.close()
    del model, cache, seq
    gc.collect()
    print(*state())
"""


def check(output, model_bytes):
    rounds = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert len(rounds) == 20
    early, late = max(rounds[2:5]), min(rounds[-3:])
    assert late[0] - early[0] < model_bytes / 4, f"resident bytes grew from {early[0]} to {late[0]}"
    assert {r[1:] for r in rounds[1:]} == {rounds[1][1:]}, f"files and threads: {rounds}"


def big(folder):
    """32 MB of weights, so that one lost copy in twenty rounds shows."""
    weights = make(folder, vocab_size=4096, hidden_size=512, intermediate_size=1536, num_attention_heads=8, max_position_embeddings=4096)
    return sum(w.nbytes for w in weights.values())


@pytest.mark.slow
def test_twenty_loads_with_close(tmp_path, run_script):
    size = big(tmp_path)
    check(run_script(ROUNDS, tmp_path, "close"), size)


@pytest.mark.slow
def test_twenty_loads_with_del(tmp_path, run_script):
    size = big(tmp_path)
    check(run_script(ROUNDS, tmp_path, "del"), size)


def test_weights_are_mapped_not_copied(tmp_path, run_script):
    """Anonymous memory hardly grows by loading and running: the weights are pages of the file."""
    size = big(tmp_path)
    grown = run_script(
        """
import sys
import llmcoopt

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous", "Swap:"))) * 1024

before = anonymous()
model = llmcoopt.Model.from_pretrained(sys.argv[1])
model.forward([1, 2, 3], llmcoopt.KVCache(model, "auto", max_tokens=256).sequence())
print(anonymous() - before)
""",
        tmp_path,
    )
    assert int(grown) < size / 10


def test_cache_memory_follows_tokens_held(tmp_path):
    make(tmp_path, num_key_value_heads=6, max_position_embeddings=4096)
    model = llmcoopt.Model.from_pretrained(tmp_path)
    cache = llmcoopt.KVCache(model, dtype="float32", page_size=16, max_tokens=1 << 20)
    assert cache.stats()["resident_bytes"] == 0
    seq = cache.sequence()
    model.forward([1] * 2000, seq)
    held = cache.stats()
    assert held["tokens_held"] == 2000
    assert held["pages_total"] - held["pages_free"] == 125
    assert 2000 * held["bytes_per_token"] <= held["resident_bytes"] < 3 * 2000 * held["bytes_per_token"] < held["reserved_bytes"] / 50
    seq.free()
    assert cache.stats()["pages_free"] == held["pages_total"]
    assert cache.stats()["resident_bytes"] < held["resident_bytes"] / 4

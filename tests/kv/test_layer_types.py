"""Caches whose layers have element types of their own: each layer is stored and read as a cache of its type stores and reads it."""

import numpy as np
import oracle
import pytest
from checkpoints import make, prompt

import llmcoopt
from llmcoopt import Tap, _core
from llmcoopt.cache import DTYPES, SCALED
from llmcoopt.errors import ArgumentError
from llmcoopt.generation import Options

MIXED = ["bfloat16", "fp8_e4m3", "int8", "float32", "fp8_e5m2", "float16"]


@pytest.fixture
def model(tmp_path, isa):
    make(
        tmp_path, num_hidden_layers=len(MIXED), hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="bfloat16"
    )
    with llmcoopt.Model.from_pretrained(tmp_path, isa=isa, threads=2) as model:
        yield model


def layer_alone(model, dtype, page_size, layer, seen, pieces, write_buffer):
    """What attention of one layer gives when it reads only its own pages: rows [n, heads * d], from what a tap saw, given in pieces."""
    c = model.config
    n, d = len(seen["k", layer]), c.head_dim
    q, k, v = (seen[p, layer].reshape(n, -1, d) for p in ("q", "k", "v"))
    ctx = _core.OpContext(model.isa, 2)
    kind, buffer = (oracle.CodedPages, (oracle.widest(page_size), 4)) if dtype in SCALED else (oracle.Pages, ())
    pages, unit = kind(-(-n // page_size), 1, c.num_key_value_heads, d, page_size, dtype, *buffer), oracle.widest(page_size)
    table, out, at = np.arange(-(-n // page_size), dtype=np.int32), np.empty_like(q), 0
    tails = [pages.new_tail(), pages.new_tail()] if dtype in SCALED and write_buffer else []
    for m in pieces:
        own = [pages.new_tail((at + m - 1) // unit - at // unit + 1)] if tails else []
        items = [(table, 0, m, at, m > 1, *(a.reshape(-1).view(np.uint8) for a in (*tails, *own)))]
        rows = slice(at, at + m)
        one, zero = np.ones((m, d // 2), np.float32), np.zeros((m, d // 2), np.float32)
        ctx.rope_append(q[rows].copy(), k[rows].copy(), v[rows], one, zero, **pages.where, layer=0, items=items)
        ctx.attention(out[rows], q[rows], **pages.where, n_kv_heads=c.num_key_value_heads, layer=0, items=items, scale=d**-0.5)
        if (at + m) // unit > at // unit:
            tails.reverse()
        at += m
    return out.reshape(n, -1)


@pytest.mark.parametrize("write_buffer", [True, False])
@pytest.mark.parametrize("page_size", [16, 48])
def test_each_layer_is_as_it_would_be_alone(model, page_size, write_buffer):
    """The bits of attention in every layer of a mixed cache, over prompts in pieces and single tokens."""
    pieces, seen = [37, 1, 50, *[1] * 20, 12], {}

    def look(point, layer, rows):
        seen.setdefault((point, layer), []).append(rows)

    with llmcoopt.KVCache(model, MIXED, page_size=page_size, write_buffer=write_buffer, turn_keys=False) as cache:
        seq, ids = cache.sequence(), prompt(sum(pieces))
        for m in pieces:
            model.forward(ids[len(seq) : len(seq) + m], seq, tap=Tap(["q", "k", "v", "attended"], look))
        cache.check()
    seen = {place: np.concatenate(rows) for place, rows in seen.items()}
    for layer, dtype in enumerate(MIXED):
        alone = layer_alone(model, dtype, page_size, layer, seen, pieces, write_buffer)
        assert np.array_equal(seen["attended", layer], alone), (layer, dtype)


def test_turned_layers_beside_others(model):
    """Keys and queries are both turned where the layer has one-byte codes, and neither elsewhere: attention stays what it is but for rounding."""
    seen, ids = [{}, {}, {}], prompt(100)
    for rows, types, turn_keys in zip(seen, (["float32"] * len(MIXED), MIXED, MIXED), (True, True, False), strict=True):
        with llmcoopt.KVCache(model, types, turn_keys=turn_keys) as cache:
            model.forward(ids, cache.sequence(), tap=Tap("attended", lambda point, layer, x, rows=rows: rows.update({layer: x})))
    for layer, dtype in enumerate(MIXED):
        error = np.linalg.norm(seen[1][layer] - seen[0][layer]) / np.linalg.norm(seen[0][layer])
        assert error < 0.04, (layer, dtype)  # observed: 0.011
    assert np.array_equal(seen[1][0], seen[2][0]), "a layer in 16 bit is not turned"
    assert not np.array_equal(seen[1][1], seen[2][1])


def test_a_list_of_one_type_is_that_type(model):
    ids = prompt(150)
    for dtype in DTYPES:
        with llmcoopt.KVCache(model, dtype) as one, llmcoopt.KVCache(model, [dtype] * len(MIXED)) as many:
            assert np.array_equal(model.forward(ids, one.sequence()), model.forward(ids, many.sequence()))
            assert one.stats()["page_bytes"] == many.stats()["page_bytes"]


def test_forks_cuts_and_errors_leave_no_trace(model):
    ids, other = prompt(200), prompt(200, seed=1)
    with llmcoopt.KVCache(model, MIXED, page_size=48) as cache:

        def alone(n, more):
            seq = cache.sequence()
            model.forward(ids[:n], seq)
            return model.forward(other[:more], seq)

        for n in (5, 16, 37, 48, 70, 96):
            first = cache.sequence()
            model.forward(ids[:n], first)
            fork = first.fork()
            assert np.array_equal(model.forward(other[:30], fork), alone(n, 30)), n
            fork.truncate(n)  # held: exact inside the block too
            assert np.array_equal(model.forward(other[:40], fork), alone(n, 40)), n
            with pytest.raises(ZeroDivisionError):
                model.forward(other[:60], first, tap=Tap("q", lambda *_: 1 / 0))
            assert np.array_equal(model.forward(other[:50], first), alone(n, 50)), n
            whole = cache.sequence()
            model.forward(ids[:150], whole)
            whole.truncate(n // 48 * 48 or 150)
            assert np.array_equal(model.forward(other[:20], whole), alone(n // 48 * 48 or 150, 20)), n
            cache.check()


def test_a_cut_inside_a_quantised_block(model):
    """16-bit layers are exact; the others read codes where they would have read the block in 16 bit."""
    ids, exact = prompt(200), ["bfloat16", "float16"] * (len(MIXED) // 2)
    for dtypes, bound in ((exact, 0), (MIXED, 0.2)):
        with llmcoopt.KVCache(model, dtypes) as cache:
            cut, lone = cache.sequence(), cache.sequence()
            model.forward(ids[:100], cut)
            cut.truncate(37)
            model.forward(ids[:37], lone)
            found, right = (model.forward(ids[100:140], seq) for seq in (cut, lone))
            assert np.abs(found - right).max() <= bound * np.abs(right).max()
            assert (found != right).any() == (bound > 0)


def test_batches(model):
    """In one running batch, with preemption, every request gets the tokens that it gets alone."""

    def run(prompts, max_tokens):
        with llmcoopt.KVCache(model, MIXED, page_size=16, max_tokens=max_tokens) as cache:
            engine = _core.Engine(cache._core, 8, 20)
            rows = {engine.add(**Options(max_new_tokens=20).request(np.array(p, np.int32), model)): [] for p in prompts}
            left = len(rows)
            while left:
                events = []
                engine.step(events)
                for request, token, logprob, finish, error in events:
                    assert error is None, error
                    rows[request].append((token, logprob))
                    left -= finish is not None
                engine.check()
                cache.check()
            preempted = engine.stats()["preemptions"]
            engine.close()
            return list(rows.values()), preempted

    prompts = [prompt(n, seed=n) for n in (3, 40, 64, 17, 90)]
    alone = [run([p], 4096)[0][0] for p in prompts]
    assert run(prompts, 4096) == (alone, 0)
    crowded, preempted = run(prompts, 128)
    assert crowded == alone and preempted > 0


def test_bytes_and_words(model):
    c = model.config
    page, values = 64, 2 * 64 * c.num_key_value_heads * c.head_dim
    sizes = {"float32": 4 * values, "float16": 2 * values, "bfloat16": 2 * values}
    coded = values + 2 * c.num_key_value_heads * (page // 16) * 4
    with llmcoopt.KVCache(model, MIXED, page_size=page) as cache:
        seq = cache.sequence()
        model.forward(prompt(20), seq)
        stats = cache.stats()
        assert stats["page_bytes"] == sum(sizes.get(dtype, coded) for dtype in MIXED)
        assert stats["bytes_per_token"] == stats["page_bytes"] // page
        assert stats["tail_bytes"] == 3 * 2 * 64 * c.num_key_value_heads * c.head_dim * 2  # of the three layers of one-byte codes
        assert cache.layer_dtypes == tuple(MIXED)
    with llmcoopt.KVCache(model, {"default": "fp8", 0: "bfloat16", -1: "bfloat16"}) as cache:
        assert cache.layer_dtypes == ("bfloat16", *["fp8_e4m3"] * 4, "bfloat16") and cache.dtype == "fp8_e4m3"
        assert repr(cache).startswith("KVCache(fp8_e4m3, 2 of 6 layers bfloat16, 0 tokens")
        assert "fp8_e4m3, 2 of 6 layers bfloat16" in cache._repr_html_()
    with llmcoopt.KVCache(model, {1: "int8"}) as cache:
        assert cache.layer_dtypes == (model.dtype, "int8", *[model.dtype] * 4)
    with llmcoopt.KVCache(model, ["auto", "fp8", "float16", "bfloat16", "float32", "auto"]) as cache:
        assert cache.layer_dtypes == ("bfloat16", "fp8_e4m3", "float16", "bfloat16", "float32", "bfloat16") and cache.write_buffer
    with llmcoopt.KVCache(model, ["bfloat16"] * 6) as cache:
        assert not cache.write_buffer and "layers" not in repr(cache)


def test_bad_types(model):
    cases = {
        "found a list of 2 names, expected one for each of the 6 layers": ["int8", "int8"],
        r"dtype\[3\] = 'int4', expected 'auto' or one of": ["int8"] * 3 + ["int4"] * 3,
        r"dtype\[1\] = 7": {1: 7},
        r"dtype\['default'\] = 'x'": {"default": "x"},
        "found the key 6, expected 'default' or a layer from -6 to 5": {6: "int8"},
        "found the key 'layers'": {"layers": "int8"},
        "found the key True": {True: "int8"},
        "-1 and 5 are the same layer": {-1: "int8", 5: "int8"},
        "expected a name, a list .* found int": 3,
    }
    for text, dtype in cases.items():
        with pytest.raises(ArgumentError, match=text):
            llmcoopt.KVCache(model, dtype)
    for text, types in {
        "expected a list of 6 names": ["int8"],
        "layer 5 has 'int4'": ["int8"] * 5 + ["int4"],
        "layer 0 has 3": [3] * 6,
    }.items():
        with pytest.raises(ArgumentError, match=text):
            _core.KVCache(model._core, "int8", 64, 1000, True, layer_dtypes=types)


def test_spilled_pages_and_prefixes(model, tmp_path):
    """Layers of unequal sizes in the spill file, and found again by the prefix index: the same bits."""
    ids, other = prompt(180), prompt(50, seed=3)
    with llmcoopt.KVCache(model, MIXED, page_size=16) as cache:
        seq = cache.sequence()
        right = [model.forward(part, seq) for part in (ids, other)]
        kept = [seq.kv(layer) for layer in range(len(MIXED))]
        page = cache.stats()["page_bytes"]
    with llmcoopt.KVCache(model, MIXED, page_size=16, host_bytes=7 * page, spill_path=tmp_path) as cache:
        seq = cache.sequence()
        for part, logits in zip((ids, other), right, strict=True):
            assert np.array_equal(model.forward(part, seq), logits)
        assert cache.stats()["pages_away"] > 0
        for layer, pair in enumerate(kept):
            for found, expected in zip(seq.kv(layer), pair, strict=True):
                assert np.array_equal(found, expected), layer
        cache.check()
    with llmcoopt.KVCache(model, MIXED, page_size=16, prefix_cache=True) as cache:
        for _ in range(2):
            seq = cache.sequence()
            assert np.array_equal(model.forward(ids, seq, last_only=True), right[0][-1])
            assert np.array_equal(model.forward(other, seq), right[1])
        assert cache.stats()["writes_skipped"]["prefix"] > 100
        seq, seen = cache.sequence(), []
        tap = Tap("k", lambda point, layer, rows: seen.append(len(rows)), layers=[0])
        assert np.array_equal(model.forward(ids, seq, last_only=True, tap=tap), right[0][-1])
        assert sum(seen) == 180, "a tap sees every token, also those whose pages are known"

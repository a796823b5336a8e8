"""cache_report against the same figures computed the plain way in float64, and choose_cache_dtype against what it promises."""

import json
import sys

import numpy as np
import oracle
import pytest
from checkpoints import make, prompt

import llmcoopt
from llmcoopt import Tap, damage, dtype_choice
from llmcoopt.cache import DTYPES, SCALED
from llmcoopt.errors import ArgumentError, NumericError, UnsupportedError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers differ: keys of layer 1 have one huge channel (F1 of FP8 caches: a scale for all would lose the others)."""
    folder = tmp_path_factory.mktemp("model")

    def edit(weights):
        weights["model.layers.1.self_attn.k_proj.weight"][3] *= 600
        weights["model.layers.2.self_attn.v_proj.weight"] *= 1e-4

    fields = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    make(folder, "mistral", edit=edit, sliding_window=30, max_position_embeddings=1200, **fields)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    with llmcoopt.Model.from_pretrained(folder, threads=2) as model:
        yield model


def plain_report(model, rows, dtype, write_buffer, turn_keys):
    """name -> [layers, kv heads], by the oracle."""
    c, sums = model.config, {}
    heads, d = c.num_key_value_heads, c.head_dim

    def add(name, layer, x):
        sums.setdefault(name, np.zeros((c.num_hidden_layers, heads)))[layer] += x

    for ids in rows:
        seen, n = {}, len(ids)

        def look(point, layer, rows, seen=seen):
            seen.setdefault((point, layer), []).append(rows)

        with llmcoopt.KVCache(model, "float32") as cache:
            model.forward(ids, cache.sequence(), tap=Tap(["q", "k", "v"], look))
        for layer in range(c.num_hidden_layers):
            q, k, v = (np.concatenate(seen[p, layer]).reshape(n, -1, d) for p in "qkv")
            right = oracle.attention(q, k, v, 0, d**-0.5, c.window[layer])[0]
            if turn_keys and dtype in SCALED:
                q, k = (oracle.turn(x.reshape(-1, d), key).reshape(x.shape) for x, key in ((q, False), (k, True)))
            own = tuple(oracle.decode(oracle.encode(x, "bfloat16"), "bfloat16") for x in (k, v))
            table = np.arange(-(-n // 16), dtype=np.int32)
            if dtype in SCALED:
                pages = oracle.CodedPages(len(table), 1, heads, d, 16, dtype)
                (pages.write if write_buffer else pages.write_widened)(table, 0, k, v)
            else:
                pages = oracle.Pages(len(table), 1, heads, d, 16, dtype)
                pages.write(table, 0, k, v)
            full, scale, window = n // 16 * 16, d**-0.5, c.window[layer]
            coded = pages.read(table, 0, full if dtype in SCALED and write_buffer else n)
            if dtype in SCALED and write_buffer:
                found = oracle.attention_buffered(q, coded, own, 0, scale, window, 0, 64, 4)[0]
            else:
                found = oracle.attention(q, *coded, 0, scale, window)[0]
            add("attention_error", layer, ((found - right) ** 2).reshape(n, heads, -1).sum((0, 2)))
            add("attention_error of", layer, (right**2).reshape(n, heads, -1).sum((0, 2)))
            for name, x, values in (("key_error", k, coded[0]), ("value_error", v, coded[1])):
                x = x[:full].astype(np.float64)
                add(name, layer, ((values[:full] - x) ** 2).sum((0, 2)))
                add(f"{name} of", layer, (x**2).sum((0, 2)))
                add("zeroed", layer, ((values[:full] == 0) & (x != 0)).mean((0, 2)) / 2 / len(rows))
    errors = {name: np.sqrt(sums[name] / sums[f"{name} of"]) for name in damage.ERRORS}
    return errors, sums["zeroed"]


@pytest.mark.parametrize("write_buffer, turn_keys", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_oracle(folder, isa, dtype, write_buffer, turn_keys):
    rows = [prompt(100), prompt(100, seed=1)]
    with llmcoopt.Model.from_pretrained(folder, isa=isa, threads=2) as model:
        report = llmcoopt.cache_report(model, rows, dtype, write_buffer=write_buffer, turn_keys=turn_keys, progress=False)
        errors, zeroed = plain_report(model, rows, dtype, write_buffer, turn_keys)
        with llmcoopt.KVCache(model, dtype) as cache:
            assert report.bytes_per_token == cache.stats()["bytes_per_token"]
    for name, right in errors.items():
        found = getattr(report, name)
        assert found.shape == (3, 2)
        if dtype == "float32":
            assert found.max() < 1e-6
        elif dtype == "bfloat16" and isa == "amx" and name == "attention_error":
            assert (found < 3 * right).all() and (found > right / 2).all()  # its tiles round queries and weights as well
        else:
            np.testing.assert_allclose(found, right, rtol=0.02, err_msg=name)  # rounding borders of the queries and of the unrounded block
    np.testing.assert_allclose(report.zeroed, zeroed, rtol=1e-9)
    assert report.saturated.max() == 0  # scales come from the data
    assert report.tokens == 200


def test_shares_by_hand():
    """What is clipped, what lost precision, what became 0, under a scale of 2: in numbers that can be counted."""
    x = np.array([1000, 927, 929, -5000, 1.0, 0.02, 0.0009, 0.0, 2.0**-5, 0.02], np.float64).reshape(1, 1, -1)
    values = oracle.code_values("fp8_e4m3")[oracle.encode_scaled(x, np.float32(2), "fp8_e4m3")] * 2
    shares = damage._shares(x, values, np.full((1, 1, 1), 2.0), "fp8_e4m3")
    assert {name: int(n[0]) for name, n in shares.items()} == {"saturated": 3, "subnormal": 2, "zeroed": 1, "count": 10}


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(dtype):
    if dtype in SCALED:
        codes, right = np.arange(256, dtype=np.uint8), oracle.code_values(dtype)
    else:
        codes = oracle.encode(np.array([0.1, -3.0, 1e-6, 60000.0], np.float32), dtype)
        right = oracle.decode(codes, dtype)
    finite = np.isfinite(right)
    assert np.array_equal(damage.decode(codes.view(np.uint8), dtype)[finite], right[finite])


def test_layers_add_up(model):
    """Totals are of all values, not means of means; a report of mixed types has each layer's figures."""
    rows = [prompt(150), prompt(64, seed=2)]
    alone = {dtype: llmcoopt.cache_report(model, rows, dtype, progress=False) for dtype in ("bfloat16", "fp8_e4m3", "int8")}
    mixed = llmcoopt.cache_report(model, rows, list(alone), progress=False)
    for layer, (_, report) in enumerate(alone.items()):
        for name in damage.ERRORS | damage.SHARES:
            assert np.array_equal(getattr(mixed, name)[layer], getattr(report, name)[layer])
            assert mixed.layer(name)[layer] == report.layer(name)[layer]
    one = alone["int8"]
    assert one.layer("key_error")[1] == pytest.approx(np.sqrt(one.sums["key_error"][1].sum() / one.sums["key_error of"][1].sum()))
    assert one.total("key_error") == pytest.approx(np.sqrt(one.sums["key_error"].sum() / one.sums["key_error of"].sum()))
    layer, head = one.worst("value_error")
    assert one.value_error[layer, head] == one.value_error.max()
    with pytest.raises(ArgumentError, match="expected one of key_error"):
        one.total("errors")
    # One huge channel: the other channels of layer 1's keys vanish in int8's even steps. 8-bit floats keep them, and so does turning.
    plain = {dtype: llmcoopt.cache_report(model, rows, dtype, turn_keys=False, progress=False) for dtype in alone}
    assert plain["int8"].zeroed[1].max() > 0.3 and plain["fp8_e4m3"].zeroed[1].max() < 0.02 and one.zeroed[1].max() < 0.05


def test_layers_in_turns(model, monkeypatch):
    """When the activations of all layers are too many, a text runs again for the others."""
    rows, calls, forward = [prompt(150), prompt(70)], [], model.forward
    whole = llmcoopt.cache_report(model, rows, progress=False)
    monkeypatch.setattr(damage, "ROOM", 2 * 150 * 4 * 16 * 8)
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    turns = llmcoopt.cache_report(model, rows, progress=False)
    assert len(calls) == 3
    for name in damage.ERRORS | damage.SHARES:
        assert np.array_equal(getattr(turns, name), getattr(whole, name))


def test_words_and_json(model):
    report = llmcoopt.cache_report(model, [prompt(80)], ["bfloat16", "int8", "fp8"], progress=False)
    found = json.loads(report.to_json())
    assert found["dtypes"] == ["bfloat16", "int8", "fp8_e4m3"] and found["tokens"] == 80
    assert found["heads"]["key_error"] == report.key_error.tolist()
    assert found["worst"]["key_error"] == dict(zip(("layer", "kv_head"), report.worst("key_error"), strict=True))
    lines = repr(report).splitlines()
    assert len(lines) == 2 + 3 + 1 and len({len(line) for line in lines[1:]}) == 1
    assert "bfloat16, 1 of 3 layers int8, 1 of 3 layers fp8_e4m3" in lines[0]
    assert lines[3].split()[:2] == ["1", "int8"] and lines[-1].split()[0] == "all"
    assert report._repr_html_().count("<tr>") == 5


def test_plot(model, tmp_path, monkeypatch):
    report = llmcoopt.cache_report(model, [prompt(80)], progress=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        report.plot()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for found, name in zip(maps, damage.ERRORS, strict=True):
        np.testing.assert_allclose(found, 100 * getattr(report, name))


def test_texts(model, tokenizer, monkeypatch):
    """Strings, ids and lists of them; cut into windows; what is too short is left out or refused."""

    def lengths(texts, **how):
        return [len(row) for row in damage.text_windows(model, texts, **how)]

    monkeypatch.setattr(tokenizer, "encode", lambda text: [ord(c) % 50 for c in text])
    assert lengths("a" * 100, tokenizer=tokenizer) == [100]
    assert lengths(["a" * 100, "b" * 40], tokenizer=tokenizer) == [100, 40]
    assert lengths(prompt(100)) == lengths(np.array(prompt(100))) == lengths([prompt(100)]) == [100]
    assert lengths(prompt(170), window=64) == [64, 64, 42]
    assert lengths(prompt(150), window=64) == [64, 64]
    assert lengths(prompt(1300)) == [1200, 100]
    for texts in ([], prompt(20), [[1, 2, 3]], ["abc"]):
        with pytest.raises(ArgumentError, match="texts"):
            lengths(texts, tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="window = 16, expected 32 to 1200"):
        lengths(prompt(100), window=16)
    with pytest.raises(ArgumentError, match=r"texts\[0\]\[1\] = 53 is outside the vocabulary"):
        lengths([4, 53] * 20)


def test_infinite_keys_are_an_error(tmp_path):
    def edit(weights):
        weights["model.layers.1.self_attn.k_proj.weight"][:] = 3e38

    make(tmp_path, edit=edit)
    with llmcoopt.Model.from_pretrained(tmp_path) as model, pytest.raises(NumericError, match=r"layer 1: queries, keys or values|logits"):
        llmcoopt.cache_report(model, prompt(64), progress=False)


# ---------------------------------------------------------------- choice


def test_compare():
    """KL and loss change as their definitions say, in float64."""
    rng = np.random.default_rng(0)
    right = (rng.standard_normal((20, 1000)) * 4 + 7).astype(np.float32)
    targets = rng.integers(0, 1000, 19)
    for size in (1e-3, 0.05, 5.0):
        found = right + (rng.standard_normal(right.shape) * size).astype(np.float32) - 3
        p, q = (x.astype(np.float64) - np.log(np.exp(x.astype(np.float64)).sum(1, keepdims=True)) for x in (right, found))
        divergence, loss = dtype_choice.compare(right, found, targets)
        np.testing.assert_allclose(divergence, (np.exp(p) * (p - q)).sum(1), rtol=1e-3, atol=2e-7)
        np.testing.assert_allclose(loss, (p - q)[np.arange(19), targets], atol=2e-6)
    assert dtype_choice.compare(right, right, targets)[0].max() < 1e-7
    far = np.where(np.arange(1000) < 500, 0, 300).astype(np.float32) * np.ones((20, 1), np.float32)
    assert np.isfinite(dtype_choice.compare(far, far[:, ::-1], targets)[0]).all()


def damage_of(model, dtypes, rows):
    """(damage, loss change) the plain way: whole texts, logits in float64."""
    divergences, losses = [], []
    for ids in rows:
        p, q = (model.forward(ids, llmcoopt.KVCache(model, types).sequence()).astype(np.float64) for types in (model.dtype, list(dtypes)))
        p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
        divergences.append((np.exp(p) * (p - q)).sum(1))
        losses.append((p - q)[np.arange(len(ids) - 1), ids[1:]])
    return np.expm1(np.concatenate(divergences).mean()), np.concatenate(losses).mean()


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """Six layers in bfloat16; layer 4's queries are large, so that errors of its keys count for more."""

    def edit(weights):
        weights["model.layers.4.self_attn.q_proj.weight"] *= 8

    folder = tmp_path_factory.mktemp("six")
    make(
        folder, edit=edit, num_hidden_layers=6, dtype="bfloat16", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    with llmcoopt.Model.from_pretrained(folder, threads=2) as model:
        yield model


@pytest.mark.parametrize("rank_by", ["damage", "attention"])
def test_choice(six, rank_by):
    rows = [np.array(prompt(n, seed=n)) for n in (200, 129, 64)]
    everything = damage_of(six, ["fp8_e4m3"] * 6, rows)[0]
    alone = [damage_of(six, ["bfloat16"] * i + ["fp8_e4m3"] + ["bfloat16"] * (5 - i), rows)[0] for i in range(6)]
    report, last = llmcoopt.cache_report(six, rows, progress=False), 7
    for share in (1.5, 0.6, 0.3, 1e-3):
        tolerance = everything * share
        choice = llmcoopt.choose_cache_dtype(six, rows, tolerance, rank_by=rank_by, progress=False)
        damage, loss = damage_of(six, choice.dtypes, rows)
        assert damage <= tolerance * 1.001
        assert choice.measured.damage == pytest.approx(damage, rel=1e-3, abs=1e-7)
        assert choice.measured.loss_change == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(choice.sensitivity, alone if rank_by == "damage" else report.layer("attention_error"), rtol=1e-3)
        assert choice.order == np.argsort(-choice.sensitivity).tolist()
        assert choice.dtypes == ["bfloat16" if layer in choice.kept else "fp8_e4m3" for layer in range(6)]
        assert choice.kept == sorted(choice.order[: choice.measured.kept])
        if choice.kept:  # one fewer was tried, and was too few
            fewer = next(step for step in choice.steps if step.kept == choice.measured.kept - 1)
            assert fewer.damage > tolerance
        with llmcoopt.KVCache(six, choice.dtypes) as cache:
            assert choice.bytes_per_token == cache.stats()["bytes_per_token"]
        assert choice.bytes_of_base <= choice.bytes_per_token <= choice.bytes_of_keep
        assert choice.tokens == 393 and len(choice.kept) <= 6 - (share == 1.5) * 6
        assert json.loads(json.dumps(choice.to_dict()))["kept"] == choice.kept
        assert repr(choice).count("<- chosen") == 1
        last, before = len(choice.kept), last
        assert before == 7 or last >= before
    assert last == 6, "a tolerance below every error keeps all layers"


def test_cache_with_calibration(six):
    rows = [prompt(200), prompt(129, seed=1)]
    tolerance = damage_of(six, ["fp8_e4m3"] * 6, [np.array(row) for row in rows])[0] / 2
    choice = llmcoopt.choose_cache_dtype(six, rows, tolerance, progress=False)
    with llmcoopt.KVCache(six, "auto", calibration=rows, tolerance=tolerance) as cache:
        assert list(cache.layer_dtypes) == choice.dtypes == cache.choice.dtypes and 0 < len(cache.choice.kept) < 6
        six.forward(prompt(100), cache.sequence())
    with llmcoopt.KVCache(six) as plain:
        assert plain.dtype == "fp8_e4m3" and plain.choice is None
    with pytest.raises(ArgumentError, match="calibration: dtype is 'int8', expected 'auto'"):
        llmcoopt.KVCache(six, "int8", calibration=rows)


def test_bad_choices(six):
    for how, text in {
        "tolerance = 0": {"tolerance": 0},
        "tolerance = nan": {"tolerance": float("nan")},
        "tolerance = '1%'": {"tolerance": "1%"},
        "rank_by = 'size'": {"rank_by": "size"},
        "dtype = 'int4'": {"base": "int4"},
        r"found \['int8'\], expected the name": {"base": ["int8"]},
    }.items():
        with pytest.raises(ArgumentError, match=how):
            llmcoopt.choose_cache_dtype(six, prompt(64), progress=False, **text)


@pytest.mark.parametrize("page_size, residual", [(48, 48), (32, None), (128, 16)])
def test_stretches_of_the_cache_that_is_chosen_for(six, page_size, residual):
    """A report, and a choice of types, measure a buffer as long as the cache has."""
    rows, how = [prompt(150)], {"page_size": page_size, "residual_length": residual, "progress": False}
    length = residual or min(page_size, 64)
    found = llmcoopt.cache_report(six, rows, "int8", **how)
    alike = llmcoopt.cache_report(six, rows, "int8", page_size=length, residual_length=length, progress=False)
    longer = llmcoopt.cache_report(six, rows, "int8", page_size=64, progress=False)
    assert np.array_equal(found.attention_error, alike.attention_error) and np.array_equal(found.key_error, alike.key_error)
    assert (found.attention_error.mean() > longer.attention_error.mean()) and np.array_equal(found.key_error, longer.key_error)
    with llmcoopt.KVCache(six, "auto", page_size, residual_length=residual, calibration=rows, tolerance=0.01) as cache:
        assert cache.residual_length == length
        assert np.array_equal(cache.choice.report.attention_error, llmcoopt.cache_report(six, rows, **how).attention_error)

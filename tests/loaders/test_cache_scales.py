"""k_scale and v_scale of checkpoints: found under every name in use, checked, shown, and used when they are asked for."""

import json
import warnings

import numpy as np
import oracle
import pytest
from checkpoints import bfloat16_bits, make, prompt, read_safetensors, write_safetensors

import llmcoopt
from llmcoopt import Tap, loaders
from llmcoopt.errors import ArgumentError, FormatError, UnsupportedError

HEADS, LAYERS = 2, 3
ATTENTION = "model.layers.{}.self_attn.{}"


def number(x, kind="float32"):
    return bfloat16_bits(np.float32([x])) if kind == "bfloat16" else np.array([x], kind)


def checkpoint(folder, scales, **config):
    """A folder with these tensors more."""
    make(folder, head_dim=16, **config)
    file = folder / "model.safetensors"
    write_safetensors(file, {**read_safetensors(file), **scales})
    return folder


def all_layers(k=0.02, v=0.003):
    return {ATTENTION.format(i, f"{which}_scale"): number(x * (i + 1)) for i in range(LAYERS) for which, x in (("k", k), ("v", v))}


@pytest.mark.parametrize("k, v", [("k_scale", "v_scale"), ("attn.k_scale", "attn.v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_names_and_types(tmp_path, k, v, kind):
    scales = {ATTENTION.format(i, k): number(0.5 + i, kind) for i in range(LAYERS)} | {
        ATTENTION.format(i, v): number(0.25, kind) for i in range(LAYERS)
    }
    with warnings.catch_warnings(action="error"):
        found = loaders.load(checkpoint(tmp_path, scales)).cache_scales
    assert found.dtype == np.float32
    assert np.array_equal(found, [[[0.5 + i] * HEADS, [0.25] * HEADS] for i in range(LAYERS)])


def test_one_for_both_and_one_for_each_head(tmp_path):
    scales = {
        ATTENTION.format(0, "kv_scale"): number(0.5),
        ATTENTION.format(1, "v_scale"): np.float32(0.125).reshape(()),
        ATTENTION.format(2, "k_scale"): np.array([1, 2], np.float32).reshape(2, 1, 1),
    }
    found = loaders.load(checkpoint(tmp_path, scales)).cache_scales
    assert found.tolist() == [[[0.5, 0.5]] * 2, [[0.125, 0.125]] * 2, [[1, 2]] * 2]
    assert loaders.load("tiny").cache_scales is None


def test_layers_without(tmp_path):
    folder = checkpoint(tmp_path, {ATTENTION.format(1, "k_scale"): number(0.5)})
    assert np.isnan(loaders.load(folder).cache_scales).all(axis=(1, 2)).tolist() == [True, False, True]
    with llmcoopt.Model.from_pretrained(folder) as model:
        assert model.facts()["cache_scales"] == "1 of 3 layers, 0.5 to 0.5"
        with pytest.raises(ArgumentError, match="layer 0 has no k_scale and v_scale"):
            llmcoopt.KVCache(model, "fp8", kv_scales="checkpoint")
        llmcoopt.KVCache(model, {1: "fp8"}, kv_scales="checkpoint").close()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 2.0**-140])
def test_bad_values(tmp_path, value):
    folder = checkpoint(tmp_path, {**all_layers(), ATTENTION.format(1, "v_scale"): number(value)})
    with pytest.raises(FormatError, match=rf"model.safetensors: tensor 'model.layers.1.self_attn.v_scale' holds the scale {value:g};"):
        loaders.load(folder)


def test_bad_shapes_and_doubles(tmp_path):
    name = ATTENTION.format(0, "k_scale")
    with pytest.raises(FormatError, match=rf"'{name}' has shape \[3\]; expected one number, or one for each of 2 kv heads"):
        loaders.load(checkpoint(tmp_path / "shape", {name: np.ones(3, np.float32)}))
    other = ATTENTION.format(0, "kv_scale")
    with pytest.raises(FormatError, match=rf"tensors '{name}' and '{other}' are the same scale"):
        loaders.load(checkpoint(tmp_path / "double", {name: number(1), other: number(1)}))


def test_unused_ones_warn(tmp_path):
    scales = {"model.layers.7.self_attn.k_scale": number(-5), "model.layers.0.mlp.v_scale": number(1), **all_layers()}
    with pytest.warns(UserWarning, match=r"'model.layers.7.self_attn.k_scale' and 1 more ignored: a cache scale of no layer .* has 3"):
        assert loaders.load(checkpoint(tmp_path, scales)).cache_scales is not None


def test_config_of_the_cache_alone(tmp_path):
    """compressed-tensors files that quantise nothing but the cache load; those that quantise weights are refused as before."""
    scheme = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True},
    }
    folder = checkpoint(tmp_path, all_layers(), quantization_config=scheme)
    assert loaders.load(folder).cache_scales is not None
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 4}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="compressed-tensors"):
        loaders.load(folder)


def attended_by_hand(seen, layer, scales, d):
    """Attention of a layer over codes under these scales, by the oracle."""
    n = len(seen["k", layer])
    q, k, v = (seen[p, layer].reshape(n, -1, d) for p in "qkv")
    own = [oracle.decode(oracle.encode(x, "bfloat16"), "bfloat16") for x in (k, v)]
    values, coded = oracle.code_values("fp8_e4m3"), []
    for x, scale in zip(own, scales, strict=True):
        scale = scale[None, :, None]
        coded.append(values[oracle.encode_scaled(x * (np.float32(1) / scale), np.float32(1), "fp8_e4m3")] * scale.astype(np.float64))
    return oracle.attention_buffered(q, coded, own, 0, d**-0.5, 0, 0, 64, 4)


def test_the_scales_are_used(tmp_path, isa):
    """What attention gives is what the file's scales say: with too small ones, most keys are clipped."""
    c = {"num_hidden_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": HEADS}
    folder, seen = checkpoint(tmp_path, all_layers(k=0.001), **c), {}

    def look(point, layer, rows):
        seen[point, layer] = rows

    with llmcoopt.Model.from_pretrained(folder, isa=isa, threads=2) as model:
        assert model.facts()["cache_scales"] == "3 of 3 layers, 0.001 to 0.009"
        ids, points = prompt(100), ["q", "k", "v", "attended"]
        with llmcoopt.KVCache(model, "fp8", kv_scales="checkpoint") as cache, llmcoopt.KVCache(model, "fp8") as block:
            logits = model.forward(ids, block.sequence())
            assert not np.array_equal(model.forward(ids, cache.sequence(), tap=Tap(points, look)), logits)
            for layer in range(LAYERS):
                right, bound = attended_by_hand(seen, layer, model.cache_scales[layer], 16)
                oracle.assert_close(seen["attended", layer].reshape(right.shape), right, 8 * bound)
        report = llmcoopt.cache_report(model, ids, "fp8", kv_scales="checkpoint", progress=False)
        size = np.abs(np.concatenate([seen[p, 0].reshape(100, HEADS, 16)[:96] for p in "kv"], axis=2))
        limit = 464 * np.repeat(model.cache_scales[0].T, 16, axis=1)
        np.testing.assert_allclose(report.saturated[0], (size > limit).mean(axis=(0, 2)), atol=0.002)
        assert report.saturated[0].min() > 0.2
        assert report.key_error.min() > 5 * llmcoopt.cache_report(model, ids, "fp8", progress=False).key_error.max()


def test_bad_options(tmp_path):
    with llmcoopt.Model.from_pretrained(checkpoint(tmp_path, all_layers())) as model:
        for how, text in (
            ({"dtype": "int8"}, "for layers of fp8_e4m3, .* found int8"),
            ({"dtype": "auto"}, "for layers of fp8_e4m3, .* found float32"),
            ({"dtype": {"default": "fp8", 1: "fp8_e5m2"}}, "found fp8_e5m2"),
            ({"dtype": "auto", "calibration": prompt(50)}, "calibration: kv_scales is 'checkpoint'"),
        ):
            with pytest.raises(ArgumentError, match=text):
                llmcoopt.KVCache(model, kv_scales="checkpoint", **how)
        with pytest.raises(ArgumentError, match="kv_scales = 'file', expected 'block' or 'checkpoint'"):
            llmcoopt.KVCache(model, "fp8", kv_scales="file")
        for scales, text in (
            (np.ones((3, 2, 2)), "48 bytes|96 bytes, expected 12 float32"),
            (np.ones((3, 2, 1), np.float32), "24 bytes, expected 12 float32"),
            (np.full((3, 2, 2), np.nan, np.float32), "number 0 is not a scale"),
        ):
            with pytest.raises(ArgumentError, match=text):
                llmcoopt._core.KVCache(model._core, "fp8_e4m3", 64, 100, True, fixed_scales=scales)
    with (
        llmcoopt.Model.from_pretrained("tiny") as tiny,
        pytest.raises(ArgumentError, match="the files of 'tiny' have no k_scale and v_scale"),
    ):
        llmcoopt.KVCache(tiny, "fp8", kv_scales="checkpoint")

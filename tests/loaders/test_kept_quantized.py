"""Quantised weights that stay in their bits: what the kernels' layout holds is what the file holds, and the model computes with it."""

import checkpoints
import numpy as np
import pytest
from quant_writers import SHAPE, as_float32, make
from test_quantized import VARIANTS, arguments
from writers import gguf_metadata, gguf_tensors, raw_gguf

import llmcoopt
from llmcoopt import _core
from llmcoopt.errors import ArgumentError, FormatError
from llmcoopt.loaders import load
from llmcoopt.loaders.gguf import BLOCKS
from llmcoopt.loaders.gguf_model import DECODABLE
from llmcoopt.loaders.packing import QUANTIZED, layout_of

UP = "model.layers.0.mlp.up_proj"


def decoded(tensor):
    """float32 [n, k] of a tensor in the layout."""
    out = np.empty(tensor.shape, np.float32)
    _core.unpack_rows(tensor.data, 0, out)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_kept_exactly(tmp_path, variant):
    layout, how = VARIANTS[variant]
    _, meant = make(tmp_path, layout, **arguments(how))
    checkpoint = load(tmp_path, quantized=True)
    assert checkpoint.tensors.keys() == meant.keys()
    kept = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype == QUANTIZED]
    assert {tensor.name for tensor in kept} == {f"{name}.weight" for name in checkpoint.quantized} and len(kept) == 14
    for tensor in kept:
        assert layout_of(tensor)[0] == (8 if how.get("bits", 4) == 8 else 4)
        assert np.array_equal(decoded(tensor), meant[tensor.name]), tensor.name
        assert checkpoint.stored[tensor.name].kept == f"{layout_of(tensor)[0]} bits"


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_run(tmp_path, variant):
    """The logits are those of the weights in float32, but for the rounding of activations to 16 bits, and to bfloat16 for the
    16-bit head on machines that do so."""
    layout, how = VARIANTS[variant]
    make(tmp_path, layout, **arguments(how))
    ids = checkpoints.prompt(20, SHAPE["vocab_size"])
    with llmcoopt.Model.from_pretrained(tmp_path, dtype="float32", threads=1) as exact, llmcoopt.KVCache(exact, dtype="float32") as cache:
        expected = exact.forward(ids, cache.sequence())
    found = []
    for isa in llmcoopt.isas():
        with llmcoopt.Model.from_pretrained(tmp_path, threads=1, isa=isa) as model, llmcoopt.KVCache(model, dtype="float32") as cache:
            assert model.dtype == "bfloat16"
            found.append(model.forward(ids, cache.sequence()))
    for logits in found:
        assert np.linalg.norm(logits - expected) < 3e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", DECODABLE)
def test_gguf_blocks_are_kept_exactly(tmp_path, kind):
    name, values, size = BLOCKS[kind]
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    weights = checkpoints.make(tmp_path, "llama", **shape)
    config = {**checkpoints.SMALL, **shape}
    tensors, rng = gguf_tensors(weights, config), np.random.default_rng(kind)
    for key, (_, dims, _) in list(tensors.items()):
        if len(dims) == 2:
            blocks = rng.integers(0, 256, (dims[0] * dims[1] // values, size)).astype(np.uint8)
            for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(name, (0,)):
                blocks[:, at : at + 2] = rng.uniform(1e-4, 1e-2, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
            tensors[key] = (name, dims, blocks.tobytes())
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_gguf(gguf_metadata(config), tensors))
    exact, checkpoint = load(path, "float32"), load(path, quantized=True)
    for key, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2:
            assert tensor.dtype == QUANTIZED and layout_of(tensor)[1] == (16 if name == "Q6_K" else 32)
            assert np.array_equal(decoded(tensor), exact.tensors[key].numpy()), key
    with llmcoopt.Model.from_pretrained(path, threads=1) as model:
        assert np.isfinite(model.forward([1, 2, 3])).all()
        assert {row["kept"] for row in model.stored if row["format"] == name} == {"4 bits" if name.startswith("Q4") else "8 bits"}


def test_what_the_layout_does_not_express(tmp_path):
    """Groups of 12, and groups of different sizes, are decoded, and the facts say why."""
    make(tmp_path, group=12)
    with llmcoopt.Model.from_pretrained(tmp_path, threads=1) as model:
        row = next(row for row in model.stored if row["modules"] == "model.layers.*.mlp.up_proj")
        assert row["kept"] == "bfloat16 (groups of 12, expected a multiple of 8)"
        assert any("kept as bfloat16 (groups of 12" in line for line in model.stored_lines())

    def uneven(tensors):
        g_idx = tensors[f"{UP}.g_idx"].copy()
        g_idx[:5] = 1
        tensors[f"{UP}.g_idx"] = g_idx

    make(tmp_path / "uneven", order=np.random.default_rng(1), edit=uneven)
    checkpoint = load(tmp_path / "uneven", quantized=True)
    assert checkpoint.tensors[f"{UP}.weight"].dtype == "BF16"
    assert checkpoint.stored[f"{UP}.weight"].kept == "bfloat16 (groups of different sizes)"


def test_mixed_modules(tmp_path):
    """Plain and quantised matrices beside each other in one product, of several bits."""
    modules = {"model.layers.0.self_attn.k_proj": None, "model.layers.0.mlp.gate_proj": None, "model.layers.1.mlp.down_proj": None}
    modules["model.layers.1.self_attn.v_proj"] = {"bits": 8, "order": np.random.default_rng(2)}
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}
    said["dynamic"] = {r"-:.*0\.(self_attn\.k|mlp\.gate)_proj": {}, r"-:.*1\.mlp\.down_proj": {}, r".*1\.self_attn\.v_proj": {"bits": 8}}
    make(tmp_path, "gptq", config=said, per_module=modules)
    ids = checkpoints.prompt(40, SHAPE["vocab_size"])
    with llmcoopt.Model.from_pretrained(tmp_path, threads=1) as model, llmcoopt.Model.from_pretrained(tmp_path, dtype="float32") as exact:
        expected, found = exact.forward(ids), model.forward(ids)
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


def test_rows_are_computed_alike_in_any_batch(tmp_path):
    make(tmp_path, sym=False, order=np.random.default_rng(3))
    prompts = [checkpoints.prompt(n, SHAPE["vocab_size"]) for n in (3, 30, 11)]
    with llmcoopt.Model.from_pretrained(tmp_path, threads=2) as model:
        together = model.generate(prompts, max_new_tokens=12)
        for prompt, ids in zip(prompts, together, strict=True):
            assert list(model.generate([prompt], max_new_tokens=12)[0]) == list(ids)


def test_activations_of_8_bits(tmp_path):
    make(tmp_path)
    ids = checkpoints.prompt(40, SHAPE["vocab_size"])
    outs = {}
    for activations in ("int16", "int8"):
        with llmcoopt.Model.from_pretrained(tmp_path, threads=1, activations=activations) as model:
            assert model.activations == activations
            outs[activations] = model.forward(ids)
    difference = np.linalg.norm(outs["int8"] - outs["int16"]) / np.linalg.norm(outs["int16"])
    assert (difference > 1e-4 or llmcoopt.isas() == ["ref"]) and difference < 0.1


@pytest.mark.parametrize("family, hidden", [("llama", 64), ("llama", 104), ("qwen2", 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_head_of_8_bits(tmp_path, family, hidden, tied):
    shape = {**SHAPE, "hidden_size": hidden, "tie_word_embeddings": tied}
    weights = checkpoints.make(tmp_path, family, **shape, dtype="bfloat16")
    ids = checkpoints.prompt(20, SHAPE["vocab_size"])
    head = load(tmp_path, head_bits=8).tensors["lm_head.weight"]
    exact = as_float32(weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
    steps = np.abs(exact).max() / 127
    assert layout_of(head) == (8, 64) and np.abs(decoded(head) - exact).max() <= steps * 0.51
    with llmcoopt.Model.from_pretrained(tmp_path, threads=1, head_bits=8) as a, llmcoopt.Model.from_pretrained(tmp_path, threads=1) as b:
        row = next(row for row in a.stored if row["modules"] == "lm_head")
        assert (row["format"], row["kept"]) == ("BF16", "8 bits") and row["memory"] < row["bytes"]
        found, expected = a.forward(ids), b.forward(ids)
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < 1e-2


def test_scales_that_are_not_finite(tmp_path):
    def edit(tensors):
        scales = tensors[f"{UP}.scales"].copy()
        scales[0, 7] = np.inf
        tensors[f"{UP}.scales"] = scales

    make(tmp_path, edit=edit)
    with pytest.raises(FormatError, match=f"'{UP}': 1 scales are NaN or infinite"):
        llmcoopt.Model.from_pretrained(tmp_path)


def test_refusals(tmp_path):
    make(tmp_path)
    with pytest.raises(ArgumentError, match="weights = 'packed', expected 'auto' or 'dequantized'"):
        llmcoopt.Model.from_pretrained(tmp_path, weights="packed")
    with pytest.raises(ArgumentError, match="activations = 'int4', expected 'int16' or 'int8'"):
        llmcoopt.Model.from_pretrained(tmp_path, activations="int4")
    with pytest.raises(ArgumentError, match="head_bits = 4, expected 8 or None"):
        llmcoopt.Model.from_pretrained(tmp_path, head_bits=4)
    with pytest.raises(ArgumentError, match="dtype is 'float32' and weights are to stay quantised"):
        load(tmp_path, "float32", quantized=True)

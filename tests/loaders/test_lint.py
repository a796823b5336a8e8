"""The linter: every fault is found, all in one run, with its tensor, and nothing is found in good files."""

import json

import checkpoints
import numpy as np
import pytest
from quant_writers import SHAPE, gptq_config, int32, make
from test_gguf_model import write_model
from test_hf_folder import edit_json, rewrite
from test_quantized import VARIANTS, arguments
from writers import gguf_metadata, gguf_tensors, raw_gguf

from llmcoopt.cli import main
from llmcoopt.errors import ArgumentError, MissingFileError
from llmcoopt.loaders import lint

UP = "model.layers.0.mlp.up_proj"


def kinds(path):
    return [(finding.kind, finding.tensor, finding.error) for finding in lint(path)]


def only(path, kind, tensor, found, error=True):
    """The one finding, checked."""
    findings = lint(path)
    assert [(f.kind, f.tensor, f.error) for f in findings] == [(kind, tensor, error)], [str(f) for f in findings]
    assert found in str(findings[0]) and str(path) in findings[0].file
    return findings[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_files_have_no_findings(tmp_path, variant):
    layout, how = VARIANTS[variant]
    make(tmp_path, layout, **arguments(how))
    assert lint(tmp_path) == []


@pytest.mark.parametrize("family", checkpoints.ARCHITECTURES)
@pytest.mark.parametrize("shards", [1, 3])
def test_good_plain_folders(tmp_path, family, shards):
    checkpoints.make(tmp_path, family, dtype="float16", shards=shards)
    assert lint(tmp_path) == []


def test_the_tiny_model():
    from llmcoopt.loaders import resolve

    assert lint(resolve("tiny")) == []


def edit_one(folder, part, change, module=UP):
    def edit(arrays):
        array = arrays[f"{module}.{part}"].copy()
        arrays[f"{module}.{part}"] = change(array)

    rewrite(folder, edit)


def set_at(value, *at):
    def change(array):
        array[at] = value
        return array

    return change


@pytest.mark.parametrize(
    "value, what, error",
    [
        (np.nan, "1 scales are NaN", True),
        (np.inf, "1 scales are infinite", True),
        (0.0, "1 scales are 0", False),
        (-0.5, "negative", False),
    ],
)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_scales(tmp_path, scale_dtype, value, what, error):
    make(tmp_path, scale_dtype=scale_dtype)
    stored = checkpoints.cast(np.float32(value), scale_dtype) if scale_dtype != "bfloat16" else checkpoints.bfloat16_bits(value)
    edit_one(tmp_path, "scales", set_at(stored, 1, 17))
    finding = only(tmp_path, "scales", f"{UP}.scales", what, error)
    assert "the first at [1, 17]" in finding.found


@pytest.mark.parametrize("written, said", [("v2", "gptq"), ("v1", "gptq_v2")])
def test_zero_format(tmp_path, written, said):
    make(tmp_path, version=written, config={**gptq_config(), "checkpoint_format": said})
    findings = lint(tmp_path)
    assert len(findings) == 14 and {f.kind for f in findings} == {"zero-format"}
    assert {f.tensor.rsplit(".", 1)[1] for f in findings} == {"qzeros"} and "checkpoint_format" in findings[0].advice


def test_borrow_damage(tmp_path):
    make(tmp_path, sym=False)
    edit_one(tmp_path, "qzeros", lambda words: set_at(0xFFFFFFF7, 1, 2)(words.view(np.uint32)).view(np.int32))
    assert "group 1: output 17 and those after it" in only(tmp_path, "borrow", f"{UP}.qzeros", "overwritten", False).found


def test_one_asymmetric_zero(tmp_path):
    make(tmp_path)
    edit_one(tmp_path, "qzeros", lambda words: set_at(0x77777757, 0, 0)(words.view(np.uint32)).view(np.int32))
    only(tmp_path, "zeros", f"{UP}.qzeros", "group 0, output 1 has the stored zero 5")


@pytest.mark.parametrize(
    "change, kind, found, error",
    [
        (set_at(2, 3), "g_idx", "input 3 is in group 2; expected 0 to 1", True),
        (lambda x: x[:-1], "shape", "shape [63]; expected [64]", True),
        (set_at(0, slice(30, 40)), "g_idx", "expected 32 in every group", False),
        (lambda x: np.ones_like(x), "g_idx", "group 0 has 0 inputs", False),
        (lambda x: np.zeros_like(x), "g_idx", "all 0 with 2 groups", False),
    ],
)
def test_g_idx(tmp_path, change, kind, found, error):
    make(tmp_path)
    edit_one(tmp_path, "g_idx", change)
    only(tmp_path, kind, f"{UP}.g_idx", found, error)


def test_shards(tmp_path):
    """A missing shard, a damaged one, a tensor that is elsewhere, a file that nothing names: all in one run."""
    make(tmp_path, shards=4)
    (tmp_path / "model-00001-of-00004.safetensors").unlink()
    damaged = tmp_path / "model-00002-of-00004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    moved = next(name for name, place in places.items() if "00003" in place)
    places[moved] = "model-00004-of-00004.safetensors"
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / "stray.safetensors").write_bytes(b"x")
    findings = {f.kind: f for f in lint(tmp_path)}
    assert "00001" in findings["missing-shard"].file and "truncated" in findings["file"].found
    assert "00002" in findings["file"].file
    assert any(f.tensor == moved and "00004" in f.file for f in lint(tmp_path) if f.kind == "missing-tensor")
    unused = [f for f in lint(tmp_path) if f.kind == "unused"]
    assert {f.tensor for f in unused if not f.error} >= {None, moved}


def test_plain_weights(tmp_path):
    """Shapes, types, NaN, missing and unused tensors of a plain folder, all in one run."""
    checkpoints.make(tmp_path, dtype="bfloat16")

    def edit(arrays):
        arrays["model.norm.weight"] = arrays["model.norm.weight"][:-1].copy()
        arrays["model.layers.1.input_layernorm.weight"] = np.ones(36, np.int64)
        arrays["model.layers.0.mlp.up_proj.weight"] = set_at(0x7FC0, 3, 5)(arrays["model.layers.0.mlp.up_proj.weight"].copy())
        arrays["model.layers.0.extra.weight"] = np.ones(3, np.float32)
        del arrays["model.layers.2.self_attn.v_proj.weight"]

    rewrite(tmp_path, edit)
    found = {(f.kind, f.tensor): f for f in lint(tmp_path)}
    assert found.keys() == {
        ("shape", "model.norm.weight"),
        ("dtype", "model.layers.1.input_layernorm.weight"),
        ("not-finite", "model.layers.0.mlp.up_proj.weight"),
        ("unused", "model.layers.0.extra.weight"),
        ("missing-tensor", "model.layers.2.self_attn.v_proj.weight"),
    }
    assert "the first at [3, 5]" in found["not-finite", "model.layers.0.mlp.up_proj.weight"].found


@pytest.mark.parametrize("dtype, value", [("float32", np.inf), ("float16", -np.inf), ("float32", -np.nan)])
def test_values_that_are_not_finite(tmp_path, dtype, value):
    checkpoints.make(tmp_path, dtype=dtype)
    edit_one(tmp_path, "weight", set_at(value, 1, 2))
    only(tmp_path, "not-finite", f"{UP}.weight", "1 values are NaN or infinite, the first at [1, 2]")


def test_tied_heads(tmp_path):
    checkpoints.make(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    only(tmp_path, "tied", "lm_head.weight", "it differs from 'model.embed_tokens.weight'", False)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    rewrite(tmp_path, lambda arrays: {name: x for name, x in arrays.items() if name != "lm_head.weight"})
    only(tmp_path, "tied", "lm_head.weight", "missing", False)


def test_biases(tmp_path):
    name = "model.layers.1.self_attn.k_proj.bias"
    checkpoints.make(tmp_path, "qwen2")
    rewrite(tmp_path, lambda arrays: {key: x for key, x in arrays.items() if key != name})
    assert f"'{name}' is missing" in only(tmp_path, "bias", None, "the config expects it").found


@pytest.mark.parametrize(
    "value, found", [(0.5, None), (0.0, "holds the scale 0; expected a number above 0"), (np.nan, "holds the scale nan")]
)
def test_cache_scales(tmp_path, value, found):
    checkpoints.make(tmp_path)
    rewrite(tmp_path, lambda arrays: {**arrays, "model.layers.0.self_attn.k_scale": np.full(1, value, np.float32)})
    if found is None:
        assert lint(tmp_path) == []
    else:
        only(tmp_path, "cache-scales", None, found)


def test_several_faults_of_modules(tmp_path):
    """One bad module does not hide another."""
    make(tmp_path)
    edit_one(tmp_path, "qweight", lambda x: np.ascontiguousarray(x[:5]))
    edit_one(tmp_path, "scales", lambda x: np.ascontiguousarray(x[:, :4]), module="model.layers.1.mlp.up_proj")
    edit_one(tmp_path, "qzeros", lambda x: np.ascontiguousarray(x[:, :4]), module="model.layers.1.mlp.gate_proj")
    tensors = ["model.layers.0.mlp.up_proj.qweight", "model.layers.1.mlp.gate_proj.qzeros", "model.layers.1.mlp.up_proj.scales"]
    assert kinds(tmp_path) == [("shape", tensor, True) for tensor in tensors]


@pytest.mark.parametrize(
    "change, kind",
    [
        ({"hidden_size": "x"}, "config"),
        ({"model_type": "bert"}, "config"),
        ({"quantization_config": {"quant_method": "hqq"}}, "unsupported"),
    ],
)
def test_configs(tmp_path, change, kind):
    make(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    assert kind in [finding.kind for finding in lint(tmp_path)]
    (tmp_path / "config.json").write_text("{")
    assert [finding.kind for finding in lint(tmp_path)] == ["config"]


def test_values_are_looked_at_without_a_config(tmp_path):
    make(tmp_path)
    edit_one(tmp_path, "scales", set_at(np.nan, 0, 0))
    (tmp_path / "config.json").write_text("{")
    assert {finding.kind for finding in lint(tmp_path)} == {"config", "scales"}


def test_foreign_layouts(tmp_path):
    checkpoints.make(tmp_path, **SHAPE)
    rewrite(tmp_path, lambda arrays: {**arrays, f"{UP}.B": int32(np.zeros((4, 4), np.uint32))})
    only(tmp_path, "unsupported", f"{UP}.B", "Marlin")


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_good_gguf_files(tmp_path, architecture):
    assert lint(write_model(tmp_path, architecture)[0]) == []


GGUF_SHAPE = {"vocab_size": 5, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


def gguf_file(tmp_path, edit):
    checkpoints.make(tmp_path, **GGUF_SHAPE, num_hidden_layers=1)
    config = {**checkpoints.SMALL, **GGUF_SHAPE, "num_hidden_layers": 1}
    tensors = gguf_tensors(checkpoints.read_safetensors(tmp_path / "model.safetensors"), config)
    edit(tensors)
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_gguf(gguf_metadata(config), tensors))
    return path


def test_gguf_faults(tmp_path):
    def edit(tensors):
        block = np.zeros((32, 18), np.uint8)
        block[7, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        tensors["blk.0.ffn_up.weight"] = ("Q4_0", (32, 32), block.tobytes())
        tensors["blk.0.attn_norm.weight"] = ("F32", (32,), np.full(32, np.inf, np.float32).tobytes())
        tensors["blk.0.ffn_gate.weight"] = ("F32", (16, 32), bytes(16 * 32 * 4))
        tensors["blk.0.ffn_gate_inp.weight"] = ("F32", (32,), bytes(128))
        tensors["blk.0.ffn_down.weight"] = ("Q2_K", (1, 256), bytes(84))
        del tensors["blk.0.attn_v.weight"]

    found = {(f.kind, f.tensor): str(f) for f in lint(gguf_file(tmp_path, edit))}
    assert "32 values are NaN or infinite, the first at [7, 0]" in found["not-finite", "blk.0.ffn_up.weight"]
    assert "the first at [0]" in found["not-finite", "blk.0.attn_norm.weight"]
    assert "shape [16, 32]; expected [32, 32]" in found["shape", "blk.0.ffn_gate.weight"]
    assert ("missing-tensor", "model.layers.0.self_attn.v_proj.weight") in found
    assert any("ffn_gate_inp" in text for (kind, _), text in found.items() if kind == "unused")
    assert any("Q2_K" in text for (kind, _), text in found.items() if kind == "unsupported")


def test_damaged_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert [finding.kind for finding in lint(path)] == ["file"]


# ---------------------------------------------------------------- the command


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(MissingFileError):
        lint(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        lint(tmp_path)
    checkpoints.make(tmp_path)
    with pytest.raises(ArgumentError, match="pass its folder"):
        lint(tmp_path / "model.safetensors")


def test_command(tmp_path, capsys):
    make(tmp_path)
    assert main(["lint", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 0 errors, 0 warnings\n"
    edit_one(tmp_path, "scales", set_at(np.nan, 0, 0))
    edit_one(tmp_path, "g_idx", lambda x: np.zeros_like(x))
    assert main(["lint", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].endswith("1 errors, 1 warnings")
    assert lines[0].startswith(f"error: {tmp_path}/model.safetensors: tensor '{UP}.scales': 1 scales are NaN")
    assert lines[0].endswith("; expected positive numbers; the file is damaged") and lines[1].startswith("warning: ")
    assert main(["lint", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == report["warnings"] == 1 and report["path"] == str(tmp_path)
    assert report["findings"][0]["level"] == "error" and report["findings"][0]["tensor"] == f"{UP}.scales"
    assert report["findings"][0].keys() == {"level", "kind", "file", "tensor", "found", "expected", "advice"}
    assert main(["lint", str(tmp_path / "nothing")]) == 2
    out = capsys.readouterr()
    assert out.out == "" and "no such folder or file" in out.err

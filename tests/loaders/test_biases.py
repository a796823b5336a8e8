"""Biases: a file must hold those that its config promises, and others are used with a warning."""

import json
import warnings

import checkpoints
import pytest
from test_gguf_model import write_model
from test_hf_folder import edit_json, rewrite

import llmcoopt
from llmcoopt.errors import FormatError
from llmcoopt.loaders import load

ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]
MLP = [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
PROMISED = [
    *(("qwen2", {}, stem) for stem in ATTENTION[:3]),
    *(("llama", {"attention_bias": True}, stem) for stem in ATTENTION),
    *(("qwen3", {"attention_bias": True}, stem) for stem in ATTENTION),
    *(("llama", {"mlp_bias": True}, stem) for stem in MLP),
]


@pytest.mark.parametrize("family, config, stem", PROMISED)
def test_a_promised_bias_must_be_there(tmp_path, family, config, stem):
    checkpoints.make(tmp_path, family, **config)
    load(tmp_path)
    name = f"model.layers.1.{stem}.bias"
    rewrite(tmp_path, lambda arrays: {key: x for key, x in arrays.items() if key != name})
    with pytest.raises(FormatError) as caught:
        llmcoopt.Model.from_pretrained(tmp_path, threads=1)
    assert f"model.safetensors: tensor '{name}' is missing" in str(caught.value)


def test_the_file_named_is_the_shard_of_the_weight(tmp_path):
    weights = checkpoints.make(tmp_path, "qwen2", shards=2)
    names = list(weights)
    weight, bias = (f"model.layers.2.self_attn.v_proj.{kind}" for kind in ("weight", "bias"))
    shard = f"model-{names.index(weight) % 2 + 1:05}-of-00002.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={name: place for name, place in places.items() if name != bias})
    with pytest.raises(FormatError, match=rf"{shard}: tensor 'model\.layers\.2\.self_attn\.v_proj\.bias' is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "family, config, stems",
    [
        ("llama", {}, ATTENTION[:1]),
        ("llama", {}, ATTENTION + MLP),
        ("qwen2", {"attention_bias": True}, ATTENTION[3:]),
        ("mistral", {"attention_bias": True}, ATTENTION[:3]),
        ("qwen3", {"mlp_bias": True}, MLP),
    ],
)
def test_a_denied_bias_is_used_with_a_warning(tmp_path, family, config, stems):
    """Which types have which biases is as in transformers: mistral none, qwen2 only q, k and v, mlp biases only llama."""
    plain = {"attention_bias": False, "mlp_bias": False}
    weights = checkpoints.make(tmp_path, family, **plain)
    edit_json(tmp_path / "config.json", **plain)
    extra = {f"model.layers.1.{stem}.bias": weights[f"model.layers.1.{stem}.weight"][:, 0].copy() for stem in stems}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)
    rewrite(tmp_path, lambda arrays: arrays | extra)
    edit_json(tmp_path / "config.json", **config)
    more = rf" \(and {len(stems) - 1} more tensors\)" if len(stems) > 1 else "$"
    with pytest.warns(UserWarning, match=rf"model\.safetensors: tensor 'model\.layers\.1\.{stems[0]}\.bias': used; expected none.*{more}"):
        checkpoint = load(tmp_path)
    assert extra.keys() <= checkpoint.tensors.keys()


@pytest.mark.parametrize(
    "architecture, stem, reason",
    [("qwen2", "k_proj", "architecture 'qwen2' has it"), ("llama", "o_proj", r"'blk\.0\.attn_\w+\.bias' is there")],
)
def test_gguf(tmp_path, architecture, stem, reason):
    """The metadata say nothing of biases: qwen2 has three, and what one layer has, all have."""
    part = {"k_proj": "attn_k", "o_proj": "attn_output"}[stem]
    path, _ = write_model(tmp_path, architecture, attention_bias=True, tensors={f"blk.1.{part}.bias": None})
    with pytest.raises(FormatError, match=rf"model\.gguf: tensor 'blk\.1\.{part}\.bias' is missing; expected it, as {reason}"):
        load(path)


def test_gguf_without_any_bias(tmp_path):
    gone = {f"blk.{i}.attn_{part}.bias": None for i in range(3) for part in "qkv"}
    path, _ = write_model(tmp_path, "qwen2", tensors=gone)
    with pytest.raises(FormatError, match=r"'blk\.0\.attn_q\.bias' is missing"):
        load(path)

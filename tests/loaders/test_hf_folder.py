"""Hugging Face folders: single files, shards, names, tied heads, and everything that is refused."""

import json
import warnings

import checkpoints
import numpy as np
import pytest

from llmcoopt.errors import ArgumentError, FormatError, MissingFileError, NumericError, UnsupportedError
from llmcoopt.loaders import load


def same(checkpoint, weights):
    assert checkpoint.tensors.keys() == weights.keys()
    for name, tensor in checkpoint.tensors.items():
        found = tensor.numpy()
        assert tensor.name == name and found.shape == weights[name].shape
        assert found.tobytes() == weights[name].tobytes(), name


def rewrite(folder, edit):
    """Changes the tensors of model.safetensors."""
    arrays = checkpoints.read_safetensors(folder / "model.safetensors")
    checkpoints.write_safetensors(folder / "model.safetensors", edit(arrays) or arrays)


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_round_trip(tmp_path, family, shards, dtype):
    weights = checkpoints.make(tmp_path, family, dtype=dtype, shards=shards)
    checkpoint = load(tmp_path)
    same(checkpoint, weights)
    assert checkpoint.config.model_type == family and checkpoint.format == "safetensors"
    assert checkpoint.path == checkpoint.tokenizer_source == tmp_path


def test_fixture_shards(data, tmp_path):
    source = data / "models/hf-tiny-logits"
    for name in ("tiny_llama-00001-of-00002.safetensors", "tiny_llama-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_bytes((source / "tiny_llama.safetensors.index.json").read_bytes())
    (tmp_path / "config.json").write_bytes((source / "tiny_llama_config.json").read_bytes())
    single = checkpoints.read_safetensors(source / "tiny_llama.safetensors")
    assert any("rotary_emb" in name for name in single)
    same(load(tmp_path), {name: x for name, x in single.items() if "rotary_emb" not in name})


def test_stray_shards_are_ignored(tmp_path):
    weights = checkpoints.make(tmp_path, shards=2)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"not read")
    same(load(tmp_path), weights)


def test_missing_shard(tmp_path):
    checkpoints.make(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"model-00002-of-00002\.safetensors: no such file; .*index\.json expects \d+ tensors"):
        load(tmp_path)


def test_shard_without_its_tensor(tmp_path):
    checkpoints.make(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    moved = "model.norm.weight"
    places[moved] = next(name for name in sorted(set(places.values())) if name != places[moved])
    edit_json(index, weight_map=places)
    with pytest.raises(FormatError, match=rf"{places[moved]}: tensor '{moved}' is not in it"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x\0y", ""])
def test_shards_outside_the_folder_are_refused(tmp_path, name):
    checkpoints.make(tmp_path, shards=2)
    edit_json(tmp_path / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises((FormatError, MissingFileError), match=r"weight_map names|cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
def test_bad_index(tmp_path, weight_map):
    checkpoints.make(tmp_path, shards=2)
    edit_json(tmp_path / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(FormatError, match="weight_map is"):
        load(tmp_path)


def test_any_single_file_is_found(tmp_path):
    weights = checkpoints.make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights-4.safetensors")
    same(load(tmp_path), weights)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(MissingFileError, match="2 safetensors files"):
        load(tmp_path)


def test_names_without_the_model_prefix(tmp_path):
    weights = checkpoints.make(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda arrays: {name.removeprefix("model."): x for name, x in arrays.items()})
    same(load(tmp_path), weights)
    rewrite(tmp_path, lambda arrays: {**arrays, "model.norm.weight": arrays["norm.weight"]})
    with pytest.raises(FormatError, match=r"'model\.norm\.weight' and '.*norm\.weight' are the same weight"):
        load(tmp_path)


def test_known_buffers_are_ignored(tmp_path):
    weights = checkpoints.make(tmp_path)
    rewrite(tmp_path, lambda arrays: {**arrays, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32)})
    same(load(tmp_path), weights)


def test_tied_head(tmp_path):
    weights = checkpoints.make(tmp_path, tie_word_embeddings=True)
    assert load(tmp_path).config.tie_word_embeddings
    rewrite(tmp_path, lambda arrays: {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"]})
    checkpoint = load(tmp_path)
    assert checkpoint.config.tied_head
    same(checkpoint, weights)
    rewrite(tmp_path, lambda arrays: {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"] + 1})
    with pytest.warns(UserWarning, match=r"'lm_head\.weight': it differs from 'model\.embed_tokens\.weight'"):
        checkpoint = load(tmp_path)
    assert not checkpoint.config.tied_head and "lm_head.weight" in checkpoint.tensors
    assert load(tmp_path, tie_word_embeddings=True).config.tied_head
    assert "lm_head.weight" in load(tmp_path, tie_word_embeddings=False).tensors


def test_head_missing_though_not_tied(tmp_path):
    checkpoints.make(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, lambda arrays: {name: x for name, x in arrays.items() if name != "lm_head.weight"})
    with pytest.warns(UserWarning, match=r"'lm_head\.weight': missing: 'model\.embed_tokens\.weight'.*tie_word_embeddings=True"):
        assert load(tmp_path).config.tied_head
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, tie_word_embeddings=True).config.tied_head
    with pytest.raises(FormatError, match=r"'lm_head\.weight' is missing"):
        load(tmp_path, tie_word_embeddings=False)
    rewrite(tmp_path, lambda arrays: {name: x for name, x in arrays.items() if "embed" not in name})
    with pytest.raises(FormatError, match=r"'model\.embed_tokens\.weight' is missing"):
        load(tmp_path)


def test_generation_config_wins(tmp_path):
    checkpoints.make(tmp_path, eos_token_id=3, bos_token_id=1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 7, "temperature": 0.6}')
    checkpoint = load(tmp_path)
    assert checkpoint.config.eos_token_ids == (5, 6) and checkpoint.config.pad_token_id == 7 and checkpoint.config.bos_token_id == 1
    assert checkpoint.generation_config["temperature"] == 0.6


def test_the_fp8_stub_is_refused(data, tmp_path):
    checkpoints.make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((data / "quant-ref/safetensors/fp8.safetensors").read_bytes())
    with pytest.raises(UnsupportedError, match=r"FP8 weights"):
        load(tmp_path)


def test_wrong_ranks(tmp_path):
    checkpoints.make(tmp_path)
    rewrite(tmp_path, lambda arrays: {**arrays, "model.norm.weight": arrays["model.norm.weight"].reshape(1, 1, -1)})
    with pytest.raises(FormatError, match=r"'model\.norm\.weight' has shape \[1, 1, 36\]"):
        load(tmp_path)


def test_pickles_only(tmp_path):
    checkpoints.make(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*save_pretrained"):
        load(tmp_path)


def test_missing_pieces(tmp_path):
    with pytest.raises(MissingFileError, match=r"no config\.json.*holds nothing"):
        load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(MissingFileError, match=r"pass a GGUF file itself: .*model\.gguf"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **checkpoints.SMALL}))
    with pytest.raises(MissingFileError, match=r"no model\.safetensors .*holds config\.json, model\.gguf"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: not valid JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config\.json: found a JSON list"):
        load(tmp_path)


def test_a_weights_file_in_place_of_its_folder(tmp_path):
    checkpoints.make(tmp_path)
    with pytest.raises(ArgumentError, match="pass its folder"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"config\.json: not a GGUF file.*JSON"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "torch.bfloat16"])
def test_dtype_converts_matrices(tmp_path, dtype):
    weights = checkpoints.make(tmp_path, dtype="float32")
    wanted = dtype.removeprefix("torch.")
    checkpoint = load(tmp_path, dtype=dtype)
    for name, tensor in checkpoint.tensors.items():
        expected = checkpoints.cast(weights[name], wanted) if weights[name].ndim == 2 else weights[name]
        assert tensor.numpy().tobytes() == expected.tobytes(), name


def test_dtype_errors(tmp_path):
    checkpoints.make(tmp_path)
    with pytest.raises(ArgumentError, match="dtype is 'int8'"):
        load(tmp_path, dtype="int8")

    def too_large(arrays):
        up = arrays["model.layers.1.mlp.up_proj.weight"].copy()
        up[3, 4], up[5, 6] = 70000, np.nan
        return {**arrays, "model.layers.1.mlp.up_proj.weight": up}

    rewrite(tmp_path, too_large)
    with pytest.raises(NumericError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds 2 values"):
        load(tmp_path, dtype="float16")
    with pytest.raises(NumericError, match="holds 1 values"):
        load(tmp_path, dtype="bfloat16")

"""Damaged files: any flip of bytes or cut of a small valid file either loads or raises llmcoopt.Error, and nothing else. The linter raises it
only where there is no model, and finds something wherever loading fails."""

import json
import warnings

import checkpoints
import numpy as np
import pytest
import quant_writers
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import gguf_metadata, gguf_tensors, raw_gguf

from llmcoopt.errors import Error
from llmcoopt.loaders import lint, load

SHAPE = {
    "num_hidden_layers": 1,
    "vocab_size": 5,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
}
# Most damage goes to the first part of a file, where the structure is.
PLACES = st.one_of(st.floats(0, 0.05), st.floats(0, 0.5), st.floats(0, 1, exclude_max=True))
FLIPS = st.lists(st.tuples(PLACES, st.integers(0, 255)), min_size=0, max_size=6)
CUT = st.one_of(st.none(), st.floats(0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoints.make(folder / "hf", **SHAPE)
    return folder


@pytest.fixture(scope="module")
def gguf(folder):
    """The bytes of a GGUF file with arrays, strings, quantised and plain tensors."""
    weights = checkpoints.read_safetensors(folder / "hf/model.safetensors")
    tensors = gguf_tensors(weights, SHAPE)
    tensors["blk.0.ffn_down.weight"] = ("Q4_1", (8, 32), bytes(range(160)))
    metadata = gguf_metadata({**checkpoints.SMALL, **SHAPE}) | {
        "tokenizer.ggml.tokens": ("[string]", ["a", "b", "c", "dd", "é"]),
        "tokenizer.ggml.scores": ("[f32]", [0.0, 1.0, 2.0, 3.0, 4.0]),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "general.alignment": ("u32", 32),
        "general.flags": ("[[bool]]", [[1], [0, 1]]),
    }
    return raw_gguf(metadata, tensors)


def damaged(raw, flips, cut):
    out = bytearray(raw)
    for place, value in flips:
        out[int(place * len(out))] ^= value
    return bytes(out if cut is None else out[: int(cut * len(out))])


def loads_or_refuses(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checkpoint = load(path)
        except Error as error:
            assert str(error)
        else:
            for tensor in checkpoint.tensors.values():
                tensor.numpy().sum()
            lint(path)
            return
        assert lint(path)


@settings(max_examples=400, deadline=None)
@given(flips=FLIPS, cut=CUT)
def test_safetensors(folder, flips, cut):
    target = folder / "damaged"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "hf/config.json").read_bytes())
    (target / "model.safetensors").write_bytes(damaged((folder / "hf/model.safetensors").read_bytes(), flips, cut))
    loads_or_refuses(target)


@settings(max_examples=400, deadline=None)
@given(flips=FLIPS, cut=CUT)
def test_gguf(folder, gguf, flips, cut):
    path = folder / "damaged.gguf"
    path.write_bytes(damaged(gguf, flips, cut))
    loads_or_refuses(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ROPE = ("rope_type", "type", "factor", "rope_theta", "short_factor", "original_max_position_embeddings", "beta_fast", "mscale", "truncate")
KEYS = (
    *checkpoints.SMALL,
    "model_type",
    "architectures",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "eos_token_id",
)
KEYS += (
    "rope_scaling",
    "rope_parameters",
    "quantization_config",
    "multi_query",
    "attention_bias",
    "max_window_layers",
    "partial_rotary_factor",
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(sorted(checkpoints.ARCHITECTURES)),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    kind=st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"]),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE), JSON, max_size=5),
)
def test_config(folder, family, changes, kind, rope):
    target = folder / "config"
    target.mkdir(exist_ok=True)
    content = {**json.loads((folder / "hf/config.json").read_text()), "model_type": family, "architectures": None}
    if rope is not None:
        content["rope_scaling"] = {"rope_type": kind, **rope}
    (target / "config.json").write_text(json.dumps({**content, **changes}))
    (target / "model.safetensors").write_bytes((folder / "hf/model.safetensors").read_bytes())
    loads_or_refuses(target)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), JSON, max_size=2), flips=FLIPS)
def test_index(folder, changes, flips):
    target = folder / "sharded"
    if not target.exists():
        checkpoints.make(target, shards=2, **SHAPE)
    index = target / "model.safetensors.index.json"
    original = target / "original.json"
    if not original.exists():
        original.write_bytes(index.read_bytes())
    content = {**json.loads(original.read_text()), **changes}
    index.write_bytes(damaged(json.dumps(content).encode(), flips, None))
    loads_or_refuses(target)


QUANTISED = {
    "gptq": ("gptq", {"order": 1, "sym": False}),
    "gptq3": ("gptq", {"bits": 3}),
    "awq": ("awq", {}),
    "compressed": ("compressed-tensors", {"order": 1, "sym": False}),
}


@pytest.fixture(scope="module")
def quantised(folder):
    """Folders of every layout, one layer each."""
    for name, (layout, how) in QUANTISED.items():
        how = {**how, "order": np.random.default_rng(1)} if "order" in how else how
        quant_writers.make(folder / name, layout, edit=first_layer, **how)
        content = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 1}))
    return folder


def first_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(QUANTISED)), flips=FLIPS, cut=st.one_of(st.none(), st.none(), CUT))
def test_quantised(quantised, name, flips, cut):
    target = quantised / "damaged-quantised"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((quantised / name / "config.json").read_bytes())
    (target / "model.safetensors").write_bytes(damaged((quantised / name / "model.safetensors").read_bytes(), flips, cut))
    loads_or_refuses(target)


QUANTISATION_KEYS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "checkpoint_format",
    "quant_method",
    "dynamic",
    "pack_dtype",
    "is_marlin_format",
)
QUANTISATION_KEYS += ("config_groups", "format", "version", "w_bit", "zero_point", "model_file_base_name", "lm_head")


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(QUANTISED)),
    changes=st.dictionaries(st.sampled_from(QUANTISATION_KEYS), JSON, max_size=3),
    other=st.none() | st.dictionaries(st.sampled_from(QUANTISATION_KEYS), JSON, max_size=3) | JSON,
)
def test_quantisation_configs(quantised, name, changes, other):
    target = quantised / "config-quantised"
    target.mkdir(exist_ok=True)
    content = json.loads((quantised / name / "config.json").read_text())
    content["quantization_config"] |= changes
    (target / "config.json").write_text(json.dumps(content))
    (target / "model.safetensors").write_bytes((quantised / name / "model.safetensors").read_bytes())
    extra = target / "quantize_config.json"
    extra.unlink(missing_ok=True)
    if other is not None:
        extra.write_text(json.dumps(other))
    loads_or_refuses(target)

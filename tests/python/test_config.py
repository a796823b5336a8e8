"""config.json to ModelConfig: aliases, defaults, rope in all spellings, windows, and the messages of what is refused."""

import dataclasses
import math

import pytest

from llmcoopt.config import ModelConfig, parse_config
from llmcoopt.errors import FormatError, UnsupportedError

BASE = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}


def parse(**changes):
    """BASE with `changes`; ... removes a key."""
    return parse_config({key: value for key, value in {**BASE, **changes}.items() if value is not ...})


def refused(error, says, **changes):
    with pytest.raises(error) as caught:
        parse(**changes)
    assert says in str(caught.value) and "config.json" in str(caught.value), str(caught.value)


def test_fields():
    config = parse(hidden_act="silu", tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_theta=5e5)
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim, config.max_positions) == (4, 8, 2, 8, 128)
    assert config.tied_head and config.attention_bias and config.mlp_bias and not config.qk_norm and config.window is None
    assert config.rope.kind == "default" and config.rope.theta == 500000.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.head_dim = 4


def test_defaults():
    config = parse(rms_norm_eps=..., max_position_embeddings=..., num_key_value_heads=...)
    assert config.rms_norm_eps == 1e-6 and config.max_position_embeddings == 2048 and config.n_kv_heads == 8
    assert not config.tied_head and config.rope.theta == 10000.0
    assert parse(model_type="mistral", max_position_embeddings=...).max_position_embeddings == 131072
    assert parse(model_type="qwen2").attention_bias and not parse(model_type="qwen3").attention_bias
    assert parse(model_type="qwen3").qk_norm


def test_model_type():
    for name in ("llama", "mistral", "qwen2", "qwen3"):
        architecture = f"{name.capitalize()}ForCausalLM"
        assert parse(model_type=name, architectures=[architecture]).model_type == name
        assert parse(model_type=..., architectures=[architecture]).model_type == name
    assert parse(architectures=["LLaMAForCausalLM"]).model_type == "llama"
    refused(
        UnsupportedError, "model_type is 'gemma'; known: llama (LlamaForCausalLM), mistral (MistralForCausalLM), qwen2", model_type="gemma"
    )
    refused(UnsupportedError, "architectures is ['LlamaForSequenceClassification']", architectures=["LlamaForSequenceClassification"])
    refused(UnsupportedError, "no model_type", model_type=...)
    refused(UnsupportedError, "model_type is 7", model_type=7)
    refused(FormatError, "architectures is 'LlamaForCausalLM'", architectures="LlamaForCausalLM")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_required_sizes(key):
    refused(FormatError, f"{key} is missing; expected a whole number from 1", **{key: ...})
    for value in (0, -1, 2.0, "8", True, [8], 2**70):
        refused(FormatError, f"{key} is {value!r}", **{key: value})
    refused(FormatError, f"{key} is None", **{key: None})


def test_kv_heads():
    for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv"):
        assert parse(**{"num_key_value_heads": ..., key: 4}).n_kv_heads == 4
    assert parse(num_key_value_heads=None).n_kv_heads == 8
    assert parse(num_key_value_heads=None, num_kv_heads=2).n_kv_heads == 2
    assert parse(num_key_value_heads=..., multi_query=True).n_kv_heads == 1
    assert parse(num_key_value_heads=..., multi_query=False).n_kv_heads == 8
    refused(FormatError, "contradicting", multi_query=True)
    refused(FormatError, "contradicting", num_kv_heads=4)
    refused(FormatError, "num_attention_heads is 8, which is no multiple of the 3", num_key_value_heads=3)


def test_head_dim():
    assert parse(head_dim=10).head_dim == 10 and parse(head_dim=None).head_dim == 8
    assert parse(model_type="qwen3").head_dim == 128 and parse(model_type="qwen3", head_dim=6).head_dim == 6
    refused(FormatError, "head_dim is 7; expected an even number", head_dim=7)
    refused(FormatError, "hidden_size is 65, no multiple of num_attention_heads 8, and head_dim is missing", hidden_size=65)
    assert parse(hidden_size=65, head_dim=8).head_dim == 8


def test_other_values():
    refused(UnsupportedError, "hidden_act is 'gelu'", hidden_act="gelu")
    refused(FormatError, "rms_norm_eps is -1e-05", rms_norm_eps=-1e-5)
    refused(FormatError, "rms_norm_eps is inf", rms_norm_eps=math.inf)
    refused(FormatError, "rms_norm_eps is '1e-5'", rms_norm_eps="1e-5")
    refused(FormatError, "tie_word_embeddings is 1; expected true or false", tie_word_embeddings=1)
    with pytest.raises(FormatError, match="found list, expected a JSON object"):
        parse_config([])


def test_token_ids():
    assert parse(eos_token_id=2, bos_token_id=1, pad_token_id=-1).eos_token_ids == (2,)
    assert parse(pad_token_id=-1).pad_token_id is None
    config = parse(eos_token_id=[2, 3, 2])
    assert config.eos_token_ids == (2, 3) and config.eos_token_id == [2, 3]
    assert parse().eos_token_id is None and parse(eos_token_id=5).eos_token_id == 5
    refused(FormatError, "eos_token_id is [2, 'x']", eos_token_id=[2, "x"])
    refused(FormatError, "bos_token_id is 'x'", bos_token_id="x")
    merged = parse_config({**BASE, "eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [7, 8], "bos_token_id": None})
    assert merged.eos_token_ids == (7, 8) and merged.bos_token_id == 1
    with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id is 'x'"):
        parse_config(BASE, {"eos_token_id": "x"})


def test_windows():
    assert parse(sliding_window=4).window is None, "llama has none, whatever the config says"
    assert parse(model_type="mistral", sliding_window=16).window == (16,) * 4
    assert parse(model_type="mistral").window == (4096,) * 4
    assert parse(model_type="mistral", sliding_window=None).window is None
    qwen = {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}
    assert parse(**qwen, max_window_layers=3).window == (0, 0, 0, 16)
    assert parse(**qwen, max_window_layers=0).window == (16,) * 4
    assert parse(**qwen).window is None, "28 layers see all before the first that does not"
    assert parse(**{**qwen, "use_sliding_window": False}, max_window_layers=0).window is None
    types = ["full_attention", "sliding_attention"] * 2
    assert parse(**{**qwen, "model_type": "qwen3"}, layer_types=types).window == (0, 16, 0, 16)
    assert parse(model_type="qwen3", layer_types=["full_attention"] * 4).window is None
    refused(FormatError, "layer_types has 'sliding_attention', but use_sliding_window is False", model_type="qwen3", layer_types=types)
    refused(FormatError, "expected a list of 4", **qwen, layer_types=types[:3])
    refused(FormatError, "layer_types is", **qwen, layer_types=["chunked_attention"] * 4)
    refused(FormatError, "sliding_window is 0", model_type="mistral", sliding_window=0)


SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", SCALED)
def test_rope_spellings(kind):
    """rope_scaling with type or rope_type, and rope_parameters with the base inside or beside: one and the same."""
    values = SCALED[kind]
    same = [
        parse(rope_theta=5e4, rope_scaling={"type": kind, **values}),
        parse(rope_theta=5e4, rope_scaling={"rope_type": kind, **values}),
        parse(rope_theta=5e4, rope_scaling={"type": "mrope", "rope_type": kind, **values}),
        parse(rope_parameters={"rope_type": kind, "rope_theta": 5e4, **values}),
        parse(rope_theta=5e4, rope_scaling=None, rope_parameters={"rope_type": kind, **values}),
        parse(rope_theta=1.0, rope_parameters={"rope_type": kind, "rope_theta": 5e4, **values}),
        parse(rope_scaling={"type": kind, **values}, rope_parameters={"rope_type": kind, "rope_theta": 5e4, **values}),
    ]
    assert same[0].rope.kind == kind and same[0].rope.theta == 5e4
    assert all(config == same[0] for config in same)


def test_rope_default_kind():
    plain = parse(rope_theta=5e4)
    for scaling in ({}, None, {"rope_type": "default"}, {"type": "default", "factor": 4.0}, {"type": None}):
        assert parse(rope_theta=5e4, rope_scaling=scaling) == plain


def test_rope_values():
    assert parse(rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 7}).rope.original_max == 128
    yarn = parse(rope_scaling={"type": "yarn", **SCALED["yarn"]}).rope
    assert (yarn.beta_fast, yarn.beta_slow, yarn.truncate, yarn.original_max) == (32.0, 1.0, True, 32.0)
    assert math.isclose(yarn.attention_factor, 0.1 * math.log(4) + 1)
    outer = parse(original_max_position_embeddings=64, rope_scaling={"type": "yarn", **SCALED["yarn"]}).rope
    assert outer.original_max == 64, "the key beside the rope dict wins"
    long = parse(rope_scaling={"type": "longrope", **SCALED["longrope"]}).rope
    assert long.factor == 4.0 and math.isclose(long.attention_factor, math.sqrt(1 + math.log(4) / math.log(32)))
    assert long.short_factor == (1.0, 1.1, 1.2, 1.3)


@pytest.mark.parametrize(
    ("scaling", "error", "says"),
    [
        ({"type": "ntk"}, UnsupportedError, "rope_scaling: rope_type is 'ntk'; known: default, linear, dynamic, yarn, llama3, longrope"),
        ({"type": "linear"}, FormatError, "rope_scaling: factor is missing"),
        ({"type": "linear", "factor": "4"}, FormatError, "factor is '4'; expected a number above 0"),
        ({"type": "linear", "factor": 0}, FormatError, "factor is 0"),
        ({"type": "dynamic", "factor": None}, FormatError, "factor is None"),
        ({"type": "yarn", "factor": 2, "truncate": "no"}, FormatError, "truncate is 'no'"),
        ({"type": "yarn", "factor": 2, "rope_theta": 1}, FormatError, "rope_theta is 1.0; expected more than 1 for yarn"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 1}, FormatError, "high_freq_factor is missing"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, FormatError, "more than low_freq_factor 4"),
        ({"type": "longrope", "short_factor": [1] * 4}, FormatError, "long_factor is missing; expected a list of 4 positive numbers"),
        ({"type": "longrope", "short_factor": [1] * 3, "long_factor": [1] * 4}, FormatError, "short_factor is [1, 1, 1]"),
        ({"type": "longrope", "short_factor": [1] * 4, "long_factor": [1, 1, 1, 0]}, FormatError, "long_factor is [1, 1, 1, 0]"),
        ({"rope_theta": -1}, FormatError, "rope_theta is -1"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "default"}}, UnsupportedError, "one set of values per layer type (full_attention)"),
        (4.0, FormatError, "rope_scaling: found float, expected a JSON object"),
    ],
)
def test_bad_rope(scaling, error, says):
    refused(error, says, rope_scaling=scaling)


def test_bad_rope_beside():
    refused(UnsupportedError, "partial_rotary_factor is 0.25", partial_rotary_factor=0.25)
    refused(FormatError, "rope_theta is 'x'", rope_theta="x")
    refused(FormatError, "head_dim 2", rope_scaling={"type": "dynamic", "factor": 2.0}, head_dim=2)
    both = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    refused(FormatError, "rope_scaling says factor 2.0, rope_parameters says 4.0", **both)


def test_to_core():
    config = parse(model_type="mistral", sliding_window=16, rope_scaling={"type": "longrope", **SCALED["longrope"]})
    core = config.to_core()
    assert core["window"] == [16] * 4 and core["n_kv_heads"] == 2 and core["max_positions"] == 128
    assert core["rope"]["kind"] == "longrope" and core["rope"]["long_factor"] == [2.0, 3.0, 4.0, 5.0]
    plain = parse().to_core()
    assert plain["window"] is None and plain["rope"]["short_factor"] is None
    names = {"vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim", "rms_norm_eps"}
    assert plain.keys() == names | {"qk_norm", "tied_head", "max_positions", "window", "rope"}


# ---- against transformers


def hf_config(**changes):
    transformers = pytest.importorskip("transformers")
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not ...}
    return transformers.AutoConfig.for_model(**content), parse_config(content)


ROPE_CASES = [
    {},
    {"rope_theta": 1e6},
    *({"rope_theta": 5e4, "rope_scaling": {"type": kind, **values}} for kind, values in SCALED.items()),
    {"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 16}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 0.9, "beta_fast": 8, "beta_slow": 2, "truncate": False}},
    {"rope_scaling": {"type": "yarn", "factor": 0.5, "mscale": 0.7}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0}},
    {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
    {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
    {"rope_scaling": {"type": "llama3", **SCALED["llama3"], "original_max_position_embeddings": 2048}, "head_dim": 32},
    {"rope_scaling": {"type": "longrope", **SCALED["longrope"], "factor": 2.5}},
    {"rope_scaling": {"type": "longrope", **SCALED["longrope"], "attention_factor": 1.3}},
    {"rope_scaling": {"type": "longrope", **SCALED["longrope"], "factor": 0.5}},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4}, "rope_theta": 7.0},
]


@pytest.mark.parity
@pytest.mark.parametrize("case", ROPE_CASES, ids=str)
def test_rope_equals_transformers(case):
    """The frequencies of the specification under our config are those of transformers under its own."""
    torch = pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llmcoopt.reference import inverse_frequencies

    theirs, ours = hf_config(**case)
    init = ROPE_INIT_FUNCTIONS.get(ours.rope.kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    for length in (1, int(ours.rope.original_max) + 1, 3 * ours.max_positions):
        frequencies, attention = init(theirs, seq_len=length) if ours.rope.kind != "default" else init(theirs)
        found = torch.from_numpy(inverse_frequencies(ours.rope, ours.head_dim, length))
        # They compute in float32, the specification in float64: a few units of 2^-24, more where a power of theta is taken. Seen: 2.1e-7.
        assert torch.allclose(found, frequencies, rtol=1e-6, atol=0)
        assert math.isclose(ours.rope.attention_factor, attention, rel_tol=1e-12)


WINDOW_CASES = [
    {"model_type": "mistral"},
    {"model_type": "mistral", "sliding_window": 7},
    {"model_type": "mistral", "sliding_window": None},
    *(
        {"model_type": family, "sliding_window": 9, "use_sliding_window": use, "max_window_layers": first}
        for family in ("qwen2", "qwen3")
        for use in (True, False)
        for first in (0, 2, 4)
    ),
    {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    {"model_type": "llama", "sliding_window": 5},
]


@pytest.mark.parity
@pytest.mark.parametrize("case", WINDOW_CASES, ids=str)
def test_windows_equal_transformers(case):
    theirs, ours = hf_config(**case)
    layers = ours.num_hidden_layers
    if case["model_type"] == "llama":
        expected = [0] * layers
    elif case["model_type"] == "mistral":
        expected = [theirs.sliding_window or 0] * layers
    else:
        expected = [theirs.sliding_window if kind == "sliding_attention" else 0 for kind in theirs.layer_types]
    assert list(ours.window or [0] * layers) == expected


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_equal_transformers(family):
    """Where a key is missing both assume the same. Key/value heads are the exception: transformers assumes 8 or 32, we the number of heads."""
    missing = dict.fromkeys(("rms_norm_eps", "max_position_embeddings"), ...)
    theirs, ours = hf_config(model_type=family, **missing)
    for key in ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "vocab_size"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert isinstance(ours, ModelConfig)

"""GGUF files as models: decoded blocks against reference values, rows put back in order, config from metadata."""

import json
import math
import re
import struct

import checkpoints
import numpy as np
import pytest
from writers import gguf_metadata, gguf_tensors, raw_gguf

from llmcoopt import _core
from llmcoopt.errors import FormatError, UnsupportedError
from llmcoopt.loaders import load
from llmcoopt.loaders.gguf import BLOCKS, read_gguf
from llmcoopt.loaders.gguf_model import DECODABLE

GOLDEN = ["smollm2_q4_0", "smollm2_q4_1", "tinyllama_q5_0", "smollm2_q5_1", "smollm2_q8_0", "smollm2_q4_k", "smollm2_q5_k", "smollm2_q6_k"]


def write_model(folder, architecture="llama", edit=None, metadata=None, tensors=None, **config):
    """A small GGUF file and the Hugging Face weights that it holds."""
    weights = checkpoints.make(folder / "hf", architecture, edit=edit, **config)
    config = {**checkpoints.SMALL, **config}
    entries = gguf_metadata(config, architecture) | (metadata or {})
    stored = gguf_tensors(weights, config, architecture) | (tensors or {})
    path = folder / "model.gguf"
    path.write_bytes(raw_gguf({key: value for key, value in entries.items() if value}, {k: v for k, v in stored.items() if v}))
    return path, weights


def decode(type_number, blocks, n, dtype):
    out = np.empty(n, {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])
    assert _core.dequantize(blocks, type_number, out, dtype) == 0
    return out


@pytest.mark.parametrize("name", GOLDEN)
def test_blocks_decode_exactly(data, name):
    raw = (data / f"quant-ref/gguf/{name}.bin").read_bytes()
    kind, n, n_raw, n_golden = struct.unpack("<4I", raw[:16])
    assert kind in DECODABLE
    blocks, golden = raw[16 : 16 + n_raw], np.frombuffer(raw, np.uint16, n_golden // 2, 16 + n_raw)
    exact = decode(kind, blocks, n, "F32")
    assert np.array_equal(checkpoints.bfloat16_bits(exact), golden)
    assert np.array_equal(decode(kind, blocks, n, "BF16"), golden)
    assert np.array_equal(decode(kind, blocks, n, "F16"), exact.astype(np.float16))


def test_k_quants_of_another_writer(data):
    folder = data / "models/hf-tiny-logits"
    _, tensors = read_gguf(folder / "tiny_kquant.gguf")
    reference = json.loads((folder / "tiny_kquant_ref.json").read_text())["dequant"]
    for name in ("Q4_K", "Q5_K", "Q6_K"):
        tensor = tensors[f"kq.{name}.weight"]
        expected = np.array(reference[name], np.float32)
        assert np.array_equal(decode(tensor.type, tensor.data, 1024, "F32"), expected), name


def test_bad_calls_of_the_decoder():
    out = np.empty(32, np.float32)
    with pytest.raises(ValueError, match="17 bytes of GGUF block type 2 do not hold 32 values"):
        _core.dequantize(bytes(17), 2, out, "F32")
    with pytest.raises(ValueError, match="do not hold 32 values"):
        _core.dequantize(bytes(36), 2, out, "F32")
    with pytest.raises(ValueError, match="type 10 is not implemented"):
        _core.dequantize(bytes(84), 10, out, "F32")
    with pytest.raises(ValueError, match="dtype is 'F64'"):
        _core.dequantize(bytes(18), 2, out, "F64")
    with pytest.raises(ValueError, match="out has 3 bytes"):
        _core.dequantize(bytes(18), 2, bytearray(3), "F16")
    with pytest.raises((BufferError, TypeError)):
        _core.dequantize(bytes(18), 2, bytes(128), "F32")
    with pytest.raises(ValueError, match="out holds 3 values, source holds 2"):
        _core.convert(np.zeros(2, np.float32), "F32", np.zeros(3, np.uint16), "BF16")


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_conversion_of_every_16_bit_value(source):
    bits = np.arange(65536, dtype=np.uint16)
    values = {"float16": bits.view(np.float16).astype(np.float32), "bfloat16": (bits.astype(np.uint32) << 16).view(np.float32)}
    x = values.get(source, np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * np.float32(1000))
    x = x[np.isfinite(x) & (np.abs(x) < 65504)]
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    stored = checkpoints.cast(x, source)
    for target, name in names.items():
        expected = checkpoints.cast(x, target)
        out = np.empty_like(expected)
        assert _core.convert(stored, names[source], out, name) == 0
        assert out.tobytes() == expected.tobytes(), (source, target)


def test_conversion_counts_what_is_lost():
    x = np.array([1, np.nan, np.inf, -np.inf, 65504, 65519, 65520, -1e30, 3.4e38], np.float32)
    for name, lost, dtype in (("F16", 6, np.uint16), ("BF16", 4, np.uint16), ("F32", 3, np.float32)):
        assert _core.convert(x, "F32", np.empty(len(x), dtype), name) == lost, name


@pytest.mark.parametrize("stem", ["f32", "f16"])
def test_the_llama_fixtures(data, stem):
    """Queries and keys come back in Hugging Face's order: the GGUF and the safetensors file hold the same model."""
    folder = data / "models/hf-tiny-logits"
    weights = checkpoints.read_safetensors(folder / "tiny_llama.safetensors")
    checkpoint = load(folder / f"tiny_llama_{stem}.gguf")
    assert {*checkpoint.tensors} == {name for name in weights if "rotary_emb" not in name}
    for name, tensor in checkpoint.tensors.items():
        expected = weights[name] if tensor.dtype == "F32" else weights[name].astype(np.float16)
        assert np.array_equal(tensor.numpy(), expected), name
    hf = json.loads((folder / "tiny_llama_config.json").read_text())
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "vocab_size", "tie_word_embeddings"):
        assert getattr(checkpoint.config, key) == hf[key]


def test_the_q8_fixture(data):
    folder = data / "models/hf-tiny-logits"
    weights = checkpoints.read_safetensors(folder / "tiny_llama_q8.safetensors")
    checkpoint = load(folder / "tiny_llama_q8.gguf", dtype="float32")
    assert checkpoint.tensors.keys() == weights.keys() and checkpoint.config.tied_head
    for name, tensor in checkpoint.tensors.items():
        # 8-bit codes: at most half a step of largest / 127 off, plus the float16 scale's rounding. Seen: 0.507 steps.
        step = np.abs(weights[name]).max() / 127 if tensor.shape[-1] == 32 and len(tensor.shape) == 2 else 0
        assert np.abs(tensor.numpy() - weights[name]).max() <= 0.56 * step, name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_architectures(tmp_path, architecture):
    extra = {"head_dim": 8} if architecture == "qwen3" else {}
    lengths = {f"{architecture}.attention.key_length": ("u32", 8), f"{architecture}.attention.value_length": ("u32", 8)}
    path, weights = write_model(
        tmp_path, architecture, metadata=lengths if extra else None, attention_bias=architecture == "llama", **extra
    )
    checkpoint = load(path)
    assert checkpoint.tensors.keys() == weights.keys()
    for name, tensor in checkpoint.tensors.items():
        assert np.array_equal(tensor.numpy(), weights[name]), name
    config, hf = checkpoint.config, load(tmp_path / "hf").config
    for key in (
        "model_type",
        "head_dim",
        "num_key_value_heads",
        "intermediate_size",
        "qk_norm",
        "tied_head",
        "rms_norm_eps",
        "rope",
        "window",
    ):
        assert getattr(config, key) == getattr(hf, key), key


def test_unmoved_tensors_are_views_of_the_file(tmp_path):
    path, _ = write_model(tmp_path)
    tensors = load(path).tensors
    up, down = (tensors[f"model.layers.0.mlp.{name}_proj.weight"].data for name in ("up", "down"))
    between = up.ctypes.data - down.ctypes.data
    raw = path.read_bytes()
    assert between == raw.index(up.tobytes()) - raw.index(down.tobytes()), "both lie in one mapping"
    assert not any(tensor.data.flags.writeable for tensor in tensors.values())
    assert load(path).nbytes == load(path.parent / "hf").nbytes


def test_quantised_queries_are_put_in_order(tmp_path):
    """Blocks run along rows, so that quantised rows can be moved whole. Here every row is constant: its number."""

    def number_rows(weights):
        for name in ("q_proj", "k_proj"):
            x = weights[f"model.layers.0.self_attn.{name}.weight"]
            x[:] = np.arange(len(x))[:, None]

    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1}
    weights = checkpoints.make(tmp_path / "hf", edit=number_rows, **shape)
    stored = gguf_tensors(weights, {**checkpoints.SMALL, **shape})
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
        rows = np.frombuffer(stored[name][2], np.float32).reshape(stored[name][1])[:, 0]
        blocks = [np.float16(row / 100).tobytes() + bytes([100] * 32) for row in rows for _ in range(2)]  # Q8_0: d * 100
        stored[name] = ("Q8_0", stored[name][1], b"".join(blocks))
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_gguf(gguf_metadata({**checkpoints.SMALL, **shape}), stored))
    for name in ("q_proj", "k_proj"):
        found = load(path, dtype="float32").tensors[f"model.layers.0.self_attn.{name}.weight"].numpy()
        assert np.array_equal(np.round(found), weights[f"model.layers.0.self_attn.{name}.weight"])


def test_dtype_of_decoded_tensors(tmp_path):
    block = np.float16(0.5).tobytes() + bytes(range(32))
    path, _ = write_model(tmp_path, intermediate_size=32, tensors={"blk.0.ffn_down.weight": ("Q8_0", (36, 32), block * 36)})
    for dtype, name in (("auto", "BF16"), ("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")):
        tensor = load(path, dtype=dtype).tensors["model.layers.0.mlp.down_proj.weight"]
        assert tensor.dtype == name
        expected = checkpoints.cast(np.arange(32, dtype=np.float32) / 2, {"auto": "bfloat16"}.get(dtype, dtype))
        assert tensor.numpy()[7].tobytes() == expected.tobytes()
    assert load(path).tensors["model.layers.1.mlp.down_proj.weight"].dtype == "F32"
    assert load(path, dtype="float16").tensors["model.norm.weight"].dtype == "F32"


def test_numbers_out_of_range(tmp_path):
    for scale, dtype, fails in ((np.inf, "auto", True), (np.nan, "float32", True), (60000, "float16", True), (60000, "auto", False)):
        block = np.float16(scale).tobytes() + bytes([2] * 32)
        path, _ = write_model(tmp_path, intermediate_size=32, tensors={"blk.0.ffn_down.weight": ("Q8_0", (36, 32), block * 36)})
        if fails:
            with pytest.raises(FormatError, match=r"'blk\.0\.ffn_down\.weight' \(Q8_0\) holds 1152 values that are NaN"):
                load(path, dtype=dtype)
        else:
            load(path, dtype=dtype)


def test_tied_output(tmp_path):
    path, _ = write_model(tmp_path, tie_word_embeddings=True)
    assert load(path).config.tied_head
    with pytest.raises(FormatError, match=r"'output\.weight' is missing"):
        load(path, tie_word_embeddings=False)
    path, _ = write_model(tmp_path)
    assert not load(path).config.tied_head
    checkpoint = load(path, tie_word_embeddings=True)
    assert checkpoint.config.tied_head and "lm_head.weight" not in checkpoint.tensors


def rope_of(tmp_path, tensors=None, **extra):
    keys = {f"llama.rope.{key.replace('__', '.')}": value for key, value in extra.items()}
    return load(write_model(tmp_path, metadata=keys, tensors=tensors)[0]).config.rope


def test_rope_scaling(tmp_path):
    plain = rope_of(tmp_path)
    assert (plain.kind, plain.theta) == ("default", 10000.0)
    assert rope_of(tmp_path, scaling__type=("string", "none"), scaling__factor=("f32", 4.0)).kind == "default"
    for extra in ({"scaling__factor": ("f32", 4.0)}, {"scale_linear": ("f32", 4.0)}):
        rope = rope_of(tmp_path, **extra)
        assert (rope.kind, rope.factor) == ("linear", 4.0)
    yarn = {"scaling__type": ("string", "yarn"), "scaling__factor": ("f32", 4.0), "scaling__original_context_length": ("u32", 64)}
    rope = rope_of(tmp_path, **yarn)
    assert (rope.kind, rope.factor, rope.original_max, rope.beta_fast) == ("yarn", 4.0, 64.0, 32.0)
    assert math.isclose(rope.attention_factor, 0.1 * math.log(4.0) + 1.0)
    rope = rope_of(tmp_path, **yarn, scaling__attn_factor=("f32", 0.5), scaling__yarn_beta_fast=("f32", 16.0))
    assert math.isclose(rope.attention_factor, 0.05 * math.log(4.0) + 0.5) and rope.beta_fast == 16.0


def test_rope_frequency_factors(tmp_path):
    factors = np.array([1.0, 2.5, 8.0], np.float32)
    rope = rope_of(tmp_path, tensors={"rope_freqs.weight": ("F32", (3,), factors.tobytes())})
    assert (rope.kind, rope.attention_factor) == ("longrope", 1.0)
    assert rope.short_factor == rope.long_factor == (1.0, 2.5, 8.0)
    both = {f"rope_factors_{n}.weight": ("F32", (3,), (factors * k).tobytes()) for n, k in (("short", 1), ("long", 2))}
    rope = rope_of(tmp_path, tensors=both, scaling__original_context_length=("u32", 32), scaling__attn_factor=("f32", 1.25))
    assert (rope.short_factor, rope.long_factor, rope.original_max) == ((1.0, 2.5, 8.0), (2.0, 5.0, 16.0), 32.0)
    assert rope.attention_factor == 1.25
    with pytest.raises(FormatError, match=r"short_factor is \[1\.0, 2\.5\]; expected a list of 3"):
        rope_of(tmp_path, tensors={"rope_freqs.weight": ("F32", (2,), factors[:2].tobytes())})
    with pytest.raises(UnsupportedError, match=r"'rope_freqs\.weight' is F16"):
        rope_of(tmp_path, tensors={"rope_freqs.weight": ("F16", (3,), bytes(6))})
    with pytest.raises(UnsupportedError, match="only one way of scaling"):
        rope_of(tmp_path, tensors={"rope_freqs.weight": ("F32", (3,), factors.tobytes())}, scaling__factor=("f32", 4.0))


@pytest.mark.parametrize(
    ("key", "value", "error", "says"),
    [
        ("general.architecture", ("string", "gptneox"), UnsupportedError, "'gptneox'; known: llama, qwen2, qwen3"),
        ("general.architecture", None, UnsupportedError, "None"),
        ("general.architecture", ("[u8]", [1, 2]), UnsupportedError, "general.architecture"),
        ("split.count", ("u16", 3), UnsupportedError, "split.count is 3"),
        ("split.count", ("[u16]", [1, 3]), UnsupportedError, "split.count"),
        ("llama.expert_count", ("u32", 8), UnsupportedError, "llama.expert_count is 8"),
        ("llama.attention.causal", ("bool", 0), UnsupportedError, "causal is False"),
        ("llama.rope.dimension_count", ("u32", 4), UnsupportedError, "dimension_count is 4; only the head's size 6"),
        ("llama.attention.value_length", ("u32", 4), UnsupportedError, "value_length is 4"),
        ("llama.embedding_length", None, FormatError, "llama.embedding_length is missing"),
        ("llama.context_length", None, FormatError, "llama.context_length is missing"),
        ("llama.attention.head_count", ("string", "x"), FormatError, "num_attention_heads is 'x'"),
        ("llama.attention.head_count_kv", ("u32", 5), FormatError, "no multiple of the 5 key/value heads"),
        ("llama.attention.head_count_kv", ("[u32]", [2, 2, 3]), UnsupportedError, "differs between layers"),
        ("llama.rope.freq_base", ("f32", 0.0), FormatError, "rope.freq_base is 0.0"),
        ("llama.rope.scaling.type", ("string", "su"), UnsupportedError, "'su'"),
        ("llama.rope.scaling.type", ("string", "longrope"), FormatError, "rope_factors_long"),
        ("llama.rope.scaling.attn_factor", ("string", "x"), FormatError, "attn_factor is 'x'"),
        ("llama.rope.scaling.factor", ("string", "x"), FormatError, "factor is 'x'"),
        ("llama.block_count", ("u32", 2), FormatError, "'blk.2.attn_norm.weight' belongs to no part of a model with 2 layers"),
        ("tokenizer.ggml.eos_token_id", ("string", "x"), FormatError, "eos_token_id is ['x']"),
    ],
)
def test_bad_metadata(tmp_path, key, value, error, says):
    path, _ = write_model(tmp_path, metadata={key: value})
    with pytest.raises(error) as caught:
        load(path)
    assert says in str(caught.value) and "model.gguf" in str(caught.value), str(caught.value)


def test_token_ids(tmp_path):
    ids = {f"tokenizer.ggml.{name}_token_id": ("u32", n) for name, n in (("bos", 1), ("eos", 2), ("eot", 5), ("padding", 3))}
    config = load(write_model(tmp_path, metadata=ids)[0]).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 5), 3)


def test_per_layer_values_that_agree(tmp_path):
    path, _ = write_model(tmp_path, metadata={"llama.attention.head_count_kv": ("[u32]", [2, 2, 2])})
    assert load(path).config.num_key_value_heads == 2


def test_bad_tensors(tmp_path):
    def refused(error, match, **tensors):
        path, _ = write_model(tmp_path, tensors={name.replace("__", "."): tensor for name, tensor in tensors.items()})
        with pytest.raises(error, match=match):
            load(path)

    refused(UnsupportedError, r"'blk\.1\.ffn_up\.weight' has type Q2_K.*known:.*Q6_K", blk__1__ffn_up__weight=("Q2_K", (1, 256), bytes(84)))
    refused(UnsupportedError, r"has type I32", blk__1__ffn_up__weight=("I32", (1, 2), bytes(8)))
    refused(FormatError, r"'blk\.0\.extra\.weight' belongs to no part", blk__0__extra__weight=("F32", (1,), bytes(4)))
    up = ("F32", (50, 36), bytes(7200))
    for layer in ("00", "01", "+1", "\u0661", "1_0"):  # one spelling for each layer: two names never mean one tensor
        with pytest.raises(FormatError, match=rf"'blk\.{re.escape(layer)}\.ffn_up\.weight' belongs to no part"):
            load(write_model(tmp_path, tensors={f"blk.{layer}.ffn_up.weight": up})[0])
    refused(FormatError, r"'nonsense' belongs to no part", nonsense=("F32", (1,), bytes(4)))
    refused(
        FormatError,
        r"'blk\.0\.attn_q\.weight' \(F32\) has shape \[7, 2\]; expected rows for 6 heads",
        blk__0__attn_q__weight=("F32", (7, 2), bytes(56)),
    )
    refused(FormatError, r"'token_embd\.weight' is missing", token_embd__weight=None)


def test_sliding_window(tmp_path):
    """A llama file with a window is a Mistral: all layers have it, and rows are interleaved as in any llama file."""
    path, weights = write_model(tmp_path, metadata={"llama.attention.sliding_window": ("u32", 4)})
    checkpoint = load(path)
    assert checkpoint.config.window == (4, 4, 4) and checkpoint.config.model_type == "mistral"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(checkpoint.tensors[name].numpy(), weights[name])
    path, _ = write_model(tmp_path, "qwen2", metadata={"qwen2.attention.sliding_window": ("u32", 4)})
    with pytest.raises(UnsupportedError, match=r"qwen2\.attention\.sliding_window is 4"):
        load(path)


def test_every_decodable_type_is_named():
    assert [BLOCKS[kind][0] for kind in DECODABLE] == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]

"""Small random checkpoints in Hugging Face's layout, made without PyTorch: a config.json, and safetensors files by a writer of our own, so
that the reader under test is not checked against itself."""

import json
from pathlib import Path

import numpy as np

from llmcoopt.config import parse_config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SMALL = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def write_safetensors(path, arrays):
    """arrays: name -> float32, float16, uint16 holding bfloat16 bits, or integers."""
    kinds = {kind.__name__: name for name, kind in KINDS.items()}
    header, at = {}, 0
    for name, a in arrays.items():
        header[name] = {"dtype": kinds[a.dtype.name], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values()))


def read_safetensors(path):
    """name -> array, as write_safetensors takes them."""
    raw = Path(path).read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(raw[begin + t["data_offsets"][0] : begin + t["data_offsets"][1]], KINDS[t["dtype"]]).reshape(t["shape"])
        for name, t in header.items()
    }


def read(folder):
    """(ModelConfig, weights) of a folder, for llmcoopt.reference."""
    config = parse_config(json.loads((Path(folder) / "config.json").read_text()))
    weights = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights |= read_safetensors(file)
    return config, weights


def bfloat16_bits(x):
    """float32 -> uint16 bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def cast(x, dtype):
    """float32 -> an array that write_safetensors takes."""
    return bfloat16_bits(x) if dtype == "bfloat16" else x.astype(dtype)


def weight_shapes(config, family):
    """name -> shape of every tensor of the model."""
    c, hidden, inner = config, config["hidden_size"], config["intermediate_size"]
    d = c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    bias = {p: c.get("attention_bias", False) for p in "qkvo"}
    if family == "qwen2":
        bias = {"q": True, "k": True, "v": True, "o": False}
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        for p, shape in {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}.items():
            layer[f"self_attn.{p}_proj.weight"] = shape
            if bias[p]:
                layer[f"self_attn.{p}_proj.bias"] = shape[:1]
        for p, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            layer[f"mlp.{p}_proj.weight"] = shape
            if c.get("mlp_bias", False):
                layer[f"mlp.{p}_proj.bias"] = shape[:1]
        if family == "qwen3":
            layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (d,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_array(rng, name, shape):
    """Numbers of the size that trained models have: activations stay near 1, logits spread over a few units."""
    x = rng.standard_normal(shape)
    if "norm" in name:
        return (1.0 + 0.2 * x).astype(np.float32)
    return (x * (0.3 if name.endswith("bias") else shape[-1] ** -0.5)).astype(np.float32)


def make(folder, family="llama", seed=0, dtype="float32", shards=1, edit=None, **config):
    """Writes a checkpoint into `folder` (made if missing) and returns its weights as written: name -> array (uint16: bfloat16 bits).

    `config` overrides SMALL by config.json's keys; `edit(weights)` may change the float32 weights before they are cast."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [ARCHITECTURES[family]], "model_type": family, "dtype": dtype, **SMALL, **config}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])  # Qwen3 would take 128
    rng = np.random.default_rng(seed)
    weights = {name: random_array(rng, name, shape) for name, shape in weight_shapes(config, family).items()}
    if edit:
        edit(weights)
    weights = {name: cast(x, dtype) for name, x in weights.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return weights
    names = list(weights)
    place = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(place.values())):
        write_safetensors(folder / file, {name: weights[name] for name in names if place[name] == file})
    total = sum(x.nbytes for x in weights.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": place}))
    return weights


def steps(model, seq, ids, *lengths):
    """Logits of ids given in pieces: these lengths, then the rest."""
    out, at = [], 0
    for length in (*lengths, len(ids)):
        if part := ids[at : at + length]:
            out.append(model.forward(part, seq))
        at += length
    return np.concatenate(out)


def row_errors(a, b):
    """The largest difference in each row, relative to the row's largest value: max |a - b| / max |b|."""
    a, b = np.atleast_2d(np.asarray(a, np.float64)), np.atleast_2d(np.asarray(b, np.float64))
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return np.abs(a - b).max(axis=1) / np.abs(b).max(axis=1)


def error(a, b):
    """The largest of row_errors."""
    return row_errors(a, b).max()


def prompt(n, vocab=SMALL["vocab_size"], seed=0):
    """n random ids."""
    return np.random.default_rng([n, vocab, seed]).integers(0, vocab, n).tolist()

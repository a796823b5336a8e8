"""Writers of raw safetensors and GGUF bytes, valid or damaged on purpose, independent of the readers under test."""

import json
import struct

import numpy as np

SCALAR_FORMATS = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
}
SCALAR_FORMATS |= {"bool": (7, "<B"), "u64": (10, "<Q"), "i64": (11, "<q"), "f64": (12, "<d")}
TENSOR_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
TENSOR_TYPES |= {"I32": 26, "BF16": 30}


def raw_safetensors(header, data=b"", length=None):
    """The bytes of a file from a header (bytes, or a dict to be written as JSON) and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def gguf_string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(kind, value):
    """The bytes of a typed value: kind "u32", ..., "string", or "[kind]" for an array of them."""
    if kind == "string":
        return struct.pack("<I", 8) + gguf_string(value)
    if kind.startswith("["):
        items = [gguf_value(kind[1:-1], item) for item in value]
        element = items[0][:4] if items else struct.pack("<I", 4)
        return struct.pack("<I", 9) + element + struct.pack("<Q", len(value)) + b"".join(item[4:] for item in items)
    number, layout = SCALAR_FORMATS[kind]
    return struct.pack("<I", number) + struct.pack(layout, value)


def raw_gguf(metadata, tensors, version=3, alignment=32, offsets=None):
    """A GGUF file. metadata: key -> (kind, value); tensors: name -> (type name or number, row-major shape, bytes).
    `offsets` overrides where tensors are said to begin."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += gguf_string(key) + gguf_value(kind, value)
    at, data = 0, b""
    for name, (kind, shape, raw) in tensors.items():
        at = len(data)
        out += gguf_string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        out += struct.pack("<IQ", TENSOR_TYPES.get(kind, kind), (offsets or {}).get(name, at))
        data += raw + bytes(-len(raw) % alignment)
    return out + bytes(-len(out) % alignment) + data


def gguf_metadata(config, architecture="llama", **extra):
    """Metadata of a model with a Hugging Face config. `extra`: key after the architecture's name, dots as double underscores -> (kind, value)."""
    keys = {
        "embedding_length": ("u32", config["hidden_size"]),
        "feed_forward_length": ("u32", config["intermediate_size"]),
        "block_count": ("u32", config["num_hidden_layers"]),
        "context_length": ("u32", config["max_position_embeddings"]),
        "attention.head_count": ("u32", config["num_attention_heads"]),
        "attention.head_count_kv": ("u32", config["num_key_value_heads"]),
        "attention.layer_norm_rms_epsilon": ("f32", config["rms_norm_eps"]),
        "rope.freq_base": ("f32", config["rope_theta"]),
    }
    keys |= {key.replace("__", "."): value for key, value in extra.items()}
    metadata = {"general.architecture": ("string", architecture)}
    return metadata | {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}


HF_TO_GGUF = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{HF_TO_GGUF[part]}.{kind}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem] + f".{kind}"


def interleave(x, heads):
    """Query or key rows as GGUF's llama has them: row 2i of a head is the i-th of its first half, row 2i + 1 that of its second half."""
    rows = x.reshape(heads, 2, len(x) // heads // 2, -1)
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(x.shape)


def gguf_tensors(weights, config, architecture="llama"):
    """float32 or float16 Hugging Face weights as tensors for raw_gguf."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]} if architecture == "llama" else {}
    tensors = {}
    for name, x in weights.items():
        swap = next((n for part, n in heads.items() if part in name), 0)
        stored = interleave(x, swap) if swap else x
        kind = {"float32": "F32", "float16": "F16", "uint16": "BF16"}[x.dtype.name]
        tensors[gguf_name(name)] = (kind, x.shape, stored.tobytes())
    return tensors

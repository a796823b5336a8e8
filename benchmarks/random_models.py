"""Models with random weights in the shapes of real ones: `python benchmarks/random_models.py PLACE --shape llama-13b --format gptq`.

Formats: bfloat16 and gptq (4 bits, groups of 128, float16 scales, 16-bit embedding and head) write a Hugging Face folder, q4_0 a .gguf file with a
16-bit head that llama.cpp reads too. Weights are a block of noise repeated, of a size that keeps activations finite. Files are written tensor by
tensor, so that they may be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# vocabulary, hidden, ffn, layers, heads, kv heads, tied head
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, True),
    "llama-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32, False),
    "llama-13b": (32000, 5120, 13824, 40, 40, 40, False),
}
GROUP = 128
NOISE = 1 << 20
PIECE = 1 << 24  # elements written at a time, at most


def named_shape(name: str, layers: int | None = None) -> tuple:
    """A shape of SHAPES, with fewer layers when asked."""
    shape = SHAPES[name]
    return shape if layers is None else (*shape[:3], layers, *shape[4:])


def config_of(shape: tuple) -> dict:
    vocab, hidden, ffn, layers, heads, kv_heads, tied = shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": tied,
    }


def tensor_shapes(shape: tuple) -> dict[str, tuple[int, ...]]:
    """Every weight by its name."""
    vocab, hidden, ffn, layers, heads, kv_heads, tied = shape
    d = hidden // heads
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(layers):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        layer |= {f"self_attn.{p}_proj": (n * d, hidden) for p, n in {"q": heads, "k": kv_heads, "v": kv_heads}.items()}
        layer |= {"self_attn.o_proj": (hidden, heads * d), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
        layer |= {"mlp.down_proj": (hidden, ffn)}
        shapes |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return shapes


def repeated(block: np.ndarray, count: int) -> Iterator[bytes]:
    """`count` elements of a block repeated, in pieces."""
    piece = max(1, PIECE // len(block)) * len(block)
    for at in range(0, count, piece):
        yield np.resize(block, min(piece, count - at)).tobytes()


def bfloat16_noise(rng: np.random.Generator) -> np.ndarray:
    """Bits of bfloat16 numbers around 0."""
    return ((rng.standard_normal(NOISE) * 0.02).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], Callable[[], Iterator[bytes]]]]) -> None:
    """tensors: name -> (dtype, shape, a function that gives the bytes in pieces)."""
    sizes, header, at = {"BF16": 2, "F16": 2, "I32": 4}, {}, 0
    for name, (dtype, shape, _) in tensors.items():
        size = sizes[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in tensors.values():
            for piece in pieces():
                file.write(piece)


def write_folder(folder: Path, shape: tuple, kind: str = "bfloat16", desc_act: bool = False) -> None:
    """A Hugging Face folder, of `kind` "bfloat16" or "gptq"."""
    rng, config, tensors = np.random.default_rng(0), config_of(shape), {}
    floats, words = bfloat16_noise(rng), rng.integers(0, 1 << 32, NOISE, dtype=np.uint64).astype(np.uint32)
    scales = rng.uniform(0.002, 0.006, NOISE).astype(np.float16)  # of codes from -8 to 7: 0.02 of deviation
    for name, value in tensor_shapes(shape).items():
        if kind == "bfloat16" or len(value) == 1 or "layers" not in name:
            tensors[name] = ("BF16", value, lambda value=value: repeated(floats, int(np.prod(value))))
            continue
        n, k = value
        groups, stem = -(-k // GROUP), name.removesuffix(".weight")
        order = np.arange(k, dtype=np.int32) // GROUP
        if desc_act:  # q, k and v of a layer, and gate and up, have one order, as they have one input
            order = np.random.default_rng(hash_of(stem)).permutation(order)
        tensors[f"{stem}.qweight"] = ("I32", (k // 8, n), lambda count=k // 8 * n: repeated(words, count))
        zeros = np.full(1024, 0x77777777, np.uint32)
        tensors[f"{stem}.qzeros"] = ("I32", (groups, n // 8), lambda zeros=zeros, count=groups * n // 8: repeated(zeros, count))
        tensors[f"{stem}.scales"] = ("F16", (groups, n), lambda count=groups * n: repeated(scales, count))
        tensors[f"{stem}.g_idx"] = ("I32", (k,), lambda order=order: iter([order.tobytes()]))
    if kind == "gptq":
        quantisation = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": desc_act,
            "checkpoint_format": "gptq",
        }
        config |= {"quantization_config": quantisation, "torch_dtype": "float16"}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))


def hash_of(stem: str) -> int:
    """A seed that modules with the same input share."""
    return sum(map(ord, stem.rsplit(".", 1)[0])) + stem.endswith("o_proj") + 2 * stem.endswith("down_proj")


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GGUF_TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18)}  # number, values and bytes of a block


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def write_q4_0(path: Path, shape: tuple) -> None:
    """A .gguf file: matrices of layers in Q4_0, embedding and head in float16."""
    vocab, hidden, ffn, layers, heads, kv_heads = shape[:6]
    numbers = {
        "block_count": layers,
        "context_length": 8192,
        "embedding_length": hidden,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "rope.dimension_count": hidden // heads,
        "vocab_size": vocab,
    }
    entries = [gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama")]
    entries += [gguf_string("tokenizer.ggml.model") + struct.pack("<I", 8) + gguf_string("no_vocab")]
    entries += [gguf_string(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()]
    floats = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e5}
    entries += [gguf_string(f"llama.{key}") + struct.pack("<If", 6, value) for key, value in floats.items()]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (NOISE // 32, 18)).astype(np.uint8)
    blocks[:, :2] = rng.uniform(0.002, 0.006, len(blocks)).astype(np.float16)[:, None].view(np.uint8)
    noise = {"F32": np.ones(1, np.float32), "F16": (rng.standard_normal(NOISE) * 0.02).astype(np.float16), "Q4_0": blocks.reshape(-1)}
    infos, parts, at = [], [], 0
    for name, value in tensor_shapes(shape).items():
        kind = "F32" if len(value) == 1 else "Q4_0" if "layers" in name else "F16"
        number, values, size = GGUF_TYPES[kind]
        infos.append(gguf_string(gguf_name(name)) + struct.pack(f"<I{len(value)}QIQ", len(value), *value[::-1], number, at))
        count = int(np.prod(value)) // values * size
        parts.append((kind, count))
        at += -(-count // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        for kind, count in parts:
            for piece in repeated(noise[kind].view(np.uint8), count):
                file.write(piece)
            file.write(bytes(-count % 32))


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path, help="the folder, or the .gguf file of q4_0")
    parser.add_argument("--shape", choices=SHAPES, default="llama-13b")
    parser.add_argument("--format", choices=("bfloat16", "gptq", "q4_0"), default="gptq")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--desc-act", action="store_true", help="gptq: groups of shuffled inputs")
    options = parser.parse_args()
    shape = named_shape(options.shape, options.layers)
    if options.format == "q4_0":
        write_q4_0(options.place, shape)
    else:
        write_folder(options.place, shape, options.format, options.desc_act)


if __name__ == "__main__":
    main()

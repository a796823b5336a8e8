"""Turns a llama2.c checkpoint (.bin, version 0) into a Hugging Face folder.

The file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len), then float32 arrays, each for all layers:
tok_emb, rms_att, wq, wk, wv, wo, rms_ffn, w1, w2, w3; then rms_final, two unused rope tables [seq_len, head_dim / 2], and the output matrix
when vocab_size is negative (else the embedding serves). Its rope turns neighbouring pairs; Hugging Face turns the halves of a head, so rows
of q and k are put in the other order: first the even ones of a head, then the odd ones."""

import json
import sys
from pathlib import Path

import numpy as np
from checkpoints import ARCHITECTURES, write_safetensors


def halves(w, head_dim):
    """[heads * d, in] with rows in pairs -> the same with rows in halves."""
    pairs = w.reshape(-1, head_dim // 2, 2, w.shape[-1])
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(w.shape)


def convert(source, folder):
    """Writes config.json and model.safetensors into `folder`; returns it."""
    raw = Path(source).read_bytes()
    dim, inner, n_layers, n_heads, n_kv, vocab, seq_len = np.frombuffer(raw, "<i4", 7).tolist()
    tied, vocab, d = vocab > 0, abs(vocab), dim // n_heads
    numbers, at = np.frombuffer(raw, "<f4", offset=28), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    weights = {"model.embed_tokens.weight": take(vocab, dim)}
    per_layer = {
        "input_layernorm": take(n_layers, dim),
        "self_attn.q_proj": take(n_layers, dim, dim),
        "self_attn.k_proj": take(n_layers, n_kv * d, dim),
        "self_attn.v_proj": take(n_layers, n_kv * d, dim),
        "self_attn.o_proj": take(n_layers, dim, dim),
        "post_attention_layernorm": take(n_layers, dim),
        "mlp.gate_proj": take(n_layers, inner, dim),
        "mlp.down_proj": take(n_layers, dim, inner),
        "mlp.up_proj": take(n_layers, inner, dim),
    }
    weights["model.norm.weight"] = take(dim)
    take(2, seq_len, d // 2)
    if not tied:
        weights["lm_head.weight"] = take(vocab, dim)
    assert at == numbers.size, f"{source}: {numbers.size} numbers, the header asks for {at}"
    for name, stack in per_layer.items():
        for i, w in enumerate(stack):
            rotated = name in ("self_attn.q_proj", "self_attn.k_proj")
            weights[f"model.layers.{i}.{name}.weight"] = halves(w, d) if rotated else w
    config = {
        "architectures": [ARCHITECTURES["llama"]],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": inner,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "vocab_size": vocab,
        "max_position_embeddings": seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_safetensors(folder / "model.safetensors", weights)
    return folder


if __name__ == "__main__":
    print(convert(sys.argv[1], sys.argv[2]))

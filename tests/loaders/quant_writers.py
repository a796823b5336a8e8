"""Quantised checkpoints of every layout, written from the formats' descriptions: a round-to-nearest quantiser and packers of our own.

A weight here is [outputs, inputs], codes are [outputs, inputs], scales and zeros [groups, outputs], as in the specification."""

import json
from pathlib import Path

import checkpoints
import numpy as np

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
SHAPE |= {"vocab_size": 64}


# ---------------------------------------------------------------- numbers


def groups_of(inputs, group, rng=None):
    """g_idx: in order, or shuffled as act-order leaves it (each group keeps its size)."""
    g_idx = np.arange(inputs, dtype=np.int32) // (inputs if group == -1 else group)
    return g_idx if rng is None else rng.permutation(g_idx)


def quantise(weight, bits, g_idx, sym=True, scale_dtype="float16"):
    """(codes, scales as stored, zeros) by rounding to nearest."""
    top, groups = 2**bits - 1, int(g_idx.max()) + 1
    scales, zeros = np.empty((2, groups, len(weight)))
    for g in range(groups):
        part = weight[:, g_idx == g]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        if sym:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = np.where(high > low, high - low, 2) / top
        zeros[g] = 2 ** (bits - 1) if sym else np.round(-low / scales[g])
    stored = checkpoints.cast(scales.astype(np.float32), scale_dtype)
    zeros = np.clip(zeros, 0, top).astype(np.int64)
    codes = np.round(weight / scales[g_idx].T) + zeros[g_idx].T
    return np.clip(codes, 0, top).astype(np.int64), stored, zeros


def as_float32(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def values(codes, scales, zeros, g_idx):
    """float32 [outputs, inputs]: what the codes mean."""
    return as_float32(scales)[g_idx].T * (codes - zeros[g_idx].T).astype(np.float32)


# ---------------------------------------------------------------- packing


def pack_stream(lines, bits):
    """[lines, n] -> uint32 [lines, words]: one run of bits for a line, zeros at its end."""
    each = (np.asarray(lines)[:, :, None] >> np.arange(bits)) & 1
    run = each.reshape(len(each), -1).astype(np.uint8)
    run = np.pad(run, ((0, 0), (0, -run.shape[1] % 32)))
    return np.packbits(run, axis=1, bitorder="little").view("<u4")


def pack_whole(lines, bits):
    """[lines, n] -> uint32 [lines, words]: 32 // bits values a word."""
    lines, per_word = np.asarray(lines), 32 // bits
    words = np.zeros((len(lines), -(-lines.shape[1] // per_word)), np.uint32)
    for i in range(lines.shape[1]):
        words[:, i // per_word] |= (lines[:, i] << (bits * (i % per_word))).astype(np.uint32)
    return words


def pack_awq(lines):
    """[lines, n] -> uint32 [lines, n / 8]: nibble 0 holds column 0, nibble 1 column 2, and so on: 0, 2, 4, 6, 1, 3, 5, 7."""
    lines = np.asarray(lines)
    words = np.zeros((len(lines), lines.shape[1] // 8), np.uint32)
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        words |= (lines[:, column::8] << (4 * nibble)).astype(np.uint32)
    return words


def int32(words):
    return np.ascontiguousarray(words).view(np.int32)


def v1_words(zeros, bits):
    """qzeros of version 1: the packed zeros less the packed ones, word by word modulo 2^32; 3 bits field by field."""
    if bits == 3:
        return pack_stream((zeros - 1) % 8, 3)
    return pack_stream(zeros, bits) - np.uint32({2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits])


# ---------------------------------------------------------------- tensors of a module


def gptq(weight, bits=4, group=32, sym=True, order=None, version="v1", scale_dtype="float16", with_g_idx=True):
    """(tensors by last name, float32 values). order: a random generator for act-order."""
    g_idx = groups_of(weight.shape[1], group, order)
    codes, scales, zeros = quantise(weight, bits, g_idx, sym, scale_dtype)
    qzeros = v1_words(zeros, bits) if version == "v1" else pack_stream(zeros, bits)
    tensors = {"qweight": int32(pack_stream(codes, bits).T), "qzeros": int32(qzeros), "scales": scales}
    return tensors | ({"g_idx": g_idx} if with_g_idx else {}), values(codes, scales, zeros, g_idx)


def awq(weight, group=32, sym=False, scale_dtype="float16"):
    g_idx = groups_of(weight.shape[1], group)
    codes, scales, zeros = quantise(weight, 4, g_idx, sym, scale_dtype)
    tensors = {"qweight": int32(pack_awq(codes.T)), "qzeros": int32(pack_awq(zeros)), "scales": scales}
    return tensors, values(codes, scales, zeros, g_idx)


def compressed(weight, bits=4, group=32, sym=True, order=None, scale_dtype="bfloat16", byte_zeros=False, dense=False):
    g_idx = groups_of(weight.shape[1], group, order)
    codes, scales, zeros = quantise(weight, bits, g_idx, sym, scale_dtype)
    tensors = {
        "weight_packed": int32((pack_stream if dense else pack_whole)(codes, bits)),
        "weight_scale": np.ascontiguousarray(scales.T),
        "weight_shape": np.array(weight.shape, np.int64),
    }
    if not sym and byte_zeros:
        tensors["weight_zero_point"] = np.ascontiguousarray((zeros - 2 ** (bits - 1)).T.astype(np.int8))
    elif not sym:
        tensors["weight_zero_point"] = int32(pack_stream(zeros, bits).T if dense else pack_columns(zeros, bits))
    if order is not None:
        tensors["weight_g_idx"] = g_idx
    return tensors, values(codes, scales, zeros, g_idx)


def pack_columns(zeros, bits):
    """zeros [groups, outputs] -> uint32 [outputs / p, groups]: packed along the outputs, which are the rows of the tensor."""
    per_word = 32 // bits
    words = np.zeros((-(-zeros.shape[1] // per_word), len(zeros)), np.uint32)
    for n in range(zeros.shape[1]):
        words[n // per_word] |= (zeros[:, n] << (bits * (n % per_word))).astype(np.uint32)
    return words


WRITERS = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed}


# ---------------------------------------------------------------- folders


def gptq_config(bits=4, group=32, sym=True, order=None, version="v1", **other):
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": order is not None}
    return {**config, "checkpoint_format": {"v1": "gptq", "v2": "gptq_v2"}[version], **other}


def awq_config(group=32, sym=False):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not sym, "version": "gemm"}


def compressed_config(bits=4, group=32, sym=True, order=None):
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "actorder": "group" if order is not None else None}
    weights |= {"strategy": "channel", "group_size": None} if group == -1 else {"strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "version": "0.9",
    }


CONFIGS = {"gptq": gptq_config, "awq": awq_config, "compressed-tensors": compressed_config}
_NO_CONFIG_KEYS = ("scale_dtype", "with_g_idx", "byte_zeros", "dense")


def make(
    folder, layout="gptq", config="config.json", dtype="bfloat16", shards=1, edit=None, per_module=None, family="llama", name=None, **how
):
    """Writes a folder and returns (tensors as written, plain weights with float32 values for what is quantised).

    config: "config.json", another file's name, a dict to write into config.json, or None for none. how: arguments of the layout's writer.
    per_module: module name -> other arguments, or None to leave it plain. edit(tensors) changes what is written. name: of the one file."""
    folder = Path(folder)
    weights = checkpoints.make(folder, family, **SHAPE, dtype=dtype)
    per_module = {"lm_head": None, "model.embed_tokens": None, **(per_module or {})}
    tensors, meant = {}, {}
    for tensor, x in weights.items():
        module = tensor.removesuffix(".weight")
        arguments = per_module.get(module, how)
        if x.ndim != 2 or arguments is None:
            tensors[tensor] = meant[tensor] = x
            continue
        parts, meant[tensor] = WRITERS[layout](as_float32(x), **arguments)
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    if edit:
        edit(tensors)
    write_config(folder, layout, config, how)
    write_weights(folder, tensors, shards, name)
    return tensors, meant


def write_config(folder, layout, config, how):
    content = json.loads((folder / "config.json").read_text())
    content["torch_dtype"] = content.pop("dtype")
    said = config if isinstance(config, dict) else CONFIGS[layout](**{key: x for key, x in how.items() if key not in _NO_CONFIG_KEYS})
    if config == "config.json" or isinstance(config, dict):
        content["quantization_config"] = said
    elif config is not None:
        (folder / config).write_text(json.dumps(said))
    (folder / "config.json").write_text(json.dumps(content))


def write_weights(folder, tensors, shards=1, name=None):
    (folder / "model.safetensors").unlink()
    stem = (name or "model.safetensors").removesuffix(".safetensors")
    if shards == 1:
        checkpoints.write_safetensors(folder / f"{stem}.safetensors", tensors)
        return
    place = {key: f"{stem}-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(tensors)}
    for file in set(place.values()):
        checkpoints.write_safetensors(folder / file, {key: x for key, x in tensors.items() if place[key] == file})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))

"""A GGUF file as a checkpoint with Hugging Face's names and layout.

Three things differ from a Hugging Face folder. The config stands in the metadata. Weights may be quantised in blocks: the C core moves their
codes to the layout of the kernels, or decodes them to 16 bit, tensor by tensor, so that no float32 copy of the model ever exists. And for the
architecture `llama`, rows of the query and key projections are stored with the two halves of a head interleaved (rope of adjacent pairs); they
are put back in order here.
"""

import math
import re
from pathlib import Path

import numpy as np

from .._core import dequantize
from ..config import ModelConfig, parse_config, yarn_scale
from ..errors import FormatError, UnsupportedError
from .checkpoint import LoadedCheckpoint, in_threads
from .gguf import BLOCKS, GgufTensor, read_gguf
from .packing import QUANTIZED, can_pack_gguf, layout_of, pack_gguf
from .safetensors import BITS, WEIGHT_DTYPES, Tensor, make_tensor
from .stored import of_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
DECODABLE = (2, 3, 6, 7, 8, 12, 13, 14)
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(0|[1-9][0-9]{0,8})\.)?([a-z_]+)\.(weight|bias)")  # each tensor has one spelling
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# Metadata (after the architecture's name) that changes the model in ways not implemented, with the values that change nothing.
_NEUTRAL = {
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
}


def load_gguf(path, dtype: str = "BF16", tie_word_embeddings: bool | None = None, quantized: bool = False) -> LoadedCheckpoint:
    """The model in a GGUF file. Quantised tensors become `dtype` (BF16, F16 or F32), or, where `quantized`, stay in their bits (packing.py);
    others stay as stored, without a copy where possible.

    A file without output.weight uses the embedding as output matrix; tie_word_embeddings=True always does so, False requires the tensor.
    Raises FormatError and UnsupportedError naming the file and the key or tensor."""
    path = Path(path)
    metadata, found = read_gguf(path)
    parts = metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise UnsupportedError(f"{path}: split.count is {parts!r:.100}; merge the parts of a split file first (llama-gguf-split --merge)")
    config = gguf_config(metadata, found, path, tie_word_embeddings)
    interleaved = metadata["general.architecture"] == "llama"
    swapped = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if interleaved else {}
    check_biases(path, config, found)
    jobs = []
    for name, tensor in found.items():
        if name in ROPE_FACTORS or (name == "output.weight" and config.tie_word_embeddings):
            continue
        full_name, stem = hf_name(path, name, config.num_hidden_layers)
        check_type(path, tensor)
        jobs.append((full_name, tensor, swapped.get(stem, 0)))

    def run(job):
        return _to_tensor(path, *job, dtype, quantized)  # decoding releases the GIL

    tensors = {}
    for tensor in in_threads(run, jobs):
        if tensor.name in tensors:
            raise FormatError(f"{path}: two tensors are '{tensor.name}'; expected one")
        tensors[tensor.name] = tensor
    stored = {
        name: of_gguf(tensor.type_name, tensor.data.nbytes, _kept(tensors[name]))
        for name, tensor, _ in jobs
        if tensor.type_name not in WEIGHT_DTYPES
    }
    return LoadedCheckpoint(config, tensors, path, "gguf", path, metadata=metadata, stored=stored)


def gguf_config(metadata: dict, tensors: dict[str, GgufTensor], path, tie_word_embeddings: bool | None = None) -> ModelConfig:
    """The model's config from the metadata of a GGUF file and the shapes of its tensors."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(f"{path}: general.architecture is {architecture!r:.100}; known: {', '.join(ARCHITECTURES)}")
    if "token_embd.weight" not in tensors:
        raise FormatError(f"{path}: tensor 'token_embd.weight' is missing")
    keys = _Metadata(metadata, architecture, path)
    for key, neutral in _NEUTRAL.items():
        if keys.get(key, neutral[0]) not in neutral:
            raise UnsupportedError(f"{path}: {architecture}.{key} is {keys.get(key)}; only models without it are implemented")
    config = {
        "model_type": architecture,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.required("embedding_length"),
        "intermediate_size": keys.required("feed_forward_length"),
        "num_hidden_layers": keys.required("block_count"),
        "num_attention_heads": keys.required("attention.head_count"),
        "num_key_value_heads": keys.get("attention.head_count_kv"),
        "head_dim": keys.get("attention.key_length"),
        "rms_norm_eps": keys.required("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.required("context_length"),
        "rope_parameters": _rope(keys, tensors, path),
        "tie_word_embeddings": _tied(tensors, path, tie_word_embeddings),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    window = keys.get("attention.sliding_window", 0)
    if window:
        if architecture != "llama":
            raise UnsupportedError(f"{path}: {architecture}.attention.sliding_window is {window}; which layers have it is not in the file")
        config |= {"model_type": "mistral", "sliding_window": window}
    checked = parse_config(config, source=str(path))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, checked.head_dim) != checked.head_dim:
            raise UnsupportedError(
                f"{path}: {architecture}.{key} is {keys.get(key)}; only the head's size {checked.head_dim} is implemented"
            )
    return checked


class _Metadata:
    """Look-ups under the architecture's name. A value given per layer must be the same in all layers."""

    def __init__(self, metadata, architecture, path):
        self.metadata, self.architecture, self.path = metadata, architecture, path

    def get(self, key, default=None):
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise UnsupportedError(f"{self.path}: {self.architecture}.{key} differs between layers: {value.tolist()!s:.100}")
            value = value[0].item()
        return value

    def required(self, key):
        value = self.get(key)
        if value is None:
            raise FormatError(f"{self.path}: {self.architecture}.{key} is missing from the metadata")
        return value

    def number(self, key, default):
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise FormatError(f"{self.path}: {self.architecture}.{key} is {value!r:.100}; expected a number above 0")
        return float(value)


def _rope(keys, tensors, path):
    """The rope values under the names of a Hugging Face config.

    Files of Llama 3.1 and later carry the frequency factors as a tensor: one number per pair by which its frequency is divided. That is
    longrope with the same factors for short and long sequences."""
    context = keys.required("context_length")
    found = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(f"{path}: {keys.architecture}.rope.scaling.type is {kind!r:.100}; known: none, linear, yarn, longrope")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0)) or 1.0
    original = keys.get("rope.scaling.original_context_length") or context
    attention = keys.number("rope.scaling.attn_factor", keys.get("rope.scaling.yarn_attn_factor", 1.0))
    factors = {name: _rope_factors(path, tensors[name]) for name in ROPE_FACTORS if name in tensors}
    scaled = kind == "yarn" or (kind == "linear" and factor != 1.0)
    if factors:
        both = factors.get("rope_freqs.weight")
        short, long = factors.get("rope_factors_short.weight", both), factors.get("rope_factors_long.weight", both)
        if scaled or len(factors) == 3 or short is None or long is None:
            raise UnsupportedError(
                f"{path}: rope.scaling.type {kind!r} with the tensors {', '.join(factors)}; expected only one way of scaling"
            )
        found |= {"rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": 1.0, "attention_factor": attention}
        return found | {"original_max_position_embeddings": original}
    if kind == "longrope":
        raise FormatError(f"{path}: rope.scaling.type is 'longrope', but the tensors {', '.join(ROPE_FACTORS[1:])} are missing")
    if not scaled:
        return found
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    for key, neutral in (("rope.scaling.yarn_ext_factor", (1.0, -1.0)), ("rope.scaling.yarn_log_multiplier", (0.0,))):
        if keys.get(key, neutral[0]) not in neutral:
            raise UnsupportedError(f"{path}: {keys.architecture}.{key} is {keys.get(key)}; only models without it are implemented")
    factor = keys.number("rope.scaling.factor", 1.0)
    return found | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": yarn_scale(factor) * attention,
        "beta_fast": keys.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": keys.get("rope.scaling.yarn_beta_slow"),
    }


def _rope_factors(path, tensor):
    if tensor.type_name != "F32" or len(tensor.shape) != 1:
        raise UnsupportedError(
            f"{path}: tensor '{tensor.name}' is {tensor.type_name} {list(tensor.shape)}; expected F32 with one dimension"
        )
    return tensor.data.view(np.float32).tolist()


def _tied(tensors, path, wanted):
    if wanted is False and "output.weight" not in tensors:
        raise FormatError(f"{path}: tensor 'output.weight' is missing; expected it, as tie_word_embeddings=False was asked for")
    return "output.weight" not in tensors if wanted is None else wanted


def _end_ids(metadata):
    """The end-of-text and end-of-turn tokens: either ends a generation."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return [token for token in ids if token is not None]


def hf_name(path, name, layers):
    """(Hugging Face's name, the stem of the GGUF name)."""
    match = _NAME.fullmatch(name)
    layer, stem, kind = match.groups() if match else (None, None, None)
    hf_stem = (_OUTSIDE if layer is None else _IN_BLOCK).get(stem)
    if hf_stem is None or (layer is not None and int(layer) >= layers):
        raise FormatError(f"{path}: tensor '{name}' belongs to no part of a model with {layers} layers")
    return (f"{hf_stem}.{kind}" if layer is None else f"model.layers.{int(layer)}.{hf_stem}.{kind}"), stem


def check_biases(path, config, found):
    """The metadata do not say which matrices have a bias: qwen2 needs those of q, k and v, and one that a layer has, all layers have."""
    for stem in _IN_BLOCK:
        names = [f"blk.{layer}.{stem}.bias" for layer in range(config.num_hidden_layers)]
        seen = next((name for name in names if name in found), None)
        needed = config.model_type == "qwen2" and stem in ("attn_q", "attn_k", "attn_v")
        if seen is None and not needed:
            continue
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            reason = "architecture 'qwen2' has it" if needed else f"'{seen}' is there"
            raise FormatError(f"{path}: tensor '{missing}' is missing; expected it, as {reason}")


def check_type(path, tensor):
    if tensor.type_name not in WEIGHT_DTYPES and tensor.type not in DECODABLE:
        known = ", ".join([*WEIGHT_DTYPES, *(BLOCKS[kind][0] for kind in DECODABLE)])
        raise UnsupportedError(f"{path}: tensor '{tensor.name}' has type {tensor.type_name}, which is not implemented; known: {known}")


def _kept(tensor):
    """What a tensor of blocks became, for people."""
    if tensor.dtype == QUANTIZED:
        return f"{layout_of(tensor)[0]} bits"
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[tensor.dtype]


def _to_tensor(path, hf_name, tensor, heads, dtype, quantized):
    """One weight under its Hugging Face name: as it lies in the file, in its bits, or decoded to `dtype`."""
    data = _split_halves(path, tensor, heads) if heads else tensor.data
    if tensor.type_name in WEIGHT_DTYPES:
        return make_tensor(hf_name, tensor.type_name, tensor.shape, data, str(path))
    if quantized and can_pack_gguf(tensor):
        packed, lost = pack_gguf(hf_name, tensor, data, str(path))
        if not lost:
            return packed
    out = np.empty(math.prod(tensor.shape) * BITS[dtype] // 8, np.uint8)
    lost = dequantize(data, tensor.type, out, dtype)
    if lost:
        raise FormatError(
            f"{path}: tensor '{tensor.name}' ({tensor.type_name}) holds {lost} values that are NaN, infinite or too large for {dtype}"
        )
    out.flags.writeable = False
    return Tensor(hf_name, dtype, tensor.shape, out, str(path))


def _split_halves(path, tensor, heads):
    """Rows of every head from (0, d/2, 1, d/2 + 1, ...) to (0, 1, ..., d - 1). Raw rows are moved, alike for every type."""
    rows = tensor.shape[0] if tensor.shape else 0
    if rows % (2 * heads) or (len(tensor.shape) == 1 and tensor.type_name not in WEIGHT_DTYPES):
        raise FormatError(
            f"{path}: tensor '{tensor.name}' ({tensor.type_name}) has shape {list(tensor.shape)}; expected rows for {heads} heads"
        )
    pairs = tensor.data.reshape(heads, rows // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)

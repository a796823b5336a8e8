"""Reads a Hugging Face folder: config.json, generation_config.json, and safetensors in one file or in shards."""

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import parse_config
from ..errors import FormatError, MissingFileError, UnsupportedError
from .cache_scales import take_cache_scales
from .checkpoint import LoadedCheckpoint
from .safetensors import WEIGHT_DTYPES, Tensor, parse_json, read_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old versions saved beside the weights; they follow from the config.
NOT_WEIGHTS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point)$")


def load_folder(path, tie_word_embeddings: bool | None = None) -> LoadedCheckpoint:
    """The checkpoint in folder `path`. `tie_word_embeddings` overrides the config: True uses the embedding as output matrix.

    Raises MissingFileError, FormatError and UnsupportedError, each naming the file and tensor."""
    path = Path(path)
    raw = read_json(path / "config.json") if os.path.exists(path / "config.json") else _no_config(path)
    quantisation = raw.get("quantization_config")
    if quantisation and not _of_cache_alone(quantisation):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise UnsupportedError(f"{path}/config.json: the weights are quantised ({method}); {_LOADABLE}")
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    config = parse_config(raw, generation, str(path / "config.json"))
    found = _read_weights(path)
    scales = take_cache_scales(found, config)
    tensors = _normalise(found)
    _check_biases(config, tensors)
    config = _settle_head(path, config, tensors, tie_word_embeddings)
    return LoadedCheckpoint(config, tensors, path, "safetensors", path, generation, scales)


def _of_cache_alone(quantisation) -> bool:
    """Whether a quantization_config speaks of the key/value cache and leaves the weights as they are."""
    return isinstance(quantisation, dict) and bool(quantisation.get("kv_cache_scheme")) and not quantisation.get("config_groups", True)


_LOADABLE = "16-bit and float32 safetensors load, and so do GGUF files (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)"


def read_json(path) -> dict:
    """The JSON object in a file. Raises MissingFileError or FormatError."""
    try:
        return parse_json(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error


def _no_config(path):
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    advice = f"pass a GGUF file itself: {path / ggufs[0]}" if ggufs else f"the folder holds {_listing(path)}"
    raise MissingFileError(f"{path}: no config.json, which a Hugging Face folder has; {advice}")


def _listing(path, most=8):
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def _read_weights(path) -> dict[str, Tensor]:
    if (path / SINGLE).exists():
        return read_safetensors(path / SINGLE)[0]
    if (path / INDEX).exists():
        return _read_shards(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_safetensors(files[0])[0]
    if files:
        raise MissingFileError(f"{path}: {len(files)} safetensors files ({files[0].name}, ...) but no {INDEX} that says what they hold")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{path}: the weights are Python pickles ({pickles[0]}), which can run code when read; convert them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        )
    raise MissingFileError(f"{path}: no {SINGLE} and no {INDEX}; the folder holds {_listing(path)}")


def _read_shards(path) -> dict[str, Tensor]:
    """The tensors that the index names, each from the shard it names; other tensors and other files are ignored."""
    index = read_json(path / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{path / INDEX}: weight_map is {places!r:.100}; expected an object of tensor name to file name")
    shards = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.isprintable():
            raise FormatError(f"{path / INDEX}: weight_map names the file {name!r}; expected a file name without folders")
        try:
            shards[name] = read_safetensors(path / name)[0]
        except MissingFileError as error:
            wanted = sum(place == name for place in places.values())
            raise MissingFileError(f"{error}; {INDEX} expects {wanted} tensors in it") from None
    tensors = {}
    for tensor, shard in places.items():
        if tensor not in shards[shard]:
            raise FormatError(f"{path / shard}: tensor '{tensor}' is not in it, though {INDEX} says so")
        tensors[tensor] = shards[shard][tensor]
    return tensors


def _normalise(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their names in a ForCausalLM checkpoint; refuses what cannot be loaded as weights."""
    tensors = {}
    for raw_name, tensor in found.items():
        if NOT_WEIGHTS.search(raw_name):
            continue
        if QUANTISED.search(raw_name):
            raise UnsupportedError(f"{tensor.file}: tensor '{raw_name}' belongs to a quantised checkpoint; {_LOADABLE}")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(f"{tensor.file}: tensor '{raw_name}' is {tensor.dtype}; {_LOADABLE}")
        if len(tensor.shape) not in (1, 2):
            raise FormatError(f"{tensor.file}: tensor '{raw_name}' has shape {list(tensor.shape)}; expected one or two dimensions")
        bare = raw_name.startswith(("layers.", "embed_tokens.", "norm."))  # saved from the model without its head
        name = f"model.{raw_name}" if bare else raw_name
        if name in tensors:
            raise FormatError(f"{tensor.file}: tensors '{name}' and '{raw_name}' are the same weight; expected one of them")
        tensors[name] = replace(tensor, name=name)
    return tensors


def _check_biases(config, tensors):
    """Refuses a file without a bias that the config promises; warns of biases that it denies, which are used all the same."""
    promised = set()
    for layer in range(config.num_hidden_layers):
        for stem in config.biased:
            name = f"model.layers.{layer}.{stem}"
            weight = tensors.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in tensors:
                key = "mlp_bias" if stem.startswith("mlp.") else "attention_bias"
                reason = f"{key} is true" if config.model_type != "qwen2" else "model_type 'qwen2' has it"
                raise FormatError(f"{weight.file}: tensor '{name}.bias' is missing; the config expects it, as {reason}")
            promised.add(f"{name}.bias")
    denied = [name for name in tensors if name.endswith(".bias") and name not in promised]
    if denied:
        more = f" and {len(denied) - 1} more biases" if len(denied) > 1 else ""
        warnings.warn(
            f"{tensors[denied[0]].file}: tensor '{denied[0]}'{more} used, though the config of model_type {config.model_type!r} says "
            f"that there is none (attention_bias {config.attention_bias}, mlp_bias {config.mlp_bias})"
        )


def _settle_head(path, config, tensors, wanted):
    """Whether the embedding is the output matrix, from the config, the file and the caller; removes a head that is a copy."""
    tied = config.tie_word_embeddings if wanted is None else wanted
    has_head, has_embedding = HEAD in tensors, EMBEDDING in tensors
    if not has_embedding:
        raise FormatError(f"{path}: tensor '{EMBEDDING}' is missing from the checkpoint")
    if not tied and not has_head:
        if wanted is False:
            raise FormatError(f"{path}: tensor '{HEAD}' is missing; expected it, as tie_word_embeddings=False was asked for")
        warnings.warn(
            f"{path}: tie_word_embeddings is false, but tensor '{HEAD}' is missing; using '{EMBEDDING}' as output matrix "
            f"(pass tie_word_embeddings=True to say so)"
        )
        tied = True
    elif tied and has_head:
        same = _equal(tensors[HEAD], tensors[EMBEDDING])
        if same or wanted:
            del tensors[HEAD]
        else:
            warnings.warn(
                f"{path}: tie_word_embeddings is true, but '{HEAD}' differs from '{EMBEDDING}'; using '{HEAD}' as output matrix "
                f"(pass tie_word_embeddings=True to use the embedding, False to silence this)"
            )
            tied = False
    return replace(config, tie_word_embeddings=tied)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.data, b.data)

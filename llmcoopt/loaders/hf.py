"""Reads a Hugging Face folder: config.json, generation_config.json, and safetensors in one file or in shards, quantised or not."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import parse_config
from ..errors import FormatError, MissingFileError, UnsupportedError
from .cache_scales import take_cache_scales
from .checkpoint import LoadedCheckpoint
from .findings import Finding
from .quant_config import LOADABLE
from .quant_modules import decode_dtype, quantized_weights, read_folder_config, split_modules, warn
from .safetensors import WEIGHT_DTYPES, Tensor, parse_json, read_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old versions saved beside the weights; they follow from the config.
NOT_WEIGHTS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def load_folder(path, tie_word_embeddings: bool | None = None, quantization_config: dict | None = None) -> LoadedCheckpoint:
    """The checkpoint in folder `path`. `tie_word_embeddings` overrides the config: True uses the embedding as output matrix.
    `quantization_config` overrides what the files say of their quantisation. Quantised weights are not decoded yet.

    Raises MissingFileError, FormatError and UnsupportedError, each naming the file and tensor."""
    path = Path(path)
    raw = read_json(path / "config.json") if os.path.exists(path / "config.json") else no_config(path)
    quantisation = read_folder_config(path, raw, read_json, quantization_config)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    config = parse_config(raw, generation, str(path / "config.json"))
    found = _read_weights(find_weights(path, quantisation.file_stem))
    scales = take_cache_scales(found, config)
    plain, modules = split_modules(full_names(found))
    tensors = _check_tensors(plain)
    quantized = quantized_weights(config, modules, tensors, quantisation)
    check_biases(config, tensors, quantized)
    config = settle_head(path, config, tensors, quantized, tie_word_embeddings)
    dtype = decode_dtype(raw)
    return LoadedCheckpoint(config, tensors, path, "safetensors", path, generation, scales, quantized=quantized, decode_dtype=dtype)


def read_json(path) -> dict:
    """The JSON object in a file. Raises MissingFileError or FormatError."""
    try:
        return parse_json(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error


def no_config(path):
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    advice = f"pass a GGUF file itself: {path / ggufs[0]}" if ggufs else f"the folder holds {_listing(path)}"
    raise MissingFileError(f"{path}: no config.json, which a Hugging Face folder has; {advice}")


def _listing(path, most=8):
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    return (", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")) or "nothing"


def find_weights(path: Path, stem: str | None = None) -> Path:
    """The file of all weights, or the index of several. Files named model* come first, then what the quantiser's config names (`stem`),
    then whatever is the only one. Raises MissingFileError, or UnsupportedError when there are Python pickles only."""
    files, indices = sorted(path.glob("*.safetensors")), sorted(path.glob("*.safetensors.index.json"))
    named = [path / f"{name}.{kind}" for name in ("model", stem) if name for kind in ("safetensors", "safetensors.index.json")]
    for place in named:
        if place.exists():
            return place
    if len(indices) == 1:
        return indices[0]
    if len(files) == 1:
        return files[0]
    if files:
        raise MissingFileError(f"{path}: {len(files)} safetensors files ({files[0].name}, ...) but no {INDEX} that says what they hold")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{path}: the weights are Python pickles ({pickles[0]}), which can run code when read; convert them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, safe_serialization=True)"
        )
    raise MissingFileError(f"{path}: no {SINGLE} and no {INDEX}; the folder holds {_listing(path)}")


def _read_weights(place: Path) -> dict[str, Tensor]:
    return _read_shards(place) if place.suffix == ".json" else read_safetensors(place)[0]


def _read_shards(index_path) -> dict[str, Tensor]:
    """The tensors that the index names, each from the shard it names; other tensors and other files are ignored."""
    path, places = index_path.parent, read_index(index_path)
    shards = {}
    for name in sorted(set(places.values())):
        try:
            shards[name] = read_safetensors(path / name)[0]
        except MissingFileError as error:
            wanted = sum(place == name for place in places.values())
            raise MissingFileError(f"{error}; {index_path.name} expects {wanted} tensors in it") from None
    tensors = {}
    for tensor, shard in places.items():
        if tensor not in shards[shard]:
            raise FormatError(f"{path / shard}: tensor '{tensor}' is not in it, though {index_path.name} says so")
        tensors[tensor] = shards[shard][tensor]
    return tensors


def read_index(path) -> dict[str, str]:
    """Tensor name -> file name, checked. Raises FormatError."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{path}: weight_map is {places!r:.100}; expected an object of tensor name to file name")
    for name in sorted(set(places.values())):
        if Path(name).name != name or not name.isprintable():
            raise FormatError(f"{path}: weight_map names the file {name!r}; expected a file name without folders")
    return places


def full_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in a ForCausalLM checkpoint, without those that are no weights."""
    tensors = {}
    for raw_name, tensor in found.items():
        if NOT_WEIGHTS.search(raw_name):
            continue
        bare = raw_name.startswith(("layers.", "embed_tokens.", "norm."))  # saved from the model without its head
        name = f"model.{raw_name}" if bare else raw_name
        if name in tensors:
            raise FormatError(f"{tensor.file}: tensors '{name}' and '{raw_name}' are the same weight; expected one of them")
        tensors[name] = replace(tensor, name=name)
    return tensors


def _check_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors; refuses types and shapes that no plain weight has."""
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UnsupportedError(f"{tensor.file}: tensor '{name}' is {tensor.dtype}; 16-bit and float32 weights load; {LOADABLE}")
        if len(tensor.shape) not in (1, 2):
            raise FormatError(f"{tensor.file}: tensor '{name}' has shape {list(tensor.shape)}; expected one or two dimensions")
    return tensors


def check_biases(config, tensors, quantized):
    """Refuses a file without a bias that the config promises; warns of biases that it denies, which are used all the same.

    For quantised modules the file decides: one without its bias has none."""
    promised, missing = set(), []
    for layer in range(config.num_hidden_layers):
        for stem in config.biased:
            name = f"model.layers.{layer}.{stem}"
            weight = tensors.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in tensors:
                key = "mlp_bias" if stem.startswith("mlp.") else "attention_bias"
                reason = f"{key} is true" if config.model_type != "qwen2" else "model_type 'qwen2' has it"
                raise FormatError(f"{weight.file}: tensor '{name}.bias' is missing; the config expects it, as {reason}")
            if name in quantized and f"{name}.bias" not in tensors:
                missing.append(
                    Finding("bias", quantized[name].file, f"{name}.bias", "missing: no bias is used", "it, by the config", error=False)
                )
            promised.add(f"{name}.bias")
    denied = [name for name in tensors if name.endswith(".bias") and name not in promised]
    for name in [name for name in denied if name.removesuffix(".bias") in quantized and not tensors[name].numpy().any()]:
        del tensors[name]  # quantisers of 2023 wrote biases of 0 for all modules
        denied.remove(name)
    said = f"none by the config of model_type {config.model_type!r} (attention_bias {config.attention_bias}, mlp_bias {config.mlp_bias})"
    warn(missing)
    warn([Finding("bias", tensors[name].file, name, "used", said, error=False) for name in denied])


def settle_head(path, config, tensors, quantized, wanted):
    """Whether the embedding is the output matrix, from the config, the file and the caller; removes a head that is a copy."""
    tied = config.tie_word_embeddings if wanted is None else wanted
    head, embedding = HEAD.removesuffix(".weight"), EMBEDDING.removesuffix(".weight")
    has_head, has_embedding = HEAD in tensors or head in quantized, EMBEDDING in tensors or embedding in quantized
    if not has_embedding:
        raise FormatError(f"{path}: tensor '{EMBEDDING}' is missing from the checkpoint")
    if not tied and not has_head:
        if wanted is False:
            raise FormatError(f"{path}: tensor '{HEAD}' is missing; expected it, as tie_word_embeddings=False was asked for")
        found, advice = f"missing: '{EMBEDDING}' is the output matrix", "pass tie_word_embeddings=True to say so"
        warn([Finding("tied", str(path), HEAD, found, "it, as tie_word_embeddings is false", advice, error=False)])
        tied = True
    elif tied and has_head:
        same = HEAD in tensors and EMBEDDING in tensors and _equal(tensors[HEAD], tensors[EMBEDDING])
        if same or wanted:
            tensors.pop(HEAD, None)
            quantized.pop(head, None)
        else:
            found = f"it differs from '{EMBEDDING}' and is used as output matrix"
            advice = "pass tie_word_embeddings=True to use the embedding, False to silence this"
            warn([Finding("tied", str(path), HEAD, found, "the same, as tie_word_embeddings is true", advice, error=False)])
            tied = False
    return replace(config, tie_word_embeddings=tied)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.data, b.data)

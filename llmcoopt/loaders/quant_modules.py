"""The quantised modules of a folder: finds them by their tensors' names, refuses layouts that do not load, by name, and makes QuantizedWeights."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import ModelConfig
from .compressed import compressed_weight
from .findings import Finding, FoundError, FoundUnsupported, FoundWarning
from .gptq import Module, awq_weight, gptq_weight, is_awq, name_hint
from .quant_config import LOADABLE, QuantConfig, read_quant_config
from .quantized import QuantizedWeight
from .safetensors import Tensor
from .shapes import matrix_shapes

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
_PART = re.compile(r"(.+)\.(qweight|qzeros|scales|g_idx|weight_packed|weight_scale|weight_shape|weight_zero_point|weight_g_idx|zeros)")
# Tensors of layouts that do not load -> the layout.
_FOREIGN = (
    (re.compile(r"\.(B|s|workspace|B_24|B_meta|meta)$"), "the Marlin layout"),
    (re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$|\.(SCB|weight_format)$"), "bitsandbytes"),
    (re.compile(r"\.(codes|codebooks)$"), "AQLM"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 weights in blocks"),
    (re.compile(r"\.(input_scale|weight_scale_2|weight_global_scale|input_global_scale)$"), "FP8 or NVFP4 weights"),
    (re.compile(r"\.(W_q|SU|SV|Qidxs)$"), "HQQ or QuIP#"),
)


def read_folder_config(path: Path, raw: dict, read_json: Callable, override: dict | None) -> QuantConfig:
    """What the folder's files say about quantisation. raw: the content of config.json; read_json reads another file's."""
    files = {str(path / name): read_json(path / name) for name in CONFIG_FILES if (path / name).exists()}
    if raw.get("quantization_config") is not None and not _of_cache_alone(raw["quantization_config"]):
        files[f"{path / 'config.json'}: quantization_config"] = raw["quantization_config"]
    config = read_quant_config(files, override)
    stems = (content.get("model_file_base_name") for content in files.values())
    stem = next((stem for stem in stems if isinstance(stem, str) and stem and Path(stem).name == stem and stem.isprintable()), None)
    return replace(config, file_stem=stem)


def _of_cache_alone(quantisation) -> bool:
    """Whether a quantization_config speaks of the key/value cache and leaves the weights as they are."""
    return isinstance(quantisation, dict) and bool(quantisation.get("kv_cache_scheme")) and not quantisation.get("config_groups", True)


def decode_dtype(raw: dict) -> str:
    """What quantised weights are decoded to: float16 where the config's torch_dtype says so, else bfloat16."""
    said = raw.get("torch_dtype") or raw.get("dtype")
    return "F16" if isinstance(said, str) and said.removeprefix("torch.") in ("float16", "half") else "BF16"


def split_modules(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The plain tensors, and those of quantised modules: module name -> last name -> tensor. Raises UnsupportedError for other layouts."""
    plain, modules = {}, {}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            modules.setdefault(match[1], {})[match[2]] = tensor
            continue
        layout = next((layout for pattern, layout in _FOREIGN if pattern.search(name)), None)
        if layout:
            raise FoundUnsupported(
                Finding("unsupported", tensor.file, name, f"it belongs to {layout}, which does not load", advice=LOADABLE)
            )
        plain[name] = tensor
    return plain, modules


def quantized_weights(
    config: ModelConfig, modules: dict[str, dict[str, Tensor]], plain: dict[str, Tensor], quantisation: QuantConfig
) -> dict[str, QuantizedWeight]:
    """Every quantised module by name. Warns once for each kind of thing that was not as the files say. Raises FormatError, UnsupportedError."""
    shapes, notes, weights = matrix_shapes(config), [], {}
    for name, tensors in modules.items():
        weights[name] = module_weight(name, tensors, shapes.get(name), plain, quantisation, notes)
    if quantisation.method is None and weights:
        notes.insert(0, _guess(next(iter(weights.values()))))
    elif quantisation.method is not None and not weights:
        source = quantisation.source
        notes.append(
            Finding("quantisation-config", source, None, "it describes a quantised checkpoint, but no tensor is quantised", error=False)
        )
    warn(notes)
    return weights


def warn(notes: list[Finding]):
    """One warning for all findings of a kind."""
    kinds = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note)
    for same in kinds.values():
        warnings.warn(FoundWarning(same))


def _guess(weight):
    found = (
        f"no quantize_config.json: read as {weight.format} with {weight.bits} bits and groups of {weight.group_size}, by names and shapes"
    )
    return Finding("guess", weight.file, None, found, "a config", "pass quantization_config={...} to say otherwise", error=False)


def module_weight(
    name: str,
    tensors: dict[str, Tensor],
    shape: tuple[int, int] | None,
    plain: dict[str, Tensor],
    quantisation: QuantConfig,
    notes: list[Finding],
) -> QuantizedWeight:
    """One module, by the layout that its tensors have and the config names. What can be used but is odd goes to `notes`."""
    part, tensor = next(iter(tensors.items()))
    if shape is None:
        raise FoundError(Finding("unused", tensor.file, f"{name}.{part}", "it belongs to no part of the model that the config describes"))
    if f"{name}.weight" in plain:
        _refuse_two(name, tensors, plain[f"{name}.weight"])
    if "zeros" in tensors:
        found = "it belongs to the first layout of GPTQ-for-LLaMa (March 2023), which does not load"
        raise FoundUnsupported(Finding("unsupported", tensor.file, f"{name}.zeros", found, advice=LOADABLE))
    compressed = any(part.startswith("weight_") for part in tensors)
    method = quantisation.method or ("compressed-tensors" if compressed else "awq" if is_awq(tensors) else "gptq")
    if compressed != (method == "compressed-tensors"):
        found = f"it belongs to {'compressed-tensors' if compressed else 'GPTQ or AWQ'}"
        raise FoundError(Finding("quantisation-config", tensor.file, f"{name}.{part}", found, f"{method}, as {quantisation.source} says"))
    module = Module(name, tensors, shape, quantisation, notes)
    if method == "compressed-tensors":
        return compressed_weight(module)
    if method == "awq":
        return awq_weight(module)
    return gptq_weight(module, name_hint(Path(module.file).name) if quantisation.method is None else None)


def _refuse_two(name, tensors, weight):
    """A module with a plain weight and quantisation's tensors: 8-bit floats or integers with scales, or a damaged file."""
    part = next(iter(tensors))
    if weight.dtype in ("F8_E4M3", "F8_E5M2", "I8", "U8"):
        found = f"{weight.dtype} weights with scales, which do not load"
        raise FoundUnsupported(Finding("unsupported", weight.file, f"{name}.weight", found, advice=LOADABLE))
    raise FoundError(Finding("ambiguous", weight.file, f"{name}.weight", f"'{name}.{part}' is there too", "one of them"))

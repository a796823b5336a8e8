"""Finds what is wrong with a checkpoint before it is run: all faults, not only the first.

The loaders' own checks do most of the work: what they would raise or warn of becomes a finding. Added here is what loading does not need to
know: values of scales and weights, how groups are filled, tensors and files that nothing uses. Tensors are read one after the other, in pieces.
"""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .._core import dequantize
from ..config import ModelConfig, parse_config
from ..errors import ArgumentError, Error, MissingFileError
from . import gguf_model
from .cache_scales import ANY as CACHE_SCALE
from .cache_scales import take_cache_scales
from .checkpoint import in_threads
from .findings import Finding, FoundWarning
from .gguf import BLOCKS, GgufTensor, read_gguf
from .hf import EMBEDDING, HEAD, check_biases, find_weights, full_names, no_config, read_index, read_json, settle_head
from .quant_config import QuantConfig
from .quant_modules import module_weight, read_folder_config, split_modules
from .quantized import QuantizedWeight
from .safetensors import WEIGHT_DTYPES, Tensor, make_tensor, read_safetensors
from .shapes import matrix_shapes, norm_shapes

PIECE = 1 << 20  # values looked at at a time
_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}  # all ones: NaN or infinite


def lint(path) -> list[Finding]:
    """All findings for a Hugging Face folder or a .gguf file, errors first. Raises MissingFileError when there is no such thing."""
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such folder or file")
    if path.is_file() and path.suffix == ".safetensors":
        raise ArgumentError(f"{path}: one file of weights; pass its folder {path.parent}, which holds config.json too")
    run = _Lint(path)
    if path.is_dir():
        run.folder()
    else:
        run.gguf()
    return sorted(set(run.findings), key=lambda found: (not found.error, found.file, found.tensor or "", found.kind, found.found))


def to_json(finding: Finding) -> dict:
    names = ("kind", "file", "tensor", "found", "expected", "advice")
    return {"level": "error" if finding.error else "warning", **{name: getattr(finding, name) for name in names}}


class _Lint:
    def __init__(self, path: Path):
        self.path = path
        self.findings: list[Finding] = []

    def add(self, kind, file, tensor, found, expected="", advice="", error=True):
        self.findings.append(Finding(kind, str(file), tensor, found, expected, advice, error))

    def attempt(self, kind: str, run: Callable, *arguments):
        """run(*arguments); what it raises or warns of becomes findings, and then the result is None. `kind`: of faults that name none."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return run(*arguments)
            except Error as error:
                self.findings.append(getattr(error, "finding", None) or self.of_text(kind, str(error), True))
                return None
            finally:
                for warning in caught:
                    message = warning.message
                    plain = [self.of_text(kind, str(message), False)]
                    self.findings += message.findings if isinstance(message, FoundWarning) else plain

    def of_text(self, kind, text, error):
        """Messages of loaders begin with the file's path."""
        file, _, rest = text.partition(": ")
        return Finding(kind, *((file, None, rest) if os.sep in file else (str(self.path), None, text)), error=error)

    # ---------------------------------------------------------------- folders

    def folder(self):
        if not (self.path / "config.json").exists():
            no_config(self.path)
        raw = self.attempt("config", read_json, self.path / "config.json")
        config = said = None
        if raw is not None:
            config = self.attempt("config", parse_config, raw, None, str(self.path / "config.json"))
            said = self.attempt("quantisation-config", read_folder_config, self.path, raw, read_json, None)
        place = self.attempt("missing-file", find_weights, self.path, said.file_stem if said else None)
        found = self.files(place) if place is not None else {}
        if config is not None:
            self.attempt("cache-scales", take_cache_scales, dict(found), config)
        found = {name: tensor for name, tensor in found.items() if not CACHE_SCALE.search(name)}
        tensors = self.attempt("ambiguous", full_names, found)
        parts = self.attempt("unsupported", split_modules, tensors) if tensors else None
        if parts is None:
            return
        plain, modules = parts
        quantized = self.modules(config, modules, plain, said) if config and said else {}
        if config:
            self.against_config(config, plain, modules, quantized)
        in_threads(self.values_of_module, [(name, tensors, quantized.get(name)) for name, tensors in modules.items()])
        in_threads(self.values, [tensor for tensor in plain.values() if tensor.dtype in WEIGHT_DTYPES])

    def files(self, place: Path) -> dict[str, Tensor]:
        """The tensors of all shards that can be read."""
        if place.suffix != ".json":
            found = self.attempt("file", read_safetensors, place)
            return found[0] if found else {}
        places = self.attempt("file", read_index, place) or {}
        tensors = {}
        for name in sorted(set(places.values())):
            wanted = [tensor for tensor, shard in places.items() if shard == name]
            if not (self.path / name).exists():
                self.add("missing-shard", self.path / name, None, "no such file", f"{len(wanted)} tensors in it", "download it again")
                continue
            read = self.attempt("file", read_safetensors, self.path / name)
            if read is None:
                continue
            for tensor in wanted:
                if tensor not in read[0]:
                    self.add("missing-tensor", self.path / name, tensor, "not in the file", f"it, as {place.name} says")
            for tensor in read[0].keys() - set(wanted):
                found = f"{place.name} does not name it" if tensor not in places else f"{place.name} has it in {places[tensor]}"
                self.add("unused", self.path / name, tensor, found, "an entry in the index", "it is not loaded", error=False)
            tensors |= {tensor: read[0][tensor] for tensor in wanted if tensor in read[0]}
        for stray in sorted(p.name for p in self.path.glob("*.safetensors") if p.name not in places.values()):
            self.add("unused", self.path / stray, None, f"{place.name} does not name this file", advice="it is not loaded", error=False)
        return tensors

    def modules(self, config: ModelConfig, modules, plain, said: QuantConfig) -> dict[str, QuantizedWeight]:
        shapes, weights = matrix_shapes(config), {}
        for name, tensors in modules.items():
            weight = self.attempt("module", module_weight, name, tensors, shapes.get(name), plain, said, self.findings)
            if weight is not None:
                weights[name] = weight
        if said.method is not None and not modules:
            self.add(
                "quantisation-config", said.source, None, "it describes a quantised checkpoint, but no tensor is quantised", error=False
            )
        return weights

    def against_config(self, config: ModelConfig, plain, modules, quantized):
        """Every weight of the model is there with its shape, and nothing else is."""
        matrices = matrix_shapes(config)
        expected = {f"{name}.weight": shape for name, shape in matrices.items()} | norm_shapes(config)
        biases = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
        for name, tensor in plain.items():
            shape = expected.get(name) or biases.get(name)
            if shape is None:
                self.add("unused", tensor.file, name, "it belongs to no part of the model that the config describes")
            elif tensor.shape != shape:
                self.add("shape", tensor.file, name, f"shape {list(tensor.shape)}", f"{list(shape)} from the config")
            if tensor.dtype not in WEIGHT_DTYPES:
                self.add("dtype", tensor.file, name, f"dtype {tensor.dtype}", f"one of {', '.join(WEIGHT_DTYPES)}")
        for name in expected.keys() - {HEAD}:
            if name not in plain and name.removesuffix(".weight") not in modules:
                self.add("missing-tensor", self.path, name, "missing from the checkpoint", "it, from the config")
        typed = {name: tensor for name, tensor in plain.items() if tensor.dtype in WEIGHT_DTYPES}
        if EMBEDDING in typed:
            self.attempt("tied", settle_head, self.path, config, dict(typed), dict(quantized), None)
        self.attempt("bias", check_biases, config, typed, quantized)

    # ---------------------------------------------------------------- values

    def values_of_module(self, job):
        name, tensors, weight = job
        for part in ("scales", "weight_scale"):
            if part in tensors and tensors[part].dtype in WEIGHT_DTYPES:
                self.scales(tensors[part])
        if weight is not None and weight.g_idx is not None:
            part = "g_idx" if "g_idx" in tensors else "weight_g_idx"
            self.filling(f"{name}.{part}", weight)

    def scales(self, tensor: Tensor):
        """Scales are positive numbers."""
        values = tensor.numpy()
        values = ((values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values).reshape(tensor.shape)
        faults = {
            "NaN": (np.isnan(values), True),
            "infinite": (np.isinf(values), True),
            "0": (values == 0, False),
            "negative": ((values < 0) & np.isfinite(values), False),
        }
        for what, (bad, error) in faults.items():
            if bad.any():
                at = [int(i) for i in np.argwhere(bad)[0]]
                found = f"{int(bad.sum())} scales are {what}, the first at {at}"
                advice = "the file is damaged" if error else "the weights of these groups are doubtful: compare with the original model"
                self.add("scales", tensor.file, tensor.name, found, "positive numbers", advice, error)

    def filling(self, tensor: str, weight: QuantizedWeight):
        """Every group has as many inputs as the group size says, but one that takes what is left."""
        counts = np.bincount(weight.g_idx, minlength=weight.groups)
        wrong = np.flatnonzero(counts != weight.group_size)
        short = weight.in_features % weight.group_size != 0
        if len(wrong) <= short:
            return
        group = int(wrong[np.argmin(counts[wrong])])
        found = f"group {group} has {int(counts[group])} inputs, and {len(wrong) - 1} other groups differ too"
        self.add("g_idx", weight.file, tensor, found, f"{weight.group_size} in every group", "the order may be damaged", error=False)

    def values(self, tensor: Tensor):
        """Weights are finite numbers."""
        word, ones = _EXPONENTS[tensor.dtype]
        bits, bad, first = tensor.data.view(word), 0, None
        for at in range(0, bits.size, PIECE):
            hits = (bits[at : at + PIECE] & ones) == ones
            if hits.any():
                bad += int(hits.sum())
                first = at + int(np.argmax(hits)) if first is None else first
        if bad:
            self.not_finite(tensor.file, tensor.name, bad, np.unravel_index(first, tensor.shape))

    def not_finite(self, file, name, bad, at):
        found = f"{bad} values are NaN or infinite, the first at {[int(i) for i in at]}"
        self.add("not-finite", file, name, found, "finite numbers", "the file is damaged")

    # ---------------------------------------------------------------- GGUF

    def gguf(self):
        read = self.attempt("file", read_gguf, self.path)
        if read is None:
            return
        metadata, tensors = read
        config = self.attempt("config", gguf_model.gguf_config, metadata, tensors, self.path)
        if config is not None:
            self.gguf_shapes(config, tensors)
        known = [tensor for tensor in tensors.values() if tensor.type_name in WEIGHT_DTYPES or tensor.type in gguf_model.DECODABLE]
        in_threads(self.gguf_values, known)

    def gguf_shapes(self, config: ModelConfig, tensors: dict[str, GgufTensor]):
        matrices = matrix_shapes(config)
        expected = {f"{name}.weight": shape for name, shape in matrices.items()} | norm_shapes(config)
        biases = {f"{name}.bias": shape[:1] for name, shape in matrices.items()}
        seen = {HEAD} if config.tie_word_embeddings else set()
        for name, tensor in tensors.items():
            if name in gguf_model.ROPE_FACTORS:
                continue
            self.attempt("unsupported", gguf_model.check_type, self.path, tensor)
            found = self.attempt("unused", gguf_model.hf_name, self.path, name, config.num_hidden_layers)
            if found is None:
                continue
            seen.add(found[0])
            shape = expected.get(found[0]) or biases.get(found[0])
            if shape is None:
                self.add("unused", self.path, name, "it belongs to no part of the model that the metadata describe")
            elif tensor.shape != shape:
                self.add("shape", self.path, name, f"shape {list(tensor.shape)}", f"{list(shape)} from the metadata")
        for name in expected.keys() - seen:
            self.add("missing-tensor", self.path, name, "missing from the file (Hugging Face's name)", "it, from the metadata")
        self.attempt("bias", gguf_model.check_biases, self.path, config, tensors)

    def gguf_values(self, tensor: GgufTensor):
        """Blocks are decoded in pieces: their scales may be NaN or infinite."""
        if tensor.type_name in WEIGHT_DTYPES:
            self.values(make_tensor(tensor.name, tensor.type_name, tensor.shape, tensor.data, str(self.path)))
            return
        _, values, nbytes = BLOCKS[tensor.type]
        piece = np.empty(PIECE, np.float32)
        count, bad, first = math.prod(tensor.shape), 0, None
        for at in range(0, count, PIECE):
            n = min(PIECE, count - at)
            lost = dequantize(tensor.data[at // values * nbytes : (at + n) // values * nbytes], tensor.type, piece[:n], "F32")
            if lost:
                bad += lost
                first = at + int(np.argmin(np.isfinite(piece[:n]))) if first is None else first
        if bad:
            self.not_finite(self.path, tensor.name, bad, np.unravel_index(first, tensor.shape))

"""quantize: a model to GPTQ's format, layer by layer.

Each layer reads what the layers before it give with their weights as quantised, and within a layer o_proj what the quantised q, k and v give, and so
on: later matrices make up for what earlier ones lost. Held are the inputs of one layer for all of the text, and one layer's weights as floats.
"""

import hashlib
import itertools
import math
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .. import _limits, loaders
from .._arrays import bytes_text
from .._core import OpContext
from .._version import __version__
from ..cache_file import fingerprint
from ..errors import ArgumentError, NumericError, OutOfMemoryError, StorageError
from ..loaders.checkpoint import in_threads
from ..loaders.quant_config import read_quant_config
from ..loaders.quant_modules import decode_dtype, module_weight, split_modules
from ..loaders.shapes import layer_matrices
from ..tokenizer import Tokenizer
from .folder import OutputFolder, gguf_hf_config, quantization_config, tokenizer_files
from .layer import Layer, as_float32, for_operators
from .matrix import Hessian, gptq_tensors, quantize_matrix
from .options import Options
from .text import calibration_windows

# Matrices that share their inputs, in the order of computation.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
IN_MEMORY = 1 / 3  # share of the memory that activations may take; beyond that they lie in a temporary file


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What a quantisation made. losses: the squared error of each matrix's outputs over the calibration text (GPTQ only), of layers that this
    run computed itself."""

    path: Path
    options: Options
    matrices: int
    tokens: int  # of the calibration text; 0: none was needed
    source_bytes: int
    bytes: int
    seconds: float
    losses: dict[str, float]

    def to_dict(self) -> dict:
        names = ("matrices", "tokens", "source_bytes", "bytes", "seconds", "losses")
        return {"path": str(self.path), **self.options.to_dict(), **{name: getattr(self, name) for name in names}}


def quantize(
    model,
    out,
    calib=None,
    *,
    bits: int = 4,
    group: int = 128,
    sym: bool = True,
    method: str = "gptq",
    format: str | None = None,
    order: str = "none",
    damp: float = 0.01,
    mse: float = 0.0,
    sink: float = 1 / 16,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    threads: int = 0,
    isa: str | None = None,
    revision: str | None = None,
    resume: bool = True,
    progress: bool = True,
) -> QuantizationReport:
    """Writes a copy of a model whose matrices in all layers are integers, as a Hugging Face folder in GPTQ's format.

    Args:
        model: a Hugging Face folder, a .gguf file, "tiny" or a hub id. Embeddings, norms, biases and the output matrix stay as they are.
        out: the folder to make. It must not exist, be empty, or be what an interrupted run left.
        calib: what GPTQ learns from: a text, a pathlib.Path of a text file, token ids, or a list of these.
        bits, group, sym, method, order, damp, mse, sink: see `llmcoopt.quantizer.Options`.
        format: how zero points are stored: "gptq" (less one) or "gptq_v2" (as they are). None: "gptq" when sym, which every reader knows, else
            "gptq_v2": GPTQModel refuses asymmetric files of the first kind that others wrote.
        samples, length, seed: at most so many windows of so many tokens (None: 2,048, or the model's context), chosen by the seed.
        threads, isa: as in Model.from_pretrained. The result is the same bits on any number of threads of one instruction set.
        resume: go on from the layers that an interrupted run of the same kind finished, with the same result; False: begin anew.
        progress: a bar on stderr.

    Raises ArgumentError (options, too little text, a model that is quantised already, a folder that is not empty), NumericError (weights or
    activations that are NaN or infinite), StorageError (a full disk, for one; the layers that are finished stay), OutOfMemoryError, and what loading
    raises.
    """
    begun = time.monotonic()
    options = Options(bits, group, sym, method, format or ("gptq" if sym else "gptq_v2"), order, float(damp), float(mse), float(sink))
    checkpoint = _load(model, revision)
    windows = []
    if method == "gptq":
        windows = calibration_windows(
            calib, lambda: Tokenizer.from_pretrained(checkpoint.tokenizer_source), checkpoint.config, samples, length, seed
        )
    context = OpContext(isa, threads or _limits.cpus())
    tokens = sum(map(len, windows))
    _warn_of_little_text(tokens, checkpoint.config, method)
    about = {"llmcoopt": __version__, **options.to_dict(), "model": fingerprint(checkpoint.config, checkpoint.tensors.values())}
    about |= {
        "isa": f"{context.name} ({context.detail})",
        "text": hashlib.sha256(b"".join(w.tobytes() + b"|" for w in windows)).hexdigest(),
    }
    beside = tokenizer_files(checkpoint)
    folder = OutputFolder(Path(out), about, resume)
    run = _Run(checkpoint, options, context, windows, folder, progress)
    try:
        run.layers()
    except MemoryError as error:
        raise OutOfMemoryError(_needs(checkpoint.config, tokens)) from error
    nbytes = folder.finish(checkpoint, options, beside)
    matrices = len(layer_matrices(checkpoint.config)) * checkpoint.config.num_hidden_layers
    return QuantizationReport(Path(out), options, matrices, tokens, checkpoint.nbytes, nbytes, time.monotonic() - begun, dict(run.losses))


def _load(model, revision):
    """The checkpoint, refused when there is something that quantising cannot start from."""
    place = loaders.resolve(model, revision)
    found = loaders.load_folder(place) if place.is_dir() else loaders.load(place)
    if found.quantized:
        first = next(iter(found.quantized.values()))
        raise ArgumentError(
            f"{place}: it is quantised already ('{first.name}': {first.format}, {first.bits} bits); expected the 16-bit model that it was made from"
        )
    if found.stored:
        kinds = ", ".join(sorted({stored.format for stored in found.stored.values()}))
        warnings.warn(
            f"{place}: its weights are quantised ({kinds}) and lose a second time; the original model gives better results", stacklevel=3
        )
    in_threads(_check_finite, [t for t in found.tensors.values() if t.name.startswith("model.layers.") and len(t.shape) == 2])
    return found


def _check_finite(tensor):
    bad = ~np.isfinite(as_float32(tensor))
    if bad.any():
        at = [int(i) for i in np.argwhere(bad)[0]]
        raise NumericError(f"{tensor.file}: tensor '{tensor.name}' has {int(bad.sum())} values that are NaN or infinite, the first at {at}")


def _warn_of_little_text(tokens, config, method):
    widest = max(inputs for _, inputs in layer_matrices(config).values())
    if method == "gptq" and tokens < widest:
        warnings.warn(
            f"calib: {tokens} tokens for matrices of {widest} inputs: expected as many at least, better ten times as many", stacklevel=3
        )


def _needs(config, tokens):
    widest = max(inputs for _, inputs in layer_matrices(config).values())
    held = 4 * tokens * (config.hidden_size + config.num_attention_heads * config.head_dim)
    return (
        f"out of memory: the sums and the factor of {widest} inputs take {bytes_text(12 * widest**2)}, "
        f"activations of {tokens:,} tokens {bytes_text(held)}; pass fewer samples, and go on with the same command where more memory is free"
    )


class _Run:
    def __init__(self, checkpoint, options, context, windows, folder, progress):
        self.checkpoint, self.options, self.context = checkpoint, options, context
        self.windows, self.folder = windows, folder
        raw = loaders.read_json(checkpoint.path / "config.json") if checkpoint.format == "safetensors" else gguf_hf_config(checkpoint)
        self.dtype = decode_dtype(raw)  # what loading decodes to: the calibration runs with the same values
        self.losses: dict[str, float] = {}
        self.costs = _Costs(checkpoint.config, windows)
        shape = "{desc}: {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=self.costs.total, desc=f"{options.method}, {options.bits} bits", bar_format=shape, disable=not progress)

    def layers(self):
        """All layers that are not finished; those that are, are computed again as far as later ones need it."""
        config, done = self.checkpoint.config, self.folder.finished()
        with self.bar, _Activations(self.windows, config, self.folder.work) as held:
            if done < config.num_hidden_layers:
                self.embed(held)
            for index in range(config.num_hidden_layers):
                layer = Layer(self.context, config, index, self.checkpoint.tensors)
                if index >= done:
                    self.bar.set_postfix_str(f"layer {index + 1} of {config.num_hidden_layers}")
                    self.quantize_layer(layer, held)
                elif done < config.num_hidden_layers:
                    self.bar.set_postfix_str(f"layer {index + 1} is there")
                    self.repeat(layer, held)
                else:
                    self.bar.update(self.costs.layer)

    def embed(self, held):
        table = self.checkpoint.tensors["model.embed_tokens.weight"]
        for ids, x in zip(self.windows, held.streams, strict=True):
            self.context.embed(x, ids, *for_operators(table.numpy(), table.dtype))

    def quantize_layer(self, layer, held):
        made = {}
        for stage, names in enumerate(STAGES):
            hessian = self.inputs(layer, stage, held) if self.windows else None
            for name in names:
                made |= self.matrix(layer, name, hessian)
        self.folder.save_layer(layer.index, made)
        for x in held.streams:
            layer.add_mlp(x)
            self.bar.update(self.costs.window(4, len(x)))

    def inputs(self, layer, stage, held):
        """The Hessian of a stage's inputs; on the way there the stream takes in what the stage before has quantised."""
        hessian, firsts = None, []
        for x, attended in zip(held.streams, held.attended, strict=True):
            if stage == 0:
                rows = layer.attention_input(x)
            elif stage == 1:
                rows = attended[:] = layer.attended(x)
            elif stage == 2:
                layer.add_attention(x, attended)
                rows = layer.mlp_input(x)
            else:
                rows = layer.down_input(x)
            hessian = hessian or Hessian(self.context, rows.shape[1])
            hessian.add(rows)
            firsts.append(rows[0] * math.sqrt(max(0.0, self.options.sink * len(x) - 1)))
            self.bar.update(self.costs.window(stage, len(x)))
        hessian.add(np.stack(firsts))
        hessian.check(f"model.layers.{layer.index}.{STAGES[stage][0]}")
        return hessian

    def matrix(self, layer, name, hessian):
        full = f"model.layers.{layer.index}.{name}"
        weight = layer.weight(name)
        outputs = len(weight)
        found = quantize_matrix(
            self.context, weight, hessian, self.options, full, lambda columns: self.bar.update(self.costs.columns(name, outputs, columns))
        )
        self.losses[full] = found.loss
        if self.windows:
            layer.replace(name, found.decode(self.dtype), self.dtype)
        return {f"{full}.{part}": entry for part, entry in gptq_tensors(found, self.options).items()}

    def repeat(self, layer, held):
        """The layer with the weights that a run before has quantised: the same bits as then."""
        config = self.checkpoint.config
        shapes, said = layer_matrices(config), read_quant_config({str(self.folder.work): quantization_config(self.options)})
        _, modules = split_modules(self.folder.load_layer(layer.index))
        for full, tensors in modules.items():
            name = full.removeprefix(f"model.layers.{layer.index}.")
            tensor = module_weight(full, tensors, shapes[name], {}, said, []).dequantize(self.dtype)
            layer.replace(name, tensor.numpy(), self.dtype)
        for x in held.streams:
            layer.add_attention(x, layer.attended(x))
            layer.add_mlp(x)
            self.bar.update(self.costs.layer * len(x) / max(1, self.costs.tokens))


class _Activations:
    """The residual stream of every window and what its attention gave: float32, in memory or in a temporary file. A context manager."""

    def __init__(self, windows, config, folder: Path):
        tokens, width = sum(map(len, windows)), config.num_attention_heads * config.head_dim
        self.file, floats = None, tokens * (config.hidden_size + width)
        if 4 * floats > IN_MEMORY * _limits.memory_bytes():
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self.fill(4 * floats)
            space = np.memmap(self.file, np.float32, "r+", shape=(floats,))
        else:
            space = np.zeros(floats, np.float32)
        edges = np.cumsum([0, *map(len, windows)])
        stream, attended = space[: tokens * config.hidden_size], space[tokens * config.hidden_size :]
        self.streams, self.attended = (
            [rows.reshape(tokens, each)[a:b] for a, b in itertools.pairwise(edges)]
            for rows, each in ((stream, config.hidden_size), (attended, width))
        )

    def fill(self, nbytes):
        """Room on the disk is taken at once: a full disk is an error here, and would be a signal when a page is written later."""
        try:
            os.posix_fallocate(self.file.fileno(), 0, nbytes)
        except OSError as error:
            raise StorageError(f"no room for {nbytes:,} bytes of activations in a temporary file: {error.strerror}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.streams = self.attended = []
        if self.file is not None:
            self.file.close()


class _Costs:
    """Products (in thousands) that the parts of a run need: what the bar counts."""

    def __init__(self, config, windows):
        self.tokens, self.shapes, self.config = sum(map(len, windows)), layer_matrices(config), config
        self.layer = sum(self.window(stage, len(ids)) for stage in range(5) for ids in windows)
        self.layer += sum(self.columns(name, *shape) for name, shape in self.shapes.items())
        self.total = self.layer * config.num_hidden_layers

    def window(self, stage, tokens):
        """Of a stage's inputs and their Hessian; stage 4: of the MLP's output."""
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        queries = self.config.num_attention_heads * self.config.head_dim
        keys = self.config.num_key_value_heads * self.config.head_dim
        before = (0, hidden * (queries + 2 * keys) + queries * tokens, queries * hidden, 2 * hidden * inner, 3 * hidden * inner)[stage]
        inputs = (hidden, queries, hidden, inner, 0)[stage]
        return tokens * (before + inputs * inputs) / 1000

    def columns(self, name, outputs, columns):
        """Of sweeping so many columns, with their share of the factorisation."""
        inputs = self.shapes[name][1]
        return columns * (outputs * (inputs if self.tokens else 100) + (inputs * inputs if self.tokens else 0)) / 1000

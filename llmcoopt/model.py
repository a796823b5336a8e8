"""Model: weights and shape of a Llama-family model, and its forward pass."""

import contextlib
import functools
import weakref
from pathlib import Path

import numpy as np

from . import _core, _limits, loaders
from ._arrays import as_ids, bytes_text, html_table
from .cache import KVCache, Sequence, of_model
from .errors import ArgumentError, ForkError, UnsupportedError
from .taps import Tap

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "QUANTIZED": "quantized"}  # safetensors' names and ours
CHUNK = 512  # prompt tokens computed at once; Ctrl-C is heard between chunks


class Model:
    """A language model on the CPU. Make one with `Model.from_pretrained`.

    Attributes: config (ModelConfig), dtype (of the weight matrices; of quantised ones, what they would be decoded to), name, path, isa
    (instruction set in use), threads, activations ("int16" or "int8", in products with quantised weights), num_parameters, weight_bytes,
    cache_scales (float32 [layers, k|v, kv heads] of the checkpoint, or None; see KVCache's kv_scales). Use it as a context manager, or call
    close(), to stop its threads and release the mapped files.
    """

    def __init__(self, checkpoint, threads: int = 0, isa: str | None = None, activations: str = "int16"):
        self.config = checkpoint.config
        self.path = Path(checkpoint.path)
        self.format = checkpoint.format
        self.tokenizer_source = checkpoint.tokenizer_source
        self.generation_config = checkpoint.generation_config
        self.cache_scales = checkpoint.cache_scales
        tensors = list(checkpoint.tensors.values())
        self._tensors = tensors
        self._core = _core.Model(
            self.config.to_core(),
            [(t.name, t.data, DTYPES[t.dtype], tuple(t.shape)) for t in tensors],
            threads or _limits.cpus(),
            isa,
            activations == "int8",
        )
        info = self._core.info()
        self.isa, self.isa_detail, self.threads = info["isa"], info["isa_detail"], info["threads"]
        self.num_parameters = sum(int(np.prod(t.shape, dtype=np.int64)) for t in tensors)
        self.weight_bytes = sum(memoryview(t.data).nbytes for t in tensors)
        self.stored = loaders.summary(tensors, checkpoint.stored)
        self.activations = activations
        dtype = next(t.dtype for t in tensors if t.name.endswith("q_proj.weight"))
        self.dtype = DTYPES[checkpoint.decode_dtype if dtype == loaders.QUANTIZED else dtype]
        self._caches: weakref.WeakSet[KVCache] = weakref.WeakSet()
        self._generations: weakref.WeakSet = weakref.WeakSet()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        threads: int = 0,
        isa: str | None = None,
        revision: str | None = None,
        tie_word_embeddings: bool | None = None,
        quantization_config: dict | None = None,
        weights: str = "auto",
        activations: str = "int16",
        head_bits: int | None = None,
    ) -> "Model":
        """Loads a model.

        Args:
            pretrained_model_name_or_path: a Hugging Face folder, a .gguf file, "tiny" (the model inside this package), or a hub id
                ("org/name", needs huggingface_hub unless it is in the local cache).
            device: "auto" or "cpu".
            dtype: "auto" keeps the file's type; "float32", "float16", "bfloat16" convert, which decodes quantised weights.
            threads: 0 uses every CPU this process may use (its affinity, and its container's quota).
            isa: "ref", "avx2", "avx512", "amx"; None takes the best, or what LLMCOOPT_ISA says.
            revision: of a hub id.
            tie_word_embeddings: overrides the config.
            quantization_config: overrides what the files say of their quantisation, key by key: quant_method, bits, group_size, sym,
                checkpoint_format ("gptq": zeros stored less one, "gptq_v2": as they are), dynamic.
            weights: "auto" keeps quantised weights in their bits where dtype is "auto"; "dequantized" decodes them to 16 bit
                (docs/quantization.md).
            activations: products with quantised weights round activations to "int16" (relative error 3e-5) or "int8" (6e-3; faster for
                prompts), with a scale for each row and group. Others do not round, or to bfloat16 for prompts.
            head_bits: 8 rounds an output matrix that is not quantised to 8 bits with a scale for 64 inputs: half the bytes to read for it.

        Files are memory-mapped and used in place where the type is kept. Raises MissingFileError, FormatError (file and tensor named),
        UnsupportedError, OutOfMemoryError.
        """
        if device not in ("auto", "cpu"):
            raise UnsupportedError(f"device = {device!r}: this version runs on the CPU; pass device='cpu' or leave it out")
        for name, value, known in (("weights", weights, ("auto", "dequantized")), ("activations", activations, ("int16", "int8"))):
            if value not in known:
                raise ArgumentError(f"{name} = {value!r}, expected {known[0]!r} or {known[1]!r}")
        if head_bits not in (None, 8):
            raise ArgumentError(f"head_bits = {head_bits!r}, expected 8 or None")
        path = loaders.resolve(pretrained_model_name_or_path, revision=revision)
        keep = weights == "auto" and dtype == "auto"
        checkpoint = loaders.load(path, dtype, tie_word_embeddings, None, quantization_config, keep, head_bits)
        return cls(checkpoint, threads=threads, isa=isa, activations=activations)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the weights: of the configuration and samples of every tensor. Saved caches carry it."""
        from .cache_file import fingerprint

        return fingerprint(self.config, self._tensors)

    @property
    def name(self) -> str:
        return self.path.stem if self.path.suffix == ".gguf" else self.path.name

    def forward(self, ids, sequence: Sequence | None = None, last_only: bool = False, tap: Tap | None = None) -> np.ndarray:
        """Computes `ids` after what `sequence` holds, appends them to it, and returns logits.

        Args:
            ids: token ids, n of them.
            sequence: where keys and values go; None: a temporary one.
            last_only: only the logits after the last id.
            tap: a Tap, which is shown activations on their way.

        Returns float32 [n, vocab_size], or [vocab_size] when last_only. Prompts are computed in chunks of 512; on an error or Ctrl-C the
        sequence is as it was before the call. Raises ArgumentError (empty, out of range, longer than the context), OutOfPagesError,
        NumericError when a logit is NaN.
        """
        ids = as_ids(ids, self.config.vocab_size)
        if not isinstance(tap, Tap | None):
            raise ArgumentError(f"tap: found {type(tap).__name__}, expected a Tap")
        if sequence is None:
            with KVCache(self, "auto", max_tokens=len(ids)) as cache:
                return self.forward(ids, cache.sequence(), last_only, tap)
        sequence = of_model(sequence, Sequence, self, "sequence")
        start, n, vocab = len(sequence), len(ids), self.config.vocab_size
        if start + n > self.config.max_positions:
            raise ArgumentError(f"ids: {n} tokens after {start} held make {start + n}, the model's context is {self.config.max_positions}")
        logits = np.empty(vocab if last_only else (n, vocab), dtype=np.float32)
        sequence._core.hold(n)
        try:
            chunk = min(CHUNK, sequence.cache._core.step_tokens())
            if tap is not None:
                chunk = tap.chunk(self.config, chunk)
            # A tap wants to see all tokens, also those that the prefix index would find.
            found = sequence._core.adopt(ids) if last_only and start == 0 and n > 1 and tap is None else 0
            for at in range(found, n, chunk):
                part = ids[at : at + chunk]
                out = logits[at : at + chunk] if not last_only else logits if at + chunk >= n else None
                how = {"rope_length": start + n, "prompt": n > 1}
                if tap is None:
                    self._core.forward(sequence._core, part, out, last_only, **how)
                else:
                    seen = tap.arrays(self.config, len(part))
                    self._core.forward(sequence._core, part, out, last_only, **how, taps=seen)
                    for place in seen:
                        tap.look(*place)
        except BaseException:
            sequence.truncate(start)
            raise
        return logits

    __call__ = forward

    def generate(self, input_ids, **options):
        """Generates for a batch of prompts of any lengths, all in one running batch; `tokenizer=` gives texts and allows `stop_strings=`.
        See `llmcoopt.generation.generate_batch`."""
        from .generation import generate_batch

        return generate_batch(self, input_ids, **options)

    def close(self) -> None:
        """Ends generations and caches of this model, stops its threads and releases the weights. The object can't be used afterwards.

        Calls of other threads end with ArgumentError after the step or chunk that they are in, which this waits for.
        """
        self._tensors = []  # they keep files mapped
        self._core.close()  # first: from here on no other thread computes, or makes a cache or a generation
        for items in (self._generations, self._caches):
            for item in _drain(items):
                with contextlib.suppress(ArgumentError, ForkError):  # its own thread is closing it, or it is the parent process's
                    item.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def facts(self) -> dict:
        """What the model is, for people and for --json: family, shape, parameters, bytes, instruction set, threads."""
        c = self.config
        return {
            "name": self.name,
            "path": str(self.path),
            "format": self.format,
            "model_type": c.model_type,
            "parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "dtype": self.dtype,
            "stored": self.stored,
            "layers": c.num_hidden_layers,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "heads": c.num_attention_heads,
            "kv_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "vocab_size": c.vocab_size,
            "context": c.max_positions,
            "sliding_window": max(c.window) if c.window else None,
            "rope": c.rope.kind,
            "tied_embeddings": c.tie_word_embeddings,
            "cache_bytes_per_token": 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (4 if self.dtype == "float32" else 2),
            "cache_scales": _scales_text(self.cache_scales),
            "isa": self.isa_detail,
            "threads": self.threads,
        }

    def stored_lines(self) -> list[str]:
        """How the file holds the matrices and how memory does, a line for those that are alike: how many, format, bits, groups, order, bytes."""
        return [loaders.row_text(row, bytes_text(row["bytes"]), bytes_text(row["memory"])) for row in self.stored]

    def __repr__(self):
        c = self.config
        return (
            f"Model({self.name!r}, {c.model_type}, {self.num_parameters / 1e6:.1f} M parameters, {self.dtype}, "
            f"{c.num_hidden_layers} layers, {c.num_attention_heads}:{c.num_key_value_heads} heads of {c.head_dim}, {self.isa_detail}, "
            f"{self.threads} threads)"
        )

    def _repr_html_(self):
        facts = self.facts()
        facts["weight_bytes"] = bytes_text(facts["weight_bytes"])
        facts["stored"] = "; ".join(self.stored_lines())
        return html_table(f"Model {self.name}", facts)


def _scales_text(scales) -> str | None:
    """Of a checkpoint's k_scale and v_scale, for people."""
    if scales is None:
        return None
    found = scales[~np.isnan(scales).any(axis=(1, 2))]
    return f"{len(found)} of {len(scales)} layers, {found.min():.4g} to {found.max():.4g}"


def _drain(items: weakref.WeakSet):
    """Takes the items out one by one: another thread may still be adding one, which iteration would not stand."""
    with contextlib.suppress(KeyError):
        while True:
            yield items.pop()

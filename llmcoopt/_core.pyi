"""The extension's contract with Python. Arrays are any objects with the buffer protocol; `ids` are int32.

Errors: ArgumentError for a wrong argument, FormatError for weights that do not fit the config, OutOfMemoryError, OutOfPagesError, NumericError,
ForkError, UnsupportedError, all of llmcoopt.errors.
"""

from collections.abc import Sequence as _Sequence
from typing import Any

from typing_extensions import Buffer

class Model:
    """A model over weight buffers, which it keeps alive. `config` is ModelConfig.to_core(); `tensors` holds (name, buffer, dtype, shape)."""

    def __init__(
        self,
        config: dict,
        tensors: list[tuple[str, Buffer, str, tuple[int, ...]]],
        threads: int = 0,
        isa: str | None = None,
        x_int8: bool = False,
    ) -> None: ...
    def forward(
        self,
        sequence: Sequence,
        ids: Buffer,
        logits: Buffer | None = None,
        last_only: bool = False,
        rope_length: int = 0,
        prompt: bool = True,
        taps: list[tuple[str, int, Buffer]] = ...,
    ) -> None:
        """Computes ids after what the sequence holds, appends them, and writes float32 logits [n, vocab] ([vocab] when last_only).
        Activations are copied into the arrays of taps, (point, layer, float32 [n, width]); llmcoopt/taps.py lists the points."""

    def info(self) -> dict[str, Any]: ...
    def close(self) -> None: ...

class KVCache:
    """A paged key/value cache shaped for a model."""

    def __init__(
        self,
        model: Model,
        dtype: str,
        page_size: int,
        max_tokens: int,
        write_buffer: bool,
        host_bytes: int = 0,
        spill_path: str | None = None,
        prefix_index: bool = False,
        turn_keys: bool = True,
        layer_dtypes: list[str] | None = None,
        fixed_scales: Buffer | None = None,
        window: int = 0,
        sinks: int = 0,
        page_tolerance: float = 0.0,
        residual: int = 0,
        n_first: int = 0,
    ) -> None:
        """layer_dtypes: of every layer, in place of dtype. fixed_scales: float32 [layers, k|v, kv_heads], for layers of fp8_e4m3."""

    def forget_prefixes(self) -> None: ...
    def reset_counters(self) -> None: ...
    def page_out(self, page: int, buffer: Buffer) -> None: ...
    def page_in(self, data: Buffer) -> int:
        """A page with these bytes, held until page_drop(); returns its number."""

    def first_out(self, page: int, buffer: Buffer) -> None: ...
    def first_in(self, page: int, data: Buffer) -> None:
        """A text begins with this page of page_in(), and these bytes lie beside it."""

    def buffer(self) -> tuple[int, int]:
        """(tokens of a stretch, bytes beside a page that a text begins with)."""

    def page_drop(self, page: int) -> None: ...
    def restore(self, length: int, exact: int, unseen: int, ids: bytes, table: bytes, tail: bytes) -> Sequence:
        """A sequence as Sequence.image() gave it, on pages of page_in()."""

    def step_tokens(self) -> int:
        """The most tokens of one sequence that a step may append."""

    def sequence(self) -> Sequence: ...
    def stats(self) -> dict[str, Any]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...

class Sequence:
    """A sequence of a KVCache; made by KVCache.sequence() and fork()."""

    def length(self) -> int: ...
    def ids(self) -> bytes:
        """int32 ids of the tokens held."""

    def image(self) -> tuple[int, int, int, bytes, bytes, bytes]:
        """(length, exact, unseen, ids, table, tail) for a file."""

    def adopt(self, ids: Buffer) -> int:
        """An empty sequence takes over the pages that the prefix index has of int32 ids; returns how many tokens that is."""

    def read(self, layer: int, keys: Buffer, values: Buffer) -> None:
        """Keys and values of a layer into float32 arrays [length, kv_heads, head_dim]."""

    def hold(self, n: int) -> None: ...
    def fork(self) -> Sequence: ...
    def truncate(self, length: int) -> None: ...
    def free(self) -> None: ...

class Engine:
    """Continuous batching over one cache."""

    def __init__(self, cache: KVCache, max_batch: int = 64, chunk: int = 512) -> None: ...
    def add(
        self,
        prompt: Buffer,
        max_new_tokens: int,
        eos: Buffer,
        ignore_eos: bool,
        min_new_tokens: int,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        seed: int,
        sequence: Sequence | None,
    ) -> int:
        """Queues a request; returns its number."""

    def step(self, events: list[tuple[int, int, float, str | None, Exception | None]]) -> None:
        """Runs one step and appends to `events`, at most one a request: (request, token or -1, logprob, finish reason or None, exception or
        None). They are in the list before it returns, so an interrupt can't lose them."""

    def cancel(self, request: int) -> None: ...
    def stats(self) -> dict[str, Any]: ...
    def check(self) -> None: ...
    def close(self) -> None: ...

class OpContext:
    """Single operators of one instruction set, for tests and benchmarks: the contracts of csrc/ops/ops.h on plain arrays."""

    name: str
    detail: str
    threads: int
    def __init__(self, isa: str | None = None, threads: int = 1) -> None: ...
    def embed(self, out: Buffer, ids: Buffer, table: Buffer, dtype: str) -> None: ...
    def rmsnorm(self, out: Buffer, x: Buffer, weight: Buffer, eps: float) -> None: ...
    def linear(
        self, x: Buffer, parts: _Sequence[tuple[Buffer, Buffer, str, Buffer | None]], m_prompt: int = 0, accumulate: bool = False
    ) -> None: ...
    def linear_quantized(
        self,
        x: Buffer,
        parts: _Sequence[tuple[Buffer, Buffer, str, Buffer | None]],
        m_prompt: int = 0,
        accumulate: bool = False,
        x_int8: bool = False,
    ) -> None: ...
    def swiglu(self, out: Buffer, gate: Buffer, up: Buffer) -> None: ...
    def mlp(
        self,
        x: Buffer,
        gate: tuple[Buffer, Buffer, str, Buffer | None],
        up: tuple[Buffer, Buffer, str, Buffer | None],
        down: tuple[Buffer, Buffer, str, Buffer | None],
        m_prompt: int = 0,
        accumulate: bool = False,
    ) -> None: ...
    def rope_append(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        cos: Buffer,
        sin: Buffer,
        cache: Buffer,
        dtype: str,
        page_size: int,
        n_layers: int,
        layer: int,
        items: _Sequence,
        scales: Buffer | None = None,
        turned: bool = False,
        buffer: tuple[int, Buffer] | None = None,
    ) -> None: ...
    def attention(
        self,
        out: Buffer,
        q: Buffer,
        cache: Buffer,
        dtype: str,
        page_size: int,
        n_layers: int,
        n_kv_heads: int,
        layer: int,
        items: _Sequence,
        scale: float,
        window: int = 0,
        sinks: int = 0,
        chosen: Buffer | None = None,
        buffer: tuple[int, Buffer] | None = None,
    ) -> None: ...
    def choose_pages(
        self,
        chosen: Buffer,
        counts: Buffer,
        masses: Buffer,
        q: Buffer,
        bounds: Buffer,
        cache: Buffer,
        dtype: str,
        page_size: int,
        n_layers: int,
        n_kv_heads: int,
        layer: int,
        items: _Sequence,
        scale: float,
        tolerance: float,
        window: int = 0,
        sinks: int = 0,
        buffer: tuple[int, Buffer] | None = None,
    ) -> None: ...
    def hessian_add(self, h: Buffer, x: Buffer) -> None: ...
    def inverse_factor(self, factor: Buffer, h: Buffer, order: Buffer, damp: float) -> bool: ...
    def sweep_block(
        self,
        w: Buffer,
        factor: Buffer | None,
        codes: Buffer,
        scales: Buffer,
        zeros: Buffer,
        loss: Buffer,
        group_of: Buffer,
        columns: tuple[int, int],
        bits: int,
        sym: bool = True,
        find: bool = True,
        least_zero: int = 0,
        exponent: float = 0.0,
    ) -> bool: ...

def isas() -> list[str]:
    """Names of the instruction sets that this machine can run, best last."""

def block_codes(blocks: Buffer, type: int, rows: int, codes: Buffer, scales: Buffer, offsets: Buffer | None) -> None:
    """The integers of GGUF blocks: uint8 codes [rows, k] (of Q8_0 plus 128), float32 scales and offsets [k / group, rows]."""

def convert(source: Buffer, from_dtype: str, out: Buffer, to_dtype: str) -> int:
    """Converts between 'F32', 'F16' and 'BF16', rounding to nearest even; returns how many values were lost."""

def dequantize(blocks: Buffer, type: int, out: Buffer, dtype: str) -> int:
    """Decodes GGUF blocks of a type number into 'F32', 'F16' or 'BF16'."""

def dequantize_groups(
    codes: Buffer, k: int, scales: Buffer, zeros: Buffer, group_of: Buffer | None, group_size: int, out: Buffer, dtype: str
) -> int:
    """out[r, c] = scales[r, g] * (codes[r, c] - zeros[r, g]), g being group_of[c] or c // group_size; returns how many values were lost."""

def pack_size(n: int, k: int, bits: int, block: int, scale_dtype: str, offsets: str, ordered: bool) -> int:
    """Bytes of a quantised weight in the layout of csrc/base/qweight.h."""

def pack_begin(out: Buffer, n: int, k: int, bits: int, block: int, scale_dtype: str, offsets: str, order: Buffer | None) -> None:
    """Writes the header of a quantised weight: 4 or 8 bits, `block` inputs that share a scale, offsets "none", "zeros" or "floats"."""

def pack_rows(
    out: Buffer,
    codes: Buffer,
    words_n: int,
    shift: int,
    rows: tuple[int, int],
    scales: Buffer,
    dtype: str,
    zeros: Buffer | None,
    offsets: Buffer | None,
    groups: tuple[int, int, int, int],
) -> int:
    """Fills outputs rows = (first, count); groups: (first output, outputs, groups, group size). Returns how many scales are not exact."""

def unpack_rows(weight: Buffer, row: int, out: Buffer) -> None:
    """Decodes outputs from `row` on into float32 [rows, k], in the file's order of inputs."""

def unpack(
    words: Buffer, bits: int, kind: int, strides: tuple[int, int], part: tuple[int, int, int, int], transposed: bool, out: Buffer
) -> None:
    """Integers of 2, 3, 4 or 8 bits from 32-bit words to one byte each; csrc/model/unpack.h says what the arguments mean."""

def mem_fail_at(n: int) -> int:
    """Makes the n-th native allocation from now fail, once (0: off)."""

def mem_live() -> int:
    """Native blocks allocated and not freed, in this process."""

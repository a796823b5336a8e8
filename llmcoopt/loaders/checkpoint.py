"""What every loader returns, and how loaders use the machine's processors."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .._limits import cpus
from ..config import ModelConfig
from .safetensors import Tensor
from .stored import Stored


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCheckpoint:
    """A checkpoint as named arrays, not yet bound to a model. The tensors keep their files mapped.

    `quantized` holds what is quantised in the file in the form that QuantizedWeight describes, by module; `load` puts the decoded weights of
    all of them into `tensors`."""

    config: ModelConfig
    tensors: dict[str, Tensor]  # by Hugging Face's names
    path: Path  # the folder or .gguf file
    format: str  # "safetensors" or "gguf"
    tokenizer_source: Path  # the folder or .gguf file that the tokenizer is to be read from
    generation_config: dict = field(default_factory=dict)
    cache_scales: np.ndarray | None = None  # float32 [layers, k|v, kv heads], NaN where the file has none; for fp8_e4m3 caches
    metadata: dict = field(default_factory=dict)  # of a GGUF file, as read_metadata gives it
    quantized: dict = field(default_factory=dict)  # module name -> QuantizedWeight
    decode_dtype: str = "BF16"  # what quantised weights are decoded to
    stored: dict[str, Stored] = field(default_factory=dict)  # how the file holds a weight, where that is not what `tensors` has

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __repr__(self):
        return f"LoadedCheckpoint({self.config.model_type}, {len(self.tensors)} tensors, {self.nbytes / 1e6:.1f} MB, {str(self.path)!r})"


def in_threads(run: Callable, jobs: Iterable) -> list:
    """[run(job) for job in jobs], on as many threads as the process may use. After a failure, jobs not begun are dropped."""
    pool = ThreadPoolExecutor(cpus())
    try:
        return list(pool.map(run, jobs))
    finally:
        pool.shutdown(cancel_futures=True)

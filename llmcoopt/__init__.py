"""llmcoopt: run Llama-family language models with an optimised key/value cache. See README.md for a ten-line example."""

from . import errors
from ._core import isas
from ._version import __version__
from .cache import KVCache, Sequence
from .damage import KVCacheReport, cache_report
from .dtype_choice import CacheChoice, choose_cache_dtype
from .errors import Error
from .generation import Generation, GenerationOutput, generate
from .model import Model
from .quantizer import QuantizationReport, quantize
from .taps import Tap
from .tokenizer import Tokenizer

__all__ = [
    "CacheChoice",
    "Error",
    "Generation",
    "GenerationOutput",
    "KVCache",
    "KVCacheReport",
    "Model",
    "QuantizationReport",
    "Sequence",
    "Tap",
    "Tokenizer",
    "__version__",
    "cache_report",
    "choose_cache_dtype",
    "errors",
    "generate",
    "isas",
    "quantize",
]

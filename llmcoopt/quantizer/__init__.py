"""Quantises models to GPTQ's format: `llmcoopt.quantize`. Read run.py first, then matrix.py."""

from .options import Options
from .run import QuantizationReport, quantize

__all__ = ["Options", "QuantizationReport", "quantize"]

"""k_scale and v_scale: what checkpoints say about an fp8_e4m3 key/value cache. A key or value is its code times the scale."""

import re
import warnings

import numpy as np

from ..errors import FormatError
from .safetensors import WEIGHT_DTYPES, Tensor

# As compressed-tensors and vLLM write them (one kv_scale for both in old files), and ModelOpt, at the projection.
PLACE = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.(?:attn\.)?(?:(?:k_proj\.)?(k)|(?:v_proj\.)?(v)|(kv))_scale")
ANY = re.compile(r"\.(k|v|kv)_scale$")
SMALLEST, LARGEST = 2.0**-126, 2.0**126  # scales in between have a reciprocal in float32


def take_cache_scales(found: dict[str, Tensor], config) -> np.ndarray | None:
    """Takes the scales out of a checkpoint's tensors: float32 [layers, k|v, kv heads], NaN in layers without; None when no layer has any.

    A layer with one of the two uses it for both. Warns of scales that belong to no layer. Raises FormatError, with file and tensor, for a scale that
    is 0, negative, NaN or infinite, for another shape than one number or one for each kv head, and for two names of one scale."""
    n, heads = config.num_hidden_layers, config.num_key_value_heads
    scales, sources, unused = np.full((n, 2, heads), np.nan, np.float32), {}, []
    for name in [name for name in found if ANY.search(name)]:
        tensor, place = found.pop(name), PLACE.fullmatch(name)
        if place is None or int(place[1]) >= n:
            unused.append(tensor)
            continue
        for which in (0,) if place[2] else (1,) if place[3] else (0, 1):
            key = int(place[1]), which
            if key in sources:
                raise FormatError(f"{tensor.file}: tensors '{sources[key]}' and '{name}' are the same scale; expected one of them")
            sources[key], scales[key] = name, _values(tensor, heads)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.warn(f"{unused[0].file}: tensor '{unused[0].name}'{more} ignored: a cache scale of no layer of the model, which has {n}")
    for one, other in ((0, 1), (1, 0)):
        scales[:, one] = np.where(np.isnan(scales[:, one]), scales[:, other], scales[:, one])
    return scales if sources else None


def _values(tensor, heads):
    """float32 [] or [kv heads]."""
    if tensor.dtype not in WEIGHT_DTYPES:
        raise FormatError(f"{tensor.file}: tensor '{tensor.name}' is {tensor.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}")
    values = tensor.numpy().ravel()
    if tensor.dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if values.size not in (1, heads):
        raise FormatError(
            f"{tensor.file}: tensor '{tensor.name}' has shape {list(tensor.shape)}; expected one number, or one for each of {heads} kv heads"
        )
    values = values.astype(np.float32)
    bad = values[~((values >= SMALLEST) & (values <= LARGEST))]
    if bad.size:
        raise FormatError(f"{tensor.file}: tensor '{tensor.name}' holds the scale {bad[0]:g}; expected a number above 0, as max / 448")
    return values

"""compressed-tensors' "pack-quantized" tensors of one module to a QuantizedWeight."""

import numpy as np

from .gptq import SCALE_DTYPES, Module, checked_order, group_size, said_size, settled
from .quant_config import BITS
from .quantized import Packed, QuantizedWeight, pack_words, words_of


def compressed_weight(module: Module) -> QuantizedWeight:
    """weight_packed [N, K / p] and weight_scale [N, G], with weight_shape, weight_zero_point and weight_g_idx where there are any."""
    outputs, inputs = module.shape
    packed = module.take("weight_packed", ("I32", "U32"))
    _check_shape(module, outputs, inputs)
    bits, kind = _packing(module, packed, inputs)
    module.must_be("weight_packed", (outputs, packed.shape[1]), f" for {outputs} outputs")
    scales = module.take("weight_scale", SCALE_DTYPES)
    groups = scales.shape[1]
    module.must_be("weight_scale", (outputs, groups), f": a row of scales for each of {outputs} outputs")
    said_size(module, "weight_scale", groups)
    order = _order(module, inputs, groups)
    size = group_size(module, "weight_scale", groups, order)
    if order is not None and np.array_equal(order, np.arange(inputs) // size):
        order = None
    codes = Packed(words_of(packed), bits, kind, outputs, inputs, (packed.shape[1], 1))
    zeros = _zeros(module, bits, kind, groups, outputs)
    return QuantizedWeight(
        module.name,
        module.file,
        "compressed-tensors",
        outputs,
        inputs,
        bits,
        size,
        codes,
        True,
        scales.numpy().T,
        zeros,
        order,
        module.nbytes,
    )


def _check_shape(module, outputs, inputs):
    if "weight_shape" not in module.tensors:
        return
    tensor = module.take("weight_shape", ("I64", "I32"), rank=1)
    shape = tensor.data.view(np.int64 if tensor.dtype == "I64" else np.int32).tolist()
    if shape != [outputs, inputs]:
        module.fail("shape", "weight_shape", f"{shape}", f"[{outputs}, {inputs}] from the config")


def _packing(module, packed, inputs):
    """(bits, kind) from the columns of weight_packed. Older versions put ten 3-bit values into a word, newer ones 32 into three."""
    width, said = packed.shape[1], module.said.bits
    fitting = [(bits, kind) for bits in BITS for kind in ("whole", "stream") if pack_words(inputs, bits, kind) == width]
    if not fitting:
        counts = ", ".join(f"{pack_words(inputs, bits, 'stream')} for {bits} bits" for bits in BITS)
        module.fail("shape", "weight_packed", f"shape {list(packed.shape)}", f"columns: {counts} and {inputs} inputs")
    for bits, kind in fitting:
        if said == bits:
            return bits, kind
    module.agree("bits", fitting[0][0], "weight_packed")
    return fitting[0]


def _zeros(module, bits, kind, groups, outputs):
    """Zero points as codes, packed along the outputs or, in files of older versions, as signed bytes [N, G]."""
    if "weight_zero_point" not in module.tensors:
        if module.said.sym is False:
            module.fail("missing-tensor", "weight_zero_point", "missing", f"it, as {module.config.source} says symmetric: false")
        return None
    tensor = module.take("weight_zero_point", ("I32", "I8"))
    if tensor.dtype == "I8":
        module.must_be("weight_zero_point", (outputs, groups), ": a zero for every scale")
        zeros = tensor.data.view(np.int8).reshape(outputs, groups).T.astype(np.int16) + 2 ** (bits - 1)
    else:
        module.must_be("weight_zero_point", (pack_words(outputs, bits, kind), groups), f" for {bits} bits and {outputs} outputs")
        zeros = Packed(words_of(tensor), bits, kind, groups, outputs, (1, groups)).lines_of(0, groups)
    return settled(zeros, bits)


def _order(module, inputs, groups):
    """weight_g_idx; its writers fill it with -1 when there is no order."""
    if "weight_g_idx" not in module.tensors:
        return None
    tensor = module.take("weight_g_idx", ("I32", "I64"), rank=1)
    module.must_be("weight_g_idx", (inputs,), ": a group for each input")
    order = tensor.data.view(np.int32 if tensor.dtype == "I32" else np.int64)
    if (order == -1).all():
        return None
    return checked_order(module, "weight_g_idx", order, groups)

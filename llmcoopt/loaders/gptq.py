"""GPTQ and AWQ tensors of one module to a QuantizedWeight: shapes, zero points and the order of the groups, each checked.

What the tensors have decides. What a config says is compared with it: a difference is an error that names the tensor and both values.
"""

import re

import numpy as np

from .findings import Finding, FoundError, FoundUnsupported
from .quant_config import BITS, LOADABLE, QuantConfig, Scheme
from .quantized import Packed, QuantizedWeight, pack_words, words_of
from .safetensors import Tensor

USUAL_GROUPS = (128, 64, 32, 256, 512, 1024)
SCALE_DTYPES = ("F16", "BF16", "F32")
# A GPTQModel of 2024 to 2026 subtracted the constants of the 3-bit words 0 and 1 in the wrong order: what became of zeros that are all 4.
SWAPPED_WORDS = np.array([0x00000000, 0xB6DB6DB7, 0x49249249], np.uint32)


class Module:
    """The tensors of one quantised module by their last name ("qweight"), its shape by the config, and what the files say about it."""

    def __init__(self, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], config: QuantConfig, notes: list[Finding]):
        self.name, self.tensors, self.shape, self.config, self.notes = name, tensors, shape, config, notes
        said = config.of(name)
        if said is None:
            self.note("quantisation-config", self.first, "the module is quantised", f"a plain weight, as {config.source} says (dynamic)")
        self.said = said or Scheme()

    @property
    def first(self) -> str:
        return next(iter(self.tensors))

    @property
    def file(self) -> str:
        return self.tensors[self.first].file

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def finding(self, kind, part, found, expected="", advice="", error=True):
        tensor = self.tensors.get(part)
        return Finding(kind, tensor.file if tensor else self.file, f"{self.name}.{part}", found, expected, advice, error)

    def fail(self, kind, part, found, expected="", advice=""):
        raise FoundError(self.finding(kind, part, found, expected, advice))

    def note(self, kind, part, found, expected="", advice=""):
        self.notes.append(self.finding(kind, part, found, expected, advice, error=False))

    def take(self, part: str, dtypes: tuple[str, ...], rank: int = 2) -> Tensor:
        """A tensor that must be there, of one of the dtypes."""
        tensor = self.tensors.get(part)
        if tensor is None:
            self.fail("missing-tensor", part, f"missing beside {', '.join(self.tensors)}", "it, as the module is quantised")
        if tensor.dtype not in dtypes:
            if part in ("qweight", "qzeros") and tensor.dtype in ("I8", "I16", "I64"):
                found = f"packed into {tensor.dtype} words (pack_dtype), which are not implemented"
                raise FoundUnsupported(self.finding("unsupported", part, found, "I32", LOADABLE))
            self.fail("dtype", part, f"dtype {tensor.dtype}", " or ".join(dtypes))
        if len(tensor.shape) != rank or 0 in tensor.shape:
            self.fail("shape", part, f"shape {list(tensor.shape)}", f"{rank} dimensions that are not 0")
        return tensor

    def must_be(self, part: str, shape: tuple[int, ...], why: str = ""):
        if self.tensors[part].shape != shape:
            self.fail("shape", part, f"shape {list(self.tensors[part].shape)}", f"{list(shape)}{why}")

    def agree(self, key: str, found: int, part: str):
        """What the tensors have is what the config says."""
        said = getattr(self.said, key)
        if said is not None and said != found:
            advice = f"if the tensors are right, pass quantization_config={{'{key}': {found}}}"
            self.fail("quantisation-config", part, f"{key} is {found} by its shape", f"{said}, as {self.config.source} says", advice)


def gptq_weight(module: Module, file_hint: Scheme | None = None) -> QuantizedWeight:
    """The module's GPTQ tensors: qweight, qzeros, scales, and g_idx if there is one. `file_hint`: what the file's name says."""
    outputs, inputs = module.shape
    qweight = module.take("qweight", ("I32", "U32"))
    scales = module.take("scales", SCALE_DTYPES)
    bits = _bits(module, qweight, inputs)
    if file_hint is not None and file_hint.bits not in (None, bits):
        module.fail("quantisation-config", "qweight", f"{bits} bits by its shape", f"{file_hint.bits}, as the file's name says")
    module.must_be("qweight", (pack_words(inputs, bits, "stream"), outputs), f" for {bits} bits, {inputs} inputs and {outputs} outputs")
    groups = scales.shape[0]
    module.must_be("scales", (groups, outputs), f": a scale for each of {outputs} outputs")
    said_size(module, "scales", groups)  # first: that groups of g_idx are out of range would follow from it
    order = _order(module, inputs, groups)
    size = group_size(module, "scales", groups, order, file_hint)
    if order is not None and np.array_equal(order, np.arange(inputs, dtype=np.int32) // size):
        order = None
    zeros = _zeros(module, bits, groups, outputs)
    codes = Packed(words_of(qweight), bits, "stream", outputs, inputs, (1, outputs))
    return QuantizedWeight(
        module.name, module.file, "gptq", outputs, inputs, bits, size, codes, True, scales.numpy(), zeros, order, module.nbytes
    )


def awq_weight(module: Module) -> QuantizedWeight:
    """The module's AWQ tensors in the layout "gemm": qweight, qzeros, scales."""
    outputs, inputs = module.shape
    module.take("qweight", ("I32", "U32"))
    scales, qzeros = module.take("scales", SCALE_DTYPES), module.take("qzeros", ("I32", "U32"))
    module.agree("bits", 4, "qweight")
    why = f" for 4 bits in AWQ's layout 'gemm', {inputs} inputs and {outputs} outputs"
    if outputs % 8:
        module.fail("shape", "qweight", f"{outputs} outputs", "a multiple of 8, as AWQ packs eight outputs into a word")
    module.must_be("qweight", (inputs, outputs // 8), why)
    groups = scales.shape[0]
    module.must_be("scales", (groups, outputs), why)
    said_size(module, "scales", groups)
    if inputs % groups:
        module.fail("shape", "scales", f"{groups} groups for {inputs} inputs", "groups of one size")
    module.must_be("qzeros", (groups, outputs // 8), why)
    strides = (outputs // 8, 1)
    zeros = Packed(words_of(qzeros), 4, "awq", groups, outputs, strides).lines_of(0, groups)
    codes = Packed(words_of(module.tensors["qweight"]), 4, "awq", inputs, outputs, strides)
    return QuantizedWeight(
        module.name,
        module.file,
        "awq",
        outputs,
        inputs,
        4,
        inputs // groups,
        codes,
        False,
        scales.numpy(),
        settled(zeros, 4),
        None,
        module.nbytes,
    )


def settled(zeros: np.ndarray, bits: int) -> np.ndarray | None:
    """int16 zeros, or None when all are 2^(bits - 1)."""
    return None if (zeros == 2 ** (bits - 1)).all() else zeros.astype(np.int16)


def is_awq(tensors: dict[str, Tensor]) -> bool:
    """Whether shapes say that qweight is packed along the outputs: for files without a config."""
    qweight, scales = tensors.get("qweight"), tensors.get("scales")
    two = qweight is not None and scales is not None and len(qweight.shape) == 2 == len(scales.shape)
    return two and qweight.shape[1] != scales.shape[1] and 8 * qweight.shape[1] == scales.shape[1]


def name_hint(file: str) -> Scheme:
    """What a file's name says: "gptq_model-4bit-128g" has 4 bits and groups of 128, "4bit--1g" one group."""
    bits = re.search(r"(?<![0-9])([2348])-?bits?(?![a-z0-9])", file, re.I)
    size = re.search(r"(?<![0-9a-z])(?:(-1|[0-9]{2,4})g|gr?([0-9]{2,4}))(?![a-z0-9])", file, re.I)
    return Scheme(int(bits[1]) if bits else None, int(size[1] or size[2]) if size else None)


def _bits(module, qweight, inputs):
    """From the rows of qweight: the config's bits if they fit, else the only ones that do."""
    rows = qweight.shape[0]
    fitting = [bits for bits in BITS if pack_words(inputs, bits, "stream") == rows]
    if not fitting:
        counts = ", ".join(f"{pack_words(inputs, bits, 'stream')} rows for {bits} bits" for bits in BITS)
        module.fail("shape", "qweight", f"shape {list(qweight.shape)}", f"{counts} and {inputs} inputs")
    if module.said.bits in fitting:
        return module.said.bits
    module.agree("bits", fitting[0], "qweight")
    return fitting[0]


def _order(module, inputs, groups):
    """g_idx as int32 [inputs], checked; None when it is missing or says nothing."""
    if "g_idx" not in module.tensors:
        if module.said.desc_act and groups > 1:
            found = f"missing, though {module.config.source} says desc_act: loaded with groups in order"
            module.note("g_idx", "qweight", found, f"{module.name}.g_idx", "quantise again if the text is noise")
        return None
    tensor = module.take("g_idx", ("I32", "I64"), rank=1)
    module.must_be("g_idx", (inputs,), ": a group for each input")
    order = tensor.data.view(np.int32 if tensor.dtype == "I32" else np.int64)
    return checked_order(module, "g_idx", order, groups)


def checked_order(module, part, order, groups):
    """Group numbers that exist, as int32. All 0 with several groups is a known slip of writers: None, groups in order."""
    if groups > 1 and not order.any():
        if module.said.desc_act:
            module.fail("g_idx", part, f"all 0 with {groups} groups", "the group of every input, as desc_act is true", "quantise again")
        module.note("g_idx", part, f"all 0 with {groups} groups: loaded with groups in order", "the group of every input")
        return None
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= groups:
        bad = low if low < 0 else high
        at = int(np.flatnonzero(order == bad)[0])
        module.fail(
            "g_idx", part, f"input {at} is in group {bad}", f"0 to {groups - 1}, as scales has {groups} rows", "the file is damaged"
        )
    return order.astype(np.int32)


def said_size(module, part, groups):
    """The config's group size, which must give as many groups as there are; None when the config has none."""
    inputs, said = module.shape[1], module.said.group_size
    if said is None:
        return None
    size = inputs if said == -1 else min(said, inputs)
    if -(-inputs // size) != groups:
        expected = f"{-(-inputs // size)} for {inputs} inputs in groups of {said}, as {module.config.source} says"
        advice = "if the tensors are right, pass quantization_config={'group_size': ...}"
        module.fail("quantisation-config", part, f"{groups} groups", expected, advice)
    return size


def group_size(module: Module, part: str, groups: int, order: np.ndarray | None, hint: Scheme | None = None) -> int:
    """From the config; else from the number of groups, the file's name and g_idx, with a note when it is a guess."""
    said, inputs = said_size(module, part, groups), module.shape[1]
    if said is not None:
        return said
    hinted = hint.group_size if hint is not None else None
    candidates = dict.fromkeys([*([inputs // groups] if inputs % groups == 0 else []), *USUAL_GROUPS])
    if hinted is not None:
        candidates = [inputs if hinted == -1 else hinted]
    fitting = [size for size in candidates if -(-inputs // size) == groups]
    if order is not None and not fitting:
        fitting = [int(np.bincount(order, minlength=groups).max())]
    if not fitting:
        named = f" (the file's name says groups of {hinted})" if hinted is not None else ""
        advice = "pass quantization_config={'group_size': ...}"
        module.fail("quantisation-config", part, f"{groups} groups for {inputs} inputs{named}", "a usual group size", advice)
    if inputs % groups and order is None and hinted is None:
        found = f"{groups} groups for {inputs} inputs: groups of {fitting[0]} assumed"
        module.note("guess", part, found, "a config", "pass quantization_config={'group_size': ...} to say otherwise")
    return min(fitting[0], inputs)


def _zeros(module, bits, groups, outputs):
    """Effective zeros as QuantizedWeight has them."""
    if "qzeros" not in module.tensors and module.said.sym:
        return None
    module.take("qzeros", ("I32", "U32"))
    width = pack_words(outputs, bits, "stream")
    module.must_be("qzeros", (groups, width), f" for {bits} bits, {groups} groups and {outputs} outputs")
    words = words_of(module.tensors["qzeros"]).reshape(groups, width)
    fields = _fields(words, bits, outputs)
    version = module.config.zeros or "v1"
    if not module.config.zeros_forced and module.said.sym is not False:
        seen = fingerprint(fields, bits)
        if seen is not None:
            if seen != version:
                _note_version(module, bits, seen)
            return None
        if bits == 3 and _has_swapped_words(words, outputs):
            advice = "loaded as symmetric; write the file again with a newer GPTQModel"
            module.note("zero-format", "qzeros", "3-bit zeros damaged by a known fault of GPTQModel before 6.1", "0xDB6DB6DB ...", advice)
            return None
        if module.said.sym:
            _not_symmetric(module, fields, bits)
    if version == "v1" and (at := or_damage(fields, bits, outputs)) is not None:
        group, column = at
        found = f"group {group}: output {column} and those after it in its word are all ones; a zero of 0 has overwritten its neighbours"
        module.note("borrow", "qzeros", found, "zeros of their own", "such a file cannot be repaired: quantise again, as gptq_v2")
    return settled(effective(words, bits, outputs, version), bits)


def _fields(words, bits, outputs):
    return Packed(words.reshape(-1), bits, "stream", len(words), outputs, (words.shape[1], 1)).lines_of(0, len(words))


def effective(words: np.ndarray, bits: int, outputs: int, version: str) -> np.ndarray:
    """Zeros uint8 [groups, outputs] from words [groups, width]. Version 1 was written by subtracting from whole words, so it is added to whole
    words; 3-bit fields, which cross words, one by one."""
    if version == "v1" and bits != 3:
        ones = sum(1 << at for at in range(0, 32, bits))
        words = words + np.uint32(ones)  # modulo 2^32
    fields = _fields(words, bits, outputs)
    return (fields + 1) & 7 if version == "v1" and bits == 3 else fields


def fingerprint(fields: np.ndarray, bits: int) -> str | None:
    """Symmetric weights have zeros of 2^(bits - 1) everywhere, so the stored fields tell their version: one less is "v1". Else None."""
    first = int(fields.flat[0])
    version = {2 ** (bits - 1) - 1: "v1", 2 ** (bits - 1): "v2"}.get(first)
    return version if version and (fields == first).all() else None


def _note_version(module, bits, seen):
    names = {"v1": "gptq", "v2": "gptq_v2"}
    said = f"{names[module.config.zeros]!r} in {module.config.source}" if module.config.zeros else f"'gptq' (v1), as {module.config.source}"
    field = 2 ** (bits - 1) - (seen == "v1")
    found = f"zeros are stored as in {names[seen]!r} (every field is {field})"
    advice = f"loaded so; correct the config's checkpoint_format, or pass quantization_config={{'checkpoint_format': {names[seen]!r}}}"
    module.note("zero-format", "qzeros", found, said, advice)


def _not_symmetric(module, fields, bits):
    middle = 2 ** (bits - 1)
    counts = np.bincount(fields.ravel(), minlength=2**bits)
    usual = middle if counts[middle] > counts[middle - 1] else middle - 1
    group, column = (int(i) for i in np.argwhere(fields != usual)[0])
    found = f"group {group}, output {column} has the stored zero {fields[group, column]}"
    expected = f"{middle - 1} (gptq) or {middle} (gptq_v2) everywhere, as {module.config.source} says sym"
    module.fail("zeros", "qzeros", found, expected, "damaged, or not symmetric: then pass quantization_config={'sym': False}")


def _has_swapped_words(words, outputs):
    width = words.shape[1]
    return outputs % 32 == 0 and (words == np.tile(SWAPPED_WORDS, -(-width // 3))[:width]).all()


def or_damage(fields: np.ndarray, bits: int, outputs: int) -> tuple[int, int] | None:
    """(group, output) of a version 1 zero that was written as -1 and OR-ed over its word: from it on, all fields of the word are ones.

    One such field alone at the end of a word is a zero of 0 that has overwritten nothing. 3-bit fields have no whole words to look at."""
    per_word = 32 // bits
    if bits == 3:
        return None
    padded = np.zeros((len(fields), -(-outputs // per_word) * per_word), bool)
    padded[:, :outputs] = fields == 2**bits - 1
    ends = padded.reshape(len(fields), -1, per_word)[:, :, -2:].all(axis=2)
    if not ends.any():
        return None
    group, word = (int(i) for i in np.argwhere(ends)[0])
    run = padded[group, word * per_word : (word + 1) * per_word]
    start = per_word - int(np.argmin(run[::-1])) if not run.all() else 0
    return group, word * per_word + start

"""What a checkpoint says about its quantisation: quantize_config.json, quant_config.json and config.json's quantization_config, as one.

The tensors decide what is loaded; this is what they are compared with. Where files disagree, or a module's tensors disagree with them, that
is an error, and a caller who knows better passes the right values as `quantization_config`.
"""

import re
from dataclasses import dataclass, replace

from ..errors import ArgumentError
from .findings import Finding, FoundError, FoundUnsupported

BITS = (2, 3, 4, 8)
OVERRIDES = ("quant_method", "bits", "group_size", "sym", "checkpoint_format", "dynamic")
# Spellings of a key, the usual one first: it wins where a file has several.
_SPELLINGS = {
    "quant_method": ("quant_method", "method"),
    "bits": ("bits", "w_bit"),
    "group_size": ("group_size", "q_group_size"),
    "checkpoint_format": ("checkpoint_format", "format", "version"),
}
# Formats of a method's files -> how zero points are stored.
_FORMATS = {"gptq": {"gptq": "v1", "gptq_v2": "v2", "gptq_p": "v2"}, "awq": {"gemm": "v2"}}
LOADABLE = "GPTQ (2, 3, 4 and 8 bits), AWQ (gemm) and compressed-tensors (pack-quantized) load, and so do GGUF files"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is said about one module. None: nothing is said."""

    bits: int | None = None
    group_size: int | None = None  # inputs that share a scale; -1: all
    sym: bool | None = None
    desc_act: bool | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A group of compressed-tensors' config_groups: the modules it is for, and their scheme."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """What the files say. Made by `read_quant_config`."""

    source: str  # the file, or files, for messages
    method: str | None = None  # "gptq", "awq" or "compressed-tensors"; None: no file says
    scheme: Scheme = Scheme()
    zeros: str | None = None  # "v1" (zero - 1 is stored) or "v2"; None: no file says, which means v1
    zeros_forced: bool = False  # the caller said so: no looking at the zeros themselves
    dynamic: tuple[tuple[str, Scheme | None], ...] = ()  # GPTQ: pattern -> scheme, or None for "not quantised"
    targets: tuple[Target, ...] = ()  # compressed-tensors
    file_stem: str | None = None  # the weights' file without .safetensors, where the quantiser says it

    def of(self, module: str) -> Scheme | None:
        """What is said about a module: the first matching pattern of `dynamic` or entry of `targets`; None: not quantised."""
        for pattern, scheme in self.dynamic:
            if re.match(pattern, module):
                return scheme
        for target in self.targets:
            if any(_matches(name, module) for name in target.targets):
                return target.scheme
        return self.scheme


def _matches(target, module):
    """compressed-tensors names modules by class ("Linear": all), by pattern ("re:...") or by name."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear" or module == target or module.endswith(f".{target}")


def read_quant_config(files: dict[str, dict], override: dict | None = None) -> QuantConfig:
    """One QuantConfig from the contents of the files that have one (name for messages -> object), the first winning where a later one adds.

    Raises FoundError for values that contradict each other or make no sense, UnsupportedError for a layout that is not implemented (by name),
    ArgumentError for an `override` with unknown keys."""
    unknown = sorted(set(override or ()) - set(OVERRIDES))
    if unknown:
        raise ArgumentError(f"quantization_config: unknown key '{unknown[0]}'; known: {', '.join(OVERRIDES)}")
    merged, places = _merge(files)
    if override:
        merged |= override
        places |= dict.fromkeys(override, "quantization_config (argument)")
    if not merged:
        return QuantConfig("no quantisation config")
    source = ", ".join(dict.fromkeys(places.values()))
    reader = _Reader(merged, places, source)
    method = reader.method()
    if method == "compressed-tensors":
        return QuantConfig(source, method, targets=reader.targets(), scheme=reader.scheme(merged))
    config = QuantConfig(source, method, reader.scheme(merged), reader.zeros(method), "checkpoint_format" in (override or {}))
    return replace(config, dynamic=reader.dynamic(config.scheme))


def _merge(files):
    merged, places = {}, {}
    for file, content in files.items():
        if not isinstance(content, dict):
            raise FoundError(Finding("quantisation-config", file, None, f"a {type(content).__name__}", "a JSON object"))
        own = {key: value for key, value in content.items() if value is not None}
        for name, keys in _SPELLINGS.items():
            given = [own.pop(key) for key in keys if key in own]
            own |= {name: given[0]} if given else {}
        if isinstance(own.get("zero_point"), bool):
            own.setdefault("sym", not own["zero_point"])
        for name, value in own.items():
            if name in OVERRIDES and name in merged and _plain(merged[name]) != _plain(value):
                found = f"{name} is {value!r:.60}, but {places[name]} says {merged[name]!r:.60}"
                advice = f"remove the wrong file, or pass quantization_config={{{name!r}: ...}}"
                raise FoundError(Finding("quantisation-config", file, None, found, "the same value in both", advice))
            merged.setdefault(name, value)
            places.setdefault(name, file)
    return merged, places


def _plain(value):
    return value.lower() if isinstance(value, str) else value


class _Reader:
    """Typed look-ups in the merged keys."""

    def __init__(self, keys, places, source):
        self.keys, self.places, self.source = keys, places, source

    def fail(self, key, value, expected):
        place = self.places.get(key, self.source)
        raise FoundError(Finding("quantisation-config", place, None, f"{key} is {value!r:.60}", expected))

    def unsupported(self, key, value, what):
        place = self.places.get(key, self.source)
        raise FoundUnsupported(Finding("unsupported", place, None, f"{key} is {value!r:.60}: {what}", advice=LOADABLE))

    def method(self):
        """ "gptq", "awq" or "compressed-tensors". Old files do not say: those of AWQ are told by their format."""
        layout = self.keys.get("checkpoint_format")
        found = self.keys.get("quant_method", "awq" if isinstance(layout, str) and layout.lower() in ("gemm", "gemv") else "gptq")
        if not isinstance(found, str):
            self.fail("quant_method", found, "a name")
        name = found.lower().replace("_", "-")
        if name == "marlin" or self.keys.get("is_marlin_format") is True:
            key = "quant_method" if name == "marlin" else "is_marlin_format"
            self.unsupported(key, self.keys[key], "weights in the Marlin layout do not load; use the GPTQ checkpoint they were made from")
        if name not in ("gptq", "awq", "compressed-tensors"):
            self.unsupported("quant_method", found, "this method is not implemented")
        word = self.keys.get("pack_dtype", "int32")
        if word != "int32":
            self.unsupported("pack_dtype", word, "only 32-bit words are implemented")
        return name

    def zeros(self, method):
        layout = self.keys.get("checkpoint_format")
        if layout is None:
            return None if method == "gptq" else "v2"
        if not isinstance(layout, str):
            self.fail("checkpoint_format", layout, "a name")
        known = _FORMATS[method]
        if layout.lower() not in known:
            self.unsupported("checkpoint_format", layout, f"of {method} only {', '.join(known)} are implemented")
        if layout.lower() == "gptq_p" and self.keys.get("bits") not in (2, 4, 8):
            self.unsupported("checkpoint_format", layout, f"its bit planes of {self.keys.get('bits')!r:.20} bits are not implemented")
        return known[layout.lower()]

    def scheme(self, keys, start=None):
        """The values that may differ from module to module; those that are missing as in `start`."""
        found = {}
        bits = keys.get("bits")
        if bits is not None:
            if type(bits) is not int:
                self.fail("bits", bits, "a whole number")
            if bits not in BITS:
                self.unsupported("bits", bits, f"only {', '.join(map(str, BITS))} are implemented")
            found["bits"] = bits
        size = keys.get("group_size")
        if size is not None:
            if type(size) is not int or (size != -1 and not 1 <= size < 2**31):
                self.fail("group_size", size, "a positive number, or -1 for one group")
            found["group_size"] = size
        for key in ("sym", "desc_act"):
            flag = keys.get(key)
            if flag is not None:
                if type(flag) is not bool:
                    self.fail(key, flag, "true or false")
                found[key] = flag
        return replace(start or Scheme(), **found)

    def dynamic(self, common):
        """Overrides by module name, in their order. "-:" before a pattern leaves its modules as they are, "+:" is the default."""
        rules = self.keys.get("dynamic", {})
        if not isinstance(rules, dict):
            self.fail("dynamic", rules, "an object of pattern to overrides")
        found = []
        for pattern, changes in rules.items():
            skipped, bare = pattern.startswith("-:"), pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
            self.pattern("dynamic", bare)
            if not skipped and not isinstance(changes, dict):
                self.fail("dynamic", rules, f"overrides for {pattern!r}")
            found.append((bare, None if skipped else self.scheme(changes, common)))
        return tuple(found)

    def pattern(self, key, text):
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError):
            self.fail(key, text, "a regular expression")

    def targets(self):
        layout = self.keys.get("checkpoint_format")
        if layout != "pack-quantized":
            self.unsupported("format", layout, "of compressed-tensors only pack-quantized is implemented")
        groups = self.keys.get("config_groups", {})
        if not isinstance(groups, dict):
            self.fail("config_groups", groups, "an object")
        return tuple(self.target(name, group) for name, group in groups.items())

    def target(self, name, group):
        key = f"config_groups.{name}"
        if not isinstance(group, dict):
            self.fail(key, group, "an object")
        weights, names = group.get("weights"), group.get("targets", ["Linear"])
        if not isinstance(weights, dict) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            self.fail(key, group, "targets and weights")
        for text in names:
            if text.startswith("re:"):
                self.pattern(key, text[3:])
        if group.get("format") not in (None, "pack-quantized"):
            self.unsupported(f"{key}.format", group["format"], "only pack-quantized is implemented")
        if weights.get("type", "int") != "int":
            self.unsupported(f"{key}.weights.type", weights["type"], "only integers are implemented")
        strategy = weights.get("strategy")
        if strategy not in (None, "group", "channel"):
            self.unsupported(f"{key}.weights.strategy", strategy, "only scales for groups or channels are implemented")
        size = -1 if strategy == "channel" else weights.get("group_size")
        order = None if weights.get("actorder") is None else weights["actorder"] in ("group", True)
        keys = {"bits": weights.get("num_bits"), "group_size": size, "sym": weights.get("symmetric"), "desc_act": order}
        return Target(tuple(names), self.scheme(keys))

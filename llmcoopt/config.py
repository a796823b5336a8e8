"""config.json (and generation_config.json) to frozen dataclasses, validated once.

The meaning of every key is that of transformers' configuration classes for the same model type. Attributes carry Hugging Face's names;
where the C core has a shorter one (n_layers, n_heads, n_kv_heads, tied_head, max_positions) that is a property.
"""

import math
from dataclasses import dataclass, fields

from .errors import FormatError, UnsupportedError

# model_type -> its architecture and the values transformers assumes for missing keys
FAMILIES = {
    "llama": {"architecture": "LlamaForCausalLM", "max_position_embeddings": 2048},
    "mistral": {"architecture": "MistralForCausalLM", "max_position_embeddings": 131072},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "max_position_embeddings": 32768},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "max_position_embeddings": 32768},
}
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_INT32 = 2**31 - 1
# What the core accepts: larger sizes are damaged files.
_MOST_LAYERS = _MOST_HEADS = 2**16
_MOST_WIDTH = 2**24
_MOST_HEAD_DIM = 2**14


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, with the names of lco_rope_config in csrc/model/model.h. Each kind uses some of the values."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max: float = 0.0  # positions before scaling; longer sequences change dynamic and longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp's ends are whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin (yarn, longrope)
    short_factor: tuple[float, ...] = ()  # longrope, head_dim / 2 values: frequencies are divided by them
    long_factor: tuple[float, ...] = ()

    def to_hf(self) -> dict | None:
        """The values of a config's rope_scaling; None: there is none."""
        if self.kind == "default":
            return None
        names = {"yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"), "llama3": ("low_freq_factor", "high_freq_factor")}
        names["longrope"] = ("attention_factor", "short_factor", "long_factor")
        values = {name: getattr(self, name) for name in ("factor", *names.get(self.kind, ()))}
        values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        if self.kind in names:
            values["original_max_position_embeddings"] = int(self.original_max)
        return {"rope_type": self.kind, **values}

    def to_core(self) -> dict:
        core = {f.name: getattr(self, f.name) for f in fields(self)}
        core["short_factor"], core["long_factor"] = list(self.short_factor) or None, list(self.long_factor) or None
        return core


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a model. Made by `parse_config`, which checks it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # what the config says; `biased` has what follows from it
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before rope
    window: tuple[int, ...] | None = None  # per layer: tokens a token sees, itself included; 0: all. None: all layers see all
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def n_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def n_heads(self) -> int:
        return self.num_attention_heads

    @property
    def n_kv_heads(self) -> int:
        return self.num_key_value_heads

    @property
    def tied_head(self) -> bool:
        return self.tie_word_embeddings

    @property
    def biased(self) -> tuple[str, ...]:
        """The matrices of a layer that have a bias, as transformers builds this model type: its file must hold them."""
        attention = {"mistral": "", "qwen2": "qkv"}.get(self.model_type, "qkvo" if self.attention_bias else "")
        mlp = ("gate", "up", "down") if self.mlp_bias and self.model_type == "llama" else ()
        return (*(f"self_attn.{part}_proj" for part in attention), *(f"mlp.{part}_proj" for part in mlp))

    @property
    def max_positions(self) -> int:
        """The longest sequence: max_position_embeddings, stretched where scaled rope promises more."""
        rope = self.rope
        if rope.kind in ("linear", "dynamic"):
            return max(self.max_position_embeddings, int(self.max_position_embeddings * rope.factor))
        if rope.kind == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max * rope.factor))
        return self.max_position_embeddings

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """As transformers shows it: nothing, one id, or a list."""
        return None if not self.eos_token_ids else self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids)

    def to_hf(self) -> dict:
        """A config.json that `parse_config` reads as this, and transformers too."""
        found = {"architectures": [FAMILIES[self.model_type]["architecture"]], "model_type": self.model_type}
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        names += ("head_dim", "rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings")
        found |= {name: getattr(self, name) for name in names}
        found |= {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        if self.model_type in ("llama", "qwen3"):
            found["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            found["mlp_bias"] = self.mlp_bias
        elif self.model_type == "mistral":
            found["sliding_window"] = max(self.window) if self.window else None
        elif self.window:
            kinds = ["sliding_attention" if size else "full_attention" for size in self.window]
            found |= {"use_sliding_window": True, "sliding_window": max(self.window), "layer_types": kinds}
        return found | {"rope_theta": self.rope.theta, "rope_scaling": self.rope.to_hf()}

    def to_core(self) -> dict:
        """The dict that the C extension takes: the fields of lco_model_config, with `rope` a dict of lco_rope_config's."""
        names = ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim")
        core = {name: getattr(self, name) for name in (*names, "rms_norm_eps", "qk_norm", "tied_head", "max_positions")}
        core["window"] = None if self.window is None else list(self.window)
        core["rope"] = self.rope.to_core()
        return core


def parse_config(config: dict, generation_config: dict | None = None, source: str = "config.json") -> ModelConfig:
    """A checked ModelConfig from the content of config.json; token ids of `generation_config` win.

    `source` names the file in messages. Raises FormatError (key, found, expected) and UnsupportedError (model type, rope kind)."""
    keys = _Keys(_mapping(config, source), source)
    family = _family(keys)
    heads = keys.integer("num_attention_heads", most=_MOST_HEADS)
    hidden = keys.integer("hidden_size", most=_MOST_WIDTH)
    layers = keys.integer("num_hidden_layers", most=_MOST_LAYERS)
    head_dim = _head_dim(keys, family, hidden, heads)
    max_positions = keys.integer("max_position_embeddings", FAMILIES[family]["max_position_embeddings"], most=2**53)
    activation = keys.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"{source}: hidden_act is {activation!r}; only 'silu' is implemented")
    ids = _token_ids(keys, _Keys(_mapping(generation_config or {}, "generation_config.json"), "generation_config.json"))
    return ModelConfig(
        model_type=family,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size", most=_MOST_WIDTH),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_kv_heads(keys, heads),
        head_dim=head_dim,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6, least=0.0),
        max_position_embeddings=max_positions,
        rope=_rope(keys, head_dim, max_positions),
        tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
        attention_bias=family == "qwen2" or keys.boolean("attention_bias", False),
        mlp_bias=keys.boolean("mlp_bias", False),
        qk_norm=family == "qwen3",
        window=_window(keys, family, layers),
        **ids,
    )


class _Keys:
    """Typed look-ups in one JSON object. A key that is missing or null takes the default; without one it is an error."""

    def __init__(self, data: dict, source: str):
        self.data, self.source = data, source

    def get(self, key, default=None):
        value = self.data.get(key)
        return default if value is None else value

    def fail(self, key, expected):
        found = f"is {self.data[key]!r}" if key in self.data else "is missing"
        raise FormatError(f"{self.source}: {key} {found}; expected {expected}")

    def integer(self, key, default=None, least=1, most=_INT32):
        value = self.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.fail(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key, default=None, least=None, above=None):
        value = self.get(key, default)
        expected = "a number" + (f" of at least {least:g}" if least is not None else f" above {above:g}" if above is not None else "")
        if type(value) not in (int, float) or not _is_finite(value):
            self.fail(key, expected)
        if (least is not None and value < least) or (above is not None and value <= above):
            self.fail(key, expected)
        return float(value)

    def boolean(self, key, default):
        value = self.get(key, default)
        if type(value) is not bool:
            self.fail(key, "true or false")
        return value


def _is_finite(value):
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond float
        return False


def _mapping(value, where):
    if not isinstance(value, dict):
        raise FormatError(f"{where}: found {type(value).__name__}, expected a JSON object")
    return value


def _family(keys):
    """The model type, from `model_type` or else from `architectures`; both must be known and agree."""
    known = ", ".join(f"{name} ({facts['architecture']})" for name, facts in FAMILIES.items())
    architectures = keys.get("architectures", [])
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        keys.fail("architectures", "a list of names")
    family = keys.get("model_type")
    if family is None:
        of_architecture = {facts["architecture"].lower(): name for name, facts in FAMILIES.items()}
        family = next((of_architecture[a.lower()] for a in architectures if a.lower() in of_architecture), None)
        if family is None:
            raise UnsupportedError(f"{keys.source}: no model_type, and architectures is {architectures}; known: {known}")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedError(f"{keys.source}: model_type is {family!r}; known: {known}")
    expected = FAMILIES[family]["architecture"]
    if architectures and expected.lower() not in [a.lower() for a in architectures]:
        raise UnsupportedError(f"{keys.source}: architectures is {architectures} with model_type {family!r}; expected {expected}")
    return family


def _kv_heads(keys, heads):
    """Key/value heads under any of their names; all that are given must agree."""
    given = {key: keys.integer(key) for key in ("num_key_value_heads", "num_kv_heads", "n_head_kv") if keys.get(key) is not None}
    if keys.boolean("multi_query", False):
        given["multi_query"] = 1
    if len(set(given.values())) > 1:
        raise FormatError(f"{keys.source}: contradicting numbers of key/value heads: {given}")
    kv_heads = next(iter(given.values()), heads)
    if heads % kv_heads:
        raise FormatError(f"{keys.source}: num_attention_heads is {heads}, which is no multiple of the {kv_heads} key/value heads")
    return kv_heads


def _head_dim(keys, family, hidden, heads):
    default = 128 if family == "qwen3" and "head_dim" not in keys.data else None
    if keys.get("head_dim", default) is None:
        if hidden % heads:
            raise FormatError(
                f"{keys.source}: hidden_size is {hidden}, no multiple of num_attention_heads {heads}, and head_dim is missing"
            )
        default = hidden // heads
    head_dim = keys.integer("head_dim", default, most=_MOST_HEAD_DIM)
    if head_dim % 2:
        raise FormatError(f"{keys.source}: head_dim is {head_dim}; expected an even number, as rope turns pairs")
    return head_dim


def _window(keys, family, layers):
    """Per-layer windows as transformers has them: Mistral in all layers; Qwen by layer_types, or from max_window_layers on."""
    if family == "llama":
        return None
    size = keys.integer("sliding_window", 4096) if keys.data.get("sliding_window", 4096) is not None else 0
    if family == "mistral":
        return (size,) * layers if size else None
    size = size if keys.boolean("use_sliding_window", False) else 0
    types = keys.get("layer_types")
    if types is None:
        first = keys.integer("max_window_layers", 28, least=0)
        windows = tuple(size if i >= first else 0 for i in range(layers))
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
            keys.fail("layer_types", f"a list of {layers} of {known}")
        if not size and "sliding_attention" in types:
            raise FormatError(
                f"{keys.source}: layer_types has 'sliding_attention', but use_sliding_window is "
                f"{keys.get('use_sliding_window', False)} and sliding_window is {keys.get('sliding_window')}"
            )
        windows = tuple(size if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else None


def _rope(keys, head_dim, max_positions):
    """All spellings: rope_theta beside rope_scaling {type | rope_type, ...}, or rope_parameters with all of it inside."""
    outer = keys
    parts = {key: _mapping(keys.get(key, {}), f"{keys.source}: {key}") for key in ("rope_scaling", "rope_parameters")}
    name = "rope_scaling" if parts["rope_scaling"] else "rope_parameters"
    _refuse_contradiction(keys, parts)
    if any(isinstance(value, dict) for value in parts[name].values()):
        raise UnsupportedError(
            f"{keys.source}: {name} holds one set of values per layer type ({', '.join(parts[name])}); one for all is expected"
        )
    inner = _Keys(parts[name], f"{keys.source}: {name}")
    for where in (outer, inner):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(f"{where.source}: partial_rotary_factor is {where.data['partial_rotary_factor']}; only 1 is implemented")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UnsupportedError(f"{inner.source}: rope_type is {kind!r}; known: {', '.join(ROPE_KINDS)}")
    thetas = [where for where in (inner, outer, _Keys(parts["rope_parameters"], inner.source)) if where.get("rope_theta") is not None]
    theta = thetas[0].number("rope_theta", above=0.0) if thetas else 10000.0
    if kind == "default":
        return RopeConfig(theta=theta)
    original = float(max_positions)
    if kind in ("yarn", "llama3", "longrope"):  # a value beside the rope dict wins over one inside
        where = outer if outer.get("original_max_position_embeddings") is not None else inner
        original = where.number("original_max_position_embeddings", max_positions, above=0.0)
    return _SCALED[kind](inner, {"kind": kind, "theta": theta, "original_max": original}, head_dim, max_positions)


def _refuse_contradiction(keys, parts):
    old, new = parts["rope_scaling"], parts["rope_parameters"]
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise FormatError(
                f"{keys.source}: rope_scaling says {key} {old[key]!r}, rope_parameters says {new[key]!r}; expected one of them"
            )


def _linear(inner, common, head_dim, max_positions):
    return RopeConfig(**common, factor=inner.number("factor", above=0.0))


def _dynamic(inner, common, head_dim, max_positions):
    if head_dim == 2:
        raise FormatError(f"{inner.source}: rope_type is 'dynamic' with head_dim 2; expected a head_dim of at least 4")
    return RopeConfig(**common, factor=inner.number("factor", above=0.0))


def _yarn(inner, common, head_dim, max_positions):
    if common["theta"] <= 1.0:
        raise FormatError(f"{inner.source}: rope_theta is {common['theta']}; expected more than 1 for yarn")
    factor = _factor_or_ratio(inner, common, max_positions)
    attention = inner.get("attention_factor")
    if attention is not None:
        attention = inner.number("attention_factor", least=0.0)
    elif inner.get("mscale") and inner.get("mscale_all_dim"):
        attention = yarn_scale(factor, inner.number("mscale")) / yarn_scale(factor, inner.number("mscale_all_dim", above=0.0))
    else:
        attention = yarn_scale(factor)
    return RopeConfig(
        **common,
        factor=factor,
        attention_factor=attention,
        beta_fast=inner.number("beta_fast", 32.0, least=0.0) or 32.0,
        beta_slow=inner.number("beta_slow", 1.0, least=0.0) or 1.0,
        truncate=inner.boolean("truncate", True),
    )


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """By how much yarn enlarges cos and sin when the context grows by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _factor_or_ratio(inner, common, max_positions):
    return inner.number("factor", max_positions / common["original_max"], above=0.0)


def _llama3(inner, common, head_dim, max_positions):
    low, high = inner.number("low_freq_factor", above=0.0), inner.number("high_freq_factor", above=0.0)
    if high <= low:
        inner.fail("high_freq_factor", f"more than low_freq_factor {low:g}")
    return RopeConfig(**common, factor=inner.number("factor", above=0.0), low_freq_factor=low, high_freq_factor=high)


def _longrope(inner, common, head_dim, max_positions):
    factors = {}
    for key in ("short_factor", "long_factor"):
        values = inner.get(key)
        good = isinstance(values, list) and len(values) == head_dim // 2
        if not good or not all(type(v) in (int, float) and _is_finite(v) and v > 0 for v in values):
            inner.fail(key, f"a list of {head_dim // 2} positive numbers (head_dim / 2)")
        factors[key] = tuple(float(v) for v in values)
    factor = _factor_or_ratio(inner, common, max_positions)
    if inner.get("attention_factor") is not None:
        attention = inner.number("attention_factor", least=0.0)
    elif factor <= 1.0:
        attention = 1.0
    elif common["original_max"] <= 1.0:
        raise FormatError(f"{inner.source}: original_max_position_embeddings is {common['original_max']:g}; expected more than 1")
    else:
        attention = math.sqrt(1.0 + math.log(factor) / math.log(common["original_max"]))
    return RopeConfig(**common, factor=factor, attention_factor=attention, **factors)


_SCALED = {"linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3, "longrope": _longrope}


def _token_ids(keys, generation):
    """bos, pad and the tuple of eos ids; a negative id means none."""

    def first(key):
        return generation if generation.get(key) is not None else keys

    ids = {}
    for key in ("bos_token_id", "pad_token_id"):
        value = first(key).get(key)
        if isinstance(value, list) and value:  # seen in the wild; the first is meant
            value = value[0]
        if value is not None and type(value) is not int:
            first(key).fail(key, "a token id")
        ids[key] = value if value is not None and value >= 0 else None
    eos = first("eos_token_id").get("eos_token_id", [])
    eos = eos if isinstance(eos, list) else [eos]
    if not all(type(value) is int for value in eos):
        first("eos_token_id").fail("eos_token_id", "a token id or a list of them")
    ids["eos_token_ids"] = tuple(dict.fromkeys(value for value in eos if value >= 0))
    return ids

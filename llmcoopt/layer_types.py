"""Element types of a cache: one for all layers, or one for each."""

from collections import Counter
from collections.abc import Mapping

from .errors import ArgumentError

DTYPES = ("fp8_e4m3", "fp8_e5m2", "int8", "float16", "bfloat16", "float32")
SCALED = ("fp8_e4m3", "fp8_e5m2", "int8")
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, **dict.fromkeys(SCALED, 1)}


def layer_types(dtype, n_layers: int, own: str) -> tuple[str, ...]:
    """The element type of every layer.

    dtype: a name for all; a list of a name for each layer; or a dict of names by layer (negative ones count from the end), where "default" names the
    type of all other layers. "auto", and a dict without "default", mean `own`, the model's type. Raises ArgumentError."""
    if isinstance(dtype, str):
        return (_name(dtype, own, "dtype"),) * n_layers
    if isinstance(dtype, Mapping):
        types = [_name(dtype.get("default", "auto"), own, "dtype['default']")] * n_layers
        given = {}
        for key, value in dtype.items():
            if key == "default":
                continue
            if isinstance(key, bool) or not isinstance(key, int) or not -n_layers <= key < n_layers:
                raise ArgumentError(f"dtype: found the key {key!r}, expected 'default' or a layer from {-n_layers} to {n_layers - 1}")
            if key % n_layers in given:
                raise ArgumentError(f"dtype: {given[key % n_layers]} and {key} are the same layer of {n_layers}")
            given[key % n_layers] = key
            types[key] = _name(value, own, f"dtype[{key}]")
        return tuple(types)
    if not isinstance(dtype, list | tuple):
        raise ArgumentError(f"dtype: expected a name, a list of a name for each layer or a dict, found {type(dtype).__name__}")
    if len(dtype) != n_layers:
        raise ArgumentError(f"dtype: found a list of {len(dtype)} names, expected one for each of the {n_layers} layers")
    return tuple(_name(name, own, f"dtype[{i}]") for i, name in enumerate(dtype))


def _name(dtype, own, what):
    name = {"auto": own, "fp8": "fp8_e4m3"}.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if name not in DTYPES:
        raise ArgumentError(f"{what} = {dtype!r}, expected 'auto' or one of {', '.join(DTYPES)}")
    return name


def types_text(types) -> str:
    """For people: "fp8_e4m3", or "fp8_e4m3, 4 of 30 layers bfloat16": the type that most layers have, then the others."""
    (first, _), *others = Counter(types).most_common()
    return ", ".join([first, *(f"{n} of {len(types)} layers {name}" for name, n in others)])

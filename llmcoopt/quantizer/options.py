"""What a quantisation is asked to do, checked once."""

from dataclasses import asdict, dataclass

from ..errors import ArgumentError
from ..loaders.quant_config import BITS

METHODS, FORMATS = ("gptq", "rtn"), ("gptq", "gptq_v2")
ORDERS = ("none", "columns", "static", "groups")


@dataclass(frozen=True, slots=True)
class Options:
    """bits: 2, 3, 4 or 8. group: inputs that share a scale; -1: all of a row. sym: zero points in the middle. method: "gptq", or "rtn" (round to
    nearest, without text). format: how zero points are stored, "gptq" (less one) or "gptq_v2" (as they are).

    order: in which order GPTQ rounds columns: "none": as they lie; "columns": by their inputs' size (act-order, desc_act); "static": the same,
    with groups as the columns lie; "groups": whole groups by size, and columns by size within. damp: share of the mean of the Hessian's
    diagonal that is added to it. mse: > 0: search the range of a group for the smallest sum of |error|^mse.

    sink: the first token of a window counts as this share of the window's tokens. Every later token attends to it, so what its key and value lose
    shows everywhere, but as one of 2,048 GPTQ would give it up for the others. 0: it counts as one token, as GPTQ was published."""

    bits: int = 4
    group: int = 128
    sym: bool = True
    method: str = "gptq"
    format: str = "gptq"
    order: str = "none"
    damp: float = 0.01
    mse: float = 0.0
    sink: float = 1 / 16

    def __post_init__(self):
        _one_of("bits", self.bits, BITS)
        if type(self.group) is not int or not (self.group == -1 or 1 <= self.group < 2**31):
            raise ArgumentError(f"group: found {self.group!r}, expected a number of inputs from 1, or -1 for all of a row")
        _one_of("method", self.method, METHODS)
        _one_of("format", self.format, FORMATS)
        _one_of("order", self.order, ORDERS)
        if self.method == "rtn" and self.order != "none":
            raise ArgumentError(f"order: found {self.order!r} with method 'rtn', which rounds every weight by itself; expected 'none'")
        if not 0 <= self.damp <= 1:
            raise ArgumentError(f"damp: found {self.damp!r}, expected a number from 0 to 1")
        if not 0 <= self.sink <= 1:
            raise ArgumentError(f"sink: found {self.sink!r}, expected a share from 0 to 1")
        if not 0 <= self.mse <= 10:
            raise ArgumentError(f"mse: found {self.mse!r}, expected an exponent above 0 (2.4 is usual), at most 10, or 0 for no search")

    def to_dict(self) -> dict:
        return asdict(self)


def _one_of(name, found, known):
    if found not in known or isinstance(found, bool):
        raise ArgumentError(f"{name}: found {found!r}, expected one of {', '.join(map(str, known))}")

"""How a file holds its weights and how memory does: bits, groups and bytes of every module, for people."""

import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from .safetensors import BITS, Tensor

GGUF_GROUPS = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}


@dataclass(frozen=True, slots=True)
class Stored:
    """Facts of one weight in the file."""

    format: str  # "gptq", "awq", "compressed-tensors", a GGUF type, or "F32", "F16", "BF16"
    bits: int
    nbytes: int
    group_size: int | None = None  # inputs that share a scale
    order: str | None = None  # "in order" or "act-order"
    zeros: str | None = None  # "symmetric" or "asymmetric"
    kept: str | None = None  # in memory, where that is not as in the file: "4 bits", "bfloat16 (groups of 12, expected a multiple of 8)"


def of_gguf(type_name: str, nbytes: int, kept: str) -> Stored:
    return Stored(type_name, int(type_name[1]), nbytes, GGUF_GROUPS[type_name], "in order", kept=kept)


def of_quantized(weight) -> Stored:
    order = "in order" if weight.g_idx is None else "act-order"
    zeros = "symmetric" if weight.zeros is None else "asymmetric"
    return Stored(weight.format, weight.bits, weight.nbytes, weight.group_size, order, zeros)


def summary(tensors: Iterable[Tensor], stored: dict[str, Stored]) -> list[dict]:
    """One row for the matrices of the same place in all layers that are stored alike: their names with '*' for the layer, how many, the facts
    of Stored, and the bytes of all together: in the file, and in memory."""
    rows = {}
    for tensor in tensors:
        if len(tensor.shape) != 2:
            continue
        facts = stored.get(tensor.name) or Stored(tensor.dtype, BITS[tensor.dtype], tensor.nbytes)
        name = re.sub(r"\.[0-9]+\.", ".*.", tensor.name.removesuffix(".weight"))
        row = rows.setdefault((name, *astuple(facts)[:2], *astuple(facts)[3:]), {"modules": name, "count": 0, "bytes": 0, "memory": 0})
        row["count"] += 1
        row["bytes"] += facts.nbytes
        row["memory"] += tensor.nbytes
        row |= {"format": facts.format, "bits": facts.bits, "group_size": facts.group_size, "order": facts.order, "zeros": facts.zeros}
        row["kept"] = facts.kept
    return list(rows.values())


def row_text(row: dict, size: str, memory: str) -> str:
    """A row of `summary` in words; `size` and `memory`: its bytes in the file and in memory, in words."""
    coded = [f"{row['bits']} bits", f"groups of {row['group_size']} {row['order']}"] if row["group_size"] else []
    zeros = [row["zeros"]] if row["zeros"] else []
    kept = [f"kept as {row['kept']}, {memory}"] if row["kept"] else []
    return ", ".join([f"{row['count']} x {row['modules']}", row["format"], *coded, *zeros, size, *kept])

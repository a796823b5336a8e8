"""One layer computed step by step with the package's own operators, so that its matrices can be quantised between the steps."""

import math

import numpy as np

from ..config import ModelConfig
from ..loaders.safetensors import Tensor
from ..reference import rope_tables

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PAGE = 512  # tokens of the pages that attention reads


def as_float32(tensor: Tensor) -> np.ndarray:
    """The values as float32."""
    values = tensor.numpy()
    return (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values.astype(np.float32, copy=False)


def for_operators(values: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """(array, type) as operators take them: 16-bit types as their bits. dtype: safetensors'."""
    values = np.ascontiguousarray(values)
    return (values.view(np.uint16) if dtype == "F16" else values), DTYPES[dtype]


class Layer:
    """A layer over windows of text that each stand alone. x: float32 [tokens, hidden], the residual stream of one window."""

    def __init__(self, context, config: ModelConfig, index: int, tensors: dict[str, Tensor]):
        self.context, self.config, self.index = context, config, index
        prefix = f"model.layers.{index}."
        self._tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self._vectors = {name: as_float32(tensor) for name, tensor in self._tensors.items() if len(tensor.shape) == 1}
        self._matrices = {
            name.removesuffix(".weight"): for_operators(tensor.numpy(), tensor.dtype)
            for name, tensor in self._tensors.items()
            if len(tensor.shape) == 2
        }

    def weight(self, name: str) -> np.ndarray:
        """A matrix by its name in the layer, as it was at first: float32 [out, in]."""
        return as_float32(self._tensors[f"{name}.weight"])

    def replace(self, name: str, values: np.ndarray, dtype: str) -> None:
        """From now on the matrix has these values: in safetensors' dtype, [out, in]."""
        self._matrices[name] = for_operators(values, dtype)

    def attention_input(self, x):
        return self._norm(x, "input_layernorm")

    def attended(self, x):
        """What o_proj is computed from: float32 [tokens, heads * head_dim]."""
        c, d, n = self.config, self.config.head_dim, len(x)
        q, k, v = self._linear(self.attention_input(x), "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        if c.qk_norm:
            q, k = (self._norm(rows.reshape(-1, d), f"self_attn.{name}_norm") for rows, name in ((q, "q"), (k, "k")))
        q, k, v = (rows.reshape(n, -1, d) for rows in (q, k, v))
        cos, sin = (np.ascontiguousarray(table, np.float32) for table in rope_tables(c.rope, d, np.arange(n), n))
        pages = -(-n // PAGE)
        cache = np.zeros(pages * (-(-2 * c.num_key_value_heads * PAGE * d * 4 // 64) * 64), np.uint8)
        items = [(np.arange(pages, dtype=np.int32), 0, n, 0, True)]
        where = {"cache": cache, "dtype": "float32", "page_size": PAGE, "n_layers": 1, "layer": 0, "items": items}
        self.context.rope_append(q, k, v, cos, sin, **where)
        out, window = np.empty_like(q), c.window[self.index] if c.window else 0
        self.context.attention(out, q, **where, n_kv_heads=c.num_key_value_heads, scale=1 / math.sqrt(d), window=window)
        return out.reshape(n, -1)

    def add_attention(self, x, attended):
        """x += what attention gives."""
        self._add(x, attended, "self_attn.o_proj")

    def mlp_input(self, x):
        return self._norm(x, "post_attention_layernorm")

    def down_input(self, x):
        """float32 [tokens, intermediate]."""
        gate, up = self._linear(self.mlp_input(x), "mlp.gate_proj", "mlp.up_proj")
        self.context.swiglu(gate, gate, up)
        return gate

    def add_mlp(self, x):
        """x += what the MLP gives."""
        self._add(x, self.down_input(x), "mlp.down_proj")

    def _norm(self, x, name):
        out = np.empty_like(x)
        self.context.rmsnorm(out, x, self._vectors[f"{name}.weight"], self.config.rms_norm_eps)
        return out

    def _part(self, out, name):
        return out, *self._matrices[name], self._vectors.get(f"{name}.bias")

    def _linear(self, x, *names):
        outs = [np.empty((len(x), len(self._matrices[name][0])), np.float32) for name in names]
        self.context.linear(x, [self._part(out, name) for out, name in zip(outs, names, strict=True)], m_prompt=len(x))
        return outs

    def _add(self, x, rows, name):
        self.context.linear(rows, [self._part(x, name)], m_prompt=len(x), accumulate=True)

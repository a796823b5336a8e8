"""The shape of every weight that a config asks for."""

from ..config import ModelConfig


def layer_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer: name within the layer -> (outputs, inputs)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every matrix of the model by its module's name ("model.layers.0.mlp.up_proj"), with the output matrix even when it is tied."""
    ends = dict.fromkeys(("model.embed_tokens", "lm_head"), (config.vocab_size, config.hidden_size))
    layer = layer_matrices(config)
    return ends | {f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}


def norm_shapes(config: ModelConfig) -> dict[str, tuple[int]]:
    """Every norm by its tensor's name."""
    layer = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.qk_norm:
        layer |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    norms = {f"model.layers.{i}.{name}.weight": (n,) for i in range(config.num_hidden_layers) for name, n in layer.items()}
    return {"model.norm.weight": (config.hidden_size,), **norms}

"""Tap: a look at the activations of a forward pass, without changing it."""

from collections.abc import Callable, Iterable

import numpy as np

from .errors import ArgumentError

# In the order of computation within a layer; "hidden" comes once, after the last layer.
POINTS = ("attention_input", "q", "k", "v", "attended", "mlp_input", "down_input", "hidden")
ROOM = 256 << 20  # bytes of activations held at once: prompts are cut into chunks that keep to it


class Tap:
    """Shows the activations of a forward pass to a function: `model.forward(ids, tap=Tap(["q", "k"], look))`.

    `look(point, layer, rows)` is called for each chunk of the prompt after it was computed, layer by layer and in the order of the points below.
    rows: float32 [tokens of the chunk, width], an array of its own, to be kept or changed at will. What is computed is the same bits as without
    a tap. The function may do anything, also use the model; when it raises, forward() raises that, and the sequence is as it was before.

    Points, and the width of their rows:
        "attention_input": what q, k and v are computed from; hidden_size
        "q", "k", "v": after rope, "k" and "v" before the cache rounds them; heads * head_dim, kv heads * head_dim. Where the cache has keys and
            queries turned (KVCache's turn_keys), "q" and "k" are turned back, exact to float32 rounding.
        "attended": what attention gives and the o projection is computed from; heads * head_dim
        "mlp_input": what gate and up are computed from; hidden_size
        "down_input": silu(gate) * up; intermediate_size
        "hidden": what the logits are computed from, after the last layer's norm; hidden_size, layer is the number of layers

    Args:
        points: one name or several.
        look: the function.
        layers: only these; negative ones count from the end. None: all. "hidden" comes in any case.
    """

    def __init__(self, points: str | Iterable[str], look: Callable[[str, int, np.ndarray], object], layers: Iterable[int] | None = None):
        names = [points] if isinstance(points, str) else list(points)
        unknown = [name for name in names if name not in POINTS]
        if unknown or not names:
            raise ArgumentError(f"points: found {unknown[0]!r}, expected some of {', '.join(POINTS)}" if unknown else "points: none given")
        if not callable(look):
            raise ArgumentError(f"look: expected a function of (point, layer, rows), found {type(look).__name__}")
        self.points = tuple(name for name in POINTS if name in names)
        self.look = look
        self.layers = None if layers is None else tuple(layers)

    def places(self, config) -> list[tuple[str, int, int]]:
        """(point, layer, width) in the order in which `look` is called."""
        n = config.num_hidden_layers
        chosen = range(n) if self.layers is None else sorted({layer + n if layer < 0 else layer for layer in self.layers})
        if any(not 0 <= layer < n for layer in chosen):
            raise ArgumentError(f"layers: found {list(self.layers)}, expected numbers from {-n} to {n - 1}: the model has {n} layers")
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        widths = {"q": heads, "attended": heads, "k": kv, "v": kv, "down_input": config.intermediate_size}
        places = [(point, layer, widths.get(point, config.hidden_size)) for layer in chosen for point in self.points if point != "hidden"]
        return places + [("hidden", n, config.hidden_size)] * ("hidden" in self.points)

    def chunk(self, config, most: int) -> int:
        """Tokens to compute at once: at most `most`, and so few that their activations keep to ROOM."""
        row = 4 * sum(width for _, _, width in self.places(config))
        return max(1, min(most, ROOM // max(row, 1)))

    def arrays(self, config, rows: int) -> list[tuple[str, int, np.ndarray]]:
        """What `look` is to be called with, for the core to fill."""
        return [(point, layer, np.empty((rows, width), np.float32)) for point, layer, width in self.places(config)]

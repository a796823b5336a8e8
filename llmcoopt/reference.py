"""The specification: a Llama-family language model in float64 NumPy, to be read from top to bottom.

The story. A text is a list of token ids. Each id picks a row of the embedding: a vector of `hidden` numbers, the token's place in the
*residual stream*. Every layer reads the stream twice and adds to it twice:

1. **Attention** lets tokens look at earlier ones. The normalised stream is projected to queries, keys and values, in heads of `head_dim`
   numbers. Queries and keys are rotated by an angle that grows with the position (rope), so that their dot product knows how far apart
   two tokens are. A softmax over the dot products says how much of each earlier value a token takes. Keys and values of past tokens are
   kept in a cache: that is what makes the next token cheap. With grouped-query attention several query heads share one key/value head.
2. **The MLP** transforms each token by itself: down(silu(gate(x)) * up(x)).

After the last layer the stream is normalised and multiplied with the output matrix: one number (a *logit*) for each word of the vocabulary.
`generate` appends the largest, or draws one with `probabilities`, and goes on from there.

What is here covers Llama 1, 2 and 3, Mistral (sliding windows), Qwen2 (biases), Qwen3 (normalised query and key heads) and SmolLM2 (tied
embeddings). Everything else in this package is a faster way to compute the same numbers, and the tests compare it with this file.

Inputs. `config` is any object with the attributes of `llmcoopt.config.ModelConfig`; `weights` maps Hugging Face's tensor names to arrays
([out, in] for matrices). Arrays of uint16 are read as bfloat16 bits, the only float type NumPy lacks. Shapes stand in comments: n tokens of
this call, t tokens in the cache after it, v words, H query heads, G key/value heads, d = head_dim.
"""

import math

import numpy as np

# ---------------------------------------------------------------- numbers


def float64(array):
    """Any weight array as float64; float64 arrays pass through uncopied, uint16 holds bfloat16 bits (the upper half of a float32)."""
    array = np.asarray(array)
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64, copy=False)


def softmax(x):
    """exp(x) / sum(exp(x)) along the last axis; the maximum is taken off first so that exp cannot overflow."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x):
    """x / (1 + exp(-x)), the denominator by its logarithm so that exp cannot overflow."""
    return x * np.exp(-np.logaddexp(0.0, -x))


# ---------------------------------------------------------------- rope: position as rotation


def inverse_frequencies(rope, head_dim, length):
    """float32 [d/2]: how far each pair of a head turns per position. `length` matters to the kinds dynamic and longrope only.

    Pair i of the plain kind turns by theta^(-2i/d): the first pair fast, the last slowly. The other kinds slow some pairs down, so that
    more positions than the model was trained with (`original_max`) stay within angles it has seen. Computed in double, rounded once."""
    exponent = np.arange(0, head_dim, 2) / head_dim  # [d/2]
    plain = rope.theta**-exponent  # [d/2]
    if rope.kind == "default":
        freq = plain
    elif rope.kind == "linear":
        freq = plain / rope.factor
    elif rope.kind == "dynamic":
        freq = dynamic_theta(rope, head_dim, length) ** -exponent
    elif rope.kind == "yarn":
        slow = yarn_ramp(rope, head_dim)  # [d/2], 1: slowed down fully
        freq = plain / rope.factor * slow + plain * (1.0 - slow)
    elif rope.kind == "llama3":
        fast = llama3_ramp(rope, plain)  # [d/2], 1: left as it is
        freq = plain / rope.factor * (1.0 - fast) + plain * fast
    elif rope.kind == "longrope":
        freq = plain / np.asarray(rope.long_factor if length > rope.original_max else rope.short_factor)
    else:
        raise ValueError(f"unknown rope kind {rope.kind!r}")
    return freq.astype(np.float32)


def dynamic_theta(rope, head_dim, length):
    """The base grows with the sequence once that is longer than the model was trained with."""
    stretch = rope.factor * max(length, rope.original_max) / rope.original_max - (rope.factor - 1.0)
    return rope.theta * stretch ** (head_dim / (head_dim - 2))


def yarn_ramp(rope, head_dim):
    """[d/2]: 0 for pairs that turn more than beta_fast times over the trained length, 1 for less than beta_slow, a line between."""

    def pair_that_turns(times):
        return head_dim * math.log(rope.original_max / (times * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step in place of a ramp, without dividing by zero
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def llama3_ramp(rope, plain):
    """[d/2]: 1 for pairs whose wavelength fits high_freq_factor times into the trained length, 0 below low_freq_factor, smooth between."""
    turns = rope.original_max * plain / (2.0 * math.pi)
    return np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)


def rope_tables(rope, head_dim, positions, length):
    """cos and sin, float64 [n, d/2]. The angle is a float32 product, as when the models were trained; cos and sin are not rounded."""
    inv_freq = inverse_frequencies(rope, head_dim, length)  # [d/2]
    angle = np.asarray(positions, np.float32)[:, None] * inv_freq[None, :]  # [n, d/2] float32
    angle = angle.astype(np.float64)
    return np.cos(angle) * rope.attention_factor, np.sin(angle) * rope.attention_factor  # factor 1 but for yarn and longrope


def rotate(x, cos, sin):
    """x [n, heads, d]: pair i is (x[i], x[i + d/2]), "rotate half", as Hugging Face checkpoints are stored."""
    a, b = np.split(x, 2, axis=-1)  # [n, heads, d/2] each
    cos, sin = cos[:, None, :], sin[:, None, :]  # [n, 1, d/2]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# ---------------------------------------------------------------- the parts of a layer


def rmsnorm(x, weight, eps):
    """Scales the last axis to mean square 1, then by a learnt weight per element."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * float64(weight)


def linear(x, weights, name):
    """x [n, in] @ weight [out, in]^T (+ bias [out] when the checkpoint has one)."""
    y = x @ float64(weights[name + ".weight"]).T  # [n, out]
    return y + float64(weights[name + ".bias"]) if name + ".bias" in weights else y


class Cache:
    """Keys (rotated) and values of all tokens so far: per layer an array [t, G, d]."""

    def __init__(self, config):
        empty = np.zeros((0, config.n_kv_heads, config.head_dim))
        self.keys = [empty] * config.n_layers
        self.values = [empty] * config.n_layers

    def __len__(self):
        return len(self.keys[-1])

    def append(self, layer, k, v):
        self.keys[layer] = np.concatenate([self.keys[layer], k])  # [t, G, d]
        self.values[layer] = np.concatenate([self.values[layer], v])  # [t, G, d]
        return self.keys[layer], self.values[layer]

    def truncate(self, length):
        self.keys = [k[:length] for k in self.keys]
        self.values = [v[:length] for v in self.values]


def attend(q, keys, values, positions, window):
    """q [n, H, d], keys and values [t, G, d] -> [n, H, d]. A token sees itself and what came before: all, or the last `window` tokens."""
    n_heads, n_kv_heads, head_dim = q.shape[1], keys.shape[1], keys.shape[2]
    past = np.arange(len(keys))[None, :] - positions[:, None]  # [n, t]: 0 is the token itself, -1 the one before
    visible = past <= 0 if not window else (past <= 0) & (past > -window)
    out = np.empty_like(q)
    for h in range(n_heads):
        g = h // (n_heads // n_kv_heads)  # query heads h of one group share key/value head g
        scores = q[:, h] @ keys[:, g].T / math.sqrt(head_dim)  # [n, t]
        out[:, h] = softmax(np.where(visible, scores, -np.inf)) @ values[:, g]  # [n, d]
    return out


def attention_block(config, weights, layer, x, cos, sin, positions, cache):
    """x [n, hidden] (normalised) -> what attention adds to the stream, [n, hidden]."""
    n, d, name = len(x), config.head_dim, f"model.layers.{layer}.self_attn."
    q = linear(x, weights, name + "q_proj").reshape(n, config.n_heads, d)
    k = linear(x, weights, name + "k_proj").reshape(n, config.n_kv_heads, d)
    v = linear(x, weights, name + "v_proj").reshape(n, config.n_kv_heads, d)
    if config.qk_norm:  # Qwen3: every head by itself, one weight [d] for all heads
        q = rmsnorm(q, weights[name + "q_norm.weight"], config.rms_norm_eps)
        k = rmsnorm(k, weights[name + "k_norm.weight"], config.rms_norm_eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = cache.append(layer, k, v)
    window = config.window[layer] if config.window else 0
    y = attend(q, keys, values, positions, window)  # [n, H, d]
    return linear(y.reshape(n, config.n_heads * d), weights, name + "o_proj")


def mlp_block(weights, layer, x):
    """x [n, hidden] (normalised) -> what the MLP adds to the stream, [n, hidden]."""
    name = f"model.layers.{layer}.mlp."
    h = silu(linear(x, weights, name + "gate_proj")) * linear(x, weights, name + "up_proj")  # [n, intermediate]
    return linear(h, weights, name + "down_proj")


# ---------------------------------------------------------------- the model


def forward(config, weights, ids, cache=None, rope_length=None):
    """Logits of `ids`, float64 [n, v]: row i scores the token after ids[i]. Reads and extends `cache` (none: the sequence begins here).

    `rope_length` is the sequence length that dynamic and longrope use: by default the length at the end of this call, as Hugging Face does.
    Keys already cached keep the rotation they were written with, so for these two kinds a prompt computed in pieces may differ from one
    computed whole; pass the whole prompt's length with each piece to make them equal."""
    cache = Cache(config) if cache is None else cache
    positions = np.arange(len(cache), len(cache) + len(ids))  # [n]
    length = len(cache) + len(ids) if rope_length is None else rope_length
    cos, sin = rope_tables(config.rope, config.head_dim, positions, length)  # [n, d/2]

    x = float64(weights["model.embed_tokens.weight"])[np.asarray(ids)]  # [n, hidden]
    for layer in range(config.n_layers):
        name, eps = f"model.layers.{layer}.", config.rms_norm_eps
        h = rmsnorm(x, weights[name + "input_layernorm.weight"], eps)
        x = x + attention_block(config, weights, layer, h, cos, sin, positions, cache)
        h = rmsnorm(x, weights[name + "post_attention_layernorm.weight"], eps)
        x = x + mlp_block(weights, layer, h)
    x = rmsnorm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = "model.embed_tokens" if config.tied_head else "lm_head"
    return linear(x, weights, head)  # [n, v]


# ---------------------------------------------------------------- sampling


def penalize(logits, seen, penalty):
    """Makes ids of the prompt and the output less likely, once per distinct id: positive logits are divided, negative ones multiplied."""
    logits = np.array(logits, np.float64)
    seen = np.unique(np.asarray(seen, np.int64))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def by_rank(logits):
    """Ids from the largest logit to the smallest, ties by id: the order in which top_k and top_p keep tokens."""
    return np.argsort(-logits, kind="stable")


def keep(logits, ids):
    """All logits but those of `ids` become -inf."""
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def keep_top_k(logits, k):
    """Keeps the k best; 0 or more than the vocabulary keeps all."""
    return keep(logits, by_rank(logits)[:k]) if k else logits


def keep_top_p(logits, p):
    """Keeps the smallest set of best tokens whose probabilities sum to at least p: the token that crosses p stays in."""
    order = by_rank(logits)
    mass = np.cumsum(softmax(logits[order]))  # [v], mass[i]: of the i + 1 best
    return keep(logits, order[: 1 + np.count_nonzero(mass < p)])


def keep_min_p(logits, p):
    """Keeps tokens at least p times as probable as the best one."""
    prob = softmax(logits)
    return np.where(prob >= p * prob.max(), logits, -np.inf)


def probabilities(logits, seen=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """What a token is drawn from, float64 [v]. The order of the steps is part of the specification; each works on what the last one left:
    repetition penalty over `seen` (prompt and output), temperature, top_k, top_p, min_p."""
    logits = penalize(logits, seen, repetition_penalty) / temperature
    logits = keep_top_k(logits, top_k)
    if top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    if min_p > 0.0:
        logits = keep_min_p(logits, min_p)
    return softmax(logits)


def uniform(seed, position):
    """A random number in [0, 1) that depends on its arguments alone, so no request disturbs another: Philox 4x32, ten rounds
    (Salmon et al., 2011), with the seed as key and the position as counter."""
    low = 2**32 - 1
    c0, c1, c2, c3 = position & low, position >> 32, 0, 0
    key0, key1 = seed & low, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ key0, b & low, (a >> 32) ^ c3 ^ key1, a & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return ((c0 << 32 | c1) >> 11) / 2**53


def draw(probabilities, u):
    """The id whose share of [0, 1), all shares laid in the order of ids, holds u."""
    return int(np.searchsorted(np.cumsum(probabilities), u, side="right").clip(max=np.flatnonzero(probabilities)[-1]))


def generate(config, weights, prompt, max_new_tokens, eos=(), do_sample=False, seed=0, repetition_penalty=1.0, **sampling):
    """The new ids, without the prompt. Greedy: the largest logit after the repetition penalty, ties to the lowest id. With `do_sample`:
    drawn from `probabilities`, with the number that belongs to the seed and the token's place in the sequence. An id of `eos` ends it."""
    cache, seen, ids = Cache(config), list(prompt), list(prompt)
    while len(seen) < len(prompt) + max_new_tokens:
        logits = forward(config, weights, ids, cache)[-1]  # [v]
        if do_sample:
            p = probabilities(logits, seen, repetition_penalty=repetition_penalty, **sampling)
            ids = [draw(p, uniform(seed, len(seen)))]
        else:
            ids = [int(penalize(logits, seen, repetition_penalty).argmax())]
        seen += ids
        if ids[0] in eos:
            break
    return seen[len(prompt) :]

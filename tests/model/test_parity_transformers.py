"""The C core against transformers: float32, CPU, small random models of every architecture and rope kind, odd sizes throughout.

The bound is 2e-5 of a row's largest logit. Both sides round every product and sum to float32 in an order of their own, and angles of rope
may differ by one unit in the last place of the frequency, times the position. Observed: 5.0e-6 at 100 tokens, 1.0e-5 at 1100."""

import json
import math

import numpy as np
import pytest
from checkpoints import error, prompt, random_array, read

import llmcoopt
from llmcoopt import reference

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install llmcoopt[parity]")
transformers = pytest.importorskip("transformers", "5.0", reason="transformers 5 is not installed: pip install llmcoopt[parity]")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")]

BOUND = 2e-5
SHAPE = {
    "vocab_size": 53,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LONG = {"short_factor": [1.0, 1.25, 1.5], "long_factor": [1.5, 3.0, 7.0], "original_max_position_embeddings": 48}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rope(kind, theta=10000.0, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def heads(n, kv, d, **fields):
    return {"num_attention_heads": n, "num_key_value_heads": kv, "head_dim": d, "hidden_size": n * d, **fields}


CASES = {
    "llama gqa 3, head_dim 6": ("llama", {}),
    "llama mha": ("llama", heads(4, 4, 10, vocab_size=101)),
    "llama mqa, ratio 5": ("llama", heads(5, 1, 6, intermediate_size=33)),
    "llama ratio 7, head_dim 40": ("llama", heads(7, 1, 40, vocab_size=131, num_hidden_layers=2)),
    "llama ratio 7, two groups": ("llama", heads(14, 2, 6, vocab_size=17)),
    "llama head_dim 80": ("llama", heads(3, 1, 80, num_hidden_layers=2)),
    "llama head_dim 256 beside hidden 44": ("llama", heads(2, 1, 256, hidden_size=44, num_hidden_layers=2)),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama2-like, eps 1e-6, wide mlp": ("llama", heads(5, 5, 8, intermediate_size=107, rms_norm_eps=1e-6)),
    "smollm2-like": ("llama", heads(9, 3, 8, tie_word_embeddings=True, vocab_size=97, **rope("default", 100000.0))),
    "mistral window 7": ("mistral", {"sliding_window": 7}),
    "mistral window 16, head_dim 40": ("mistral", heads(3, 1, 40, hidden_size=50, sliding_window=16)),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 ratio 7": ("qwen2", {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 42}),
    "qwen2 window in upper layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3 ratio 5, head_dim 40, biases": ("qwen3", heads(5, 1, 40, hidden_size=60, attention_bias=True, num_hidden_layers=2)),
    "rope linear": ("llama", rope("linear", factor=2.5)),
    "rope dynamic": ("llama", {"max_position_embeddings": 64, **rope("dynamic", factor=2.5)}),
    "rope yarn": ("llama", heads(3, 1, 40, **rope("yarn", factor=4.0, original_max_position_embeddings=64))),
    "rope yarn, exact ramp": (
        "llama",
        heads(3, 1, 40, **rope("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False, beta_fast=16.0, beta_slow=2.0)),
    ),
    "rope yarn, attention factor": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)),
    "rope yarn, mscale": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)),
    "rope llama3": ("llama", heads(3, 1, 40, **rope("llama3", 500.0, **LLAMA3))),
    "rope longrope": ("llama", rope("longrope", **LONG)),
    "rope longrope, factor": ("qwen2", rope("longrope", factor=3.0, **LONG)),
    "rope longrope, attention factor": ("qwen3", {"head_dim": 6, **rope("longrope", attention_factor=1.25, **LONG)}),
}
PIECES = {"short": [30], "whole": [100], "tokens": [20, *[1] * 60], "chunks": [1, 16, 17, 31, 35]}


def build(folder, family, fields, dtype=None, **save):
    """A random model, as transformers writes it to `folder`, and as it reads it again, computing in float32."""
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_array(rng, name, tuple(parameter.shape))))
    model.to(dtype or torch.float32).save_pretrained(folder, **save)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Pair:
    """One checkpoint in both implementations."""

    def __init__(self, folder, family, fields, **how):
        torch.set_num_threads(1)
        self.folder, self.hf = folder, build(folder, family, fields, **how)
        self.model = llmcoopt.Model.from_pretrained(folder)
        self.vocab = self.hf.config.vocab_size

    @torch.no_grad()
    def theirs(self, ids, pieces):
        self.hf(torch.tensor([ids[:1]]))  # a short call takes dynamic rope back to its first base
        cache, at, rows = None, 0, []
        for n in pieces:
            out = self.hf(torch.tensor([ids[at : at + n]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].numpy())
            at += n
        return np.concatenate(rows)

    def ours(self, ids, pieces):
        seq, at, rows = llmcoopt.KVCache(self.model, dtype="float32").sequence(), 0, []
        for n in pieces:
            rows.append(self.model.forward(ids[at : at + n], seq))
            at += n
        assert len(seq) == at
        return np.concatenate(rows)

    def by_spec(self, ids, pieces):
        config, weights = read(self.folder)
        cache, at, rows = reference.Cache(config), 0, []
        for n in pieces:
            rows.append(reference.forward(config, weights, ids[at : at + n], cache))
            at += n
        return np.concatenate(rows)


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(", ", " ").replace(" ", "-"))
def pair(request, tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"), *CASES[request.param])


@pytest.mark.parametrize("pieces", PIECES)
def test_logits(pair, pieces):
    ids = prompt(sum(PIECES[pieces]), pair.vocab)
    theirs = pair.theirs(ids, PIECES[pieces])
    ours = pair.ours(ids, PIECES[pieces])
    assert ours.dtype == np.float32
    assert error(ours, theirs) < BOUND


@pytest.mark.parametrize("pieces", PIECES)
def test_reference(pair, pieces):
    """The specification itself; what is left of the bound is the rounding of transformers."""
    ids = prompt(sum(PIECES[pieces]), pair.vocab)
    assert error(pair.by_spec(ids, PIECES[pieces]), pair.theirs(ids, PIECES[pieces])) < BOUND


@pytest.mark.parametrize("n", [1, 29])
def test_greedy(pair, n):
    ids = prompt(n, pair.vocab)
    with torch.no_grad():
        pair.hf(torch.tensor([ids[:1]]))
        theirs = pair.hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0].tolist()
    assert pair.model.generate([ids], max_new_tokens=64)[0] == theirs
    assert list(llmcoopt.generate(pair.model, ids, max_new_tokens=64)) == theirs[n:]


LONG_CASES = {
    "llama": ("llama", {}),
    "mistral window 40": ("mistral", {"sliding_window": 40}),
    "dynamic": ("llama", {"max_position_embeddings": 600, **rope("dynamic", factor=2.0)}),
    "longrope": ("llama", rope("longrope", **{**LONG, "original_max_position_embeddings": 600})),
}


@pytest.mark.parametrize("name", LONG_CASES)
def test_prompt_of_several_chunks(tmp_path, name):
    """1100 tokens are computed in pieces of 512, but as one call: kinds of rope that look at the length see the whole prompt's."""
    family, fields = LONG_CASES[name]
    pair = Pair(tmp_path, family, {"max_position_embeddings": 2048, **fields})
    ids = prompt(1100, pair.vocab)
    theirs = pair.theirs(ids, [1100])
    assert error(pair.ours(ids, [1100]), theirs) < BOUND
    run = llmcoopt.generate(pair.model, ids, max_new_tokens=8)
    with torch.no_grad():
        expected = pair.hf.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, 1100:].tolist()
    assert list(run) == expected


# ---------------------------------------------------------------- 16-bit weights

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MIXED = {
    "llama": ("llama", heads(6, 2, 16, intermediate_size=128)),
    "odd": ("llama", heads(5, 1, 6, hidden_size=35, intermediate_size=33)),
    "qwen3": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MIXED)
def test_16_bit_weights(tmp_path, name, dtype, isa):
    """Against transformers in float32 on the same rounded weights.

    Where the CPU has bfloat16 dot products, rows of a prompt round activations to bfloat16 (8 bits: 2^-9 relative) before each of the
    seven products of a layer. The errors are independent, so the logits' error is about sqrt(7 * layers) * 2^-9 / sqrt(3) of their size:
    0.5 % for three layers in the mean; the largest of a row may be several times that (observed: 2.0e-2). Everything else stays in float32."""
    pair = Pair(tmp_path, *MIXED[name], dtype=HALF[dtype])
    pair.model = llmcoopt.Model.from_pretrained(tmp_path, isa=isa)
    ids = prompt(60, pair.vocab)
    rounds = dtype == "bfloat16" and "BF16" in pair.model.isa_detail
    assert error(pair.ours(ids, [60]), pair.theirs(ids, [60])) < (5e-2 if rounds else BOUND)
    assert error(pair.ours(ids, [1] * 60), pair.theirs(ids, [1] * 60)) < BOUND


# ---------------------------------------------------------------- files as transformers wrote them over the years


def test_sharded(tmp_path):
    whole = Pair(tmp_path / "whole", "llama", {})
    parts = Pair(tmp_path / "parts", "llama", {}, max_shard_size="20KB")
    assert len(list(parts.folder.glob("*.safetensors"))) > 2
    ids = prompt(20)
    np.testing.assert_array_equal(parts.ours(ids, [20]), whole.ours(ids, [20]))


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rope ")])
def test_older_spelling(tmp_path, name, key):
    """Version 4 wrote rope_theta beside rope_scaling, and before that `type` for rope_type; the logits are the same."""
    pair = Pair(tmp_path, *CASES[name])
    ids = prompt(80, pair.vocab)
    new = pair.ours(ids, [80])
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    scaling[key] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    pair.model = llmcoopt.Model.from_pretrained(tmp_path)
    np.testing.assert_array_equal(pair.ours(ids, [80]), new)


def test_rope_kinds_differ(tmp_path):
    """Each kind changes the logits, so none of the cases above passes by being the plain kind."""
    ids, seen = prompt(100), {}
    for name in ("llama gqa 3, head_dim 6", "rope linear", "rope dynamic", "rope yarn, attention factor", "rope longrope"):
        family, fields = CASES[name]
        seen[name] = Pair(tmp_path / "same", family, fields).ours(ids, [100])
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert error(seen[a], seen[b]) > 1e-3, (a, b)
    assert math.isfinite(sum(float(x.sum()) for x in seen.values()))

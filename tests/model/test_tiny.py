"""The embedded model: its shape is as promised, its files load, and it has learnt its language."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import read, read_safetensors

import llmcoopt
from llmcoopt import reference

FOLDER = Path(llmcoopt.__file__).parent / "models" / "tiny"
# Written for this test, so in none of the texts the model was trained on.
STORY = """Once upon a time, there was a little girl named Sue. She had a small red boat. One day, Sue took her boat to the pond. The wind was \
strong, and the boat went far away.
"Oh no! My boat!" said Sue. She was very sad. A big duck saw her and said, "Don't cry. I can help you."
The duck swam to the boat and pushed it back. Sue was so happy. "Thank you, duck!" she said. They played together all day."""
LOSS_BOUND = 1.8  # nats a token; observed 1.704. One output projection with its rows rolled by one gives 1.93, rope theta 100 gives 3.20.


@pytest.fixture(scope="module")
def story_ids():
    return llmcoopt.Tokenizer.from_pretrained("tiny").encode(STORY)


def token_losses(logits, ids):
    """Minus the log-probability of each id after the first, in float64."""
    logits = np.asarray(logits, np.float64)[:-1]
    peak = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - peak).sum(-1)) + peak[:, 0] - logits[np.arange(len(ids) - 1), ids[1:]]


def test_config_is_as_promised():
    config = json.loads((FOLDER / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    assert {name: config.get(name) for name in expected} == expected
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert generation["do_sample"] and 0 < generation["temperature"] <= 1 and generation["eos_token_id"] == 0


def test_weights_fit_in_8_megabytes_of_bfloat16():
    weights = read_safetensors(FOLDER / "model.safetensors")
    assert {a.dtype.name for a in weights.values()} == {"uint16"}, "every tensor is bfloat16"
    assert sum(a.nbytes for a in weights.values()) <= 8_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert "lm_head.weight" not in weights, "the head is tied to the embedding"
    exponents = np.concatenate([a.ravel() for a in weights.values()]) >> 7 & 0xFF
    assert exponents.max() < 0xFF, "no weight is infinite or NaN"


def test_tokenizer_round_trips_and_fits_the_model():
    tok = llmcoopt.Tokenizer.from_pretrained("tiny")
    assert tok.vocab_size == 2048
    text = STORY + " Ünïcode 🦆\ttabs  and   spaces\n\n"
    ids = tok.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1, "a document begins with one <|endoftext|>"
    assert tok.decode(ids, skip_special_tokens=True) == text
    assert len(STORY.encode()) / len(tok.encode(STORY)) > 3, "bytes a token on a story"


def test_story_has_a_low_loss_by_the_reference(story_ids):
    config, weights = read(FOLDER)
    loss = token_losses(reference.forward(config, weights, story_ids), story_ids).mean()
    assert loss < LOSS_BOUND


def test_story_has_the_same_loss_by_the_engine(story_ids):
    config, weights = read(FOLDER)
    expected = token_losses(reference.forward(config, weights, story_ids), story_ids).mean()
    with llmcoopt.Model.from_pretrained("tiny") as model:
        loss = token_losses(model.forward(story_ids), story_ids).mean()
    assert abs(loss - expected) < 2e-3, "bfloat16 activations; observed 1.4e-4"


def test_story_order_matters(story_ids):
    """The same tokens shuffled must be far less likely: the loss above is not that of single words."""
    config, weights = read(FOLDER)
    shuffled = [story_ids[0], *np.random.default_rng(0).permutation(story_ids[1:]).tolist()]
    loss = token_losses(reference.forward(config, weights, shuffled), shuffled).mean()
    assert loss > LOSS_BOUND + 2


def test_generation_writes_words_and_stops_at_the_end_mark():
    tok = llmcoopt.Tokenizer.from_pretrained("tiny")
    with llmcoopt.Model.from_pretrained("tiny") as model:
        generation = llmcoopt.generate(model, "Once upon a time", tokenizer=tok, max_new_tokens=600, temperature=0.7, top_p=0.95, seed=1)
        generation.run()
        assert generation.finish_reason == "eos", f"a story ends; this one ran on for {len(generation.ids)} tokens"
        assert generation.text.isascii() and len(generation.text.split()) > 30

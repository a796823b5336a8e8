"""One-byte caches with a write buffer, seen from Python: how a sequence came about never shows in its logits, bit by bit."""

import numpy as np
import pytest
from checkpoints import make, row_errors, steps

import llmcoopt
from llmcoopt.cache import SCALED
from llmcoopt.errors import ArgumentError, NumericError, OutOfPagesError

IDS = np.random.default_rng(7).integers(0, 2048, 1024).tolist()
OTHER = np.random.default_rng(8).integers(0, 2048, 1024).tolist()
# Logits through one-byte keys and values against those of a bfloat16 cache, largest difference relative to the largest logit. Observed:
# half of it at most.
NEAR = {"fp8_e4m3": 0.05, "fp8_e5m2": 0.1, "int8": 0.02}


@pytest.fixture(scope="module")
def model():
    with llmcoopt.Model.from_pretrained("tiny", threads=2) as model:
        yield model


@pytest.fixture(params=SCALED)
def dtype(request):
    return request.param


@pytest.fixture(params=[16, 48, 128], ids=["page16", "page48", "page128"])
def cache(request, model, dtype):
    with llmcoopt.KVCache(model, dtype, page_size=request.param, max_tokens=8192) as cache:
        yield cache
        cache.check()


def continuation(model, seq, ids=OTHER):
    """Logits of what comes next: a prompt over several blocks, then single tokens to the end of a block and past it."""
    return steps(model, seq, ids[:60], 1, 2, 20, *[1] * 20)


def test_cuts_do_not_show(model, cache):
    whole = model.forward(IDS[:230], cache.sequence())
    rng = np.random.default_rng(0)
    for lengths in ([7] * 40, [16] * 20, [100, 3], rng.integers(2, 40, 60).tolist()):
        lengths = lengths[: np.searchsorted(np.cumsum(lengths), 228)]  # no single token at the end: decode rows round differently
        assert np.array_equal(steps(model, cache.sequence(), IDS[:230], *lengths), whole), lengths


def test_long_prompts_in_chunks(model, cache):
    """forward() cuts at 512 by itself."""
    whole, pieces = cache.sequence(), cache.sequence()
    assert np.array_equal(steps(model, pieces, IDS[:700], 37, 600), model.forward(IDS[:700], whole))
    assert np.array_equal(continuation(model, pieces), continuation(model, whole))


def test_decode_rows_read_what_prompt_rows_read(model, cache):
    """One token at a time is a prompt but for rounding: far nearer than codes are to 16 bit."""
    prompt = model.forward(IDS[:100], cache.sequence())
    single = steps(model, cache.sequence(), IDS[:100], *[1] * 100)
    assert row_errors(single, prompt).max() < NEAR[cache.dtype] / 3


def test_near_a_cache_of_16_bit(model, cache):
    with llmcoopt.KVCache(model, "bfloat16") as plain:
        right = model.forward(IDS[:300], plain.sequence())
    found = model.forward(IDS[:300], cache.sequence())
    errors = row_errors(found, right)
    assert errors.max() < NEAR[cache.dtype]
    assert errors[:16].max() < 0.007, "rows of the first block read it from 16 bit: turned keys are rounded to other bfloat16 numbers"
    if "AMX" not in model.isa_detail:  # its tiles round prompt rows over 16-bit caches only
        with llmcoopt.KVCache(model, cache.dtype, turn_keys=False) as same:
            assert row_errors(model.forward(IDS[:16], same.sequence()), right[:16]).max() == 0
    assert errors[40:].max() > 1e-4, "the codes are in use"


@pytest.mark.parametrize("length", [5, 16, 37, 48, 72, 96, 103])
def test_forks_go_their_own_way(model, cache, length):
    """Forked inside blocks, at their ends, inside pages, at theirs: the original and the forks are as sequences without relatives."""
    lone = [cache.sequence() for _ in range(3)]
    right = []
    for i, seq in enumerate(lone):
        model.forward(IDS[:length], seq)
        right.append(continuation(model, seq, IDS[i * 100 + 200 :]))
    first = cache.sequence()
    model.forward(IDS[:length], first)
    family = [first, first.fork()]
    family.append(family[1].fork())
    found = [[], [], []]
    for at in range(0, 60, 6):  # by turns
        for i, seq in enumerate(family):
            found[i].append(model.forward(IDS[i * 100 + 200 + at :][:6], seq))
    for i in range(3):
        alone = cache.sequence()
        model.forward(IDS[:length], alone)
        expected = model.forward(IDS[i * 100 + 200 :][:60], alone)
        assert np.array_equal(np.concatenate(found[i]), expected), i
    single = [first.fork() for _ in range(2)]  # single tokens
    cache.check()
    tails = [steps(model, seq, OTHER[:20], *[1] * 20) for seq in single]
    assert np.array_equal(*tails)
    for i, seq in enumerate(lone):
        seq.truncate(0)
        model.forward(IDS[:length], seq)
        assert np.array_equal(continuation(model, seq.fork(), IDS[i * 100 + 200 :]), right[i]), i


@pytest.mark.parametrize("stretches, more", [(0, 40), (1, 1), (2, 50), (3, 130)])
def test_cut_at_a_stretch_s_end(model, cache, stretches, more):
    """As if it had never been longer."""
    length, longer = stretches * cache.residual_length, stretches * cache.residual_length + more
    lone, seq = cache.sequence(), cache.sequence()
    if length:
        model.forward(IDS[:length], lone)
    model.forward(IDS[:longer], seq)
    seq.truncate(length)
    assert np.array_equal(continuation(model, seq), continuation(model, lone))


@pytest.mark.parametrize("length, longer", [(5, 11), (66, 79), (65, 70), (33, 47)])
def test_cut_inside_the_stretch_being_filled(model, cache, length, longer):
    lone, seq, decoded = (cache.sequence() for _ in range(3))
    model.forward(IDS[:length], lone)
    model.forward(IDS[:longer], seq)
    model.forward(IDS[:length], decoded)
    steps(model, decoded, OTHER[: longer - length], *[1] * 20)
    right = continuation(model, lone)
    for cut in (seq, decoded):
        cut.truncate(length)
        assert np.array_equal(continuation(model, cut), right)


@pytest.mark.parametrize("length", [1, 15, 40, 63])
def test_cut_inside_a_full_stretch(model, cache, length):
    """Its rows come back as their codes say: near, and the same every time."""
    lone, seq, again = (cache.sequence() for _ in range(3))
    model.forward(IDS[:length], lone)
    right = continuation(model, lone)
    for cut in (seq, again):
        model.forward(IDS[:100], cut)
        cut.truncate(length)
    found = continuation(model, seq)
    assert row_errors(found, right).max() < NEAR[cache.dtype]
    assert np.array_equal(found, continuation(model, again))


class Interrupting:
    """Stands for a model's core: its n-th forward is Ctrl-C, before or after the work."""

    def __init__(self, core, nth, after):
        self.core, self.left, self.after = core, nth, after

    def __getattr__(self, name):
        return getattr(self.core, name)

    def forward(self, *args, **kwargs):
        self.left -= 1
        if self.left or self.after:
            self.core.forward(*args, **kwargs)
        if not self.left:
            raise KeyboardInterrupt


def unharmed(model, cache, seq, held):
    """The next logits are those of a sequence that nothing happened to."""
    assert seq.ids == IDS[:held] and len(seq) == held
    cache.check()
    lone = cache.sequence()
    model.forward(IDS[:held], lone)
    assert np.array_equal(continuation(model, seq), continuation(model, lone))


@pytest.mark.parametrize("held", [40, 47, 48, 7])
@pytest.mark.parametrize("nth, after", [(1, True), (2, False), (2, True)])
def test_interrupt_leaves_no_trace(model, cache, monkeypatch, held, nth, after):
    seq = cache.sequence()
    model.forward(IDS[:held], seq)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_core", Interrupting(model._core, nth, after))
        with pytest.raises(KeyboardInterrupt):
            model.forward(OTHER[:600], seq)
    unharmed(model, cache, seq, held)


@pytest.mark.parametrize("held", [40, 31, 32])
@pytest.mark.parametrize("more", [400, 600], ids=["first chunk", "second chunk"])
def test_a_full_cache_leaves_no_trace(model, dtype, held, more):
    with llmcoopt.KVCache(model, dtype, page_size=16, max_tokens=more - 16) as cache:
        seq = cache.sequence()
        model.forward(IDS[:held], seq)
        with pytest.raises(OutOfPagesError, match="max_tokens"):
            model.forward(OTHER[:more], seq)
        unharmed(model, cache, seq, held)


def test_nan_logits_leave_no_trace(dtype, tmp_path, isa):
    """A token whose embedding is NaN, in prompts and alone, inside a block and as its last: its keys do not stay."""

    def edit(weights):
        weights["model.embed_tokens.weight"][3] = np.nan

    make(tmp_path, edit=edit, tie_word_embeddings=False)
    ids = [i % 40 + 5 for i in range(200)]
    with llmcoopt.Model.from_pretrained(tmp_path, isa=isa, threads=2) as model, llmcoopt.KVCache(model, dtype, page_size=16) as cache:
        for held in (1, 20, 31, 32):
            for bad in ([3], [3, 4], [7] * 10 + [3], [3] + [9] * 40):
                lone, seq = cache.sequence(), cache.sequence()
                for each in (lone, seq):
                    model.forward(ids[:held], each)
                with pytest.raises(NumericError):
                    model.forward(bad, seq)
                for part in (ids[100:101], ids[101:140], ids[140:141]):
                    assert np.array_equal(model.forward(part, seq), model.forward(part, lone)), (held, bad)
        cache.check()


def test_bytes(model, dtype):
    for page_size in (16, 64, 512):
        with llmcoopt.KVCache(model, dtype, page_size) as coded, llmcoopt.KVCache(model, "bfloat16", page_size) as plain:
            assert coded.stats()["bytes_per_token"] <= 0.51 * plain.stats()["bytes_per_token"]


def test_counters(model, cache):
    c = model.config
    tails = c.num_hidden_layers * 2 * c.num_key_value_heads * cache.residual_length * c.head_dim * 2
    beside = c.num_hidden_layers * 2 * c.num_key_value_heads * 4 * c.head_dim * 2

    def counts():
        s = cache.stats()
        return s["blocks_quantised"], s["tail_bytes"]

    seq = cache.sequence()
    assert counts() == (0, 0) and cache.stats()["first_bytes"] == 0
    model.forward(IDS[:15], seq)
    assert counts() == (0, tails)
    model.forward(IDS[:1], seq)
    held = tails  # a call that leaves the stretch that it began in keeps what was in it, for going back
    assert counts() == (1, tails + held * (cache.residual_length == 16))
    model.forward(IDS[:100], seq)
    assert counts() == (7, tails + held)
    fork = seq.fork()
    assert counts() == (7, 2 * tails + held) and cache.stats()["first_bytes"] == beside, "the fork shares the first page"
    steps(model, fork, IDS[:12], *[1] * 12)
    assert counts() == (8, 2 * tails + held + tails * (128 % cache.residual_length == 0))
    fork.free()
    seq.truncate(50)
    assert counts() == (8, tails + held)
    del seq
    assert counts() == (8, 0)
    with llmcoopt.KVCache(model, cache.dtype, write_buffer=False) as plain:
        model.forward(IDS[:40], plain.sequence())
        assert (plain.stats()["blocks_quantised"], plain.stats()["tail_bytes"]) == (2, 0)


BAD = ["64", 64.0, True, [16], -1, 2**40, 2**70, np.float32(32), np.int64(-16)]


@pytest.mark.parametrize(
    "options, text",
    [
        *(({"residual_length": bad}, r"residual_length = .*expected a whole number from 16 to 64") for bad in [*BAD, 0, 15, 128]),
        *(({"sink_length": bad}, r"sink_length = .*expected a whole number from 0 to 16") for bad in [*BAD, 17]),
        *(({"page_size": bad}, r"page_size = .*expected a whole number from 16 to 512") for bad in [*BAD[:3], *BAD[4:], None, 0, 1024]),
        *(({"max_tokens": bad}, r"max_tokens = .*expected a whole number from 1 to ") for bad in [*BAD[:5], 2**70, 0]),
        *(({"host_bytes": bad}, r"host_bytes = .*expected a whole number from 1 to ") for bad in [*BAD[:5], 2**70, 0]),
        ({"residual_length": 48}, "residual_length = 48, expected a multiple of 16 to 64 that divides page_size = 64"),
        ({"residual_length": 32, "page_size": 48}, "residual_length = 32, expected a multiple of 16 to 64 that divides page_size = 48"),
        ({"residual_length": 40, "page_size": 80}, "residual_length = 40, expected a multiple of 16"),
        ({"page_size": 40}, "page_size = 40, expected a multiple of 16"),
        ({"write_buffer": False, "residual_length": 64}, "residual_length = 64 .*without a write_buffer"),
        ({"write_buffer": False, "sink_length": 4}, "sink_length = 4 without a write_buffer"),
    ],
)
def test_wrong_options(model, options, text):
    with pytest.raises(ArgumentError, match=text):
        llmcoopt.KVCache(model, **options)


def test_options_of_numpy(model):
    options = {"page_size": np.int64(96), "residual_length": np.uint8(48), "sink_length": np.int16(3), "max_tokens": np.int32(500)}
    with llmcoopt.KVCache(model, **options) as cache:
        assert (cache.page_size, cache.residual_length, cache.sink_length) == (96, 48, 3)
        assert all(type(n) is int for n in (cache.page_size, cache.residual_length, cache.sink_length))
        assert cache.stats()["pages_total"] == 6


def test_16_bit_caches_have_no_buffer(model):
    with llmcoopt.KVCache(model, "bfloat16", residual_length=64, sink_length=16) as cache:
        model.forward(IDS[:40], cache.sequence())
        assert (cache.write_buffer, cache.residual_length, cache.sink_length) == (False, 0, 0)
        assert cache.stats()["first_bytes"] == cache.stats()["tail_bytes"] == 0

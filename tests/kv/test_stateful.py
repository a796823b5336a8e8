"""Sequences under random treatment against a plain model of them: a list of ids and of what was done to them, computed anew by itself.

All rows are computed by the `ref` operators, whose rows don't depend on whether they come as a prompt or one by one, so logits must be equal to
the bit, whatever was shared, cut, moved or found in the meantime."""

import tempfile

import numpy as np
import pytest
from checkpoints import make
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule, run_state_machine_as_test

import llmcoopt
from llmcoopt.errors import ArgumentError, OutOfPagesError

VOCAB = 5  # few ids: sequences often begin alike
CONTEXT = 256
OPTIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16", "page_size": 32},
    "fp8_e4m3": {"dtype": "fp8_e4m3", "page_size": 32},
    "fp8_e5m2": {"dtype": "fp8_e5m2"},
    "narrow": {"dtype": "fp8_e4m3", "page_size": 48, "residual_length": 16, "sink_length": 0},
    "two stretches": {"dtype": "int8", "page_size": 64, "residual_length": 32, "sink_length": 9},
    "int8": {"dtype": "int8", "page_size": 48},
    "unbuffered": {"dtype": "fp8_e4m3", "write_buffer": False},
    "prefix": {"dtype": "fp8_e4m3", "prefix_cache": True},
    "prefix unbuffered": {"dtype": "int8", "write_buffer": False, "prefix_cache": True},
    "prefix spilled": {"dtype": "int8", "page_size": 32, "prefix_cache": True, "hot_pages": 4},
    "bounds": {"dtype": "fp8_e4m3", "page_tolerance": 1e-300},  # kept, and no page left out
    "windowed": {"dtype": "bfloat16", "attention_window": 50, "attention_sinks": 5},
    "windowed, spilled": {"dtype": "float32", "attention_window": 30, "hot_pages": 5},
    "windowed, prefix": {"dtype": "fp8_e4m3", "attention_window": 40, "attention_sinks": 5, "prefix_cache": True},
    "spilled": {"dtype": "fp8_e4m3", "hot_pages": 4},
    "bounds, spilled": {"dtype": "fp8_e4m3", "page_tolerance": 1e-300, "hot_pages": 4},
    "all": {
        "dtype": ["int8", "bfloat16"],
        "page_size": 32,
        "residual_length": 16,
        "attention_window": 40,
        "attention_sinks": 5,
        "prefix_cache": True,
        "page_tolerance": 1e-300,
        "hot_pages": 5,
    },
    "spilled bfloat16": {"dtype": "bfloat16", "page_size": 32, "hot_pages": 5},
}
# Options that the plain model shares: the others may not change a bit.
EXACT = ("dtype", "page_size", "write_buffer", "residual_length", "sink_length", "attention_window", "attention_sinks")

counts = st.one_of(st.just(1), st.integers(1, 40))
seeds = st.integers(0, 2)


def ids_of(seed, start, n):
    """Ids at positions [start, start + n) of one of a few endless texts, two of which begin alike."""
    text = np.random.default_rng(max(seed, 1)).integers(0, VOCAB, CONTEXT)
    text[40:] = np.random.default_rng(10 + seed).integers(0, VOCAB, CONTEXT - 40)
    return text[start : start + n].tolist()


class Plain:
    """What a sequence is: the steps that lead to it, which replay() does again in a cache of its own."""

    def __init__(self, steps=(), longest=0):
        self.steps, self.longest = list(steps), longest  # the most tokens that it held, or would have in a call that failed

    @property
    def ids(self):
        ids = []
        for step in self.steps:
            ids = ids[:step] if isinstance(step, int) else ids + step
        return ids

    def append(self, ids):
        self.steps.append(list(ids))

    def truncate(self, length, exact, unit):
        """`exact`: nothing shows that the sequence was longer just now. Nothing at all does, unless an earlier cut, in a stretch of `unit` that
        begins before `length`, was not."""
        forget = exact and all(length <= step // unit * unit for step in self.steps if isinstance(step, int))
        self.steps = [self.ids[:length]] if forget else [*self.steps, length]

    def replay(self, model, options):
        with llmcoopt.KVCache(model, max_tokens=4 * CONTEXT, **options) as cache:
            sequence = cache.sequence()
            for step in self.steps:
                if isinstance(step, int):
                    sequence.truncate(step)
                elif step:
                    model.forward(step, sequence, last_only=True)
            return model.forward([1], sequence)[-1]


class Cache(RuleBasedStateMachine):
    """One cache with room for about six sequences. A bundle holds pairs of a Sequence and its Plain."""

    model = options = None  # set by the test
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.cache = llmcoopt.KVCache(self.model, **{"page_size": 16, "max_tokens": 480} | self.options)
        self.unit = self.cache.residual_length or 16
        self.live = []
        self.plain_options = {"page_size": 16} | {name: value for name, value in self.options.items() if name in EXACT}

    def teardown(self):
        for sequence, _ in self.live:
            sequence.free()
        self.cache.check()
        stats = self.cache.stats()
        assert stats["pages_free"] == stats["pages_total"] and stats["sequences"] == 0
        self.cache.close()

    def keep(self, sequence, plain):
        self.live.append((sequence, plain))
        return sequence, plain

    @rule(target=sequences)
    def begin(self):
        return self.keep(self.cache.sequence(), Plain())

    @rule(pair=sequences, n=counts, seed=seeds)
    def append(self, pair, n, seed):
        sequence, plain = pair
        ids = ids_of(seed, len(sequence), n)
        if not ids:
            return
        plain.longest = max(plain.longest, len(sequence) + len(ids))
        try:
            self.model.forward(ids, sequence, last_only=True)
        except OutOfPagesError as error:
            assert "raise max_tokens" in str(error)
        else:
            plain.append(ids)

    @rule(pair=sequences, n=st.integers(1, 5), seed=seeds)
    def generate(self, pair, n, seed):
        """By the engine: a prompt, then tokens one by one."""
        sequence, plain = pair
        prompt = ids_of(seed, len(sequence), n + 3)
        if len(prompt) < n + 3:
            return
        plain.longest = max(plain.longest, len(sequence) + len(prompt) + n)
        try:
            generation = llmcoopt.generate(self.model, prompt, sequence=sequence, max_new_tokens=n, ignore_eos=True).run()
        except OutOfPagesError:
            new = sequence.ids[len(plain.ids) :]  # as far as it went
        else:
            new = [*prompt, *generation.ids[:-1]]
        if not self.cache.write_buffer:  # see is_exact
            plain.append(new[: len(prompt)])
            new = new[len(prompt) :]
        for ids in [new] if self.cache.write_buffer else [[i] for i in new]:
            plain.append(ids)

    @rule(n=st.integers(1, 90), seed=seeds)
    def ask(self, n, seed):
        """A request without a sequence of its own: what it computes is what a fresh cache computes."""
        prompt = ids_of(seed, 0, n)
        try:
            found = llmcoopt.generate(self.model, prompt, cache=self.cache, max_new_tokens=3, ignore_eos=True).run()
        except OutOfPagesError:
            return
        with llmcoopt.KVCache(self.model, max_tokens=CONTEXT, **self.plain_options) as cache:
            expected = llmcoopt.generate(self.model, prompt, cache=cache, max_new_tokens=3, ignore_eos=True).run()
        assert found.ids == expected.ids and found.logprobs == expected.logprobs

    @rule(target=sequences, pair=sequences)
    def fork(self, pair):
        sequence, plain = pair
        return self.keep(sequence.fork(), Plain(plain.steps, plain.longest))

    @rule(pair=sequences, share=st.integers(0, 100), whole=st.booleans())
    def truncate(self, pair, share, whole):
        sequence, plain = pair
        length = len(sequence) * share // 100
        length -= length % self.unit if whole else 0
        try:
            sequence.truncate(length)
        except ArgumentError as error:
            assert "attention_window" in self.options and "left the window" in str(error) and length < plain.longest - self.cache.page_size
            return
        plain.truncate(length, self.is_exact(length, len(plain.ids)), self.unit)

    def is_exact(self, length, before):
        """Of a cut from `before` to `length`, docs/cache.md: whole stretches, the one being filled. Without a write buffer it shows how a
        sequence was put together, since a block is scaled again and again."""
        if self.cache.dtype not in llmcoopt.cache.SCALED:
            return True
        return self.cache.write_buffer and (length % self.unit == 0 or length // self.unit == before // self.unit)

    @rule(target=sequences, pair=sequences)
    def save_and_load(self, pair):
        sequence, plain = pair
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(f"{folder}/saved", sequence)
            try:
                (loaded,) = self.cache.load(f"{folder}/saved")
            except OutOfPagesError:
                return multiple()
        if len(sequence) % self.unit and self.cache.write_buffer:
            # What truncate() would come back to is not saved: go on from a stretch's beginning.
            length = len(sequence) // self.unit * self.unit
            loaded.truncate(length)
            shorter = Plain(plain.steps, plain.longest)
            shorter.truncate(length, self.is_exact(length, len(plain.ids)), self.unit)
            return self.keep(loaded, shorter)
        return self.keep(loaded, Plain(plain.steps, plain.longest))

    @rule(pair=consumes(sequences))
    def free(self, pair):
        self.live.remove(pair)
        pair[0].free()

    @rule(pair=sequences)
    def compare(self, pair):
        sequence, plain = pair
        if len(sequence) == CONTEXT:
            return
        probe = sequence.fork()
        try:
            found = self.model.forward([1], probe)[-1]
        except OutOfPagesError:
            return
        finally:
            probe.free()
        assert np.array_equal(found, plain.replay(self.model, self.plain_options))

    @invariant()
    def sound(self):
        self.cache.check()
        assert all(sequence.ids == plain.ids for sequence, plain in self.live)
        assert self.cache.stats()["tokens_held"] == sum(len(plain.ids) for _, plain in self.live)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateful")
    make(folder, vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=CONTEXT)
    with llmcoopt.Model.from_pretrained(folder, threads=1, isa="ref") as model:
        yield model


def with_file(model, folder, hot_pages, **options):
    """Options of a cache with so many pages in memory."""
    with llmcoopt.KVCache(model, max_tokens=64, **{"page_size": 16} | options) as cache:
        return options | {"host_bytes": hot_pages * cache.stats()["page_bytes"], "spill_path": folder}


@pytest.mark.parametrize("name", OPTIONS)
def test_random_treatment(small, name, tmp_path):
    options = with_file(small, tmp_path, **OPTIONS[name]) if "hot_pages" in OPTIONS[name] else OPTIONS[name]
    machine = type(f"Cache_{name}", (Cache,), {"model": small, "options": options})
    quick = settings(max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    run_state_machine_as_test(machine, settings=quick)

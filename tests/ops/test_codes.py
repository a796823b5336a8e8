"""One-byte caches: what rope_append writes (codes, scales, tails), bit by bit, and what attention reads, on every instruction set."""

import itertools

import numpy as np
import oracle
import pytest

BOUND = 8  # in units of oracle.attention's bound, as in test_attention.py. Observed: 2 at most over all cases below
BLOCK = oracle.BLOCK
RATIOS = [(2, 2), (4, 2), (3, 1), (10, 2), (7, 1), (8, 1)]
scaled = pytest.mark.parametrize("dtype", oracle.SCALED)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def uneven(rng, tokens, kv_heads, head_dim):
    """Rows of sizes from 2^-8 to 2^8: scales differ from block to block."""
    return normal(rng, tokens, kv_heads, head_dim) * np.exp2(rng.integers(-8, 9, (tokens, 1, 1))).astype(np.float32)


class Stored:
    """A sequence that rope_append writes: its pages, its two tails, and what was written. narrow: stretches of 16, no first tokens in 16 bit."""

    def __init__(self, rng, tokens, kv_heads, head_dim, page_size, dtype, buffered=True, layers=2, narrow=False):
        n = -(-tokens // page_size)
        buffer = () if narrow else (oracle.widest(page_size), 4)
        self.pages = oracle.CodedPages(n + 2, layers, kv_heads, head_dim, page_size, dtype, *buffer)
        self.unit = self.pages.residual
        self.table = rng.permutation(n + 2)[:n].astype(np.int32)
        self.buffered, self.n = buffered, 0
        self.tail, self.next_tail = self.pages.new_tail(), self.pages.new_tail()

    def item(self, row, length, prompt):
        item = self.table, row, length, self.n, prompt
        if not self.buffered:
            return item
        own = self.pages.new_tail((self.n + length - 1) // self.unit - self.n // self.unit + 1)
        return *item, *(a.reshape(-1).view(np.uint8) for a in (self.tail, self.next_tail, own))

    def append(self, ctx, k, v, layer, prompt=True, commit=True):
        """Rows k, v as they are: not rotated."""
        m, _, d = k.shape
        one, zero = np.ones((m, d // 2), np.float32), np.zeros((m, d // 2), np.float32)
        ctx.rope_append(k.copy(), k.copy(), v, one, zero, **self.pages.where, layer=layer, items=[self.item(0, m, prompt)])
        if commit:
            self.commit(m)

    def commit(self, length):
        if self.n // self.unit != (self.n + length) // self.unit:
            self.tail, self.next_tail = self.next_tail, self.tail
        self.n += length

    def state(self):
        """All bytes that count."""
        tail = np.ascontiguousarray(self.tail[:, :, :, : self.n % self.unit])
        return self.pages.data.tobytes() + self.pages.firsts.tobytes() + tail.tobytes() * self.buffered


def expect(stored, layer, k, v):
    """The pages that a sequence of these rows has, all else poisoned; asserts the tail and the first tokens."""
    right = stored.pages.blank()
    (right.write if stored.buffered else right.write_widened)(stored.table, layer, k, v)
    if stored.buffered:
        assert np.array_equal(stored.pages.firsts, right.firsts), "the first tokens"
        begin = len(k) // stored.unit * stored.unit
        for which, rows in enumerate((k, v)):
            tail = oracle.encode(rows[begin:], "bfloat16").transpose(1, 0, 2)
            assert np.array_equal(stored.tail[layer, which, :, : len(k) - begin], tail), "the tail"
        assert (stored.tail[1 - layer] == 0xFFFF).all(), "another layer's tail was written"
    return right.data


@scaled
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim, page_size", [(4, 2, 64, 48), (3, 1, 6, 16), (5, 5, 40, 32), (2, 1, 80, 512)])
def test_append_against_oracle(ctx, rng, dtype, buffered, heads, kv_heads, head_dim, page_size, narrow):
    """Continuations inside a block, to its end, and over blocks and pages; decode rows that begin a block, are in one, and end one."""
    layer = 1
    shapes = [(5, 7, True), (5, 11, True), (0, 16, True), (9, 90, True), (0, 1, True), (32, 20, True), (15, 1, False), (16, 1, False)]
    for before, length, prompt in [*shapes, (23, 1, False), (47, 1, False), (2, 1, False), (63, 1, False), (1, 200, True), (64, 65, True)]:
        stored = Stored(rng, before + length, kv_heads, head_dim, page_size, dtype, buffered, narrow=narrow)
        k, v = (uneven(rng, before + length, kv_heads, head_dim) for _ in range(2))
        if before:
            stored.append(ctx, k[:before], v[:before], layer)
        angle = rng.uniform(0, 1000, (length, head_dim // 2))
        q, tail = normal(rng, length, heads, head_dim), stored.tail.copy()
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        rows, item = k[before:].copy(), stored.item(0, length, prompt)
        ctx.rope_append(q, rows, v[before:], cos, sin, **stored.pages.where, layer=layer, items=[item])
        k[before:] = rows  # rotated
        if prompt and before // stored.unit != (before + length) // stored.unit:
            assert np.array_equal(stored.tail, tail), "rows past the stretch touch the old tail: a step that fails could not be undone"
        stored.commit(length)
        data = expect(stored, layer, k, v)
        assert np.array_equal(stored.pages.data, data), f"{length} rows after {before}, prompt {prompt}"


@scaled
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_cuts_change_no_byte(ctx, one_thread, rng, dtype, buffered):
    n, kv_heads, head_dim = 150, 2, 24
    k, v = (uneven(rng, n, kv_heads, head_dim) for _ in range(2))
    whole = Stored(np.random.default_rng(1), n, kv_heads, head_dim, 48, dtype, buffered)
    for layer in range(2):
        whole.append(ctx, k, v, layer, commit=layer == 1)
    for trial in range(12):
        piece = Stored(np.random.default_rng(1), n, kv_heads, head_dim, 48, dtype, buffered)
        while piece.n < n:
            stop = min(n, piece.n + (int(rng.choice([1, 2, 15, 16, 17, 40])) if trial else 1))
            rows = slice(piece.n, stop)
            prompt = stop - piece.n > 1 or rng.random() < 0.3
            for layer in range(2):
                piece.append(one_thread if trial % 2 else ctx, k[rows], v[rows], layer, prompt, commit=layer == 1)
        assert piece.state() == whole.state(), trial


@scaled
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_all_instruction_sets_write_the_same(ctx, dtype, buffered):
    """Hard values too: zeros of both signs, subnormals, the largest, infinities, NaN of both signs."""
    from llmcoopt import _core

    hard = np.array([0, -0.0, 1e-40, -1e-45, 3e38, -3.3e38, 1e-30, np.inf, -np.inf, np.nan, -np.nan], np.float32)
    for head_dim in (2, 6, 40, 128):
        states = []
        for context in (ctx, _core.OpContext(isa="ref")):
            local = np.random.default_rng(head_dim)
            stored = Stored(local, 400, 2, head_dim, 64, dtype, buffered)
            rows = [uneven(local, 400, 2, head_dim) for _ in range(2)]
            for a in rows:
                a[64:] = np.where(local.random(a[64:].shape) < 0.3 / head_dim, local.choice(hard, a[64:].shape), a[64:])
                a[32:48] = hard[local.integers(0, 4, a[32:48].shape)]
            stored.append(context, *rows, 0)
            states.append((stored.pages.data, stored.state()))
        assert np.array_equal(states[0][0], states[1][0]), head_dim
        assert states[0][1] == states[1][1], head_dim


def within(largest):
    """All bfloat16 values within +-largest, 62 in each row beside the largest: every scale is 1."""
    values = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.abs(values) <= largest]  # no NaN
    rows = np.zeros((-(-len(values) // 62 // BLOCK) * BLOCK, 62), np.float32)
    rows.reshape(-1)[: len(values)] = values
    return np.concatenate([np.full((len(rows), 1), largest), np.full((len(rows), 1), -largest), rows], axis=1, dtype=np.float32)


def written_values(ctx, rng, rows, dtype, buffered):
    """The codes of rows [tokens, d] as values of a sequence; their scales are 1."""
    stored = Stored(rng, len(rows), 1, rows.shape[1], 64, dtype, buffered, layers=1)
    stored.append(ctx, np.ones_like(rows[:, None]), rows[:, None], 0)
    blocks = [stored.pages.block(stored.table, 0, 1, t) for t in range(0, len(rows), BLOCK)]
    assert all((scales == 1).all() for _, scales in blocks)
    return np.concatenate([codes[0] for codes, _ in blocks])


LARGEST = {"fp8_e4m3": 448, "fp8_e5m2": 57344, "int8": 127}


@scaled
def test_every_rounding(ctx, rng, dtype):
    rows = within(LARGEST[dtype])
    for values, buffered in ((rows, True), (-rows, False)):
        codes = written_values(ctx, rng, values, dtype, buffered)
        assert np.array_equal(codes, oracle.encode_scaled(values, np.float32(1), dtype))


@pytest.mark.parametrize("dtype, name", [("fp8_e4m3", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_codes_are_those_of_ml_dtypes(ctx, rng, dtype, name):
    kind = getattr(pytest.importorskip("ml_dtypes"), name)
    rows = within(LARGEST[dtype])
    assert np.array_equal(written_values(ctx, rng, rows, dtype, True), rows.astype(kind).view(np.uint8))
    numbers, codes = oracle.code_values(dtype), np.arange(256, dtype=np.uint8)
    finite = ~np.isnan(numbers)
    assert np.array_equal(codes.view(kind).astype(np.float64)[finite], numbers[finite])


class Case:
    """A sequence in randomly placed pages, layer 1 of 2, written by the oracle, and queries for every position."""

    def __init__(self, rng, tokens, heads=4, kv_heads=2, head_dim=64, page_size=64, dtype="fp8_e4m3", buffered=True, size=1.0, buffer=None):
        n = -(-tokens // page_size)
        buffer = buffer or (oracle.widest(page_size), 4)
        self.pages = oracle.CodedPages(n + 3, 2, kv_heads, head_dim, page_size, dtype, *buffer)
        self.table = rng.permutation(n + 3)[:n].astype(np.int32)
        k, v = (uneven(rng, tokens, kv_heads, head_dim) / 64 + normal(rng, tokens, kv_heads, head_dim) for _ in range(2))
        k, v = k * np.float32(size), v * np.float32(size)
        (self.pages.write if buffered else self.pages.write_widened)(self.table, 1, k, v)
        self.bits = [oracle.encode(a, "bfloat16") for a in (k, v)]
        self.k, self.v = (oracle.decode(a, "bfloat16") for a in self.bits)
        self.coded = self.pages.read(self.table, 1, tokens)
        self.q = normal(rng, tokens, heads, head_dim) / np.float32(max(size, 1))
        self.scale, self.buffered, self.poison, self.sinks = head_dim**-0.5, buffered, 0xFF, 0

    def hide(self, end):
        """Pages as they are when only blocks before position `end` have codes: the rest is poison. So are codes that nobody reads."""
        pages = self.pages.blank()
        pages.data[:] = self.pages.data
        pages.firsts[:] = self.pages.firsts
        if self.buffered and end:
            pages.page(self.table[0])[1, :, :, : pages.n_first] = self.poison
        for t in range(-(-end // BLOCK) * BLOCK, len(self.table) * pages.page_size, BLOCK):
            for which in (0, 1):
                codes, scales = pages.block(self.table, 1, which, t)
                codes[:] = self.poison
                scales.view(np.uint32)[:] = self.poison * 0x01010101
        return pages.where

    def item(self, row, length, pos, prompt):
        unit, end = self.pages.residual, pos + length
        table, first = self.table[: -(-end // self.pages.page_size)].copy(), pos // unit
        if not self.buffered:
            return table, row, length, pos, prompt
        blocks = np.full(((end - 1) // unit - first + 1, *self.pages.tail_shape[1:]), self.poison * 0x0101, np.uint16)
        for which, rows in enumerate(self.bits):
            for t in range(first * unit, end):
                blocks[t // unit - first, which, :, t % unit] = rows[t]
        tail = np.full(self.pages.tail_shape, self.poison * 0x0101, np.uint16)
        if not prompt:
            tail[1], blocks = blocks[0], np.full_like(blocks, self.poison * 0x0101)
        return table, row, length, pos, prompt, *(a.reshape(-1).view(np.uint8) for a in (tail, np.full_like(tail, 0xFFFF), blocks))

    def run(self, ctx, q, items, window=0, coded=None):
        out = np.full_like(q, np.nan)
        where = self.hide(coded) if coded is not None else self.pages.where
        how = {"scale": self.scale, "window": window, "sinks": self.sinks}
        ctx.attention(out, q, n_kv_heads=self.pages.n_kv_heads, **where, layer=1, items=items, **how)
        return out

    def rows(self, ctx, pos, length, prompt, window=0):
        """Output of the rows at positions pos.., as one item; blocks that they need not as codes are poisoned."""
        unit = self.pages.residual
        coded = (pos + length - 1) // unit * unit if self.buffered else pos + length
        return self.run(ctx, self.q[pos : pos + length].copy(), [self.item(0, length, pos, prompt)], window, coded)

    def check(self, ctx, pos, length, prompt, window=0):
        end = pos + length
        coded, sight = [a[:end] for a in self.coded], (window, self.sinks)
        if self.buffered:
            buffer = self.pages.residual, self.pages.n_first
            wanted = oracle.attention_buffered(self.q[pos:end], coded, (self.k[:end], self.v[:end]), pos, self.scale, *sight, *buffer)
        else:
            wanted = oracle.attention(self.q[pos:end], *coded, pos, self.scale, *sight)
        oracle.assert_close(self.rows(ctx, pos, length, prompt, window), wanted[0], BOUND * wanted[1])


both = pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])


@scaled
@both
@pytest.mark.parametrize("heads, kv_heads", RATIOS)
def test_head_ratios(ctx, rng, heads, kv_heads, dtype, buffered):
    case = Case(rng, 112, heads, kv_heads, dtype=dtype, buffered=buffered)
    case.check(ctx, 108, 1, prompt=False)
    case.check(ctx, 0, 110, prompt=True)


@scaled
@pytest.mark.parametrize("head_dim", [2, 6, 40, 64, 80, 128, 256])
def test_head_sizes(ctx, rng, head_dim, dtype):
    case = Case(rng, 96, 3, 1, head_dim, 48, dtype)
    case.check(ctx, 93, 1, prompt=False)
    case.check(ctx, 30, 60, prompt=True)
    Case(rng, 96, 1, 1, head_dim, 48, dtype).check(ctx, 95, 1, prompt=False)


@both
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 80, 112, 512])
def test_page_sizes(ctx, rng, page_size, buffered):
    case = Case(rng, 1200, 2, 2, 16, page_size, "int8", buffered)
    for pos in (0, 15, 16, 511, 512, 543, 1199):
        case.check(ctx, pos, 1, prompt=False)
    case.check(ctx, 1000, 130, prompt=True)


@scaled
@pytest.mark.parametrize("residual, n_first", [(16, 0), (16, 16), (32, 0), (32, 1), (64, 0), (64, 4), (64, 16)])
def test_stretches_and_first_tokens(ctx, rng, dtype, residual, n_first):
    case = Case(rng, 400, 6, 2, 40, 64, dtype, buffer=(residual, n_first))
    for pos in (0, 3, 31, 32, 63, 64, 65, 127, 128, 399):
        case.check(ctx, pos, 1, prompt=False)
    for window in (0, 3, 66, 98, 350):  # 98: of position 100 it begins among the first tokens
        for case.sinks in (0, 2, 9):
            case.check(ctx, 0, 140, prompt=True, window=window)
            for pos in (40, 90, 352):
                case.check(ctx, pos, 1, prompt=False, window=window)
            case.check(ctx, 100, 60, prompt=True, window=window)


@scaled
def test_starts_inside_blocks(ctx, rng, dtype):
    case = Case(rng, 176, 5, 1, 24, 32, dtype)
    for pos in (0, 1, 15, 16, 17, 63, 100):
        case.check(ctx, pos, 1, prompt=False)
        for length in (1, 2, 15, 16, 17, 70):
            case.check(ctx, pos, length, prompt=True)


@both
@pytest.mark.parametrize("window", [1, 5, 16, 17, 64, 100, 10_000])
def test_window(ctx, rng, window, buffered):
    case = Case(rng, 320, 4, 2, 32, 32, "fp8_e5m2", buffered)
    for pos in (0, 98, 99, 100, 303, 319):
        case.check(ctx, pos, 1, False, window)
    case.check(ctx, 0, 130, True, window)
    case.check(ctx, 250, 60, True, window)


@scaled
@both
def test_unwritten_bytes_do_not_matter(ctx, rng, dtype, buffered):
    """Whatever lies in codes, scales and tails that no row has reached: the same bits come out."""
    case = Case(rng, 80, 3, 1, 40, 32, dtype, buffered)
    for pos, length, prompt in ((37, 1, False), (64, 1, False), (5, 30, True), (32, 17, True)):
        results = []
        for case.poison in (0xFF, 0x00, 0x7F, 0x41):
            results.append(case.rows(ctx, pos, length, prompt))
        assert np.isfinite(results[0]).all()
        assert all(np.array_equal(results[0], other) for other in results[1:]), (pos, length, prompt)


@scaled
@pytest.mark.parametrize("window", [0, 45])
@pytest.mark.parametrize("heads, kv_heads", [(3, 1), (2, 2)])
def test_prompt_rows_do_not_depend_on_chunks_or_threads(ctx, one_thread, rng, heads, kv_heads, window, dtype):
    tokens = 240
    case = Case(rng, tokens, heads, kv_heads, 24, 48, dtype)
    whole = case.rows(ctx, 0, tokens, True, window)
    assert np.array_equal(case.rows(one_thread, 0, tokens, True, window), whole)
    for step in (7, 16, 64):
        pieces = [case.rows(ctx, pos, min(step, tokens - pos), True, window) for pos in range(0, tokens, step)]
        assert np.array_equal(np.concatenate(pieces), whole), f"chunks of {step}"


@scaled
@pytest.mark.parametrize("heads, kv_heads", [(5, 5), (8, 2)])
def test_rows_do_not_depend_on_the_batch(ctx, one_thread, rng, heads, kv_heads, dtype):
    case = Case(rng, 1200, heads, kv_heads, 16, 16, dtype)
    shapes = [(40, 100, True), (5, 33, True), (1199, 1, False), (513, 1, False), (0, 1, False), (800, 1, False)]
    ends = np.cumsum([length for _, length, _ in shapes])
    q = np.concatenate([case.q[pos : pos + length] for pos, length, _ in shapes])
    items = [case.item(int(end) - length, length, pos, prompt) for end, (pos, length, prompt) in zip(ends, shapes, strict=True)]
    for window in (0, 300):
        together = case.run(ctx, q, items, window)
        for end, (pos, length, prompt) in zip(ends, shapes, strict=True):
            assert np.array_equal(case.rows(one_thread, pos, length, prompt, window), together[end - length : end]), (pos, length, prompt)


@scaled
@both
@pytest.mark.parametrize("at", [0, 7, 15, 40])
def test_a_bad_key_or_value_shows(ctx, rng, dtype, buffered, at):
    """NaN in a key or value comes out as NaN, from codes and from 16 bit, never as a number. An infinity too, once it is a code."""
    for which, value in itertools.product((0, 1), (np.nan, -np.nan, np.inf, -np.inf)):
        rows = [normal(rng, 42, 1, 64) for _ in range(2)]
        rows[which][at, 0, 5] = value
        stored = Stored(rng, 42, 1, 64, 16, dtype, buffered)
        stored.append(ctx, *rows, 1)
        found, q, stored.n = np.zeros((1, 2, 64), np.float32), normal(rng, 1, 2, 64), 41  # the query's own key is in the cache already
        ctx.attention(found, q, n_kv_heads=1, **stored.pages.where, layer=1, items=[stored.item(0, 1, False)], scale=0.125)
        found = found[..., 5]
        if buffered and at == 40 and np.isinf(value):  # still in 16 bit
            assert which == 0 or (found == value).all()
        else:
            assert np.isnan(found).all(), (which, value, found)


@scaled
@both
@pytest.mark.parametrize("size", [1e-30, 1e-6, 300, 1e5, 1e12, 1e30])
def test_sizes_of_values(ctx, rng, dtype, buffered, size):
    """Keys and values of any size that bfloat16 holds: scales follow. Queries are as small as keys are large."""
    case = Case(rng, 64, 2, 1, 32, 32, dtype, buffered, size)
    case.check(ctx, 63, 1, prompt=False)
    case.check(ctx, 20, 40, prompt=True)


@scaled
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 80), (5, 1, 72)])
@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
def test_queries_and_neighbours_of_any_size(ctx, rng, dtype, heads, kv_heads, head_dim, size):
    """Queries as large as keys are small, or the other way round; values of every other block 2^40 times their neighbours'. The query points
    at one key, so that the output is a value of a small block, or of a large one."""
    case = Case(rng, 320, heads, kv_heads, head_dim, 64, dtype)
    small = np.where(np.arange(320) // BLOCK % 2, 2.0**20, 2.0**-20).astype(np.float32)[:, None, None]
    k, v = normal(rng, 320, kv_heads, head_dim) * np.float32(size), normal(rng, 320, kv_heads, head_dim) * small
    case.pages.write(case.table, 1, k, v)
    case.bits = [oracle.encode(a, "bfloat16") for a in (k, v)]
    case.k, case.v = (oracle.decode(a, "bfloat16") for a in case.bits)
    case.coded = case.pages.read(case.table, 1, 320)
    for pos, key in itertools.product((319, 300), (3, 21, 256)):
        towards = (case.coded[0][key] / np.float32(size)).repeat(heads // kv_heads, axis=0)
        case.q[pos] = towards / np.square(towards).sum(-1, keepdims=True) * np.float32(60 / case.scale / size)
        case.check(ctx, pos, 1, prompt=False)
        found = np.abs(case.rows(ctx, pos, 1, prompt=False)).max()
        assert (found > 1) == (key // BLOCK % 2 == 1), "the query does not point at the key"


@scaled
def test_zeros_set_no_scale(ctx, rng, dtype):
    """Unbuffered: a row of zeros (of a padding token, say) at a block's start must not coarsen the rows after it."""
    rows = normal(rng, 16, 1, 64) / 50
    rows[0] = 0
    stored = Stored(rng, 16, 1, 64, 16, dtype, buffered=False)
    stored.append(ctx, rows, rows, 1)
    step = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int8": 3 / 127}[dtype]
    for found in stored.pages.read(stored.table, 1, 16):
        assert np.abs(found - rows).max() <= step * np.abs(rows).max()


def test_items_with_and_without_tails_are_refused(isa, run_script):
    run_script(
        """
import sys
import numpy as np
from llmcoopt import _core
ctx, q = _core.OpContext(isa=sys.argv[1]), np.zeros((2, 1, 16), np.float32)
table, tail, angle = np.zeros(1, np.int32), np.zeros(4096, np.uint8), np.zeros((2, 8), np.float32)
plain, tailed = (table, 0, 1, 0, True), (table, 1, 1, 0, True, tail, tail, tail)
for items in ([tailed, plain], [plain, tailed]):
    for call in (
        lambda: ctx.rope_append(q, q.copy(), q, angle, angle, np.zeros(4096, np.uint8), "int8", 16, 1, 0, items),
        lambda: ctx.attention(q.copy(), q, np.zeros(4096, np.uint8), "int8", 16, 1, 1, 0, items, 1.0),
    ):
        try:
            call()
        except ValueError as error:
            assert "the fields of an item" in str(error), error
        else:
            raise AssertionError(f"not refused: {[len(item) for item in items]}")
short = (*plain[:5], tail, tail[:10], tail)
try:
    ctx.attention(q.copy(), q, np.zeros(4096, np.uint8), "int8", 16, 1, 1, 0, [short], 1.0)
except ValueError as error:
    assert "next_tail is 10" in str(error), error
else:
    raise AssertionError("a short tail was taken")
""",
        isa,
    )

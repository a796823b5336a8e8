"""Pages in a spill file: the same bits wherever they lie, and errors of the file that end no more than the sequence they belong to."""

import os
import resource

import numpy as np
import pytest

import llmcoopt
from llmcoopt.cache import DTYPES
from llmcoopt.errors import ArgumentError, OutOfPagesError, StorageError

IDS = np.random.default_rng(5).integers(0, 2048, 2000).tolist()
PAGE = 16


@pytest.fixture(scope="module")
def model():
    with llmcoopt.Model.from_pretrained("tiny", threads=2) as model:
        yield model


def page_bytes(model, dtype):
    with llmcoopt.KVCache(model, dtype, page_size=PAGE, max_tokens=64) as cache:
        return cache.stats()["page_bytes"]


@pytest.fixture
def small(model, tmp_path):
    """small(dtype, pages): a cache that keeps that many pages in memory and the others in a file of tmp_path."""
    made = []

    def make(dtype="fp8_e4m3", pages=6, **options):
        options = {"max_tokens": 16 * 512, "spill_path": tmp_path} | options
        cache = llmcoopt.KVCache(model, dtype, page_size=PAGE, host_bytes=pages * page_bytes(model, dtype), **options)
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()
    assert list(tmp_path.iterdir()) == [], "a spill file was left"


def run(model, cache, n=700, new=40):
    """Logits of a prompt and of single tokens after it, whose pages lie all over."""
    sequence = cache.sequence()
    prompt = model.forward(IDS[:n], sequence, last_only=True)
    steps = [model.forward([i], sequence)[0] for i in IDS[n : n + new]]
    return np.stack([prompt, *steps])


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_where_pages_lie(model, small, dtype):
    with llmcoopt.KVCache(model, dtype, page_size=PAGE, max_tokens=1024) as cache:
        expected = run(model, cache)
    cache = small(dtype)
    assert np.array_equal(run(model, cache), expected)
    stats = cache.stats()
    assert stats["pages_spilled"] >= 40 and stats["slices_fetched"] > 0
    assert stats["resident_bytes"] <= 6 * stats["page_bytes"] + 50 * os.sysconf("SC_PAGE_SIZE")  # edges of pages share the system's pages
    cache.check()


def test_every_instruction_set(isa, tmp_path):
    with llmcoopt.Model.from_pretrained("tiny", threads=2, isa=isa) as model:
        for dtype in ("bfloat16", "int8"):
            with llmcoopt.KVCache(model, dtype, page_size=PAGE, max_tokens=1024) as cache:
                expected = run(model, cache, 300, 5)
            size = 5 * page_bytes(model, dtype)
            with llmcoopt.KVCache(model, dtype, page_size=PAGE, max_tokens=1024, host_bytes=size, spill_path=tmp_path) as cache:
                assert np.array_equal(run(model, cache, 300, 5), expected)
                assert cache.stats()["pages_spilled"] > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3"])
def test_a_prompt_reads_pages_that_are_away_a_few_times(model, small, dtype):
    """Its rows share them, not only those that share converted keys."""
    if model.isa == "ref":
        pytest.skip("the portable operators read every page for every row")
    cache = small(dtype, pages=36)
    sequence = cache.sequence()
    model.forward(IDS[:520], sequence, last_only=True)
    model.forward(IDS[520:1020], sequence, last_only=True)
    stats = cache.stats()
    slices = stats["pages_away"] * model.config.num_hidden_layers * model.config.num_key_value_heads
    assert 0 < stats["slices_fetched"] <= 4 * slices


def test_a_batch_and_forks(model, small):
    prompts = [IDS[i : i + 150 + 31 * i] for i in range(5)]
    options = {"max_new_tokens": 30, "ignore_eos": True}
    with llmcoopt.KVCache(model, "fp8_e4m3", page_size=PAGE, max_tokens=8192) as cache:
        expected = model.generate(prompts, cache=cache, **options)
    cache = small(pages=20)
    assert model.generate(prompts, cache=cache, **options) == expected
    assert cache.stats()["pages_spilled"] > 20
    cache.check()

    sequence = cache.sequence()
    model.forward(IDS[:600], sequence)
    fork = sequence.fork()
    assert np.array_equal(model.forward(IDS[600:650], fork), model.forward(IDS[600:650], sequence))
    fork.truncate(325)  # an old page comes back to be written
    assert cache.stats()["pages_away"] > 0
    model.forward(IDS[:3], fork)
    cache.check()
    fork.free()
    sequence.free()
    stats = cache.stats()
    assert stats["pages_away"] == 0 and stats["pages_free"] == stats["pages_total"]


def test_sequences_not_in_use_give_their_memory_first(model, small):
    cache = small(pages=12)
    old, new = cache.sequence(), cache.sequence()
    model.forward(IDS[:100], old)
    model.forward(IDS[:150], new)
    assert cache.stats()["pages_away"] == 5  # 7 + 10 pages, all that went are the old one's, but for the page rows go to
    before = cache.stats()["slices_fetched"]
    model.forward(IDS[:1], new)
    assert cache.stats()["slices_fetched"] == before
    for i in range(12):  # and it gets them back when it is used
        model.forward([i], old)
    before = cache.stats()["slices_fetched"]
    model.forward(IDS[:1], old)
    assert cache.stats()["slices_fetched"] == before and cache.stats()["pages_restored"] > 0


def test_read_back(model, small):
    cache = small()
    sequence = cache.sequence()
    model.forward(IDS[:500], sequence)
    with llmcoopt.KVCache(model, "fp8_e4m3", page_size=PAGE, max_tokens=1024) as plain:
        other = plain.sequence()
        model.forward(IDS[:500], other)
        for layer in range(4):
            assert all(np.array_equal(a, b) for a, b in zip(sequence.kv(layer), other.kv(layer), strict=True))


def spill_file(cache):
    """Its open file: it has no name."""
    links = [(int(fd), os.readlink(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
    return next(fd for fd, link in links if str(cache.spill_path) in link)


def test_a_file_cut_short_is_an_error_of_its_sequence(model, small):
    cache = small(pages=12)
    victim, other = cache.sequence(), cache.sequence()
    model.forward(IDS[:500], victim)
    model.forward(IDS[:20], other)
    expected = model.forward(IDS[500:501], victim.fork())
    os.ftruncate(spill_file(cache), 3 * cache.stats()["page_bytes"] + 100)
    held = len(victim)
    with pytest.raises(StorageError, match=r"tokens 48 to 63 .*spill file.*ends before it.*truncate it before them"):
        model.forward(IDS[500:501], victim)
    assert len(victim) == held
    with pytest.raises(StorageError):
        victim.kv(0)
    model.forward(IDS[20:40], other)
    cache.check()
    generation = llmcoopt.generate(model, IDS[:5], sequence=victim, max_new_tokens=3)
    with pytest.raises(StorageError):
        generation.run()
    assert generation.finish_reason == "error" and len(victim) == held
    victim.truncate(48)
    model.forward(IDS[48:500], victim)
    assert np.array_equal(model.forward(IDS[500:501], victim), expected)


def test_a_full_disk_loses_nothing(model, small, monkeypatch):
    cache = small()
    sequence = cache.sequence()
    model.forward(IDS[:80], sequence)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.stats()["page_bytes"] // 2, limit[1]))
    try:
        import signal

        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(
            StorageError, match=r"could not be written to the spill file .*make room there, raise host_bytes or free sequences"
        ):
            model.forward(IDS[80:140], sequence)
        signal.signal(signal.SIGXFSZ, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(sequence) == 80
    cache.check()
    found = model.forward(IDS[80:140], sequence)
    with llmcoopt.KVCache(model, "fp8_e4m3", page_size=PAGE, max_tokens=1024) as plain:
        other = plain.sequence()
        model.forward(IDS[:80], other)
        assert np.array_equal(found, model.forward(IDS[80:140], other))


def test_more_than_memory_allows_at_once(model, small):
    cache = small(pages=5)
    sequences = [cache.sequence() for _ in range(3)]
    for sequence in sequences:
        model.forward(IDS[:200], sequence)
    prompts = [IDS[:40]] * 8  # each needs a page in memory: some wait, none fails
    with llmcoopt.KVCache(model, "fp8_e4m3", page_size=PAGE, max_tokens=1024) as plain:
        expected = model.generate(prompts[:1], cache=plain, max_new_tokens=20, ignore_eos=True)
    assert model.generate(prompts, cache=cache, max_new_tokens=20, ignore_eos=True) == expected * 8


def test_memory_for_all_pages_of_a_small_cache(model, tmp_path):
    """A file that is never needed bounds nothing, not even where the cache has fewer pages than a bound may have."""
    for pages in (1, 2, 3, 4):
        size = pages * page_bytes(model, "int8")
        with llmcoopt.KVCache(model, "int8", page_size=PAGE, max_tokens=pages * PAGE, host_bytes=size, spill_path=tmp_path) as cache:
            assert model.forward(IDS[: pages * PAGE], cache.sequence()).shape[0] == pages * PAGE
            cache.check()


def test_named_files(model, tmp_path):
    path = tmp_path / "cache.bin"
    size = 6 * page_bytes(model, "int8")
    with llmcoopt.KVCache(model, "int8", page_size=PAGE, max_tokens=4096, host_bytes=size, spill_path=path) as cache:
        model.forward(IDS[:300], cache.sequence())
        assert path.stat().st_size > 0 and path.stat().st_mode & 0o077 == 0
        assert str(path) in repr(cache) and str(path) in cache._repr_html_()
        with pytest.raises(StorageError, match=r"spill_path = .*cache.bin': File exists; expected a folder, or the name of a file"):
            llmcoopt.KVCache(model, "int8", host_bytes=1 << 30, spill_path=path)
    assert not path.exists()


def test_wrong_options(model, tmp_path):
    with pytest.raises(StorageError, match=r"spill_path = '/nowhere/x': No such file"):
        llmcoopt.KVCache(model, "auto", spill_path="/nowhere/x")
    for bad in (0, -1, True, 1.5, "1"):
        with pytest.raises(ArgumentError, match="host_bytes = "):
            llmcoopt.KVCache(model, "auto", host_bytes=bad, spill_path=tmp_path)
    with pytest.raises(ArgumentError, match=r"host_bytes = 1000 is room for 0 pages of \d+ bytes, expected at least 4 pages"):
        llmcoopt.KVCache(model, "auto", host_bytes=1000, spill_path=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_host_bytes_alone_bound_the_cache(model):
    size = page_bytes(model, "int8")
    with llmcoopt.KVCache(model, "int8", page_size=PAGE, max_tokens=1 << 20, host_bytes=10 * size + 5) as cache:
        assert cache.stats()["pages_total"] == 10
        with pytest.raises(OutOfPagesError, match=r"raise max_tokens .* and host_bytes, give a spill_path, or free sequences"):
            model.forward(IDS[:170], cache.sequence())

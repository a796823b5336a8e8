import numpy as np
import oracle
import pytest


@pytest.mark.parametrize("dtype", oracle.DTYPES)
def test_rows_are_exact(ctx, rng, dtype):
    table = oracle.encode(rng.standard_normal((50, 37)), dtype)
    ids = rng.integers(0, 50, 100).astype(np.int32)
    out = np.empty((100, 37), np.float32)
    ctx.embed(out, ids, table, dtype)
    assert np.array_equal(out, oracle.embed(ids, table, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_half_values(ctx, dtype):
    codes = np.arange(65536, dtype=np.uint16).reshape(-1, 256)
    out = np.empty((256, 256), np.float32)
    ctx.embed(out, np.arange(256, dtype=np.int32), codes, dtype)
    assert np.array_equal(out, oracle.decode(codes, dtype), equal_nan=True)
    assert np.array_equal(np.signbit(out), np.signbit(oracle.decode(codes, dtype)))


def test_table_beyond_four_gib(ctx, tmp_path):
    table = np.memmap(tmp_path / "sparse", np.uint16, "w+", shape=(140_000, 16_384))  # 4.6e9 bytes, 4 KiB of them on disk
    table[139_999, 5] = 0x3F80
    out = np.empty((1, 16_384), np.float32)
    ctx.embed(out, np.array([139_999], np.int32), table, "bfloat16")
    assert out[0, 5] == 1 and np.count_nonzero(out) == 1


def test_refusals(ctx):
    table, out = np.zeros((4, 8), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match="an element of ids is 4, expected a row of table"):
        ctx.embed(out, np.array([4], np.int32), table, "float32")
    with pytest.raises(ValueError, match="an element of ids is -1"):
        ctx.embed(out, np.array([-1], np.int32), table, "float32")
    with pytest.raises(ValueError, match="axis 1 of out is 8, expected 9"):
        ctx.embed(out, np.array([0], np.int32), np.zeros((4, 9), np.float32), "float32")
    with pytest.raises(ValueError, match="dtype = 'float64', expected float32, float16 or bfloat16"):
        ctx.embed(out, np.array([0], np.int32), table, "float64")
    with pytest.raises(ValueError, match="table holds elements of buffer format 'f', expected 'H'"):
        ctx.embed(out, np.array([0], np.int32), table, "float16")

"""What this machine can do at most: reading from memory and multiplying, on one thread and on all.

`python benchmarks/roofline.py` prints a table, `--json` the same for programs. benchmarks/ops.py divides by these figures. The loops are in
roofline.c, compiled on first use into a temporary folder. The reading base is the best of a plain loop and of loops with software prefetch.
"amx bf16" multiplies tiles that are in registers, the unit's own peak; "from L1" loads a tile for every product, as a product of matrices must.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

UNITS = ("avx2 f32", "avx512 f32", "avx512 bf16", "amx bf16", "amx bf16 from L1")
AHEAD = (0, 1024, 2048, 4096, 8192)  # bytes of software prefetch tried
READ_BYTES = 512 << 20  # far more than any last-level cache share we meet
TRIES = 5


def cpu_count() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops of roofline.c. SystemExit with one sentence when there is no compiler."""
    source = Path(__file__).with_name("roofline.c")
    command = os.environ.get("CC", "").split() or next(([c] for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if not command:
        sys.exit("roofline needs a C compiler: install one with 'apt-get install gcc' (Debian, Ubuntu) or set CC.")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "roofline.so")
        subprocess.run(
            [*command, "-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-Wno-psabi", str(source), "-o", str(target)], check=True
        )
        lib = ctypes.CDLL(str(target))
    lib.roofline_read.restype = lib.roofline_flops.restype = ctypes.c_double
    lib.roofline_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_int]
    lib.roofline_flops.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    return lib


def read_bandwidth(data: np.ndarray, threads: int, ahead: int = 0, tries: int = TRIES) -> float:
    """Bytes per second of reading `data` once, best of `tries`, with `ahead` bytes of software prefetch (0: none)."""
    return max(library().roofline_read(data.ctypes.data, data.nbytes, ahead, threads) for _ in range(tries))


def peak_flops(unit: str, threads: int, tries: int = TRIES) -> float:
    """Operations per second (a product and a sum are two) of one of UNITS; 0 when this CPU lacks it."""
    return max(library().roofline_flops(unit.encode(), 2_000_000, threads) for _ in range(tries))


def measure(threads: list[int], read_bytes: int = READ_BYTES) -> dict:
    """{"read": {threads: {ahead: bytes/s}}, "read_best": {threads: bytes/s}, "flops": {threads: {unit: op/s}}} with text keys, as JSON has them."""
    data = np.ones(read_bytes // 8)
    read = {str(t): {str(a): read_bandwidth(data, t, a) for a in AHEAD} for t in threads}
    flops = {str(t): {unit: rate for unit in UNITS if (rate := peak_flops(unit, t)) > 0} for t in threads}
    return {"read": read, "read_best": {t: max(rates.values()) for t, rates in read.items()}, "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, cpu_count()}), help="thread counts (default: 1 and all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    result = measure(options.threads)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    heads = "".join(f"{t:>8} thr" for t in options.threads)
    print(f"{'read, GB/s':<24}{heads}")
    for ahead in AHEAD:
        name = "plain" if ahead == 0 else f"prefetch {ahead} B ahead"
        print(f"{name:<24}" + "".join(f"{result['read'][str(t)][str(ahead)] / 1e9:>12.1f}" for t in options.threads))
    print(f"\n{'arithmetic, GFLOP/s':<24}{heads}")
    for unit in result["flops"][str(options.threads[0])]:
        print(f"{unit:<24}" + "".join(f"{result['flops'][str(t)][unit] / 1e9:>12.1f}" for t in options.threads))


if __name__ == "__main__":
    main()

"""The C tests: built by `python setup.py build_ctest`, each program run as one test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.c"))
COMPILER = (os.environ.get("CC", "").split() or [""])[0] or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)


@pytest.fixture(scope="session")
def built():
    """The folder of the built programs."""
    if not COMPILER or not shutil.which(COMPILER):
        pytest.skip("no C compiler: install one or set CC")
    done = subprocess.run([sys.executable, "setup.py", "build_ctest"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"the C tests do not build\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return ROOT / "build" / ("ctest-sanitize" if os.environ.get("LLMCOOPT_SANITIZE") else "ctest")


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(built, program):
    # Under a sanitizer the runtime may be preloaded for Python's sake; these programs carry their own.
    env = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "LLMCOOPT_ISA")}
    done = subprocess.run([built / program], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, f"{program}: exit status {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " 0 failed" in done.stdout, done.stdout

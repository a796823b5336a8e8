"""Building: missing tools are said in one sentence, and the extension keeps to the stable ABI."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llmcoopt

ROOT = Path(__file__).parents[2]
setup_py = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def call(expression, **env):
    code = f"import runpy, sys, setuptools; setuptools.setup = lambda **k: None; m = runpy.run_path('setup.py'); {expression}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


@setup_py
def test_missing_compiler_is_one_sentence():
    done = call("m['compiler']()", CC="no-such-compiler")
    assert done.returncode == 1 and "apt-get install gcc" in done.stderr and "Traceback" not in done.stderr


@setup_py
def test_missing_python_headers_is_one_sentence():
    done = call("m['sysconfig'].get_path = lambda name: '/nonexistent'; m['python_include']()")
    assert done.returncode == 1 and re.search(r"apt-get install python3\.\d+-dev", done.stderr) and "Traceback" not in done.stderr


@setup_py
def test_no_flags_of_the_build_machine():
    assert "-march=native" not in (ROOT / "setup.py").read_text()
    done = call("print(m['flags_for']('csrc/model/llama.c')); print(m['flags_for']('csrc/ops/avx512/linear_bf16.c'))")
    plain, special = done.stdout.splitlines()
    assert "-m" not in plain.replace("-fno-math", "") and "-mavx512bf16" in special


def test_extension_is_abi3():
    assert ".abi3." in llmcoopt._core.__file__

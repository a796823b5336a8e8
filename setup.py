"""Builds the extension llmcoopt._core (stable ABI: one wheel for every CPU and every CPython from 3.11).

Which instruction set a source may use is decided by its folder, in FLAGS below, and nowhere else; which of them runs is decided when a model is
loaded. `python setup.py build_ctest` builds the C tests. LLMCOOPT_SANITIZE=address,undefined builds either with sanitizers.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
COMMON = ["-std=c11", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=implicit"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mprfchw", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Longest matching path decides.
FLAGS = {
    "csrc": [],
    "csrc/ops/avx2": AVX2,
    "csrc/ops/avx512": AVX512,
    "csrc/ops/avx512/linear_bf16.c": [*AVX512, "-mavx512bf16"],
    "csrc/ops/amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
X86_ONLY = ("csrc/ops/avx2", "csrc/ops/avx512", "csrc/ops/amx")
LINK = ["-pthread", "-lm"]


def sources(python):
    """All C files of the core; those of csrc/python too when `python`."""
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c"))
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [p for p in found if (python or not p.startswith("csrc/python/")) and (x86 or not p.startswith(X86_ONLY))]


def flags_for(path):
    return COMMON + FLAGS[max((key for key in FLAGS if path.startswith(key)), key=len, default="csrc")] + sanitizers()


def sanitizers():
    kinds = os.environ.get("LLMCOOPT_SANITIZE")
    return [f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g"] if kinds else []


def compiler():
    """The C compiler, or one sentence on what to install."""
    command = os.environ.get("CC", "").split() or next(([c] for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if not command or not shutil.which(command[0]):
        sys.exit("llmcoopt needs a C compiler to build: install one with 'apt-get install gcc' (Debian, Ubuntu) or set CC.")
    return command


def python_include():
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"llmcoopt needs the Python headers ({include}/Python.h is missing): install them with 'apt-get install python{version}-dev'."
        )
    return include


def compile_all(paths, out_dir, extra):
    """Compiles what is older than its source, any header or this file; returns the objects."""
    headers = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"])

    def one(path):
        obj = Path(out_dir, path).with_suffix(".o")
        if obj.exists() and obj.stat().st_mtime > max(headers, (ROOT / path).stat().st_mtime):
            return str(obj)
        obj.parent.mkdir(parents=True, exist_ok=True)
        run([*compiler(), *flags_for(path), *extra, "-c", str(ROOT / path), "-o", str(obj)])
        return str(obj)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, paths))


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(f"this command failed:\n  {' '.join(command)}")


def object_dir(kind):
    return ROOT / "build" / f"{kind}{'-sanitize' if os.environ.get('LLMCOOPT_SANITIZE') else ''}"


class BuildExt(build_ext):
    def build_extension(self, ext):
        define = [*([] if sanitizers() else ["-DNDEBUG"]), "-DPy_LIMITED_API=0x030B0000", f"-I{python_include()}"]
        objects = compile_all(sources(python=True), object_dir("ext"), define)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")  # moved into place: a process that has the old file mapped keeps it
        run([*compiler(), "-shared", *sanitizers(), *objects, *LINK, "-o", str(fresh)])
        os.replace(fresh, target)


class BuildCTest(Command):
    description = "build the C tests into build/ctest"
    user_options: ClassVar[list] = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        out = object_dir("ctest")
        core = compile_all(sources(python=False), out, [])
        tests = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests/c").glob("test_*.c"))
        for path, obj in zip(tests, compile_all(tests, out, ["-UNDEBUG"]), strict=True):
            run([*compiler(), *sanitizers(), obj, *core, *LINK, "-o", str(out / Path(path).stem)])


setup(
    ext_modules=[Extension("llmcoopt._core", sources(python=True), py_limited_api=True)],
    cmdclass={"build_ext": BuildExt, "build_ctest": BuildCTest},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

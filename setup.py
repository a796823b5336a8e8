"""Builds the extension llmcoopt._core (stable ABI: one wheel for every CPU and every CPython from 3.11).

Which instruction set a source may use is decided by its folder, in FLAGS below, and nowhere else; which of them runs is decided when a model is
loaded. `python setup.py build_ctest` builds the C tests. LLMCOOPT_SANITIZE=address,undefined builds either with sanitizers.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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
    "csrc/ops/avx512/linear_quantized.c": [*AVX512, "-mavx512vnni"],
    "csrc/ops/amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
X86_ONLY = ("csrc/ops/avx2", "csrc/ops/avx512", "csrc/ops/amx")
LINK = ["-pthread", "-lm"]
OBJECTS = ROOT / "build/objects"
KEPT = 8  # objects of a source: the extension's and the tests', with sanitizers too, and those of another branch


def sources(python):
    """All C files of the core; those of csrc/python too when `python`."""
    found = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c"))
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [p for p in found if (python or not p.startswith("csrc/python/")) and (x86 or not p.startswith(X86_ONLY))]


def flags_for(path):
    return COMMON + FLAGS[max((key for key in FLAGS if path.startswith(key)), key=len, default="csrc")] + sanitizers()


def sanitizers():
    """-O1, the last one named: at -O3 the checks of attention's loops take the compiler minutes."""
    kinds = os.environ.get("LLMCOOPT_SANITIZE")
    return ["-O1", f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g"] if kinds else []


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


@cache
def compiler_version():
    return run([*compiler(), "--version"])


def compile_all(paths, extra):
    """Objects of these sources. They are named by what makes them - the text after the preprocessor, flags, compiler - and compiled where none
    of that name is there: so the extension and the C tests share those whose assertions and Python's macros don't matter."""

    def one(path):
        command = [*compiler(), *flags_for(path)]
        text = run([*command, *extra, "-E", str(ROOT / path)])
        digest = hashlib.sha256("\0".join([compiler_version(), *command, text]).encode()).hexdigest()
        obj = (OBJECTS / path).with_suffix(f".{digest[:16]}.o")
        if not obj.exists():
            obj.parent.mkdir(parents=True, exist_ok=True)
            fresh = obj.with_suffix(f".{os.getpid()}.new")  # moved into place: what has the name is whole
            run([*command, *extra, "-c", str(ROOT / path), "-o", str(fresh)])
            os.replace(fresh, obj)
        obj.touch()
        for old in sorted(obj.parent.glob(f"{obj.name.split('.')[0]}.*.o"), key=lambda p: p.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
        return str(obj)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, paths))


def run(command):
    """Runs it; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        sys.exit(f"this command failed:\n  {' '.join(command)}")
    return done.stdout


class BuildExt(build_ext):
    def build_extension(self, ext):
        define = [*([] if sanitizers() else ["-DNDEBUG"]), "-DPy_LIMITED_API=0x030B0000", f"-I{python_include()}"]
        objects = compile_all(sources(python=True), define)
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
        out = ROOT / "build" / ("ctest-sanitize" if sanitizers() else "ctest")
        out.mkdir(parents=True, exist_ok=True)
        tests = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests/c").glob("test_*.c"))
        core = sources(python=False)
        objects = compile_all([*core, *tests], ["-UNDEBUG"])

        def link(path, obj):
            run([*compiler(), *sanitizers(), obj, *objects[: len(core)], *LINK, "-o", str(out / Path(path).stem)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(link, tests, objects[len(core) :]))


setup(
    ext_modules=[Extension("llmcoopt._core", sources(python=True), py_limited_api=True)],
    cmdclass={"build_ext": BuildExt, "build_ctest": BuildCTest},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""The rules of the tree: where code may stand, how long it may be, what it may call. docs/design.md section 8 says why."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
C_FILES = sorted(p for suffix in ("*.c", "*.h") for p in (ROOT / "csrc").rglob(suffix))
CUDA_FILES = sorted(p for suffix in ("*.cu", "*.cuh") for p in (ROOT / "kernels").rglob(suffix))
PYTHON_FILES = sorted((ROOT / "llmcoopt").rglob("*.py"))
ALL_CODE = C_FILES + CUDA_FILES + PYTHON_FILES + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.[ch]"))
LONGEST_FILE, LONGEST_FUNCTION = 800, 80
# A layer may include its own files and those of the layers named here.
INCLUDES = {
    "base": set(),
    "ops": {"base"},
    "kv": {"base", "ops"},
    "quant": {"base", "ops"},
    "model": {"base", "ops", "kv"},
    "engine": {"base", "ops", "kv", "model"},
    "python": {"base", "ops", "model", "quant", ""},
    "": {"engine", "kv", "model"},
}
# Python modules from low to high: a module imports modules of lower rank only (or of its own package).
RANKS = [
    ["errors", "_version", "_core"],
    ["_arrays", "_limits", "config", "reference", "reference_quant", "taps"],
    ["loaders"],
    ["text"],
    ["chat", "streaming"],
    ["tokenizer"],
    ["layer_types", "cache_file"],
    ["cache"],
    ["generation"],
    ["model"],
    ["damage"],
    ["dtype_choice", "quantizer"],
    ["chat_session"],
    ["demo"],
    ["cli"],
    ["__init__", "__main__"],
]


def without_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', re.sub(r"//[^\n]*", "", text))


def layer(path):
    return path.relative_to(ROOT / "csrc").parts[0] if path.parent != ROOT / "csrc" else ""


def rel(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ALL_CODE, ids=rel)
def test_file_length(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", C_FILES, ids=rel)
def test_includes_follow_the_arrows(path):
    text = path.read_text()
    here = layer(path)
    for name in re.findall(r'#include "([^"]+)"', text):
        target = (path.parent / name).resolve()
        assert target.exists(), f"{rel(path)} includes {name}, which is not there"
        there = layer(target)
        assert there == here or there in INCLUDES[here], f"{rel(path)} includes {rel(target)}: {here} may not reach {there}"
    if "Python.h" in text or "numpy/" in text:
        assert here == "python"
    assert not re.search(r"#include <cuda|#include <cublas", text), "CUDA headers belong under kernels/"


@pytest.mark.parametrize("path", [p for p in C_FILES if layer(p) != "python"], ids=rel)
def test_the_core_never_ends_the_process_or_prints(path):
    code = without_comments(path.read_text())
    assert not re.search(r"\b(exit|abort|_exit|printf|puts|putchar|fprintf|perror)\s*\(", code)


@pytest.mark.parametrize("path", [p for p in C_FILES if p.suffix == ".c"], ids=rel)
def test_no_writable_file_scope_variables(path):
    allowed = {"csrc/base/mem.c": 2, "csrc/base/file.c": 2}  # fault hooks and the leak counter
    if layer(path) == "python":
        allowed[rel(path)] = 99  # method and slot tables, which CPython's API takes as non-const
    found = re.findall(
        r"^static (?!const\b|inline\b)(?:_Atomic |_Thread_local )?[\w ]+\**\w+(?:\[[^\]]*\])*\s*(?:=|;)",
        without_comments(path.read_text()),
        re.M,
    )
    assert len(found) <= allowed.get(rel(path), 0), found


def c_functions(text):
    """(name, lines) of each function body, found by a brace in column 0."""
    lines = without_comments(text).splitlines()
    for i, line in enumerate(lines):
        if line == "{":
            end = next(j for j in range(i, len(lines)) if lines[j] == "}")
            head = " ".join(lines[max(0, i - 3) : i])
            yield (re.findall(r"(\w+)\s*\(", head) or ["?"])[-1], end - i + 1


@pytest.mark.parametrize("path", [p for p in C_FILES if layer(p) != "ops"], ids=rel)
def test_function_length(path):
    for name, length in c_functions(path.read_text()):
        assert length <= LONGEST_FUNCTION, f"{name} has {length} lines"


def operators():
    return re.findall(r"lco_status \(\*(\w+)\)\(const", (ROOT / "csrc/ops/ops.h").read_text())


def test_every_op_has_a_reference_a_test_and_a_bench_row():
    assert len(operators()) >= 6
    bench = (ROOT / "benchmarks/ops.py").read_text()
    for op in operators():
        assert (ROOT / f"csrc/ops/ref/{op}.c").exists()
        assert (ROOT / f"tests/ops/test_{op}.py").exists()
        assert re.search(rf"\b{op}\b", bench), f"benchmarks/ops.py has no row for {op}"


@pytest.mark.parametrize("path", [p for p in CUDA_FILES if p.suffix == ".cu"], ids=rel)
def test_kernel_cards(path):
    card = path.read_text().split("*/")[0]
    for title in ("Contract", "Work split", "Tiles", "Shared memory", "Pipeline", "Roofline", "Measured", "Why not"):
        assert title in card, f"the kernel card lacks '{title}'"


def test_stateful_modules_can_be_checked():
    for header, check in {"kv/kv.h": "lco_kv_check", "engine/engine.h": "lco_engine_check"}.items():
        assert f"{check}(" in (ROOT / "csrc" / header).read_text()


def module_of(path):
    parts = path.relative_to(ROOT / "llmcoopt").with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=rel)
def test_python_imports_point_down(path):
    rank = {name: i for i, names in enumerate(RANKS) for name in names}
    here = module_of(path)
    if here == "models":
        return
    depth = len(path.relative_to(ROOT / "llmcoopt").parts)
    for node in ast.parse(path.read_text()).body:  # imports inside functions are late on purpose
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        if node.level < depth:  # of its own package
            continue
        for name in names:
            assert name in rank, f"{name} has no rank"
            assert rank[name] < rank[here], f"{rel(path)} imports {name}, which stands higher"


def test_one_version():
    version = (ROOT / "llmcoopt/_version.py").read_text().split('"')[1]
    tracked = subprocess.run(
        ["git", "grep", "-lF", f'"{version}"', "--", "*.py", "*.toml", "*.c", "*.h"], cwd=ROOT, capture_output=True, text=True
    )
    assert tracked.stdout.split() in ([], ["llmcoopt/_version.py"])


def test_no_leftovers():
    for path in ALL_CODE:
        assert not re.search(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b", path.read_text()), path


def test_stub_agrees_with_the_extension():
    """llmcoopt/_core.pyi declares exactly what the extension has, methods too."""
    from llmcoopt import _core

    stub = ast.parse((ROOT / "llmcoopt/_core.pyi").read_text())
    declared = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert set(declared) == public
    for name, node in declared.items():
        if isinstance(node, ast.ClassDef):
            methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)} - {"__init__"}
            attributes = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            assert methods | attributes == {m for m in dir(getattr(_core, name)) if not m.startswith("_")}, name

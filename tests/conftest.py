"""Fixtures shared by all tests.

Test data lives outside the tree: LLMCOOPT_DATA names its folder, and tests that need it skip where it is unset. Tests that ask for `isa`
run once for each instruction set this CPU has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "model"))  # checkpoints.py and llama2c.py serve the other folders too


@pytest.fixture(scope="session")
def data():
    """The folder of test data, or a skip."""
    folder = os.environ.get("LLMCOOPT_DATA")
    if not folder:
        pytest.skip("LLMCOOPT_DATA is not set: it names the folder of test data")
    if not Path(folder).is_dir():
        pytest.fail(f"LLMCOOPT_DATA is {folder!r}, which is no folder")
    return Path(folder)


@pytest.fixture(scope="module")
def model():
    """The embedded model. Test files with a model of their own define a fixture of this name."""
    import llmcoopt

    return llmcoopt.Model.from_pretrained("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded model's."""
    import llmcoopt

    return llmcoopt.Tokenizer.from_pretrained("tiny")


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        import llmcoopt

        metafunc.parametrize("isa", llmcoopt.isas())


@pytest.fixture
def run_script():
    """A function that runs Python code in a fresh interpreter, with the import path of this one: run_script(code, *argv) -> its output.
    The test fails when the script does, or when it takes longer than `timeout` seconds."""

    def run(code, *argv, timeout=120):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], env=env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run

"""Every operator test runs on every instruction set of this machine."""

import numpy as np
import pytest

from llmcoopt import _core


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _core.isas())


@pytest.fixture
def ctx(isa):
    return _core.OpContext(isa=isa, threads=2)


@pytest.fixture
def one_thread(isa):
    return _core.OpContext(isa=isa, threads=1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)

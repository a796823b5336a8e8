"""Operators on every instruction set of this machine: tests that use `ctx` or `isa` run once for each (see the conftest above)."""

import numpy as np
import pytest

from llmcoopt import _core


@pytest.fixture
def ctx(isa):
    return _core.OpContext(isa=isa, threads=2)


@pytest.fixture
def one_thread(isa):
    return _core.OpContext(isa=isa, threads=1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)

"""The folders of these tests: small random models, and token ids to calibrate on."""

import checkpoints
import numpy as np
import pytest
from small import SHAPE


@pytest.fixture
def source(tmp_path):
    """A small bfloat16 model of three layers."""
    checkpoints.make(tmp_path / "source", dtype="bfloat16", **SHAPE)
    return tmp_path / "source"


@pytest.fixture
def ids():
    """1,000 token ids, some more frequent than others."""
    return (np.random.default_rng(5).integers(0, 64, (2, 1000)).min(axis=0)).tolist()

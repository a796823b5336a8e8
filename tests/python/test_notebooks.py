"""Every notebook runs from top to bottom in a fresh interpreter, and is stored without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, run_script, tmp_path):
    pytest.importorskip("matplotlib", reason="notebooks draw with matplotlib, which is not installed")
    source = "\n\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    run_script(f"import os\nos.environ['MPLBACKEND'] = 'Agg'\nos.chdir({str(tmp_path)!r})\n{source}", timeout=300)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    for cell in cells(path):
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)

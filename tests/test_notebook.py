"""The notebook of the documentation runs, with a few steps in place of minutes."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning")  # a reader would see it
    notebook = nbformat.read(ROOT / "docs" / "first.ipynb", as_version=4)
    for written, short in (("max_minutes=2", "max_steps=20"), ('["step"] + 200', '["step"] + 10')):
        assert sum(cell.source.count(written) for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(written, short)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    said = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert said.startswith("finished at step 20\n")
    assert said.count("i love this movie because") == 3
    assert said.count(" bits per byte: ") == 2
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert '"step": 30' in (tmp_path / "runs" / "notebook" / "status.json").read_text()

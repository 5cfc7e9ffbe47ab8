"""The notebooks run from top to bottom on the committed study, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import planted
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OF_KTO = ROOT / "notebooks" / "kto_logits.ipynb"  # which needs a study that is not committed: test_kto_study.py


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p != OF_KTO], ids=lambda path: path.stem)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Jupyter runs them: in their own folder, and on the committed study without a word from the user."""
    monkeypatch.delenv("STABSTUDY_STUDY", raising=False)
    monkeypatch.setenv("STABSTUDY_OTHER", str(planted.plant_study(tmp_path / "other", seeds=(0, 1, 2))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    first = outputs[0].get("text") or outputs[0]["data"]["text/plain"]
    assert "Does qk-norm keep attention logits" in first

"""The notebooks print what they are committed with, wherever they run."""

from __future__ import annotations

import copy
import math
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\binf\b|\bnan\b)", re.IGNORECASE)
OF_THIS_MACHINE = "of-this-machine"
"""The tag of a cell that prints the text of a data set which is not the same everywhere."""


def outputs(notebook: Any) -> Iterator[tuple[str, str, int]]:
    """Source, text and number of images of each cell that is to print the same everywhere."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and OF_THIS_MACHINE not in cell.metadata.get("tags", []):
            data = [o.get("data", {}) for o in cell.outputs]
            images = sum("image/png" in d for d in data)
            printed = "".join(o.text for o in cell.outputs if o.output_type == "stream")  # cut anywhere into pieces
            texts = [d.get("text/plain", "") for d in data if "image/png" not in d]
            yield cell.source, "\n".join([printed, *texts]), images


def differences(committed: Any, now: Any) -> list[str]:
    """What differs, a line per cell: words, numbers by more than 1e-6 of their size, the number of images."""
    found = []
    for (source, before, drawn), (_, after, drawn_now) in zip(outputs(committed), outputs(now), strict=True):
        words = [NUMBER.sub("#", text).split() for text in (before, after)]
        numbers = [[float(v) for v in NUMBER.findall(text)] for text in (before, after)]
        alike = [len(x) for x in numbers[:1]] == [len(x) for x in numbers[1:]] and all(
            math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b)) for a, b in zip(*numbers, strict=True)
        )
        if words[0] != words[1] or not alike or drawn != drawn_now:
            found.append(f"{source}\n-- {before}\n++ {after}\n{drawn} and {drawn_now} images")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_outputs_and_end_in_an_answer(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = [o for cell in code for o in cell.outputs]
    assert not [o for o in shown if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in shown)
    (answer,) = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## The answer")]
    assert any(cell.get("outputs") for cell in notebook.cells[answer + 1 :])
    assert not re.search(r"/(?:tmp|home|root|work|Users)/", path.read_text())


def test_a_changed_output_is_found() -> None:
    """The comparison that the next test rests on."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    assert not differences(notebook, copy.deepcopy(notebook))
    for change in (lambda text: text.replace("stable", "steady"), lambda text: NUMBER.sub("7.25", text, count=1)):
        other = copy.deepcopy(notebook)
        (cell,) = [c for c in other.cells if c.cell_type == "code" and c.source.endswith("study")][:1]
        cell.outputs[0].data["text/plain"] = change(cell.outputs[0].data["text/plain"])
        assert len(differences(notebook, other)) == 1
    other = copy.deepcopy(notebook)
    next(c for c in other.cells if any("image/png" in o.get("data", {}) for o in c.get("outputs", []))).outputs.clear()
    assert len(differences(notebook, other)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::PendingDeprecationWarning"
)
def test_notebooks_print_what_they_are_kept_with(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Jupyter runs them: in their own folder, on the committed studies, without a word from the user."""
    for name in ("STUDY", "OTHER", "CLIP", "FRONTIER", "KTO"):
        monkeypatch.delenv(f"STABSTUDY_{name}", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    now = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))["executed"](path)
    assert not differences(nbformat.read(path, as_version=4), now)

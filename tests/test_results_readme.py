"""results/README.md: read for ever, so what it says must be true."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
from pathlib import Path

import planted
import pytest
from conftest import ROOT

from stabstudy.analysis.table_columns import spike_kinds
from stabstudy.stability.columns import COLUMNS, SPIKES
from stabstudy.stability.spikes import SPIKE_COLUMNS
from stabstudy.state import State
from stabstudy.store import StudyFolder
from stabstudy.trace import PROBES, TRACE

PAGE = ROOT / "results" / "README.md"


def documented(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, unescaped."""
    text = PAGE.read_text()
    lines = text[text.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    cells = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table[2:]]
    return [[row[0].strip("`"), *row[1:]] for row in cells]


def generated(*arguments: str, page: Path = PAGE) -> subprocess.CompletedProcess[str]:
    code = f"import runpy, pathlib, sys; m = runpy.run_path({str(ROOT / '.ci' / 'columns.py')!r}); "
    code += f"m['main'].__globals__['PAGE'] = pathlib.Path({str(page)!r}); sys.argv = ['columns.py', *{arguments!r}]; "
    return subprocess.run(
        [sys.executable, "-c", code + "sys.exit(m['main']())"], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_tables_are_written_from_the_definitions() -> None:
    done = generated("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[0] for row in documented("**Statistics.**")] == list(COLUMNS)
    assert [row[0] for row in documented("## spikes.parquet")] == list(spike_kinds())
    for schema in (TRACE, PROBES):
        assert [row[0] for row in documented(f"## {schema.name}.parquet")] == schema.names


def test_a_page_that_says_otherwise_is_noticed_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE.read_text().replace("largest over median, both settled", "something else"))
    assert generated("--check", page=page).returncode == 1
    assert generated(page=page).returncode == 0
    assert page.read_text() == PAGE.read_text()


def test_every_field_of_a_spike_is_defined() -> None:
    assert tuple(SPIKES) == SPIKE_COLUMNS


def test_state_and_config_are_documented(tmp_path: Path) -> None:
    study = StudyFolder(planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3, 1e-2), seeds=(0,)))
    state = {name for row in documented("state.json\n") for name in re.findall("[a-z_]+", row[0])}
    assert state == {f.name for f in dataclasses.fields(State)}
    assert [row[0] for row in documented("config.json\n\n")] == list(study.trials()[0].read_config())


@pytest.mark.parametrize("name", ["summary.json", "state.json", "config.json"])
def test_each_file_of_a_trial_has_its_section(name: str) -> None:
    assert f"## trials/<trial_id>/{name}" in PAGE.read_text()

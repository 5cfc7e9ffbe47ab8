"""Studies written by earlier versions load, are judged by today's rules, and get their report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from stabstudy.analysis.study import Study, update_tables
from stabstudy.report import main

DATA = ROOT / "tests" / "data"
STUDIES = {
    "tiny": dict.fromkeys(("33edcd5751", "36929b6842", "d8c1338b96", "eed2c37b69"), ("done", 80)),
    "unfinished": {"8ebdecba34": ("lost", 120), "e33732d7e9": ("done", 300)},
    "ingested": {"70c59bccff": ("done", 150)},
}
"""Study -> trial -> state, recorded steps: facts of the files, whatever the rules of the day say of them."""


@pytest.fixture
def copy(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    target = tmp_path / str(request.param)
    shutil.copytree(DATA / str(request.param), target)
    return target


@pytest.mark.parametrize("copy", STUDIES, indirect=True)
def test_every_trial_is_read_and_judged_by_the_rules_of_today(copy: Path) -> None:
    study = update_tables(Study.load(copy).folder)
    assert not study.damaged
    rows = {t: (study.row(t)["state"], study.row(t)["steps_done"]) for t in study.trials.index}
    assert rows == STUDIES[copy.name]
    assert set(study.trials["detector_id"]) == {study.rules.detector_id}
    done = study.trials[study.trials["state"] == "done"]
    assert (done["verdict"].notna() | done["verdict_reason"].notna()).all()


@pytest.mark.parametrize("copy", ["tiny", "unfinished"], indirect=True)
def test_measured_losses_are_those_of_the_state(copy: Path) -> None:
    for trial_id, row in Study.load(copy).trials.iterrows():
        state = json.loads((copy / "trials" / str(trial_id) / "state.json").read_text())
        if state["status"] == "done":
            assert (row["init_loss"], row["final_loss"]) == (state["init_loss"], state["final_loss"])


def test_extremes_of_the_record_are_those_of_its_time() -> None:
    """Numbers that no rule changes, as the version that wrote the studies computed them."""
    tiny, ingested = (Study.load(DATA / name).trials for name in ("tiny", "ingested"))
    assert tiny["grad_norm_argmax"].to_dict() == {"33edcd5751": 0, "36929b6842": 17, "d8c1338b96": 17, "eed2c37b69": 13}
    assert tiny.loc["d8c1338b96", "grad_norm_max"] == pytest.approx(8.742868, abs=1e-6)
    assert ingested.loc["70c59bccff", ["grad_norm_max", "grad_norm_argmax"]].tolist() == [9.118, 100]


def test_the_spike_of_the_ingested_run_is_found() -> None:
    spikes = Study.load(DATA / "ingested").spikes
    assert 100 in set(spikes.loc[spikes["series"] == "grad", "peak_step"])


@pytest.mark.parametrize("copy", STUDIES, indirect=True)
def test_the_report_is_written(copy: Path) -> None:
    assert main([str(copy)]) == 0
    page = (copy / "report" / "index.html").read_text()
    assert all(trial in page for trial in STUDIES[copy.name])

"""`sweep=kto_logits` from the command to the page, and KTO on the real rows."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from trials import Make, vary

from stabstudy import cli, sweep
from stabstudy.analysis.study import Study
from stabstudy.config import DataConfig, ObjectiveConfig
from stabstudy.stability.rules import Rules
from stabstudy.store import StudyFolder
from stabstudy.trace import TRACE_KTO
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine

SHORT = ["launcher=local", "train.steps=30", "train.eval_every=15", "train.final_eval_tokens=512"]
SHORT += ["optim.lr=1e-4,1e-2", "seeds=2"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep that is shipped, with fewer rates, seeds and steps; its start is that of the file, shortened too."""
    folder = tmp_path_factory.mktemp("kto")
    (folder / "sweeps").mkdir()
    for name in ("kto_logits", "kto_start"):
        text = (ROOT / "sweeps" / f"{name}.yaml").read_text()
        (folder / "sweeps" / f"{name}.yaml").write_text(text.replace("steps: 400", "steps: 60"))
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        assert sweep.main(["sweep=kto_logits", *SHORT]) == 0
    return folder / "results" / "kto_logits"


@pytest.mark.slow
def test_the_remedies_are_answered_with_intervals(study: Path) -> None:
    loaded = Study.load(study)
    assert len(loaded.trials) == 20 and set(loaded.trials["state"]) == {"done"}
    (start,) = StudyFolder(study.parent / "kto_start").trials()
    assert set(loaded.trials["objective.init_id"]) == {start.trial_id}
    page = (study / "report" / "report.md").read_text()
    answers = page.split("**What the cases changed**")[1].split("**Caveats**")[0]
    cases = set(loaded.trials["case"].dropna())
    assert len(cases) == 8 and all(case.replace("_", "\\_") in answers for case in cases)
    rows = re.findall(r"^\| (\w[\w\\]*) \| .*\| margin \| .*\[", page, re.M)
    assert {row.replace("\\", "") for row in rows} == cases
    figures = "".join(p.read_text() for p in (study / "report" / "figures").glob("*.svg"))
    assert "final validation loss" in figures and "nat/token" not in figures
    before, _ = page.split("## Methods")
    assert "nat/token" not in before, "the loss of kto has no unit"


@pytest.mark.slow
def test_the_first_step_is_that_of_a_model_which_is_its_own_reference(study: Path) -> None:
    loaded = Study.load(study)
    for trial_id in loaded.trials.index[loaded.trials["train.precision"] == "fp32"]:
        trace = loaded.trace(trial_id)
        assert trace["loss"][0] == pytest.approx(0.5, abs=1e-6) and trace["kl"][0] == 0
        assert abs(trace["margin"][0]) < 1e-5 and np.nanmax(trace["logit_absmax"]) < 50
    assert loaded.trials["init_loss"].sub(0.5).abs().max() < 1e-6


def test_kto_without_starting_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweep.main(["objective=kto", "data=arithmetic_graded", "--dry-run"]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "objective.init_from: objective kto tunes a trained model" in error and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.shareddata
def test_the_300_real_rows_are_tuned_on(shared_data: Path, make: Make, tmp_path: Path) -> None:
    """From a model that was trained on the same rows, labels passed over."""
    path = shutil.copy(shared_data / "kto_en_demo.json", tmp_path)
    data = DataConfig(source="examples", path=str(path), seq_len=1024, layout="padded")
    small = {"train": {"steps": 6, "batch_size": 4, "eval_sequences": 4, "final_eval_tokens": 512}}
    base = vary(**small)
    engine = Engine(tmp_path / "cache", keep_checkpoints=True)
    source = make(dataclasses.replace(base, data=data, objective=ObjectiveConfig(kind="sft")), "source")
    (state,) = run_pack([source], engine, Rules(), lambda members: False)
    assert state.status == "done", state.error
    objective = ObjectiveConfig(kind="kto", init_from=str(source.path), init_id=source.trial_id)
    tuned = dataclasses.replace(base, data=dataclasses.replace(data, labels=True), objective=objective)
    trial = make(tuned, "kto")
    (state,) = run_pack([trial], engine, Rules(), lambda members: False)
    assert state.status == "done" and state.init_loss == pytest.approx(0.5, abs=1e-6), state.error
    rows = trial.rows(TRACE_KTO)
    assert rows is not None and len(rows) == 6 and np.isfinite(rows["loss"]).all()
    assert (rows["sequences_chosen"] + rows["sequences_rejected"] == 4).all() and rows["clipped"].max() > 0
    assert rows["logit_absmax"].max() < 50

"""Studies written by earlier versions load, are judged by today's rules, and get their report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from stabstudy.analysis.study import Study, update_tables
from stabstudy.external import read_external
from stabstudy.planning.plan import make_plan
from stabstudy.report import main
from stabstudy.settings import ConfigError
from stabstudy.stability.summary import Source
from stabstudy.store import StudyFolder
from stabstudy.sweeping import progress

DATA = ROOT / "tests" / "data"
STUDIES = {
    "tiny": dict.fromkeys(("33edcd5751", "36929b6842", "d8c1338b96", "eed2c37b69"), ("done", 80)),
    "unfinished": {"8ebdecba34": ("lost", 120), "e33732d7e9": ("done", 300)},
    "ingested": {"70c59bccff": ("done", 150)},
    "synthetic": {"b27473298b": ("done", 40), "178250e1a7": ("done", 40)},
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


@pytest.mark.parametrize("copy", ["tiny", "unfinished", "synthetic"], indirect=True)
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


# settings of the synthetic source, called data.synth_* then


@pytest.mark.parametrize("copy", ["synthetic"], indirect=True)
def test_columns_have_the_names_of_today(copy: Path) -> None:
    then = pq.read_schema(copy / "trials.parquet").names
    study = update_tables(Study.load(copy).folder)
    assert study.axes == {"data.synthetic.flip_ppm": [0, 1000]}
    assert set(study.trials["data.synthetic.vocabulary"]) == {300} and set(study.trials["data.synthetic.order"]) == {1}
    now = pq.read_schema(copy / "trials.parquet").names
    assert sum(name.startswith("data.synth_") for name in then) == sum(
        name.startswith("data.synthetic.") for name in now
    )
    assert not [name for name in now if name.startswith("data.synth_")]


@pytest.mark.parametrize("trial_id", STUDIES["synthetic"])
def test_a_judgement_of_then_is_of_the_same_source(trial_id: str) -> None:
    """What a trial keeps of itself stays valid: nothing is judged anew because a setting was renamed."""
    trial = StudyFolder(DATA / "synthetic").trial(trial_id)
    source = Source(trial.read_own()[0], trial.read_state())
    assert json.loads(trial.summary_file.read_text())["source_sha256"] == source.sha256


GROW = ["study=synthetic", "launcher=local", "data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16",
        "data.synthetic.vocabulary=300", "data.synthetic.alphabet_permille=100", "seeds=1", "model.dim=8",
        "model.n_heads=2", "model.depth=1", "train.steps=40", "train.batch_size=2", "optim.warmup_steps=3",
        "train.eval_sequences=8", "train.final_eval_tokens=256", "train.probe_every=20", "results_dir=."]  # fmt: skip


@pytest.mark.parametrize("copy", ["synthetic"], indirect=True)
def test_it_grows_under_the_names_of_today(copy: Path) -> None:
    plan = make_plan([*GROW, "data.synthetic.flip_ppm=0,1000,5000"], copy.parent)
    assert [t.trial_id for t in plan.trials][:2] == ["b27473298b", "178250e1a7"]
    assert not [w for w in plan.warnings if "the launch before" in w]
    records = yaml.safe_load(plan.sweep_text)["data"]
    assert [r["settings"].get("synthetic.flip_ppm") for r in records] == [None, 1000, 5000]
    assert not [name for r in records for name in r["settings"] if name.startswith("synth_")]
    changed = make_plan([*GROW, "data.synthetic.flip_ppm=1000", "data.synthetic.alphabet_permille=0"], copy.parent)
    assert "data.synthetic.alphabet_permille: 0 now, 100 in the launch before" in "\n".join(changed.warnings)


@pytest.mark.parametrize("copy", ["synthetic"], indirect=True)
def test_its_record_of_the_text_is_held_against_a_new_launch(copy: Path) -> None:
    text = (copy / "sweep.yaml").read_text()
    (copy / "sweep.yaml").write_text(text.replace("e30fed890d21c554", "0" * 16))
    make_plan([*GROW, "data.synthetic.flip_ppm=0"], copy.parent)
    with pytest.raises(ConfigError, match="the text of source synthetic has changed"):
        make_plan([*GROW, "data.synthetic.flip_ppm=1000"], copy.parent)


@pytest.mark.parametrize("copy", ["synthetic"], indirect=True)
def test_its_status_shows_the_values_of_its_axis(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress.show_status(progress.standing(copy))
    out = capsys.readouterr().out
    assert "flip_ppm=0 seed=0" in out and "flip_ppm=1000 seed=0" in out


def test_settings_of_an_ingested_run_are_read_under_their_former_names() -> None:
    path = DATA / "ingested" / "trials" / "70c59bccff" / "config.json"
    body = json.loads(path.read_text())
    body["external"]["settings"]["data.synth_vocab"] = 300
    log = read_external(body, path)
    assert log is not None and log.settings["data.synthetic.vocabulary"] == 300


@pytest.mark.parametrize("copy", STUDIES, indirect=True)
def test_the_report_is_written(copy: Path) -> None:
    assert main([str(copy)]) == 0
    page = (copy / "report" / "index.html").read_text()
    assert all(trial in page for trial in STUDIES[copy.name])

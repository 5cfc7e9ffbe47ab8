"""`python -m stabstudy.export`: what a tracker's own reader reads back is what the trials recorded, once each."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_launch import until

from stabstudy import disk, export, extras, ingest, live
from stabstudy.analysis.study import Study
from stabstudy.exporting.event_files import EventFiles, read_progress
from stabstudy.exporting.exported import _points
from stabstudy.exporting.exporter import Exporter
from stabstudy.store import StudyFolder, TrialFolder
from stabstudy.trace import PROBES, SKIPS, TRACE, from_dicts

OF_TRACE = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/learning_rate": "lr",
    "train/clip_scale": "clip_scale",
    "train/logit_absmax": "logit_absmax",
}
OF_PROBES = {"eval/loss": "val_loss", "probes/param_norm": "param_norm", "probes/update_rms": "update_rms"}


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """A done trial, one that diverged, and one whose live record has a torn block at its end."""
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    planted.plant_trial(folder, planted.settings(lr=1e-2), nonfinite_at=60, stop_reason="diverged", steps_done=61)
    half = planted.plant_trial(folder, planted.settings(lr=0.1), status="running", steps_done=47)
    with half.live(TRACE).open("ab") as f:
        f.write(b"BLK\xff\x07torn")
    return StudyFolder(folder)


def exported(study: StudyFolder, out: Path, *words: str, code: int = 0) -> None:
    assert export.main([str(study.path), "--to", "tensorboard", "--out", str(out), *words]) == code


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
    """The steps and values of a tag, as TensorBoard's reader has them."""
    accumulator = read(folder)
    if tag not in accumulator.Tags()["scalars"]:
        return [], np.array([], np.float32)
    events = accumulator.Scalars(tag)
    return [e.step for e in events], np.array([e.value for e in events], np.float32)


def is_exported(trial: TrialFolder, folder: Path) -> None:
    """Fails unless every value of the records stands at its step, at float32 equality, once, and nothing else does."""
    accumulator = read(folder)
    for tags, schema in ((OF_TRACE, TRACE), (OF_PROBES, PROBES)):
        rows = trial.rows(schema)
        assert rows is not None
        for tag, column in tags.items():
            there = ~rows.is_null(column)
            events = accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else []
            assert [e.step for e in events] == rows["step"][there].tolist(), tag
            values = np.array([e.value for e in events], np.float32)
            np.testing.assert_array_equal(values, rows[column][there].astype(np.float32), tag)


def test_each_record_is_read_back_whole(study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(study, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"export: tensorboard --logdir {tmp_path / 'out'}" and len(lines) == 2
    for trial in study.trials():
        is_exported(trial, tmp_path / "out" / trial.trial_id)
        rows: Any = trial.rows(TRACE)
        for name in ("embed", "0", "head"):
            of, norms = scalars(tmp_path / "out" / trial.trial_id, f"layer_grad_norm/{name}")
            place = {"embed": 0, "0": 1, "head": -1}[name]
            assert of == rows["step"].tolist()
            np.testing.assert_array_equal(norms, rows["layer_grad_norm"][:, place].astype(np.float32))
    diverged = next(t for t in study.trials() if t.read_state().step == 61)
    steps, norms = scalars(tmp_path / "out" / diverged.trial_id, "train/grad_norm")
    assert steps[-1] == 60 and math.isnan(norms[-1]) and np.isfinite(norms[:-1]).all()
    half = next(t for t in study.trials() if t.read_state().step == 47)
    assert scalars(tmp_path / "out" / half.trial_id, "train/loss")[0][-1] == 46, "the torn block is left out"
    total = sum(len(rows) for t in study.trials() if (rows := t.rows(TRACE)) is not None)
    assert lines[1] == f"s: {total:,} new steps of 3 of 3 trials"


def test_a_skipped_update_is_the_number_of_its_policy(tmp_path: Path) -> None:
    rows = [{"step": i, "tokens": i, "seconds": 0.1, "lr": 1e-3, "loss": 2.0, "grad_norm": 1.0} for i in range(3)]
    rows[1]["skip"] = SKIPS[-1]  # type: ignore[assignment]
    (point,) = [p for p in _points(from_dicts(rows, TRACE), np.arange(3), np.zeros(3), -1) if "train/skip" in p.scalars]
    assert (point.step, point.scalars["train/skip"]) == (1, len(SKIPS))


def test_settings_verdict_and_numbers_of_a_done_trial(study: StudyFolder, tmp_path: Path) -> None:
    exported(study, tmp_path / "out")
    row = next(r for _, r in Study(study).trials.reset_index().iterrows() if r["state"] == "done")
    accumulator = read(tmp_path / "out" / row["trial_id"])
    start = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert {name: value.number_value for name, value in hparams.items()} == {"optim.lr": row["optim.lr"], "seed": 0}
    (spikes,) = accumulator.Scalars("summary/spikes")
    (roughness,) = accumulator.Scalars("summary/roughness")
    assert spikes.value == row["spike_events"] and roughness.value == np.float32(row["grad_norm_log_sd"])
    (verdict,) = accumulator.Tensors("summary/verdict")
    assert verdict.tensor_proto.string_val[0].decode().startswith(f"{row['verdict']}. ")
    end = accumulator.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    assert plugin_data_pb2.HParamsPluginData.FromString(end).session_end_info.status == 1
    running = next(t for t in study.trials() if t.read_state().status != "done")
    assert "summary/spikes" not in read(tmp_path / "out" / running.trial_id).Tags()["scalars"]


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(path)): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(path.rglob("*"))
    }


def test_again_it_goes_on_and_nothing_of_the_study_is_written(study: StudyFolder, tmp_path: Path) -> None:
    before, out = contents(study.path), tmp_path / "out"
    exported(study, out)
    assert contents(study.path) == before
    once = contents(out)
    exported(study, out)
    assert {name: body for name, (_, body) in contents(out).items() if name != ".lock"} == {
        name: body for name, (_, body) in once.items() if name != ".lock"
    }
    half = next(t for t in study.trials() if t.read_state().step == 47)
    grow(half, 90)
    exported(study, out)
    is_exported(half, out / half.trial_id)
    changed = {n for n, entry in contents(out).items() if once.get(n) != entry}
    assert {name.partition("/")[0] for name in changed} - {".lock"} == {half.trial_id}, "and no other trial is written"


def grow(trial: TrialFolder, steps: int, cut: int | None = None) -> None:
    """The trial is resumed at `cut` (None: where it is whole) and goes on to so many steps, with the same values."""
    whole = planted.settings(lr=0.1)
    norms = planted.norms(whole.train.steps, seed=int(trial.trial_id, 16), log_sd=0.08)
    live.cut(trial.live(TRACE), TRACE, steps if cut is None else cut)
    live.cut(trial.live(PROBES), PROBES, steps if cut is None else cut + 1)
    if cut is not None and steps == cut:
        return
    for schema in (TRACE, PROBES):
        trial.live(schema).unlink()
    planted.write_records(trial, whole, norms[:steps], 4.0, finish=False)


def test_a_resumed_trial_is_not_written_twice(study: StudyFolder, tmp_path: Path) -> None:
    """Its rows go back to a checkpoint, are trained again to the same values, and go on."""
    out, half = tmp_path / "out", next(t for t in study.trials() if t.read_state().step == 47)
    exported(study, out)
    grow(half, 20, cut=20)
    exported(study, out)
    assert scalars(out / half.trial_id, "train/loss")[0] == list(range(47)), "what was exported stands"
    grow(half, 35)
    exported(study, out)
    grow(half, 80)
    exported(study, out)
    is_exported(half, out / half.trial_id)


KILLED = """\
import os, signal, sys
from tensorboard.summary.writer import record_writer
from stabstudy import export
left, write = [int(sys.argv[1])], record_writer.RecordWriter.write
def killed(self, data):
    left[0] -= 1
    if not left[0]:
        self._writer.write(b"torn")
        self._writer.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)
record_writer.RecordWriter.write = killed
sys.exit(export.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_export_goes_on_without_a_loss_and_without_a_double(study: StudyFolder, tmp_path: Path) -> None:
    """SIGKILL in the midst of an event, between commits, and while its own state is replaced."""
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [str(study.path), "--to", "tensorboard", "--out", str(out)]
    command = [sys.executable, "-m", "stabstudy.export", *words]

    def killed(after: int) -> int:
        child = [sys.executable, "-c", KILLED, str(after), *words]
        return subprocess.run(child, env=environment, check=False, capture_output=True).returncode

    def killed_at(point: str) -> int:
        named = environment | {"STABSTUDY_FAILPOINT": f"{point}:kill"}
        return subprocess.run(command, env=named, check=False, capture_output=True).returncode

    ends = [killed(1), killed_at("file.written"), killed(40), killed_at("file.renamed"), killed(70)]
    assert ends == [-signal.SIGKILL] * 5
    assert 0 < sum(read_progress(out / t.trial_id).bytes > 0 for t in study.trials()) < 3, "some were committed"
    exported(study, out)
    for trial in study.trials():
        is_exported(trial, out / trial.trial_id)


def test_a_torn_export_is_cut_to_what_it_committed(study: StudyFolder, tmp_path: Path) -> None:
    """The control of the test above: with the torn bytes left in, TensorBoard would read no further."""
    out, half = tmp_path / "out", next(t for t in study.trials() if t.read_state().step == 47)
    exported(study, out)
    (file,) = (out / half.trial_id).glob("*tfevents*")
    with file.open("ab") as f:
        f.write(file.read_bytes()[:1000])
    assert len(scalars(out / half.trial_id, "train/loss")[0]) >= 47
    grow(half, 80)
    exported(study, out)
    is_exported(half, out / half.trial_id)
    file.write_bytes(file.read_bytes()[:-3])
    grow(half, 100)
    exported(study, out, code=3)
    assert read_progress(out / half.trial_id).bytes == file.stat().st_size + 3, "a file that others cut is left alone"


def test_an_export_is_ingested_with_the_same_norms(study: StudyFolder, tmp_path: Path) -> None:
    whole = next(t for t in study.trials() if t.read_state().stop_reason == "complete")
    exported(study, tmp_path / "out", "--trials", whole.trial_id[:6])
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == [whole.trial_id]
    results = str(tmp_path / "again")
    assert ingest.main([str(tmp_path / "out" / whole.trial_id), "--study", "back", "--results-dir", results]) == 0
    again = Study.load(tmp_path / "again" / "back")
    (trial_id,) = again.trials.index
    rows, own = again.trace(trial_id), whole.rows(TRACE)
    assert own is not None and rows["step"].tolist() == own["step"].tolist()
    for column in ("grad_norm", "loss", "lr"):
        np.testing.assert_array_equal(rows[column].astype(np.float32), own[column].astype(np.float32))


def test_it_follows_a_launch_to_its_end(study: StudyFolder, tmp_path: Path) -> None:
    half = next(t for t in study.trials() if t.read_state().step == 47)
    launch = contextlib.ExitStack()
    launch.enter_context(disk.lock(study.path))
    exporter, lines = Exporter(study, EventFiles(tmp_path / "out")), list[str]()
    then = [lambda: None, lambda: grow(half, 90), launch.close]
    exporter.follow(2, lines.append, lambda seconds: then.pop(0)())
    assert not then and len(lines) == 2 and lines[1].startswith("43 new steps of ")
    is_exported(half, tmp_path / "out" / half.trial_id)


def test_damaged_trials_are_named_and_the_others_exported(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, *_ = (t for t in study.trials() if t.read_state().status == "done")
    bad.finished(TRACE).write_bytes(b"rotten")
    exported(study, tmp_path / "out", code=3)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert line.startswith(f"damaged, left out: {bad.trial_id}: ")
    for trial in study.trials():
        if trial != bad:
            is_exported(trial, tmp_path / "out" / trial.trial_id)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--to", "mlflow"], "--to: invalid choice: 'mlflow'"),
        ([], "the following arguments are required: --to"),
        (["--to", "tensorboard", "--follow", "0"], "--follow: must be a number of seconds in [1, 86400], got 0"),
        (["--to", "tensorboard", "--follow", "x"], "--follow: must be a number of seconds in [1, 86400] (name the"),
        (["--to", "tensorboard", "--out", "STUDY/out"], "--out: must lie outside of the study"),
        (["--to", "tensorboard", "--project", "p"], "--project: goes with --to wandb"),
        (["--to", "wandb", "--project", "a/b"], "--project: must be 1-64 of"),
        (["--to", "tensorboard", "--trials", "zz"], "--trials zz: is no trial of"),
        (["--to", "tensorboard", "--folow"], "--folow: is not a flag (did you mean --follow?)"),
    ],
)
def test_bad_words(
    study: StudyFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    words: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [word.replace("STUDY", str(study.path)) for word in words]
    assert export.main([str(study.path), *given]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (study.path / "out").exists()


def test_no_study_no_package_no_second_export(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export.main([str(tmp_path / "none"), "--to", "tensorboard"]) == 2
    out = tmp_path / "out"
    out.mkdir()
    with disk.lock(out):
        exported(study, out, code=4)
    assert "locked by pid" in capsys.readouterr().err
    monkeypatch.setattr(extras, "installed", lambda package: "none")
    assert export.main([str(study.path), "--to", "wandb", "--out", str(tmp_path / "w")]) == 4
    assert capsys.readouterr().err == "error: export: needs wandb, not installed here: pip install 'stabstudy[wandb]'\n"
    assert not (tmp_path / "w").exists()


def test_the_state_of_another_version_is_not_written_over(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(study, tmp_path / "out")
    half = next(t for t in study.trials() if t.read_state().step == 47)
    state = tmp_path / "out" / half.trial_id / "stabstudy.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format": 2}))
    grow(half, 90)
    exported(study, tmp_path / "out", code=2)
    assert "stabstudy.json: is not the state of an export of this version" in capsys.readouterr().err


WORDS = [
    "data=synthetic", "data.synthetic.bytes=200000", "data.seq_len=32", "model.dim=16", "model.n_heads=2",
    "model.depth=1", "train.batch_size=4", "train.steps=600", "train.checkpoint_every=100", "optim.warmup_steps=10",
    "train.eval_sequences=8", "optim.lr=1e-2", "study=tiny", "seeds=1", "launcher=local",
]  # fmt: skip


@pytest.mark.slow
def test_a_launch_that_is_killed_and_resumed_is_followed_from_beside(tmp_path: Path) -> None:
    """What was exported while it trained is what the finished records hold, and so is all that came after the kill."""
    study, out = StudyFolder(tmp_path / "results" / "tiny"), tmp_path / "out"
    command = [sys.executable, "-m", "stabstudy.sweep", *WORDS]
    follow = [sys.executable, "-m", "stabstudy.export", str(study.path), "--to", "tensorboard", "--out", str(out)]
    launch = subprocess.Popen(command, cwd=tmp_path)
    until(lambda: any(live.last_step(trial.live(TRACE)) > 150 for trial in study.trials()))
    following = subprocess.Popen([*follow, "--follow", "1"], stdout=subprocess.DEVNULL)
    until(lambda: any(read_progress(out / trial.trial_id).trace > 150 for trial in study.trials()))
    launch.kill()
    launch.wait()
    assert following.wait(60) == 0, "it ends with its launch"
    (first, *_) = (t for t in study.trials() if read_progress(out / t.trial_id).trace > 150)
    assert first.read_state().status != "done" and len(scalars(out / first.trial_id, "train/loss")[0]) > 150
    launch = subprocess.Popen(command, cwd=tmp_path)
    until(lambda: disk.is_locked(study.path))
    assert subprocess.run([*follow, "--follow", "1"], check=False).returncode == 0
    launch.kill()  # it has trained, and would write its report
    launch.wait()
    for trial in study.trials():
        assert trial.read_state().status == "done"
        is_exported(trial, out / trial.trial_id)
        assert "summary/spikes" in read(out / trial.trial_id).Tags()["scalars"]

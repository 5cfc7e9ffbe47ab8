"""`python -m stabstudy.export --to wandb`, offline: what W&B's files hold, read back, is what the trials recorded."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from conftest import ROOT

from stabstudy.exporting import wandb_runs
from stabstudy.store import StudyFolder, TrialFolder
from stabstudy.trace import TRACE

NAMES = {"train/loss": "loss", "train/grad_norm": "grad_norm", "train/learning_rate": "lr"}


def is_there() -> None:
    """Skips without W&B, which is no part of `all`."""
    pytest.importorskip("wandb", reason="needs wandb: pip install 'stabstudy[wandb]'")


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """A done trial, one that diverged, one that is half way."""
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    planted.plant_trial(folder, planted.settings(lr=1e-2), nonfinite_at=60, stop_reason="diverged", steps_done=61)
    planted.plant_trial(folder, planted.settings(lr=0.1), status="interrupted", steps_done=47)
    return StudyFolder(folder)


def exported(study: StudyFolder, out: Path, program: str = "from stabstudy import export") -> int:
    """Export in a process of its own, as W&B starts another; returns its exit code."""
    words = [str(study.path), "--to", "wandb", "--out", str(out)]
    code = f"import sys\n{program}\nsys.exit(export.main({words!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    return subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log of LevelDB's in blocks of 32 KiB, behind seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (rest := 32768 - at % 32768) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if not kind or at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def runs(out: Path, trial_id: str) -> list[Any]:
    """All records of the trial's run, session after session."""
    folders = sorted((out / "wandb").glob(f"offline-run-*-{trial_id}"))
    return [record for folder in folders for record in records(folder / f"run-{trial_id}.wandb")]


def history(out: Path, trial_id: str) -> list[tuple[int, dict[str, float]]]:
    rows = []
    for record in runs(out, trial_id):
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append((int(record.history.step.num), {k: v for k, v in items.items() if not k.startswith("_")}))
    return rows


def is_exported(trial: TrialFolder, out: Path, steps: int) -> None:
    """Fails unless each of the first steps of the trace stands there once, with its values."""
    rows, logged = trial.rows(TRACE), history(out, trial.trial_id)
    assert rows is not None
    of_trace = [(step, items) for step, items in logged if "train/loss" in items]
    assert [step for step, _ in of_trace] == list(range(steps))
    for tag, column in NAMES.items():
        values = np.array([float(items[tag]) for _, items in of_trace])
        np.testing.assert_array_equal(values, rows[column][:steps], tag)


@pytest.mark.slow
def test_runs_are_read_back_resumed_and_never_doubled(study: StudyFolder, tmp_path: Path) -> None:
    """A half exported trial that goes on, then a kill in the middle of it, then the end."""
    is_there()
    out = tmp_path / "out"
    assert exported(study, out) == 0
    done, diverged, half = sorted(study.trials(), key=lambda t: -t.read_state().step)
    is_exported(done, out, done.read_state().step)
    is_exported(diverged, out, 61)
    assert math.isnan(float(history(out, diverged.trial_id)[60][1]["train/grad_norm"]))
    held = len(history(out, half.trial_id))
    assert 0 < held <= 47, "the steps at which a probe may come are held back"
    (run,) = [r.run for r in runs(out, done.trial_id) if r.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.run_group, run.project) == (done.trial_id, "s", "stabstudy")
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["optim.lr"] == 1e-3 and config["seed"] == 0
    summary = [r.summary for r in runs(out, done.trial_id) if r.WhichOneof("record_type") == "summary"]
    values = {u.key or "/".join(u.nested_key): u.value_json for s in summary for u in s.update}
    assert json.loads(values["verdict"]) in ("stable", "rough", "spiky") and "spikes" in values

    killed = (
        "import os, signal, time\nfrom wandb.sdk.wandb_run import Run\nfrom stabstudy import export\n"
        "left, log = [50], Run.log\n"
        "def killed(self, *a, **k):\n    left[0] -= 1\n    log(self, *a, **k)\n"
        "    if not left[0]:\n        time.sleep(2)\n        os.kill(os.getpid(), signal.SIGKILL)\nRun.log = killed"
    )
    shutil.rmtree(half.path)
    planted.plant_trial(study.path, planted.settings(lr=0.1))
    assert exported(study, out, killed) == -signal.SIGKILL
    assert exported(study, out) == 0
    is_exported(half, out, half.read_state().step)
    before = sorted(p.name for p in (out / "wandb").iterdir())
    assert exported(study, out) == 0 and sorted(p.name for p in (out / "wandb").iterdir()) == before


def test_offline_is_the_rule_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_runs.mode() == "offline"
    (tmp_path / "netrc").write_text("machine elsewhere.org\n  login user\n  password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert wandb_runs.mode() == "offline"
    with (tmp_path / "netrc").open("a") as f:
        f.write("machine api.wandb.ai\n  login user\n  password x\n")
    assert wandb_runs.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_runs.mode() == "offline"
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("nothing\n")
    assert wandb_runs.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_runs.mode() == "online"

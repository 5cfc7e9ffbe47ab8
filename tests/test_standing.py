"""A launch over what is on disk: edited files, newer formats, links and devices where files should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_launch import SWEEP, TINY, folder  # noqa: F401  # a fixture

from stabstudy import disk, report, store, sweep

pytestmark = pytest.mark.usefixtures("undrawn")  # but for the launch that the studies are copies of

COMMAND = [*TINY, "launcher=local", "train.steps=8", "seeds=1", "optim.lr=1e-3", "optim.clip=1.0,0.5"]
Capture = pytest.CaptureFixture[str]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a finished study of two trials."""
    path = tmp_path_factory.mktemp("trained")
    (path / "sweeps").mkdir()
    (path / "sweeps" / "check.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STABSTUDY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(path)
        assert sweep.main(COMMAND) == 0
    return path / "results"


@pytest.fixture
def study(folder: Path, trained: Path) -> store.StudyFolder:  # noqa: F811
    """A copy of it."""
    shutil.copytree(trained, folder / "results")
    return store.StudyFolder(folder / "results" / "check")


def edit(path: Path, change: Callable[[dict[str, Any]], Any], seal: bool = False) -> None:
    body = json.loads(path.read_text())
    change(body)
    (store.write_sealed if seal else store.write_json)(path, body)


def test_a_changed_config_is_written_anew_from_the_plan(study: store.StudyFolder, capsys: Capture) -> None:
    trial = study.trials()[0]
    right = trial.config_file.read_bytes()
    edit(trial.config_file, lambda body: body["config"]["optim"].update(beta1=0.95))
    assert report.main([str(study.path)]) == 3
    assert f"damaged, left out: {trial.trial_id}: trials/{trial.trial_id}/config.json: was" in capsys.readouterr().out
    assert sweep.main(COMMAND) == 0
    assert "written anew: " in capsys.readouterr().out and trial.config_file.read_bytes() == right


def test_a_config_without_a_checksum_stays_as_it_is(study: store.StudyFolder) -> None:
    trial = study.trials()[0]
    body = trial.read_config()
    store.write_json(trial.config_file, body)
    before = trial.config_file.read_bytes()
    assert sweep.main(COMMAND) == 0 and trial.config_file.read_bytes() == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: edit(p, lambda body: body.update(init_loss=1.0)),
        lambda p: edit(p, lambda body: body.update(records={}), seal=True),
        lambda p: p.write_text("{"),
        lambda p: (p.unlink(), p.mkdir()),
        lambda p: (p.unlink(), os.mkfifo(p)),
        lambda p: (p.unlink(), p.symlink_to("nowhere")),
    ],
    ids=["edited", "no record", "broken", "folder", "pipe", "link to nothing"],
)
def test_a_damaged_state_is_named_and_stops_no_other_trial(
    study: store.StudyFolder, spoil: Callable[[Path], Any], capsys: Capture
) -> None:
    bad, other = study.trials()
    other.state_file.unlink()
    spoil(bad.state_file)
    before = files(bad.path)
    assert sweep.main([*COMMAND, "--dry-run"]) == 0
    assert f"damaged: {bad.path}" in capsys.readouterr().out
    assert sweep.main(COMMAND) == 3
    out = capsys.readouterr()
    (line,) = [line for line in out.out.splitlines() if line.startswith("damaged, left alone")]
    assert str(bad.state_file) in line and "internal" not in out.err
    assert other.read_state().status == "done" and files(bad.path) == before
    assert sweep.main(["sweep=check", "--status"]) == 0


@pytest.mark.parametrize("entry", ["log.txt", ".lock", "trace.live", "probes.live", "summary.json", "config.json"])
def test_a_folder_in_the_place_of_a_trials_file_is_named(study: store.StudyFolder, entry: str, capsys: Capture) -> None:
    bad, other = study.trials()
    for trial in (bad, other):
        trial.state_file.unlink()
    (bad.path / entry).unlink(missing_ok=True)
    (bad.path / entry).mkdir()
    assert sweep.main(COMMAND) == 3
    out = capsys.readouterr()
    assert f"{bad.path / entry}: is a folder, not a file" in out.out and "internal" not in out.err
    assert other.read_state().status == "done"


@pytest.mark.parametrize("entry", [".lock", "sweep.yaml", "provenance.json", "trials.parquet"])
def test_a_folder_in_the_place_of_a_studys_file_is_the_environment(
    study: store.StudyFolder, entry: str, capsys: Capture
) -> None:
    (study.path / entry).unlink()
    (study.path / entry).mkdir()
    before = files(study.path)
    code = sweep.main(COMMAND)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == (2 if entry == "sweep.yaml" else 4) and f"{study.path / entry}: is a folder, not a file" in line
    assert files(study.path) == before


NEWER = "format 99, this version reads up to 1"


@pytest.mark.parametrize("name", ["config.json", "state.json", "provenance.json", "sweep.yaml"])
def test_a_newer_format_is_refused_and_never_written_over(study: store.StudyFolder, name: str, capsys: Capture) -> None:
    trial = study.trials()[1]
    path = next(p for p in (trial.path / name, study.path / name) if p.exists())
    if name == "sweep.yaml":
        path.write_text(path.read_text().replace("format: 1", "format: 99"))
    else:
        edit(path, lambda body: body.update(format=99))
    study.trials()[0].state_file.unlink()
    before = files(study.path)
    for arguments in (COMMAND, [*COMMAND, "--dry-run"]):
        if name == "provenance.json" or "--dry-run" not in arguments:
            assert sweep.main(arguments) == 2
            assert NEWER in capsys.readouterr().err
    before.pop(".lock"), (now := files(study.path)).pop(".lock")
    assert now == before


def test_a_study_that_is_being_worked_on_is_refused_before_anything_is_composed_or_read(
    folder: Path,  # noqa: F811
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten launches at once: nine of them have nothing to do, and their Pythons share the cores with the tenth."""
    made = folder / "results" / "check"
    made.mkdir(parents=True)
    monkeypatch.setattr("stabstudy.planning.compose.base", None)
    monkeypatch.setattr("stabstudy.data.sources.fingerprint", None)
    with disk.lock(made):
        assert sweep.main(COMMAND) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: machine: {made}: locked by pid {os.getpid()} on \S+ since 20\S+", line)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    with disk.lock(made):
        assert sweep.main([*COMMAND, "optim.lrr=1"]) == 2, "what is wrong with the command comes first"


def test_a_launch_that_loses_loads_neither_torch_nor_what_trains(folder: Path) -> None:  # noqa: F811
    made = folder / "results" / "check"
    made.mkdir(parents=True)
    code = (
        "import sys; from stabstudy import sweep; code = sweep.main(sys.argv[1:])\n"
        "heavy = {'torch', 'ray', 'pandas', 'matplotlib', 'stabstudy.sweeping.launch'} & set(sys.modules)\n"
        "assert not heavy, heavy\nsys.exit(code)"
    )
    with disk.lock(made):
        command = [sys.executable, "-c", code, *COMMAND]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "locked by pid" in done.stderr, done.stderr


# links


@pytest.mark.parametrize("entry", ["trials", "report", "sweep.yaml", "provenance.json", ".lock", "state.json.7.tmp"])
def test_a_link_in_a_studys_folder_is_refused_and_not_followed(
    study: store.StudyFolder, entry: str, capsys: Capture, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    if (study.path / entry).exists():
        (study.path / entry).rename(outside)
    else:
        outside.write_text("mine")
    (study.path / entry).symlink_to(outside)
    before = files(tmp_path) | files(outside)
    assert sweep.main([*COMMAND, "optim.lr=1e-3,2e-3"]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == f"error: machine: {study.path / entry}: is a symbolic link"
    assert files(tmp_path) | files(outside) == before


@pytest.mark.parametrize(
    "entry", ["", "checkpoint", "state.json", "log.txt", "trace.live", "trace.parquet.tmp", ".lock"]
)
def test_a_link_in_a_trials_folder_leaves_the_trial_alone(
    study: store.StudyFolder, entry: str, capsys: Capture, tmp_path: Path
) -> None:
    bad, other = study.trials()
    for trial in (bad, other):
        trial.state_file.unlink()
    outside, link = tmp_path / "outside", bad.path / entry
    if link.exists():
        link.rename(outside)
    else:
        outside.mkdir() if entry == "checkpoint" else outside.write_text("mine")
    link.symlink_to(outside)
    before = files(outside) or outside.lstat().st_mtime_ns
    assert sweep.main(COMMAND) == 3
    out = capsys.readouterr()
    assert f"{link}: is a symbolic link" in out.out and "internal" not in out.err
    assert (files(outside) or outside.lstat().st_mtime_ns) == before and link.is_symlink()
    assert other.read_state().status == "done"

"""`python -m stabstudy.report`: exit codes, what is said and what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest

from stabstudy.report import main, write_report
from stabstudy.store import StoreError
from stabstudy.trace import TRACE


def small(path: Path) -> Path:
    """One trial, a rough one."""
    return planted.plant_study(path, depths=(2,), lrs=(1e-3,), seeds=(0,))


def test_a_finished_study_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    assert main([str(study)]) == 0
    out = capsys.readouterr()
    page = study / "report" / "index.html"
    assert out.out.splitlines() == ["s: 1 trial", "     1 rough", f"report: {page}"] and not out.err
    assert page.is_file() and (study / "report" / "report.md").is_file()
    assert (study / "trials.parquet").is_file() and (study / "spikes.parquet").is_file()


def test_out_takes_the_place_of_the_folder(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    assert main([str(study), "--out", str(tmp_path / "deep" / "out")]) == 0
    assert (tmp_path / "deep" / "out" / "index.html").is_file() and not (study / "report").exists()


def test_several_studies_are_each_reported_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [small(tmp_path / "a"), small(tmp_path / "b")]
    assert main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a" / "index.html").is_file() and (tmp_path / "out" / "b" / "index.html").is_file()
    assert capsys.readouterr().out.splitlines()[-1] == f"comparison: {tmp_path / 'out' / 'index.html'}"
    assert (tmp_path / "out" / "index.html").is_file()


def test_studies_of_one_name_do_not_overwrite_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(small(tmp_path / where / "s")) for where in ("old", "new")]
    assert main([*folders, "--out", str(tmp_path / "out")]) == 2
    assert "two of the studies have the same name: s, s" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_study_may_be_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(tmp_path / "inside")
    monkeypatch.chdir(study)
    assert main(["."]) == 0
    assert "<h1>inside</h1>" in (study / "report" / "index.html").read_text()


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_study_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    good = small(tmp_path / "good")
    assert main([str(good), str(tmp_path / name)]) == 2
    out = capsys.readouterr()
    assert (
        out.err == f"error: report: {tmp_path / name}: is not a study (it has no sweep.yaml and no trials/)\n"
        and not out.out
    )
    assert not (good / "report").exists() and list((tmp_path / "empty").iterdir()) == []


def test_nothing_done_is_written_and_told_by_the_code(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    assert main([str(tmp_path / "s")]) == 3
    planted.plant_trial(tmp_path / "s", planted.settings(), status="interrupted", steps_done=40)
    assert main([str(tmp_path / "s")]) == 3
    assert "nothing to draw" in (tmp_path / "s" / "report" / "index.html").read_text()


def test_a_damaged_trial_is_named_and_told_by_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    bad = planted.plant_trial(study, planted.settings(lr=0.5))
    bad.finished(TRACE).write_bytes(bad.finished(TRACE).read_bytes()[:-1])
    assert main([str(study)]) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert line.startswith(f"damaged, left out: {bad.trial_id}: trials/{bad.trial_id}/trace.parquet: sha256 is")


def test_a_failed_trial_is_no_failure_of_the_report(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    planted.plant_trial(study, planted.settings(lr=0.5), status="failed", steps_done=3)
    assert main([str(study)]) == 0


def test_a_folder_that_cannot_be_written_is_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    (tmp_path / "out").write_text("a file where the folder should be")
    assert main([str(study), "--out", str(tmp_path / "out")]) == 4
    assert capsys.readouterr().err.startswith("error: report: ")


@pytest.mark.slow
def test_a_large_study_tells_how_far_its_report_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,), seeds=(0,))
    quiet: list[str] = []
    write_report(path, quiet.append)
    monkeypatch.setattr("stabstudy.report.LARGE", 3)
    said: list[str] = []
    write_report(path, said.append)
    assert said == ["reading 3 trials", "building the page", "writing the page, and one for each trial", *quiet]


def test_write_report_says_what_main_prints(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    said: list[str] = []
    assert write_report(study, said.append) == study / "report" / "index.html"
    assert said[1:] == ["     1 rough", f"report: {study / 'report' / 'index.html'}"]
    with pytest.raises(StoreError):
        write_report(tmp_path, said.append)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--nonsense"], 2)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


def test_help_and_errors_wait_for_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from stabstudy.report import main\n"
        f"assert main([{str(tmp_path)!r}]) == 2\n"
        "heavy = {'pandas', 'matplotlib', 'scipy', 'pyarrow', 'jinja2', 'torch', 'ray', 'hydra'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_who_leaves_early_hears_no_complaint(tmp_path: Path) -> None:
    study, other = small(tmp_path / "s"), small(tmp_path / "other")
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "stabstudy.report", str(study), str(other)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert (study / "report" / "index.html").is_file() and (other / "report" / "index.html").is_file()

"""`python -m stabstudy.report`: exit codes, what is said and what is written."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted
import pyarrow.parquet as pq
import pytest

from stabstudy import progress_line
from stabstudy.report import main, write_report
from stabstudy.store import StoreError
from stabstudy.trace import TRACE


def small(path: Path) -> Path:
    """One trial, a rough one."""
    return planted.plant_study(path, depths=(2,), lrs=(1e-3,), seeds=(0,))


def test_a_finished_study_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_line, "EVERY_SECONDS", 3600.0)  # a slow machine would say how far it is
    study = small(tmp_path / "s")
    assert main([str(study)]) == 0
    out = capsys.readouterr()
    page = study / "report" / "index.html"
    answer = "use: no recipe: no cell is stable and trained to its end"
    assert out.out.splitlines() == ["s: 1 trial", "     1 rough", answer, f"report: {page}"] and not out.err
    assert page.is_file() and (study / "report" / "report.md").is_file()
    assert (study / "trials.parquet").is_file() and (study / "spikes.parquet").is_file()


@pytest.mark.usefixtures("undrawn")
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


@pytest.mark.usefixtures("undrawn")
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


def test_a_study_given_by_its_name_is_answered_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "results" / "mine")
    monkeypatch.chdir(tmp_path)
    assert main(["mine"]) == 2 and main(["yours"]) == 2
    named, unknown = capsys.readouterr().err.splitlines()
    assert named.endswith("trials/) (did you mean results/mine?)") and unknown.endswith("trials/)")


def test_nothing_done_is_written_and_told_by_the_code(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    assert main([str(tmp_path / "s")]) == 3
    planted.plant_trial(tmp_path / "s", planted.settings(), status="interrupted", steps_done=40)
    assert main([str(tmp_path / "s")]) == 3
    assert "nothing to draw" in (tmp_path / "s" / "report" / "index.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_trial_is_named_and_told_by_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    bad = planted.plant_trial(study, planted.settings(lr=0.5))
    bad.finished(TRACE).write_bytes(bad.finished(TRACE).read_bytes()[:-1])
    assert main([str(study)]) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged")]
    assert line.startswith(f"damaged, left out: {bad.trial_id}: trials/{bad.trial_id}/trace.parquet: sha256 is")


@pytest.mark.usefixtures("undrawn")
def test_a_failed_trial_is_no_failure_of_the_report(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    planted.plant_trial(study, planted.settings(lr=0.5), status="failed", steps_done=3)
    assert main([str(study)]) == 0


@pytest.mark.usefixtures("undrawn")
def test_a_folder_that_cannot_be_written_is_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    (tmp_path / "out").write_text("a file where the folder should be")
    assert main([str(study), "--out", str(tmp_path / "out")]) == 4
    assert capsys.readouterr().err.startswith("error: report: ")


def contents(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every entry below the folder, with the time it was changed."""
    return {
        str(p.relative_to(path)): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in sorted(path.rglob("*"))
    }


@pytest.fixture
def colleagues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two studies below a folder that cannot be written, also by root, to whom modes mean nothing."""
    there = tmp_path / "colleague"
    paths = [small(there / "a"), small(there / "b")]
    opened, access = open, os.access

    def refuse(path: object, flags: object, *more: Any, **named: Any) -> Any:
        if str(path).startswith(f"{there}{os.sep}") and any(c in str(flags) for c in "wxa+"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *more, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", refuse)  # what pathlib opens with
    writing = os.W_OK
    monkeypatch.setattr(os, "access", lambda p, m: not (m & writing and str(p).startswith(str(there))) and access(p, m))
    return paths


@pytest.mark.usefixtures("undrawn")
def test_a_study_that_cannot_be_written_is_reported_elsewhere(
    colleagues: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path / "colleague")
    assert main([str(colleagues[0])]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: report: ") and str(colleagues[0]) in line and "; --out DIR writes" in line
    out = tmp_path / "mine" / "deep"
    assert main([str(colleagues[0]), "--out", str(out)]) == 0
    assert {"index.html", "report.md", "trials.parquet", "spikes.parquet", "trials.csv"} <= {
        p.name for p in out.iterdir()
    }
    assert main([*map(str, colleagues), "--out", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both" / "index.html").is_file()
    assert all((tmp_path / "both" / n / "trials.parquet").is_file() for n in ("a", "b"))
    assert contents(tmp_path / "colleague") == before


@pytest.mark.usefixtures("undrawn")
def test_out_gets_the_tables_that_the_study_would_get(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    before = contents(study)
    assert main([str(study), "--out", str(tmp_path / "out")]) == 0
    assert contents(study) == before
    assert main([str(study)]) == 0
    for name in ("trials.parquet", "spikes.parquet"):
        assert (study / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("name", ["provenance.json", "trials.parquet", "spikes.parquet"])
@pytest.mark.usefixtures("undrawn")
def test_what_a_newer_version_wrote_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    study = small(tmp_path / "s")
    assert main([str(study)]) == 0
    if name == "provenance.json":
        (study / name).write_text('{"format": 99}')
    else:
        table = pq.read_table(study / name)
        pq.write_table(table.replace_schema_metadata({"format": "99"}), study / name)
    capsys.readouterr()
    before = (study / name).read_bytes()
    assert main([str(study)]) == 2
    assert "format 99, this version " in capsys.readouterr().err and (study / name).read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_provenance_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small(tmp_path / "s")
    (study / "provenance.json").write_text('{"question": "Why?", "content_sha256": "0"}')
    assert main([str(study)]) == 0
    assert "not shown, damaged: provenance.json" in capsys.readouterr().out.splitlines()
    assert "Why?" not in (study / "report" / "index.html").read_text()


@pytest.mark.parametrize("link", ["report", "report/figures", "report/trials", "report/assets", "report/assets/traces"])
@pytest.mark.usefixtures("undrawn")
def test_a_report_is_never_written_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str
) -> None:
    study, outside = small(tmp_path / "s"), tmp_path / "outside"
    outside.mkdir()
    (outside / "old.svg").write_text("mine")
    (study / link).parent.mkdir(parents=True, exist_ok=True)
    (study / link).symlink_to(outside)
    before = contents(outside)
    assert main([str(study)]) == 4
    assert capsys.readouterr().err == f"error: report: {study / link}: is a symbolic link\n"
    assert contents(outside) == before


@pytest.mark.usefixtures("undrawn")
def test_tables_replace_a_link_and_leave_what_it_led_to(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    (tmp_path / "mine").write_text("mine")
    (study / "trials.parquet").symlink_to(tmp_path / "mine")
    assert main([str(study)]) == 0
    assert (tmp_path / "mine").read_text() == "mine" and not (study / "trials.parquet").is_symlink()


@pytest.mark.usefixtures("undrawn")
def test_write_report_says_what_main_prints(tmp_path: Path) -> None:
    study = small(tmp_path / "s")
    said: list[str] = []
    assert write_report(study, said.append) == study / "report" / "index.html"
    assert [said[1], said[-1]] == ["     1 rough", f"report: {study / 'report' / 'index.html'}"] and len(said) == 4
    with pytest.raises(StoreError):
        write_report(tmp_path, said.append)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--nonsense"], 2)])
def test_usage(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: report: ") for line in lines) and len(lines) == (code != 0)


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

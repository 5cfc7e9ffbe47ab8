"""Parts of a report by several processes: the same answers as by one, whatever happens to a worker."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import planted
import pytest
from conftest import ROOT

from stabstudy.analysis import spreading
from stabstudy.analysis.report.publish import publish
from stabstudy.analysis.report.study_page import report
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import read_tables
from stabstudy.store import StudyFolder


def squares(numbers: list[int]) -> list[tuple[int, int]]:
    return [(number * number, os.getpid()) for number in numbers]


def dies_elsewhere(numbers: list[int]) -> list[int]:
    if os.getpid() != numbers[0]:
        os._exit(3)
    return numbers


def refuses(numbers: list[int]) -> list[int]:
    raise ValueError(f"no {numbers[0]}")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "_cores", lambda: 2)


def test_results_stand_in_the_order_of_the_items(two_cores: None) -> None:
    found = spreading.spread(squares, range(50), seconds=100)
    assert [square for square, _ in found] == [n * n for n in range(50)]
    assert os.getpid() not in {pid for _, pid in found}


@pytest.mark.parametrize(("items", "seconds"), [(range(50), spreading.WORTH_S / 2), (range(1), 100), ((), 100)])
def test_little_work_starts_no_process(two_cores: None, items: range, seconds: float) -> None:
    assert spreading.spread(squares, items, seconds) == [(n * n, os.getpid()) for n in items]


@pytest.mark.parametrize("seconds", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_progress_counts_up_to_all_of_it(two_cores: None, seconds: float) -> None:
    counted: list[tuple[int, int]] = []
    spreading.spread(squares, range(50), seconds, lambda done, of: counted.append((done, of)))
    assert counted == sorted(counted) and counted[-1] == (50, 50) and len(counted) == (1 if seconds == 1 else 8)
    if seconds == 1:
        return
    counted.clear()
    here = [os.getpid()] * 50
    spreading.spread(dies_elsewhere, here, 100, lambda done, of: counted.append((done, of)))
    assert len(counted) > 5 and counted[-1] == (50, 50), "nor is it silent where a worker has died"


def test_a_worker_that_dies_costs_no_result(two_cores: None) -> None:
    here = [os.getpid()] * 5
    assert spreading.spread(dies_elsewhere, here, seconds=100) == here


def test_what_the_work_raises_is_raised(two_cores: None) -> None:
    with pytest.raises(ValueError, match="no 7"):
        spreading.spread(refuses, [7, 7], seconds=100)


@pytest.mark.slow
def test_a_report_by_several_processes_is_that_of_one(
    tmp_path: Path, two_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr, seed in ((1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-2, 1)):
        planted.plant_trial(tmp_path / "s", planted.settings(lr=lr, seed=seed), logit=4.0)
    broken = planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-1), logit=4.0)
    record = broken.path / "trace.parquet"
    record.write_bytes(record.read_bytes()[:-9])
    answers = []
    for worth in (0.0, 1e9):
        monkeypatch.setattr(spreading, "WORTH_S", worth)
        study = Study(StudyFolder(tmp_path / "s"), read_tables(StudyFolder(tmp_path / "s")))
        publish(study, report(study), tmp_path / f"{worth}")
        files = {p.name: p.read_bytes() for p in (tmp_path / f"{worth}").rglob("*") if p.is_file()}
        answers.append((repr(study.tables), files))
    assert answers[0] == answers[1]
    assert [d.trial_id for d in study.damaged] == [broken.trial_id]
    assert study.tables.computed == 4 and len(answers[0][1]) == 44


def test_a_script_without_a_guard_may_use_them(tmp_path: Path) -> None:
    """A process that ran the script again would start tables of its own, and so on."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import math
        from stabstudy.analysis import spreading

        def roots(numbers):
            return [math.sqrt(n) for n in numbers]

        spreading._cores = lambda: 2
        print("ran", spreading.spread(roots, [1, 4, 9], seconds=100))
        """)
    )
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "ran [1.0, 2.0, 3.0]\n", done.stderr

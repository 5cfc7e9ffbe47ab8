"""`report --watch`: a page that is written again while its study is trained, and is a plain one afterwards."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import planted
import pytest
from test_launch import until

from stabstudy import disk, report
from stabstudy.analysis.elements import Report
from stabstudy.analysis.report.html import html_index
from stabstudy.analysis.report.watched import RETRIES, Mark, plain, watch
from stabstudy.store import StoreError, StudyFolder
from stabstudy.tailing import Follower

PLAIN = html_index(Report("s", "q?", "None of 1 trial has a verdict.", (), (), (), ()))
MARK = Mark(7.2, 1, 3, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def test_a_marked_page_reloads_itself_and_says_when_it_was_written() -> None:
    page = MARK(PLAIN)
    assert page.count('<meta http-equiv="refresh" content="8">') == 1 and 'http-equiv="refresh"' not in PLAIN
    assert "Written 2026-01-02 03:04:05 UTC" in page and "1 of 3 trials had ended" in page
    assert plain(page) == PLAIN == plain(PLAIN), "and nothing of it is left"
    with pytest.raises(ValueError, match="is not a page"):
        MARK("<p>")


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    """One trial done, one running."""
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    planted.plant_trial(folder, planted.settings(lr=1e-2, seed=0), status="running", steps_done=40)
    return StudyFolder(folder)


def end(study: StudyFolder, status: str = "failed") -> None:
    """The running trial ends."""
    for trial in study.trials():
        if (state := trial.read_state()).status in ("running", "lost"):
            trial.write_state(replace(state, status=status))


def test_a_look_reads_only_what_changed_and_knows_when_all_is_over(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower, first = Follower(study), Follower(study).look()
    assert (first.is_launched, first.ended, len(first.stamps), first.is_over) == (False, 1, 2, False)
    with disk.lock(study.path):
        assert (launched := follower.look()).is_launched and launched.stamps == first.stamps
        reads: list[str] = []
        kept = type(study.trials()[0]).read_state
        monkeypatch.setattr(type(study.trials()[0]), "read_state", lambda t: reads.append(t.trial_id) or kept(t))
        assert follower.look() == launched and reads == []
        end(study)
        reads.clear()
        ended = follower.look()
        assert ended != launched and len(reads) == 1 and ended.ended == 2 and not ended.is_over, "its launch goes on"
    assert follower.look().is_over
    planted.plant_trial(study.path, planted.settings(lr=0.1, seed=0), status="pending", steps_done=0)
    assert not follower.look().is_over


def watched(
    study: StudyFolder, *then: Callable[[], object], fail: int = 0
) -> tuple[list[Mark | None], list[str], list[float]]:
    """What was written, said and slept; `then` happens while it sleeps, one after another."""
    written: list[Mark | None] = []
    lines: list[str] = []
    slept: list[float] = []
    left, failures = list(then), [fail]

    def write(mark: Mark | None) -> None:
        if failures[0]:
            failures[0] -= 1
            raise StoreError("a trial ended under its reader")
        written.append(mark)
        (study.path / "index.html").write_text(mark(PLAIN) if mark else PLAIN)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        left.pop(0)()

    watch(study, study.path / "index.html", 5, write, lines.append, sleep)
    return written, lines, slept


def nothing() -> None:
    """Time passes."""


def test_it_writes_where_something_changed_and_ends_with_a_plain_page(study: StudyFolder) -> None:
    launch = contextlib.ExitStack()
    launch.enter_context(disk.lock(study.path))
    written, lines, slept = watched(study, nothing, nothing, lambda: end(study), launch.close)
    assert [mark and (mark.ended, mark.trials) for mark in written] == [(1, 2), (2, 2), None] and slept == [5] * 4
    assert [line[8:] for line in lines] == [" UTC: 1 of 2 trials have ended", " UTC: 2 of 2 trials have ended"]
    assert (study.path / "index.html").read_text() == PLAIN


def test_a_study_that_is_over_is_written_once(study: StudyFolder) -> None:
    end(study)
    assert watched(study) == ([None], [], [])


def test_a_study_without_a_launch_is_waited_for(study: StudyFolder) -> None:
    _, (line,), _ = watched(study, nothing, lambda: end(study, "oom"))
    assert line.endswith("1 of 2 trials have ended; no launch is at work, the next one is waited for")


def test_a_trial_that_ends_under_its_reader_is_read_again(study: StudyFolder) -> None:
    written, *_ = watched(study, *[nothing] * RETRIES, lambda: end(study), fail=RETRIES)
    assert [mark is None for mark in written] == [False, True]
    with pytest.raises(StoreError):
        watched(study, *[nothing] * 9, fail=99)


def test_ctrl_c_leaves_a_plain_page(study: StudyFolder) -> None:
    def interrupt() -> None:
        assert "refresh" in (study.path / "index.html").read_text()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(study, interrupt)
    assert (study.path / "index.html").read_text() == PLAIN


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--watch", "0"], "--watch: must be a number of seconds in [1, 86400], got 0"),
        (["--watch", "nan"], "--watch: must be a number of seconds in [1, 86400], got nan"),
        (["--watch=-5"], "--watch: must be a number of seconds in [1, 86400], got -5"),
        (
            ["--watch", "soon"],
            "--watch: must be a number of seconds in [1, 86400] (name the study before it), got soon",
        ),
        (["--watch", "5", "STUDY"], "--watch: watches one study"),
        (["--watch", "5", "--baseline", "STUDY", "--fail-on", "rough"], "--watch: does not go with --baseline"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    study: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    shutil.copytree(study.path, tmp_path / "other")
    given = [str(tmp_path / "other") if word == "STUDY" else word for word in words]
    assert report.main([str(study.path), *given]) == 2
    assert line in capsys.readouterr().err and not study.report.exists()


def test_two_writers_of_a_folder_take_turns(tmp_path: Path) -> None:
    with disk.turn(tmp_path):
        began = time.monotonic()
        with disk.turn(tmp_path, 0.3):
            assert time.monotonic() - began >= 0.3, "it is waited for, and not for ever"
    began = time.monotonic()
    with disk.turn(tmp_path):
        assert time.monotonic() - began < 0.1
    assert not list(tmp_path.iterdir())


WORDS = [
    "data=synthetic", "data.synthetic.bytes=200000", "data.seq_len=32", "model.dim=16", "model.n_heads=2",
    "model.depth=1", "train.batch_size=4", "train.steps=700", "optim.warmup_steps=10", "train.eval_sequences=8",
    "optim.lr=1e-3,0.1", "study=tiny", "seeds=1", "launcher=local",
]  # fmt: skip


@pytest.mark.slow
def test_a_launch_is_watched_from_beside(tmp_path: Path) -> None:
    """Marked while it trains, plain after Ctrl-C and at the end, when it is the launch's own page."""
    launch = subprocess.Popen([sys.executable, "-m", "stabstudy.sweep", *WORDS], cwd=tmp_path)
    study, page = StudyFolder(tmp_path / "results" / "tiny"), tmp_path / "out" / "index.html"
    until(lambda: any(trial.state_file.exists() for trial in study.trials()))
    words = [sys.executable, "-m", "stabstudy.report", str(study.path), "--watch", "1", "--out", str(page.parent)]
    watching = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    until(page.exists)
    marked = page.read_text()
    assert 'http-equiv="refresh" content="1"' in marked and " UTC, while the study is trained" in marked
    watching.send_signal(signal.SIGINT)
    assert watching.wait(60) == 130 and "refresh" not in page.read_text()
    again = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == f"report: {page}"
    assert launch.wait(120) == 0 and {t.read_state().status for t in study.trials()} == {"done"}
    assert page.read_bytes() == (study.report / "index.html").read_bytes()

"""What a person sees while nothing trains yet, and while the report is written: on a terminal, and in a log."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from stabstudy import progress_line
from stabstudy.progress_line import ProgressLine
from stabstudy.sweeping import progress
from stabstudy.sweeping.progress import Board


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    for module in (progress, progress_line):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def board() -> Iterator[tuple[Board, io.StringIO]]:
    text = io.StringIO()
    yield Board("study: q?", {"a": "lr=1", "b": "lr=2"}, 0, console=Console(file=text, width=120)), text


def shown(board: Board, text: io.StringIO) -> list[str]:
    text.seek(0)
    text.truncate()
    board.console.print(board)
    return [line.rstrip() for line in text.getvalue().rstrip().splitlines()]


def test_the_board_says_that_ray_starts_and_for_how_long(board: tuple[Board, io.StringIO], clock: list[float]) -> None:
    table, text = board
    with table.waiting("starting Ray"):
        assert text.getvalue() == "starting Ray\n", "a log has one line of it"
        clock[0] += 12
        assert shown(table, text) == ["study: q?", "0 of 2 trials ended", "starting Ray, 12 s"], "and no empty table"
    assert shown(table, text) == ["study: q?", "0 of 2 trials ended", "the first trials start"]


def test_before_its_first_step_a_trial_has_no_numbers(board: tuple[Board, io.StringIO], clock: list[float]) -> None:
    table, text = board
    table.start("a")
    clock[0] += 7
    *_, row = shown(table, text)
    assert row.split() == ["a", "lr=1", "starting,", "7", "s"] and "nan" not in "".join(shown(table, text))
    table.progress("a", {"step": 3, "steps": 9, "loss": float("nan"), "grad_norm": 1.5})
    *_, row = shown(table, text)
    assert row.split() == ["a", "lr=1", "3/9", "nan", "1.5", "0", "0"], "a loss that is NaN is shown"


def test_a_line_names_the_part_and_counts_it(clock: list[float]) -> None:
    line = ProgressLine("report", None)
    with line:
        assert line.text == "report"
        line("statistics and figures")
        clock[0] += 5
        assert line.text == "report: statistics and figures, 5 s"
        line("pages of trials", 12, 36)
        assert line.text == "report: pages of trials: 12 of 36"
        clock[0] += 3
        line("pages of trials", 24, 36)
        assert line.text == "report: pages of trials: 24 of 36, 3 s", "the clock is that of the part"


def test_a_log_gets_few_lines_and_a_short_report_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress_line, "EVERY_SECONDS", 0.05)
    with ProgressLine("report", lines.append) as line:
        line("reading 9 trials")
        limit = time.monotonic() + 10
        while len(lines) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
    assert len(lines) >= 2 and set(lines) == {"report: reading 9 trials"}
    spoken = len(lines)
    time.sleep(0.2)
    assert len(lines) == spoken, "nothing after its end"
    monkeypatch.setattr(progress_line, "EVERY_SECONDS", 15.0)
    with ProgressLine("report", lines.append) as line:
        line("reading 9 trials")
    assert len(lines) == spoken


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_line_that_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: Any = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine("report", lambda line: None) as line:
        line("pages of trials", 1, 2)
        line._live.refresh()  # type: ignore[union-attr]
    assert "report: pages of trials: 1 of 2" in terminal.getvalue()
    assert terminal.getvalue().endswith(("\x1b[2K", "\x1b[?25h", "\r\x1b[1A\x1b[2K"))

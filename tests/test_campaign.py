"""The campaign of faults: its record, its table, and what counts as an injection and as a violation."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import campaign
from faults.campaign import Part
from faults.counts import COUNTS


def test_the_table_is_what_ran() -> None:
    page, rows = campaign.README.read_text(), campaign.read(campaign.ROWS)
    assert campaign.with_table(page, rows) == page, "PYTHONPATH=tests python -m faults.campaign writes it anew"
    assert {row["injection"] for row in rows} <= set(COUNTS)


def test_a_part_counts_what_struck_and_keeps_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> list[float]:
        drawn = []
        with Part("writer", wanted=4, seed=7, rows=tmp_path / "rows") as running:
            for rng in running.injections():
                drawn.append(rng.random())
                running.count(running.tried != 1)
        return drawn

    first = run()
    assert len(first) == 5 and first == run(), "one came too late; a seed gives the same again"
    rows = campaign.read(tmp_path / "rows")
    assert [(r["injection"], r["n"], r["violations"], r["seed"]) for r in rows] == [("writer", 4, 0, 7)] * 2
    assert "writer: 4 injections, 0 violations" in capsys.readouterr().out


def test_violations_are_injections_and_fail_the_part(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    with pytest.raises(AssertionError, match=r"seed 1\ninjection 1: I1 lost\ninjection 1: I2 torn"), \
            Part("writer", 3, 1, rows) as running:  # fmt: skip
        for _ in running.injections():
            running.check(running.tried != 1, "I1 lost")
            running.check(running.tried != 1, "I2 torn")
    with pytest.raises(KeyError), Part("writer", 3, 1, rows) as running:
        raise KeyError("a bug of the part itself")
    assert [(r["n"], r["violations"]) for r in campaign.read(rows)] == [(3, 1), (0, 1)]


def test_the_table_has_every_part_and_the_last_row_of_each() -> None:
    row = {"injection": "writer", "n": 9, "violations": 2, "date": "2026-01-01", "commit": "abc", "seconds": 90}
    lines = campaign.table([row, row | {"violations": 0}]).splitlines()
    assert len(lines) == 2 + len(COUNTS)
    assert lines[2].endswith("| 9 of 1,000 | 0 | 2026-01-01 | abc | 1.5 |") and "not yet run" in lines[3]

"""Writers that are killed: rows that were acknowledged are there, states are old or new."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faults import children
from faults.campaign import Part
from faults.invariants import differences
from faults.killer import Child, killed
from stabstudy import live, store, trace
from stabstudy.trace import DamagedRecord, Rows

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
MOST = 40_000
"""Rows of a file; the next one is written then."""


def expected(count: int) -> Rows:
    """Made without the package's bytes of a row."""
    columns, nulls = children.columns_at(np.arange(count))
    columns["skip"] = np.array(["amp", "nonfinite", "spike", "no_targets"], object)[columns["skip"]]
    absent = [name for name in trace.TRACE.names if name not in columns]
    columns |= {name: np.full(count, np.nan) for name in absent}
    nulls |= {name: np.full(count, name in absent) for name in trace.TRACE.names if name not in nulls}
    return Rows(trace.TRACE, columns, nulls)


def of_record(path: Path, committed: int) -> list[str]:
    """I1 and I2 of a record whose writer was killed after it had acknowledged so many rows."""
    try:
        rows = live.read(path, trace.TRACE)
    except FileNotFoundError:
        return [f"I1 no file, {committed} rows acknowledged"] if committed else []
    except DamagedRecord as error:
        return [f"I2 {error}"]
    broken = [f"I1 {len(rows)} rows, {committed} acknowledged"] if len(rows) < committed else []
    return broken + [f"I1 {line}" for line in differences(rows, expected(len(rows)))]


def point(rng: random.Random) -> str:
    """Half of the kills fall between two instructions that a random moment would hardly hit."""
    name = rng.choice(["live.short_write", "live.write", "live.written"])
    return f"{name}:kill@{rng.randint(1, 200)}" if rng.random() < 0.5 else ""


def test_no_acknowledged_row_is_lost(part: Begin, tmp_path: Path) -> None:
    with part("writer") as running:
        number, kept, torn = 0, 0, 0
        for rng in running.injections():
            path = tmp_path / f"{number}.live"
            child = killed(children.write_rows, path, str(rng.random()), MOST, rng=rng, seconds=0.1, point=point(rng))
            acks = child.end()
            running.count(child.was_killed)
            committed = int(acks[-1]) if acks else kept
            running.add(of_record(path, committed))
            if not path.exists():
                continue
            note, rows = (read := live.read(path, trace.TRACE)).note, len(read)
            torn += bool(note)
            # as a further attempt does, from a checkpoint at or below the last row
            kept = rng.randint(max(0, rows - 100), rows)
            dropped, _ = live.cut(path, trace.TRACE, kept)
            running.check(dropped == rows - kept, f"I4 {dropped} rows dropped of {rows}, {kept} to be kept")
            running.check(not live.read(path, trace.TRACE).note, "I2 the torn end is still there")
            running.add(of_record(path, kept))
            if kept > MOST // 2:
                number, kept = number + 1, 0
        print(f"{torn} torn ends, all cut")
        assert torn > running.n // 20, "no kill tore a block: the test proves less than it says"


def test_a_lost_row_would_be_seen(tmp_path: Path) -> None:
    """Negative control."""
    path = tmp_path / "trace.live"
    child = Child(children.write_rows, path, "0", 500)
    child.end()
    assert child.code == 0 and of_record(path, 500) == []
    data = path.read_bytes()
    path.write_bytes(data[:-40])
    assert len(of_record(path, 500)) == 1 and of_record(path, 500)[0].startswith("I1")
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    assert len(of_record(path, 500)) == 1 and of_record(path, 500)[0].startswith("I2")


def test_a_state_is_the_old_or_the_new_one(part: Begin, tmp_path: Path) -> None:
    trial = store.TrialFolder(tmp_path / "0123456789")
    trial.path.mkdir()
    with part("state") as running:
        last = 0
        for rng in running.injections():
            step = rng.choice(["written", "synced", "renamed", "folder_synced"])
            at = f"state.{step}:kill@{rng.randint(1, 20)}" if rng.random() < 0.5 else ""
            child = killed(children.write_states, trial.path, rng=rng, seconds=0.05, point=at)
            acks = child.end()
            running.count(child.was_killed)
            committed = int(acks[-1]) if acks else last
            state = trial.read_state()
            running.check(committed <= state.step <= committed + 1, f"I1 step {state.step}, {committed} acknowledged")
            store.sweep_leftovers(trial.path)
            running.check(len(list(trial.path.iterdir())) <= 1, "I2 a temporary file is left")
            last = state.step

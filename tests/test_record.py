"""The recorder of a pack: when rows wait no longer, and that waiting changes none of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabstudy import config as cfg
from stabstudy import live
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import MonitorFacts
from stabstudy.trace import PROBES, TRACE, Rows, widths
from stabstudy.training.clipping import NoiseMeans
from stabstudy.training.driver import Taken, Tick
from stabstudy.training.probes import OF_LAYERS, SCALARS
from stabstudy.training.record import JUDGED_AT_ONCE, Recorded, Recorder

COLUMNS = ("loss", "logz_mean", "logit_absmax", "grad_norm", "clip_scale", "loss_scale", "spike", "targets")
CONFIG = cfg.from_dict({"train": {"steps": 200, "skip_nonfinite": True}, "model": {"depth": 2}})
TENSORS = 4


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def recorder(folder: Path, members: int, clock: Clock) -> Recorder:
    folder.mkdir(exist_ok=True)
    facts, given = MonitorFacts(200, 20, 5.0), []
    for k in range(members):
        trace, probes = (live.Writer(folder / f"{k}.{s.name}", s, widths(2), clock) for s in (TRACE, PROBES))
        given.append(Recorded(CONFIG, trace, probes, facts, NoiseMeans(), 0))
    return Recorder(given, COLUMNS, np.array([0, 1, 2, 3]), Rules(), clock)


def steps(n: int, members: int, **planted: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Vectors [n, K, columns] of plain steps, with values at (step, member) of a column."""
    random = np.random.default_rng(0)
    values = 1 + 0.1 * random.random((n, members, len(COLUMNS) + TENSORS))
    values[..., COLUMNS.index("spike")] = 0
    values[..., COLUMNS.index("targets")] = 64
    for name, cells in planted.items():
        for (step, member), value in cells.items():
            values[step, member, COLUMNS.index(name)] = value
    return values


def tick(step: int, alive: tuple[bool, ...]) -> Tick:
    return Tick(step, tuple(1e-3 * (1 + step + k) for k in range(len(alive))), alive)


def probe(members: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.ones((members, len(SCALARS) + len(OF_LAYERS) * 2))


def read(folder: Path, member: int) -> tuple[Rows, Rows]:
    trace, probes = (live.read(folder / f"{member}.{s.name}", s) for s in (TRACE, PROBES))
    return trace, probes


def one_by_one(into: Recorder, values: np.ndarray[Any, np.dtype[np.float64]]) -> Iterator[int]:
    """Judge a step at a time; a member that diverged is live no more, and leaves the vectors at step 60."""
    places = list(range(values.shape[1]))
    alive = set(places)
    for step in range(len(values)):
        if step == 60:
            places = sorted(alive)
        measured = {0: probe(len(places))} if (step + 1) % 10 == 0 else {}
        given = [tick(step, tuple(k in alive for k in places))]
        alive -= set(into.judge(places, given, Taken(values[step : step + 1, places], measured), 0.001 * step))
        yield step


@pytest.mark.parametrize("every", [3, 32, 50])
def test_rows_that_waited_are_those_written_at_once(tmp_path: Path, every: int) -> None:
    """Spikes, skips of three kinds, a member that diverges; then it is not in the vectors any more."""
    planted = {"loss": dict.fromkeys([(40, 1), (41, 1), (42, 1), (70, 0)], math.nan)} | {
        "grad_norm": {(30, 0): 20.0, (100, 2): 30.0},
        "spike": {(50, 2): 1.0},
        "targets": {(55, 0): 0.0},
    }
    values, found = steps(120, 3, **planted), {}
    for name, gap in (("at once", 1), ("waited", every)):
        into = recorder(tmp_path / name, 3, Clock())
        for step in one_by_one(into, values):
            if (step + 1) % gap == 0:
                into.write()
        into.write()
        for member in into.members:
            member.trace.close()
            member.probes.close()
        found[name] = into
        assert into.rows.tolist() == [120, 43, 120] and into.monitor.code == [None, "nonfinite", None]
    for k in range(3):
        for a, b in zip(read(tmp_path / "at once", k), read(tmp_path / "waited", k), strict=True):
            assert len(a) == len(b) > 0
            for name in a.schema.names:
                same = a[name].dtype == np.float64
                assert np.array_equal(a[name], b[name], equal_nan=same) and (a.is_null(name) == b.is_null(name)).all()
    skips = read(tmp_path / "waited", 0)[0]["skip"]
    assert {i: s for i, s in enumerate(skips.tolist()) if s} == {55: "no_targets", 70: "nonfinite"}
    assert read(tmp_path / "waited", 2)[0]["loss"].tolist() == values[:, 2, 0].tolist()
    assert read(tmp_path / "waited", 2)[0]["seconds"].tolist() == [round(0.001 * i, 6) for i in range(120)]
    for into in found.values():
        last = [values[-1, 0, 0], values[-1, 2, 0]]
        assert into.loss[[0, 2]].tolist() == last and math.isnan(into.loss[1])


def test_plain_steps_wait_for_a_second_or_for_the_detector(tmp_path: Path) -> None:
    clock = Clock()
    into, values = recorder(tmp_path, 1, clock), steps(120, 1)
    stepping = one_by_one(into, values)
    for _ in range(JUDGED_AT_ONCE - 1):
        next(stepping)
        assert not into.due
    next(stepping)
    assert into.due
    into.write()
    assert not into.due and len(read(tmp_path, 0)[0]) == 0  # they wait in the writer now
    next(stepping)
    clock.now = 0.99
    assert not into.due
    clock.now = 1.0
    assert into.due
    into.write()
    assert len(read(tmp_path, 0)[0]) == 33 and len(read(tmp_path, 0)[1]) == 3
    clock.now = 1.9
    assert not into.due


def test_a_second_counts_from_when_all_was_written(tmp_path: Path) -> None:
    """An anomaly of one member writes its rows early; those that others have waiting get no older for it."""
    clock = Clock()
    into = recorder(tmp_path, 2, clock)
    stepping = one_by_one(into, steps(60, 2, spike={(9, 0): 1.0}))
    for _ in range(10):
        next(stepping)
    clock.now = 0.5
    assert into.due
    into.write()
    assert [len(read(tmp_path, k)[0]) for k in (0, 1)] == [10, 0]
    clock.now = 1.0
    next(stepping)
    into.write()
    assert [len(read(tmp_path, k)[0]) for k in (0, 1)] == [11, 11]
    assert [len(read(tmp_path, k)[1]) for k in (0, 1)] == [1, 1]


@pytest.mark.parametrize(
    "planted",
    [{"spike": 1.0}, {"targets": 0.0}, {"loss": math.nan}, {"grad_norm": math.inf}],
    ids=["spike skipped", "no targets", "loss", "norm"],
)
def test_an_anomaly_does_not_wait(tmp_path: Path, planted: dict[str, float]) -> None:
    into = recorder(tmp_path, 2, Clock())
    stepping = one_by_one(into, steps(60, 2, **{name: {(3, 1): value} for name, value in planted.items()}))
    for _ in range(3):
        next(stepping)
        assert not into.due
    next(stepping)
    assert into.due
    into.write()
    assert len(read(tmp_path, 1)[0]) == 4 and len(read(tmp_path, 0)[0]) == 0
    next(stepping)
    assert not into.due


def test_weights_that_are_not_finite_do_not_wait(tmp_path: Path) -> None:
    into, lost = recorder(tmp_path, 1, Clock()), probe(1)
    lost[:, SCALARS.index("param_norm")] = math.inf
    for step, vector in ((9, probe(1)), (19, lost)):
        ticks = [tick(i, (True,)) for i in range(step - 9, step + 1)]
        ended = into.judge([0], ticks, Taken(steps(10, 1), {9: vector}), 0.01)
    assert ended == {0: 9} and into.due
    into.write()
    assert [len(rows) for rows in read(tmp_path, 0)] == [20, 2]


def test_a_spike_is_on_the_disk_when_the_detector_has_seen_it(tmp_path: Path) -> None:
    into = recorder(tmp_path, 2, Clock())
    for step in one_by_one(into, steps(40, 2, grad_norm={(30, 1): 30.0})):
        if into.due:
            into.write()
            assert step == JUDGED_AT_ONCE - 1
    assert [len(read(tmp_path, k)[0]) for k in (0, 1)] == [0, 32] and into.spikes.spike_events.tolist() == [0, 1]

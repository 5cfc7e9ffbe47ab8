"""The stability frontier: what holds, edges and their intervals, and what to train next."""

from __future__ import annotations

import math

import pytest

from stabstudy.analysis.frontier import Scale, fit
from stabstudy.analysis.holding import Observation, observations
from stabstudy.analysis.proposals import propose

SCALE = Scale("optim.lr", 1e-4, 1.0, 1.25)


def row(lr: float, seed: int, verdict: str | None, loss: float = 2.0, **more: object) -> dict[str, object]:
    code = "nonfinite" if verdict == "diverged" else "ok"
    return {
        "optim.lr": lr, "seed": seed, "state": "done", "verdict": verdict, "verdict_code": code,
        "verdict_reason": None, "final_loss": loss, "final_loss_capped": loss,
    } | more  # fmt: skip


def test_verdicts_say_what_holds() -> None:
    rows = [row(lr, 0, v, 3 - i) for i, (lr, v) in enumerate([(1e-3, "stable"), (3e-3, "spiky"), (1e-2, "rough")])]
    rows.append(row(0.1, 1, "diverged", 5.0))
    assert observations(rows, "optim.lr", "stable") == [
        (1e-3, 0, True), (3e-3, 0, False), (1e-2, 0, False), (0.1, 1, False),
    ]  # fmt: skip


def test_nothing_known_starts_in_the_middle() -> None:
    assert propose({"a": [], "b": []}, set(), SCALE, [5, 6], 2) == [("a", 1e-2, 5), ("b", 1e-2, 5)]


def test_an_edge_between_two_values() -> None:
    edge = fit(
        {"a": [Observation(1e-3, s, True) for s in range(4)] + [Observation(1e-1, s, False) for s in range(4)]}, SCALE
    )["a"]
    assert edge.status == "open" and edge.n == 8 and not edge.exceptions
    assert math.log10(edge.estimate) == pytest.approx(-2, abs=0.02)
    assert 5e-4 < edge.low < 5e-3 and 2e-2 < edge.high < 0.2

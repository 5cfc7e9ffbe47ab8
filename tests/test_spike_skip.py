"""The sigma rule against its published form in plain Python, and what a non-finite value may not do to it."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stabstudy.training.clipping import SpikeSkip

NAN, INF = math.nan, math.inf
Floats = NDArray[np.float64]


def skipped(loss: Floats, norm: Floats) -> list[int]:
    return skipped_of([(loss, norm)])[0]


def skipped_of(members: list[tuple[Floats, Floats]]) -> list[list[int]]:
    """Of members of one pack, the steps that each had skipped."""
    policy = SpikeSkip(len(members), torch.device("cpu"))
    losses, norms = (np.stack(both) for both in zip(*members, strict=True))
    judged = [policy.judge(torch.tensor(x), torch.tensor(g)).tolist() for x, g in zip(losses.T, norms.T, strict=True)]
    return [[i for i, spikes in enumerate(judged) if spikes[k]] for k in range(len(members))]


def by_hand(loss: Floats, norm: Floats) -> list[int]:
    """Lists, and the standard library's sample deviation."""
    past: list[list[float]] = [[], []]
    found = []
    for i, values in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
        if not all(math.isfinite(x) for x in values):
            continue
        windows = [p[-128:] for p in past]
        if len(past[0]) >= 64 and any(
            x > statistics.fmean(w) + 6 * statistics.stdev(w) for x, w in zip(values, windows, strict=True)
        ):
            found.append(i)
        for p, x in zip(past, values, strict=True):
            p.append(x)
    return found


def series(n: int = 500, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    return 3 + 0.1 * rng.standard_normal(n), np.exp(0.2 * rng.standard_normal(n))


def test_it_is_the_published_rule() -> None:
    loss, norm = series()
    norm[[10, 63, 64, 200, 201, 460]] *= 20
    loss[[150, 300]] += 3
    loss[350:] += 2  # a new level
    expected = by_hand(loss, norm)
    assert skipped(loss, norm) == expected
    assert {150, 200, 300, 350} < set(expected) and not {10, 63} & set(expected) and len(expected) < 12


@pytest.mark.parametrize(("at", "first"), [(63, None), (64, 64)])
def test_it_begins_with_64_values(at: int, first: int | None) -> None:
    loss, norm = series(80)
    norm[at] = 1e3
    assert skipped(loss, norm) == ([] if first is None else [first])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [0, 1])
def test_a_nonfinite_value_enters_nothing(bad: float, column: int) -> None:
    """Published: no spike is found, or every step is skipped, while a NaN is in the window."""
    loss, norm = series()
    norm[300] *= 20
    clean = skipped(loss, norm)
    both = np.insert(loss, 299, 3.0), np.insert(norm, 299, 1e9)
    both[column][299] = bad
    got = skipped(*both)
    assert 299 not in got and [i - (i > 299) for i in got] == clean and 300 in clean


def test_a_constant_series_proves_nothing() -> None:
    flat = np.full(300, 2.0)
    flat[200] = 50.0
    assert skipped(flat, np.full(300, 1.0)) == []


def test_a_drop_is_not_skipped() -> None:
    loss, norm = series()
    norm[200], loss[210] = 0.0, -50.0
    assert skipped(loss, norm) == by_hand(loss, norm) == []


def test_members_of_a_pack_are_judged_each_by_itself() -> None:
    """Spikes of one, a NaN of another, a third that is always NaN, a constant one: as each alone, and by hand."""
    members = [series(400, seed) for seed in range(4)] + [(np.full(400, 2.0), np.full(400, 1.0))]
    members[0][1][[100, 200]] *= 20
    members[1][0][150] += 3
    members[1][1][90:95] = NAN
    members[2][0][:] = NAN
    members[3][1][[70, 71, 300]] = INF, 1e9, 1e9
    assert skipped_of(members) == [skipped(*m) for m in members] == [by_hand(*m) for m in members]
    assert {100, 200} <= set(skipped_of(members)[0]) and skipped_of(members)[2] == []


def test_a_row_moved_to_another_pack_goes_on_alike() -> None:
    five = SpikeSkip(5, torch.device("cpu"))
    values = torch.tensor(np.random.default_rng(0).normal(3, 0.1, (200, 2, 5)))
    values[180, 1, 3] = 50
    for loss, norm in values[:150]:
        five.judge(loss, norm)
    alone = SpikeSkip(1, torch.device("cpu"))
    for key, tensor in alone.state.items():
        tensor.copy_(five.state[key][3:4])
    after = [
        (five.judge(loss, norm)[3].item(), alone.judge(loss[3:4], norm[3:4]).item()) for loss, norm in values[150:]
    ]
    assert [i for i, pair in enumerate(after) if pair == (1, 1)] == [30] and all(a == b for a, b in after)
    assert {key: tuple(x.shape[1:]) for key, x in five.state.items()} == {
        "spike_skip/seen": (),
        "spike_skip/window": (2, 128),
    }

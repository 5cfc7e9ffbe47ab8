"""What a frontier trains next: pure, never what is taken, ends, and finds edges that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import whole
from hypothesis import given, settings
from hypothesis import strategies as st

from stabstudy.analysis import frontier
from stabstudy.analysis.frontier import Edge, Scale, fit
from stabstudy.analysis.holding import Observation, observations
from stabstudy.analysis.proposals import Proposal, propose

SCALE = Scale("optim.lr", 1e-4, 1.0, 1.25)
SEEDS = [0, 1, 2]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_nothing_known_starts_in_the_middle() -> None:
    assert propose({"a": [], "b": []}, set(), SCALE, [5, 6], 2) == [("a", 1e-2, 5), ("b", 1e-2, 5)]
    assert propose({"a": [], "b": []}, set(), SCALE, [5, 6], 1) == [("a", 1e-2, 5)]
    assert propose({}, set(), SCALE, SEEDS, 4) == propose({"a": []}, set(), SCALE, SEEDS, 0) == []


def test_room_is_filled_over_the_range() -> None:
    proposals = propose({"a": [], "b": []}, set(), SCALE, SEEDS, 41)
    assert len(set(proposals)) == 41
    for cell, n in (("a", 21), ("b", 20)):
        positions = sorted(math.log10(v) for c, v, _ in proposals if c == cell)
        assert len(positions) == n and positions[0] == -4 and positions[-1] == 0 and np.diff(positions).max() < 0.3


def test_the_median_of_what_is_left_comes_next() -> None:
    cells = {"a": [Observation(1e-2, 0, True)], "b": [Observation(1e-2, 0, False)]}
    (_, up, _), (_, down, _) = sorted(propose(cells, set(), SCALE, SEEDS, 2))
    assert 0.05 < up < 0.3 and 3e-4 < down < 2e-3


def test_a_spent_value_gives_way_to_its_neighbour() -> None:
    middle = SCALE.lattice.index(1e-2)
    cells = {"a": [Observation(1e-2, 7, True), Observation(1e-2, 7, False)]}
    taken = {("a", 1e-2, 7)}
    [(_, value, seed)] = propose(cells, taken, SCALE, [7], 1)
    assert value != 1e-2 and seed == 7 and abs(SCALE.lattice.index(value) - middle) < 12
    assert propose(cells, {("a", v, 7) for v in SCALE.lattice}, SCALE, [7], 1) == []


def test_a_search_ends_once_only_values_are_left_whose_result_is_known() -> None:
    """A transition too wide for the seeds: the cell stays open, and values far from its edge are not tried for that."""
    draw = np.random.default_rng(1)
    cells: dict[str, list[Observation]] = {"a": []}
    while proposals := propose(cells, {("a", v, s) for v, s, _ in cells["a"]}, SCALE, [0, 1], 1):
        for _, value, seed in proposals:
            failing = 0.5 * math.erfc(-(math.log10(value) + 2) / 0.4 / math.sqrt(2))
            cells["a"].append(Observation(value, seed, bool(draw.random() > failing)))
    assert fit(cells, SCALE)["a"].status == "open"
    assert len(cells["a"]) < 0.2 * 2 * len(SCALE.lattice)


def test_a_value_that_said_nothing_is_not_asked_again() -> None:
    few = Scale("optim.lr", 1e-4, 1.0, 1.25, grid=(1e-4, 1e-2, 1.0))
    taken: set[Proposal] = set()
    for value in (1e-2, 1e-4, 1.0):
        assert (proposals := propose({"a": []}, taken, few, SEEDS, 1)) == [("a", value, 0)]
        taken.update(proposals)
    assert propose({"a": []}, taken, few, SEEDS, 1) == []


def test_what_is_resolved_is_left_alone() -> None:
    sharp = [Observation(v, s, v < 1e-2) for v in (9.5e-3, 1.05e-2) for s in range(6)]
    beyond = [Observation(1.0, s, True) for s in range(6)]
    cells = {"sharp": sharp, "beyond": beyond, "open": []}
    assert {c for c, _, _ in propose(cells, set(), SCALE, SEEDS, 50)} == {"open"}
    assert propose({"sharp": sharp, "beyond": beyond}, set(), SCALE, SEEDS, 50) == []


observation = st.builds(Observation, st.sampled_from(SCALE.lattice), st.integers(0, 2), st.booleans())
some_cells = st.dictionaries(st.sampled_from("abc"), st.lists(observation, max_size=6), min_size=1)
some_taken = st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from(SCALE.lattice), st.integers(0, 2)), max_size=40)


@given(some_cells, some_taken, st.integers(1, 30), st.sampled_from(["stable", "works"]), st.randoms())
@settings(max_examples=25, deadline=None)
def test_proposals_are_a_function_of_what_is_known(
    cells: dict[str, list[Observation]], taken: set[Proposal], room: int, rule: str, order: np.random.Generator
) -> None:
    proposals = propose(cells, taken, SCALE, SEEDS, room, rule)
    known = taken | {(c, o.value, o.seed) for c, of in cells.items() for o in of}
    assert len(proposals) == len(set(proposals)) <= room and not set(proposals) & known
    assert all(c in cells and v in SCALE.lattice and s in SEEDS for c, v, s in proposals)
    shuffled = {c: order.sample(of, len(of)) for c, of in cells.items()}  # type: ignore[attr-defined]
    assert propose(shuffled, sorted(taken), SCALE, SEEDS, room, rule) == proposals


# whole searches over rows of trials, where some say nothing


def run(judge: Callable[[float], dict[str, object]], rule: str, room: int) -> tuple[dict[int, Edge], int]:
    """The edges of two equal cells at the end, and the trials of a cell."""
    rows: dict[int, list[dict[str, object]]] = {0: [], 1: []}
    taken: set[Proposal] = set()
    while True:
        cells = {c: observations(of, "optim.lr", rule) for c, of in rows.items()}
        if not (proposals := propose(cells, taken, SCALE, SEEDS, room, rule)):
            return fit(cells, SCALE), len(taken) // 2  # type: ignore[return-value]
        for cell, value, seed in proposals:
            taken.add((cell, value, seed))
            rows[cell].append({"optim.lr": value, "seed": seed, "state": "done"} | judge(math.log10(value)))  # type: ignore[index]


def recipe(stable_to: float, trained_from: float, best: float = -2) -> Callable[[float], dict[str, object]]:
    """Rough above an edge, untrained below another, the loss a parabola about its best value."""

    def judge(x: float) -> dict[str, object]:
        word = "rough" if x > stable_to else None if x < trained_from else "stable"
        loss = 2 + 0.3 * (x - best) ** 2
        reason = None if word else "untrained"
        return {"verdict": word, "verdict_reason": reason, "verdict_code": "ok", "final_loss_capped": loss}

    return judge


CRASH: dict[str, object] = {"state": "oom", "verdict": None, "verdict_reason": "oom", "final_loss_capped": None}
WORKS_TO = -2 + math.sqrt(0.2 / 0.3)


@pytest.mark.parametrize("room", [2, 60])
@pytest.mark.parametrize(
    ("rule", "judge", "edge"),
    [
        ("stable", recipe(-0.8, -3.2), -0.8),
        ("stable", recipe(-1.5, -1.6), -1.5),  # untrained right up to where it gets rough
        ("works", recipe(-0.8, -3.2), WORKS_TO),
        ("works", recipe(9, -9), WORKS_TO),
        ("works", recipe(9, -9, best=-3.4), WORKS_TO - 1.4),  # the best value is far below the middle of the range
        ("works", lambda x: CRASH if x > 0.5 + WORKS_TO else recipe(9, -9)(x), WORKS_TO),
    ],
)
def test_an_edge_is_located(rule: str, judge: Callable[[float], dict[str, object]], edge: float, room: int) -> None:
    edges, trials = run(judge, rule, room)
    for e in edges.values():
        assert e.status == "resolved" and math.log10(e.low) - 0.02 <= edge <= math.log10(e.high) + 0.02
    assert trials <= (25 if room == 2 else 90)


@pytest.mark.parametrize(
    ("judge", "status", "most"),
    [
        (recipe(9, -9), "beyond", 12),
        (recipe(-9, -9), "below", 12),
        (recipe(-2.003, 0), "open", 40),  # nothing holds anywhere: rough or untrained
        (lambda x: CRASH, "open", 20),
        (lambda x: CRASH if x > -1 else recipe(9, -9)(x), "open", 20),
    ],
)
def test_a_search_ends_where_there_is_no_edge(
    judge: Callable[[float], dict[str, object]], status: str, most: int
) -> None:
    edges, trials = run(judge, "stable", 2)
    assert {e.status for e in edges.values()} == {status} and trials <= most


# surfaces with known edges: benchmarks/search.py has the table


def replays(way: str, width: float, n: int) -> tuple[float, float, float]:
    """Share of the dense grid's trials, the largest rounds of nine in ten, coverage."""
    import search  # type: ignore[import-not-found]

    row = search.summary(way, width, [search.search(search.ways()[way], width, seed) for seed in range(n)])
    assert row["left_open"] == 0
    return row["share"], row["rounds_p90"], row["coverage"]


def test_a_sample_of_searches_is_short_and_covers(benchmark_scripts: None) -> None:
    share, _, coverage = replays("cost", 0.05, 6)
    assert share <= 0.17 and coverage >= 0.85
    _, rounds, coverage = replays("packs", 0.05, 4)
    assert rounds <= 3 and coverage >= 0.8


def test_a_width_that_is_believed_and_wrong_does_not_cover(
    benchmark_scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the coverage of the others can fail."""
    monkeypatch.setattr(frontier, "_widths", lambda scale: np.geomspace(0.005, 0.01, frontier.WIDTHS))
    frontier.chances.cache_clear()
    try:
        assert replays("cost", 0.10, 5)[2] < 0.6
    finally:
        frontier.chances.cache_clear()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("width", "largest"), [whole(0.02, 0.12), whole(0.05, 0.17), (0.10, 0.38)])
def test_searches_are_short_and_cover(benchmark_scripts: None, width: float, largest: float) -> None:
    """A sample of the 500 replays that `benchmarks/search.py` makes of each."""
    share, _, coverage = replays("cost", width, 50)
    assert share <= largest and coverage >= 0.85
    _, rounds, coverage = replays("packs", width, 20)
    assert rounds <= 3 and coverage >= 0.85

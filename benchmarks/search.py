"""Trials and rounds until every edge of a frontier is known to a factor 1.25, beside other ways to find it.

Analytic surfaces with known edges: 6 cells, 4 decades of the learning rate, edges that fall from cell to cell by .4 to
1.2 decades in all +- .08; a trial fails to hold with the probability Phi((log10 lr - edge) / width), at widths of .02,
.05 and .10 decades, which no way is given. All ways stop by the same rule, that of `frontier.fit`:

    cost         one trial for each open cell and round
    2 slots      two trials at a time: hours on a machine that trains two
    packs        128 trials a round
    random       a random rate for each open cell and round
    TPE          Optuna's, for each cell the largest rate that holds
    dense grid   24 rates x 4 seeds for each cell

Then the recorded grid (`dense_grid.csv`: 3 depths x 24 rates x 4 seeds, trained) answers in place of a surface, to a
factor 1.5, as its rates lie a factor 1.35 apart. One JSON line for each, a Markdown table at the end, and the gates: at
most 12, 17 and 38 % of the dense grid's trials at the three widths (cost), at most 3 rounds in nine replays of ten
(packs), 90 % intervals that cover at least 85 % of the edges, and no more time than the grid on two slots.

    python benchmarks/search.py [--tiny] [--replays 500] [--rivals 20]
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy.analysis.frontier import Scale, fit
from stabstudy.analysis.holding import Observation, observations
from stabstudy.analysis.proposals import Proposal, propose
from stabstudy.space import HOLDS

RECORDED = Path(__file__).with_name("dense_grid.csv")
CELLS, SEEDS, DENSE, PACK, SLOTS = 6, (0, 1, 2, 3), 24 * 4, 128, 2
SCALE = Scale("optim.lr", 1e-4, 1.0, 1.25)
LARGEST_SHARE = {0.02: 0.12, 0.05: 0.17, 0.10: 0.38}
"""Of the dense grid's trials, by the width of the transition in decades."""
LEAST_COVERAGE, MOST_ROUNDS = 0.85, 3

Cells = Mapping[int, list[Observation]]
Way = Callable[[Cells, list[int], set[Proposal]], list[Proposal]]
"""From the observations of every cell, the cells that are open and what was requested to what to train next."""


@dataclass
class Surface:
    """A frontier with known edges (log10 of the rate)."""

    width: float
    rng: np.random.Generator
    edges: list[float] = field(init=False)

    def __post_init__(self) -> None:
        first, fall = self.rng.uniform(-1.6, -0.4), self.rng.uniform(0.4, 1.2)
        self.edges = [first - fall * i / (CELLS - 1) + self.rng.normal(0, 0.08) for i in range(CELLS)]

    def holds(self, cell: int, value: float) -> bool:
        z = (math.log10(value) - self.edges[cell]) / self.width
        return bool(self.rng.random() >= 0.5 * math.erfc(-z / math.sqrt(2)))


@dataclass(frozen=True)
class Replay:
    """One search: trials for each cell, rounds, share of the edges in their intervals, edges left open."""

    trials: float
    rounds: int
    covered: float
    left_open: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replays", type=int, default=500, help="of `cost` and of `packs`")
    parser.add_argument("--rivals", type=int, default=20, help="replays of the others")
    parser.add_argument("--tiny", action="store_true", help="the smallest shape, to see that all of it runs")
    given = parser.parse_args()
    return measure(2, 1, [0.02]) if given.tiny else measure(given.replays, given.rivals, list(LARGEST_SHARE))


def measure(replays: int, rivals: int, widths: list[float]) -> int:
    """Print all figures; 1 where a gate fails that so many replays can test."""
    table, failures = [], []
    for width in widths:
        for name, way in ways().items():
            n = replays if name in ("cost", "packs") else rivals
            begin = time.perf_counter()
            results = [search(way, width, seed) for seed in range(n)]
            row = summary(name, width, results) | {"seconds": round(time.perf_counter() - begin, 1)}
            print(json.dumps({"benchmark": "search", **row}), flush=True)
            table.append(row)
            failures += broken(row)
    print(markdown(table))
    if RECORDED.exists():
        print(recorded_markdown(recorded(RECORDED)))
    else:
        print(f"{RECORDED.name} is not here: the recorded grid is left out")
    judged = failures if replays >= 100 else []
    print("\n".join(judged) or "no gate failed" if replays >= 100 else "too few replays for the gates")
    return int(bool(judged))


def ways() -> dict[str, Way]:
    """The ways to search, by name; without Optuna its own is left out."""
    by_name: dict[str, Way] = {
        "cost": lambda cells, still, requests: propose(cells, requests, SCALE, SEEDS, len(still)),
        "2 slots": lambda cells, _, requests: propose(cells, requests, SCALE, SEEDS, SLOTS),
        "packs": lambda cells, _, requests: propose(cells, requests, SCALE, SEEDS, PACK),
        "random": random_rates,
        "dense grid": dense_grid,
    }
    try:
        import optuna
    except ImportError:
        print("TPE is left out: optuna is not installed (pip install 'stabstudy[search]')")
        return by_name
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return by_name | {"TPE": tpe_rates}


def open_cells(cells: Cells, scale: Scale = SCALE) -> list[int]:
    return [cell for cell, edge in fit(cells, scale).items() if edge.status == "open"]


def random_rates(cells: Cells, still: list[int], requests: set[Proposal]) -> list[Proposal]:
    rng = np.random.default_rng([1, len(requests)])
    values = SCALE.lattice
    return [(cell, values[rng.integers(len(values))], len(requests)) for cell in still]


def dense_grid(cells: Cells, still: list[int], requests: set[Proposal]) -> list[Proposal]:
    rates = np.geomspace(SCALE.low, SCALE.high, DENSE // len(SEEDS))
    return [] if requests else [(cell, float(rate), seed) for cell in cells for rate in rates for seed in SEEDS]


def tpe_rates(cells: Cells, still: list[int], requests: set[Proposal]) -> list[Proposal]:
    """What TPE tries next in each open cell to maximise log lr where it holds; worse the higher where it does not."""
    import optuna

    rate = optuna.distributions.FloatDistribution(SCALE.low, SCALE.high, log=True)
    proposals = []
    for cell in still:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=cell), direction="maximize")
        for value, _, holds in cells[cell]:
            height = math.log10(value / SCALE.low)
            study.add_trial(
                optuna.trial.create_trial(
                    params={"lr": value}, distributions={"lr": rate}, value=height if holds else -height
                )
            )
        study.sampler.reseed_rng()
        proposals.append((cell, study.ask({"lr": rate}).params["lr"], len(requests)))
    return proposals


def search(way: Way, width: float, seed: int) -> Replay:
    """One search on one surface, ended by the rule or at the dense grid's number of trials."""
    surface = Surface(width, np.random.default_rng([seed, round(1000 * width)]))
    cells: dict[int, list[Observation]] = {cell: [] for cell in range(CELLS)}
    requests: set[Proposal] = set()
    rounds = 0
    while (still := open_cells(cells)) and len(requests) < CELLS * DENSE and (proposals := way(cells, still, requests)):
        rounds += 1
        for cell, value, trial in proposals:
            requests.add((cell, value, trial))
            cells[cell].append(Observation(value, trial, surface.holds(cell, value)))
    edges = fit(cells, SCALE)
    covered = [e.low <= 10**true <= e.high for e, true in zip(edges.values(), surface.edges, strict=True)]
    return Replay(len(requests) / CELLS, rounds, statistics.mean(covered), len(open_cells(cells)))


def summary(name: str, width: float, results: list[Replay]) -> dict[str, Any]:
    trials = statistics.mean(r.trials for r in results)
    rounds = sorted(r.rounds for r in results)
    return {
        "way": name,
        "width": width,
        "n": len(results),
        "trials": round(trials, 1),
        "share": round(trials / DENSE, 3),
        "rounds": round(statistics.mean(rounds), 2),
        "rounds_p90": rounds[math.ceil(0.9 * len(rounds)) - 1],
        "coverage": round(statistics.mean(r.covered for r in results), 3),
        "left_open": round(statistics.mean(r.left_open for r in results) / CELLS, 3),
    }


def broken(row: Mapping[str, Any]) -> list[str]:
    """The gates that a row fails, in words."""
    at, gates = f"{row['way']} at a width of {row['width']:g} decades", []
    if row["way"] == "cost" and row["share"] > (most := LARGEST_SHARE[row["width"]]):
        gates.append(f"{at}: {row['share']:.1%} of the dense grid's trials, at most {most:.0%} allowed")
    if row["way"] == "packs" and row["rounds_p90"] > MOST_ROUNDS:
        gates.append(f"{at}: {row['rounds_p90']} rounds in one replay of ten, at most {MOST_ROUNDS} allowed")
    if row["way"] in ("cost", "packs") and row["coverage"] < LEAST_COVERAGE:
        gates.append(f"{at}: intervals cover {row['coverage']:.1%}, at least {LEAST_COVERAGE:.0%} wanted")
    if row["way"] == "2 slots" and row["rounds_p90"] > CELLS * DENSE / SLOTS:
        gates.append(f"{at}: longer than the dense grid")
    return gates


def markdown(table: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| width, decades | way | trials a cell | of the grid | rounds: mean, 9 in 10 | coverage | edges left open |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['width']:.2f} | {r['way']} | {r['trials']} | {r['share']:.1%} | {r['rounds']}, {r['rounds_p90']} "
        f"| {r['coverage']:.3f} | {r['left_open']:.1%} |"
        for r in table
    ]
    return "\n".join(lines)


# the recorded grid


@dataclass(frozen=True)
class Recorded:
    """A search that recorded trials answered, beside the edge from all of them, for one depth."""

    rule: str
    depth: int
    trials: int
    steps: float  # share of the steps of all recorded trials
    rounds: int
    interval: tuple[float, float]
    status: str
    dense: tuple[float, float]


def read_recorded(path: Path) -> dict[int, list[dict[str, Any]]]:
    """The recorded trials of each depth, as rows of a study's table."""
    rows: dict[int, list[dict[str, Any]]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            losses = [float(line[name] or "nan") for name in ("init_loss", "final_loss")]
            rows.setdefault(int(line["depth"]), []).append(
                {
                    "optim.lr": float(line["lr"]),
                    "seed": int(line["seed"]),
                    "state": "done",
                    "verdict": line["verdict"] or None,
                    "verdict_reason": line["verdict_reason"] or None,
                    "verdict_code": line["verdict_code"] or None,
                    "final_loss_capped": min((x for x in losses if math.isfinite(x)), default=None),
                    "steps": int(float(line["steps"])),
                }
            )
    return rows


def recorded(path: Path) -> list[Recorded]:
    """The frontier over the depths of a recorded grid by each rule, one trial for each open cell and round."""
    rows = read_recorded(path)
    rates, seeds = (sorted({row[name] for of in rows.values() for row in of}) for name in ("optim.lr", "seed"))
    scale = Scale("optim.lr", rates[0], rates[-1], 1.5, grid=tuple(rates))
    results = []
    for rule in HOLDS:
        requests: set[Proposal] = set()
        rounds = 0
        while proposals := next_round(answers(rows, rule, requests), requests, scale, seeds, rule):
            rounds += 1
            requests.update(proposals)
        edges, dense = (fit(answers(rows, rule, of), scale) for of in (requests, None))
        for depth, of in rows.items():
            trained = [row for row in of if (depth, row["optim.lr"], row["seed"]) in requests]
            share = sum(row["steps"] for row in trained) / sum(row["steps"] for row in of)
            e, all_trials = edges[depth], (dense[depth].low, dense[depth].high)
            results.append(Recorded(rule, depth, len(trained), share, rounds, (e.low, e.high), e.status, all_trials))
    return results


def answers(
    rows: Mapping[int, list[dict[str, Any]]], rule: str, requests: set[Proposal] | None
) -> dict[int, list[Observation]]:
    """The observations from the trials that were requested; from all of them for None."""
    cells: dict[int, list[Observation]] = {}
    for depth, of in rows.items():
        trained = [row for row in of if requests is None or (depth, row["optim.lr"], row["seed"]) in requests]
        cells[depth] = observations(trained, "optim.lr", rule)
    return cells


def next_round(cells: Cells, requests: set[Proposal], scale: Scale, seeds: list[int], rule: str) -> list[Proposal]:
    """One trial for each open cell; while `works` looks for the best value, for each cell."""
    return propose(cells, requests, scale, seeds, max(1, len(open_cells(cells, scale))), rule)


def recorded_markdown(results: Iterable[Recorded]) -> str:
    lines = [
        "| holds | depth | trials of 96 | steps | rounds | 90 % interval | status | of all 96 trials |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    lines += [
        f"| {r.rule} | {r.depth} | {r.trials} | {r.steps:.0%} | {r.rounds} "
        f"| {r.interval[0]:.3g} to {r.interval[1]:.3g} | {r.status} | {r.dense[0]:.3g} to {r.dense[1]:.3g} |"
        for r in results
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

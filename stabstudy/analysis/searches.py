"""History of a search.

A suggestion is a cell with all the sweep's seeds; its objectives are means over them. Every number is finite, so that a
sampler and a figure can take it: a trial that diverged, that was stopped or that has no value counts as `final_loss`
with its capped loss (that of the untrained model), as any other statistic with the worst one measured in the search.
Such a suggestion is infeasible, and so is one that breaks a constraint with any of its seeds.

Read from the rows of trials and nothing else: Optuna's journal is a copy that may be gone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.tables import Row, read_tables
from stabstudy.space import Choice, Domain, Objective, Range, Search, from_body
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.verdict import VERDICTS
from stabstudy.store import StoreError, StudyFolder

ENDED = ("done", "stopped")
"""States of a trial that is not trained further: a stopped one was without hope."""

FAILED = ("failed", "oom", "timeout", "disk_full")
"""States of a trial that ended without a result; the next launch tries it again."""

LOSS, CAPPED = "final_loss", "final_loss_capped"
FEWEST = 16
"""Suggestions with values from which on shares of variance are estimated."""

FULFILLED = -1.0
"""What a constraint is told as where it holds; where it does not, the share of the seeds that break it."""


@dataclass(frozen=True)
class Suggestion:
    """One cell of a search, judged.

    Attributes:
        values: What it has on each axis of the space.
        trial_ids: Its trials that stand in the study's folder, by seed.
        state: `done` (every seed), `running` (not yet), or `failed` (a seed will not be done).
        objectives: Means over its seeds, one for each objective, finite; () unless done.
        violations: Above 0 where infeasible: whether it trained, then one for each constraint; () unless done.
        penalised: Whether a trial of it diverged, was stopped or lacks a value.
    """

    cell_id: str
    values: Mapping[str, Any]
    trial_ids: tuple[str, ...]
    state: str
    objectives: tuple[float, ...] = ()
    violations: tuple[float, ...] = ()
    penalised: bool = False

    @property
    def feasible(self) -> bool:
        """Whether it is done and breaks nothing."""
        return self.state == "done" and all(v <= 0 for v in self.violations)


@dataclass(frozen=True)
class History:
    """A search so far.

    Attributes:
        suggestions: In the order in which they began.
        best: With one objective, the index of the best feasible suggestion up to each one; None before there is any.
            () with several.
        front: Indices of the feasible suggestions that no other is better than (at least as good in every objective,
            better in one); with one objective, the best ones.
    """

    search: Search
    suggestions: tuple[Suggestion, ...]
    best: tuple[int | None, ...]
    front: tuple[int, ...]


def search_history(folder: StudyFolder, rows: Sequence[Row] | None = None) -> History | None:
    """The search of a study; None where its sweep.yaml records none. `rows`: those of its trials, where known.

    Raises StoreError for a record that is broken.
    """
    asked = record(folder)
    search = recorded(folder, asked)
    if search is None:
        return None
    rows = read_tables(folder).trials if rows is None else rows
    given_up = {row["trial_id"] for row in rows if row["state"] in FAILED}
    seeds = [seed for seed in asked.get("seeds") or [] if type(seed) is int]
    return history(search, suggestions(rows, search, seeds, begun(folder, rows), given_up))


def recorded(folder: StudyFolder, asked: Mapping[str, Any] | None = None) -> Search | None:
    """The search that the study's sweep.yaml records, or None. Raises StoreError for one that is broken."""
    body = (record(folder) if asked is None else asked).get("search")
    try:
        return from_body(body, list(COLUMNS), VERDICTS) if body else None
    except ValueError as error:  # ConfigError is one
        raise StoreError(f"{folder.sweep_file}: {error}") from error


def record(folder: StudyFolder) -> Mapping[str, Any]:
    """The content of sweep.yaml; {} where there is none."""
    import yaml

    try:
        content = yaml.safe_load(folder.sweep_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StoreError(f"{folder.sweep_file}: cannot be read ({type(error).__name__})") from error
    return content if isinstance(content, dict) else {}


def begun(folder: StudyFolder, rows: Sequence[Row]) -> dict[str, str]:
    """When each trial was first started (UTC, ISO 8601), by id; those that were not are left out."""
    states = {row["trial_id"]: folder.trial(row["trial_id"]).read_state() for row in rows}
    return {trial_id: state.attempts[0].started for trial_id, state in states.items() if state.attempts}


def suggestions(
    rows: Sequence[Row],
    search: Search,
    seeds: Sequence[int],
    started: Mapping[str, str],
    given_up: Collection[str] = (),
) -> list[Suggestion]:
    """Every cell of the space among the rows, judged, in the order in which they began, cells not yet begun last.

    `given_up`: ids of trials that will not be done. Rows outside of the space, named cases, and seeds that are not
    among `seeds` are left out.
    """
    cells: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["case"] is None and row["seed"] in seeds and search.values(row) is not None:
            cells.setdefault(row["cell_id"], []).append(row)
    ended = {
        cell: all(row["state"] in ENDED for row in own) and len(own) == len(set(seeds)) for cell, own in cells.items()
    }
    worst = _worst([row for cell, own in cells.items() if ended[cell] for row in own], search.objectives)
    order = {cell: min((started.get(row["trial_id"], "~") for row in own), default="~") for cell, own in cells.items()}
    judged = []
    for cell in sorted(cells, key=lambda cell: (order[cell], cell)):
        failed = any(row["trial_id"] in given_up for row in cells[cell])
        state = "done" if ended[cell] else "failed" if failed else "running"
        judged.append(_judged(cell, cells[cell], search, state, worst))
    return judged


def _judged(cell: str, rows: Sequence[Row], search: Search, state: str, worst: Sequence[float]) -> Suggestion:
    values, ids = search.values(rows[0]), tuple(row["trial_id"] for row in rows)
    assert values is not None
    if state != "done":
        return Suggestion(cell, values, ids, state)
    measured = [[_measured(row, objective) for objective in search.objectives] for row in rows]
    told = [
        [_penalty(row, o, w) if v is None else v for v, o, w in zip(own, search.objectives, worst, strict=True)]
        for row, own in zip(rows, measured, strict=True)
    ]
    trained = [None not in own for own in measured]
    held = [trained, *([e.holds({n: row.get(n) for n in e.names}) for row in rows] for e in search.constraints)]
    return Suggestion(
        cell,
        values,
        ids,
        state,
        tuple(float(mean) for mean in np.mean(told, axis=0)),
        tuple(FULFILLED if all(each) else each.count(False) / len(each) for each in held),
        not all(trained),
    )


def _measured(row: Row, objective: Objective) -> float | None:
    """The row's value; None where the trial diverged, was stopped, or has none that is finite."""
    value = row.get(objective.column)
    if row["state"] != "done" or row["verdict"] == "diverged" or value is None or not math.isfinite(value):
        return None
    return float(value)


def _penalty(row: Row, objective: Objective, worst: float) -> float:
    capped = row.get(CAPPED) if objective.column in (LOSS, CAPPED) and not objective.maximize else None
    return float(capped) if capped is not None and math.isfinite(capped) else worst


def _worst(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[float]:
    """The worst value of each objective that any trial has; 0 where none has one, when nothing can be compared."""
    measured = [[v for row in rows if (v := _measured(row, o)) is not None] for o in objectives]
    return [o.worst(values) if values else 0.0 for o, values in zip(objectives, measured, strict=True)]


def history(search: Search, judged: Sequence[Suggestion]) -> History:
    """The best so far and the front of these suggestions."""
    feasible = [i for i, suggestion in enumerate(judged) if suggestion.feasible]
    signs = np.array([-1.0 if o.maximize else 1.0 for o in search.objectives])
    costs = np.array([judged[i].objectives for i in feasible]).reshape(len(feasible), len(signs)) * signs
    front = tuple(feasible[i] for i in pareto(costs))
    best: list[int | None] = []
    if len(signs) == 1:
        cost = dict(zip(feasible, costs[:, 0], strict=True))
        for i in range(len(judged)):
            known = [j for j in (best[-1] if best else None, i) if j in cost]
            best.append(min(known, key=cost.__getitem__) if known else None)
    return History(search, tuple(judged), tuple(best), front)


def pareto(costs: NDArray[np.float64]) -> list[int]:
    """Indices of the rows of `costs` [n, objectives], each to be minimised, that no other row dominates.

    A row dominates another that is nowhere smaller and somewhere larger; equal rows are all kept.
    """
    front = []
    for i, cost in enumerate(costs):
        dominates = (costs <= cost).all(axis=1) & (costs < cost).any(axis=1)
        if not dominates.any():
            front.append(i)
    return front


def importance(known: History) -> dict[str, dict[str, float]]:
    """The share of each objective's variance over the space that each axis explains: objective -> axis -> share.

    By Optuna's fANOVA over the suggestions that are done and not penalised; each log range by its logarithm. The shares
    leave out what axes do together. Needs optuna and scikit-learn. {} under FEWEST suggestions; an objective that does
    not vary is left out.
    """
    import optuna
    from optuna.importance import FanovaImportanceEvaluator

    measured = [s for s in known.suggestions if s.state == "done" and not s.penalised]
    if len(measured) < FEWEST:
        return {}
    box = {name: _even(distribution) for name, distribution in distributions(known.search).items()}
    shares = {}
    for i, objective in enumerate(known.search.objectives):
        values = [suggestion.objectives[i] for suggestion in measured]
        if max(values) > min(values):
            with quiet():
                study = optuna.create_study()
            for suggestion, value in zip(measured, values, strict=True):
                params = {n: _evenly(known.search.space[n], v) for n, v in suggestion.values.items()}
                study.add_trial(optuna.trial.create_trial(params=params, distributions=box, value=value))
            shares[objective.column] = dict(FanovaImportanceEvaluator(seed=0).evaluate(study))
    return shares


def _even(distribution: Any) -> Any:
    """The distribution on the scale on which it is searched: fANOVA averages over the box and knows no logarithms."""
    from optuna.distributions import FloatDistribution

    if getattr(distribution, "log", False):
        return FloatDistribution(math.log(distribution.low), math.log(distribution.high))
    return distribution


def _evenly(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Range) and domain.log:
        return min(max(math.log(value), math.log(domain.low)), math.log(domain.high))
    return int(value) if isinstance(domain, Range) and domain.whole else value


def as_optuna(judged: Sequence[Suggestion], search: Search, sampler: Any = None) -> Any:
    """The suggestions as an `optuna.Study` in memory, in order, for its importances and figures, or to be asked.

    Feasibility stands in the trials' constraints. Needs optuna.
    """
    study = new_study(search, sampler)
    study.add_trials([frozen(suggestion, search) for suggestion in judged])
    return study


def new_study(search: Search, sampler: Any = None, storage: Any = None, name: str | None = None) -> Any:
    """An `optuna.Study` without trials."""
    import optuna

    directions = ["maximize" if o.maximize else "minimize" for o in search.objectives]
    with quiet():
        return optuna.create_study(storage=storage, sampler=sampler, study_name=name, directions=directions)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's log lines, and without its warnings of features that may change."""
    import optuna

    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(loud)


def frozen(suggestion: Suggestion, search: Search) -> Any:
    """The suggestion as an `optuna.trial.FrozenTrial`."""
    from optuna.trial import TrialState, create_trial

    states = {"done": TrialState.COMPLETE, "running": TrialState.RUNNING, "failed": TrialState.FAIL}
    return create_trial(
        state=states[suggestion.state],
        values=list(suggestion.objectives) or None,
        params=parameters(suggestion.values, search),
        distributions=distributions(search),
        user_attrs={"cell_id": suggestion.cell_id, "penalised": suggestion.penalised},
        constraints=constraints(suggestion, search),
    )


def constraints(suggestion: Suggestion, search: Search) -> dict[str, float]:
    """What the suggestion is told to hold to: name -> value, above 0 where it is broken; {} unless it is done."""
    names = ["trained", *(expression.text for expression in search.constraints)]
    return dict(zip(names, suggestion.violations, strict=False))


def parameters(values: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """The values as Optuna's distributions take them."""
    domains = search.space
    return {n: int(v) if isinstance(d := domains[n], Range) and d.whole else v for n, v in values.items()}


def distributions(search: Search) -> dict[str, Any]:
    """The space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for name, domain in search.space.items():
        if isinstance(domain, Choice):
            made[name] = CategoricalDistribution(domain.values)
        elif domain.whole:
            made[name] = IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        else:
            made[name] = FloatDistribution(domain.low, domain.high, log=domain.log)
    return made

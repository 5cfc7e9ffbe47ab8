"""A search over an analytic objective: a planner of small trials, and a disk that holds their rows alone.

`Disk` stands in for a study's folder where a test needs no files: the rows are those that `read_tables` would give of
trials with these results. `tests/test_optuna_search.py` holds it to a planted study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from stabstudy import config as cfg
from stabstudy.analysis import searches
from stabstudy.planning import searchspace
from stabstudy.planning.trials import PlannedTrial
from stabstudy.search import journal, optuna_search
from stabstudy.settings import ConfigError, Issues, Problem, put
from stabstudy.space import Search

SPACE: dict[str, Any] = {
    "optim.lr": {"log": [1e-4, 1e-1]},
    "optim.warmup_steps": {"int": [5, 50]},
    "optim.clip": [0.5, 1.0, None],
    "data": ["pysrc", "synthetic"],
}
BEST_LR, BEST_WARMUP = 10**-2.3, 30


def search(**changed: Any) -> Search:
    """A search, by default for the smallest `final_loss` by TPE."""
    written = {"trials": 20, "minimize": ["final_loss"], "space": SPACE} | changed
    issues = Issues()
    checked = searchspace.parse(written, lambda key: key, None, issues)
    assert checked is not None, issues.problems
    return checked


class Planner:
    """Completes trials; refuses those for which `refuses` gives a rule."""

    rests = (None,)

    def __init__(
        self,
        seeds: Sequence[int] = (0,),
        refuses: Callable[[Mapping[str, Any]], str | None] = lambda values: None,
        steps: int = 60,
    ):
        self.seeds, self.refuses, self.steps = seeds, refuses, steps

    def replicates(self, rest: None, values: Mapping[str, Any], seeds: Sequence[int]) -> list[PlannedTrial]:
        if rule := self.refuses(values):
            raise ConfigError(Problem("optim", rule))
        return [self.trial(values, seed) for seed in seeds]

    def trial(self, values: Mapping[str, Any], seed: int) -> PlannedTrial:
        nested: dict[str, Any] = {"train": {"steps": self.steps}, "optim": {"warmup_steps": 10}, "seed": seed}
        for name, value in values.items():
            if name not in cfg.GROUPS:
                put(nested, name, value)
        config, data = cfg.from_dict(nested), str(values.get("data", "pysrc"))
        fingerprint = f"{data:0<16}"
        ids = cfg.trial_id(config, fingerprint), cfg.cell_id(config, fingerprint)
        return PlannedTrial(*ids, config, {"data": data, "model": "tiny"}, None, fingerprint)


def loss(trial: PlannedTrial) -> float:
    """Least at BEST_LR, BEST_WARMUP, clip 1.0 and pysrc, where it is 2.0."""
    optim = trial.config.optim
    decades = math.log10(optim.lr / BEST_LR)
    choices = {0.5: 0.1, 1.0: 0.0, None: 0.2}[optim.clip] + (0.1 if trial.choices["data"] == "synthetic" else 0)
    return 2.0 + 0.3 * decades**2 + 1e-4 * (trial.config.warmup_steps - BEST_WARMUP) ** 2 + choices


def row(trial: PlannedTrial, **result: Any) -> dict[str, Any]:
    """The row of a done and stable trial, with its loss, unless the result says otherwise."""
    value = loss(trial)
    done = {"state": "done", "verdict": "stable", "final_loss": value, "final_loss_capped": value, "severity": 0.0}
    own = {"trial_id": trial.trial_id, "cell_id": trial.cell_id, "case": trial.case}
    return own | trial.choices | cfg.flat(trial.config) | done | result


@dataclass
class Disk:
    """Rows of trials in the order in which they were trained, and ids of damaged ones."""

    path: Any
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)

    name = "mine"

    @property
    def journal(self) -> Any:
        return self.path / "optuna.journal"

    def train(self, *trials: PlannedTrial, **result: Any) -> None:
        for trial in trials:
            self.rows[trial.trial_id] = row(trial, **result)


def without_files(monkeypatch: Any, writes: bool = False) -> None:
    """Let searches read a Disk; `writes`: the journal too."""
    tables = lambda disk: SimpleNamespace(  # noqa: E731
        trials=list(disk.rows.values()), damaged=[SimpleNamespace(trial_id=i, cell_id=None) for i in disk.damaged]
    )
    monkeypatch.setattr(optuna_search, "read_tables", tables)
    monkeypatch.setattr(searches, "begun", lambda disk, rows: {t: f"{i:06}" for i, t in enumerate(disk.rows)})
    if not writes:
        monkeypatch.setattr(journal, "write", lambda *_: None)

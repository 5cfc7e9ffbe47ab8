"""Trials: complete cells times seeds, named by what they are and by the text they train on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stabstudy import config as cfg
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.data import sources
from stabstudy.data.files import Memory
from stabstudy.planning.complete import Composed
from stabstudy.planning.findings import Findings
from stabstudy.planning.grammar import Expression
from stabstudy.settings import ConfigError, DataError


@dataclass(frozen=True)
class PlannedTrial:
    """A planned trial: its ids, what it is, the presets it was made of, and the named case if it is one."""

    trial_id: str
    cell_id: str
    config: TrialConfig
    choices: dict[str, str]
    case: str | None
    data_fingerprint: str


def fingerprints(configs: Iterable[DataConfig], cache: Path | None, found: Findings) -> dict[DataConfig, str]:
    """The fingerprint of every distinct data setting. Each text is checked and hashed once: seq_len only cuts it.

    `cache`: the token cache, which remembers large files; None where there is none yet.
    """
    memory = None if cache is None else Memory(cache)
    of_text: dict[DataConfig, str] = {}
    known: dict[DataConfig, str] = {}
    for data in dict.fromkeys(configs):
        text = dataclasses.replace(data, seq_len=DataConfig.seq_len, validation_share=DataConfig.validation_share)
        try:
            if text not in of_text:
                sources.check(data)
                of_text[text] = sources.fingerprint(data, memory)
            known[data] = of_text[text]
        except DataError as error:
            found.take([error.problem])
        if data.source == "hf" and data.hub_revision is None:
            found.warn(f"data.hub_revision: null pins no version of {data.path}: its text may change")
    return known


def planned(composed: Sequence[Composed], seeds: Sequence[int], known: dict[DataConfig, str]) -> list[PlannedTrial]:
    """Every trial, seed by seed, so that a study stopped half-way has every cell once before any cell twice."""
    trials = []
    for seed in seeds:
        for c in composed:
            config, fingerprint = dataclasses.replace(c.config, seed=seed), known[c.config.data]
            ids = cfg.trial_id(config, fingerprint), cfg.cell_id(config, fingerprint)
            trials.append(PlannedTrial(*ids, config, c.choices, c.cell.case, fingerprint))
    return trials


def distinct(trials: Sequence[PlannedTrial], found: Findings) -> list[PlannedTrial]:
    """Every trial once; a cell of the grid that is also a named case goes by that name."""
    known: dict[str, PlannedTrial] = {}
    for trial in trials:
        first = known.setdefault(trial.trial_id, trial)
        if first is not trial:
            known[trial.trial_id] = dataclasses.replace(first, case=first.case or trial.case)
            found.warn(
                f"{f'case {trial.case}' if trial.case else 'a cell'} equals another cell: {trial.cell_id} counts once"
            )
    return list(known.values())


def without_excluded(
    trials: Sequence[PlannedTrial], exclude: Sequence[Expression], chosen: Iterable[str], found: Findings
) -> list[PlannedTrial]:
    """The trials that no condition names; cases stay. A condition that names none is warned about: a typing error?

    `chosen`: settings that the command line chose, which may well leave a condition without anything to exclude.
    """
    if not exclude:
        return list(trials)
    used: set[str] = set()
    kept = []
    for trial in trials:
        values = {**cfg.flat(trial.config), **trial.choices}
        try:
            naming = [e.text for e in exclude if trial.case is None and e.holds(values)]
        except ConfigError as error:
            found.take(error.problems)
            return list(trials)
        used.update(naming)
        if not naming:
            kept.append(trial)
    for expression in exclude:
        if expression.text not in used and expression.names.isdisjoint(chosen):
            found.warn(f"sweep.exclude: {expression.text!r} matches no cell")
    if not kept:
        found.refuse("sweep.exclude", "leaves nothing to train")
    return kept

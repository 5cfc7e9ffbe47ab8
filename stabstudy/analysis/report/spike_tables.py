"""Tables of spikes: the highest ones of a study, and every one of a trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.elements import Block, Table, Text
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study
from stabstudy.stability.rules import Rules

MOST = 12
"""Spikes of each series that the table of a study shows."""

_PROPERTIES = ("recovers after (steps)", "class", "flagged as", "batch", "in warmup", "coupled spike")


def highest_spikes(study: Study) -> Iterator[Block]:
    """The section: how many spikes there are, and the highest of each series."""
    if not len(study.spikes):
        yield Text("No spike was found in any trial.")
        return
    grad, loss = (study.spikes[study.spikes["series"] == series] for series in ("grad", "loss"))
    yield Text(
        f"{words.count(len(grad), 'spike')} of the gradient norm and {len(loss)} of the loss, in all trials that have "
        f"a record, done or not. {legend(study.rules)}"
    )
    if study.trials["approximate"].any():
        yield Text(
            "Approximate where a log leaves steps out: steps are those of the source, and how long a spike lasted "
            "is known to within the stride."
        )
    if len(grad):
        yield _highest(study, "Gradient norm", grad, "peak_ratio", "peak / recent level")
    if len(loss):
        yield _highest(study, "Loss", loss, "peak_delta", "peak - recent level (nat)")


def trial_spikes(study: Study, trial_id: str) -> Table | None:
    """Every spike of a trial, in order; None where it has none."""
    spikes = study.spikes_by_trial.get(trial_id, [])
    if not spikes:
        return None
    numbers = ("start", "end", "peak at", "peak", "recent level", "peak / recent level", "peak - recent level (nat)")
    rows = tuple(
        (
            "gradient norm" if s["series"] == "grad" else "loss",
            *(str(s[name]) for name in ("start", "end", "peak_step")),
            *(words.number(s[name]) for name in ("peak", "level", "peak_ratio", "peak_delta")),
            *_properties(s),
        )
        for s in spikes
    )
    heads = ("series", *numbers, *_PROPERTIES)
    return Table(f"{words.count(len(rows), 'spike')}, by step", heads, rows, frozenset((*numbers, _PROPERTIES[0])))


def legend(rules: Rules) -> str:
    """What the heads of the tables mean."""
    return (
        f"Recent level: the median of the {rules.level} steps before. Recovers after: steps from the first flagged one "
        f"to {rules.recovery_steps} values in a row near it; over: not by the end. Class, by that time: narrow, wide, "
        "malignant, or open (cut off by the end). Flagged as: surprise, unusual for this trial; absolute, a norm of "
        f"{rules.ratio:g} times its recent level and median; or both. Batch: whether the other trials that read the "
        "same batch stood high too."
    )


def _highest(study: Study, name: str, spikes: pd.DataFrame, height: str, head: str) -> Table:
    shown = spikes.sort_values([height, "trial_id", "start"], ascending=[False, True, True]).head(MOST)
    rows = tuple(
        (
            s["trial_id"],
            study.describe(s["trial_id"]),
            f"{s['start']}" if s["start"] == s["end"] else f"{s['start']}-{s['end']}",
            *(words.number(s[column]) for column in ("peak", height)),
            *_properties(s),
        )
        for s in records(shown)
    )
    numbers = ("flagged steps", "peak", head)
    title = f"{name}: the {len(rows)} highest" if len(rows) > 1 else name
    return Table(title, ("trial", "which", *numbers, *_PROPERTIES), rows, frozenset((*numbers, _PROPERTIES[0])))


def _properties(spike: Mapping[str, Any]) -> tuple[str, ...]:
    """What _PROPERTIES names; null where not every step was logged, or the other trials of a batch are too few."""
    return (
        _duration(spike),
        spike["class"] or words.NOTHING,
        spike["part"] or words.NOTHING,
        _yes_or_no(spike["batch"]),
        _yes_or_no(spike["in_warmup"]),
        "none" if spike["partner"] is None else f"{_other(spike['series'])} at {spike['partner']}",
    )


def _duration(spike: Mapping[str, Any]) -> str:
    if spike["duration"] is None:
        return words.NOTHING
    return f"{spike['duration']}" if spike["recovered"] else f"over {spike['duration']}"


def _yes_or_no(value: bool | None) -> str:
    return words.NOTHING if value is None else "yes" if value else "no"


def _other(series: str) -> str:
    return "loss" if series == "grad" else "norm"

"""The report's words on runs trained elsewhere: which logs were read, what their numbers mean, what is unknown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis import words
from stabstudy.analysis.elements import Block, Finding, Table, Text
from stabstudy.analysis.levels import levels_of, records
from stabstudy.analysis.study import Study
from stabstudy.external import FORMATS, ExternalLog
from stabstudy.stability.columns import COLUMNS, SETTLED
from stabstudy.store import StoreError

MOST_RUNS = 6
"""Runs that the first screen names."""

SHOWN = (
    "grad_norm_median", "grad_norm_max", "grad_norm_argmax", "grad_norm_max_over_median", "spike_events",
    "spike_abs_rate", "spike_loss_events", "clip_share", "verdict",
)  # fmt: skip

NO_PAIRS = (
    "No paired comparison: runs trained elsewhere need not share initial weights and data order, and settings that no "
    "file beside a log names are unknown."
)


def read(study: Study) -> Iterator[Block]:
    """What the numbers of the logs mean, and what was left out."""
    logs = dict(_logs(study))
    for key in dict.fromkeys(log.format for log in logs.values()):
        yield Text(f"{FORMATS[key].name}: {FORMATS[key].meaning}.")
    if notes := tuple(_left_out(logs)):
        yield Table("Rows left out, and notes", ("run", "note"), notes, folded=len(notes) > 8)


def findings(study: Study) -> Finding:
    """A sentence or two for each of the roughest runs."""
    done = study.trials[study.trials["state"] == "done"]
    ranked = done.sort_values("grad_norm_max_over_median", ascending=False, kind="stable", na_position="last")
    sentences = [_sentence(study, str(trial_id)) for trial_id in ranked.index[:MOST_RUNS]]
    more = len(ranked) - len(sentences)
    rest = [f"{words.count(more, 'more run')}: see Runs."] if more > 0 else []
    return Finding("The roughest runs" if more > 0 else "The runs", sentences + rest)


def warnings(study: Study) -> list[str]:
    """What limits the numbers beside those of a study of our own."""
    strides = [int(s) for s in levels_of(study.trials["log_stride"])]
    caveats = []
    if top := [s for s in strides if s > 1]:
        every = words.listing([str(s) for s in top])
        caveats.append(
            f"Approximate: logs with a row every {every} steps do not show the steps between. Spikes there are missed, "
            "and rates are per logged row."
        )
    if len(strides) > 1:
        steps = words.listing(list(map(str, strides)))
        caveats.append(f"Logging intervals differ ({steps} steps): rates of these runs are not comparable.")
    gaps = study.trials["approximate"] & (study.trials["log_stride"] == 1)
    if n := int(gaps.sum()):
        caveats.append(f"Approximate: of {words.count(n, 'run')} a tenth of the steps or more was not logged.")
    clipped = [trial_id for trial_id, log in _logs(study) if log.after_clipping]
    zero = study.trials["verdict_reason"].eq("all_zero").fillna(False)  # of these the loss was not judged either
    if blind := int((study.trials["grad_norm_max"].isna() & ~zero).drop(clipped).sum()):
        caveats.append(f"{words.count(blind, 'run')} without a gradient norm: only the loss was judged.")
    if n := len(clipped):
        caveats.append(
            f"{words.count(n, 'run')} whose gradient norms are those after clipping, which hide every spike: only the "
            "loss was judged."
        )
    return caveats


def runs(study: Study) -> Table:
    """A row for each run: its log, the steps of it, and what they show."""
    logs = dict(_logs(study))
    heads = ("run", "log", "steps", "every", "rows with a norm", *(COLUMNS[n].label for n in SHOWN))
    rows = []
    for trial_id, row in zip(study.trials.index, records(study.trials), strict=True):
        log = logs.get(trial_id)
        trace = study.trace(trial_id)
        steps = words.NOTHING if log is None or not len(trace) else f"{trace['step'][0]} to {trace['step'][-1]}"
        norms = words.NOTHING if log is None else str(int(np.isfinite(trace["grad_norm"]).sum()))
        name = words.clean(row["case"], 60)
        kind = FORMATS[row["log_format"]].name
        rows.append((name, kind, steps, str(row["log_stride"]), norms, *(words.value(n, row[n]) for n in SHOWN)))
    return Table("Runs", heads, tuple(rows), frozenset(heads[2:-1]))


def _left_out(logs: dict[str, ExternalLog]) -> Iterator[tuple[str, str]]:
    for log in logs.values():
        name = words.clean(log.run, 60)
        if parts := [f"{words.clean(what)}: {n}" for what, n in log.left_out.items()]:
            yield name, f"left out: {', '.join(parts)}"
        for note in log.notes:
            yield name, words.clean(note)


def _sentence(study: Study, trial_id: str) -> str:
    row = study.row(trial_id)
    name = words.clean(row["case"], 60)
    if (log := study.log(trial_id)) is not None and log.after_clipping:
        return f"{name}: gradient norms after clipping alone, which do not show how large the gradients were."
    if row["grad_norm_max"] is None:
        return f"{name}: no gradient norm in {words.count(row['steps_done'], 'step')}."
    norm = study.trace(trial_id)["grad_norm"]
    norm = norm[np.isfinite(norm)]
    ratio, lost = row["grad_norm_max_over_median"], row["nonfinite_steps"]
    start = f"{'the warmup and ' if row['optim.warmup_steps'] else ''}the first {SETTLED} rows"
    later = f"; after {start} at most {words.number(ratio)} times the median" if ratio else ""
    broken = f"; {words.count(lost, 'row')} not finite" if lost else ""
    return (
        f"{name}: of {words.count(len(norm), 'logged norm')} the largest is {words.number(row['grad_norm_max'], 4)}, "
        f"at step {row['grad_norm_argmax']}, and the median {words.number(float(np.median(norm)))}{later}{broken}."
        f"{_clipping(norm, row)}"
    )


def _clipping(norm: NDArray[np.float64], row: dict[str, Any]) -> str:
    """The share of norms above the clip threshold; where it is not known, above the default of that trainer."""
    clip, default = row["optim.clip"], FORMATS[row["log_format"]].default_clip
    if clip is not None:
        share = words.percent(float(np.mean(norm > clip)))
        return "" if clip == math.inf else f" {share} of them lie above its clip of {words.level(clip)}."
    if default is None:
        return ""
    threshold, setting = default
    share = words.percent(float(np.mean(norm > threshold)))
    return f" {share} of them lie above {words.level(threshold)}, that trainer's default; its {setting} is not known."


def _logs(study: Study) -> Iterator[tuple[str, ExternalLog]]:
    for trial_id in study.trials.index:
        try:
            log = study.log(trial_id)
        except StoreError:  # it was readable when the tables were made
            continue
        if log is not None:
            yield trial_id, log

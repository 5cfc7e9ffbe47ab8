"""Tables about single trials: all of a study's, and what is known of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stabstudy.analysis import words
from stabstudy.analysis.blocks import Table
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.study import Study
from stabstudy.config import setting_names
from stabstudy.stability.summary import COLUMNS
from stabstudy.trace import Rows

STATISTICS = (
    "final_loss", "spike_events", "spike_abs_rate", "severity", "grad_norm_median", "grad_norm_max_over_median",
    "grad_norm_log_sd", "clip_share", "attn_logit_peak",
)  # fmt: skip
"""Shown of every trial where all stand in one table."""

MOST_PROBES = 60


def all_trials(study: Study) -> Table:
    """A row per trial: its levels and seed, how it ended, and STATISTICS."""
    axes = list(study.axes)
    case = ["case"] if study.trials["case"].notna().any() else []
    numbers = [*map(words.heading, axes), "seed", "steps", *(COLUMNS[name].label for name in STATISTICS)]
    heads = ("trial", *case, *numbers[: len(axes) + 1], "verdict or state", *numbers[len(axes) + 1 :])
    rows = tuple(
        (
            row["trial_id"],
            *(words.clean(row[name] or "", 40) for name in case),
            *(words.level(row[a], a) for a in axes),
            words.level(row["seed"]),
            ended(row),
            str(row["steps_done"]),
            *(_value(name, row[name]) for name in STATISTICS),
        )
        for row in map(study.row, study.trials.index)
    )
    title = f"All {len(rows)} trials" if len(rows) != 1 else "The one trial"
    return Table(title, heads, rows, frozenset(numbers), folded=True)


def ended(row: Mapping[str, Any]) -> str:
    """Its verdict with the rule that made it, else its state."""
    if row["state"] != "done":
        return words.clean(row["state"], 40)
    notes = [note for note in (rule(row, "{}"), "sampling noise" if row["sampling_noise"] else "") if note]
    said = f" ({', '.join(notes)})" if notes else ""
    return f"{row['verdict'] or 'not judged'}{said}"


def rule(row: Mapping[str, Any], form: str) -> str:
    """The rule that made the verdict, in this form; empty where it is the verdict's own word, or there is none."""
    return form.format(row["verdict_rule"]) if row["verdict_rule"] not in (None, row["verdict"]) else ""


def settings(study: Study, row: Mapping[str, Any]) -> Iterator[Table]:
    """What differs in the study first; then the rest, folded."""
    varied = [(words.heading(a), a, words.level(row[a], a), _others(study, row, a)) for a in study.axes]
    varied.append(("seed", "seed", words.level(row["seed"]), _others(study, row, "seed")))
    yield Table("Settings that differ in this study", ("axis", "setting", "here", "elsewhere"), tuple(varied))
    rest = [n for n in setting_names() if n not in study.axes and n != "seed"]
    yield Table(
        "All other settings", ("setting", "value"), tuple((n, words.level(row[n], n)) for n in rest), folded=True
    )


def _others(study: Study, row: Mapping[str, Any], axis: str) -> str:
    levels = levels_of(study.trials["seed"]) if axis == "seed" else study.axes[axis]
    return ", ".join(words.level(v, axis) for v in levels if v != row[axis]) or words.NOTHING


def replicates(study: Study, row: Mapping[str, Any]) -> Table | None:
    """The trials of the same cell; None where this is the only one."""
    same = study.rows_by_cell[row["cell_id"]]
    if len(same) < 2:
        return None
    heads = ("seed", "trial", "verdict or state", *(COLUMNS[name].label for name in STATISTICS))
    rows = tuple(
        (
            words.level(r["seed"]),
            "this one" if r["trial_id"] == row["trial_id"] else r["trial_id"],
            ended(r),
            *(_value(name, r[name]) for name in STATISTICS),
        )
        for r in same
    )
    return Table("The trials of this cell: all settings equal but the seed", heads, rows, frozenset(heads[3:]))


def spikes(study: Study, trial_id: str) -> Table | None:
    """Every spike of the trial, in order; None where it has none."""
    found = study.spikes_by_trial.get(trial_id, [])
    if not found:
        return None
    rows = tuple(
        (
            "gradient norm" if s["series"] == "grad" else "loss",
            str(s["start"]),
            str(s["end"]),
            str(s["peak_step"]),
            words.number(s["peak"]),
            words.number(s["level"]),
            words.number(s["peak_ratio"]),
            words.number(s["peak_delta"]),
            lasts(s),
            s["class"] or words.NOTHING,
            {True: "yes", False: "no", None: words.NOTHING}[s["in_warmup"]],
            words.NOTHING if s["partner"] is None else f"step {s['partner']}",
        )
        for s in found
    )
    heads = (
        "series", "start", "end", "peak at", "peak", "level", "peak / level", "peak - level (nat)", "lasts",
        "class", "in warmup", "coupled with",
    )  # fmt: skip
    return Table(f"{words.count(len(rows), 'spike')}, by step", heads, rows, frozenset(heads[1:9]))


def lasts(spike: Mapping[str, Any]) -> str:
    """Null where not every step was logged."""
    if spike["duration"] is None:
        return words.NOTHING
    return f"{spike['duration']}" if spike["recovered"] else f"over {spike['duration']}"


def statistics(row: Mapping[str, Any]) -> Table:
    """Every statistic with its name, value, unit and meaning."""
    rows = tuple(
        (d.label, name, _value(name, row[name]), "" if d.unit == "fraction" else d.unit, d.meaning)
        for name, d in COLUMNS.items()
    )
    heads = ("shown as", "column", "value", "unit", "meaning")
    return Table("All statistics", heads, rows, frozenset({"value"}), folded=True)


def probes(rows: Rows) -> Table:
    """What was measured at intervals, lists as their extremes over the layers; at most MOST_PROBES, evenly spread."""
    shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MOST_PROBES)).round().astype(int))
    columns = {
        "validation loss": rows["val_loss"],
        "update RMS": rows["update_rms"],
        "Adam RMS, largest": rows["adam_rms_max"],
        "attention logit, largest": _over_layers(rows, "attn_logit_max", np.fmax),
        "attention entropy, smallest": _over_layers(rows, "attn_entropy", np.fmin),
        "residual RMS, largest": _over_layers(rows, "resid_rms", np.fmax),
        "norm of the weights": rows["param_norm"],
    }
    numbers = tuple((str(rows["step"][i]), *(words.number(float(c[i])) for c in columns.values())) for i in shown)
    left_out = f", {len(shown)} of {len(rows)}, evenly spread" if len(shown) < len(rows) else ""
    return Table(f"Probes{left_out}", ("step", *columns), numbers, frozenset({"step", *columns}), folded=True)


def _over_layers(rows: Rows, name: str, pick: np.ufunc) -> Any:
    values = rows[name]
    return pick.reduce(values, axis=1) if values.shape[1] else np.full(len(rows), np.nan)


def _value(metric: str, value: Any) -> str:
    value = plain(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return words.clean(value)
    return words.statistic(value, COLUMNS[metric].unit)

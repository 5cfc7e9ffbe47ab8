"""Tables about single trials: all of a study's, and what is known of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stabstudy.analysis import words
from stabstudy.analysis.elements import Table
from stabstudy.analysis.levels import levels_of, plain
from stabstudy.analysis.report.findings import REASONS
from stabstudy.analysis.study import Study
from stabstudy.config import setting_names
from stabstudy.stability.summary import COLUMNS
from stabstudy.trace import Rows

STATISTICS = (
    "final_loss", "spike_events", "spike_abs_rate", "severity", "grad_norm_median", "grad_norm_max_over_median",
    "grad_norm_log_sd", "clip_share", "attn_logit_peak",
)  # fmt: skip
"""Shown of every trial where all stand in one table."""

RULES = {
    "R1": "long spike",
    "R2": "recurring spikes",
    "R1+R2": "long and recurring spikes",
    "nonfinite": "a value not finite",
    "above_init": "loss above that of the untrained model",
    "persistent": "loss rose and stayed",
    "above_unigram": "loss back above the entropy of single tokens",
    "no_recovery": "loss ended far above its best",
}
"""`verdict_rule` -> what it means, short; `rough` is its own word."""

MOST_PROBES = 60


def all_trials(study: Study) -> Table:
    """A row per trial, by cell and seed: its levels and seed, how it ended, and STATISTICS."""
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
        for cell_id in study.cells.index
        for row in study.rows_by_cell[cell_id]
    )
    title = f"All {len(rows)} trials" if len(rows) != 1 else "The one trial"
    return Table(title, heads, rows, frozenset(numbers), folded=True)


def ended(row: Mapping[str, Any]) -> str:
    """Its verdict and why, in words, else its state."""
    if row["state"] != "done":
        return words.clean(row["state"], 40)
    if row["verdict"] is None:
        reason = row["verdict_reason"]
        return "not judged" if reason is None else f"not judged: {REASONS.get(reason, words.clean(reason, 40))}"
    notes = [note for note in (rule(row["verdict_rule"]), "sampling noise" if row["sampling_noise"] else "") if note]
    return f"{row['verdict']} ({'; '.join(notes)})" if notes else str(row["verdict"])


def rule(code: str | None) -> str:
    """The rule that made a verdict, in words and as its code; empty where the verdict's own word says it all."""
    return f"{RULES[code]}, {code}" if code in RULES else ""


def settings(study: Study, row: Mapping[str, Any]) -> Iterator[Table]:
    """Those that vary in the study; then the others, folded."""
    varied = [(words.heading(a), a, words.level(row[a], a), _others(study, row, a)) for a in study.axes]
    varied.append(("seed", "seed", words.level(row["seed"]), _others(study, row, "seed")))
    yield Table("Settings that differ in this study", ("axis", "setting", "this trial", "other trials"), tuple(varied))
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
            "this trial" if r["trial_id"] == row["trial_id"] else r["trial_id"],
            ended(r),
            *(_value(name, r[name]) for name in STATISTICS),
        )
        for r in same
    )
    return Table("The trials of this cell: all settings equal but the seed", heads, rows, frozenset(heads[3:]))


def statistics(row: Mapping[str, Any]) -> Table:
    """Every statistic with its name, value, unit and meaning."""
    rows = tuple(
        (d.label, name, _value(name, row[name]), "" if d.unit == "fraction" else d.unit, d.meaning)
        for name, d in COLUMNS.items()
    )
    heads = ("shown as", "column", "value", "unit", "meaning")
    return Table("All statistics", heads, rows, frozenset({"value"}), folded=True)


def probes(rows: Rows) -> Table:
    """The probes, lists as their extremes over the layers; at most MOST_PROBES rows, evenly spread."""
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
    return Table(f"Values at probes{left_out}", ("step", *columns), numbers, frozenset({"step", *columns}), folded=True)


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

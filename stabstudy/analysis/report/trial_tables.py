"""Tables of trials and spikes: all trials of a study, its highest spikes, what is known of one trial."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from stabstudy.analysis import words
from stabstudy.analysis.elements import Block, Table, Text
from stabstudy.analysis.levels import levels_of, records
from stabstudy.analysis.study import Study
from stabstudy.config import setting_names
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import COLUMNS
from stabstudy.trace import Rows

STATISTICS = (
    "final_loss", "spike_events", "spike_abs_rate", "severity", "grad_norm_median", "grad_norm_max_over_median",
    "grad_norm_log_sd", "clip_share", "attn_logit_peak",
)  # fmt: skip
"""Shown of every trial where all stand in one table."""

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
            *(words.value(name, row[name]) for name in STATISTICS),
        )
        for cell_id in study.cells.index
        for row in study.rows_by_cell[cell_id]
    )
    title = f"All {len(rows)} trials" if len(rows) != 1 else "The one trial"
    return Table(title, heads, rows, frozenset(numbers), folded=True)


def ended(row: Mapping[str, Any]) -> str:
    """Its verdict and why, in words, else its state."""
    if row["state"] != "done":
        so_far = f" ({row['verdict']} as far as it ran)" if row["state"] == "stopped" and row["verdict"] else ""
        return words.clean(row["state"], 40) + so_far
    if row["verdict"] is None:
        reason = row["verdict_reason"]
        return "not judged" if reason is None else f"not judged: {words.REASONS.get(reason, words.clean(reason, 40))}"
    notes = [
        note for note in (words.rule(row["verdict_rule"]), "sampling noise" if row["sampling_noise"] else "") if note
    ]
    return f"{row['verdict']} ({'; '.join(notes)})" if notes else str(row["verdict"])


def settings(study: Study, row: Mapping[str, Any]) -> Iterator[Table]:
    """Those that vary in the study; then the others, folded."""
    varied = [(words.heading(a), a, words.level(row[a], a), _others(study, row, a)) for a in study.axes]
    if row["seed"] is not None:
        varied.append(("seed", "seed", words.level(row["seed"]), _others(study, row, "seed")))
    heads = ("axis", "setting", "this trial", "other trials")
    if varied:
        yield Table("Settings that differ in this study", heads, tuple(varied))
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
            *(words.value(name, r[name]) for name in STATISTICS),
        )
        for r in same
    )
    return Table("The trials of this cell: all settings equal but the seed", heads, rows, frozenset(heads[3:]))


def statistics(row: Mapping[str, Any]) -> Table:
    """Every statistic with its name, value, unit and meaning."""
    nats = row.get("objective.kind") != "kto"
    rows = tuple(
        (d.label, name, words.value(name, row[name]), words.unit_of(name, nats).replace("fraction", ""), d.meaning)
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


MOST_SPIKES = 6
"""Spikes of each series that the table of a study shows."""

_PROPERTIES = ("recovers after (steps)", "class", "flagged as", "batch", "in warmup", "coupled spike")


def highest_spikes(study: Study) -> Iterator[Block]:
    """The section: how many spikes there are, and the highest of each series."""
    if not len(study.spikes):
        yield Text("No spike was found in any trial.")
        return
    grad, loss = (study.spikes[study.spikes["series"] == series] for series in ("grad", "loss"))
    yield Text(
        f"{words.count(len(grad), 'spike')} of the gradient norm and {len(loss) or 'none'} of the loss, in all trials "
        "that have a record, done or not."
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


def spike_method(study: Study) -> Iterator[Text]:
    """What the columns of the highest spikes are; nothing where there is none."""
    if len(study.spikes):
        yield Text(f"Spikes. {legend(study.rules)}")


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
    title = f"{words.count(len(rows), 'spike')}, by step"
    return Table(title, heads, rows, frozenset((*numbers, _PROPERTIES[0])), steps=frozenset(numbers[:3]))


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
    shown = spikes.sort_values([height, "trial_id", "start"], ascending=[False, True, True]).head(MOST_SPIKES)
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
    heads = ("trial", "which", *numbers, *_PROPERTIES)
    return Table(title, heads, rows, frozenset((*numbers, _PROPERTIES[0])), steps=frozenset(numbers[:1]))


def _properties(spike: Mapping[str, Any]) -> tuple[str, ...]:
    """What _PROPERTIES names; null where not every step was logged, or the other trials of a batch are too few."""
    return (
        _duration(spike),
        spike["class"] or words.NOTHING,
        spike["part"] or words.NOTHING,
        words.yes_or_no(spike["batch"]),
        words.yes_or_no(spike["in_warmup"]),
        "none" if spike["partner"] is None else f"{_other(spike['series'])} at {spike['partner']}",
    )


def _duration(spike: Mapping[str, Any]) -> str:
    if spike["duration"] is None:
        return words.NOTHING
    return f"{spike['duration']}" if spike["recovered"] else f"over {spike['duration']}"


def _other(series: str) -> str:
    return "loss" if series == "grad" else "norm"

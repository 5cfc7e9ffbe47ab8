"""Tables of cells: a row per combination of settings, its seeds together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stabstudy.analysis import words
from stabstudy.analysis.elements import Table
from stabstudy.analysis.levels import records
from stabstudy.analysis.report.trial_tables import rule
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

STATISTICS = (
    "spike_events", "spike_abs_rate", "grad_norm_max_over_median", "grad_norm_log_sd", "clip_share",
    "attn_logit_peak",
)  # fmt: skip
"""Shown per cell beside the final loss: the mean over its done trials."""

MOST_OPEN = 24
"""Rows up to which the table is open from the start."""


def cells(study: Study) -> Iterator[Table]:
    """Means and verdicts of every cell; then the intervals, which would make one table three screens wide."""
    rows, heads = records(study.cells.reset_index()), _heads(study)
    numbers = ("seeds", "final loss", *(COLUMNS[name].label for name in STATISTICS))
    rules = _rules(study)
    means = tuple((*_which(row, study), _verdicts(row, rules), _seeds(row), *_means(row)) for row in rows)
    title = (
        f"{words.count(len(rows), 'cell')}: means over the done seeds (geometric of norms, ratios and logits), ± half "
        "the 95 % interval (from 2 seeds on)"
    )
    right = frozenset((*heads, *numbers)) - {"case"}
    yield Table(title, (*heads, "verdicts", *numbers), means, right, folded=len(rows) > MOST_OPEN)
    ends = tuple((*_which(row, study), *_intervals(row)) for row in rows)
    title = "95 % intervals of these means (those of every statistic: cells.csv)"
    yield Table(title, (*heads, *numbers[1:]), ends, right, folded=True)


def value(metric: str, number: Any) -> str:
    """A statistic, or a difference of it, as its unit wants it."""
    return words.statistic(number, COLUMNS[metric].unit)


def interval(metric: str, low: Any, high: Any) -> str:
    """`0.1 to 0.3`; a dash where there is none."""
    return words.NOTHING if low is None or high is None else f"{value(metric, low)} to {value(metric, high)}"


def _heads(study: Study) -> tuple[str, ...]:
    return (*(["case"] if _has_cases(study) else []), *map(words.heading, study.axes))


def _which(row: Mapping[str, Any], study: Study) -> tuple[str, ...]:
    case = [words.clean(row["case"] or "", 40)] if _has_cases(study) else []
    return (*case, *(words.level(row[a], a) for a in study.axes))


def _has_cases(study: Study) -> bool:
    return bool(study.cells["case"].notna().any())


def _rules(study: Study) -> dict[Any, str]:
    """(cell, verdict) -> in parentheses, the rules by which its trials got it, and how many by sampling noise."""
    by_verdict = study.trials[study.trials["verdict"].notna()].groupby(["cell_id", "verdict"])
    texts = {}
    for at, members in by_verdict:
        rules = sorted({text for code in members["verdict_rule"].dropna() if (text := rule(code))})
        noise = int(members["sampling_noise"].fillna(False).sum())
        notes = [*rules, *([f"{noise} by sampling noise"] if noise else [])]
        texts[at] = f" ({'; '.join(notes)})" if notes else ""
    return texts


def _verdicts(row: Mapping[str, Any], rules: Mapping[Any, str]) -> str:
    named = [f"{row[v]} {v}{rules.get((row['cell_id'], v), '')}" for v in VERDICTS if row[v]]
    return ", ".join(named) or words.NOTHING


def _seeds(row: Mapping[str, Any]) -> str:
    """How many are done, of how many where some are not."""
    return str(row["n"]) if row["n"] == row["n_done"] else f"{row['n_done']} of {row['n']}"


def _means(row: Mapping[str, Any]) -> Iterator[str]:
    yield words.estimate(row["final_loss_capped"], row["final_loss_capped_low"], row["final_loss_capped_high"], 4)
    for name in STATISTICS:
        yield value(name, row[name])


def _intervals(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("final_loss_capped", *STATISTICS):
        yield interval(name, row[f"{name}_low"], row[f"{name}_high"])

"""The comparison of studies: effects of the study, matched cells, differences paired by seed, caveats.

Studies are put together as one whose first axis is `study`. Trials are paired across it as across any other axis: same
seed, same level of everything that varies within a study. Settings that differ between the studies and within none are
what the axis stands for, and are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from stabstudy.analysis import compare, style, words
from stabstudy.analysis.effects import CLEAR, REPORTED, effects
from stabstudy.analysis.elements import Block, Count, Finding, Report, Section, Table, Text
from stabstudy.analysis.levels import Level, levels_of, records
from stabstudy.analysis.paired import holm
from stabstudy.analysis.report import findings
from stabstudy.analysis.report.cell_tables import interval, value
from stabstudy.analysis.report.matched_cells import AXIS, matched_figures, matched_tables
from stabstudy.analysis.study import Study
from stabstudy.config import setting_names
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

BY_DETECTOR = ("spike_abs_rate",)
"""Statistics compared here that depend on the detector and on the logging stride."""

UNPAIRED = "No trial of one study has a partner of the same seed and levels in another, so no difference is computed."


def report(studies: Sequence[Study], pages: Sequence[str] = ()) -> Report:
    """The comparison of at least two studies of different names; the first is what the others are compared with.

    `pages`: the way from this report's folder to each study's own page.
    """
    whole = Study.concat(studies)
    metrics = _comparable(whole)
    table = _differences(whole, metrics)
    names = whole.axes[AXIS]
    return Report(
        study=" against ".join(words.clean(name, 60) for name in names),
        question="",
        headline=f"Comparison of {len(names)} studies.",
        counts=[Count(v, int((whole.trials["verdict"] == v).sum()), style.VERDICT_SIGNS[v]) for v in VERDICTS],
        findings=[Finding("Differences", list(_findings(whole, metrics, table)))],
        warnings=list(warnings(whole)),
        sections=[s for s in _sections(studies, whole, metrics, table) if s.blocks],
        pages=[(words.clean(study.name, 60), page) for study, page in zip(studies, pages, strict=False)],
    )


def warnings(whole: Study) -> Iterator[str]:
    """What keeps a number of one study from being compared with that of another."""
    trials = whole.trials
    by_study = trials.groupby(AXIS)
    if _differ(by_study["eval_hash"]):
        yield "The evaluation sets differ: losses are shown, and not compared."
    if _differ(by_study["data_fingerprint"]):
        yield "The studies read different data."
    if trials["detector_id"].nunique() > 1:
        yield "The rules for spikes differ (detector_id): spike rates and verdicts are shown, and not compared."
    if "log_stride" in trials and trials["log_stride"].nunique() > 1:
        yield "The logging intervals differ: rates of spikes are shown, and not compared."
    if _differ(by_study["train.batch_size"]) or _differ(by_study["data.seq_len"]):
        yield "Steps hold different numbers of tokens, so rates per step differ in meaning."
    if _differ(by_study["train.steps"]):
        yield "Trials have different numbers of steps: final losses and largest values are those of different lengths."


def _differ(column: Any) -> bool:
    """Whether the sets of values of a grouped column are not the same in every group."""
    return len({frozenset(levels_of(values)) for _, values in column}) > 1


def _comparable(whole: Study) -> list[str]:
    trials = whole.trials
    strides = trials["log_stride"].nunique() if "log_stride" in trials else 1
    mixed = trials["detector_id"].nunique() > 1 or strides > 1
    return [m for m in REPORTED if not (mixed and m in BY_DETECTOR)]


def _sections(
    studies: Sequence[Study], whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]
) -> Iterator[Section]:
    yield Section("studies", "The studies", [_studies(studies), *_settings(whole)])
    yield Section("differences", "Differences", list(_difference_blocks(whole, metrics, table)))
    yield Section("figures", "Figures", list(matched_figures(whole)))
    yield Section("cells", "Matched cells", list(matched_tables(whole)))


def _studies(studies: Sequence[Study]) -> Table:
    rows = []
    for study in studies:
        numbers = findings.counts(study)
        rows.append(
            (
                words.clean(study.name, 60),
                words.clean(study.question) or words.NOTHING,
                *(str(numbers[v]) for v in VERDICTS),
                str(sum(numbers.values()) - sum(numbers[v] for v in VERDICTS)),
                study.rules.detector_id,
            )
        )
    heads = ("study", "question", *VERDICTS, "others", "detector")
    return Table("Studies", heads, tuple(rows), frozenset((*VERDICTS, "others")))


def _settings(whole: Study) -> Iterator[Block]:
    """Settings that differ between the studies and within none of them."""
    by_study = {name: whole.trials[whole.trials[AXIS] == name] for name in whole.axes[AXIS]}
    rows = []
    for setting in setting_names():
        levels = {name: levels_of(trials[setting]) for name, trials in by_study.items()}
        if setting != "seed" and all(len(v) == 1 for v in levels.values()) and len({v[0] for v in levels.values()}) > 1:
            rows.append((setting, *(words.level(v[0], setting) for v in levels.values())))
    if rows:
        heads = ("setting", *(words.clean(name, 60) for name in by_study))
        yield Table("Settings that differ between the studies and are the same within each", heads, tuple(rows))
    else:
        yield Text("No setting that is the same within each study differs between the studies.")


def _differences(whole: Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of `compare.levels` along the study axis, with the first study as `a`."""
    first = whole.axes[AXIS][0]
    differences = []
    for metric in metrics:
        rows = records(compare.levels(whole.trials, list(whole.axes), AXIS, metric))
        kept = [row for row in rows if row["pairs"] and first in (row["a"], row["b"])]
        differences += [{"metric": metric, **_from(first, row)} for row in kept]
    return differences


def _from(first: Level, row: dict[str, Any]) -> dict[str, Any]:
    """The row with `first` as its `a`."""
    if row["a"] == first:
        return row
    low, high = (None if row[end] is None else -row[end] for end in ("high", "low"))
    turned = {"difference": -row["difference"], "low": low, "high": high, "positive": 1 - row["positive"]}
    swapped = {
        f"{name}{one}": row[f"{name}{other}"] for name in ("", "mean_", "diverged_") for one, other in ("ab", "ba")
    }
    return row | turned | swapped


def _difference_blocks(whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]) -> Iterator[Block]:
    if not table:
        yield Text(" ".join([UNPAIRED, *_disjoint(whole)]))
        return
    yield Text(
        "A pair is two trials of different studies with the same seed and the same level of everything that varies "
        "within a study. Differences are averaged per seed; the interval is Student's over seeds."
    )
    rows = tuple(
        (
            f"{words.clean(r['a'], 60)} → {words.clean(r['b'], 60)}",
            COLUMNS[r["metric"]].label,
            f"{value(r['metric'], r['mean_a'])} → {value(r['metric'], r['mean_b'])}",
            value(r["metric"], r["difference"]),
            interval(r["metric"], r["low"], r["high"]),
            str(r["pairs"]),
            str(r["seeds"]),
        )
        for r in table
    )
    numbers = ("mean", "change", "95 % interval", "pairs", "seeds")
    yield Table("Paired differences", ("studies", "statistic", *numbers), rows, frozenset(numbers))
    for metric in REPORTED:
        if metric not in metrics:
            yield Text(f"{words.STATISTICS[metric]}: not compared (see above).")


def _disjoint(whole: Study) -> Iterator[str]:
    """The axes on which the studies have no level in common, as `Depth: 4 in a, 2 and 6 in b.` lists them."""
    for axis in [a for a in [*whole.axes, "seed"] if a != AXIS]:
        levels = {name: levels_of(whole.trials.loc[whole.trials[AXIS] == name, axis]) for name in whole.axes[AXIS]}
        if not set.intersection(*map(set, levels.values())):
            each = [
                f"{words.listing([words.level(v, axis) for v in own])} in {words.clean(name, 60)}"
                for name, own in levels.items()
            ]
            label = words.label(axis)
            yield f"{label[0].upper()}{label[1:]}: {', '.join(each)}."


def _findings(whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]) -> Iterator[str]:
    """The differences by statistic with their intervals: stated, not found, or not tested."""
    if not table:
        yield UNPAIRED
        return
    for row in _claims(whole, metrics):
        name = _capital(words.STATISTICS[row["metric"]])
        if row["p_holm"] is None:
            yield f"{name}: not tested ({row['note']})."
        else:
            at = f"{words.clean(row['a'], 60)} → {words.clean(row['b'], 60)}"
            reading = "" if row["p_holm"] < CLEAR else "no difference found: "
            p = words.number(row["p_holm"], 2)
            yield f"{name}, {at}: {reading}{findings.change(row)} (p {p}, Holm)."


def _claims(whole: Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """The effects of the study axis on matched trials, all other axes as factors; Holm over the statistics.

    Matched: trials of the same seed, data and levels in at least two studies. A statistic that cannot be compared
    between these (see `compare.alike`) is left out. Where an effect involves the first study, it starts there.
    """
    axes = [a for a in whole.axes if a != AXIS]
    others = ["seed", *axes, "data_fingerprint"]
    done = whole.trials[(whole.trials["state"] == "done") & whole.trials["seed"].notna()]
    matched = done[done.groupby(others, dropna=False)[AXIS].transform("nunique") > 1]
    groups = matched.groupby(others, dropna=False)
    usable = [m for m in metrics if not any((groups[c].nunique() > 1).any() for c in compare.alike(m, matched))]
    rows = [r for r in records(effects(matched, [AXIS, *axes], usable)) if r["axis"] == AXIS]
    adjusted = holm([math.nan if r["p"] is None else r["p"] for r in rows])
    first = whole.axes[AXIS][0]
    return [_turned(first, r) | {"p_holm": None if math.isnan(p) else p} for r, p in zip(rows, adjusted, strict=True)]


def _turned(first: Level, row: dict[str, Any]) -> dict[str, Any]:
    """The effect as that from the study `first` to the other one, where it ends at `first`."""
    if row["b"] != first:
        return row
    ends = [row[name] for name in ("estimate", "high", "low")]
    turned = [-v if row["scale"] == "difference" else 1 / v if v else math.inf for v in ends]
    return row | dict(zip(("estimate", "low", "high"), turned, strict=True)) | {"a": row["b"], "b": row["a"]}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

"""The report's maps: verdicts with the stable range of each row, then statistics, of the main and of other axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from stabstudy.analysis import map_plots, plots, style, words
from stabstudy.analysis.elements import Absent, Figure, Table
from stabstudy.analysis.layout import Layout, at_levels, level_texts, pooled
from stabstudy.analysis.levels import Level, split
from stabstudy.analysis.map_plots import DIVERGED
from stabstudy.analysis.paired import Kind, kind_of
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS

VALUES = {
    "spike_abs_rate": "Share of evaluable steps at three times the recent norm or more",
    "grad_norm_max_over_median": "Largest over median gradient norm",
    DIVERGED: "Share of trials that diverged",
}
"""The statistics that have a map, each with its meaning."""

MOST_ROWS = 4
"""Rows of the stability map that a caption names beside each limit."""

MOST_PAIRS = 4
"""Other pairs of axes than the main one that get a map of PAIRED, in the order of the settings."""

PAIRED = "spike_abs_rate"


COUNTS = ("n", "without it", "not stable")
"""Heads of the counts beside a mean: the done trials that it is over, those that lack the statistic, and of both."""


def figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Every map that the study allows; in place of one that it does not, the reason."""
    if layout.by is None:
        yield Absent("Maps", "they need two axes; this study varies one")
        return
    yield _verdicts(study, layout)
    for value, meaning in VALUES.items():
        if value == DIVERGED and not (study.trials["verdict"] == DIVERGED).any():
            yield Absent("Map of the share diverged", "no trial diverged")
        else:
            yield _statistic(study, layout, value, meaning)
    yield from _other_pairs(study, layout)


def _verdicts(study: Study, layout: Layout) -> Figure:
    x, y = layout.x, str(layout.by)
    figure = plots.panels(study, lambda part, ax: plots.verdict_map(part, x, y, ax), layout.over, _height(study, y))
    fields = _fields(study, layout)
    heads = (*map(words.heading, layout.axes(study)), *VERDICTS, "n")
    rows = tuple(
        (*level_texts(layout.axes(study), f.levels), *(str(f.count(v)) for v in VERDICTS), str(f.n)) for f in fields
    )
    ranges = _limits(study, layout)
    caption = (
        f"Verdicts over {words.label(x)} and {words.label(y)}. Each field is coloured by the worst verdict in it. "
        f"Hatched: no done trial.{_pooled_too(layout)}"
    )
    if ranges:
        caption += (
            f" Heavy line: every trial of the row is stable up to it; solid where the next {words.label(x)} was "
            f"unstable, dashed where none was. {' '.join(ranges)}"
        )
    worst = [f"{at_levels(layout.axes(study), f.levels)}: {f.verdicts}" for f in fields if f.count("stable") < f.n]
    alt = f"Map of verdicts. {'; '.join(worst[:12]) or 'Every done trial is stable'}."
    table = Table("Numbers of this figure", heads, rows, frozenset(heads), folded=True)
    title = f"Verdicts over {words.label(x)} and {words.label(y)}"
    return Figure("stability-map", title, style.draw(figure), alt, caption, table)


def _limits(study: Study, layout: Layout) -> list[str]:
    """`Stable up to 0.01, first unstable at 0.03 (1 of 3): depth 2.`, one sentence for all rows of one range."""
    y = str(layout.by)
    rows: dict[str, list[str]] = {}
    for fixed in plots.combinations(study, layout.over):
        for level, row in map_plots.limits(study.where(fixed), layout.x, y).items():
            rows.setdefault(_limit(row, layout.x), []).append(at_levels([*fixed, y], [*fixed.values(), level]))
    return [
        f"{limit}: {'; '.join(names[:MOST_ROWS])}"
        f"{f'; and {more} more rows' if (more := len(names) - MOST_ROWS) > 0 else ''}."
        for limit, names in rows.items()
    ]


def _limit(row: Mapping[str, Any], x: str) -> str:
    known = row["all_stable"] is not None
    stable = f"Stable up to {words.level(row['all_stable'], x)}" if known else "Not all stable at the smallest"
    if row["first_unstable"] is None:
        return f"{stable}, no larger one was unstable"
    at, bad, there = words.level(row["first_unstable"], x), int(row["n_unstable"]), int(row["n_there"])
    return f"{stable}, first unstable at {at} ({bad} of {there})"


def _statistic(study: Study, layout: Layout, value: str, meaning: str) -> Figure:
    fields = _fields(study, layout)
    known = [f for f in fields if f.mean(value) == f.mean(value)]
    unknown = " Grey: no trial has the statistic." if len(known) < len(fields) else ""
    highest = max(known, key=lambda f: f.mean(value), default=None)
    top = highest.mean(value) if highest else 0.0
    y, axes = str(layout.by), layout.axes(study)
    figure = plots.panels(
        study,
        lambda part, ax: plots.stability_map(part, layout.x, y, value, top, ax),
        layout.over,
        _height(study, y),
    )
    what = f"{meaning} over {words.label(layout.x)} and {words.label(y)}"
    low, high = (map_plots.text(v, value) for v in map_plots.scale(value, top))
    geometric = "geometric " if kind_of(value) is Kind.RATIO else ""
    mean = "over the n done trials" if value == DIVERGED else f"the {geometric}mean over the n done trials that have it"
    caption = (
        f"{what}: {mean}, {sum(f.having(value) for f in fields)} in all{_lacking(fields, value)}. Below the value: "
        f"trials that are not stable. Colours run from {low} (dark) to {high} (light).{unknown} Hatched: no done "
        f"trial; a cross: at least one diverged.{pooled(layout)}"
    )
    peak = f" Highest: {map_plots.text(top, value)} at {at_levels(axes, highest.levels)}." if highest else ""
    heads = (*map(words.heading, axes), map_plots.label(value), *COUNTS)
    rows = [(*level_texts(axes, f.levels), f.text(value), *f.counts(value)) for f in fields]
    table = Table("Numbers of this figure", heads, tuple(rows), frozenset(heads), folded=True)
    title = f"{map_plots.label(value).capitalize()} over {words.label(layout.x)} and {words.label(y)}"
    return Figure(f"{value.replace('_', '-')}-map", title, style.draw(figure), f"Map. {what}.{peak}", caption, table)


def _other_pairs(study: Study, layout: Layout) -> Iterator[Figure]:
    """PAIRED over pairs of axes that no map above shows, each pooled over all other axes."""
    pairs = [p for p in itertools.combinations(study.axes, 2) if set(p) != {layout.x, layout.by}]
    if not pairs:
        return
    drawn = [_turned(study, *pair) for pair in pairs[:MOST_PAIRS]]
    fields = {pair: _fields(study, Layout(*pair, [], [])) for pair in drawn}
    top = max((v for of in fields.values() for f in of if (v := f.mean(PAIRED)) == v), default=0.0)
    columns = min(2, len(drawn))
    tall = sum(max(_height(study, y) for _, y in drawn[i : i + columns]) for i in range(0, len(drawn), columns))
    figure = style.new_figure(6.6 if columns == 1 else 9.2, tall, rows=-(-len(drawn) // columns), columns=columns)
    for ax, (x, y) in zip(figure.axes, drawn, strict=False):
        plots.stability_map(study, x, y, PAIRED, top, ax)
    for ax in figure.axes[len(drawn) :]:
        ax.set_visible(False)
    named = [f"{words.label(x)} and {words.label(y)}" for x, y in drawn]
    high = map_plots.text(map_plots.scale(PAIRED, top)[1], PAIRED)
    caption = (
        f"{VALUES[PAIRED]} over {'; '.join(named)}: the mean over the n done trials that have it, every other axis "
        f"pooled{_lacking(next(iter(fields.values())), PAIRED)}. Colours run from 0 (dark) to {high} (light); hatched: "
        "no done trial; a cross: at least one diverged."
    )
    if more := len(pairs) - len(drawn):
        caption += f" {words.count(more, 'more pair')} of axes: plots.stability_map(study, x, y) draws any."
    heads = ("axis", "level", "axis", "level", map_plots.label(PAIRED), *COUNTS)
    rows = tuple(
        (words.heading(x), words.level(f.levels[1], x), words.heading(y), words.level(f.levels[0], y),
         f.text(PAIRED), *f.counts(PAIRED))
        for (x, y), own in fields.items() for f in own
    )  # fmt: skip
    ranges = [f"{name}: {_span(own)}" for name, own in zip(named, fields.values(), strict=True)]
    numbers = Table("Numbers of this figure", heads, rows, frozenset(heads[4:]), folded=True)
    what = map_plots.label(PAIRED)
    alt = f"Maps of the {what}. {'; '.join(ranges)}."
    title = f"{what.capitalize()} over other pairs of axes"
    yield Figure(f"{PAIRED.replace('_', '-')}-pairs", title, style.draw(figure), alt, caption, numbers)


def _lacking(fields: list[_Field], value: str) -> str:
    """`; 2 diverged without it`: the done trials that no field's mean holds."""
    lacking = [f.trials.drop(map_plots.having(f.trials, value).index) for f in fields]
    diverged = sum(int((trials["verdict"] == DIVERGED).sum()) for trials in lacking)
    others = sum(map(len, lacking)) - diverged
    parts = [f"{n} {which}" for n, which in ((diverged, "diverged"), (others, "others")) if n]
    return f"; {words.listing(parts)} without it" if parts else ""


def _span(fields: list[_Field]) -> str:
    means = sorted(v for f in fields if (v := f.mean(PAIRED)) == v)
    return f"{words.percent(means[0])} to {words.percent(means[-1])}" if means else "not known"


def _turned(study: Study, a: str, b: str) -> tuple[str, str]:
    """(x, y): the axis of more levels lies across."""
    return (a, b) if len(study.axes[a]) >= len(study.axes[b]) else (b, a)


def _height(study: Study, y: str) -> float:
    """Inches of a map: rows of half an inch to one inch."""
    return 1.0 + max(0.55, min(1.0, 4.0 / len(study.axes[y]))) * len(study.axes[y])


def _pooled_too(layout: Layout) -> str:
    return pooled(replace(layout, pooled=["seed", *layout.pooled])).replace("Averaged", "Pooled")


@dataclass(frozen=True)
class _Field:
    """One field of a map: its levels (panels, row, column) and its done trials."""

    levels: tuple[Level, ...]
    trials: pd.DataFrame

    @property
    def n(self) -> int:
        return len(self.trials)

    @property
    def not_stable(self) -> int:
        return sum(map(self.count, VERDICTS[1:]))

    def having(self, value: str) -> int:
        return len(map_plots.having(self.trials, value))

    def counts(self, value: str) -> tuple[str, str, str]:
        """COUNTS, in words."""
        known = self.having(value)
        return str(known), str(self.n - known), str(self.not_stable)

    @property
    def verdicts(self) -> str:
        return ", ".join(f"{self.count(v)} {v}" for v in VERDICTS if self.count(v)) or "not judged"

    def count(self, verdict: str) -> int:
        return int((self.trials["verdict"] == verdict).sum())

    def mean(self, value: str) -> float:
        return map_plots.mean(self.trials, value)

    def text(self, value: str) -> str:
        return map_plots.text(self.mean(value), value)


def _fields(study: Study, layout: Layout) -> list[_Field]:
    axes = layout.axes(study)
    read = [v for v in VALUES if v != DIVERGED]
    needed = list(dict.fromkeys([*axes, "state", "verdict", "eval_hash", *read]))
    done = study.trials.loc[study.trials["state"] == "done", needed]
    return [_Field(levels, trials) for levels, trials in split(done, axes)]

"""Maps of a statistic: its mean in each field of one axis by another."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.figures.layout import Layout, level_texts, panels, pooled
from stabstudy.analysis.figures.style import Positions
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, levels_of, split
from stabstudy.analysis.paired import EXPOSURE, Kind, kind_of
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

DIVERGED = "diverged"
"""As the `value` of a map: the share of trials that diverged."""

SCALES = {"spike_abs_rate": (0.0, 0.01), "grad_norm_max_over_median": (1.0, 10.0), DIVERGED: (0.0, 1.0)}
"""Value at the dark end of the colour scale, and the least at its light end: a map of next to nothing stays dark."""

SHADES = 24
"""Colours in a colour bar; the fields of a map have any."""

SMALL_FROM = 8
"""Levels on an axis from which the words in the fields are set smaller."""

VALUES = {
    "spike_abs_rate": "Share of evaluable steps at three times the recent norm or more",
    "grad_norm_max_over_median": "Largest over median gradient norm",
    DIVERGED: "Share of trials that diverged",
}
"""The statistics that have a map, each with its meaning."""

MOST_PAIRS = 4
"""Other pairs of axes than the main one that get a map of PAIRED, in the order of the settings."""

PAIRED = "spike_abs_rate"

COUNTS = ("n", "without it", "not stable")
"""Heads of the counts beside a mean: the done trials that it is over, those that lack the statistic, and of both."""


def stability_map(
    study: Study,
    x: str = "optim.lr",
    y: str = "model.depth",
    value: str = "spike_abs_rate",
    highest: float | None = None,
    bar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Mean of a statistic in each field of x by y, written in it with n; hatched: no done trial; cross: one diverged.

    `value`: a statistic, or "diverged" for the share of trials that did. n: the done trials that have it (`2 of 3`
    where some lack it). `highest`: the largest value of several maps that are to be compared. The colours run over
    `scale(value, highest)`, not over what happens to be there; `bar`: draw them beside the map.
    """
    if ax is None:
        ax = style.new_figure(width(study, x), height(study, y)).axes[0]
    sheet = Sheet(study, x, y, value)
    means = {levels: mean(trials, value) for levels, trials in sheet.fields.items()}
    low, high = scale(value, max(filter(math.isfinite, means.values()), default=0.0) if highest is None else highest)

    def draw(at: tuple[int, int], levels: tuple[Level, ...], trials: pd.DataFrame) -> None:
        lines = [text(means[levels], value), _n(trials, value)]
        field = _draw_field(ax, at, trials, lines, (means[levels] - low) / (high - low), sheet.font)
        tooltips.describe(field, About(filters=[tooltips.condition(dict(zip((x, y), levels, strict=True)))]))

    sheet.draw(ax, draw)
    tooltips.describe(ax, About(label(value)))
    if bar:
        colour_bar([ax], value, low, high)
    return ax


def colour_bar(axes: Sequence[Axes], value: str, low: float, high: float) -> None:
    """The colours of a map beside it, or beside several on one scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colours = ListedColormap([style.field_colour((i + 0.5) / SHADES) for i in range(SHADES)])
    figure: Any = axes[0].get_figure()
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), ax=axes, pad=0.015, aspect=28, shrink=0.94)
    bar.set_label(textwrap.fill(style.plain(label(value)), 26), color=style.INK, fontsize=style.look().note)
    bar.locator, bar.formatter = MaxNLocator(4), FuncFormatter(lambda v, _: text(float(f"{v:.6g}"), value))
    bar.ax.tick_params(color=style.MUTED, labelcolor=style.INK, labelsize=style.look().note)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")  # else the ground shines through between two shades
    bar.update_ticks()


class Sheet:
    """The fields of a map: the trials in these states at each level of `x`, across, and of `y`."""

    def __init__(self, study: Study, x: str, y: str, value: str, states: Sequence[str] = ("done",)):
        self.columns, self.rows = (
            Positions(study.axes.get(a) or levels_of(study.trials[a]), a, categorical=True) for a in (x, y)
        )
        read = [] if value == DIVERGED else [compare.column(value)]
        columns = [x, y, "state", "verdict", "eval_hash", EXPOSURE, *read]
        shown = study.trials.loc[study.trials["state"].isin(states), columns]
        self.fields = dict(split(shown, {x: self.columns.levels, y: self.rows.levels}))

    @property
    def font(self) -> float:
        """Size of the words in the fields."""
        return (
            style.look().field
            if max(len(self.columns.levels), len(self.rows.levels)) < SMALL_FROM
            else style.look().least
        )

    def draw(self, ax: Axes, draw: Callable[[tuple[int, int], tuple[Level, ...], pd.DataFrame], None]) -> None:
        """Each field by `draw` (place, levels, trials), or hatched where no trial is done; then the axes' names."""
        for (i, x), (j, y) in itertools.product(enumerate(self.columns.levels), enumerate(self.rows.levels)):
            if (x, y) in self.fields:
                draw((i, j), (x, y), self.fields[x, y])
            else:
                _hatch(ax, (i, j))
        self.columns.apply_x(ax)
        self.rows.apply_y(ax)
        ax.set_xlim(-0.5, len(self.columns.levels) - 0.5)
        ax.set_ylim(-0.5, len(self.rows.levels) - 0.5)
        ax.grid(False)


def width(study: Study, x: str) -> float:
    """Inches of a map across: half a column while the words in its fields have room."""
    return style.HALF if len(study.axes.get(x, ())) <= style.look().columns else style.FULL


def height(study: Study, y: str) -> float:
    """Inches of a map: rows of half an inch to one inch."""
    if y not in study.axes:
        return 3.6
    return 1.0 + max(0.55, min(1.0, 4.0 / len(study.axes[y]))) * len(study.axes[y])


@dataclass(frozen=True)
class Field:
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
        return len(having(self.trials, value))

    def counts(self, value: str) -> tuple[str, str, str]:
        """COUNTS, in words."""
        n = self.having(value)
        return str(n), str(self.n - n), str(self.not_stable)

    @property
    def verdicts(self) -> str:
        return ", ".join(f"{self.count(v)} {v}" for v in VERDICTS if self.count(v)) or "not judged"

    def count(self, verdict: str) -> int:
        return int((self.trials["verdict"] == verdict).sum())

    def mean(self, value: str) -> float:
        return mean(self.trials, value)

    def text(self, value: str) -> str:
        return text(self.mean(value), value)


def fields_of(study: Study, layout: Layout) -> list[Field]:
    """Every field of a figure of this layout that has a done trial."""
    axes = layout.axes(study)
    read = [v for v in VALUES if v != DIVERGED]
    needed = list(dict.fromkeys([*axes, "state", "verdict", "eval_hash", *read]))
    done = study.trials.loc[study.trials["state"] == "done", needed]
    return [Field(levels, trials) for levels, trials in split(done, axes)]


def mean(trials: pd.DataFrame, value: str) -> float:
    """What a field of these trials shows."""
    if value == DIVERGED:
        return float((trials["verdict"] == DIVERGED).mean())
    return compare.mean(trials, value).mean


def having(trials: pd.DataFrame, value: str) -> pd.DataFrame:
    """The trials that `mean` is over: a trial that diverged early may lack a statistic."""
    return trials if value == DIVERGED else trials[[math.isfinite(v) for v in compare.values(trials, value)]]


def scale(value: str, highest: float) -> tuple[float, float]:
    """The values at the dark and at the light end of the colours."""
    low, least = SCALES.get(value, (0.0, 0.0))
    return low, max(least, highest) if max(least, highest) > low else low + 1.0


def text(value: float, name: str) -> str:
    """A field's number as its unit wants it."""
    return words.percent(value) if name == DIVERGED else words.statistic(value, COLUMNS[name].unit)


def label(value: str) -> str:
    """What a map shows, in words."""
    return "share diverged" if value == DIVERGED else words.STATISTICS.get(value, COLUMNS[value].label)


def _n(trials: pd.DataFrame, value: str) -> str:
    n = len(having(trials, value))
    return f"n={n}" if n == len(trials) else f"n={n} of {len(trials)}"


def _draw_field(
    ax: Axes, at: tuple[int, int], trials: pd.DataFrame, lines: Sequence[str], share: float, size: float
) -> Artist:
    """One field of a map: colour, value and n (`lines`), and how many of its trials were not stable; its text."""
    from matplotlib.patches import Rectangle

    corner = (at[0] - 0.5, at[1] - 0.5)
    ground = style.field_colour(share)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor=ground, edgecolor=style.PAPER, linewidth=1.5))
    verdicts = compare.verdicts(trials)
    unstable = [f"{verdicts[v]} {v}" for v in VERDICTS[1:] if verdicts[v]]
    ink = style.field_text_colour(ground)
    words_in_it = "\n".join([*lines, *unstable])
    field = ax.text(*at, words_in_it, ha="center", va="center", color=ink, fontsize=size, gid="field")
    if verdicts["diverged"]:
        corner = at[0] + 0.4, at[1] + 0.38
        ax.plot(*corner, marker="X", markersize=7, color=ink, linestyle="none", gid=tooltips.RING)
    return field


def _hatch(ax: Axes, at: tuple[int, int]) -> None:
    """A field without a done trial."""
    from matplotlib.patches import Rectangle

    corner = (at[0] - 0.5, at[1] - 0.5)
    ax.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=style.MUTED, hatch="///", linewidth=0.5))


def figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Every map that the study allows; in place of one that it does not, the reason."""
    grid = study.grid
    if layout.by is None:
        yield Absent("Maps", "they need two axes; this study varies one")
        return
    pairs = {pair: fields_of(grid, Layout(*pair, [], [])) for pair in _other_pairs(grid, layout)[:MOST_PAIRS]}
    fields = fields_of(grid, layout)
    tops = {value: _highest(fields, value) for value in VALUES}
    tops[PAIRED] = max(tops[PAIRED], *(_highest(own, PAIRED) for own in pairs.values()), 0.0)
    for value, meaning in VALUES.items():
        if value == DIVERGED and not (grid.trials["verdict"] == DIVERGED).any():
            yield Absent("Map of the share diverged", "no trial diverged")
        else:
            yield _statistic(grid, layout, value, meaning, tops[value])
    if pairs:
        yield _pairs_figure(grid, layout, pairs, tops[PAIRED])


def _highest(fields: Sequence[Field], value: str) -> float:
    """The largest mean of the fields; 0 where none has one."""
    return max((v for f in fields if (v := f.mean(value)) == v), default=0.0)


def _statistic(study: Study, layout: Layout, value: str, meaning: str, top: float) -> Figure:
    fields = fields_of(study, layout)
    filled = [f for f in fields if f.mean(value) == f.mean(value)]
    unknown = " Grey: no trial has the statistic." if len(filled) < len(fields) else ""
    highest = max(filled, key=lambda f: f.mean(value), default=None)
    y, axes = str(layout.by), layout.axes(study)
    pair = f"{words.label(layout.x)} and {words.label(y)}"
    what = f"{meaning} over {pair}"
    low, high = (text(v, value) for v in scale(value, top))
    geometric = "geometric " if kind_of(value) is Kind.RATIO else ""
    over = "over the n done trials" if value == DIVERGED else f"the {geometric}mean over the n done trials that have it"
    caption = (
        f"{what}: {over}, {sum(f.having(value) for f in fields)} in all{_lacking(fields, value)}. Below the value: "
        f"trials that are not stable. Colours run from {low} (dark) to {high} (light).{unknown} Hatched: no done "
        f"trial; a cross: at least one diverged.{pooled(layout)}"
    )
    peak = (
        f" Highest: {text(highest.mean(value), value)} at {words.at_levels(axes, highest.levels)}." if highest else ""
    )
    name, title = f"{value.replace('_', '-')}-map", f"{label(value).capitalize()} over {pair}"
    across = 1 if width(study, layout.x) == style.FULL else 2
    picture = panels(
        study, lambda part, ax: stability_map(part, layout.x, y, value, top, False, ax), layout.over,
        height(study, y), across,
    )  # fmt: skip
    colour_bar([ax for ax in picture.axes if ax.get_visible()], value, *scale(value, top))
    heads = (*map(words.heading, axes), label(value), *COUNTS)
    rows = ((*level_texts(axes, f.levels), f.text(value), *f.counts(value)) for f in fields)
    return style.report_figure(name, title, picture, f"Map. {what}.{peak}", caption, heads, rows)


def _other_pairs(study: Study, layout: Layout) -> list[tuple[str, str]]:
    """The pairs of axes (x, y) that no other map shows."""
    pairs = [p for p in itertools.combinations(study.axes, 2) if set(p) != {layout.x, layout.by}]
    return [_turned(study, *pair) for pair in pairs]


def _pairs_figure(study: Study, layout: Layout, fields: Mapping[tuple[str, str], list[Field]], top: float) -> Figure:
    """PAIRED over these pairs of axes, each pooled over all other axes."""
    drawn = list(fields)
    columns = 2 if all(width(study, x) == style.HALF for x, _ in drawn) and len(drawn) > 1 else 1
    tall = sum(max(height(study, y) for _, y in drawn[i : i + columns]) for i in range(0, len(drawn), columns))
    across = width(study, drawn[0][0]) if len(drawn) == 1 else style.FULL
    picture = style.new_panels(len(drawn), across, tall, columns)
    for ax, (x, y) in zip(picture.axes, drawn, strict=False):
        stability_map(study, x, y, PAIRED, top, False, ax)
    colour_bar([ax for ax in picture.axes if ax.get_visible()], PAIRED, *scale(PAIRED, top))
    named = [f"{words.label(x)} and {words.label(y)}" for x, y in drawn]
    high = text(scale(PAIRED, top)[1], PAIRED)
    caption = (
        f"{VALUES[PAIRED]} over {'; '.join(named)}: the mean over the n done trials that have it, every other axis "
        f"pooled{_lacking(next(iter(fields.values())), PAIRED)}. Colours run from 0 (dark) to {high} (light); hatched: "
        "no done trial; a cross: at least one diverged."
    )
    if more := len(_other_pairs(study, layout)) - len(drawn):
        caption += f" {words.count(more, 'more pair')} of axes: plots.stability_map(study, x, y) draws any."
    ranges = [f"{name}: {_span(own)}" for name, own in zip(named, fields.values(), strict=True)]
    what = label(PAIRED)
    name, title = f"{PAIRED.replace('_', '-')}-pairs", f"{what.capitalize()} over other pairs of axes"
    alt = f"Maps of the {what}. {'; '.join(ranges)}."
    heads = ("axis", "level", "axis", "level", what, *COUNTS)
    rows = (
        (words.heading(x), words.level(f.levels[1], x), words.heading(y), words.level(f.levels[0], y),
         f.text(PAIRED), *f.counts(PAIRED))
        for (x, y), own in fields.items() for f in own
    )  # fmt: skip
    return style.report_figure(name, title, picture, alt, caption, heads, rows, texts={"axis", "level"})


def _lacking(fields: list[Field], value: str) -> str:
    """`; 2 diverged without it`: the done trials that no field's mean holds."""
    lacking = [f.trials.drop(having(f.trials, value).index) for f in fields]
    diverged = sum(int((trials["verdict"] == DIVERGED).sum()) for trials in lacking)
    others = sum(map(len, lacking)) - diverged
    parts = [f"{n} {which}" for n, which in ((diverged, "diverged"), (others, "others")) if n]
    return f"; {words.listing(parts)} without it" if parts else ""


def _span(fields: list[Field]) -> str:
    means = sorted(v for f in fields if (v := f.mean(PAIRED)) == v)
    return f"{words.percent(means[0])} to {words.percent(means[-1])}" if means else "not known"


def _turned(study: Study, a: str, b: str) -> tuple[str, str]:
    """(x, y): the axis of more levels lies across."""
    return (a, b) if len(study.axes[a]) >= len(study.axes[b]) else (b, a)

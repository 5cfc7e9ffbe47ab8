"""The map of verdicts: how many trials of each field have each, and how far the axis across can be raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.elements import Figure
from stabstudy.analysis.figures import maps, style, tooltips
from stabstudy.analysis.figures.layout import Layout, combinations, level_texts, panel_width, panels
from stabstudy.analysis.figures.tooltips import About
from stabstudy.analysis.levels import Level, records
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS
from stabstudy.state import ENDED

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

LIMIT_COLOURS = ("#fefefe", "#0b3d91")
"""Frame and core of the line that ends the stable levels of a row."""

MOST_ROWS = 4
"""Rows of the stability map that a caption names beside each limit."""


def verdict_map(study: Study, x: str = "optim.lr", y: str = "model.depth", ax: Axes | None = None) -> Axes:
    """How many trials of each field have each verdict, and per row how far x can be raised.

    A field's ground is that of its worst verdict; trials that a rule has stopped are counted, and keep a field from
    being green. In each row of an x with an order a heavy line ends the levels up to which every trial is stable
    (`compare.limits`): solid where the next level was seen to be unstable, dashed where it was not (nothing larger was
    tried, or trials have no verdict); none where trials are missing. All other axes and seeds are pooled.
    """
    if ax is None:
        ax = style.new_figure(maps.width(study, x), maps.height(study, y)).axes[0]
    sheet = maps.Sheet(study, x, y, maps.DIVERGED, ENDED)

    def draw(at: tuple[int, int], levels: tuple[Level, ...], trials: pd.DataFrame) -> None:
        field = _draw_verdicts(ax, at, trials, sheet.font)
        tooltips.describe(field, About(filters=[tooltips.condition(dict(zip((x, y), levels, strict=True)))]))

    sheet.draw(ax, draw)
    columns, ranges = sheet.columns.levels, limits(study, x, y)
    for j, row in enumerate(sheet.rows.levels):
        _draw_limit(ax, j, columns, ranges.get(row, {}))
    ax.set_xlim(-0.56, len(columns) - 0.44)  # the line of a limit at the end of the grid stays visible
    return ax


def limits(study: Study, x: str, y: str) -> Mapping[Level, Mapping[str, Any]]:
    """Per level of y, how far x can be raised: the rows of `compare.limits`; empty where x has no order.

    Named cases are left out, and so are levels of y that the limits are refused for.
    """
    if not _has_order(study.axes.get(x, [])):
        return {}
    rows = records(compare.limits(study.grid.trials, list(study.axes), x, y).reset_index())
    return {row[y]: row for row in rows if row["reason"] is None}


def figures(study: Study, layout: Layout) -> Iterator[Figure]:
    """The map over the two main axes, where there are two."""
    if layout.by is not None:
        yield _figure(study.grid, layout, layout.x, layout.by)


def _figure(study: Study, layout: Layout, x: str, y: str) -> Figure:
    axes, fields = layout.axes(study), maps.fields_of(study, layout)
    title = f"Verdicts over {words.label(x)} and {words.label(y)}"
    caption = (
        f"{title}. Each field is coloured by the worst verdict in it. "
        f"Hatched: no done trial. Pooled over {words.listing([words.label(a) for a in ('seed', *layout.pooled)])}."
    )
    if (study.trials["state"] == "stopped").any():
        caption += " ⊘: ended early by a rule of the sweep, with hardly a chance to end near the best; never green."
    if ranges := _limits(study, layout):
        caption += (
            f" Heavy line: every trial of the row is stable up to it; solid where the next {words.label(x)} was "
            f"unstable, dashed where none was. {' '.join(ranges)}"
        )
    worst = [f"{words.at_levels(axes, f.levels)}: {f.verdicts}" for f in fields if f.count("stable") < f.n]
    alt = f"Map of verdicts. {'; '.join(worst[:12]) or 'Every done trial is stable'}."
    columns = 1 if maps.width(study, x) == style.FULL else 2
    across = panel_width(study) if columns == 2 else style.FULL
    tall = maps.height(study, y)
    picture = panels(study, lambda part, ax: verdict_map(part, x, y, ax), layout.over, tall, columns, across)
    heads = (*map(words.heading, axes), *VERDICTS, "n")
    rows = ((*level_texts(axes, f.levels), *(str(f.count(v)) for v in VERDICTS), str(f.n)) for f in fields)
    return style.report_figure("stability-map", title, picture, alt, caption, heads, rows)


def _limits(study: Study, layout: Layout) -> list[str]:
    """`Stable up to 0.01, first unstable at 0.03 (1 of 3): depth 2.`, one sentence for all rows of one range."""
    y = str(layout.by)
    rows: dict[str, list[str]] = {}
    for fixed in combinations(study, layout.over):
        for level, row in limits(study.where(fixed), layout.x, y).items():
            rows.setdefault(_limit(row, layout.x), []).append(words.at_levels([*fixed, y], [*fixed.values(), level]))
    return [
        f"{limit}: {'; '.join(names[:MOST_ROWS])}"
        f"{f'; and {more} more rows' if (more := len(names) - MOST_ROWS) > 0 else ''}."
        for limit, names in rows.items()
    ]


def _limit(row: Mapping[str, Any], x: str) -> str:
    highest = row["all_stable"]
    stable = "Not all stable at the smallest" if highest is None else f"Stable up to {words.level(highest, x)}"
    if row["first_unstable"] is None:
        return f"{stable}, no larger one was unstable"
    at, bad, there = words.level(row["first_unstable"], x), int(row["n_unstable"]), int(row["n_there"])
    return f"{stable}, first unstable at {at} ({bad} of {there})"


def _has_order(levels: Sequence[Level]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in levels)


def _draw_verdicts(ax: Axes, at: tuple[int, int], trials: pd.DataFrame, size: float) -> Artist:
    from matplotlib.patches import Rectangle

    done = trials[trials["state"] == "done"]
    counts = compare.verdicts(done)
    worst = next((v for v in reversed(VERDICTS) if counts[v]), None)
    stopped = len(trials) - len(done)
    known = None if worst == "stable" and stopped else worst
    ground = style.GRID if known is None else style.VERDICT_GROUNDS[known]
    ax.add_patch(Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, facecolor=ground, edgecolor=style.PAPER, linewidth=1.5))
    lines = [f"{style.VERDICT_SIGNS[v]} {n} {v}" for v, n in counts.items() if n]
    if rest := len(done) - sum(counts.values()):
        lines.append(f"○ {rest} not judged")
    if stopped:
        lines.append(f"⊘ {stopped} stopped")
    return ax.text(*at, "\n".join(lines), ha="center", va="center", color="#010101", fontsize=size, gid="field")


def _draw_limit(ax: Axes, j: int, levels: Sequence[Level], row: Mapping[str, Any]) -> None:
    """The line that ends the stable levels of a row."""
    if not row:
        return
    i = -1 if row["all_stable"] is None else levels.index(row["all_stable"])
    seen = i + 1 < len(levels) and row["first_unstable"] == levels[i + 1]
    line = "-" if seen else (0, (2, 1.5))
    ends = [i + 0.5] * 2, [j - 0.46, j + 0.46]
    # both colours stay in the dark: the fields are light there too, and between and beside them it is black
    frame, core = LIMIT_COLOURS
    ax.plot(*ends, color=frame, linewidth=5.4, solid_capstyle="butt", zorder=3)
    ax.plot(*ends, color=core, linewidth=3.2, linestyle=line, gid="limit", solid_capstyle="butt", zorder=4)

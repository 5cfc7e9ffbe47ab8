"""Figures of a search: its values in order with the best so far, the Pareto front, and what each axis explains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from stabstudy import extras
from stabstudy.analysis import searches, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import labels, style, tooltips
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.searches import FEWEST, History, Suggestion
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.store import StoreError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

NEEDED = ("optuna", "scikit-learn")
GROUPS = (
    ("feasible", style.BLUE, "o", style.BLUE),
    ("with a broken constraint", style.VERMILLION, "s", style.PAPER),
    ("diverged or without a value", style.VERMILLION, "x", style.VERMILLION),
)
"""Of done cells: what it is, its colour, marker and the marker's face."""


def search_figures(study: Study, layout: Layout) -> Iterator[Figure | Absent]:
    """Those of a study whose sweep.yaml records a search; nothing for any other."""
    try:
        known = searches.search_history(study.folder, study.tables.trials)
    except StoreError as error:
        yield Absent("Figures of the search", str(error))
        return
    if known is None:
        return
    done = [suggestion for suggestion in known.suggestions if suggestion.state == "done"]
    if not done:
        yield Absent("History of the search", "no cell has all its seeds done")
        return
    yield _history_figure(known, study.trials)
    if len(known.search.objectives) > 1:
        yield _front_figure(known, study.trials)
    yield _importance_figure(known, study.trials)


def _named(column: str, trials: pd.DataFrame) -> str:
    """The label of an axis: a statistic with its unit in these trials, a setting by its name."""
    return style.plain(labels.statistic(column, trials) if column in COLUMNS else words.label(column))


def history(known: History, trials: pd.DataFrame, objective: int = 0, ax: Axes | None = None) -> Axes:
    """An objective of every done cell, in the order in which they began; with one objective, the best so far."""
    ax = style.new_figure(style.FULL).axes[0] if ax is None else ax
    for name, colour, marker, face in GROUPS:
        places = [i for i, suggestion in enumerate(known.suggestions) if _group(suggestion) == name]
        (line,) = ax.plot(
            [i + 1 for i in places], [known.suggestions[i].objectives[objective] for i in places], marker=marker,
            markersize=5, linestyle="none", color=colour, markerfacecolor=face, label=name,
        )  # fmt: skip
        _describe(line, name, [known.suggestions[i] for i in places])
    best = [(i + 1, known.suggestions[b].objectives[0]) for i, b in enumerate(known.best) if b is not None]
    if best:
        at, values = zip(*best, strict=True)
        ax.step(at, values, where="post", color=style.INK, linewidth=1.4, label="best so far")
    ax.set_xlabel("cell, in order")
    ax.set_ylabel(_named(known.search.objectives[objective].column, trials))
    style.legend_beside(ax, "")
    return ax


def front(known: History, trials: pd.DataFrame, across: int = 0, up: int = 1, ax: Axes | None = None) -> Axes:
    """Two objectives against each other; the cells that none is better than in all objectives are joined by a line."""
    ax = style.new_figure(style.FULL).axes[0] if ax is None else ax
    for name, colour, marker, face in GROUPS:
        own = [s for s in known.suggestions if _group(s) == name]
        points = [s.objectives for s in own]
        (line,) = ax.plot(
            [p[across] for p in points], [p[up] for p in points], marker=marker, markersize=5, linestyle="none",
            color=colour, markerfacecolor=face, label=name,
        )  # fmt: skip
        _describe(line, name, own)
    best = sorted(known.suggestions[i].objectives for i in known.front)
    best.sort(key=lambda values: values[across])
    joined = "-" if len(known.search.objectives) == 2 else "none"
    ax.plot(
        [p[across] for p in best], [p[up] for p in best], color=style.INK, linestyle=joined, linewidth=1.2,
        marker="o", markersize=9, markerfacecolor="none", label="Pareto front",
    )  # fmt: skip
    names = [_named(objective.column, trials) for objective in known.search.objectives]
    ax.set(xlabel=names[across], ylabel=names[up])
    style.legend_beside(ax, "")
    return ax


def importance(
    shares: dict[str, dict[str, float]], axes: Sequence[str], trials: pd.DataFrame, ax: Axes | None = None
) -> Axes:
    """The share of the variance of each objective that each axis explains alone, axes from top to bottom."""
    ax = style.new_figure(style.FULL, 1.2 + 0.5 * len(axes)).axes[0] if ax is None else ax
    for number, (objective, own) in enumerate(shares.items()):
        offset = 0.16 * (number - (len(shares) - 1) / 2)
        places = [len(axes) - 1 - i - offset for i in range(len(axes))]
        colour, marker = style.CATEGORIES[number % len(style.CATEGORIES)], style.MARKERS[number % len(style.MARKERS)]
        values = [own[axis] for axis in axes]
        ax.hlines(places, 0, values, color=colour, linewidth=2.5)
        ax.plot(values, places, color=colour, marker=marker, linestyle="none", label=_named(objective, trials))
    ax.set_yticks(range(len(axes)), [style.plain(words.label(axis)) for axis in reversed(axes)])
    ax.set(xlim=(0, 1.02), ylim=(-0.6, len(axes) - 0.4), xlabel="share of variance")
    style.legend_beside(ax, "")
    return ax


def _describe(line: Line2D, name: str, own: Sequence[Suggestion]) -> None:
    """A click on a cell shows its runs."""
    tooltips.describe(line, tooltips.About(name, filters=[tooltips.condition(s.values) for s in own]))


def _group(suggestion: Suggestion) -> str | None:
    if suggestion.state != "done":
        return None
    return GROUPS[0][0] if suggestion.feasible else GROUPS[2][0] if suggestion.penalised else GROUPS[1][0]


def _counts(known: History) -> str:
    groups = [_group(suggestion) for suggestion in known.suggestions]
    parts = [f"{groups.count(name)} {name}" for name, *_ in GROUPS if name in groups]
    open_ones = f"; {groups.count(None)} more not done" if None in groups else ""
    return f"{words.count(len(groups) - groups.count(None), 'done cell')} ({words.listing(parts)}{open_ones})"


def _history_figure(known: History, trials: pd.DataFrame) -> Figure:
    objectives = known.search.objectives
    picture = style.new_panels(len(objectives), style.FULL, 3.6 * -(-len(objectives) // 2))
    for i, ax in enumerate(picture.axes[: len(objectives)]):
        history(known, trials, i, ax)
    style.share_legend(picture)
    names = words.listing([objective.column for objective in objectives])
    caption = (
        f"{_counts(known)} of at most {known.search.trials} that {known.search.sampler} was asked for, in the order in "
        "which they began. A cell's value is the mean over its seeds; one that diverged or has no value stands at its "
        "penalty (the capped loss, else the worst value measured), and is never the best."
    )
    best = [f"the best is {words.number(known.suggestions[b].objectives[0])}" for b in known.best[-1:] if b is not None]
    alt = f"Scatter plot of {names} over {words.count(len(known.suggestions), 'cell')}. {'; '.join(best)}."
    return style.report_figure(
        "search-history", f"History of the search: {names}", picture, alt, caption, *_table(known, known.suggestions)
    )


def _front_figure(known: History, trials: pd.DataFrame) -> Figure:
    objectives = known.search.objectives
    names = words.listing([objective.column for objective in objectives])
    ways = words.listing([f"{o.column} {'large' if o.maximize else 'small'}" for o in objectives])
    others = f" The front is that of all {len(objectives)} objectives." if len(objectives) > 2 else ""
    chosen = [known.suggestions[i] for i in known.front]
    caption = (
        f"{_counts(known)}. Circled: {words.count(len(chosen), 'feasible cell')} that no other is better than, with "
        f"{ways} (the Pareto front).{others} Values are means over seeds, so that of a close pair either may be chance."
    )
    alt = f"Scatter plot of {objectives[0].column} against {objectives[1].column}; {len(chosen)} cells on the front."
    return style.report_figure(
        "search-front", f"Pareto front of {names}", front(known, trials), alt, caption, *_table(known, chosen)
    )


def _importance_figure(known: History, trials: pd.DataFrame) -> Figure | Absent:
    title = "Importance of the axes of the search"
    if missing := extras.why_not(NEEDED):
        return Absent(title, "; ".join(missing))
    shares = searches.importance(known)
    if not shares:
        return Absent(title, f"it takes {FEWEST} cells with values that differ")
    means = {axis: sum(own[axis] for own in shares.values()) for axis in known.search.space}
    axes = sorted(means, key=lambda axis: -means[axis])
    caption = (
        f"The share of the variance of {words.listing(list(shares))} over the space that each axis explains alone "
        "(fANOVA), estimated from the cells that have values. A search spends its trials where they are good, so the "
        "shares are rough; what axes do together is left out."
    )
    first = [f"{words.label(a)} {words.percent(next(iter(shares.values()))[a])}" for a in axes[:3]]
    heads = ("axis", *shares)
    rows = ((words.label(a), *(words.percent(own[a]) for own in shares.values())) for a in axes)
    alt = f"Bar chart. {'; '.join(first)}."
    return style.report_figure(
        "search-importance", title, importance(shares, axes, trials), alt, caption, heads, rows, ("axis",)
    )


def _table(known: History, shown: Sequence[Suggestion]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of done cells: their order, values and objectives."""
    names = list(known.search.space)
    heads = ("order", *map(words.heading, names), *(o.column for o in known.search.objectives), "state")
    rows = []
    for place, s in enumerate(known.suggestions, start=1):
        if s in shown and (group := _group(s)):
            levels = (words.level(s.values[name], name) for name in names)
            rows.append((str(place), *levels, *map(words.number, s.objectives), group))
    return heads, rows

"""The figure of a frontier: each cell's edge with its interval, and every trial that made it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import frontiers, words
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import style, tooltips
from stabstudy.analysis.frontiers import CellEdge, EdgeTrial, Frontier
from stabstudy.analysis.levels import Level, ordered
from stabstudy.analysis.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SIZES = ("model.depth", "model.dim")
"""Axes that lie across where they vary, before any other axis of numbers."""

MOST_SERIES = 6
"""Series side by side at each level of the axis across; cells that need more, and named cases, have a row each."""

MOST_NAMED = 12
"""Cells that the alternative text names."""

KINDS: tuple[tuple[bool | None, str, str], ...] = (
    (True, "o", "holds"),
    (False, "x", "does not hold"),
    (None, "d", "says nothing"),
)
"""Of a trial: what it says, its marker, its name."""


_LOOKS = {"o": (4.0, "full"), "x": (5.0, "full"), "d": (4.5, "none")}
"""Size and filling of the markers."""


def frontier(study: Study, setting: str | None = None, holds: str | None = None, ax: Axes | None = None) -> Axes:
    """The edge of a setting in each cell of the other axes, a bracket for its 90 % interval, and the trials as points.

    Setting and rule as in `Study.frontier`. Where another axis of numbers varies it lies across, its edges joined by a
    line for each combination of the rest; else each cell has a row. An arrow: the interval has no end on that side.
    """
    of = frontiers.chosen(study.searched, study.tables.trials, study.axes, setting, holds)
    if holds not in (None, of.asked.holds):
        asked = dataclasses.replace(of.asked, holds=holds)
        of = frontiers.frontier(asked, study.tables.trials, study.axes)
    return draw(of, ax)


def draw(of: Frontier, ax: Axes | None = None) -> Axes:
    """See `frontier`."""
    if (across := axis_across(of)) is None:
        return _rows(of, ax)
    return _columns(of, across, ax)


def axis_across(of: Frontier) -> str | None:
    """The axis that lies across: one of numbers, if few enough cells share each of its levels."""
    names = sorted(of.axes, key=lambda a: SIZES.index(a) if a in SIZES else len(SIZES))
    usable = [a for a in names if len(of.axes[a]) > 1 and None not in of.axes[a] and ordered(of.axes[a])]
    if not usable or any(cell.case for cell in of.cells):
        return None
    return usable[0] if len(series(of, usable[0])) <= MOST_SERIES else None


def series(of: Frontier, across: str) -> dict[tuple[Level, ...], list[CellEdge]]:
    """The cells by their levels of all axes but the one across."""
    lines: dict[tuple[Level, ...], list[CellEdge]] = {}
    for cell in of.cells:
        lines.setdefault(tuple(v for a, v in cell.levels.items() if a != across), []).append(cell)
    return lines


def name_of(cell: CellEdge) -> str:
    """A named case, or the cell's levels; empty where nothing else varies."""
    return f"case {words.clean(cell.case, 40)}" if cell.case else words.at_levels(cell.levels, cell.levels.values())


def interval(edge: Any) -> str:
    """`[0.216, 0.281]`."""
    return f"[{words.number(edge.low)}, {words.number(edge.high)}]"


@dataclass(frozen=True)
class _Paper:
    """Axes on which the setting runs up, or to the right where each cell has a row."""

    ax: Axes
    of: Frontier
    is_rows: bool

    def limits(self) -> tuple[float, float]:
        """Of the setting: everything tried, every finite end, and a little beyond."""
        scale, edges = self.of.asked.scale, [cell.edge for cell in self.of.cells]
        values = [t.value for cell in self.of.cells for t in cell.trials]
        values += [
            v for e in edges for v in (e.low, e.high, e.estimate) if math.isfinite(v) and not (scale.log and v <= 0)
        ]
        low, high = scale.axis(min(values)), scale.axis(max(values))
        beyond = max(0.06 * (high - low), scale.width / 2)
        return scale.value(low - beyond), scale.value(high + beyond)

    def set_up(self) -> None:
        log, setting = self.of.asked.scale.log, self.of.asked.setting
        if self.is_rows:
            self.ax.set(
                xlim=self.limits(), xlabel=style.plain(words.heading(setting)), xscale="log" if log else "linear"
            )
        else:
            self.ax.set(
                ylim=self.limits(), ylabel=style.plain(words.heading(setting)), yscale="log" if log else "linear"
            )
        if log:
            style.log_ticks(self.ax, across=self.is_rows)

    def plot(self, across: Sequence[float], along: Sequence[float], at: str, **look: Any) -> Line2D:
        """Points or a line; `at`: the level at which all of it stands, however it is spread."""
        places = (along, across) if self.is_rows else (across, along)
        gid = f"at {'y' if self.is_rows else 'x'} {at}" if at else None
        (line,) = self.ax.plot(*places, **({"gid": gid} | look))
        return line

    def cell(self, cell: CellEdge, centre: float, room: float, at: str, colour: str, name: str) -> None:
        """The bracket at the centre, and the trials beside it, spread by seed."""
        self._bracket(cell, centre, colour, room)
        seeds = sorted({t.seed for t in cell.trials})
        for holds, marker, kind in KINDS:
            own = [t for t in cell.trials if t.holds is holds]
            if own:
                places = [centre + room * (0.16 + 0.3 * seeds.index(t.seed) / max(3, len(seeds))) for t in own]
                self._points(own, places, at, marker, colour, ", ".join(filter(None, (name, kind))))

    def _points(
        self, own: Sequence[EdgeTrial], places: Sequence[float], at: str, marker: str, colour: str, name: str
    ) -> None:
        size, fill = _LOOKS[marker]
        look = {"marker": marker, "markersize": size, "fillstyle": fill, "color": colour, "linestyle": "none"}
        line = self.plot(places, [t.value for t in own], at, label="_", **look)
        tooltips.describe(line, tooltips.About(name, [t.trial_id for t in own]))
        ringed = [(place, t.value) for place, t in zip(places, own, strict=True) if t.is_exception]
        if ringed:
            where, values = zip(*ringed, strict=True)
            self.plot(
                where, values, "", marker="o", markersize=11, fillstyle="none", linestyle="none", color=style.INK,
                gid=tooltips.RING,
            )  # fmt: skip

    def _bracket(self, cell: CellEdge, centre: float, colour: str, room: float) -> None:
        if not cell.edge.n:
            return
        low, high = self.limits()
        ends = [
            (cell.edge.low, low, "<" if self.is_rows else "v"),
            (cell.edge.high, high, ">" if self.is_rows else "^"),
        ]
        known = [end if math.isfinite(end) and low <= end <= high else limit for end, limit, _ in ends]
        self.plot([centre, centre], known, "", color=colour, linewidth=2.2, solid_capstyle="butt", gid="interval")
        for place, (end, limit, arrow) in zip(known, ends, strict=True):
            cap = arrow if place == limit and place != end else ("|" if self.is_rows else "_")
            ornament = {"gid": tooltips.RING, "clip_on": False} if cap == arrow else {}
            self.plot([centre], [place], "", marker=cap, markersize=8, color=colour, linestyle="none", **ornament)


def _columns(of: Frontier, across: str, ax: Axes | None) -> Axes:
    lines = series(of, across)
    ax = style.new_figure(style.FULL, 4.4).axes[0] if ax is None else ax
    paper, levels = _Paper(ax, of, False), of.axes[across]
    log = style.Positions(levels, across).log or (across in SIZES and min(levels) > 0)
    at = [math.log10(v) if log else float(v) for v in levels]
    gap = min(b - a for a, b in zip(at, at[1:], strict=False))
    room = 0.7 * gap / len(lines)
    paper.set_up()
    others = [a for a in of.axes if a != across]
    for i, (line, cells) in enumerate(lines.items()):
        colour, name = style.CATEGORIES[i % len(style.CATEGORIES)], words.at_levels(others, line)
        centres = {
            c.levels[across]: at[levels.index(c.levels[across])] + room * (i - (len(lines) - 1) / 2) for c in cells
        }
        for cell in cells:
            level = words.level(cell.levels[across], across)
            paper.cell(cell, centres[cell.levels[across]], room, level, colour, name)
        shown = [c for c in cells if c.edge.n]
        ax.plot(
            [centres[c.levels[across]] for c in shown], [c.edge.estimate for c in shown], color=colour, linewidth=1.3,
            linestyle=style.DASHES[i % len(style.DASHES)], marker=style.MARKERS[i % len(style.MARKERS)], markersize=6,
            markerfacecolor=style.PAPER, gid="edge", label=style.plain(name) or "edge",
        )  # fmt: skip
    ax.set_xticks(at, [style.plain(words.level(v, across)) for v in levels])
    ax.set_xlim(at[0] - 0.5 * gap, at[-1] + 0.5 * gap)
    ax.set_xlabel(style.plain(words.heading(across)))
    _legend(ax, of)
    return ax


def _rows(of: Frontier, ax: Axes | None) -> Axes:
    if ax is None:
        ax = style.new_figure(style.FULL, 1.6 + 0.42 * len(of.cells)).axes[0]
    paper = _Paper(ax, of, True)
    paper.set_up()
    for i, cell in enumerate(of.cells):
        paper.cell(cell, float(i), 0.9, name_of(cell) or "every trial", style.BLUE, "")
    shown = [(i, c.edge.estimate) for i, c in enumerate(of.cells) if c.edge.n]
    ax.plot(
        [v for _, v in shown], [float(i) for i, _ in shown], marker="D", markersize=6, color=style.BLUE,
        markerfacecolor=style.PAPER, linestyle="none", label="edge", gid="edge",
    )  # fmt: skip
    ax.set_yticks(range(len(of.cells)), [style.plain(name_of(c)) for c in of.cells])
    ax.set_ylim(len(of.cells) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    _legend(ax, of)
    return ax


def _legend(ax: Axes, of: Frontier) -> None:
    there = {t.holds for cell in of.cells for t in cell.trials}
    for _, marker, kind in (k for k in KINDS if k[0] in there):
        fill = "none" if marker == "d" else "full"
        ax.plot([], [], marker=marker, linestyle="none", color=style.MUTED, markersize=5, fillstyle=fill, label=kind)
    style.legend_beside(ax, "")


def figures(study: Study) -> Iterator[Figure | Absent]:
    """The figure, where the sweep searched a frontier; of a grid nothing."""
    of = study.searched
    if of is None:
        return
    if not any(cell.edge.n for cell in of.cells):
        yield Absent("Frontier", "no trial says anything of it yet")
        return
    asked, title = of.asked, f"Frontier of {words.label(of.asked.setting)}"
    trials = [t for cell in of.cells for t in cell.trials]
    counts = {kind: sum(t.holds is holds for t in trials) for holds, _, kind in KINDS}
    ringed = sum(t.is_exception for t in trials)
    verb = "contradicts" if ringed == 1 else "contradict"
    rings = f" Ringed: {words.count(ringed, 'trial')} that {verb} the interval." if ringed else ""
    caption = (
        f"The largest {words.label(asked.setting)} that holds (rule: {asked.holds}) in each of "
        f"{words.count(len(of.cells), 'cell')}, with its 90 % interval; an arrow where that has no end inside what was "
        f"searched. {words.count(len(trials), 'trial')} drawn, beside the interval and spread by seed: "
        f"{words.listing([f'{n} {_VERBS[kind]}' for kind, n in counts.items() if n])}.{rings}"
    )
    texts = [f"{name_of(c) or 'every trial'}: {words.number(c.edge.estimate)} {interval(c.edge)}" for c in of.cells]
    alt = f"Intervals with points. {'; '.join(texts[:MOST_NAMED])}."
    heads = ("cell", "edge", "low", "high", "status", *counts, "ringed")
    rows = [(name_of(cell) or "every trial", *_numbers(cell)) for cell in of.cells]
    yield style.report_figure("frontier", title, draw(of), alt, caption, heads, rows, texts=("cell", "status"))


_VERBS = {"holds": "hold", "does not hold": "do not hold", "says nothing": "say nothing"}


def _numbers(cell: CellEdge) -> tuple[str, ...]:
    edge = cell.edge
    counts = [sum(t.holds is holds for t in cell.trials) for holds, _, _ in KINDS]
    counts.append(sum(t.is_exception for t in cell.trials))
    return *map(words.number, (edge.estimate, edge.low, edge.high)), edge.status, *map(str, counts)

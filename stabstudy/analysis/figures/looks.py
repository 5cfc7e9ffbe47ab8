"""Sizes and type of figures: two widths on a page, the same two in a two-column paper.

A figure is half a column or a whole one wide, so that two halves stand side by side. Every drawing function asks for
HALF or FULL inches; inside `paper()` these become 3.3 and 6.8 inches with type of at least 7 points.
No `pyplot`: its global state would outlive the figure and choose a backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HALF, FULL = 5.15, 10.6
"""Inches across of a figure on a page: 494 and 1018 CSS pixels, two halves and a gap in a column of 1,024."""

PAIR = 7.6
"""Inches of two panels in a figure of which a page sets two side by side, at about three quarters of its size."""

INK, MUTED, GRID, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"

FONTS = ("DejaVu Sans", "Verdana", "Bitstream Vera Sans", "Liberation Sans", "Arial", "Helvetica")
"""Text is laid out in the first, which matplotlib brings; the others are as wide or narrower, so nothing collides."""


LAYOUT_DPI = 288
"""Text is measured at so many dots per inch: at 100 its letters stand on whole pixels, narrower than in a fine file."""

SETTLED: Any = {"figure.autolayout": False, "figure.constrained_layout.use": False}
"""Settings of matplotlib with which a figure that is laid out stays so."""


@dataclass(frozen=True)
class Look:
    """How large figures are drawn: factors on inches across and up, and sizes of type in points."""

    across: float = 1.0
    up: float = 1.0
    font: float = 9.5
    note: float = 8.0  # words inside the axes
    field: float = 8.5  # words in the fields of a map
    least: float = 6.5  # of a map with many fields
    line: float = 1.0
    columns: int = 5  # of a map for which HALF is wide enough


ON_PAGE = Look()
IN_PAPER = Look(across=3.3 / HALF, up=0.72, font=7.5, note=7.0, field=7.0, least=7.0, line=0.8, columns=3)

_look: ContextVar[Look] = ContextVar("look", default=ON_PAGE)


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Figures drawn inside are for a two-column paper: 3.3 or 6.8 inches wide, type of 7 points or more.

    Your own axes look alike: matplotlib's settings are ours meanwhile, text in a PDF is TrueType, in an SVG text.
    """
    from matplotlib import rc_context

    token = _look.set(IN_PAPER)
    try:
        with rc_context(rc() | {"figure.figsize": size(HALF, 3.6), "savefig.dpi": 300}):
            yield
    finally:
        _look.reset(token)


def look() -> Look:
    """The sizes that are drawn with now."""
    return _look.get()


def size(width: float, height: float) -> tuple[float, float]:
    """Inches of a figure that is as large as this on a page."""
    return width * look().across, height * look().up


def rc() -> Any:
    """Our settings of matplotlib."""
    now = look()
    return {
        "svg.hashsalt": "stabstudy",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "font.family": "sans-serif",
        "font.sans-serif": list(FONTS),
        "font.size": now.font,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.labelsize": now.font,
        "axes.edgecolor": MUTED,
        "axes.titlesize": now.font,
        "axes.titlecolor": INK,
        "axes.linewidth": 0.8 * now.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6 * now.line,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": now.font,
        "ytick.labelsize": now.font,
        "axes.facecolor": "none",
        "figure.facecolor": PAPER,
        "legend.frameon": False,
        "legend.fontsize": now.font,
        "hatch.linewidth": 0.6,
    }


def new_figure(width: float = HALF, height: float = 3.6, rows: int = 1, columns: int = 1, **share: Any) -> Figure:
    """A Figure of our looks with a grid of Axes (`figure.axes`, row by row); `share` is `subplots`' sharex, sharey.

    `width`, HALF or FULL, and `height` in inches of a page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(rc()):
        figure = Figure(figsize=size(width, height), layout="constrained")
        figure.subplots(rows, columns, **share)
        for ax in figure.axes:  # ticks are made later, when other settings hold
            ax.tick_params(color=MUTED, labelcolor=INK, labelsize=look().font)
    return figure


def new_panels(n: int, width: float, height: float, columns: int = 2) -> Figure:
    """A Figure with n Axes in rows of at most `columns`; what the last row has over is hidden."""
    columns = min(columns, n)
    figure = new_figure(width, height, rows=-(-n // columns), columns=columns)
    for ax in figure.axes[n:]:
        ax.set_visible(False)
    return figure


def settle(figure: Figure) -> None:
    """Lay the figure out, for good: every file of it has the same layout, and marks lie where it is drawn."""
    from matplotlib import rc_context

    if (engine := figure.get_layout_engine()) is not None:
        dpi = figure.dpi
        figure.set_dpi(LAYOUT_DPI)
        for _ in range(2):  # which ticks there are follows from the sizes that the first pass gives
            engine.execute(figure)
        with rc_context(SETTLED):
            figure.set_layout_engine(None)  # "none" leaves one that does nothing, for which each file is drawn twice
        figure.set_dpi(dpi)

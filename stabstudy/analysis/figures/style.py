"""The style of figures: colours that hold on white and on black, markers and dashes beside hue, deterministic files.

An SVG is drawn once, in light colours. `to_svg` adds one style block that exchanges each known colour for its
counterpart where the viewer prefers dark, so the same file serves the page, the folder and a slide.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import elements, words
from stabstudy.analysis.figures import looks
from stabstudy.analysis.figures.tooltips import marks
from stabstudy.analysis.levels import ordered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL, HALF, PAIR = looks.FULL, looks.HALF, looks.PAIR
look, new_figure, new_panels = looks.look, looks.new_figure, looks.new_panels

INK, MUTED, GRID, PAPER = looks.INK, looks.MUTED, looks.GRID, looks.PAPER
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
AMBER = "#b27b00"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE, AMBER, "#3a8fc0", "#6b5b95")
"""Okabe and Ito's colours, the light ones darkened to 3:1 on white; at most seven, never told apart by hue alone."""

# viridis at 16 places: .04 to .54 for white paper, .45 to 1 for black; each at least 3:1 on its ground.
ORDINAL = (
    "#471063", "#481b6d", "#482677", "#46307e", "#443b84", "#404588", "#3c4f8a", "#38588c",
    "#34618d", "#306a8e", "#2c718e", "#297a8e", "#26828e", "#238a8d", "#20928c", "#1f9a8a",
)  # fmt: skip
ORDINAL_ON_DARK = (
    "#25848e", "#228d8d", "#1f958b", "#1f9f88", "#22a785", "#2ab07f", "#37b878", "#46c06f",
    "#5ac864", "#6ece58", "#86d549", "#9dd93b", "#b5de2b", "#d0e11c", "#e7e419", "#fde725",
)  # fmt: skip

UNKNOWN = "#c9ced6"
"""A field of a map whose trials do not have the statistic: no colour of its scale, which would be a value."""

VERDICT_SIGNS = {"stable": "●", "spiky": "▲", "rough": "◆", "diverged": "✕"}
VERDICT_GROUNDS = {"stable": "#cfe8dd", "spiky": "#f7e7b6", "rough": "#f0a98a", "diverged": "#dcb3dd"}
"""Of a field, in the light and in the dark: near-black reads on each (over 10:1)."""

DARK = {
    INK: "#e6edf3",
    MUTED: "#9198a1",
    GRID: "#30363d",
    PAPER: "#0d1117",
    BLUE: "#56a8e0",
    VERMILLION: "#f0883e",
    GREEN: "#2ebd8e",
    PURPLE: "#dd9cc2",
    AMBER: "#e69f00",
    "#3a8fc0": "#56b4e9",
    "#6b5b95": "#a99bd6",
    **dict(zip(ORDINAL, ORDINAL_ON_DARK, strict=True)),
}
"""Colour on white -> colour on black. Text on coloured fields (#010101, #fefefe) stays as it is."""

MARKERS = ("o", "s", "D", "v", "P", "X", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))

GROUND = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
"""Behind words that lie over lines."""

LOG_FROM = 8
"""Positive levels that span at least this factor lie on a log scale."""

MOST_TICKS = 9

DPI = 160


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, with a dark variant inside; its text can be searched, and edited in a drawing program."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(looks.rc() | looks.SETTLED):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    places = r'(?<= d=")[^"]+|(?<= [xy]=")[^"]+|(?<=translate\()[^)]+|(?<=rotate\()[^)]+'
    svg = re.sub(places, _shorter, buffer.getvalue()).replace(' transform="rotate(-0 ', ' transform="rotate(0 ')
    # a page may write the attributes between single quotes: there are none in them, and no double ones in the words
    svg = re.sub(r"(?<=<text style=\")[^\"]+", lambda style: style[0].replace("'", ""), svg)
    svg = re.sub(r"(?<=>)[^<>]*(?=</(?:text|tspan)>)", lambda said: said[0].replace('"', "&quot;"), svg)
    return svg.replace("<defs>", f"{_dark_style(svg)}<defs>", 1)


def _shorter(places: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point."""
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), places[0])


def _dark_style(svg: str) -> str:
    used = sorted({c for c in re.findall(r"#[0-9a-f]{6}", svg) if c in DARK})
    rules = "".join(
        f'[style*="{part}: {colour}"]{{{part}:{DARK[colour]} !important}}'
        for colour in used
        for part in ("fill", "stroke")
    )
    return f"<style>@media screen and (prefers-color-scheme: dark){{{rules}}}</style>"


def to_png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure in light colours."""
    return _bytes(figure, "png", dpi=dpi, metadata={"Software": None})


def to_pdf(figure: Figure) -> bytes:
    """The figure in light colours, its text as TrueType, which journals ask for."""
    return _bytes(figure, "pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def _bytes(figure: Figure, kind: str, **how: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(looks.rc() | looks.SETTLED):
        figure.savefig(buffer, format=kind, **how)
    return buffer.getvalue()


def draw(figure: Figure, png: bool = True) -> elements.Drawing:
    """The figure in both forms, and its marks."""
    looks.settle(figure)
    return elements.Drawing(to_svg(figure), to_png(figure) if png else None, marks(figure))


def report_figure(
    name: str,
    title: str,
    drawn: Axes | Figure,
    alt: str,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[tuple[str, ...]],
    texts: Collection[str] = (),
    png: bool = True,
) -> elements.Figure:
    """A figure of a report: the picture, its words, and its numbers as a folded table of `heads` and `rows`.

    `drawn`: the picture, or any of its Axes. `texts`: the heads of columns of words; the others are set flush right.
    `png`: whether the picture is a file of its own, too.
    """
    picture: Any = drawn.figure  # that of a Figure is itself
    numeric = frozenset(heads).difference(texts)
    table = elements.Table("Numbers of this figure", tuple(heads), tuple(rows), numeric, folded=True)
    return elements.Figure(name, title, draw(picture, png), alt, caption, table)


def ordered_colours(n: int) -> list[str]:
    """n colours along viridis, dark to light, for levels with an order."""
    return [ORDINAL[round(i * (len(ORDINAL) - 1) / max(1, n - 1))] for i in range(n)]


def colours(levels: Sequence[Any]) -> list[str]:
    """A colour per level: along viridis where the levels have an order, else categories (repeating after seven)."""
    n = len(levels)
    return ordered_colours(n) if ordered(levels) else [CATEGORIES[i % len(CATEGORIES)] for i in range(n)]


def plain(text: str) -> str:
    """Text for a label: `$` would start mathtext."""
    return text.replace("$", r"\$")


def field_colour(share: float) -> str:
    """The colour of a field at this share of a scale, dark to light along viridis; grey where it is not known.

    It is the same on black. Beware: a field that had the very colour of a line would be exchanged with it, and show
    another value in the dark.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not math.isfinite(share):
        return UNKNOWN
    colour = to_hex(colormaps["viridis"](0.12 + 0.83 * min(1.0, max(0.0, share))))
    return f"#{int(colour[1:], 16) ^ 1:06x}" if colour in DARK else colour  # one step of blue in 255: not to be seen


def field_text_colour(colour: str) -> str:
    """Near-black or near-white, whichever reads better on a field of this colour."""
    from matplotlib.colors import to_rgb

    return "#010101" if luminance(to_rgb(colour)) > 0.179 else "#fefefe"


def luminance(rgb: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def title(ax: Axes, text: str) -> None:
    """A title above the left end of the axes, in the size of the other words."""
    ax.set_title(plain(text), loc="left", fontsize=look().font, color=INK)


def legend(ax: Axes, heading: str) -> None:
    """A legend without a frame, where the axes hold anything with a name."""
    if ax.get_legend_handles_labels()[0]:
        box = ax.legend(
            title=plain(heading),
            fontsize=look().font,
            title_fontsize=look().font,
            labelcolor=INK,
            frameon=False,
            handlelength=3,
        )
        box.get_title().set_color(INK)


def legend_beside(ax: Axes, heading: str) -> None:
    """A legend to the right of the axes: for one that would hide what it names."""
    legend(ax, heading)
    if (box := ax.get_legend()) is not None:
        box.set_loc("center left")
        box.set_bbox_to_anchor((1.02, 0.5))


def share_legend(figure: Figure) -> None:
    """One legend above all panels in place of one in each."""
    legends = [box for ax in figure.axes if (box := ax.get_legend()) is not None]
    if len(figure.axes) > 1 and legends:
        handles, names = figure.axes[0].get_legend_handles_labels()
        heading = legends[0].get_title().get_text()
        for box in legends:
            box.remove()
        shared = figure.legend(
            handles, names, title=heading, fontsize=look().font, title_fontsize=look().font, labelcolor=INK,
            loc="outside upper center", ncols=min(7, len(names)), frameon=False, handlelength=3,
        )  # fmt: skip
        shared.get_title().set_color(INK)


def log_ticks(ax: Axes, across: bool = False) -> None:
    """Plain numbers on a log y axis (`across`: x axis), closer where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis, (low, high) = (ax.xaxis, ax.get_xlim()) if across else (ax.yaxis, ax.get_ylim())
    decades = math.log10(high / low)
    fine = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # of less than half a decade, where 1, 2, 3, 5 may leave one tick
    subs = fine if decades < 0.5 else (1, 2, 3, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: words.tick(v)))
    axis.set_minor_locator(NullLocator())


def few_ticks(ax: Axes, unit: str) -> None:
    """At most five numbers below the axes, so that long ones keep apart; fractions as percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    written = words.percent if unit == "fraction" else words.tick
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: written(float(f"{v:.6g}"))))


def percent_ticks(ax: Axes) -> None:
    """Fractions beside the axes as percent."""
    from matplotlib.ticker import FuncFormatter

    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: words.percent(float(f"{v:.6g}"))))


def tidy(ax: Axes) -> None:
    """No minor ticks' labels: the levels of an axis are its ticks."""
    from matplotlib.ticker import NullFormatter, NullLocator

    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


class Positions:
    """Where the levels of an axis lie: at their numbers (log where they span a factor of 8), else side by side."""

    def __init__(self, levels: Sequence[Any], setting: str, categorical: bool = False):
        self.levels, self.setting = list(levels), setting
        self.categorical = categorical or None in levels or not ordered(levels) or len(levels) < 2
        self.log = not self.categorical and min(levels) > 0 and max(levels) / min(levels) >= LOG_FROM

    def of(self, level: Any) -> float:
        return float(self.levels.index(level)) if self.categorical else float(level)

    def apply_x(self, ax: Axes) -> None:
        if self.log:
            ax.set_xscale("log")
        at = self._ticks()
        ax.set_xticks([self.of(v) for v in at], [plain(words.level(v, self.setting)) for v in at])
        tidy(ax)
        if self.categorical:
            ax.set_xlim(-0.5, len(self.levels) - 0.5)
        else:  # also a level without a value: a mark on the edge may stand there
            ax.update_datalim([(self.of(v), 0.0) for v in self.levels], updatey=False)
            ax.autoscale_view(scaley=False)
        ax.set_xlabel(plain(words.heading(self.setting)))

    def apply_y(self, ax: Axes) -> None:
        names = [plain(words.level(v, self.setting)) for v in self.levels]
        ax.set_yticks([self.of(v) for v in self.levels], names)
        ax.set_ylabel(plain(words.heading(self.setting)))

    def _ticks(self) -> list[Any]:
        """Levels with a name: all, or of those that lie close together the first."""
        if self.categorical:
            return self.levels
        at = [math.log(v) if self.log else float(v) for v in self.levels]
        room = (max(at) - min(at)) / MOST_TICKS
        named = [0]
        for i, place in enumerate(at):
            if abs(place - at[named[-1]]) >= room:
                named.append(i)
        return [self.levels[i] for i in named]

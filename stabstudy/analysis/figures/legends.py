"""Marks of the entries of legends that name a level: which runs lie at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stabstudy.analysis import words
from stabstudy.config import setting_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

UNITS = 10_000


def entries(figure: Figure) -> Iterator[dict[str, Any]]:
    """A series of marks, as `tooltips.marks` has them, for each legend whose title is an axis or the verdict."""
    settings = {words.heading(name): name for name in setting_names()} | {"verdict": "verdict"}
    legends = [*figure.legends, *(box for ax in figure.axes if (box := ax.get_legend()) is not None)]
    for legend in legends:
        title = legend.get_title().get_text().replace("\n", " ")
        if title in settings and legend.get_visible():
            yield _series(figure, legend, title, settings[title])


def _series(figure: Figure, legend: Legend, title: str, setting: str) -> dict[str, Any]:
    from matplotlib.backends.backend_agg import RendererAgg

    width, height = figure.bbox.width, figure.bbox.height
    renderer = RendererAgg(width, height, figure.dpi)  # type: ignore[no-untyped-call]
    legend.draw(renderer)  # it lies where the last picture had it, and that had another resolution
    texts = [text.get_text().replace(r"\$", "$") for text in legend.get_texts()]
    boxes = [text.get_window_extent(renderer) for text in legend.get_texts()]
    places = [((box.x0 + box.x1) / 2 / width, 1 - (box.y0 + box.y1) / 2 / height) for box in boxes]
    filters = [f'{setting}="{text}"' if " " in text else f"{setting}={text}" for text in texts]
    at = [round(UNITS * min(1.0, max(0.0, v))) for place in places for v in place]
    runs = ["its runs"] * len(texts)
    return {"name": "", "x": title, "y": "", "at": at, "a": texts, "b": runs, "filter": filters}

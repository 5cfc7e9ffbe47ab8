"""Figures as files for papers and slides: PDF with TrueType text, SVG with text as text, PNG; always the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabstudy.analysis.figures import looks, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WRITERS: dict[str, Callable[[Figure], bytes]] = {
    ".pdf": style.to_pdf,
    ".svg": lambda figure: style.to_svg(figure).encode(),
    ".png": lambda figure: style.to_png(figure, 300),
}
"""Ending of a file -> its bytes; a PNG has 300 dots per inch."""


def save(drawn: Axes | Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure, or that of these Axes, as .pdf, .svg or .png, by the path's ending; answers with the path.

    The same figure gives the same bytes, without a date. Raises ValueError for another ending, OSError where the file
    cannot be written.
    """
    file = Path(path)
    if file.suffix not in WRITERS:
        raise ValueError(f"{file}: a figure is written as {', '.join(WRITERS)}, got {file.suffix or 'no ending'}")
    picture: Any = drawn.figure  # that of a Figure is itself
    looks.settle(picture)
    file.write_bytes(WRITERS[file.suffix](picture))
    return file

"""The table of figures, the function that builds them, and the module that offers them to notebooks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.text import Text

from stabstudy.analysis import figures, plots
from stabstudy.analysis.figures import looks, registry, style

OF_SEVERAL_AXES = {"trace", "traces", "trial", "panels"}
"""What `plots` documents as returning a Figure."""

OF_FILES = {"paper", "save"}
"""Those that draw nothing."""


def families(modules: Iterable[ModuleType]) -> set[str]:
    """`module.function` of every function that yields figures of a report."""
    return {
        f"{module.__name__}.{name}"
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and name.endswith("figures") and not name.startswith("_")
    }


def test_the_table_names_every_family_of_figures_once() -> None:
    names = [p.stem for p in Path(str(figures.__path__[0])).glob("*.py") if p.stem not in ("__init__", "registry")]
    modules = [importlib.import_module(f"{figures.__name__}.{name}") for name in names]
    listed = [
        f"{f.__module__}.{f.__name__}" for f in (*registry.OVER_SETTINGS, *registry.OF_SEARCHES, *registry.OF_TRIALS)
    ]
    assert len(listed) == len(set(listed)) and set(listed) == families(modules)
    forgotten = ModuleType("forgotten")
    forgotten.figures = lambda study, layout: iter(())  # type: ignore[attr-defined]
    forgotten.figures.__module__ = "forgotten"
    assert len(families([*modules, forgotten])) == len(listed) + 1  # a family that the table lacks is seen


def line_chart() -> Axes:
    ax = style.new_figure().axes[0]
    ax.plot([1, 2, 3], [4, 5, 6], label="line")
    return ax


@pytest.mark.parametrize("of_axes", [True, False])
def test_a_figure_has_its_picture_its_words_and_its_numbers(of_axes: bool) -> None:
    ax = line_chart()
    drawn: Any = ax if of_axes else ax.figure
    heads, rows = ("which", "n", "agrees"), (row for row in [("a", "1", "yes"), ("b", "2", "no")])
    figure = style.report_figure("name", "Title", drawn, "alt", "caption", heads, rows, {"which", "agrees"})
    assert (figure.name, figure.title, figure.alt, figure.caption) == ("name", "Title", "alt", "caption")
    assert figure.table.title == "Numbers of this figure" and figure.table.folded
    assert figure.table.rows == (("a", "1", "yes"), ("b", "2", "no")) and figure.table.numeric == {"n"}
    assert figure.drawing == style.draw(line_chart().figure)  # type: ignore[arg-type]
    assert figure.drawing.png and '"name":"line"' in figure.drawing.marks
    only_text = style.report_figure("name", "Title", drawn, "alt", "caption", ("n",), [("1",)], png=False)
    assert only_text.drawing.png is None and only_text.table.numeric == {"n"}


def test_what_the_last_row_of_panels_has_over_is_hidden() -> None:
    visible = {n: [ax.get_visible() for ax in style.new_panels(n, 6, 4).axes] for n in (1, 2, 3)}
    assert visible == {1: [True], 2: [True, True], 3: [True, True, True, False]}
    assert len({ax.get_position().y0 for ax in style.new_panels(3, 9, 3, columns=3).axes}) == 1


@pytest.mark.parametrize("name", sorted({*plots.__all__} - OF_FILES))
def test_every_plot_takes_axes_and_returns_them_or_its_figure(name: str) -> None:
    signature = inspect.signature(getattr(plots, name))
    if name in OF_SEVERAL_AXES:
        assert signature.return_annotation == "Figure" and f"`{name}`" in str(plots.__doc__)
    else:
        assert signature.return_annotation == "Axes" and signature.parameters["ax"].default is None


def test_plots_is_a_facade() -> None:
    """It offers what it lists, and defines nothing itself."""
    own = {name for name, value in vars(plots).items() if inspect.isfunction(value) or inspect.isclass(value)}
    assert own == set(plots.__all__)
    assert all(getattr(plots, name).__module__.startswith(figures.__name__) for name in plots.__all__)


@pytest.mark.parametrize("ending", [".pdf", ".svg", ".png"])
def test_a_saved_figure_is_the_same_bytes_every_time(tmp_path: Path, ending: str) -> None:
    first, second = (plots.save(line_chart(), tmp_path / f"{i}{ending}") for i in "ab")
    assert first.read_bytes() == second.read_bytes() and first.name == f"a{ending}"
    again = line_chart()
    plots.save(again, first)
    assert plots.save(again.figure, second).read_bytes() == first.read_bytes()  # drawn before, too


def test_each_file_of_a_figure_takes_one_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of a report's time are drawings; a layout that is settled needs none of its own."""
    drawings: list[MatplotlibFigure] = []
    draw = MatplotlibFigure.draw
    monkeypatch.setattr(MatplotlibFigure, "draw", lambda self, renderer: drawings.append(self) or draw(self, renderer))
    ax = line_chart()
    with rc_context({"figure.autolayout": True}):  # of somebody's own matplotlibrc
        assert style.draw(ax.figure).png is not None  # type: ignore[arg-type]
    assert len(drawings) == 2 and ax.figure.get_layout_engine() is None  # type: ignore[union-attr]


def test_text_in_files_is_text(tmp_path: Path) -> None:
    ax = line_chart()
    ax.set_xlabel("learning rate")
    svg = plots.save(ax, tmp_path / "a.svg").read_text()
    assert ">learning rate</text>" in svg and "DejaVu Sans, Verdana" in svg and "<use" not in svg.split("<text")[-1]
    pdf = plots.save(ax, tmp_path / "a.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"/CreationDate" not in pdf
    with pytest.raises(ValueError, match=r"as \.pdf, \.svg, \.png, got \.eps"):
        plots.save(ax, tmp_path / "a.eps")
    assert not (tmp_path / "a.eps").exists()


def test_figures_of_a_paper_have_its_widths_and_readable_type() -> None:
    page = line_chart().figure.get_size_inches()
    with plots.paper():
        own, whole = line_chart(), style.new_figure(style.FULL, 3.0)
        style.title(own, "title")
        style.legend(own, "heading")
        own.figure.canvas.draw()
        sizes = {t.get_fontsize() for t in own.figure.findobj(Text) if t.get_text()}
    assert own.figure.get_size_inches()[0] == pytest.approx(3.3) and whole.get_size_inches()[0] == pytest.approx(
        6.8, abs=0.1
    )
    assert min(sizes) >= 7 and tuple(page) == (style.HALF, 3.6)
    assert tuple(line_chart().figure.get_size_inches()) == tuple(page)  # it ends with its block
    assert 2 * style.HALF * 96 <= 1024 - 16 and style.FULL * 96 <= 1024  # two abreast in the column of a page


@pytest.mark.parametrize(("dpi", "fits"), [(looks.LAYOUT_DPI, True), (100, False)])
def test_what_was_laid_out_has_room_in_a_fine_file(monkeypatch: pytest.MonkeyPatch, dpi: int, fits: bool) -> None:
    """At 100 dots per inch the letters of a long name are narrower than in print, and the name loses its first one."""
    monkeypatch.setattr(looks, "LAYOUT_DPI", dpi)
    with plots.paper():
        ax = style.new_figure().axes[0]
        ax.set_yticks([0], ["learning rate 3e-3 to 0.3"])
        looks.settle(ax.figure)  # type: ignore[arg-type]
    ax.figure.set_dpi(300)
    ax.figure.draw_without_rendering()
    assert (ax.get_yticklabels()[0].get_window_extent().x0 >= 0) == fits

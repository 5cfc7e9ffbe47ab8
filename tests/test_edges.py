"""The edge of a frame, by hand: which scale holds what, where a line is cut, and that no two marks coincide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import planted
import pytest
from matplotlib.axes import Axes

from stabstudy.analysis import plots
from stabstudy.analysis.figures import edges, style, tooltips
from stabstudy.analysis.figures.edges import Diverged
from stabstudy.analysis.study import Study


@pytest.mark.parametrize(
    ("seen", "others", "expected"),
    [
        ([2.0, 3.0], [], (1.93, 3.07)),  # 7 % of room
        ([2.0, 3.0], [2.2, 3.3], (2.0 - 0.07 * 1.3, 3.3 + 0.07 * 1.3)),  # an interval inside the room
        ([2.0, 3.0], [5.5], (2.0 - 0.07 * 1.6, 3.6 + 0.07 * 1.6)),  # one outside: 0.6 of the range and no more
        ([2.0, 3.0], [-9.0, 9.0, math.nan, math.inf], (1.4 - 0.07 * 2.2, 3.6 + 0.07 * 2.2)),
        ([math.nan], [5.0, 6.0], (4.93, 6.07)),  # only diverged ones
        ([math.nan], [], None),
    ],
)
def test_the_scale(seen: list[float], others: list[float], expected: tuple[float, float] | None) -> None:
    limits = edges.limits(seen, others, log=False)
    assert limits == (None if expected is None else pytest.approx(expected))


def test_the_scale_of_logarithms() -> None:
    low, high = edges.limits([1.0, 100.0], [1e9, -3.0, 0.0], log=True) or (0.0, 0.0)
    reach = 100 ** (1 + edges.ROOM)  # of 1e9, and a value without a logarithm asks for nothing
    assert (low, high) == pytest.approx((reach**-0.07, reach**1.07))
    one = edges.limits([7.0], [], log=True)
    assert one == pytest.approx((7 / 1.15, 7 * 1.15))


def cut() -> Axes:
    """A line of means through (1, 2), (2, 3), (3, 7.5) in a frame from 1 to 4."""
    ax = style.new_figure().axes[0]
    ax.plot([1, 2, 3], [2.0, 3.0, 7.5], color=style.BLUE, gid=edges.MEAN)
    ax.set(xlim=(0, 4), ylim=(1, 4))
    edges.settle(ax)
    return ax


def signs(ax: Axes) -> list[Any]:
    return [line for line in ax.get_lines() if line.get_gid() == "cut"]


def test_a_line_is_cut_where_it_leaves_the_frame() -> None:
    ax = cut()
    (sign,) = signs(ax)
    assert list(sign.get_xdata()) == pytest.approx([2 + 1 / 4.5]) and list(sign.get_ydata()) == [1.0]
    assert sign.get_transform() == ax.get_xaxis_transform() and not sign.get_clip_on()
    assert [t.get_text() for t in ax.texts] == ["to 7.50"] and edges.is_cut(ax)


def test_what_is_inside_is_not_marked() -> None:
    ax = cut()
    ax.set_ylim(1, 8)
    edges.settle(ax)
    assert not signs(ax) and not ax.texts and not edges.is_cut(ax)


def test_marks_are_drawn_anew_not_twice() -> None:
    ax = cut()
    n = len(ax.get_children())
    edges.settle(ax)
    assert len(ax.get_children()) == n


def test_an_interval_that_leaves_the_frame_says_where_it_ends() -> None:
    ax = style.new_figure().axes[0]
    ax.fill_between([1, 2], [0.2, 1.5], [2.5, 9.25], gid=f"{edges.BAND} {style.GREEN}")
    ax.set(ylim=(1, 4))
    edges.settle(ax)
    assert {t.get_text() for t in ax.texts} == {"interval to 0.200", "interval to 9.25"}
    assert {t.get_color() for t in ax.texts} == {style.GREEN}


def places(ax: Axes, line: Any) -> list[tuple[float, float]]:
    """Where the marks of a line stand, in points from the lower left corner of the figure."""
    data = np.column_stack([line.get_xdata(), line.get_ydata()])
    return [(float(x), float(y)) for x, y in line.get_transform().transform(data) * 72 / ax.figure.dpi]


def test_no_two_marks_on_the_edge_coincide() -> None:
    """Nine without a value, two above the frame, one inside, all at one place; two lines' colours."""
    ax = style.new_figure().axes[0]
    ax.set(xlim=(0, 2), ylim=(0, 10))
    values = [math.nan] * 9 + [20.0, 30.0, 5.0]
    edges.keep(ax, (Diverged(1.0, v, (style.BLUE, style.GREEN)[i % 2], f"t{i}") for i, v in enumerate(values)))
    edges.settle(ax)
    lines = [line for line in ax.get_lines() if line.get_gid() == "diverged"]
    marks = {t: at for line in lines for t, at in zip(tooltips.about(line).trials, places(ax, line), strict=True)}
    assert len(marks) == 12 and edges.beyond(ax) == 2
    apart = [math.dist(a, b) for i, a in enumerate(marks.values()) for b in list(marks.values())[:i]]
    assert min(apart) >= edges.STEP - 1e-6
    top = ax.transAxes.transform((0, 1))[1] * 72 / ax.figure.dpi
    rows = [round((top - y) / edges.STEP, 6) for t, (_, y) in marks.items() if t != "t11"]
    assert rows == [0] * edges.ABREAST + [1] * 4  # a second row, inside the frame
    at = ax.transData.transform((1, 5)) * 72 / ax.figure.dpi
    assert marks["t11"] == pytest.approx(tuple(at))
    about = [tooltips.about(line) for line in lines]
    texts = {t: up for one in about for t, up in zip(one.trials, one.up, strict=True)}
    assert texts["t0"] == "diverged, no value" and texts["t11"] == "5, diverged"
    assert texts["t9"] == "20, diverged, above the frame"
    shapes = {t: line.get_marker() for line in lines for t in tooltips.about(line).trials}
    assert (shapes["t0"], shapes["t9"], shapes["t11"]) == ("^", "x", "x")


def test_one_place_would_coincide_without_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "STEP", 0.0)
    ax = style.new_figure().axes[0]
    edges.keep(ax, (Diverged(1.0, math.nan, style.BLUE, f"t{i}") for i in range(2)))
    edges.settle(ax)
    first, second = (places(ax, line)[0] for line in ax.get_lines())
    assert math.dist(first, second) == 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Loss 2.1, 2.2, 2.3 at two rates and depths; at depth 6 and the third rate all three trials diverged."""
    path = tmp_path_factory.mktemp("edges") / "s"
    planted.plant_frame(path)
    for depth in (2, 6):
        for lr in (1e-3, 1e-2, 1e-1):
            for seed in (0, 1, 2):
                config, logit = planted.settings(depth, lr, seed=seed, steps=40), 50.0 * 10**seed
                if depth == 6 and lr == 1e-1:
                    planted.plant_trial(
                        path, config, final_loss=math.nan, logit=logit, nonfinite_at=29, steps_done=30,
                        stop_reason="diverged",
                    )  # fmt: skip
                else:
                    planted.plant_trial(path, config, final_loss=2.1 + seed / 10, logit=logit)
    return Study.load(path)


def test_the_line_to_a_level_of_which_all_diverged_has_a_break(study: Study) -> None:
    ax = plots.lr_curves(study)
    high = ax.get_ylim()[1]
    assert high < 2.7 < planted.INIT_LOSS
    (sign,) = signs(ax)
    share = (high - 2.2) / (planted.INIT_LOSS - 2.2)  # of the way from 1e-2 to 1e-1, which is a decade
    assert list(sign.get_xdata()) == pytest.approx([10 ** (-2 + share)])
    assert "to 5.50" in [t.get_text() for t in ax.texts]


def test_measured_peaks_of_diverged_trials_lie_at_their_values(study: Study) -> None:
    ax = plots.curves(study, "attn_logit_peak", log_y=True)
    gone = study.trials[study.trials["verdict"] == "diverged"]
    drawn = [line for line in ax.get_lines() if line.get_gid() == "diverged"]
    values = {t: y for line in drawn for t, y in zip(tooltips.about(line).trials, line.get_ydata(), strict=True)}
    assert values == pytest.approx(gone["attn_logit_peak"].to_dict()) and len(values) == 3
    low, high = ax.get_ylim()
    assert all(low < y < high for y in values.values()) and {line.get_marker() for line in drawn} == {"x"}


def test_panels_mark_what_their_common_scale_leaves_out(study: Study) -> None:
    figure = plots.panels(study, lambda part, ax: plots.lr_curves(part, by=None, ax=ax), ["model.depth"])
    calm, wild = figure.axes
    assert calm.get_ylim() == wild.get_ylim() and not signs(calm) and len(signs(wild)) == 1
    assert (edges.beyond(calm), edges.beyond(wild)) == (0, 3)

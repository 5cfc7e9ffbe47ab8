"""Time to the first spike and LR sensitivity, drawn: each line holds the numbers of its table."""

from __future__ import annotations

import math

import planted
import pytest

from stabstudy.analysis.figures import study_curves, style
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every trial of lr .1 spikes, those of smaller rates at most at depth 6."""
    path = tmp_path_factory.mktemp("curves") / "planted"
    return Study.load(planted.plant_study(path, seeds=(0, 1, 2), lrs=(1e-3, 3e-3, 1e-2, 1e-1)))


def test_curves_start_at_one_and_fall_where_trials_spike(study: Study) -> None:
    ax = study_curves.first_spikes(study, "optim.lr")
    lines = {line.get_label(): line for line in ax.get_lines() if not str(line.get_label()).startswith("_")}
    assert list(lines) == ["1e-3", "3e-3", "0.01", "0.1"]
    assert all((line.get_xdata()[0], line.get_ydata()[0]) == (0, 1) for line in lines.values())
    steps, free = lines["0.1"].get_xdata(), lines["0.1"].get_ydata()
    first = study.trials.loc[study.trials["optim.lr"] == 0.1, "spike_first_step"]
    assert len(first) == 6 and free[-1] == 0 and list(steps[1:]) == sorted(set(first))
    assert list(free[1:]) == pytest.approx([float((first > step).mean()) for step in steps[1:]])
    assert lines["1e-3"].get_ydata()[-1] == 1


def test_trials_that_end_free_are_ticks(study: Study) -> None:
    ax = study_curves.first_spikes(study, "optim.lr")
    ticks = [line for line in ax.get_lines() if line.get_marker() == "|" and len(line.get_xdata())]
    assert all(list(line.get_xdata()) == [120] for line in ticks)
    assert len(ticks) == 3  # the rates at which a trial ended without a spike


def test_sensitivity_is_that_of_the_table(study: Study) -> None:
    rows = records(study.sensitivity())
    ax = study_curves.sensitivity(study)
    marks = [line for line in ax.get_lines() if line.get_linestyle() == "None" and len(line.get_xdata()) == 1]
    drawn = {float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in marks}
    assert drawn == {r["model.depth"]: pytest.approx(r["lrs"]) for r in rows}
    edges = {float(line.get_xdata()[0]): line.get_markerfacecolor() == style.PAPER for line in marks}
    assert edges == {r["model.depth"]: r["opt_at_edge"] for r in rows}


def test_a_level_without_a_value_keeps_its_place() -> None:
    """A diverged trial without a value is marked above its level, which no other mark may hold in the frame."""
    ax = style.new_figure().axes[0]
    ax.plot([3e-3, 3.0], [0.2, math.nan])
    style.Positions([3e-3, 3.0], "optim.lr").apply_x(ax)
    low, high = ax.get_xlim()
    assert low < 3e-3 and high > 3.0


def test_of_levels_that_lie_close_together_the_first_is_named() -> None:
    ax = style.new_figure().axes[0]
    searched = [0.0246, 0.029, 0.0347, 0.0389, 0.0548, 0.0614, 0.0772, 0.109, 0.153, 0.242, 0.383, 0.54, 0.76]
    style.Positions(searched, "optim.lr").apply_x(ax)
    at = [math.log(x) for x in ax.get_xticks()]
    room = (math.log(searched[-1]) - math.log(searched[0])) / style.MOST_TICKS
    assert at[0] == math.log(searched[0]) and all(b - a >= room for a, b in zip(at, at[1:], strict=False))
    style.Positions(grid := [10.0**i for i in range(style.MOST_TICKS)], "optim.lr").apply_x(ax)
    assert list(ax.get_xticks()) == grid

"""Time to the first spike and LR sensitivity, drawn: each line holds the numbers of its table."""

from __future__ import annotations

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

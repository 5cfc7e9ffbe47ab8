"""What a page carries so that figures can be read: places against matplotlib's transforms, values against data."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest

from stabstudy.analysis import plots
from stabstudy.analysis.figures import layers, step_data, style, tooltips, traces
from stabstudy.analysis.loss_levels import LossLevels, loss_levels
from stabstudy.analysis.study import Study
from stabstudy.trace import TRACE, Rows


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(planted.plant_study(tmp_path_factory.mktemp("marks") / "planted", seeds=(0, 1, 2)))


def read(figure: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(style.draw(figure, png=False).marks)
    return found


def test_a_mark_lies_where_the_picture_shows_it() -> None:
    figure = style.new_figure(6, 4)
    ax = figure.axes[0]
    ax.plot([1, 2, 3], [10.0, 30.0, 20.0], marker="o", label="one")
    ax.set(xlabel="x", ylabel="y")
    (series,) = read(figure)
    figure.canvas.draw()
    pixels = ax.transData.transform([(1, 10), (2, 30), (3, 20)]) / (600, 400)
    places = np.array(series["at"]).reshape(-1, 2) / tooltips.UNITS
    assert places[:, 0] == pytest.approx(pixels[:, 0], abs=1e-3)
    assert 1 - places[:, 1] == pytest.approx(pixels[:, 1], abs=1e-3)
    assert (series["name"], series["x"], series["y"]) == ("one", "x", "y")
    assert (series["a"], series["b"]) == (["1", "2", "3"], ["10", "30", "20"])


def test_every_drawn_trial_can_be_pointed_at(study: Study) -> None:
    series = read(plots.lr_curves(study).figure)
    named = [t for s in series for t in s.get("trials", [])]
    assert sorted(named) == sorted(str(t) for t in study.trials.index)
    for s in (s for s in series if "trials" in s):
        for trial_id, lr, loss in zip(s["trials"], s["a"], s["b"], strict=True):
            row = study.row(trial_id)
            assert s["name"] == f"depth {row['model.depth']}" and float(lr) == row["optim.lr"]
            assert float(loss) == pytest.approx(row["final_loss"], rel=1e-3)


def test_a_diverged_trial_is_named_on_the_edge(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed, diverged in ((0, False), (1, True)):
        planted.plant_trial(
            tmp_path / "s", planted.settings(2, 0.1, seed=seed), nonfinite_at=60 if diverged else None,
            final_loss=math.nan if diverged else 2.5, stop_reason="diverged" if diverged else "complete",
        )  # fmt: skip
    series = read(plots.lr_curves(Study.load(tmp_path / "s"), by=None).figure)
    (edge,) = [s for s in series if s["b"] == ["5.50, diverged, above the frame"]]
    assert len(edge["trials"]) == 1 and edge["at"][1] < 1000 and edge["filter"] == ["lr=0.1"]


def test_fields_of_a_map_have_their_words(study: Study) -> None:
    (series,) = read(plots.stability_map(study).figure)
    assert series["a"][0] == "learning rate 1e-3, depth (layers) 2".removeprefix("learning rate ")
    assert series["x"] == "learning rate" and series["b"][0] == "0 %, n=3" and series["y"] == ""


def test_ornaments_are_no_marks() -> None:
    figure = style.new_figure()
    ax = figure.axes[0]
    ax.axhline(1.0)
    ax.axvline(1.0)
    ax.plot([0, 1], [0, 1])  # a diagonal, an interval
    ax.plot([0, 1, 2], [1, 1, 1], linestyle="none", marker="|")
    ax.set_ylabel("y")
    assert read(figure) == []


def test_a_long_line_is_thinned_and_keeps_its_peaks() -> None:
    figure = style.new_figure()
    values = np.sin(np.arange(5000) / 7)
    values[3333] = 50.0
    values[100] = math.nan
    figure.axes[0].plot(values)
    figure.axes[0].set_ylabel("y")
    (series,) = read(figure)
    assert len(series["a"]) <= tooltips.MOST_VERTICES and "50" in series["b"] and "nan" not in str(series)
    assert series["a"][series["b"].index("50")] == "3333"


def test_hostile_names_stay_text() -> None:
    figure = style.new_figure()
    figure.axes[0].plot([1, 2, 3], [1, 2, 3], marker="o", label=style.plain('"><script>$\\frac'))
    figure.axes[0].set_ylabel("y")
    (series,) = read(figure)
    assert series["name"] == '"><script>$\\frac'


def _unpacked(text: str) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def _curve(own: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve in a page's record."""
    at, values = own["curves"][name]
    return _unpacked(own["steps"][at]), _unpacked(values)


def test_a_page_carries_every_step(study: Study) -> None:
    worst = str(study.worst())
    rows = study.trace(worst)
    absolute = traces.absolute_steps(study, rows)
    spikes = study.spikes_by_trial.get(worst, [])
    levels, probes = loss_levels(study, worst, rows), study.probes(worst)
    row = study.row(worst) | {"trial_id": worst}
    own = json.loads(json.dumps(step_data.steps(rows, probes, row, spikes, absolute, levels)))
    mean = pd.Series(rows["loss"]).ewm(alpha=2 / 21, adjust=False).mean()  # none of its losses is null
    for name, values in [(n, rows[n]) for n in ("grad_norm", "loss", "clip_scale")] + [("mean", mean.to_numpy())]:
        steps, carried = _curve(own, name)
        assert steps.tolist() == rows["step"].tolist() and carried == pytest.approx(values, rel=1e-6, nan_ok=True)
    assert probes is not None
    steps, values = _curve(own, "attention logit (nat), largest")
    assert steps.tolist() == probes["step"].tolist()
    assert values == pytest.approx(probes["attn_logit_max"].max(axis=1), rel=1e-6)
    assert "gradient noise scale (token)" not in own["curves"]  # never measured
    steps, values = _curve(own, "rings")
    assert steps.tolist() == rows["step"][absolute].tolist() and len(steps) == row["spike_abs_steps"] > 0
    assert values == pytest.approx(rows["grad_norm"][absolute], rel=1e-6)
    assert own["trial"] == worst and own["peaks"] == sorted({s["peak_step"] for s in spikes}) != []


def test_a_chart_marks_spikes_levels_and_the_end_of_warmup(study: Study) -> None:
    worst = str(study.worst())
    rows, spikes = study.trace(worst), study.spikes_by_trial[worst]
    row = study.row(worst) | {"trial_id": worst}
    absolute, levels = traces.absolute_steps(study, rows), loss_levels(study, worst, rows)
    shapes = step_data.steps(rows, None, row, spikes, absolute, levels)["layout"]["shapes"]
    axis = {"grad": "y domain", "loss": "y2 domain"}
    rectangles = [(s["yref"], s["x0"], s["x1"]) for s in shapes if s["type"] == "rect"]
    assert rectangles == [(axis[s["series"]], s["start"] - 0.5, s["end"] + 0.5) for s in spikes]
    levels_drawn = [s for s in shapes if s.get("xref") == "x domain"]
    heights = {s["label"]["text"].rpartition(" ")[0]: (s["yref"], s["y0"]) for s in levels_drawn}
    assert heights["untrained model"] == ("y2", row["init_loss"])
    assert heights.get("clip") == (None if pd.isna(row["optim.clip"]) else ("y", row["optim.clip"]))
    (warmup,) = [s["x0"] for s in shapes if s.get("yref") == "paper"]
    assert warmup == row["optim.warmup_steps"]


def test_what_is_marked_in_a_very_long_trace_is_carried(study: Study) -> None:
    worst = str(study.worst())
    n = 250_000
    random = np.random.default_rng(0)
    columns = {c.name: np.full(n, 0.5) for c in TRACE.columns}
    columns |= {"step": np.arange(n), "grad_norm": random.lognormal(size=n), "loss": random.lognormal(size=n)}
    rows = Rows(TRACE, columns, {name: np.zeros(n, bool) for name in columns})
    spike = {"series": "grad", "start": 12_345, "end": 12_351, "peak_step": 12_347, "peak_ratio": 3.0}
    rough = np.arange(n) == 41_234
    levels = LossLevels(20, columns["loss"], None, "first loss", None)
    own = step_data.steps(rows, None, study.row(worst) | {"trial_id": worst}, [spike], rough, levels)
    carried = _curve(own, "loss")[0].tolist()
    assert {12_345, 12_351, 12_347, 41_234} <= set(carried) and len(carried) <= step_data.MOST_STEPS + 6


def test_a_very_long_trace_keeps_its_extremes() -> None:
    norm, loss = np.random.default_rng(0).lognormal(size=(2, 100_000))
    norm[77_777], loss[55_555], norm[33_333] = 1e6, 1e6, math.nan
    kept = tooltips.thinned(norm, loss, most=20_000)
    assert {0, 33_333, 55_555, 77_777, 99_999} <= set(kept.tolist()) and len(kept) <= 20_003
    assert list(tooltips.thinned(norm[:500], loss[:500], most=500)) == list(range(500))


def test_a_condition_is_what_the_page_of_runs_reads() -> None:
    levels = {"model.depth": 6, "optim.lr": 0.003, "optim.clip": None, "model.qk_norm": True}
    assert tooltips.condition(levels) == "depth=6 lr=3e-3 clip=off qk_norm=true"
    assert tooltips.condition({"train.steps": 100}) == "train.steps=100"  # steps is a column of its own
    assert tooltips.condition({"data": 'my "own" text'}) == 'data="my own text"' and tooltips.condition({}) == ""


def test_a_click_selects_the_runs_of_a_field(study: Study) -> None:
    """Each filter, read by hand, leaves as many done trials as the field says."""
    part = study.where({"optim.clip": 1.0})
    figure = plots.panels(part, lambda one, ax: plots.verdict_map(one, ax=ax), [])
    (series,) = read(figure)
    for condition, text in zip(series["filter"], series["b"], strict=True):
        asked = dict(term.split("=") for term in condition.split())
        trials = part.trials[part.trials["state"] == "done"]
        there = trials[(trials["model.depth"] == int(asked["depth"])) & (trials["optim.lr"] == float(asked["lr"]))]
        assert len(there) == sum(int(count.split()[1]) for count in text.split(", ")) > 0


def test_marks_of_panels_hold_what_their_panel_fixes(study: Study) -> None:
    figure = plots.panels(study, lambda one, ax: plots.lr_curves(one, by="optim.lr", ax=ax), ["model.depth"])
    named = {(s["name"], f) for s in read(figure) for f in s["filter"]}
    assert {name for name, _ in named} == {"depth 2", "depth 6"}
    assert all(condition.startswith(f"depth={name[-1]} lr=") for name, condition in named)
    assert {s["y"] for s in read(figure)} == {"final validation loss (nat/token)"}  # of the right panel, too
    assert not figure.axes[1].yaxis.label.get_visible()


def test_the_map_of_layers_can_be_read(study: Study) -> None:
    worst = str(study.worst())
    rows, spike = study.trace(worst), max(study.spikes_by_trial[worst], key=lambda s: s["peak_ratio"] or 0)
    series = read(plots.layer_map(rows, spike).figure)
    assert [s["name"] for s in series] == layers.layer_names(len(series))
    at = series[1]["a"].index(str(spike["peak_step"]))
    norm = rows["layer_grad_norm"][rows["step"] == spike["peak_step"]][0, 1]
    assert float(series[1]["b"][at]) == pytest.approx(norm, rel=1e-2)
    assert (series[1]["x"], series[1]["y"]) == ("optimizer step", "gradient norm")
    places = np.array(series[1]["at"]).reshape(-1, 2)
    assert (np.diff(places[:, 0]) > 0).all() and len(set(places[:, 1])) == 1


def test_an_entry_of_a_legend_is_where_it_is_drawn_and_asks_for_its_runs(study: Study) -> None:
    ax = plots.lr_curves(study)
    (legend,) = [series for series in read(ax.figure) if "filter" in series and series["b"][0] == "its runs"]
    figure: Any = ax.figure
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in (ax.get_legend() or figure.legends[0]).get_texts()]
    for (x, y), box in zip(np.array(legend["at"]).reshape(-1, 2) / tooltips.UNITS, boxes, strict=True):
        assert box.x0 <= x * figure.bbox.width <= box.x1 and box.y0 - 2 <= (1 - y) * figure.bbox.height <= box.y1 + 2
    assert legend["filter"] == ["model.depth=2", "model.depth=6"] and legend["a"] == ["2", "6"]


def test_a_legend_of_something_else_asks_nothing() -> None:
    figure = style.new_figure(6, 4)
    figure.axes[0].plot([1, 2, 3], [1.0, 2.0, 3.0], marker="o", label="one")
    style.legend(figure.axes[0], "method")
    assert not [series for series in read(figure) if "filter" in series]

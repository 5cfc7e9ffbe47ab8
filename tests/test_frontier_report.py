"""What a report says of a study that searched a frontier: planted studies of known edges, and their forecasts."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import yaml

from stabstudy import report as command
from stabstudy.analysis import answer, commands, forecasts, frontiers, plots, recipe, words
from stabstudy.analysis.elements import Absent, Figure, Text
from stabstudy.analysis.figures import forecast_plot, frontier_plot, registry, tooltips
from stabstudy.analysis.frontier import Edge
from stabstudy.analysis.frontier import Finding as Oddity
from stabstudy.analysis.frontiers import Asked, CellEdge, EdgeTrial, Frontier
from stabstudy.analysis.report import comparison_page, findings, frontier_page, publish, study_page
from stabstudy.analysis.study import Study

EDGES = {2: 0.2, 4: 0.1, 8: 0.05}
"""Planted: the edge halves with each doubling of the depth."""

TRIALS = {0.06: 1, 0.5: 1, 0.8: 1, 0.9: 2, 0.96: 2, 1.04: 2, 1.1: 2, 1.25: 1, 1.6: 1, 3.0: 1}
"""Of each cell: how many seeds at this share of the edge."""

SEARCH = {"between": [1e-3, 1.0], "resolution": 1.25, "holds": "stable"}


def record(study: Path, search: Mapping[str, Any] | None = None, setting: str = "optim.lr", **more: Any) -> None:
    body = {"format": 1, "sweep": "planted", "frontier": {setting: dict(search or SEARCH)}, "cases": {}} | more
    (study / "sweep.yaml").write_text(yaml.safe_dump(body))


def plant(study: Path, depth: int, lr: float, holds: bool, seed: int = 0, **more: Any) -> None:
    loss = 2.4 + 0.3 * (math.log10(lr) + 2) ** 2
    spikes = {} if holds else dict.fromkeys(planted.ROUGH, 8.0)
    planted.plant_trial(study, planted.settings(depth, lr, 1.0, seed), spikes=spikes, final_loss=loss, **more)


def plant_edge(study: Path, depth: int, edge: float) -> None:
    for factor, seeds in TRIALS.items():
        for seed in range(seeds):
            plant(study, depth, float(f"{factor * edge:.4g}"), factor <= 1, seed)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = tmp_path_factory.mktemp("results") / "searched"
    planted.plant_frame(study)
    record(study)
    for depth, edge in EDGES.items():
        plant_edge(study, depth, edge)
    plant(study, 2, 0.9, True)  # stable again above unstable
    return study


@pytest.fixture(scope="module")
def study(searched: Path) -> Study:
    return Study.load(searched)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(planted.plant_study(tmp_path_factory.mktemp("results") / "grid"))


def edge(estimate: float, low: float, high: float, status: str = "resolved", odd: Sequence[Oddity] = ()) -> Edge:
    return Edge(estimate, low, high, 9, status, 0.02, tuple(odd))


def made_up(cells: Mapping[tuple[Any, ...], Edge], axes: Mapping[str, list[Any]], **asked: Any) -> Frontier:
    """A frontier of three trials in each cell, at, below and above its edge."""
    own = Asked(**({"setting": "optim.lr", "low": 1e-3, "high": 1.0, "resolution": 1.25, "holds": "stable"} | asked))
    trials = [
        [
            EdgeTrial("0" * 10, e.estimate * f, 0, holds, False, False)
            for f, holds in ((0.9, True), (1.2, False), (0.5, None))
        ]
        for e in cells.values()
    ]
    parts = [
        CellEdge(None, dict(zip(axes, levels, strict=True)), {own.holds: e}, tuple(t), 300)
        for (levels, e), t in zip(cells.items(), trials, strict=True)
    ]
    return Frontier(own, dict(axes), tuple(parts))


# the table


def test_the_table_has_the_planted_edges(study: Study) -> None:
    table = study.frontier()
    stable = table[table["holds"] == "stable"].set_index("model.depth")
    assert list(stable.index) == list(EDGES) and set(stable["status"]) == {"resolved"}
    for depth, planted_edge in EDGES.items():
        row = stable.loc[depth]
        assert row["low"] < planted_edge < row["high"] <= row["low"] * SEARCH["resolution"]
        assert row["estimate"] == pytest.approx(planted_edge, rel=0.04)
        assert row["n"] == row["trials"] == 14 + (depth == 2) and row["steps"] == 120 * row["n"]
    assert [(f.value, f.holds, f.n) for f in stable.loc[2, "exceptions"]] == [(0.9, True, 1)]
    assert not stable.loc[4, "exceptions"]


def test_the_answer_as_data_has_the_edges_and_no_grid(study: Study) -> None:
    whole = answer.answer(study)
    assert whole["stable_up_to"] == whole["recipes"] == []
    table = study.frontier(holds="stable").set_index("model.depth")
    for cell in whole["frontier"]:
        row = table.loc[cell["at"]["model.depth"]]
        assert [cell[k] for k in ("status", "estimate", "low", "high")] == [
            row[k] for k in ("status", "estimate", "low", "high")
        ]
    assert len(whole["frontier"]) == len(EDGES)


def test_the_other_rule_shares_the_trials_where_it_can_be_judged(study: Study) -> None:
    works = study.frontier(holds="works").set_index("model.depth")
    assert list(works.index) == [8]  # losses are least at 0.01: elsewhere nothing below the best was tried
    assert list(study.frontier()["holds"]) == ["stable"] * 3 + ["works"]
    assert 0.08 < works.loc[8, "estimate"] < 0.15  # its losses lie 0.197 and 0.367 above that of the best, 0.025


def test_on_request_the_range_is_that_of_the_levels(grid: Study, study: Study) -> None:
    assert grid.searched is None
    table = grid.frontier("optim.lr")
    assert list(table["model.depth"].drop_duplicates()) == [2, 6] and grid.frontier().equals(table)
    row = table[table["holds"] == "stable"].iloc[0]
    assert 1e-2 < row["low"] < row["high"] < 1e-1 and row["status"] == "open" and row["n"] == 6
    assert "optim.lr" in study.frontier("model.depth")
    for asked, error in ((("optim.clip",), KeyError), (("optim.lr", "best"), ValueError)):
        with pytest.raises(error):
            grid.frontier(*asked)


def test_what_the_search_leaves_out_has_no_edge(study: Study, tmp_path: Path) -> None:
    planted.plant_frame(tmp_path)
    record(tmp_path, cases={"lingua": {"optim.lr": 3e-3}, "tight": {"model.depth": 3}})
    asked = frontiers.read(Study.load(tmp_path).folder)
    assert asked is not None and asked.fixing == {"lingua"}
    rows = study.tables.trials
    more = [
        rows[0] | {"case": "lingua", "optim.lr": 3e-3, "model.depth": 5},
        rows[0] | {"case": "tight", "optim.lr": 1e-2, "model.depth": 3},
        rows[0] | {"optim.lr": 5.0},  # beyond the range
    ]
    before, after = (frontiers.frontier(asked, of, study.axes) for of in (rows, [*rows, *more]))
    assert [(c.case, c.levels["model.depth"]) for c in after.cells] == [(None, 2), (None, 4), (None, 8), ("tight", 3)]
    assert [c.edge.n for c in after.cells] == [*(c.edge.n for c in before.cells), 1]
    assert list(frontiers.table(after)["case"].dropna()) == ["tight"] and "case" not in frontiers.table(before)


def test_an_axis_equal_to_the_setting_follows_it() -> None:
    rows = [
        planted_row(depth, lr) | {"optim.muon_lr": lr if tied else 0.02, "state": "done"}
        for depth in (2, 4)
        for lr, tied in ((1e-2, True), (1e-1, True))
    ]
    axes = {"model.depth": [2, 4], "optim.lr": [1e-2, 1e-1], "optim.muon_lr": [1e-2, 1e-1]}
    asked = Asked("optim.lr", 1e-3, 1.0, 1.25, "stable")
    assert list(frontiers.frontier(asked, rows, axes).axes) == ["model.depth"]
    rows[0]["optim.muon_lr"] = 0.02
    assert list(frontiers.frontier(asked, rows, axes).axes) == ["model.depth", "optim.muon_lr"]


def planted_row(depth: int, lr: float) -> dict[str, Any]:
    return {"trial_id": f"{depth:010d}", "model.depth": depth, "optim.lr": lr, "seed": 0, "verdict": "stable"}


NONSENSE = (
    *("", "[1", "frontier: 3", "frontier: {a: 1, b: 2}", "frontier: {optim.lr: {between: [1, 0.1]}}"),
    "frontier: {optim.lr: {between: [1e-3, 1.0], resolution: 1.25, holds: best}}",
)


@pytest.mark.parametrize("text", NONSENSE)
def test_a_record_that_makes_no_sense_is_no_search(tmp_path: Path, text: str) -> None:
    planted.plant_frame(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    assert frontiers.read(Study.load(tmp_path).folder) is None


# the figure


def test_the_figure_draws_every_trial_and_the_edges_of_the_table(study: Study) -> None:
    table = study.frontier(holds="stable")
    ax = plots.frontier(study)
    lines = {gid: [line for line in ax.lines if line.get_gid() == gid] for gid in ("edge", "interval", tooltips.RING)}
    (joined,) = lines["edge"]
    assert list(joined.get_ydata()) == list(table["estimate"])
    assert [tuple(line.get_ydata()) for line in lines["interval"]] == list(
        zip(table["low"], table["high"], strict=True)
    )
    points = [line for line in ax.lines if tooltips.about(line).trials]
    drawn = {marker: sorted(v for p in points if p.get_marker() == marker for v in p.get_ydata()) for marker in "ox"}
    values = [(e * f, f <= 1) for e in EDGES.values() for f, n in TRIALS.items() for _ in range(n)]
    assert drawn["o"] == pytest.approx(sorted([*(v for v, holds in values if holds), 0.9]))
    assert drawn["x"] == pytest.approx(sorted(v for v, holds in values if not holds))
    assert [list(line.get_ydata()) for line in lines[tooltips.RING]] == [[0.9]]
    assert ax.get_yscale() == "log" and [t.get_text() for t in ax.get_xticklabels()] == ["2", "4", "8"]


def test_the_figure_says_what_is_drawn(study: Study) -> None:
    (figure,) = frontier_plot.figures(study)
    assert isinstance(figure, Figure)
    assert "in each of 3 cells" in figure.caption and "43 trials drawn" in figure.caption
    assert "22 hold and 21 do not hold. Ringed: 1 trial that contradicts the interval." in figure.caption
    assert figure.table.rows[0][0] == "depth 2" and figure.table.rows[0][4:] == ("resolved", "8", "7", "0", "1")
    assert figure.table.rows[0][1] in figure.alt
    marks = json.loads(figure.drawing.marks)
    trials = [(series["a"][0], len(series["trials"])) for series in marks if "trials" in series]
    assert trials == [("2", 8), ("2", 7), ("4", 7), ("4", 7), ("8", 7), ("8", 7)]


def test_one_cell_forty_cells_and_open_ends_have_a_row_each() -> None:
    one = frontier_plot.draw(made_up({(): edge(0.1, 0.09, math.inf)}, {}))
    arrow = [line for line in one.lines if line.get_marker() == ">"]
    assert len(arrow) == 1 and arrow[0].get_xdata()[0] == one.get_xlim()[1]
    names = [f"set{i}" for i in range(40)]
    many = frontier_plot.draw(made_up({(n,): edge(0.1, 0.09, 0.11) for n in names}, {"data": names}))
    assert [t.get_text() for t in many.get_yticklabels()] == [f"dataset {n}" for n in names]
    (edges,) = [line for line in many.lines if line.get_gid() == "edge"]
    assert list(edges.get_ydata()) == list(range(40)) and not [line for line in many.lines if line.get_marker() in "<>"]
    assert many.figure.get_figheight() > 3 * one.figure.get_figheight()


def test_further_axes_stand_side_by_side() -> None:
    cells = {
        (d, q): edge(0.4 / d * (1 + q), 0.3 / d * (1 + q), 0.5 / d * (1 + q)) for d in (2, 4) for q in (False, True)
    }
    ax = frontier_plot.draw(made_up(cells, {"model.depth": [2, 4], "model.qk_norm": [False, True]}))
    edges = [line for line in ax.lines if line.get_gid() == "edge"]
    assert [line.get_label() for line in edges] == ["qk-norm false", "qk-norm true"]
    assert len({line.get_color() for line in edges}) == len({line.get_marker() for line in edges}) == 2
    assert all(a < b for a, b in zip(edges[0].get_xdata(), edges[1].get_xdata(), strict=True))


def test_a_grid_has_no_such_figure(grid: Study) -> None:
    """And no row that says so: nobody asked for one."""
    assert "Frontier" not in [block.what for block in registry.search_figures(grid) if isinstance(block, Absent)]


def test_contradictions_that_chance_makes_are_counted_and_not_named() -> None:
    """Of three values at one depth and one at another, two are rarer than RARE."""
    odd = [Oddity(0.5, True, 1, 0.2), Oddity(0.6, True, 2, 0.01), Oddity(0.9, True, 1, frontier_page.RARE)]
    cells = {
        (2,): edge(0.1, 0.09, 0.11, odd=odd),
        (4,): edge(0.1, 0.09, 0.11, odd=[Oddity(0.01, False, 3, 1e-4)]),
    }
    lines = list(frontier_page._oddities(made_up(cells, {"model.depth": [2, 4]})))
    assert len(lines) == 3 and [line.partition(":")[0] for line in lines[:2]] == ["Not monotone"] * 2
    assert "all 2 trials at learning rate 0.6" in lines[0] and "all 3 trials at learning rate 0.01" in lines[1]
    assert lines[2].startswith("2 values contradict the intervals as chance may make them (each 0.05 or more")


# the page


def test_the_first_screen_gives_each_edge(study: Study) -> None:
    table = study.frontier(holds="stable").set_index("model.depth")
    how_far, use = findings.findings(study)
    assert (how_far.about, use.about) == ("How far", "What to use")
    for depth, row in table.iterrows():
        numbers = f"{words.number(row['estimate'])} [{words.number(row['low'])}, {words.number(row['high'])}]"
        assert f"Learning rate is stable up to {numbers} (depth {depth}, {row['n']} trials)." in how_far.sentences
    text = " ".join(how_far.sentences)
    assert "Not monotone: at depth 2, the one trial at learning rate 0.9 holds again, above the interval" in text
    assert "The search took 43 trials and 5,160 steps." in text
    assert "launch again" not in text and "lies beyond" not in text
    assert len(use.sentences) == 1 and "chosen by what earlier trials did" in use.sentences[0]
    assert recipe.recipes(study) == []


@pytest.mark.slow
def test_seeds_that_a_search_did_not_need_are_no_caveat(study: Study, grid: Study) -> None:
    assert sorted(set(study.cells["n"])) == [1, 2]
    assert not [w for w in findings.warnings(study) if "seed" in w]
    assert [w for w in findings.warnings(grid.part(set(grid.trials.index[1:]))) if "lack" in w]


def test_a_grid_is_told_as_before(grid: Study) -> None:
    assert [f.about for f in findings.findings(grid)] == ["What is stable", "What to use", "What the axes changed"]
    assert recipe.recipes(grid)


@pytest.mark.slow
def test_no_statement_takes_a_search_for_a_grid(study: Study) -> None:
    made = study_page.report(study)
    sections = {s.anchor: s for s in made.sections}
    texts = {anchor: " ".join(b.text for b in s.blocks if isinstance(b, Text)) for anchor, s in sections.items()}
    assert all("hole" not in text for text in texts.values())
    assert "not computed: the values of learning rate were chosen by what earlier trials did" in texts["changes"]
    models = [
        b for anchor in ("sensitivity", "shares", "rates", "first") for b in getattr(sections.get(anchor), "blocks", [])
    ]
    assert not models, "nothing is modelled over values that were chosen"
    names = {f.name for f in made.figures}
    assert {"frontier", "forecast", "final-loss"} <= names
    assert not names & {"stability-map", "effects", "first-spikes", "norm-ratios", "lr-sensitivity"}
    (axes,) = [b for b in sections["design"].blocks if getattr(b, "title", "") == "Axes"]
    assert axes.rows[1][2].startswith("searched from 1e-3 to 1: ")


def test_open_beyond_and_below_come_with_the_command_that_goes_on(study: Study) -> None:
    cells = {
        (2,): edge(1.0, 1.0, math.inf, "beyond"),
        (4,): edge(1e-3, 0.0, 1e-3, "below"),
        (8,): edge(0.1, 0.05, 0.2, "open"),
    }
    of = made_up(cells, {"model.depth": [2, 4, 8]})
    text = "\n".join(frontier_page.findings(study, of))
    assert (
        "Learning rate is stable up to 1 (depth 2, 9 trials), the largest value searched: the edge lies beyond." in text
    )
    assert "Learning rate is not stable even at 1e-3 (depth 4, 9 trials), the smallest value searched" in text
    assert "Learning rate is stable up to about 0.100 [0.0500, 0.200] (depth 8, 9 trials; open)." in text
    again = "python -m stabstudy.sweep sweep=planted study=searched"
    assert (
        "Not yet within the resolution 1.25 (depth 8): launch again, with more seeds or a larger limit where it trains "
        f"nothing new: {again}\n" in text
    )
    assert "The search took 9 trials and 900 steps; 3 say nothing of the edge." in text
    assert f"This searches above the range (depth 2): {again} 'optim.lr={{between:[0.001,10]}}'\n" in text
    assert f"This searches below the range (depth 4): {again} 'optim.lr={{between:[0.0001,1]}}'\n" in text


def test_a_command_names_the_rule_and_the_resolution_where_they_are_no_defaults(study: Study) -> None:
    text = commands.extended(study, Asked("optim.lr", 1e-3, 10.0, 1.1, "works"))
    search = "'optim.lr={between:[0.001,10],resolution:1.1,holds:works}'"
    assert text == f"python -m stabstudy.sweep sweep=planted study=searched {search}"


def test_a_comparison_says_that_a_search_is_no_grid(study: Study, grid: Study) -> None:
    assert Study.concat([study, grid]).searched is None
    assert not list(comparison_page.missing(Study.concat([study, grid]))), "its values are no levels to fill in"
    notes = list(comparison_page._searched([study, grid]))
    assert len(notes) == 1 and notes[0].startswith("searched is no grid: the values of learning rate were chosen")


# forecasts


def power_law(edges: Mapping[float, float], size: float) -> float:
    slope, level = np.polyfit(np.log(list(edges)), np.log(list(edges.values())), 1)
    return float(np.exp(level + slope * math.log(size)))


def test_the_next_size_is_forecast(study: Study) -> None:
    of = study.searched
    assert of is not None
    (one,) = forecasts.made(of)
    measured = {cell.levels["model.depth"]: cell.edge.estimate for cell in of.cells}
    assert (one.axis, one.size, one.at, one.measured) == ("model.depth", 16, {}, [2, 4, 8])
    assert one.estimate == pytest.approx(power_law(measured, 16)) and one.low < 0.025 < one.high
    assert one.exponent == pytest.approx(-1, abs=0.05)
    held_out = measured[8] / power_law({2: measured[2], 4: measured[4]}, 8)
    (sentence,) = frontier_page.forecast_sentences(study, of)
    numbers = [words.number(v) for v in (one.estimate, one.low, one.high)]
    assert sentence.startswith(
        "At depth 16 the edge of the learning rate is forecast at {} [{}, {}] (power law".format(*numbers)
    )
    assert sentence.endswith(f"was off by a factor {words.number(max(held_out, 1 / held_out), 2)}.")


@pytest.mark.parametrize(("sizes", "size"), [((2, 4, 8), 16), ((2, 6, 10), 14), ((64, 128, 256), 512), ((2, 3, 8), 21)])
def test_the_next_size_goes_on_as_the_sizes_do(sizes: tuple[int, ...], size: int) -> None:
    of = made_up({(n,): edge(1 / n, 0.9 / n, 1.1 / n) for n in sizes}, {"model.depth": list(sizes)})
    assert [one.size for one in forecasts.made(of)] == [size]


def test_two_resolved_edges_make_no_forecast() -> None:
    cells = {(n,): edge(1 / n, 0.9 / n, 1.1 / n, "resolved" if n < 8 else "open") for n in (2, 4, 8)}
    of = made_up(cells, {"model.depth": [2, 4, 8]})
    assert not list(forecasts.made(of))
    named = made_up({(n,): e for n, e in zip("abc", [edge(0.1, 0.09, 0.11)] * 3, strict=True)}, {"data": list("abc")})
    assert not forecasts.lines(named)
    linear = made_up(
        {k: edge(1 / k[0], 0.9 / k[0], 1.1 / k[0]) for k in cells}, {"model.depth": [2, 4, 8]}, low=-1.0, resolution=0.1
    )
    assert not forecasts.lines(linear)


def along(edges: Mapping[float, float], **asked: Any) -> Frontier:
    return made_up({(n,): edge(e, 0.95 * e, 1.05 * e) for n, e in edges.items()}, {"model.depth": list(edges)}, **asked)


@pytest.fixture
def empty(tmp_path: Path) -> Study:
    planted.plant_frame(tmp_path / "s")
    return Study.load(tmp_path / "s")


def test_a_forecast_is_registered_once_and_scored_when_its_size_is_trained(empty: Study) -> None:
    file = empty.folder.forecast_file
    forecasts.register(empty.folder, along({2: 0.2, 4: 0.1}))
    assert not file.exists()
    forecasts.register(empty.folder, along(EDGES))
    text = file.read_bytes()
    forecasts.register(empty.folder, along({2: 0.21, 4: 0.11, 8: 0.052}))  # more trials have moved the edges
    assert file.read_bytes() == text
    (first,) = json.loads(text)["forecasts"]
    assert (first["size"], first["measured"]) == (16, [2, 4, 8]) and first["estimate"] == pytest.approx(0.025)

    of = along(EDGES | {16: 0.03})
    forecasts.register(empty.folder, of)
    kept, new = json.loads(file.read_text())["forecasts"]
    assert kept == first and (new["size"], new["measured"]) == (32, [2, 4, 8, 16])
    scored, ahead = frontier_page.forecast_sentences(empty, of)
    assert scored.startswith("At depth 16 the edge of the learning rate had been forecast at 0.0250 [0.0")
    ends = "and was measured at 0.0300 [0.0285, 0.0315]: off by a factor 1.2, {} the interval of the forecast."
    assert scored.endswith(ends.format("inside" if first["high"] > 0.03 else "outside"))
    assert ahead.startswith("At depth 32 the edge of the learning rate is forecast at ")
    far, _ = frontier_page.forecast_sentences(empty, along(EDGES | {16: 0.5}))
    assert far.endswith("off by a factor 20, outside the interval of the forecast.")
    other = along({2: 0.3, 4: 0.15, 8: 0.07}, holds="works")  # by another rule: a forecast of its own, none is scored
    forecasts.register(empty.folder, other)
    assert [f["holds"] for f in json.loads(file.read_text())["forecasts"]] == ["stable", "stable", "works"]
    assert len(list(frontier_page.forecast_sentences(empty, other))) == 1


def test_a_forecast_that_was_edited_is_neither_shown_nor_written_over(empty: Study) -> None:
    file, of = empty.folder.forecast_file, along(EDGES)
    forecasts.register(empty.folder, of)
    for text in (file.read_text().replace('"size": 16', '"size": 17'), "{", '{"format": 1, "forecasts": [3]}'):
        file.write_text(text)
        forecasts.register(empty.folder, of)
        assert file.read_text() == text
        (sentence,) = frontier_page.forecast_sentences(empty, of)
        assert sentence.startswith("Forecasts are not shown: forecast.json") and str(empty.folder.path) not in sentence


def test_the_forecast_is_drawn_where_it_was_made(study: Study) -> None:
    of = study.searched
    assert of is not None
    (one,) = forecasts.made(of)
    ax = forecast_plot.draw(of, [one])
    (point,) = [line for line in ax.lines if line.get_label() == "forecast"]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([16], [one.estimate])
    (known,) = [line for line in ax.lines if line.get_label() == "measured"]
    assert list(known.get_ydata()) == [cell.edge.estimate for cell in of.cells]


@pytest.mark.slow
def test_a_report_registers_the_forecast_unless_it_is_written_elsewhere(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_write_trials", lambda *of: [])  # the pages of the trials take most of the time
    copied = tmp_path / "searched"
    shutil.copytree(searched, copied)
    command.write_report(copied, lambda line: None, tmp_path / "out")
    assert not (copied / "forecast.json").exists()
    command.write_report(copied, lambda line: None)
    page = (copied / "report" / "report.md").read_bytes()
    (first,) = json.loads((copied / "forecast.json").read_text())["forecasts"]
    assert first["size"] == 16
    assert (tmp_path / "out" / "report.md").read_bytes() == page
    plant_edge(copied, 16, 0.03)
    command.write_report(copied, lambda line: None)
    assert json.loads((copied / "forecast.json").read_text())["forecasts"][0] == first
    assert (
        "At depth 16 the edge of the learning rate had been forecast at"
        in (copied / "report" / "report.md").read_text()
    )
    with (copied / "report" / "figures" / "forecast.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["at"] for row in rows] == ["depth 16", "depth 32"]
    assert float(rows[0]["measured"]) == pytest.approx(0.03, rel=0.05) and not rows[1]["measured"]

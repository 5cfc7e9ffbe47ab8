"""The report's sections on sensitivity and on what drives spikes: the numbers of `Study`, and reasons for no number."""

from __future__ import annotations

import math
import re
from pathlib import Path

import planted
import pytest
from conftest import blank_figures
from test_page import Page, markdown_tables, read, report_on, unescaped

from stabstudy.analysis import words
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study
from stabstudy.report import write_report


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 depths x 3 learning rates x 4 seeds, with spikes enough for a model of their rate; reported."""
    folder = planted.plant_study(tmp_path_factory.mktemp("drivers") / "planted", seeds=(0, 1, 2, 3), steps=200)
    with blank_figures():
        write_report(folder, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return read((path / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def study(path: Path) -> Study:
    return Study.load(path)


def test_sensitivity_is_that_of_the_study(page: Page, study: Study) -> None:
    head, *shown = page.table("LR sensitivity by combination")
    assert head == [
        "depth (layers)", "LR sensitivity", "seeds", "best rate", "excess above it", "largest usable rate",
        "basin (decades)", "logit exponent",
    ]  # fmt: skip
    for row, found in zip(shown, records(study.sensitivity()), strict=True):
        assert (row[0], row[2]) == (str(found["model.depth"]), "4")
        assert float(row[1]) == pytest.approx(found["lrs"], rel=5e-3)  # the seeds' curves are parallel: no interval
        # planted: 0.3 above the best at the first and the last of three rates, so 0.1 is left after a third of a decade
        assert row[3:] == ["0.01", "0.300", "0.01", "0.667", words.NOTHING]
    assert ["Growth of attention logits with size", "under 3 sizes"] in page.table("Not shown, and why")


def test_rates_times_and_shares_are_those_of_the_study(page: Page, study: Study) -> None:
    model = study.rate_model()
    assert f"{model.spikes} spikes in 24 trials of 4 seeds" in page.text
    rows = page.table("Ratios of spike rates")[1:]
    assert [row[:2] for row in rows] == [["depth", "per doubling"], ["learning rate", "per doubling"]]
    assert [float(row[2]) for row in rows] == pytest.approx(model.ratios["ratio"].tolist(), rel=5e-3)
    first = study.time_to_first_spike("optim.lr")
    free = [row for row in page.table("Trials free of spikes")[1:] if row[0] == "learning rate"]
    assert [(row[1], int(row[2]), int(row[3])) for row in free] == [("1e-3", 8, 0), ("0.01", 8, 1), ("0.1", 8, 8)]
    assert [row[5] for row in free] == [words.percent(v) for v in first.levels["free"]] == ["100 %", "88 %", "0 %"]
    assert first.p is not None and float(free[0][8]) == pytest.approx(2 * first.p, rel=0.1)  # Holm: the smaller of two
    shares = study.importance().set_index("metric")
    logit = next(row for row in page.table("Shares of variance") if row[0] == "largest attention logit")
    assert logit[2] == f"{100 * shares.loc['attn_logit_peak', 'optim.lr']:.0f} %"


def test_markdown_holds_the_same_sections(path: Path, page: Page) -> None:
    text = (path / "report" / "report.md").read_text()
    assert [[" ".join(c.split()) for c in row] for t in page.tables for row in t] == [
        row for t in markdown_tables(text) for row in t
    ]
    section = text.split("## Sensitivity and models", 1)[1].split("## Methods", 1)[0]
    said = [
        unescaped(line.strip()) for line in section.splitlines() if line and not line.startswith(("|", "**", "#", "!"))
    ]
    assert len(said) >= 4 and all(line in page.text for line in said)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_reasons_stand_where_numbers_do_not(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", seeds=(0, 1))
    planted.plant_trial(folder, planted.settings(6, 0.5, 1.0, 1, 120), status="oom", steps_done=3)
    planted.plant_trial(folder, planted.settings(6, 0.5, 1.0, 0, 120))
    reasons = dict(report_on(folder).table("Not shown, and why")[1:])
    hole = "the grid has a hole at learning rate 0.5, seed {} ({})"
    assert reasons["LR sensitivity at depth 2"] == hole.format(0, "no trial")
    assert reasons["LR sensitivity at depth 6"] == hole.format(1, "oom")
    assert reasons["Model of the spike rate"] == "2 seeds, and it needs 3"
    assert reasons["Shares of variance"] == "13 trials for 2 axes, and it needs 10 for each: mostly chance"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_hole_changes_nothing_beside_it(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,), seeds=(0, 1), lrs=(1e-2, 1e-1))
    for seed in (0, 1):
        planted.plant_trial(folder, planted.settings(4, 1e-2, 1.0, seed, 120), final_loss=2.5)
    page = report_on(folder)
    assert [row[:3] for row in page.table("LR sensitivity by combination")[1:]] == [
        ["2", page.table("LR sensitivity by combination")[1][1], "2"]
    ]
    hole = dict(page.table("Not shown, and why")[1:])["LR sensitivity at depth 4"]
    assert re.fullmatch(r"the grid has a hole at learning rate 0\.1, seed [01] \(no trial\)", hole)
    (limit,) = (item for item in page.items if item.startswith("Depth 2: every trial is stable up to "))
    assert "learning rate 0.01" in limit and limit.endswith("at 0.1, 2 of 2 are not.")


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_study_at_one_rate_says_so(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for depth in (2, 4):
        planted.plant_trial(tmp_path / "s", planted.settings(depth))
    reasons = dict(report_on(tmp_path / "s").table("Not shown, and why")[1:])
    assert reasons["LR sensitivity"] == "the learning rate does not vary"
    assert reasons["Time to the first spike"] == "no trial spiked or diverged"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_growth_is_shown_from_three_sizes_on(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for depth in (2, 4, 8):
        for lr in (1e-3, 1e-2):
            planted.plant_trial(tmp_path / "s", planted.settings(depth, lr), logit=1e3 * lr)  # x depth: the last layer
    head, *rows = report_on(tmp_path / "s").table("Attention logits by size")
    assert head == ["learning rate", "sizes", "depth exponent", "largest size", "reaches 1e4 at"]
    assert [row[:2] for row in rows] == [["1e-3", "3"], ["0.01", "3"]]
    assert [float(row[2]) for row in rows] == pytest.approx([1.0, 1.0], abs=1e-9)  # "1" or "1.000", by the last bit
    assert float(rows[1][4]) == pytest.approx(49_216 * 8 * 1e4 / 80, rel=0.2)  # 80 at 8 layers, about linear


def test_stable_and_behind_is_said(page: Page, study: Study) -> None:
    stable = study.trials["verdict"] == "stable"
    assert math.isclose(study.trials["final_loss"].max() - study.trials["final_loss"].min(), 0.3 + 0.1, abs_tol=1e-9)
    behind = int((stable & study.underperform).sum())
    assert behind == 8
    assert f"{behind} of {int(stable.sum())} stable trials ended over 0.2 nat/token above" in " ".join(page.items)

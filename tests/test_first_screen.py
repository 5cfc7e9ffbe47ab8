"""The first screen: three boxes that are never empty, with the numbers of the tables, and no claim from half a cell."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import tabled
import yaml
from test_recipe import ROUGH, change
from test_sentences import PENDING, Row, grid

from stabstudy.analysis import answer, compare, words
from stabstudy.analysis.elements import Answer, Bar, Box, Code, Folded, Point, Table, Text
from stabstudy.analysis.levels import records
from stabstudy.analysis.report import comparison_page, design_line, first_boxes, first_screen, html, methods, study_page
from stabstudy.analysis.report.design_line import settled
from stabstudy.analysis.study import Study

DATA = Path(__file__).parent / "data"
LR, CLIP, DEPTH = "optim.lr", "optim.clip", "model.depth"


def rows(**axes: Any) -> list[Row]:
    """Two depths, three rates, two thresholds, three seeds; rough at the largest rate, where the loss is higher."""
    own = grid(
        lambda r: 2.5 + 0.5 * (r[LR] == 0.3) + 0.05 * (r[CLIP] is None),
        model__depth=(2, 6), optim__lr=(3e-3, 0.03, 0.3), optim__clip=(1.0, None),
    )  # fmt: skip
    for row in own:
        if row[LR] == 0.3:
            row |= ROUGH | {"grad_norm_log_sd": 3 * row["grad_norm_log_sd"]}
    return [row | axes for row in own]


def boxes(study: Study, known: first_boxes.Shares | None = None) -> list[Box]:
    """Without shares of variance unless they are given: a forest takes a second."""
    return first_screen.boxes(study, known or first_boxes.Shares((), reason="not asked for"))


def text(box: Box) -> str:
    parts = []
    for item in box.items:
        if isinstance(item, Answer):
            parts.append(f"{item.text} {item.rest}")
        elif isinstance(item, Point):
            parts.append(f"{item.lead} {item.text}")
        elif isinstance(item, Bar):
            parts.append(", ".join(f"{c.number} {c.kind}" for c in item.counts))
        elif isinstance(item, Folded):
            parts.append(text(Box(item.title, item.items)))
        else:
            parts.append(item.text)
    return "\n".join(parts)


def test_the_first_box_counts_what_the_table_has() -> None:
    study = tabled.study(rows())
    stable = boxes(study)[0]
    assert stable.title == "Stable up to" and stable.items[0] == Answer("learning rate 0.03", "at both depths")
    verdicts = [row["verdict"] for row in study.tables.trials]
    (bar,) = (item for item in stable.items if isinstance(item, Bar))
    assert {c.kind: c.number for c in bar.counts} == {v: verdicts.count(v) for v in ("stable", "rough")}
    bad = sum(row["verdict"] != "stable" for row in study.tables.trials if row[LR] == 0.3)
    assert f"At 0.3, {bad} of 12 not stable. The limit lies between 0.03 and 0.3." in text(stable)


def test_limits_that_differ_stand_apart_and_open_ones_have_their_command() -> None:
    own = change(rows(), lambda r: r[DEPTH] == 2 and r[LR] == 0.3, verdict="stable")
    study = tabled.study(own)
    study.provenance["argv"] = ["sweep=depth_lr"]
    first = boxes(study)[0]
    assert [item for item in first.items if isinstance(item, Answer)] == [
        Answer("learning rate 0.3 or more", "the largest tried, at depth 2"),
        Answer("learning rate 0.03", "at depth 6"),
    ]
    assert "Depth 6: at 0.3, 6 of 6 not stable." in text(first) and "Depth 2: at" not in text(first)
    commands = [item for item in first.items if isinstance(item, Code)]
    assert [c.text for c in commands[:1]] == [answer.answer(study)["stable_up_to"][0]["next"]["stable"]]


def test_every_axis_is_answered_with_its_interval_the_null_ones_too() -> None:
    study = tabled.study(rows())
    drivers = boxes(study, first_boxes.shares(study))[1]
    claims = {(r["axis"], r["metric"]): r for r in records(study.claims())}
    points = {item.lead: item.text for item in drivers.items if isinstance(item, Point)}
    assert set(points) == {"Learning rate 3e-3 to 0.3:", "Clip threshold 1 to off:", "Depth 2 to 6:"}
    assert next(iter(points)).startswith("Learning rate"), "by its share of the variance"
    null = claims[CLIP, "grad_norm_log_sd"]
    texts = [words.number(null[end]) for end in ("estimate", "low", "high")]
    assert not null["clear"] and "no effect found on roughness, ×{} [{}, {}]".format(*texts) in "".join(points.values())
    loss = claims[LR, "final_loss"]
    shown = re.search(r"loss higher by (\S+) \[(\S+), (\S+)\]", next(iter(points.values())))
    assert shown is not None
    assert [float(v) for v in shown.groups()] == pytest.approx(
        [loss[end] for end in ("estimate", "low", "high")], rel=0.05
    )
    assert drivers.items[0].text == "learning rate" and "of the variance of roughness" in drivers.items[0].rest  # type: ignore[union-attr]
    share = study.importance().set_index("metric").loc["grad_norm_log_sd", LR]
    assert f"explains {100 * share:.0f} %" in text(drivers)


def test_a_recipe_can_be_typed_as_it_stands() -> None:
    study = tabled.study(rows())
    use = boxes(study)[2]
    recipes = answer.answer(study)["recipes"]
    codes = [item.text for item in use.items if isinstance(item, Code) and not item.title]
    typed = [dict(word.split("=") for word in code.split()) for code in codes]
    assert {tuple(yaml.safe_load(v) for v in t.values()) for t in typed} == {tuple(r["use"].values()) for r in recipes}
    assert all(words.number(r["final_loss"]["mean"], 4) in text(use) for r in recipes)
    assert "Edge of the grid: the smallest learning rate" in text(use)


def test_answers_beyond_the_first_are_folded_and_none_is_lost() -> None:
    """Eight cases of which one changed something, and recipes of many settings under two conditions."""
    own = [row for row in rows() if row[CLIP] == 1.0 and row[LR] != 0.3]
    base = [row for row in own if row[LR] == 0.03]
    cases = [
        row
        | {
            CLIP: 2.0 + i,
            "case": f"c{i}",
            "grad_norm_log_sd": (5 + 0.05 * row["seed"] if i == 7 else 1) * row["grad_norm_log_sd"],
        }
        for i in range(8)
        for row in base
    ]
    drivers = boxes(tabled.study([*own, *cases]))[1]
    points = [item for item in drivers.items if isinstance(item, Point)]
    (folded,) = (item for item in drivers.items if isinstance(item, Folded))
    inside = [item for item in folded.items if isinstance(item, Point)]
    assert len(points) == first_boxes.FIRST_AXES and folded.title == f"{len(inside)} more"
    leads = " ".join(point.lead for point in [*points, *inside])
    assert all(f"Case c{i} " in leads for i in range(8))
    assert any("Case c7 " in point.lead for point in points), "the case with an effect comes first"


# A study at work


def _late(row: Row) -> bool:
    return row[DEPTH] == 6 and row[LR] == 0.3 and row["seed"] > 0


def test_of_half_a_cell_nothing_is_claimed() -> None:
    """B7: one trial of three is rough at the largest rate and two have not run; that is no statement on the rate."""
    whole, half = tabled.study(rows()), tabled.study(change(rows(), _late, **PENDING))
    said, all_said = ("\n".join(map(text, boxes(study))) for study in (half, whole))
    assert "6 of 6" in all_said.replace("12 of 12", "6 of 6") and "not stable" in all_said
    assert "at depth 2" in boxes(half)[0].items[0].rest  # type: ignore[union-attr]
    assert "No limit yet at depth 6: 4 trials still to come." in said
    assert not re.search(r"[12] of (2|4|6|12|3) (trials )?(is|are)? ?not", said)
    assert "From the 10 of 12 cells that have ended." in said and "From the" not in all_said
    assert {row["cell_id"] for row in settled(half).tables.trials} == {
        row["cell_id"] for row in half.tables.trials if not (row[DEPTH] == 6 and row[LR] == 0.3)
    }


def test_a_recipe_of_a_study_at_work_has_no_margin_from_half_a_cell() -> None:
    own = [row | {"n_evaluable": 400} for row in rows() if row[CLIP] == 1.0]
    (two, six) = answer.answer(tabled.study(change(own, _late, **PENDING)))["recipes"]
    assert two["margin"]["unstable_at"] == 0.3 and six["margin"]["unstable_at"] is None
    assert six["margin"]["tried_to"] == 0.3 and six["next"] is None
    (_, done) = answer.answer(tabled.study(own))["recipes"]
    assert done["margin"]["unstable_at"] == 0.3


# What is trained, and what is asked


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (lambda r: True, "36 trials = 2 depths × 3 learning rates × 2 clip thresholds × 3 seeds"),
        (lambda r: r[DEPTH] == 2 and r[LR] == 0.03 and r[CLIP] and not r["seed"], "1 trial"),
        (lambda r: r[LR] == 0.03 and r[CLIP], "6 trials = 2 depths × 3 seeds"),
        (lambda r: r[LR] != 0.3 or r["seed"] < 2, "32 trials: 32 of the 36 of 2 depths × 3 learning rates × 2 clip "),
    ],
)
def test_the_design_is_a_line(chosen: Any, line: str) -> None:
    own = [row | {"steps_planned": 200} for row in rows() if chosen(row)]
    assert design_line.design(tabled.study(own)).startswith(line)


def test_cases_stand_beside_the_grid() -> None:
    own = [row | {"steps_planned": 200} for row in rows() if row[CLIP] == 1.0]
    case = [row | {CLIP: 0.2, "case": "tight"} for row in own if row[DEPTH] == 2 and row[LR] == 0.03]
    line = design_line.design(tabled.study([*own, *case]))
    assert line.startswith("21 trials = (2 depths × 3 learning rates × 3 seeds) + 3 trials of 1 case")


@pytest.mark.parametrize(("number", "said"), [(38400, "38k"), (1.25e6, "1.2M"), (3e9, "3B"), (950, "950")])
def test_large_numbers_are_short(number: float, said: str) -> None:
    assert design_line.short(number) == said


def test_the_question_of_another_sweep_is_not_kept(tmp_path: Path) -> None:
    """B6: trials that vary in what the last launch held fixed are another launch's."""
    planted.plant_frame(tmp_path / "s", "Does it fall?")
    for depth in (2, 6):
        planted.plant_trial(tmp_path / "s", planted.settings(depth))
    sweep = tmp_path / "s" / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"question": "Does it fall?", "settings": {"optim.lr": 3e-3}}))
    assert Study.load(tmp_path / "s").question == "Does it fall?"
    sweep.write_text(yaml.safe_dump({"question": "Does it fall?", "settings": {"optim.lr": 3e-3, "model.depth": 6}}))
    assert Study.load(tmp_path / "s").question == "What does depth change?"


# Every kind of study has three boxes


KINDS = {
    "grid": lambda tmp: tabled.study(rows()),
    "no trial": lambda tmp: tabled.study([]),
    "one trial": lambda tmp: tabled.study(rows()[:1]),
    "one cell": lambda tmp: tabled.study(rows()[:3]),
    "no learning rate": lambda tmp: tabled.study([r for r in rows() if r[LR] == 0.03]),
    "diverged": lambda tmp: tabled.study([r | {"verdict": "diverged", "verdict_rule": "nonfinite"} for r in rows()]),
    "nothing has ended": lambda tmp: tabled.study(change(rows(), lambda r: True, **PENDING)),
    "kto": lambda tmp: tabled.study(rows(**{"objective.kind": "kto"})),
    "ingested": lambda tmp: Study.load(DATA / "ingested"),
    "half done": lambda tmp: Study.load(DATA / "unfinished"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_boxes_and_none_is_empty(kind: str, tmp_path: Path) -> None:
    made = boxes(KINDS[kind](tmp_path))
    assert len(made) == 3 and len({box.title for box in made}) == 3
    for box in made:
        assert any(isinstance(item, Answer) for item in box.items) and len(text(box)) > 20
        assert not re.search(r"\bnan\b|None(?! of)|\b0 (stable|spiky|rough|diverged)\b", text(box))
        assert all(c.number > 0 for item in box.items if isinstance(item, Bar) for c in item.counts)
        assert all(item.text.endswith(".") for item in box.items if isinstance(item, Text))
    if kind == "kto":
        assert "nat" not in "".join(map(text, made))


@pytest.mark.parametrize("kind", ["lm", "kto"])
def test_the_loss_of_kto_has_no_unit_in_the_methods(kind: str) -> None:
    own = [row | {"objective.kind": kind} for row in rows()]
    table = methods._definitions(compare.in_nats(tabled.study(own).trials))
    units = {row[1]: row[3] for row in table.rows}
    assert units["final_loss_capped"] == ("" if kind == "kto" else "nat/token")
    assert units["grad_norm_log_sd"] == words.unit_of("grad_norm_log_sd", True)


def test_runs_trained_elsewhere_have_their_table_first() -> None:
    study = Study.load(DATA / "ingested")
    first, second = study_page.report(study).sections[:2]
    table = first.blocks[0]
    assert (first.title, first.link, second.title) == ("Runs", study_page.RUNS_PAGE, "What was read")
    assert isinstance(table, Table) and len(table.rows) == len(study.trials)


def test_a_comparison_has_them_too(tmp_path: Path) -> None:
    folders = [planted.plant_study(tmp_path / name, depths=(2,), lrs=(1e-3,)) for name in "ab"]
    report = comparison_page.report([Study.load(folder) for folder in folders])
    assert [box.title for box in report.boxes] == ["Stable", "What differs", "Use"]
    assert all(len(text(box)) > 20 for box in report.boxes)


# In a browser

CHROMIUM = next((c for c in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(c)), None)


@pytest.fixture(scope="module")
def page_of_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study like that of the quickstart."""
    folder = tmp_path_factory.mktemp("screen") / "quickstart"
    planted.plant_frame(folder, "How rough does training get as the learning rate rises, and does clipping smooth it?")
    for i, row in enumerate(rows()):
        config = planted.settings(row[DEPTH], row[LR], row[CLIP], row["seed"], 150)
        rough = dict.fromkeys((60, 75, 90, 105, 120), 8.0) if row[LR] == 0.3 else {}
        planted.plant_trial(folder, config, spikes=rough, log_sd=0.08 + 0.001 * i, final_loss=row["final_loss"])
    file = folder / "index.html"
    file.write_text(html.html_index(study_page.report(Study.load(folder))))
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=shutil.which(str(CHROMIUM)), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


BOTTOM = "(name) => Math.max(...[...document.querySelectorAll(name)].map((e) => e.getBoundingClientRect().bottom))"
TOP = "(name) => document.querySelector(name).getBoundingClientRect().top"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium")
def test_the_answer_is_on_the_first_screen(page_of_quickstart: Path, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(page_of_quickstart.as_uri())
    for name in (".boxes .box", ".sketch img", ".warnings"):
        assert 0 < page.evaluate(BOTTOM, name) <= 900, name
    assert page.locator(".boxes .box").count() == 3 and page.locator(".sketch").count() == 3
    assert page.evaluate(TOP, "#methods") < 5400
    assert page.locator("nav.contents").evaluate("(e) => getComputedStyle(e).position") == "sticky"
    assert page.locator(".screen a[href^='trials/']").count() >= 3
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("nav.contents").evaluate("(e) => e.getBoundingClientRect().height") < 50
    axe = Path(str(importlib.util.find_spec("axe_playwright_python").origin)).with_name("axe.min.js")  # type: ignore[union-attr]
    checked = browser.new_context(bypass_csp=True).new_page()
    checked.goto(page_of_quickstart.as_uri())
    checked.add_script_tag(content=axe.read_text())
    assert [v["id"] for v in checked.evaluate("axe.run()")["violations"]] == []


def test_too_few_trials_have_no_shares() -> None:
    assert first_boxes.shares(tabled.study(rows()[:20])).reason is not None
    assert first_boxes.shares(tabled.study(rows()[:3])).reason == "nothing varies but the seed"
    assert study_page.RUNS_PAGE[0] == "runs.html"

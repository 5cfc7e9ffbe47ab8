"""The step explorer of a trial's page in a real browser: it shows the record, and its view is in the address."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from test_browser import AXE, OPEN_ALL, Opened, browser, playwright, pytestmark, until  # noqa: F401

from stabstudy.analysis.elements import Drawing, Figure, Section, Table, TrialPage
from stabstudy.analysis.figures import step_data
from stabstudy.analysis.loss_levels import LossLevels
from stabstudy.analysis.report import trial_page
from stabstudy.analysis.report.assets import ASSETS, write_assets
from stabstudy.analysis.report.html import html_trial
from stabstudy.analysis.study import Study
from stabstudy.trace import TRACE, Rows

STEPS = 200


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """One rough trial, with spikes at steps 60, 75, 90 and 105."""
    folder = tmp_path_factory.mktemp("explorer") / "planted"
    planted.plant_frame(folder)
    planted.plant_trial(folder, planted.settings(steps=STEPS), spikes=dict.fromkeys(planted.ROUGH, 8.0))
    study = Study.load(folder)
    write_assets(study, list(study.trials.index), folder / "report" / ASSETS)
    return study


@pytest.fixture(scope="module")
def page_file(study: Study) -> Path:
    (trial_id,) = study.trials.index
    page = trial_page.page(study, trial_id, frozenset({trial_id}), drawn=True)
    file = study.folder.path / "report" / "trials" / f"{trial_id}.html"
    file.parent.mkdir()
    file.write_text(html_trial(trial_page.with_figures(study, page), ""), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def shared(page_file: Path, browser: Any) -> Iterator[Opened]:  # noqa: F811
    """One page for all tests that leave it as it was: the library takes a second to load."""
    at = opened(browser, page_file)
    with at:
        yield at


@pytest.fixture
def page(shared: Opened) -> Any:
    """All of its steps, and nothing kept."""
    shared.page.get_by_title("every step").click()
    shared.page.mouse.move(5, 5)
    return shared.page


def opened(browser: Any, file: Path, address: str = "", **context: Any) -> Opened:  # noqa: F811
    """The page at this address, its charts drawn."""
    at = Opened(browser, file, address, **{"viewport": {"width": 1280, "height": 1100}} | context)
    at.page.wait_for_selector(".steps .xtick")
    return at


def view(page: Any) -> tuple[int, int]:
    """The steps that it shows."""
    return int(page.get_by_label("from step").input_value()), int(page.get_by_label("to step").input_value())


def choose(page: Any, first: int, last: int) -> None:
    """Type both ends."""
    for name, step in (("from step", first), ("to step", last)):
        page.get_by_label(name).fill(str(step))
        page.get_by_label(name).blur()
    until(page, f"document.querySelector('.steps').layout.xaxis.range[1] === {last + 0.5}")


def said(page: Any) -> str:
    return str(page.locator(".explore + output").text_content())


def plot(page: Any, expression: str) -> Any:
    """What the library knows of the drawing, `p`."""
    return page.evaluate(f"(() => {{ const p = document.querySelector('.steps'); return {expression}; }})()")


def place_of(page: Any, step: float) -> tuple[float, float]:
    """Where in the window a step is, in the upper panel."""
    page.locator(".steps").scroll_into_view_if_needed()
    x, y = plot(page, f"[p._fullLayout.xaxis.d2p({step}) + p._fullLayout._size.l, p._fullLayout.yaxis._offset + 40]")
    box = page.locator(".steps").bounding_box()
    return box["x"] + x, box["y"] + y


def hash_of(page: Any) -> str:
    return str(page.evaluate("location.hash"))


def ema(loss: Any) -> list[float]:
    """By hand: its share of a new value is 2 / (20 + 1)."""
    means = [float(loss[0])]
    for value in loss[1:]:
        means.append(means[-1] + 2 / 21 * (float(value) - means[-1]))
    return means


def test_dragging_shows_a_rectangle_and_chooses_the_steps_under_it(page: Any) -> None:
    assert view(page) == (0, STEPS - 1)
    (x, y), (to, _) = place_of(page, 100), place_of(page, 120)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + to) / 2, y + 150, steps=3)
    page.mouse.move(to, y + 150, steps=3)
    rectangle = page.locator(".steps .zoombox-corners").first.bounding_box()
    assert rectangle["width"] > (to - x) / 2 and page.evaluate("String(getSelection())") == ""
    page.mouse.up()
    until(page, "location.hash.startsWith('#steps')")
    a, b = view(page)
    assert abs(a - 100) <= 1 and abs(b - 120) <= 1 and hash_of(page) == f"#steps={a}-{b}"
    page.mouse.dblclick(x, y)
    until(page, "!location.hash.includes('steps=')")
    assert view(page) == (0, STEPS - 1)


def test_the_cursor_says_what_is_recorded_and_a_click_keeps_the_step(study: Study, page: Any) -> None:
    (trial_id,) = study.trials.index
    rows = study.trace(trial_id)
    norm, loss, clip = (rows[name][75] for name in ("grad_norm", "loss", "clip_scale"))
    x, y = place_of(page, 75)
    page.mouse.move(x + 1, y)
    until(page, "document.querySelector('.explore + output').textContent.startsWith('step 75, ')")
    mean = ema(rows["loss"])[75]
    values = f"step 75, norm {norm:.4g}, loss {loss:.4g}, EMA {mean:.4g}, "
    assert f", factor of clipping {clip:.4g}, " in said(page)
    assert said(page).startswith(values) and said(page).endswith(", in a spike")
    page.locator(".steps").focus()
    page.keyboard.press("ArrowRight")
    until(page, "document.querySelector('.explore + output').textContent.startsWith('step 76, ')")
    assert said(page).startswith(f"step 76, norm {rows['grad_norm'][76]:.4g}, ")
    page.mouse.move(x, y + 2)
    until(page, "document.querySelector('.explore + output').textContent.startsWith('step 75, ')")
    page.mouse.click(x, y + 2)
    until(page, "location.hash.startsWith('#step=')")
    assert hash_of(page) == "#step=75"
    page.mouse.move(5, 5)
    until(page, "document.querySelector('.explore + output').textContent.startsWith('step 75, ')")


def test_the_address_brings_the_view_back(page_file: Path, browser: Any) -> None:  # noqa: F811
    with opened(browser, page_file, "#steps=120-180") as page:
        assert view(page) == (120, 180) and said(page) == "61 of 200 recorded steps"
        page.evaluate("location.hash = '#step=90'")
        until(page, "document.querySelector('[aria-label=\"from step\"]').value === '65'")
        assert view(page) == (65, 115) and said(page).startswith("step 90, ")
        page.get_by_role("link", name="105").first.click()  # of the table of spikes
        until(page, "document.querySelector('[aria-label=\"from step\"]').value === '80'")
        assert view(page) == (80, 130) and "step=105" in hash_of(page)
        assert page.locator(".steps").bounding_box()["y"] < 600  # scrolled to


def test_buttons_go_from_spike_to_spike_and_through_the_steps(study: Study, page: Any) -> None:
    (spikes,) = study.spikes_by_trial.values()
    peaks = sorted({s["peak_step"] for s in spikes})
    for step in (*peaks, peaks[0]):  # and round
        page.get_by_title("next spike").click()
        assert view(page) == (step - 25, step + 25) and said(page).startswith(f"step {step}, ")
    page.get_by_title("previous spike").click()
    assert said(page).startswith(f"step {peaks[-1]}, ")
    page.get_by_title("zoom in").click()
    a, b = view(page)
    assert b - a == 24 and a < peaks[-1] < b
    page.get_by_title("zoom out").click()
    assert view(page) == (peaks[-1] - 25, peaks[-1] + 25)
    page.get_by_title("every step").click()
    assert view(page) == (0, STEPS - 1) and hash_of(page) == "#trace"


def test_scales_smoothing_and_probes_can_be_chosen(study: Study, page: Any) -> None:
    (trial_id,) = study.trials.index
    probes = study.probes(trial_id)
    assert probes is not None
    kinds = "[p._fullLayout.yaxis.type, p._fullLayout.yaxis2.type]"
    assert plot(page, kinds) == ["log", "linear"]
    for name, kind in (("norm", "linear"), ("loss", "log")):
        page.get_by_label(f"scale of the {name}").select_option(kind)
    until(page, "document.querySelector('.steps')._fullLayout.yaxis2.type === 'log'")
    assert plot(page, kinds) == ["linear", "log"]
    for name, kind in (("norm", "log"), ("loss", "linear")):
        page.get_by_label(f"scale of the {name}").select_option(kind)
    bold = "p.data.filter((t) => t.line && t.line.width > 2).map((t) => [...t.y])"
    assert plot(page, bold) == [pytest.approx(ema(study.trace(trial_id)["loss"]), rel=1e-6)]
    notes = plot(page, "p.layout.shapes.map((s) => s.label?.text)")
    assert {"warmup ends", "clip 1", "untrained model 5.50"} <= set(notes)
    page.get_by_label("EMA").uncheck()
    until(page, "!document.querySelector('.steps').data.some((t) => t.line && t.line.width > 2)")
    page.get_by_label("EMA").check()
    x, y = plot(page, "(({ x, y }) => [[...x], [...y]])(p.data.find((t) => t.yaxis === 'y3'))")
    assert x == probes["step"].tolist() and y == pytest.approx(probes["attn_logit_max"].max(axis=1), rel=1e-6)
    page.get_by_label("below", exact=True).select_option("nothing")
    until(page, "!document.querySelector('.steps').data.some((t) => t.yaxis === 'y3')")
    page.get_by_label("below", exact=True).select_option(index=0)


def test_every_zoom_has_ticks_and_shows_what_is_marked(study: Study, page: Any) -> None:
    (trial_id,) = study.trials.index
    rows = study.trace(trial_id)
    ticks = "['x', 'y', 'y2'].map((a) => p.querySelectorAll(`.${a}tick text`).length)"
    for a, b in ((60, 62), (110, 117), (3, 55), (0, 199)):
        choose(page, a, b)
        assert min(plot(page, ticks)) >= 3, (a, b, plot(page, ticks))
        shaded = [s for s in study.spikes_by_trial[trial_id] if s["end"] >= a and s["start"] <= b]
        assert len(plot(page, "p.layout.shapes.filter((s) => s.type === 'rect')")) == len(shaded)
    rings = plot(page, "(({ x, y }) => [[...x], [...y]])(p.data.find((t) => t.marker?.symbol === 'circle-open'))")
    assert len(rings[0]) == study.row(trial_id)["spike_abs_steps"] > 0
    assert rings[1] == pytest.approx(rows["grad_norm"][rings[0]], rel=1e-6)


def test_the_steps_in_view_are_saved(study: Study, page: Any, tmp_path: Path) -> None:
    (trial_id,) = study.trials.index
    rows = study.trace(trial_id)
    for first, last, name in ((0, STEPS - 1, ""), (50, 59, "-steps-50-59")):
        choose(page, first, last)
        with page.expect_download() as download:
            page.get_by_title("these steps as CSV").click()
        assert download.value.suggested_filename == f"{trial_id}{name}.csv"
        download.value.save_as(tmp_path / "saved.csv")
        table = list(csv.DictReader((tmp_path / "saved.csv").read_text().splitlines()))
        assert [int(r["step"]) for r in table] == list(range(first, last + 1))
        for column in ("grad_norm", "loss", "clip_scale"):
            assert [float(r[column]) for r in table] == pytest.approx(rows[column][first : last + 1], rel=1e-6)


def test_pictures_are_saved(page: Any, tmp_path: Path) -> None:
    for name in ("PNG", "SVG"):
        with page.expect_download() as download:
            page.locator("#trace-figure").get_by_role("link", name=name).click()
        download.value.save_as(tmp_path / name)
    assert (tmp_path / "PNG").read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "SVG").read_text()


def test_only_the_library_is_loaded_and_nothing_complains(shared: Opened, page: Any, page_file: Path) -> None:
    for scheme, ink in (("dark", "rgb(230, 237, 243)"), ("light", "rgb(31, 35, 40)")):
        page.emulate_media(color_scheme=scheme)
        until(page, f"getComputedStyle(document.querySelector('.steps .tracemean .js-line')).stroke === '{ink}'")
    library = (page_file.parents[1] / "assets" / "plotly.js").as_uri()
    requests = {u for u in shared.requests if not u.startswith(("data:", "blob:"))}
    assert requests == {page_file.as_uri(), library} and shared.complaints == []


@pytest.mark.parametrize("script", [True, False])
def test_without_the_library_or_the_script_the_picture_stands(
    page_file: Path,
    browser: Any,  # noqa: F811
    tmp_path: Path,
    script: bool,
) -> None:
    alone = tmp_path / "trials" / page_file.name
    alone.parent.mkdir()
    alone.write_bytes(page_file.read_bytes())
    with Opened(browser, alone, java_script_enabled=script) as page:
        if script:
            page.get_by_text("assets/plotly.js is missing").wait_for()
        assert page.locator("#trace-figure img").is_visible() and page.locator(".explore, .steps").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [800, 390])
def test_narrow_windows_do_not_overflow_and_can_be_touched(page_file: Path, browser: Any, width: int) -> None:  # noqa: F811
    with opened(browser, page_file, viewport={"width": width, "height": 900}, has_touch=True, is_mobile=True) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert plot(page, "p.layout.dragmode") is False  # a finger scrolls the page
        page.get_by_title("next spike").tap()
        assert said(page).startswith("step 60, ")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page_file: Path, browser: Any, scheme: str) -> None:  # noqa: F811
    with opened(browser, page_file, "#step=75", color_scheme=scheme, bypass_csp=True) as page:
        page.evaluate(OPEN_ALL)
        page.add_script_tag(content=AXE.read_text())
        found = page.evaluate("axe.run('#trace-figure')")
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []


@pytest.mark.slow
def test_a_hundred_thousand_steps_lose_no_spike(study: Study, browser: Any) -> None:  # noqa: F811
    n, random = 100_000, np.random.default_rng(0)
    columns = {c.name: np.full(n, 0.5) for c in TRACE.columns}
    columns |= {"step": np.arange(n), "grad_norm": random.lognormal(size=n), "loss": random.lognormal(size=n)}
    columns["grad_norm"][77_777], columns["loss"][55_555], columns["grad_norm"][33_333] = 1e6, 1e5, math.nan
    rows = Rows(TRACE, columns, {name: np.zeros(n, bool) for name in columns})
    (trial_id,) = study.trials.index
    levels = LossLevels(20, columns["loss"], None, "first loss", None)
    row = study.row(trial_id) | {"trial_id": trial_id}
    steps = step_data.steps(rows, None, row, [], np.zeros(n, bool), levels)
    assert len(steps["steps"][0]) >= 4 * n  # whole
    picture = Drawing('<svg xmlns="http://www.w3.org/2000/svg" width="100pt" height="50pt"/>')
    figure = Figure("trace-figure", "t", picture, "a picture", "c", Table("n", ("a",), ()), steps=steps)
    page_of = TrialPage(trial_id, "s", "t", "stable", "●", [], [Section("trace", "t", [figure])], frozenset())
    file = study.folder.path / "report" / "trials" / "long.html"
    file.write_text(html_trial(page_of, ""))
    with opened(browser, file) as page:
        for y, peak in (("y", 1e6), ("y2", 1e5)):
            lines = f"[...p.querySelectorAll('.x{y} path.js-line')].map((one) => one.getAttribute('d')).join('')"
            path = plot(page, lines)
            top = plot(page, f"p._fullLayout.{y.replace('y', 'yaxis')}.d2p({peak})")
            drawn = [float(v) for v in re.findall(r"[ML,V]?(?:-?[\d.]+,)?(-?[\d.]+)", path)]
            assert len(path) < 500_000 and min(drawn) == pytest.approx(top, abs=0.1)
        assert plot(page, "p.data.find((t) => t.marker?.symbol === 'x').x") == [33_333]
        choose(page, 77_770, 77_790)
        assert page.locator(".steps .xy .point").count() == 23  # those beside the frame, and what is in it

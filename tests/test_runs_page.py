"""The page of all runs, in a browser too, and the scripts beside the pages."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
from test_browser import AXE, CHROMIUM, CONTRASTS, Opened, playwright, until
from test_page import PAYLOADS

from stabstudy.analysis.report import assets, runs_page, study_page
from stabstudy.analysis.report.html import TEMPLATES, html_runs
from stabstudy.analysis.study import Study

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium")]

LONG, SPIKE = 5_000, 3_217


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twelve trials of a grid, a diverged one, one with a hostile case, and a long one with a spike of one step."""
    folder = planted.plant_study(tmp_path_factory.mktemp("runs") / "planted")
    diverged = planted.settings(6, 0.5, 1.0, 0, 120)
    planted.plant_trial(folder, diverged, nonfinite_at=70, steps_done=71, final_loss=math.nan, stop_reason="diverged")
    hostile = "</script><script>document.body.innerHTML = 'owned'</script>' " + " ".join(PAYLOADS)
    planted.plant_trial(folder, planted.settings(2, 0.7, None, 1, 120), case=hostile)
    planted.plant_trial(folder, planted.settings(2, 3e-3, 1.0, 0, LONG), spikes={SPIKE: 50.0}, log_sd=0.3)
    return Study.load(folder)


@pytest.fixture(scope="module")
def page(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs.html with its assets, written as `publish` does."""
    folder = tmp_path_factory.mktemp("page")
    assets.write_assets(study, list(study.trials.index), folder / assets.ASSETS)
    (folder / runs_page.RUNS).write_text(html_runs(runs_page.page(study, study_page.paged(study))))
    return folder / runs_page.RUNS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=shutil.which(str(CHROMIUM)), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


SHOWN = "[...all.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[0].textContent.trim())"
NONE = "#trials="  # no run is chosen, so the library is not loaded
DRAWN = "[...curves.data].map((d) => [d.name, d.yaxis, [...d.x], [...d.y], d.visible !== false])"


class At(Opened):
    """The page with this end of its address."""

    def __init__(self, browser: Any, page: Path, end: str, **context: Any):
        class Address:
            def as_uri(self) -> str:
                return page.as_uri() + end

        super().__init__(browser, Address(), **context)  # type: ignore[arg-type]


def drawn(opened: Any) -> list[Any]:
    """The curves of the overlay, once they are there."""
    until(opened, "document.getElementById('curves').data?.length > 0")
    lines: list[Any] = opened.evaluate(DRAWN)
    return lines


Mask = Callable[[pd.DataFrame], Any]

FILTERS: list[tuple[str, Mask]] = [
    ("depth=6", lambda t: t["model.depth"] == 6),
    ("depth != 6".replace(" ", ""), lambda t: t["model.depth"] != 6),
    ("lr>0.01", lambda t: t["optim.lr"] > 0.01),
    ("lr>=1e-2", lambda t: t["optim.lr"] >= 0.01),
    ("lr=1e-3..1E-2", lambda t: t["optim.lr"].between(1e-3, 1e-2)),
    ("lr=..1e-3", lambda t: t["optim.lr"] <= 1e-3),
    ("learning_rate=0.001,.1", lambda t: t["optim.lr"].isin([1e-3, 0.1])),
    ('"Learning rate"=1e-1', lambda t: t["optim.lr"] == 0.1),
    ("optim.lr<2e-3", lambda t: t["optim.lr"] < 2e-3),
    ("clip=off", lambda t: t["optim.clip"].isna()),
    ("clip=1", lambda t: t["optim.clip"] == 1),
    ("verdict=rough,spiky depth=6", lambda t: t["verdict"].isin(["rough", "spiky"]) & (t["model.depth"] == 6)),
    ("depth=6 lr>0.03 verdict=rough spikes>=2", lambda t: (t["model.depth"] == 6) & (t["optim.lr"] > 0.03)
        & (t["verdict"] == "rough") & (t["spike_events"] >= 2)),
    ("x3_rate>1%", lambda t: t["spike_abs_rate"] > 0.01),
    ("x3_rate>0.01", lambda t: t["spike_abs_rate"] > 0.01),
    ("final_loss<2.4", lambda t: t["final_loss"] < 2.4),
    ("STABLE", lambda t: t["verdict"] == "stable"),
    ("stable seed=1", lambda t: (t["verdict"] == "stable") & (t["seed"] == 1)),
    ("lr>", lambda t: t["seed"] >= 0),
    ("nothing-like-this", lambda t: t["seed"] < 0),
]  # fmt: skip


def test_a_filter_finds_what_the_tables_say(study: Study, page: Path, browser: Any) -> None:
    with At(browser, page, NONE) as opened:
        for text, mask in FILTERS:
            opened.get_by_label("Filter", exact=False).fill(text)
            wanted = set(study.trials.index[mask(study.trials)])
            assert set(opened.evaluate(SHOWN)) == wanted, text
            assert len(wanted) < len(study.trials) or text == "lr>"
            assert opened.locator(".filter output").text_content() == f"{len(wanted)} of {len(study.trials)} rows"


MISSPELT = {
    "lrr=3": "no column is called lrr; the nearest are lr, ",
    "verdikt=rough": "no column is called verdikt; the nearest are verdict, ",
    "lr>fast": "fast is no number",
}


def test_a_misspelt_filter_is_named_and_asks_nothing(study: Study, page: Path, browser: Any) -> None:
    with At(browser, page, NONE) as opened:
        for text, line in MISSPELT.items():
            opened.get_by_label("Filter", exact=False).fill(f"depth=6 {text}")
            assert line in opened.locator(".filter output.wrong").text_content()
            assert len(opened.evaluate(SHOWN)) == (study.trials["model.depth"] == 6).sum()
        opened.get_by_label("Filter", exact=False).fill("depth=6")
        assert opened.locator(".wrong").count() == 0


def test_rows_are_in_the_order_of_their_settings_and_sort(study: Study, page: Path, browser: Any) -> None:
    trials = study.trials.sort_values(["model.depth", "optim.lr", "seed"]).groupby("model.depth", sort=True)
    with At(browser, page, NONE) as opened:
        order = opened.evaluate(SHOWN)
        depths = list(study.trials.loc[order, "model.depth"])
        assert depths == sorted(depths) and order != sorted(order) and len(trials) == 2
        opened.get_by_role("button", name="final loss", exact=True).click()
        losses = study.trials.loc[opened.evaluate(SHOWN), "final_loss"].dropna()
        assert list(losses.round(3)) == sorted(losses.round(3))


def test_chosen_runs_are_overlaid_with_their_own_numbers(study: Study, page: Path, browser: Any) -> None:
    done = study.trials[(study.trials["state"] == "done") & (study.trials["steps_done"] == 120)].index[:2]
    with Opened(browser, page) as opened:
        opened.get_by_role("button", name="Choose none").click()
        for trial_id in done:
            opened.locator(f"#all input[value='{trial_id}']").check()
        until(opened, "document.getElementById('curves').data?.length === 6")
        for name, axis, x, y, _ in drawn(opened):
            rows = study.probes(name) if axis == "y3" else study.trace(name)
            assert rows is not None
            values = {"y": "grad_norm", "y2": "loss", "y3": "attn_logit_max"}[axis or "y"]
            exact = rows[values].max(axis=1) if axis == "y3" else rows[values]
            assert x == list(rows["step"]) and y == pytest.approx(list(exact), rel=1e-6)
        opened.get_by_label("Also show").select_option(label="update RMS")
        until(opened, "document.getElementById('curves').data?.length === 8")
        opened.get_by_label("Also show").select_option(label="KL")
        until(opened, "document.getElementById('note').textContent.endsWith(': KL.')")
        hide = opened.locator("#legend button").first
        hide.focus()
        opened.keyboard.press("Enter")
        until(opened, "document.querySelector('#legend button[aria-pressed=false]')")
        visible = {name for name, _, _, _, shown in drawn(opened) if shown}
        assert len(visible) == 1


def test_one_cursor_reads_every_panel(study: Study, page: Path, browser: Any) -> None:
    trial_id = study.trials.index[study.trials["optim.lr"] == 1e-2][0]
    rows = study.trace(trial_id)
    with At(browser, page, f"#trials={trial_id}") as opened:
        drawn(opened)
        opened.locator("#curves").focus()
        opened.keyboard.press("ArrowRight")
        until(opened, "document.querySelector('#legend caption').textContent.includes('step')")
        step = int(re.findall(r"\d+", opened.locator("#legend caption").text_content())[0])
        texts = opened.locator("#legend tbody tr td.n").all_text_contents()
        assert texts[:2] == [f"{rows[n][step]:.4g}" for n in ("grad_norm", "loss")] and len(texts) == 3
        low, high = opened.evaluate("curves.layout.xaxis.range")
        opened.keyboard.press("+")
        until(opened, "location.hash.includes('steps=')")
        assert np.diff(opened.evaluate("curves.layout.xaxis.range"))[0] == pytest.approx((high - low) / 2)


def decoded(script: str) -> dict[str, tuple[Any, Any]]:
    """The curves of a trace's script, read with json and numpy."""
    body = json.loads(script[script.index(" = ") + 3 : script.rindex(";")])
    arrays = [np.frombuffer(base64.b64decode(text), "<f4") for text in body["steps"]]
    return {
        name: (arrays[at], np.frombuffer(base64.b64decode(text), "<f4")) for name, (at, text) in body["curves"].items()
    }


def test_no_spike_of_a_long_trace_is_lost(study: Study) -> None:
    (trial_id,) = study.trials.index[study.trials["steps_done"] == LONG]
    rows = study.trace(trial_id)
    x, y = decoded(assets.trace_script(study, trial_id))["grad_norm"]
    assert 500 < len(x) <= assets.MOST_POINTS < LONG and set(np.diff(x)) > {1.0}
    assert y[x == SPIKE] == pytest.approx([rows["grad_norm"][SPIKE]])
    assert list(y) == pytest.approx(list(rows["grad_norm"][x.astype(int)]), rel=1e-6)
    for stretch in np.array_split(np.arange(LONG), 50):  # far wider than a bucket: its ends are all there
        own = (x >= stretch[0]) & (x <= stretch[-1])
        assert y[own].max() == pytest.approx(rows["grad_norm"][stretch].max(), rel=1e-6)
        assert y[own].min() == pytest.approx(rows["grad_norm"][stretch].min(), rel=1e-6)


def test_a_trace_that_is_not_finite_keeps_its_gap_and_what_is_null_is_left_out(study: Study) -> None:
    (diverged,) = study.trials.index[study.trials["optim.lr"] == 0.5]
    _, norms = decoded(assets.trace_script(study, diverged))["grad_norm"]
    assert len(norms) == 71 and np.isnan(norms[70]) and not np.isnan(norms[:70]).any()
    (free,) = study.trials.index[study.trials["optim.clip"].isna()]
    curves = decoded(assets.trace_script(study, free))
    assert "clip_scale" not in curves and "noise_scale" not in curves and "attn_logit_max" in curves
    assert len(curves["val_loss"][0]) < len(curves["param_norm"][0])


def test_assets_are_written_once_and_those_of_gone_trials_removed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(study.trials.index)
    assets.write_assets(study, ids, tmp_path)
    files = sorted(tmp_path.rglob("*.js"))
    assert [f.stem for f in files if f.parent.name == "traces"] == sorted(ids)
    before = {f: f.stat().st_mtime_ns for f in files}
    broken = tmp_path / "traces" / f"{ids[0]}.js"
    broken.write_text("// of another source\n")
    made: list[str] = []
    script = assets.trace_script
    monkeypatch.setattr(assets, "trace_script", lambda of, t: made.append(t) or script(of, t))
    assets.write_assets(study, ids[:-1], tmp_path)
    assert made == [ids[0]]  # no other trace is read again
    after = {f: f.stat().st_mtime_ns for f in sorted(tmp_path.rglob("*.js"))}
    assert {f for f in after if after[f] != before[f]} == {broken}
    assert {f.stem for f in set(before) - set(after)} == {ids[-1]} and "grad_norm" in broken.read_text()


def test_without_the_library_nothing_stands_in_its_place(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "library", lambda: None)
    assets.write_assets(study, [], tmp_path)
    assert not list(tmp_path.rglob("*.js"))


def test_the_view_is_in_the_address(study: Study, page: Path, browser: Any) -> None:
    ids = [row.trial_id for row in runs_page.page(study, study_page.paged(study)).rows][:2]
    view = f"filter=lr%3E1e-3+depth%3D2&trials={','.join(ids)}&also=param_norm&steps=20-60"
    with At(browser, page, f"#{view}") as opened:
        drawn(opened)
        assert opened.get_by_label("Filter", exact=False).input_value() == "lr>1e-3 depth=2"
        assert set(opened.evaluate(SHOWN)) == set(
            study.trials.index[(study.trials["optim.lr"] > 1e-3) & (study.trials["model.depth"] == 2)]
        )
        assert {name for name, *_ in drawn(opened)} == set(ids)
        assert opened.evaluate("curves.layout.xaxis.range") == [20, 60] and len(drawn(opened)) == 8
        opened.get_by_label("Filter", exact=False).fill("verdict=rough")
        address = opened.evaluate("location.hash")
        assert "filter=verdict%3Drough" in address and f"trials={'%2C'.join(ids)}" in address
        assert "also=param_norm" in address and "steps=20-60" in address
        opened.evaluate("location.hash = 'filter=depth%3D6'")
        until(opened, "document.querySelector('.filter input').value === 'depth=6'")


def brushed(opened: Any) -> tuple[str, set[str]]:
    return opened.get_by_label("Filter", exact=False).input_value(), set(opened.evaluate(SHOWN))


def test_a_brush_on_a_scale_filters_and_the_filter_greys_the_lines(study: Study, page: Path, browser: Any) -> None:
    trials = study.trials
    with At(browser, page, NONE, viewport={"width": 1280, "height": 1000}) as opened:
        scale = opened.locator(".scale[data-name=lr]")
        scale.scroll_into_view_if_needed()
        stops = dict(json.loads(scale.get_attribute("data-stops")))
        box = opened.locator("#parallel").bounding_box()
        unit = box["height"] / runs_page.HEIGHT
        x = box["x"] + box["width"] * float(scale.locator("line").get_attribute("x1")) / runs_page.WIDTH
        opened.mouse.move(x, box["y"] + unit * stops["1e-3"] + 8)
        opened.mouse.down()
        opened.mouse.move(x, box["y"] + unit * stops["0.01"] - 8, steps=4)
        opened.mouse.up()
        text, ids = brushed(opened)
        assert text == "lr=1e-3..0.01" and ids == set(trials.index[trials["optim.lr"] <= 0.01])
        depth = opened.locator(".scale[data-name=depth]")
        depth.focus()
        opened.keyboard.press("ArrowUp")
        text, ids = brushed(opened)
        assert text == "lr=1e-3..0.01 depth=2"
        assert ids == set(trials.index[(trials["optim.lr"] <= 0.01) & (trials["model.depth"] == 2)])
        assert depth.get_attribute("aria-valuetext") == "2 to 2"
        greyed = opened.evaluate("document.querySelectorAll('.line.off').length")
        assert greyed == len(trials) - len(ids) > 0
        opened.keyboard.press("Shift+ArrowUp")
        assert brushed(opened)[0] == "lr=1e-3..0.01 depth=2,6"
        opened.keyboard.press("Escape")
        scale.focus()
        opened.keyboard.press("Escape")
        assert brushed(opened) == ("", set(trials.index))
        assert opened.locator(".line.off").count() == 0 and scale.get_attribute("aria-valuetext") == "all"


def test_a_line_is_named_and_chooses_its_run(study: Study, page: Path, browser: Any) -> None:
    with At(browser, page, NONE) as opened:
        line = opened.locator(".line").nth(3)
        trial_id = opened.evaluate(SHOWN)[3]
        assert study.describe(trial_id) in line.locator("title").text_content()
        box = opened.locator(f"#all input[value='{trial_id}']")
        before = box.is_checked()
        line.locator("use").dispatch_event("click")
        assert box.is_checked() is not before


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_complains_overflows_or_is_hard_to_read(study: Study, page: Path, browser: Any, scheme: str) -> None:
    opened = Opened(browser, page, color_scheme=scheme)
    with opened as tab:
        drawn(tab)
        tab.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
        tab.emulate_media(color_scheme=scheme)
        ink = "getComputedStyle(document.body).color"
        until(tab, f"getComputedStyle(document.querySelector('#curves .xtick text')).fill === {ink}")
        for width in (1280, 800, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth") == width
        assert opened.complaints == [] and all(u.startswith(page.parent.as_uri()) for u in opened.requests)
        assert [c for c in tab.evaluate(CONTRASTS) if c[0] < 4.5] == []
        assert tab.locator("#curves img, h1 script").count() == 0
        assert "document.body.innerHTML = 'owned'" in tab.locator("#all").text_content()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_the_runs_page(page: Path, browser: Any, scheme: str) -> None:
    with Opened(browser, page, color_scheme=scheme, bypass_csp=True) as opened:
        drawn(opened)
        opened.add_script_tag(content=AXE.read_text())
        outcome = opened.evaluate("axe.run()")
    assert len(outcome["passes"]) > 20 and [(v["id"], v["nodes"][0]["html"]) for v in outcome["violations"]] == []


def test_the_table_is_whole_without_scripts_and_without_assets(
    study: Study, page: Path, browser: Any, tmp_path: Path
) -> None:
    alone = tmp_path / page.name
    shutil.copyfile(page, alone)
    with Opened(browser, alone, java_script_enabled=False) as opened:
        assert opened.locator("#all tbody tr").count() == len(study.trials)
        assert not opened.locator("#overlay").is_visible() and opened.locator(".line path").count() == len(study.trials)
        assert not any(part.is_visible() for part in opened.locator("#all input, .live, .explore").all())
    with Opened(browser, alone) as opened:
        until(opened, "document.getElementById('note').textContent.includes('missing')")
        opened.emulate_media(media="print")
        whole, shown = opened.evaluate("(t => [t.scrollHeight, t.clientHeight])(document.querySelector('.tall'))")
        assert whole == shown > 0
        opened.emulate_media(media="screen")
        assert "assets/" in opened.locator("#note").text_content() and not opened.locator("#curves").is_visible()
        opened.get_by_label("Filter", exact=False).fill("depth=6")
        assert len(opened.evaluate(SHOWN)) == (study.trials["model.depth"] == 6).sum()


def page_with(tmp_path: Path, body: str, *scripts: str) -> Path:
    file = tmp_path / "t.html"
    text = "".join((TEMPLATES / name).read_text() for name in scripts)
    file.write_text(f"<!doctype html><meta charset=utf-8>{body}<script>{text}</script>")
    return file


def test_a_button_copies_the_text_beside_it(browser: Any, tmp_path: Path) -> None:
    texts = ("# a=1\nb", "lr: 3e-3\n")
    body = "".join(f"<div class=copy><pre>{text}</pre><button>copy</button></div>" for text in texts)
    with Opened(
        browser, page_with(tmp_path, body, "tables.js"), permissions=["clipboard-read", "clipboard-write"]
    ) as opened:
        for i, text in enumerate(texts):
            button = opened.locator("button").nth(i)
            button.click()
            until(opened, f"document.querySelectorAll('button')[{i}].textContent === 'copied'")
            assert opened.evaluate("navigator.clipboard.readText()") == text


def test_a_field_of_a_map_opens_its_runs(browser: Any, tmp_path: Path) -> None:
    marks = [{"name": "", "x": "learning rate", "y": "", "at": [5000, 5000], "a": ["0.1"], "b": ["2 rough"],
              "filter": ["depth=6 lr=0.1"]}]  # fmt: skip
    image = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='200' height='100'/>"
    figure = (
        f"<figure data-marks='{json.dumps(marks)}' data-trials='trials/' data-runs='runs.html'><div class=scroll>"
        f'<img src="{image}" width=200 height=100></div></figure>'
    )
    (tmp_path / "runs.html").write_text("<title>runs</title>")
    with Opened(browser, page_with(tmp_path, f"<main>{figure}</main>", "tables.js", "figures.js")) as opened:
        opened.locator("img").click()
        opened.wait_for_url("**/runs.html#filter=depth%3D6+lr%3D0.1")


def test_titles_of_scales_stand_clear_of_each_other(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = runs_page.page(study, frozenset()).scales
    assert [scale.title for scale in wide] == [scale.head for scale in wide]
    monkeypatch.setattr(runs_page, "WIDTH", 620)
    narrow = runs_page.page(study, frozenset()).scales
    gap = narrow[1].x - narrow[0].x
    assert any(len(scale.head) * runs_page.LETTER > gap for scale in narrow)
    assert all(len(scale.title) * runs_page.LETTER <= gap for scale in narrow)


def test_a_trace_is_read_by_columns(study: Study) -> None:
    trial_id = study.trials.index[0]
    rows, whole = study.trace(trial_id, ["loss"]), study.trace(trial_id)
    assert rows.schema.names == ["step", "loss"] and list(rows["loss"]) == list(whole["loss"])

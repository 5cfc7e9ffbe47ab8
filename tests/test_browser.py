"""The report in a real browser: nothing is fetched, nothing overflows, all can be read, and tables sort and filter."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
from test_page import PAYLOADS

from stabstudy.analysis import words
from stabstudy.analysis.study import Study
from stabstudy.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((c for c in ("chromium-headless-shell", "chromium", "google-chrome") if shutil.which(c)), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no headless Chromium")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen trials in seven cells, spiky and diverged ones among them; two bear a hostile case name and log."""
    folder = planted.plant_study(tmp_path_factory.mktemp("browser") / "planted", steps=200)
    diverged = planted.settings(6, 0.5, 1.0, 0, 200)
    planted.plant_trial(folder, diverged, nonfinite_at=70, steps_done=71, final_loss=math.nan, stop_reason="diverged")
    names = [*PAYLOADS, "x" * 5000, "<script>document.body.innerHTML = 'owned'</script>"]
    for seed in (0, 1):
        config = planted.settings(2, 0.7, 1.0, seed, 200)
        trial = planted.plant_trial(folder, config, case=names[-1] + " ".join(names), spikes={150: 9.0})
        trial.log_file.write_text("\n".join(names))
    return write_report(folder, lambda line: None).parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=shutil.which(str(CHROMIUM)), args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Opened:
    """A page in the browser, with all that it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, address: str = "", **context: Any):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.goto(file.as_uri() + address)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()


def until(page: Any, expression: str, seconds: float = 30.0) -> None:
    """Wait until the expression holds in the page.

    Playwright's own wait_for_function evaluates its text in the page again at each frame, which the page's
    Content Security Policy refuses: it works only where the expression holds at the first look.
    """
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"not true within {seconds:g} s: {expression}"
        page.wait_for_timeout(20)


def files(report: Path) -> dict[str, Path]:
    """The index, and the pages of a spiky and a hostile trial."""
    trials = Study.load(report.parent).trials
    hostile, spiky = (
        trials.index[chosen & (trials["verdict"] == "spiky")][0] if named == "spiky" else trials.index[chosen][0]
        for named, chosen in (("hostile", trials["case"].notna()), ("spiky", trials["case"].isna()))
    )
    pages = {name: report / "trials" / f"{t}.html" for name, t in (("spiky", spiky), ("hostile", hostile))}
    return {"index": report / "index.html"} | pages


AXE = Path(str(importlib.util.find_spec("axe_playwright_python").origin)).with_name("axe.min.js")  # type: ignore[union-attr]
OPEN_ALL = "for (const d of document.querySelectorAll('details')) d.open = true"


@pytest.mark.parametrize("name", ["index", "spiky", "hostile"])
def test_nothing_is_fetched_and_nothing_complains(report: Path, browser: Any, name: str) -> None:
    opened = Opened(browser, files(report)[name])
    with opened as page:
        page.evaluate(OPEN_ALL)
        page.wait_for_load_state("networkidle")
        own = [] if name == "index" else [(report / "assets" / "plotly.js").as_uri()]
        assert [u for u in opened.requests if not u.startswith("data:")] == [files(report)[name].as_uri(), *own]
        assert opened.complaints == []
        images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.height, i.alt])")
        assert images and all(i[0] and min(i[1:4]) > 50 and len(i[4]) > 40 for i in images)


@pytest.mark.parametrize("name", ["index", "spiky", "hostile"])
def test_nothing_overflows(report: Path, browser: Any, name: str) -> None:
    for width in (1280, 800, 390):
        with Opened(browser, files(report)[name], viewport={"width": width, "height": 900}) as page:
            page.evaluate(OPEN_ALL)
            needs, has = page.evaluate("(w => [w.scrollWidth, w.clientWidth])(document.documentElement)")
            assert needs == has == width


CONTRASTS = """() => {
  const rgba = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgba(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const seen = [];
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))];
    seen.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.className]);
  }
  return seen;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "spiky"])
def test_all_text_can_be_read(report: Path, browser: Any, name: str, scheme: str) -> None:
    with Opened(browser, files(report)[name], color_scheme=scheme) as page:
        page.evaluate(OPEN_ALL)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
        found = page.evaluate(CONTRASTS)
        assert len(found) > 100 and [f for f in found if f[0] < 4.5] == []


def test_what_comes_late_is_waited_for(report: Path, browser: Any) -> None:
    with Opened(browser, files(report)["index"]) as page:
        page.evaluate("setTimeout(() => { document.title = 'late' }, 200); 0")
        until(page, "document.title === 'late'")
        with pytest.raises(AssertionError, match="not true within 0.1 s"):
            until(page, "document.title === 'never'", 0.1)


def test_contrasts_are_measured(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "pale.html").write_text("<body style='background:#fff'><p style='color:#777777'>pale</p></body>")
    with Opened(browser, tmp_path / "pale.html") as page:
        ((contrast, _),) = page.evaluate(CONTRASTS)
    assert contrast == pytest.approx(4.478, abs=1e-3)  # WCAG's own example of a grey that just fails


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", *(pytest.param(n, marks=pytest.mark.slow) for n in ("spiky", "hostile"))])
def test_axe_finds_nothing(report: Path, browser: Any, name: str, scheme: str) -> None:
    with Opened(browser, files(report)[name], color_scheme=scheme, bypass_csp=True) as page:
        page.evaluate(OPEN_ALL)
        page.add_script_tag(content=AXE.read_text())
        found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 30 and [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []


def column(page: Any, caption: str, head: str) -> list[str]:
    """The texts of a column of the table with this caption, as they stand now, hidden rows left out."""
    found: list[str] = page.evaluate(
        """([caption, head]) => {
          const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent.includes(caption));
          const at = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === head);
          return [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.cells[at].textContent);
        }""",
        [caption, head],
    )
    return found


def head(page: Any, caption: str, text: str) -> Any:
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    return table.locator("th", has=page.get_by_role("button", name=text, exact=True))


def test_heads_sort_by_click_and_by_key(report: Path, browser: Any) -> None:
    with Opened(browser, report / "index.html") as page:
        before = column(page, "cells: means", "final loss")
        numbers = [float(text.split(" ± ")[0]) for text in before]
        loss = head(page, "cells: means", "final loss")
        loss.locator("button").click()
        assert [float(t.split(" ± ")[0]) for t in column(page, "cells: means", "final loss")] == sorted(numbers)
        assert loss.get_attribute("aria-sort") == "ascending"
        loss.locator("button").press("Enter")
        assert [float(t.split(" ± ")[0]) for t in column(page, "cells: means", "final loss")] == sorted(numbers)[::-1]
        assert loss.get_attribute("aria-sort") == "descending"
        loss.locator("button").press("Space")
        assert column(page, "cells: means", "final loss") == before and loss.get_attribute("aria-sort") is None
        head(page, "cells: means", "learning rate").locator("button").click()
        rates = column(page, "cells: means", "learning rate")
        assert rates == sorted(rates, key=float) and rates[0] == "1e-3"
        assert page.locator("th[aria-sort]").count() == 1


@pytest.mark.parametrize(
    ("texts", "up", "down"),
    [
        (["10", "9", "–", "over 12", "1e-3"], ["1e-3", "9", "10", "over 12", "–"], ["over 12", "10", "9", "1e-3", "–"]),
        (["2.35 ± 9", "12 %", "-1", "∞"], ["-1", "2.35 ± 9", "12 %", "∞"], ["∞", "12 %", "2.35 ± 9", "-1"]),
        (["1", "off", "0.1"], ["0.1", "1", "off"], ["1", "0.1", "off"]),
        (["c10", "C2", "a"], ["a", "C2", "c10"], ["c10", "C2", "a"]),
        (["3 of 4", "", "10 of 12"], ["3 of 4", "10 of 12", ""], ["10 of 12", "3 of 4", ""]),
    ],
)
def test_the_order_of_texts(browser: Any, tmp_path: Path, texts: list[str], up: list[str], down: list[str]) -> None:
    from stabstudy.analysis.report.html import TEMPLATES

    rows = "".join(f"<tr><td>{t}</td></tr>" for t in texts)
    table = f"<table><caption>t</caption><thead><tr><th>h</th></tr></thead><tbody>{rows}</tbody></table>"
    script = (TEMPLATES / "tables.js").read_text()
    (tmp_path / "t.html").write_text(f"<meta charset=utf-8><div>{table}</div><script>{script}</script>")
    with Opened(browser, tmp_path / "t.html") as page:
        page.locator("button").click()
        assert column(page, "t", "h") == up
        page.locator("button").click()
        assert column(page, "t", "h") == down


def test_long_tables_filter(report: Path, browser: Any) -> None:
    trial = files(report)["spiky"]
    with Opened(browser, trial) as page:
        page.evaluate(OPEN_ALL)
        everything = column(page, "All statistics", "column")
        box = page.locator("details", has_text="All statistics").get_by_label("Filter")
        box.focus()
        page.keyboard.type("CLIP share")
        found = column(page, "All statistics", "column")
        assert {"clip_share", "clip_share_warmup", "clip_share_after"} <= set(found) and len(found) < len(everything)
        shown = page.locator("details", has_text="All statistics").locator("output")
        assert shown.text_content() == f"{len(found)} of {len(everything)} rows"
        box.fill("")
        assert column(page, "All statistics", "column") == everything and shown.text_content() == ""


def test_pointing_at_a_trial_reads_and_opens_it(report: Path, browser: Any) -> None:
    trials = Study.load(report.parent).trials
    with Opened(browser, report / "index.html", viewport={"width": 1280, "height": 900}) as page:
        image = page.locator("#final-loss img")
        image.scroll_into_view_if_needed()
        series = json.loads(page.locator("#final-loss").get_attribute("data-marks"))
        dots = next(s for s in series if "trials" in s and s["name"] == "depth 2")
        box = image.bounding_box()
        x = box["x"] + box["width"] * dots["at"][0] / 1e4
        y = box["y"] + box["height"] * dots["at"][1] / 1e4
        page.mouse.move(x + 3, y)
        trial_id = dots["trials"][0]
        row = trials.loc[trial_id]
        rate = f"learning rate {words.level(row['optim.lr'])}"
        values = f"{rate}, final validation loss (nat/token) {row['final_loss']:.4g}"
        assert page.locator(".tip").text_content() == f"depth 2: {values} (trial {trial_id})"
        page.mouse.move(box["x"] + box["width"] + 200, y)
        assert not page.locator(".tip").is_visible()
        page.mouse.click(x, y)
        page.wait_for_url(f"**/trials/{trial_id}.html")


def test_a_field_of_a_map_is_read_with_the_keyboard(report: Path, browser: Any) -> None:
    with Opened(browser, report / "index.html") as page:
        page.locator("#stability-map .scroll").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").text_content() == "learning rate 1e-3, depth (layers) 2, ● 2 stable"
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").text_content().startswith("learning rate 1e-3, depth (layers) 6, ")
        page.keyboard.press("Escape")
        assert not page.locator(".tip").is_visible()


def test_hostile_names_are_shown_as_text(report: Path, browser: Any) -> None:
    with Opened(browser, files(report)["hostile"]) as page:
        page.evaluate(OPEN_ALL)
        text = page.inner_text("body")
        assert "<script>document.body.innerHTML" in text and "<script>alert(1)</script>" in text and r"$\frac" in text
        assert page.locator("script:not([src])").count() == 1 and page.locator("body h1").count() == 1


def test_a_mention_leads_to_the_trial_and_back(report: Path, browser: Any) -> None:
    with Opened(browser, report / "index.html") as page:
        link = page.locator("ul.pointers a").first
        trial_id = link.text_content()
        link.click()
        assert page.url.endswith(f"/trials/{trial_id}.html") and trial_id in page.title()
        page.locator("header a").click()
        assert page.url == (report / "index.html").as_uri()


def test_the_page_reads_the_same_without_the_script(report: Path, browser: Any) -> None:
    with (
        Opened(browser, report / "index.html") as with_script,
        Opened(browser, report / "index.html", java_script_enabled=False) as without,
    ):
        assert without.locator("th button, .filter").count() == 0
        texts = [page.locator("main").text_content().split() for page in (with_script, without)]
        assert with_script.locator(".hint").is_visible() and not without.locator(".hint").is_visible()
        assert without.locator(".tip").count() == 0 and not any(
            b.is_visible() for b in without.get_by_text("copy").all()
        )
    assert len(texts[1]) > 1000 and [w for w in texts[0] if w != "Filter"] == [w for w in texts[1] if w != "Filter"]

"""The report: its numbers are the tables', it says what is wrong, it is safe, and it is the same every time."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import planted
import pytest
import scipy.stats

from stabstudy.analysis import words
from stabstudy.analysis.effects import contrasts, interactions
from stabstudy.analysis.elements import Figure, Text
from stabstudy.analysis.figures import maps, verdict_maps
from stabstudy.analysis.figures.layout import layout_of
from stabstudy.analysis.figures.registry import figures
from stabstudy.analysis.levels import plain, records
from stabstudy.analysis.report import effect_tables, findings, html, methods
from stabstudy.analysis.study import Study
from stabstudy.report import write_report
from stabstudy.stability.columns import COLUMNS
from stabstudy.store import StudyFolder
from stabstudy.trace import TRACE


@dataclass
class Page(HTMLParser):
    """What a reader of the page finds."""

    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "caption":
            self.captions.append("")
        elif tag == "li":
            self.items.append("")
        elif re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self.tables[-1][-1][-1] += data
        elif "caption" in self._open:
            self.captions[-1] += data
        elif "li" in self._open:
            self.items[-1] += data
        elif self._open and re.fullmatch("h[1-6]", self._open[-1]):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def table(self, title: str) -> list[list[str]]:
        return next(t for t, c in zip(self.tables, self.captions, strict=True) if title in c)

    def counts(self) -> dict[str, int]:
        found = (re.fullmatch(r"\S (\d+) ([a-z ]+)", " ".join(item.split())) for item in self.items)
        return {m[2]: int(m[1]) for m in found if m}


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert not page._open
    return page


MARKDOWN_LINK = re.compile(r"(?<!\\)\[([0-9a-f]{10})\]\((trials/\1\.html)\)")


def unescaped(text: str) -> str:
    """What a reader of Markdown sees: links as their words."""
    return re.sub(r"\\(.)", r"\1", MARKDOWN_LINK.sub(r"\1", text))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Every table of a Markdown text, cells unescaped, without the row of dashes."""
    tables: list[list[list[str]]] = []
    for line, before in zip(text.splitlines(), ["", *text.splitlines()], strict=False):
        if not line.startswith("|"):
            continue
        if not before.startswith("|"):
            tables.append([])
        if not re.fullmatch(r"[|:-]+", line):
            tables[-1].append([unescaped(c.strip()) for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return tables


def report_on(path: Path) -> Page:
    return read(write_report(path, lambda line: None).read_text())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 trials in 6 cells; one more diverged, one failed, one damaged; reported."""
    folder = planted.plant_study(tmp_path_factory.mktemp("page") / "planted", steps=200)
    diverged = planted.settings(6, 0.5, 1.0, 0, 200)
    planted.plant_trial(folder, diverged, nonfinite_at=70, steps_done=71, final_loss=math.nan, stop_reason="diverged")
    error = {"kind": "RuntimeError", "message": "out of luck", "step": 30}
    planted.plant_trial(folder, planted.settings(6, 0.5, 1.0, 1, 200), status="failed", steps_done=30, error=error)
    bad = planted.plant_trial(folder, planted.settings(2, 0.5, 1.0, 0, 200))
    bad.finished(TRACE).write_bytes(b"PAR1")
    write_report(folder, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return read((path / "report" / "index.html").read_text())


@pytest.fixture(scope="module")
def study(path: Path) -> Study:
    return Study.load(path)


# The numbers


def test_counts_are_those_of_the_table(page: Page, study: Study) -> None:
    verdicts = study.trials.loc[study.trials["state"] == "done", "verdict"].value_counts()
    assert page.counts() == {
        "stable": verdicts["stable"], "spiky": verdicts["spiky"], "rough": verdicts["rough"], "diverged": 1,
        "failed": 1, "damaged": 1,
    }  # fmt: skip
    assert (verdicts["stable"], verdicts["spiky"], verdicts["rough"]) == (7, 1, 4)
    assert page.headings[1:4] == [(2, "Stable up to"), (2, "What drives instability"), (2, "Use")]
    assert findings.headline(study).startswith("Of 13 judged trials: 7 stable, 1 spiky, 4 rough and 1 diverged; ")
    assert words.GLOSSARY in page.text


def test_cells_are_those_of_the_table(page: Page, study: Study) -> None:
    head, *rows = page.table("cells: means")
    assert head[:5] == ["depth (layers)", "learning rate", "verdicts", "seeds", "final loss"]
    cells = records(study.cells)
    assert len(rows) == len(cells) == 7
    for row, cell in zip(rows, cells, strict=True):
        shown = dict(zip(head, row, strict=True))
        assert (int(shown["depth (layers)"]), float(shown["learning rate"])) == (cell["model.depth"], cell["optim.lr"])
        assert float(shown["final loss"].split(" ± ")[0]) == pytest.approx(cell["final_loss_capped"], rel=5e-4)
        assert float(shown["spikes"]) == cell["spike_events"]
        assert float(shown["x3 rate"].removesuffix(" %")) / 100 == pytest.approx(cell["spike_abs_rate"], rel=0.05)
        assert float(shown["max / median"]) == pytest.approx(cell["grad_norm_max_over_median"], rel=5e-3)
        assert float(shown["clipped"].removesuffix(" %")) / 100 == pytest.approx(cell["clip_share"], rel=0.05)
        told = {m[2]: int(m[1]) for m in re.finditer(r"(\d+) (stable|spiky|rough|diverged)", shown["verdicts"])}
        assert told == {v: cell[v] for v in ("stable", "spiky", "rough", "diverged") if cell[v]}
    assert rows[2][2] == "2 rough" and rows[4][2] == "1 stable, 1 spiky (long spike, R1)"
    assert rows[-1][2] == "1 diverged (a value not finite, nonfinite)"
    assert rows[-1][3] == "1 of 2"  # one of the two seeds at the largest rate failed
    assert "±" not in rows[-1][4] and all("±" in row[4] for row in rows[:-1])


def test_markdown_holds_the_same_numbers(path: Path, page: Page) -> None:
    text = (path / "report" / "report.md").read_text()
    (counts,) = re.findall(r"(?m)^● 7 .*$", text)
    assert {m[2]: int(m[1]) for m in re.finditer(r"(\d+) ([a-z ]+)", counts)} == page.counts()
    assert markdown_tables(text) == [[[" ".join(c.split()) for c in row] for row in table] for table in page.tables]
    bullets = [unescaped(line[2:]) for line in text.splitlines() if line.startswith("- ")]
    assert len(page.counts()) == 6 and bullets[2:] == page.items[8:]  # after the two trials whose traces are drawn
    assert [b.split(" (")[0] for b in bullets[:2]] == [" ".join(i.split()).split(" (")[0] for i in page.items[6:8]]
    assert words.GLOSSARY in text


def test_markdown_links_to_the_same_trials(path: Path, page: Page) -> None:
    text = (path / "report" / "report.md").read_text()
    linked = [attrs["href"] for tag, attrs in page.tags if tag == "a" and re.match("trials/[^#]*$", attrs["href"])]
    found = [target for _, target in MARKDOWN_LINK.findall(text)]
    assert found == linked and len(set(found)) == 9
    assert all((path / "report" / target).exists() for target in found)


def test_csv_is_the_table(path: Path, study: Study) -> None:
    rows = list(csv.DictReader(io.StringIO((path / "report" / "trials.csv").read_text())))
    assert [row["trial_id"] for row in rows] == list(study.trials.index)
    for row in rows:
        for name, value in study.row(row["trial_id"]).items():
            if isinstance(value, float):
                assert float(row[name]) == value, name
            else:
                assert row[name] == ("" if value is None else str(value)), name


def test_cells_have_their_intervals(page: Page, path: Path, study: Study) -> None:
    written = list(csv.DictReader(io.StringIO((path / "report" / "cells.csv").read_text())))
    head, *shown = page.table("95 % intervals of these means")
    assert len(written) == len(shown) == len(study.cells)
    told = 0
    for row, text, (cell_id, _) in zip(written, shown, study.cells.iterrows(), strict=True):
        members = study.trials[(study.trials["cell_id"] == cell_id) & (study.trials["state"] == "done")]
        values = members["grad_norm_log_sd"].dropna()
        field = text[head.index("roughness")]
        if len(values) < 2:
            assert row["grad_norm_log_sd_low"] == "" and field == words.NOTHING
            continue
        logs = np.log(values)
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * logs.std() / math.sqrt(len(values))
        ends = (math.exp(logs.mean() - half), math.exp(logs.mean() + half))
        assert (float(row["grad_norm_log_sd_low"]), float(row["grad_norm_log_sd_high"])) == pytest.approx(ends)
        assert field == " to ".join(map(words.number, ends)) and row["cell_id"] == cell_id
        told += 1
    assert told


def test_a_caption_names_the_ends_of_its_lines(tmp_path: Path) -> None:
    """With names as they are written: those of a dataset keep their capitals."""
    planted.plant_frame(tmp_path / "s")
    for lr, loss in ((1e-3, 2.75), (1e-2, 2.5), (1e-1, 3.25)):
        for name in ("FineWeb", "DCLM"):
            config = planted.settings(lr=lr, data={"seq_len": 32 + len(name)})
            planted.plant_trial(tmp_path / "s", config, choices={"data": name}, final_loss=loss + len(name) / 100)
    first = next(figures(Study.load(tmp_path / "s")))
    said = "Lowest 2.54 at dataset DCLM, learning rate 0.01, highest 3.32 at dataset FineWeb, learning rate 0.1."
    assert isinstance(first, Figure) and first.name == "final-loss" and said in first.caption


def test_the_card_says_how_much_was_trained(page: Page, study: Study) -> None:
    trials = study.trials
    step = trials["train.batch_size"] * trials["data.seq_len"]
    total = int((trials["steps_done"] * step).sum())
    assert f"trained in all: {total:,} tokens." in page.text and f"{len(trials)} trials of " in page.text


def test_trials_that_diverged_early_lack_statistics_and_say_so(tmp_path: Path) -> None:
    """Their roughness is not known: fewer pairs have it, their fields are grey, and no step is named twice."""
    planted.plant_frame(tmp_path / "s")
    for depth in (2, 4):
        for seed in (0, 1, 2):
            loss = 2.5 + seed / 100
            planted.plant_trial(
                tmp_path / "s", planted.settings(depth, 1e-3, seed=seed), final_loss=loss, logit=8.0 / depth
            )
            planted.plant_trial(
                tmp_path / "s", planted.settings(depth, 10.0, seed=seed), steps_done=21, nonfinite_at=20,
                final_loss=None, stop_reason="diverged", logit=(4e7 + seed * 1e6) / depth,
            )  # fmt: skip
    study = Study.load(tmp_path / "s")
    texts = [sentence for finding in findings.findings(study) for sentence in finding.sentences]
    (depth,) = (text for text in texts if "epth 2 to 4" in text)
    assert "no effect found: " in depth and not any("e+" in text for text in texts)
    notes = study.effects().set_index(["axis", "metric"])["note"]
    assert notes["model.depth", "grad_norm_log_sd"].endswith("6 of 12 trials without it")
    layout = layout_of(study)
    assert layout is not None
    drawn = [*verdict_maps.figures(study, layout), *maps.figures(study, layout)]
    captions = {f.name: f.caption for f in drawn if isinstance(f, Figure)}
    grey = {name for name, caption in captions.items() if "Grey: no trial has the statistic." in caption}
    assert grey == {"grad-norm-max-over-median-map"} and len(captions) == 4


def test_effects_are_those_of_the_study(page: Page, study: Study) -> None:
    rows = records(study.effects())
    shown = page.table("Effects: 4 tests")[1:]  # the planted losses and logits do not scatter: those are not tested
    assert len(rows) == len(shown) == 8 and sum(row["p_holm"] is not None for row in rows) == 4
    for row, (axis, step, statistic, effect, p, p_holm, reading, note) in zip(rows, shown, strict=True):
        assert (axis, statistic) == (words.label(row["axis"]), COLUMNS[row["metric"]].label)
        assert note == (row["note"] or "")
        if row["p"] is None:
            assert (step, effect, p, p_holm, reading) == (*[words.NOTHING] * 4, "not tested") and note
            continue
        ends = [row["estimate"], row["low"], row["high"]]
        assert [float(v) for v in re.findall(r"[\d.]+", effect)] == pytest.approx(ends, rel=5e-3)
        assert step == " → ".join(words.level(row[end], row["axis"]) for end in ("a", "b"))
        assert (float(p), float(p_holm)) == pytest.approx((row["p"], row["p_holm"]), rel=0.06)
        assert reading == ("effect" if row["p_holm"] < 0.05 else "suggestive" if row["p"] < 0.05 else "no effect found")
    assert {row[6] for row in shown} == {"effect", "no effect found", "not tested"}


def test_the_reading_of_an_effect_rests_on_the_corrected_p() -> None:
    for p, p_holm, reading in ((0.01, 0.04, "effect"), (0.01, 0.05, "suggestive"), (0.05, 0.2, "no effect found")):
        row = {"p": p, "p_holm": p_holm, "clear": p_holm < 0.05, "other": None}
        assert effect_tables.reading(row) == reading
        depends = effect_tables.reading(row | {"clear": True, "other": "optim.lr"})  # by its interaction
        assert depends == "effect, depends on learning rate"
    assert effect_tables.reading({"p": None, "p_holm": None, "clear": False, "other": None}) == "not tested"


def test_contrasts_and_interactions_are_those_of_the_study(page: Page, study: Study) -> None:
    above = records(contrasts(*study.tested()))
    shown = page.table("Each level of an axis against")[1:]
    kept = [r for r in above if r["axis"] == "optim.lr"]  # two depths are one contrast, which the effects hold
    assert len(shown) == len(kept) > 2
    for row, text in zip(kept, shown, strict=True):
        assert text[1:3] == [words.level(row["level"]), words.level(row["best"])]
        assert float(text[5]) == pytest.approx(row["p_holm"], rel=0.06)
    (pair,) = [r for r in records(interactions(*study.tested())) if r["metric"] == "grad_norm_log_sd"]
    (text,) = [row for row in page.table("Interactions: ")[1:] if row[2] == "roughness"]
    assert text[:2] == ["depth", "learning rate"] and float(text[3]) == pytest.approx(pair["statistic"], rel=5e-3)


def test_paired_differences_are_compare(page: Page, study: Study) -> None:
    rows = {(r[0], r[2]): r for r in page.table("Paired differences")[1:]}
    for metric, label in (("final_loss", "final loss"), ("grad_norm_log_sd", "roughness")):
        (depth,) = records(study.compare("model.depth", metric))
        shown = rows["depth", label]
        assert shown[1] == "2 → 6" and float(shown[4]) == pytest.approx(depth["difference"], rel=5e-3)
        assert shown[6:8] == [str(depth["pairs"]), str(depth["seeds"])] == ["6", "2"]
    # the levels of the effect where there is one; else the outermost with a pair: at 0.5 one of depth 6 is done
    assert rows["learning rate", "roughness"][1] == page.table("Effects: ")[7][1] == "1e-3 → 0.1"
    assert rows["learning rate", "final loss"][1] == "1e-3 → 0.5" and rows["learning rate", "final loss"][6] == "1"
    assert "p (sign flip)" not in page.table("Paired differences")[0]  # under 6 seeds it cannot fall below .05


def test_figures_have_words_and_their_numbers(page: Page, path: Path, study: Study) -> None:
    names = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert names[:3] == ["first-final-loss", "first-spike-abs-rate", "first-traces"]
    assert names[3:8] == ["final-loss", "grad-norm-log-sd", "attn-logit-peak", "stability-map", "effects"]
    on_demand = ["spike-abs-rate-map", "grad-norm-max-over-median-map", "diverged-map", "traces"]
    assert names[8:] == [*on_demand, "norm-ratios", "layers", "first-spikes"]
    files = {f"{name}.{ending}" for name in names for ending in ("svg", "png", "csv")}
    assert {p.name for p in (path / "report" / "figures").iterdir()} == files
    alts = {n: a["alt"] for n, a in zip(names, [a for t, a in page.tags if t == "img"], strict=True)}
    assert "depth 2: from 2.69 at 1e-3 to 2.69 at 0.1; lowest 2.39 at 0.01" in alts["final-loss"]
    assert "depth 6: " in alts["attn-logit-peak"]
    assert study.describe(str(study.worst())) in alts["traces"]
    numbers = [t for t, c in zip(page.tables, page.captions, strict=True) if c == "Numbers of this figure"]
    assert len(numbers) == len(names) - 3  # those of the small ones are files beside the page
    assert numbers[0][0] == ["depth (layers)", "learning rate", "final validation loss (nat/token)", "low", "high", "n in the mean", "diverged"]  # fmt: skip  # noqa: E501
    assert numbers[0][1][:3] == ["2", "1e-3", "2.69"] and numbers[0][-1][-2:] == ["1", "1"]


# What it says


def test_findings_answer_the_question(page: Page, study: Study) -> None:
    text = " ".join(page.items)
    assert planted.QUESTION in page.text
    assert [f.about for f in findings.findings(study)] == ["What is stable", "What to use", "What the axes changed"]
    assert page.items[8:] == [
        *findings.warnings(study),
        *(sentence for finding in findings.findings(study) for sentence in finding.sentences),
    ]
    assert "Depth 2: every trial is stable up to learning rate 0.01" in text and "at 0.1, 2 of 2 are not" in text
    assert "the grid has a hole at learning rate 0.5, seed 1 (failed)" in text
    assert "For depth 2: use learning rate " in text and "For depth 6: use learning rate " in text


def test_what_is_wrong_is_said(page: Page, study: Study) -> None:
    said = " ".join(page.items)
    (damaged,) = study.damaged
    assert f"1 trial damaged and left out of every number: {damaged.trial_id}." in said
    assert "Trials in no mean: 1 failed (see Runs)." in said
    assert "Runs" in [heading for _, heading in page.headings]
    rows = {row[2]: row for row in page.table("Not done, failed or damaged")[1:]}
    assert rows["failed"][3:] == ["30 of 200", "RuntimeError: out of luck (step 30)"]
    assert rows["damaged"][0] == damaged.trial_id and "trace.parquet" in rows["damaged"][4]


def test_a_precision_says_what_it_is(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for precision in ("fp32", "bf16", "bf16_stream"):
        config = planted.settings()
        planted.plant_trial(tmp_path / "s", replace(config, train=replace(config.train, precision=precision)))
    texts = [b.text for b in methods.design(Study.load(tmp_path / "s")) if isinstance(b, Text)]
    assert any("Precision bf16: autocast" in t and "residual stream" in t and "fp32" in t for t in texts)
    assert any("Precision bf16_stream:" in t and "residual stream and outputs of norms in bf16" in t for t in texts)
    assert not any("Precision fp32" in t for t in texts)


def test_nothing_differs_is_said(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr, seed in ((1e-3, 0), (1e-2, 0), (1e-3, 1), (1e-2, 1)):
        planted.plant_trial(tmp_path / "s", planted.settings(lr=lr, seed=seed), logit=4.0)
    found = findings.findings(Study.load(tmp_path / "s"))
    assert [f.about for f in found] == ["What is stable", "What to use", "What the axes changed"]
    said = " ".join(text for f in found for text in f.sentences)
    assert "very trial is stable up to learning rate 0.01" in said and "no larger one was tried." in said
    assert "Learning rate 1e-3 to 0.01: no effect found: roughness ×" in said


def test_the_whole_grid_unstable_is_said(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr in (1e-2, 1e-1):
        config = planted.settings(lr=lr)
        planted.plant_trial(tmp_path / "s", config, nonfinite_at=60, final_loss=math.nan, stop_reason="diverged")
    stable, use, *_ = findings.findings(Study.load(tmp_path / "s"))
    assert "at 0.01, 1 of 1 is not" in stable.sentences[0]
    assert use.about == "What to use" and [text.startswith("No recipe: ") for text in use.sentences] == [True]


@pytest.mark.slow
def test_one_seed_has_no_interval_and_no_test(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", seeds=(0,))
    page = report_on(folder)
    assert "One seed: no interval and no test is possible" in " ".join(page.items)
    assert not any("±" in field for row in page.table("cells: means")[1:] for field in row)
    assert all(row[5] == words.NOTHING for row in page.table("Paired differences")[1:])
    assert {row[6] for row in page.table("Effects: ")[1:]} == {"not tested"}
    assert ["What each axis changed", "not tested: one seed: no scatter between seeds to test against"] in page.table(
        "Not shown, and why"
    )


@pytest.mark.parametrize(("seeds", "p"), [(5, None), (6, "0.031"), pytest.param(21, None, marks=pytest.mark.slow)])
def test_the_sign_flip_test_is_shown_where_it_can_tell(tmp_path: Path, seeds: int, p: str | None) -> None:
    """Its floor is 2 / 2^seeds: .063 of 5 seeds, .031 of 6; over 20 seeds it is not computed."""
    planted.plant_frame(tmp_path / "s")
    for lr in (0.01, 0.1):
        for seed in range(seeds):
            planted.plant_trial(tmp_path / "s", planted.settings(2, lr, seed=seed, steps=60), final_loss=2.0 + lr)
    blocks = effect_tables.effect_blocks(Study.load(tmp_path / "s"))
    (table,) = (b for b in blocks if getattr(b, "title", "").startswith("Paired differences"))
    (loss,) = (dict(zip(table.columns, row, strict=True)) for row in table.rows if row[2] == "final loss")
    assert loss.get("p (sign flip)") == p and loss["seeds"] == loss["pairs"] == str(seeds)


def test_differing_batches_and_data_are_said(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-3))
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-2), eval_hash="other", fingerprint="0" * 16)
    said = findings.warnings(Study.load(tmp_path / "s"))
    assert "Losses were measured on 2 different evaluation sets: compare them where data are equal." in said
    assert "Trials with the same data settings saw different data (their fingerprints differ)." in said


def test_missing_seeds_are_said(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,))
    planted.plant_trial(folder, planted.settings(lr=0.5, seed=0))
    assert "1 of 4 cells lacks seeds that others have (2)." in findings.warnings(Study.load(folder))


@pytest.mark.usefixtures("undrawn")
def test_a_study_without_a_done_trial_says_so(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(), status="interrupted", steps_done=40)
    page = report_on(tmp_path / "s")
    assert "No cell has ended; 1 trial still to come." in page.text and "No recipe yet" in page.text
    assert page.counts()["unfinished"] == 1
    assert ["Every figure", "no trial is done yet: there is nothing to draw"] in page.table("Not shown, and why")
    assert not any(tag == "figure" for tag, _ in page.tags)


def test_an_empty_study_says_so(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    page = report_on(tmp_path / "s")
    assert "The study holds no trial yet." in page.text and page.counts() == {}


@pytest.mark.slow
def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed in (0, 1):
        planted.plant_trial(tmp_path / "s", planted.settings(seed=seed))
    absent = report_on(tmp_path / "s").table("Not shown, and why")
    assert ["Every figure over settings", "nothing varies but the seed"] in absent
    planted.plant_trial(tmp_path / "s", planted.settings(lr=0.5))
    absent = report_on(tmp_path / "s").table("Not shown, and why")
    assert ["Maps", "they need two axes; this study varies one"] in absent
    assert not (tmp_path / "s" / "report" / "figures" / "spike-abs-rate-map.svg").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_data_sets_are_an_axis_like_any_other(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name in ("pysrc", "synthetic"):
        for lr in (1e-3, 1e-2):
            config = planted.settings(lr=lr, data={"source": name})
            planted.plant_trial(tmp_path / "s", config, choices={"data": name}, eval_hash=name, fingerprint=name * 2)
    page = report_on(tmp_path / "s")
    assert ["dataset", "data", "pysrc, synthetic"] in page.table("Axes")
    assert [row[:2] for row in page.table("cells: means")[1:]] == [
        ["1e-3", "pysrc"], ["1e-3", "synthetic"], ["0.01", "pysrc"], ["0.01", "synthetic"],
    ]  # fmt: skip
    effects = [row[2] for row in page.table("Paired differences")[1:] if row[0] == "dataset"]
    assert effects and "final loss" not in effects  # two data sets, two evaluation batches
    recipes = [item.partition(": use ")[0] for item in page.items if ": use " in item]
    assert recipes == ["For dataset pysrc", "For dataset synthetic"]  # never the lower of the two


def test_the_highest_spikes_are_those_of_the_study(page: Page, study: Study) -> None:
    grad = study.spikes[study.spikes["series"] == "grad"].sort_values("peak_ratio", ascending=False)
    head, *shown = page.table("Gradient norm: the ")
    assert len(shown) == min(6, len(grad)) > 4 and "x3" not in " ".join(head)
    for text, spike in zip(shown, records(grad), strict=False):
        row = dict(zip(head, text, strict=True))
        assert (row["trial"], row["flagged as"]) == (spike["trial_id"], spike["part"])
        assert row["batch"] == {True: "yes", False: "no", None: words.NOTHING}[spike["batch"]]
        assert float(row["peak / recent level"]) == pytest.approx(spike["peak_ratio"], rel=5e-3)
        assert row["recovers after (steps)"].split()[-1] == str(spike["duration"])
        assert row["recovers after (steps)"].startswith("over") != spike["recovered"]
    assert {spike["part"] for spike in records(grad)} <= {"surprise", "absolute", "both"}


# The same every time


def _bytes(path: Path) -> dict[str, bytes]:
    files = [p for p in path.rglob("*") if p.is_file() and p.relative_to(path).parts[0] != "trials"]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def test_an_unchanged_study_gives_the_same_bytes(path: Path) -> None:
    before = _bytes(path)
    write_report(path, lambda line: None)
    assert (
        _bytes(path) == before and len(before) == 4 + 7 + 15 * 3 + 15 + 15
    )  # the study's, the report's, figures, trials, traces


@pytest.mark.slow
def test_a_moved_study_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    before = _bytes(path)
    moved = tmp_path / "elsewhere" / path.name
    shutil.copytree(path, moved)
    for made in ("report", "trials.parquet", "spikes.parquet"):
        shutil.rmtree(moved / made) if (moved / made).is_dir() else (moved / made).unlink()
    write_report(moved, lambda line: None)
    assert _bytes(moved) == before


@pytest.mark.usefixtures("undrawn")
def test_figures_of_an_older_report_are_removed(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    (folder / "report" / "figures").mkdir(parents=True)
    (folder / "report" / "figures" / "gone.svg").write_text("old")
    write_report(folder, lambda line: None)
    assert not (folder / "report" / "figures" / "gone.svg").exists()


# Safe


PAYLOADS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></tr></table><h1>x",
    "<!--",
    "]]><svg onload=x>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "{% for %}",
    "&lt;b&gt;",
    "'; DROP TABLE",
    "\x1b[31mred\x1b[0m",
    "\x00\x07bell",
    "\u202egnp.exe",
    r"$\frac{1}{0}$",
    "| a | b |",
    "`x`",
    "[x](http://example.com)",
    "![x](http://example.com/x.png)",
    "# heading",
    "=HYPERLINK(1)",
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose every free text is a payload: question, provenance, choices, case, error, fingerprint."""
    everything = " ".join(PAYLOADS)
    folder = tmp_path_factory.mktemp("hostile") / "<b>study"
    planted.plant_frame(folder, question=everything)
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance |= {"argv": [everything], "versions": {everything: everything}, "git": {"commit": everything}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    for i in range(0, len(PAYLOADS), 4):
        data, model, case, kind = PAYLOADS[i : i + 4]
        planted.plant_trial(
            folder,
            planted.settings(lr=1e-3 * (i + 1), steps=60),
            choices={"data": data, "model": model},
            case=case,
            fingerprint=f"{i:016x}",
            eval_hash=kind,
            status="done" if i % 8 else "failed",
            error=None if i % 8 else {"kind": kind, "message": everything, "step": 1},
        )
    write_report(folder, lambda line: None)
    return folder


def test_foreign_text_stays_text(hostile: Path, path: Path) -> None:
    shown = read((hostile / "report" / "index.html").read_text())
    allowed = {tag for tag, _ in read((path / "report" / "index.html").read_text()).tags}
    assert {tag for tag, _ in shown.tags} <= allowed and [tag for tag, _ in shown.tags].count("script") == 1
    for _, attrs in shown.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert not attrs.get("href", "").startswith("javascript")
    assert all(text in shown.text for text in ("<script>alert(1)</script>", "{{ 7 * 7 }}", "&lt;b&gt;", "<b>study"))
    assert not re.search(r"(?<![\w.])49(?![\w.])", shown.text)  # 7 * 7


def test_no_control_characters_come_out(hostile: Path) -> None:
    for name in ("index.html", "report.md", "trials.csv"):
        text = (hostile / "report" / name).read_text()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text), name
    assert words.clean("\x1b[31mred\x1b[0m \x1b]0;title\x07x\ny") == "red x y"
    assert len(words.clean("x" * 5000)) == 300


def test_markdown_has_no_foreign_markup(hostile: Path) -> None:
    text = (hostile / "report" / "report.md").read_text()
    assert not re.search(r"(?m)^(?! {4}|$).*\n {4}", text)  # indented lines follow a gap or each other: they are code
    assert not re.search(r"(?m)^(?! {4}).*(?<!\\)<", text)
    assert not re.search(r"(?<!\\)\]\(http", text) and "\n# heading" not in text
    columns = {line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("| done")}
    assert len(columns) <= 1


def test_csv_starts_no_formula(hostile: Path) -> None:
    rows = list(csv.reader(io.StringIO((hostile / "report" / "trials.csv").read_text())))
    fields = {field for row in rows[1:] for field in row}
    assert "'=HYPERLINK(1)" in fields
    texts = [f for f in fields if f.startswith(("=", "+", "-", "@"))]
    assert all(math.isfinite(float(f)) for f in texts)  # a negative number is no formula


SVG_NAMESPACE = '"http://www.w3.org/2000/svg"'
"""A name and no address: nothing is asked for there."""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


EMPTY = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"
"""A style sheet of nothing: the plotting library adds one."""


def test_policy_allows_our_one_script_and_no_request(path: Path) -> None:
    index, trials = ("tables.js", "figures.js"), ("tables.js", "charts.js", "figures.js", "explorer.js")
    for file in [path / "report" / "index.html", *(path / "report" / "trials").iterdir()]:
        drawn = file.parent.name == "trials"
        own = "".join((html.TEMPLATES / name).read_text() for name in (trials if drawn else index))
        assert not re.search("fetch|XMLHttpRequest|import|eval|innerHTML|https?:", own.replace(SVG_NAMESPACE, ""))
        text = file.read_text()
        page = read(text)
        (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        (css,) = re.findall("<style>(.*?)</style>", text.partition("<body")[0], re.DOTALL)
        (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
        assert script == own and [t for t, _ in page.tags].count("script") == 1
        empty, beside = (f" {EMPTY}", "'self' ") if drawn else ("", "")
        assert policy == (
            f"default-src 'none'; img-src data:; style-src 'sha256-{_digest(css)}'{empty}; "
            f"script-src {beside}'sha256-{_digest(script)}'; base-uri 'none'; form-action 'none'"
        )
        assert not any("style" in attrs for _, attrs in page.tags)  # the policy would refuse it
        assert "url(" not in css and "@import" not in css
        assert all(a["src"].startswith("data:image/svg+xml,") for t, a in page.tags if t == "img")
        assert not any(t in ("link", "iframe", "object", "form") for t, _ in page.tags)


def test_links_resolve(path: Path, page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in [a["href"] for t, a in page.tags if t == "a"]:
        file, _, place = target.partition("#")
        assert (path / "report" / file).is_file() if file else place in ids


# For everybody


def test_the_page_can_be_read_aloud(page: Page) -> None:
    assert ("html", {"lang": "en"}) in page.tags
    depths = [depth for depth, _ in page.headings]
    assert depths[0] == 1 and depths.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(depths, depths[1:], strict=False))
    images = [a for t, a in page.tags if t == "img"]
    assert images and all(len(a["alt"]) > 40 and int(a["width"]) > 0 and int(a["height"]) > 0 for a in images)
    assert sum(t == "figcaption" for t, _ in page.tags) == len(images)
    assert all(a["scope"] == "col" for t, a in page.tags if t == "th")
    assert len(page.captions) == len(page.tables)


def test_provenance_is_shown(page: Page) -> None:
    rows = dict(page.table("Command, versions")[1:])
    assert rows["command"] == "python -m stabstudy.sweep sweep=planted"
    assert rows["versions: torch"] == "2.10.0" and rows["git: commit"] == "0" * 40
    assert rows["trained"] == "2026-01-02T03:04:05+00:00 to 2026-01-02T03:05:05+00:00"
    assert rows["trained with"] == "device cpu, threads 1, torch 2.10.0"
    assert planted.FINGERPRINT in page.text


def test_the_rule_and_its_parameters_are_shown(page: Page, study: Study) -> None:
    rules = study.rules
    shown = dict(page.table(f"Parameters of the rules ({rules.detector_id})")[1:])
    assert {k: float(v) for k, v in shown.items()} == {k: float(v) for k, v in rules.parameters().items()}
    rule = (
        "at least 5 robust standard deviations and a factor 2 above its recent level (the median of the 5 steps before)"
    )
    assert rule in page.text
    assert "as absolute where it is at least 3 times both its recent level and the median of the last 64" in page.text
    shown = page.table("Verdicts, from worst to best")[1:]
    codes = [row[1].rpartition(" (")[2].rstrip(")") for row in shown if row[0] == "diverged"]
    assert codes == ["nonfinite", "above_init", "persistent", "above_unigram", "no_recovery"]
    assert [row[0] for row in shown if row[0] != "diverged"] == ["rough", "spiky", "stable", "not judged"]
    assert f"under {rules.min_evaluable} evaluable steps" in shown[-1][1] and "untrained" in shown[-1][1]


def test_settings_that_did_not_vary_are_shown(page: Page, study: Study) -> None:
    shown = dict(page.table("Settings with one value")[1:])
    assert shown["optim.clip"] == "1" and shown["model.dim"] == "64" and shown["data.source"] == "pysrc"
    assert not {"optim.lr", "model.depth", "seed"} & set(shown)
    for name, text in shown.items():
        assert text == words.level(plain(study.trials[name].iloc[0]), name)


# How numbers are written


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.5, "2.50"), (1234.5678, "1235"), (0.01234, "0.0123"), (1.5e-4, "1.5e-4"), (3e7, "3e7"), (-2.0, "-2"),
     (None, "–"), (math.nan, "–"), (math.inf, "∞")],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "setting", "text"),
    [(1e-3, "", "1e-3"), (3e-3, "", "3e-3"), (0.01, "", "0.01"), (0.1, "", "0.1"), (6, "", "6"), (6.0, "", "6"),
     (None, "optim.clip", "off"), (None, "data.path", "null"), (True, "", "true"), ("pysrc", "", "pysrc")],
)  # fmt: skip
def test_levels(value: object, setting: str, text: str) -> None:
    assert words.level(value, setting) == text


def test_small_words() -> None:
    assert words.listing(["a", "b", "c"]) == "a, b and c" and words.listing([]) == ""
    assert words.count(1, "trial") == "1 trial" and words.count(0, "trial") == "0 trials"
    assert words.estimate(2.5, math.nan, math.nan) == "2.50" and words.estimate(2.5, 2.4, 2.6) == "2.50 ± 0.10"
    assert words.statistic(0.0125, "fraction") == "1.2 %" and words.statistic(2.5, "") == "2.5"


def test_folder_names_are_not_trusted(hostile: Path) -> None:
    assert StudyFolder(hostile).name == "<b>study"
    assert "<b>study" not in (hostile / "report" / "index.html").read_text()

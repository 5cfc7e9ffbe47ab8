"""The page of a trial: its numbers are the table's, every mention leads to it, and it is drawn once."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import planted
import pytest
from test_page import PAYLOADS, Page, _bytes, read

from stabstudy.analysis import words
from stabstudy.analysis.levels import plain
from stabstudy.analysis.report import html, study_page, trial_page, trial_tables
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import outcome
from stabstudy.analysis.words import REASONS, RULES
from stabstudy.report import write_report
from stabstudy.stability.explain import DIVERGED
from stabstudy.stability.summary import COLUMNS
from stabstudy.trace import TRACE

LOG = ["2026 attempt 1: from step 0 of 200 on cpu", *(f"line {i}" for i in range(60)), "<b>done</b>"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four trials in two cells, of which two are rough; one diverged, one failed, one damaged, one never started."""
    folder = planted.plant_study(tmp_path_factory.mktemp("pages") / "planted", depths=(2,), lrs=(1e-3, 0.1), steps=200)
    diverged = planted.settings(2, 0.5, 1.0, 0, 200)
    planted.plant_trial(folder, diverged, nonfinite_at=70, steps_done=71, final_loss=math.nan, stop_reason="diverged")
    error = {"kind": "RuntimeError", "message": "out of luck", "step": 30}
    planted.plant_trial(folder, planted.settings(2, 0.5, 1.0, 1, 200), status="failed", steps_done=30, error=error)
    planted.plant_trial(folder, planted.settings(2, 0.5, 1.0, 2, 200), status="pending", steps_done=0)
    bad = planted.plant_trial(folder, planted.settings(2, 0.5, 1.0, 3, 200))
    bad.finished(TRACE).write_bytes(b"PAR1")
    bad.log_file.write_text("the disk made a noise")
    for trial in Study.load(folder).trials.index:
        (folder / "trials" / trial / "log.txt").write_text("\n".join(LOG))
    write_report(folder, lambda line: None)
    return folder


@pytest.fixture(scope="module")
def study(path: Path) -> Study:
    return Study.load(path)


def page_of(path: Path, trial_id: str) -> Page:
    return read((path / "report" / "trials" / f"{trial_id}.html").read_text())


def ended(study: Study, kind: str) -> str:
    return next(t for t in study.trials.index if outcome(study.row(t)) == kind)


def links_of(page: Page) -> list[str]:
    return [a["href"] for tag, a in page.tags if tag == "a"]


# Every trial has one, and every mention leads to it


def test_every_trial_has_a_page_the_damaged_one_too(path: Path, study: Study) -> None:
    ids = {*study.trials.index, *(d.trial_id for d in study.damaged)}
    assert len(ids) == 8 and {p.stem for p in (path / "report" / "trials").iterdir()} == ids


def test_every_mention_is_a_link(path: Path, study: Study) -> None:
    html = (path / "report" / "index.html").read_text()
    body = re.sub(
        " data-marks='[^']*'| data-copy=\"[^\"]*\"|(?s:<pre.*?</pre>)",
        "",
        html[html.index("<body>") : html.index("<script>")],
    )
    for trial_id in study_page.paged(study):
        linked = f'<a href="trials/{trial_id}.html">{trial_id}</a>'
        steps = re.compile(rf'<a href="trials/{trial_id}\.html#step=\d+">')
        assert trial_id not in steps.sub("", body.replace(linked, ""))
    every = [[*trial_tables.all_trials(study).columns], *map(list, trial_tables.all_trials(study).rows)]
    by_cell = study.trials.sort_values(["optim.lr", "seed"], kind="stable").index  # the one axis, then seeds
    assert [row[0] for row in every[1:]] == list(by_cell)


def test_links_of_every_page_resolve(path: Path) -> None:
    for file in (path / "report" / "trials").iterdir():
        page = read(file.read_text())
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        for target in links_of(page):
            name, _, anchor = target.partition("#")
            other = (file.parent / name).read_text() if name else file.read_text()
            assert not anchor or ("data-steps" in other if anchor.startswith("step=") else f'id="{anchor}"' in other)


def test_only_known_ids_become_links_and_text_is_escaped() -> None:
    known = frozenset({"0123456789"})
    text = "0123456789, x0123456789, 0123456789a, 9876543210 <b>"
    assert str(html.linked_html(text, known, "trials/")) == (
        '<a href="trials/0123456789.html">0123456789</a>, x0123456789, 0123456789a, 9876543210 &lt;b&gt;'
    )


# What it says


def test_settings_that_differ_come_first_and_all_others_follow(path: Path, study: Study) -> None:
    trial_id = ended(study, "rough")
    page = page_of(path, trial_id)
    seed = study.row(trial_id)["seed"]
    others = ", ".join(str(s) for s in range(3) if s != seed)
    assert page.table("Settings that differ")[1:] == [
        ["learning rate", "optim.lr", "0.1", "1e-3, 0.5"], ["seed", "seed", str(seed), others],
    ]  # fmt: skip
    rest = dict(page.table("All other settings")[1:])
    assert "optim.lr" not in rest and "seed" not in rest
    for name, text in rest.items():
        assert text == words.level(plain(study.trials.loc[trial_id, name]), name)


def test_statistics_are_those_of_the_table(path: Path, study: Study) -> None:
    trial_id = ended(study, "rough")
    row = study.row(trial_id)
    shown = {r[1]: r for r in page_of(path, trial_id).table("All statistics")[1:]}
    assert list(shown) == list(COLUMNS)
    for name, (_, _, text, _, meaning) in shown.items():
        value = row[name]
        assert meaning == COLUMNS[name].meaning
        if value is None:
            assert text == words.NOTHING
        elif isinstance(value, bool):
            assert text == ("yes" if value else "no")
        elif isinstance(value, str):
            assert text == value
        elif COLUMNS[name].unit == "fraction":
            assert float(text.removesuffix(" %")) / 100 == pytest.approx(value, rel=0.05)
        else:
            assert float(text) == pytest.approx(value, rel=5e-3)


def test_spikes_and_replicates_are_those_of_the_tables(path: Path, study: Study) -> None:
    trial_id = ended(study, "rough")
    page = page_of(path, trial_id)
    own = study.spikes[study.spikes["trial_id"] == trial_id].sort_values(["start", "series"])
    shown = page.table(f"{len(own)} spikes")
    assert [row[1] for row in shown[1:]] == [str(s) for s in own["start"]]
    assert {"75", "90", "105"} <= {row[1] for row in shown[1:]}  # as planted
    assert [float(row[6]) for row in shown[1:]] == pytest.approx(list(own["peak_ratio"]), rel=5e-3)
    at = {head: i for i, head in enumerate(shown[0])}
    assert [row[at["flagged as"]] for row in shown[1:]] == list(own["part"])
    batches = [{True: "yes", False: "no"}.get(plain(b), words.NOTHING) for b in own["batch"]]
    assert [row[at["batch"]] for row in shown[1:]] == batches
    cell = page.table("The trials of this cell")
    same = study.trials[study.trials["cell_id"] == study.row(trial_id)["cell_id"]]
    assert {row[1] for row in cell[1:]} == {"this trial", *same.index} - {trial_id}
    assert {f"{t}.html" for t in same.index if t != trial_id} <= set(links_of(page))


def test_verdict_reasons_and_errors_are_said(path: Path, study: Study) -> None:
    assert "Diverged" in page_of(path, ended(study, "diverged")).headings[1][1]
    failed = page_of(path, ended(study, "failed")).text
    assert "This trial is not done: failed, 30 of 200 steps recorded." in failed
    assert "RuntimeError: out of luck (step 30)" in failed
    waiting = page_of(path, ended(study, "unfinished")).text
    assert "0 of 200 steps recorded." in waiting and "No step of this trial is recorded" in waiting
    damaged = page_of(path, study.damaged[0].trial_id).text
    assert "Its files are damaged" in damaged and "the disk made a noise" in damaged


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"state": "oom"}, "oom"),
        ({"verdict_reason": "untrained"},
         "not judged: untrained (the loss never came below the entropy of single tokens)"),
        ({"verdict_reason": "too_short"}, "not judged: too short"),
        ({"verdict_reason": "no_gradient_norm"}, "not judged: without a gradient norm"),
        ({"verdict_reason": "strided"}, "not judged: logged with gaps"),
        ({"verdict": "stable"}, "stable"),
        ({"verdict": "rough", "verdict_rule": "rough"}, "rough"),
        ({"verdict": "rough", "verdict_rule": "rough", "sampling_noise": True}, "rough (sampling noise)"),
        ({"verdict": "spiky", "verdict_rule": "R1+R2"}, "spiky (long and recurring spikes, R1+R2)"),
        ({"verdict": "diverged", "verdict_rule": "above_unigram"},
         "diverged (loss back above the entropy of single tokens, above_unigram)"),
    ],
)  # fmt: skip
def test_a_verdict_and_its_absence_stand_in_words(values: dict[str, object], text: str) -> None:
    row = {"state": "done", "verdict": None, "verdict_rule": None, "verdict_reason": None, "sampling_noise": None}
    assert trial_tables.ended(row | values) == text


def test_every_rule_and_reason_has_words() -> None:
    assert set(RULES) == {"R1", "R2", "R1+R2", *DIVERGED}
    assert set(REASONS) == {"untrained", "too_short", "no_gradient_norm", "norm_after_clipping", "all_zero", "strided"}


@pytest.mark.usefixtures("undrawn")
def test_a_trial_without_a_verdict_says_why_on_its_page_and_in_the_table(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    short = planted.plant_trial(tmp_path / "s", planted.settings(steps=50), logit=400.0)
    write_report(tmp_path / "s", lambda line: None)
    (row,) = trial_tables.all_trials(Study.load(tmp_path / "s")).rows
    assert "not judged: too short" in row
    page = page_of(tmp_path / "s", short.trial_id)
    assert "Not judged: 38 evaluable steps, and a verdict needs 50." in page.text
    assert "Warning: attention logits passed 100 at step " in page.text


def test_sampling_noise_is_said_of_a_trial(path: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = ended(study, "rough")
    assert not any(trial_page.NOISE in text for text in trial_page.explanation(study, rough))
    monkeypatch.setitem(study._rows[rough], "sampling_noise", True)
    assert trial_page.explanation(study, rough)[-1] == f"Rough by {trial_page.NOISE}."


def test_the_log_ends_the_page_as_text(path: Path, study: Study) -> None:
    text = page_of(path, ended(study, "stable")).text
    assert "log.txt, the last 40 lines" in text and "<b>done</b>" in text
    assert "line 21" in text and "line 20\n" not in text


def test_figures_show_the_trace_and_the_layers(path: Path, study: Study) -> None:
    rough = page_of(path, ended(study, "rough"))
    alts = [a["alt"] for tag, a in rough.tags if tag == "img"]
    assert len(alts) == 3 and re.search(r"\d spikes\.", alts[0]) and "attention logit, largest" in alts[1]
    assert "At step" in alts[2]
    assert [r[0] for r in rough.table("Values at probes")][:2] == ["step", "0"]
    stable = page_of(path, ended(study, "stable"))
    assert sum(tag == "img" for tag, _ in stable.tags) == 2
    assert "Layer by layer" not in stable.text  # it has no spike to draw them around


# Large studies stay light


@pytest.mark.usefixtures("undrawn")
def test_the_notable_are_drawn_and_the_rest_say_how_to(
    path: Path, tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = trial_page.notable(study)
    kinds = [outcome(study.row(t)) for t in order]
    assert order[0] == study.typical() and kinds[1:] == ["diverged", "failed", "rough", "rough", "stable"]
    monkeypatch.setattr(trial_page, "MOST_DRAWN", 2)
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    write_report(copy, lambda line: None)
    pages = {t: page_of(copy, t) for t in study.trials.index}
    assert {t for t, p in pages.items() if any(tag == "img" for tag, _ in p.tags)} == set(order[:2])
    assert "the report draws the 2 most notable" in pages[ended(study, "rough")].text
    assert f'"{ended(study, "rough")}").savefig' in pages[ended(study, "rough")].text


@pytest.mark.slow
def test_what_has_not_changed_is_not_drawn_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / path.name
    shutil.copytree(path, copy)
    drawn: list[str] = []
    real = trial_page.with_figures
    monkeypatch.setattr(trial_page, "with_figures", lambda s, p: drawn.append(p.trial_id) or real(s, p))
    before = _bytes(copy)
    write_report(copy, lambda line: None)
    assert drawn == [] and _bytes(copy) == before
    log = next((copy / "trials").glob("*/trace.parquet")).parent / "log.txt"
    log.write_text("one more line")
    write_report(copy, lambda line: None)
    assert drawn == [log.parent.name]
    log.write_text("\n".join(LOG))
    write_report(copy, lambda line: None)
    assert _bytes(copy) == before


def test_a_changed_record_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"
    planted.plant_frame(folder)
    old = planted.plant_trial(folder, planted.settings(steps=60))
    write_report(folder, lambda line: None)
    page = (folder / "report" / "trials" / f"{old.trial_id}.html").read_text()
    shutil.rmtree(old.path)
    planted.plant_trial(folder, planted.settings(steps=60), spikes={50: 8.0})
    write_report(folder, lambda line: None)
    assert (folder / "report" / "trials" / f"{old.trial_id}.html").read_text() != page


@pytest.mark.usefixtures("undrawn")
def test_pages_of_trials_that_are_gone_are_removed(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0, 1))
    write_report(folder, lambda line: None)
    pages = sorted((folder / "report" / "trials").iterdir())
    shutil.rmtree(folder / "trials" / pages[0].stem)
    write_report(folder, lambda line: None)
    assert sorted((folder / "report" / "trials").iterdir()) == pages[1:]


# Safe


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    everything = " ".join(PAYLOADS)
    planted.plant_frame(tmp_path / "s", question=everything)
    for seed, status in enumerate(("done", "failed")):
        trial = planted.plant_trial(
            tmp_path / "s", planted.settings(seed=seed, steps=60), status=status, case=everything,
            choices={"data": PAYLOADS[0], "model": PAYLOADS[1]}, error={"kind": "x", "message": everything, "step": 1},
        )  # fmt: skip
        trial.log_file.write_bytes("\n".join(PAYLOADS).encode() + b"\xff\x00</pre><script>alert(2)</script>")
    write_report(tmp_path / "s", lambda line: None)
    for trial_id in Study.load(tmp_path / "s").trials.index:
        html = (tmp_path / "s" / "report" / "trials" / f"{trial_id}.html").read_text()
        page = read(html)
        assert [tag for tag, _ in page.tags].count("script") == 1 and not {t for t, _ in page.tags} & {"b", "svg"}
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        assert "</pre><script>alert(2)</script>" in page.text and "<script>alert(1)</script>" in page.text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


@pytest.mark.usefixtures("undrawn")
def test_a_folder_named_unlike_a_trial_gets_no_page(tmp_path: Path) -> None:
    folder = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    bad = folder / "trials" / "..%2f<b>"
    bad.mkdir()
    (bad / "config.json").write_text(json.dumps({"trial_id": "x"}))
    write_report(folder, lambda line: None)
    assert len(list((folder / "report" / "trials").iterdir())) == 1


# Downloads


def test_figures_come_as_pixels_and_numbers(path: Path) -> None:
    page = read((path / "report" / "index.html").read_text())
    figures = path / "report" / "figures"
    numbers = [t for t, c in zip(page.tables, page.captions, strict=True) if c == "Numbers of this figure"]
    names = [a["id"] for tag, a in page.tags if tag == "figure" and not a["id"].startswith("first-")]
    for name, table in zip(names, numbers, strict=True):
        assert {f"figures/{name}.{e}" for e in ("svg", "png", "csv")} <= set(links_of(page))
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        rows = list(csv.reader(io.StringIO((figures / f"{name}.csv").read_text())))
        assert rows == [[("" if c == words.NOTHING else c) for c in row] for row in table]


def test_spikes_csv_is_the_table(path: Path, study: Study) -> None:
    rows = list(csv.DictReader(io.StringIO((path / "report" / "spikes.csv").read_text())))
    assert [row["trial_id"] for row in rows] == list(study.spikes["trial_id"])
    assert [float(row["peak"]) for row in rows] == list(study.spikes["peak"])
    assert [row["class"] for row in rows] == list(study.spikes["class"])

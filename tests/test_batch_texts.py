"""The text of a spike's batch on the page of its trial: what was read, nothing hidden in it, and none that is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import planted
import pytest
from test_page import read

from stabstudy.analysis.elements import Code, Text
from stabstudy.analysis.report import trial_page
from stabstudy.analysis.report.batch_texts import MOST_CHARACTERS, batch_texts, shortened, visible
from stabstudy.analysis.report.html import html_trial
from stabstudy.analysis.study import Study
from stabstudy.data import sources, step_texts

HOSTILE = "<script>alert(1)</script> \u202e\x1b[31m\x00\ttab\n</pre><b>bold</b> "


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """One trial on a text of ours, which the token cache holds, with spikes at steps 60 and 75, the second higher."""
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(f"{HOSTILE}number {i} " * 3)
    data = {"source": "text", "path": str(tmp_path / "texts"), "seq_len": 50, "validation_share": 0.2}
    config = planted.settings(batch_size=4, data=data)
    fingerprint = sources.fingerprint(config.data)
    step_texts.text_of_step(config, 0, fingerprint, tmp_path / "cache")  # as training leaves it
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", config, spikes={60: 6.0, 75: 12.0}, fingerprint=fingerprint)
    return Study.load(tmp_path / "s")


def test_the_highest_spikes_are_printed_as_they_were_read(study: Study, tmp_path: Path) -> None:
    (trial_id,) = study.trials.index
    blocks = list(batch_texts(study, trial_id, printed=True))
    printed = [b for b in blocks if isinstance(b, Code) and b.shown]
    assert [b.title for b in printed] == [
        "What it read at step 75, the highest spike of the gradient norm: 4 sequences",
        "What it read at step 60, the second highest spike: 4 sequences",
    ]
    read_again = study.batch(trial_id, 75, tmp_path / "cache")
    lines = printed[0].text.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [visible(text) for text in read_again["text"]]
    assert [line.split()[2] for line in lines] == [f"{d}:" for d in read_again["document"]]
    assert isinstance(blocks[1], Code) and f'Study.load("results/s").batch("{trial_id}", 75)' in blocks[1].text
    assert [b.title for b in batch_texts(study, trial_id, printed=False) if isinstance(b, Code)] == [
        "The text of the batch at step 75, the highest spike of the gradient norm: in Python",
        "The text of the batch at step 60, the second highest spike: in Python",
    ]


def test_it_is_text_in_the_page_whatever_it_holds(study: Study) -> None:
    (trial_id,) = study.trials.index
    html = html_trial(trial_page.page(study, trial_id, frozenset(), drawn=True), "")
    page = read(html)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "b" not in {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> \\u202e␛[31m␀→tab↵" in page.text.replace("\n", "")
    assert not {"\x00", "\x1b", "\u202e"} & set(html)


def test_a_text_that_is_gone_is_said_to_be_and_no_path_is_named(study: Study, tmp_path: Path) -> None:
    (trial_id,) = study.trials.index
    shutil.rmtree(tmp_path / "cache")
    first, code, *_ = batch_texts(study, trial_id, printed=True)
    assert first == Text(
        "The text of step 75, the highest spike of the gradient norm, is not available here: data are not in the "
        "token cache."
    )
    assert isinstance(code, Code) and "batch(" in code.text and not (tmp_path / "cache").exists()


def test_a_rough_trial_without_a_spike_shows_its_largest_norm(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    (trial_id,) = study.trials.index
    study.spikes_by_trial.clear()
    monkeypatch.setitem(study._rows[trial_id], "verdict", "stable")
    assert not list(batch_texts(study, trial_id, printed=True))
    monkeypatch.setitem(study._rows[trial_id], "verdict", "rough")
    monkeypatch.setitem(study._rows[trial_id], "grad_norm_argmax", 75)
    (block, _) = batch_texts(study, trial_id, printed=True)
    assert isinstance(block, Code) and block.title.startswith("What it read at step 75, the largest gradient norm")


@pytest.mark.parametrize(("count", "length", "shown"), [(4, 50, 4), (64, 2_000, 15), (1, 10_000, 1)])
def test_long_batches_are_cut_and_say_so(count: int, length: int, shown: int) -> None:
    text = shortened([(i, "x" * length) for i in range(count)])
    lines = text.splitlines()
    assert len(text) < MOST_CHARACTERS + 60 * len(lines) and text.count("x") == min(count * length, MOST_CHARACTERS)
    assert (lines[-1] == f"... and {count - shown} more sequences") == (count > shown)
    assert ("more characters" in lines[0]) == (length > MOST_CHARACTERS // shown)


def test_every_character_can_be_seen() -> None:
    assert visible("a\r\n\u200b\u2028\ud800é中\x7f") == "a␍↵\\u200b\\u2028\\ud800é中␡"

"""Studies beside each other: cells that match, differences paired by seed, refusals of what cannot be compared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import planted
import pytest
import scipy.stats

from stabstudy import report as command
from stabstudy.analysis import study_statistics, words
from stabstudy.analysis.elements import Figure, Report, Table, Text
from stabstudy.analysis.report import comparison_page
from stabstudy.analysis.study import Study
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import COLUMNS


def plant(folder: Path, decay: float, gain: float, eval_hash: str = planted.EVAL_HASH, seeds: int = 3) -> Study:
    """A study over two learning rates with another weight decay, whose losses are `gain` lower."""
    planted.plant_frame(folder)
    for lr in (0.01, 0.1):
        for seed in range(seeds):
            values = {
                "model": {"depth": 2},
                "optim": {"lr": lr, "weight_decay": decay, "warmup_steps": 10},
                "train": {"steps": 120},
                "seed": seed,
            }
            loss = 2.501 + lr + 0.01 * seed - gain - 0.001 * seed * gain
            planted.plant_trial(folder, planted.cfg.from_dict(values), final_loss=loss, eval_hash=eval_hash)
    return Study.load(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Study]:
    base = tmp_path_factory.mktemp("several")
    return [plant(base / "low", 0.1, 0.0), plant(base / "high", 0.3, 0.2)]


@pytest.fixture(scope="module")
def made(two: list[Study]) -> Report:
    """The report on both."""
    return comparison_page.report(two)


def table(made: Report, title: str) -> Table:
    return next(b for s in made.sections for b in s.blocks if isinstance(b, Table) and b.title.startswith(title))


def test_the_whole_has_the_study_as_its_first_axis(two: list[Study]) -> None:
    whole = Study.concat(two)
    assert whole.axes == {"study": ["low", "high"], "optim.lr": [0.01, 0.1]}
    assert len(whole.trials) == 12 and whole.trials.index.is_unique
    assert len(whole.cells) == 4 and set(whole.cells["n"]) == {3}
    trial_id = whole.trials.index[0]
    name, _, rest = trial_id.partition("/")
    own = next(s for s in two if s.name == name)
    assert whole.trace(trial_id)["grad_norm"].tolist() == own.trace(rest)["grad_norm"].tolist()


def test_a_part_of_the_whole_keeps_the_study_as_an_axis(two: list[Study]) -> None:
    """Weight decay, which differs between the studies alone, is no axis of the whole, so of no part of it either."""
    whole = Study.concat(two)
    ids = set(whole.trials.index[whole.trials["seed"] == 0])
    assert whole.part(ids).axes == whole.axes
    assert whole.part({t for t in ids if whole.trials["optim.lr"][t] == 0.1}).axes == {"study": ["low", "high"]}
    assert list(two[0].part({t for t in two[0].trials.index}).axes) == ["optim.lr"]


def test_differences_are_paired_by_seed_and_level(two: list[Study], made: Report) -> None:
    losses = [r for r in table(made, "Paired differences").rows if r[1] == "final loss"]
    ((studies, _, means, change, interval, pairs, seeds),) = losses
    assert (studies, pairs, seeds) == ("low → high", "6", "3")
    assert change == "-0.200" and means == "2.57 → 2.37"
    assert interval.startswith("-0.201")
    (differences,) = made.findings
    whole = Study.concat(two)
    metrics = study_statistics.comparable(whole.trials)
    claims = study_statistics.study_effects(whole.trials, whole.axes, metrics)
    row = next(r for r in claims if r["metric"] == "final_loss")
    assert row["estimate"] == pytest.approx(-0.2002) and row["p_holm"] < 1e-6
    text = f"Final validation loss, low → high: {words.change(row)} (p {words.number(row['p_holm'], 2)}, Holm)."
    assert text in differences.sentences and text.startswith("Final validation loss, low → high: -0.200 [-0.2")


def test_an_effect_starts_from_the_first_study() -> None:
    """As the table of paired differences does; the model orders names by their letters."""
    row = {"a": "high", "b": "low", "scale": "difference", "estimate": 0.2, "low": 0.1, "high": 0.4}
    turned = {"a": "low", "b": "high", "scale": "difference", "estimate": -0.2, "low": -0.4, "high": -0.1}
    assert study_statistics.effect_from("low", row) == turned and study_statistics.effect_from("high", row) == row
    ratio = {"scale": "ratio", "estimate": 2.0, "low": 1.0, "high": 4.0}
    row |= {"scale": "ratio", "estimate": 0.5, "low": 0.25, "high": 1.0}
    assert study_statistics.effect_from("low", row) == turned | ratio


@pytest.mark.usefixtures("undrawn")
def test_the_other_order_turns_every_sign(two: list[Study]) -> None:
    ((*_, change, interval, _, _),) = [
        r for r in table(comparison_page.report(two[::-1]), "Paired differences").rows if r[1] == "final loss"
    ]
    assert change == "0.200" and interval.endswith("0.201")


@pytest.mark.usefixtures("undrawn")
def test_a_single_seed_tests_nothing_and_says_so(tmp_path: Path) -> None:
    alone = [plant(tmp_path / name, decay, gain, seeds=1) for name, decay, gain in (("a", 0.1, 0.0), ("b", 0.3, 0.2))]
    (finding,) = comparison_page.report(alone).findings
    reason = "not tested (one seed: no scatter between seeds to test against)."
    assert f"Final validation loss: {reason}" in finding.sentences
    assert all(sentence.endswith(reason) for sentence in finding.sentences)


def test_what_differs_between_them_is_named(made: Report) -> None:
    assert table(made, "Settings that differ").rows == (("optim.weight_decay", "0.1", "0.3"),)
    cells = table(made, "Cells in at least two").rows
    assert [row[0] for row in cells] == ["0.01", "0.1"] and all(row[-1] == "3 stable" for row in cells)
    assert {b.name for s in made.sections for b in s.blocks if isinstance(b, Figure)} == {
        "studies-final-loss",
        "studies-grad-norm-log-sd",
        "studies-attn-logit-peak",
    }


@pytest.mark.usefixtures("undrawn")
def test_losses_on_other_batches_are_not_compared(tmp_path: Path, two: list[Study]) -> None:
    other = plant(tmp_path / "other", 0.3, 0.2, eval_hash="a" * 16)
    made = comparison_page.report([two[0], other])
    assert "The evaluation sets differ: losses are shown, and not compared." in made.warnings
    compared = {row[1] for row in table(made, "Paired differences").rows}
    assert "final loss" not in compared and "roughness" in compared


@pytest.mark.usefixtures("undrawn")
def test_spike_rates_of_other_rules_are_not_compared(
    tmp_path: Path, two: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stabstudy.analysis.tables.Rules", lambda: Rules(k_grad=7.0))
    other = plant(tmp_path / "other", 0.3, 0.2)
    assert other.rules.k_grad == 7.0
    made = comparison_page.report([two[0], other])
    assert any("detector_id" in w for w in made.warnings)
    compared = {row[1] for row in table(made, "Paired differences").rows}
    assert COLUMNS["spike_abs_rate"].label not in compared and "roughness" in compared
    texts = [b.text for s in made.sections for b in s.blocks if isinstance(b, Text)]
    assert any(t.startswith(words.STATISTICS["spike_abs_rate"]) and "not compared" in t for t in texts)


@pytest.mark.usefixtures("undrawn")
def test_studies_without_a_common_cell_say_so(tmp_path: Path, two: list[Study]) -> None:
    planted.plant_frame(tmp_path / "far")
    for lr in (0.5, 0.6):
        planted.plant_trial(tmp_path / "far", planted.settings(2, lr, seed=7))
    made = comparison_page.report([two[0], Study.load(tmp_path / "far")])
    texts = [b.text for s in made.sections for b in s.blocks if isinstance(b, Text)]
    why = "Learning rate: 0.01 and 0.1 in low, 0.5 and 0.6 in far. Seed: 0, 1 and 2 in low, 7 in far."
    fills = "python -m stabstudy.sweep sweep=planted optim.lr=0.01,0.1 'seeds=[0,1,2]' study=far"
    assert f"{comparison_page.UNPAIRED} {why} {comparison_page.TRAINS}{fills}" in texts
    assert texts.count(comparison_page.NO_CELL) == 2  # in place of figures and of tables
    assert [f.sentences for f in made.findings] == [[f"{comparison_page.UNPAIRED} {comparison_page.TRAINS}{fills}"]]
    planted.plant_trial(tmp_path / "far", planted.settings(2, 0.7, seed=7), fingerprint="a" * 16)
    other_data = comparison_page.report([two[0], Study.load(tmp_path / "far")])
    assert [f.sentences for f in other_data.findings] == [[comparison_page.UNPAIRED]]  # no training makes partners


def test_each_matched_cell_has_its_paired_change(made: Report) -> None:
    """The planted difference: 0.2 nat lower, a little more for each seed."""
    shown = table(made, "Differences in each")
    head, *rest = [shown.columns, *shown.rows]
    at = head.index("final loss (capped)")
    differences = [-(0.2 + 0.001 * seed * 0.2) for seed in range(3)]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(differences), scipy.stats.sem(differences))
    assert [row[:3] for row in rest] == [("0.01", "low → high", "3"), ("0.1", "low → high", "3")]
    assert {row[at] for row in rest} == {
        f"{words.number(float(np.mean(differences)))} ({words.number(low)} to {words.number(high)})"
    }


@pytest.mark.usefixtures("undrawn")
def test_cells_on_other_evaluation_batches_have_no_change_of_loss(tmp_path: Path, two: list[Study]) -> None:
    other = plant(tmp_path / "elsewhere", 0.1, 0.0, eval_hash="another")
    found = table(comparison_page.report([two[0], other]), "Differences in each")
    assert {row[found.columns.index("final loss (capped)")] for row in found.rows} == {words.NOTHING}
    assert words.NOTHING not in {row[found.columns.index("roughness")] for row in found.rows}


@pytest.mark.usefixtures("undrawn")
def test_cells_on_other_data_are_not_paired(tmp_path: Path, two: list[Study]) -> None:
    planted.plant_frame(tmp_path / "moved")
    for lr in (0.01, 0.1):
        config = planted.cfg.from_dict(
            {"model": {"depth": 2}, "optim": {"lr": lr, "warmup_steps": 10}, "train": {"steps": 120}}
        )
        planted.plant_trial(tmp_path / "moved", config, fingerprint="a" * 16)
    made = comparison_page.report([two[0], Study.load(tmp_path / "moved")])
    tables = [b.title for s in made.sections for b in s.blocks if isinstance(b, Table)]
    assert any(t.startswith("Cells in") for t in tables) and not any(
        t.startswith("Differences in each") for t in tables
    )


@pytest.mark.usefixtures("undrawn")
def test_other_lengths_of_training_are_named(tmp_path: Path, two: list[Study], made: Report) -> None:
    planted.plant_frame(tmp_path / "short")
    planted.plant_trial(tmp_path / "short", planted.settings(2, 0.01, steps=100))
    said = "Trials have different numbers of steps: final losses and largest values are those of different lengths."
    assert said in comparison_page.report([two[0], Study.load(tmp_path / "short")]).warnings
    assert said not in made.warnings


def test_equal_names_are_refused(two: list[Study]) -> None:
    with pytest.raises(ValueError, match="different names"):
        Study.concat([two[0], two[0]])
    with pytest.raises(ValueError, match="at least two"):
        Study.concat(two[:1])


@pytest.mark.slow
def test_the_command_writes_the_comparison(
    two: list[Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(s.folder.path) for s in two]
    assert command.main([*paths, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"comparison: {tmp_path / 'out' / 'index.html'}"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "low against high" in page and "optim.weight_decay" in page
    assert (tmp_path / "out" / "low" / "index.html").exists()
    assert re.findall(r'href="([^"]+)">(?:low|high)<', page) == ["low/index.html", "high/index.html"]
    assert command.main(paths) == 0
    beside = two[0].folder.report / "with-high"
    ways = re.findall(r'href="([^"]+)">(?:low|high)<', (beside / "index.html").read_text())
    assert ways == ["../index.html", "../../../high/report/index.html"] and all((beside / w).exists() for w in ways)
    before = page
    assert command.main([*paths, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").read_text() == before

"""The gate of a study against its baseline: what it lets pass, what it fails on, how often it fails on nothing.

`python tests/test_gate.py` prints the shares of the simulation.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import tabled

from stabstudy import cli, report
from stabstudy.analysis import compare, factors
from stabstudy.analysis.report import gate
from stabstudy.analysis.study import Study
from stabstudy.store import StudyFolder

AXES: dict[str, tuple[Any, ...]] = {"optim.lr": (1e-3, 1e-2, 1e-1), "optim.clip": (0.5, 1.0)}
MOST_ALARMS, STUDIES, STEPS = 0.07, 150, 388
ROUGH = dict.fromkeys(planted.ROUGH, 8.0)


def two_studies(
    rng: np.random.Generator,
    seeds: int = 3,
    rougher: float = 1.0,
    interaction: float = 0.0,
    shared: float = 0.5,
    spikes: float = 3.0,
    levels: int = 3,
    noise: str = "normal",
    alone: bool = False,
) -> gate.Pair:
    """A baseline and a new study of each seed in each cell, of chance alone but for `rougher`.

    In units of a trial's standard deviation: seeds and cells differ by 1, the study and each axis act by `interaction`
    differently at each seed and level (`alone`: the study only). `shared`: the share of a trial's variance that its
    partner has too (the same initial weights, the same batches). `spikes`: flagged steps of a usual trial. `rougher`:
    what the new study's rates and roughness are multiplied with, and the share of unstable trials (a tenth).
    """
    axes = AXES | {"optim.lr": AXES["optim.lr"][:levels]}
    table = pd.DataFrame(
        list(itertools.product(("new", "old"), *axes.values(), range(seeds))), columns=["study", *axes, "seed"]
    )
    n, partner = len(table), pd.factorize(pd.MultiIndex.from_frame(table[[*axes, "seed"]]))[0]
    cell = pd.factorize(pd.MultiIndex.from_frame(table[[*axes]]))[0]

    def statistic() -> np.ndarray:
        own = rng.standard_normal(n) if noise == "normal" else rng.standard_t(4, n) / math.sqrt(2)
        own = math.sqrt(shared) * rng.standard_normal(n)[partner] + math.sqrt(1 - shared) * own
        own += rng.standard_normal(n)[cell] + rng.standard_normal(seeds)[table["seed"]]
        for axis in ("study",) if alone else ("study", *axes):
            codes = pd.factorize(table[axis])[0]
            own += interaction * rng.standard_normal((seeds, codes.max() + 1))[table["seed"], codes]
        return own

    factor = np.where(table["study"] == "new", rougher, 1.0)
    unstable = rng.random(n) < np.minimum(1.0, 0.1 * factor)
    table["final_loss_capped"] = 2.5 + 0.03 * statistic()
    table["grad_norm_log_sd"] = factor * np.exp(0.2 * statistic() - 1.5)
    table["spike_abs_rate"] = rng.poisson(spikes * factor * np.exp(0.5 * statistic())) / STEPS
    table["verdict"] = np.where(unstable, np.where(rng.random(n) < 0.5, "rough", "spiky"), "stable")
    same: dict[str, Any] = {"n_evaluable": STEPS, "state": "done", "eval_hash": "e", "data_fingerprint": "f"}
    table = table.assign(**same, log_stride=1, detector_id="jump-1", sampling_noise=None)
    return gate.Pair(gate.ranked(table), {"study": ["old", "new"], **axes}, "old", "new")


def failures(studies: int, **how: Any) -> float:
    """The share of pairs of studies on which `worse` fails."""
    rng = np.random.default_rng([studies, *(int(100 * v) for v in how.values() if isinstance(v, int | float))])
    return float(np.mean([not gate.worse(two_studies(rng, **how))[0] for _ in range(studies)]))


# What it says of studies of chance


def test_chance_seldom_fails_it() -> None:
    """Of 10 studies three or fewer: were the true share .07, more would come of it in one sample of two hundred."""
    assert 10 * failures(10) <= 3


def test_twice_the_roughness_fails_it() -> None:
    assert failures(4, rougher=2.0) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "interaction"), [(2, 0.0), (2, 1.0), (3, 0.5), (5, 1.0)])
def test_studies_of_chance(seeds: int, interaction: float) -> None:
    assert failures(STUDIES, seeds=seeds, interaction=interaction) <= MOST_ALARMS


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"shared": 0.0}, {"spikes": 0.2}, {"levels": 1}, {"noise": "t4"}], ids=str)
def test_other_studies_of_chance(how: dict[str, Any]) -> None:
    """Partners that share nothing; rare spikes; two cells alone; heavy tails."""
    assert failures(STUDIES, **how) <= MOST_ALARMS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "power"), [({}, 0.99), ({"seeds": 2}, 0.95), ({"levels": 1}, 0.8), ({"interaction": 1.0}, 0.5)], ids=str
)
def test_power_at_twice_the_roughness(how: dict[str, Any], power: float) -> None:
    assert failures(100, rougher=2.0, **how) >= power


@pytest.mark.slow
@pytest.mark.whole
def test_the_known_weakness() -> None:
    """Only the study acts differently by seed, and as much as a trial scatters: no more than the docstring says."""
    assert failures(400, seeds=5, interaction=1.0, alone=True) <= 0.15


@pytest.mark.slow
def test_the_residual_alone_would_fail_studies_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """That this file can fail: without the moderated error, what differs by seed is taken for the study's doing."""
    monkeypatch.setattr(
        factors.Family, "error", lambda self, m, axis: factors.Error(m.additive[0] / m.additive[1], m.additive[1])
    )
    assert failures(60, seeds=5, interaction=1.0) > 2 * MOST_ALARMS


# What it says of given studies


def rows(seeds: int = 3, **columns: Any) -> list[dict[str, Any]]:
    """Trials of two learning rates; `columns`: a value for all, or one for each trial."""
    grid = list(itertools.product((1e-3, 1e-2), range(seeds)))
    each = {k: v if isinstance(v, list) else [v] * len(grid) for k, v in columns.items()}
    noise = [0.01 * math.sin(7 * i) for i in range(len(grid))]
    return [
        tabled.trial(lr=lr, seed=seed)
        | {"final_loss": 2.5 + noise[i], "final_loss_capped": 2.5 + noise[i], "spike_abs_rate": 0.01}
        | {"grad_norm_log_sd": 0.2 * math.exp(noise[-i]), "n_evaluable": 400}
        | {name: values[i] for name, values in each.items()}
        for i, (lr, seed) in enumerate(grid)
    ]


def answer(new: list[dict[str, Any]], old: list[dict[str, Any]], kind: str) -> gate.Gate:
    return gate.judge(tabled.study(new), tabled.study(old), kind)


def test_equal_studies_pass_also_with_one_seed() -> None:
    for seeds in (1, 3):
        passed = answer(rows(seeds), rows(seeds), "worse")
        assert passed.passed and passed.unfinished == 0
        assert passed.conclusion.startswith("gate passed (worse): no claim that new is worse than baseline: no stat")
        assert all("no difference found" in line for line in passed.lines) and len(passed.lines) == 4


def test_what_is_higher_is_worse_and_what_is_lower_is_better() -> None:
    up = [0.4 * math.exp(0.02 * math.cos(i)) for i in range(6)]
    failed = answer(rows(grad_norm_log_sd=up), rows(), "worse")
    passed = answer(rows(), rows(grad_norm_log_sd=up), "worse")
    assert not failed.passed and passed.passed
    ratio = math.exp(np.mean(np.log(up)) - np.mean(np.log([r["grad_norm_log_sd"] for r in rows()])))
    stated = re.search(
        r"new is worse than baseline in roughness ×([\d.]+) \[([\d.]+), ([\d.]+)\], p", failed.conclusion
    )
    assert stated is not None and float(stated[1]) == pytest.approx(ratio, abs=0.01)
    assert float(stated[2]) < ratio < float(stated[3])
    assert "6 pairs of trials, 3 seeds" in failed.conclusion
    assert any(line.startswith("roughness") and line.endswith(": better") for line in passed.lines)


@pytest.mark.slow
def test_only_partners_count() -> None:
    """What one study alone holds, another seed or rate, changes nothing."""
    more = rows(5, grad_norm_log_sd=9.0)
    new = [*rows(), *(row for row in more if row["seed"] > 2)]
    alone = rows(spike_abs_rate=0.5)[:3]
    new += [row | {"optim.lr": 0.3} for row in alone]
    assert answer(new, rows(), "worse").conclusion == answer(rows(), rows(), "worse").conclusion


def test_a_setting_that_differs_is_named() -> None:
    other = [row | {"optim.weight_decay": 0.3} for row in rows()]
    assert answer(other, rows(), "worse").lines[0] == "differs: optim.weight_decay 0.1 in baseline, 0.3 in new"


def test_rough_holds_each_cell_that_was_stable() -> None:
    old = rows(verdict=["stable"] * 3 + ["stable", "rough", "stable"])
    new = rows(verdict=["stable", "stable", "spiky", "diverged", "rough", "stable"])
    failed = answer(new, old, "rough")
    (line,) = failed.lines
    assert re.fullmatch(r"[0-9a-f]{10} spiky: learning rate 1e-3, seed 2", line)
    assert failed.conclusion == (
        "gate failed (rough): 1 spiky of 3 trials of new, in 1 of 1 cell in which baseline was stable"
    )
    assert answer(old, old, "rough").passed  # what was rough may be
    noisy = answer(rows(verdict=["rough"] * 6, sampling_noise=True), rows(), "rough")
    assert not noisy.passed and ", by sampling noise:" in noisy.lines[0] and "6 rough of 6" in noisy.conclusion


@pytest.mark.slow
def test_rough_counts_seeds_that_the_baseline_lacks_and_says_what_has_no_verdict() -> None:
    new = rows(4, verdict=["stable", None, "stable", "rough"] + ["stable"] * 4)
    assert answer(new, rows(), "rough").conclusion == (
        "gate failed (rough): 1 rough of 8 trials of new, in 1 of 2 cells in which baseline was stable; "
        "1 trial without a verdict"
    )


@pytest.mark.slow
def test_many_rough_trials_are_not_all_listed() -> None:
    failed = answer(rows(15, verdict="rough"), rows(15), "rough")
    assert len(failed.lines) == gate.MOST_LISTED + 1 and failed.lines[-1] == "and 10 more"


@pytest.mark.parametrize(
    ("new", "old", "kind", "reason"),
    [
        ({"eval_hash": "other"}, {}, "worse", "the evaluation sets differ (eval_hash), so losses cannot be compared"),
        ({"detector_id": "jump-2"}, {}, "rough", "the rules for spikes differ (detector_id)"),
        ({"data_fingerprint": "g"}, {}, "worse", "no cell of new is in baseline, with the same data. The studies read"),
        ({"optim.lr": 0.3}, {}, "rough", "no cell of new is in baseline, with the same data. Learning rate: "),
        ({"seed": 9}, {}, "worse", "no done trial of new has a partner of the same cell and seed in baseline"),
        ({"state": "failed"}, {}, "worse", "no done trial of new has a partner of the same cell and seed"),
        ({"seeds": 1, "final_loss_capped": 3.0}, {"seeds": 1}, "worse", "nothing that differs can be tested: one seed"),
        ({}, {"verdict": "rough"}, "rough", "no cell of new is one in which every trial of baseline is done and sta"),
        ({}, {"state": "lost"}, "rough", "no cell of new is one in which every trial of baseline is done and stable"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(new: dict[str, Any], old: dict[str, Any], kind: str, reason: str) -> None:
    with pytest.raises(compare.Refused) as error:
        answer(rows(**new), rows(**old), kind)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)


@pytest.mark.slow
def test_losses_on_other_sets_are_no_matter_to_rough() -> None:
    assert answer(rows(eval_hash="other"), rows(), "rough").passed


def test_trials_that_are_not_done_make_it_pass_in_part() -> None:
    passed = answer([*rows(), *rows(4, state="failed", verdict=None)[3:4]], rows(), "worse")
    assert passed.passed and passed.unfinished == 1
    assert passed.conclusion.startswith("gate passed in part (1 trial not done or damaged) (worse): ")


# The command

Out = pytest.CaptureFixture[str]


def plant(path: Path, log_sd: float = 0.08, seeds: int = 3, **how: Any) -> Path:
    """Two learning rates; equal trials of two studies have the same noise, of another size."""
    planted.plant_frame(path)
    for lr, seed in itertools.product((1e-3, 1e-2), range(seeds)):
        loss = 2.5 + 0.01 * math.sin(50 * lr + seed)
        planted.plant_trial(path, planted.settings(lr=lr, seed=seed), log_sd=log_sd, final_loss=loss, **how)
    return path


@pytest.mark.slow
def test_a_rougher_study_is_reported_and_ends_with_5_and_the_numbers(tmp_path: Path, capsys: Out) -> None:
    old, new = plant(tmp_path / "old"), plant(tmp_path / "new", log_sd=0.16)
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    assert report.main([str(new), "--baseline", str(old), "--fail-on", "worse"]) == cli.GATE_FAILED == 5
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"gate failed \(worse\): new is worse than old in roughness ×(1\.[89]|2)", lines[-1])
    assert lines[-1].endswith("6 pairs of trials, 3 seeds)") and f"report: {new / 'report' / 'index.html'}" in lines
    assert before == {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}  # nothing is written into the baseline


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The studies whose report was written: here none is, which takes seconds."""
    written: list[Path] = []

    def write(folder: StudyFolder, say: object, out: Path | None, show: object) -> tuple[Study, Path, dict[str, Any]]:
        written.append(folder.path)
        return Study(folder), folder.path, {}

    monkeypatch.setattr(report, "write", write)
    return written


@pytest.mark.slow
def test_the_code_is_that_of_the_gate(tmp_path: Path, unwritten: list[Path], capsys: Out) -> None:
    old, new = plant(tmp_path / "old", seeds=2), plant(tmp_path / "new", seeds=2, spikes=ROUGH)
    calm = plant(tmp_path / "x" / "old", seeds=2)
    for study, kind, code in ((new, "worse", 5), (new, "rough", 5), (calm, "worse", 0), (calm, "rough", 0)):
        assert report.main([str(study), "--baseline", str(old), "--fail-on", kind]) == code
    ends = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gate ")]
    assert unwritten == [new, new, calm, calm] and len(ends) == 4
    assert ends[0].startswith("gate failed (worse): new is worse than old in ") and ends[0].endswith("2 seeds)")
    assert ends[1] == "gate failed (rough): 4 rough of 4 trials of new, in 2 of 2 cells in which old was stable"
    assert ends[3].endswith(
        "none of 4 trials of new is spiky, rough or diverged in 2 cells in which baseline was stable"
    )
    planted.plant_trial(calm, planted.settings(lr=0.1), status="failed", steps_done=3)
    assert report.main([str(calm), "--baseline", str(old), "--fail-on", "rough"]) == cli.PARTIAL


def test_a_gate_that_fails_ends_with_5(studies: Path, unwritten: list[Path], capsys: Out) -> None:
    new, old = studies / "rough", studies / "old"
    assert report.main([str(new), "--baseline", str(old), "--fail-on", "rough"]) == cli.GATE_FAILED == 5
    last = "gate failed (rough): 2 rough of 2 trials of rough, in 2 of 2 cells in which old was stable"
    assert capsys.readouterr().out.splitlines()[-1] == last and unwritten == [new]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["new", "--baseline", "old"], "--baseline: needs --fail-on"),
        (["new", "--fail-on", "rough"], "--fail-on: needs --baseline OLD"),
        (["new", "--baseline", "old", "--fail-on", "slow"], "--fail-on: invalid choice: 'slow' (choose from"),
        (["new", "other", "--baseline", "old", "--fail-on", "worse"], "--baseline: is compared with one study, got"),
        (["new", "--baseline", "./new", "--fail-on", "worse"], "--baseline: must be another study, got new"),
        (["new", "--baseline", "none", "--fail-on", "worse"], "none: is not a study"),
        (["new", "--baseline", "other", "--fail-on", "worse"], "--baseline: no cell of new is in other, with the same"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str], line: str, studies: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.chdir(studies)
    before = sorted(studies.rglob("*"))
    assert report.main(arguments) == cli.BAD_INPUT
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(f"error: report: {line}") and out.err.count("\n") == 1
    assert sorted(studies.rglob("*")) == before


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    for name in ("new", "old"):
        plant(folder / name, seeds=1)
    plant(folder / "rough", seeds=1, spikes=ROUGH)
    planted.plant_frame(folder / "other")
    planted.plant_trial(folder / "other", planted.settings(lr=0.5))
    return folder


def main() -> None:
    """Print the shares."""
    chance: list[dict[str, Any]] = [{"seeds": s, "interaction": i} for s in (2, 3, 5) for i in (0.0, 0.5, 1.0)]
    chance += [{"shared": 0.0}, {"spikes": 0.2}, {"levels": 1}, {"noise": "t4"}]
    chance += [{"seeds": s, "interaction": i, "alone": True} for s in (3, 5) for i in (0.5, 1.0)]
    rougher: list[dict[str, Any]] = [{}, {"seeds": 2}, {"levels": 1}, {"interaction": 0.5}, {"interaction": 1.0}]
    for how in [*chance, *({"rougher": 2.0} | more for more in rougher), {"rougher": 1.3}]:
        print(how, f"{failures(STUDIES, **how):.3f}", flush=True)


if __name__ == "__main__":
    main()

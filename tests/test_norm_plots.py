"""Ratios of norms to their recent median against the detector that judges them; splits of a batch compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import planted
import pytest

from stabstudy import config as cfg
from stabstudy.analysis import plots
from stabstudy.analysis.elements import Absent, Figure
from stabstudy.analysis.figures import norms
from stabstudy.analysis.figures.layout import Layout
from stabstudy.analysis.study import Study
from stabstudy.config import TrialConfig
from stabstudy.stability.detectors import measured
from stabstudy.stability.published import ratio3

MAIN = Layout("optim.lr", None, [], [])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.load(planted.plant_study(tmp_path_factory.mktemp("norms") / "planted", seeds=(0, 1)))


def test_ratios_are_those_of_the_detector(study: Study) -> None:
    worst = study.worst()
    assert worst is not None
    rows = study.trace(worst)
    rules = study.rules
    norm = measured(rows, "grad_norm")
    flags = ratio3(norm, dataclasses.replace(rules.published, ratio3_fill=rules.fill))
    own = norms.ratios_of(rows, 0, rules)
    assert flags.flagged.sum() == 4 and flags.evaluable.tolist() == [False] * 12 + [True] * 108
    assert (own >= rules.ratio).tolist() == flags.flagged[flags.evaluable].tolist()
    by_hand = [norm[t] / np.median(norm[max(0, t - 64) : t]) for t in range(12, 120)]
    assert own == pytest.approx(by_hand, rel=1e-12)
    assert norms.ratios_of(rows, 50, rules) == pytest.approx(by_hand[38:], rel=1e-12)


def test_the_tail_is_drawn_to_its_last_step(study: Study) -> None:
    ratios = norms.read_ratios(study, "optim.lr")
    found = ratios.values
    assert not ratios.empty and len(ratios.read) <= norms.MOST_LEVELS * norms.TRIALS_PER_LEVEL
    ax = plots.norm_ratios(study, "optim.lr", found)
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_")]
    for line, values in zip(lines, found.values(), strict=True):
        assert line.get_xdata()[-1] == values.max()
        assert line.get_ydata()[-1] == pytest.approx(1 / len(values)) and line.get_ydata()[0] == 1
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert y == pytest.approx((values >= x).mean())


def test_long_traces_are_thinned_but_not_at_the_top() -> None:
    drawn = norms._thinned(100_000)
    assert len(drawn) <= 2 * norms.POINTS and drawn[0] == 0
    assert set(range(100_000 - norms.POINTS, 100_000)) <= set(drawn.tolist())


def _plant(folder: Path, factor: float = 1.0, precision: str = "fp32") -> Study:
    """Three splits of one batch; the norms of the smallest are `factor` times those of the whole batch."""
    planted.plant_frame(folder)
    for lr in (0.01, 0.1):
        for micro in (None, 4, 2):
            base = planted.settings(2, lr)
            train = dataclasses.replace(base.train, micro_batch_size=micro, precision=precision)
            planted_norms(folder, dataclasses.replace(base, train=train), factor if micro == 2 else 1.0)
    return Study.load(folder)


def planted_norms(folder: Path, config: TrialConfig, factor: float) -> None:
    """A trial whose norms depend on the learning rate alone."""
    trial = planted.plant_trial(folder, config)
    for name in ("trace.parquet", "trace.jsonl"):
        (trial.path / name).unlink(missing_ok=True)
    for name in ("probes.parquet", "probes.jsonl"):
        (trial.path / name).unlink(missing_ok=True)
    grads = [factor * v for v in planted.norms(config.train.steps, seed=int(1e4 * config.optim.lr))]
    records = planted.write_records(trial, config, grads, 4.0, finish=True)
    trial.write_state(dataclasses.replace(trial.read_state(), records=records))


def test_equal_splits_agree_and_a_wrong_normaliser_does_not(tmp_path: Path) -> None:
    good, bad = norms.splits(_plant(tmp_path / "good")), norms.splits(_plant(tmp_path / "bad", 4.0))
    assert [(s.sizes, s.agrees) for s in good] == [((4, 8), True), ((2, 8), True)] * 2
    assert [(s.sizes, s.agrees) for s in bad] == [((4, 8), True), ((2, 8), False)] * 2
    assert bad[1].norm == pytest.approx(np.full(120, 3.0)) and not good[1].norm.any()


def test_the_report_says_whether_they_agree(tmp_path: Path) -> None:
    def said(study: Study) -> Figure:
        blocks = {b.name: b for b in norms.accumulation_figures(study, MAIN) if isinstance(b, Figure)}
        return blocks["accumulation"]

    assert "They agree: the split of the batch changes only rounding (4 pairs)." in said(_plant(tmp_path / "a")).alt
    wrong = said(_plant(tmp_path / "b", 1.01))
    assert "They do NOT agree in 2 of 4 pairs" in wrong.caption
    assert [row[-1] for row in wrong.table.rows] == ["yes", "no", "yes", "no"]
    assert "Not judged" in said(_plant(tmp_path / "c", precision="bf16")).caption


def test_ratios_of_a_diverged_trial_have_readable_numbers(study: Study) -> None:
    ratios = {0.01: np.array([0.8, 1.0, 2.0]), 0.1: np.array([1.0, 1e7, 3e13])}
    ax = plots.norm_ratios(study, "optim.lr", ratios)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text()]
    inside = sorted((b for b in boxes if ax.bbox.x0 <= b.x1 and b.x0 <= ax.bbox.x1), key=lambda b: b.x0)
    assert len(inside) > 3 and all(a.x1 < b.x0 for a, b in zip(inside, inside[1:], strict=False))


def test_without_such_trials_the_report_says_so(study: Study) -> None:
    absent = list(norms.accumulation_figures(study, MAIN))
    assert absent == [Absent("Check of gradient accumulation", "the micro-batch size does not vary")]


def test_every_setting_is_compared(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for seed, micro in ((0, 8), (1, 4)):
        base = planted.settings(2, 0.01, seed=seed)
        train = dataclasses.replace(base.train, micro_batch_size=micro)
        planted.plant_trial(tmp_path / "s", dataclasses.replace(base, train=train))
    study = Study.load(tmp_path / "s")
    assert "seed" in cfg.setting_names() and norms.splits(study) == []

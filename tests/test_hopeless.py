"""Early stopping: the rule on planted series, what a stopped trial is, and that it goes on as if it never stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from series import learning, lognormal
from trials import BASE, DATA, Make, assert_same, records

from stabstudy import failpoints, live, store, sweep, trace
from stabstudy.analysis.tables import read_tables
from stabstudy.config import TrialConfig
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError
from stabstudy.stability import hopeless
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import MonitorFacts
from stabstudy.state import State, is_over
from stabstudy.sweeping.launch import Outcome, launch
from stabstudy.training.loop import Progress
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine, Trial

RULES = Rules()
T = 400
FACTS = MonitorFacts(T, 20, 6.5, 3.2)


def signs(norm: Any, loss: Any = None, facts: MonitorFacts = FACTS) -> hopeless.Signs:
    return hopeless.signs(np.asarray(norm), learning(len(norm), 1) if loss is None else loss, facts, RULES)


# The rule


def test_checks_are_at_shares_of_the_planned_steps() -> None:
    assert hopeless.checks(1200) == (240, 360, 480, 720)
    assert hopeless.checks(7) == (2, 3, 5)  # 1.4, 2.1, 2.8, 4.2 rounded up
    assert hopeless.checks(1) == ()


def test_the_scatter_is_that_of_the_settled_norms_about_their_mean_and_robust() -> None:
    """Against loops over plain numbers."""
    norm = lognormal(0.3, 160, 3) * np.exp(-np.arange(160) / 80)
    logs = [math.log(x) for x in norm[25:]]
    apart = []
    for i in range(len(logs)):
        near = logs[max(0, i - 4) : i + 5]
        apart.append(logs[i] - sum(near) / len(near))
    middle = sorted(apart)[len(apart) // 2]
    robust = sorted(abs(d - middle) for d in apart)[len(apart) // 2] / 0.6745
    assert signs(norm).scatter == pytest.approx(robust, abs=1e-12)
    spiked = norm.copy()
    spiked[60:70] *= 40
    assert signs(spiked).scatter == pytest.approx(robust, abs=0.05)
    warm = dataclasses.replace(FACTS, warmup_steps=100)
    assert (signs(norm).settled, signs(norm, facts=warm).settled) == (135, 60)


@pytest.mark.parametrize(("sd", "ends"), [(0.1, False), (0.2, False), (0.3, False), (0.5, True), (0.7, True)])
def test_a_norm_that_scatters_ends_a_trial(sd: float, ends: bool) -> None:
    """The centred mean of 9 takes a ninth of the variance: .35 is a log-sd of .37."""
    for seed in range(20):
        reason = signs(lognormal(sd, 160, seed)).reason(FACTS)
        assert (reason is not None) is ends
        assert reason is None or "scatters by" in reason


def test_a_rough_trial_is_ended_at_less_scatter_and_a_calm_one_with_spikes_is_not() -> None:
    norm = lognormal(0.25, 160, 0)
    assert signs(norm).reason(FACTS) is None
    norm[[40, 60, 80, 100, 120]] = 6
    assert signs(norm).rough and "rough already" in str(signs(norm).reason(FACTS))
    calm = lognormal(0.1, 160, 0)
    calm[[40, 60, 80, 100, 120]] = 6
    assert signs(calm).rough and signs(calm).reason(FACTS) is None
    few = lognormal(0.25, 160, 0)
    few[[40, 80]] = 6
    assert not signs(few).rough, "two stretches are no proof so early"


def test_a_loss_above_single_tokens_that_does_not_fall_ends_a_trial() -> None:
    calm, at = lognormal(0.1, 160, 0), np.arange(160)
    flat, falling = np.full(160, 3.5), 4.5 - at / 100
    assert signs(calm, flat).loss_at_end == pytest.approx(3.5)
    assert "falls too slowly" in str(signs(calm, flat).reason(FACTS))
    assert signs(calm, falling).loss_at_end == pytest.approx(4.5 - 4 + 0.095, abs=0.02), "a mean lags by 9.5 steps"
    assert signs(calm, falling).reason(FACTS) is None
    rising = 3.3 + at / 1000
    assert signs(calm, rising).loss_at_end == pytest.approx(3.3 + 0.15, abs=0.01), "a rise is not drawn out"
    below = np.full(160, 3.1)
    assert signs(calm, below).reason(FACTS) is None
    unknown = dataclasses.replace(FACTS, unigram_entropy=None)
    assert signs(calm, flat).reason(unknown) is None
    early = lognormal(0.1, 80, 0)
    assert signs(early, flat[:80]).reason(FACTS) is None, "a fifth of the steps is too early for it"


def test_nothing_is_ended_before_enough_settled_steps() -> None:
    wild = lognormal(0.8, 160, 0)
    assert signs(wild[:56]).reason(FACTS) is None and signs(wild[:57]).reason(FACTS) is not None
    late = dataclasses.replace(FACTS, warmup_steps=140)
    assert signs(wild, facts=late).reason(late) is None
    long = dataclasses.replace(FACTS, steps_planned=4000)
    assert signs(wild, facts=long).reason(long) is None, "135 of 4,000: under a twentieth"


def test_losses_and_norms_that_are_not_finite_are_passed_over() -> None:
    norm, loss = lognormal(0.1, 160, 0), learning(160, 1)
    norm[30], loss[30] = math.nan, math.inf
    assert signs(norm, loss).reason(FACTS) is None
    nothing = np.full(160, math.nan)
    assert signs(nothing, nothing) == hopeless.Signs(0.4, 135, None, False, None)


def test_what_it_was_not_calibrated_for_is_not_judged() -> None:
    assert hopeless.why_not("lm", 128) is None
    assert "128 tokens a step" in str(hopeless.why_not("lm", 127))
    assert "not for kto" in str(hopeless.why_not("kto", 4096))


def test_what_a_page_says_of_the_calibration_is_what_was_measured() -> None:
    section = (Path(__file__).parent.parent / "benchmarks" / "README.md").read_text().partition("## Early stopping")[2]
    measured = section.partition("\n## ")[0]
    assert "replayed on 471 trials" in measured and "of 471 verdicts one changes" in " ".join(measured.split())
    assert "of 36 limits none" in measured and f"| **{hopeless.SCATTER:.2f}** |".replace("0.", ".") in measured
    rows = [row.split("|") for row in measured.splitlines() if row.startswith(("| **.35** |", "| all |"))]
    ended = [int(row[at]) for row, at in zip(rows, (2, 4), strict=True)]  # of the calibration, and of the rest
    assert f"it ended {sum(ended)}" in hopeless.CALIBRATED and "on 471 trials" in hopeless.CALIBRATED


def test_what_is_over() -> None:
    assert is_over("done", "diverged") and is_over("done", "hopeless") and is_over("stopped", "hopeless")
    assert not is_over("stopped", "diverged") and not is_over("interrupted", "hopeless")


# Training


@pytest.fixture
def learns_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models as tiny as here stay above the entropy of single tokens, and would all be ended for that."""
    monkeypatch.setattr(hopeless, "UNTRAINED_FROM", 2.0)


CALM = dataclasses.replace(
    BASE,
    optim=dataclasses.replace(BASE.optim, lr=1e-3),
    data=dataclasses.replace(DATA, seq_len=32),
    train=dataclasses.replace(
        BASE.train, steps=150, batch_size=4, probe_every=20, eval_every=75, checkpoint_every=50, final_eval_tokens=64
    ),
)
WILD = dataclasses.replace(CALM, optim=dataclasses.replace(CALM.optim, lr=1.0, warmup_steps=0))
END = 60  # the first check with 32 settled steps

Train = Callable[..., list[State]]


@pytest.fixture
def train(cache: Path, learns_little: None) -> Train:
    def run(folders: Sequence[store.TrialFolder], stop: str = "hopeless", **engine: Any) -> list[State]:
        def heartbeat(members: Sequence[Progress]) -> bool:
            return False

        return run_pack(folders, Engine(cache, stop=stop, **engine), RULES, engine.pop("heartbeat", heartbeat))

    return run


def seeds(config: TrialConfig, count: int) -> list[TrialConfig]:
    return [dataclasses.replace(config, seed=seed) for seed in range(count)]


def values(state: State) -> list[str]:
    return [state.records[name]["values_sha256"] for name in ("trace", "probes")]


def test_a_stopped_trial_is_skipped_and_goes_on_when_the_rule_is_taken_back(make: Make, train: Train) -> None:
    whole, stopped = make(WILD, "whole"), make(WILD, "stopped")
    (expected,) = train([whole], stop="diverged")
    assert (expected.status, expected.step) == ("done", 150), "the negative control: without the rule it trains on"
    (state,) = train([stopped])
    assert (state.status, state.stop_reason, state.step, state.final_loss) == ("stopped", "hopeless", END, None)
    assert state.outcome is not None and state.outcome.startswith(f"Stopped at step {END} of 150 by the rule hopeless")
    assert [a.status for a in state.attempts] == ["stopped"] and state.attempts[0].ended
    assert [p.name for p in sorted(stopped.checkpoints.iterdir())] == ["step-00000050", f"step-{END:08d}"]
    rows, _ = records(stopped)
    assert_same(records(whole)[0], rows, END)
    assert train([stopped])[0] == state, "not trained again"
    (done,) = train([stopped], stop="diverged")
    assert (done.status, done.stop_reason, done.step) == ("done", expected.stop_reason, 150)
    assert [a.from_step for a in done.attempts] == [0, END]
    assert values(done) == values(expected)
    names = ("verdict", "verdict_code", "spike_events", "init_loss", "final_loss", "outcome")
    assert [getattr(done, n) for n in names] == [getattr(expected, n) for n in names]
    assert not stopped.checkpoints.exists()
    bodies = [json.loads(f.summary_file.read_text()) for f in (whole, stopped)]
    assert bodies[0] == bodies[1]


def test_a_trial_that_goes_on_and_is_interrupted_keeps_nothing_of_its_stop(
    make: Make, cache: Path, learns_little: None
) -> None:
    folder = make(WILD)
    run_pack([folder], Engine(cache, stop="hopeless"), RULES, lambda members: False)
    (state,) = run_pack([folder], Engine(cache), RULES, lambda members: members[0].step > END)
    assert state.status == "interrupted" and (state.stop_reason, state.outcome, state.verdict) == (None, None, None)


SLOW = pytest.mark.slow
RINGS = [{"ring": 16, "captured": True}, *(pytest.param({"ring": n}, marks=SLOW) for n in (7, 32))]


@pytest.mark.parametrize("engine", RINGS, ids=str)
def test_the_ring_makes_no_difference(make: Make, train: Train, engine: dict[str, Any]) -> None:
    one, other = make(WILD, "one"), make(WILD, "other")
    (a,), (b,) = train([one]), train([other], **engine)
    assert (a.step, a.outcome) == (b.step, b.outcome) and b.status == "stopped"
    for rows, others in zip(records(one), records(other), strict=True):
        assert_same(rows, others)


@pytest.mark.slow
def test_a_stopped_member_leaves_its_pack_and_the_others_are_as_ever(make: Make, train: Train) -> None:
    configs = [*seeds(CALM, 1), *seeds(WILD, 2)]
    plain, pack = ([make(c, name) for c in configs] for name in ("plain", "pack"))
    expected, states = train(plain, stop="diverged"), train(pack)
    assert [s.status for s in states] == ["done", "stopped", "stopped"]
    assert values(states[0]) == values(expected[0]) and states[0].final_loss == expected[0].final_loss
    for folder, whole in zip(pack[1:], plain[1:], strict=True):
        assert_same(records(whole)[0], records(folder)[0], END)
    assert [s.attempts for s in train(pack)] == [s.attempts for s in states]
    again = train(pack, stop="diverged")
    assert [values(s) for s in again[1:]] == [values(s) for s in expected[1:]]


@pytest.mark.parametrize("point", [pytest.param("checkpoint.begun", marks=SLOW), "checkpoint.durable", "stop.judged"])
def test_a_kill_while_stopping_changes_nothing(
    make: Make, train: Train, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder as it lies there at the moment of the kill: state `running`, and no lock."""
    folder, killed = make(WILD), tmp_path / "killed" / "trials" / "x"
    ends: list[int] = []
    stop = Trial.stop

    def stopping(self: Trial, step: int, reason: str) -> None:
        ends.append(step)
        stop(self, step, reason)

    def hit(name: str, first: object = None) -> None:
        begun = live.find(folder.live(trace.TRACE)) and live.last_step(folder.live(trace.TRACE)) == END - 1
        if name == point and begun and not killed.exists() and (ends or point.startswith("checkpoint")):
            shutil.copytree(folder.path, killed)

    monkeypatch.setattr(Trial, "stop", stopping)
    monkeypatch.setattr(failpoints, "hit", hit)
    (expected,) = train([folder])
    monkeypatch.undo()
    copy = store.StudyFolder(killed.parent.parent).trial(folder.trial_id)
    killed.rename(copy.path)
    assert copy.read_state().status == "lost"
    (state,) = train([copy])
    assert (state.status, state.step, state.outcome) == ("stopped", END, expected.outcome)
    assert state.attempts[-1].from_step == (50 if point == "checkpoint.begun" else END)
    for rows, others in zip(records(folder), records(copy), strict=True):
        assert_same(rows, others)


def test_a_stopped_trial_has_a_row_of_what_was_seen(make: Make, train: Train) -> None:
    folders = [make(c) for c in (CALM, WILD)]
    train(folders)
    rows = {row["optim.lr"]: row for row in read_tables(store.StudyFolder(folders[0].path.parent.parent)).trials}
    done, stopped = rows[1e-3], rows[1.0]
    assert (done["state"], done["stop_reason"], done["verdict_partial"]) == ("done", "complete", None)
    names = ("state", "stop_reason", "steps_done", "steps_planned", "final_loss", "final_loss_capped", "best_loss")
    assert [stopped[n] for n in names] == ["stopped", "hopeless", END, 150, None, None, None]
    assert stopped["verdict"] in ("rough", "spiky", None) and stopped["verdict_reason"] in ("stopped", None)
    assert (stopped["verdict_partial"] is True) == (stopped["verdict"] is not None)
    assert stopped["n_evaluable"] == END - RULES.fill and stopped["error"].startswith("Stopped at step")


# Launches

SWEEP = """\
# @package _global_
# Does a rule end what has no hope?
sweep:
  seeds: [0]
  stop: {stop}
  grid:
    optim.lr: [1e-3, 1.0]
"""
TINY = [
    "sweep=check", "data=synthetic", "data.synthetic.bytes=40000", "data.seq_len=32", "model.dim=16", "model.n_heads=2",
    "model.depth=2", "train.batch_size=4", "train.steps=150", "optim.warmup_steps=0", "train.checkpoint_every=50",
    "train.eval_sequences=8", "train.probe_every=50", "train.final_eval_tokens=64", "launcher=local",
]  # fmt: skip


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, learns_little: None
) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "check.yaml").write_text(SWEEP.format(stop="hopeless"))
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(folder: Path, *words: str) -> Plan:
    return make_plan([*TINY, *words], folder)


def states(folder: Path) -> dict[float, State]:
    trials = store.StudyFolder(folder / "results" / "check").trials()
    return {t.read_own()[0].optim.lr: t.read_state() for t in trials}


@pytest.mark.slow
def test_a_launch_ends_skips_and_takes_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(folder).stop == "hopeless" and plan(folder, "stop=diverged").stop == "diverged"
    said: list[str] = []
    assert launch(plan(folder), said.append) == Outcome(0), "complete: nothing is left to do under this rule"
    assert {lr: s.status for lr, s in states(folder).items()} == {1e-3: "done", 1.0: "stopped"}
    assert f"stopped at step {END} (hopeless)" in capsys.readouterr().out
    recorded = yaml.safe_load((folder / "results" / "check" / "sweep.yaml").read_text())
    assert recorded["stop"] == "hopeless"
    assert launch(plan(folder), said.append) == Outcome(0)
    assert said[-1].startswith("nothing to train: all 2 trials are done, 1 of them stopped early")
    assert sweep.main(["--dry-run", *TINY]) == 0
    assert "2 done (1 of them stopped early), 0 to do" in capsys.readouterr().out
    assert sweep.main(["--status", "study=check"]) == 0
    assert "1 done (1 untrained), 1 stopped; " in capsys.readouterr().out
    assert [w for w in plan(folder, "stop=diverged").warnings if "sweep.stop" in w] == [
        "sweep.stop: diverged now, hopeless in the launch before: trials that it stopped go on"
    ]
    assert not [w for w in plan(folder).warnings if "sweep.stop" in w]
    stopped = states(folder)[1.0]
    assert launch(plan(folder, "stop=diverged"), said.append) == Outcome(0)
    done = states(folder)[1.0]
    assert (done.status, done.trial_id, len(done.attempts)) == ("done", stopped.trial_id, 2)
    assert "stop" not in yaml.safe_load((folder / "results" / "check" / "sweep.yaml").read_text())


def test_the_default_ends_nothing_but_what_diverged(folder: Path) -> None:
    (folder / "sweeps" / "check.yaml").write_text(SWEEP.format(stop="diverged"))
    made = plan(folder)
    assert made.stop == "diverged" and "stop:" not in made.sweep_text
    assert [t.trial_id for t in made.trials] == [t.trial_id for t in plan(folder, "stop=hopeless").trials]
    assert plan(folder, "stop=hopeless").stop == "hopeless", "the command line wins"


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("stop=never", r"stop: must be one of diverged, hopeless"),
        ("stop=diverged,hopeless", "stop: takes one value"),
        ("train.batch_size=2", r"sweep\.stop: hopeless would end no trial of this sweep: .* not for 64"),
        ("data.seq_len=16", r"sweep\.stop: .*calibrated from 128 tokens a step on"),
    ],
)
def test_a_wrong_rule_is_refused(folder: Path, word: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan(folder, word)


def test_a_misspelt_rule_in_a_file_is_refused_with_its_line(folder: Path) -> None:
    (folder / "sweeps" / "check.yaml").write_text(SWEEP.format(stop="hopeles"))
    with pytest.raises(ConfigError, match=r"sweep\.stop: must be one of diverged, hopeless, got 'hopeles' .*:5"):
        plan(folder)


def test_trials_that_the_rule_passes_over_are_warned_of(folder: Path) -> None:
    made = plan(folder, "train.batch_size=2,4")
    (warning,) = [w for w in made.warnings if "hopeless" in w]
    assert warning.startswith("sweep.stop: hopeless never ends 2 of 4 trials: it is calibrated from 128 tokens")

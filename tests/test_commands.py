"""The commands that pages print, put through the planner: each is the plan that it is meant to be."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tabled
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stabstudy import wording
from stabstudy.analysis import adaptive, commands
from stabstudy.analysis.frontiers import Asked
from stabstudy.analysis.study import Study
from stabstudy.config import SETTINGS, TrialConfig
from stabstudy.planning import axes, overrides
from stabstudy.planning.plan import Plan, PlannedTrial, make_plan
from stabstudy.settings import Issues
from stabstudy.space import MOST_RESOLUTIONS, default_resolution, resolutions
from stabstudy.store import StudyFolder

LR, DEPTH, CLIP = "optim.lr", "model.depth", "optim.clip"
MINE = """\
# @package _global_
# What of both?
sweep:
  seeds: 2
  grid: {model.depth: [1, 2]}
  zip: [{optim.lr: [1e-3, 1e-2], optim.weight_decay: [0.1, 0.3]}]
"""
GRIDS = [
    [],
    ["seeds=1", "compute=gpu"],
    ["study=tried", "launcher=local"],
    ["sweep=depth_lr", "optim.lr=1e-3,1e-2", "train.steps=80", "seeds=[0,7]"],
    ["sweep=depth_lr", "+optim.lr={log:[1e-3,0.1],num:3}", "study=other", "results_dir=a b"],
    ["sweep=mine", "optim.clip=0.5,null"],
    ["optim.lr=1e-3,1e-2", "model.depth=2,4", "model.qk_norm=true,false"],
    ["optim.lr=1e-3,1e-2", "data=pysrc,synthetic", "study=probe", "max_trials=100"],
]
SEARCHES = [
    ["sweep=depth_lr", "optim.lr={between:[1e-3,1]}", "study=depth_lr_frontier"],
    ["sweep=frontier_depth"],
    ["optim.lr={between:[0.003,0.3],holds:works,resolution:1.1}", "model.depth=2,4"],
    ["optim.weight_decay={between:[0,0.5]}", "study=decay"],
    ["model.depth={between:[3,25]}", "study=depths"],
    ["optim.beta2={between:[0.9,0.999]}", "seeds=1"],
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(MINE)
    return tmp_path


def study(plan: Plan) -> Study:
    """A study of the plan's trials, as its launch leaves it."""
    known = [dict(zip((axis.name for axis in plan.axes), plan.values(t), strict=True)) for t in plan.trials]
    whole = tabled.study(row | {"seed": t.config.seed} for row, t in zip(known, plan.trials, strict=True))
    whole.folder = StudyFolder(plan.folder)
    whole.provenance |= {"argv": list(plan.argv)}
    return whole


def planned(text: str | None, here: Path) -> Plan:
    assert text is not None and text.startswith("python -m stabstudy.sweep ")
    return make_plan(shlex.split(text)[3:], here)


def without(name: str, trials: Iterable[PlannedTrial]) -> set[TrialConfig]:
    """The trials' settings with this one set to the same in all."""
    group, key = name.split(".")
    of: Callable[[TrialConfig], Any] = lambda c: dataclasses.replace(getattr(c, group), **{key: None})  # noqa: E731
    return {dataclasses.replace(t.config, **{group: of(t.config)}) for t in trials}


@pytest.mark.parametrize("typed", [*GRIDS, *SEARCHES], ids=" ".join)
def test_launched_again_it_is_the_same_plan(typed: list[str], here: Path) -> None:
    plan = make_plan(typed, here)
    again = planned(commands.relaunch(study(plan)), here)
    assert (again.folder, [t.trial_id for t in again.trials]) == (plan.folder, [t.trial_id for t in plan.trials])


@pytest.mark.parametrize("typed", GRIDS, ids=" ".join)
@pytest.mark.parametrize(("holds", "some"), [("stable", False), ("works", True)])
def test_the_limit_is_searched_at_the_same_settings_in_a_study_of_its_own(
    typed: list[str], holds: str, some: bool, here: Path
) -> None:
    plan = make_plan(typed, here)
    axis = next(axis for axis in plan.axes if axis.name not in (LR, "optim.weight_decay"))
    at = {axis.name: axis.values[-1:]} if some else {}
    found = planned(commands.searched(study(plan), 0.01, holds, at), here)
    assert found.planner is not None and found.planner.frontier is not None
    assert found.planner.frontier.record == {"between": [0.01, 0.1], "resolution": 1.25, "holds": holds}
    assert (found.study, found.folder.parent) == (f"{plan.study}_frontier", plan.folder.parent)
    place = [axis.name for axis in plan.axes].index(axis.name)
    own = [t for t in plan.trials if not some or plan.values(t)[place] in at[axis.name]]
    assert without(LR, found.trials) == without(LR, own)


@pytest.mark.parametrize("typed", SEARCHES, ids=" ".join)
@pytest.mark.parametrize("way", ["above", "below"])
def test_a_wider_search_is_the_same_in_the_same_study(typed: list[str], way: str, here: Path) -> None:
    plan = make_plan(typed, here)
    assert plan.planner is not None and plan.planner.frontier is not None
    of = plan.planner.frontier
    asked = Asked(of.setting, of.low, of.high, of.resolution, of.holds)
    wider = getattr(commands, way)(asked)
    if wider is None:
        assert (way, of.setting) in {("below", "optim.weight_decay")}, "0 is the least"
        return
    assert wider.low < asked.low if way == "below" else wider.high > asked.high
    found = planned(commands.extended(study(plan), wider), here)
    assert found.planner is not None and found.folder == plan.folder
    record = {"between": [wider.low, wider.high], "resolution": of.resolution, "holds": of.holds}
    assert found.planner.frontier is not None and found.planner.frontier.record == record
    assert without(of.setting, found.trials) == without(of.setting, plan.trials)


@pytest.mark.parametrize("typed", GRIDS, ids=" ".join)
def test_what_is_filled_in_is_added_to_the_study(typed: list[str], here: Path) -> None:
    plan = make_plan(typed, here)
    levels = {LR: [0.01, 1e-7], CLIP: [None, 2.0], "seed": [3, 11]}
    filled = planned(commands.filled(study(plan), levels), here)
    assert filled.folder == plan.folder and filled.planner is None
    configs = [t.config for t in filled.trials]
    assert {(c.optim.lr, c.optim.clip, c.seed) for c in configs} == {
        (lr, clip, seed) for lr in levels[LR] for clip in levels[CLIP] for seed in levels["seed"]
    }


def test_a_search_by_a_sampler_has_no_limit_of_a_grid_to_search(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study(make_plan(["sweep=mine"], here))
    assert commands.searched(whole, 0.01, "stable", {}) is not None
    monkeypatch.setattr(adaptive, "why_biased", lambda study: "the cells were chosen by what earlier ones did")
    assert commands.searched(whole, 0.01, "stable", {}) is None, "its planner takes no axis and no second search"


NUMBERS = [n for n in SETTINGS if axes.kind(n) in ("int", "float") and n != "seed"]


@settings(max_examples=40)
@given(st.sampled_from(NUMBERS), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["above", "below"]))
def test_every_setting_allows_the_range_that_is_proposed(name: str, first: float, second: float, way: str) -> None:
    least, most = commands.bounds(name)
    ends = sorted(float(f"{least + share * (min(most, 1e6) - least):.6g}") for share in (first, second))
    low, high = map(math.floor, ends) if axes.kind(name) == "int" else ends
    metadata = SETTINGS[name].metadata
    assume(low < high and low != metadata.get("gt") and high != metadata.get("lt"))
    assume(1 <= resolutions(low, high, default_resolution(low, high), low > 0) <= MOST_RESOLUTIONS)
    asked = Asked(name, float(low), float(high), default_resolution(low, high), "stable")
    if (wider := getattr(commands, way)(asked)) is None:
        return
    assert wider.low >= least and wider.high <= most and (wider.low, wider.high) != (low, high)
    assert wider.high != metadata.get("lt") and wider.low != metadata.get("gt")
    whole = tabled.study([tabled.trial()])
    whole.provenance |= {"argv": ["sweep=depth_lr"]}
    if (text := commands.extended(whole, wider)) is not None:
        issues = Issues()
        request = overrides.read(shlex.split(text)[3:], None, issues)
        assert not issues.problems and request.frontier is not None
        assert (request.frontier.low, request.frontier.high) == (wider.low, wider.high)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.text(), st.text("\\'\"`{}[](),=:$ ab")), min_size=2, max_size=3, unique=True))
def test_a_level_that_is_text_is_read_as_it_is(levels: list[str]) -> None:
    whole = tabled.study([tabled.trial()])
    whole.provenance |= {"argv": ["sweep=depth_lr"]}
    text = commands.filled(whole, {"data.path": levels})
    if text is None:
        assert not "".join(levels).isprintable() or "`" in "".join(levels), "it cannot be shown"
        return
    issues = Issues()
    request = overrides.read(shlex.split(text)[3:], None, issues)
    if not issues.problems:  # an interpolation, say, is refused
        assert [chosen.value for chosen in request.axes["data.path"]] == levels
    else:
        assert "${" in text or "_" in text, [str(p) for p in issues.problems]


def test_a_command_of_a_module_is_quoted_for_the_shell() -> None:
    assert wording.command(["a b", "c=${d}"], "stabstudy.report") == "python -m stabstudy.report 'a b' 'c=${d}'"

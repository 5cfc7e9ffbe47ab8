"""The `search` block of a sweep file: what it means, and every problem of it at once, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stabstudy import space
from stabstudy.planning import compose, searchspace, sweepfile
from stabstudy.settings import ConfigError, Issues
from stabstudy.space import Choice, Objective, Range, Search
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.verdict import VERDICTS

HEAD = "# @package _global_\n# Which recipe is best?\nsweep:\n"
BLOCK = """\
  search:
    sampler: tpe
    trials: 60
    minimize: [final_loss, severity]
    maximize: optim.lr
    space:
      optim.lr: {log: [1e-4, 1]}
      optim.beta2: {between: [0.9, 0.999]}
      optim.warmup_steps: {int: [10, 100]}
      train.batch_size: {log: [4, 64]}
      optim.clip: [0.5, 1, null]
      data: [pysrc, synthetic]
    constraints: ["verdict == stable", "train.batch_size < 64 or optim.lr < .1"]
    seed: 7
"""


def read(text: str, tmp_path: Path) -> tuple[Search | None, Issues]:
    (tmp_path / "sweeps").mkdir(exist_ok=True)
    (tmp_path / "sweeps" / "mine.yaml").write_text(HEAD + text)
    issues = Issues()
    with compose.conf() as loader:
        return sweepfile.read("mine", tmp_path, loader, issues).search, issues


def parse(**changed: Any) -> tuple[Search | None, list[str]]:
    written = {"trials": 5, "minimize": ["final_loss"], "space": {"optim.lr": {"log": [1e-4, 1e-1]}}} | changed
    issues = Issues()
    search = searchspace.parse(written, lambda key: f"x.yaml:{key}", None, issues)
    return search, [str(problem) for problem in issues.problems] or issues.warnings


def test_a_search_as_written(tmp_path: Path):
    search, issues = read(BLOCK, tmp_path)
    assert search is not None and not issues.problems
    assert issues.warnings == ["final_loss on different data cannot be compared: data decides by that too"]
    assert (search.sampler, search.trials, search.seed, search.size) == ("TPE", 60, 7, float("inf"))
    assert search.objectives == (Objective("final_loss"), Objective("severity"), Objective("optim.lr", maximize=True))
    assert search.space == {
        "optim.lr": Range(1e-4, 1.0, log=True),
        "optim.beta2": Range(0.9, 0.999),
        "optim.warmup_steps": Range(10, 100, whole=True),
        "train.batch_size": Range(4, 64, log=True, whole=True),
        "optim.clip": Choice((0.5, 1.0, None)),
        "data": Choice(("pysrc", "synthetic")),
    }
    assert {type(v) for v in search.space["optim.clip"].values} == {float, type(None)}
    assert [e.text for e in search.constraints] == ["verdict == stable", "train.batch_size < 64 or optim.lr < .1"]
    assert search.constraints[0].holds({"verdict": "stable"}) and not search.constraints[0].holds({"verdict": "rough"})


def test_a_sweep_without_a_search_has_none(tmp_path: Path):
    assert read("  grid: {optim.lr: [0.1]}\n", tmp_path)[0] is None


def test_the_record_says_the_same(tmp_path: Path):
    search, _ = read(BLOCK, tmp_path)
    assert search is not None
    again = space.from_body(search.body(), list(COLUMNS), VERDICTS)
    assert again.body() == search.body() and again.space == search.space and again.objectives == search.objectives
    for broken in ({}, {**search.body(), "space": {"optim.lr": {}}}, {**search.body(), "constraints": ["x ="]}):
        with pytest.raises(ValueError):
            space.from_body(broken, list(COLUMNS), VERDICTS)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("TPE", "TPE"), ("tpe", "TPE"), ("TPESampler", "TPE"), ("gp", "GP"), ("cma-es", "CMA-ES"), ("CmaEs", "CMA-ES"),
        ("cma_es", "CMA-ES"), ("nsga2", "NSGA-II"), ("NSGAIISampler", "NSGA-II"), ("NSGA-III", "NSGA-III"),
        ("QMC", "QMC"), ("sobol", "QMC"), ("random", "Random"),
    ],
)  # fmt: skip
def test_a_sampler_is_spelled_freely(written: str, name: str):
    sampler = space.sampler_named(written)
    assert sampler is not None and sampler.name == name


def test_every_problem_at_once_each_with_its_line(tmp_path: Path):
    text = (
        "  search:\n    sampler: TPA\n    trails: 60\n    minimize: [final_los]\n    space:\n"
        "      optim.lr: {log: [0, 1]}\n      optim.clp: [1]\n      data: [pysrcc]\n"
        "    constraints: ['verdit == stable']\n"
    )
    search, issues = read(text, tmp_path)
    lines = "\n".join(str(problem) for problem in issues.problems)
    assert search is None and len(issues.problems) == 8
    for part in (
        "sweep.search.trails: is not part of a search (did you mean trials?) (sweeps/mine.yaml:6)",
        "sweep.search.sampler: is no sampler (did you mean TPE",
        "sweep.search.trials: must be a whole number in [1, 10,000], got nothing (sweeps/mine.yaml:4)",
        "final_los is no column of trials.parquet (did you mean final_loss",
        "optim.lr: a logarithmic range needs 0 < low < high, got [0, 1] (sweeps/mine.yaml:9)",
        "optim.clp: is not a setting (did you mean optim.clip",
        "pysrc",
        "verdit is not a setting (did you mean verdict",
    ):
        assert part in lines, part


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"sampler": "grid"}, "sweep.search.sampler: is no sampler (known: TPE, GP,"),
        ({"sampler": 3}, "is no sampler"),
        ({"trials": True}, "must be a whole number"),
        ({"trials": 0}, "must be a whole number"),
        ({"seed": -1}, "must be a whole number"),
        ({"minimize": []}, "needs an objective"),
        ({"minimize": {"final_loss": 1}}, "must be a list of columns"),
        ({"minimize": ["verdict"]}, "verdict is no number"),
        ({"minimize": ["data"]}, "data is no number"),
        ({"maximize": ["final_loss"]}, "final_loss is listed twice"),
        ({"space": {}}, "must be a mapping"),
        ({"space": {"seed": [0, 1]}}, "seeds are replicates"),
        ({"space": {"compute.pack": [1, 2]}}, "cannot vary within a study"),
        ({"space": {"objective.init_from": ["x"]}}, "cannot be searched"),
        ({"space": {"optim.lr": 0.1}}, "must be a list of choices"),
        ({"space": {"optim.lr": []}}, "must be a list of choices"),
        ({"space": {"optim.lr": {"log": [1e-4, 1e-1], "num": 5}}}, "must be a list of choices"),
        ({"space": {"optim.lr": {"lin": [1, 2]}}}, "must be a list of choices"),
        ({"space": {"optim.lr": {"log": [1e-1, 1e-4]}}}, "0 < low < high"),
        ({"space": {"optim.lr": {"between": [1, 100]}}}, "must be a finite number in [0, 10], got 100"),
        ({"space": {"optim.lr": {"between": [float("nan"), 1]}}}, "low < high"),
        ({"space": {"optim.lr": [1e-3, "fast"]}}, "must be a finite number"),
        ({"space": {"optim.schedule": {"between": [1, 2]}}}, "has no numbers to range over"),
        ({"space": {"data": {"int": [1, 2]}}}, "has no numbers to range over"),
        ({"space": {"model.depth": {"between": [1.5, 4]}}}, "the ends must be whole numbers"),
        ({"space": {"model.n_kv_heads": [1, None]}}, "null is another number in each trial"),
        ({"space": {"optim.warmup_steps": [5], "optim.warmup_share": [0.1]}}, "two settings of one quantity"),
        ({"constraints": "verdict == stable"}, "must be a list of conditions"),
        ({"constraints": ["verdict < 3"]}, "sweep.search.constraints: compares values of different kinds"),
        ({"constraints": ["__import__('os')"]}, "not allowed in a condition"),
        ({"constraints": ["verdict == unstable"]}, "unstable is not a setting"),
        ({"sampler": "CMA-ES", "minimize": ["final_loss", "severity"]}, "CMA-ES takes one objective"),
        ({"sampler": "CMA-ES"}, "CMA-ES needs two ranges or more, got 1"),
    ],
)  # fmt: skip
def test_a_block_that_is_wrong(changed: dict[str, Any], part: str):
    search, lines = parse(**changed)
    assert search is None and any(part in line for line in lines), lines


def test_the_sampler_of_ranges_says_what_it_draws_at_random():
    ranges = {"optim.lr": {"log": [1e-4, 1e-1]}, "optim.beta2": {"between": [0.9, 0.99]}}
    search, lines = parse(sampler="CMA-ES", space=ranges | {"optim.clip": [1.0, None]})
    assert search is not None and "draws optim.clip at random" in lines[0]
    assert parse(sampler="CMA-ES", space=ranges)[1] == []
    assert "learns of none" in parse(sampler="CMA-ES", space=ranges, constraints=["verdict == stable"])[1][0]


@pytest.mark.parametrize(
    "other",
    [
        "grid: {optim.eps: [1e-8]}",
        "cases: {a: {optim.eps: 1e-8}}",
        "exclude: ['seed == 1']",
        "zip: [{optim.eps: [1e-8], optim.beta1: [0.9]}]",
    ],
)
def test_a_grid_beside_a_search_is_refused(other: str, tmp_path: Path):
    _, issues = read(f"  {other}\n{BLOCK}", tmp_path)
    (problem,) = issues.problems
    assert problem.setting == f"sweep.{other.partition(':')[0]}" and "cannot stand beside sweep.search" in problem.rule
    assert "sweeps/mine.yaml:4" in str(problem)


def test_the_command_line_takes_axes_out_of_a_search():
    search, _ = parse(space={"optim.warmup_steps": [5, 10], "optim.clip": [1.0, None]})
    assert search is not None
    issues = Issues()
    for pins in ({"optim.warmup_steps": 1}, {"optim.warmup_share": 1}):
        left = searchspace.fixed(search, pins, issues)
        assert left is not None and list(left.space) == ["optim.clip"]
    assert searchspace.fixed(search, {"optim.warmup_steps": 1, "optim.clip": 1}, issues) is None
    assert "no axis left" in str(issues.problems[0])


def test_a_value_is_rounded_and_stays_in_its_range():
    lr = Range(1e-4, 0.123456789, log=True)
    assert lr.nearest(0.0012345678) == 0.00123457
    assert lr.nearest(0.1234567889) == 0.123456789, "rounding up would leave the range"
    assert Range(0.1, 0.12345649, log=True).nearest(0.12345648) == 0.123456
    assert Range(4, 64, whole=True).nearest(4.4) == 4
    assert lr.holds(1e-4) and not lr.holds(1e-5) and not lr.holds(None) and not lr.holds("a") and not lr.holds(True)
    assert Choice((1.0, None)).holds(None) and not Choice((1.0,)).holds(True) and not Choice((True,)).holds(1)


def test_the_language_of_exclude_is_as_it_was():
    from stabstudy import expressions

    with pytest.raises(ConfigError, match="stable is not a setting"):
        expressions.parse("optim.schedule == stable")
    with pytest.raises(ConfigError, match="verdict is not a setting"):
        expressions.parse("verdict == 'stable'")

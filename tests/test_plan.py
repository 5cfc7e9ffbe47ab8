"""Planning: which trials a command line and a sweep file stand for."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config as cfg
from stabstudy import expressions, wording
from stabstudy.config import TrialConfig
from stabstudy.data import sources
from stabstudy.planning import asked, compose, compute, estimate
from stabstudy.planning.compute import Compute
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError

SWEEP = """\
# @package _global_
# Which of these is rough?
sweep:
  seeds: [0, 1]
  grid:
    model.depth: [2, 4]
    optim.lr: [1e-3, 3e-3]
"""


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Plan]:
    """ask(sweep_text, *arguments): the plan of that sweep file, called `own`, in an empty folder."""

    def plan(text: str, *arguments: str) -> Plan:
        (tmp_path / "sweeps").mkdir(exist_ok=True)
        (tmp_path / "sweeps" / "own.yaml").write_text(text)
        return make_plan(["sweep=own", *arguments], tmp_path)

    return plan


def values(plan: Plan, *names: str) -> list[tuple[Any, ...]]:
    """The settings of the plan's trials, in order."""
    return [tuple(cfg.flat(t.config)[n] for n in names) for t in plan.trials]


def block(body: str) -> str:
    """A sweep file with this `sweep:` block."""
    indented = "\n".join(f"  {line}" for line in body.strip().splitlines())
    return f"# @package _global_\n# Is it?\nsweep:\n{indented}\n"


# the product


def test_grid_times_seeds_seed_by_seed(ask):
    plan = ask(SWEEP)
    cells = list(itertools.product([2, 4], [1e-3, 3e-3]))
    assert values(plan, "model.depth", "optim.lr", "seed") == [(*c, s) for s in (0, 1) for c in cells]
    assert [(a.name, a.values) for a in plan.axes] == [("model.depth", (2, 4)), ("optim.lr", (1e-3, 3e-3))]
    assert len({t.trial_id for t in plan.trials}) == 8 and len({t.cell_id for t in plan.trials}) == 4
    assert plan.question == "Which of these is rough?"
    presets = {"model": "tiny", "optim": "adamw", "objective": "lm", "data": "pysrc", "train": "short"}
    assert plan.trials[0].choices == presets


def test_every_value_is_in_its_settings_type(ask):
    plan = ask(block("grid: {optim.clip: [1, null, 0.5], model.dim: [32, 64]}"))
    assert plan.axes[0].values == (1.0, None, 0.5)
    assert {type(t.config.optim.clip) for t in plan.trials} == {float, type(None)}
    assert {type(t.config.model.dim) for t in plan.trials} == {int}


def test_ids_are_those_of_the_settings_and_the_text(ask):
    for trial in ask(SWEEP).trials:
        assert trial.data_fingerprint == sources.fingerprint(trial.config.data)
        assert trial.trial_id == cfg.trial_id(trial.config, trial.data_fingerprint)
        assert trial.cell_id == cfg.cell_id(trial.config, trial.data_fingerprint)


def test_logarithmic_axis(ask):
    plan = ask(block("grid: {optim.lr: {log: [1e-4, 1e-2], num: 5}, train.steps: {log: [100, 800], num: 4}}"))
    lr, steps = plan.axes
    assert lr.values == (1e-4, 0.000316228, 1e-3, 0.00316228, 1e-2)
    assert steps.values == (100, 200, 400, 800) and {type(v) for v in steps.values} == {int}


def test_zipped_axes_advance_together(ask):
    plan = ask(
        block("zip:\n  - {train.batch_size: [8, 32], optim.warmup_steps: [40, 10]}\ngrid: {optim.lr: [0.1, 0.2]}")
    )
    assert values(plan, "optim.lr", "train.batch_size", "optim.warmup_steps") == [
        (0.1, 8, 40),
        (0.1, 32, 10),
        (0.2, 8, 40),
        (0.2, 32, 10),
    ]


def test_cases_are_added_to_the_grid(ask):
    plan = ask(block("grid: {optim.lr: [0.1]}\ncases:\n  rough: {optim.lr: 1.0, optim.clip: null, model: small}"))
    assert [t.case for t in plan.trials] == [None, "rough"]
    rough = plan.trials[1]
    assert (rough.config.optim.lr, rough.config.optim.clip, rough.config.model.dim) == (1.0, None, 128)
    assert rough.choices["model"] == "small"


def test_a_sweep_of_cases_alone_has_no_other_cell(ask):
    assert [t.case for t in ask(block("cases: {a: {optim.lr: 0.1}, b: {optim.lr: 0.2}}")).trials] == ["a", "b"]


def test_a_sweep_without_axes_is_one_trial(ask):
    assert [
        t.config
        for t in ask(
            "# @package _global_\n# One?\nseed_free: &x 1\n".replace("seed_free: &x 1", "optim: {lr: 0.2}")
        ).trials
    ] == [cfg.from_dict({"optim": {"lr": 0.2}})]


def test_group_axis_takes_each_preset_whole(ask):
    plan = ask(block("grid: {data: [pysrc, synthetic], model: [tiny, small]}"))
    assert [(t.choices["data"], t.choices["model"]) for t in plan.trials] == [
        ("pysrc", "tiny"),
        ("pysrc", "small"),
        ("synthetic", "tiny"),
        ("synthetic", "small"),
    ]
    assert [t.config.data.source for t in plan.trials] == ["pysrc", "pysrc", "synthetic", "synthetic"]
    assert [t.config.model.dim for t in plan.trials] == [64, 128, 64, 128]


def test_a_setting_lies_on_top_of_the_preset_it_belongs_to(ask):
    plan = ask(block("grid: {model: [tiny, small], model.depth: [3]}"), "model.n_heads=2")
    assert values(plan, "model.dim", "model.depth", "model.n_heads") == [(64, 3, 2), (128, 3, 2)]


def test_all_seven_axes_in_every_combination(ask):
    """The seven that the project exists for, over two values each, clipping off among them."""
    axes = {
        "model.depth": (2, 3),
        "optim.lr": (1e-3, 1e-2),
        "train.batch_size": (4, 8),
        "optim.weight_decay": (0.0, 0.1),
        "optim.warmup_steps": (0, 20),
        "optim.clip": (1.0, None),
        "data": ("pysrc", "synthetic"),
    }
    overrides = [f"{n}={','.join('null' if v is None else str(v) for v in vs)}" for n, vs in axes.items()]
    plan = ask("# @package _global_\n# All?\n{}\n".replace("{}", "sweep: {seeds: [7]}"), *overrides)
    assert {a.name: a.values for a in plan.axes} == axes
    found = [tuple(plan.values(t)) for t in plan.trials]
    assert found == list(itertools.product(*axes.values()))
    assert len({t.trial_id for t in plan.trials}) == 2**7


SHARE = """\
# @package _global_
# Long or short?
optim: {warmup_steps: null, warmup_share: 0.1}
train: {steps: 50}
sweep:
  grid: {train.batch_size: [4, 8]}
"""


@pytest.mark.parametrize(
    ("said", "warmups", "shares"),
    [
        ([], [5, 5], {0.1}),
        (["train.steps=20"], [2, 2], {0.1}),
        (["optim.warmup_share=0.2"], [10, 10], {0.2}),
        (["optim.warmup_share=0.2,0.4"], [10, 20, 10, 20], {0.2, 0.4}),
        (["optim.warmup_steps=7"], [7, 7], {None}),
        (["optim.warmup_steps=7", "optim.warmup_share=null"], [7, 7], {None}),
        (["optim.warmup_steps=0,20"], [0, 20, 0, 20], {None}),
    ],
)
def test_who_says_the_warmup_one_way_takes_back_the_other(ask, said, warmups, shares):
    plan = ask(SHARE, *said)
    assert [w for (w,) in values(plan, "optim.warmup_steps")] == warmups
    assert {s for (s,) in values(plan, "optim.warmup_share")} == shares and "warmup" not in " ".join(plan.warnings)


def test_the_command_line_takes_the_warmup_out_of_grids_and_cases(ask):
    grid = "grid: {train.batch_size: [4], optim.warmup_share: [0.1, 0.2]}"
    text = block(f"{grid}\ncases:\n  long: {{optim.warmup_share: 0.5, optim.lr: 1e-3}}")
    names = "optim.warmup_steps", "optim.warmup_share"
    assert values(ask(text), *names) == [(20, 0.1), (40, 0.2), (100, 0.5)]
    assert [a.name for a in ask(text).axes] == ["train.batch_size", "optim.warmup_share"]
    assert values(ask(text, "optim.warmup_steps=7"), *names) == [(7, None), (7, None)]
    assert values(ask(text, "optim.warmup_steps=7,9"), *names) == [(7, None), (9, None), (100, 0.5)]
    text = block("grid: {optim.warmup_steps: [1, 2]}")
    assert values(ask(text, "optim.warmup_share=null"), *names) == [(1, None), (2, None)]
    assert values(ask(text, "optim.warmup_share=0.5"), *names) == [(100, 0.5)]


def test_both_ways_at_once_are_refused(ask):
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps, optim\.warmup_share: set one of them.* got 7 and 0.2"):
        ask(SHARE, "optim.warmup_steps=7", "optim.warmup_share=0.2")


def test_shares_that_come_to_the_same_steps_are_one_cell(ask):
    plan = ask(SHARE, "optim.warmup_share=0.1,0.101", "train.batch_size=4")
    assert len(plan.trials) == 1 and "equals another cell" in plan.warnings[0]


def test_interpolations_follow_the_axis(ask):
    text = "train: {checkpoint_every: '${train.steps}'}\n" + block("grid: {train.steps: [50, 60]}")
    assert values(ask(text), "train.steps", "train.checkpoint_every") == [(50, 50), (60, 60)]
    assert values(ask(text, "train.steps=70"), "train.checkpoint_every") == [(70,)]


def test_an_override_follows_another_setting_in_each_cell(ask):
    text, names = block("grid: {train.steps: [50, 60]}"), ("train.steps", "optim.warmup_steps")
    plan = ask(text, "optim.warmup_steps=${train.steps}")
    assert values(plan, *names) == [(50, 50), (60, 60)] and [axis.name for axis in plan.axes] == ["train.steps"]
    assert values(ask(text, "optim.warmup_steps=20,${train.steps}"), *names) == [(50, 20), (50, 50), (60, 20), (60, 60)]
    assert values(ask(text, "optim.warmup_steps=50"), *names) == [(50, 50), (60, 50)]
    for written, problem in (("${train.step}", "cannot be resolved"), ("${optim.lr}", "must be a whole number")):
        with pytest.raises(ConfigError, match=rf"optim\.warmup_steps: {problem}"):
            ask(text, f"optim.warmup_steps={written}")


def test_an_allowed_environment_variable_is_read(ask, monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    monkeypatch.setenv("STABSTUDY_TEXT", str(tmp_path / "a.txt"))
    plan = ask("data: {path: '${oc.env:STABSTUDY_TEXT}'}\n" + block("seeds: 1"), "data=text")
    assert plan.trials[0].config.data.path == str(tmp_path / "a.txt")


# the command line has the last word


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-4,1e-3", [1e-4, 1e-3]),
        ("optim.lr=choice(0.1,0.2)", [0.1, 0.2]),
        ("optim.lr=range(1,4)", [1.0, 2.0, 3.0]),
        ("optim.lr={log:[1e-3,1e-1],num:3}", [1e-3, 1e-2, 1e-1]),
        ("optim.lr=sort(3,1,2)", [1.0, 2.0, 3.0]),
        ("++optim.lr=0.5", [0.5]),
        ("optim.lr=0.7", [0.7]),
    ],
)
def test_an_override_replaces_the_axis(ask, override, expected):
    plan = ask(SWEEP, override, "seeds=1", "model.depth=2")
    assert [lr for (lr,) in values(plan, "optim.lr")] == expected


@pytest.mark.parametrize(
    ("given", "question"),
    [
        (["optim.lr=1e-4,1e-5"], "Which of these is rough?"),
        (["optim.clip=1.0,2.0"], "What do depth, learning rate and clip threshold change?"),
        (["model.depth=2"], "What does learning rate change?"),
        (["model.depth=2", "optim.lr=1e-3"], "How stable is this one recipe?"),
    ],
)
def test_a_sweep_of_other_axes_asks_another_question(ask, given, question):
    assert ask(SWEEP, *given).question == question


def test_a_replaced_axis_keeps_its_place_and_a_new_one_comes_last(ask):
    plan = ask(SWEEP, "optim.clip=1,null", "model.depth=range(2,11,4)")
    assert [a.name for a in plan.axes] == ["model.depth", "optim.lr", "optim.clip"]
    assert plan.axes[0].values == (2, 6, 10)


def test_glob_chooses_presets(ask):
    plan = ask(SWEEP, "data=glob(synthetic*)", "seeds=1")
    names = next(a.values for a in plan.axes if a.name == "data")
    assert len(names) >= 2 and all(n.startswith("synthetic") for n in names)


def test_the_last_of_two_overrides_counts(ask):
    assert values(ask(SWEEP, "optim.lr=1,2", "optim.lr=3", "seeds=1", "model.depth=2"), "optim.lr") == [(3.0,)]


def test_a_pin_takes_its_setting_out_of_a_zip(ask):
    text = block("zip:\n  - {train.batch_size: [8, 32], optim.warmup_steps: [40, 10]}")
    plan = ask(text, "optim.warmup_steps=5")
    assert values(plan, "train.batch_size", "optim.warmup_steps") == [(8, 5), (32, 5)]
    assert [a.name for a in plan.axes] == ["train.batch_size"]
    assert len(ask(text, "optim.warmup_steps=5", "train.batch_size=4").trials) == 1


def test_what_a_removed_partner_leaves_equal_counts_once(ask):
    text = block("zip:\n  - {train.batch_size: [8, 8, 4], optim.warmup_steps: [40, 10, 5]}")
    plan = ask(text, "optim.warmup_steps=5")
    assert values(plan, "train.batch_size") == [(8,), (4,)] and plan.warnings == ()


def test_an_axis_override_takes_its_setting_out_of_a_zip(ask):
    text = block("zip:\n  - {train.batch_size: [8, 32], optim.warmup_steps: [40, 10]}")
    plan = ask(text, "optim.warmup_steps=1,2,3")
    assert len(plan.trials) == 6 and {len(a.values) for a in plan.axes} == {2, 3}


def test_a_pin_overrules_cases_and_an_axis_leaves_them(ask):
    text = block("grid: {optim.clip: [1.0]}\ncases:\n  one: {optim.lr: 1.0, optim.clip: null}")
    assert values(ask(text, "optim.lr=0.5"), "optim.lr") == [(0.5,), (0.5,)]
    assert values(ask(text, "optim.lr=0.5,0.6"), "optim.lr") == [(0.5,), (0.6,), (1.0,)]
    assert values(ask(text, "train.steps=30"), "train.steps") == [(30,), (30,)]


def test_a_pinned_group_takes_the_place_of_a_group_axis(ask):
    plan = ask(block("grid: {data: [pysrc, synthetic], optim.lr: [0.1]}"), "data=synthetic")
    assert [t.choices["data"] for t in plan.trials] == ["synthetic"]
    assert [a.name for a in plan.axes] == ["optim.lr"]


@pytest.mark.parametrize(
    ("said", "seeds"),
    [
        ("seeds=3", [0, 1, 2]),
        ("seeds=[0,7]", [0, 7]),
        ("seeds=0,7", [0, 7]),
        ("seed=5", [5]),
        ("seeds=range(2,4)", [2, 3]),
    ],
)
def test_seeds(ask, said, seeds):
    plan = ask(SWEEP, said, "optim.lr=0.1", "model.depth=2")
    assert [t.config.seed for t in plan.trials] == seeds


def test_launch_keys(ask, tmp_path):
    plan = ask(SWEEP, "study=2024", "results_dir=out put", "launcher=local", "compute=gpu", "compute.retries=0")
    assert (plan.study, plan.folder, plan.launcher) == ("2024", tmp_path / "out put" / "2024", "local")
    assert (plan.compute.retries, plan.compute.gpus_per_pack, plan.compute.threads) == (0, 1.0, 4)
    assert {t.trial_id for t in plan.trials} == {t.trial_id for t in ask(SWEEP).trials}, "no part of a trial"


def test_auto_takes_a_gpu_where_there_is_one(ask, monkeypatch):
    monkeypatch.setattr("stabstudy.planning.compute.gpu_memory", lambda: (80 * 10**9,))
    assert ask(SWEEP).compute.gpus_per_pack == 1.0
    monkeypatch.setattr("stabstudy.planning.compute.gpu_memory", lambda: ())
    assert ask(SWEEP).compute == Compute()


@pytest.mark.parametrize("name", ["1e3", "2024", "a.b", "null", "true"])
def test_a_sweep_may_have_any_name_that_a_study_may_have(tmp_path, name):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / f"{name}.yaml").write_text("# @package _global_\n# Named?\noptim: {lr: 0.5}\n")
    assert make_plan([f"sweep='{name}'"], tmp_path).study == name


def test_own_sweeps_come_before_shipped_ones(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "quickstart.yaml").write_text("# @package _global_\n# Mine?\noptim: {lr: 0.5}\n")
    plan = make_plan([], tmp_path)
    assert (plan.study, plan.question, len(plan.trials)) == ("quickstart", "Mine?", 1)


# conditions


def test_conditions_are_axes_that_are_given(ask):
    plan = ask(block("grid: {model.depth: [2, 4], optim.lr: [1e-3, 3e-3]}\nconditions: [model.depth, data]"))
    assert plan.conditions == ("model.depth", "data")
    assert yaml.safe_load(plan.sweep_text)["conditions"] == ["model.depth", "data"]
    assert ask(block("grid: {model.depth: [2, 4]}")).conditions is None


@pytest.mark.parametrize(
    ("written", "problem"),
    [("model.depth", "must be a list of settings or groups"), ("[model.dept]", "is not a setting"), ("[1]", "must be")],
)
def test_conditions_are_names_of_settings(ask, written: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        ask(block(f"grid: {{model.depth: [2, 4]}}\nconditions: {written}"))


# exclusions


def test_a_group_within_a_group_is_set_swept_pinned_and_excluded(ask):
    text = "# @package _global_\n# Is it?\ndefaults:\n  - override /data: synthetic_flips\n"
    text += "data: {seq_len: 64, synthetic: {order: 2, nesting: '${data.synthetic.order}'}}\nsweep:\n"
    text += "  grid: {data.synthetic.vocabulary: [300, 400]}\n  exclude: ['data.synthetic.vocabulary == 400']\n"
    plan = ask(text, "data.synthetic.flip_ppm=0,9", "data.synthetic.bytes=15000")
    names = [f"data.synthetic.{name}" for name in ("vocabulary", "flip_ppm", "bytes", "order", "nesting", "tail_milli")]
    assert values(plan, *names) == [(300, 0, 15_000, 2, 2, 1000), (300, 9, 15_000, 2, 2, 1000)]
    assert {a.name for a in plan.axes} == {"data.synthetic.vocabulary", "data.synthetic.flip_ppm"}
    assert values(ask(text), *names) == [(300, 1000, 2_000_000, 2, 2, 1000)], "the preset's"


def test_exclude_leaves_cells_out_but_no_case(ask):
    text = block(
        "grid: {model.depth: [2, 4], optim.lr: [1e-3, 3e-3]}\n"
        "cases: {kept: {model.depth: 4, optim.lr: 0.5}}\n"
        'exclude: ["model.depth == 4 and optim.lr > 1e-3"]'
    )
    assert values(ask(text), "model.depth", "optim.lr") == [(2, 1e-3), (2, 3e-3), (4, 1e-3), (4, 0.5)]


def test_a_case_stays_where_its_equal_in_the_grid_is_excluded(ask):
    text = block("grid: {optim.lr: [0.1, 0.2]}\ncases: {kept: {optim.lr: 0.2}}\nexclude: ['optim.lr == 0.2']")
    assert [(t.config.optim.lr, t.case) for t in ask(text).trials] == [(0.1, None), (0.2, "kept")]


def test_presets_are_composed_once_and_settings_laid_on_top(ask, monkeypatch):
    """A composition costs a tenth of a second: 2 presets times 200 cells must not cost 40."""
    composed = []
    original = compose.base
    monkeypatch.setattr(compose, "base", lambda *a: composed.append(a) or original(*a))
    assert len(ask(block("grid: {model: [tiny, small], optim.lr: {log: [1e-4, 1e-1], num: 200}}")).trials) == 400
    assert len(composed) == 3, "one for each preset, one for the compute group"


def test_exclude_by_preset_and_seed(ask):
    text = block("seeds: 2\ngrid: {data: [pysrc, synthetic]}\nexclude: [\"data == 'synthetic' and seed != 0\"]")
    assert [(t.choices["data"], t.config.seed) for t in ask(text).trials] == [
        ("pysrc", 0),
        ("synthetic", 0),
        ("pysrc", 1),
    ]


def test_a_condition_that_names_nothing_is_warned_about_unless_the_command_line_explains_it(ask):
    text = block('grid: {model.depth: [2, 10]}\nexclude: ["model.depth == 12"]')
    assert ask(text).warnings == ("sweep.exclude: 'model.depth == 12' matches no cell",)
    assert ask(text, "model.depth=2").warnings == ()


VALUES = {"optim.lr": 0.01, "optim.clip": None, "model.depth": 4, "data": "c4", "seed": 0, "train.steps": 100}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("optim.lr > 3e-3", True),
        ("optim.lr > 3e-3 and model.depth == 5", False),
        ("optim.lr > 3e-3 or model.depth == 5", True),
        ("not model.depth == 4", False),
        ("1 < model.depth <= 4", True),
        ("data in ('c4', 'dclm')", True),
        ("data not in ['c4']", False),
        ("optim.clip == null", True),
        ("optim.clip == None", True),
        ("optim.clip > 0", False),
        ("optim.clip != 1.0", True),
        ("-1 < seed", True),
        ("(data == 'c4') == true", True),
        ("model.depth in (2, 4) and (seed == 1 or not data == 'dclm')", True),
    ],
)
def test_conditions(text, holds):
    assert expressions.parse(text).holds(VALUES) is holds


@given(st.integers(-5, 5), st.integers(-5, 5), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
def test_conditions_agree_with_python(a, b, op):
    assert expressions.parse(f"model.depth {op} {b}").holds({"model.depth": a}) is eval(f"a {op} b")


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "optim.lr.__class__ == 1",
        "(lambda: 1)() == 1",
        "[x for x in (1,)] == 1",
        "optim.lr * 2 > 1",
        "f'{seed}' == '0'",
        "model['depth'] == 1",
        "data in 'c4'",
        "seed is 0",
        "b'x' == 1",
        "1j == seed",
        "...",
        "optim.lr",
        "True",
        "",
        "seed ==",
        "seed = 0",
        "seed == 0; 1",
        "x" * 501,
        "(" * 240,
        "\0",
        "optim.lr := 3",
        "optim.lrr == 1",
        "depth == 1",
    ],
)
def test_nothing_else_is_a_condition(text):
    with pytest.raises(ConfigError):
        expressions.parse(text)


def test_an_unknown_name_in_a_condition_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"depth is not a setting \(did you mean model.depth\?\)"):
        expressions.parse("depth == 1")


# warnings


def test_equal_values_count_once_with_a_warning(ask):
    plan = ask(block("grid: {optim.lr: [3e-3, 0.003, 1, 1.0]}\nseeds: [0, 0]"))
    assert len(plan.trials) == 2 and len(plan.warnings) == 3
    assert (
        "optim.lr: 0.003 is listed twice" in plan.warnings[0] or "optim.lr: 0.003 is listed twice" in plan.warnings[1]
    )


def test_equal_cells_count_once_with_a_warning(ask):
    plan = ask(block("grid: {optim.lr: [0.1]}\ncases: {same: {optim.lr: 0.1}}\nseeds: 3"))
    assert len(plan.trials) == 3
    assert plan.warnings == (f"case same equals another cell: {plan.trials[0].cell_id} counts once",)
    assert {t.case for t in plan.trials} == {"same"}, "and goes by the name of the case"


def test_a_hub_text_without_revision_is_warned_about(tmp_path):
    plan = make_plan(["sweep=dataset", "data=fineweb,dclm", "seeds=1"], tmp_path)
    assert [w.split(":")[0] for w in plan.warnings] == ["data.hub_revision"] * 2


# studies grow and never mix


def written(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text)


def test_the_same_sweep_may_grow(ask):
    first = ask(SWEEP)
    written(first)
    grown = ask(SWEEP, "optim.lr=1e-3,3e-3,1e-2")
    assert {t.trial_id for t in first.trials} < {t.trial_id for t in grown.trials}
    assert grown.warnings == ()


def test_a_changed_base_is_warned_about(ask):
    written(ask(SWEEP))
    assert ask(SWEEP, "train.steps=300").warnings == (
        "train.steps: 300 now, 200 in the launch before; the study holds trials of both",
    )


def test_another_sweep_is_refused(ask, tmp_path):
    written(ask(SWEEP))
    with pytest.raises(ConfigError, match=r"holds another sweep: .* got sweep quickstart, in that folder sweep own"):
        make_plan(["sweep=quickstart", "study=own"], tmp_path)


def test_a_folder_that_is_no_study_is_refused(ask, tmp_path):
    (tmp_path / "results" / "own").mkdir(parents=True)
    assert ask(SWEEP).study == "own", "an empty folder is fine"
    (tmp_path / "results" / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not a study of this program: it holds thesis\.txt"):
        ask(SWEEP)


def test_a_newer_format_is_refused(ask):
    plan = ask(SWEEP)
    written(plan)
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text.replace("format: 1", "format: 99"))
    with pytest.raises(ConfigError, match="has format 99, this version reads up to 1"):
        ask(SWEEP)


def test_text_that_changed_since_the_study_began_is_refused(ask, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one two three\n" * 100)
    arguments = ("data=text", f"data.path={text}", "seeds=1")
    first = ask(SWEEP, *arguments)
    written(first)
    assert ask(SWEEP, *arguments).trials == first.trials
    text.write_text("one two four!\n" * 100)
    with pytest.raises(ConfigError, match="text of source text has changed since this study began"):
        ask(SWEEP, *arguments)
    assert ask(SWEEP, "seeds=1").trials, "other text is growth"


@pytest.mark.parametrize("text", ["", "[1]", "a: [", "\xff", "sweep: {own: 1}", "data: [{settings: {a: [1]}}]"])
def test_a_broken_sweep_yaml_is_refused(ask, text):
    plan = ask(SWEEP)
    written(plan)
    (plan.folder / "sweep.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="study: "):
        ask(SWEEP)


def test_an_odd_question_does_not_lock_its_study(ask):
    text = SWEEP.replace("Which of these is rough?", "Is ${x:1} or 1e-400: {worse} 'than' \"no\"?")
    written(ask(text))
    assert ask(text).question.startswith("Is $ {x:1} or 1e-400")


def test_what_was_trained_on_is_remembered_through_other_launches(ask, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one two three\n" * 100)
    written(ask(SWEEP, "data=text", f"data.path={text}"))
    written(ask(SWEEP))
    text.write_text("one two four!\n" * 100)
    with pytest.raises(ConfigError, match="has changed since"):
        ask(SWEEP, "data=text", f"data.path={text}")


def test_sweep_yaml_says_what_was_asked(ask):
    plan = ask(SWEEP.replace("seeds:", "exclude: ['seed == 5']\n  seeds:"), "optim.eps=1e-5", "model.depth=2,4")
    written(plan)
    said = asked.read_record(plan.folder)
    assert said is not None
    assert (said["sweep"], said["question"], said["trials"]) == ("own", "Which of these is rough?", 8)
    assert said["axes"] == {"model.depth": [2, 4], "optim.lr": [0.001, 0.003]}
    assert said["settings"]["optim.eps"] == 1e-5 and "optim.lr" not in said["settings"]
    assert said["command"] == ["sweep=own", "optim.eps=1e-5", "model.depth=2,4"]
    assert said["data"] == [{"fingerprint": plan.trials[0].data_fingerprint, "settings": {"source": "pysrc"}}]


CANARIES = ["hf_abcdefghijklmnop", "sk-abcdefghijklmnop", "AKIAABCDEFGHIJKL", "ghp_abcdefghijklmnop"]


@pytest.mark.parametrize("canary", CANARIES)
def test_no_secret_reaches_sweep_yaml(ask, canary, tmp_path):
    (tmp_path / canary).write_text("text\n" * 100)
    plan = ask(SWEEP, "data=text", f"data.path={tmp_path}/{canary}")
    assert canary not in plan.sweep_text and canary not in " ".join(plan.argv)
    written(plan)
    assert ask(SWEEP, "data=text", f"data.path={tmp_path}/{canary}").trials == plan.trials


def test_redaction_leaves_settings_alone():
    body = {
        "data.tokenizer": "bytes",
        "tokens": 3,
        "train": {"api_key": "x"},
        "auth_token": "t",
        "address": "ray://u:p@h",
    }
    assert asked.redact(body) == {
        "data.tokenizer": "bytes",
        "tokens": "<hidden>",
        "train": {"api_key": "<hidden>"},
        "auth_token": "<hidden>",
        "address": "ray://<hidden>@h",
    }
    ours = {name: 1 for name in cfg.setting_names()}
    assert asked.redact(ours) == ours
    nested = cfg.to_dict(TrialConfig())
    assert asked.redact(nested) == nested and nested["train"]["final_eval_tokens"] == 16_384


# estimates


def test_arithmetic_agrees_with_a_count_by_hand():
    """Width 128, 4 layers, 256 bytes: about 7.5 MFLOP a token were counted on Lingua's own model."""
    config = cfg.from_dict(
        {"model": {"dim": 128, "multiple_of": 256}, "data": {"seq_len": 256}, "train": {"steps": 100, "batch_size": 8}}
    )
    weights = 1_049_728 + 258 * 128  # all but the input embedding, which is looked up
    assert estimate.flops(config) == 100 * 8 * 256 * (6 * weights + 6 * 4 * 128 * 256)
    assert estimate.flops(config) / config.tokens == pytest.approx(7.5e6, rel=0.05)


def test_cost_adds_up():
    config = TrialConfig()
    one, many = (estimate.cost([[config]] * n, Compute(), "local", None) for n in (1, 8))
    assert (many.tokens, many.flops) == (8 * one.tokens, 8 * one.flops)
    assert many.seconds == many.wall_seconds == pytest.approx(8 * one.seconds)
    assert not one.measured and estimate.cost([[config]], Compute(), "local", 1e9).measured
    slow, fast = (estimate.cost([[config]], Compute(), "local", rate).seconds for rate in (1e9, 1e10))
    assert slow - estimate.START_SECONDS == pytest.approx(10 * (fast - estimate.START_SECONDS))


def test_a_cluster_of_unknown_size_has_no_wall_time():
    assert estimate.cost([[TrialConfig()]], Compute(address="auto"), "ray", None).wall_seconds is None


def test_memory_of_the_published_models_is_of_the_right_size():
    """Mixed-precision training of 7B takes over 100 GB for weights and moments alone."""
    big = cfg.from_dict({"model": {"dim": 4096, "depth": 32, "n_heads": 32, "multiple_of": 256}})
    assert 100e9 < estimate.memory(big) < 400e9
    assert estimate.memory(TrialConfig()) < 200e6


def test_memory_and_checkpoints_count_what_the_optimizer_remembers():
    adamw, lion = (cfg.from_dict({"optim": {"kind": kind}}) for kind in ("adamw", "lion"))
    parameters = adamw.model.parameters(estimate.vocabulary(adamw))
    assert estimate.checkpoint_bytes(adamw) == 12 * parameters and estimate.checkpoint_bytes(lion) == 8 * parameters
    assert estimate.memory(adamw) - estimate.memory(lion) == pytest.approx(4 * parameters)


def test_capped_attention_keeps_its_scores_in_memory():
    """8 sequences of 4096, 4 layers, 4 heads: 4096 scores for each position and head, 16 bytes each."""
    long = {"data": {"seq_len": 4096}}
    plain, capped = (estimate.memory(cfg.from_dict(long | {"model": {"attn_softcap": cap}})) for cap in (None, 50.0))
    assert capped - plain == pytest.approx(8 * 4 * 4 * 4096**2 * 16)


class FakeDriver:
    """The three calls of NVIDIA's management library that the program makes, for two GPUs."""

    sizes = (80 * 10**9, 24 * 10**9)

    def nvmlInit_v2(self):  # noqa: N802 - the library's names
        return 0

    def nvmlShutdown(self):  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.sizes)

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):  # noqa: N802
        handle._obj.value = index.value + 1

    def nvmlDeviceGetMemoryInfo(self, handle, sizes):  # noqa: N802
        sizes._obj[0] = self.sizes[handle.value - 1]


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, FakeDriver.sizes), ("0,1", FakeDriver.sizes), ("0", (80 * 10**9,)), ("", ()), ("-1", ())],
)
def test_gpus_are_asked_of_the_driver(monkeypatch, visible, found):
    monkeypatch.setattr(compute.ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert compute.gpu_memory.__wrapped__() == found


def test_a_trial_may_fill_its_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr(compute, "gpu_memory", lambda: (80 * 10**9,))
    big = cfg.from_dict({"model": {"dim": 2048, "depth": 25, "n_heads": 16, "multiple_of": 256}})  # 1.3 billion: 28 GB
    assert estimate.too_large([big], Compute(gpus_per_pack=1.0)) == []
    (problem,) = estimate.too_large([TrialConfig(), big], Compute(gpus_per_pack=0.25))
    assert "must fit into the 20 GB there are" in problem.rule
    assert estimate.too_large([big], Compute(gpus_per_pack=0.25, address="auto")) == [], "a cluster's is not known"


def test_trials_that_fit_only_one_by_one_are_warned_about(monkeypatch):
    monkeypatch.setattr(compute, "memory", lambda: 2 * 10**9)
    monkeypatch.setattr(compute, "cores", lambda: 8)
    (warning,) = estimate.crowded([[TrialConfig()]] * 8, Compute(), "ray")
    assert warning.endswith("; 2 fit")
    assert estimate.crowded([[TrialConfig()]] * 2, Compute(), "ray") == []
    assert estimate.crowded([[TrialConfig()]] * 8, Compute(max_concurrent=2), "ray") == []
    assert estimate.crowded([[TrialConfig()]] * 8, Compute(), "local") == []


def test_a_study_written_before_packs_goes_on(ask):
    """Its sweep.yaml holds the settings' old names, which a command line may no longer use."""
    plan = ask(SWEEP)
    plan.folder.mkdir(parents=True)
    old = re.sub(r"  pack: .*\n", "", plan.sweep_text).replace("us_per_pack", "us_per_trial")
    assert "gpus_per_trial" in old and "cpus_per_trial" in old and "pack:" not in old
    (plan.folder / "sweep.yaml").write_text(old)
    assert ask(SWEEP) == plan
    with pytest.raises(ConfigError, match=r"compute\.gpus_per_trial: is now called compute\.gpus_per_pack"):
        ask(SWEEP + "compute: {gpus_per_trial: 1}\n")


def test_settings_without_effect_are_warned_about(ask):
    plan = ask(SWEEP, "launcher=local", "compute.address=auto", "compute.max_concurrent=3", "compute.threads=4")
    assert plan.warnings == (
        "compute.address: has no effect with launcher=local",
        "compute.max_concurrent: has no effect with launcher=local",
        "compute.threads: 4 threads of a pack share 1 core",
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h"), (864_000, "10 days")]
)
def test_durations(seconds, said):
    assert wording.duration(seconds) == said


@given(st.floats(0, 1e20))
def test_amounts_keep_three_digits(value):
    number, _, unit = wording.amount(value).partition(" ")
    back = float(number) * 1000 ** wording.UNITS.index(unit.strip())
    assert math.isclose(back, value, rel_tol=5.1e-3, abs_tol=1e-300)

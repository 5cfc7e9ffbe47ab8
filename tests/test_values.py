"""Launches asked in Python values: the requests and plans that the same words make, and the words themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hydra.core.config_loader import ConfigLoader
from hypothesis import given

import stabstudy
from stabstudy.api import planned
from stabstudy.planning import compose, overrides, values
from stabstudy.settings import ConfigError, Issues

LR = "optim.lr"
ASKED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"sweep": "depth_lr"}, ["sweep=depth_lr"]),
    ({LR: 1e-3}, ["optim.lr=0.001"]),
    ({LR: 1}, ["optim.lr=1"]),
    ({LR: [1e-4, 3e-4], "model.depth": range(2, 11, 4)}, ["optim.lr=1e-4,3e-4", "model.depth=range(2,11,4)"]),
    ({LR: (1e-4,)}, ["optim.lr=choice(1e-4)"]),
    ({LR: np.array([1e-4, 1e-3])}, ["optim.lr=0.0001,0.001"]),
    ({LR: np.float64(1e-4), "model.depth": np.int64(3)}, ["optim.lr=1e-4", "model.depth=3"]),
    ({LR: {"log": (1e-4, 1e-2), "num": 3}}, ["optim.lr={log:[1e-4,1e-2],num:3}"]),
    ({LR: {"between": [1e-4, 1], "holds": "works"}}, ["optim.lr={between:[1e-4,1],holds:works}"]),
    ({"optim.clip": None}, ["optim.clip=null"]),
    ({"optim.clip": [1.0, None]}, ["optim.clip=1.0,null"]),
    ({"optim.clip": [None]}, ["optim.clip=null"]),
    ({"model.qk_norm": [True, False]}, ["model.qk_norm=true,false"]),
    ({"train.compile": "off", "data": ["text", "c4"]}, ["train.compile=off", "data=text,c4"]),
    ({"data.path": Path("/a b/it's.txt")}, [r"data.path='/a b/it\'s.txt'"]),
    ({"data.path": [PurePosixPath("/a"), "/b,c"]}, ["data.path=/a,'/b,c'"]),
    ({"data.hub_revision": 1234567, "study": 2024}, ["data.hub_revision=1234567", "study=2024"]),
    ({"data.hub_revision": "1e5"}, ["data.hub_revision='1e5'"]),
    ({"train.checkpoint_every": "${train.steps}"}, ["train.checkpoint_every=${train.steps}"]),
    ({"seeds": 5}, ["seeds=5"]),
    ({"seeds": (0, 7)}, ["seeds=[0,7]"]),
    ({"seeds": np.arange(3)}, ["seeds=[0,1,2]"]),
    ({"seed": 3}, ["seed=3"]),
    ({"budget.trials": 4, "budget.hours": 0.5, "force": True}, ["budget.trials=4", "budget.hours=0.5", "force=true"]),
    ({"results_dir": Path("out"), "launcher": "local"}, ["results_dir=out", "launcher=local"]),
    ({"compute": "cpu", "compute.gpus_per_pack": 0}, ["compute=cpu", "compute.gpus_per_pack=0"]),
]


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    with compose.conf() as presets:
        yield presets


def content(request: overrides.Request) -> Any:
    """What is asked, without the words that it was asked in."""
    pins = {name: (type(chosen.value), chosen.value) for name, chosen in request.pins.items()}
    axes = {name: [(type(c.value), c.value) for c in chosen] for name, chosen in request.axes.items()}
    rest = request.frontier, dict(request.budget), request.study
    return request.sweep, request.launch, request.seeds, pins, list(axes.items()), rest


@pytest.mark.parametrize(("asked", "words"), ASKED, ids=lambda x: str(x)[:60])
def test_values_ask_what_words_ask(asked: dict[str, Any], words: list[str], loader: ConfigLoader) -> None:
    issues, others = Issues(), Issues()
    request = values.request(asked, loader, issues)
    assert content(request) == content(overrides.read(words, loader, others)) and issues == others == Issues()
    assert overrides.read(request.given, loader, issues) == request, "its own words, origins and all"


def test_the_words_are_those_that_a_person_would_type(loader: ConfigLoader) -> None:
    asked = {
        "sweep": "depth_lr",
        LR: [1e-4, 0.3],
        "data": "c4",
        "optim.clip": None,
        "data.path": "/a b",
        "seeds": [0, 7],
    }
    words = ["sweep=depth_lr", "optim.lr=0.0001,0.3", "data=c4", "optim.clip=null", "data.path='/a b'", "seeds=[0,7]"]
    assert list(values.request(asked, loader, Issues()).given) == words


HARD = ["null", "1e-3", "TRUE", "NaN", "a'b", "a\\", "\\'", "${train.steps}", "\\${x}", " x ", "", "range(1,2)", "é\n"]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(HARD)
plain = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | texts
asked_values = (
    plain
    | st.lists(plain, min_size=1, max_size=4)
    | st.fixed_dictionaries({"log": st.lists(plain, max_size=2), "num": plain})
    | st.fixed_dictionaries({"between": st.lists(st.floats(0, 1), min_size=2, max_size=2)})
)
names = st.sampled_from(
    [
        LR,
        "model.depth",
        "data.path",
        "data.hub_revision",
        "study",
        "seeds",
        "data",
        "compute.pack",
        "sweep",
        "optim.lrr",
    ]
)


@given(st.dictionaries(names, asked_values, max_size=4))
def test_any_values_can_be_typed(asked: dict[str, Any]) -> None:
    issues, others = Issues(), Issues()
    request = values.request(asked, None, issues)
    assert overrides.read(request.given, None, others) == request and issues == others


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"optim.lrr": 1}, ["optim.lrr=1"]),
    ({"sweep.grid.optim.lr": [1, 2]}, ["sweep.grid.optim.lr=1,2"]),
    ({"compute.gpus_per_trial": 1}, ["compute.gpus_per_trial=1"]),
    ({"data": ["c4", "c5"]}, ["data=c4,c5"]),
    ({"sweep": ["a", "b"]}, ["sweep=a,b"]),
    ({LR: {"log": [1, 0], "num": 3}}, ["optim.lr={log:[1,0],num:3}"]),
    ({LR: {"between": [1, 2], "until": 3}}, ["optim.lr={between:[1,2],until:3}"]),
    ({"data.path": "${oc.env:HOME}"}, ["data.path='${oc.env:HOME}'"]),
    ({"seeds": "many"}, ["seeds=many"]),
    ({"launcher": "slurm", "study": "a/b"}, ["launcher=slurm", "study='a/b'"]),
]


@pytest.mark.parametrize(("asked", "words"), REFUSED, ids=lambda x: str(x)[:60])
def test_what_is_wrong_is_answered_alike(asked: dict[str, Any], words: list[str], loader: ConfigLoader) -> None:
    issues, others = Issues(), Issues()
    values.request(asked, loader, issues)
    overrides.read(words, loader, others)
    assert issues.problems and issues == others


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ({1, 2}, "must be a number, text, True, False, None, a path, a list of these, or a mapping"),
        (1j, "must be a number"),
        ([1, print], "must be a number"),
        (range(10**12), "an axis has at most 10000 values"),
        ([], "the axis is empty"),
        ("a\0b", "must be text that can be typed"),
        ("\ud800", "must be text that can be typed"),
    ],
)
def test_values_without_words_are_refused(value: Any, rule: str) -> None:
    issues = Issues()
    values.request({LR: value}, None, issues)
    [problem] = issues.problems
    assert problem.setting == LR and problem.rule.startswith(rule)


SMALL = {"data": "synthetic", "data.synthetic.bytes": 15_000, "data.seq_len": 16, "train.steps": 64}
PLANS: list[tuple[tuple[Any, ...], dict[str, Any], list[str]]] = [
    (
        (None, {**SMALL, LR: [1e-3, 1e-2], "optim.clip": None}),
        {"seeds": 2, "launcher": "local"},
        ["optim.lr=1e-3,1e-2", "optim.clip=null", "seeds=2", "launcher=local"],
    ),
    (
        ("mine", {**SMALL, "model.depth": range(1, 4), LR: {"between": [1e-3, 1.0]}, "budget.trials": 9}),
        {"study": "s", "results_dir": Path("out"), "compute": {"pack": 4}},
        ["sweep=mine", "model.depth=1,2,3", "optim.lr={between:[1e-3,1.0]}", "budget.trials=9", "study=s",
         "results_dir=out", "compute.pack=4"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "named", "words"), PLANS, ids=["no sweep", "a search"])
def test_the_plans_are_the_same(
    given: tuple[Any, ...], named: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweeps").mkdir()
    Path("sweeps", "mine.yaml").write_text("# @package _global_\n# Mine?\nsweep: {seeds: 3, grid: {optim.lr: [1]}}\n")
    plan, typed = (
        stabstudy.plan(*given, **named),
        planned([f"{k}={v}" for k, v in SMALL.items()] + words, tmp_path, False),
    )
    assert plan.trials == typed.trials and plan.folder == typed.folder and plan.budget == typed.budget
    assert plan.compute == typed.compute and plan.axes == typed.axes and plan.warnings == typed.warnings
    record, other = (text.partition("command:")[0] for text in (plan.sweep_text, typed.sweep_text))
    assert record == other and "command:" in plan.sweep_text
    assert planned(plan.argv, tmp_path, False).sweep_text == plan.sweep_text, "the command that it names makes it again"
    assert list(tmp_path.iterdir()) == [tmp_path / "sweeps"]
    assert repr(plan).startswith(f"<Plan {plan.study}: ") and f"in {plan.folder}" in repr(plan)


def test_compute_is_a_preset_or_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    preset = stabstudy.plan(None, SMALL | {"compute.threads": 2}, compute="gpu")
    assert (preset.compute.threads, preset.compute.gpus_per_pack) == (2, 1)
    assert stabstudy.plan(None, SMALL, compute={"threads": 2, "cpus_per_pack": 2}).compute.threads == 2
    with pytest.raises(TypeError, match="overrides must be a mapping"):
        stabstudy.plan(None, ["optim.lr=1"])  # type: ignore[arg-type]


def test_an_argument_is_not_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    twice = "is given twice: as an argument and in the overrides"
    with pytest.raises(ConfigError) as raised:
        stabstudy.plan("quickstart", {"seeds": 3, "compute.pack": 2}, seeds=5, compute={"pack": 1})
    assert [dataclasses.astuple(p) for p in raised.value.problems] == [
        ("compute.pack", twice, ""),
        ("seeds", twice, ""),
    ]

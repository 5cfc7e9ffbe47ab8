"""Everything that lies in conf/ and sweeps/ composes, plans, and keeps the rules of its folder."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest

from stabstudy import config as cfg
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.planning import compose, compute, document
from stabstudy.planning.compute import Compute
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(p for p in (ROOT / "conf").rglob("*.yaml") if p.parent != ROOT / "conf")
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
STARTS = {"kto_start"}
"""Sweeps of one trial, from which others begin."""
NEEDS_PATH = {"sft", "kto", "text", "jsonl", "parquet", "lingua", "dclm_local", "fineweb_local", "fineweb_edu_local"}


def read(path: Path) -> document.Document:
    return document.read(path, str(path.relative_to(ROOT)))


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@functools.cache
def composed_once(presets: tuple[tuple[str, str], ...]) -> compose.Base:
    nothing = document.Document("nothing.yaml", "", {"sweep": {}}, {})
    with compose.conf():
        return compose.base(nothing, dict(presets))


def composed(**presets: str) -> compose.Base:
    """conf/ with these presets and no sweep on top."""
    return copy.deepcopy(composed_once(tuple(presets.items())))


# conf/


def test_without_a_word_it_is_the_default_trial():
    values = composed().values
    where = values.pop("compute")
    assert cfg.from_dict(values) == TrialConfig()
    assert compute.read(where, []) == dataclasses.replace(Compute(), gpus_per_pack=where["gpus_per_pack"] or 0.0)


def test_every_setting_stands_in_conf_and_nothing_else_does():
    assert set(leaves(composed().values)) == {*cfg.setting_names(), *compute.names()}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_preset_holds_one_value_for_each_key_and_only_settings(path: Path):
    group = path.parent.name
    known = {*cfg.setting_names(), *compute.names()}
    for name, value in leaves(read(path).content, f"{group}.").items():
        assert name in known
        assert not isinstance(value, list), f"{name}: alternatives belong into sweeps/"


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_preset_composes_to_a_trial(path: Path):
    group, name = path.parent.name, path.stem
    values = composed(**{group: name}).values
    problems: list[cfg.Problem] = []
    compute.read(values.pop("compute"), problems)
    assert problems == []
    if group == "data" and name in NEEDS_PATH:
        values["data"]["path"] = "somewhere"
    if group == "objective" and name != "lm":
        graded = {"source": "arithmetic_graded", "layout": "padded"}
        values["data"] |= graded if name == "kto" else {"source": "arithmetic"}
    if values["data"]["source"] in cfg.EXAMPLES:
        labelled = values["data"].get("labels") or values["data"]["source"] in cfg.LABELLED
        values["objective"]["kind"] = "kto" if labelled else "sft"
    if group == "optim":
        values["train"]["steps"] = 100_000  # the published warmups are longer than the default run
    config = cfg.from_dict(values)
    if group in cfg.GROUPS:
        said = leaves(read(path).content, f"{group}.")
        chosen = {n: v for n, v in cfg.flat(config).items() if n in said and said[n] is not None and n != "data.path"}
        assert chosen == {n: v for n, v in said.items() if v is not None and n != "data.path"}


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_preset_says_what_it_is(path: Path):
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("name", ["lingua_debug", "lingua_1b", "lingua_7b"])
def test_lingua_models_have_linguas_size(name: str):
    sizes = {"lingua_debug": 102_777_856, "lingua_1b": 1_284_610_048, "lingua_7b": 6_476_271_616}
    assert cfg.from_dict({"model": composed(model=name).values["model"]}).model.parameters(0) == sizes[name]


def test_the_guessed_model_is_of_about_210_million_parameters():
    model = cfg.from_dict({"model": composed(model="lingua_210m").values["model"]}).model
    assert model.depth < 10 and model.parameters(50_257) == pytest.approx(210e6, rel=0.05)


def test_lingua_recipes_share_lr_times_decay():
    optims = [composed(optim=name).values["optim"] for name in ("lingua_1b", "lingua_7b")]
    assert [round(o["lr"] * o["weight_decay"], 6) for o in optims] == [9.9e-5, 1e-4]
    assert all(o["decay_params"] == "all" for o in optims)


# sweeps/


@functools.cache
def plan_of(name: str, folder: Path = ROOT / "nowhere", *more: str) -> Plan:
    return make_plan([f"sweep={name}", *more], folder)


def test_the_sweeps_that_were_promised_are_there():
    promised = {"quickstart", "depth_lr", "batch_lr", "clip_warmup", "weight_decay", "dataset", "lingua_depth"}
    assert promised | {"lingua_depth_cpu"} <= {p.stem for p in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_asks_one_question_and_plans(path: Path, tmp_path: Path):
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    plan = plan_of(path.stem, tmp_path)
    assert plan.study == path.stem and plan.question.endswith("?") and plan.question.count("?") == 1
    assert plan.question.startswith(lines[1].removeprefix("# ").split("?")[0])
    if path.stem in STARTS:
        assert len(plan.trials) == 1 and plan.compute.keep_checkpoints
    elif plan.planner is not None:
        assert plan.planner.aim and len(plan.planner.seeds) >= 2
    else:
        assert len(plan.trials) >= 16
        assert len(plan.axes) >= 2 or len({t.case for t in plan.trials}) > 2
    assert all("hub_revision" in warning for warning in plan.warnings)
    assert not list(tmp_path.iterdir()), "planning creates nothing"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_the_header_counts_its_trials(path: Path):
    plan = plan_of(path.stem)
    search = plan.planner and plan.planner.search
    number = "About" if plan.planner else f" {len(plan.trials)} trial"  # nobody knows what a search will ask for
    assert (f" {search.trials} cells" if search else number) in path.read_text()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_a_sweep_file_holds_settings_and_one_block(path: Path):
    content = read(path).content
    assert set(content) <= {*cfg.GROUPS, "compute", "defaults", "sweep"} and "sweep" in content


def test_quickstart_reaches_from_tame_to_rough_on_the_embedded_text():
    plan = plan_of("quickstart")
    assert {a.name for a in plan.axes} == {"model.depth", "optim.lr", "optim.clip"}
    assert len({t.config.seed for t in plan.trials}) >= 2
    assert {t.config.data.source for t in plan.trials} == {"pysrc"} and plan.compute.gpus_per_pack == 0
    lr = {t.config.optim.lr for t in plan.trials}
    assert min(lr) <= 3e-3 and max(lr) >= 1e-1, "tame below 1e-2, rough from 1e-1 on, as measured"
    assert None in {t.config.optim.clip for t in plan.trials}


def test_quickstart_warms_up_over_a_share_of_the_steps():
    assert {t.config.warmup_steps for t in plan_of("quickstart").trials} == {20}
    short = plan_of("quickstart", ROOT / "nowhere", "train.steps=5", "train.micro_batch_size=2,4,8", "seeds=1")
    assert {t.config.warmup_steps for t in short.trials} == {1} and "warmup" not in " ".join(short.warnings)


def test_lingua_depth_changes_only_what_it_says():
    plan = plan_of("lingua_depth")
    flats = [cfg.flat(t.config) for t in plan.trials]
    differing = {name for name in flats[0] if len({f[name] for f in flats}) > 1}
    assert differing == {"model.depth", "optim.lr", "seed"}
    depths = plan.axes[0].values
    assert min(depths) < 10 and 10 in depths and max(depths) > 10
    assert all(f["data.path"] == "HuggingFaceFW/fineweb-edu" for f in flats)


def test_dataset_plans_without_a_network_and_reads_the_named_sets():
    paths = {t.config.data.path for t in plan_of("dataset").trials}
    assert {"HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb-edu", "mlfoundations/dclm-baseline-1.0"} <= paths


def test_local_presets_read_the_same_column(tmp_path: Path, shared_data: Path):
    """A real sample of DCLM's rows, through the preset for its local files."""
    plan = plan_of(
        "quickstart", tmp_path, "data=jsonl", f"data.path={shared_data}/c4_demo.jsonl", "seeds=1", "optim.lr=1e-3"
    )
    assert len({t.data_fingerprint for t in plan.trials}) == 1
    with pytest.raises(ConfigError, match=r"data\.text_column|data\.path"):
        plan_of("quickstart", tmp_path, "data=jsonl", f"data.path={shared_data}/c4_demo.jsonl", "data.text_column=body")


# where they lie


def test_a_checkout_uses_its_own_folders():
    assert compose.conf_folder() == ROOT / "conf"
    assert compose.sweep_folders(ROOT) == [ROOT / "sweeps"]
    assert DataConfig().source == "pysrc"

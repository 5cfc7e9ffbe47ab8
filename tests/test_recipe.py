"""What to use: the best stable cell, its margin, and the same recipe read back by the programs it is written for."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import yaml
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from stabstudy import config as cfg
from stabstudy.analysis import recipe
from stabstudy.analysis.study import Study
from stabstudy.planning.plan import make_plan
from stabstudy.training import schedule as lr_schedule

BURSTS = {60: 8.0, 75: 8.0, 90: 8.0, 105: 8.0}


def flat(**groups: dict[str, Any]) -> dict[str, Any]:
    return cfg.flat(cfg.from_dict(groups))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """lr .01 is best and stable, .03 stable and worse, .1 spiky with the lowest loss of all."""
    planted.plant_frame(tmp_path / "s")
    for lr, loss in ((0.01, 2.5), (0.03, 2.6), (0.1, 2.0)):
        for seed in range(3):
            spikes = BURSTS if lr == 0.1 and seed else None
            config = planted.settings(2, lr, seed=seed)
            planted.plant_trial(tmp_path / "s", config, spikes=spikes, final_loss=loss + 0.01 * seed)
    return Study.load(tmp_path / "s")


def test_the_best_stable_cell_and_how_far_trouble_is(study: Study) -> None:
    (found,) = recipe.recipes(study)
    assert found.levels == {"optim.lr": 0.01} and found.stable_cells == 2
    assert (found.trouble, found.trials_at_trouble) == (0.1, (2, 3)) and found.margin == pytest.approx(10)
    assert recipe.sentence(found) == (
        "Use learning rate 0.01: final loss 2.510 ± 0.025 nat/token (3 seeds), the lowest of 2 cells in which every "
        "trial is stable. Margin: at 10 times its learning rate 2 of 3 trials were not stable."
    )


@pytest.mark.parametrize(
    ("below", "said"),
    [
        (0.1, "Margin: no trial was seen to be unstable up to 3 times its learning rate, the most tried."),
        (0.03, "No larger learning rate was tried with it: the margin is not known."),
    ],
)
def test_a_margin_that_no_trial_reached_is_at_least_what_was_tried(study: Study, below: float, said: str) -> None:
    kept = study.trials[study.trials["optim.lr"] < below]
    (found,) = recipe.recipes(study._part(set(kept.index), study.axes))
    assert found.margin is None and recipe.sentence(found).endswith(said)


def test_no_stable_cell_no_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1), spikes=BURSTS)
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.01), status="failed", steps_done=30)
    assert recipe.recipes(Study.load(tmp_path / "s")) == []


def test_losses_on_different_batches_give_no_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.1), eval_hash="a" * 16)
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.01), eval_hash="b" * 16)
    assert recipe.recipes(Study.load(tmp_path / "s")) == []


def test_each_dataset_has_its_own_recipe(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name, better in (("pysrc", 1e-2), ("synthetic", 1e-3)):
        for lr in (1e-3, 1e-2):
            config = planted.settings(lr=lr, data={"source": name})
            planted.plant_trial(
                tmp_path / "s", config, choices={"data": name}, eval_hash=name, fingerprint=name * 2,
                final_loss=2.0 if lr == better else 2.5,
            )  # fmt: skip
    found = recipe.recipes(Study.load(tmp_path / "s"))
    assert [r.levels for r in found] == [
        {"optim.lr": 1e-2, "data": "pysrc"},
        {"optim.lr": 1e-3, "data": "synthetic"},
    ]
    assert all(r.stable_cells == 2 for r in found)


SOME = {
    "model": {"depth": 6, "n_heads": 8, "n_kv_heads": 2, "qk_norm": True},
    "optim": {"lr": 1e-3, "clip": None, "schedule": "wsd", "warmup_steps": 10, "decay_shape": "one_minus_sqrt"},
    "train": {"steps": 110, "batch_size": 32, "micro_batch_size": 8, "precision": "bf16"},
}


def test_the_overrides_give_the_same_trial(tmp_path: Path) -> None:
    words = [
        "model.depth=6",
        "optim.lr=3e-3",
        "optim.clip=null",
        "seeds=1",
    ]  # 3e-3 is the default: an axis all the same
    (trial,) = make_plan(words, tmp_path).trials
    settings = {k: v for k, v in cfg.flat(trial.config).items() if k != "seed"}
    levels = {"model.depth": 6, "optim.lr": 3e-3, "optim.clip": None}
    (again,) = make_plan([*recipe.overrides(levels, settings), "seeds=1"], tmp_path).trials
    assert again.trial_id == trial.trial_id


def test_lingua_keys() -> None:
    text, notes = recipe.lingua(flat(**SOME))
    body = yaml.safe_load(text)
    assert body["steps"] == 110 and body["grad_acc_steps"] == 4 and body["data"]["batch_size"] == 8
    assert body["optim"]["lr"] == 1e-3 and math.isinf(body["optim"]["clip"]) and body["optim"]["warmup"] == 10
    assert body["model"]["n_layers"] == 6 and body["model"]["n_kv_heads"] == 2
    assert "model.qk_norm=true has no key there" in notes and "Lingua decays norms and embeddings too" in notes


def test_trainers_bf16_is_not_that_of_the_stream() -> None:
    of = {p: recipe.hugging_face(flat(train={"precision": p})) for p in ("fp32", "bf16", "bf16_stream", "fp16")}
    assert [yaml.safe_load(text)["bf16"] for text, _ in of.values()] == [False, True, True, False]
    assert [any("autocast" in note for note in notes) for _, notes in of.values()] == [False, False, True, False]


def test_independent_decay_is_given_as_torch_means_it() -> None:
    settings = flat(optim={"lr": 0.01, "weight_decay": 1e-4, "decay_mode": "independent"})
    for text, _ in (recipe.lingua(settings), recipe.hugging_face(settings)):
        body = yaml.safe_load(text)
        assert (body.get("optim") or body)["weight_decay"] == pytest.approx(0.01)


def test_a_rule_for_the_learning_rate_is_applied_for_those_who_lack_it() -> None:
    settings = flat(optim={"lr": 1e-3, "lr_rule": "sqrt_batch", "base_batch": 8}, train={"batch_size": 32})
    assert yaml.safe_load(recipe.lingua(settings)[0])["optim"]["lr"] == pytest.approx(2e-3)
    assert yaml.safe_load(recipe.hugging_face(settings)[0])["learning_rate"] == pytest.approx(2e-3)


def test_a_warmup_said_as_a_share_is_given_in_steps(tmp_path: Path) -> None:
    settings = flat(optim={"lr": 1e-2, "warmup_steps": None, "warmup_share": 0.1}, train={"steps": 60})
    assert yaml.safe_load(recipe.lingua(settings)[0])["optim"]["warmup"] == 6
    assert yaml.safe_load(recipe.hugging_face(settings)[0])["warmup_steps"] == 6
    said = [*recipe.overrides({"model.depth": 2, "optim.lr": 1e-2, "optim.clip": 1.0}, settings), "seeds=1"]
    (trial,) = make_plan(said, tmp_path).trials
    assert trial.config.warmup_steps == 6


@pytest.mark.parametrize("schedule", sorted(recipe.SCHEDULERS))
def test_transformers_accepts_its_keys_and_schedules_alike(schedule: str, tmp_path: Path) -> None:
    optim = {"lr": 1e-3, "warmup_steps": 10, "schedule": schedule, "min_lr_ratio": 0.0}
    config = cfg.from_dict({"optim": optim, "train": {"steps": 110}})
    settings = cfg.flat(config)
    body = yaml.safe_load(recipe.hugging_face(settings)[0])
    assert set(body) <= {f.name for f in dataclasses.fields(TrainingArguments)}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kind, arguments = body["lr_scheduler_type"], body.get("lr_scheduler_kwargs")
    theirs = get_scheduler(kind, optimizer, body["warmup_steps"], body["max_steps"], arguments)
    ours = [lr_schedule.schedule(config.optim, 110)(step) for step in range(110)]
    for step in range(110):  # one step apart at most: their first update has learning rate 0, our last has the floor
        around = ours[max(0, step - 1) : step + 2]
        low, high = (0.0 if step == 0 else min(around)), max(around)
        assert low - 0.01 <= optimizer.param_groups[0]["lr"] <= high + 0.01, (step, around)
        optimizer.step()
        theirs.step()

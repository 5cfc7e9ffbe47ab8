"""Learning rates of exported recipes, step by step: Lingua's by hand, transformers' by its own scheduler, and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim, zeros
from transformers.optimization import get_scheduler

from stabstudy import config as cfg
from stabstudy.analysis.report import recipe_formats
from stabstudy.training import schedule as lr_schedule

Curve = Callable[[int], float]


def lingua_curve(body: dict[str, Any]) -> Curve:
    """Lingua's factor of the peak at a 0-based step, by hand from its published code's behaviour."""
    n, o = body["steps"], body["optim"]
    kind, w, r = o["scheduler"], o["warmup"], o["lr_min_ratio"]

    def factor(step: int) -> float:
        if kind == "constant":
            return 1.0
        if step < w:
            return step / w
        if kind == "inv_sqrt":
            return max((w / step) ** 0.5, r)
        if kind == "wsd":
            decay = int(n * o["decay_fraction"])
            p = (step - (n - decay)) / decay if step > n - decay else 0.0
            return 1 / (p / r + 1 - p) if p else 1.0
        s = (step - w) / (n - w)
        return 1 - s * (1 - r) if kind == "linear" else r + 0.5 * (1 - r) * (math.cos(math.pi * s) + 1)

    return factor


def trainer_curve(body: dict[str, Any]) -> Curve:
    """transformers' own scheduler for the keys."""
    optimizer = optim.SGD([nn.Parameter(zeros(1))], lr=body["learning_rate"])
    arguments = body.get("lr_scheduler_kwargs")
    theirs = get_scheduler(body["lr_scheduler_type"], optimizer, body["warmup_steps"], body["max_steps"], arguments)
    (factor,) = theirs.lr_lambdas
    return factor  # type: ignore[no-any-return]


def off_by_more_than_a_step(theirs: Curve, config: cfg.TrialConfig, steps: range, other: int) -> list[int]:
    """Steps at which theirs lies outside of ours at that step and the one `other` from it (-1 or 1)."""
    ours = lr_schedule.schedule(config.optim, config.train.steps)
    before = 0.0 if config.warmup_steps else ours(0)
    around = {i: (ours(i), ours(i + other) if i + other >= 0 else before) for i in steps}
    return [i for i, pair in around.items() if not min(pair) - 1e-9 <= theirs(i) <= max(pair) + 1e-9]


def wsd_decay(body: dict[str, Any]) -> int:
    """The step in which Lingua's wsd first lies below the peak; the number of steps where there is none."""
    decay = int(body["steps"] * body["optim"].get("decay_fraction", 0.0))
    return body["steps"] - decay + 1 if decay else body["steps"]


@st.composite
def configs(draw: st.DrawFn) -> cfg.TrialConfig:
    steps = draw(st.integers(2, 250))
    kind = draw(st.sampled_from(cfg.SCHEDULES))
    warmup = draw(st.sampled_from([0, 1, steps // 10, steps // 2, steps - 1, steps]))
    o = {"schedule": kind, "warmup_steps": max(1, warmup) if kind == "inv_sqrt" else warmup}
    o["min_lr_ratio"] = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
    if kind == "wsd":
        o["decay_share"] = draw(st.sampled_from([0.01, 0.1, 0.2, 0.5, 1.0]))
        o["decay_shape"] = draw(st.sampled_from(["linear", "cosine", "one_minus_sqrt"]))
    return cfg.from_dict({"optim": o, "train": {"steps": steps}})


def mention(notes: list[str], *names: str) -> bool:
    return any(all(f"{name}=" in note for name in names) for note in notes)


@given(configs())
def test_linguas_rate_is_ours_a_step_later_or_a_note_says_what_else(config: cfg.TrialConfig) -> None:
    text, notes = recipe_formats.lingua(cfg.flat(config))
    body = yaml.safe_load(text)
    n, w = config.train.steps, config.warmup_steps
    ours, theirs = lr_schedule.schedule(config.optim, n), lingua_curve(body)
    theirs(n)  # it is asked for the step after the last, too: nothing may divide by zero
    end = wsd_decay(body)
    assert off_by_more_than_a_step(theirs, config, range(end), -1) == []
    if end < n:  # the shape is its own, which a note says; it begins a step after ours, and falls towards the floor
        assert mention(notes, "optim.decay_shape")
        assert ours(end - 1) < 1 or config.optim.min_lr_ratio == 1
        assert all(body["optim"]["lr_min_ratio"] - 1e-9 <= theirs(i) <= theirs(i - 1) + 1e-9 for i in range(end, n))
    if any(not math.isclose(theirs(i), ours(i)) for i in range(n)):
        assert mention(notes, "optim.warmup_steps") if w else mention(notes, "optim.schedule")


@given(configs())
def test_transformers_rate_is_ours_a_step_apart_or_a_note_says_what_else(
    config: cfg.TrialConfig,
) -> None:
    text, notes = recipe_formats.hugging_face(cfg.flat(config))
    n, w, floor = config.train.steps, config.warmup_steps, config.optim.min_lr_ratio
    ours, theirs = lr_schedule.schedule(config.optim, n), trainer_curve(yaml.safe_load(text))
    theirs(n)
    start, end = 0, n
    if mention(notes, "optim.min_lr_ratio", "optim.warmup_steps"):
        start = w
        assert [theirs(i) for i in range(w)] == pytest.approx([floor + (1 - floor) * i / w for i in range(w)])
    elif mention(notes, "optim.min_lr_ratio"):
        end = next(i for i in range(n) if i >= w and ours(i) == floor)
        assert all(theirs(i) <= floor + 1e-9 for i in range(end + 1, n))
    other = 1 if yaml.safe_load(text)["lr_scheduler_type"] == "cosine_warmup_with_min_lr" else -1
    assert off_by_more_than_a_step(theirs, config, range(start, end), other) == []
    if other == 1:
        assert [theirs(i) for i in range(w)] == pytest.approx([ours(i) for i in range(w)])
    if any(not math.isclose(theirs(i), ours(i)) for i in range(w)):
        assert mention(notes, "optim.warmup_steps")
    if any(not math.isclose(theirs(i), ours(i)) for i in range(w, n)):
        assert mention(notes, "optim.schedule")


@pytest.mark.parametrize(
    ("optimizer", "changed"),
    [
        ({"schedule": "constant"}, {"scheduler": "constant"}),
        ({"schedule": "wsd", "decay_share": 0.2}, {"decay_fraction": 0.1}),
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, {"lr_min_ratio": 0.1}),
        ({"schedule": "linear"}, {"warmup": 23}),
    ],
)
def test_the_comparison_sees_what_lingua_does_by_default(optimizer: dict[str, Any], changed: dict[str, Any]) -> None:
    config = cfg.from_dict({"optim": optimizer})
    body = yaml.safe_load(recipe_formats.lingua(cfg.flat(config))[0])
    assert off_by_more_than_a_step(lingua_curve(body), config, range(wsd_decay(body)), -1) == []
    body["optim"] |= changed
    assert off_by_more_than_a_step(lingua_curve(body), config, range(wsd_decay(body)), -1) != []

"""Packs on a CUDA device: captured steps are the eager ones, deterministic, and nothing waits inside a ring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trials import BASE, Make, assert_same, records, vary

from stabstudy import store
from stabstudy.config import TrialConfig
from stabstudy.stability.rules import Rules
from stabstudy.state import State
from stabstudy.training.driver import Replay
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Train = Callable[..., list[State]]
LONG = vary(train={"steps": 70, "probe_every": 10, "eval_every": 25, "checkpoint_every": 30})


@pytest.fixture
def train(cache: Path) -> Train:
    def run(folders: Sequence[store.TrialFolder], heartbeat: Any = lambda members: False, **engine: Any) -> Any:
        return run_pack(folders, Engine(cache, **({"device": "cuda"} | engine)), Rules(), heartbeat)

    return run


def members(config: TrialConfig, count: int = 4) -> list[TrialConfig]:
    return [
        dataclasses.replace(config, seed=k, optim=dataclasses.replace(config.optim, lr=1e-3 * (1 + k % 3), clip=clip))
        for k, clip in zip(range(count), [0.5, None, 1.0, 1e-2] * count, strict=False)
    ]


VARIANTS = {
    "fp32": LONG,
    "bf16": vary(train={"steps": 70, "precision": "bf16", "micro_batch_size": 2}),
    "fp16": vary(train={"steps": 70, "precision": "fp16"}),
    "bf16_stream": vary(train={"steps": 70, "precision": "bf16_stream"}),
    "muon": vary(train={"steps": 70}, optim={"kind": "muon"}),
    "lion": vary(train={"steps": 70}, optim={"kind": "lion"}),
    "stable_adamw": vary(train={"steps": 70}, optim={"kind": "stable_adamw"}),
    "skips": vary(train={"steps": 70, "skip_spikes": True}),
    "z-loss, capped": vary(train={"steps": 70, "z_loss": 1e-3}, model={"logit_softcap": 9.0, "qk_norm": True}),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_captured_steps_are_the_eager_ones(config: TrialConfig, count: int, make: Make, train: Train) -> None:
    configs = [c if config.optim.clip_kind == "norm" else config for c in members(config, count)]
    eager, captured = ([make(c, name) for c in configs] for name in ("eager", "captured"))
    assert {s.status for s in train(eager, captured=False, ring=1)} == {"done"}
    assert {s.status for s in train(captured)} == {"done"}
    assert all("not captured" not in f.log_file.read_text() for f in captured)
    for a, b in zip(eager, captured, strict=True):
        for x, y in zip(records(a), records(b), strict=True):
            assert_same(x, y)
        assert a.read_state().final_loss == b.read_state().final_loss


def test_the_same_pack_twice_and_resumed_is_bitwise_equal(make: Make, train: Train) -> None:
    configs = members(LONG)
    first, again, broken = ([make(c, name) for c in configs] for name in ("first", "again", "broken"))
    train(first), train(again)
    train(broken, lambda m: m[0].step >= 30, checkpoint_seconds=0.0)
    train(broken)
    for a, b, c in zip(first, again, broken, strict=True):
        for x, y, z in zip(records(a), records(b), records(c), strict=True):
            assert_same(x, y), assert_same(x, z)


def test_a_member_is_trained_as_on_a_cpu(make: Make, train: Train) -> None:
    configs = members(vary(train={"steps": 20}))
    on_cpu, on_gpu = ([make(c, name) for c in configs] for name in ("cpu", "gpu"))
    for folder in on_cpu:
        train([folder], device="cpu")
    train(on_gpu)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        x, y = records(a)[0], records(b)[0]
        assert len(x) == len(y) and np.allclose(x["loss"], y["loss"], rtol=1e-4)
        assert np.allclose(x["grad_norm"], y["grad_norm"], rtol=1e-3)


def test_compiled_members_agree_with_eager_ones(make: Make, train: Train) -> None:
    plain = [make(c, "plain") for c in members(BASE)]
    compiled = [make(c, "compiled") for c in members(vary(train={"compile": "on"}))]
    train(plain)
    assert all(s.attempts[-1].engine["compiled"] and s.attempts[-1].engine["graph"] for s in train(compiled))
    for a, b in zip(plain, compiled, strict=True):
        assert np.allclose(records(a)[0]["loss"], records(b)[0]["loss"], rtol=1e-4)


def test_nothing_waits_inside_a_ring(make: Make, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Replay.__call__

    def strict(self: Replay) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Replay, "__call__", strict)
    assert {s.status for s in train([make(c) for c in members(LONG)])} == {"done"}

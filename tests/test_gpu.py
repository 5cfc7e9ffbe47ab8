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
from stabstudy.architecture import OF_FAMILY
from stabstudy.config import DataConfig, ObjectiveConfig, TrialConfig
from stabstudy.stability.rules import Rules
from stabstudy.state import State
from stabstudy.training import driver
from stabstudy.training.driver import Replay
from stabstudy.training.loop import Loop
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
    def run(folders: Sequence[store.TrialFolder], heartbeat: Any = lambda members: False, **engine: Any) -> list[State]:
        return run_pack(folders, Engine(cache, **({"device": "cuda"} | engine)), Rules(), heartbeat)

    return run


def done(train: Train, folders: Sequence[store.TrialFolder], **engine: Any) -> None:
    statuses = [state.status for state in train(folders, **engine)]
    assert statuses == ["done"] * len(folders), folders[0].log_file.read_text()[-2000:]


def same(one: Sequence[store.TrialFolder], other: Sequence[store.TrialFolder]) -> None:
    for a, b in zip(one, other, strict=True):
        for x, y in zip(records(a), records(b), strict=True):
            assert_same(x, y)


def members(config: TrialConfig, count: int = 4) -> list[TrialConfig]:
    return [
        dataclasses.replace(config, seed=k, optim=dataclasses.replace(config.optim, lr=1e-3 * (1 + k % 3), clip=clip))
        for k, clip in zip(range(count), [0.5, None, 1.0, 1e-2] * count, strict=False)
    ]


def examples(kind: str, source: str) -> TrialConfig:
    data = DataConfig(source=source, max_bytes=20_000, seq_len=32, layout="padded")
    made = vary(train={"steps": 70, "batch_size": 8, "micro_batch_size": 4})
    return dataclasses.replace(made, data=data, objective=ObjectiveConfig(kind))


VARIANTS = {
    "fp32": LONG,
    "bf16": vary(train={"steps": 70, "precision": "bf16", "micro_batch_size": 2}),
    "fp16": vary(train={"steps": 70, "precision": "fp16"}),
    "bf16_stream": vary(train={"steps": 70, "precision": "bf16_stream"}),
    "muon": vary(train={"steps": 70}, optim={"kind": "muon"}),
    "lion": vary(train={"steps": 70}, optim={"kind": "lion"}),
    "stable_adamw": vary(train={"steps": 70}, optim={"kind": "stable_adamw"}),
    "skips": vary(train={"steps": 70, "skip_spikes": True}),
    "zclip": vary(train={"steps": 70}, optim={"clip_kind": "zclip"}),
    "adagc": vary(train={"steps": 70}, optim={"clip_kind": "adagc"}),
    "agc": vary(train={"steps": 70}, optim={"clip_kind": "agc"}),
    "grouped": vary(train={"steps": 70}, model={"n_kv_heads": 1, "tied": True}),
    "odd heads": vary(train={"steps": 70}, model={"dim": 12}),
    **{name: vary(train={"steps": 70}, model={"family": name, **fixed}) for name, fixed in OF_FAMILY.items()},
    "qwen3 bf16": vary(train={"steps": 70, "precision": "bf16"}, model={"family": "qwen3", **OF_FAMILY["qwen3"]}),
    "sft": examples("sft", "arithmetic"),
    "kto": examples("kto", "arithmetic_graded"),
    "z-loss, capped": vary(train={"steps": 70, "z_loss": 1e-3}, model={"logit_softcap": 9.0, "qk_norm": True}),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_captured_steps_are_the_eager_ones(config: TrialConfig, count: int, make: Make, train: Train) -> None:
    kept = config.optim.clip_kind != "norm"  # else no clip would be another rule
    configs = [dataclasses.replace(config, seed=c.seed) if kept else c for c in members(config, count)]
    if config.objective.kind == "kto":  # whose members begin as one reference
        configs = [dataclasses.replace(c, seed=0) for c in configs]
    eager, captured = ([make(c, name) for c in configs] for name in ("eager", "captured"))
    done(train, eager, captured=False, ring=1)
    done(train, captured)
    assert "not captured" not in captured[0].log_file.read_text(), captured[0].log_file.read_text()
    for a, b in zip(eager, captured, strict=True):
        same([a], [b])
        assert a.read_state().final_loss == b.read_state().final_loss


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_long_sequences_twice_are_bitwise_equal(precision: str, count: int, make: Make, train: Train) -> None:
    """Where attention splits its keys, or adds up gradients in any order, unless it is told not to."""
    config = vary(train={"steps": 30, "precision": precision, "eval_sequences": 2}, model={"dim": 64})
    configs = members(dataclasses.replace(config, data=dataclasses.replace(BASE.data, seq_len=512)), count)
    first, again = ([make(c, name) for c in configs] for name in ("first", "again"))
    done(train, first)
    done(train, again)
    same(first, again)


def test_windows_from_the_host_are_the_resident_ones(make: Make, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, host = ([make(c, name) for c in members(LONG)] for name in ("resident", "host"))
    done(train, resident)
    monkeypatch.setattr(driver, "RESIDENT_BYTES", 0.0)
    done(train, host)
    same(resident, host)


def test_half_a_pack_goes_on_without_those_that_ended(
    make: Make, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [dataclasses.replace(c, train=dataclasses.replace(c.train, steps=steps)) for c, steps in
               zip(members(BASE), (40, 80, 40, 80), strict=True)]  # fmt: skip
    whole, shrunk = ([make(c, name) for c in configs] for name in ("whole", "shrunk"))
    done(train, whole)
    monkeypatch.setattr(Loop, "_few", lambda self: 0 < 2 * len(self.live) <= len(self.plan.places))
    done(train, shrunk)
    for a, b in zip(whole, shrunk, strict=True):
        assert np.allclose(records(a)[0]["loss"], records(b)[0]["loss"], rtol=1e-4)


def test_a_pack_that_does_not_fit_is_halved(make: Make, train: Train) -> None:
    """On a card that is nearly full: where memory ends, by itself, in whatever the pack does just then."""
    large = vary(train={"steps": 40, "batch_size": 16}, model={"dim": 64, "depth": 4})
    configs = members(dataclasses.replace(large, data=dataclasses.replace(BASE.data, seq_len=128)), 16)
    whole, halved = ([make(c, name) for c in configs] for name in ("whole", "halved"))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    done(train, whole)
    needed = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    room = torch.cuda.mem_get_info()[0] - int(0.75 * needed)
    full = torch.empty(room, dtype=torch.uint8, device="cuda")
    done(train, halved)
    del full
    assert "a pack of 16 did not fit into memory: going on with 8" in halved[0].log_file.read_text()
    assert "not captured" not in halved[0].log_file.read_text()
    for a, b in zip(whole, halved, strict=True):
        assert np.allclose(records(a)[0]["loss"], records(b)[0]["loss"], rtol=1e-4)


def test_the_same_pack_twice_and_resumed_is_bitwise_equal(make: Make, train: Train) -> None:
    configs = members(LONG)
    first, again, broken = ([make(c, name) for c in configs] for name in ("first", "again", "broken"))
    done(train, first)
    done(train, again)
    train(broken, lambda m: m[0].step >= 30, checkpoint_seconds=0.0)
    assert {f.read_state().step for f in broken} == {30}
    done(train, broken)
    same(first, again)
    same(first, broken)


def test_a_member_is_trained_as_on_a_cpu(make: Make, train: Train) -> None:
    configs = members(vary(train={"steps": 20}))
    on_cpu, on_gpu = ([make(c, name) for c in configs] for name in ("cpu", "gpu"))
    for folder in on_cpu:
        done(train, [folder], device="cpu")
    done(train, on_gpu)
    for a, b in zip(on_cpu, on_gpu, strict=True):
        x, y = records(a)[0], records(b)[0]
        assert len(x) == len(y) and np.allclose(x["loss"], y["loss"], rtol=1e-4)
        assert np.allclose(x["grad_norm"], y["grad_norm"], rtol=1e-3)


def test_compiled_members_agree_with_eager_ones(make: Make, train: Train) -> None:
    plain = [make(c, "plain") for c in members(BASE)]
    compiled = [make(c, "compiled") for c in members(vary(train={"compile": "on"}))]
    done(train, plain)
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
    done(train, [make(c) for c in members(LONG)])

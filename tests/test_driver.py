"""What a captured step needs: no value from or for the host, sums for attention's gradient, windows made ready."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap
from trials import vary

from stabstudy.config import OF_FAMILY, TrialConfig
from stabstudy.data.batches import Batches
from stabstudy.data.tokens import Corpus
from stabstudy.training import families
from stabstudy.training.driver import Captured, Due, HostFeed, ResidentFeed
from stabstudy.training.model import causal_attention
from stabstudy.training.step import Stepper

META = torch.device("meta")
VOCABULARY, SEQUENCES = 50, 6

VARIANTS = {
    "fp32, adamw": vary(),
    "bf16, accumulated": vary(train={"precision": "bf16", "micro_batch_size": 2}),
    "fp16, adagc": vary(train={"precision": "fp16"}, optim={"clip_kind": "adagc"}),
    "bf16_stream, muon": vary(train={"precision": "bf16_stream"}, optim={"kind": "muon"}),
    "lion, agc": vary(optim={"kind": "lion", "clip_kind": "agc"}),
    "stable_adamw, zclip, skips": vary(
        train={"skip_spikes": True, "steps": 100, "z_loss": 1e-3}, optim={"kind": "stable_adamw", "clip_kind": "zclip"}
    ),
    "capped": vary(model={"attn_softcap": 5.0, "logit_softcap": 9.0, "qk_norm": True, "tied": True}),
    "qwen3": vary(model={"family": "qwen3", **OF_FAMILY["qwen3"]}),
}


class NoFeed:
    """Windows that have a shape and no values."""

    def __init__(self, members: int, config: TrialConfig):
        self.shape = members, config.train.batch_size, config.data.seq_len + 1

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        return torch.zeros(self.shape, dtype=torch.int64, device=META), False

    def fill(self, tick: int, count: int) -> None:
        pass

    def prepare(self, tick: int, count: int) -> None:
        pass

    def at(self, slot: Tensor) -> Tensor:
        return self.windows(0)[0]


def captured(config: TrialConfig, members: int) -> Captured:
    configs = [dataclasses.replace(config, seed=k) for k in range(members)]
    seq_len = config.data.seq_len
    stepper = Stepper(configs, (families.build(c.model, VOCABULARY, seq_len, c.seed) for c in configs), META)
    stepper.stack.device = torch.device("cpu")  # of which autocast alone makes use: it knows no tensors without values
    evaluation = torch.zeros(members, SEQUENCES, seq_len + 1, dtype=torch.int64, device=META)
    return Captured(stepper, NoFeed(members, config), evaluation, 5)


@pytest.fixture(autouse=True)
def _without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernel has no form for them."""
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *arguments, **named: None)


def refuse(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("a tensor was made from numbers of the host")


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_step_and_its_probes_run_without_a_value(
    config: TrialConfig, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = captured(config, members)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    for replay in driver._replays.values():
        replay()


@pytest.mark.parametrize(
    "reading", [lambda norm: norm.sum().item(), lambda norm: bool(norm.sum() > 1), lambda n: n.cpu()]
)
def test_a_step_that_reads_a_value_is_seen(reading: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    update = Stepper._update

    def peeking(self: Stepper, norm: Tensor, *rest: Any) -> None:
        reading(norm)
        update(self, norm, *rest)

    monkeypatch.setattr(Stepper, "_update", peeking)
    driver = captured(vary(), 2)
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        driver._replays[Due.NOTHING]()


def test_a_step_that_takes_numbers_from_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    driver, update = captured(vary(), 2), Stepper._update
    monkeypatch.setattr(
        Stepper, "_update", lambda self, *rest: (torch.tensor([1.0, 2.0], device=META), update(self, *rest))
    )
    monkeypatch.setattr(torch, "tensor", refuse)
    with pytest.raises(AssertionError, match="numbers of the host"):
        driver._replays[Due.NOTHING]()


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_under_vmap_keeps_the_sums_of_its_gradient(groups: int) -> None:
    """Else the gradient of every fp32 pack fails on CUDA: no member's tensor says by itself that it needs one."""
    queries, keys = (torch.zeros(3, 2, heads, 8, 4, device=META, requires_grad=True) for heads in (2, 2 // groups))
    nodes: list[Any] = [vmap(causal_attention)(queries, keys, keys).grad_fn]
    while nodes and not hasattr(nodes[0], "_saved_log_sumexp"):
        nodes = nodes[1:] + [node for node, _ in nodes[0].next_functions if node is not None]
    assert nodes[0]._saved_log_sumexp.shape[:2] == (3 * 2, 2) and nodes[0]._saved_log_sumexp.shape[2] >= 8


@pytest.mark.parametrize("kind", [HostFeed, ResidentFeed])
@pytest.mark.parametrize("ready", [(4, 4), (4, 2), (2, 4)], ids=str)
def test_what_was_made_ready_is_what_is_read(kind: Any, ready: tuple[int, int]) -> None:
    """Also where another stretch comes next than was expected: a ring that is cut, or run again."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2001, np.uint32)
    corpus = Corpus(tokens, np.array([2001], np.uint64), VOCABULARY, "random", Path())
    batches = [Batches(corpus, 8, 2, seed, 0.1, 4, 4) for seed in range(3)]
    feed, plain = (kind(batches, [0, 1, 5], [20, 20, 10], torch.device("cpu")) for _ in range(2))
    feed.fill(0, 4)
    feed.prepare(*ready)
    feed.fill(4, 4)
    for i in range(4):
        assert torch.equal(feed.at(torch.tensor([i])), plain.windows(4 + i)[0])

"""KTO's "exploding logits" (LLaMA-Factory issue 7380): what such a number is, and what an ingested log is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import series
import torch
from torch import Tensor
from trials import BASE

from stabstudy import ingest
from stabstudy.analysis.report import runs_page
from stabstudy.analysis.study import Study
from stabstudy.stability import statistics
from stabstudy.stability.rules import Rules
from stabstudy.training import kto
from stabstudy.training.families import build
from stabstudy.training.kto import Kl, Rows, Weighting
from stabstudy.training.objective import IGNORE

V, T = 8192, 256


def llama_factorys_metric(logits_BTV: Tensor) -> float:
    """`logits/chosen` as it is logged: the sum over sequences, positions and vocabulary by the sequences."""
    return float(logits_BTV.nansum() / len(logits_BTV))


def healthy() -> tuple[Any, Tensor, list[float]]:
    """A tiny model that learned a skewed language, its tokens, and its losses."""
    torch.manual_seed(0)
    net = build(BASE.model, V, T, 0)
    probabilities = 1 / torch.arange(1, V + 1, dtype=torch.float64) ** 1.5
    tokens = torch.multinomial(probabilities, 2 * (T + 1), replacement=True).reshape(2, T + 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return net, tokens, losses


def record(logits_BTV: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    targets = tokens[:, 1:].clone()
    targets[:, : T // 2] = IGNORE
    rows = Rows(tokens[:, :-1], targets, torch.tensor([kto.CHOSEN, kto.CHOSEN]), torch.zeros(2, dtype=torch.bool))
    none = torch.zeros(())
    return kto.means(kto.sums(logits_BTV, rows, torch.zeros(2), Kl(none, none, none), Weighting()))


def warned(largest: float) -> int | None:
    """The first step at which a trial with this largest logit is warned of."""
    trace = series.trace_rows(series.ones(5), series.ones(5), logit_absmax=[largest] * 5)
    step = statistics.warnings(trace, None, Rules())["warn_logit"]
    assert step is None or isinstance(step, int)
    return step


def test_1e8_logits_are_a_sum_over_the_tensor() -> None:
    net, tokens, losses = healthy()
    assert losses[-1] < losses[0] - 2
    with torch.no_grad():
        logits = net(tokens[:, :-1])
        grown = 40 * (logits - logits.mean(-1, keepdim=True))
    alarming, calm = llama_factorys_metric(logits), record(logits, tokens)
    assert 1e5 < abs(alarming) < 1e8
    assert float(calm["logit_absmax_chosen"]) < 50 and warned(float(calm["logit_absmax_chosen"])) is None
    assert abs(alarming) / (V * T) == pytest.approx(abs(float(logits.mean())), rel=1e-4)
    # logits that did explode: the sum is smaller, so no threshold on it tells them from healthy ones
    assert abs(llama_factorys_metric(grown)) < abs(alarming) / 100
    true = record(grown, tokens)
    assert float(true["logit_absmax_chosen"]) > 100 and warned(float(true["logit_absmax_chosen"])) == 0
    assert float(true["logz_mean_chosen"]) > 5 * abs(float(calm["logz_mean_chosen"]))
    assert float(true["logit_sd_chosen"]) == pytest.approx(40 * float(calm["logit_sd_chosen"]), rel=1e-4)

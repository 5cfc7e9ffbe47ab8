"""KTO's "exploding logits" (LLaMA-Factory issue 7380): what such a number is, and what is said of it in a log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import logs
import pytest
import series
import torch
from torch import Tensor
from trials import BASE

from stabstudy import ingest
from stabstudy.analysis.report import ingested_page
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


LINE = {
    "loss": 0.5806,
    "grad_norm": 0.16,
    "learning_rate": 4.2203e-08,
    "logps/chosen": -1.796,
    "logits/chosen": -202528030.0,
    "kl": 11.29,
}
"""What the thread shows of its log."""


def ingested(tmp_path: Path, rows: list[dict[str, float]], name: str = "trainer_state.json") -> Study:
    if name.endswith(".csv"):
        text = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])
        (source := tmp_path / name).write_text(text)
    else:
        source = logs.trainer_state(tmp_path / "run", rows)
    assert ingest.main([str(source), "--study", "s", "--results-dir", str(tmp_path / "results")]) == 0
    return Study.load(tmp_path / "results" / "s")


def notes(study: Study) -> list[str]:
    (trial_id,) = study.trials.index
    log = study.log(trial_id)
    assert log is not None
    return list(log.notes)


@pytest.mark.parametrize("name", ["trainer_state.json", "log.csv"])
def test_the_line_of_the_thread_is_answered_in_words(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step": 10 * (i + 1), **LINE, "grad_norm": 0.16 - 0.001 * i} for i in range(20)]
    study = ingested(tmp_path, rows, name)
    logits, kl = (note for note in notes(study) if "sum over" in note)
    assert logits.startswith("logits/chosen of this size (-202,528,030) is a sum over the tensor")
    assert "vocabulary 152,064 and 1,024 positions" in logits and "about -1.3." in logits
    assert kl.startswith("kl (up to 11.29) is in LLaMA-Factory's logs the sum over the micro-batches")
    printed = capsys.readouterr().out
    assert logits in printed and kl in printed
    page = str(list(ingested_page.read(study)))
    assert logits in page and kl in page  # not shortened
    assert study.trials["grad_norm_max"].tolist() == [0.16] and study.trials["warn_logit"].isna().all()


def test_means_of_logits_are_left_alone(tmp_path: Path) -> None:
    """trl's, or ours: no sum, and so nothing is said of a KL either; nor of a column under another name."""
    others = {"logits/chosen": -1.3, "logits/rejected": 40.0, "eval_logits/chosen": -2e8, "kl": 11.29}
    study = ingested(tmp_path, [{"step": i + 1, **LINE, **others} for i in range(20)])
    assert not [note for note in notes(study) if "sum over" in note]


def test_the_largest_finite_value_counts(tmp_path: Path) -> None:
    rows = [{"step": i + 1, **LINE, "logits/chosen": v} for i, v in enumerate([1.0, -5e6, float("nan"), 3e5] * 5)]
    (logits, _) = (note for note in notes(ingested(tmp_path, rows)) if "sum over" in note)
    assert "(-5,000,000)" in logits

"""`objective=kto` from micro-batches to verdicts: a step, packs, resumed trials, their records, their judgements."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from series import lognormal
from test_kto import LABELS, WEIGHTING, Pair, T, V, distance, examples, micro_batch, moved, toward_pairs, trainer_of
from test_kto import gradients as gradients_of
from torch import Tensor
from trials import BASE, Make, assert_same, records, vary

from stabstudy import config as cfg
from stabstudy.config import DataConfig, ObjectiveConfig, TrialConfig
from stabstudy.data.layouts import IGNORE, flag, hidden
from stabstudy.planning import estimate
from stabstudy.settings import ConfigError
from stabstudy.shape import shape
from stabstudy.stability.divergence import highest_mean
from stabstudy.stability.explain import Recipe, explain
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Summary, TrialFacts, summarise
from stabstudy.store import TrialFolder
from stabstudy.trace import KTO as KTO_COLUMNS
from stabstudy.trace import PROBES, TRACE, TRACE_KTO, Rows, from_dicts
from stabstudy.training import kto, probes
from stabstudy.training.driver import HostFeed
from stabstudy.training.families import build
from stabstudy.training.kto import CHOSEN, REJECTED, Kl
from stabstudy.training.loop import Progress
from stabstudy.training.objective import MINIMISED
from stabstudy.training.pack import run_pack
from stabstudy.training.step import Stepper
from stabstudy.training.trial import Engine

CPU = torch.device("cpu")
KTO = ObjectiveConfig("kto", **WEIGHTING._asdict())
RULES = Rules()
Measured = tuple[dict[str, float], dict[str, Tensor]]


def windows_of(pairs: Sequence[Pair], labels: Sequence[int]) -> NDArray[np.int64]:
    """[n, T+2]: prompts that are read, completions that are targets, and the flags."""
    rows = np.full((len(pairs), T + 2), IGNORE, np.int64)
    for row, (prompt, completion), label in zip(rows, pairs, labels, strict=True):
        numbers = [*hidden(np.array(prompt)), *completion]
        row[: min(T + 1, len(numbers))] = numbers[: T + 1]
        row[T + 1] = flag(np.array(label), np.array(len(numbers) > T + 1))
    return rows


def config(micro: int = 5, batch: int = 5, **model: Any) -> TrialConfig:
    made = vary(train={"batch_size": batch, "micro_batch_size": micro}, model=model)
    return dataclasses.replace(made, objective=KTO)


def stepper_of(made: TrialConfig, seed: int = 5) -> tuple[Stepper, Any, Any]:
    """A stepper whose weights have moved away from the reference; that policy and the reference."""
    reference = build(made.model, V, T, 0)
    policy = moved(reference, seed)
    stepper = Stepper([made], [copy.deepcopy(reference)], CPU)
    load(stepper, policy)
    return stepper, policy, reference


def load(stepper: Stepper, policy: Any) -> None:
    """As a checkpoint is."""
    weights = dict(policy.named_parameters())
    for name, tensor in zip(stepper.stack.names, stepper.stack.tensors, strict=True):
        tensor[0].copy_(weights[name].detach())


def step(
    stepper: Stepper, windows: NDArray[np.int64], noise: bool = False
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scalars of a step that moves nothing, and its gradients."""
    stack = torch.from_numpy(windows)[None]
    scalars = stepper.accumulate(stack, stepper.objective.divisor(stack).float(), True, noise)
    grads = {name: g[0].clone() for name, g in zip(stepper.stack.names, stepper.grads, strict=True)}
    return {name: x[0].item() for name, x in scalars.items()}, grads


# --- a step


def test_a_step_has_the_loss_and_gradients_of_the_terms() -> None:
    pairs = examples(1, 5)
    stepper, policy, reference = stepper_of(config())
    scalars, grads = step(stepper, windows_of(pairs, LABELS))
    terms = kto.terms(policy, reference, micro_batch(pairs, LABELS), WEIGHTING)
    means = kto.means(terms)
    assert {name: scalars[name] for name in means} == pytest.approx({n: x.item() for n, x in means.items()}, rel=1e-5)
    assert distance(grads, gradients_of(terms[MINIMISED] / terms["sequences"], policy)) < 1e-5
    both = means["logit_absmax_chosen"], means["logit_absmax_rejected"]
    assert scalars["logit_absmax"] == max(both).item() and min(both) < max(both)
    targets = terms["targets_chosen"] + terms["targets_rejected"]
    mean = (terms["logz_mean_chosen"] + terms["logz_mean_rejected"]) / targets
    assert scalars["logz_mean"] == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_step_has_trls_loss_and_gradients(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16")
    from transformers import LlamaConfig, LlamaForCausalLM

    made = config(family="llama")
    size = {"hidden_size": made.model.dim, "intermediate_size": made.model.ffn_dim, "num_hidden_layers": 2}
    size |= {"num_attention_heads": made.model.n_heads, "num_key_value_heads": made.model.kv_heads}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=V, rms_norm_eps=made.model.norm_eps, **size))
    reference = build(made.model, V, T, 0)
    names = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    theirs.load_state_dict({names.get(n, f"model.{n}"): p.detach() for n, p in reference.named_parameters()})
    trainer, pairs = trainer_of(theirs, tmp_path)
    policy = toward_pairs(reference, lambda net: net, micro_batch(pairs, LABELS), positive=True)
    weights = {names.get(n, f"model.{n}"): p.detach() for n, p in policy.named_parameters()}
    trainer.model.load_state_dict(weights)
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    expected = gradients_of(loss, trainer.model)
    stepper = Stepper([made], [reference], CPU)
    load(stepper, policy)
    scalars, grads = step(stepper, windows_of(pairs, LABELS))
    assert scalars["kl"] > 0.1 and scalars["loss"] == pytest.approx(loss.item(), abs=1e-6, rel=0)
    assert distance({names.get(n, f"model.{n}"): g for n, g in grads.items()}, expected) < 1e-5


def pin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kto, "kl_estimate", lambda *given: Kl(torch.tensor(0.2), torch.tensor(0.0), torch.tensor(0.0)))


@pytest.mark.parametrize("micro", [3, 2])
def test_accumulation_is_exact_with_z0_pinned_and_not_otherwise(micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences per micro-batch are unequal too: one has no completion."""
    pairs, labels = examples(2, 6), [CHOSEN, REJECTED, CHOSEN, REJECTED, REJECTED, REJECTED]
    windows = windows_of([(pairs[0][0], []), *pairs[1:]], labels)

    def measured(size: int) -> Measured:
        return step(stepper_of(config(size, 6))[0], windows)

    (free, _), (free_split, _) = measured(6), measured(micro)
    assert abs(free["kl"] - free_split["kl"]) > 1e-3 and abs(free["loss"] / free_split["loss"] - 1) > 1e-4
    pin(monkeypatch)
    (whole, grads), (split, split_grads) = measured(6), measured(micro)
    for name in set(whole) - {"pairs", "kl_raw"}:
        assert split[name] == pytest.approx(whole[name], rel=1e-5), name
    assert distance(split_grads, grads) < 1e-5


def test_noise_counts_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """G2 and S by their formula, from each micro-batch's own mean gradient."""
    pin(monkeypatch)
    pairs, labels = examples(3, 6), [CHOSEN, REJECTED] * 3
    windows = windows_of([*pairs[:4], (pairs[4][0], []), pairs[5]], labels)
    stepper, *_ = stepper_of(config(3, 6))
    step(stepper, windows, noise=True)
    parts = [step(stepper_of(config(3, 3))[0], part)[1] for part in np.split(windows, 2)]
    n = np.array([3.0, 2.0])
    squares = np.array([sum(float(g.double().square().sum()) for g in part.values()) for part in parts])
    mean = {name: (3 * parts[0][name] + 2 * parts[1][name]).double() / 5 for name in parts[0]}
    small, big = float((n / 5 * squares).sum()), sum(float(g.square().sum()) for g in mean.values())
    g2, s = (5 * big - 2.5 * small) / 2.5, (small - big) / (1 / 2.5 - 1 / 5)
    assert stepper.noise is not None
    assert stepper.noise[0].tolist() == pytest.approx([g2, s], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_stream", "fp16"])
@pytest.mark.parametrize("model", [{}, {"tied": True}, {"family": "llama"}], ids=["lingua", "tied", "llama"])
def test_the_reference_is_the_policy_before_the_first_step(precision: str, model: dict[str, Any]) -> None:
    """In every number format, so no reward is a difference between two roundings."""
    made = config(**model)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, precision=precision))
    stepper = Stepper([made], [build(made.model, V, T, 0)], CPU)
    windows = windows_of(examples(4, 5), LABELS)
    first, _ = step(stepper, windows)
    assert first["reward_chosen"] == first["reward_rejected"] == first["kl_raw"] == 0
    with torch.no_grad():
        stepper.stack.tensors[0].add_(1.0)
    assert abs(step(stepper, windows)[0]["reward_chosen"]) > 1e-3


def test_members_that_begin_elsewhere_have_no_reference_in_common() -> None:
    with pytest.raises(ValueError, match="begin with the same weights"):
        Stepper([config(), config()], [build(BASE.model, V, T, seed) for seed in (0, 1)], CPU)


def test_validation_is_the_mean_over_sequences_in_micro_batches() -> None:
    pairs, labels = examples(6, 5), LABELS
    stepper, policy, reference = stepper_of(config(2, 2))
    loss = stepper.loss_on(torch.from_numpy(windows_of([*pairs[:4], (pairs[4][0], [])], labels))[None]).item()
    parts = [kto.terms(policy, reference, micro_batch(pairs[i : i + 2], labels[i : i + 2]), WEIGHTING) for i in (0, 2)]
    assert loss == pytest.approx(sum(p["loss"].item() for p in parts) / 4, rel=1e-6)


# --- whole trials

GRADED = DataConfig(source="arithmetic_graded", max_bytes=20_000, seq_len=32, layout="padded")
TRIAL = dataclasses.replace(
    vary(train={"steps": 12, "batch_size": 8, "micro_batch_size": 4, "final_eval_tokens": 256}),
    objective=ObjectiveConfig("kto"),
    data=GRADED,
)


def run(folders: Sequence[TrialFolder], cache: Path, heartbeat: Any = None, **engine: Any) -> list[str]:
    states = run_pack(folders, Engine(cache, **engine), RULES, heartbeat or (lambda members: False))
    return [state.status for state in states]


def rows_of(folder: TrialFolder) -> Rows:
    rows = folder.rows(TRACE_KTO)
    assert rows is not None
    return rows


def test_a_pack_trains_each_member_as_it_would_be_alone(make: Make, cache: Path) -> None:
    """With rates, betas and weights of their own, and on captured steps."""
    given = [(3e-3, KTO), (1e-2, ObjectiveConfig("kto", beta=0.5, desirable=1.3, undesirable=0.7))]
    configs = [
        dataclasses.replace(TRIAL, optim=dataclasses.replace(TRIAL.optim, lr=lr), objective=objective)
        for lr, objective in given
    ]
    assert shape(configs[0]) == shape(configs[1]) != shape(dataclasses.replace(TRIAL, objective=ObjectiveConfig("sft")))
    alone, together = ([make(c, name) for c in configs] for name in ("alone", "together"))
    assert [run([folder], cache) for folder in alone] == [["done"]] * 2
    assert run(together, cache, captured=True, ring=4) == ["done"] * 2
    for one, other in zip(alone, together, strict=True):
        a, b = rows_of(one), rows_of(other)
        for name in ("loss", "grad_norm", "logp_chosen", "logit_sd_rejected", "targets_chosen", "clipped", "tokens"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
        for name in ("reward_chosen", "margin", "kl_raw"):
            assert b[name] == pytest.approx(a[name], abs=2e-4), name
        assert other.read_state().final_loss == pytest.approx(one.read_state().final_loss, rel=1e-5)
    assert np.abs(rows_of(alone[1])["reward_chosen"]).max() > 0.05


def test_a_trial_that_was_stopped_goes_on_as_if_nothing_had_happened(make: Make, cache: Path) -> None:
    """The reference too is that of the start, not of the checkpoint."""
    whole, stopped = make(TRIAL, "whole"), make(TRIAL, "stopped")
    assert run([whole], cache) == ["done"]

    def stop(members: Sequence[Progress]) -> bool:
        return members[0].step >= 7

    assert run([stopped], cache, stop) == ["interrupted"] and run([stopped], cache) == ["done"]
    assert_same(rows_of(whole), rows_of(stopped))
    assert rows_of(whole).schema.names == [*TRACE.names, *(c.name for c in KTO_COLUMNS)]
    assert records(whole)[0].schema.names == TRACE.names  # who does not ask for them
    probed = [folder.rows(PROBES) for folder in (whole, stopped)]
    assert probed[0] is not None and probed[1] is not None
    assert_same(probed[0], probed[1])


def test_classes_that_are_absent_are_null_and_no_divergence(
    make: Make,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 3 has chosen completions only, step 5 rejected ones, step 7 none at all, step 9 one cut and one empty."""
    cut = HostFeed._cut

    def changed(self: HostFeed, tick: int) -> Any:
        windows = cut(self, tick).copy()
        if tick in (3, 5):
            windows[..., -1] = CHOSEN if tick == 3 else REJECTED
        elif tick == 7:
            windows[..., :-1] = np.minimum(windows[..., :-1], IGNORE)
        elif tick == 9:
            windows[..., -1] %= 2
            windows[0, 2, -1] += 2
            windows[0, 1, :-1] = np.minimum(windows[0, 1, :-1], IGNORE)
        return windows

    monkeypatch.setattr(HostFeed, "_cut", changed)
    folder = make(TRIAL)
    assert run([folder], cache) == ["done"]
    rows, kinds = rows_of(folder), ("reward", "logp", "logz_mean", "logit_sd", "logit_absmax")
    for step_of, absent in ((3, "rejected"), (5, "chosen")):
        null = {name for name in rows.schema.names if rows.is_null(name)[step_of]}
        assert null == {f"{kind}_{absent}" for kind in kinds} | {"margin", "loss_scale", "skip"}
        assert rows[f"sequences_{absent}"][step_of] == rows[f"targets_{absent}"][step_of] == 0
        assert np.isfinite(rows["loss"][step_of]) and np.isfinite(rows["grad_norm"][step_of])
    assert rows["skip"].tolist() == [None] * 7 + ["no_targets"] + [None] * 4
    assert (
        rows.is_null("kl")[7]
        and rows.is_null("loss")[7]
        and rows["empty"][7] == 1
        and rows["tokens"][7] == rows["tokens"][6]
    )
    assert rows["empty"][9] == rows["clipped"][9] == 1 / 8
    assert rows["sequences_chosen"][9] + rows["sequences_rejected"][9] == 7
    probed = folder.rows(PROBES)
    assert probed is not None
    assert len(set(probed["param_norm"].tolist())) == len(probed)  # the step without a sequence stopped nothing
    summary = summarise(rows, None, facts(12), RULES)
    assert summary.columns["one_class_steps"] == 2 and summary.columns["verdict_reason"] == "too_short"


def test_rules_between_kto_and_its_data() -> None:
    values = cfg.to_dict(TRIAL)
    assert cfg.from_dict(values) == TRIAL and cfg.trial_id(TRIAL, "0") != cfg.trial_id(BASE, "0")

    def refused(**changes: Any) -> str:
        changed = copy.deepcopy(values)
        for name, value in changes.items():
            group, key = name.split("__")
            changed[group][key] = value
        with pytest.raises(ConfigError) as error:
            cfg.from_dict(changed)
        return str(error.value)

    assert "reads prompts with completions and labels: data=kto" in refused(data__source="arithmetic")
    assert "gives prompts with completions and labels, which objective=kto reads" in refused(objective__kind="sft")
    assert "must be padded, got packed" in refused(data__layout="packed")
    assert "must be at least 2, got 1" in refused(train__micro_batch_size=1)
    assert "train.z_loss: has no effect" in refused(train__z_loss=1e-4)
    assert "objective.beta" in refused(objective__kind="lm", objective__beta=0.2, data__source="pysrc")


def test_the_estimate_knows_the_other_passes_and_the_reference() -> None:
    sft = dataclasses.replace(TRIAL, objective=ObjectiveConfig("sft"))
    assert estimate.flops(TRIAL) == 2 * estimate.flops(sft)
    weights = TRIAL.model.parameters(estimate.vocabulary(TRIAL))
    assert estimate.memory(TRIAL) - estimate.memory(sft) == 4 * weights
    assert estimate.disk(TRIAL, False) - estimate.disk(sft, False) == 12 * 8 * 19


def test_the_preflight_of_a_foreign_model_is_of_completions(cache: Path) -> None:
    """The loss itself is not the same in other micro-batches."""
    foreign = dataclasses.replace(TRIAL, model=dataclasses.replace(TRIAL.model, family="llama"))
    loss, norm = probes.accumulation_differences(foreign, cache, CPU)
    assert loss <= 3e-7 and norm <= 3e-7


# --- verdicts


def facts(steps: int, objective: str = "kto", **others: Any) -> TrialFacts:
    given: dict[str, Any] = {"init_loss": 0.5, "final_loss": 0.4, "unigram_entropy": 0.3} | others
    return TrialFacts(steps, 20, 1.0, "done", "complete", objective=objective, **given)


def reward(value: float, steps: int = 400) -> NDArray[np.float64]:
    """Both models are the same at the first step."""
    return np.where(np.arange(steps), value, 0.0)


def record(steps: int = 400, **columns: Any) -> Rows:
    """A calm trial of objective kto, some columns of which are others."""
    rng = np.random.default_rng(0)
    calm = {"loss": 0.45 + 0.02 * rng.standard_normal(steps), "grad_norm": 0.3 * lognormal(0.1, steps, 0)}
    calm |= {"margin": 0.2 + 0.1 * rng.standard_normal(steps), "kl": np.full(steps, 0.1), "kl_raw": np.full(steps, 0.1)}
    calm |= {"reward_chosen": reward(0.1, steps), "reward_rejected": reward(-0.1, steps)}
    calm |= {"logit_absmax": np.full(steps, 4.0), "logz_mean": np.full(steps, 6.0)}
    calm |= {"sequences_chosen": np.full(steps, 4), "sequences_rejected": np.full(steps, 4)}
    calm |= {"targets_chosen": np.full(steps, 40), "targets_rejected": np.full(steps, 40)} | columns
    base = {"seconds": 0.1, "lr": 1e-3, "skip": None}
    plain = {name: np.asarray(x, dtype=object).tolist() for name, x in calm.items()}
    return from_dicts(
        [base | {"step": i, "tokens": i} | {n: x[i] for n, x in plain.items()} for i in range(steps)], TRACE_KTO
    )


def judged(rows: Rows, **others: Any) -> Summary:
    return summarise(rows, None, facts(len(rows), **others), RULES)


def verdict(rows: Rows, **others: Any) -> tuple[Any, ...]:
    columns = judged(rows, **others).columns
    return columns["verdict"], columns["verdict_code"], columns["verdict_step"]


def losses(high: int, start: int = 200, gap: int | None = None, value: float = 0.62) -> list[float | None]:
    """.45, but high for so many steps from `start` on; step `gap` after that was not measured."""
    values: list[float | None] = [0.5, *[0.45] * 399]
    for i in range(start, start + high + (gap is not None)):
        values[i] = None if gap is not None and i == start + gap else value
    return values


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (losses(20), ("diverged", "above_start", 219)),
        (losses(20, gap=7), ("diverged", "above_start", 220)),  # a step that was not measured proves nothing
        (losses(19), ("spiky", "ok", None)),  # long, and over
        (losses(40, value=0.599), ("spiky", "ok", None)),  # not .1 above .5
        ([x if i % 10 else 0.45 for i, x in enumerate(losses(180))], None),  # never 20 in a row
    ],
    ids=["20", "20 and a gap", "19", "lower", "interrupted"],
)
def test_above_start(loss: list[float | None], expected: tuple[Any, ...] | None) -> None:
    skip = ["no_targets" if x is None else None for x in loss]
    answer = verdict(record(loss=loss, skip=skip))
    assert answer == expected if expected else answer[1] == "ok"


def test_cuts_into_blocks_change_no_verdict() -> None:
    from stabstudy.stability.detectors import Block
    from stabstudy.stability.verdict import DivergenceMonitor, MonitorFacts

    loss = np.array(losses(20), float)
    for size in (1, 7, 150):
        monitor = DivergenceMonitor(RULES, [MonitorFacts(400, 20, 0.5, objective=kind) for kind in ("kto", "lm")])
        for i in range(0, 400, size):
            part = np.stack([loss[i : i + size]] * 2)
            monitor.update(Block(part, np.ones_like(part), np.zeros(part.shape, np.uint8), None, None, None))
        assert (monitor.code[0], monitor.step[0]) == ("above_start", 219)
        assert monitor.code[1] != "above_start"


def test_what_is_of_cross_entropies_is_not_tested() -> None:
    """A smoothed loss above the start, an end above the unigram entropy, one never below it: findings of lm and sft."""
    climbing = np.where(np.arange(400) % 19, 0.7, 0.45)
    assert verdict(record(loss=climbing))[1] == "ok"
    assert verdict(record(loss=climbing), objective="lm")[1] == "above_init"
    assert judged(record()).columns["verdict"] == "stable"
    assert judged(record(), objective="sft").columns["verdict_reason"] == "untrained"
    lost = {"unigram_entropy": 1.0, "final_loss": 1.2}
    assert verdict(record(), **lost)[0] == "stable" and verdict(record(), objective="lm", **lost)[1] == "above_unigram"
    assert judged(record()).columns["loss_over_unigram"] is None


def test_margin_negative() -> None:
    noise = 0.1 * np.random.default_rng(1).standard_normal(400)
    fallen = np.where(np.arange(400) < 320, 0.2, -0.1) + noise
    assert verdict(record(margin=fallen)) == ("diverged", "margin_negative", 399)
    assert judged(record(margin=fallen)).columns["margin_final"] == pytest.approx(fallen[320:].mean())
    early = np.where(np.arange(400) < 320, -0.2, 0.1) + noise
    scattered = np.where(np.arange(400) < 320, 0.2, -0.1) + 10 * noise
    tiny = -1e-4 + 1e-3 * noise
    few = [None if i % 5 else float(x) for i, x in enumerate(fallen)]  # 16 of the last 80
    for calm in (early, scattered, tiny, few):
        assert verdict(record(margin=calm))[:2] == ("stable", "ok")
    assert verdict(record(margin=fallen), objective="lm")[1] != "margin_negative"
    half = [None if i % 2 else float(x) for i, x in enumerate(fallen)]  # steps without a class
    assert verdict(record(margin=half))[1] == "margin_negative"


def test_the_bound_is_honest_where_steps_in_a_row_are_alike() -> None:
    """AR(1) with .8 about 0, 200 steps: the interval of single steps is wrong four times as often as it says."""
    rng, wrong = np.random.default_rng(2), np.zeros(2)
    for _ in range(400):
        x, series = 0.0, []
        for e in rng.standard_normal(240).tolist():
            x = 0.8 * x + e
            series.append(x)
        values = np.array(series[40:])
        bound = highest_mean(values, 10, 0.05)
        assert bound is not None
        wrong += bound < 0, values.mean() + 1.653 * values.std(ddof=1) / math.sqrt(200) < 0
    assert wrong[0] / 400 < 0.1 and wrong[1] / 400 > 0.2


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_values_that_are_not_finite_diverge(name: str) -> None:
    broken = {"loss": np.full(400, 0.45), "grad_norm": 0.3 * lognormal(0.1, 400, 0)}[name]
    broken[150] = math.nan
    assert verdict(record(**{name: broken})) == ("diverged", "nonfinite", 150)


def test_sentences() -> None:
    def told(**columns: Any) -> list[str]:
        summary = judged(record(**columns))
        return explain(summary.columns, summary.spikes, Recipe(None, 20), RULES)

    assert told() == [
        "Stable: no spike in 388 judged steps.",
        "The logits did not explode: none on a token of a completion was above 4.",
    ]
    grown = told(logit_absmax=np.linspace(4, 250, 400))
    assert "The logits grew in truth: up to 250 on a single token of a completion." in grown
    fallen = np.where(np.arange(400) < 320, 0.2, -0.1)
    assert told(margin=fallen)[0].endswith("the rejected completions had the higher reward (margin_negative).")
    assert "Rejected completions ended with the higher reward: a margin of -0.1, surely below 0." in told(margin=fallen)
    down = told(reward_chosen=reward(-16.2), margin=np.full(400, 0.2))
    assert down[2] == (
        "Chosen completions became less likely than at the start: their mean reward ended at -16.2, 0.2 above that of "
        "the rejected."
    )
    margin, rejected = [0.2, None, *[0.2] * 398], [0.0, None, *[-0.1] * 398]
    absent = told(sequences_rejected=[4, 0, *[4] * 398], margin=margin, reward_rejected=rejected)
    assert absent[2] == "1 step had completions of one class alone: margin and means of the other are null there."
    rounded = told(reward_chosen=[0.03, *[0.1] * 399], skip=["amp", "amp", *[None] * 398])
    assert rounded[2] == (
        "The number format gave rewards of up to 0.03 at step 0, where both models are the same, and lost 2 steps "
        "to values beyond fp16."
    )

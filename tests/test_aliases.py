"""Names in other trainers' logs: what each framework writes is known, and look-alikes are not taken."""

from __future__ import annotations

import re

import pytest

from stabstudy.ingesting.aliases import ALIASES, CHART, FRAMEWORKS, NOT, PATTERNS, place, plain

KINDS = ("step", "loss", "grad_norm", "lr")


def best(ours: str, names: list[str]) -> str | None:
    placed = [(at, name) for name in names if (at := place(ours, name)) is not None]
    return min(placed)[1] if placed else None


# columns as the frameworks write them -> step, loss, norm, rate
COLUMNS = {
    "transformers on W&B": (
        ["_step", "_runtime", "_timestamp", "train/epoch", "train/global_step", "train/loss", "train/grad_norm"]
        + ["train/learning_rate", "eval/loss", "train/total_flos", "train_samples_per_second"],
        ("train/global_step", "train/loss", "train/grad_norm", "train/learning_rate"),
    ),
    "ms-swift": (
        ["loss", "grad_norm", "learning_rate", "token_acc", "epoch", "global_step/max_steps", "elapsed_time"],
        ("global_step/max_steps", "loss", "grad_norm", "learning_rate"),
    ),
    "Lightning": (
        ["epoch", "step", "train_loss_step", "train_loss_epoch", "val_loss", "lr-AdamW", "lr-AdamW-momentum"]
        + ["lr-AdamW/pg2", "grad_2.0_norm/layer.weight", "grad_2.0_norm_total"],
        ("step", "train_loss_step", "grad_2.0_norm_total", "lr-AdamW"),
    ),
    "torchtitan": (
        ["step", "loss_metrics/global_avg_loss", "loss_metrics/global_max_loss", "grad_norm", "lr", "mfu(%)"]
        + ["validation_metrics/loss", "throughput(tps)", "time_metrics/end_to_end(s)", "n_tokens_seen"],
        ("step", "loss_metrics/global_avg_loss", "grad_norm", "lr"),
    ),
    "OLMo": (
        ["_step", "train/CrossEntropyLoss", "train/Perplexity", "train/ZLoss", "optim/total_grad_norm"]
        + ["optim/learning_rate_group0", "optim/learning_rate_group1", "eval/c4/CrossEntropyLoss", "optim/clip_coef"]
        + ["optim/grad/transformer.blocks.0.norm", "throughput/total_tokens"],
        ("_step", "train/CrossEntropyLoss", "optim/total_grad_norm", "optim/learning_rate_group0"),
    ),
    "OLMo-core": (
        ["step", "train/CE loss", "train/PPL", "train/Z loss", "optim/total grad norm", "optim/LR (group 0)"]
        + ["optim/step skipped", "eval/lm/pile/CE loss", "optim/LR (group 1)"],
        ("step", "train/CE loss", "optim/total grad norm", "optim/LR (group 0)"),
    ),
    "Megatron-LM": (
        ["iteration", "lm loss", "lm loss vs samples", "grad-norm", "grad-norm vs samples", "learning-rate"]
        + ["params-norm", "loss-scale", "lm loss validation", "learning-rate vs samples", "batch-size"],
        ("iteration", "lm loss", "grad-norm", "learning-rate"),
    ),
    "NeMo": (
        ["epoch", "step", "global_step", "reduced_train_loss", "lr", "grad_norm", "consumed_samples", "val_loss"],
        ("global_step", "reduced_train_loss", "grad_norm", "lr"),
    ),
    "Composer": (
        ["time/batch", "time/batch_in_epoch", "time/token", "loss/train/total", "l2_norm/grad/global"]
        + ["l2_norm/param/model.wte", "l2_norm/grad/model.wte", "lr-DecoupledAdamW/group0", "metrics/eval/loss"],
        ("time/batch", "loss/train/total", "l2_norm/grad/global", "lr-DecoupledAdamW/group0"),
    ),
    "MaxText": (
        ["step", "run_name", "learning/grad_norm", "learning/loss", "learning/moe_lb_loss", "learning/param_norm"]
        + ["learning/raw_grad_norm", "learning/current_learning_rate", "perf/step_time_seconds", "eval/avg_loss"],
        ("step", "learning/loss", "learning/raw_grad_norm", "learning/current_learning_rate"),
    ),
    "litgpt": (
        ["loss", "iter", "step", "epoch", "iter_time", "remaining_time", "tokens", "learning_rate", "val_loss"],
        ("step", "loss", None, "learning_rate"),
    ),
    "nanotron": (
        ["iteration_step", "consumed_tokens", "lm_loss", "z_loss", "lr", "grad_norm", "tokens_per_sec"],
        ("iteration_step", "lm_loss", "grad_norm", "lr"),
    ),
    "verl": (
        ["training/global_step", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/lr"]
        + ["critic/vf_loss", "critic/grad_norm", "critic/lr", "val-core/acc"],
        ("training/global_step", "actor/pg_loss", "actor/grad_norm", "actor/lr"),
    ),
    "llm.c": (["s", "trl", "tel", "eval", "lr", "norm"], ("s", "trl", "norm", "lr")),
    "nanoGPT": (["iter", "train/loss", "val/loss", "lr", "mfu"], ("iter", "train/loss", None, "lr")),
    "Lingua": (
        ["global_step", "acc_step", "loss/out", "optim/grad_norm", "optim/lr", "optim/total_tokens", "speed/wps"],
        ("global_step", "loss/out", "optim/grad_norm", "optim/lr"),
    ),
    "fairseq": (
        ["epoch", "update", "loss", "nll_loss", "ppl", "num_updates", "lr", "gnorm", "gnorm_decoder", "loss_scale"],
        ("num_updates", "loss", "gnorm", "lr"),
    ),
    "levanter": (
        ["global_step", "train/loss", "grad/norm/total", "grad/norm/embeddings", "params/norm/total"]
        + ["optim/learning_rate", "run_progress", "throughput/tokens_per_second"],
        ("global_step", "train/loss", "grad/norm/total", "optim/learning_rate"),
    ),
    "before and after": (
        ["step", "train/loss", "train/grad_norm_after_clip", "train/grad_norm_before_clip", "lrm"],
        ("step", "train/loss", "train/grad_norm_before_clip", None),
    ),
    "a namespace of one's own": (
        ["metrics/global_step", "metrics/train_loss", "stats/gradient_norm", "opt/learning_rate"],
        ("metrics/global_step", "metrics/train_loss", "stats/gradient_norm", "opt/learning_rate"),
    ),
}


@pytest.mark.parametrize("framework", COLUMNS)
def test_a_frameworks_own_columns_are_known(framework: str) -> None:
    names, expected = COLUMNS[framework]
    assert tuple(best(ours, names) for ours in KINDS) == expected
    assert tuple(best(ours, names[::-1]) for ours in KINDS) == expected  # their order in the file says nothing


LOOK_ALIKES = {
    "step": ["epoch", "consumed_tokens", "consumed_samples", "_runtime", "step_time", "step_avg", "warmup_steps"]
    + ["eval_steps", "total_steps", "max_steps", "batch_size", "steps_per_second", "acc_step", "logging_steps"],
    "loss": ["eval_loss", "val/loss", "valid_loss", "test loss", "z_loss", "aux_loss", "train/ZLoss", "loss_scale"]
    + ["router Z loss", "load balancing loss", "kl_loss", "critic/vf_loss", "train_loss_epoch"]
    + ["loss_metrics/global_max_loss"],
    "grad_norm": ["grad_norm_after_clip", "post_clip_grad_norm", "clipped_grad_norm", "param_norm", "params norm"]
    + ["max_grad_norm", "update_norm", "weight_norm", "critic/grad_norm", "layers/0/grad_norm", "actv_norm"]
    + ["grad_norm_threshold", "grad_norm_var", "grad-norm vs samples", "lr=1e-2 - train/grad_norm"],
    "lr": ["lrm", "min_lr", "max_lr", "lr_scale", "critic/lr", "learning_rate_group1", "lr-AdamW-momentum"]
    + ["train/lr(1e-3)", "lr-AdamW/pg2", "base_lr", "lr_decay_iters", "weight_decay"],
}


@pytest.mark.parametrize(("ours", "name"), [(ours, name) for ours, names in LOOK_ALIKES.items() for name in names])
def test_a_look_alike_is_not_taken(ours: str, name: str) -> None:
    assert place(ours, name) is None


def test_no_alias_is_a_look_alike_of_another_kind() -> None:
    known = {ours: {plain(name) for name in names} for ours, names in ALIASES.items()}
    for ours in KINDS:
        for other in set(KINDS) - {ours}:
            assert not known[ours] & known[other]


def test_every_expression_compiles_and_every_framework_names_its_source() -> None:
    for expressions in (*PATTERNS.values(), *NOT.values(), (CHART,)):
        for expression in expressions:
            re.compile(expression)
    assert all(f.source and (f.step or f.loss) for f in FRAMEWORKS)


@pytest.mark.parametrize(
    ("column", "run", "metric", "edge"),
    [
        ("gpt2-lr3e-3 - train/loss", "gpt2-lr3e-3", "train/loss", None),
        ("a - b - train/grad_norm__MAX", "a - b", "train/grad_norm", "__MAX"),
    ],
)
def test_a_chart_export_names_run_and_metric(column: str, run: str, metric: str, edge: str | None) -> None:
    match = re.fullmatch(CHART, column)
    assert match is not None
    assert (match["run"], match["metric"], match["edge"]) == (run, metric, edge)

"""Facts of the training frameworks' logs: what each calls step, loss, norm and rate, and what to beware of.

Each row comes from the framework's own source, which it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Framework:
    """The names of one trainer, best first. `norm`: whether its gradient norm is that before or after clipping."""

    name: str
    source: str
    step: tuple[str, ...] = ()
    loss: tuple[str, ...] = ()
    grad_norm: tuple[str, ...] = ()
    lr: tuple[str, ...] = ()
    norm: Literal["before", "after", "not logged", "unknown"] = "unknown"
    beware: str = ""


FRAMEWORKS = (
    Framework(  # first, so that its order decides
        "any",
        "what scripts call them",
        step=(
            *("global_step", "trainer/global_step", "global_steps", "num_updates", "optimizer_step", "completed_steps"),
            *("step", "steps", "training_step", "current_step", "current_steps", "iteration", "iterations", "iter"),
            *("iter_num", "it", "update", "updates"),
        ),
        loss=(
            "loss",
            "training_loss",
            "loss_mean",
            "mean_loss",
            "cross_entropy",
            "cross_entropy_loss",
            "ce",
            "nll",
            *("step_loss", "avg_loss", "avr_loss", "average_loss", "total_loss"),
        ),
        grad_norm=(
            *("grad_norm_before_clip", "grad_norm_pre_clip", "pre_clip_grad_norm", "grad_norm_before_clipping"),
            *("unclipped_grad_norm", "grad_norm_unclipped", "raw_grad_norm", "grad_norm", "gradient_norm"),
            *("total_grad_norm", "global_grad_norm", "grad_norm_total", "grad_norm_global", "grad_global_norm"),
            *("gradnorm", "grads_norm", "norm_grad", "total_norm", "gnorm", "grad_l2_norm", "grad_norm_l2"),
        ),
        lr=("lr", "learning_rate", "current_lr", "current_learning_rate", "lr_0", "lr_group_0"),
    ),
    Framework(
        "transformers, TRL, axolotl, alignment-handbook, open-r1",
        "trainer.py, integrations/integration_utils.py (5.24): rewrite_logs puts train/ before each name",
        step=("train/global_step", "step"),
        loss=("train/loss", "loss"),
        grad_norm=("train/grad_norm", "grad_norm"),
        lr=("train/learning_rate", "learning_rate"),
        norm="before",
        beware="logging_nan_inf_filter makes a loss that is not finite 0.0; under DeepSpeed the norm may be -1; W&B's "
        "_step counts calls; stdout lines have no step; train_loss is the mean of the whole run, in the last row; a "
        "GRPO loss of 0.0 beside a healthy norm is a loss",
    ),
    Framework(
        "LLaMA-Factory",
        "train/callbacks.py",
        step=("current_steps",),
        loss=("loss",),
        lr=("lr", "learning_rate"),
        norm="not logged",
        beware="trainer_log.jsonl has no norm; its trainer_state.json has",
    ),
    Framework(
        "ms-swift",
        "trainers/patcher.py, megatron/callbacks/print.py: logging.jsonl",
        step=("global_step/max_steps", "iteration"),
        loss=("loss",),
        grad_norm=("grad_norm",),
        lr=("learning_rate",),
        norm="before",
        beware="the step is text, `10/500`; the last line is a summary; loss and norm are 0 where "
        "all completions were cut",
    ),
    Framework(
        "Lightning",
        "loggers/csv_logs.py, callbacks/lr_monitor.py, utilities/grads.py",
        step=("trainer/global_step", "step"),
        loss=("train_loss_step", "train/loss_step", "loss_step", "train_loss"),
        grad_norm=("grad_2.0_norm_total", "grad_norm_step"),
        lr=("lr-AdamW", "lr-Adam", "lr-SGD"),
        norm="before",
        beware="loss, norm and rate of one step stand on several rows; *_epoch are means of an epoch; lr-*/pg2 and "
        "lr-*-momentum are something else; the bar counts batches of an epoch",
    ),
    Framework(
        "W&B",
        "documentation: history, chart export, runs table",
        step=("_step",),
        beware="_step counts log calls; a chart export is `RUN - METRIC` with __MIN and __MAX; the runs table has "
        "a row per run and no steps; exports are sampled",
    ),
    Framework(
        "torchtitan",
        "components/metrics.py",
        step=("step",),
        loss=("loss_metrics/global_avg_loss", "loss"),
        grad_norm=("grad_norm",),
        lr=("lr",),
        norm="before",
        beware="its own comment says after clipping, but clip_grad_norm_ returns the norm before; one folder per rank",
    ),
    Framework(
        "OLMo",
        "olmo/train.py",
        loss=("train/CrossEntropyLoss",),
        grad_norm=("optim/total_grad_norm",),
        lr=("optim/learning_rate_group0",),
        norm="before",
        beware="console blocks of a [step=..] line and indented name=value lines",
    ),
    Framework(
        "OLMo-core",
        "train/common.py, callbacks/console_logger.py",
        loss=("train/CE loss",),
        grad_norm=("optim/total grad norm",),
        lr=("optim/LR (group 0)", "optim/LR"),
        norm="before",
        beware="`optim/step skipped` 1: no update was taken",
    ),
    Framework(
        "Megatron-LM, Megatron-DeepSpeed",
        "megatron/training/training.py",
        step=("iteration",),
        loss=("lm loss",),
        grad_norm=("grad norm", "grad-norm"),
        lr=("learning rate", "learning-rate"),
        norm="before",
        beware="a loss that is not finite is left out of the line (avg >= 0 is asked); names ending in `vs samples` "
        "are the same over another axis",
    ),
    Framework(
        "NeMo",
        "lightning/pytorch: progress printer and CSV logger (1.x, 2.x)",
        step=("global_step", "step"),
        loss=("reduced_train_loss",),
        grad_norm=("grad_norm",),
        lr=("lr",),
        norm="before",
        beware="`iteration` counts within an epoch; NeMo-RL puts train/ before loss, grad_norm and lr",
    ),
    Framework(
        "Composer, llm-foundry",
        "trainer/trainer.py, callbacks/optimizer_monitor.py, callbacks/lr_monitor.py",
        step=("time/batch", "trainer/batch_idx", "batch"),
        loss=("loss/train/total", "loss/train"),
        grad_norm=("l2_norm/grad/global",),
        lr=("lr-DecoupledAdamW/group0", "lr-DecoupledLionW/group0"),
        norm="after",
        beware="the monitor reads the gradients at the end of the batch, after GradientClipping; the other l2_norm/* "
        "are layers, moments, parameters and updates",
    ),
    Framework(
        "MaxText",
        "common/metric_logger.py, trainers/pre_train/train.py",
        step=("step", "completed step"),
        loss=("learning/loss",),
        grad_norm=("learning/raw_grad_norm", "learning/grad_norm"),
        lr=("learning/current_learning_rate",),
        norm="before",
        beware="learning/grad_norm is after clipping, learning/raw_grad_norm before; stdout has no norm",
    ),
    Framework(
        "litgpt, TinyLlama",
        "litgpt/pretrain.py, litgpt/finetune/full.py; pretrain/tinyllama.py",
        step=("step",),
        loss=("loss", "metric/train_loss", "loss train"),
        lr=("learning_rate",),
        norm="not logged",
        beware="`iter` counts micro-batches, so one `step` has several rows; the loss is that of the last micro-batch",
    ),
    Framework(
        "nanotron",
        "src/nanotron/trainer.py, logging/base.py",
        step=("iteration_step", "iteration"),
        loss=("lm_loss",),
        grad_norm=("grad_norm",),
        lr=("lr",),
        norm="before",
        beware="numbers have three digits and a letter (1.05M, 10.4)",
    ),
    Framework(
        "verl",
        "trainer/sft_trainer.py, trainer/ppo/ray_trainer.py, workers/actor",
        step=("training/global_step", "step"),
        loss=("train/loss", "actor/loss", "actor/pg_loss"),
        grad_norm=("train/grad_norm", "actor/grad_norm"),
        lr=("train/lr", "actor/lr"),
        norm="before",
        beware="train/lr(1e-3) is a thousand times the rate; critic/* is a second model; a step whose norm is not "
        "finite is skipped; pg_loss near 0 is a loss",
    ),
    Framework(
        "OpenRLHF",
        "trainer/sft_trainer.py, trainer/ray/ppo_actor.py",
        step=("train/global_step",),
        loss=("train/gpt_loss", "train/loss_mean", "train/policy_loss", "policy_loss"),
        grad_norm=("train/grad_norm", "actor_grad_norm"),
        lr=("train/lr", "actor_lr", "act_lr"),
        norm="before",
        beware="norm 0.0 where the engine gave none",
    ),
    Framework(
        "llm.c",
        "llmc/logger.h, train_gpt2.cu, train_gpt2.py",
        step=("s", "step"),
        loss=("trl", "loss", "train loss"),
        grad_norm=("norm",),
        lr=("lr",),
        norm="before",
        beware="tel is the test loss and eval an accuracy; the older main.log has trl alone",
    ),
    Framework(
        "nanoGPT, build-nanogpt, nanochat, modded-nanogpt",
        "train.py; train_gpt2.py; scripts/base_train.py; train_gpt.py",
        step=("iter", "step"),
        loss=("loss", "train_loss", "train/loss", "train loss"),
        grad_norm=("norm", "grad_norm"),
        lr=("lr",),
        norm="before",
        beware="nanoGPT's `step N: train loss` and its W&B rows are evaluations; nanochat's loss is smoothed and its "
        "lrm a factor of the rate",
    ),
    Framework(
        "Lingua",
        "apps/main/train.py, lingua/metrics.py",
        step=("global_step", "step"),
        loss=("loss/out", "loss"),
        grad_norm=("optim/grad_norm", "grad"),
        lr=("optim/lr", "lr"),
        norm="before",
        beware="norm -1 on micro-batches without a step; logs every tenth step; `iter` is a time",
    ),
    Framework(
        "DeepSpeed",
        "runtime/engine.py, runtime/utils.py, runtime/zero",
        step=("step", "global_steps"),
        loss=("Train/Samples/train_loss",),
        lr=("Train/Samples/lr",),
        norm="before",
        beware="a norm that is inf or NaN becomes -1 in ZeRO and get_global_norm; Train/Samples/* count samples",
    ),
    Framework(
        "GPT-NeoX",
        "megatron/logging.py",
        step=("iteration",),
        loss=("train/lm_loss", "lm_loss"),
        grad_norm=("train/grad_norm", "grad_norm"),
        lr=("train/learning_rate", "learning rate"),
        norm="unknown",
        beware="a skipped iteration adds 0 to the mean: lm_loss 0.0 is a skipped step",
    ),
    Framework(
        "fairseq, metaseq",
        "logging/progress_bar/json_progress_bar.py, trainer.py",
        step=("num_updates", "train_inner/num_updates"),
        loss=("loss", "train_inner/loss"),
        grad_norm=("gnorm", "train_inner/gnorm"),
        lr=("lr", "train_inner/lr"),
        norm="before",
        beware="values are text; `update` is a fraction of epochs; the loss is in bits (base 2) and averaged over "
        "log_interval; gnorm_<layer> are layers",
    ),
    Framework(
        "torchtune",
        "training/metric_logging.py, recipes",
        step=("step",),
        loss=("loss",),
        grad_norm=("grad_norm",),
        lr=("lr",),
        norm="before",
    ),
    Framework(
        "levanter",
        "callbacks/_metrics.py, callbacks/watch.py",
        step=("global_step", "step"),
        loss=("train/loss",),
        grad_norm=("grad/norm/total",),
        lr=("optim/learning_rate",),
        norm="before",
        beware="norms only every watch interval",
    ),
    Framework("open_lm", "open_lm/train.py", step=("step",), loss=("train/loss",), lr=("train/lr",), norm="not logged"),
    Framework(
        "accelerate examples",
        "examples/by_feature",
        step=("step", "completed_steps"),
        loss=("train_loss",),
        beware="often a row per epoch",
    ),
    Framework("progress bars", "tqdm", step=("progress",), beware="of our own making in text.py: a bar beside a row"),
)

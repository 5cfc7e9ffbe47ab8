"""Names by which logs are read: what each training framework calls step, loss, norm and rate, and the one rule.

`place` says how good a name is, for columns and text alike: capitals, punctuation and a leading `train` do not count,
and look-alikes (`NOT`) are never taken. Each row of `FRAMEWORKS` comes from the framework's own source, which it names.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal


def place(ours: str, name: str) -> int | None:
    """How good `name` is as ours (0 the best), None where it is not known as that.

    `_step` is W&B's count of log calls: it comes after every name that counts steps.
    """
    text = "_step" if name == "_step" else plain(name)
    if (known := _PLACES[ours].get(text)) is not None:
        return known
    if any(re.fullmatch(expression, text) for expression in NOT[ours]):
        return None
    matches = (i for i, expression in enumerate(PATTERNS[ours]) if re.fullmatch(expression, name, re.IGNORECASE))
    return next((len(_PLACES[ours]) + i for i in matches), None)


def plain(name: str) -> str:
    """A name without capitals, punctuation and a leading `train`: `train/Grad-Norm` is `grad_norm`."""
    text = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")
    return re.sub(r"^(train|training|trainer)_(?=.)", "", text)


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
    Framework("any", "what scripts call them",  # first, so that its order decides
        step=("global_step", "trainer/global_step", "global_steps", "num_updates", "optimizer_step",
              "completed_steps", "step", "steps", "training_step", "current_step", "current_steps", "iteration",
              "iterations", "iter", "iter_num", "it", "update", "updates"),
        loss=("loss", "training_loss", "loss_mean", "mean_loss", "cross_entropy", "cross_entropy_loss", "ce", "nll",
              "step_loss", "avg_loss", "avr_loss", "average_loss", "total_loss"),
        grad_norm=("grad_norm_before_clip", "grad_norm_pre_clip", "pre_clip_grad_norm", "grad_norm_before_clipping",
                   "unclipped_grad_norm", "grad_norm_unclipped", "raw_grad_norm", "grad_norm", "gradient_norm",
                   "total_grad_norm", "global_grad_norm", "grad_norm_total", "grad_norm_global", "grad_global_norm",
                   "gradnorm", "grads_norm", "norm_grad", "total_norm", "gnorm", "grad_l2_norm", "grad_norm_l2"),
        lr=("lr", "learning_rate", "current_lr", "current_learning_rate", "lr_0", "lr_group_0")),
    Framework("transformers, TRL, axolotl, alignment-handbook, open-r1",
        "trainer.py, integrations/integration_utils.py (5.24): rewrite_logs puts train/ before each name",
        step=("train/global_step", "step"), loss=("train/loss", "loss"), grad_norm=("train/grad_norm", "grad_norm"),
        lr=("train/learning_rate", "learning_rate"), norm="before",
        beware="logging_nan_inf_filter makes a loss that is not finite 0.0; under DeepSpeed the norm may be "
               "-1; W&B's _step counts calls; stdout lines have no step; train_loss is the mean of the whole "
               "run, in the last row; a GRPO loss of 0.0 beside a healthy norm is a loss"),
    Framework("LLaMA-Factory", "train/callbacks.py",
        step=("current_steps",), loss=("loss",), lr=("lr", "learning_rate"), norm="not logged",
        beware="trainer_log.jsonl has no norm; its trainer_state.json has"),
    Framework("ms-swift", "trainers/patcher.py, megatron/callbacks/print.py: logging.jsonl",
        step=("global_step/max_steps", "iteration"), loss=("loss",), grad_norm=("grad_norm",), lr=("learning_rate",),
        norm="before",
        beware="the step is text, `10/500`; the last line is a summary; loss and norm are 0 where all "
               "completions were cut"),
    Framework("Lightning", "loggers/csv_logs.py, callbacks/lr_monitor.py, utilities/grads.py",
        step=("trainer/global_step", "step"), loss=("train_loss_step", "train/loss_step", "loss_step", "train_loss"),
        grad_norm=("grad_2.0_norm_total", "grad_norm_step"), lr=("lr-AdamW", "lr-Adam", "lr-SGD"), norm="before",
        beware="loss, norm and rate of one step stand on several rows; *_epoch are means of an epoch; lr-*/pg2 "
               "and lr-*-momentum are something else; the bar counts batches of an epoch"),
    Framework("W&B", "documentation: history, chart export, runs table", step=("_step",),
        beware="_step counts log calls; a chart export is `RUN - METRIC` with __MIN and __MAX; the runs table "
               "has a row per run and no steps; exports are sampled"),
    Framework("torchtitan", "components/metrics.py",
        step=("step",), loss=("loss_metrics/global_avg_loss", "loss"), grad_norm=("grad_norm",), lr=("lr",),
        norm="before",
        beware="its own comment says after clipping, but clip_grad_norm_ returns the norm before; one folder "
               "per rank"),
    Framework("OLMo", "olmo/train.py",
        loss=("train/CrossEntropyLoss",), grad_norm=("optim/total_grad_norm",), lr=("optim/learning_rate_group0",),
        norm="before",
        beware="console blocks of a [step=..] line and indented name=value lines"),
    Framework("OLMo-core", "train/common.py, callbacks/console_logger.py",
        loss=("train/CE loss",), grad_norm=("optim/total grad norm",), lr=("optim/LR (group 0)", "optim/LR"),
        norm="before",
        beware="`optim/step skipped` 1: no update was taken"),
    Framework("Megatron-LM, Megatron-DeepSpeed", "megatron/training/training.py",
        step=("iteration",), loss=("lm loss",), grad_norm=("grad norm", "grad-norm"),
        lr=("learning rate", "learning-rate"), norm="before",
        beware="a loss that is not finite is left out of the line (avg >= 0 is asked); names ending in `vs "
               "samples` are the same over another axis"),
    Framework("NeMo", "lightning/pytorch: progress printer and CSV logger (1.x, 2.x)",
        step=("global_step", "step"), loss=("reduced_train_loss",), grad_norm=("grad_norm",), lr=("lr",),
        norm="before",
        beware="`iteration` counts within an epoch; NeMo-RL puts train/ before loss, grad_norm and lr"),
    Framework("Composer, llm-foundry", "trainer/trainer.py, callbacks/optimizer_monitor.py, callbacks/lr_monitor.py",
        step=("time/batch", "trainer/batch_idx", "batch"), loss=("loss/train/total", "loss/train"),
        grad_norm=("l2_norm/grad/global",), lr=("lr-DecoupledAdamW/group0", "lr-DecoupledLionW/group0"), norm="after",
        beware="the monitor reads the gradients at the end of the batch, after GradientClipping; the other "
               "l2_norm/* are layers, moments, parameters and updates"),
    Framework("MaxText", "common/metric_logger.py, trainers/pre_train/train.py",
        step=("step", "completed step"), loss=("learning/loss",),
        grad_norm=("learning/raw_grad_norm", "learning/grad_norm"), lr=("learning/current_learning_rate",),
        norm="before",
        beware="learning/grad_norm is after clipping, learning/raw_grad_norm before; stdout has no norm"),
    Framework("litgpt, TinyLlama", "litgpt/pretrain.py, litgpt/finetune/full.py; pretrain/tinyllama.py",
        step=("step",), loss=("loss", "metric/train_loss", "loss train"), lr=("learning_rate",), norm="not logged",
        beware="`iter` counts micro-batches, so one `step` has several rows; the loss is that of the last "
               "micro-batch"),
    Framework("nanotron", "src/nanotron/trainer.py, logging/base.py",
        step=("iteration_step", "iteration"), loss=("lm_loss",), grad_norm=("grad_norm",), lr=("lr",), norm="before",
        beware="numbers have three digits and a letter (1.05M, 10.4)"),
    Framework("verl", "trainer/sft_trainer.py, trainer/ppo/ray_trainer.py, workers/actor",
        step=("training/global_step", "step"), loss=("train/loss", "actor/loss", "actor/pg_loss"),
        grad_norm=("train/grad_norm", "actor/grad_norm"), lr=("train/lr", "actor/lr"), norm="before",
        beware="train/lr(1e-3) is a thousand times the rate; critic/* is a second model; a step whose norm is "
               "not finite is skipped; pg_loss near 0 is a loss"),
    Framework("OpenRLHF", "trainer/sft_trainer.py, trainer/ray/ppo_actor.py",
        step=("train/global_step",), loss=("train/gpt_loss", "train/loss_mean", "train/policy_loss", "policy_loss"),
        grad_norm=("train/grad_norm", "actor_grad_norm"), lr=("train/lr", "actor_lr", "act_lr"), norm="before",
        beware="norm 0.0 where the engine gave none"),
    Framework("llm.c", "llmc/logger.h, train_gpt2.cu, train_gpt2.py",
        step=("s", "step"), loss=("trl", "loss", "train loss"), grad_norm=("norm",), lr=("lr",), norm="before",
        beware="tel is the test loss and eval an accuracy; the older main.log has trl alone"),
    Framework("nanoGPT, build-nanogpt, nanochat, modded-nanogpt",
        "train.py; train_gpt2.py; scripts/base_train.py; train_gpt.py",
        step=("iter", "step"), loss=("loss", "train_loss", "train/loss", "train loss"),
        grad_norm=("norm", "grad_norm"), lr=("lr",), norm="before",
        beware="nanoGPT's `step N: train loss` and its W&B rows are evaluations; nanochat's loss is smoothed "
               "and its lrm a factor of the rate"),
    Framework("Lingua", "apps/main/train.py, lingua/metrics.py",
        step=("global_step", "step"), loss=("loss/out", "loss"), grad_norm=("optim/grad_norm", "grad"),
        lr=("optim/lr", "lr"), norm="before",
        beware="norm -1 on micro-batches without a step; logs every tenth step; `iter` is a time"),
    Framework("DeepSpeed", "runtime/engine.py, runtime/utils.py, runtime/zero",
        step=("step", "global_steps"), loss=("Train/Samples/train_loss",), lr=("Train/Samples/lr",), norm="before",
        beware="a norm that is inf or NaN becomes -1 in ZeRO and get_global_norm; Train/Samples/* count "
               "samples"),
    Framework("GPT-NeoX", "megatron/logging.py",
        step=("iteration",), loss=("train/lm_loss", "lm_loss"), grad_norm=("train/grad_norm", "grad_norm"),
        lr=("train/learning_rate", "learning rate"),
        beware="a skipped iteration adds 0 to the mean: lm_loss 0.0 is a skipped step"),
    Framework("fairseq, metaseq", "logging/progress_bar/json_progress_bar.py, trainer.py",
        step=("num_updates", "train_inner/num_updates"), loss=("loss", "train_inner/loss"),
        grad_norm=("gnorm", "train_inner/gnorm"), lr=("lr", "train_inner/lr"), norm="before",
        beware="values are text; `update` is a fraction of epochs; the loss is in bits (base 2) and averaged "
               "over log_interval; gnorm_<layer> are layers"),
    Framework("torchtune", "training/metric_logging.py, recipes",
        step=("step",), loss=("loss",), grad_norm=("grad_norm",), lr=("lr",), norm="before"),
    Framework("levanter", "callbacks/_metrics.py, callbacks/watch.py",
        step=("global_step", "step"), loss=("train/loss",), grad_norm=("grad/norm/total",),
        lr=("optim/learning_rate",), norm="before",
        beware="norms only every watch interval"),
    Framework("open_lm", "open_lm/train.py", step=("step",), loss=("train/loss",), lr=("train/lr",), norm="not logged"),
    Framework("accelerate examples", "examples/by_feature", step=("step", "completed_steps"), loss=("train_loss",),
        beware="often a row per epoch"),
    Framework("progress bars", "tqdm", step=("progress",),
        beware="of our own making in text.py: a bar beside a row"),
)  # fmt: skip

ALIASES: dict[str, tuple[str, ...]] = {
    ours: tuple(dict.fromkeys(itertools.chain.from_iterable(getattr(f, ours) for f in FRAMEWORKS)))
    for ours in ("step", "loss", "grad_norm", "lr")
}
"""Ours -> the names of all frameworks, best first."""

_SPACE = r"((train(er|ing)?|optim(izer)?|learning|metrics?|stats|scalars|log|time|progress|model|losses)[/.])*"
PATTERNS: dict[str, tuple[str, ...]] = {
    "step": (_SPACE + r"(global[ _]?)?(steps?|iterations?|iters?)",),
    "loss": (_SPACE + r"(train(ing)?[ _./-]?)?((ce|lm|nll|xent|cross[ _]?entropy)[ _-]?)?loss",),
    "grad_norm": (
        r".*grad(ient)?s?[ _-]?norm.*(before|pre|un)[ _-]?clip.*",
        r".*(before|pre|un)[ _-]?clip.*grad(ient)?s?[ _-]?norm.*",
        r"grad_(2(\.0)?|l2)_norm_total",  # Lightning: grad_<norm type>_norm_total
        r"([^ ]*[/.])?((global|total|overall|raw)[ _-]?)?grad(ient)?s?[ _-]?norm([ _/-](total|global|all|l2|2(\.0)?))?",
    ),
    "lr": (
        r"([^ ]*/)?lr-[A-Za-z]+(/(pg1|group0|group_0))?",  # Lightning and Composer: named after the optimizer
        r"([^ ]*[/.])?(current[ _-])?(lr|learning[ _-]?rate)([ _/]*\(?(pg|param_?)?(group)?[ _]?0\)?)?",
    ),
}
"""Ours -> expressions for open-ended names: matched as a whole, capitals do not count, after `ALIASES`."""

_ELSEWHERE = r"(.*_)?(eval|evaluation|val|valid|validation|test|dev|holdout|heldout|predict|critic|ref|draft)(_.*)?"
NOT: dict[str, tuple[str, ...]] = {
    "step": (
        _ELSEWHERE,
        r".*(token|sample|second|time|runtime|timestamp|epoch|batch_size|flops|per_|_per|avg|progress_bar|skipped).*",
        r"(micro|acc|accum|accumulation|warmup|max|total|last|num|eval|save|logging|log)_?(steps?|iters?|batch(es)?)",
    ),
    "loss": (
        _ELSEWHERE,
        r".*(aux|balanc|router|mtp|moe|lb|z|kl|entropy|vf|value|reward|distill|ema|ewm|max|min|std|var)_?loss.*",
        r".*loss_?(scale|max|min|std|var|epoch|ratio|ema|mask|coef|weight|vs_samples|z|aux).*",
        r"best_.*|.*(ppl|perplexity|bpb|accuracy|dx|total_fdiff).*",
    ),
    "grad_norm": (
        _ELSEWHERE,
        r".*(after|post|clipped|clip_coef|clip_ratio|threshold|limit|max_grad|grad_clip|target|ema|var|std|min|max).*",
        r".*(param|weight|update|moment|momentum|actv|activation|layer|embed|head|z_?score|vs_samples|ratio).*",
    ),
    "lr": (
        _ELSEWHERE,
        r"lrm|.*(momentum|weight_decay|scale|ratio|mult|min|max|peak|initial|base|decay|vs_samples|1e_3).*",
        r".*(group|pg)_?[1-9].*",
    ),
}
"""Ours -> expressions for plain names (`plain`) that look like one and are another quantity. Before-clip names win."""

AFTER_CLIP = ("learning/grad_norm", "l2_norm/grad/global")
"""Names of norms that their framework logs after clipping: MaxText's where it has no raw_grad_norm, Composer's."""

RUN = (
    *("run", "run_id", "run_name", "Name", "ID", "experiment", "exp_name", "experiment_name", "trial", "trial_id"),
    *("job_id", "seed", "config", "model", "model_name", "version"),
)
"""Columns that name the run of a row."""

RANK = ("rank", "global_rank", "local_rank", "dp_rank", "process_index", "process", "worker", "node_rank", "gpu")
"""Columns that name the process of a row."""

RUNS_TABLE = ("Name", "State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep")
"""The first columns of W&B's table of runs, a row per run; a table without a step and with two of them is one."""

CHART = r"(?P<run>.+) - (?P<metric>.+?)(?P<edge>__(?:MIN|MAX))?"
"""A column of W&B's chart export, which has `Step` beside them; those with an edge are no values of their own."""

EVERY = (
    *("logging_steps", "log_every_n_steps", "log_every", "log_interval", "log_freq", "metrics.log_freq"),
    *("logging.freq", "console_log_interval", "metrics_log_interval", "iteration_step_info_interval", "log_period"),
    *("steps_per_print", "print_freq", "print_every", "logging_freq", "log_steps", "logging_interval"),
)
"""Settings that say how many steps pass between two rows."""

PLANNED = (
    *("max_steps", "total_steps", "train_iters", "max_iters", "num_iterations", "num_train_steps", "max_train_steps"),
    *("train_steps", "training_steps", "training.steps", "tokens.train_steps", "total_training_steps", "max_update"),
    *("total_num_update", "max_duration", "trainer.max_steps", "steps"),
)
"""Settings and columns that say how many steps were planned (max_duration is `1000ba`)."""


def _places(names: tuple[str, ...]) -> dict[str, int]:
    spelt = ["_step" if name == "_step" else plain(name) for name in names]
    return {name: i for i, name in reversed(list(enumerate(spelt)))}


_PLACES = {ours: _places(names) for ours, names in ALIASES.items()}

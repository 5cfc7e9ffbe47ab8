"""Names by which logs are read: the one table, and the one rule, for columns and text.

`place` says how good a name is: capitals, punctuation and a leading `train` do not count, and look-alikes (`NOT`) are
never taken. The names come from `frameworks`, where each stands with its source.
"""

from __future__ import annotations

import itertools
import re

from stabstudy.ingesting.frameworks import FRAMEWORKS

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


def plain(name: str) -> str:
    """A name without capitals, punctuation and a leading `train`: `train/Grad-Norm` is `grad_norm`."""
    text = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")
    return re.sub(r"^(train|training|trainer)_(?=.)", "", text)


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


def _places(names: tuple[str, ...]) -> dict[str, int]:
    spelt = ["_step" if name == "_step" else plain(name) for name in names]
    return {name: i for i, name in reversed(list(enumerate(spelt)))}


_PLACES = {ours: _places(names) for ours, names in ALIASES.items()}

"""Numbers, levels and foreign text as text, one way in the page, the Markdown, the figures and the CSV; a glossary."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from stabstudy.stability.columns import COLUMNS
from stabstudy.wording import LABELS as LABELS  # beside the other words of a page
from stabstudy.wording import count as count
from stabstudy.wording import label as label
from stabstudy.wording import listing as listing

NOTHING = "–"
"""Stands where a statistic is null: not measurable is not zero."""

NATS = "nat/token"

STATISTICS = {
    "final_loss": "final validation loss",
    "final_loss_capped": "final loss",
    "spike_abs_rate": "share of steps at 3x the recent norm",
    "spike_rate": "share of steps flagged",
    "grad_norm_log_sd": "roughness",
    "attn_logit_peak": "largest attention logit",
    "logit_absmax_peak": "largest output logit",
    "margin_final": "margin of rewards at the end",
    "kl_final": "KL at the end",
}
"""Names for sentences and figures; the tables' heads are the shorter labels of `stability.columns`."""

REASONS = {
    "untrained": "untrained (the loss never came below the entropy of single tokens)",
    "too_short": "too short",
    "no_gradient_norm": "without a gradient norm",
    "norm_after_clipping": "with gradient norms after clipping alone",
    "all_zero": "with a loss of 0 throughout",
    "strided": "logged with gaps",
}
"""Why a done trial has no verdict, in words."""

RULES = {
    "R1": "long spike",
    "R2": "recurring spikes",
    "R1+R2": "long and recurring spikes",
    "nonfinite": "a value not finite",
    "above_init": "smoothed loss above that of the untrained model",
    "above_start": "loss above that at the start",
    "persistent": "loss rose and stayed",
    "above_unigram": "loss back above the entropy of single tokens",
    "no_recovery": "loss ended far above its best",
    "margin_negative": "rejected completions ended with the higher reward",
}
"""`verdict_rule` -> what it means, short; `rough` is its own word."""

GLOSSARY = (
    "Trial: one training run. Cell: one combination of settings; its trials differ in the seed alone. Axis: a setting "
    "that varies; level: one of its values. Roughness: standard deviation of the logarithm of the gradient norm about "
    "its moving mean. x3: a gradient norm of at least 3 times its recent level and median."
)
"""The terms of the first screen."""

MARKS = (
    "Marks: one per trial, open where it is stable, filled where not, × where it diverged (at the loss of the "
    "untrained model); lines: means; ring: the step to look at."
)
"""How the small figures of the first screen are read."""

READ_FIGURES = "Point at a mark to read its values, or focus a figure and use the arrow keys."

FOLLOW_MARKS = " A click, or Enter, on the mark of a trial opens its page, on a field or a legend the runs there."

UNITS = {"model.depth": "layers", "train.batch_size": "sequences", "optim.warmup_steps": "steps"}

_ANSI = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")


def clean(text: object, limit: int = 300) -> str:
    """Text from a file, fit to be shown: no terminal sequences, no control or direction characters, one line, short."""
    bare = _ANSI.sub("", str(text))
    spaced = "".join(" " if c in "\t\n\r\v\f" else c for c in bare)
    kept = "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    short = " ".join(kept.split())
    return short if len(short) <= limit else short[: limit - 1] + "…"


def is_null(value: Any) -> bool:
    """Whether a table's field is null: None, NaN or pandas' NA."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits; whole numbers whole; null as a dash."""
    if is_null(value):
        return NOTHING
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if not 1e-3 <= abs(value) < 1e6:
        return _scientific(float(value), digits)
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def tick(value: float) -> str:
    """A number beside an axis: as people type it, large ones with an exponent."""
    rounded = float(f"{value:.6g}")
    return number(rounded) if abs(rounded) >= 1e6 else level(rounded)


def percent(share: Any) -> str:
    """A fraction as percent; null as a dash."""
    return NOTHING if is_null(share) else f"{number(100 * float(share), 2)} %"


def statistic(value: Any, unit: str) -> str:
    """A statistic or a difference of it as its unit wants it: fractions as percent, counts without padding zeros."""
    if unit == "fraction":
        return percent(value)
    return level(float(f"{value:.3g}")) if unit == "" and not is_null(value) else number(value)


def estimate(mean: Any, low: Any, high: Any, digits: int = 3) -> str:
    """`2.43 ± 0.02`: the mean and half the 95 % interval; the mean alone where there is no interval.

    `0.21 (0.15 to 0.31)` where the mean is not in the middle of it.
    """
    if is_null(low) or is_null(high):
        return number(mean, digits)
    if abs(high + low - 2 * mean) > 0.01 * (high - low):
        return f"{number(mean, digits)} ({number(low, digits)} to {number(high, digits)})"
    return f"{number(mean, digits)} ± {number((high - low) / 2, 2)}"


def value(metric: str, field: Any) -> str:
    """A statistic of a trial or a mean of it: a number as its unit wants it, yes or no, or clean text."""
    if isinstance(field, bool):
        return yes_or_no(field)
    return clean(field) if isinstance(field, str) else statistic(field, COLUMNS[metric].unit)


def yes_or_no(answer: bool | None) -> str:
    """An answer in one word; a dash where there is none."""
    return NOTHING if answer is None else "yes" if answer else "no"


def interval(metric: str, low: Any, high: Any) -> str:
    """`0.1 to 0.3`; a dash where there is none."""
    return NOTHING if is_null(low) or is_null(high) else f"{value(metric, low)} to {value(metric, high)}"


def level(value: Any, setting: str = "") -> str:
    """An axis value as people type it: 3e-3, 0.1, 6, pysrc; null is `off` for the clip threshold."""
    if is_null(value):
        return "off" if setting == "optim.clip" else "null"
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value == float("inf") and setting == "optim.clip":
        return "off"  # of an ingested run, where null means not known
    if isinstance(value, float):
        small = value != 0 and abs(value) < 0.01
        return _scientific(float(value), 6) if small else f"{value:.10g}"
    return clean(value, 60)


def heading(setting: str) -> str:
    """What an axis is called where its levels stand alone: `depth (layers)`."""
    return f"{label(setting)} ({UNITS[setting]})" if setting in UNITS else label(setting)


def capital(text: str) -> str:
    """As a sentence begins; a setting's own name (model.dim) stays as it is written."""
    return text if "." in text.partition(" ")[0] else text[:1].upper() + text[1:]


def at_levels(axes: Iterable[str], levels: Iterable[object]) -> str:
    """`depth 2, learning rate 0.01`; the levels may be fewer than the axes."""
    return ", ".join(f"{label(a)} {level(v, a)}" for a, v in zip(axes, levels, strict=False))


def rule(code: str | None) -> str:
    """The rule that made a verdict, in words and as its code; empty where the verdict's own word says it all."""
    return f"{RULES[code]}, {code}" if code in RULES else ""


def step(axis: str, a: object, b: object) -> str:
    """`learning rate 1e-3 to 0.03`."""
    return f"{label(axis)} {level(a, axis)} to {level(b, axis)}"


def unit_of(metric: str, nats: bool) -> str:
    """The unit of a statistic; of losses none unless they are in nat/token (`nats`, see `compare.in_nats`)."""
    own = COLUMNS[metric].unit
    return "" if own == NATS and not nats else own


def change(row: Mapping[str, Any], unit: bool = True, nats: bool = True) -> str:
    """`+0.52 [0.45, 0.59] nat/token`, or `×2.4 [2.2, 2.6]` of a ratio; `unit` False: without it.

    `nats`: whether losses are in nat/token, see `compare.in_nats`.
    """
    if row["scale"] == "difference":
        of = unit_of(row["metric"], nats) if unit else ""
        low, mean, high = (_signed(row[name]) for name in ("low", "estimate", "high"))
        if low == high == NOTHING:  # equal in every seed
            return mean
        return f"{mean} [{low}, {high}]{f' {of}' if of not in ('', '1') else ''}"
    low, mean, high = (number(row[name]) for name in ("low", "estimate", "high"))
    return f"×{mean} [{low}, {high}]"


def _signed(value: Any) -> str:
    return NOTHING if is_null(value) else f"{'+' if value > 0 else ''}{number(value)}"


def load(study: str) -> str:
    """Python that loads a study of this name, from where launches put it unless told otherwise."""
    return f'Study.load("results/{clean(study, 80)}")'


def either(items: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return listing(items, "or")


def _scientific(value: float, digits: int) -> str:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"

"""Names and units of statistics in figures; the loss has a unit only where the objective gives it one."""

from __future__ import annotations

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.stability.columns import COLUMNS
from stabstudy.trace import Rows


def name(metric: str) -> str:
    """The statistic in words."""
    return words.STATISTICS.get(metric, COLUMNS[metric].label)


def unit(metric: str, trials: pd.DataFrame) -> str:
    """The unit of a statistic of these trials; empty where it has none: losses of `kto`, shares."""
    own = words.unit_of(metric, compare.in_nats(trials))
    return "" if own in ("1", "ratio", "fraction") else own


def statistic(metric: str, trials: pd.DataFrame) -> str:
    """Name and unit, for the side of a figure and the head of a table: `final validation loss (nat/token)`."""
    own = unit(metric, trials)
    return f"{name(metric)}{f' ({own})' if own else ''}"


def is_share(metric: str) -> bool:
    """Whether the statistic is a fraction, written as percent."""
    return COLUMNS[metric].unit == "fraction"


def training_loss(rows: Rows) -> str:
    """The name of the loss of a trace, with its unit: that of `kto`, whose rows have margins, has none."""
    return "training loss" if "margin" in rows.columns else f"training loss ({words.NATS})"

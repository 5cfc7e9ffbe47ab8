"""Notes on the columns of preference training that are sums, and look like values that exploded.

LLaMA-Factory's `logits/chosen` and `logits/rejected`, like those of older trl, add up the whole tensor, sequences by
positions by vocabulary, padding included, and divide by the sequences alone (LLaMA-Factory issue 7380: -2e8 in the
first line of a healthy run; trl divides by the tokens since its pull request 6424).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from stabstudy.ingesting.points import Raw, real

LOGITS = re.compile(r"(train/)?logits/(chosen|rejected)")
KL = re.compile(r"(train/)?kl")
SUM_FROM = 1000.0
"""From this size on it is no mean: ten times the level at which the largest single logit is a warning."""

VOCABULARY, POSITIONS = 152_064, 1024
"""The example: a log says neither. Qwen 2.5's output matrix, and a usual length."""


def notes(raw: Raw) -> Iterator[str]:
    """Sentences for the report, none where no column of the log's rows is such a sum."""
    largest = {name: value for name in raw.columns() if (value := _largest(raw, name)) is not None}
    summed = {name: v for name, v in largest.items() if LOGITS.fullmatch(name) and abs(v) >= SUM_FROM}
    for name, value in summed.items():
        mean = value / (VOCABULARY * POSITIONS)
        yield (
            f"{name} of this size ({value:,.0f}) is a sum over the tensor, padding included, and no logit: at "
            f"vocabulary {VOCABULARY:,} and {POSITIONS:,} positions, for example (the log says neither), the mean is "
            f"about {mean:.2g}. Whether logits grow it does not show"
        )
    for name, value in largest.items() if summed else ():
        if KL.fullmatch(name):
            yield (
                f"{name} (up to {value:.4g}) is in LLaMA-Factory's logs the sum over the micro-batches and over the "
                "steps between two lines, and no mean: it grows with both (trl logs the mean)"
            )


def _largest(raw: Raw, name: str) -> float | None:
    """The finite value of the largest size in one of the columns that may be sums."""
    if not (LOGITS.fullmatch(name) or KL.fullmatch(name)):
        return None
    values = (v for row in raw.rows if (v := real(row.get(name))) is not None and math.isfinite(v))
    return max(values, key=abs, default=None)

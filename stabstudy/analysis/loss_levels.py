"""The levels that a trial's loss is judged by: its moving mean, the untrained model's loss, the entropy of tokens."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.study import Study
from stabstudy.stability.divergence import moving_means
from stabstudy.store import StoreError
from stabstudy.trace import Rows


@dataclass(frozen=True)
class LossLevels:
    """Of one trial, in the unit of its loss."""

    steps: int  # over which the moving mean goes: factor 2 / (steps + 1)
    mean: NDArray[np.float64]  # [rows], after each row; NaN before the first loss
    start: float | None  # what divergence is measured from
    start_name: str
    unigram: float | None  # entropy of single tokens (H1); None: not known, or of no meaning for the objective

    @property
    def lines(self) -> list[tuple[str, float]]:
        """Name and height of each level that does not change."""
        levels = [(self.start_name, self.start), ("single tokens (H1)", self.unigram)]
        return [(name, float(value)) for name, value in levels if value is not None and math.isfinite(value)]


def loss_levels(study: Study, trial_id: str, rows: Rows) -> LossLevels:
    """Those of a trial of a study, from its `rows` and what was measured of its data and initial weights."""
    row = study.row(trial_id)
    owner, own = study.owner(trial_id)
    unigram = None
    with contextlib.suppress(StoreError):
        unigram = owner.folder.trial(own).read_state().unigram_entropy
    finite = rows["loss"][np.isfinite(rows["loss"])]
    first = float(finite[0]) if len(finite) else None
    start, name = (row["init_loss"], "untrained model") if row["init_loss"] is not None else (first, "first loss")
    kto = row["objective.kind"] == "kto"
    mean = moving_means(rows, study.rules)
    return LossLevels(study.rules.ema_steps, mean, start, "at the start" if kto else name, None if kto else unigram)

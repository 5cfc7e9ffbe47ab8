"""Is it the batch? Spikes of several trials at a step for which they read the same tokens.

A batch is a pure function of the seed and the step, so trials of one seed, data, sequence length and batch size read
the same tokens at the same step whatever else differs. A spike is the meeting of a batch with a state of the weights;
where several states spike at one batch, the batch is the suspect (equal seeds also mean equal initial weights, for
equal shapes). The measure of chance are trials whose settings of the data are the same and whose seeds differ: they
train as far and as roughly, and read other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]

STREAM = ("data_fingerprint", "data.seq_len", "data.validation_share", "train.batch_size")
"""Beside the seed, all that a batch depends on."""

COLUMNS = ("seed", "step", "spiked", "read", "peak_ratio", "trials")


@dataclass(frozen=True)
class SharedBatches:
    """Steps at which trials that read the same batch spiked together, and how often pairs of trials do.

    Attributes:
        steps: A row for each seed's step at which a spike of the gradient norm began in two or more trials that read
            the same batch: `seed`, `step`, how many `spiked` of those that `read` it, the highest `peak_ratio`, and
            their ids (`trials`). Most trials first, then the highest.
        same_pairs, same_met: Pairs of trials with the same batches, and those of them with a spike at a common step.
        other_pairs, other_met: The same of pairs that differ in the seed, so in every batch.
    """

    steps: pd.DataFrame
    same_pairs: int
    same_met: int
    other_pairs: int
    other_met: int


def shared_batches(trials: pd.DataFrame, spikes: pd.DataFrame) -> SharedBatches:
    """Of the trials that have a record (rows of `Study.trials`), with their spikes (rows of `Study.spikes`).

    Trials whose seed is not known are left out.
    """
    read = trials[(trials["steps_done"].fillna(0) > 0) & trials["seed"].notna()]
    own = spikes[(spikes["series"] == "grad") & spikes["trial_id"].isin(read.index)]
    stream = read.groupby(list(STREAM), dropna=False).ngroup()
    batches = read.groupby([*STREAM, "seed"], dropna=False).ngroup()
    a, b = _met(own, {str(trial_id): i for i, trial_id in enumerate(read.index)})
    alike = stream.to_numpy()[a] == stream.to_numpy()[b]
    same = batches.to_numpy()[a] == batches.to_numpy()[b]
    pairs = {"stream": _pairs(stream), "batches": _pairs(batches)}
    return SharedBatches(
        pd.DataFrame(_rows(read, own, batches), columns=list(COLUMNS)),
        same_pairs=pairs["batches"],
        same_met=int(same.sum()),
        other_pairs=pairs["stream"] - pairs["batches"],
        other_met=int((alike & ~same).sum()),
    )


def _met(spikes: pd.DataFrame, place: Mapping[str, int]) -> tuple[Ints, Ints]:
    """The places of the first and the second of each pair of trials with a spike that began at a common step."""
    at = np.array([place[t] for t in spikes["trial_id"]], dtype=np.int64)
    steps, column = np.unique(spikes["start"].to_numpy(np.int64), return_inverse=True)
    began = sparse.csr_matrix((np.ones(len(at)), (at, column)), shape=(len(place), len(steps)))
    met = sparse.triu(began @ began.T, k=1).tocoo()
    return met.row, met.col


def _rows(read: pd.DataFrame, spikes: pd.DataFrame, batches: pd.Series) -> list[dict[str, Any]]:
    """The rows of `SharedBatches.steps`."""
    lengths = dict(iter(read["steps_done"].groupby(batches)))
    rows = []
    step: Any
    for (_, step), begun in spikes.groupby([spikes["trial_id"].map(batches), "start"]):
        ids = sorted(set(begun["trial_id"]))
        if len(ids) > 1:
            readers = int((lengths[batches[ids[0]]] > step).sum())
            found = {"seed": int(read["seed"][ids[0]]), "step": int(step), "spiked": len(ids), "read": readers}
            rows.append(found | {"peak_ratio": float(begun["peak_ratio"].max()), "trials": ids})
    return sorted(rows, key=lambda row: (-row["spiked"], -row["peak_ratio"], row["step"], row["seed"]))


def _pairs(groups: pd.Series) -> int:
    sizes = groups.value_counts()
    return int((sizes * (sizes - 1) // 2).sum())

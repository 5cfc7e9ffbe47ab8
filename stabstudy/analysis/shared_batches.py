"""The share of the batch in the roughness, the batches that lift the norm, and the spikes that they cause.

A batch is a pure function of the seed and the step, so trials of one seed, data, sequence length and batch size read
the same tokens at the same step whatever else differs (equal seeds are also equal initial weights, for equal shapes).
Everything here rests on one series for each trial:

    r = log x - m64     x: grad_norm, m64: median of log x over the (up to) 64 finite values before the step

that is, by how much a norm stands above what was usual for its own trial (`log_ratios`). Where r rises in several
trials at one batch, the batch is the cause; where it rises in one of them, the state of its weights is.

    share     mean correlation of r over pairs of trials that read the same batches, less that over pairs of trials of
              different seeds: the part of the variance of r that belongs to the batch (`batch_share`)
    effects   mean r of each batch (`batch_effects`)
    batch     of a spike: at the step where it starts, or where it peaks, the other trials stand at 1.5 times their
              medians or more (median of them; of an even number the lower of the two in the middle, so of two both do)
    sampling_noise  of a rough trial: more than half of its absolute flags are at such batches; of a spiky one, more
              than half of the spikes that its verdict counts are marked `batch`

Choices. A step counts where the detector judges it (12 finite values before); for correlations only where the window is
full: before that the median lags behind the fall of the norm that every trial begins with, and different seeds
correlate at 0.4. Rough and diverged trials have an r that is mostly their own: they are left out of share and effects,
unless it is their batches that make them rough. Rough ones are witnesses for others (where batches are small every
trial may be rough), diverged ones are not. A loss spike is marked by the norms of the others too: what is asked is the
batch. Trials with the same record number for number (a clip threshold that neither reaches) are one witness, not two.
What ingested runs read is not known.

Measured on 120 trials of two depths (H200, 1,200 steps): at a random step two calm witnesses are high in 0.15 % of
cases, two rough ones in 2 to 7 %; at the three steps that lift all calm trials most, two calm ones in 80 %.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabstudy.stability.detectors import jump
from stabstudy.stability.rules import Rules
from stabstudy.store import TrialFolder

STREAM = ("data_fingerprint", "data.seq_len", "data.validation_share", "train.batch_size")
"""Beside the seed, all that a batch depends on."""

HIGH = 1.5  # multiple of their medians at which the other trials stand at a batch that is the cause
LEAST_OTHERS = 2  # trials beside the one in question that read a batch; with fewer nothing is known
LEAST_STEPS = 32  # common to a pair, else its correlation is chance
LEAST_SD = 1e-3  # of r; a norm that does not vary correlates with nothing
MOST_TRIALS = 200  # of one stream whose pairs are correlated
KEPT = 50_000_000  # values of r in memory (200 MB); those of further trials are read again when asked for
BLOCK = 4096  # steps correlated at once

ENDS = ("start", "peak_step")
"""The steps of a spike whose batches are asked."""

EFFECTS = ("seed", "step", "log_ratio", "trials", "spikes", "trial_id", *STREAM)

Row = Mapping[str, Any]
Item = TypeVar("Item")
Floats = NDArray[np.float64]
Ratio = NDArray[np.float32]


@dataclass(frozen=True)
class BatchShare:
    """The part of the variance of r that belongs to the batch, and what it is made from; null where there is no pair.

    Attributes:
        share: `same` - `other`.
        same, same_pairs: Mean correlation over pairs of trials that read the same batches, and their number.
        other, other_pairs: Likewise of trials whose seeds differ and whose data, sequence length and batch size do
            not: what trials have in common without the batch, such as the warmup.
        reason: Why there is no share; null where there is one.
    """

    share: float | None
    same: float | None
    same_pairs: int
    other: float | None
    other_pairs: int
    reason: str | None


class Ratios:
    """`log_ratios` by trial_id, read when first asked for."""

    def __init__(self, norm: Callable[[str], Floats], rules: Rules):
        self.norm, self.rules = norm, rules  # norm: grad_norm of a trial, [steps], NaN where there is no value
        self._kept: dict[str, Ratio] = {}
        self._room = KEPT

    @staticmethod
    def of_parts(parts: Mapping[str, Ratios]) -> Ratios:
        """Those of trials named <part>/<trial_id>; of at least one part."""
        return Ratios(functools.partial(_norm_of_part, parts), next(iter(parts.values())).rules)

    def __reduce__(self) -> tuple[Any, ...]:
        return Ratios, (self.norm, self.rules)  # workers read what they need

    def __call__(self, trial_id: str) -> Ratio:
        """Shape [steps]."""
        if trial_id in self._kept:
            return self._kept[trial_id]
        ratios = log_ratios(self.norm(trial_id), self.rules)
        if len(ratios) <= self._room:
            self._kept[trial_id] = ratios
            self._room -= len(ratios)
        return ratios

    def full(self, trial_id: str) -> Ratio:
        """The same with NaN where the window of the median is not full."""
        ratios = self(trial_id)
        first = self.rules.window - self.rules.fill
        return np.where(np.cumsum(np.isfinite(ratios)) > first, ratios, np.float32(np.nan))


def _norm_of_part(parts: Mapping[str, Ratios], trial_id: str) -> Floats:
    part, _, rest = trial_id.partition("/")
    return parts[part].norm(rest)


def log_ratios(norm: Floats, rules: Rules) -> Ratio:
    """r of each step, shape [steps]; NaN where the norm is not finite, or fewer than 12 finite values came before."""
    positive = np.flatnonzero(np.isfinite(norm) & (norm > 0))
    y = pd.Series(np.log(norm[positive]))
    usual = y.shift(1).rolling(rules.window, min_periods=rules.fill).median()
    ratios = np.full(len(norm), np.nan, np.float32)
    ratios[positive] = y - usual
    return ratios


def mark(trials: Sequence[dict[str, Any]], spikes: Sequence[dict[str, Any]], ratios: Ratios) -> None:
    """Fill `batch` of each spike and `sampling_noise` of each trial (rows of the tables), in place.

    Null is not known: under two other trials read the batch, or what was read is not known. Only records of trials
    that read the same batches as one with a spike, or as a rough one, are read.
    """
    own: dict[str, list[dict[str, Any]]] = {row["trial_id"]: [] for row in trials}
    for row in trials:
        row["sampling_noise"] = None
    for spike in spikes:
        spike["batch"] = None
        own[spike["trial_id"]].append(spike)
    for readers in _readers(trials).values():
        if len(readers) > LEAST_OTHERS:
            _mark_readers(readers, own, ratios)


def batch_share(trials: Sequence[Row], ratios: Ratios) -> BatchShare:
    """Of trials that are neither rough nor diverged, or rough by their batches (rows of the tables, marked).

    Of more than `MOST_TRIALS` of a stream an even choice is correlated, two or more of each seed that it includes.
    """
    same: list[float] = []
    other: list[float] = []
    for seeds in _streams(_calm(trials)):
        chosen = _evenly(seeds, MOST_TRIALS // 2)
        series = [
            (i, r)
            for i, ids in enumerate(chosen)
            for r in _distinct(ratios.full(t) for t in _evenly(ids, MOST_TRIALS // len(chosen)))
        ]
        seed, (a, b) = np.array([i for i, _ in series]), np.triu_indices(len(series), 1)
        c = _correlations([r for _, r in series])[a, b]
        finite, alike = np.isfinite(c), seed[a] == seed[b]
        same += c[finite & alike].tolist()
        other += c[finite & ~alike].tolist()
    reason = None
    if not any(_readers(trials)):
        reason = "it is not known what the trials read"
    elif not same:
        reason = (
            f"no two calm trials read the same batches for {LEAST_STEPS} steps behind the first {ratios.rules.window}"
        )
    elif not other:
        reason = "one seed alone, so nothing tells what trials have in common without the batch"
    means = [float(np.mean(c)) if c else None for c in (same, other)]
    share = None if means[0] is None or means[1] is None else means[0] - means[1]
    return BatchShare(share, means[0], len(same), means[1], len(other), reason)


def batch_effects(trials: Sequence[Row], spikes: Iterable[Row], ratios: Ratios) -> pd.DataFrame:
    """A row for each batch that two or more calm trials read (see `batch_share`), highest mean first.

    Columns: `seed` and `step`; `log_ratio`, the mean of r, and over how many `trials`; how many `spikes` of any trial
    and series that read it start or peak there; `trial_id`, one of those that read it, to ask `Study.batch` for its
    text; and what else makes the batch (`STREAM`).
    """
    tables = []
    at = _spike_steps(spikes)
    readers = _readers(trials)
    for key, rows in _readers(_calm(trials)).items():
        steps = max(row["steps_done"] for row in rows)
        total, number = np.zeros(steps), np.zeros(steps, np.int64)
        for row in rows:
            r = ratios(row["trial_id"])[:steps]
            number[: len(r)] += np.isfinite(r)
            total[: len(r)] += np.nan_to_num(r, nan=0.0)
        began = np.zeros(steps, np.int64)
        for row in readers[key]:
            np.add.at(began, [s for s in at.get(row["trial_id"], []) if s < steps], 1)
        longest = max(rows, key=lambda row: int(row["steps_done"]))
        step = np.flatnonzero(number > 1)
        columns = {"seed": key[-1], "step": step, "log_ratio": total[step] / number[step], "trials": number[step]}
        columns |= {"spikes": began[step], "trial_id": longest["trial_id"], **{n: longest[n] for n in STREAM}}
        tables.append(pd.DataFrame(columns, columns=list(EFFECTS)))
    if not tables:
        return pd.DataFrame(columns=list(EFFECTS))
    order = ["log_ratio", *EFFECTS[:2], *STREAM]
    return pd.concat(tables).sort_values(order, ascending=[False, *[True] * 6], kind="stable", ignore_index=True)


def sequences(trial: TrialFolder, step: int, cache_dir: str | Path | None = None) -> pd.DataFrame:
    """What a step of a trial of our own read, a row per sequence: see `Study.batch`. It reads the data again."""
    from stabstudy.data import step_texts  # here and not above: all other questions do without

    config, body = trial.read_own()
    cache = None if cache_dir is None else Path(cache_dir)
    read = step_texts.text_of_step(config, step, body["data_fingerprint"], cache)
    rows = [(s.start, s.documents[0], len(s.documents), s.text) for s in read]
    return pd.DataFrame(rows, columns=["start", "document", "documents", "text"])


def kept_sequences(trial: TrialFolder, step: int) -> list[tuple[int, str]]:
    """The first document and the text of each sequence of a step, from the token cache alone; no network, no torch.

    Raises DataError where the cache or the tokenizer is not there.
    """
    from stabstudy.data import step_texts

    config, body = trial.read_own()
    return [(s.documents[0], s.text) for s in step_texts.kept_text_of_step(config, step, body["data_fingerprint"])]


@dataclass(frozen=True)
class _Witnesses:
    """r of trials that read the same batches, at some steps."""

    steps: NDArray[np.int64]  # sorted
    record: Mapping[str, int]  # by trial_id: equal for equal records
    ratios: Mapping[int, Floats]  # by record, [steps]; those of diverged trials are left out

    def high(self, trial_id: str, steps: Sequence[int]) -> list[bool | None]:
        """For each step whether the other trials stand at `HIGH` times their medians; None where they are too few."""
        others = [r for record, r in self.ratios.items() if record != self.record[trial_id]]
        r = np.sort(np.array(others).reshape(-1, len(self.steps))[:, np.searchsorted(self.steps, steps)], axis=0)
        counts = np.isfinite(r).sum(axis=0)  # not finite is NaN, which is sorted last
        column = zip(r.T.tolist(), counts.tolist(), strict=True)
        return [values[(n - 1) // 2] >= math.log(HIGH) if n >= LEAST_OTHERS else None for values, n in column]


def _witnesses(readers: Sequence[Row], steps: NDArray[np.int64], ratios: Ratios) -> _Witnesses:
    record: dict[str, int] = {}
    at_steps: dict[int, Floats] = {}
    for row in readers:
        r = ratios(row["trial_id"])
        record[row["trial_id"]] = hash(r.tobytes())
        if row["verdict"] != "diverged":
            padded = np.r_[r, np.nan]
            at_steps[record[row["trial_id"]]] = padded[np.minimum(steps, len(r))]
    return _Witnesses(steps, record, at_steps)


def _mark_readers(
    readers: Sequence[dict[str, Any]], spikes: Mapping[str, Sequence[dict[str, Any]]], ratios: Ratios
) -> None:
    """`mark` for trials that read the same batches."""
    rough = [row["trial_id"] for row in readers if row["verdict"] == "rough"]
    absolute = {t: np.flatnonzero(jump(ratios.norm(t), ratios.rules, "grad").absolute).tolist() for t in rough}
    ends = {row["trial_id"]: [s[end] for s in spikes[row["trial_id"]] for end in ENDS] for row in readers}
    steps = set(itertools.chain(*absolute.values(), *ends.values()))
    if not steps:
        return
    witnesses = _witnesses(readers, np.array(sorted(steps)), ratios)
    for row in readers:
        trial_id, own = row["trial_id"], spikes[row["trial_id"]]
        at_ends = iter(witnesses.high(trial_id, ends[trial_id]))
        for spike in own:
            high = [next(at_ends) for _ in ENDS]
            spike["batch"] = True if True in high else None if None in high else False
        if row["verdict"] == "rough":
            row["sampling_noise"] = _most(witnesses.high(trial_id, absolute[trial_id]))
        elif row["verdict"] == "spiky":
            # those that the verdict counts
            row["sampling_noise"] = _most([s["batch"] for s in own if s["series"] == "loss" or s["part"] != "surprise"])


def _most(answers: Sequence[bool | None]) -> bool | None:
    """Whether more than half are true; null where those that are not known decide."""
    yes, unknown = answers.count(True), answers.count(None)
    if 2 * yes > len(answers):
        return True
    return None if 2 * (yes + unknown) > len(answers) else False


def _correlations(series: Sequence[Ratio]) -> Floats:
    """[n, n] correlation of each two over the steps that both have; NaN where these are few, or one does not vary."""
    size, steps = len(series), max((len(r) for r in series), default=0)
    n, total, square, product = (np.zeros((size, size)) for _ in range(4))
    for start in range(0, steps, BLOCK):
        x = np.full((size, min(BLOCK, steps - start)), np.nan)
        for row, r in zip(x, series, strict=True):
            part = r[start : start + BLOCK]
            row[: len(part)] = part
        there = np.isfinite(x).astype(np.float64)
        x = np.nan_to_num(x, nan=0.0)
        n += there @ there.T
        total += x @ there.T  # of the row's series, over the steps that the column's has too
        square += (x * x) @ there.T
        product += x @ x.T
    variance = n * square - total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        c = (n * product - total * total.T) / np.sqrt(variance * variance.T)
    varies = variance > (LEAST_SD * n) ** 2
    return np.where((n >= LEAST_STEPS) & varies & varies.T, c, np.nan)


def _calm(trials: Iterable[Row]) -> list[Row]:
    """Those whose r is not mostly their own; one that was stopped early may be rough without a verdict that says so."""
    calm = [row for row in trials if row["verdict"] not in ("rough", "diverged") or row["sampling_noise"]]
    return [row for row in calm if row.get("state") != "stopped"]


def _readers(trials: Iterable[Any]) -> dict[tuple[Any, ...], list[Any]]:
    """(*STREAM, layout, seed) -> the trials that read these batches, by trial_id."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in sorted(trials, key=lambda row: str(row["trial_id"])):
        layout = row.get("data.layout")  # of prompts with completions; older tables have none
        key = (*(row[name] for name in STREAM), layout, row["seed"])
        if row["log_format"] is None and row["steps_done"] and key[0] is not None and key[-1] is not None:
            groups.setdefault(key, []).append(row)
    return groups


def _streams(trials: Iterable[Row]) -> list[list[list[str]]]:
    """For each stream and each of its seeds the trial_ids, all in order."""
    streams: dict[tuple[Any, ...], dict[int, list[str]]] = {}
    for key, rows in _readers(trials).items():
        streams.setdefault(key[:-1], {})[key[-1]] = [row["trial_id"] for row in rows]
    return [[ids for _, ids in sorted(seeds.items())] for seeds in streams.values()]


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, at even distances."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]


def _distinct(series: Iterable[Ratio]) -> list[Ratio]:
    return list({r.tobytes(): r for r in series}.values())


def _spike_steps(spikes: Iterable[Row]) -> dict[str, list[int]]:
    """trial_id -> the steps at which its spikes start or peak, a step twice for two spikes."""
    at: dict[str, list[int]] = {}
    for spike in spikes:
        at.setdefault(spike["trial_id"], []).extend({spike[end] for end in ENDS})
    return at

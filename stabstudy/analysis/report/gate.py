"""Gate for CI between a study and its baseline.

Two trials are partners where they have the same seed, the same data and the same level of everything that varies within
one of the studies. What differs between the studies and within none (a setting, or the code) is what is judged.

    worse   a claim that the new study is worse, by the rule of every claim of a report: over all partners a statistic
            rose with p < .05, corrected (Holm) for the STATISTICS (`study_statistics.study_effects`)
    rough   a trial of the new study, of whatever seed, is spiky, rough or diverged in a cell in which the baseline was
            stable: every trial of the baseline in that cell is done and stable

`worse` is about the whole, and passes chance: of 400 pairs of studies that differ by nothing it fails under .01, and
.04 where every axis acts differently by seed as much as a trial scatters; it sees twice the roughness in six cells of
two seeds (`tests/test_gate.py`). Known weakness: where the study alone acts so (a change of the initial weights, say,
gives every seed another start), it fails .11 to .14 of them. `rough` is about each cell: one trial is enough, so where
verdicts are a matter of chance it fails by chance. Of kto the margin of rewards is not tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, study_statistics, words
from stabstudy.analysis.compare import Refused
from stabstudy.analysis.effects import CLEAR
from stabstudy.analysis.levels import Level, keys, records
from stabstudy.analysis.report import comparison_page
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import STUDY
from stabstudy.config import setting_names
from stabstudy.stability.verdict import VERDICTS

RANK = "verdict_rank"
"""The column of the verdict as a number, stable 0 to diverged 3; null where there is no verdict."""

STATISTICS = ("final_loss", "spike_abs_rate", "grad_norm_log_sd", RANK)
"""What `worse` tests; of each, more is worse. A diverged trial has the loss of the untrained model."""

MOST_LISTED = 20
"""Trials that are listed one by one."""


@dataclass(frozen=True)
class Gate:
    """The answer. `lines`: the evidence, a line each; `conclusion`: the last line, with the numbers.

    `unfinished`: trials of the new study that are not done, or damaged ones of either: what passes, passes in part.
    """

    kind: str
    passed: bool
    lines: tuple[str, ...]
    conclusion: str
    unfinished: int


@dataclass(frozen=True)
class Pair:
    """The trials of both studies in the cells that both hold, as `Study.concat` has them, and `verdict_rank`."""

    trials: pd.DataFrame
    axes: Mapping[str, Sequence[Level]]  # of both as one: the study, and whatever varies within either
    old: str
    new: str

    @property
    def cell(self) -> list[str]:
        """The columns in which trials of one cell are equal, in either study."""
        return [*(a for a in self.axes if a != STUDY), "data_fingerprint"]

    def of(self, study: str) -> pd.DataFrame:
        return self.trials[self.trials[STUDY] == study]


def judge(new: Study, old: Study, kind: str) -> Gate:
    """The gate of this kind, `worse` or `rough`. Raises Refused where there is nothing to compare, or it may not be."""
    pair = paired(new, old)
    passed, lines, reason = (worse if kind == "worse" else rough)(pair)
    unfinished = int((new.trials["state"] != "done").sum()) + len(new.damaged) + len(old.damaged)
    part = f" in part ({words.count(unfinished, 'trial')} not done or damaged)" if passed and unfinished else ""
    conclusion = f"gate {'passed' if passed else 'failed'}{part} ({kind}): {reason}"
    return Gate(kind, passed, (*_settings(pair), *lines), conclusion, unfinished)


def paired(new: Study, old: Study) -> Pair:
    """Both studies. Raises Refused where they have no cell in common, or their verdicts have other rules."""
    names = [old.name, new.name] if old.name != new.name else ["baseline", "new"]
    whole = Study.concat([old, new], names)
    pair = Pair(ranked(whole.trials), whole.axes, *names)
    if pair.trials["detector_id"].nunique() > 1:
        raise Refused("the rules for spikes differ (detector_id), so verdicts cannot be compared")
    shared = pair.trials.groupby(pair.cell, dropna=False)[STUDY].transform("nunique") > 1
    if not shared.any():
        reasons = [*comparison_page.disjoint(whole), *comparison_page.warnings(whole)]
        raise Refused(" ".join([f"no cell of {pair.new} is in {pair.old}, with the same data.", *reasons]))
    return replace(pair, trials=pair.trials[shared])


def ranked(trials: pd.DataFrame) -> pd.DataFrame:
    """The trials with their verdict as a number."""
    ranks = {verdict: float(rank) for rank, verdict in enumerate(VERDICTS)}
    return trials.assign(**{RANK: trials["verdict"].map(ranks).astype("float64")})


def _settings(pair: Pair) -> Iterator[str]:
    """The settings that differ between the studies and within none."""
    names = [name for name in setting_names() if name != "seed"]
    apart = study_statistics.settings_apart(pair.trials, [pair.old, pair.new], names)
    for name, (old, new) in apart.items():
        yield f"differs: {name} {words.level(old, name)} in {pair.old}, {words.level(new, name)} in {pair.new}"


def worse(pair: Pair) -> tuple[bool, list[str], str]:
    """Whether no statistic is worse by a claim; a line for each; the reason. Raises Refused."""
    partner = ["seed", *pair.cell]
    done = pair.trials[(pair.trials["state"] == "done") & pair.trials["seed"].notna()]
    trials = done[done.groupby(partner, dropna=False)[STUDY].transform("nunique") > 1]
    if trials.empty:
        raise Refused(f"no done trial of {pair.new} has a partner of the same cell and seed in {pair.old}")
    groups = trials.groupby(partner, dropna=False)
    if (groups["eval_hash"].nunique() > 1).any():
        raise Refused("the evaluation sets differ (eval_hash), so losses cannot be compared")
    rows = study_statistics.study_effects(trials, pair.axes, STATISTICS)
    tested = sum(row["p"] is not None for row in rows)
    rows = [_none(row) if row["p"] is None and _equal(groups, row["metric"]) else row for row in rows]
    unknown = {_name(row): str(row["note"]) for row in rows if row["p"] is None}
    if unknown and not tested:
        raise Refused(f"nothing that differs can be tested: {'; '.join(dict.fromkeys(unknown.values()))}")
    left_out = f", not tested: {words.listing([*unknown])}" if unknown else ""
    family = f"Holm over {words.count(tested, 'statistic')}{left_out}"
    pairs, seeds = words.count(groups.ngroups, "pair"), words.count(trials["seed"].nunique(), "seed")
    passed, reason = _reading(rows, pair)
    return passed, [_line(row, trials) for row in rows], f"{reason} ({family}; {pairs} of trials, {seeds})"


def _reading(rows: Sequence[Mapping[str, Any]], pair: Pair) -> tuple[bool, str]:
    higher = [row for row in rows if row["p_holm"] is not None and _rose(row)]
    claims = [_change(row, pair.trials) for row in higher if row["p_holm"] < CLEAR]
    if claims:
        return False, f"{pair.new} is worse than {pair.old} in {words.listing(claims)}"
    least = min((row["p_holm"] for row in higher), default=None)
    p = "no statistic is higher" if least is None else f"least p of one that is higher {words.number(least, 2)}"
    return True, f"no claim that {pair.new} is worse than {pair.old}: {p}"


def _equal(groups: Any, metric: str) -> bool:
    """Whether both trials of every pair have the same value: then there is no scatter to test against, and no need."""
    return bool((groups[compare.column(metric)].nunique(dropna=False) == 1).all())


def _none(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a statistic that is equal in every pair."""
    neutral = 0.0 if row["scale"] == "difference" else 1.0
    return {**row, **dict.fromkeys(("estimate", "low", "high"), neutral), "p": 1.0, "p_holm": 1.0}


def _rose(row: Mapping[str, Any]) -> bool:
    return bool(row["estimate"] > (0 if row["scale"] == "difference" else 1))


def _line(row: Mapping[str, Any], trials: pd.DataFrame) -> str:
    if row["p"] is None:
        return f"{_name(row)}: not tested ({row['note']})"
    reading = "no difference found" if row["p_holm"] >= CLEAR else "worse" if _rose(row) else "better"
    counts = f" ({_verdicts(trials)})" if row["metric"] == RANK else ""
    return f"{_change(row, trials)}: {reading}{counts}"


def _verdicts(trials: pd.DataFrame) -> str:
    return "; ".join(f"{study}: {_counts(own)}" for study, own in trials.groupby(STUDY))


def _counts(trials: pd.DataFrame) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in compare.verdicts(trials).items() if n)


def _change(row: Mapping[str, Any], trials: pd.DataFrame) -> str:
    """`roughness ×1.9 [1.4, 2.5], p 0.002`."""
    change = words.change(row, unit=row["metric"] != RANK, nats=compare.in_nats(trials))
    return f"{_name(row)} {change}, p {words.number(row['p_holm'], 2)}"


def _name(row: Mapping[str, Any]) -> str:
    return words.STATISTICS.get(row["metric"], "verdict (stable 0 to diverged 3)")


def rough(pair: Pair) -> tuple[bool, list[str], str]:
    """Whether no trial is rough where the baseline was stable; a line for each that is; the reason. Raises Refused."""
    old, new = pair.of(pair.old), pair.of(pair.new)
    stable = (old["state"] == "done") & (old["verdict"] == "stable")
    calm = set(keys(old, pair.cell)) - set(keys(old[~stable], pair.cell))
    held = new[[cell in calm for cell in keys(new, pair.cell)]]
    if held.empty:
        raise Refused(f"no cell of {pair.new} is one in which every trial of {pair.old} is done and stable")
    bad = held[held["verdict"].isin(VERDICTS[1:])]
    lines = [_trial(row, pair) for row in records(bad.reset_index())[:MOST_LISTED]]
    lines += [f"and {len(bad) - MOST_LISTED} more"] if len(bad) > MOST_LISTED else []
    cells, unknown = len(set(keys(bad, pair.cell))), int(held["verdict"].isna().sum())
    of = f"of {words.count(len(held), 'trial')} of {pair.new}"
    where = f"{words.count(len(calm), 'cell')} in which {pair.old} was stable"
    where += f"; {words.count(unknown, 'trial')} without a verdict" if unknown else ""
    if len(bad):
        return False, lines, f"{_counts(bad)} {of}, in {cells} of {where}"
    return True, lines, f"none {of} is spiky, rough or diverged in {where}"


def _trial(row: Mapping[str, Any], pair: Pair) -> str:
    noise = ", by sampling noise" if row["sampling_noise"] else ""
    names = [*(a for a in pair.axes if a != STUDY), "seed"]
    own = str(row["trial_id"]).partition("/")[2]
    return f"{own} {row['verdict']}{noise}: {words.at_levels(names, [row[name] for name in names])}"

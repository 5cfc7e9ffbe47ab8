"""The recipe that a study supports under each of its conditions, what ties with it, and how far it lies from trouble.

Axes are *conditions*, which are given (the size of the model, data, length, steps, precision), or *knobs*, which can be
chosen. There is one recipe for each combination of conditions and never one that says "use depth 2". Only what a study
tried is recommended: a cell whose every seed is stable, all seeds of the study being there. Of those the one of least
mean final loss and every one that the model of `effects` cannot tell from it are tied, and of the tied ones that with
the widest margin to instability is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stabstudy import config as cfg
from stabstudy.analysis import compare, effects, words
from stabstudy.analysis.levels import Level, at_level, levels_of, ordered, records, split
from stabstudy.analysis.paired import Estimate
from stabstudy.analysis.study import Study
from stabstudy.stability.verdict import VERDICTS

Settings = Mapping[str, Any]
"""Every setting of a trial under its dotted name, as in trials.parquet."""

LR = "optim.lr"

GIVEN = (
    *("model", "model.family", "model.depth", "model.dim", "model.n_heads", "model.n_kv_heads"),
    *("model.ffn_multiplier", "model.multiple_of", "data", "train.steps", "train.precision"),
    *("train.batch_size", "train.eval_sequences", "train.final_eval_tokens"),
)
"""Axes that are conditions unless a sweep's `conditions` says otherwise; and every setting of the data."""

MARGIN_STEPS = 200  # evaluable steps from which a sentence on a margin is made
MOST_TIES = 4
"""Tied cells that a sentence names."""

TIED = 0.05  # adjusted p-value from which two cells are not told apart


@dataclass(frozen=True)
class Margin:
    """What larger learning rates did, all else equal; None where the learning rate does not vary."""

    lr: float
    stable_to: float  # largest rate such that at it and every tried one below it, from `lr` on, every trial is stable
    unstable_at: float | None  # smallest larger rate with an unstable trial; None: none seen
    unstable: tuple[int, int]  # trials at `unstable_at` that are not stable, of how many
    evaluable: int  # fewest evaluable steps of the trials it rests on

    @property
    def width(self) -> tuple[float, float]:
        """Ends of the margin in multiples of `lr`, on the log scale: known to hold, known to fail (inf: not seen)."""
        return math.log(self.stable_to / self.lr), math.log((self.unstable_at or math.inf) / self.lr)


@dataclass(frozen=True)
class Recipe:
    """A cell worth using."""

    cell_id: str
    given: dict[str, Level]  # the conditions
    levels: dict[str, Level]  # of the knobs
    settings: Settings
    loss: Estimate  # final_loss_capped over its seeds, nat/token
    candidates: int  # cells of these conditions whose every seed is stable
    ties: tuple[dict[str, Level], ...]  # knobs of the candidates that cannot be told from the best; not of this one
    margin: Margin | None
    ends: dict[str, str]  # numeric knobs whose level here is the `smallest` or the `largest` tried
    eval_tokens: int | None  # tokens that the final losses rest on; None: not known


def conditions(study: Study) -> list[str]:
    """The axes that are given: those that the sweep names, else GIVEN and the data.

    The batch size is one unless the question asks about it. Data are always one: losses on different data do not
    compare.
    """
    named = study.provenance.get("conditions")
    chosen = set(named) if isinstance(named, list) else set(GIVEN)
    if not isinstance(named, list) and "batch" in study.question.lower():
        chosen.discard("train.batch_size")
    return [a for a in study.axes if a in chosen or a == "data" or a.startswith("data.")]


def recipes(study: Study) -> list[Recipe]:
    """A recipe for each combination of conditions that has one, in the order of their levels.

    Losses on different evaluation sets do not compare: where they differ for another reason than a condition, there is
    no recipe, as where no cell has all seeds of the study and is stable in each.
    """
    given = conditions(study)
    parts = split(study.trials, {a: study.axes[a] for a in given})
    chosen = (
        _best(study, dict(zip(given, levels, strict=True)), trials)
        for levels, trials in parts
        if trials.loc[trials["state"] == "done", "eval_hash"].nunique() == 1
    )
    return [recipe for recipe in chosen if recipe is not None]


def why_none(study: Study) -> str:
    """Why a study has no recipe."""
    done = study.trials[study.trials["state"] == "done"]
    parts = [t for _, t in split(done, {a: study.axes[a] for a in conditions(study)})]
    if parts and all(t["eval_hash"].nunique() != 1 for t in parts):
        return "its losses were measured on different evaluation sets, or not at all"
    return "no cell has every seed of the study and is stable in each"


def _best(study: Study, given: dict[str, Level], trials: pd.DataFrame) -> Recipe | None:
    """The recipe among these trials, which share their conditions."""
    seeds = set(levels_of(trials["seed"]))
    cells = {str(c): members for c, members in trials.groupby("cell_id") if _is_stable(members, seeds)}
    losses = {c: compare.mean(members, "final_loss_capped") for c, members in cells.items()}
    known = sorted((c for c in cells if math.isfinite(losses[c].mean)), key=lambda c: (losses[c].mean, c))
    if not known:
        return None
    tied = _tied(cells, known)
    knobs = {c: _levels(study, cells[c], given) for c in tied}
    margins = {c: _margin(trials, knobs[c]) for c in tied}
    widths = {c: (-math.inf, -math.inf) if m is None else m.width for c, m in margins.items()}
    chosen = max(tied, key=lambda c: (widths[c], -losses[c].mean))
    row = records(cells[chosen].head(1))[0]
    return Recipe(
        cell_id=chosen,
        given=given,
        levels=knobs[chosen],
        settings={name: row[name] for name in cfg.setting_names() if name != "seed"},
        loss=losses[chosen],
        candidates=len(known),
        ties=tuple(knobs[c] for c in tied if c != chosen),
        margin=margins[chosen],
        ends={a: end for a, v in knobs[chosen].items() if (end := _end(v, study.grid.axes.get(a, [])))},
        eval_tokens=row["eval_tokens"],
    )


def _is_stable(members: pd.DataFrame, seeds: set[Level]) -> bool:
    """Whether the cell has all these seeds and is stable in each; what is rough by sampling noise counts as stable."""
    stable = (members["verdict"] == "stable") | _is_noise(members)
    return set(levels_of(members["seed"])) == seeds and bool(((members["state"] == "done") & stable).all())


def _tied(cells: Mapping[str, pd.DataFrame], known: Sequence[str]) -> list[str]:
    """The best of the cells, which are in the order of their loss, and those not distinguishable from it.

    The model is final_loss ~ seed + cell, with Holm's correction over all other cells; one seed tells nothing apart.
    """
    if len(known) < 2:
        return list(known)
    trials = pd.concat([cells[c].assign(cell=place) for place, c in enumerate(known)])
    table = effects.contrasts(trials, ["cell"], ["final_loss"])
    apart = {known[int(row["level"])] for row in records(table) if row["p_holm"] is not None and row["p_holm"] < TIED}
    return [c for c in known if c not in apart]


def _levels(study: Study, members: pd.DataFrame, given: Mapping[str, Level]) -> dict[str, Level]:
    row = records(members.head(1))[0]
    return {a: row[a] for a in study.axes if a not in given}


def _margin(trials: pd.DataFrame, levels: Mapping[str, Level]) -> Margin | None:
    """How far the learning rate can grow with all other knobs as they are, among trials of the same conditions."""
    if levels.get(LR) is None:
        return None
    for axis, level in levels.items():
        if axis != LR:
            trials = at_level(trials, axis, level)
    lr = stable_to = float(levels[LR])
    evaluable, unbroken = math.inf, True
    for rate in (v for v in levels_of(trials[LR]) if v >= lr):
        members = at_level(trials, LR, rate)
        evaluable = min(evaluable, float(members["n_evaluable"].min()))
        if bad := int((members["verdict"].isin(VERDICTS[1:]) & ~_is_noise(members)).sum()):
            return Margin(lr, stable_to, rate, (bad, len(members)), int(evaluable))
        unbroken = unbroken and _is_stable(members, set(levels_of(members["seed"])))
        stable_to = rate if unbroken else stable_to
    return Margin(lr, stable_to, None, (0, 0), int(evaluable))


def _is_noise(members: pd.DataFrame) -> pd.Series[bool]:
    """Which trials are rough or spiky by the noise of small batches."""
    return members["sampling_noise"].fillna(False).astype(bool)


def _end(level: Level, levels: Sequence[Level]) -> str:
    """`smallest` or `largest` where a number is that of those tried, null and booleans aside; else empty."""
    numbers = [v for v in levels if v is not None]
    if level is None or len(numbers) < 2 or not ordered(levels):
        return ""
    return {numbers[0]: "smallest", numbers[-1]: "largest"}.get(level, "")


def sentence(recipe: Recipe) -> str:
    """The recipe in words: its knobs, its loss, what ties with it, its margin and where the grid ends."""
    given = ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in recipe.given.items())
    knobs = _named(recipe.levels) or "these settings"
    loss = words.estimate(recipe.loss.mean, recipe.loss.low, recipe.loss.high, 4)
    rests = [words.count(recipe.loss.n, "seed")]
    if recipe.eval_tokens is not None:
        rests.append(f"{recipe.eval_tokens:,} evaluation tokens")
    parts = [f"final loss {loss} nat/token ({', '.join(rests)})", *_rivals(recipe), *_room(recipe)]
    return f"{f'For {given}: use' if given else 'Use'} {knobs}: {'; '.join(parts)}."


def _named(levels: Mapping[str, Level]) -> str:
    return ", ".join(f"{words.label(a)} {words.level(v, a)}" for a, v in levels.items())


def _rivals(recipe: Recipe) -> Iterator[str]:
    """How it compares with the other stable cells of its conditions."""
    stable = words.count(recipe.candidates, "stable cell")
    if recipe.ties:
        others = " or ".join(
            _named({a: v for a, v in t.items() if v != recipe.levels[a]}) for t in recipe.ties[:MOST_TIES]
        )
        more = f" or {len(recipe.ties) - MOST_TIES} more" if len(recipe.ties) > MOST_TIES else ""
        why = ", and of these the one with the widest margin" if recipe.margin else ""
        yield f"tied with {others}{more} (not distinguishable; {stable}){why}"
    elif recipe.candidates > 1:
        yield f"the lowest of {stable}"
    else:
        yield "the only stable cell"


def _room(recipe: Recipe) -> Iterator[str]:
    """The margin as an interval, and which of its levels stand at an end of what was tried."""
    m = recipe.margin
    if m is not None and m.evaluable < MARGIN_STEPS:
        yield f"no margin is claimed from trials of {m.evaluable} evaluable steps ({MARGIN_STEPS} are needed)"
    elif m is not None:
        held = f"stable at {words.number(m.stable_to / m.lr, 2)} times this learning rate" if m.stable_to > m.lr else ""
        if m.unstable_at is not None:
            times, (bad, n) = words.number(m.unstable_at / m.lr, 2), m.unstable
            lost = f"not at {times} times{'' if held else ' this learning rate'} ({bad} of {n} trials)"
            yield f"margin: {', '.join(p for p in (held, lost) if p)}"
        else:
            yield f"margin: {held}, the most tried" if held else "margin: not known, no larger learning rate was tried"
    for axis, end in recipe.ends.items():
        yield f"{words.level(recipe.levels[axis], axis)} is the {end} {words.label(axis)} tried"

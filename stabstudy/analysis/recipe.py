"""The recipe that a study supports under each of its conditions, what ties with it, and how far it lies from trouble.

Axes are *conditions*, which are given (the size of the model, data, length, steps, precision), or *knobs*, which can be
chosen. There is one recipe for each combination of conditions and never one that says "use depth 2". Only what a study
tried is recommended: a cell whose every seed is stable, all seeds of the study being there. Of those the one of least
mean final loss and every one that the model of `effects` cannot tell from it are tied. Of the tied ones that with the
widest margin to instability is chosen, unless its mean is so far above the best that it would count as
underperforming: where there is one seed, all are tied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from stabstudy import config as cfg
from stabstudy import wording
from stabstudy.analysis import compare, effects, words
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level, at_level, levels_of, ordered, plain, records, split
from stabstudy.analysis.paired import Estimate
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import FAILED
from stabstudy.state import ENDED

Settings = Mapping[str, Any]
"""Every setting of a trial under its dotted name, as in trials.parquet."""

LR, BATCH, STEPS = "optim.lr", "train.batch_size", "train.steps"

GIVEN = (
    *("study", "objective", "objective.kind", "objective.init_id", "data", "train"),
    *("model", "model.family", "model.depth", "model.dim", "model.n_heads"),
    *("model.n_kv_heads", "model.ffn_multiplier", "model.multiple_of", STEPS, BATCH, "train.precision"),
    *("train.eval_sequences", "train.final_eval_tokens"),
)
"""Axes that are conditions unless a sweep's `conditions` says otherwise; and every setting of the data."""

_ASKS_BATCH = re.compile(r"(?<![.-])\bbatch", re.IGNORECASE)
"""In a question that somebody wrote, not one that the program made of the axes."""

_READ = (
    *("cell_id", "seed", "state", "verdict", "verdict_reason", "sampling_noise", "n_evaluable"),
    *("eval_hash", "final_loss_capped"),
)
"""Columns that a choice is made from, beside the axes."""

TIED = 0.05
"""Adjusted p-value from which two cells are not told apart."""

MARGIN_STEPS = 200
"""Evaluable steps from which a sentence on a margin is made."""


@dataclass(frozen=True)
class Margin:
    """What larger learning rates did, all else equal, up to the largest that was tried."""

    lr: float
    stable_to: float  # largest rate such that at it and every tried one below it, from `lr` on, every trial is stable
    unstable_at: float | None  # smallest larger rate with an unstable trial; None: none seen
    unstable: tuple[int, int]  # trials at `unstable_at` that are not stable, of how many
    evaluable: int  # fewest evaluable steps of the stable trials it rests on
    tried_to: float  # largest rate that was tried

    @property
    def is_open(self) -> bool:
        """Whether all that was tried holds, in enough steps to say so: the limit lies beyond."""
        return self.stable_to == self.tried_to and self.evaluable >= MARGIN_STEPS

    @property
    def width(self) -> tuple[float, float]:
        """Decades from `lr` to what is known to hold, and to what is known to fail (inf: nothing is)."""
        ends = (self.stable_to, self.unstable_at or math.inf)
        return round(math.log10(ends[0] / self.lr), 9), round(math.log10(ends[1] / self.lr), 9)


@dataclass(frozen=True)
class Recipe:
    """A cell worth using."""

    cell_id: str
    given: dict[str, Level]  # the conditions
    levels: dict[str, Level]  # of the knobs
    settings: Settings
    loss: Estimate  # final_loss_capped over its seeds, nat/token
    noise: int  # its trials that are rough or spiky, by sampling noise
    candidates: int  # cells of these conditions that are stable with every seed, this one too
    incomplete: int  # cells that are stable as far as they go, and lack a seed or its loss
    ties: tuple[dict[str, Level], ...]  # knobs of the other candidates that cannot be told from the best
    near: int  # of these and this one, how many lie within 0.2 nat/token of the best, this one too
    widest: int  # of those, how many have the widest margin, this one too; 0: no margin is known
    margin: Margin | None  # None: the learning rate does not vary
    ends: dict[str, str] = field(default_factory=dict)  # knobs whose number here is the `smallest` or `largest` tried
    eval_tokens: int | None = None  # tokens that the final losses rest on; None: not known

    @property
    def unit(self) -> str:
        """Of its losses, behind a space; that of kto has none."""
        return "" if self.settings.get("objective.kind") == "kto" else " nat/token"


@dataclass(frozen=True)
class NoRecipe:
    """Conditions without a recipe, and why."""

    given: dict[str, Level]
    reason: str


def conditions(study: Study) -> list[str]:
    """The axes that are given: those that the sweep names (a group's name stands for its settings), else GIVEN.

    Data are always given: losses on different data do not compare. The batch size is not where the question asks about
    it, nor are the steps where they change with it, at equal tokens.
    """
    named = study.provenance.get("conditions")
    if isinstance(named, list):
        chosen = {a for a in study.axes if a in named or a.partition(".")[0] in named}
    else:
        asks = _ASKS_BATCH.search(study.question) and not wording.is_made(study.question, study.axes)
        chosen = set(GIVEN) - (_batch_axes(study) if asks else set())
    return [a for a in study.axes if a in chosen or a == "data" or a.startswith("data.")]


def _batch_axes(study: Study) -> set[str]:
    """The axes that belong to a question about the batch size."""
    sequences = study.grid.trials[BATCH] * study.grid.trials[STEPS]
    return {BATCH, STEPS} if sequences.nunique() == 1 else {BATCH}


def answers(study: Study) -> list[Recipe | NoRecipe]:
    """What to use under each combination of conditions, in the order of their levels."""
    if study.searched is not None:  # every seed is spent beside the edge: a cell there is the only complete one
        return [NoRecipe({}, f"{study.searched.bias}; a grid of values below it finds one")]
    given = conditions(study)
    parts = split(study.trials[[*_READ, *study.axes]], {a: study.axes[a] for a in given})
    return [_answer(study, dict(zip(given, levels, strict=True)), trials) for levels, trials in parts]


def recipes(study: Study) -> list[Recipe]:
    """A recipe for each combination of conditions that has one."""
    return [answer for answer in answers(study) if isinstance(answer, Recipe)]


def why_none(study: Study) -> str:
    """Why conditions have no recipe; empty where all have one."""
    return "; ".join(dict.fromkeys(answer.reason for answer in answers(study) if isinstance(answer, NoRecipe)))


def _answer(study: Study, given: dict[str, Level], trials: pd.DataFrame) -> Recipe | NoRecipe:
    """The recipe among these trials, which share their conditions."""
    seeds, ended = set(levels_of(trials["seed"])), _ended(trials)
    stable = {str(c): members for c, members in trials.groupby("cell_id") if _is_stable(members)}
    cells = {c: members for c, members in stable.items() if _is_complete(members, seeds)}
    if not cells:
        every = f"with all {len(seeds)} seeds, each trained" if len(seeds) > 1 else "and trained"
        return NoRecipe(given, f"no cell is stable {every} to its end")
    if len(hashes := levels_of(pd.concat(list(cells.values()))["eval_hash"])) > 1 or hashes == [None]:
        return NoRecipe(given, "the losses were measured on different evaluation sets, or not at all")
    losses = {c: compare.mean(members, "final_loss_capped") for c, members in cells.items()}
    ranked = sorted(cells, key=lambda c: (losses[c].mean, c))
    tied = _tied(study, cells, ranked)
    knobs = {c: _knobs(study, cells[c], given) for c in tied}
    near = [c for c in tied if losses[c].mean <= losses[ranked[0]].mean + STABLE_MARGIN]
    margins = {c: _margin(ended, knobs[c], trials) for c in near}
    widths = {c: (-math.inf, -math.inf) if m is None else m.width for c, m in margins.items()}
    chosen = max(near, key=lambda c: widths[c])  # of equally wide ones the first: they are in the order of their loss
    row, done = study.row(str(cells[chosen].index[0])), trials[trials["state"] == "done"]
    return Recipe(
        cell_id=chosen,
        given=given,
        levels=knobs[chosen],
        settings={name: row[name] for name in cfg.setting_names() if name != "seed"},
        loss=losses[chosen],
        noise=int(compare.by_noise(cells[chosen]).sum()),
        candidates=len(cells),
        incomplete=len(stable) - len(cells),
        ties=tuple(knobs[c] for c in tied if c != chosen),
        near=len(near),
        widest=0 if margins[chosen] is None else sum(widths[c] == widths[chosen] for c in near),
        margin=margins[chosen],
        ends={a: end for a, v in knobs[chosen].items() if (end := _end(v, levels_of(done[a])))},
        eval_tokens=row["eval_tokens"],
    )


def _ended(trials: pd.DataFrame) -> pd.DataFrame:
    """The cells of which no trial is still to end: one that is half trained shows neither a margin nor a rival."""
    over = trials["state"].isin([*ENDED, *FAILED])
    return trials[over.groupby(trials["cell_id"]).transform("all")] if len(trials) else trials


def _is_stable(members: pd.DataFrame) -> bool:
    """Whether no trial is unstable and one is stable. What is rough by sampling noise counts as stable.

    A trial that a rule has stopped is no evidence of stability: its cell is none to recommend.
    """
    if (members["state"] == "stopped").any():
        return False
    stable = (members["verdict"] == "stable") | compare.by_noise(members)
    return bool(stable.any() and (stable | members["verdict"].isna()).all())


def _is_complete(members: pd.DataFrame, seeds: set[Level]) -> bool:
    """Whether the cell has all these seeds, each done, judged, and with a final loss."""
    whole = (members["state"] == "done") & members["verdict"].notna() & members[compare.column("final_loss")].notna()
    return bool(whole.all()) and set(levels_of(members["seed"])) == seeds


def _tied(study: Study, cells: Mapping[str, pd.DataFrame], ranked: Sequence[str]) -> list[str]:
    """The best of the cells, which are in the order of their loss, and those not distinguishable from it.

    The model is final_loss ~ seed + cell, with Holm's correction over all other cells; one seed tells nothing apart.
    That alone would be a test beside those of the first screen. So a cell is told apart only if it differs from the
    best in an axis whose effect on the loss is clear in the study, or if the cells differ at all as clearly as one of
    so many tests must (Bonferroni).
    """
    if len(ranked) < 2:
        return list(ranked)
    trials = pd.concat([cells[c].assign(cell=place) for place, c in enumerate(ranked)])
    table = effects.contrasts(trials, ["cell"], ["final_loss"])
    apart = [ranked[row["level"]] for row in records(table) if row["p_holm"] is not None and row["p_holm"] < TIED]
    if not apart:
        return list(ranked)
    whole = float(effects.effects(trials, ["cell"], ["final_loss"])["p"].iloc[0])
    if whole >= TIED / max(1, len(study.grid.axes) * len(effects.REPORTED)):
        claims = study.claims()
        clear = claims.loc[claims["clear"] & (claims["metric"] == "final_loss"), "axis"]
        levels = {c: [plain(cells[c][axis].iloc[0]) for axis in clear] for c in ranked}
        apart = [c for c in apart if levels[c] != levels[ranked[0]]]
    return [c for c in ranked if c not in apart]


def _knobs(study: Study, members: pd.DataFrame, given: Mapping[str, Level]) -> dict[str, Level]:
    return {a: plain(members[a].iloc[0]) for a in study.axes if a not in given}


def _margin(trials: pd.DataFrame, levels: Mapping[str, Level], planned: pd.DataFrame) -> Margin | None:
    """How far the learning rate can grow with all other knobs as they are, among trials of the same conditions.

    `planned`: these trials, and those of cells that have not ended.
    """
    if levels.get(LR) is None:
        return None
    for axis, level in levels.items():
        if axis != LR:
            trials, planned = at_level(trials, axis, level), at_level(planned, axis, level)
    lr = float(levels[LR])
    above = trials[trials[LR] >= lr]
    row = compare.stable_range(above.assign(verdict=above["verdict"].mask(compare.by_noise(above), "stable")), LR)
    if row["all_stable"] is None:  # another cell of the same settings, on other data, is not
        return None
    unstable = (row["n_unstable"] or 0, row["n_there"] or 0)
    return Margin(lr, row["all_stable"], row["first_unstable"], unstable, row["evaluable"], float(planned[LR].max()))


def _end(level: Level, levels: Sequence[Level]) -> str:
    """`smallest` or `largest` where a number is that of those tried; else empty.

    Nothing lies below 0, and beyond the largest number may lie null: clipping off, no limit.
    """
    if level is None or len(levels) < 2 or not ordered(levels):
        return ""
    if level == levels[0]:
        return "smallest" if level != 0 else ""
    return "largest" if level == levels[-1] else ""


def sentence(recipe: Recipe) -> str:
    """One sentence, so that nothing of it is quoted without what it rests on."""
    knobs = _named(recipe.levels) or "these settings"
    loss = words.estimate(recipe.loss.mean, recipe.loss.low, recipe.loss.high, 4)
    rests = [words.count(recipe.loss.n, "seed")]
    if recipe.eval_tokens is not None:
        rests.append(f"{recipe.eval_tokens:,} evaluation tokens")
    noise = f"{recipe.noise} of its {words.count(recipe.loss.n, 'trial')} rough or spiky by sampling noise"
    parts = [
        f"final loss {loss}{recipe.unit} ({', '.join(rests)})",
        *([noise] if recipe.noise else []),
        f"{rivals(recipe)}{_why(recipe)}",
        *([] if recipe.margin is None else [room(recipe.margin)]),
        *(f"{words.level(recipe.levels[a], a)} is the {end} {words.label(a)} tried" for a, end in recipe.ends.items()),
    ]
    return f"{f'For {_named(recipe.given)}: use' if recipe.given else 'Use'} {knobs}: {'; '.join(parts)}."


def refusals(missing: Sequence[NoRecipe]) -> Iterator[str]:
    """A sentence for each reason: the conditions that have no recipe for it."""
    for reason in dict.fromkeys(m.reason for m in missing):
        named = [_named(m.given) for m in missing if m.reason == reason and m.given]
        yield f"No recipe{f' for {words.either(named)}' if named else ''}: {reason}."


def _named(levels: Mapping[str, Level]) -> str:
    return words.at_levels(levels, levels.values())


def rivals(recipe: Recipe) -> str:
    """How it compares with the other stable cells of its conditions."""
    lack = "lacks" if recipe.incomplete == 1 else "lack"
    more = f" ({recipe.incomplete} more {lack} a seed, a verdict or a loss)" if recipe.incomplete else ""
    tied, cells = len(recipe.ties) + 1, recipe.candidates
    if tied > 1:
        which = f"{tied} of {cells}" if tied < cells else f"all {cells}"
        return f"{which} stable cells are tied{more}, not distinguishable: {_boxes(recipe)}"
    if cells > 1:
        others = "other stable cell" if cells == 2 else f"{cells - 1} other stable cells"
        return f"lower than in the {others}{more}"
    return f"the only stable cell{more}"


def _why(recipe: Recipe) -> str:
    """Why this one of those that are tied; empty where none is."""
    if not recipe.ties:
        return ""
    far = recipe.near <= len(recipe.ties)
    which = f"those within {STABLE_MARGIN:g}{recipe.unit} of the best" if far else "these"
    if recipe.widest in (0, recipe.near):
        return f"; of {which} it has the lowest loss"
    lowest = ", and of those that share it the lowest loss" if recipe.widest > 1 else ""
    short = recipe.margin is not None and recipe.margin.evaluable < MARGIN_STEPS
    wide = "stayed stable up to the highest multiple of its learning rate" if short else "has the widest known margin"
    return f"; of {which} it {wide}{lowest}"


def room(margin: Margin) -> str:
    """The margin as an interval; of trials that are too short what was unstable, and nothing that was stable."""
    bad, there = margin.unstable
    number = f"({bad} of {words.count(there, 'trial')} {'is' if bad == 1 else 'are'} not stable)"
    fails = None if margin.unstable_at is None else f"{_times(margin, margin.unstable_at)} {{}}{number}"
    if margin.evaluable < MARGIN_STEPS:
        seen = "" if fails is None else f"; unstable at {fails.format('this learning rate ')}"
        return f"no margin is claimed from {margin.evaluable} evaluable steps ({MARGIN_STEPS} are needed){seen}"
    if margin.tried_to == margin.lr:
        return "margin: not known, no larger learning rate was tried with these settings"
    held = f"stable at {_times(margin, margin.stable_to)} this learning rate" if margin.stable_to > margin.lr else ""
    if fails is not None:
        return f"margin: {f'{held}, ' if held else ''}not at {fails.format('' if held else 'this learning rate ')}"
    if margin.stable_to == margin.tried_to:
        return f"margin: {held}, the most tried"
    return f"margin: {held or 'not known'}, not every seed above it has a verdict"


def _times(margin: Margin, rate: float) -> str:
    return f"{words.number(float(f'{rate / margin.lr:.6g}'), 2)} times"


def _boxes(recipe: Recipe) -> str:
    """The tied cells, in as few boxes of levels as a simple rule makes of them; what all share is left out."""
    cells = [recipe.levels, *recipe.ties]
    differing = [a for a in recipe.levels if len(levels_of(c[a] for c in cells)) > 1]
    boxes = [{a: [c[a]] for a in differing} for c in cells]
    for axis in differing:
        boxes = _merged(boxes, axis)
    return ", and ".join(map(_box, boxes))


def _merged(boxes: Sequence[dict[str, list[Level]]], axis: str) -> list[dict[str, list[Level]]]:
    """The boxes with those in one that differ along this axis alone."""
    merged: list[dict[str, list[Level]]] = []
    for box in boxes:
        same = next((m for m in merged if all(m[a] == v for a, v in box.items() if a != axis)), None)
        if same is None:
            merged.append(dict(box))
        else:
            same[axis] = levels_of([*same[axis], *box[axis]])
    return merged


def _box(box: Mapping[str, Sequence[Level]]) -> str:
    """`learning rate 1e-3 or 0.01 with clip threshold off`."""
    return " with ".join(f"{words.label(a)} {words.either([words.level(v, a) for v in own])}" for a, own in box.items())

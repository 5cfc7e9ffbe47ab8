"""The sentences of a report's first screen: counts, what is stable, what to use, what each axis changed, caveats.

A sentence "X changed Y" is made only where the corrected p of `effects` is under .05; every axis of the study is
answered, one that changed nothing by the interval of its effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import compare, recipe, runs, words
from stabstudy.analysis.blocks import Finding
from stabstudy.analysis.effects import CLEAR, interactions
from stabstudy.analysis.levels import levels_of, records
from stabstudy.analysis.recipe import MARGIN_STEPS
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.explain import WARNINGS
from stabstudy.stability.sensitivity import STABLE_MARGIN
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

LR = "optim.lr"

REASONS = {
    "untrained": "untrained (the loss never came below the entropy of single tokens)",
    "too_short": "too short",
    "no_gradient_norm": "without a gradient norm",
    "strided": "logged with gaps",
}
"""Why a done trial has no verdict, in words."""


def counts(study: Study) -> dict[str, int]:
    """How many trials have which verdict or state. Each trial, the damaged ones too, is counted once."""
    done = study.trials[study.trials["state"] == "done"]
    by_verdict = {verdict: int((done["verdict"] == verdict).sum()) for verdict in VERDICTS}
    states = study.trials["state"]
    failed = states.isin(("failed", "oom", "timeout", "disk_full"))
    return by_verdict | {
        "not judged": len(done) - sum(by_verdict.values()),
        "unfinished": int((states != "done").sum() - failed.sum()),
        "failed": int(failed.sum()),
        "damaged": len(study.damaged),
    }


def headline(study: Study) -> str:
    """One sentence: the counts."""
    numbers = counts(study)
    total = sum(numbers.values())
    if not total:
        return "The study holds no trial yet."
    if not (judged := sum(numbers[v] for v in VERDICTS)):
        return f"None of {words.count(total, 'trial')} has a verdict{_reasons(study)}."
    noise = int(study.trials["sampling_noise"].fillna(False).sum())
    named = [f"{numbers[v]} {v}" for v in VERDICTS if numbers[v]]
    of_noise = f" ({noise} by sampling noise)" if noise else ""
    rest = total - judged
    tail = f"; {rest} more without a verdict{_reasons(study)}" if rest else ""
    return f"Of {words.count(judged, 'judged trial')}: {words.listing(named)}{of_noise}{tail}."


def findings(study: Study) -> list[Finding]:
    """The answers of the first screen, by question."""
    if not (study.trials["state"] == "done").any():
        return []
    if study.ingested:
        return [runs.findings(study)]
    answers = (
        Finding("What is stable", [*_limits(study), *_behind(study), *_warned(study)]),
        Finding("What to use", list(_recipes(study))),
        Finding("What the axes changed", list(_changes(study))),
    )
    return [answer for answer in answers if answer.sentences]


def warnings(study: Study) -> list[str]:
    """What limits the numbers."""
    if study.ingested:
        return [*_missing(study), *runs.warnings(study)]
    return [*_missing(study), *_incomparable(study), *_few(study)]


def step(axis: str, a: object, b: object) -> str:
    """`learning rate 1e-3 to 0.03`."""
    return f"{words.label(axis)} {words.level(a, axis)} to {words.level(b, axis)}"


def change(row: Row) -> str:
    """`+0.52 [0.45, 0.59] nat/token`, or `x2.4 [2.2, 2.6]` of a ratio."""
    if row["scale"] == "difference":
        unit = COLUMNS[row["metric"]].unit
        low, mean, high = (_signed(row[name]) for name in ("low", "estimate", "high"))
        return f"{mean} [{low}, {high}]{f' {unit}' if unit not in ('', '1') else ''}"
    low, mean, high = (words.number(row[name]) for name in ("low", "estimate", "high"))
    return f"×{mean} [{low}, {high}]"


def _signed(value: Any) -> str:
    return words.NOTHING if words.is_null(value) else f"{'+' if value > 0 else ''}{words.number(value)}"


def _reasons(study: Study) -> str:
    """` (2 too short)`: why done trials have no verdict."""
    done = study.trials[(study.trials["state"] == "done") & study.trials["verdict"].isna()]
    numbers = done["verdict_reason"].value_counts()
    named = [f"{n} {REASONS.get(str(reason), reason)}" for reason, n in sorted(numbers.items())]
    return f" ({words.listing(named)})" if named else ""


def _limits(study: Study) -> Iterator[str]:
    """The largest learning rate at which every trial stayed stable: per depth, or per level of the one other axis."""
    grid = study.grid
    if LR not in grid.axes:
        return
    others = [a for a in grid.axes if a != LR]
    by = "model.depth" if "model.depth" in others else others[0] if len(others) == 1 else None
    table = grid.largest_stable(LR, by)
    evaluable = int(grid.trials["n_evaluable"].min())
    by_text: dict[str, list[str]] = {}
    for level, row in zip(table.index, records(table), strict=True):
        by_text.setdefault(_limit(row, grid.axes[LR], evaluable), []).append(words.level(level, by or ""))
    for text, levels in by_text.items():
        where = "" if by is None else f"{words.label(by)} {words.listing(levels)}: "
        sentence = f"{where}{text}"
        yield sentence[0].upper() + sentence[1:]
    pooled = [words.label(a) for a in others if a != by]
    yield from _working(table, by, f", averaged over {words.listing(pooled)}" if pooled else "")


def _limit(row: Row, grid: list[float], evaluable: int) -> str:
    if row["reason"] is not None:
        return f"no largest stable learning rate is given: {row['reason']}."
    stable, unstable, again = (row[name] for name in ("all_stable", "first_unstable", "stable_again"))
    rests = f" (in {evaluable} evaluable steps; a margin needs {MARGIN_STEPS})" if evaluable < MARGIN_STEPS else ""
    if unstable is None and stable is None:
        return "no learning rate at which every trial is stable, and none with an unstable trial."
    if unstable is None:
        beyond = "; the limit lies above the grid" if stable == grid[-1] else ""
        return f"every trial is stable up to learning rate {words.level(stable)}{rests}{beyond}."
    back = "" if again is None else f", though every one at {words.level(again)} is again"
    verb = "is" if row["n_unstable"] == 1 else "are"
    bad, total = (words.number(row[name]) for name in ("n_unstable", "n_there"))
    lost = f"at {words.level(unstable)}, {bad} of {total} {verb} not{back}"
    if stable is None:
        return f"at no smaller learning rate is every trial stable; {lost}{rests}."
    return f"every trial is stable up to learning rate {words.level(stable)}; {lost}{rests}."


def _working(table: Any, by: str | None, pooled: str) -> Iterator[str]:
    """Where the loss says that a learning rate is too large, beside the verdicts."""
    parts = []
    for level, row in zip(table.index, records(table), strict=True):
        if row["works_to"] is not None:
            where = "" if by is None else f" at {words.label(by)} {words.level(level, by)}"
            parts.append(f"{words.level(row['works_to'])}{where} (best {words.level(row['best'])})")
    if parts:
        yield (
            f"Largest learning rate whose final loss is within {STABLE_MARGIN:g} nat/token of the best of its cell, "
            f"paired by seed{pooled}: {words.listing(parts)}."
        )


def _recipes(study: Study) -> Iterator[str]:
    recipes = recipe.recipes(study)
    yield from map(recipe.sentence, recipes)
    if not recipes:
        yield f"No recipe: {recipe.why_none(study)}."


def _behind(study: Study) -> Iterator[str]:
    """How many stable trials are far from the best: a trial that learns little is stable too."""
    stable = study.trials["verdict"] == "stable"
    if behind := int(study.underperform[stable].sum()):
        yield (
            f"{behind} of {words.count(int(stable.sum()), 'stable trial')} ended over {STABLE_MARGIN:g} nat/token "
            "above the best trial of as many tokens: stable does not mean well trained."
        )


def _warned(study: Study) -> Iterator[str]:
    """How many stable trials crossed a warning level: what may become unstable later."""
    stable = study.trials[study.trials["verdict"] == "stable"]
    crossed = {name: int(stable[name].notna().sum()) for name in WARNINGS}
    if any(crossed.values()):
        parts = [f"in {n} {WARNINGS[name]}" for name, n in crossed.items() if n]
        yield f"Stable so far, with a warning: of {words.count(len(stable), 'stable trial')}, {', '.join(parts)}."


def _changes(study: Study) -> Iterator[str]:
    """Each axis in turn: the changes that can be told from chance, or that none was found, with its interval."""
    rows = records(study.effects())
    crossed = {(r["axis"], r["metric"]): r for r in _crossed(study)}
    for axis in dict.fromkeys(r["axis"] for r in rows):
        own = [r for r in rows if r["axis"] == axis]
        clear = [r for r in own if r["p_holm"] is not None and r["p_holm"] < CLEAR]
        tested = [r for r in own if r["p_holm"] is not None]
        if clear:
            yield from _stated(study, axis, clear, crossed)
        elif tested:
            parts = [f"{words.STATISTICS[r['metric']]} {change(r)}" for r in tested]
            at = f"{words.level(tested[0]['a'], axis)} to {words.level(tested[0]['b'], axis)}"
            yield f"{_capital(words.label(axis))} {at}: no effect found: {'; '.join(parts)}."
        else:
            yield f"{_capital(words.label(axis))}: not tested ({own[0]['note'] or 'too few trials'})."


def _stated(study: Study, axis: str, clear: Sequence[Row], crossed: Mapping[tuple[str, str], Row]) -> Iterator[str]:
    """The clear changes along an axis; one that depends on another axis is given at each level of that one."""
    by_step: dict[str, list[str]] = {}
    for row in clear:
        at, text = step(axis, row["a"], row["b"]), change(row)
        if other := crossed.get((axis, row["metric"]), {}).get("other"):
            at, text = f"{at}, depending on {words.label(other)}", _simple(study, row, other)
        by_step.setdefault(at, []).append(f"{words.STATISTICS[row['metric']]} {text}")
    for at, texts in by_step.items():
        yield f"{_capital(at)}: {'; '.join(texts)}."


def _simple(study: Study, row: Row, other: str) -> str:
    """The paired change at each level of another axis that it depends on."""
    table = records(study.compare(row["axis"], row["metric"], by=other))
    unit = COLUMNS[row["metric"]].unit
    parts = [
        f"{words.statistic(r['mean_a'], unit)} → {words.statistic(r['mean_b'], unit)} at {words.level(r[other], other)}"
        for r in table
        if (r["a"], r["b"]) in ((row["a"], row["b"]), (row["b"], row["a"])) and r["pairs"]
    ]
    return ", ".join(parts)


def _crossed(study: Study) -> Iterator[Row]:
    """Pairs of axes that depend on each other, from the side of each."""
    if len(study.grid.axes) < 2:
        return
    for row in records(interactions(*study.tested())):
        if row["p_holm"] is not None and row["p_holm"] < CLEAR:
            yield row
            yield row | {"axis": row["other"], "other": row["axis"]}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _missing(study: Study) -> Iterator[str]:
    numbers = counts(study)
    if numbers["damaged"]:
        ids = words.listing([d.trial_id for d in study.damaged[:5]])
        yield f"{words.count(numbers['damaged'], 'trial')} damaged and left out of every number: {ids}."
    absent = [f"{numbers[kind]} {kind}" for kind in ("unfinished", "failed") if numbers[kind]]
    if absent:
        yield f"Trials in no mean: {words.listing(absent)} (see Trials without a result)."
    if numbers["not judged"]:
        yield f"Done trials without a verdict: {numbers['not judged']}{_reasons(study)}."
    cells = study.cells[study.cells["case"].isna()] if len(study.cells) else study.cells
    if len(cells) and (short := int((cells["n"] < cells["n"].max()).sum())):
        verb = "lacks" if short == 1 else "lack"
        yield f"{short} of {len(cells)} cells {verb} seeds that others have ({int(cells['n'].max())})."
    if notes := int(study.trials["note"].notna().sum()):
        yield f"{words.count(notes, 'record')} read without a torn last line (a trial still running, or killed)."


def _incomparable(study: Study) -> Iterator[str]:
    hashes = levels_of(study.trials["eval_hash"].dropna())
    if len(hashes) > 1:
        yield f"Losses were measured on {len(hashes)} different evaluation sets: compare them where data are equal."
    strides = levels_of(study.trials.get(compare.STRIDE, []))
    if len(strides) > 1:
        every = words.listing([words.level(s) for s in strides])
        yield f"Logged every {every} steps: statistics of records with different strides are never paired or averaged."
    data = [c for c in study.trials.columns if c == "data" or str(c).startswith("data.")]
    if (study.trials.groupby(data, dropna=False)["data_fingerprint"].nunique() > 1).any():
        yield "Trials with the same data settings saw different data (their fingerprints differ)."


def _few(study: Study) -> Iterator[str]:
    if len(levels_of(study.trials["seed"])) == 1:
        yield "One seed: no interval and no test is possible; a difference may be chance."
    evaluable = study.trials.loc[study.trials["state"] == "done", "n_evaluable"]
    if len(evaluable) and int(evaluable.min()) < MARGIN_STEPS:
        yield (
            f"Trials have as few as {int(evaluable.min())} evaluable steps: what is stable in them may be unstable in "
            f"longer ones (margins are stated from {MARGIN_STEPS} on)."
        )
    epochs = study.trials["epochs"].dropna()
    if len(epochs) and float(epochs.max()) > 1:
        yield f"The training part was read up to {words.number(float(epochs.max()))} times (epochs)."

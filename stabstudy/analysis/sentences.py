"""What came out, in sentences made from the numbers: also that nothing did, or that too few seeds can tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, recipe, runs, words
from stabstudy.analysis.blocks import Finding
from stabstudy.analysis.levels import levels_of, ordered, records
from stabstudy.analysis.paired import holm
from stabstudy.analysis.study import VERDICTS, Study
from stabstudy.stability.sensitivity import STABLE_MARGIN
from stabstudy.stability.summary import COLUMNS

EFFECTS = ("final_loss", "spike_rate", "grad_norm_log_sd", "attn_logit_peak")
"""Statistics whose change along each axis a report states."""


def counts(study: Study) -> dict[str, int]:
    """How many trials are what. Each trial, the damaged ones too, is counted once."""
    done = study.trials[study.trials["state"] == "done"]
    found = {verdict: int((done["verdict"] == verdict).sum()) for verdict in VERDICTS}
    states = study.trials["state"]
    failed = states.isin(("failed", "oom", "timeout", "disk_full"))
    return found | {
        "not judged": len(done) - sum(found.values()),
        "unfinished": int((states != "done").sum() - failed.sum()),
        "failed": int(failed.sum()),
        "damaged": len(study.damaged),
    }


def headline(study: Study) -> str:
    """One sentence: the counts."""
    found = counts(study)
    total = sum(found.values())
    if not total:
        return "The study holds no trial yet."
    if not (judged := sum(found[v] for v in VERDICTS)):
        return f"None of {words.count(total, 'trial')} has a verdict."
    named = [f"{found[v]} {v}" for v in VERDICTS if found[v]]
    rest = total - judged
    tail = f"; {rest} more {'has' if rest == 1 else 'have'} no verdict" if rest else ""
    return f"Of {words.count(judged, 'judged trial')}: {words.listing(named)}{tail}."


def findings(study: Study) -> list[Finding]:
    """What stands in the box, by question."""
    if not (study.trials["state"] == "done").any():
        return []
    if study.ingested:
        return [runs.findings(study)]
    found = (
        Finding("What is stable", [*_limits(study), *_behind(study)]),
        Finding("What to use", list(_best(study))),
        Finding("What the axes changed", list(_changes(study))),
    )
    return [f for f in found if f.sentences]


def warnings(study: Study) -> list[str]:
    """What a reader must know before believing the numbers."""
    if study.ingested:
        return [*_missing(study), *runs.warnings(study)]
    return [*_missing(study), *_incomparable(study), *_few(study)]


def effects(study: Study) -> pd.DataFrame:
    """What each axis did to each of EFFECTS: `compare` rows with `axis` and `metric`, Holm-adjusted over all of them.

    An axis of numbers: the two levels farthest apart (null last) that have at least half as many pairs as any two. An
    axis of names: the first level against each other one.
    """
    rows: list[dict[str, Any]] = []
    for axis, levels in study.axes.items():
        for metric in EFFECTS:
            pairs = [r for r in records(study.compare(axis, metric)) if r["pairs"]]
            rows += [{"axis": axis, "metric": metric, **r} for r in _ends(pairs, levels)]
    adjusted = holm([math.nan if row["p"] is None else float(row["p"]) for row in rows])  # null: over 20 seeds
    return pd.DataFrame([row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)])


def step(axis: str, a: object, b: object) -> str:
    """`learning rate 1e-3 to 0.03`."""
    return f"{words.label(axis)} {words.level(a, axis)} to {words.level(b, axis)}"


def _limits(study: Study) -> Iterator[str]:
    """The largest learning rate at which every trial stayed stable: per depth, or per level of the one other axis."""
    grid = study.grid
    if "optim.lr" not in grid.axes:
        return
    others = [a for a in grid.axes if a != "optim.lr"]
    by = "model.depth" if "model.depth" in others else others[0] if len(others) == 1 else None
    table = grid.largest_stable("optim.lr", by)
    said: dict[str, list[str]] = {}
    for level, row in zip(table.index, records(table), strict=True):
        said.setdefault(_limit_text(row, grid.axes["optim.lr"]), []).append(words.level(level, by or ""))
    pooled = [words.label(a) for a in grid.axes if a not in ("optim.lr", by)]
    over = f", pooled over {words.listing(pooled)}" if pooled else ""
    fewest, most = int(table["trials"].min()), int(table["trials"].max())
    trials = f"{fewest if fewest == most else f'{fewest} to {most}'} trials{f' per {words.label(by)}' if by else ''}"
    for text, levels in said.items():
        where = "" if by is None else f"{words.label(by)} {words.listing(levels)}: "
        sentence = f"{where}{text}"
        yield sentence[0].upper() + sentence[1:]
    yield from _working(table, by, f"{trials}{over}")


def _limit_text(row: dict[str, Any], grid: list[float]) -> str:
    stable, unstable, again = (row[name] for name in ("all_stable", "first_unstable", "stable_again"))
    if row["reason"] is not None:
        return f"how far the learning rate can be raised is not told: {row['reason']}."
    if unstable is None and stable == grid[-1]:
        return f"every trial is stable at every learning rate, up to {words.level(stable)}; the limit lies beyond."
    if unstable is None:
        return "no trial is spiky or diverged, but not every one has a verdict."
    back = "" if again is None else f", though every one at {words.level(again)} is again"
    verb = "is" if row["n_unstable"] == 1 else "are"
    bad, total = (words.number(row[name]) for name in ("n_unstable", "n_there"))  # 1.0 beside a null, not 1
    there = f"at {words.level(unstable)}, {bad} of {total} {verb} not{back}."
    if unstable == grid[0]:
        return f"not even at the smallest learning rate is every trial stable: {there}"
    if stable is not None and grid.index(stable) + 1 == grid.index(unstable):
        return f"every trial is stable up to learning rate {words.level(stable)}; {there}"
    return f"below learning rate {words.level(unstable)} not every trial has a verdict; {there}"


def _working(table: pd.DataFrame, by: str | None, trials: str) -> Iterator[str]:
    """Where the loss says that a learning rate is too large, beside the verdicts; and on how many trials both rest."""
    parts = []
    for level, row in zip(table.index, records(table), strict=True):
        if row["works_to"] is not None:
            where = "" if by is None else f" at {words.label(by)} {words.level(level, by)}"
            parts.append(f"{words.level(row['works_to'])}{where} (best {words.level(row['best'])})")
    if parts:
        yield (
            f"Largest learning rate within {STABLE_MARGIN:g} nat/token of the best mean loss: {words.listing(parts)} "
            f"({trials})."
        )


def _best(study: Study) -> Iterator[str]:
    """Each recipe; and the cell of least mean loss where that is another one.

    One of both per evaluation batch, as losses on different ones cannot be compared.
    """
    recipes = recipe.recipes(study)
    yield from map(recipe.sentence, recipes)
    chosen = {found.cell_id for found in recipes}
    known = study.cells[study.cells["final_loss_capped"].notna() & (study.cells["diverged"] == 0)]
    batches = study.trials.groupby("cell_id")["eval_hash"].first().reindex(known.index)
    for _, cells in known.groupby(batches):
        lowest = cells.sort_values("final_loss_capped", kind="stable").head(1)
        if len(cells) > 1 and lowest.index[0] not in chosen:
            best = records(lowest)[0]
            mean, low, high = (best[f"final_loss_capped{end}"] for end in ("", "_low", "_high"))
            where = ", ".join(f"{words.label(a)} {words.level(best[a], a)}" for a in study.axes)
            seeds = words.count(best["n_done"], "seed")
            yield f"Lowest final loss: {words.estimate(mean, low, high, 4)} nat/token ({seeds}) at {where}."


def _behind(study: Study) -> Iterator[str]:
    """How many stable trials are far from the best: who learns nothing is stable."""
    stable = study.trials["verdict"] == "stable"
    if behind := int(study.underperform[stable].sum()):
        yield (
            f"{behind} of {words.count(int(stable.sum()), 'stable trial')} ended over {STABLE_MARGIN:g} nat/token "
            "above the best trial of as many tokens: stable is not yet good."
        )


def _changes(study: Study) -> Iterator[str]:
    """What each axis did in numbers: what the seeds can tell from chance, or all of it where they can tell nothing."""
    rows = records(effects(study))
    judged = [r for r in rows if r["low"] is not None]
    any_clear, silent = any(map(_is_clear, rows)), []
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(step(row["axis"], row["a"], row["b"]), []).append(row)
    for name, group in steps.items():
        told = [r for r in group if _is_clear(r) or not any_clear]
        pairs = sorted({r["pairs"] for r in told})  # a statistic that some trials lack has fewer
        moved = [f"{words.STATISTICS[r['metric']]} {_shown(r, 'mean_a')} → {_shown(r, 'mean_b')}" for r in told]
        if moved:
            some = f"{pairs[0]} to " if len(pairs) > 1 else ""
            yield f"From {name} ({some}{words.count(pairs[-1], 'pair')}): {words.listing(moved)}."
        else:
            silent.append(name)
    if any_clear:
        nothing = f"; nothing from {words.listing(silent)}" if silent else ""
        yield (
            f"So much the seeds can tell from chance (paired 95 % intervals without 0, not corrected for {len(rows)} "
            f"comparisons){nothing}."
        )
    elif judged:
        seeds = words.count(max(r["seeds"] for r in judged), "seed")
        yield f"With {seeds} none of these changes can be told from chance: each paired 95 % interval holds 0."


def _is_clear(row: dict[str, Any]) -> bool:
    """Whether the interval of the change does not hold 0."""
    return row["low"] is not None and (row["low"] > 0 or row["high"] < 0)


def _ends(pairs: list[dict[str, Any]], levels: list[Any]) -> list[dict[str, Any]]:
    """The rows of `compare` to state: see `effects`."""
    if not pairs or not ordered(levels):
        return [r for r in pairs if r["a"] == levels[0]]
    most = max(r["pairs"] for r in pairs)
    supported = [r for r in pairs if 2 * r["pairs"] >= most]
    return [max(supported, key=lambda r: levels.index(r["b"]) - levels.index(r["a"]))]


def _shown(row: dict[str, Any], end: str) -> str:
    return words.statistic(row[end], COLUMNS[row["metric"]].unit)


def _missing(study: Study) -> Iterator[str]:
    found = counts(study)
    if found["damaged"]:
        ids = words.listing([d.trial_id for d in study.damaged[:5]])
        yield f"{words.count(found['damaged'], 'trial')} damaged and left out of every number: {ids}."
    absent = [f"{found[kind]} {kind}" for kind in ("unfinished", "failed") if found[kind]]
    if absent:
        yield f"In no mean: {words.listing(absent)} (see Trials without a result)."
    if found["not judged"]:
        unjudged = words.count(found["not judged"], "done trial")
        yield f"{unjudged} without a verdict: under {study.rules.min_steps} steps."
    cells = study.cells[study.cells["case"].isna()] if len(study.cells) else study.cells
    if len(cells) and (short := int((cells["n"] < cells["n"].max()).sum())):
        verb = "lacks" if short == 1 else "lack"
        yield f"{short} of {len(cells)} cells {verb} seeds that others have ({int(cells['n'].max())})."
    if notes := int(study.trials["note"].notna().sum()):
        yield f"{words.count(notes, 'record')} read without a torn last line (a trial still running, or killed)."


def _incomparable(study: Study) -> Iterator[str]:
    hashes = levels_of(study.trials["eval_hash"].dropna())
    if len(hashes) > 1:
        yield f"Losses were measured on {len(hashes)} different evaluation batches: compare them where data are equal."
    strides = levels_of(study.trials.get(compare.STRIDE, []))
    if len(strides) > 1:
        every = words.listing([words.level(s) for s in strides])
        yield f"Logged every {every} steps: statistics of records with different strides are never paired or averaged."
    data = [c for c in study.trials.columns if c == "data" or str(c).startswith("data.")]
    if (study.trials.groupby(data, dropna=False)["data_fingerprint"].nunique() > 1).any():
        yield "Trials with the same data settings saw different data (their fingerprints differ)."


def _few(study: Study) -> Iterator[str]:
    seeds = len(levels_of(study.trials["seed"]))
    if seeds == 1:
        yield "One seed: no interval and no test is possible; a difference may be chance."
    elif 1 < seeds < 6 and len(study.trials):
        floor = words.number(2 / 2**seeds, 2)
        yield f"{seeds} seeds: no exact test can give a p-value under {floor}; read the differences, not p."

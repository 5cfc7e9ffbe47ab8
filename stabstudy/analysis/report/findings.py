"""The sentences of a report's first screen: counts, what is stable, what to use, what each axis changed, caveats.

A sentence "X changed Y" is made only where a corrected p is under .05, as `effects.claims` has it, so that a study of
noise states a change in about one of twenty cases (`tests/test_null_studies.py`). Every axis of the study is answered,
one that changed nothing by the interval of its effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import adaptive, answer, cases, commands, compare, recipe, searches, study_statistics, words
from stabstudy.analysis.effects import reported, simple_effects
from stabstudy.analysis.elements import Finding
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level, levels_of, ordered, records
from stabstudy.analysis.recipe import LR, MARGIN_STEPS, NoRecipe, Recipe
from stabstudy.analysis.report import frontier_page, ingested_page
from stabstudy.analysis.report.design_line import settled
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.explain import WARNINGS
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

FINDS = "This finds the limit: "
"""Before a command, which the page sets apart."""

SHOWN = 3
"""Best cells of a search that the first screen names."""

FEW_SEEDS = 5
"""Seeds under which a caveat says how few they are."""

MOST_LEVELS = 3
"""Levels of another axis at which an effect that depends on it is given; of more the first and the last."""


def headline(study: Study) -> str:
    """One sentence: the counts."""
    numbers = study.outcomes
    if not (total := sum(numbers.values())):
        return "The study holds no trial yet."
    rest = _without_verdict(study, numbers)
    if not (judged := sum(numbers[v] for v in VERDICTS)):
        return f"None of {words.count(total, 'trial')} has a verdict: {rest}."
    noise = study_statistics.verdicts_by_noise(study.trials)
    by_noise = {v: f" ({noise[v]} by sampling noise)" if v in noise else "" for v in VERDICTS}
    named = [f"{numbers[v]} {v}{by_noise[v]}" for v in VERDICTS if numbers[v]]
    tail = f"; without a verdict: {rest}" if rest else ""
    return f"Of {words.count(judged, 'judged trial')}: {words.listing(named)}{tail}."


def findings(study: Study) -> list[Finding]:
    """The answers of the first screen, by question."""
    if not (study.trials["state"] == "done").any():
        return []
    if study.ingested:
        return [ingested_page.findings(study)]
    if study.searched is not None:
        sentences = [*frontier_page.findings(study, study.searched), *_behind(study), *_warned(study)]
        return [Finding("How far", sentences), Finding("What to use", list(_recipes(study, "")))]
    if adaptive.why_biased(study) is not None:
        return [Finding("What the search found", [*best(study), *_behind(study), *_warned(study)])]
    part = settled(study)
    limits = list(_limits(study, part))
    answers = (
        Finding("What is stable", [*limits, *_behind(study), *_warned(study)]),
        Finding("What to use", list(_recipes(study, " ".join(limits)))),
        Finding("What the axes changed", list(_changes(part))),
        Finding("What the cases changed", list(_cases(part))),
    )
    return [each for each in answers if each.sentences]


def best(study: Study) -> Iterator[str]:
    """The best cells of a search, which are better than what they would be when trained again."""
    history = searches.search_history(study.folder, study.tables.trials)
    assert history is not None
    cells = [s for s in history.suggestions if s.state == "done"]
    counted = f"{history.search.sampler} tried {len(cells)} of {words.count(history.search.trials, 'cell')}"
    feasible = sum(s.feasible for s in cells)
    if not history.front:
        yield f"{counted}; none fulfils {words.listing([e.text for e in history.search.constraints])}."
        return
    names = [COLUMNS[o.column].label if o.column in COLUMNS else o.column for o in history.search.objectives]
    yield f"{counted}, {feasible} of them trained and fulfil what was asked."
    if len(names) > 1:
        yield f"{words.count(len(history.front), 'cell')} of them no other is better than in {words.listing(names)}."
    for index in history.front[:SHOWN]:
        cell = history.suggestions[index]
        levels = [f"{words.label(name)} {words.level(value, name)}" for name, value in cell.values.items()]
        results = [f"{name} {words.number(value)}" for name, value in zip(names, cell.objectives, strict=True)]
        n = words.count(len(cell.trial_ids), "seed")
        yield f"Best: {words.listing(levels)} ({words.listing(results)}; mean of {n})."
    yield "As the best of many it was lucky too: train it again with other seeds before its values are relied on."


def warnings(study: Study) -> list[str]:
    """What limits the numbers."""
    if study.ingested:
        return [*_missing(study), *ingested_page.warnings(study)]
    return [*_missing(study), *_stopped(study), *_incomparable(study), *_few(study)]


def _without_verdict(study: Study, numbers: Mapping[str, int]) -> str:
    """`2 too short, 3 unfinished and 1 failed`; empty where every trial has a verdict."""
    names = {"stopped": "stopped early"}
    others = [f"{numbers[k]} {names.get(k, k)}" for k in (*study_statistics.WITHOUT_END, "damaged") if numbers[k]]
    return words.listing([*_reasons(study), *others])


def _reasons(study: Study) -> list[str]:
    """`2 too short`: why done trials have no verdict."""
    numbers = study_statistics.without_verdict(study.trials)
    return [f"{n} {words.REASONS.get(reason, reason)}" for reason, n in numbers.items()]


def _limits(study: Study, part: Study) -> Iterator[str]:
    """The largest learning rate at which every trial stayed stable: per depth, or per level of the one other axis."""
    grid = study.grid
    if LR not in grid.axes:
        yield from _stable_cells(part)
        return
    by, rows = answer.limits(study)
    alike: dict[str, list[tuple[Level, Row]]] = {}
    for level, row in rows:
        alike.setdefault(_limit(row, grid.axes[LR]), []).append((level, row))
    for text, own in alike.items():
        levels, (_, row) = [level for level, _ in own], own[0]
        where = "" if by is None else f"{words.label(by)} {words.listing([words.level(v, by) for v in levels])}: "
        beyond = levels if "stable" in answer.ends(row, grid.axes[LR]) else []
        yield words.capital(f"{where}{text}") + _search(study, "stable", by, beyond)
    pooled = [words.label(a) for a in grid.axes if a not in (LR, by)]
    yield from _working(study, by, rows, f", averaged over {words.listing(pooled)}" if pooled else "")


def _search(study: Study, holds: str, by: str | None, levels: Sequence[Level]) -> str:
    """The command that finds the limit at these levels, where it lies beyond the grid and a command can."""
    if not levels:
        return ""
    command = commands.searched(study, study.grid.axes[LR][-1], holds, answer.pins(study, by, levels))
    return "" if command is None else f" {FINDS}{command}"


def _stable_cells(study: Study) -> Iterator[str]:
    """How many cells are stable; nothing where no cell has ended."""
    stable = [all(row["verdict"] == "stable" for row in rows) for rows in study.rows_by_cell.values()]
    verb = "is" if sum(stable) == 1 else "are"
    if stable:
        yield f"{sum(stable)} of {words.count(len(stable), 'cell')} {verb} stable in every trial."


def _limit(row: Row, grid: Sequence[Level]) -> str:
    """How far the learning rate can grow, in words; of trials that are too short, on how many steps that rests."""
    if row["reason"] is not None:
        return f"no largest stable learning rate is given: {row['reason']}."
    stable, unstable, again, steps = (row[n] for n in ("all_stable", "first_unstable", "stable_again", "evaluable"))
    short = steps is not None and steps < MARGIN_STEPS
    rests = f" in {words.number(steps)} evaluable steps (a margin needs {MARGIN_STEPS})" if short else ""
    held = "" if stable is None else f"every trial is stable up to learning rate {words.level(stable)}{rests}"
    if unstable is None:
        beyond = "no larger one was tried" if stable == grid[-1] else "what lies above has no verdict"
        return f"{held}; {beyond}." if held else "no trial is unstable, and at no learning rate are all stable."
    back = "" if again is None else f", although every trial at {words.level(again)} is stable again"
    parts = {"by sampling noise": row["n_noise"], "stopped early": row["n_stopped"]}
    noise = "".join(f", {words.number(n)} {how}" for how, n in parts.items() if n)
    bad, there = (words.number(row[name]) for name in ("n_unstable", "n_there"))
    lost = f"at {words.level(unstable)}, {bad} of {there} {'is' if bad == '1' else 'are'} not{noise}"
    return f"{held or 'at no smaller learning rate is every trial stable'}; {lost}{back}."


def _working(study: Study, by: str | None, rows: Sequence[tuple[Level, Row]], pooled: str) -> Iterator[str]:
    """Where the loss says that a learning rate is too large, beside the verdicts."""
    grid = study.grid.axes[LR]
    parts, beyond = [], []
    for level, row in rows:
        if row["works_to"] is not None:
            where = "" if by is None else f" at {words.label(by)} {words.level(level, by)}"
            is_last = "works" in answer.ends(row, grid)
            beyond += [level] if is_last else []
            largest = ", the largest tried," if is_last else ""
            parts.append(f"{words.level(row['works_to'])}{largest}{where} (best {words.level(row['best'])})")
    if parts:
        yield (
            f"Largest learning rate whose final loss is within {STABLE_MARGIN:g} nat/token of the best of its cell, "
            f"paired by seed{pooled}: {words.listing(parts)}.{_search(study, 'works', by, beyond)}"
        )


def _recipes(study: Study, above: str) -> Iterator[str]:
    """A sentence for each recipe, with the command that finds its limit unless that stands `above`."""
    answers = recipe.answers(study)
    for each in answers:
        if isinstance(each, Recipe):
            command = answer.margin_command(study, each)
            is_new = command is not None and command not in above
            yield recipe.sentence(each) + (f" {FINDS}{command}" if is_new else "")
    yield from recipe.refusals([each for each in answers if isinstance(each, NoRecipe)])


def _behind(study: Study) -> Iterator[str]:
    """How many stable trials are far from the best: a trial that learns little is stable too."""
    stable = study.trials["verdict"] == "stable"
    if compare.in_nats(study.trials) and (behind := int(study.underperform[stable].sum())):
        yield (
            f"{behind} of {words.count(int(stable.sum()), 'stable trial')} ended over {STABLE_MARGIN:g} nat/token "
            "above the best trial of as many tokens: stable does not mean well trained."
        )


def _warned(study: Study) -> Iterator[str]:
    """How many stable trials crossed a warning level: what may become unstable later."""
    crossed = study_statistics.warned(study.trials)
    if any(crossed.values()):
        parts = [f"in {n} {WARNINGS[name]}" for name, n in crossed.items() if n]
        stable = words.count(study.outcomes["stable"], "stable trial")
        yield f"Stable so far, with a warning: of {stable}, {', '.join(parts)}."


def _changes(study: Study) -> Iterator[str]:
    """Each axis in turn: the changes that can be told from chance, or that none was found, with its interval."""
    rows = records(study.claims())
    axes, metrics = (list(dict.fromkeys(r[name] for r in rows)) for name in ("axis", "metric"))
    idle = [m for m in metrics if all(r["p_holm"] is None for r in rows if r["metric"] == m)]
    untested: dict[str, list[str]] = {}
    for axis in axes:
        own = [r for r in rows if r["axis"] == axis and (r["metric"] not in idle or idle == metrics)]
        tested = [r for r in own if r["p_holm"] is not None]
        if clear := [r for r in tested if r["clear"]]:
            yield from _by_step(axis, [(r, *_change(study, r)) for r in clear])
        elif tested:
            none = [(r, "no effect found: ", words.change(r, nats=compare.in_nats(study.trials))) for r in tested]
            lacking = [f"{_name(r)} ({r['note']})" for r in own if r["p_holm"] is None]
            yield from _by_step(axis, none, f"; not tested: {words.listing(lacking)}" if lacking else "")
        else:
            untested.setdefault("; ".join(dict.fromkeys(r["note"] for r in own)), []).append(words.label(axis))
    for reason, labels in untested.items():
        yield f"{words.capital(words.listing(labels))}: not tested ({reason})."
    if idle and idle != metrics:
        why = [f"{_name(r)} ({r['note']})" for r in rows if r["axis"] == axes[0] and r["metric"] in idle]
        yield f"Along no axis: not tested: {words.listing(why)}."


def _cases(study: Study) -> Iterator[str]:
    """The cases that changed something, each with what; then those of which the seeds show no change."""
    by_case: dict[str, list[Row]] = {}
    nats = compare.in_nats(study.trials)
    for row in records(cases.changes(study.trials, list(study.axes), reported(study.trials))):
        by_case.setdefault(row["case"], []).append(row)
    calm = []
    for case, rows in by_case.items():
        name = f"{words.clean(case, 40)} ({words.step(rows[0]['axis'], rows[0]['a'], rows[0]['b'])})"
        if clear := [f"{_name(r)} {words.change(r, nats=nats)}" for r in rows if r["clear"]]:
            yield f"Case {name}: {'; '.join(clear)}."
        else:
            calm.append(name)
    if calm:
        seeds = max(row["seeds"] for rows in by_case.values() for row in rows)
        yield f"No change that {words.count(seeds, 'seed')} can tell from chance in {words.listing(calm)}."


def _by_step(axis: str, changes: Iterable[tuple[Row, str, str]], more: str = "") -> Iterator[str]:
    """A sentence for each pair of levels, and what the change depends on: every statistic's change between them."""
    sentences: dict[str, list[str]] = {}
    for row, how, text in changes:
        chosen = " (lowest to highest value)" if (row["note"] or "").startswith("highest against lowest") else ""
        at = (
            f"{words.capital(words.step(axis, row['a'], row['b']))}{chosen}{how if how.startswith(',') else f': {how}'}"
        )
        sentences.setdefault(at, []).append(f"{_name(row)} {text}")
    for i, (at, texts) in enumerate(sentences.items(), 1):
        yield f"{at}{'; '.join(texts)}{more if i == len(sentences) else ''}."


def _change(study: Study, row: Row) -> tuple[str, str]:
    """What it depends on, and the change; where it depends on another axis, at each level of that one alone."""
    if (other := row["other"]) is None:
        return "", words.change(row, nats=compare.in_nats(study.trials))
    trials, axes, (metric,) = study.tested([row["metric"]])
    table = records(simple_effects(trials, axes, metric, row["axis"], (row["a"], row["b"]), other))
    rows = [r for r in table if r["estimate"] is not None]
    shown = rows if len(rows) <= MOST_LEVELS or not ordered(r[other] for r in rows) else [rows[0], rows[-1]]
    nats = compare.in_nats(study.trials)
    at = [f"{words.change(r, r is shown[-1], nats)} at {words.level(r[other], other)}" for r in shown]
    return f", depending on {words.label(other)}: ", words.listing(at) or "not known at any one of its levels"


def _name(row: Row) -> str:
    return words.STATISTICS[row["metric"]]


def _missing(study: Study) -> Iterator[str]:
    numbers = study.outcomes
    if numbers["damaged"]:
        ids = words.listing([d.trial_id for d in study.damaged[:5]])
        yield f"{words.count(numbers['damaged'], 'trial')} damaged and left out of every number: {ids}."
    absent = [f"{numbers[kind]} {kind}" for kind in ("unfinished", "failed") if numbers[kind]]
    if absent:
        yield f"Trials in no mean: {words.listing(absent)} (see Runs)."
    if numbers["not judged"]:
        yield f"Done trials without a verdict: {words.listing(_reasons(study))}."
    cells = study.cells[study.cells["case"].isna()] if len(study.cells) else study.cells
    if len(cells) and study.searched is None and (short := int((cells["n"] < cells["n"].max()).sum())):
        verb = "lacks" if short == 1 else "lack"
        yield f"{short} of {len(cells)} cells {verb} seeds that others have ({int(cells['n'].max())})."
    if notes := int(study.trials["note"].notna().sum()):
        yield f"{words.count(notes, 'record')} read without a torn last line (a trial still running, or killed)."


def _stopped(study: Study) -> Iterator[str]:
    """How many trials a rule has ended, when, what that saved, and what is known of them."""
    trials = study.trials
    for rule in levels_of(trials.loc[trials["state"] == "stopped", "stop_reason"]):
        stopped = trials[(trials["state"] == "stopped") & (trials["stop_reason"] == rule)]
        shares = stopped["steps_done"] / stopped["steps_planned"]
        saved = float((stopped["steps_planned"] - stopped["steps_done"]).sum() / trials["steps_planned"].sum())
        when = dict.fromkeys(f"{100 * share:.0f}" for share in (shares.min(), shares.max()))
        verb = "was" if len(stopped) == 1 else "were"
        so_far = [f"{n} {v}" for v, n in compare.verdicts(stopped).items() if n]
        yield (
            f"{len(stopped)} of {words.count(len(trials), 'trial')} {verb} ended early by the rule {rule} (at "
            f"{'-'.join(when)} % of their steps): {words.percent(saved)} of the planned steps saved. They have no "
            f"final loss and are in no mean, no effect and no recipe, and a level with one of them counts as not stable"
            f"{f'; as far as they ran, {words.listing(so_far)}' if so_far else ''}."
        )


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
    if len(levels_of(study.trials["seed"])) == 1 and study.searched is None:
        yield "One seed: no interval and no test is possible; a difference may be chance."
    elif (
        1 < (seeds := len(levels_of(study.trials["seed"].dropna()))) < FEW_SEEDS
        and study.grid.axes
        and study.searched is None
    ):
        yield f"{seeds} seeds: intervals are wide, and a small effect can be missed."
    evaluable = study.trials.loc[study.trials["verdict"] == "stable", "n_evaluable"]
    if len(evaluable) and int(evaluable.min()) < MARGIN_STEPS:
        yield (
            f"Stable trials have as few as {int(evaluable.min())} evaluable steps: what is stable in them may be "
            f"unstable in longer ones (margins are stated from {MARGIN_STEPS} on)."
        )
    epochs = study.trials["epochs"].dropna()
    if len(epochs) and float(epochs.max()) > 1:
        yield f"The training part was read up to {words.number(float(epochs.max()))} times (epochs)."

"""Last lines of a launch: how far the learning rate can be raised, and what to use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stabstudy.analysis import adaptive, searches, words
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.state import ENDED

Row = Mapping[str, Any]

MOST = 3
"""Levels, conditions or cells that are named; the report has the others."""

_HOLDS = {"stable": "stable up to", "works": "works up to"}


def lines(study: Study, answer: Row) -> list[str]:
    """Two to four lines, of the answer that `answer.answer` makes of the study; none of a study of other logs.

    What has not ended is counted and nothing is said of it: a level with such a trial has no limit, and a recipe is
    made of cells alone whose every seed is done.
    """
    if study.ingested:
        return []
    if not (study.trials["state"] == "done").any():
        return ["nothing to say yet: no trial is done"]
    return [*_unfinished(study), *_answered(study, answer)]


def _answered(study: Study, answer: Row) -> Iterator[str]:
    if answer["frontier"]:
        yield f"{_HOLDS[answer['frontier'][0]['holds']]}: {_listed([_edge(edge) for edge in answer['frontier']])}"
    elif adaptive.why_biased(study) is not None:
        yield from _best(study)
    else:
        yield from _limits(study, answer["stable_up_to"])
        yield from _recipes(answer["recipes"])


def _unfinished(study: Study) -> Iterator[str]:
    """How many trials have no result."""
    left = int((~study.trials["state"].isin(ENDED)).sum()) + len(study.damaged)
    total = len(study.trials) + len(study.damaged)
    if left:
        yield f"so far: {left} of {words.count(total, 'trial')} {'has' if left == 1 else 'have'} no result"


def _limits(study: Study, rows: list[Row]) -> Iterator[str]:
    """The limit of each level of the depth, or of the one other axis; behind it the command for what lies beyond."""
    if not rows:
        return
    setting = rows[0]["setting"]
    largest = study.grid.axes[setting][-1]
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault(_limit(row, largest), []).append(row["at"])
    parts = [f"{held}{_at_all(levels)} ({why})" for (held, why), levels in alike.items()]
    yield f"stable up to: {_listed(parts)}"
    commands = dict.fromkeys(row["next"]["stable"] for row in rows)
    if command := next(filter(None, commands), None):
        yield f"where it ends: {command}"


def _limit(row: Row, largest: Any) -> tuple[str, str]:
    """'learning rate 0.03' and 'at 0.3, 4 of 6 trials are not'."""
    label = words.label(row["setting"])
    if row["reason"] is not None:
        return f"{label} not known", row["reason"]
    if row["all_stable"] is None and row["first_unstable"] is None:
        return f"{label} not known", "at none is every trial judged stable"
    held = f"no {label} tried" if row["all_stable"] is None else f"{label} {words.level(row['all_stable'])}"
    if row["first_unstable"] is not None:
        bad, there = row["n_unstable"], words.count(row["n_there"], "trial")
        return held, f"at {words.level(row['first_unstable'])}, {bad} of {there} {_are(bad)} not"
    return held, "the largest tried" if row["all_stable"] == largest else "no verdict above"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _at_all(levels: list[Row]) -> str:
    """' at depth 2 and 6'; empty where there is one row for the whole grid."""
    (name, _), *_ = levels[0].items() if levels[0] else [("", None)]
    if not name:
        return ""
    return f" at {words.label(name)} {words.listing([words.level(at[name], name) for at in levels])}"


def _recipes(recipes: list[Row]) -> Iterator[str]:
    """A line for each condition, and one for those that have none."""
    usable = [each for each in recipes if each["use"] is not None]
    for each in usable[:MOST]:
        loss, given = each["final_loss"], f"{_levels(each['given'])}: " if each["given"] else ""
        mean = words.estimate(loss["mean"], loss["low"], loss["high"], 4)
        yield (
            f"use: {given}{_levels(each['use']) or 'these settings'} (final loss {mean}, "
            f"{words.count(loss['seeds'], 'seed')}{_rivals(each)}{_ends(each)})"
        )
    if more := len(usable) - MOST:
        yield from [f"use: {words.count(more, 'more recipe')} in the report"] if more > 0 else []
    missing: dict[str, list[str]] = {}
    for each in recipes:
        if each["use"] is None:
            missing.setdefault(each["reason"], []).append(_levels(each["given"]))
    for reason, conditions in missing.items():
        named = [name for name in conditions if name]
        yield f"use: no recipe{f' for {_listed(named)}' if named else ''}: {reason}"


def _rivals(each: Row) -> str:
    ties, others = len(each["ties"]), words.count(each["candidates"] - 1, "other stable cell")
    return f", tied with {ties} of {others}" if ties else ""


def _ends(each: Row) -> str:
    """'; learning rate 3e-3 is the smallest tried': what of the recipe is an end."""
    ends = {end: [axis for axis in each["ends"] if each["ends"][axis] == end] for end in ("smallest", "largest")}
    named = {end: words.listing([words.at_levels([a], [each["use"][a]]) for a in axes]) for end, axes in ends.items()}
    return "".join(f"; {named[end]} {_are(len(ends[end]))} the {end} tried" for end in ends if ends[end])


def _levels(levels: Row) -> str:
    return words.at_levels(levels, levels.values())


def _edge(edge: Row) -> str:
    """'learning rate 0.235 (0.225 to 0.263) at depth 2'."""
    where = ", ".join(filter(None, (edge["case"] and words.clean(edge["case"], 40), _levels(edge["at"]))))
    value = {"beyond": "beyond the range searched", "below": "below the range searched"}.get(edge["status"])
    if value is None and edge["estimate"] is not None:
        ends = [words.number(edge[end]) if edge[end] is not None else "the range's end" for end in ("low", "high")]
        is_open = "; open" if edge["status"] == "open" else ""
        value = f"{words.number(edge['estimate'])} ({' to '.join(ends)}{is_open})"
    return f"{words.label(edge['setting'])} {value or 'not known yet'}{f' at {where}' if where else ''}"


def _best(study: Study) -> Iterator[str]:
    """The best cell of a search by its objectives."""
    history = searches.search_history(study.folder, study.tables.trials)
    if history is None or not history.front:
        yield "best: none of the cells that have ended fulfils what was asked"
        return
    names = [COLUMNS[o.column].label if o.column in COLUMNS else o.column for o in history.search.objectives]
    cell = history.suggestions[history.front[0]]
    results = [f"{name} {words.number(value)}" for name, value in zip(names, cell.objectives, strict=True)]
    n = words.count(len(cell.trial_ids), "seed")
    others = f", one of {len(history.front)} that none beats in all" if len(history.front) > 1 else ""
    yield f"best: {_levels(cell.values)} ({words.listing(results)}; mean of {n}{others})"
    yield "as the best of many it was lucky too: train it again with other seeds"


def _listed(parts: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f"; {len(parts) - MOST} more in the report" if len(parts) > MOST else ""
    return f"{'; '.join(parts[:MOST])}{more}"

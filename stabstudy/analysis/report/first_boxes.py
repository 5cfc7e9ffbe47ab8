"""Two of the first screen's boxes for a study over settings: what drives instability, and what to use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabstudy.analysis import adaptive, answer, cases, recipe, words
from stabstudy.analysis.effects import reported, simple_effects
from stabstudy.analysis.elements import Answer, Box, Code, Folded, Point, Text
from stabstudy.analysis.levels import Level, records
from stabstudy.analysis.recipe import NoRecipe, Recipe
from stabstudy.analysis.report.design_line import plural
from stabstudy.analysis.report.recipe_formats import overrides, yaml_scalar
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import too_few

Row = Mapping[str, Any]
Line = Point | Text | Code
Item = Answer | Line | Folded

ROUGHNESS, LOSS = "grad_norm_log_sd", "final_loss"

DRIVERS = "What drives instability"
USE = "Use"

MOST_AXES = 4
"""Axes, and cases, up to which the box answers all at once."""

FIRST_AXES = 3
"""Of more those that it answers at once."""

MOST_FOLDED = 12
"""Axes, and cases, that it answers on demand; of more it says where the others are."""

MOST_KNOBS = 3
"""Settings up to which the overrides that say one of several recipes again are shown at once."""

MOST_LEVELS = 3
"""Levels of another axis at which an effect that depends on it is given; of more the first and the last."""

MOST_TIES = 160
"""Letters of what a recipe is tied with that the box holds."""

MOST_RECIPES = 3
"""Different recipes that the box holds."""


@dataclass(frozen=True)
class Shares:
    """Rows of `Study.importance` for the axes, or the `reason` why there are none."""

    axes: tuple[str, ...]
    rows: tuple[Row, ...] = ()
    reason: str | None = None

    def of(self, metric: str) -> Row | None:
        """The row of a statistic; None where it is not known."""
        return next((row for row in self.rows if row["metric"] == metric and row["reason"] is None), None)


def shares(study: Study) -> Shares:
    """The shares of variance, where the trials can carry so many axes."""
    axes = tuple(study.grid.axes)
    done = int((study.grid.trials["state"] == "done").sum())
    if not axes or not done:
        return Shares(axes, reason="nothing varies but the seed" if done else "no trial is done")
    if (bias := adaptive.why_biased(study)) is not None:
        return Shares(axes, reason=bias)
    if few := too_few(done, len(axes)):
        return Shares(axes, reason=few)
    table = study.importance()
    return Shares(tuple(n for n in (*axes, "seed") if n in table), tuple(records(table)))


def drivers_box(study: Study, known: Shares) -> Box:
    """The share of each axis in the variance of roughness; then what each axis did to roughness and loss."""
    rows = records(study.claims()) if study.grid.axes else []
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    row = known.of(ROUGHNESS)
    axes.sort(key=lambda axis: -(row[axis] or 0.0) if row is not None else 0.0)
    by_axis = {axis: [r for r in rows if r["axis"] == axis] for axis in axes}
    points = [_axis_point(study, own) for own in by_axis.values()]
    tested = records(cases.changes(study.trials, list(study.axes), reported(study.trials)))
    names = list(dict.fromkeys(row["case"] for row in tested))
    names.sort(key=lambda name: not any(r["clear"] for r in tested if r["case"] == name))
    points += [_case_point(study, [r for r in tested if r["case"] == name]) for name in names]
    return Box(DRIVERS, [*_most(known, rows), *_some(points)])


def _some(points: Sequence[Point]) -> Iterator[Item]:
    """The first of the answers; more of them on demand."""
    shown = len(points) if len(points) <= MOST_AXES else FIRST_AXES
    yield from points[:shown]
    if rest := points[shown:]:
        beyond = len(rest) - MOST_FOLDED
        where = [Text(f"{beyond} more: see Effects.")] if beyond > 0 else []
        yield Folded(f"{len(rest)} more", [*rest[:MOST_FOLDED], *where])


def _most(known: Shares, rows: Sequence[Row]) -> Iterator[Item]:
    """The axis with the largest share, and the shares of the others; else what the tests found."""
    row = known.of(ROUGHNESS)
    if row is None:
        reason = known.reason or next((r["reason"] for r in known.rows if r["metric"] == ROUGHNESS), None)
        yield _by_tests(rows)
        yield Text(f"Shares of the variance of roughness: not computed{f' ({reason})' if reason else ''}.")
        return
    ranked = sorted((a for a in known.axes if a != "seed"), key=lambda a: -(row[a] or 0.0))
    first, *others = ranked
    yield Answer(words.label(first), f"explains {_percent(row[first])} of the variance of roughness")
    rest = [f"{words.label(a)} {_percent(row[a])}" for a in others]
    chance = [f"seed {_percent(row['seed'])} (chance)"] if "seed" in known.axes else []
    if rest or chance:
        yield Text(f"{words.capital(', '.join([*rest, *chance]))}.")


def _by_tests(rows: Sequence[Row]) -> Answer:
    own = [r for r in rows if r["metric"] == ROUGHNESS]
    clear = [words.label(r["axis"]) for r in own if r["clear"]]
    if clear:
        return Answer(words.listing(clear), f"change{'s' if len(clear) == 1 else ''} roughness")
    if any(r["p_holm"] is not None for r in own):
        return Answer("No effect found", "of any axis on roughness")
    return Answer("Not tested", "whether an axis changes roughness" if rows else "nothing varies but the seed")


def _percent(share: float | None) -> str:
    return words.NOTHING if share is None else f"{100 * share:.0f} %"


def _axis_point(study: Study, rows: Sequence[Row]) -> Point:
    """One axis: roughness, then the loss in words; other statistics by name where they changed."""
    first = next((r for r in rows if r["metric"] == ROUGHNESS and r["estimate"] is not None), None)
    first = first or next((r for r in rows if r["estimate"] is not None), None)
    if first is None:
        return Point(f"{words.capital(words.label(rows[0]['axis']))}:", f"not tested ({rows[0]['note']})")
    return Point(
        f"{words.capital(words.step(rows[0]['axis'], first['a'], first['b']))}:", f"{_results(study, rows, first)}."
    )


def _case_point(study: Study, rows: Sequence[Row]) -> Point:
    row = rows[0]
    lead = f"Case {words.clean(row['case'], 40)} ({words.step(row['axis'], row['a'], row['b'])}):"
    return Point(lead, f"{_results(study, rows, row)}.")


def _results(study: Study, rows: Sequence[Row], first: Row) -> str:
    """Roughness and loss with their intervals; together where both depend on one other axis."""
    named = {r["metric"]: r for r in rows}
    own = [named[m] for m in (ROUGHNESS, LOSS) if m in named]
    alike = {(r["a"], r["b"], r.get("other")) for r in own if r["clear"] and r.get("other") is not None}
    if len(alike) == 1 and all(r["clear"] and r.get("other") is not None for r in own):
        return _simple(study, own)
    return "; ".join(_result(study, row, first) for row in own)


def _result(study: Study, row: Row, first: Row) -> str:
    name, axis = _name(row), row["axis"]
    if row["p_holm"] is None:
        return f"{name} not tested ({row['note']})" if row["note"] else f"{name} not tested"
    other_levels = (row["a"], row["b"]) != (first["a"], first["b"])
    between = f" ({words.level(row['a'], axis)} to {words.level(row['b'], axis)})" if other_levels else ""
    if not row["clear"]:
        return f"no effect found on {name}{between}, {_signed(row)}"
    if row.get("other") is not None:
        return f"{_simple(study, [row])}{between}"
    return f"{_clear(name, row)}{between}"


def _name(row: Row) -> str:
    return "loss" if row["metric"] == LOSS else words.STATISTICS[row["metric"]]


def _clear(name: str, row: Row) -> str:
    """What is clear, as `loss higher by 0.047 [0.022, 0.072]`; a ratio as it is."""
    if row["scale"] != "difference" or row["low"] * row["high"] <= 0:
        return f"{name} {_signed(row)}"
    way = "higher" if row["estimate"] > 0 else "lower"
    low, high = (words.number(v, 2) for v in sorted(abs(row[end]) for end in ("low", "high")))
    return f"{name} {way} by {words.number(abs(row['estimate']), 2)} [{low}, {high}]"


def _signed(row: Row) -> str:
    """`+0.047 [0.022, 0.072]` of a difference, `×3.08 [2.87, 3.31]` of a ratio."""
    if row["scale"] != "difference":
        return words.change(row)
    sign = "+" if row["estimate"] > 0 else ""
    return f"{sign}{words.number(row['estimate'], 2)} [{words.number(row['low'], 2)}, {words.number(row['high'], 2)}]"


def _simple(study: Study, rows: Sequence[Row]) -> str:
    """Effects at each level of the axis on which they depend; of many the first and the last."""
    other, names = rows[0]["other"], [_name(row) for row in rows]
    tables = [_at_levels(study, row) for row in rows]
    levels = [level for level in tables[0] if all(level in table for table in tables)]
    if not levels:
        return f"{words.listing(names)} depend{'s' if len(names) == 1 else ''} on {words.label(other)}"
    shown = levels if len(levels) <= MOST_LEVELS else [levels[0], levels[-1]]
    parts = [
        f"{'' if i else f'{words.label(other)} '}{words.level(level, other)}, "
        + ", ".join(f"{name} {_signed(table[level])}" for name, table in zip(names, tables, strict=True))
        for i, level in enumerate(shown)
    ]
    return f"at {'; at '.join(parts)}"


def _at_levels(study: Study, row: Row) -> dict[Level, Row]:
    """The effect at each level of the axis on which it depends, where it is known."""
    trials, axes, (metric,) = study.tested([row["metric"]])
    table = records(simple_effects(trials, axes, metric, row["axis"], (row["a"], row["b"]), row["other"]))
    return {r[row["other"]]: r for r in table if r["estimate"] is not None}


def use_box(study: Study, known_commands: Sequence[str], pending: int) -> Box:
    """Each recipe with the conditions that share it; then the conditions without one."""
    answers = recipe.answers(study)
    recipes = [a for a in answers if isinstance(a, Recipe)]
    missing = [a for a in answers if isinstance(a, NoRecipe)]
    groups: dict[str, list[Recipe]] = {}
    for each in recipes:
        groups.setdefault(_knobs(each), []).append(each)
    shown = list(groups.values())[:MOST_RECIPES]
    notes = [list(_notes(study, own, known_commands)) for own in shown]
    shared = [note for note in notes[0] if all(note in lines for lines in notes)] if len(notes) > 1 else []
    items: list[Item] = []
    for alike, lines in zip(shown, notes, strict=True):
        lead, code, loss = _recipe_items(alike, recipes, pending)
        rest = [note for note in lines if note not in shared]
        if len(shown) == 1:
            items += [lead, code, loss, *rest]
        elif len(alike[0].levels) <= MOST_KNOBS:
            items += [lead, code, loss, *([Folded("What it rests on", rest)] if rest else [])]
        else:
            items += [lead, loss, Folded("As overrides, and what it rests on", [code, *rest])]
    items += shared
    if more := len(groups) - MOST_RECIPES:
        items += [Text(f"{words.count(more, 'more recipe')}: see Methods.")] if more > 0 else []
    items += _missing(missing, bool(recipes), pending)
    items += [Text(f"{words.count(pending, 'trial')} still to come.")] if pending and recipes else []
    return Box(USE, items)


def _missing(missing: Sequence[NoRecipe], some: bool, pending: int) -> Iterator[Item]:
    if pending and missing:
        lead = "No recipe yet" if not some else f"No recipe yet for {_conditions(missing)}"
        rest = "no cell has ended with every seed stable"
        yield (
            Answer(lead, f"{words.count(pending, 'trial')} still to come")
            if not some
            else Point(f"{lead}:", f"{rest}.")
        )
        yield from [Text(f"{words.capital(rest)}.")] if not some else []
        return
    if missing and not some:
        yield Answer("No recipe")
    for reason in dict.fromkeys(m.reason for m in missing):
        named = _conditions([m for m in missing if m.reason == reason])
        yield Point(f"No recipe for {named}:" if named else "Why:", f"{reason}.")


def _conditions(missing: Sequence[NoRecipe]) -> str:
    return words.either([words.at_levels(m.given, m.given.values()) for m in missing if m.given])


def _knobs(each: Recipe) -> str:
    return words.at_levels(each.levels, each.levels.values())


def _recipe_items(own: Sequence[Recipe], every: Sequence[Recipe], pending: int) -> tuple[Answer, Code, Text]:
    """A recipe, the conditions under which it is the answer, how to type it, and its loss."""
    where = [words.at_levels(r.given, r.given.values()) for r in own if r.given]
    scope = "" if not where else f"at {_every(own)}" if len(own) == len(every) > 1 else f"at {words.listing(where)}"
    so_far = "so far" if pending else ""
    lead = Answer(_knobs(own[0]) or "These settings", ", ".join(filter(None, (scope, so_far))))
    if own[0].levels:
        code = Code("", " ".join(f"{axis}={yaml_scalar(level)}" for axis, level in own[0].levels.items()))
    else:
        code = Code("As overrides of this tool", "\n".join(overrides(own[0].given, own[0].settings)))
    return lead, code, Text(_losses(own))


def _notes(study: Study, own: Sequence[Recipe], known: Sequence[str]) -> Iterator[Line]:
    """The margin of a recipe, what it is tied with, where it lies in the grid, and the commands that find its limit."""
    for text in (_margins, _ties):
        yield from (Text(each) for each in text(own))
    ends = [f"the {end} {words.label(axis)}" for axis, end in own[0].ends.items()]
    if ends:
        yield Point("Edge of the grid:", f"{words.listing(ends)} tried.")
    commands = dict.fromkeys(c for r in own if (c := answer.margin_command(study, r)) is not None and c not in known)
    yield from (Code("Find its limit", command) for command in commands)


def _every(own: Sequence[Recipe]) -> str:
    """`both depths`, `all 3 depths`."""
    if len(own[0].given) == 1:
        (axis,) = own[0].given
        return all_levels(axis, len(own))
    return f"every {' and '.join(words.label(axis) for axis in own[0].given)}"


def _losses(own: Sequence[Recipe]) -> str:
    """Each loss with its interval, `2.536 ± 0.052 nat/token (depth 2)`, and how many seeds it rests on."""
    parts = []
    for i, each in enumerate(own):
        loss = words.estimate(each.loss.mean, each.loss.low, each.loss.high, 4)
        at = f" ({words.at_levels(each.given, each.given.values())})" if each.given and len(own) > 1 else ""
        parts.append(f"{loss}{each.unit if not i else ''}{at}")
    seeds = sorted({r.loss.n for r in own})
    number = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    noise = sum(r.noise for r in own)
    noisy = f"; {noise} of its trials rough or spiky by sampling noise" if noise else ""
    rests = f"{number} seed{'' if seeds[-1] == 1 else 's'}{' each' if len(own) > 1 else ''}"
    return f"Loss {', '.join(parts)}; {rests}{noisy}."


def _by_text(own: Sequence[Recipe], texts: Iterable[str]) -> Iterator[str]:
    """Each text once, with the conditions where it holds unless that is all of them."""
    groups: dict[str, list[Recipe]] = {}
    for each, text in zip(own, texts, strict=True):
        if text:
            groups.setdefault(text, []).append(each)
    for text, members in groups.items():
        at = [words.at_levels(r.given, r.given.values()) for r in members if r.given]
        all_of_them = len(members) == len(own)
        yield f"{words.capital(text)}." if all_of_them or not at else f"{words.capital(words.listing(at))}: {text}."


def _margins(own: Sequence[Recipe]) -> Iterator[str]:
    return _by_text(own, ("" if r.margin is None else recipe.room(r.margin) for r in own))


def _ties(own: Sequence[Recipe]) -> Iterator[str]:
    return _by_text(own, (_short(recipe.rivals(r)) if r.levels else "" for r in own))


def _short(rivals: str) -> str:
    """Without the list of the tied cells where that is long: the sentences below the boxes have it."""
    return rivals if len(rivals) <= MOST_TIES else f"{rivals.partition(': ')[0]}: see the full sentences"


def levels_text(axis: str, levels: Sequence[Level]) -> str:
    """`depth 2 and 6`."""
    return f"{words.label(axis)} {words.listing([words.level(v, axis) for v in levels])}"


def all_levels(axis: str, number: int) -> str:
    """`both depths`."""
    return f"{'both' if number == 2 else f'all {number}'} {plural(axis)}"

"""Frontier section of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stabstudy.analysis import commands, forecasts, words
from stabstudy.analysis.elements import Block, Figure, Table, Text
from stabstudy.analysis.figures import registry
from stabstudy.analysis.figures.frontier_plot import interval, name_of
from stabstudy.analysis.forecast import FEWEST_SIZES
from stabstudy.analysis.forecasts import Registered
from stabstudy.analysis.frontier import Finding as Oddity
from stabstudy.analysis.frontiers import CellEdge, Frontier
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level
from stabstudy.analysis.study import Study
from stabstudy.store import StoreError

HOLD = {"stable": "is stable", "works": "works"}
RULES = {
    "stable": "a trial holds whose verdict is stable; one that is untrained does not, above the best value",
    "works": "from the best value upwards a trial holds that did not diverge and whose final loss is within "
    f"{STABLE_MARGIN:g} nat/token of the best",
}
"""What holding means, in words."""

MOST_CELLS = 8
"""Cells that the first screen names, and forecasts."""

RARE = 0.05
"""Chance, under the fitted boundary, below which a value that contradicts an interval is named in a sentence."""


def findings(study: Study, of: Frontier) -> Iterator[str]:
    """The edges, what is open, what contradicts them, what they cost, and the forecasts."""
    yield from edges(of)
    if (more := len(of.cells) - MOST_CELLS) > 0:
        yield f"{words.count(more, 'more cell')}: see Frontier."
    yield from _unfinished(study, of)
    yield from _oddities(of)
    yield _cost(of)
    yield from list(forecast_sentences(study, of))[:MOST_CELLS]


def edges(of: Frontier) -> list[str]:
    """A sentence for each of the first cells of which something is known."""
    return [_edge(of, cell) for cell in of.cells[:MOST_CELLS] if cell.edge.n]


def _edge(of: Frontier, cell: CellEdge) -> str:
    """A sentence such as 'Learning rate is stable up to 0.235 [0.225, 0.263] (depth 2, 13 trials)'."""
    edge, setting = cell.edge, words.capital(words.label(of.asked.setting))
    rests = f"({', '.join(filter(None, (name_of(cell), words.count(edge.n, 'trial'))))})"
    holds = f"{setting} {HOLD[of.asked.holds]}"
    if edge.status == "beyond":
        return f"{holds} up to {words.level(of.asked.high)} {rests}, the largest value searched: the edge lies beyond."
    if edge.status == "below":
        negated = holds.replace("works", "does not work").replace("is stable", "is not stable")
        return (
            f"{negated} even at {words.level(of.asked.low)} {rests}, the smallest value searched: the edge lies below."
        )
    about, state = ("", "") if edge.status == "resolved" else ("about ", "; open")
    return f"{holds} up to {about}{words.number(edge.estimate)} {interval(edge)} {rests[:-1]}{state})."


def _unfinished(study: Study, of: Frontier) -> Iterator[str]:
    """What is not known yet, with the command that goes on."""
    asked = of.asked
    opened = [c for c in of.cells if c.edge.status == "open"]
    if opened:
        again = commands.relaunch(study)
        more = "launch again, with more seeds or a larger limit where it trains nothing new"
        do = more if again is None else f"{more}: {again}"
        which = "" if len(opened) == len(of.cells) else _cells(opened)
        yield f"Not yet within the resolution {asked.resolution:g}{which}: {do}"
    for status, where, wider in (
        ("beyond", "above", commands.above(asked)),
        ("below", "below", commands.below(asked)),
    ):
        if own := [c for c in of.cells if c.edge.status == status]:
            if wider is None:
                yield f"The setting allows nothing {where} the range{_cells(own)}."
            elif (again := commands.extended(study, wider)) is not None:
                yield f"This searches {where} the range{_cells(own)}: {again}"


def _cells(cells: Sequence[CellEdge]) -> str:
    """` (depth 2; depth 4)`; empty for a study of one cell."""
    names = [name_of(cell) for cell in cells if name_of(cell)]
    more = f"; and {len(names) - MOST_CELLS} more" if len(names) > MOST_CELLS else ""
    return f" ({'; '.join(names[:MOST_CELLS])}{more})" if names else ""


def _oddities(of: Frontier) -> Iterator[str]:
    """Values whose trials contradict the interval: those that chance hardly makes by name, the others by number."""
    every = [(cell, odd) for cell in of.cells for odd in cell.edge.exceptions]
    yield from (_oddity(of, cell, odd) for cell, odd in every if odd.chance < RARE)
    if likely := sum(odd.chance >= RARE for _, odd in every):
        yield (
            f"{words.count(likely, 'value')} {'contradicts' if likely == 1 else 'contradict'} the intervals as chance "
            f"may make them (each {RARE:g} or more under the fitted boundary): see the table under Frontier."
        )


def _oddity(of: Frontier, cell: CellEdge, odd: Oddity) -> str:
    """A value whose trials contradict the interval."""
    where = f"at {name}, " if (name := name_of(cell)) else ""
    value, trials = words.level(float(odd.value)), words.count(odd.n, "trial")
    side, verb = ("above", "hold again") if odd.holds else ("below", "do not hold")
    if odd.n == 1:
        verb = "holds again" if odd.holds else "does not hold"
    which = "the one trial" if odd.n == 1 else f"all {trials}"
    return (
        f"Not monotone: {where}{which} at {words.label(of.asked.setting)} {value} {verb}, {side} the interval "
        f"{interval(cell.edge)} (chance of that under the fitted boundary: {words.number(odd.chance, 2)})."
    )


def _cost(of: Frontier) -> str:
    trials = [t for cell in of.cells for t in cell.trials]
    silent = sum(t.holds is None for t in trials)
    untrained = sum(t.holds is False and t.is_untrained for t in trials)
    verb = "is" if untrained == 1 else "are"
    notes = [f"{untrained} of those that do not hold {verb} untrained"] if untrained else []
    notes += [f"{silent} {'says' if silent == 1 else 'say'} nothing of the edge"] if silent else []
    return (
        f"The search took {words.count(len(trials), 'trial')} and {sum(c.steps for c in of.cells):,} steps"
        f"{f'; {words.listing(notes)}' if notes else ''}."
    )


def forecast_sentences(study: Study, of: Frontier) -> Iterator[str]:
    """Each forecast: what is expected, or how it compares with what was measured."""
    try:
        registered = forecasts.known(study.folder, of)
    except StoreError as error:
        yield f"Forecasts are not shown: {str(error).replace(f'{study.folder.path}/', '')}."
        return
    yield from (_forecast(of, one) for one in registered)


def _forecast(of: Frontier, one: Registered) -> str:
    at = "".join(f", {text}" for text in [words.at_levels(one.at, one.at.values())] if text)
    where = f"{words.label(one.axis)} {words.level(one.size, one.axis)}{at}"
    expected = f"{words.number(one.estimate)} [{words.number(one.low)}, {words.number(one.high)}]"
    edge = forecasts.measured(one, of)
    if edge is None:
        return (
            f"At {where} the edge of the {words.label(one.setting)} is forecast at {expected} (power law through "
            f"{len(one.measured)} sizes); the largest measured size, held out, was off by a factor "
            f"{words.number(10 ** abs(one.held_out), 2)}."
        )
    before = f"At {where} the edge of the {words.label(one.setting)} had been forecast at {expected}"
    if edge.status != "resolved":
        return f"{before}; measured so far: {words.number(edge.estimate)} {interval(edge)} ({edge.status})."
    off = max(edge.estimate / one.estimate, one.estimate / edge.estimate)
    side = "inside" if one.low <= edge.estimate <= one.high else "outside"
    return (
        f"{before} and was measured at {words.number(edge.estimate)} {interval(edge)}: off by a factor "
        f"{words.number(off, 2)}, {side} the interval of the forecast."
    )


def levels(study: Study, axis: str, values: Sequence[Level]) -> str:
    """The levels of an axis in words; of what was searched the range, and how many values were tried."""
    if study.searched is None or axis != (asked := study.searched.asked).setting:
        return ", ".join(words.level(v, axis) for v in values)
    tried = [words.level(v, axis) for v in values]
    ends = f"{words.level(asked.low)} to {words.level(asked.high)}"
    return f"searched from {ends}: {words.count(len(tried), 'value')} tried, {tried[0]} to {tried[-1]}"


def section(study: Study, of: Frontier) -> Iterator[Block]:
    """Rule and range, the figures, the table of every cell by each rule, the forecasts."""
    asked = of.asked
    kind = "a factor" if asked.scale.log else "a difference"
    name = words.capital(words.label(asked.setting))
    yield Text(
        f"{name} was searched between {words.level(asked.low)} and {words.level(asked.high)}, to {kind} of "
        f"{asked.resolution:g}; the rule is {asked.holds}: {RULES[asked.holds]}. An edge is the median of its "
        "posterior with its 90 % interval, under a boundary of which all cells share the width; values whose trials "
        "contradict it stand in the table and are never left out."
    )
    yield from (figure for figure in registry.search_figures(study) if isinstance(figure, Figure))
    yield _table(study, of)
    yield from map(Text, forecast_sentences(study, of))
    yield from map(Text, _no_forecast(of))


def _table(study: Study, of: Frontier) -> Table:
    rows = []
    for rule in sorted(RULES, key=lambda rule: rule != of.asked.holds):
        for cell in of.cells:
            if (edge := cell.edges.get(rule)) is not None:
                odd = ", ".join(words.level(float(e.value)) for e in edge.exceptions)
                numbers = (words.number(edge.estimate), words.number(edge.low), words.number(edge.high), str(edge.n))
                known = numbers if edge.n else (*[words.NOTHING] * 3, "0")
                rows.append(
                    (name_of(cell) or "every trial", rule, *known, edge.status, odd or words.NOTHING, f"{cell.steps:,}")
                )
    heads = ("cell", "holds", "edge", "low", "high", "trials", "status", "contradicted at", "steps")
    title = f"Edges of {words.label(of.asked.setting)}: estimate and 90 % interval"
    return Table(title, heads, tuple(rows), frozenset({"edge", "low", "high", "trials", "steps"}))


def _no_forecast(of: Frontier) -> Iterator[str]:
    """Why there is no forecast along an axis of sizes."""
    few = [line for line in forecasts.lines(of) if len(line.resolved) < FEWEST_SIZES]
    for axis in dict.fromkeys(line.axis for line in few):
        most = max(len(line.resolved) for line in few if line.axis == axis)
        yield (
            f"Forecast along {words.label(axis)}: needs {FEWEST_SIZES} sizes with a resolved edge at equal "
            f"levels of everything else, got {most}."
        )

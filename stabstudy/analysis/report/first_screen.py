"""The boxes of a report's first screen: what is stable, what drives instability, what to use.

Every kind of study has the same three, with what is true of it. Limits, recipes and commands are those of `answer`. Of
a cell with a trial that has not ended nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import adaptive, answer, commands, compare, recipe, words
from stabstudy.analysis.elements import Answer, Bar, Box, Code, Count, Figure, Pointer, Text
from stabstudy.analysis.figures import sketches
from stabstudy.analysis.figures.frontier_plot import interval, name_of
from stabstudy.analysis.frontiers import CellEdge, Frontier
from stabstudy.analysis.holding import STABLE_MARGIN
from stabstudy.analysis.levels import Level
from stabstudy.analysis.recipe import LR, MARGIN_STEPS, Recipe
from stabstudy.analysis.report import findings, first_boxes, frontier_page, ingested_page, trial_page
from stabstudy.analysis.report.design_line import settled, to_come
from stabstudy.analysis.report.first_boxes import DRIVERS, USE, Item, Shares, all_levels, levels_text
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import verdicts_by_noise
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

STABLE = "Stable up to"
SHOWN = 3
"""Cells, runs and edges that a box names; of more it says how many."""

ODD = 2
"""Statements on a search, beside its edges."""

FIND = "Find the limit"
"""Title of a command that searches beyond the grid."""


def boxes(study: Study, known: Shares) -> list[Box]:
    """The three boxes. `known`: the shares of variance of `settled(study)`."""
    if not len(study.trials):
        return _empty(study)
    if study.ingested:
        return list(_ingested(study))
    if study.searched is not None:
        return list(_frontier(study, study.searched))
    part, pending = settled(study), to_come(study)
    stable = Box(STABLE if LR in study.grid.axes else "Stability", list(_stable(study, pending)))
    shown = [item.text for item in stable.items if isinstance(item, Code)]
    if (bias := adaptive.why_biased(study)) is not None:
        return [
            _all_counts(study, "Stability"),
            Box(DRIVERS, [Answer("Not computed"), Text(f"{_sentence(bias)}")]),
            _best(study),
        ]
    return [stable, _drivers(study, part, known, pending), first_boxes.use_box(study, shown, pending)]


def _sentence(text: str) -> str:
    return f"{words.capital(text)}."


def _bar(study: Study) -> Bar:
    return Bar([Count(kind, n, trial_page.SIGNS[kind]) for kind, n in study.outcomes.items() if n])


def _more(study: Study) -> Iterator[Text]:
    """The counts in a sentence, where it says more than the bar: why there is no verdict, what is sampling noise."""
    if study.outcomes["not judged"] or verdicts_by_noise(study.trials):
        yield Text(findings.headline(study))


def _empty(study: Study) -> list[Box]:
    damaged = study.outcomes["damaged"]
    what = f"{words.count(damaged, 'damaged trial')}" if damaged else "The study holds no trial yet"
    return [
        Box(STABLE, [Answer("Nothing yet"), Text(f"{what}.")]),
        Box(DRIVERS, [Answer("Nothing yet"), Text("No trial has ended.")]),
        Box(USE, [Answer("No recipe yet"), Text("No trial has ended.")]),
    ]


def _all_counts(study: Study, title: str) -> Box:
    numbers = study.outcomes
    judged = sum(numbers[v] for v in VERDICTS)
    return Box(
        title,
        [Answer(f"{numbers['stable']} of {judged}", "judged trials"), _bar(study), *_more(study)],
    )


# A grid


def _stable(study: Study, pending: int) -> Iterator[Item | Bar]:
    """How far the learning rate can grow, under each condition that has its own limit; the counts; what is open."""
    grid, (by, rows) = study.grid, answer.limits(study)
    known = [(level, row) for level, row in rows if row["reason"] is None]
    groups: dict[Answer, list[tuple[Level, Row]]] = {}
    for level, row in known:
        groups.setdefault(_limit(row, grid.axes[LR]), []).append((level, row))
    for text, own in groups.items():
        yield Answer(text.text, ", ".join(filter(None, (text.rest, _where(grid, by, [level for level, _ in own])))))
    if not groups:
        yield _cells(study, pending)
    yield _bar(study)
    yield from _more(study)
    whole = len(groups) == 1 and len(known) == len(rows)
    for own in groups.values():
        scope = "" if by is None or whole else levels_text(by, [level for level, _ in own])
        if lines := list(_limit_lines([row for _, row in own], grid.axes[LR])):
            yield Text(
                f"{words.capital(scope)}: {_small(lines[0])}{' '.join(['', *lines[1:]])}" if scope else " ".join(lines)
            )
    steps = [row["evaluable"] for _, row in known if row["evaluable"] is not None]
    if steps and min(steps) < MARGIN_STEPS:
        yield Text(f"Seen in {words.number(min(steps))} evaluable steps (a margin needs {MARGIN_STEPS}).")
    yield from _unknown(by, [(level, row) for level, row in rows if row["reason"] is not None], pending)
    yield from _by_loss(by, known, len(known) == len(rows))
    yield from _commands(study, by, known)


def _small(text: str) -> str:
    return text[0].lower() + text[1:]


def _where(grid: Study, by: str | None, levels: Sequence[Level]) -> str:
    if by is None:
        return ""
    if len(levels) == len(grid.axes[by]) > 1:
        return f"at {all_levels(by, len(levels))}"
    return f"at {levels_text(by, levels)}"


def _limit(row: Row, grid: Sequence[Level]) -> Answer:
    stable, unstable, name = row["all_stable"], row["first_unstable"], words.label(LR)
    if stable is None and unstable is None:
        return Answer("Not known", "at no learning rate is every trial stable, and none is unstable")
    if stable is None:
        return Answer(
            f"below {name} {words.level(unstable, LR)}",
            "the smallest with a verdict" if unstable != grid[0] else "the smallest tried",
        )
    if unstable is None:
        return Answer(f"{name} {words.level(stable, LR)} or more", "" if stable != grid[-1] else "the largest tried")
    return Answer(f"{name} {words.level(stable, LR)}")


def _limit_lines(rows: Sequence[Row], grid: Sequence[Level]) -> Iterator[str]:
    """Of conditions with one limit: the trials at the first rate that is not stable, and on what the limit rests."""
    first = rows[0]
    stable, unstable = first["all_stable"], first["first_unstable"]
    at_first = [row for row in rows if row["first_unstable"] == unstable]
    if unstable is not None:
        bad, there = (sum(int(row[name]) for row in at_first) for name in ("n_unstable", "n_there"))
        parts = {"by sampling noise": "n_noise", "stopped early": "n_stopped"}
        why = "".join(f", {n} {how}" for how, name in parts.items() if (n := sum(int(r[name]) for r in at_first)))
        yield f"At {words.level(unstable, LR)}, {bad} of {there} not stable{why}."
        again = {row["stable_again"] for row in at_first} - {None}
        if again:
            yield f"Every trial at {words.level(max(again), LR)} is stable again."
    if stable is not None and unstable is not None and unstable > stable:
        yield f"The limit lies between {words.level(stable, LR)} and {words.level(unstable, LR)}."
    if stable is not None and unstable is None and stable != grid[-1]:
        yield "What lies above has no verdict."


def _cells(study: Study, pending: int) -> Answer:
    """How many of the cells that have ended are stable in every trial."""
    rows = list(settled(study).rows_by_cell.values())
    if not rows:
        return Answer("Not known yet", f"no cell has ended; {words.count(pending, 'trial')} still to come")
    stable = sum(all(row["verdict"] == "stable" for row in cell) for cell in rows)
    if len(rows) == 1 == len(study.rows_by_cell):
        return _one_cell(rows[0])
    ended = " that have ended" if pending else ""
    return Answer(
        f"{stable} of {words.count(len(rows), 'cell')}",
        f"{'is' if len(rows) == 1 else 'are'} stable in every trial{ended}".replace("cells that", "that"),
    )


def _one_cell(rows: Sequence[Row]) -> Answer:
    stable = sum(row["verdict"] == "stable" for row in rows)
    if len(rows) == 1:
        return Answer(str(rows[0]["verdict"] or "not judged").capitalize(), "the one trial of this recipe")
    return Answer(f"{stable} of {len(rows)} trials", "of this recipe are stable")


def _unknown(by: str | None, rows: Sequence[tuple[Level, Row]], pending: int) -> Iterator[Item]:
    """Conditions without a limit, and why; of a study at work how much is to come."""
    if not rows:
        return
    if pending:
        levels = [level for level, _ in rows]
        at = f" at {levels_text(by, levels)}" if by is not None else ""
        yield Text(f"No limit yet{at}: {words.count(pending, 'trial')} still to come.")
        return
    for reason in dict.fromkeys(row["reason"] for _, row in rows):
        own = [level for level, row in rows if row["reason"] == reason]
        at = f" at {levels_text(by, own)}" if by is not None else ""
        yield Text(f"No limit{at}: {reason}.")


def _by_loss(by: str | None, rows: Sequence[tuple[Level, Row]], whole: bool) -> Iterator[Item]:
    """How far the loss stays within the margin of the best."""
    groups: dict[Level, list[Level]] = {}
    for level, row in rows:
        if row["works_to"] is not None:
            groups.setdefault(row["works_to"], []).append(level)
    parts = [
        words.level(rate, LR)
        + (f" ({levels_text(by, own)})" if by is not None and not (whole and len(groups) == 1) else "")
        for rate, own in groups.items()
    ]
    if parts:
        yield Text(f"Loss within {STABLE_MARGIN:g} nat/token of the best up to {words.listing(parts)}.")


def _commands(study: Study, by: str | None, rows: Sequence[tuple[Level, Row]]) -> Iterator[Code]:
    """The commands that find the limits beyond the grid."""
    grid = study.grid.axes.get(LR, [])
    for holds, title in (("stable", FIND), ("works", f"{FIND} of the loss")):
        levels = [level for level, row in rows if holds in answer.ends(row, grid)]
        if (
            levels
            and (command := commands.searched(study, grid[-1], holds, answer.pins(study, by, levels))) is not None
        ):
            yield Code(title, command)


def _drivers(study: Study, part: Study, known: Shares, pending: int) -> Box:
    if not len(part.trials):
        return Box(
            DRIVERS,
            [Answer("Not known yet"), Text(f"No cell has ended; {words.count(pending, 'trial')} still to come.")],
        )
    if not part.grid.axes and not part.trials["case"].notna().any():
        return Box(DRIVERS, list(_one_recipe(part)))
    box = first_boxes.drivers_box(part, known)
    cells = f"{len(part.rows_by_cell)} of {words.count(len(study.rows_by_cell), 'cell')}"
    ended = [Text(f"From the {cells} that have ended.")] if pending else []
    return Box(box.title, [*box.items, *ended])


def _one_recipe(study: Study) -> Iterator[Item]:
    """Of a study without an axis: the largest norm of its roughest trial."""
    yield Answer("Nothing varies", "but the seed")
    if (worst := study.worst()) is not None and (row := study.row(worst))["grad_norm_max"] is not None:
        ratio = row["grad_norm_max_over_median"]
        times = f", {words.number(ratio)} times the median" if ratio is not None else ""
        yield Text(
            f"Largest gradient norm: {words.number(row['grad_norm_max'])} at step {row['grad_norm_argmax']}{times}."
        )
        flagged, spikes = row["spike_abs_steps"], row["spike_events"]
        if flagged is not None:
            yield Text(
                f"{words.count(flagged, 'step')} at 3 times the recent norm, {words.count(spikes or 0, 'spike')}."
            )
    yield Text("Give a setting several values to see what it changes.")


# Other kinds of studies


def _best(study: Study) -> Box:
    """The best cells of a search."""
    first, *rest = findings.best(study)
    return Box(USE, [Answer("Best of a search", "to be trained again"), *map(Text, [first, *rest])])


def _frontier(study: Study, of: Frontier) -> Iterator[Box]:
    """The edges; what the search cost, and what contradicts it; why there is no recipe."""
    edges = [each for each in of.cells if each.edge.n]
    items: list[Item | Bar] = [_edge(of, cell) for cell in edges[:SHOWN]] or [
        Answer("Not known yet", "no trial has ended")
    ]
    if more := len(of.cells) - len(edges[:SHOWN]):
        items.append(Text(f"{words.count(more, 'more cell')}: see Frontier."))
    lines = list(frontier_page.findings(study, of))
    further = [line for line in lines if ": python -m" in line]
    items += [_bar(study), *_more(study), *(_command(line) for line in further)]
    yield Box(STABLE if of.asked.holds == "stable" else "Works up to", items)
    told = {*further, *frontier_page.edges(of)}
    left = [line for line in lines if line not in told]
    rest = [*left[:ODD], *([f"{len(left) - ODD} more: see Frontier."] if len(left) > ODD else [])]
    yield Box(
        DRIVERS,
        [
            Answer(words.label(of.asked.setting), "was searched, and nothing else is tested"),
            Text(_sentence(of.bias)),
            *map(Text, rest),
        ],
    )
    reasons = [Text(_sentence(each.reason)) for each in recipe.answers(study) if not isinstance(each, Recipe)]
    yield Box(USE, [Answer("No recipe", "from a search of an edge"), *reasons])


def _edge(of: Frontier, cell: CellEdge) -> Answer:
    edge, where, name = cell.edge, name_of(cell), words.label(of.asked.setting)
    trials = words.count(edge.n, "trial")
    if edge.status == "beyond":
        return Answer(
            f"{name} {words.level(of.asked.high)} or more",
            ", ".join(filter(None, (where, "the largest value searched", trials))),
        )
    if edge.status == "below":
        return Answer(
            f"below {name} {words.level(of.asked.low)}",
            ", ".join(filter(None, (where, "the smallest value searched", trials))),
        )
    about = "" if edge.status == "resolved" else "about "
    rest = (interval(edge), where, trials, "" if edge.status == "resolved" else "open")
    return Answer(f"{name} {about}{words.number(edge.estimate)}", ", ".join(filter(None, rest)))


def _command(line: str) -> Code:
    head, _, command = line.partition(": python -m")
    return Code(head, f"python -m{command}")


def _ingested(study: Study) -> Iterator[Box]:
    """What the logs show; why no setting is blamed; why none is recommended."""
    runs = len(study.trials)
    numbers = study.outcomes
    judged = sum(numbers[v] for v in VERDICTS)
    lead = (
        Answer(f"{numbers['stable']} of {words.count(judged, 'judged run')}", "stable")
        if judged
        else Answer("Not judged", words.count(runs, "run"))
    )
    yield Box("Stability", [lead, _bar(study), *_more(study)])
    sentences = list(ingested_page.findings(study).sentences)
    top = study.worst()
    row = {} if top is None else study.row(top)
    largest = row.get("grad_norm_max_over_median") or row.get("grad_norm_max")
    name = "times the median, the largest norm" if row.get("grad_norm_max_over_median") else "the largest norm"
    head = (
        Answer(words.number(largest, 3), name) if largest is not None else Answer("No gradient norm", "in these logs")
    )
    yield Box("Largest gradient norms", [head, *map(Text, sentences[:SHOWN] or ["No run has ended."])])
    yield Box(USE, [Answer("No recipe", "from logs alone"), Text(ingested_page.NO_PAIRS)])


# Figures


def figures(study: Study) -> tuple[list[Figure], list[Pointer]]:
    """The small figures, and the trials of the last of them with the step to look at."""
    done = study.trials["state"] == "done"
    if not done.any():
        return [], []
    one_stride = not study.ingested or study.trials[compare.STRIDE].nunique() == 1
    drawn = list(sketches.curve_sketches(study)) if one_stride and adaptive.why_biased(study) is None else []
    chosen = dict(_chosen(study))
    trace = sketches.trace_sketch(study, chosen)
    pointers = [_pointer(study, t, name) for t, name in chosen.items()]
    return [*drawn, *([trace] if trace else [])], pointers


def _chosen(study: Study) -> Iterator[tuple[str, str]]:
    """The roughest trial, and one of the recipe, else a typical one."""
    worst = study.worst()
    if worst is None:
        return
    one = len(study.trials) == 1
    yield worst, "the one trial" if one else "roughest"
    other, name = study.typical(), "typical"
    if study.searched is None and not study.ingested and adaptive.why_biased(study) is None:
        for each in recipe.recipes(study):
            members = study.rows_by_cell[each.cell_id]
            other, name = str(members[0]["trial_id"]), "recommended"
            break
    if other is not None and other != worst:
        yield other, name


def _pointer(study: Study, trial_id: str, name: str) -> Pointer:
    """What happened in a trial, and the step to look at: its highest spike, or where it diverged."""
    row, step = study.row(trial_id), sketches.moment(study, trial_id)
    verdict = [str(row["verdict"])] if row["verdict"] else []
    if row["verdict"] == "diverged":
        verdict, event = [], "diverged" if step is None else f"diverged at step {step}"
    elif step is not None:
        norm = study.trace(trial_id)
        event = f"norm {words.number(float(norm['grad_norm'][norm['step'] == step][0]))} at step {step}"
    else:
        event = "no spike"
    text = f"{study.describe(trial_id)} ({', '.join([*verdict, event])})"
    return Pointer(words.capital(name), text, trial_id, step, has_text=not study.ingested)

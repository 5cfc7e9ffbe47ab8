"""The page that compares studies: effects of the study, matched cells, differences paired by seed, caveats.

Studies are put together as one whose first axis is `study`. Trials are paired across it as across any other axis: same
seed, same level of everything that varies within a study. Settings that differ between the studies and within none are
what the axis stands for, and are listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from stabstudy.analysis import adaptive, commands, compare, matched_cells, recipe, study_statistics, words
from stabstudy.analysis.effects import CLEAR, REPORTED
from stabstudy.analysis.elements import Answer, Bar, Block, Box, Count, Finding, Point, Report, Section, Table, Text
from stabstudy.analysis.figures import curves, edges, labels, style
from stabstudy.analysis.levels import levels_of, split
from stabstudy.analysis.paired import Estimate
from stabstudy.analysis.study import Study
from stabstudy.analysis.study_statistics import STUDY
from stabstudy.config import setting_names
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

UNPAIRED = "No trial of one study has a partner of the same seed and levels in another, so no difference is computed."

UNTESTED = "not tested"
"""In the sentence of a statistic that no test was made of."""

MOST_RECIPES = 3
"""Recipes of each study that the first screen names."""

NO_CELL = "No cell is in two studies."

TRAINS = "The trials that are missing are trained with: "
"""Before a command, which the page sets apart."""

FIGURES = (("final_loss", False), ("grad_norm_log_sd", False), ("attn_logit_peak", True))
"""Statistic, and whether on a log scale: one figure each."""

CELL = ("final_loss_capped", "grad_norm_log_sd", "spike_abs_rate")
"""Statistics of the tables."""


def report(studies: Sequence[Study], pages: Sequence[str] = ()) -> Report:
    """The comparison of at least two studies of different names; the first is what the others are compared with.

    `pages`: the way from this report's folder to each study's own page.
    """
    whole = Study.concat(studies)
    metrics = study_statistics.comparable(whole.trials)
    table = study_statistics.paired_differences(whole.trials, whole.axes, metrics)
    names = whole.axes[STUDY]
    sentences = list(_findings(whole, metrics, table))
    return Report(
        study=" against ".join(words.clean(name, 60) for name in names),
        design=f"comparison of {len(names)} studies, {words.count(len(whole.trials), 'trial')}",
        question="",
        boxes=list(_boxes(studies, whole, sentences, table)),
        findings=[Finding("Differences", sentences)],
        warnings=[*warnings(whole), *_searched(studies)],
        sections=[s for s in _sections(studies, whole, metrics, table) if s.blocks],
        pages=[(words.clean(study.name, 60), page) for study, page in zip(studies, pages, strict=False)],
    )


def _boxes(
    studies: Sequence[Study], whole: Study, sentences: Sequence[str], table: Sequence[dict[str, Any]]
) -> Iterator[Box]:
    """How many trials of each study are stable; what differs; what each study recommends."""
    done = whole.trials[whole.trials["state"] == "done"]
    counts: list[Answer | Bar] = []
    for name in whole.axes[STUDY]:
        verdicts = compare.verdicts(done[done[STUDY] == name])
        judged = words.count(sum(verdicts.values()), "judged trial")
        counts.append(Answer(f"{verdicts['stable']} of {judged}", f"stable in {words.clean(name, 60)}"))
        if any(verdicts.values()):
            counts.append(Bar([Count(v, n, style.VERDICT_SIGNS[v]) for v, n in verdicts.items() if n]))
    yield Box("Stable", counts)
    stated = sum(UNTESTED not in s and "no difference found" not in s for s in sentences) if table else 0
    lead = Answer(f"{stated or 'None'} of {len(sentences)}", "statistics found to differ")
    lead = lead if table else Answer("Nothing is paired")
    yield Box("What differs", [lead, *map(Text, sentences)])
    pairs = len(matched_cells.matched(whole.trials, whole.axes)[0])
    shared = Text(f"{words.count(pairs, 'done trial')} in cells that two studies share: only these are paired.")
    yield Box("Use", [*(Point(f"{words.clean(s.name, 60)}:", _use(s)) for s in studies), shared])


def _use(study: Study) -> str:
    """What a study recommends, under each of its conditions."""
    texts = [
        f"{words.at_levels(r.given, r.given.values())}: " * bool(r.given)
        + (words.at_levels(r.levels, r.levels.values()) or "its settings")
        + f" (loss {words.estimate(r.loss.mean, r.loss.low, r.loss.high, 4)})"
        for r in recipe.recipes(study)
    ]
    more = f"; and {len(texts) - MOST_RECIPES} more" if len(texts) > MOST_RECIPES else ""
    return f"{'; '.join(texts[:MOST_RECIPES])}{more}." if texts else f"no recipe: {recipe.why_none(study)}."


def warnings(whole: Study) -> Iterator[str]:
    """What keeps a number of one study from being compared with that of another."""
    trials = whole.trials
    by_study = trials.groupby(STUDY)
    if _differ(by_study["eval_hash"]):
        yield "The evaluation sets differ: losses are shown, and not compared."
    if _differ(by_study["data_fingerprint"]):
        yield "The studies read different data."
    if trials["detector_id"].nunique() > 1:
        yield "The rules for spikes differ (detector_id): spike rates and verdicts are shown, and not compared."
    if "log_stride" in trials and trials["log_stride"].nunique() > 1:
        yield "The logging intervals differ: rates of spikes are shown, and not compared."
    if _differ(by_study["train.batch_size"]) or _differ(by_study["data.seq_len"]):
        yield "Steps hold different numbers of tokens, so rates per step differ in meaning."
    if stopped := int((trials["state"] == "stopped").sum()):
        yield f"{words.count(stopped, 'trial')} stopped early by a rule of the sweep: in no mean and no difference."
    if _differ(by_study["train.steps"]):
        yield "Trials have different numbers of steps: final losses and largest values are those of different lengths."


def _searched(studies: Sequence[Study]) -> Iterator[str]:
    """Studies that are no grids: of their trials the pairs are a choice."""
    for study in studies:
        if (of := study.searched) is not None:
            yield f"{words.clean(study.name, 60)} is no grid: {of.bias}. Compare its edges with Study.frontier."


def _differ(column: Any) -> bool:
    """Whether the sets of values of a grouped column are not the same in every group."""
    return len({frozenset(levels_of(values)) for _, values in column}) > 1


def _sections(
    studies: Sequence[Study], whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]
) -> Iterator[Section]:
    yield Section("studies", "The studies", [_studies(studies), *_settings(whole)])
    yield Section("differences", "Differences", list(_difference_blocks(whole, metrics, table)))
    yield Section("figures", "Figures", list(matched_figures(whole)))
    yield Section("cells", "Matched cells", list(matched_tables(whole)))


def _studies(studies: Sequence[Study]) -> Table:
    rows = []
    for study in studies:
        numbers = study.outcomes
        rows.append(
            (
                words.clean(study.name, 60),
                words.clean(study.question) or words.NOTHING,
                *(str(numbers[v]) for v in VERDICTS),
                str(sum(numbers.values()) - sum(numbers[v] for v in VERDICTS)),
                study.rules.detector_id,
            )
        )
    heads = ("study", "question", *VERDICTS, "others", "detector")
    return Table("Studies", heads, tuple(rows), frozenset((*VERDICTS, "others")))


def _settings(whole: Study) -> Iterator[Block]:
    """Settings that differ between the studies and within none of them."""
    names = [name for name in setting_names() if name != "seed"]
    levels = study_statistics.settings_apart(whole.trials, whole.axes[STUDY], names)
    rows = tuple((name, *(words.level(v, name) for v in each)) for name, each in levels.items())
    if rows:
        heads = ("setting", *(words.clean(name, 60) for name in whole.axes[STUDY]))
        yield Table("Settings that differ between the studies and are the same within each", heads, rows)
    else:
        yield Text("No setting that is the same within each study differs between the studies.")


def _difference_blocks(whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]) -> Iterator[Block]:
    if not table:
        yield Text(" ".join([UNPAIRED, *disjoint(whole), *missing(whole)]))
        return
    yield Text(
        "A pair is two trials of different studies with the same seed and the same level of everything that varies "
        "within a study. Differences are averaged per seed; the interval is Student's over seeds."
    )
    rows = tuple(
        (
            f"{words.clean(r['a'], 60)} → {words.clean(r['b'], 60)}",
            COLUMNS[r["metric"]].label,
            f"{words.value(r['metric'], r['mean_a'])} → {words.value(r['metric'], r['mean_b'])}",
            words.value(r["metric"], r["difference"]),
            words.interval(r["metric"], r["low"], r["high"]),
            str(r["pairs"]),
            str(r["seeds"]),
        )
        for r in table
    )
    numbers = ("mean", "change", "95 % interval", "pairs", "seeds")
    yield Table("Paired differences", ("studies", "statistic", *numbers), rows, frozenset(numbers))
    for metric in REPORTED:
        if metric not in metrics:
            yield Text(f"{words.STATISTICS[metric]}: not compared (see above).")


def disjoint(whole: Study) -> Iterator[str]:
    """The axes on which the studies have no level in common, as `Depth: 4 in a, 2 and 6 in b.` lists them."""
    for axis in [a for a in [*whole.axes, "seed"] if a != STUDY]:
        levels = {name: levels_of(whole.trials.loc[whole.trials[STUDY] == name, axis]) for name in whole.axes[STUDY]}
        if not set.intersection(*map(set, levels.values())):
            each = [
                f"{words.listing([words.level(v, axis) for v in own])} in {words.clean(name, 60)}"
                for name, own in levels.items()
            ]
            yield f"{words.capital(words.label(axis))}: {', '.join(each)}."


def missing(whole: Study) -> Iterator[str]:
    """The command that trains in a later study what it lacks of the first, or in the first what it lacks of that.

    Nothing where that would not help, as trials on other data are no partners, nor for values that were chosen by
    results: those of a search are no levels of a grid.
    """
    if _differ(whole.trials.groupby(STUDY)["data_fingerprint"]) or any(map(adaptive.why_biased, whole.parts.values())):
        return
    first, *others = whole.parts.items()
    for (own, study), (other, _) in [*((later, first) for later in others), *((first, later) for later in others)]:
        lacking = {}
        for axis in [a for a in [*whole.axes, "seed"] if a != STUDY]:
            there, wanted = (levels_of(whole.trials.loc[whole.trials[STUDY] == n, axis]) for n in (own, other))
            if not set(wanted) <= set(there):
                lacking[axis] = wanted
        if lacking and (command := commands.filled(study, lacking)) is not None:
            yield f"{TRAINS}{command}"
            return


def _findings(whole: Study, metrics: Sequence[str], table: list[dict[str, Any]]) -> Iterator[str]:
    """The differences by statistic with their intervals: stated, not found, or not tested."""
    if not table:
        yield " ".join([UNPAIRED, *missing(whole)])
        return
    for row in study_statistics.study_effects(whole.trials, whole.axes, metrics):
        name = words.capital(words.STATISTICS[row["metric"]])
        if row["p_holm"] is None:
            yield f"{name}: not tested ({row['note']})."
        else:
            at = f"{words.clean(row['a'], 60)} → {words.clean(row['b'], 60)}"
            reading = "" if row["p_holm"] < CLEAR else "no difference found: "
            p = words.number(row["p_holm"], 2)
            yield f"{name}, {at}: {reading}{words.change(row)} (p {p}, Holm)."


def matched_figures(whole: Study) -> Iterator[Block]:
    """A statistic against the main axis, a line per study, over the done trials of the cells that all studies hold."""
    axes = [a for a in whole.axes if a != STUDY]
    x = "optim.lr" if "optim.lr" in axes else axes[0] if axes else None
    if x is None:
        yield Text("No setting varies within the studies: there is no axis to draw a statistic against.")
        return
    matched, names = matched_cells.matched(whole.trials, whole.axes)
    if not matched:
        yield Text(NO_CELL)
        return
    shared = whole.part(matched, whole.axes | {STUDY: names, x: levels_of(whole.trials.loc[sorted(matched), x])})
    done = int((whole.trials["state"] == "done").sum())
    alone = done - len(shared.trials)
    rest = f" Left out: {words.count(alone, 'done trial')} of cells that not all of them have." if alone else ""
    absent = [words.clean(name, 60) for name in whole.axes[STUDY] if name not in names]
    rest += f" Not drawn: {words.listing(absent)}, in no cell with these." if absent else ""
    pooled = [words.label(a) for a in axes if a != x]
    over = f", averaged over {words.listing(pooled)}" if pooled else ""
    cells = len(split(shared.trials, {a: whole.axes[a] for a in axes}))
    where = f" Over the {words.count(cells, 'cell')} that {'both' if len(names) == 2 else 'all'} studies hold."
    for metric, log_y in FIGURES:
        points = split(curves.drawable(shared.trials, metric), {a: shared.axes[a] for a in (STUDY, x)})
        if not points:
            continue
        label = labels.statistic(metric, shared.trials)
        against = words.capital(f"{label} against {words.label(x)}")
        drawn = curves.curves(shared, metric, x=x, by=STUDY, log_y=log_y)
        caption = (
            f"{against}, a line for each study{over}.{where} "
            f"{curves.marks_text(shared.trials, [metric], edges.beyond(drawn))} Bands: 95 % "
            f"intervals (from {curves.BAND_FROM} trials on).{rest}"
        )
        heads = ("study", words.heading(x), label, *curves.COUNTS)
        rows = [
            (words.clean(study, 60), words.level(level, x), *curves.mean_texts(trials, metric))
            for (study, level), trials in points
        ]
        alt = f"Line chart. {'; '.join(f'{r[0]} at {r[1]}: {r[2]}' for r in rows[:12])}."
        name = f"studies-{metric.replace('_', '-')}"
        yield style.report_figure(name, against, drawn, alt, caption, heads, rows, {"study"})


def matched_tables(whole: Study) -> Iterator[Block]:
    """A row per combination of levels that at least two studies hold, and the paired differences there."""
    axes = {a: levels for a, levels in whole.axes.items() if a != STUDY}
    names = whole.axes[STUDY]
    rows = []
    done = whole.trials[whole.trials["state"] == "done"]
    for levels, trials in split(done, axes):
        parts = [trials[trials[STUDY] == name] for name in names]
        if sum(map(bool, map(len, parts))) > 1:
            texts = [words.level(v, a) for a, v in zip(axes, levels, strict=True)]
            rows.append((*texts, *(_cell(part, m) for m in CELL for part in parts), *map(_verdicts, parts)))
    if not rows:
        yield Text(NO_CELL)
        return
    statistics = [f"{COLUMNS[m].label}: {words.clean(n, 30)}" for m in CELL for n in names]
    verdicts = [f"verdicts: {words.clean(n, 30)}" for n in names]
    heads = (*map(words.heading, axes), *statistics, *verdicts)
    title = "Cells in at least two studies: means over done seeds, with the 95 % interval"
    yield Table(title, heads, tuple(rows), frozenset(heads) - frozenset(verdicts))
    changes = tuple(_changes(whole))
    if changes:
        heads = (*map(words.heading, axes), "studies", "seeds", *(COLUMNS[m].label for m in CELL))
        title = "Differences in each of these cells, paired by seed, with the 95 % t-interval (from 2 seeds on)"
        yield Table(title, heads, changes, frozenset(heads) - {"studies"})


def _changes(whole: Study) -> Iterator[tuple[str, ...]]:
    """A row for each cell that the first study and another one hold: what the other's trials of equal seeds did."""
    axes = [a for a in whole.axes if a != STUDY]
    for cell in study_statistics.cell_changes(whole.trials, whole.axes, CELL):
        texts = [words.level(v, a) for a, v in zip(axes, cell.levels, strict=True)]
        pair = f"{words.clean(cell.first, 60)} → {words.clean(cell.other, 60)}"
        yield *texts, pair, str(cell.seeds), *(_change(m, change) for m, change in cell.changes.items())


def _change(metric: str, e: Estimate | None) -> str:
    """`0.02 (-0.01 to 0.05)`; a dash where the two cannot be compared."""
    if e is None:
        return words.NOTHING
    ends = "" if words.is_null(e.low) else f" ({words.interval(metric, e.low, e.high)})"
    return f"{words.value(metric, e.mean)}{ends}"


def _cell(trials: Any, metric: str) -> str:
    e = compare.mean(trials, metric)
    return words.estimate(e.mean, e.low, e.high) if COLUMNS[metric].unit != "fraction" else words.percent(e.mean)


def _verdicts(trials: Any) -> str:
    return ", ".join(f"{n} {v}" for v, n in compare.verdicts(trials).items() if n) or words.NOTHING

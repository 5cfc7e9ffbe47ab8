"""Tables over several trials: cells, effects of axes, contrasts of levels, interactions, paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import adaptive, compare, words
from stabstudy.analysis import cases as named_cases
from stabstudy.analysis.effects import CLEAR, contrasts, interactions, reported
from stabstudy.analysis.elements import Block, Table, Text
from stabstudy.analysis.levels import records
from stabstudy.analysis.report import ingested_page
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.verdict import VERDICTS

Row = Mapping[str, Any]

MOST_OPEN = 8
"""Rows of the table of cases up to which it stands open."""

METHOD = (
    "Model: statistic ~ seed + every axis, each axis tested as a whole (type II F test). Norms, logits and roughness "
    "enter by their logarithms and counts by their rates, so their effects are ratios; losses enter as they are. The "
    "error is moderated over all tests: it is larger where axes act differently by seed."
)


def effect_blocks(study: Study) -> Iterator[Block]:
    """The section: the table of `effects.claims`; folded, contrasts, interactions and paired differences."""
    if study.ingested:
        yield Text(ingested_page.NO_PAIRS)
        return
    if (bias := adaptive.why_biased(study)) is not None:
        instead = " Compare the edges." if study.searched is not None else ""
        yield Text(f"Effects, contrasts, interactions: not computed: {bias}.{instead}")
        return
    rows = records(study.claims()) if study.grid.axes else []
    if rows:
        yield from _effects(rows, compare.in_nats(study.trials))
    elif not _has_cases(study):
        yield Text("No axis varies, so there is nothing to compare.")
        return
    yield from _cases(study)
    if rows:
        yield from _contrasts(study)
        yield from _interactions(study)
        yield from _paired(study, rows)


def reading(row: Row) -> str:
    """What the p-values of an effect allow to state; a row of `effects.claims`."""
    if row["p_holm"] is None:
        return "not tested"
    if row["clear"]:
        return f"effect, depends on {words.label(row['other'])}" if row["other"] else "effect"
    return "suggestive" if row["p"] < CLEAR else "no effect found"


def method(study: Study) -> Iterator[Text]:
    """How the table of effects is made; nothing where it has no test."""
    rows = [] if study.ingested or adaptive.why_biased(study) is not None else records(study.claims())
    if tests := sum(r["p_holm"] is not None for r in rows):
        yield Text(
            f"{METHOD} p is corrected (Holm) for {words.count(tests, 'test')}. An effect is stated where that, or the "
            f"corrected p of an interaction, is under {CLEAR:g}; one that only the uncorrected p shows is suggestive."
        )


def _effects(rows: Sequence[Row], nats: bool) -> Iterator[Block]:
    tests = words.count(sum(r["p_holm"] is not None for r in rows), "test")
    heads = ("axis", "from → to", "statistic", "effect [95 % interval]", "p", "p (Holm)", "reading", "note")
    yield Table(
        f"Effects: {tests}", heads, tuple(_effect(row, nats) for row in rows), frozenset(heads[4:6]), folded=True
    )


def _effect(row: Row, nats: bool) -> tuple[str, ...]:
    null = row["estimate"] is None
    return (
        words.label(row["axis"]),
        words.NOTHING if null else _step(row["axis"], row),
        COLUMNS[row["metric"]].label,
        words.NOTHING if null else words.change(row, nats=nats),
        words.number(row["p"], 2),
        words.number(row["p_holm"], 2),
        reading(row),
        row["note"] or "",
    )


def _cases(study: Study) -> Iterator[Block]:
    """What each case changed against the cell of the grid that it differs from in one setting."""
    rows = records(named_cases.changes(study.trials, list(study.axes), reported(study.trials)))
    if alone := named_cases.without_partner(study.trials, list(study.axes)):
        names = words.listing([words.clean(name, 40) for name in alone])
        yield Text(f"Compared with nothing, as no one cell of the grid differs in one setting alone: {names}.")
    heads = ("case", "from → to", "at", "statistic", "change [95 % interval]", "seeds", "p", "p (Holm)", "note")
    nats = compare.in_nats(study.trials)
    texts = tuple(_case(row, nats) for row in rows)
    tests = words.count(sum(r["p_holm"] is not None for r in rows), "test")
    title = (
        "Cases: each against the cell of the grid that differs from it in one setting, paired by seed; Student's "
        f"interval over seeds, p corrected (Holm) for {tests}"
    )
    if texts:
        yield Table(title, heads, texts, frozenset(heads[5:8]), folded=len(texts) > MOST_OPEN)


def _case(row: Row, nats: bool) -> tuple[str, ...]:
    return (
        words.clean(row["case"], 40),
        words.step(row["axis"], row["a"], row["b"]),
        words.at_levels(row["at"], row["at"].values()),
        COLUMNS[row["metric"]].label,
        words.NOTHING if row["estimate"] is None else words.change(row, nats=nats),
        str(row["seeds"]),
        words.number(row["p"], 2),
        words.number(row["p_holm"], 2),
        row["note"] or "",
    )


def _contrasts(study: Study) -> Iterator[Block]:
    """Each level of an axis of three and more against the one of the lowest mean: so that a U shape is seen."""
    heads = ("axis", "level", "lowest at", "statistic", "above the lowest [95 % interval]", "p (Holm, within the axis)")
    texts = tuple(
        (
            words.label(r["axis"]),
            words.level(r["level"], r["axis"]),
            words.level(r["best"], r["axis"]),
            COLUMNS[r["metric"]].label,
            words.change(r, nats=compare.in_nats(study.trials)),
            words.number(r["p_holm"], 2),
        )
        for r in records(contrasts(*study.tested()))
        if len(study.grid.axes[r["axis"]]) > 2
    )
    if texts:
        title = "Each level of an axis against the level of the lowest mean"
        yield Table(title, heads, texts, frozenset(heads[-1:]), folded=True)


def _interactions(study: Study) -> Iterator[Block]:
    """Whether the effect of one axis depends on the level of another."""
    rows = records(interactions(*study.tested())) if len(study.grid.axes) > 1 else []
    noted = any(r["note"] for r in rows)
    heads = ("axis", "other axis", "statistic", "F", "p (Holm)", *(["note"] if noted else []))
    texts = tuple(
        (
            words.label(r["axis"]),
            words.label(r["other"]),
            COLUMNS[r["metric"]].label,
            words.number(r["statistic"]),
            words.number(r["p_holm"], 2),
            *([r["note"] or ""] if noted else []),
        )
        for r in rows
    )
    if texts:
        title = "Interactions: does the effect of one axis depend on another axis?"
        yield Table(title, heads, texts, frozenset(heads[3:5]), folded=True)


def _paired(study: Study, effects: Sequence[Row]) -> Iterator[Table]:
    """The paired differences between the levels of each effect; where there is none, between the outermost levels."""
    rows = [(e["axis"], e["metric"], row) for e in effects if (row := _pair(study, e)) is not None]
    flips = any(row["p"] is not None for *_, row in rows)
    stopped = any(row["stopped_a"] or row["stopped_b"] for *_, row in rows)
    more = [*(["stopped early"] if stopped else []), *(["p (sign flip)"] if flips else [])]
    counts = ("pairs", "seeds", "larger in", "diverged", *more)
    heads = ("axis", "from → to", "statistic", "mean", "change", "95 % interval", *counts)
    texts = tuple(_difference(*row, stopped, flips) for row in rows)
    title = (
        "Paired differences: trials of one seed that differ in the axis alone, averaged per seed; Student's interval "
        "over seeds"
    )
    if texts:
        yield Table(title, heads, texts, frozenset(heads[3:]), folded=True)


def _pair(study: Study, effect: Row) -> Row | None:
    """The row of `Study.compare` for an effect: its two levels, or the outermost two that share a pair."""
    pairs = [row for row in records(study.grid.compare(effect["axis"], effect["metric"])) if row["pairs"]]
    if effect["estimate"] is not None:
        pairs = [row for row in pairs if {row["a"], row["b"]} == {effect["a"], effect["b"]}]
    place = study.grid.axes[effect["axis"]].index
    return max(pairs, key=lambda row: place(row["b"]) - place(row["a"]), default=None)


def _difference(axis: str, metric: str, row: Row, stopped: bool, flips: bool) -> tuple[str, ...]:
    return (
        words.label(axis),
        _step(axis, row),
        COLUMNS[metric].label,
        f"{words.value(metric, row['mean_a'])} → {words.value(metric, row['mean_b'])}",
        words.value(metric, row["difference"]),
        words.interval(metric, row["low"], row["high"]),
        str(row["pairs"]),
        str(row["seeds"]),
        words.percent(row["positive"]),
        f"{row['diverged_a']} → {row['diverged_b']}",
        *([f"{row['stopped_a']} → {row['stopped_b']}"] if stopped else []),
        *([words.number(row["p"], 2)] if flips else []),
    )


def _step(axis: str, row: Row) -> str:
    return f"{words.level(row['a'], axis)} → {words.level(row['b'], axis)}"


STATISTICS = (
    "spike_events", "spike_abs_rate", "grad_norm_max_over_median", "grad_norm_log_sd", "clip_share",
    "attn_logit_peak",
)  # fmt: skip
"""Shown per cell beside the final loss: the mean over its done trials."""

MOST_OPEN = 24
"""Rows up to which the table is open from the start."""


def cells(study: Study) -> Iterator[Table]:
    """Means and verdicts of every cell; then the intervals, which would make one table three screens wide."""
    rows, heads = records(study.cells.reset_index()), _heads(study)
    numbers = ("seeds", "final loss", *(COLUMNS[name].label for name in STATISTICS))
    rules = _rules(study)
    stopped = study.trials[study.trials["state"] == "stopped"].groupby("cell_id").size()
    means = tuple(
        (*_which(row, study), _verdicts(row, rules, int(stopped.get(row["cell_id"], 0))), _seeds(row), *_means(row))
        for row in rows
    )
    title = (
        f"{words.count(len(rows), 'cell')}: means over the done seeds (geometric of norms, ratios and logits), ± half "
        "the 95 % interval (from 2 seeds on)"
    )
    right = frozenset((*heads, *numbers)) - {"case"}
    yield Table(title, (*heads, "verdicts", *numbers), means, right, folded=len(rows) > MOST_OPEN)
    ends = tuple((*_which(row, study), *_intervals(row)) for row in rows)
    title = "95 % intervals of these means (those of every statistic: cells.csv)"
    yield Table(title, (*heads, *numbers[1:]), ends, right, folded=True)


def _heads(study: Study) -> tuple[str, ...]:
    return (*(["case"] if _has_cases(study) else []), *map(words.heading, study.axes))


def _which(row: Mapping[str, Any], study: Study) -> tuple[str, ...]:
    case = [words.clean(row["case"] or "", 40)] if _has_cases(study) else []
    return (*case, *(words.level(row[a], a) for a in study.axes))


def _has_cases(study: Study) -> bool:
    return bool(study.cells["case"].notna().any())


def _rules(study: Study) -> dict[Any, str]:
    """(cell, verdict) -> in parentheses, the rules by which its trials got it, and how many by sampling noise."""
    judged = study.trials[(study.trials["state"] == "done") & study.trials["verdict"].notna()]
    by_verdict = judged.groupby(["cell_id", "verdict"])
    texts = {}
    for at, members in by_verdict:
        rules = sorted({text for code in members["verdict_rule"].dropna() if (text := words.rule(code))})
        noise = int(members["sampling_noise"].fillna(False).sum())
        notes = [*rules, *([f"{noise} by sampling noise"] if noise else [])]
        texts[at] = f" ({'; '.join(notes)})" if notes else ""
    return texts


def _verdicts(row: Mapping[str, Any], rules: Mapping[Any, str], stopped: int) -> str:
    named = [f"{row[v]} {v}{rules.get((row['cell_id'], v), '')}" for v in VERDICTS if row[v]]
    named += [f"{stopped} stopped early"] if stopped else []
    return ", ".join(named) or words.NOTHING


def _seeds(row: Mapping[str, Any]) -> str:
    """How many are done, of how many where some are not."""
    return str(row["n"]) if row["n"] == row["n_done"] else f"{row['n_done']} of {row['n']}"


def _means(row: Mapping[str, Any]) -> Iterator[str]:
    yield words.estimate(row["final_loss_capped"], row["final_loss_capped_low"], row["final_loss_capped_high"], 4)
    for name in STATISTICS:
        yield words.value(name, row[name])


def _intervals(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("final_loss_capped", *STATISTICS):
        yield words.interval(name, row[f"{name}_low"], row[f"{name}_high"])

"""Tables of what each axis changed: effects, contrasts of levels, interactions, paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stabstudy.analysis import words
from stabstudy.analysis.effects import CLEAR, claims, contrasts, interactions
from stabstudy.analysis.elements import Block, Table, Text
from stabstudy.analysis.levels import records
from stabstudy.analysis.report import findings, runs_page
from stabstudy.analysis.report.cell_tables import interval, value
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS

Row = Mapping[str, Any]

METHOD = (
    "Model: statistic ~ seed + every axis, each axis tested as a whole (type II F test). Norms, logits and roughness "
    "enter by their logarithms and counts by their rates, so their effects are ratios; losses enter as they are. The "
    "error is moderated over all tests: it is larger where axes act differently by seed."
)


def effect_blocks(study: Study) -> Iterator[Block]:
    """The section: the table of `effects.claims`; folded, contrasts, interactions and paired differences."""
    if study.ingested:
        yield Text(runs_page.NO_PAIRS)
        return
    rows = records(claims(*study.tested())) if study.grid.axes else []
    if not rows:
        yield Text("No axis varies, so there is nothing to compare.")
        return
    yield from _effects(rows)
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


def _effects(rows: Sequence[Row]) -> Iterator[Block]:
    tests = words.count(sum(r["p_holm"] is not None for r in rows), "test")
    if any(r["p_holm"] is not None for r in rows):
        yield Text(
            f"{METHOD} p is corrected (Holm) for {tests}. An effect is stated where that, or the corrected p of an "
            f"interaction, is under {CLEAR:g}; one that only the uncorrected p shows is suggestive."
        )
    heads = ("axis", "from → to", "statistic", "effect [95 % interval]", "p", "p (Holm)", "reading", "note")
    yield Table(f"Effects: {tests}", heads, tuple(map(_effect, rows)), frozenset(heads[4:6]))


def _effect(row: Row) -> tuple[str, ...]:
    known = row["estimate"] is not None
    return (
        words.label(row["axis"]),
        _step(row["axis"], row) if known else words.NOTHING,
        COLUMNS[row["metric"]].label,
        findings.change(row) if known else words.NOTHING,
        words.number(row["p"], 2),
        words.number(row["p_holm"], 2),
        reading(row),
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
            findings.change(r),
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
    counts = ("pairs", "seeds", "larger in", "diverged", *(["p (sign flip)"] if flips else []))
    heads = ("axis", "from → to", "statistic", "mean", "change", "95 % interval", *counts)
    texts = tuple(_difference(*row, flips) for row in rows)
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


def _difference(axis: str, metric: str, row: Row, flips: bool) -> tuple[str, ...]:
    return (
        words.label(axis),
        _step(axis, row),
        COLUMNS[metric].label,
        f"{value(metric, row['mean_a'])} → {value(metric, row['mean_b'])}",
        value(metric, row["difference"]),
        interval(metric, row["low"], row["high"]),
        str(row["pairs"]),
        str(row["seeds"]),
        words.percent(row["positive"]),
        f"{row['diverged_a']} → {row['diverged_b']}",
        *([words.number(row["p"], 2)] if flips else []),
    )


def _step(axis: str, row: Row) -> str:
    return f"{words.level(row['a'], axis)} → {words.level(row['b'], axis)}"

"""The report's figures of effects: forest plot, clipping, LR sensitivity, first spikes, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, curve_plots, effect_plots, style, words
from stabstudy.analysis import survival as drivers
from stabstudy.analysis import words as sentences
from stabstudy.analysis.effects import CLEAR, REPORTED
from stabstudy.analysis.elements import Absent, Figure, Table
from stabstudy.analysis.levels import records
from stabstudy.analysis.paired import INTERVAL_FROM
from stabstudy.analysis.study import Study
from stabstudy.stability.summary import COLUMNS
from stabstudy.stability.verdict import VERDICTS

EFFECTS_TITLE = "What each axis changed"
MOST_CHANGES = 12
PARALLEL = ("final_loss", "grad_norm_log_sd", "spike_abs_rate")


def figures(study: Study, main_axis: str | None) -> Iterator[Figure | Absent]:
    """Every figure of effects that the study allows; `main_axis` has its curves elsewhere."""
    yield from _effects(study)
    yield from _clipping(study)
    yield from _sensitivity(study)
    yield from _first_spikes(study, main_axis)
    yield from _parallel(study)


def _sensitivity(study: Study) -> Iterator[Figure | Absent]:
    grid = study.grid
    others = [a for a in grid.axes if a != "optim.lr"]
    if "optim.lr" not in grid.axes or not others:
        yield Absent("LR sensitivity", "it takes several learning rates and another axis")
        return
    table = study.sensitivity()
    known = [r for r in records(table) if r["reason"] is None]
    if not known:
        yield Absent("LR sensitivity", "not computed (see Learning-rate sensitivity)")
        return
    x = "model.depth" if "model.depth" in others else others[0]
    rows = tuple(
        (
            *(words.level(r[a], a) for a in others),
            *(words.number(r[n]) for n in ("lrs", "lrs_low", "lrs_high", "seeds")),
        )
        for r in known
    )
    values = "; ".join(f"{_where(r, others)}: {words.number(r['lrs'])}" for r in known[:12])
    caption = (
        f"LR sensitivity (see Learning-rate sensitivity) against {words.label(x)}, with its 95 % interval over seeds "
        f"(from {INTERVAL_FROM} on), of {len(known)} of {words.count(len(table), 'recipe')}. Open mark: the best "
        "learning rate is the smallest or largest tried, so a wider grid may change the number."
        f"{_untrained(grid.trials)}"
        f"{_sensitivity_changes(study, x, [a for a in others if a != x])}"
    )
    heads = (*map(words.heading, others), "LR sensitivity (nat/token)", "low", "high", "seeds")
    numbers = Table("Numbers of this figure", heads, rows, frozenset(heads), folded=True)
    drawing = style.draw(curve_plots.sensitivity(study, x, table).figure)  # type: ignore[arg-type]
    title = f"LR sensitivity against {words.label(x)}"
    yield Figure("lr-sensitivity", title, drawing, f"Line chart. {values}.", caption, numbers)


def _sensitivity_changes(study: Study, x: str, others: list[str]) -> str:
    """` Paired by seed, depth 2 to 6: 0.02 (-0.01 to 0.05).`, of each recipe that has an interval."""
    rows = [r for r in records(study.sensitivity_difference(x)) if r["low"] is not None and r["seeds"] >= INTERVAL_FROM]
    changes = [
        f"{', '.join(filter(None, (sentences.step(x, r['a'], r['b']), _where(r, others))))}: {_change(r)}"
        for r in rows[:MOST_CHANGES]
    ]
    return f" Paired by seed, {'; '.join(changes)}." if changes else ""


def _where(row: dict[str, Any], axes: list[str]) -> str:
    return ", ".join(f"{words.label(a)} {words.level(row[a], a)}" for a in axes)


def _first_spikes(study: Study, axis: str | None) -> Iterator[Figure | Absent]:
    if axis is None or axis not in study.grid.axes:
        return
    times = study.time_to_first_spike(axis)
    if not len(times.levels) or not (times.levels["spiked"] + times.levels["diverged"]).any():
        yield Absent("Time to the first spike", "no trial spiked or diverged")
        return
    rows = tuple(
        (words.level(r["level"], axis), *map(words.number, (r["step"], r["at_risk"], r["free"], r["low"], r["high"])))
        for r in records(times.curves)
    )
    ends = [
        f"{words.level(r['level'], axis)}: {r['spiked']} of {r['trials']} spiked, {r['diverged']} diverged"
        for r in records(times.levels)
    ]
    seen, diverged = (int(times.levels[name].sum()) for name in ("trials", "diverged"))
    caption = (
        f"Kaplan-Meier: the estimated share of trials that had no spike of the gradient norm and did not diverge, per "
        f"level of {words.label(axis)}, all other axes pooled. {words.count(seen, 'trial')}, {diverged} of which "
        "diverged before a spike. Steps down: first spikes and divergences; ticks: trials that ended without either."
        f"{''.join(f' {caveat}' for caveat in drivers.caveats(axis, times))}"
    )
    heads = (words.heading(axis), "step", "at risk", "free", "low", "high")
    numbers = Table("Numbers of this figure", heads, rows, frozenset(heads), folded=True)
    drawing = style.draw(curve_plots.first_spikes(study, axis, times).figure)  # type: ignore[arg-type]
    title = f"Time to the first spike, by {words.label(axis)}"
    yield Figure("first-spikes", title, drawing, f"Step chart. {'; '.join(ends)}.", caption, numbers)


def _untrained(trials: pd.DataFrame) -> str:
    n = int((trials["verdict"] == "diverged").sum())
    return f" Diverged trials ({n} in the grid) count with the loss of the untrained model." if n else ""


def _effects(study: Study) -> Iterator[Figure | Absent]:
    if study.ingested:
        yield Absent(EFFECTS_TITLE, "runs trained elsewhere are not paired")
        return
    table = study.effects()
    rows = [r for r in records(table) if r["estimate"] is not None]
    if not rows:
        reasons = dict.fromkeys(str(note) for note in table["note"].dropna())
        yield Absent(EFFECTS_TITLE, f"not tested: {'; '.join(reasons) or 'no axis varies'}")
        return
    metrics = [m for m in REPORTED if any(r["metric"] == m for r in rows)]
    height = 0.9 + 0.42 * max(sum(r["metric"] == m for r in rows) for m in metrics)
    columns = min(2, len(metrics))
    figure = style.new_figure(
        9.2, height * -(-len(metrics) // columns), rows=-(-len(metrics) // columns), columns=columns
    )
    for ax, metric in zip(figure.axes, metrics, strict=False):
        effect_plots.effects(study, metric, table, ax)
    for ax in figure.axes[len(metrics) :]:
        ax.set_visible(False)
    tested = sum(r["p_holm"] is not None for r in rows)
    lacking = _lacking(study.trials, metrics)
    caption = (
        "Effect of each axis with its 95 % interval, seeds as blocks and all other axes as factors: losses as "
        f"differences, the others as ratios (log scale). Filled mark: p under {CLEAR:g} after Holm's correction for "
        f"{words.count(tested, 'test')}; open mark: no effect found, or suggestive at most."
        f"{f' Left out: {lacking}.' if lacking else ''}"
    )
    effects = [
        f"{sentences.step(r['axis'], r['a'], r['b'])}: {words.STATISTICS[r['metric']]} {sentences.change(r)}"
        for r in rows
    ]
    heads = ("axis", "statistic", "scale", "effect", "low", "high", "p (Holm)")
    texts = tuple(
        (
            sentences.step(r["axis"], r["a"], r["b"]),
            COLUMNS[r["metric"]].label,
            r["scale"],
            *map(words.number, (r["estimate"], r["low"], r["high"])),
            words.number(r["p_holm"], 2),
        )
        for r in rows
    )
    numbers = Table("Numbers of this figure", heads, texts, frozenset(heads[3:]), folded=True)
    alt = f"Forest plot. {'; '.join(effects)}."
    yield Figure("effects", EFFECTS_TITLE, style.draw(figure), alt, caption, numbers)


def _lacking(trials: pd.DataFrame, metrics: Sequence[str]) -> str:
    """`2 diverged without roughness`: how many diverged trials lack which of these statistics; empty: none."""
    diverged = trials[trials["verdict"] == "diverged"]
    without = {m: sum(not math.isfinite(v) for v in compare.values(diverged, m)) for m in metrics}
    return words.listing([f"{n} diverged without {_name(m)}" for m, n in without.items() if n])


def _change(row: dict[str, float]) -> str:
    interval = "" if row["low"] is None else f" ({words.number(row['low'])} to {words.number(row['high'])})"
    return f"{words.number(row['difference'])}{interval}"


def _clipping(study: Study) -> Iterator[Figure | Absent]:
    trials = effect_plots.clipped_trials(study)
    if not len(trials):
        yield Absent("Clip threshold against the norms", "no done trial clips by the norm")
        return
    groups = [(clip, members) for clip, members in trials.groupby("optim.clip")]
    heads = ("clip threshold", "trials", "median norm, smallest", "median norm, largest", "share of steps clipped")
    rows = tuple(
        (
            words.level(clip, "optim.clip"),
            str(len(members)),
            *map(words.number, (members["grad_norm_median"].min(), members["grad_norm_median"].max())),
            words.percent(float(members["clip_share"].mean())),
        )
        for clip, members in groups
    )
    ranges = [
        f"threshold {r[0]}: {r[1]} trials, median norms {r[2]} to {r[3]}, {r[4]} of the steps clipped" for r in rows
    ]
    above = int((trials["grad_norm_median"] > trials["optim.clip"]).sum())
    caption = (
        f"{words.count(len(trials), 'done trial')} that clip by the norm{_unsettled(study)}. Left: median "
        "gradient norm before clipping against the clip threshold. Dashed line: both are equal; above it "
        f"({words.count(above, 'trial')}) more than half of the settled steps are rescaled, so the threshold sets "
        "their size, not the gradient. Right: share of steps that were clipped; horizontal bars: means. All other "
        "settings are pooled."
    )
    figure = style.new_figure(9.2, 3.9, columns=2)
    effect_plots.clipping(study, figure.axes[0])
    effect_plots.clip_shares(study, figure.axes[1])
    drawing = style.draw(figure)
    table = Table("Numbers of this figure", heads, rows, frozenset(heads), folded=True)
    title = "Clip threshold against the norms"
    yield Figure("clipping", title, drawing, f"Scatter plot. {'; '.join(ranges)}.", caption, table)


def _unsettled(study: Study) -> str:
    """The trials that clip by the norm and ended before a median of it was known."""
    lacking = effect_plots.norm_clipping(study)
    lacking = lacking[lacking["grad_norm_median"].isna() | lacking["clip_share"].isna()]
    diverged = int((lacking["verdict"] == "diverged").sum())
    return f", {len(lacking)} more ({diverged} diverged) without a settled step" if len(lacking) else ""


def _parallel(study: Study) -> Iterator[Figure | Absent]:
    grid = study.grid
    if len(grid.axes) < 2:
        yield Absent("All axes at once", "fewer than two axes vary")
        return
    trials = effect_plots.judged_trials(grid)
    if not len(trials):
        yield Absent("All axes at once", "no trial is judged")
        return
    mixed = bool(compare.mixed(trials, "final_loss"))
    metrics = [m for m in PARALLEL if not (mixed and m in compare.ON_EVALUATION)]
    drawing = effect_plots.parallel(grid, metrics)
    counts = [(v, int((trials["verdict"] == v).sum())) for v in VERDICTS]
    verdicts = words.listing([f"{n} {v}" for v, n in counts if n])
    lacking = _lacking(trials, metrics)
    rest = int((grid.trials["state"] == "done").sum()) - len(trials)
    caption = (
        f"Parallel coordinates: a line for each of the {words.count(len(trials), 'judged trial')}, through its level "
        "on each axis (spread a little) and its statistics; every coordinate from its lowest value to its highest. "
        f"The line skips a statistic that its trial lacks{f' ({lacking})' if lacking else ''}."
        f"{f' Left out: {rest} done and not judged.' if rest else ''}"
        f"{' The loss is left out: trials were evaluated on different batches.' if mixed else ''}"
    )
    heads = ("coordinate", "lowest", "highest", "trials")
    rows = tuple((_name(n), *_range(n, trials, grid)) for n in (*grid.axes, *metrics))
    table = Table("Numbers of this figure", heads, rows, frozenset(heads[1:]), folded=True)
    alt = f"Parallel coordinates of {verdicts} trials."
    yield Figure("parallel", "All axes at once", style.draw(drawing.figure), alt, caption, table)  # type: ignore[arg-type]


def _name(coordinate: str) -> str:
    return words.STATISTICS.get(coordinate, words.label(coordinate))


def _range(name: str, trials: pd.DataFrame, study: Study) -> tuple[str, str, str]:
    """The ends of a coordinate, and the trials that have a value on it."""
    if name in study.axes:
        return words.level(study.axes[name][0], name), words.level(study.axes[name][-1], name), str(len(trials))
    known = sum(map(math.isfinite, compare.values(trials, name)))
    return *effect_plots.ends(trials, name), str(known)

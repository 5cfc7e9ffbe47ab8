"""What to use: candidates, ties, margins, edges and conditions, each in the sentence that states it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import statsmodels.formula.api as smf
import tabled
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from stabstudy.analysis import effects, recipe
from stabstudy.analysis.recipe import NoRecipe, Recipe
from stabstudy.analysis.report import recipe_formats
from stabstudy.analysis.study import Study

LR, CLIP, DEPTH = "optim.lr", "optim.clip", "model.depth"
SCATTER = ((0.004, -0.003, -0.001), (-0.002, 0.005, -0.003), (0.001, -0.004, 0.003), (-0.005, 0.001, 0.004))
"""What a trial's loss lies from that of its cell and seed: sd .004, so .02 between cells is clear at three seeds."""


def cells(*given: Mapping[str, Any], seeds: Iterable[int] = (0, 1, 2), steps: int = 400) -> list[dict[str, Any]]:
    """Trials of each cell: `loss`, and what else differs; the loss rises by .01 with the seed, and scatters."""
    rows = []
    for i, cell in enumerate(given):
        loss = cell["loss"]
        own = {"n_evaluable": steps - 12, "steps_done": steps, "eval_tokens": 16384}
        own |= {k: v for k, v in cell.items() if k != "loss"}
        for seed in seeds:
            value = loss + 0.01 * seed + SCATTER[i % 4][seed % 3] * (1 + 0.1 * (i // 4))
            rows.append(tabled.trial(seed=seed) | {"final_loss": value, "final_loss_capped": value} | own)
    return rows


ROUGH = {"verdict": "rough", "verdict_code": "ok"}
UNTRAINED = {"verdict": None, "verdict_reason": "untrained"}


def rates(*given: tuple[float, float] | tuple[float, float, dict[str, Any]], **how: Any) -> list[dict[str, Any]]:
    """Cells of (learning rate, loss) and what else differs."""
    return cells(*({LR: lr, "loss": loss} | (rest[0] if rest else {}) for lr, loss, *rest in given), **how)


def only(rows: Iterable[Mapping[str, Any]], **how: Any) -> Recipe:
    """The one recipe of these trials."""
    (answer,) = recipe.answers(tabled.study(rows, **how))
    assert isinstance(answer, Recipe), answer
    return answer


def change(rows: list[dict[str, Any]], where: Callable[[dict[str, Any]], bool], **columns: Any) -> list[dict[str, Any]]:
    """The rows with other values where the test holds."""
    return [row | columns if where(row) else row for row in rows]


def at(lr: float, *seeds: int) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row[LR] == lr and (not seeds or row["seed"] in seeds)


# The whole sentence


def test_the_best_stable_cell_with_its_margin_and_what_it_rests_on() -> None:
    """The largest rate has the lowest loss of all, and is rough in two of three seeds."""
    rows = rates((3e-3, 2.6), (1e-2, 2.5), (3e-2, 2.55), (1e-1, 2.0, ROUGH), (1.0, 2.0, ROUGH))
    rows = change(rows, at(1e-1, 0), verdict="stable")
    answer = only(rows)
    assert answer.levels == {LR: 1e-2} and answer.given == {} and answer.candidates == 3 and not answer.ties
    assert answer.margin == recipe.Margin(1e-2, 3e-2, 1e-1, (2, 3), 388, 1.0)
    assert recipe.sentence(answer) == (
        "Use learning rate 0.01: final loss 2.510 ± 0.026 nat/token (3 seeds, 16,384 evaluation tokens); lower than in "
        "the 2 other stable cells; margin: stable at 3 times this learning rate, not at 10 times (2 of 3 trials are "
        "not stable)."
    )


def test_the_interval_of_the_loss_is_students() -> None:
    losses = [2.5 - 0.002, 2.5 + 0.01 + 0.005, 2.5 + 0.02 - 0.003]
    loss = only(rates((3e-3, 2.6), (1e-2, 2.5))).loss
    assert (loss.n, loss.mean) == (3, pytest.approx(np.mean(losses)))
    assert loss.high - loss.mean == pytest.approx(4.302653 * np.std(losses, ddof=1) / math.sqrt(3))


def test_a_study_on_disk_has_the_same_answer(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for row in rates((1e-2, 2.5), (3e-2, 2.6), (1e-1, 2.0)):
        spikes = dict.fromkeys((60, 75, 90, 105), 8.0) if row[LR] == 1e-1 and row["seed"] else None
        config = planted.settings(2, row[LR], seed=row["seed"], steps=240)
        planted.plant_trial(tmp_path / "s", config, spikes=spikes, final_loss=row["final_loss"])
    (answer,) = recipe.recipes(Study.load(tmp_path / "s"))
    assert recipe.sentence(answer) == (
        "Use learning rate 0.01: final loss 2.510 ± 0.020 nat/token (3 seeds); lower than in the other stable cell; "
        "margin: stable at 3 times this learning rate, not at 10 times (2 of 3 trials are not stable); 0.01 is the "
        "smallest learning rate tried."
    )
    assert recipe_formats.overrides(answer.given | answer.levels, answer.settings)[0] == "optim.lr=0.01"


# Candidates


def test_a_lucky_cell_of_one_seed_never_wins() -> None:
    """Its seed is an easy one: at the other rate it has the lower loss too."""
    rows = cells({LR: 3e-3, "loss": 2.44, DEPTH: 6}, {LR: 3e-2, "loss": 2.39, DEPTH: 6})
    lucky = [row for row in rows if row[LR] == 3e-3 or row["seed"] == 1]
    answer = only(lucky)
    assert answer.levels == {LR: 3e-3} and (answer.candidates, answer.incomplete) == (1, 1)
    assert "; the only stable cell (1 more lacks a seed, a verdict or a loss);" in recipe.sentence(answer)
    assert only(rows).levels == {LR: 3e-2}  # with all seeds there it is the better one


@pytest.mark.parametrize(
    "columns",
    [
        {"state": "failed", "verdict": None, "final_loss": None, "final_loss_capped": None},
        {"state": "pending", "verdict": None, "final_loss": None, "final_loss_capped": None},
        {"final_loss": None, "final_loss_capped": None},
        UNTRAINED,
        {"verdict": None, "verdict_reason": "too_short"},
    ],
)
def test_a_better_mean_of_fewer_seeds_is_no_better(columns: dict[str, Any]) -> None:
    """The worst seed of the better cell gives no result: over all seeds it was the worse one."""
    rows = change(rates((1e-2, 2.5), (3e-2, 2.45)), at(3e-2, 2), **columns)
    answer = only(rows)
    assert answer.levels == {LR: 1e-2} and (answer.candidates, answer.incomplete) == (1, 1)
    assert answer.loss.n == 3 and math.isfinite(answer.loss.high)


def test_an_unstable_seed_excludes_its_cell_and_counts_as_no_hole() -> None:
    for verdict in ("spiky", "rough", "diverged"):
        rows = change(rates((1e-2, 2.5), (3e-2, 2.4)), at(3e-2, 1), verdict=verdict)
        answer = only(rows)
        assert answer.levels == {LR: 1e-2} and (answer.candidates, answer.incomplete) == (1, 0)


def test_sampling_noise_excludes_no_cell() -> None:
    rows = rates((1e-2, 2.5), (3e-2, 2.45), (1e-1, 2.6), (3e-1, 2.6, ROUGH))
    noisy = change(rows, at(3e-2, 0, 2), **ROUGH, sampling_noise=True)
    noisy = change(noisy, at(1e-1, 1), verdict="spiky", sampling_noise=True)
    answer = only(noisy)
    assert (answer.levels, answer.noise, answer.candidates) == ({LR: 3e-2}, 2, 3)
    assert recipe.sentence(answer) == (
        "Use learning rate 0.03: final loss 2.460 ± 0.026 nat/token (3 seeds, 16,384 evaluation tokens); 2 of its 3 "
        "trials rough or spiky by sampling noise; lower than in the 2 other stable cells; margin: stable at 3.3 times "
        "this learning rate, not at 10 times (3 of 3 trials are not stable)."
    )
    assert only(change(noisy, at(3e-2), sampling_noise=False)).levels == {LR: 1e-2}  # rough by itself


def test_a_cell_that_learned_nothing_is_not_stable() -> None:
    answer = only(rates((1e-2, 2.5), (3e-2, 2.0, UNTRAINED), (1e-1, 2.0, UNTRAINED)))
    assert (answer.levels, answer.candidates, answer.incomplete) == ({LR: 1e-2}, 1, 0)


# Ties


def test_a_tie_that_a_test_without_holm_would_separate() -> None:
    """Of nine rates one is better by less than two deviations: the cells differ, and no single one is told apart."""
    draw = np.random.default_rng(1140)
    losses = 2.5 + 0.03 * draw.standard_normal((9, 3))
    losses[0] -= 0.05
    grid = [0.001 * (i + 1) for i in range(9)]
    rows = [
        row | dict.fromkeys(("final_loss", "final_loss_capped"), float(losses[grid.index(row[LR]), row["seed"]]))
        for row in rates(*((lr, 2.5) for lr in grid))
    ]
    table = pd.DataFrame({"y": row["final_loss"], "seed": row["seed"], "cell": grid.index(row[LR])} for row in rows)
    best = table.groupby("cell")["y"].mean().idxmin()
    fit = smf.ols(f"y ~ C(seed) + C(cell, Treatment({best}))", table).fit()
    p = fit.pvalues.filter(like="C(cell").to_numpy()
    assert anova_lm(fit, typ=2).loc[f"C(cell, Treatment({best}))", "PR(>F)"] < 0.05
    assert (p < 0.05).sum() == 3 and multipletests(p, method="holm")[1].min() > 0.05
    answer = only(rows)
    assert len(answer.ties) == 8
    assert "; all 9 stable cells are tied, not distinguishable: learning rate 1e-3, 2e-3, " in recipe.sentence(answer)


def test_what_is_clearly_worse_is_no_tie_and_all_ties_are_named() -> None:
    rows = cells(
        {LR: 3e-3, CLIP: 1.0, "loss": 2.502}, {LR: 3e-3, CLIP: None, "loss": 2.504},
        {LR: 1e-2, CLIP: 1.0, "loss": 2.500}, {LR: 1e-2, CLIP: None, "loss": 2.503},
        {LR: 3e-2, CLIP: 1.0, "loss": 2.501}, {LR: 3e-2, CLIP: None, "loss": 2.600},
        {LR: 1e-1, CLIP: 1.0, "loss": 2.900} | ROUGH, {LR: 1e-1, CLIP: None, "loss": 2.900} | ROUGH,
    )  # fmt: skip
    answer = only(rows)
    assert recipe.sentence(answer) == (
        "Use learning rate 3e-3, clip threshold 1: final loss 2.512 ± 0.020 nat/token (3 seeds, 16,384 evaluation "
        "tokens); 5 of 6 stable cells are tied, not distinguishable: learning rate 3e-3, 0.01 or 0.03 with clip "
        "threshold 1, and learning rate 3e-3 or 0.01 with clip threshold off; of these it has the widest known margin, "
        "and of those that share it the lowest loss; margin: stable at 10 times this learning rate, not at 33 times (3 "
        "of 3 trials are not stable); 3e-3 is the smallest learning rate tried; 1 is the smallest clip threshold tried."
    )


def test_of_equally_wide_margins_the_lowest_loss() -> None:
    rows = cells(
        {"optim.beta2": 0.95, "loss": 2.502}, {"optim.beta2": 0.99, "loss": 2.5}, {"optim.beta2": 0.999, "loss": 2.503}
    )
    answer = only(rows)
    assert answer.levels == {"optim.beta2": 0.99} and answer.margin is None
    assert recipe.sentence(answer).endswith(
        "; all 3 stable cells are tied, not distinguishable: optim.beta2 0.95, 0.99 or 0.999; of these it has the "
        "lowest loss."
    )


def test_one_seed_ties_everything_but_recommends_nothing_that_learned_little() -> None:
    """Of a single seed nobody knows; the rate with the widest margin of all ended 1.4 nat above the best."""
    rows = rates((1e-4, 4.0), (3e-3, 2.6), (1e-2, 2.5), (1e-1, 2.4, ROUGH), seeds=(0,))
    answer = only(rows)
    assert answer.levels == {LR: 3e-3} and len(answer.ties) == 2
    assert recipe.sentence(answer) == (
        "Use learning rate 3e-3: final loss 2.598 nat/token (1 seed, 16,384 evaluation tokens); all 3 stable cells are "
        "tied, not distinguishable: learning rate 1e-4, 3e-3 or 0.01; of those within 0.2 nat/token of the best it has "
        "the widest known margin; margin: stable at 3.3 times this learning rate, not at 33 times (1 of 1 trial is not "
        "stable)."
    )


def test_cells_are_not_told_apart_on_less_evidence_than_a_change_needs() -> None:
    """Clipping changes nothing that the study can tell; two cells alone would be told apart at p = .02."""
    rows = [
        row | {"final_loss_capped": v, "final_loss": v}
        for row, v in zip(
            cells(*({LR: lr, CLIP: clip, "loss": 0.0} for lr in (1e-2, 1e-1) for clip in (1.0, None))),
            (2.500, 2.510, 2.520, 2.508, 2.521, 2.529, 2.95, 2.90, 2.93, 2.92, 2.94, 2.90),
            strict=True,
        )
    ]
    rows = change(rows, at(1e-1), **ROUGH)
    pair = pd.DataFrame(rows[:6])
    alone = effects.contrasts(pair.assign(cell=pair[CLIP].isna().astype(int)), ["cell"], ["final_loss"])
    assert alone["p_holm"].iloc[0] < 0.02
    assert len(only(rows).ties) == 1
    clear = [r | {"final_loss_capped": r["final_loss_capped"] + 0.05 * (r[CLIP] is None)} for r in rows]
    assert not only(clear).ties  # the study can tell that clipping matters


def test_a_named_case_is_a_candidate_like_others() -> None:
    """No axis of the grid says how it differs; where it is far worse it is no tie for that."""
    grid = rates((1e-2, 2.5), (3e-2, 2.6))
    for loss, tied in ((2.503, True), (2.65, False)):
        case = cells({LR: 1e-2, "optim.weight_decay": 0.3, "loss": loss, "case": "heavy"})
        answer = only([*grid, *case])
        assert answer.levels == {LR: 1e-2, "optim.weight_decay": 0.1} and answer.candidates == 3
        assert (tuple(t["optim.weight_decay"] for t in answer.ties) == (0.3,)) == tied
    best = only([*grid, *cells({LR: 1e-2, "optim.weight_decay": 0.3, "loss": 2.3, "case": "heavy"})])
    assert best.levels == {LR: 1e-2, "optim.weight_decay": 0.3}
    assert recipe.sentence(best).endswith(
        "; 0.01 is the smallest learning rate tried; 0.3 is the largest weight decay tried."
    )


@pytest.mark.slow
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.05, 0.3]))
def test_whatever_the_losses_the_choice_is_a_stable_cell_near_the_best(rng: int, seeds: int, spread: float) -> None:
    draw = np.random.default_rng(rng)
    grid = itertools.product((1e-3, 1e-2, 1e-1), (1.0, None))
    rows = cells(
        *({LR: a, CLIP: b, "loss": 2.5 + spread * draw.standard_normal()} for a, b in grid), seeds=range(seeds)
    )
    rows = [r | {"verdict": draw.choice(["stable", "stable", "stable", "rough"])} for r in rows]
    table = pd.DataFrame(rows)
    stable = table.groupby([LR, CLIP], dropna=False).filter(lambda c: (c["verdict"] == "stable").all())
    (answer,) = recipe.answers(tabled.study(rows))
    if stable.empty:
        assert isinstance(answer, NoRecipe)
        return
    assert isinstance(answer, Recipe)
    means = stable.groupby([LR, CLIP], dropna=False)["final_loss_capped"].mean()
    assert answer.candidates == len(means) > len(answer.ties)
    key = (answer.levels[LR], math.nan if answer.levels[CLIP] is None else 1.0)
    assert answer.loss.mean == pytest.approx(means.loc[[key]].iloc[0])
    assert answer.loss.mean <= means.min() + 0.2
    assert seeds > 1 or len(answer.ties) == len(means) - 1
    assert recipe.sentence(answer).endswith(".") and "None" not in recipe.sentence(answer)


# Margins


@pytest.mark.parametrize(
    ("above", "words"),
    [
        ([], "margin: not known, no larger learning rate was tried with these settings"),
        ([(3e-2, {})], "margin: stable at 3 times this learning rate, the most tried"),
        ([(3e-2, ROUGH)], "margin: not at 3 times this learning rate (3 of 3 trials are not stable)"),
        ([(3e-2, UNTRAINED)], "margin: not known, not every seed above it has a verdict"),
        ([(3e-2, UNTRAINED), (1e-1, {})], "margin: stable at 10 times this learning rate, the most tried"),
        (
            [(3e-2, UNTRAINED), (1e-1, ROUGH)],
            "margin: not at 10 times this learning rate (3 of 3 trials are not stable)",
        ),
        (
            [(3e-2, {}), (1e-1, {"state": "oom", "verdict": None, "n_evaluable": 0})],
            "margin: stable at 3 times this learning rate, not every seed above it has a verdict",
        ),
        (
            [(3e-2, {"state": "oom", "verdict": None, "n_evaluable": 0}), (1e-1, {})],
            "margin: not known, not every seed above it has a verdict",
        ),
        (
            [(3e-2, {}), (1e-1, {"verdict": "diverged", "n_evaluable": 6})],
            "margin: stable at 3 times this learning rate, not at 10 times (3 of 3 trials are not stable)",
        ),
        (
            [(3e-2, ROUGH), (1e-1, {})],
            "margin: not at 3 times this learning rate (3 of 3 trials are not stable)",
        ),
    ],
)  # fmt: skip
def test_a_margin_is_an_interval_of_what_was_seen(above: list[tuple[float, dict[str, Any]]], words: str) -> None:
    answer = only(rates((3e-3, 2.6), (1e-2, 2.5), *((lr, 2.8, how) for lr, how in above)))
    assert answer.levels == {LR: 1e-2}
    assert f"; {words}" in recipe.sentence(answer)


def test_a_missing_seed_ends_what_is_known_to_be_stable() -> None:
    rows = rates((1e-2, 2.5), (3e-2, 2.8), (1e-1, 2.8), (3e-1, 2.9, ROUGH))
    answer = only([row for row in rows if not at(1e-1, 2)(row)])
    assert answer.margin is not None and (answer.margin.stable_to, answer.margin.unstable_at) == (3e-2, 3e-1)


def test_under_two_hundred_evaluable_steps_no_margin_is_claimed() -> None:
    """What was unstable in so few steps is; what was not is no claim."""
    given = ((3e-3, 2.5), (1e-2, 2.501), (3e-2, 2.8, ROUGH))
    short, long = only(rates(*given, steps=211)), only(rates(*given, steps=212))
    assert short.margin is not None and long.margin is not None
    assert (short.margin.evaluable, long.margin.evaluable) == (199, 200)
    assert recipe.sentence(short).endswith(
        "; of these it stayed stable up to the highest multiple of its learning rate; no margin is claimed from 199 "
        "evaluable steps (200 are needed); unstable at 10 times this learning rate (3 of 3 trials are not stable); "
        "3e-3 is the smallest learning rate tried."
    )
    assert recipe.sentence(long).endswith(
        "; of these it has the widest known margin; margin: stable at 3.3 times this learning rate, not at 10 times (3 "
        "of 3 trials are not stable); 3e-3 is the smallest learning rate tried."
    )


def test_three_times_is_as_wide_as_three_times() -> None:
    """.3 / .1 and .03 / .01 differ in their last bit: no margin is wider for that."""
    margins = [recipe.Margin(lr, to, 10 * lr, (1, 3), 388, 10 * lr) for lr, to in ((0.1, 0.3), (0.01, 0.03))]
    assert 0.3 / 0.1 != 0.03 / 0.01 and margins[0].width == margins[1].width
    assert margins[0].width == (pytest.approx(math.log10(3)), 1.0)


def test_a_margin_is_that_of_the_same_other_knobs() -> None:
    rows = cells(
        {LR: 1e-2, CLIP: 1.0, "loss": 2.5}, {LR: 1e-1, CLIP: 1.0, "loss": 2.8}, {LR: 1e-2, CLIP: None, "loss": 2.8},
        {LR: 3e-2, CLIP: None, "loss": 2.8} | ROUGH,
    )  # fmt: skip
    answer = only(rows)
    assert answer.levels == {LR: 1e-2, CLIP: 1.0} and answer.margin is not None
    assert (answer.margin.stable_to, answer.margin.unstable_at) == (1e-1, None)


# Edges


@pytest.mark.parametrize(
    ("axis", "levels", "best", "words"),
    [
        (CLIP, (0.5, 1.0, None), 1.0, ""),  # off lies beyond the largest threshold
        (CLIP, (0.5, 1.0, None), None, ""),
        (CLIP, (0.5, 1.0, None), 0.5, "0.5 is the smallest clip threshold tried"),
        (CLIP, (0.5, 1.0, 2.0), 2.0, "2 is the largest clip threshold tried"),
        (CLIP, (0.5, 1.0, 2.0), 1.0, ""),
        ("optim.weight_decay", (0.0, 0.1, 0.3), 0.0, ""),  # nothing lies below
        ("optim.weight_decay", (0.0, 0.1, 0.3), 0.3, "0.3 is the largest weight decay tried"),
        ("model.qk_norm", (False, True), True, ""),
        ("optim.decay_mode", ("coupled", "independent"), "coupled", ""),
    ],
)
def test_an_end_of_the_grid_stands_in_the_sentence(axis: str, levels: tuple[Any, ...], best: Any, words: str) -> None:
    answer = only(cells(*({axis: v, "loss": 2.5 if v == best else 2.7} for v in levels)))
    assert answer.levels[axis] == best
    others = "2 other stable cells" if len(levels) == 3 else "other stable cell"
    ending = f"; lower than in the {others}{f'; {words}' if words else ''}."
    assert recipe.sentence(answer).endswith(ending)


def test_an_end_is_that_of_the_conditions() -> None:
    """At depth 6 the rates above .03 were excluded: there .03 is the largest that was tried."""
    rows = [
        row
        for depth, rates_there in ((2, (1e-2, 3e-2, 1e-1)), (6, (1e-2, 3e-2)))
        for row in cells(*({DEPTH: depth, LR: lr, "loss": 2.6 - 0.1 * (lr == 3e-2)} for lr in rates_there))
    ]
    shallow, deep = recipe.recipes(tabled.study(rows))
    assert (shallow.ends, deep.ends) == ({}, {LR: "largest"})
    waiting = change(rows, at(1e-1), state="pending", verdict=None, final_loss_capped=None)
    assert recipe.recipes(tabled.study(waiting))[0].ends == {LR: "largest"}  # planned is not tried


# Conditions


def by_depth() -> list[dict[str, Any]]:
    """The deeper model has the lower loss, and another best rate."""
    return cells(
        {DEPTH: 2, LR: 1e-2, "loss": 2.6}, {DEPTH: 2, LR: 3e-2, "loss": 2.5},
        {DEPTH: 6, LR: 1e-2, "loss": 2.3}, {DEPTH: 6, LR: 3e-2, "loss": 2.4},
    )  # fmt: skip


def test_there_is_a_recipe_for_each_depth_and_none_of_a_depth() -> None:
    sentences = [recipe.sentence(r) for r in recipe.recipes(tabled.study(by_depth()))]
    assert [s.partition(":")[0] for s in sentences] == ["For depth 2", "For depth 6"]
    assert sentences[0].startswith("For depth 2: use learning rate 0.03: final loss 2.510")
    assert sentences[1].startswith("For depth 6: use learning rate 0.01: final loss 2.310")
    assert not any("use depth" in s.lower() for s in sentences)


def test_every_combination_of_conditions_has_its_own() -> None:
    grid = itertools.product((2, 6), (200, 400), (1e-2, 3e-2))
    rows = cells(*({DEPTH: d, "train.steps": s, LR: lr, "loss": 2.5 + lr} for d, s, lr in grid))
    answers = recipe.recipes(tabled.study(rows))
    expected = [{DEPTH: d, "train.steps": s} for d in (2, 6) for s in (200, 400)]
    assert [answer.given for answer in answers] == expected and {answer.candidates for answer in answers} == {2}
    assert recipe.sentence(answers[1]).startswith("For depth 2, train.steps 400: use learning rate 0.01: ")


@pytest.mark.parametrize(
    ("conditions", "given"),
    [
        (None, {DEPTH: 2}),
        (["optim.clip"], {CLIP: 1.0}),
        ([], {}),
        (["model"], {DEPTH: 2}),
        (["model.depth", "optim.clip", "data"], {DEPTH: 2, CLIP: 1.0}),
    ],
)
def test_a_sweep_may_name_its_conditions(conditions: list[str] | None, given: dict[str, Any]) -> None:
    grid = itertools.product((2, 6), (1e-2, 3e-2), (1.0, None))
    study = tabled.study(cells(*({DEPTH: d, LR: lr, CLIP: c, "loss": 2.5} for d, lr, c in grid)), conditions=conditions)
    first = recipe.recipes(study)[0]
    assert first.given == given and set(first.levels) == {DEPTH, LR, CLIP} - set(given)
    if conditions == []:
        assert "depth" in recipe.sentence(first).partition(":")[0]  # whoever says that the depth can be chosen, may


@pytest.mark.parametrize(
    ("question", "steps", "given"),
    [
        ("", 400, ["train.batch_size"]),
        ("Which learning rate?", 400, ["train.batch_size"]),
        ("How do micro-batches matter?", 400, ["train.batch_size"]),
        ("What do batch size and learning rate change?", 400, ["train.batch_size"]),  # made of the axes
        ("What do train.batch_size and optim.lr change?", 400, ["train.batch_size"]),  # so in older studies
        ("May the learning rate grow with the batch size?", 400, []),
        ("Is a larger batch calmer?", 400, []),
        ("", None, ["train.steps", "train.batch_size"]),
        ("May the learning rate grow with the batch size, at equal tokens?", None, []),
    ],
)
def test_the_batch_size_is_given_unless_the_question_asks(question: str, steps: int | None, given: list[str]) -> None:
    """`steps` None: they fall as the batch grows, so that all trials read as many tokens."""
    grid = itertools.product((8, 32), (1e-2, 3e-2))
    rows = cells(
        *({"train.batch_size": b, "train.steps": steps or 3200 // b, LR: lr, "loss": 2.5} for b, lr in grid), steps=400
    )
    study = tabled.study(rows, question)
    assert sorted(recipe.conditions(study)) == sorted(given)
    assert len(recipe.recipes(study)) == (2 if given else 1)


def test_each_dataset_has_its_own_recipe_though_losses_do_not_compare() -> None:
    rows = [
        row | {"eval_hash": f"of {name}"}
        for name, better in (("c4", 1e-2), ("dclm", 1e-3))
        for row in cells(*({"data": name, LR: lr, "loss": 2.0 if lr == better else 2.5} for lr in (1e-3, 1e-2)))
    ]
    answers = recipe.recipes(tabled.study(rows, groups=["data"]))
    assert [(a.given, a.levels, a.candidates) for a in answers] == [
        ({"data": "c4"}, {LR: 1e-2}, 2),
        ({"data": "dclm"}, {LR: 1e-3}, 2),
    ]
    assert recipe.sentence(answers[0]).startswith("For dataset c4: use learning rate 0.01: ")
    assert len(recipe.recipes(tabled.study(rows, groups=["data"], conditions=[DEPTH]))) == 2  # whatever a sweep says


# No recipe


def refused(rows: Iterable[Mapping[str, Any]], **how: Any) -> list[str]:
    answers = recipe.answers(tabled.study(rows, **how))
    return list(recipe.refusals([answer for answer in answers if isinstance(answer, NoRecipe)]))


def test_conditions_without_a_recipe_are_named() -> None:
    rows = by_depth()
    rough = change(rows, lambda row: row[DEPTH] == 6, **ROUGH)
    assert refused(rough) == ["No recipe for depth 6: no cell is stable with all 3 seeds, each trained to its end."]
    assert len(recipe.recipes(tabled.study(rough))) == 1
    none = change(rows, lambda row: True, **ROUGH)
    reason = "no cell is stable with all 3 seeds, each trained to its end"
    assert refused(none) == [f"No recipe for depth 2 or depth 6: {reason}."]
    assert recipe.why_none(tabled.study(none)) == reason and recipe.why_none(tabled.study(rows)) == ""
    one = change(rates((1e-2, 2.5), seeds=(0,)), lambda row: True, state="failed", verdict=None)
    assert refused(one) == ["No recipe: no cell is stable and trained to its end."]


@pytest.mark.parametrize("hashes", [("a", "b"), ("a", None), (None, None)])
def test_losses_on_different_evaluation_sets_give_no_recipe(hashes: tuple[str | None, str | None]) -> None:
    first, second = hashes
    rows = change(change(rates((1e-2, 2.5), (3e-2, 2.4)), at(1e-2), eval_hash=first), at(3e-2), eval_hash=second)
    assert refused(rows) == ["No recipe: the losses were measured on different evaluation sets, or not at all."]
    unstable = change(rows, at(3e-2), **ROUGH)  # what is no candidate is compared with nothing
    assert bool(refused(unstable)) == (first is None)


def test_a_study_of_one_cell_has_nothing_to_name() -> None:
    assert recipe.sentence(only(rates((1e-2, 2.5)))) == (
        "Use these settings: final loss 2.510 ± 0.020 nat/token (3 seeds, 16,384 evaluation tokens); the only stable "
        "cell."
    )

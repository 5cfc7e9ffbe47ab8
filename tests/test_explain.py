"""The sentences on a trial, from records whose story is known: each number in them is checked by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from series import Floats, learning, lognormal, probe_rows, trace_rows

from stabstudy.stability.explain import DIVERGED, Recipe, explain, outcome
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise

RULES = Rules()
FACTS = TrialFacts(
    steps_planned=400, warmup_steps=40, clip=1.0, status="done", stop_reason="complete", init_loss=6.5, final_loss=2.5
)
RECIPE = Recipe(clip=1.0, warmup_steps=40)


def told(norm: Floats, loss: Floats | None = None, facts: TrialFacts = FACTS, recipe: Recipe = RECIPE) -> list[str]:
    found = summarise(trace_rows(learning(len(norm), 1) if loss is None else loss, norm), None, facts, RULES)
    return explain(found.columns, found.spikes, recipe, RULES)


def quiet(n: int = 400, level: float = 0.5) -> Floats:
    return level * lognormal(0.1, n, 0)


def test_a_quiet_trial_has_no_spike_and_a_clip_that_never_acted() -> None:
    norm = quiet()
    assert told(norm) == [
        "Stable: no spike in 388 judged steps.",
        f"A clip of 1.0 never acted: the largest norm was {norm.max():.3g}.",
    ]


def test_clipping_off_is_not_spoken_of() -> None:
    facts = dataclasses.replace(FACTS, clip=None)
    assert told(quiet(), facts=facts, recipe=Recipe(None, 40)) == ["Stable: no spike in 388 judged steps."]


def test_a_threshold_below_the_median_sets_the_step() -> None:
    norm = np.where(np.arange(400) % 10 == 0, 0.9, 1.66)  # 40 of 400 below the threshold
    assert told(norm)[-1] == (
        "A clip of 1.0 lies below the median norm of 1.66: it rescales 90 % of the steps, so the threshold, not the "
        "gradient, sets the step."
    )


def test_a_threshold_above_the_median_does_not() -> None:
    norm = np.where(np.arange(400) % 10 == 0, 1.1, 0.8)
    assert told(norm)[-1] == "A clip of 1.0 lies above the median norm of 0.8: it rescales 10 % of the steps."


def test_one_spike_that_the_loss_follows() -> None:
    norm, loss = quiet(), learning(400, 1)
    norm[200], loss[203] = 5.0, loss[203] + 3.0
    sentence = told(norm, loss)[1]
    assert sentence.startswith(
        "The one spike of the gradient norm began at step 200, after the warmup of 40; it reached "
    )
    assert "reached 5, " in sentence and sentence.endswith(
        ", took 1 step to come back near it, and the loss followed by 3 steps."
    )


def test_several_spikes_name_the_first_and_the_highest() -> None:
    norm = quiet()
    norm[[25, 150, 300]] = 2.0, 8.0, 4.0
    verdict, spikes, _ = told(norm)
    assert verdict == "Spiky: spikes recur (3 of the gradient norm, 0 of the loss) (R2)."
    assert spikes.startswith("The first of 3 spikes of the gradient norm began at step 25, in the warmup of 40; ")
    assert "the highest, at step 150, reached " in spikes and spikes.endswith("and the loss did not follow.")


def test_a_spike_of_the_loss_alone() -> None:
    loss = learning(400, 1)
    loss[250] += 2.0
    assert told(quiet(), loss)[1] == "The loss spiked at step 250; the gradient norm did not."


def test_large_numbers_are_written_as_people_type_them() -> None:
    from stabstudy.stability.explain import _number

    assert [_number(v) for v in (3.474e6, 1.36e8, 0.3171, 5.0, 1e-5)] == ["3.47e6", "1.36e8", "0.317", "5", "1e-5"]


def test_roughness_says_how_many_steps() -> None:
    norm = quiet() * np.where(np.arange(400) % 20 == 10, 3.3, 1.0)
    found = summarise(trace_rows(learning(400, 1), norm), None, FACTS, RULES).columns
    steps = found["spike_abs_steps"]
    assert isinstance(steps, int) and 10 <= steps <= 20
    assert outcome(found, RULES) == (
        f"Rough: {steps} of 388 judged steps ({100 * steps / 388:.2g} %; at least "
        f"{100 * chi2.ppf(0.05, 2 * steps) / 2 / 388:.2g} %) had a gradient norm of 3 times the recent level or more."
    )


def test_a_long_spike_and_one_that_is_not_over() -> None:
    norm = np.full(400, 0.5)
    norm[200:215] *= 10
    assert told(norm)[0] == "Spiky: a spike lasted more than 10 steps, or was not over at the end (R1)."
    assert ", took 15 steps to come back near it, and the loss did not follow." in told(norm)[1]
    partial = dataclasses.replace(FACTS, stop_reason="log_ended", steps_planned=800)
    assert told(norm, facts=partial)[0].startswith("Spiky as far as it ran: ")


def test_a_trial_that_learned_nothing_is_untrained_and_warned_of() -> None:
    probes = probe_rows(
        [0, 40], attn_logit_max=[[1.0], [3750.0]], attn_entropy=[[0.9], [0.01]], resid_rms=[[1.0], [101.0]]
    )
    facts = dataclasses.replace(FACTS, unigram_entropy=2.0, clip=None)
    trace = trace_rows(learning(400, 1), quiet(), logit_absmax=[1.0] * 50 + [200.0] * 350)
    found = summarise(trace, probes, facts, RULES)
    assert explain(found.columns, found.spikes, RECIPE, RULES) == [
        "Untrained: the smoothed loss never came below the entropy of single tokens, so nothing was learned that "
        "could have become unstable.",
        "Warning: attention logits passed 1,000 at step 40; attention entropy fell below 0.02 of its largest possible "
        "value at step 40; the residual stream grew to 100 times its initial RMS at step 40; output logits passed 100 "
        "at step 50.",
    ]
    low = summarise(trace, probe_rows([0, 40], attn_logit_max=[[1.0], [375.0]]), facts, RULES).columns
    assert explain(low, [], RECIPE, RULES)[1].startswith("Warning: attention logits passed 100 at step 40; ")


def test_a_diverged_trial_needs_no_warning() -> None:
    norm = quiet()
    norm[120] = math.nan
    found = summarise(trace_rows(learning(400, 1), norm, logit_absmax=[200.0] * 400), None, FACTS, RULES)
    assert not any(s.startswith("Warning") for s in explain(found.columns, found.spikes, RECIPE, RULES))


def test_without_a_gradient_norm_there_is_no_verdict() -> None:
    found = summarise(trace_rows(learning(400, 1), [None] * 400), None, FACTS, RULES).columns
    assert outcome(found, RULES) == "Not judged: the record has no gradient norm."


def test_divergence_names_its_code_and_step() -> None:
    norm = quiet()
    norm[120] = math.nan
    assert told(norm)[0] == f"Diverged at step 120 of 400: {DIVERGED['nonfinite']} (nonfinite)."


def test_a_short_or_failed_trial_is_not_judged() -> None:
    short = dataclasses.replace(FACTS, steps_planned=30)
    assert told(quiet(30), facts=short)[0] == "Not judged: 18 evaluable steps, and a verdict needs 50."
    failed = dataclasses.replace(FACTS, status="oom", stop_reason=None)
    assert told(quiet(120), facts=failed)[0] == "Not judged: oom after 120 of 400 steps."


def test_other_clipping_rules_have_no_threshold() -> None:
    facts = dataclasses.replace(FACTS, clip_kind="zclip")
    norm = quiet()
    scale = np.where(np.arange(400) < 100, 0.5, 1.0)
    found = summarise(trace_rows(learning(400, 1), norm, clip_scale=scale), None, facts, RULES)
    sentence = explain(found.columns, found.spikes, Recipe(1.0, 40, "zclip"), RULES)[-1]
    assert sentence.startswith("Clipping by zclip rescaled 25 % of the steps (median norm ")


def test_a_log_that_leaves_steps_out_proves_no_stability() -> None:
    strided = dataclasses.replace(FACTS, stride=10, steps_planned=4000, warmup_steps=0)
    assert told(quiet(), facts=strided, recipe=Recipe(None, None)) == [
        "Not judged: no spike in 388 judged rows, and the log leaves out the steps between."
    ]
    norm = quiet()
    norm[200] = 5.0
    assert told(norm, facts=strided, recipe=Recipe(None, None))[1].startswith(
        "The one spike of the gradient norm began at step 2000; it reached "
    )
    assert told(norm, facts=strided)[1].endswith("(not every step was logged: how long it lasted is not known).")


@given(
    st.lists(st.floats(0, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=150),
    st.sampled_from(["done", "failed"]),
    st.sampled_from([None, 1e-3, 1.0]),
)
def test_every_record_can_be_told(norms: list[float], status: str, clip: float | None) -> None:
    facts = dataclasses.replace(FACTS, status=status, clip=clip)
    norm = np.array(norms)
    sentences = told(norm, np.full(len(norm), 2.5), facts, Recipe(clip, None))
    assert sentences and all(s.endswith(".") and "None" not in s and "nan" not in s for s in sentences)

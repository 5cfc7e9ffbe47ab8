"""The edge cases that the statistics must hold in, each with the tests that show it.

The list below is checked: every test it names exists. Tests of this file are those that belong nowhere else.
"""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from series import learning, lognormal, trace_rows

from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise

CASES = {
    "1. shorter than min_fill; zero, one, all-NaN rows": [
        "test_detectors::test_a_series_shorter_than_the_fill_is_not_evaluable",
        "test_summary::test_what_cannot_be_measured_is_null_and_not_zero_or_nan",
        "test_statistics::test_a_window_never_filled_is_null",
    ],
    "2. constant, then x1.9 and x2.1; zeros and negatives; a decay and x10 in it": [
        "test_detectors::test_after_a_constant_series_the_smallest_jump_decides",
        "test_detectors::test_zeros_and_negatives_count_as_not_finite_for_the_norm_but_not_for_the_loss",
        "test_detectors::test_a_decay_hides_no_spike_and_is_none",
        "test_published::test_a_constant_series_is_never_flagged",
    ],
    "3. NaN or Inf first, in the middle, last; a spike right after": [
        "test_verdict::test_one_value_that_is_not_finite",
        "test_detectors::test_a_spike_right_after_a_value_that_is_not_finite_is_found",
        "test_summary::test_a_spike_right_after_a_value_that_is_not_finite_is_counted",
    ],
    "4. first evaluable step, the 13th; distances 5, 10, 11, 50; lasting x3 and x10": [
        "test_detectors::test_a_spike_on_the_first_evaluable_step_is_found",
        "test_spikes::test_two_steps_of_twenty_times_in_noise",
        "test_detectors::test_a_permanent_shift_is_flagged_until_the_level_has_followed",
        "test_spikes::test_a_permanent_shift_is_one_malignant_spike_and_then_the_new_level",
    ],
    "5. open when a scheduler stops the trial": [
        "test_summary::test_a_spike_open_where_the_log_ends_is_censored",
    ],
    "6. resumed = unbroken; live = offline = replayed": [
        "test_trial::test_stopped_and_resumed_equals_uninterrupted",
        "test_detectors::test_any_cut_into_blocks_of_any_trials_gives_the_same_bits",
        "test_spikes::test_live_counts_are_the_offline_counts_after_every_block",
        "test_spikes::test_the_recorder_of_a_pack_counts_as_the_report_will",
        "test_judgement::test_a_trial_judges_itself_as_its_files_would",
    ],
    "7. a log at stride 10": ["test_strided::test_every_tenth_step", "test_strided::test_it_is_never_called_stable"],
    "8. ten Inf steps at the start in fp16": [
        "test_summary::test_fp16_overflows_at_the_start_are_skips_and_no_divergence",
        "test_verdict::test_ten_skips_at_the_start_are_no_divergence_and_twenty_are",
    ],
    "9. accumulation splits; both wrong normalisers": [
        "test_step::test_accumulation_equals_the_single_batch",
        "test_step::test_wrong_normalisers_fail_the_same_assertions",
    ],
    "10. clip null, clip 0; tied and untied layer norms": [
        "test_summary::test_clipping_off_is_null",
        "test_bad_inputs::test_a_bad_override",
        "test_step::test_tensor_norms_sum_to_the_global_norm_and_group_by_layer",
    ],
    "11. spikes at random: coupled as often as by chance": [
        "test_spikes::test_independent_spikes_are_coupled_as_often_as_by_chance",
    ],
    "13. other evaluation batch, other detector": [
        "test_study::test_losses_on_different_evaluation_batches_are_never_compared",
        "test_study::test_rows_made_with_other_rules_are_computed_again",
        "test_judgement::test_a_judgement_by_other_rules",
    ],
    "14. planted: step, duration, layer; equal seeds": [
        "test_edge_cases::test_one_bad_batch_returns_its_step_duration_and_layer",
        "test_trial::test_a_divergent_loss_stops_the_trial_early",
        "test_trial::test_equal_seeds_give_equal_records_and_other_seeds_do_not",
    ],
    "15. probing changes nothing": ["test_probes::test_a_probe_row_reads_the_right_things_and_changes_none"],
}
"""12 (a grid with a hole) is a question to a study, not to a trial."""


def test_every_case_has_its_tests() -> None:
    for case, named in CASES.items():
        for name in named:
            module, _, function = name.partition("::")
            tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
            assert function in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, (case, name)


@pytest.mark.parametrize("last", [False, True])
def test_one_bad_batch_returns_its_step_duration_and_layer(last: bool) -> None:
    """The loss of one batch x50 and its gradient x50 in one layer; also in the last step that there is."""
    n, step = 400, 399 if last else 250
    groups = np.repeat(lognormal(0.1, n, 0)[:, None], 6, axis=1)
    groups[step, 3] *= 50
    loss = learning(n, 0)
    loss[step] *= 50
    facts = TrialFacts(n, 20, 1.0, "done", "complete", 6.5, 2.5)
    norm = np.sqrt(np.sum(groups**2, axis=1))
    found = summarise(trace_rows(loss, norm, layer_grad_norm=groups.tolist()), None, facts, Rules())
    grad, lost = found.spikes
    for spike in (grad, lost):
        assert (spike["start"], spike["end"], spike["peak_step"], spike["duration"]) == (step, step, step, 1)
        assert spike["class"] == ("open" if last else "narrow") and spike["partner"] == step and spike["lag"] == 0
    assert (grad["attrib_first"], grad["attrib_peak"]) == ("layer 2", "layer 2")
    assert grad["attrib_peak_share"] == pytest.approx(1, abs=1e-3)
    assert found.columns["spike_peak_layer"] == "layer 2"

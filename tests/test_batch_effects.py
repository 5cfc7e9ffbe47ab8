"""How much of the roughness is the batch: planted effects are measured, noise has none, marks ask other trials."""

from __future__ import annotations

import itertools
import math
import pickle
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stabstudy.analysis import shared_batches, words
from stabstudy.analysis.elements import Code, Table, Text
from stabstudy.analysis.report import drivers, trial_tables
from stabstudy.analysis.shared_batches import Ratios, batch_effects, batch_share, log_ratios, mark
from stabstudy.analysis.study import Study, update_tables
from stabstudy.stability.detectors import jump
from stabstudy.stability.rules import Rules
from stabstudy.stability.spikes import find_spikes
from stabstudy.stability.verdict import is_rough

Floats = NDArray[np.float64]
RULES = Rules()


def trial(
    trial_id: str, seed: int | None = 0, verdict: str | None = "stable", steps: int = 200, **other: Any
) -> dict[str, Any]:
    row = {"trial_id": trial_id, "seed": seed, "verdict": verdict, "steps_done": steps, "log_format": None}
    stream = {"data_fingerprint": "f", "data.seq_len": 32, "data.validation_share": 0.05, "train.batch_size": 8}
    return row | stream | {"sampling_noise": None} | other


def spike(trial_id: str, start: int, peak_step: int | None = None, **other: Any) -> dict[str, Any]:
    ends = {"start": start, "peak_step": start if peak_step is None else peak_step}
    return {"trial_id": trial_id, "series": "grad", "part": "both"} | ends | other


def noise(name: str, steps: int = 200, high: Mapping[int, float] | None = None, log_sd: float = 0.1) -> Floats:
    """Log-normal norms of a trial's own; `high` maps a step to its factor."""
    norm = np.exp(np.random.default_rng(list(name.encode())).normal(0, log_sd, steps))
    for step, factor in (high or {}).items():
        norm[step] *= factor
    return norm


def ratios(norms: Mapping[str, Floats]) -> Ratios:
    return Ratios(norms.__getitem__, RULES)


# r


def r_by_hand(norm: list[float]) -> list[float]:
    past: list[float] = []
    answers = []
    for x in norm:
        usable = math.isfinite(x) and x > 0
        answers.append(math.log(x) - statistics.median(past[-64:]) if usable and len(past) >= 12 else math.nan)
        past += [math.log(x)] if usable else []
    return answers


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 8.0, 0.0, -1.0, math.nan, math.inf]), max_size=150))
def test_r_is_the_norm_over_the_median_of_those_before(norm: list[float]) -> None:
    np.testing.assert_allclose(log_ratios(np.array(norm), RULES), r_by_hand(norm), rtol=1e-6, atol=1e-6)


def test_a_window_is_full_after_64_finite_values() -> None:
    norm = noise("a")
    norm[[3, 30]] = math.nan
    full = ratios({"a": norm}).full("a")
    assert np.flatnonzero(np.isfinite(full))[0] == 66
    np.testing.assert_array_equal(full[66:], log_ratios(norm, RULES)[66:])


def test_workers_are_sent_no_records(study: Study) -> None:
    some = study.tables.ratios
    victim = study.trials.index[0]
    size = len(pickle.dumps(some))
    np.testing.assert_array_equal(some(victim), pickle.loads(pickle.dumps(some))(victim))
    assert len(pickle.dumps(some)) == size < 2000


def test_records_are_read_once_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_batches, "KEPT", 500)
    calls: list[str] = []

    def norm(trial_id: str) -> Floats:
        calls.append(trial_id)
        return noise(trial_id)

    some = Ratios(norm, RULES)
    for trial_id in "abcabc":
        some(trial_id)
    assert calls == ["a", "b", "c", "c"]


# Share


def study_of(
    series: Callable[[int, int], Floats], seeds: int = 3, each: int = 4
) -> tuple[list[dict[str, Any]], dict[str, Floats]]:
    """Rows, and norms by trial: exp of what `series(seed, trial)` gives."""
    names = list(itertools.product(range(seeds), range(each)))
    norms = {f"{seed}.{n}": np.exp(series(seed, n)) for seed, n in names}
    return [trial(f"{seed}.{n}", seed, steps=len(norms[f"{seed}.{n}"])) for seed, n in names], norms


def test_independent_noise_has_no_share() -> None:
    shares = []
    for study in range(30):
        rng = np.random.default_rng(study)
        rows, norms = study_of(lambda seed, n, rng=rng: rng.normal(0, 0.3, 600))
        found = batch_share(rows, ratios(norms))
        assert found.share is not None and found.reason is None
        assert (found.same_pairs, found.other_pairs) == (3 * 6, 3 * 16)
        shares.append(found.share)
    # a correlation of 536 independent steps has a standard deviation of .043; so its means over 18 and 48 pairs ...
    expected = math.sqrt(1 / 18 + 1 / 48) / math.sqrt(536)
    assert abs(np.mean(shares)) < 4 * expected / math.sqrt(30)
    assert 0.6 * expected < np.std(shares) < 1.5 * expected


@pytest.mark.parametrize("part", [0.2, 0.6])
def test_the_share_is_the_part_of_the_variance_that_is_the_batch(part: float) -> None:
    rng = np.random.default_rng(5)
    batch = rng.normal(0, 0.3 * math.sqrt(part), (3, 3000))
    rows, norms = study_of(lambda seed, n: batch[seed] + rng.normal(0, 0.3 * math.sqrt(1 - part), 3000))
    found = batch_share(rows, ratios(norms))
    assert found.share == pytest.approx(part, abs=0.03)
    assert found.same == pytest.approx(part, abs=0.03) and found.other == pytest.approx(0, abs=0.03)


def test_what_all_seeds_have_in_common_is_no_batch() -> None:
    rng = np.random.default_rng(6)
    schedule = 0.3 * np.sin(np.arange(2000) / 15)
    rows, norms = study_of(lambda seed, n: schedule + rng.normal(0, 0.2, 2000))
    found = batch_share(rows, ratios(norms))
    assert found.same is not None and found.same > 0.4
    assert found.share == pytest.approx(0, abs=0.03)


def test_correlations_are_over_the_steps_that_both_have() -> None:
    """Unequal lengths, a trial that diverged half-way, NaN steps, a constant norm: as pandas does it."""
    rng = np.random.default_rng(7)
    batch = rng.normal(0, 0.3, (2, 5000))
    rows, norms = study_of(lambda seed, n: batch[seed] + rng.normal(0, 0.3, 5000), seeds=2, each=5)
    for i, t in enumerate(norms):
        norms[t] = norms[t][: 5000 - 450 * i]
        norms[t][rng.integers(0, len(norms[t]), 40)] = math.nan
    norms["0.4"] = np.ones(4000)
    norms["1.4"] = norms["1.4"][:95]  # 31 steps with a full window at most
    norms["1.3"][700:] = math.inf
    some = ratios(norms)
    c = pd.DataFrame({t: pd.Series(some.full(t).astype(float)) for t in norms}).corr(min_periods=32)
    c.loc["0.4"] = c.loc[:, "0.4"] = math.nan
    pairs = list(itertools.combinations(norms, 2))
    same = [c.loc[a, b] for a, b in pairs if a[0] == b[0] and not math.isnan(c.loc[a, b])]
    other = [c.loc[a, b] for a, b in pairs if a[0] != b[0] and not math.isnan(c.loc[a, b])]
    found = batch_share(rows, some)
    assert (found.same_pairs, found.other_pairs) == (len(same), len(other)) == (12, 16)
    assert found.same == pytest.approx(np.mean(same), abs=1e-6)
    assert found.other == pytest.approx(np.mean(other), abs=1e-6)


def test_where_there_is_no_pair_there_is_a_reason() -> None:
    norms = {t: noise(t) for t in "abc"}
    some = ratios(norms)
    one_seed = batch_share([trial(t) for t in "abc"], some)
    assert one_seed.share is None and one_seed.same_pairs == 3 and one_seed.other is None
    assert one_seed.reason is not None and "one seed" in one_seed.reason
    no_pair = batch_share([trial(t, seed) for seed, t in enumerate("abc")], some)
    assert no_pair.share is None and (no_pair.same_pairs, no_pair.other_pairs) == (0, 3)
    assert no_pair.reason is not None and "no two calm trials" in no_pair.reason
    for rows in ([trial(t, None) for t in "abc"], [trial(t, log_format="csv") for t in "abc"], []):
        unknown = batch_share(rows, some)
        assert unknown.reason == "it is not known what the trials read"


def test_pairs_that_prove_nothing_are_left_out() -> None:
    rows = [trial(t) for t in "ab"]
    for steps, pairs in ((64 + 31, 0), (64 + 32, 1)):
        assert batch_share(rows, ratios({"a": noise("a"), "b": noise("b")[:steps]})).same_pairs == pairs
    even = noise("a", 400, log_sd=1e-5)
    assert batch_share(rows, ratios({"a": even, "b": noise("b", 400)})).same_pairs == 0


def test_other_batches_are_no_control() -> None:
    """Trials of another batch size read other tokens, and differ in more than the tokens."""
    norms = {t: noise(t) for t in "abcd"}
    found = batch_share(
        [trial(t, i // 2, **{"train.batch_size": (8, 16)[i // 2]}) for i, t in enumerate("abcd")], ratios(norms)
    )
    assert (found.same_pairs, found.other_pairs) == (2, 0)


def test_rough_trials_have_no_say_in_the_share_unless_it_is_their_batches() -> None:
    norms = {t: noise(t) for t in "abcdef"}
    rows = [trial(t, i % 2) for i, t in enumerate("abcd")]
    verdicts = [trial("e", verdict="rough"), trial("f", verdict="diverged")]
    assert batch_share(rows + verdicts, ratios(norms)).same_pairs == 2
    verdicts[0]["sampling_noise"] = True
    assert batch_share(rows + verdicts, ratios(norms)).same_pairs == 4


def test_equal_records_are_one_trial() -> None:
    norms = {t: noise(t) for t in "abc"} | {"d": noise("a")}
    assert batch_share([trial(t) for t in "abcd"], ratios(norms)).same_pairs == 3


@pytest.mark.parametrize(("seeds", "each", "pairs"), [(2, 9, 2 * 3), (9, 2, 3)])
def test_of_many_trials_an_even_choice_is_correlated(
    seeds: int, each: int, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_batches, "MOST_TRIALS", 6)
    rng = np.random.default_rng(8)
    rows, norms = study_of(lambda seed, n: rng.normal(0, 0.3, 200), seeds, each)
    found = batch_share(rows, ratios(norms))
    assert (found.same_pairs, found.other_pairs) == (pairs, 15 - pairs)
    assert batch_share(rows[::-1], ratios(norms)) == found


# Effects


def test_the_batch_that_lifts_all_is_first() -> None:
    norms = {t: noise(t, high={100: 4.0}) for t in "abc"} | {t: noise(t, high={50: 9.0}) for t in "xy"}
    norms["b"] = norms["b"][:150]
    norms["c"][100] = math.nan
    rows = [*(trial(t) for t in "abc"), trial("x", 1), trial("y", 0, "rough")]
    rows[1]["steps_done"] = 150
    some = ratios(norms)
    table = batch_effects(
        rows, [spike("a", 100), spike("b", 98, 100), spike("b", 100), spike("y", 100), spike("x", 100)], some
    )
    first = table.iloc[0]
    assert (first["seed"], first["step"], first["trials"], first["spikes"]) == (0, 100, 2, 4)
    assert first["log_ratio"] == pytest.approx((some("a")[100] + some("b")[100]) / 2)
    assert first["trial_id"] in "ac"  # the longest: it can be asked for every step
    assert table["log_ratio"].is_monotonic_decreasing
    assert set(table["seed"]) == {0}  # of seed 1 one trial alone is known
    assert sorted(table["step"]) == list(range(12, 200))  # at least two of three have each
    assert (table["trials"] == 2).sum() == 50 + 1
    assert int(table["spikes"].sum()) == 5  # at 98, and four at 100


def test_nothing_in_common_is_an_empty_table() -> None:
    table = batch_effects([trial("a"), trial("b", 1)], [], ratios({t: noise(t) for t in "ab"}))
    assert len(table) == 0 and list(table.columns) == list(shared_batches.EFFECTS)


# Marks


def marks(rows: list[dict[str, Any]], spikes: list[dict[str, Any]], norms: Mapping[str, Floats]) -> list[bool | None]:
    mark(rows, spikes, ratios(norms))
    return [s["batch"] for s in spikes]


def test_a_shock_of_the_batch_is_marked_and_one_of_a_trial_is_not() -> None:
    common = {t: noise(t, high={100: 5.0}) for t in "abcd"}
    alone = {t: noise(t, high={100: 5.0} if t == "e" else None) for t in "efgh"}
    rows = [*(trial(t, 0) for t in common), *(trial(t, 1) for t in alone)]
    spikes = [spike(t, 100) for t in "abcde"]
    assert marks(rows, spikes, common | alone) == [True, True, True, True, False]


def test_equal_steps_of_other_seeds_data_or_batch_sizes_are_other_batches() -> None:
    norms = {t: noise(t, high={100: 5.0}) for t in "abcdefgh"} | {t: noise(t) for t in "xy"}
    others = [
        *(trial(t, 1) for t in "bc"),
        *(trial(t, **{"train.batch_size": 16}) for t in "de"),
        *(trial(t, data_fingerprint="g") for t in "fg"),
        trial("h", None),
    ]
    assert marks([trial("a"), *others], [spike("a", 100)], norms) == [None]
    assert marks([trial("a"), *others, trial("x"), trial("y")], [spike("a", 100)], norms) == [False]


def test_the_height_that_counts_is_half_again() -> None:
    def norms(factor: float) -> dict[str, Floats]:
        return {t: noise(t, high={100: factor}, log_sd=1e-4) for t in "abc"}

    for factor, answer in ((1.49, False), (1.51, True)):
        assert marks([trial(t) for t in "abc"], [spike("a", 100)], norms(factor)) == [answer]


@pytest.mark.parametrize(("high", "answer"), [(1, False), (2, True)])
def test_the_middle_one_of_the_others_decides(high: int, answer: bool) -> None:
    norms = {t: noise(t, high={100: 5.0} if i <= high else None) for i, t in enumerate("abcd")}
    assert marks([trial(t) for t in "abcd"], [spike("a", 100)], norms) == [answer]
    # of two witnesses both must be high, however high the one is
    norms = {"a": noise("a"), "b": noise("b", high={100: 1e6 if high == 1 else 2.0})}
    norms["c"] = noise("c", high={100: 2.0} if high == 2 else None)
    assert marks([trial(t) for t in "abc"], [spike("a", 100)], norms) == [answer]


def test_who_is_no_witness() -> None:
    """One that ended before, had no value there, had too few before, diverged, or is the same trial again."""
    good = {t: noise(t, high={100: 5.0}) for t in "ab"}
    ended, null = noise("c", high={50: 5.0})[:100], noise("c", high={100: math.nan})
    late = np.r_[np.full(90, math.nan), noise("c", high={10: 5.0}, steps=110)]
    for norm in (ended, null, late, noise("a", high={100: 5.0}), np.empty(0)):
        assert marks([trial(t) for t in "abc"], [spike("a", 100)], good | {"c": norm}) == [None]
    full = good | {"c": noise("c", high={100: 5.0})}
    assert marks([trial(t) for t in "abc"], [spike("a", 100)], full) == [True]
    assert marks([trial("a"), trial("b"), trial("c", verdict="diverged")], [spike("a", 100)], full) == [None]
    # a spike of a trial that diverged later is asked as any other, and a rough trial is a witness
    verdicts = ("diverged", "rough", None)
    assert marks([trial(t, verdict=v) for t, v in zip("abc", verdicts, strict=True)], [spike("a", 100)], full) == [True]


def test_start_or_peak_may_be_the_batch_and_a_loss_spike_asks_the_norms() -> None:
    norms = {t: noise(t, high={100: 5.0}) for t in "abc"}
    spikes = [spike("a", 97, 100), spike("a", 100, 104), spike("a", 97, 104), spike("a", 100, series="loss")]
    assert marks([trial(t) for t in "abc"], spikes, norms) == [True, True, False, True]
    short = norms | {"b": norms["b"][:102]}
    assert marks([trial(t) for t in "abc"], spikes, short) == [True, True, None, True]


def test_ingested_runs_and_unknown_seeds_are_not_asked() -> None:
    norms = {t: noise(t, high={100: 5.0}) for t in "abc"}
    for rows in ([trial(t, None) for t in "abc"], [trial(t, log_format="csv") for t in "abc"]):
        assert marks(rows, [spike("a", 100)], norms) == [None]


def test_only_records_that_can_answer_are_read() -> None:
    calls: list[str] = []

    def norm(trial_id: str) -> Floats:
        calls.append(trial_id)
        return noise(trial_id)

    rows = [trial(t, seed) for seed, ids in enumerate(("abc", "def", "gh")) for t in ids]
    mark(rows, [spike("d", 50), spike("g", 50)], Ratios(norm, RULES))
    assert sorted(calls) == ["d", "e", "f"]


# Sampling noise

SURPRISES = {70: 2.5, 90: 2.5, 110: 2.5}  # unusual for the trial, and nothing that makes it rough
HIGH_STEPS = {60: 5.0, 80: 5.0, 100: 5.0, 120: 5.0, 140: 5.0}


def rough_study(*others: Mapping[int, float], steps: int = 200) -> tuple[list[dict[str, Any]], dict[str, Floats]]:
    """A trial that is rough by the detector's own account, and others that are high at these steps."""
    norms = {"a": noise("a", steps, HIGH_STEPS | SURPRISES)} | {
        f"o{i}": noise(f"o{i}", steps, high) for i, high in enumerate(others)
    }
    assert is_rough(flags := jump(norms["a"], RULES, "grad"), RULES)
    assert np.flatnonzero(flags.absolute).tolist() == list(HIGH_STEPS)
    assert np.flatnonzero(flags.flagged).tolist() == sorted(HIGH_STEPS | SURPRISES)
    return [trial("a", verdict="rough"), *(trial(t) for t in list(norms)[1:])], norms


def some_steps(*steps: int) -> dict[int, float]:
    return dict.fromkeys(steps, 2.0)


@pytest.mark.parametrize(
    ("steps", "answer"),
    [(list(HIGH_STEPS), True), ([60, 80, 100], True), ([60, 80], False), ([61, 81, 101, 121, 141], False), ([], False)],
)
def test_rough_is_sampling_noise_where_most_absolute_flags_are_the_batches(steps: list[int], answer: bool) -> None:
    rows, norms = rough_study(some_steps(*steps), some_steps(*steps))
    mark(rows, [], ratios(norms))
    assert [row["sampling_noise"] for row in rows] == [answer, None, None]


def test_rough_is_sampling_noise_is_not_known_where_the_unknown_decide() -> None:
    def answer(end: int, *steps: int) -> bool | None:
        rows, norms = rough_study(some_steps(*steps), some_steps(*steps))
        norms["o0"] = norms["o0"][:end]  # behind it one witness is left, and one is too few
        mark(rows, [], ratios(norms))
        known: bool | None = rows[0]["sampling_noise"]
        return known

    assert answer(130, 60, 80, 100) is True  # three of five, whatever the fifth is
    assert answer(130, 60, 80) is None  # two and one not known
    assert answer(130, 60) is False
    assert answer(50) is None
    rows, norms = rough_study({})
    mark(rows, [], ratios(norms))
    assert rows[0]["sampling_noise"] is None


@pytest.mark.parametrize(
    ("own", "answer"),
    [
        ([(100, {}), (130, {})], False),  # half is not most
        ([(100, {}), (110, {}), (130, {})], True),
        ([(100, {}), (110, {"series": "loss", "part": "surprise"}), (130, {})], True),
        ([(100, {}), (110, {"part": "surprise"}), (130, {})], False),  # one that the verdict does not count
        ([(100, {}), (120, {}), (130, {"part": "surprise"})], False),
        ([(100, {}), (130, {"part": "surprise"})], True),
    ],
)
def test_spiky_is_sampling_noise_by_the_spikes_that_the_verdict_counts(
    own: list[tuple[int, dict[str, Any]]], answer: bool
) -> None:
    norms = {t: noise(t, high=some_steps(100, 110)) for t in "abc"}
    rows = [trial("a", verdict="spiky"), trial("b"), trial("c")]
    mark(rows, [spike("a", start, **other) for start, other in own], ratios(norms))
    assert rows[0]["sampling_noise"] is answer


def test_small_batches_make_every_trial_rough_and_that_is_noise() -> None:
    """Nobody is calm, all are witnesses; the share is still known."""
    rng = np.random.default_rng(9)
    batch = rng.normal(0, 0.65, (2, 800))
    rows, norms = study_of(lambda seed, n: batch[seed] + rng.normal(0, 0.2, 800), seeds=2, each=4)
    for row in rows:
        assert is_rough(jump(norms[row["trial_id"]], RULES, "grad"), RULES)
        row["verdict"] = "rough"
    mark(rows, [], ratios(norms))
    assert all(row["sampling_noise"] for row in rows)
    assert batch_share(rows, ratios(norms)).share == pytest.approx(0.65**2 / (0.65**2 + 0.2**2), abs=0.05)
    # the same noise, each trial's own
    rows, norms = study_of(lambda seed, n: rng.normal(0, 0.68, 800), seeds=2, each=4)
    for row in rows:
        row["verdict"] = "rough"
    mark(rows, [], ratios(norms))
    assert not any(row["sampling_noise"] for row in rows)


# A study on disk


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 seeds x 4 rates, 200 steps: at step 100 all four of seed 0 are high, and one of seed 1; one trial is rough."""
    folder = tmp_path_factory.mktemp("batches") / "planted"
    planted.plant_frame(folder)
    for seed, lr in itertools.product((0, 1), (1e-3, 3e-3, 1e-2, 3e-2)):
        high = {100: 8.0} if seed == 0 or lr == 1e-2 else {}
        high |= dict.fromkeys(range(110, 200, 10), 8.0) if (seed, lr) == (0, 3e-2) else {}
        planted.plant_trial(folder, planted.settings(lr=lr, seed=seed, steps=200), spikes=high)
    # alone with its batches; and one that is still running when seed 0's batch comes
    planted.plant_trial(folder, planted.settings(batch_size=16, steps=200), spikes={100: 8.0})
    planted.plant_trial(folder, planted.settings(depth=3, steps=200), status="interrupted", steps_done=90)
    return update_tables(Study.load(folder).folder)


def test_the_tables_hold_the_marks_and_unchanged_studies_keep_their_bytes(study: Study) -> None:
    files = (study.folder.trials_table, study.folder.spikes_table)
    before = [file.read_bytes() for file in files]
    spikes = study.spikes.merge(study.trials[["seed", "optim.lr", "train.batch_size"]], on="trial_id")
    at = spikes[(spikes["series"] == "grad") & (spikes["start"] == 100)]
    known = at[at["train.batch_size"] == 8]
    assert known["batch"].tolist() == (known["seed"] == 0).tolist() and len(known) == 5
    assert at.loc[at["train.batch_size"] == 16, "batch"].isna().all()
    rough = study.trials[study.trials["verdict"] == "rough"]
    assert rough["sampling_noise"].tolist() == [False]
    assert study.trials["sampling_noise"].notna().sum() == len(rough)
    assert pq.read_table(files[1])["batch"].to_pylist() == [None if pd.isna(b) else b for b in study.spikes["batch"]]
    again = update_tables(study.folder)
    assert [file.read_bytes() for file in files] == before
    pd.testing.assert_frame_equal(again.spikes, study.spikes)


def test_questions_of_a_study(study: Study) -> None:
    first = study.batch_effects().iloc[0]
    assert (first["seed"], first["step"], first["trials"], first["spikes"]) == (0, 100, 3, 4)
    share = study.batch_share()
    assert (share.same_pairs, share.other_pairs) == (3 + 6, 3 * 4)  # the trial of 90 steps has too few
    part = study.where({"train.batch_size": 16})
    assert part.batch_share().reason is not None and not len(part.batch_effects())


def test_several_studies_keep_their_marks_and_share_their_batches(study: Study, tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "second")
    planted.plant_trial(tmp_path / "second", planted.settings(lr=0.5, seed=0, steps=200), spikes={100: 8.0})
    both = Study.concat([study, Study.load(tmp_path / "second")])
    pd.testing.assert_series_equal(both.spikes["batch"][: len(study.spikes)], study.spikes["batch"])
    assert both.spikes["batch"][len(study.spikes) :].isna().all()
    assert both.batch_share().same_pairs == study.batch_share().same_pairs + 3
    assert both.batch_effects().iloc[0]["trials"] == 4
    part = both.where({"study": "second"})
    assert len(part.trace(part.trials.index[0])) == 200


def test_a_record_that_is_damaged_after_the_tables_were_made_is_empty(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,)))
    victim, other = study.trials.index
    file = study.folder.trial(victim).path / "trace.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    assert len(study.tables.ratios.norm(victim)) == 0 and len(study.tables.ratios.norm(other)) == 120
    assert not len(study.batch_effects()) and study.batch_share().reason is not None


def texts(study: Study) -> tuple[list[str], list[Table]]:
    blocks = list(drivers.batches(study))
    return [b.text for b in blocks if isinstance(b, Text)], [b for b in blocks if isinstance(b, Table)]


def test_the_report_says_the_share_first(study: Study) -> None:
    (share, marked, _), (table,) = texts(study)
    found = study.batch_share()
    assert found.share is not None and found.same is not None and found.other is not None
    assert share.startswith(f"Share of the batch in the roughness: {words.number(found.share, 2)};")
    assert "9 pairs" in share and "12 pairs" in share
    spikes = study.spikes["batch"]
    assert marked.startswith(f"{int(spikes.sum())} of {int(spikes.notna().sum())} spikes")
    assert f"of {int(spikes.isna().sum())} more it is not known" in marked
    assert table.columns == ("seed", "step", "norm / running median", "trials", "spikes")
    assert len(table.rows) == 10 and table.rows[0][:2] == ("0", "100") and table.rows[0][3:] == ("3", "4")
    assert 6 < float(table.rows[0][2]) < 10
    first = study.batch_effects().iloc[0]
    (code,) = (b.text for b in drivers.batches(study) if isinstance(b, Code))
    assert code.endswith(f'Study.load("results/planted").batch("{first["trial_id"]}", 100)')
    assert study.row(first["trial_id"])["seed"] == 0


def test_the_report_gives_reasons_and_names_noise(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for lr in (1e-3, 1e-2, 1e-1):
        planted.plant_trial(tmp_path / "s", planted.settings(lr=lr, steps=200), spikes=dict.fromkeys(HIGH_STEPS, 8.0))
    noisy = Study.load(tmp_path / "s")
    assert noisy.trials["sampling_noise"].tolist() == [True] * 3
    assert {trial_tables.ended(noisy.row(t)) for t in noisy.trials.index} == {"rough (sampling noise)"}
    said, tables = texts(noisy)
    assert "not computed: one seed alone" in said[0] and "(3 pairs)" in said[0]
    assert said[2].startswith("3 trials rough or spiky by sampling noise")
    assert {row[1] for row in tables[0].rows[:5]} == set(map(str, HIGH_STEPS))
    planted.plant_frame(tmp_path / "one")
    planted.plant_trial(tmp_path / "one", planted.settings(steps=200))
    said, tables = texts(Study.load(tmp_path / "one"))
    assert len(said) == 1 and said[0].startswith("Share of the batch in the roughness: not computed: ") and not tables


# Real traces


@pytest.mark.shareddata
def test_the_share_on_a_gpu(shared_data: Path) -> None:
    """120 trials of two depths, 1,200 steps of real text: .68 against .07 at calm rates, and .68 between depths."""
    frames = [pd.read_parquet(shared_data / "gpu_pilot" / f"depth_{depth:02}.parquet") for depth in (4, 16)]
    pilot = pd.concat(frames, ignore_index=True)
    norms = {f"t{i}": np.asarray(norm) for i, norm in enumerate(pilot["grad_norm"])}
    rows, spikes = [], []
    for (t, norm), known in zip(norms.items(), pilot.to_dict("records"), strict=True):
        flags = jump(norm, RULES, "grad")
        verdict = "rough" if is_rough(flags, RULES) else "stable"
        rows.append(trial(t, known["seed"], verdict, len(norm), lr=known["lr"], depth=known["depth"]))
        spikes += [
            {"trial_id": t, **s.row()} for s in find_spikes(norm, flags, known["warmup_steps"], 1200, RULES, "grad")
        ]
    some = ratios(norms)
    calm = [row for row in rows if row["lr"] <= 2e-3]  # 48 of the 72 that were measured: two of their three depths
    found = batch_share(calm, some)
    assert found.same == pytest.approx(0.68, abs=0.05) and found.other == pytest.approx(0.07, abs=0.05)
    assert (found.same_pairs, found.other_pairs) == (3 * 16 * 15 // 2, 3 * 16 * 16)
    # between depths, whose weights differ from the start: the batch, not the start
    between = shared_batches._correlations([some.full(row["trial_id"]) for row in calm])
    pairs = [
        between[i, j]
        for (i, a), (j, b) in itertools.combinations(enumerate(calm), 2)
        if a["seed"] == b["seed"] and a["depth"] != b["depth"]
    ]
    assert np.mean(pairs) == pytest.approx(0.68, abs=0.05)
    # all 72 that are not rough, and the rough ones among themselves
    every = batch_share(rows, some)
    assert every.share == pytest.approx(0.47, abs=0.02) and every.same_pairs == 3 * 24 * 23 // 2
    rough = batch_share([row | {"verdict": "stable"} for row in rows if row["verdict"] == "rough"], some)
    assert rough.share is not None and rough.share < 0.05
    # two batches make most of the spikes of calm trials; rough trials are rough of themselves
    mark(rows, spikes, some)
    rate = {row["trial_id"]: row["lr"] for row in rows}
    share = {
        lr: np.mean([s["batch"] for s in spikes if rate[s["trial_id"]] == lr]) for lr in sorted(set(rate.values()))
    }
    assert share[1e-3] > 0.5 and share[2e-3] > 0.5 and share[8e-3] < 0.05 and share[1.6e-2] < 0.05
    assert [row["sampling_noise"] for row in rows if row["verdict"] == "rough"] == [False] * 48
    top = batch_effects(rows, spikes, some).head(2)
    assert set(zip(top["seed"], top["step"], strict=True)) == {(2, 485), (1, 569)}
    assert np.exp(top["log_ratio"]).tolist() == pytest.approx([3.1, 3.1], abs=0.1)

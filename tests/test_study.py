"""Studies read from disk: tables and their reuse, axes, cells, paired comparison, the largest stable level, damage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import live_rows
import numpy as np
import pandas as pd
import planted
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config as cfg
from stabstudy import encodings
from stabstudy.analysis import compare, levels, recipe
from stabstudy.analysis.paired import holm, sign_flip_p, t_interval
from stabstudy.analysis.report import recipe_formats
from stabstudy.analysis.study import Study, update_tables
from stabstudy.analysis.table_columns import spike_kinds, trial_kinds
from stabstudy.settings import ConfigError
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import COLUMNS, Source, judge_trial, write_summary
from stabstudy.store import StoreError, StudyFolder, write_sealed
from stabstudy.trace import PROBES, TRACE, DamagedRecord


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 depths x 3 learning rates x 2 seeds; see `planted.plant_study`."""
    return Study.load(planted.plant_study(tmp_path_factory.mktemp("study") / "planted", steps=200))


# Intervals and exact tests


def test_t_interval_is_students() -> None:
    e = t_interval([1.0, 2.0, 3.0])
    assert (e.n, e.mean) == (3, 2.0)
    assert e.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)  # t .975 at 2 degrees of freedom
    assert e.low == pytest.approx(4.0 - e.high)


def test_t_interval_has_the_tabled_width() -> None:
    for df, t in enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), start=1):
        values = [float(i) for i in range(df + 1)]
        e = t_interval(values)
        assert (e.high - e.mean) / (np.std(values, ddof=1) / math.sqrt(df + 1)) == pytest.approx(t, abs=6e-4)


def test_one_value_has_a_mean_and_no_interval() -> None:
    e = t_interval([2.5])
    assert (e.n, e.mean) == (1, 2.5)
    assert math.isnan(e.low) and math.isnan(e.high)
    assert t_interval([]).n == 0 and math.isnan(t_interval([]).mean)


@pytest.mark.parametrize(("n", "floor"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_sign_flip_floor(n: int, floor: float) -> None:
    assert sign_flip_p([0.1 * (i + 1) for i in range(n)]) == floor


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_sign_flip_counts_every_flip(whole: list[int]) -> None:
    seen = abs(sum(whole))
    flips = [abs(sum(s * d for s, d in zip(signs, whole, strict=True))) for signs in _signs(len(whole))]
    expected = sum(f >= seen for f in flips) / len(flips)
    assert sign_flip_p([0.1 * d for d in whole]) == expected  # tenths: their sums differ in the last bit


def _signs(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=n))


def test_sign_flip_of_nothing_or_too_much_is_unknown() -> None:
    assert math.isnan(sign_flip_p([]))
    assert math.isnan(sign_flip_p([1.0] * 21))
    assert math.isnan(sign_flip_p([1.0, math.nan]))


def test_holm_by_hand() -> None:
    adjusted = holm([0.01, 0.04, 0.03, math.nan])
    assert adjusted[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(adjusted[3])


# Axes


def test_axes_are_what_differs(study: Study) -> None:
    assert study.axes == {"model.depth": [2, 6], "optim.lr": [1e-3, 1e-2, 1e-1]}


def test_null_is_a_level_and_comes_last() -> None:
    assert levels.levels_of([None, 1.0, 0.5, math.nan, 1.0]) == [0.5, 1.0, None]
    frame = pd.DataFrame({"optim.clip": [1.0, None, 0.5]})
    assert list(levels.at_level(frame, "optim.clip", None).index) == [1]
    assert levels.levels_of(["b", "a"]) == ["a", "b"]


def test_a_group_choice_stands_for_the_settings_that_follow_it(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name, data in (("pysrc", {}), ("synthetic", {"source": "synthetic", "synthetic": {"order": 2}})):
        for length in (64, 128):
            config = planted.settings(data={**data, "seq_len": length})
            planted.plant_trial(tmp_path / "s", config, choices={"data": name, "model": "tiny"})
    assert Study.load(tmp_path / "s").axes == {"data": ["pysrc", "synthetic"], "data.seq_len": [64, 128]}


def test_settings_that_follow_another_setting_are_no_axes(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for batch in (4, 8):
        planted.plant_trial(tmp_path / "s", planted.settings(batch_size=batch))
    assert Study.load(tmp_path / "s").axes == {"train.batch_size": [4, 8]}  # micro_batch_size null: the batch size


def test_a_warmup_is_one_axis_however_it_was_said(tmp_path: Path) -> None:
    def axes(name: str, *said: tuple[float | None, int]) -> dict[str, list[Any]]:
        planted.plant_frame(tmp_path / name)
        for share, steps in said:
            optim = {"warmup_steps": steps if share is None else None, "warmup_share": share}
            planted.plant_trial(tmp_path / name, cfg.from_dict({"optim": optim}))
        return Study.load(tmp_path / name).axes

    assert axes("shares", (0.1, 0), (0.2, 0)) == {"optim.warmup_share": [0.1, 0.2]}
    assert axes("steps", (None, 20), (None, 40)) == {"optim.warmup_steps": [20, 40]}
    assert axes("mixed", (0.1, 0), (None, 40)) == {"optim.warmup_steps": [20, 40]}


# Tables


def test_trials_have_every_documented_column_in_order(study: Study) -> None:
    kinds = trial_kinds(["model", "data"])
    assert [study.trials.index.name, *study.trials.columns] == list(kinds)
    assert set(cfg.setting_names()) < set(kinds) and set(COLUMNS) < set(kinds)
    assert len(study.trials) == 12
    assert list(study.spikes.columns) == list(spike_kinds())


def test_values_have_the_type_that_the_table_declares(study: Study) -> None:
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float,), "text": (str,), "bool": (bool,)}
    for rows, kinds in ((study.tables.trials, trial_kinds(["model", "data"])), (study.tables.spikes, spike_kinds())):
        for row, (name, kind) in itertools.product(rows, kinds.items()):
            assert row[name] is None or type(row[name]) in types[kind], name


def test_a_study_of_before_a_rule_between_settings_is_read(tmp_path: Path) -> None:
    """Independent decay at the default weight_decay is refused now; who trained with it keeps the study, and page."""
    planted.plant_frame(tmp_path / "s")
    config = planted.settings(2, 1e-2)
    old = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_mode="independent"))
    with pytest.raises(ConfigError):
        cfg.from_dict(cfg.to_dict(old))
    for seed in range(2):
        planted.plant_trial(tmp_path / "s", dataclasses.replace(old, seed=seed))
    loaded = Study.load(tmp_path / "s")
    assert not loaded.damaged and set(loaded.trials["optim.weight_decay"]) == {0.1}
    (found,) = recipe.recipes(loaded)
    assert recipe_formats.lingua(found.settings) and recipe_formats.hugging_face(found.settings)


def test_planted_verdicts_and_spikes_come_back(study: Study) -> None:
    at = {
        verdict: sorted(zip(rows["model.depth"], rows["optim.lr"], rows["seed"], strict=True))
        for verdict, rows in study.trials.groupby("verdict")
    }
    assert at["rough"] == [(2, 0.1, 0), (2, 0.1, 1), (6, 0.1, 0), (6, 0.1, 1)]
    assert at["spiky"] == [(6, 0.01, 1)] and len(at["stable"]) == 7
    for verdict, starts in (("rough", planted.ROUGH), ("spiky", planted.LONG[:1])):
        for trial_id in study.trials.index[study.trials["verdict"] == verdict]:
            own = study.spikes[study.spikes["trial_id"] == trial_id]
            assert own["start"].tolist() == list(starts) and set(own["series"]) == {"grad"}
            assert set(own["class"]) == {"narrow" if verdict == "rough" else "wide"}
    assert set(study.spikes["trial_id"]) == set(study.trials.index[study.trials["verdict"] != "stable"])


def judge(path: Path) -> list[Path]:
    """Let each done trial keep its judgement, as one that ends does; the files."""
    files = []
    for folder in StudyFolder(path).trials():
        source = Source(cfg.from_dict(folder.read_config()["config"]), folder.read_state())
        trace, probes = folder.rows(TRACE), folder.rows(PROBES)
        assert trace is not None
        write_summary(folder, judge_trial(trace, probes, source, Rules()), source, Rules())
        files.append(folder.summary_file)
    return files


def test_what_trials_judged_themselves_is_not_computed_again(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    first = update_tables(StudyFolder(path))
    before = _table_bytes(path)
    judge(path)
    again = update_tables(StudyFolder(path))
    assert (first.tables.computed, again.tables.computed) == (6, 0)
    assert _table_bytes(path) == before
    pd.testing.assert_frame_equal(first.trials, again.trials)
    pd.testing.assert_frame_equal(first.spikes, again.spikes)


def test_new_and_changed_trials_alone_are_computed(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    judge(path)
    changed = StudyFolder(path).trials()[0]
    planted.plant_trial(path, planted.settings(depth=3))
    changed.write_state(dataclasses.replace(changed.read_state(), final_loss=9.0))
    study = update_tables(StudyFolder(path))
    assert study.tables.computed == 2
    assert study.trials.loc[changed.trial_id, "final_loss"] == 9.0


def test_attempts_and_their_times_are_no_part_of_a_row(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    judge(path)
    update_tables(StudyFolder(path))
    before = _table_bytes(path)
    trial = StudyFolder(path).trials()[0]
    state = trial.read_state()
    attempt = dataclasses.replace(state.attempts[0], host="elsewhere", started="2031-01-01T00:00:00+00:00")
    trial.write_state(dataclasses.replace(state, attempts=(attempt, attempt)))
    assert update_tables(StudyFolder(path)).tables.computed == 0
    assert _table_bytes(path) == before


def test_rows_made_with_other_rules_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    judge(path)
    monkeypatch.setattr("stabstudy.analysis.tables.Rules", lambda: Rules(k_grad=7.0))
    assert update_tables(StudyFolder(path)).tables.computed == 6


def test_a_broken_judgement_is_made_anew(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    torn, other, *_ = judge(path)
    before = update_tables(StudyFolder(path)).trials
    torn.write_bytes(torn.read_bytes()[:-20])
    other.unlink()
    study = update_tables(StudyFolder(path))
    assert study.tables.computed == 2
    pd.testing.assert_frame_equal(study.trials, before)


@pytest.mark.parametrize("name", ["trials.parquet", "spikes.parquet"])
def test_a_broken_table_is_made_anew(tmp_path: Path, name: str) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    update_tables(StudyFolder(path))
    before = _table_bytes(path)
    (path / name).write_bytes((path / name).read_bytes()[:-20])
    update_tables(StudyFolder(path))
    assert _table_bytes(path) == before


def test_tables_name_their_detector(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.folder.path, tmp_path / "s")
    update_tables(StudyFolder(tmp_path / "s"))
    for name in ("trials.parquet", "spikes.parquet"):
        metadata = pq.read_schema(tmp_path / "s" / name).metadata
        assert Rules.from_json(metadata[b"detector"].decode()) == Rules()
        assert metadata[b"detector_id"].decode() == Rules().detector_id
    assert set(study.trials["detector_id"]) == {Rules().detector_id}


def test_not_finite_and_not_measured_stay_apart_on_disk(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    nan = planted.plant_trial(
        tmp_path / "s", planted.settings(), nonfinite_at=80, steps_done=81, final_loss=math.nan, stop_reason="diverged"
    )
    none = planted.plant_trial(tmp_path / "s", planted.settings(seed=1), status="failed", steps_done=20)
    study = update_tables(StudyFolder(tmp_path / "s"))
    column = dict(
        zip(
            pq.read_table(tmp_path / "s" / "trials.parquet")["trial_id"].to_pylist(),
            pq.read_table(tmp_path / "s" / "trials.parquet")["final_loss"].to_pylist(),
            strict=True,
        )
    )
    assert math.isnan(column[nan.trial_id]) and column[none.trial_id] is None
    assert study.row(nan.trial_id)["verdict_code"] == "nonfinite"
    assert study.row(nan.trial_id)["final_loss_capped"] == planted.INIT_LOSS
    assert study.row(none.trial_id)["final_loss_capped"] is None


# A study that runs


def test_a_running_study_shows_whole_rows_only(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,))
    live = planted.plant_trial(path, planted.settings(lr=0.5), status="running", steps_done=70)
    with live.live(TRACE).open("ab") as f:
        f.write(encodings.MARKER + b"\1\0")  # a write that has not ended
    study = Study.load(path)
    row = study.row(live.trial_id)
    assert row["steps_done"] == 70 and row["verdict"] is None and row["final_loss"] is None
    assert "torn last block" in row["note"]
    assert row["state"] == "lost"  # it says running, and nobody holds its lock
    assert len(study.trace(live.trial_id)) == 70 and not study.damaged


def test_a_trial_may_finish_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings())
    study = Study.load(tmp_path / "s")
    assert len(study.trials) == 1
    now = trial.read_state()
    looks = iter([dataclasses.replace(now, status="running", records={})])  # then its live file is gone
    monkeypatch.setattr(type(trial), "read_state", lambda self: next(looks, now))
    assert len(study.trace(trial.trial_id)) == 120
    assert next(looks, None) is None


def test_a_growing_record_gives_a_prefix(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings(), status="running", steps_done=30)
    before = Study.load(tmp_path / "s").trace(trial.trial_id)
    live_rows.write(trial.live(TRACE), [planted._trace_row(planted.settings(), 30, 0.5)])
    after = Study.load(tmp_path / "s").trace(trial.trial_id)
    assert len(after) == 31 and np.array_equal(after["grad_norm"][:30], before["grad_norm"])


def test_a_trial_that_never_started_has_null_statistics(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    config = planted.settings()
    folder = StudyFolder(tmp_path / "s").trial(cfg.trial_id(config, planted.FINGERPRINT))
    folder.path.mkdir(parents=True)
    planted.write_config(folder, config, {"data": "pysrc"}, None, planted.FINGERPRINT)
    study = Study.load(tmp_path / "s")
    row = study.row(folder.trial_id)
    assert (row["state"], row["steps_done"], row["verdict_reason"]) == ("pending", 0, "pending")
    assert row["spike_events"] is None and row["spike_rate"] is None and row["grad_norm_max"] is None
    with pytest.raises(DamagedRecord, match="has no trace"):
        study.trace(folder.trial_id)
    assert study.probes(folder.trial_id) is None


# Damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_excludes_the_trial_also_when_its_row_is_known(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,))
    judge(path)
    known = update_tables(StudyFolder(path))
    victim = StudyFolder(path).trial(known.trials.index[2])
    _flip(victim.finished(TRACE))
    study = update_tables(StudyFolder(path))
    assert study.tables.computed == 0 and len(study.trials) == 5
    (damaged,) = study.damaged
    assert damaged.trial_id == victim.trial_id and damaged.seed in (0, 1)
    assert damaged.reason.startswith(f"trials/{victim.trial_id}/trace.parquet: sha256 is")


@pytest.mark.parametrize("schema", [TRACE, PROBES], ids=lambda schema: schema.name)
@pytest.mark.parametrize("cached", [True, False])
def test_a_missing_record_excludes_the_trial(tmp_path: Path, schema: Any, cached: bool) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings())
    if cached:
        judge(tmp_path / "s")
    trial.finished(schema).unlink()
    study = Study.load(tmp_path / "s")
    assert not len(study.trials)
    assert [d.reason.partition(": ")[0] for d in study.damaged] == [f"trials/{trial.trial_id}/{schema.name}.parquet"]
    assert "missing" in study.damaged[0].reason


def _cut_middle(parts: list[bytes]) -> list[bytes]:
    header, first, second, third = parts
    return [header, first, second[:20], third]


def _repeat(parts: list[bytes]) -> list[bytes]:
    header, first, second, third = parts
    return [header, first, second, second, third]


@pytest.mark.parametrize("spoil", [_cut_middle, _repeat])
def test_a_live_record_that_cannot_be_trusted_excludes_the_trial(tmp_path: Path, spoil: Any) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings(), status="interrupted", steps_done=30)
    live = trial.live(TRACE)
    live.write_bytes(encodings.MARKER.join(spoil(live.read_bytes().split(encodings.MARKER))))
    study = Study.load(tmp_path / "s")
    assert [d.trial_id for d in study.damaged] == [trial.trial_id] and not len(study.trials)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trial_id": "0123456789"}, "belongs to trial 0123456789"),
        ({"config": None}, "holds no config"),
        ({"cell_id": 7}, "was changed: belongs to cell 7"),
        ({"case": 7}, "case must be text"),
        ({"config": {"optim": {"lr": "fast"}}}, "optim.lr: must be a finite number"),
    ],
)
def test_a_config_that_cannot_be_used_excludes_the_trial(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings())
    trial.config_file.write_text(json.dumps(trial.read_config() | change))
    study = Study.load(tmp_path / "s")
    assert not len(study.trials) and reason in study.damaged[0].reason


@pytest.mark.parametrize(
    "change", [{"records": {"trace": "x"}}, {"records": 3}, {"error": "text"}, {"eval_hash": 3}, {"stop_reason": []}]
)
def test_a_state_that_cannot_be_used_excludes_the_trial(tmp_path: Path, change: dict[str, Any]) -> None:
    planted.plant_frame(tmp_path / "s")
    trial = planted.plant_trial(tmp_path / "s", planted.settings())
    write_sealed(trial.state_file, json.loads(trial.state_file.read_text()) | change)
    assert "state.json: is not a trial's state: " in Study.load(tmp_path / "s").damaged[0].reason


def test_a_message_may_hold_what_utf8_cannot(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    error = {"kind": "OSError", "message": "no such file: \udce4.txt", "step": 3}
    planted.plant_trial(tmp_path / "s", planted.settings(), status="failed", steps_done=3, error=error)
    study = update_tables(StudyFolder(tmp_path / "s"))
    assert study.trials["error"].iloc[0] == "OSError: no such file: ?.txt (step 3)"


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a study"):
        Study.load(tmp_path)


# Cells and comparisons


def test_cells_aggregate_their_seeds(study: Study) -> None:
    cells = study.cells
    assert list(zip(cells["model.depth"], cells["optim.lr"], strict=True)) == list(
        itertools.product([2, 6], [1e-3, 1e-2, 1e-1])
    )
    first = cells.iloc[0]
    assert (first["n"], first["n_done"], first["stable"], first["spiky"], first["diverged"]) == (2, 2, 2, 0, 0)
    # planted: 2.4 + 0.3 * (lg lr + 2)^2 + 0.02 * seed - 0.01 * depth, at lr 1e-3, depth 2
    assert first["final_loss_capped"] == pytest.approx(2.69)
    assert first["final_loss_capped_high"] - 2.69 == pytest.approx(12.706 * 0.01, abs=1e-5)
    assert cells["spiky"].tolist() == [0, 0, 0, 0, 1, 0] and cells["rough"].tolist() == [0, 0, 2, 0, 0, 2]


def test_a_cell_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", seeds=(0,)))
    assert study.cells["final_loss_capped"].notna().all()
    assert study.cells["final_loss_capped_low"].isna().all()


def test_compare_pairs_by_seed_and_every_other_axis(study: Study) -> None:
    (row,) = levels.records(study.compare("model.depth", "final_loss"))
    assert (row["a"], row["b"], row["seeds"], row["pairs"]) == (2, 6, 2, 6)
    assert row["difference"] == pytest.approx(-0.04)  # 0.01 per layer, in every pair
    assert row["positive"] == 0.0 and row["p"] is None  # of two seeds it could not fall below .5
    assert row["mean_b"] - row["mean_a"] == pytest.approx(row["difference"])


def test_compare_leaves_out_what_has_no_partner(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    losses = {(1e-3, 0): 3.0, (1e-2, 0): 2.0, (1e-3, 1): 3.0, (1e-2, 1): 2.5, (1e-2, 2): 0.1}
    for (lr, seed), loss in losses.items():
        planted.plant_trial(tmp_path / "s", planted.settings(lr=lr, seed=seed), final_loss=loss)
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-3, seed=2), status="failed", steps_done=10)
    (row,) = levels.records(Study.load(tmp_path / "s").compare("optim.lr"))
    assert (row["seeds"], row["pairs"], row["difference"]) == (2, 2, -0.75)
    assert row["high"] == pytest.approx(-0.75 + 12.706 * 0.25, abs=1e-4)


def test_a_diverged_trial_counts_with_its_capped_loss(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-3), final_loss=2.5)
    planted.plant_trial(
        tmp_path / "s", planted.settings(lr=1.0), nonfinite_at=80, final_loss=math.nan, stop_reason="diverged"
    )
    (row,) = levels.records(Study.load(tmp_path / "s").compare("optim.lr", "final_loss"))
    assert row["difference"] == planted.INIT_LOSS - 2.5 and (row["diverged_a"], row["diverged_b"]) == (0, 1)


def test_losses_on_different_evaluation_batches_are_never_compared(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    for name in ("pysrc", "synthetic"):
        choices = {"data": name}
        planted.plant_trial(
            tmp_path / "s", planted.settings(data={"source": name}), choices=choices, eval_hash=f"of {name}"
        )
    study = Study.load(tmp_path / "s")
    assert levels.records(study.compare("data", "final_loss"))[0]["pairs"] == 0
    assert levels.records(study.compare("data", "grad_norm_median"))[0]["pairs"] == 1
    assert math.isnan(compare.mean(study.trials, "final_loss").mean)


def test_unknown_names_are_answered_with_the_known_ones(study: Study) -> None:
    with pytest.raises(KeyError, match="no axis of study planted .it has: model.depth, optim.lr."):
        study.compare("optim.clip")
    with pytest.raises(KeyError, match="no statistic"):
        study.compare("optim.lr", "loss")
    with pytest.raises(KeyError, match="'final_los' is no statistic of study planted .did you mean final_loss"):
        study.compare("optim.lr", "final_los")
    with pytest.raises(KeyError, match="'optim.clip' is no axis beside the depth of study planted .it has: optim.lr."):
        study.compare("model.depth", by="optim.clip")
    with pytest.raises(KeyError, match="'model.dept' is no axis of study planted .it has: model.depth, optim.lr."):
        study.compare("model.dept")
    with pytest.raises(KeyError, match="no trial"):
        study.trace("0" * 10)


def test_largest_stable_rate_of_the_planted_study(study: Study) -> None:
    table = study.largest_stable("optim.lr", by="model.depth")
    assert list(table.index) == [2, 6]
    assert table["all_stable"].tolist() == [1e-2, 1e-3]
    assert table["first_unstable"].tolist() == [1e-1, 1e-2]
    assert table["n_unstable"].tolist() == [2, 1] and table["n_there"].tolist() == [2, 2]
    assert table["n_noise"].tolist() == [0, 0] and table["evaluable"].tolist() == [188, 188]
    assert table["best"].tolist() == [1e-2, 1e-2]
    assert table["works_to"].tolist() == [1e-2, 1e-2]  # at 1e-1 the planted loss is 0.3 above the best


GRID = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]


def _grid(losses: list[float], verdicts: list[str | None] | None = None) -> pd.DataFrame:
    verdicts = verdicts or ["stable"] * len(losses)
    codes = [None if v is None else "nonfinite" if v == "diverged" else "ok" for v in verdicts]
    return pd.DataFrame(
        {
            "optim.lr": GRID[: len(losses)],
            "verdict": verdicts,
            "verdict_code": codes,
            "verdict_reason": None,
            "sampling_noise": None,
            "n_evaluable": 300,
            "eval_hash": "e",
            "final_loss_capped": losses,
            "seed": 0,
            "state": "done",
        }
    )


def limits(table: pd.DataFrame, axes: tuple[str, ...] = ("optim.lr",), by: str | None = None) -> dict[str, Any]:
    """The only row of `compare.limits` along the learning rate."""
    (row,) = levels.records(compare.limits(table, axes, "optim.lr", by))
    return row


@pytest.mark.parametrize(
    ("losses", "works_to", "best"),
    [
        ([3.100, 2.654, 2.370, 2.315, 2.564, 2.913, 2.845], 1e-2, 1e-2),  # measured, qk-norm off
        ([3.090, 2.650, 2.400, 2.305, 2.413, 2.521, 2.654], 3e-2, 1e-2),  # on
    ],
)
def test_working_rate_of_the_measured_curves(losses: list[float], works_to: float, best: float) -> None:
    row = limits(_grid(losses))
    assert (row["works_to"], row["best"], row["best_loss"]) == (works_to, best, min(losses))
    assert (row["all_stable"], row["first_unstable"]) == (3e-1, None)


def test_limits_do_not_jump_over_holes() -> None:
    verdicts = ["stable", None, "stable", "spiky", "stable"]
    row = limits(_grid([3.0, math.nan, 2.0, 2.1, 2.1], verdicts))
    assert row["all_stable"] == 3e-4  # 1e-3 has no verdict
    assert (row["first_unstable"], row["stable_again"]) == (1e-2, 3e-2)
    assert row["works_to"] == 3e-2  # spiky, but its loss is near the best
    none = limits(_grid([math.nan], [None]))
    assert none["best"] is None and none["works_to"] is None and none["all_stable"] is None


def test_a_diverged_rate_does_not_work(study: Study) -> None:
    row = limits(_grid([2.1, 2.0, 2.1], ["stable", "stable", "diverged"]))
    assert row["works_to"] == 1e-3


def test_what_is_neither_stable_nor_unstable_bounds_nothing() -> None:
    """A trial that learned nothing shows no instability: its level is passed over, and is no answer itself."""
    table = _grid([5.5, 2.1, 5.5, 2.0, 5.5], [None, "stable", None, "stable", None])
    table["verdict_reason"] = ["untrained", None, "untrained", None, "untrained"]
    row = limits(table)
    assert (row["all_stable"], row["first_unstable"], row["reason"]) == (1e-2, None, None)
    table.loc[2, "verdict_reason"] = "too_short"  # of this one nobody knows
    assert limits(table)["all_stable"] == 1e-3
    table.loc[2, ["verdict", "verdict_reason"]] = ["rough", None]
    row = limits(table)
    assert (row["all_stable"], row["first_unstable"], row["stable_again"]) == (1e-3, 3e-3, 1e-2)


def test_a_limit_counts_sampling_noise_and_names_the_steps_it_rests_on() -> None:
    table = pd.concat([_grid([2.2, 2.1, 2.0], ["stable", "stable", "rough"]).assign(seed=seed) for seed in range(3)])
    table = table.reset_index(drop=True)
    table["n_evaluable"] = [300, 250, 40, 300, 300, 10, 280, 300, 300]
    table.loc[2, "sampling_noise"] = True
    row = limits(table)
    assert (row["all_stable"], row["evaluable"]) == (1e-3, 250)  # not 10, of a trial that bounds it from above
    assert (row["first_unstable"], row["n_unstable"], row["n_there"], row["n_noise"]) == (3e-3, 3, 3, 1)


def _widths(losses: dict[tuple[int, float], float], seeds: int = 2) -> pd.DataFrame:
    """Trials of (width, learning rate), whose loss rises by .02 with the seed."""
    rows = [
        {"model.dim": width, "optim.lr": lr, "seed": seed, "final_loss_capped": loss + 0.02 * seed}
        for (width, lr), loss in losses.items()
        for seed in range(seeds)
    ]
    same = {"state": "done", "verdict": "stable", "verdict_code": "ok", "verdict_reason": None, "eval_hash": "e"}
    return pd.DataFrame(rows).assign(**same, sampling_noise=None, n_evaluable=300)


WIDTHS = ("model.dim", "optim.lr")


def test_a_hole_in_the_grid_is_no_limit() -> None:
    """Narrow models lose .45 nat at .3 and wide ones too; without (narrow, .3) pooled means show no loss at all."""
    losses = {(64, 0.03): 3.0, (64, 0.3): 3.45, (256, 0.03): 2.5, (256, 0.3): 2.95}
    full = _widths(losses)
    row = limits(full, WIDTHS)
    assert (row["best"], row["works_to"], row["reason"]) == (0.03, 0.03, None)
    assert row["best_loss"] == pytest.approx(2.76)
    del losses[64, 0.3]
    hole = limits(_widths(losses), WIDTHS)
    assert hole["reason"] == "the grid has a hole at learning rate 0.3, model.dim 64, seed 0 (no trial)"
    assert all(hole[name] is None for name in ("all_stable", "first_unstable", "best", "best_loss", "works_to"))
    full.loc[3, "state"] = "oom"
    assert limits(full, WIDTHS)["reason"] == "the grid has a hole at learning rate 0.3, model.dim 64, seed 1 (oom)"
    per_width = levels.records(compare.limits(_widths(losses), WIDTHS, "optim.lr", "model.dim"))
    assert [row["works_to"] for row in per_width] == [0.03, 0.03]  # of one width nothing is pooled


def test_a_gain_in_one_cell_does_not_make_up_for_a_loss_in_another() -> None:
    losses = {(64, 0.01): 3.0, (64, 0.1): 2.6, (256, 0.01): 2.5, (256, 0.1): 3.0}
    row = limits(_widths(losses), WIDTHS)
    # to the best rate of its own width .1 lies 0 and .5 above: .25; .01 lies .4 and 0 above: .2
    assert (row["best"], row["works_to"]) == (0.01, 0.01)


def test_losses_of_each_dataset_are_compared_within_it() -> None:
    table = _widths({(64, 0.01): 3.0, (64, 0.1): 3.1, (256, 0.01): 7.5, (256, 0.1): 7.6})
    table["eval_hash"] = table["model.dim"].astype(str)  # as if the width were the dataset
    row = limits(table, WIDTHS)
    assert (row["best"], row["works_to"], row["best_loss"]) == (0.01, 0.1, None)
    table.loc[0, "eval_hash"] = "other"
    assert limits(table, WIDTHS)["best"] is None


def test_the_largest_stable_level_of_any_study(study: Study, tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(study.largest_stable(), study.largest_stable("optim.lr", by="model.depth"))
    clips = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), clips=(0.5, 1.0), lrs=(1e-3, 1e-1)))
    (row,) = levels.records(clips.largest_stable())
    assert (row["all_stable"], row["trials"], row["reason"]) == (1e-3, 8, None)
    with pytest.raises(KeyError, match="'optim.lr' is no axis of study t .it has: optim.clip"):
        Study.load(planted.plant_study(tmp_path / "t", depths=(2,), clips=(0.5, 1.0), lrs=(1e-3,))).largest_stable()
    with pytest.raises(KeyError, match="no axis beside the learning rate"):
        clips.largest_stable(by="optim.lr")


def test_a_comparison_at_each_level_of_another_axis(study: Study) -> None:
    table = study.compare("model.depth", "final_loss", by="optim.lr")
    rows = levels.records(table)
    assert [row["optim.lr"] for row in rows] == [1e-3, 1e-2, 1e-1]
    assert [row["pairs"] for row in rows] == [2, 2, 2]
    for row in rows:
        (alone,) = levels.records(study.where({"optim.lr": row["optim.lr"]}).compare("model.depth"))
        assert {k: row[k] for k in alone} == alone
    with pytest.raises(KeyError, match="no axis beside the depth"):
        study.compare("model.depth", by="model.depth")


def test_diverged_trials_count_also_without_the_statistic(tmp_path: Path) -> None:
    """At the larger rate the one trial that lived is smooth; that two are gone must stand beside it."""
    planted.plant_frame(tmp_path / "s")
    for seed in range(3):
        planted.plant_trial(tmp_path / "s", planted.settings(lr=1e-3, seed=seed), final_loss=2.5)
        gone = {"steps_done": 21, "nonfinite_at": 20, "final_loss": math.nan, "stop_reason": "diverged"}
        planted.plant_trial(tmp_path / "s", planted.settings(lr=1.0, seed=seed), **(gone if seed else {}))
    (row,) = levels.records(Study.load(tmp_path / "s").compare("optim.lr", "grad_norm_log_sd"))
    assert (row["pairs"], row["diverged_a"], row["diverged_b"]) == (1, 0, 2)


# Parts and choices


def test_a_part_keeps_its_levels_and_its_spikes(study: Study) -> None:
    part = study.where({"model.depth": 6})
    assert set(part.trials["model.depth"]) == {6} and part.axes == {"optim.lr": [1e-3, 1e-2, 1e-1]}
    assert set(part.spikes["trial_id"]) < set(part.trials.index)
    assert study.where({"model.depth": 6, "verdict": "spiky"}).trials["optim.lr"].tolist() == [1e-2]
    gap = study.where({"verdict": "spiky"}).where({"model.depth": 6, "optim.lr": 1e-3})  # a level that is an axis's own
    assert len(gap.trials) == 0


def test_the_grid_is_the_study_without_its_cases(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3, 1e-2), seeds=(0,))
    case = planted.plant_trial(path, planted.settings(depth=3, lr=0.3), case="lingua_1b")
    study = Study.load(path)
    assert "model.depth" in study.axes and study.grid.axes == {"optim.lr": [1e-3, 1e-2]}
    assert study.describe(case.trial_id) == "case lingua_1b, depth 3, learning rate 0.3, seed 0"


def test_worst_and_typical(study: Study) -> None:
    worst, typical = study.worst(), study.typical()
    assert worst is not None and typical is not None
    ratios = study.trials.groupby("verdict")["grad_norm_max_over_median"]
    assert (
        worst == ratios.idxmax()["rough"] and ratios.max()["rough"] < ratios.max()["spiky"]
    )  # the verdict comes first
    assert study.trials.loc[typical, "verdict"] == "stable"
    assert study.trials.loc[typical, "cell_id"] != study.trials.loc[worst, "cell_id"]


def test_provenance_may_be_missing_or_broken(tmp_path: Path) -> None:
    path = planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    assert Study.load(path).question == planted.QUESTION
    (path / "provenance.json").write_text("{")
    assert Study.load(path).question == "" and Study.load(path).provenance == {}


def _table_bytes(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in ("trials.parquet", "spikes.parquet")]


@pytest.mark.parametrize("cwd", [".", "results", "elsewhere"])
@pytest.mark.parametrize("name", ["results/s", "s"])
def test_a_study_is_found_from_beside_results_and_from_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cwd: str, name: str
) -> None:
    planted.plant_frame(tmp_path / "results" / "s")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / cwd)
    if cwd == "elsewhere":
        other = {"s": "results/s", "results/s": "s"}[name]
        with pytest.raises(StoreError, match=f"^{name}: is not a study.*; nor is {other}, seen from elsewhere/$"):
            Study.load(name)
    else:
        assert Study.load(name).folder.path.resolve() == tmp_path / "results" / "s"


def test_a_study_of_that_very_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("results/s", "s"):
        planted.plant_frame(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    assert Study.load("s").folder.path == Path("s")
    assert Study.load("results/s").folder.path == Path("results/s")
    for outside in ("../s", str(tmp_path / "nowhere")):
        with pytest.raises(StoreError, match=r"no trials/\)$"):
            Study.load(outside)

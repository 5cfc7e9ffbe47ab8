"""Logs as people have them: which column is which, runs in one file, hidden values, lost rows; kinds, not files.

Every log is generated with known numbers; what must come out is known without the code that reads it.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import logs
import numpy as np
import pandas as pd
import pytest
from test_ingest import Out, only, refused, series, take

from stabstudy import report
from stabstudy.ingesting import points as spelt
from stabstudy.ingesting.choice import choose, flag
from stabstudy.ingesting.points import Point, Raw
from stabstudy.ingesting.series import settle

pytestmark = pytest.mark.usefixtures("undrawn")

N = 120
NORMS, LOSSES = logs.norms(N, {90: 8.0}), logs.losses(N)


def csv(path: Path, **columns: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


def one(tmp_path: Path, path: Path, *more: str) -> tuple[Mapping[str, Any], Any]:
    return only(take(tmp_path, path, more=more))


def notes(study: Any, trial_id: str) -> tuple[str, ...]:
    log = study.log(trial_id)
    assert log is not None
    return tuple(log.notes)


# which column is which


def test_calls_of_the_log_function_are_no_steps(tmp_path: Path, capsys: Out) -> None:
    """W&B's history: `_step` rises and is always there, but counts rows."""
    rows = {"_step": range(N), "train/loss": LOSSES, "train/grad_norm": NORMS}
    path = csv(tmp_path / "h.csv", **rows, **{"train/global_step": range(20, 20 * N + 1, 20)})
    row, _ = one(tmp_path, path)
    assert (row["spike_first_step"], row["steps_done"], row["log_stride"]) == (20 * 91, 20 * N, 20)
    assert "step: train/global_step, chosen over _step (counts log calls)" in capsys.readouterr().out
    row, _ = one(tmp_path / "alone", csv(tmp_path / "b.csv", **rows))  # where it is all there is
    assert (row["spike_first_step"], row["log_stride"]) == (90, 1)


def test_a_step_that_restarts_in_each_epoch_is_none(tmp_path: Path, capsys: Out) -> None:
    path = csv(tmp_path / "e.csv", epoch=[0] * 60 + [1] * 60, step=[*range(60)] * 2, global_step=range(N), loss=LOSSES)
    assert series(take(tmp_path, path), "loss") == pytest.approx(LOSSES)
    assert "step: global_step, chosen over step (goes back 1 times)" in capsys.readouterr().out


def test_a_restart_is_in_every_column_and_the_name_decides(tmp_path: Path) -> None:
    steps = [*range(80), *range(60, 100)]
    path = csv(tmp_path / "e.csv", step=steps, iteration=[2 * s for s in steps], loss=LOSSES, grad_norm=NORMS)
    row, log = one(tmp_path, path)
    assert row["steps_done"] == 100 and log.left_out == {"written again after a restart": 20}
    assert any("1 restart" in note for note in log.notes)


def test_a_step_stands_where_the_losses_are(tmp_path: Path) -> None:
    """`step` is filled in rows of the evaluation alone."""
    steps = [None if i % 10 else i for i in range(N)]
    assert len(series(take(tmp_path, csv(tmp_path / "a.csv", step=steps, iter=range(N), loss=LOSSES)), "loss")) == N


@pytest.mark.parametrize("columns", [{"epoch": range(N)}, {"index": range(N)}, {"Unnamed: 0": range(N)}])
def test_an_index_is_no_step_unless_it_is_named(columns: dict[str, Any], tmp_path: Path, capsys: Out) -> None:
    path = csv(tmp_path / "a.csv", **columns, loss=LOSSES)
    assert "has no column known as the step (it has: " in refused(tmp_path, capsys, path)
    assert len(series(take(tmp_path, path, more=("--columns", f"step={next(iter(columns))}")), "loss")) == N


@pytest.mark.parametrize(
    ("value", "number"),
    [("1,000", 1000), ("1 000", 1000), ("1_000", 1000), ("1\u00a0000", 1000), ("1'000", 1000), ("1.2e3", 1200),
     ("12,345,678.5", 12_345_678.5), (" 7 ", 7), ("1,00", None), ("10,00,000", None), ("1,000,", None), ("", None),
     ("1/2", None), ("tensor(1.0)", None), (True, None)],
)  # fmt: skip
def test_numbers_with_thousands(value: object, number: float | None) -> None:
    assert spelt.real(value) == number


@pytest.mark.parametrize(("value", "step"), [("1/100", 1), ("1,000/5,000", 1000), ("1/x", None), ("2024/01/05", None)])
def test_a_step_of_all_steps(value: str, step: int | None) -> None:
    assert spelt.whole(value) == step


NOT_FINITE = ["nan", "-nan", "nan(ind)", "-nan(ind)", "1.#QNAN", "-1.#IND", "1.#QNAN00", ".nan", "nan(snan)"]
INFINITE = ["inf", "-inf", "Infinity", "-Infinity", "1.#INF", "-1.#INF", ".inf", "-.inf", "+inf"]


@pytest.mark.parametrize("capitals", [str, str.upper, str.lower, str.capitalize])
def test_not_finite_in_all_spellings(capitals: Callable[[str], str]) -> None:
    assert all(math.isnan(spelt.real(capitals(text)) or 0.0) for text in NOT_FINITE)
    assert [spelt.real(capitals(t)) for t in INFINITE] == [
        -math.inf if t.startswith("-") else math.inf for t in INFINITE
    ]
    assert [spelt.real(capitals(text)) for text in ("nano", "info", "nan nan", "banana", "in", "n/a", "none")] == [
        None
    ] * 7


def test_swift_writes_its_step_of_all_steps(tmp_path: Path) -> None:
    rows = [
        {"loss": a, "grad_norm": g, "global_step/max_steps": f"{i + 1}/500"}
        for i, (a, g) in enumerate(zip(LOSSES, NORMS, strict=True))
    ]
    path = logs.jsonl(tmp_path / "logging.jsonl", [*rows, {"global_step": 500, "best_metric": 1.0}])
    row, log = one(tmp_path, path)
    assert (row["steps_done"], row["steps_planned"], row["stop_reason"]) == (N, 500, "log_ended")
    assert log.left_out == {"neither loss nor norm": 1}


NORM_NAMES = [
    ("grad_norm_before_clip", "grad_norm_after_clip"), ("train/grad_norm_preclip", "train/grad_norm"),
    ("raw_grad_norm", "grad_norm"), ("grad_norm_unclipped", "grad_norm_clipped"),
    ("grad_norm/pre_clip", "grad_norm/post_clip"),
    ("unclipped_grad_norm", "grad_norm"), ("grad_norm", "clipped_grad_norm"), ("grad_norm", "param_norm"),
    ("grad_norm", "grad_norm/layer.0"), ("learning/raw_grad_norm", "learning/grad_norm"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "other"), NORM_NAMES)
@pytest.mark.parametrize("turned", [False, True])
def test_the_norm_before_clipping_wins(before: str, other: str, turned: bool, tmp_path: Path) -> None:
    columns = {before: NORMS, other: [1.0] * N}
    columns = dict(reversed(columns.items())) if turned else columns
    path = csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, **columns)
    assert series(take(tmp_path, path), "grad_norm") == pytest.approx(NORMS)


@pytest.mark.parametrize("name", ["my_grad_norm_x", "g-norm,total", "grad norm = l2 (ours)", 'the "grad" norm'])
def test_a_norm_that_is_not_known_is_named_with_what_takes_it(name: str, tmp_path: Path, capsys: Out) -> None:
    import shlex

    path = csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, **{name: NORMS})
    row, log = one(tmp_path, path)
    out = capsys.readouterr().out
    assert "the log has none" not in out and row["verdict_reason"] == "no_gradient_norm"
    (note,) = (n for n in log.notes if "--columns" in n)
    assert note in out
    option, value = shlex.split(note[note.index("--columns") :])[:2]
    assert series(take(tmp_path / "named", path, more=(option, value)), "grad_norm") == pytest.approx(NORMS)


def test_where_nothing_looks_like_a_norm_the_columns_are_named(tmp_path: Path, capsys: Out) -> None:
    one(tmp_path, csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, wibble=NORMS))
    assert "no column is known as the gradient norm (columns: step, loss, wibble)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["eval_loss", "val/loss", "valid_loss", "test_loss", "validation.loss", "Validation Loss"]
)
def test_a_loss_of_an_evaluation_is_never_taken(name: str, tmp_path: Path, capsys: Out) -> None:
    path = csv(tmp_path / "a.csv", step=range(N), **{name: [9.0] * N}, grad_norm=NORMS)
    assert series(take(tmp_path, path), "loss") == [None] * N
    both = csv(tmp_path / "b.csv", step=range(N), **{name: [9.0] * N}, train_loss=LOSSES, grad_norm=NORMS)
    assert series(take(tmp_path / "both", both), "loss") == pytest.approx(LOSSES)
    refused(tmp_path / "alone", capsys, csv(tmp_path / "c.csv", step=range(N), **{name: [9.0] * N}))


def test_rows_that_a_column_calls_an_evaluation(tmp_path: Path) -> None:
    rows = [
        r
        for i in range(N)
        for r in ({"split": "train", "step": i, "loss": LOSSES[i]}, {"split": "val", "step": i, "loss": 9.0})
    ]
    study = take(tmp_path, logs.jsonl(tmp_path / "a.jsonl", rows))
    assert series(study, "loss") == LOSSES and only(study)[1].left_out == {"evaluation rows": N}


def test_the_last_row_of_a_trainer_is_no_second_loss(tmp_path: Path) -> None:
    """transformers ends with `train_loss`, the mean of the run: no rival, and no remark in every run."""
    path = logs.trainer_state(tmp_path / "run", logs.history(NORMS))
    assert one(tmp_path, path)[1].notes == ()


def test_the_rate_of_lightning_and_of_a_state(tmp_path: Path) -> None:
    columns = {"lr-AdamW": [1e-3] * N, "lr-AdamW/pg2": [9.0] * N, "lr-AdamW-momentum": [0.9] * N}
    path = csv(tmp_path / "m.csv", step=range(N), train_loss_step=LOSSES, **columns, **{"grad_2.0_norm_total": NORMS})
    study = take(tmp_path, path)
    assert series(study, "lr") == [1e-3] * N and series(study, "grad_norm") == pytest.approx(NORMS)
    rows = [{"step": i + 1, "loss": LOSSES[i], "grad_norm": NORMS[i], "lr": 1e-4} for i in range(N)]
    assert series(take(tmp_path / "state", logs.trainer_state(tmp_path / "run", rows)), "lr") == [1e-4] * N


# --columns


def test_columns_as_json_name_anything(tmp_path: Path) -> None:
    name = "lr=1e-3,bs=8 - train/grad_norm"
    path = csv(tmp_path / "a.csv", s=range(N), **{name: NORMS, f"{name}__MIN": NORMS, f"{name}__MAX": NORMS})
    study = take(tmp_path, path, more=("--columns", json.dumps({"step": "s", "grad_norm": name})))
    assert series(study, "grad_norm") == pytest.approx(NORMS)
    assert flag({"grad_norm": name}) == f"--columns '{json.dumps({'grad_norm': name})}'"
    assert flag({"grad_norm": "gnorm", "step": "it"}) == "--columns grad_norm=gnorm,step=it"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"grad_norm": ', "must be a JSON object"),
        ('{"grad_norm": 3}', "must be NAME=COLUMN"),
        ("{}x", "must be a JSON object"),
        ('{"norm": "a"}', "NAME of step, loss, grad_norm, lr"),
        ('{"loss": ""}', "must be NAME=COLUMN"),
        ('{"loss": null}', "must be NAME=COLUMN"),
        ("{" * 5000, "must be a JSON object"),
        ("[1]", "must be NAME=COLUMN"),
        ("", "must be NAME=COLUMN"),
    ],
)
def test_bad_columns(text: str, reason: str, tmp_path: Path, capsys: Out) -> None:
    path = csv(tmp_path / "a.csv", step=range(N), loss=LOSSES)
    assert reason in (line := refused(tmp_path, capsys, path, more=("--columns", text))) and line.count("\n") == 1


def test_of_micro_batches_the_last_is_kept(tmp_path: Path, capsys: Out) -> None:
    """litgpt: `iter` counts micro-batches, `step` updates; the norm stands in the last row of a step."""
    rows = [
        {"iter": 4 * i + k, "step": i, "loss": LOSSES[i] if k == 3 else 9.0 - k}
        | ({"grad_norm": NORMS[i]} if k == 3 else {})
        for i in range(N)
        for k in range(4)
    ]
    study = take(tmp_path, logs.jsonl(tmp_path / "a.jsonl", [*rows, {"summary": True}]))
    assert series(study, "loss") == LOSSES and series(study, "grad_norm") == NORMS
    assert only(study)[1].left_out == {"micro-batches of a step before its last": 3 * N, "neither loss nor norm": 1}
    assert "step: step, chosen over iter" in capsys.readouterr().out
    for row in rows:
        row["iter"] = row["step"]  # now nothing says that the rows are micro-batches
    assert "ranks or micro-batches" in refused(tmp_path / "x", capsys, logs.jsonl(tmp_path / "b.jsonl", rows))


# several runs


def two_runs(**marks: Sequence[Any]) -> pd.DataFrame:
    """Two runs, one after the other; the second has the norms in reverse."""
    return pd.DataFrame({
        **{name: [v for v in pair for _ in range(N)] for name, pair in marks.items()},
        "step": [*range(N)] * 2, "loss": [*LOSSES, *(v + 1 for v in LOSSES)], "grad_norm": [*NORMS, *reversed(NORMS)],
    })  # fmt: skip


@pytest.mark.parametrize("order", ["after each other", "in turn"])
@pytest.mark.parametrize(
    ("marks", "names"),
    [({"run": ("a", "b")}, ["a", "b"]), ({"Name": ("a,1", "b=2")}, ["a,1", "b=2"]),
     ({"seed": (0, 7)}, ["seed=0", "seed=7"]),
     ({"RUN_ID": ("x", "y"), "seed": (3, 3)}, ["x", "y"]), ({"width": (64, 128)}, ["width=64", "width=128"])],
)  # fmt: skip
def test_a_trial_for_each_run_of_a_table(order: str, marks: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    frame = two_runs(**marks)
    frame = frame.sort_values("step", kind="stable") if order == "in turn" else frame
    frame.to_csv(tmp_path / "a.csv", index=False)
    study = take(tmp_path, tmp_path / "a.csv")
    assert set(study.trials["case"]) == set(names)
    assert series(study, "grad_norm", names[0]) == pytest.approx(NORMS)
    assert series(study, "grad_norm", names[1]) == pytest.approx(NORMS[::-1])
    assert not any("restart" in note for trial in study.trials.index for note in notes(study, trial))
    if "seed" in marks:
        assert sorted(study.trials["seed"]) == sorted(marks["seed"])


def test_what_tells_runs_apart_is_a_setting(tmp_path: Path) -> None:
    frame = two_runs(run=("a", "b"), lr=(1e-3, 1e-2), weight_decay=(0.1, 0.1), optimizer=("adam", "lion"))
    frame.to_parquet(tmp_path / "a.parquet")
    trials = take(tmp_path, tmp_path / "a.parquet").trials.set_index("case")
    assert trials["optim.lr"].to_dict() == {"a": 1e-3, "b": 1e-2} and set(trials["optim.weight_decay"]) == {0.1}
    assert trials["external.optimizer"].to_dict() == {"a": "adam", "b": "lion"}


def test_a_restart_within_one_of_several_runs_is_still_one(tmp_path: Path) -> None:
    frame = two_runs(run=("a", "b"))
    again = frame[(frame["run"] == "b") & (frame["step"] >= 100)].assign(loss=3.5)
    pd.concat([frame, again]).to_csv(tmp_path / "a.csv", index=False)
    study = take(tmp_path, tmp_path / "a.csv")
    assert series(study, "loss", "a") == pytest.approx(LOSSES) and series(study, "loss", "b")[99:] == [
        pytest.approx(LOSSES[99] + 1),
        *[3.5] * 20,
    ]


@pytest.mark.parametrize("seeds", [(0.0, 7.0), ("0", "7"), ("0.0", "7.0")])
def test_a_seed_that_a_table_writes_as_it_can_is_one(seeds: tuple[Any, Any], tmp_path: Path) -> None:
    two_runs(seed=seeds).to_parquet(tmp_path / "a.parquet")
    study = take(tmp_path, tmp_path / "a.parquet")
    assert sorted(study.trials["seed"]) == [0, 7] and not any(
        "seed:" in n for t in study.trials.index for n in notes(study, t)
    )


def test_rows_of_no_run_are_lost(tmp_path: Path, capsys: Out) -> None:
    frame = two_runs(run=("a", "b"))
    frame.loc[frame["step"] == 50, "run"] = None
    frame.to_csv(tmp_path / "few.csv", index=False)
    assert len(take(tmp_path, tmp_path / "few.csv").trials) == 2
    frame.loc[frame["step"] > 100, "run"] = None
    frame.to_csv(tmp_path / "many.csv", index=False)
    assert "rows without a run: 40" in refused(tmp_path / "x", capsys, tmp_path / "many.csv")


@pytest.mark.parametrize("order", ["after each other", "in turn", "by tens"])
def test_runs_that_nothing_tells_apart_are_refused(order: str, tmp_path: Path, capsys: Out) -> None:
    frame = two_runs()
    if order == "in turn":
        frame = frame.sort_values("step", kind="stable")
    if order == "by tens":
        frame = frame.assign(ten=frame["step"] // 10).sort_values("ten", kind="stable").drop(columns="ten")
    frame.to_csv(tmp_path / "a.csv", index=False)
    line = refused(tmp_path, capsys, tmp_path / "a.csv")
    assert f"{N} of {2 * N} rows" in line and "several runs" in line
    assert len(take(tmp_path, tmp_path / "a.csv", more=("--allow-loss",)).trials) == 1


def test_one_rank_of_several_is_taken(tmp_path: Path, capsys: Out) -> None:
    frame = two_runs(rank=(1, 0)).sort_values("step", kind="stable")
    frame.to_csv(tmp_path / "a.csv", index=False)
    study = take(tmp_path, tmp_path / "a.csv")
    assert series(study, "grad_norm") == pytest.approx(NORMS[::-1]) and only(study)[1].left_out == {
        "rows of other ranks": N
    }
    assert "rank=0 of 2 is taken" in capsys.readouterr().out


def chart(path: Path, metric: str, runs: Mapping[str, Sequence[float]]) -> Path:
    columns = {f"{run} - {metric}{edge}": v for run, v in runs.items() for edge in ("", "__MIN", "__MAX")}
    return csv(path, Step=range(N), **columns)


def test_a_chart_export_is_a_trial_for_each_run_and_charts_of_the_same_runs_are_joined(tmp_path: Path) -> None:
    runs = ("lr=1e-3,bs=8", "a - b")
    chart(tmp_path / "in" / "n.csv", "train/grad_norm", dict(zip(runs, (NORMS, NORMS[::-1]), strict=True)))
    chart(tmp_path / "in" / "l.csv", "train/loss", dict(zip(runs, (LOSSES, LOSSES[::-1]), strict=True)))
    study = take(tmp_path, tmp_path / "in")
    assert sorted(study.trials["case"]) == sorted(runs)
    assert series(study, "grad_norm", "a - b") == pytest.approx(NORMS[::-1])
    assert series(study, "loss", runs[0]) == pytest.approx(LOSSES)
    alone = take(tmp_path / "one", tmp_path / "in" / "n.csv")
    assert len(alone.trials) == 2 and series(alone, "loss", runs[0]) == [None] * N


def test_a_chart_whose_runs_end_at_different_steps(tmp_path: Path) -> None:
    path = chart(tmp_path / "n.csv", "train/loss", {"a": LOSSES, "b": [*LOSSES[:50], *[math.nan] * 70]})
    assert len(series(take(tmp_path, path), "loss", "b")) == 50


@pytest.mark.parametrize("steps", [[5000] * 40, [*range(4000, 0, -100)]])
def test_a_row_per_run_is_no_log(steps: list[int], tmp_path: Path, capsys: Out) -> None:
    path = csv(
        tmp_path / "r.csv", Name=[f"run-{i}" for i in range(40)], State=["done"] * 40, step=steps, loss=LOSSES[:40]
    )
    assert "has a row per run (Name)" in refused(tmp_path, capsys, path)
    path = csv(tmp_path / "s.csv", run_id=[f"r{i}" for i in range(40)], step=steps, loss=LOSSES[:40])
    assert "has a row per run (run_id)" in refused(tmp_path, capsys, path)


# rows of one step


@pytest.mark.parametrize("order", ["by step", "by column", "shuffled", "rate late"])
def test_rows_of_one_step_are_one_point_whatever_their_order(order: str, tmp_path: Path) -> None:
    rows = [
        row
        for i in range(N)
        for row in (
            {"step": i, "lr": 1e-3}, {"step": i, "loss": LOSSES[i]}, {"step": i, "grad_norm": NORMS[i]},
            {"step": i, "val_loss": 9.0},
        )
    ]  # fmt: skip
    if order == "by column":
        rows.sort(key=lambda row: list(row)[1])
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    if order == "rate late":
        rows.sort(key=lambda row: (int(row["step"]) + 2 * ("lr" in row), "lr" in row))
    study = take(tmp_path, logs.jsonl(tmp_path / "a.jsonl", rows))
    assert (series(study, "loss"), series(study, "grad_norm"), series(study, "lr")) == (LOSSES, NORMS, [1e-3] * N)
    assert only(study)[1].left_out == {"evaluation rows": N}


def test_a_restart_of_sparse_rows_is_still_one(tmp_path: Path) -> None:
    def rows(steps: Sequence[int], shift: float) -> list[dict[str, Any]]:
        return [
            r
            for i in steps
            for r in (
                {"step": i, "lr": 1e-3},
                {"step": i, "loss": LOSSES[i] + shift},
                {"step": i, "grad_norm": NORMS[i]},
            )
        ]

    path = logs.jsonl(tmp_path / "a.jsonl", [*rows(range(80), 0.0), *rows(range(50, N), 1.0)])
    study = take(tmp_path, path)
    assert series(study, "loss") == [*LOSSES[:50], *(v + 1 for v in LOSSES[50:])]
    assert series(study, "grad_norm") == NORMS
    assert only(study)[1].notes[-1] == "1 restart: of repeated steps the last is kept"


def test_a_later_attempt_that_repeats_no_logged_step_first(tmp_path: Path) -> None:
    """Old 0, 10, ... 50; a restart from 20 logs 25, 35 and then 50 again: nothing of the old is kept from 25 on."""
    raw = Raw("table", points=[Point(s, float(s)) for s in range(0, 60, 10)])
    raw.points += [Point(s, 1000.0 + s) for s in (25, 35, 50, 60)]
    assert [(p.step, p.loss) for p in settle(raw)] == [
        (0, 0),
        (10, 10),
        (20, 20),
        (25, 1025),
        (35, 1035),
        (50, 1050),
        (60, 1060),
    ]


# hidden values


def state(folder: Path, losses: Sequence[float], norms: Sequence[float | None]) -> Path:
    rows = [
        {"step": i + 1, "loss": a, "learning_rate": 1e-4} | ({} if g is None else {"grad_norm": g})
        for i, (a, g) in enumerate(zip(losses, norms, strict=True))
    ]
    return logs.trainer_state(folder, rows)


@pytest.mark.parametrize("norm", [None, 0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 80, N - 2])
def test_a_loss_of_zero_for_ever_is_not_finite(norm: float | None, at: int, tmp_path: Path) -> None:
    losses = [*LOSSES[:at], *[0.0] * (N - at)]
    norms = [*(NORMS[:at] if norm is not None else [None] * at), *[norm] * (N - at)]
    row, log = one(tmp_path, state(tmp_path / "run", losses, norms))
    assert (row["verdict"], row["verdict_code"], row["verdict_step"]) == ("diverged", "nonfinite", at + 1)
    assert any("hidden a loss that was not finite" in note for note in log.notes)


@pytest.mark.parametrize("norm", [None, 0.0, -1.0])
def test_zero_from_the_first_row_on_is_not_judged(norm: float | None, tmp_path: Path, capsys: Out) -> None:
    study = take(tmp_path, state(tmp_path / "run", [0.0] * N, [norm] * N))
    row, _ = only(study)
    assert (row["verdict"], row["verdict_reason"], row["grad_norm_max"]) == (None, "all_zero", None)
    assert "the loss is exactly 0.0 in every row" in capsys.readouterr().out
    assert report.main([str(study.folder.path)]) == 0
    assert "with a loss of 0 throughout" in (study.folder.report / "report.md").read_text()


@pytest.mark.parametrize(
    ("losses", "norms"),
    [
        ([0.0] * N, NORMS),  # GRPO
        ([*LOSSES[:60], *[0.0] * 60], NORMS),
        ([*LOSSES[:30], 0.0, 0.0, *LOSSES[32:]], NORMS),
        (LOSSES, [*NORMS[:50], -1.0, *NORMS[51:]]),  # a step that the scaler skipped
        ([round(2 * math.exp(-i / 8), 4) for i in range(N)], [*NORMS[:100], *[None] * 20]),  # learnt by heart
        *[([a if i % 9 else 0.0 for i, a in enumerate(LOSSES)], [g if i % 9 else 0.0 for i, g in enumerate(NORMS)])],
    ],
)  # fmt: skip
def test_a_loss_of_zero_that_is_one(losses: list[float], norms: list[float | None], tmp_path: Path) -> None:
    study = take(tmp_path, state(tmp_path / "run", losses, norms))
    row, _ = only(study)
    assert row["verdict_code"] != "nonfinite" and row["nonfinite_steps"] == 0
    assert series(study, "loss") == pytest.approx(losses)


def test_a_lone_negative_norm_is_missing(tmp_path: Path) -> None:
    study = take(tmp_path, state(tmp_path / "run", LOSSES, [*NORMS[:50], -1.0, *NORMS[51:]]))
    assert series(study, "grad_norm")[50] is None and only(study)[1].left_out == {"negative gradient norms": 1}


def test_norms_of_zero_alone_are_none(tmp_path: Path) -> None:
    row, _ = one(tmp_path, state(tmp_path / "run", LOSSES, [0.0] * N))
    assert (row["verdict_reason"], row["grad_norm_max"]) == ("no_gradient_norm", None)


# norms after clipping


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize(("clip", "known"), [(1.9, False), (1.0, False), (1.9, True)])
def test_norms_that_are_cut_off_are_those_after_clipping(
    clip: float, known: bool, noise: float, tmp_path: Path, capsys: Out
) -> None:
    rng = np.random.default_rng(0)
    norms = np.minimum(NORMS, clip * (1 - noise * rng.random(N)))
    path = csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, grad_norm=norms)
    study = take(tmp_path, path, more=("--set", f"optim.clip={clip}") if known else ())
    row, log = only(study)
    assert f"the gradient norms are cut off at {clip:g}: they are those after clipping" in capsys.readouterr().out
    assert (row["verdict"], row["verdict_reason"], row["grad_norm_max"]) == (None, "norm_after_clipping", None)
    assert (
        log.after_clipping and series(study, "grad_norm") == pytest.approx(norms.tolist()) and row["clip_share"] is None
    )
    assert report.main([str(study.folder.path)]) == 0
    assert "1 run whose gradient norms are those after clipping" in (study.folder.report / "report.md").read_text()


@pytest.mark.parametrize(
    ("norms", "more"),
    [(NORMS, ()), ([round(g, 1) for g in NORMS], ()), ([round(g, 2) for g in NORMS], ()),
     ([min(g, 1.9) for g in NORMS], ("--set", "optim.clip=1.0"))],  # above a threshold that is known
)  # fmt: skip
def test_norms_that_are_not_cut_off(norms: list[float], more: tuple[str, ...], tmp_path: Path) -> None:
    row, log = one(tmp_path, csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, grad_norm=norms), *more)
    assert not log.after_clipping and row["verdict"] == "stable"


def test_a_run_with_norms_after_clipping_may_have_diverged(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", step=range(N), loss=[*LOSSES[:-1], "nan"], grad_norm=np.minimum(NORMS, 1.9))
    assert one(tmp_path, path)[0]["verdict"] == "diverged"


def test_a_norm_after_clipping_by_its_name(tmp_path: Path) -> None:
    """Composer's monitor reads the gradients after clipping."""
    columns = {"l2_norm/grad/global": NORMS, "loss/train/total": LOSSES, "time/batch": range(N)}
    assert one(tmp_path, csv(tmp_path / "a.csv", **columns))[0]["verdict_reason"] == "norm_after_clipping"


@pytest.mark.parametrize(("digits", "clip", "after"), [(2, 1.9, True), (1, 1.9, True), (2, None, False)])
def test_a_cap_at_a_threshold_that_is_known_is_one_though_norms_are_rounded(
    digits: int, clip: float | None, after: bool, tmp_path: Path
) -> None:
    norms = [round(min(g, 1.9) if clip else g, digits) for g in NORMS]
    path = csv(tmp_path / "a.csv", step=range(N), loss=LOSSES, grad_norm=norms)
    assert one(tmp_path, path, *(("--set", f"optim.clip={clip}") if clip else ()))[1].after_clipping is after


# rows that are lost, steps that are missing


@pytest.mark.parametrize(("lost", "code"), [(2, 2), (1, 0), (0, 0)])
def test_more_than_one_row_in_a_hundred_is_too_many(lost: int, code: int, tmp_path: Path, capsys: Out) -> None:
    steps = ["?" if i in range(30, 30 + lost) else str(i) for i in range(N)]
    path = csv(tmp_path / "a.csv", step=steps, loss=LOSSES, grad_norm=NORMS)
    if code:
        assert f"2 of {N} rows with a loss or gradient norm would be lost (without a step: 2)" in refused(
            tmp_path, capsys, path
        )
    study = take(tmp_path, path, more=("--allow-loss",) if code else ())
    assert only(study)[1].left_out == ({"without a step": lost} if lost else {})


def test_rows_that_may_be_left_out_are_not_lost(tmp_path: Path) -> None:
    rows = logs.history(NORMS, stride=1)
    rows[60:60] = [{"eval_loss": 3.0, "step": 60}] * 30
    again = [r | {"loss": 9.0} for r in rows if r["step"] > 100 and "loss" in r]
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", [*rows[:-1], *again, rows[-1]]))
    assert only(study)[1].left_out == {"evaluation rows": 31, "summary rows": 1, "written again after a restart": 20}


def test_a_folder_names_the_tables_that_it_passes_over(tmp_path: Path, capsys: Out) -> None:
    csv(tmp_path / "in" / "good.csv", step=range(N), loss=LOSSES)
    csv(tmp_path / "in" / "odd.csv", step=range(N), gq=NORMS, obj=LOSSES)
    csv(tmp_path / "in" / "data.csv", text=["a"], label=[1])
    take(tmp_path, tmp_path / "in")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "passed over" in line)
    assert "odd.csv was passed over: has no column known as the loss or gradient norm (it has: step, gq, obj)" in line
    (tmp_path / "in" / "good.csv").unlink()
    assert "odd.csv was passed over" in refused(tmp_path / "none", capsys, tmp_path / "in")


def test_a_table_beside_a_run_is_named(tmp_path: Path, capsys: Out) -> None:
    history = [{"step": i + 1, "loss": loss} for i, loss in enumerate(LOSSES)]
    csv(tmp_path / "in" / "metrics.csv", step=range(N), loss=LOSSES)
    csv(tmp_path / "in" / "data.csv", text=["a"], label=[1])
    (tmp_path / "in" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    take(tmp_path, tmp_path / "in")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "passed over" in line)
    assert line.endswith(
        "metrics.csv was passed over: it lies beside trainer_state.json; name the file itself to read it"
    )


@pytest.mark.parametrize(("missing", "approximate"), [(11, False), (12, True), (40, True)])
def test_missing_steps_make_a_log_approximate(missing: int, approximate: bool, tmp_path: Path) -> None:
    kept = sorted(random.Random(0).sample(range(1, N - 1), N - 2 - missing))
    kept = [0, *kept, N - 1]
    path = csv(tmp_path / "a.csv", step=kept, loss=np.array(LOSSES)[kept], grad_norm=np.array(logs.norms(N))[kept])
    study = take(tmp_path, path)
    row, _ = only(study)
    assert (row["log_stride"], row["approximate"], row["steps_done"]) == (1, approximate, N)
    assert (row["verdict"], row["verdict_reason"]) == ((None, "strided") if approximate else ("stable", None))
    assert report.main([str(study.folder.path)]) == 0
    said = "of 1 run a tenth of the steps or more was not logged" in (study.folder.report / "report.md").read_text()
    assert said is approximate


def test_the_file_says_how_often_it_logs(tmp_path: Path) -> None:
    rows = logs.history(NORMS, stride=10)
    rows = [row for row in rows if (row["step"] // 10) % 2]  # every other row was lost
    path = logs.trainer_state(tmp_path / "run", rows, max_steps=10 * N)
    assert one(tmp_path, path)[0]["log_stride"] == 20
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logging_steps": 10}))
    row, _ = one(tmp_path / "said", path)
    assert (row["log_stride"], row["approximate"], row["steps_done"]) == (10, True, 10 * N - 10)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logging_steps": 7}))
    row, log = one(tmp_path / "wrong", path)
    assert row["log_stride"] == 20 and log.notes == ("its settings say a row every 7 steps; most rows are 20 apart",)


def test_settings_beside_a_table_say_how_often_it_logs(tmp_path: Path) -> None:
    path = csv(tmp_path / "v" / "metrics.csv", step=range(0, 20 * N, 20), train_loss=LOSSES)
    (tmp_path / "v" / "hparams.yaml").write_text("log_every_n_steps: 10\nlr: 0.1\n")
    row, log = one(tmp_path, path)
    assert row["log_stride"] == 10 and log.settings == {}  # a table may be one of several in its folder


@pytest.mark.parametrize("kind", ["dense start", "jitter", "first and last"])
def test_irregular_steps_lose_no_rows(kind: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    steps = {
        "dense start": [*range(20), *range(20, 1020, 10)],
        "jitter": [20 * i + rng.randrange(-4, 5) for i in range(1, N + 1)],
        "first and last": [1, *range(10, 1190, 10), 1183],
    }[kind]
    study = take(tmp_path, csv(tmp_path / "a.csv", step=sorted(steps), loss=LOSSES[: len(steps)]))
    measured = {s: v for s, v in zip(series(study, "step"), series(study, "loss"), strict=True) if v is not None}
    expected = dict(zip(sorted(steps), LOSSES, strict=False))
    if kind == "first and last":
        del expected[1183]  # which trainers write besides
    assert measured == pytest.approx(expected)


# a step keeps its own number


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (0, 10), (7, 1), (5, 10), (10, 10), (1, 100)])
def test_a_step_keeps_its_own_number(first: int, stride: int, tmp_path: Path, capsys: Out) -> None:
    steps = [first + stride * i for i in range(N)]
    study = take(tmp_path, csv(tmp_path / "a.csv", step=steps, loss=LOSSES, grad_norm=NORMS))
    row, _ = only(study)
    assert (row["spike_first_step"], row["grad_norm_argmax"]) == (steps[90], steps[90])
    assert row["steps_done"] == (N if (first, stride) == (0, 1) else steps[-1])
    assert f"steps {first} to {steps[-1]}," in capsys.readouterr().out
    assert report.main([str(study.folder.path)]) == 0
    assert f"| {first} to {steps[-1]} |" in (study.folder.report / "report.md").read_text()


def test_a_row_beside_the_grid_keeps_its_own_number(tmp_path: Path, capsys: Out) -> None:
    """transformers' logging_first_step: 1, 10, 20, ...; the largest norm is the first."""
    rows = logs.history([99.0, *NORMS], stride=10)
    for row in rows:
        row["step"] = max(1, row["step"] - 10)
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", rows))
    row, _ = only(study)
    assert (row["grad_norm_argmax"], row["spike_first_step"]) == (1, 10 * 91)
    assert series(study, "step")[:3] == [1, 10, 20] and "steps 1 to 1200," in capsys.readouterr().out


# files as they come


def written(frame: pd.DataFrame, path: Path) -> Path:
    write: dict[str, Callable[[], object]] = {
        "bom.csv": lambda: frame.to_csv(path, index=False, encoding="utf-8-sig", lineterminator="\r\n"),
        "semicolon.csv": lambda: frame.to_csv(path, index=False, sep=";", decimal=","),
        "tab.tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "UPPER.CSV": lambda: frame.rename(columns=str.upper).to_csv(path, index=False),
        "zipped.csv.gz": lambda: frame.to_csv(path, index=False),
        "zipped.jsonl.gz": lambda: frame.to_json(path, orient="records", lines=True, double_precision=15),
        "list.json": lambda: frame.to_json(path, orient="records", double_precision=15),
        "lines.json": lambda: frame.to_json(path, orient="records", lines=True, double_precision=15),
        "text.parquet": lambda: frame.astype(str).to_parquet(path),
    }
    write[path.name]()
    return path


NAMES = [
    *("bom.csv", "semicolon.csv", "tab.tsv", "UPPER.CSV", "zipped.csv.gz", "zipped.jsonl.gz", "list.json"),
    *("lines.json", "text.parquet"),
]


@pytest.mark.parametrize("name", NAMES)
def test_one_log_in_every_dress(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"step": range(N), "loss": LOSSES, "grad_norm": NORMS, "note": "é"})
    study = take(tmp_path, written(frame, tmp_path / name))
    assert series(study, "grad_norm") == pytest.approx(NORMS) and series(study, "loss") == pytest.approx(LOSSES)
    assert study.trials["case"].tolist() == [name.split(".")[0]]


def test_a_torn_gzip_gives_what_is_whole(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"step": i, "loss": LOSSES[i], "x": random.Random(i).random()}) + "\n" for i in range(N))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-900])
    losses = series(take(tmp_path, tmp_path / "a.jsonl.gz"), "loss")
    assert 50 < len(losses) < N and losses == LOSSES[: len(losses)]


def test_a_byte_that_is_no_utf8_damages_its_own_field_alone(tmp_path: Path) -> None:
    text = "step,loss,note\n" + "".join(f"{i},{LOSSES[i]!r},caf\xe9\n" for i in range(N))
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert series(take(tmp_path, tmp_path / "a.csv"), "loss") == LOSSES


def test_every_reader_chooses_by_the_same_rule() -> None:
    """Negative control: by its name alone `step` would be taken; by its values it is not."""
    rows = [{"step": i % 10, "global_step": i, "loss": LOSSES[i], "eval_loss": 1.0} for i in range(N)]
    choice = choose(rows, list(rows[0]), {}, [0] * N)
    assert choice.names == {"step": "global_step", "loss": "loss"}
    assert choose(rows, list(rows[0]), {"step": "step"}, [0] * N).names["step"] == "step"

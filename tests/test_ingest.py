"""Logs of other trainers: each format, each kind of damage, what becomes of settings, and the report on them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import logs
import numpy as np
import pandas as pd
import planted
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from stabstudy import cli, disk, ingest, report, sweep
from stabstudy.analysis.study import Study
from stabstudy.external import ExternalLog
from stabstudy.ingesting import points as log_values
from stabstudy.ingesting import readers, run_settings
from stabstudy.ingesting.points import LogError, Point, Raw
from stabstudy.ingesting.series import Grid, on_grid, settle
from stabstudy.store import StoreError, write_sealed

Out = pytest.CaptureFixture[str]


def take(tmp_path: Path, *paths: Path, code: int = 0, more: tuple[str, ...] = ()) -> Study:
    """Ingest into the study `s` and load it."""
    arguments = [*map(str, paths), "--study", "s", "--results-dir", str(tmp_path / "results"), *more]
    assert ingest.main(arguments) == code
    return Study.load(tmp_path / "results" / "s")


def refused(tmp_path: Path, out: Out, *paths: Path, code: int = 2, more: tuple[str, ...] = ()) -> str:
    """Ingest what must be refused: the code, nothing written, and the lines on stderr."""
    arguments = [*map(str, paths), "--study", "s", "--results-dir", str(tmp_path / "results"), *more]
    assert ingest.main(arguments) == code
    assert not (tmp_path / "results").exists()
    said = out.readouterr().err
    assert all(line.startswith("error: ingest: ") for line in said.splitlines()) and "Traceback" not in said
    return said


def only(study: Study) -> tuple[dict[str, Any], ExternalLog]:
    (trial_id,) = study.trials.index
    log = study.log(trial_id)
    assert log is not None
    return study.row(trial_id), log


def series(study: Study, name: str, run: str | None = None) -> list[float | None]:
    """A column of a run's trace, null as None."""
    trials = study.trials if run is None else study.trials[study.trials["case"] == run]
    (trial_id,) = trials.index
    rows = study.trace(trial_id)
    return [None if null else v for v, null in zip(rows[name].tolist(), rows.is_null(name).tolist(), strict=True)]


# the real run


def test_the_real_run(shared_data: Path, tmp_path: Path, capsys: Out) -> None:
    source = shared_data / "llamafactory_run"
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.iterdir()}
    study = take(tmp_path, source)
    assert "866 rows every 10 steps (approximate), steps 10 to 8660, 866 gradient norms" in capsys.readouterr().out
    row, log = only(study)
    norm = np.array(series(study, "grad_norm"))
    assert (row["steps_done"], row["steps_planned"], row["log_stride"], row["approximate"]) == (8660, 8660, 10, True)
    assert (len(norm), round(norm.max(), 2), round(float(np.median(norm)), 2)) == (866, 16.25, 1.66)
    assert round(100 * float(np.mean(norm > 1.0))) == 91
    assert (row["grad_norm_argmax"], log.format, row["optim.clip"], row["clip_share"]) == (
        50,
        "trainer_log",
        None,
        None,
    )
    assert report.main([str(study.folder.path)]) == 0
    page = (study.folder.report / "report.md").read_text().replace("\\", "")
    said = re.search(
        r"of 866 logged norms the largest is 16\.25, at step 50, .* its max_grad_norm is not known\.", page
    )
    assert said is not None and "91 % of them lie above 1" in said[0] and "median 1.66" in said[0]
    told = " ".join((ROOT / "docs" / "ingesting.md").read_text().split())
    assert said[0] in told and "Four spikes stand out (steps 3220, 4530, 5510 and 6110)" in told
    assert study.spikes["start"].tolist() == [3220, 4530, 5510, 6110]
    assert study.spikes["part"].tolist() == ["both", "absolute", "absolute", "absolute"]
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in source.iterdir()} == before
    clipped, _ = only(take(tmp_path, source, more=("--set", "optim.clip=1.0")))
    assert round(100 * clipped["clip_share"]) == 91 and clipped["trial_id"] == row["trial_id"]


# formats


def test_a_state_that_transformers_wrote(tmp_path: Path) -> None:
    from transformers import TrainerState

    grads = [*logs.norms(9), math.nan]
    rows = logs.history(grads, stride=1)
    rows[-2]["loss"] = 0.0  # as the filter of the Trainer writes a loss that is not finite
    path = tmp_path / "run" / "trainer_state.json"
    path.parent.mkdir()
    TrainerState(global_step=10, max_steps=20, log_history=rows).save_to_json(str(path))
    assert "NaN" in path.read_text()
    study = take(tmp_path, path)
    row, log = only(study)
    assert series(study, "step") == list(range(1, 11)) and series(study, "grad_norm")[:9] == grads[:9]
    assert math.isnan(series(study, "loss")[9] or 0) and row["nonfinite_steps"] == 1
    assert (row["verdict"], row["verdict_code"], row["verdict_step"]) == ("diverged", "nonfinite", 10)
    assert log.left_out == {"evaluation rows": 1, "summary rows": 1}
    assert (row["log_stride"], row["approximate"]) == (1, False)
    assert (row["stop_reason"], row["verdict_partial"]) == ("log_ended", True)  # of 20 steps that were planned
    assert any("hidden a loss that was not finite" in note for note in log.notes)


@pytest.mark.parametrize("rate", ["lr", "learning_rate"])
def test_llama_factory_takes_the_norms_of_the_state_beside_it(tmp_path: Path, rate: str) -> None:
    rows = logs.history(grads := logs.norms(40))
    logs.trainer_log(tmp_path / "run", rows, rate)
    alone, _ = only(take(tmp_path / "alone", tmp_path / "run"))
    assert (alone["grad_norm_max"], alone["spike_events"], alone["n_evaluable"]) == (None, None, 0)
    logs.trainer_state(tmp_path / "run", rows)
    study = take(tmp_path, tmp_path / "run")
    assert series(study, "grad_norm") == grads and series(study, "lr") == [1e-4] * 40
    assert len(study.trials) == 1 and study.trials["case"].tolist() == ["run"]


def test_a_state_of_another_run_lends_no_norms(tmp_path: Path) -> None:
    rows = logs.history(logs.norms(40))
    logs.trainer_log(tmp_path / "run", rows)
    logs.trainer_state(tmp_path / "run", [row | {"loss": row["loss"] + 1} if "loss" in row else row for row in rows])
    study = take(tmp_path, tmp_path / "run")
    assert series(study, "grad_norm") == [None] * 40 and "another run's" in only(study)[1].notes[0]


def test_the_last_checkpoint_speaks_for_a_run_without_its_own_state(tmp_path: Path) -> None:
    for step in (100, 1000, 900):
        logs.trainer_state(tmp_path / "run" / f"checkpoint-{step}", logs.history(logs.norms(step // 10)))
    logs.trainer_state(tmp_path / "run" / "runs", logs.history(logs.norms(7)))  # what lies in a run is its own
    study = take(tmp_path, tmp_path)
    assert study.trials["case"].tolist() == ["run"] and only(study)[0]["steps_done"] == 1000


LINGUA = """
seed: 777
grad_acc_steps: 2
steps: 60
optim: {lr: 3e-3, weight_decay: 0.033, beta1: 0.9, beta2: 0.95, epsilon: 1.0e-08, clip: 1.0, warmup: 5}
model: {dim: 2048, n_layers: 25, n_heads: 16, seed: 42}
data: {batch_size: 4, seq_len: 4096, seed: 42, root_dir: shuffled}
distributed: {dp_replicate: 8, dp_shard: 1, model_dtype: bf16}
"""  # fmt: skip


def test_lingua_without_its_sentinels_and_with_its_settings(tmp_path: Path) -> None:
    path = logs.lingua(tmp_path / "run", grads := logs.norms(60, {40: 8.0}), config=LINGUA)
    lines = path.read_text().splitlines(keepends=True)
    skipped = {"global_step": 30, "acc_step": 1, "loss/out": 9.0, "optim/grad_norm": -1.0, "optim/lr": 1e-3}
    path.write_text("".join([*lines[:30], json.dumps(skipped) + "\n", *lines[30:]]))
    (tmp_path / "run" / "metrics.eval.jsonl").write_text('{"global_step": 60, "nll": -3.0}\n')
    study = take(tmp_path, tmp_path)
    row, log = only(study)
    assert series(study, "grad_norm") == grads
    assert log.left_out == {"micro-batches without a step (norm -1)": 1}
    known = {
        "optim.lr": 3e-3, "optim.weight_decay": 0.033, "optim.beta1": 0.9, "optim.beta2": 0.95, "optim.eps": 1e-8,
        "optim.clip": 1.0, "optim.clip_kind": "norm", "optim.warmup_steps": 5, "model.dim": 2048, "model.depth": 25,
        "model.n_heads": 16, "data.seq_len": 4096, "train.steps": 60, "train.batch_size": 64,
        "train.precision": "bf16_stream", "seed": 42,
    }  # fmt: skip
    assert log.settings == known and {name: row[name] for name in known} == known
    assert (row["optim.schedule"], row["model.init"], row["data.source"]) == (None, None, None)  # no default of ours
    (spike,) = study.spikes.to_dict("records")
    assert (spike["start"], spike["peak_step"], spike["class"], spike["in_warmup"]) == (41, 41, "narrow", False)
    assert row["clip_share"] == 1.0 and row["clip_scale_min"] == pytest.approx(1 / (max(grads) + 1e-6))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "tsv"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"iter": range(50), "train_loss": logs.losses(50), "gnorm": logs.norms(50), "note": "x"})
    path = tmp_path / f"a.{suffix}"
    write: dict[str, Callable[[], object]] = {
        "csv": lambda: frame.to_csv(path, index=False),
        "tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "parquet": lambda: frame.to_parquet(path),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True, double_precision=15),
    }
    write[suffix]()
    study = take(tmp_path, path)
    assert series(study, "grad_norm") == pytest.approx(frame["gnorm"].tolist(), rel=1e-12)
    assert series(study, "loss") == pytest.approx(frame["train_loss"].tolist(), rel=1e-12)
    assert series(study, "step") == list(range(50)) and only(study)[0]["steps_done"] == 50
    assert series(study, "lr") == [None] * 50 and only(study)[1].notes == (
        "columns: step=iter, loss=train_loss, grad_norm=gnorm",
    )


@pytest.mark.parametrize("norm", [None, "tensor(1.02)", ""])
def test_without_a_gradient_norm_there_is_no_verdict_but_divergence(norm: str | None, tmp_path: Path) -> None:
    """The column absent, unreadable or empty: nothing that was not measured is called stable."""
    for name, end, verdict in (("whole", 2.0, None), ("lost", math.nan, "diverged")):
        frame = pd.DataFrame({"step": range(120), "loss": [*logs.losses(119), end]})
        if norm is not None:
            frame["grad_norm"] = norm
        folder = tmp_path / name
        folder.mkdir()
        frame.to_csv(folder / "a.csv", index=False, na_rep="nan")
        row, _ = only(take(folder, folder / "a.csv"))
        assert (row["verdict"], row["n_evaluable"], row["spike_events"]) == (verdict, 0, None)
        assert row["verdict_reason"] == (None if verdict else "no_gradient_norm")
        assert [row[name] for name in ("spike_rate", "spike_abs_low", "severity")] == [None] * 3


def test_columns_are_said_where_they_are_not_known(tmp_path: Path, capsys: Out) -> None:
    frame = pd.DataFrame({"t": range(20), "objective": logs.losses(20), "|g|": logs.norms(20)})
    frame.to_csv(tmp_path / "a.csv", index=False)
    said = refused(tmp_path, capsys, tmp_path / "a.csv")
    assert "(it has: t, objective, |g|)" in said and "--columns step=iter,grad_norm=gnorm,loss=train_loss" in said
    more = ("--columns", "step=t,loss=objective,grad_norm=|g|")
    assert series(take(tmp_path, tmp_path / "a.csv", more=more), "grad_norm") == pytest.approx(frame["|g|"].tolist())


def test_halves_of_a_step_are_one_row(tmp_path: Path) -> None:
    rows = [r for i in range(20) for r in ({"_step": i, "train/loss": 2.0}, {"_step": i, "train/grad_norm": 1.0 + i})]
    path = logs.jsonl(tmp_path / "a.jsonl", rows)
    study = take(tmp_path, path, more=("--columns", "step=_step"))
    assert series(study, "grad_norm") == [1.0 + i for i in range(20)] and series(study, "loss") == [2.0] * 20
    assert only(study)[1].left_out == {}


def test_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    grads = logs.norms(30)
    (folder := tmp_path / "tb").mkdir()
    writer = EventFileWriter(str(folder))
    for i, g in enumerate(grads):
        for tag, value in (("train/loss", 2.0), ("train/grad_norm", g), ("eval/loss", 3.0)):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=5 * (i + 1), summary=summary))
    writer.close()
    study = take(tmp_path, tmp_path)
    assert series(study, "grad_norm") == pytest.approx(grads, rel=1e-6) and series(study, "loss") == [2.0] * 30
    assert only(study)[0]["log_stride"] == 5
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-60])  # torn in the last step
    assert series(take(tmp_path / "torn", folder), "grad_norm")[:29] == pytest.approx(grads[:29], rel=1e-6)


def test_without_tensorboard_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from stabstudy.ingest import main\n"
        f"sys.exit(main([{str(tmp_path)!r}, '--study', 's', '--results-dir', {str(tmp_path / 'results')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "pip install 'stabstudy[tensorboard]'" in done.stderr
    assert not (tmp_path / "results").exists()


# damage


def plain(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def raw_bytes(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty state": ("trainer_state.json", b"", "is not JSON (empty)"),
    "cut state": ("trainer_state.json", b'{"log_history": [{"step": 10, "lo', "is not JSON ("),
    "another json": ("trainer_state.json", b'{"a": 1}', "has no log_history (it holds a)"),
    "a list": ("trainer_state.json", b"[1, 2]", "must hold a JSON object"),
    "no train rows": (
        "trainer_state.json",
        b'{"log_history": [{"eval_loss": 1, "step": 2}]}',
        "has no row with a step",
    ),
    "no utf-8": ("trainer_state.json", b'{"log_history": "\xff"}', "is not UTF-8 text (byte 0xff at 17)"),
    "too deep": ("trainer_state.json", b"[" * 100_000, "is not JSON ("),
    "empty lines": ("trainer_log.jsonl", b"\n\n", "is empty"),
    "garbage": ("metrics.jsonl", bytes(range(256)) * 20, "has no line that is a JSON object"),
    "empty csv": ("a.csv", b"", "is empty"),
    "header alone": ("a.csv", b"step,loss\n", "has no row with a step"),
    "garbage csv": ("a.csv", bytes(range(128, 256)) * 20, "is not UTF-8 text"),
    "garbage parquet": ("a.parquet", b"PAR1" + bytes(200) + b"PAR1", "is not a Parquet file"),
    "no log": ("notes.pdf", b"step 1 loss 2", "is not known as a log by its name"),
    "prose": ("notes.txt", b"One step back, and the loss was ours.", "has no line of `name: value` pairs with a loss"),
    "empty events": ("events.out.tfevents.1.host", b"", "holds no scalar"),
    "garbage events": ("events.out.tfevents.1.host", bytes(range(256)) * 20, "holds no scalar"),
    "wild steps": (
        "a.csv",
        b"step,loss\n1,2\n2,2\n3,2\n9000000,2\n",
        "its 4 steps, 1 to 9000000, do not lie on a regular grid",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_log_is_refused_in_one_line(name: str, tmp_path: Path, capsys: Out) -> None:
    file, data, reason = BAD[name]
    path = raw_bytes(tmp_path / "in" / file, data)
    first, last = refused(tmp_path, capsys, path).splitlines()
    assert first.startswith(f"error: ingest: {path}: {reason}") and "no log could be used" in last
    assert path.read_bytes() == data


def test_a_folder_without_a_log_and_a_path_that_is_not_there(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "in").mkdir()
    plain(tmp_path / "in" / "data.csv", "text,label\nhello,1\n")
    assert "holds no training log (looked for trainer_state.json," in refused(tmp_path, capsys, tmp_path / "in")
    assert "does not exist" in refused(tmp_path, capsys, tmp_path / "nowhere")


def test_the_good_logs_come_in_beside_a_bad_one(tmp_path: Path, capsys: Out) -> None:
    logs.trainer_state(tmp_path / "in" / "good", logs.history(logs.norms(60)))
    plain(tmp_path / "in" / "bad" / "trainer_state.json", "{")
    study = take(tmp_path, tmp_path / "in", code=3)
    assert study.trials["case"].tolist() == ["good"]
    assert f"error: ingest: {tmp_path / 'in' / 'bad' / 'trainer_state.json'}: is not JSON" in capsys.readouterr().err


def test_damaged_lines_are_counted_and_the_rest_is_kept(tmp_path: Path, capsys: Out) -> None:
    path = logs.jsonl(tmp_path / "a.jsonl", [{"step": i, "loss": 2.0, "grad_norm": 1.0} for i in range(40)])
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = '{"step": 5, "loss": 2.0, "grad_norm": NaN}\n'
    lines[7] = "{broken\n"
    lines[9] = '{"step": 9, "loss": 1' + "0" * 400 + ', "grad_norm": 1.0}\n'
    lines[11] = '{"step": 1e300, "loss": 2.0}\n'
    lines[13] = '{"step": 13, "loss": "Infinity", "grad_norm": true}\n'
    path.write_bytes("".join(lines).encode()[:-9] + b"\xff\xfe")
    refused(tmp_path, capsys, path)  # more than one row in a hundred
    study = take(tmp_path, path, more=("--allow-loss",))
    assert only(study)[1].left_out == {
        "torn last line": 1,
        "lines that are not JSON objects": 1,
        "values that are not numbers": 2,
        "without a step": 1,
    }
    loss, norm = series(study, "loss"), series(study, "grad_norm")
    assert len(loss) == 39 and [i for i, v in enumerate(loss) if v is None] == [7, 9, 11] and loss[13] == math.inf
    assert norm[5] is not None and math.isnan(norm[5]) and norm[13] is None and norm[9] == 1.0
    assert only(study)[0]["nonfinite_steps"] == 2


def test_a_csv_cut_in_its_last_line(tmp_path: Path) -> None:
    text = "step,loss,grad_norm\n" + "".join(f"{i},2.0,1.5\n" for i in range(30)) + "30,2."
    study = take(tmp_path, plain(tmp_path / "a.csv", text))
    assert len(series(study, "loss")) == 30
    assert only(study)[1].left_out == {"rows with more or fewer fields than columns": 1}


@pytest.mark.parametrize("cut", range(0, 400, 23))
def test_a_log_cut_anywhere_gives_its_whole_lines(cut: int, tmp_path: Path) -> None:
    path = logs.jsonl(tmp_path / "a.jsonl", [{"step": i, "loss": 2.0, "grad_norm": 1.0} for i in range(20)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - cut])
    whole = path.read_bytes().count(b"}")
    assert len(series(take(tmp_path, path), "loss")) == whole


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, put in or taken out."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 10])):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found = found[:at]
        elif kind == 2:
            found[at:at] = rng.choice(
                [b"NaN", b"1e999", b'"', b"{", b"9" * 5000, b"\n", b"\0", b"null", b"[[", b"\xff"]
            )
        else:
            del found[at : at + rng.randrange(1, 20)]
    return bytes(found)


@pytest.mark.parametrize("name", ["trainer_state.json", "trainer_log.jsonl", "metrics.jsonl", "a.csv", "a.parquet"])
def test_mutated_files_end_in_a_code_of_ours(name: str, tmp_path: Path, capsys: Out) -> None:
    folder = tmp_path / "run"
    rows = logs.history(logs.norms(20))
    logs.trainer_state(folder, rows)
    logs.trainer_log(folder, rows)
    logs.lingua(folder, logs.norms(20), config="optim: {lr: 1e-3, clip: 1.0}\n")
    frame = pd.DataFrame({"step": range(20), "loss": logs.losses(20), "grad_norm": logs.norms(20)})
    frame.to_csv(folder / "a.csv", index=False)
    frame.to_parquet(folder / "a.parquet")
    data, settings = (folder / name).read_bytes(), (folder / "config.yaml").read_bytes()
    rng = random.Random(name)
    codes = set()
    for i in range(40):
        changed = mutated(data, rng)
        (folder / name).write_bytes(changed)
        (folder / "config.yaml").write_bytes(mutated(settings, rng))
        target = tmp_path / f"results{i}"
        codes.add(code := ingest.main([str(folder / name), "--study", "s", "--results-dir", str(target)]))
        assert target.exists() == (code == 0) and (folder / name).read_bytes() == changed
        assert code or not Study.load(target / "s").damaged
    assert codes == {0, 2} and "Traceback" not in capsys.readouterr().err


# steps


def points_of(steps: list[int], raw: Raw | None = None) -> Grid:
    raw = raw or Raw("table")
    raw.points = [Point(s, float(i)) for i, s in enumerate(steps)]
    return on_grid(settle(raw), raw)


def values(grid: Grid) -> list[float | None]:
    return [p.loss for p in grid.points]


def test_strides_by_hand() -> None:
    assert points_of([10, 20, 30]) == Grid(10, 10, [Point(10, 0.0), Point(20, 1.0), Point(30, 2.0)])
    assert (points_of([7]).first_step, points_of([7]).stride) == (7, 1)
    gap = points_of([10, 20, 50])
    assert (gap.stride, values(gap), gap.last_step) == (10, [0.0, 1.0, None, None, 2.0], 50)


def test_rows_beside_the_stride_move_to_it_and_are_told() -> None:
    raw = Raw("table")
    grid = points_of([1, 10, 20, 30, 40, 43], raw)  # logging_first_step, and a last row
    assert (grid.first_step, grid.stride, values(grid)) == (0, 10, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert "1 rows between its steps (1) stand at the nearest one" in raw.notes[0]
    assert raw.left_out == {"between the steps of the stride of 10": 1}


def test_a_restart_leaves_out_what_it_wrote_again() -> None:
    raw = Raw("table")
    grid = points_of([10, 20, 30, 40, 50, 30, 40], raw)  # from the checkpoint at 20; it never came back to 50
    assert (values(grid), grid.last_step) == ([0.0, 1.0, 5.0, 6.0], 40)
    assert raw.left_out == {"written again after a restart": 3} and raw.notes == [
        "1 restart: of repeated steps the last is kept"
    ]


def test_steps_within_epochs_are_asked_about() -> None:
    raw = Raw("table")
    assert values(points_of([0, 1, 2, 0, 1, 2, 0, 1, 2], raw)) == [6.0, 7.0, 8.0]
    assert raw.notes[1] == "steps returned to the first one 2 times: do they count within an epoch?"


def test_steps_that_go_back_without_repeating_are_sorted() -> None:
    raw = Raw("table")
    assert values(points_of([30, 20, 10], raw)) == [2.0, 1.0, 0.0]
    assert raw.notes == ["steps went backwards 2 times and were sorted"] and not raw.left_out


@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
@example([0, 1, 60])  # no grid
def test_any_steps_give_a_grid_or_one_line(steps: list[int]) -> None:
    raw = Raw("table")
    try:
        grid = points_of(steps, raw)
    except LogError as error:
        assert "do not lie on a regular grid" in str(error)
        return
    kept = [p for p in grid.points if p.step >= 0]
    assert len(kept) + sum(raw.left_out.values()) == len(steps)  # each row is kept or counted
    for place, point in enumerate(grid.points):
        at = grid.first_step + place * grid.stride
        assert point.step < 0 or 2 * abs(point.step - at) <= grid.stride or place == 0


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(2, 40))
def test_a_regular_log_is_kept_as_it_is(first: int, stride: int, n: int) -> None:
    raw = Raw("table")
    grid = points_of([first + stride * i for i in range(n)], raw)
    assert (grid.first_step, grid.stride, values(grid)) == (first, stride, [float(i) for i in range(n)])
    assert not raw.left_out and not raw.notes


@pytest.mark.parametrize(
    ("value", "step"),
    [(3, 3), (3.0, 3), ("3", 3), ("1e3", 1000), (3.5, None), (-1, None), (True, None), (None, None), (math.nan, None),
     (10**30, None), ("x", None), (math.inf, None), ([1], None)],
)  # fmt: skip
def test_what_a_step_is(value: object, step: int | None) -> None:
    assert log_values.whole(value) == step


# strides in the tables


def test_spikes_of_a_strided_log_lie_at_the_steps_of_its_source(tmp_path: Path) -> None:
    path = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(100, {70: 10.0, 71: 10.0}), stride=25))
    study = take(tmp_path, path)
    row, _ = only(study)
    (spike,) = study.spikes.to_dict("records")
    assert (spike["start"], spike["end"], spike["duration"], spike["flag_steps"]) == (71 * 25, 72 * 25, None, 2)
    assert spike["class"] is None and spike["in_warmup"] is None
    assert (row["spike_first_step"], row["grad_norm_argmax"] in (71 * 25, 72 * 25)) == (71 * 25, True)
    assert row["spike_rate"] == 2 / row["n_evaluable"]  # per logged row
    assert (row["steps_done"], row["spike_narrow"], row["approximate"]) == (2500, None, True)


def test_our_own_trials_have_stride_one(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,)))
    (row,) = study.tables.trials
    assert (row["log_stride"], row["log_format"], row["approximate"]) == (1, None, False) and not study.ingested


# settings


def args(folder: Path, **values: object) -> Path:
    return plain(folder / "training_args.json", json.dumps(values))


def test_settings_are_known_or_null(tmp_path: Path) -> None:
    args(tmp_path, learning_rate=5e-5, max_grad_norm=1.0, warmup_ratio=0.1, warmup_steps=0, weight_decay=0, seed=7,
         adam_beta2=0.999, adam_epsilon=1e-8, bf16=True, fp16=False, per_device_train_batch_size=4,
         gradient_accumulation_steps=8, lr_scheduler_type="cosine", output_dir="x", hub_token="hf_abcdefg")  # fmt: skip
    plain(tmp_path / "config.json", json.dumps({"num_hidden_layers": 12, "hidden_size": 768}))
    found = run_settings.from_files(tmp_path, steps_planned=95)
    assert found.known == {
        "optim.lr": 5e-5, "optim.clip": 1.0, "optim.clip_kind": "norm", "optim.warmup_steps": 10, "seed": 7,
        "optim.weight_decay": 0.0, "optim.beta2": 0.999, "optim.eps": 1e-8, "train.precision": "bf16",
        "model.depth": 12, "model.dim": 768,
    }  # fmt: skip
    assert "train.batch_size" not in found.known  # how many devices there were, nobody says
    assert found.others["lr_scheduler_type"] == "cosine" and "output_dir" not in found.others
    assert "hf_abc" not in str(found)


@pytest.mark.parametrize(
    ("values", "name", "known"),
    [
        ({"max_grad_norm": 0.0}, "optim.clip", None),
        ({"max_grad_norm": 0.5}, "optim.clip", 0.5),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "world_size": 2}, "train.batch_size", 64),
        ({"warmup_steps": 0.03, "max_steps": 5}, "optim.warmup_steps", 3),
        ({"warmup_steps": 500}, "optim.warmup_steps", 500),
        ({"fp16": True}, "train.precision", "fp16"),
    ],
)
def test_a_setting_follows(values: dict[str, object], name: str, known: object, tmp_path: Path) -> None:
    args(tmp_path, **values)
    found = run_settings.from_files(tmp_path, steps_planned=100).known
    assert name in found and found[name] == known


@pytest.mark.parametrize(
    ("values", "name"),
    [({"learning_rate": "fast"}, "optim.lr"), ({"learning_rate": 99.0}, "optim.lr"), ({}, "optim.clip"),
     ({"bf16": False, "fp16": False}, "train.precision"), ({"num_hidden_layers": 0}, "model.depth"),
     ({"warmup_ratio": None}, "optim.warmup_steps"), ({"seed": True}, "seed")],
)  # fmt: skip
def test_a_setting_stays_unknown(values: dict[str, object], name: str, tmp_path: Path) -> None:
    args(tmp_path, **values)
    assert name not in run_settings.from_files(tmp_path, steps_planned=100).known


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2", "x: !!python/object:os.system {}", "", "- 1", "a: \x00"])
def test_settings_that_cannot_be_read_cost_the_settings_alone(text: str, tmp_path: Path) -> None:
    logs.lingua(tmp_path / "run", logs.norms(60), config=text)
    row, log = only(take(tmp_path, tmp_path))
    assert row["optim.lr"] is None and row["steps_done"] == 60
    assert "settings in config.yaml left unknown" in log.notes[0]


def test_nothing_is_interpolated_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THIS_MACHINE", "3e-3")
    config = "optim: {lr: '${oc.env:SECRET_OF_THIS_MACHINE}'}\n"
    logs.lingua(tmp_path / "run", logs.norms(60), config=config)
    assert only(take(tmp_path, tmp_path))[0]["optim.lr"] is None


@pytest.mark.usefixtures("undrawn")
def test_axes_are_what_is_known_of_every_run(tmp_path: Path) -> None:
    for i, (lr, scheduler) in enumerate([(1e-4, "cosine"), (3e-4, "cosine"), (1e-3, "linear")]):
        logs.trainer_state(tmp_path / "in" / f"run{i}", logs.history(logs.norms(60, seed=i)))
        more = {"weight_decay": 0.1} if i else {}  # of run0 it is not known: no axis
        args(tmp_path / "in" / f"run{i}", learning_rate=lr, lr_scheduler_type=scheduler, num_epochs=3, **more)
    study = take(tmp_path, tmp_path / "in")
    assert study.axes == {"optim.lr": [1e-4, 3e-4, 1e-3], "external.lr_scheduler_type": ["cosine", "linear"]}
    assert study.describe(study.trials.index[study.trials["case"] == "run2"][0]) == (
        "run run2, learning rate 1e-3, external.lr_scheduler_type linear"
    )
    assert report.main([str(study.folder.path)]) == 0
    columns = pq.read_table(study.folder.trials_table).column_names
    assert "external.lr_scheduler_type" in columns and "external.num_epochs" not in columns
    text = (study.folder.report / "report.md").read_text()
    assert "No paired comparison: runs trained elsewhere" in text and "p (Holm)" not in text and "One seed" not in text


@pytest.mark.usefixtures("undrawn")
def test_clipping_known_to_be_off_is_not_unknown(tmp_path: Path) -> None:
    for name, values in (("off", {"max_grad_norm": 0}), ("on", {"max_grad_norm": 1.0}), ("unsaid", {})):
        logs.trainer_state(tmp_path / "in" / name, logs.history(logs.norms(60, seed=len(name))))
        args(tmp_path / "in" / name, **values)
    study = take(tmp_path, tmp_path / "in")
    clips = dict(zip(study.trials["case"], study.tables.trials, strict=True))
    assert {name: row["optim.clip"] for name, row in clips.items()} == {"off": math.inf, "on": 1.0, "unsaid": None}
    assert {name: row["clip_share"] for name, row in clips.items()} == {"off": None, "on": 1.0, "unsaid": None}
    assert report.main([str(study.folder.path)]) == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--set", "optim.lrr=1"), "optim.lrr: is not a setting (did you mean optim.lr"),
        (("--set", "optim.lr=fast"), "must be a finite number"),
        (("--columns", "stepp=t"), "must be NAME=COLUMN with a NAME of step, loss, grad_norm, lr"),
        (("--columns", "step"), "must be NAME=COLUMN"),
        (("--study", "../../etc"), "must be 1-64 of"),
    ],
)
def test_bad_arguments(more: tuple[str, ...], reason: str, tmp_path: Path, capsys: Out) -> None:
    path = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    assert reason in refused(tmp_path, capsys, path, more=more)


# the study's folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_ingesting_again_adds_what_is_new_and_leaves_the_rest(tmp_path: Path, capsys: Out) -> None:
    first = logs.trainer_state(tmp_path / "in" / "a", logs.history(logs.norms(60)))
    study = take(tmp_path, tmp_path / "in")
    before = everything(study.folder.path / "trials")
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 trial (1 new) in ")
    logs.trainer_state(tmp_path / "in" / "b", logs.history(logs.norms(60, seed=1)))
    assert len(take(tmp_path, tmp_path / "in").trials) == 2
    assert "2 trials (1 new, 1 unchanged)" in capsys.readouterr().out
    assert before.items() <= everything(study.folder.path / "trials").items()
    args(first.parent, learning_rate=1e-4)
    assert take(tmp_path, tmp_path / "in").trials["optim.lr"].tolist().count(1e-4) == 1
    assert "2 trials (1 changed, 1 unchanged)" in capsys.readouterr().out


def test_a_log_that_has_grown_takes_the_place_of_its_shorter_self(tmp_path: Path, capsys: Out) -> None:
    grads = logs.norms(90)
    for n in (60, 90):
        logs.trainer_state(tmp_path / "run", logs.history(grads[:n]))
        study = take(tmp_path, tmp_path / "run")
        assert series(study, "grad_norm") == grads[:n]
    assert "1 trial (1 grown)" in capsys.readouterr().out
    logs.trainer_state(tmp_path / "run", logs.history(logs.norms(95, seed=1)))  # another training in the same folder
    assert len(take(tmp_path, tmp_path / "run").trials) == 2
    logs.trainer_state(tmp_path / "branch", logs.history([*grads, 2.0]))  # one that goes on from it under its own name
    assert len(take(tmp_path, tmp_path / "branch").trials) == 3


def test_one_log_at_two_places_is_one_trial(tmp_path: Path, capsys: Out) -> None:
    for name in ("a", "b"):
        logs.trainer_state(tmp_path / "in" / name, logs.history(logs.norms(60)))
    assert len(take(tmp_path, tmp_path / "in").trials) == 1
    assert "the same rows as" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for i, name in enumerate(("a", "b")):
        logs.trainer_state(tmp_path / "in" / name / "out", logs.history(logs.norms(60, seed=i)))
    assert sorted(take(tmp_path, tmp_path / "in").trials["case"]) == ["a/out", "b/out"]


def test_a_sweeps_folder_is_refused(tmp_path: Path, capsys: Out) -> None:
    path = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    planted.plant_study(tmp_path / "results" / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    before = everything(tmp_path / "results")
    assert ingest.main([str(path), "--study", "s", "--results-dir", str(tmp_path / "results")]) == 2
    assert "holds the study of a sweep" in capsys.readouterr().err and everything(tmp_path / "results") == before


def test_the_status_of_an_ingested_study_says_where_it_is_judged(tmp_path: Path, capsys: Out) -> None:
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60))))
    planted.plant_study(tmp_path / "results" / "trained", depths=(2,), lrs=(1e-3,), seeds=(0,))
    last = []
    for folder in (study.folder.path, tmp_path / "results" / "trained"):
        assert cli.main(["status", str(folder)]) == 0
        last.append(capsys.readouterr().out.splitlines()[-1])
    assert last[0].endswith(f"are judged in the report: python -m stabstudy.report {study.folder.path}")
    assert last[1].startswith("trained: 1 trial: 1 done")


def test_a_sweep_does_not_train_into_an_ingested_study(tmp_path: Path, capsys: Out) -> None:
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60))))
    before = everything(study.folder.path)
    assert sweep.main(["study=s", f"results_dir={tmp_path / 'results'}", "--dry-run"]) == 2
    assert "is not a study of this program: it holds trials but no sweep.yaml" in capsys.readouterr().err
    assert everything(study.folder.path) == before


@pytest.mark.parametrize("kind", ["file", "stranger", "link"])
def test_a_folder_that_is_no_study_is_refused(kind: str, tmp_path: Path, capsys: Out) -> None:
    path = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    target = tmp_path / "results" / "s"
    target.parent.mkdir()
    if kind == "file":
        target.write_text("")
    elif kind == "link":
        target.symlink_to(tmp_path / "run")
    else:
        plain(target / "thesis.tex", "")
    assert ingest.main([str(path), "--study", "s", "--results-dir", str(tmp_path / "results")]) == 2
    assert str(target) in capsys.readouterr().err


def test_a_locked_study_and_a_folder_that_cannot_be_written(tmp_path: Path, capsys: Out) -> None:

    path = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    study = take(tmp_path, path)
    with disk.lock(study.folder.path):
        assert ingest.main([str(path), "--study", "s", "--results-dir", str(tmp_path / "results")]) == 4
    assert "locked by" in capsys.readouterr().err
    plain(tmp_path / "no", "")
    assert ingest.main([str(path), "--study", "s", "--results-dir", str(tmp_path / "no" / "deep")]) == 4


def test_a_block_that_we_did_not_write_is_damage(tmp_path: Path) -> None:
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60))))
    (config,) = study.folder.path.glob("trials/*/config.json")
    good = json.loads(config.read_text())
    for key, value in (
        ("stride", 0), ("stride", "10"), ("format", "x"), ("settings", []), ("first_step", -1), ("others", {"a": []}),
        ("settings", {"optim.lr": "fast"}), ("settings", {"optim.lrr": 1.0}), ("steps_planned", 10**30),
    ):  # fmt: skip
        write_sealed(config, good | {"external": good["external"] | {key: value}})
        (damaged,) = Study.load(study.folder.path).damaged
        assert "external" in damaged.reason
    write_sealed(config, good | {"external": {}})
    assert Study.load(study.folder.path).damaged
    config.write_text(json.dumps(good | {"external": good["external"] | {"run": "another"}}))
    assert "was changed since" in Study.load(study.folder.path).damaged[0].reason
    with pytest.raises(StoreError):
        Study.load(tmp_path / "nowhere")


@pytest.mark.parametrize("link", ["trials", "provenance.json", "trial", "state.json"])
def test_nothing_is_written_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str], link: str) -> None:
    log = logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    study = take(tmp_path, log)
    (trial,) = study.folder.trials()
    trial.state_file.write_text("{}")
    path = {"trial": trial.path, "state.json": trial.state_file}.get(link, study.folder.path / link)
    outside = path.rename(tmp_path / "outside")
    path.symlink_to(outside)
    before = {p: p.read_bytes() for p in (outside, *outside.rglob("*")) if p.is_file()}
    capsys.readouterr()
    arguments = [str(log), "--study", study.folder.name, "--results-dir", str(study.folder.path.parent)]
    assert ingest.main(arguments) == 4
    assert capsys.readouterr().err == f"error: ingest: {path}: is a symbolic link\n"
    assert {p: p.read_bytes() for p in (outside, *outside.rglob("*")) if p.is_file()} == before


# the report


@pytest.mark.usefixtures("undrawn")
def test_runs_at_different_strides_are_in_no_figure_together(tmp_path: Path) -> None:
    for i, stride in enumerate((1, 10)):
        logs.trainer_state(tmp_path / "in" / f"r{i}", logs.history(logs.norms(80, seed=i), stride))
        args(tmp_path / "in" / f"r{i}", learning_rate=10.0**-i)
    study = take(tmp_path, tmp_path / "in")
    assert report.main([str(study.folder.path)]) == 0
    text = (study.folder.report / "report.md").read_text()
    assert (
        "Logging intervals differ (1 and 10 steps)" in text
        and "| Every figure over settings | the runs were logged at different strides" in text
    )
    assert {p.stem for p in (study.folder.report / "figures").iterdir()} == {"first-traces", "traces"}


@pytest.mark.usefixtures("undrawn")
def test_what_a_log_does_not_tell_is_a_dash_in_the_report(tmp_path: Path) -> None:
    norms = logs.norms(200, seed=0)
    norms[150] = 80.0
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", logs.history(norms, stride=10)))
    assert report.main([str(study.folder.path)]) == 0
    text = (study.folder.report / "report.md").read_text()
    (spike,) = (line for line in text.splitlines() if "| run run | 1510 | 80 |" in line)
    assert spike.endswith("| – | – | both | – | – | none |")  # duration, class, batch and warmup are not known


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_a_log_without_norms(tmp_path: Path) -> None:
    rows = logs.history([None] * 80)
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", rows))
    assert report.main([str(study.folder.path)]) == 0
    text = (study.folder.report / "report.md").read_text()
    assert (
        "1 run without a gradient norm: only the loss was judged." in text and "no gradient norm in 800 steps" in text
    )


def test_the_report_repeats_itself_and_survives_a_move(tmp_path: Path) -> None:
    study = take(tmp_path, logs.trainer_state(tmp_path / "run", logs.history(logs.norms(80, {60: 9.0}))))
    assert report.main([str(study.folder.path)]) == 0
    before = everything(study.folder.report)
    (tmp_path / "moved").mkdir()
    moved = study.folder.path.rename(tmp_path / "moved" / "s")
    assert report.main([str(moved)]) == 0
    assert everything(moved / "report") == before


def test_hostile_names_are_escaped(tmp_path: Path, capsys: Out) -> None:
    name = "<script>alert(1)</script>\x1b[31m"
    frame = pd.DataFrame({"step": range(60), "loss": logs.losses(60), "grad_norm": logs.norms(60)})
    folder = tmp_path / "in" / name.replace("/", "")
    folder.mkdir(parents=True)
    logs.trainer_state(folder, logs.history(logs.norms(60)))
    args(folder, **{"<img src=x>": 1})
    frame.to_csv(tmp_path / "in" / "=cmd.csv", index=False)
    study = take(tmp_path, tmp_path / "in")
    assert report.main([str(study.folder.path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    page = (study.folder.report / "index.html").read_text()
    assert "<script>alert" not in page and "<img src=x>" not in page and "\x1b" not in page
    assert page.count("<script>") == 1  # our own, which the policy names by its hash


# the command


def test_help_and_errors_wait_for_no_library(tmp_path: Path) -> None:
    code = (
        "import sys; from stabstudy.ingest import main\n"
        f"assert main([{str(tmp_path)!r}, '--study', 's']) == 2\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'pandas', 'matplotlib', 'scipy', 'pyarrow', 'omegaconf', 'torch', 'ray', 'hydra', 'tensorboard'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["x"], 2), (["--nonsense"], 2), (["--help"], 0)])
def test_usage(arguments: list[str], code: int, capsys: Out) -> None:
    assert ingest.main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ingest: ") for line in lines) and len(lines) == (code != 0)


def test_as_a_module_whose_reader_leaves_early(tmp_path: Path) -> None:
    logs.trainer_state(tmp_path / "run", logs.history(logs.norms(60)))
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "stabstudy.ingest", str(tmp_path / "run"), "--study", "s"]
    done = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, timeout=60, cwd=tmp_path
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "results" / "s" / "provenance.json").is_file()


def test_the_reader_of_states_takes_any_json(tmp_path: Path) -> None:
    rows = [3, None, {"step": "10", "loss": "2.5", "grad_norm": "NaN"}, {"step": 20, "loss": 0.0, "grad_norm": None}]
    raw = readers.read_state(plain(tmp_path / "a.json", json.dumps({"log_history": rows, "max_steps": "many"})))
    assert raw.left_out["rows that are not objects"] == 2 and raw.steps_planned is None
    assert [p.step for p in raw.points] == [10, 20] and math.isnan(raw.points[0].grad_norm or 0)

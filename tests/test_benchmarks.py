"""Benchmarks run their smallest shapes here, so that they are whole where a device or an hour is at hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from stabstudy import live
from stabstudy.encodings import Table
from stabstudy.stability.detectors import jump
from stabstudy.stability.rules import Rules
from stabstudy.trace import PROBES, TRACE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the scripts is where they import one another from."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_instrument_is_measured(benchmark_scripts: None, capsys: pytest.CaptureFixture[str]) -> None:
    import instrument  # type: ignore[import-not-found]

    found = instrument.measure(traces=2, steps=160)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == [*found, "summarise over read"]
    assert all(us > 0 for us in found.values()) and {"read", "summarise"} < set(found)


def test_the_rule_in_pandas_is_the_rule(benchmark_scripts: None) -> None:
    import instrument

    rng = np.random.default_rng(0)
    norm, loss = np.exp(0.25 * rng.standard_normal(600)), 2.5 + 0.05 * rng.standard_normal(600)
    norm[[50, 300]], loss[[90, 400]] = 20, 4
    grad, lost = (jump(x, Rules(), series) for x, series in ((norm, "grad"), (loss, "loss")))
    answers = [np.asarray(flags)[12:] for flags in instrument.by_pandas(norm, loss)]
    for answer, right in zip(answers, (grad.surprise, lost.surprise, grad.absolute), strict=True):
        assert answer.tolist() == right[12:].tolist() and answer.any()


def test_recording_is_measured(benchmark_scripts: None, capsys: pytest.CaptureFixture[str]) -> None:
    import recording  # type: ignore[import-not-found]

    found = recording.measure(trials=3, steps=70, depth=2, rounds=1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["part"] for line in lines] == ["judge", "write", "compact", "verdict", "sum"] == list(found)
    assert found["sum"] == pytest.approx(sum(us for part, us in found.items() if part != "sum"))


def test_what_recording_plants_is_recorded(benchmark_scripts: None, tmp_path: Path) -> None:
    import recording
    import trainer  # type: ignore[import-not-found]

    configs = [recording.config(seed, 70, 2) for seed in range(3)]
    layers = np.repeat(np.arange(4), [1, 6, 6, 2])
    recorder = trainer.recorder_of(configs, [tmp_path / str(k) for k in range(3)], recording.COLUMNS, layers)
    norms = []
    for ticks, taken in recording.planted(configs):
        recorder.judge(range(3), ticks, taken, 0.1)
        recorder.write()
        norms.append(taken.steps[..., recording.COLUMNS.index("grad_norm")])
    for member in recorder.members:
        member.trace.close()
        member.probes.close()
    for k in range(3):
        rows = live.read(tmp_path / str(k) / "trace.live", TRACE)
        assert rows["grad_norm"].tolist() == np.concatenate(norms)[:, k].tolist()
        assert live.read(tmp_path / str(k) / "probes.live", PROBES)["step"].tolist() == list(range(10, 70, 10))


def test_recording_changes_no_bit_of_the_training(benchmark_scripts: None) -> None:
    import throughput  # type: ignore[import-not-found]

    shape = throughput.TINY["tiny"]
    ours, bare = throughput.ours(shape), throughput.bare(shape)
    for _ in range(2):
        recorded, plain = ours().losses, bare().losses
        assert recorded == plain and len(set(recorded)) == throughput.WARM + shape.steps


def test_a_recorder_that_does_nothing_leaves_the_training_alone(
    benchmark_scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu  # type: ignore[import-not-found]
    import gpu_parts  # type: ignore[import-not-found]

    blocks: dict[str, list[Table]] = {"on": [], "whole": []}
    append = live.Writer.append

    def kept(writer: live.Writer, block: Table, urgent: bool = False) -> None:
        if writer.path.match("0/trace.live"):
            blocks["whole" if "whole" in writer.path.parts else "on"].append(block.copy())
        append(writer, block, urgent)

    monkeypatch.setattr(live.Writer, "append", kept)
    place, shape = gpu_parts.Place("cpu", tmp_path, compiled=False, rings=2, ring=4), gpu.TINY.packs["tiny"]
    segments = gpu_parts.recording(shape, 2, place, deterministic=False)
    _, whole = gpu_parts.own_loop(shape, 2, place, deterministic=False, name="whole")
    assert [name.split(",")[0] for name in segments] == ["on", "off", "no probes"]
    for segment in segments.values():
        segment()
        whole()
    on, all_rows = (np.concatenate(blocks[name]) for name in ("on", "whole"))
    assert on["step"].tolist() == [*range(8), *range(16, 24)]
    assert on["loss"].tolist() == all_rows["loss"][on["step"]].tolist()


def test_a_large_trial_is_measured_beside_a_rival(benchmark_scripts: None, tmp_path: Path) -> None:
    import gpu
    import gpu_parts

    shape, _, rings = gpu.TINY.large["one_trial"]
    place = gpu_parts.Place("cpu", tmp_path, compiled=False, rings=rings, ring=2)
    for segments in (gpu_parts.ours(shape, place, False), gpu_parts.rival("hf", shape, place, False, None)):
        for segment in segments.values():
            segment()


def test_figures_without_time_are_named(benchmark_scripts: None) -> None:
    import gpu

    bench = gpu.measure(gpu.TINY, 0.0, [], None)
    assert bench.skipped == list(gpu.FIGURES) and not bench.lines
    assert gpu.table(bench).endswith(f"left out: {', '.join(gpu.FIGURES)}")


@pytest.mark.slow
@pytest.mark.whole  # the benchmark itself, at its tiny shape, runs with the others
def test_a_soak_looks_at_the_launch_and_what_it_leaves(
    benchmark_scripts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import soak  # type: ignore[import-not-found]

    last = soak.measure(trials=8, launcher="local", every=0.1)
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert last["trials"] == 8 and last["left_files"] == last["left_processes"] == 0
    assert len(looks) > 2 and looks[-1]["driver_mb"] > 50 and looks[-1]["driver_handles"] > 2
    assert {f"{name}_per_1000" for name in soak.GROWING} < set(last)


def test_growth_is_per_thousand_trials(benchmark_scripts: None) -> None:
    import soak

    flat = soak.Look(0, 0, 300, 9, 200, 9, 2, 400, 20, 5, 50, 1)
    looks = [dataclasses.replace(flat, done=10 * i, driver_mb=300 + 0.5 * i, workers=2) for i in range(100)]
    grown = soak.growth(looks)
    assert grown["driver_mb_per_1000"] == pytest.approx(50) and grown["workers_per_1000"] == 0


def test_early_stopping_is_measured(benchmark_scripts: None, capsys: pytest.CaptureFixture[str]) -> None:
    import early_stop  # type: ignore[import-not-found]

    lines = early_stop.measure(list(early_stop.synthetic()))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    chosen, whole = lines[len(early_stop.LIMITS)], lines[-1]
    assert (chosen["part"], chosen["data"], whole["trials"], whole["verdicts"]) == ("calibration", "synthetic", 24, 24)
    ended = [line["ended"] for line in lines[: len(early_stop.LIMITS)]]
    assert ended == sorted(ended, reverse=True) and ended[0] > ended[-1], "a higher limit ends fewer"
    assert whole["ended within .2 nat"] == 0 < whole["ended"] <= whole["hopeless"]
    assert 0 < whole["steps saved"] < whole["steps of hopeless trials saved"] < 0.8


def test_a_replay_sees_what_a_launch_would(benchmark_scripts: None) -> None:
    """The signs at a check are those of the first rows alone: what comes later is changed and changes nothing."""
    import early_stop

    trial = next(t for t in early_stop.synthetic() if t.lr > 0.05)
    (one,) = early_stop.replay([trial])
    rows = dataclasses.replace(trial.rows, columns={n: c.copy() for n, c in trial.rows.columns.items()})
    rows.columns["grad_norm"][150:], rows.columns["loss"][150:] = 1.0, 9.0
    (other,) = early_stop.replay([dataclasses.replace(trial, rows=rows)])
    assert one.signs == other.signs and [n for n, _ in one.signs] == [48, 72, 96, 144]
    assert one.ended_at(0.2) is not None


def test_ways_to_search_are_measured(benchmark_scripts: None, tmp_path: Path) -> None:
    import search  # type: ignore[import-not-found]

    ways = search.ways()
    rows = [
        search.summary(name, 0.02, [search.search(ways[name], 0.02, 0)]) for name in ("cost", "packs", "dense grid")
    ]
    assert [row["trials"] for row in rows][2] == 96 and rows[0]["trials"] < 15 and rows[1]["rounds"] == 2
    assert [search.broken(row) for row in rows] == [[], [], []]
    assert search.broken(rows[0] | {"share": 0.121, "coverage": 0.84}) == [
        "cost at a width of 0.02 decades: 12.1% of the dense grid's trials, at most 12% allowed",
        "cost at a width of 0.02 decades: intervals cover 84.0%, at least 85% wanted",
    ]
    assert len(search.markdown(rows).splitlines()) == 5


def test_a_search_among_recorded_trials_agrees_with_all_of_them(benchmark_scripts: None, tmp_path: Path) -> None:
    import search

    lines, rates = (
        ["depth,lr,seed,verdict,verdict_reason,verdict_code,init_loss,final_loss,steps"],
        np.geomspace(1e-3, 1, 24),
    )
    for depth, rate, seed in itertools.product((2, 4), rates, range(4)):
        x = np.log10(rate)
        word = "rough" if x > -0.6 - depth / 20 else "stable" if x > -2.5 else ""
        code, loss = ("nonfinite", "nan") if x > -0.1 else ("ok", f"{2 + 0.3 * (x + 1.5) ** 2}")
        reason = "" if word else "untrained"
        lines.append(f"{depth},{rate},{seed},{'diverged' if code != 'ok' else word},{reason},{code},5.5,{loss},150")
    path = tmp_path / "grid.csv"
    path.write_text("\n".join(lines))
    results = search.recorded(path)
    assert [(r.rule, r.depth) for r in results] == [("stable", 2), ("stable", 4), ("works", 2), ("works", 4)]
    assert all(r.status == "resolved" and r.trials < 25 and r.steps == r.trials / 96 for r in results)
    assert all(max(r.interval[0], r.dense[0]) < min(r.interval[1], r.dense[1]) for r in results)
    assert len(search.recorded_markdown(results).splitlines()) == 6

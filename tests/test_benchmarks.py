"""Benchmarks run their smallest shapes here, so that they are whole where a device or an hour is at hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from stabstudy.stability.detectors import jump
from stabstudy.stability.rules import Rules

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu  # type: ignore[import-not-found]

    return gpu


def test_the_instrument_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import instrument  # type: ignore[import-not-found]

    found = instrument.measure(traces=2, steps=160)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["what"] for line in lines] == [*found, "summarise over read"]
    assert all(us > 0 for us in found.values()) and {"read", "summarise"} < set(found)


def test_recording_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import recording  # type: ignore[import-not-found]

    figures = recording.encode_and_write(K=3, steps=70, depth=2)
    assert list(figures) == ["encode", "write", "compact", "compact_probes", "sync"]
    assert all(us >= 0 for us in figures.values()) and figures["compact"] > 0


def test_the_rule_in_pandas_is_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import instrument

    rng = np.random.default_rng(0)
    norm, loss = np.exp(0.25 * rng.standard_normal(600)), 2.5 + 0.05 * rng.standard_normal(600)
    norm[[50, 300]], loss[[90, 400]] = 20, 4
    grad, lost = (jump(x, Rules(), series) for x, series in ((norm, "grad"), (loss, "loss")))
    answers = [np.asarray(flags)[12:] for flags in instrument.by_pandas(norm, loss)]
    for answer, right in zip(answers, (grad.surprise, lost.surprise, grad.absolute), strict=True):
        assert answer.tolist() == right[12:].tolist() and answer.any()


def test_every_rival_is_measured_on_a_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)  # the compiler has a test of its own
    line = gpu.measure("tiny", CPU, steps=2, rounds=1, checkout=None)
    assert set(line["rivals"]) == {"eager", "compile", "eager_bare", "hf_loop"}
    assert all(found["tokens_per_s"] > 0 for found in line["rivals"].values())


def test_graph_mode_needs_a_device(gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.ours(gpu.SHAPES["tiny"], CPU, "graph", True)

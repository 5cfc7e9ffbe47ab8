"""Tiny trials in folders as a launch writes them, for tests of whole trials and packs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabstudy import config as cfg
from stabstudy import store, trace
from stabstudy.config import DataConfig, ModelConfig, OptimConfig, SyntheticConfig, TrainConfig, TrialConfig
from stabstudy.data import sources
from stabstudy.training.driver import HostFeed
from stabstudy.training.step import Stepper

DATA = DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=16)
BASE = TrialConfig(
    model=ModelConfig(depth=2, dim=16, n_heads=2),
    optim=OptimConfig(lr=3e-3, warmup_steps=3),
    data=DATA,
    train=TrainConfig(
        steps=12,
        batch_size=4,
        probe_every=5,
        eval_every=6,
        checkpoint_every=4,
        eval_sequences=6,
        final_eval_tokens=1600,
    ),
)
"""Beware: by default the first and the last loss take two fifths of the time of so short a trial."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tmp_path: Path, cache: Path) -> Callable[..., store.TrialFolder]:
    """Writes a trial's config.json as a launch would."""

    def folder(config: TrialConfig, name: str = "study") -> store.TrialFolder:
        fingerprint = sources.fingerprint(config.data)
        trial_id = cfg.trial_id(config, fingerprint)
        made = store.StudyFolder(tmp_path / name).trial(trial_id)
        made.path.mkdir(parents=True)
        body = {"format": cfg.FORMAT_VERSION, "trial_id": trial_id, "cell_id": cfg.cell_id(config, fingerprint)}
        body |= {"config": cfg.to_dict(config), "choices": {}, "case": None, "data_fingerprint": fingerprint}
        store.write_json(made.config_file, body)
        return made

    return folder


Make = Callable[..., store.TrialFolder]


def vary(**groups: dict[str, Any]) -> TrialConfig:
    changed = {g: dataclasses.replace(getattr(BASE, g), **v) for g, v in groups.items()}
    return dataclasses.replace(BASE, **changed)


def records(folder: store.TrialFolder) -> tuple[trace.Rows, trace.Rows]:
    rows, probes = folder.rows(trace.TRACE), folder.rows(trace.PROBES)
    assert rows is not None and probes is not None
    return rows, probes


def assert_same(a: trace.Rows, b: trace.Rows, first: int | None = None) -> None:
    """Bitwise equal but for the timing; of a, where `first` says so, only so many rows."""
    n = len(a) if first is None else first
    assert n == len(b)
    for name in a.schema.names:
        if name != "seconds":
            assert np.array_equal(a.is_null(name)[:n], b.is_null(name)), name
            same = a[name][:n].tolist() == b[name].tolist() if a[name].dtype == object else None
            assert same if same is not None else np.array_equal(a[name][:n], b[name], equal_nan=True), name


class Crash(Exception):
    pass


def at_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Stepper, int], None]) -> None:
    """Call act(stepper, step) after the gradients of each step are there, of a pack that begins with step 0."""
    windows, accumulate, now = HostFeed.windows, Stepper.accumulate, [0]

    def told(self: HostFeed, tick: int) -> Any:
        now[0] = self.starts[0] + tick
        return windows(self, tick)

    def acting(self: Stepper, *arguments: Any) -> Any:
        scalars = accumulate(self, *arguments)
        act(self, now[0])
        return scalars

    monkeypatch.setattr(HostFeed, "windows", told)
    monkeypatch.setattr(Stepper, "accumulate", acting)


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, member: int = 0) -> None:
    """One NaN in one gradient of these steps."""

    def act(stepper: Stepper, step: int) -> None:
        if step in steps:
            stepper.grads[2][member].view(-1)[0] = math.nan

    at_step(monkeypatch, act)

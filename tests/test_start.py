"""Starting weights: another trial's end, a sweep that is launched first, Hugging Face folders; their identity."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from trials import BASE, Make, assert_same, records, vary

from stabstudy import config as cfg
from stabstudy import store, sweep
from stabstudy.architecture import ffn_settings
from stabstudy.config import ModelConfig, ObjectiveConfig, TrialConfig
from stabstudy.data import weights
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError, DataError
from stabstudy.stability.rules import Rules
from stabstudy.training import families
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine


def trained(folder: store.TrialFolder, cache: Path, stop_at: int | None = None) -> None:
    run_pack([folder], Engine(cache, keep_checkpoints=True), Rules(), lambda members: members[0].step == stop_at)


def after(source: store.TrialFolder, **changes: Any) -> TrialConfig:
    """Settings of a trial that starts from the source's end."""
    start = ObjectiveConfig(init_from=str(source.path), init_id=source.trial_id)
    return dataclasses.replace(vary(**changes), objective=start)


@pytest.fixture
def source(make: Make, cache: Path) -> store.TrialFolder:
    folder = make(BASE, "source")
    trained(folder, cache)
    return folder


def test_a_trial_begins_where_its_source_ended(make: Make, cache: Path, source: store.TrialFolder) -> None:
    folder = make(dataclasses.replace(after(source), seed=3))
    trained(folder, cache)
    state, before = folder.read_state(), source.read_state()
    assert state.status == "done" and state.init_loss == before.final_loss
    assert state.init_loss != before.init_loss

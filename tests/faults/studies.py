"""A study of 24 tiny trials that was trained without interruption: what every other is compared with."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from faults import children
from faults.killer import Child
from stabstudy import config as cfg
from stabstudy import store
from stabstudy.config import DataConfig, ModelConfig, OptimConfig, SyntheticConfig, TrainConfig, TrialConfig
from stabstudy.data import sources

BASE = TrialConfig(
    model=ModelConfig(depth=2, dim=16, n_heads=2),
    optim=OptimConfig(lr=3e-3, warmup_steps=3),
    data=DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=16),
    train=TrainConfig(steps=60, batch_size=4, probe_every=7, eval_every=20, checkpoint_every=9, eval_sequences=6),
)
LR, CLIPS, SEEDS = (1e-3, 1e-2, 0.1, 3.0), (1.0, None), (0, 1, 2)


def configs() -> list[TrialConfig]:
    """24 cells and seeds; at the largest rate some diverge."""
    return [
        dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, lr=lr, clip=clip), seed=seed)
        for lr, clip, seed in itertools.product(LR, CLIPS, SEEDS)
    ]


def write_study(path: Path, wanted: list[TrialConfig]) -> store.StudyFolder:
    """The files of a launch before its first trial."""
    study = store.StudyFolder(path)
    for config in wanted:
        fingerprint = sources.fingerprint(config.data)
        trial = study.trial(cfg.trial_id(config, fingerprint))
        trial.path.mkdir(parents=True)
        cell_id = cfg.trial_id(dataclasses.replace(config, seed=0), fingerprint)
        body = {"format": cfg.FORMAT_VERSION, "trial_id": trial.trial_id, "cell_id": cell_id}
        body |= {"config": cfg.to_dict(config), "choices": {}, "data_fingerprint": fingerprint}
        store.write_json(trial.config_file, body)
    store.write_text(study.sweep_file, "# @package _global_\n# What survives?\n")
    return study


def trial_paths(study: store.StudyFolder) -> list[Path]:
    return [trial.path for trial in study.trials()]


def trained(path: Path, cache: Path, pack: int) -> Path:
    """A study of all configs, trained whole."""
    study = write_study(path, configs())
    child = Child(children.train, trial_paths(study), pack, cache)
    child.end(600)
    assert child.code == 0
    assert [trial.read_state().status for trial in study.trials()] == ["done"] * 24
    return path

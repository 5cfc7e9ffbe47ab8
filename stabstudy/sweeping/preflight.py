"""Pre-flight of a launch: models that are not ours must be exact under gradient accumulation, or nothing starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stabstudy import config as cfg
from stabstudy.config import ModelConfig, TrialConfig
from stabstudy.planning.compute import Compute, NotReadyError
from stabstudy.settings import ConfigError, Problem

LOSS_APART, NORM_APART = 1e-5, 1e-4
"""Largest relative differences that are float summation order; what was measured is a hundredth of them."""


def preflight(configs: Sequence[TrialConfig], compute: Compute, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Measure each distinct model of a foreign family among the configs, in a process that may import torch.

    Raises ConfigError with every model that is not exact; NotReadyError where that cannot be found out.
    """
    chosen = models(configs)
    if not chosen:
        return
    say(f"pre-flight: checking gradient accumulation of {', '.join(_label(c.model) for c in chosen)}")
    problems = []
    for config, (loss, norm) in zip(chosen, _measured(chosen, compute, cache_dir), strict=True):
        apart = f"one batch whole and split, loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
        if loss <= LOSS_APART and norm <= NORM_APART:  # NaN is not
            say(f"pre-flight: {_label(config.model)} is exact: {apart}")
            continue
        rule = f"{_label(config.model)} is not exact under gradient accumulation: {apart}"
        problems.append(Problem("model.family", f"{rule} (at most {LOSS_APART:g} and {NORM_APART:g} are rounding)"))
    if problems:
        raise ConfigError(problems)


def _label(model: ModelConfig) -> str:
    return f"{model.family} {model.dim}x{model.depth}"


def models(configs: Sequence[TrialConfig]) -> list[TrialConfig]:
    """One config for each distinct model of a foreign family: that of the smallest batch."""
    found: dict[ModelConfig, TrialConfig] = {}
    for config in sorted(configs, key=lambda c: c.tokens_per_step):
        if config.model.family != "lingua":
            found.setdefault(config.model, config)
    return list(found.values())


def _measured(configs: Sequence[TrialConfig], compute: Compute, cache_dir: Path) -> list[tuple[float, float]]:
    """Of each config the relative differences of loss and gradient norm."""
    asked = {
        "cache_dir": str(cache_dir.resolve()),
        "device": "cuda" if compute.gpus_per_pack and compute.address is None else "cpu",
        "threads": compute.threads,
        "configs": [cfg.to_dict(config) for config in configs],
    }
    command = [sys.executable, "-m", "stabstudy.training.preflight"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != len(configs):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = said[-1][:300] if said else f"its process ended with {done.returncode}"
        raise NotReadyError(f"the pre-flight of model.family could not run: {reason}")
    return [tuple(json.loads(line)) for line in lines]

"""The `compute` group: where trials run. It is not part of a trial, so it never changes a trial's id."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.planning import machine, words
from stabstudy.settings import Problem, read_group, setting


@dataclass(frozen=True)
class Compute:
    """Resources of one trial, and how a launch treats its trials. `conf/compute/*.yaml` are presets of it."""

    address: str | None = setting(None)  # Ray cluster to join; null: start one on this machine
    gpus_per_trial: float = setting(0.0, ge=0, le=1024)  # a share below 1, or whole GPUs
    cpus_per_trial: int = setting(1, ge=1, le=1024)  # cores that Ray sets aside for a trial
    threads: int = setting(1, ge=1, le=1024)  # torch threads of a trial
    max_concurrent: int | None = setting(None, ge=1, le=10**6)  # trials at once; null: as many as fit
    cache_dir: str | None = setting(None)  # folder of tokenized text; null: the user's cache folder
    keep_checkpoints: bool = setting(False)  # of finished trials
    retries: int = setting(1, ge=0, le=100)  # more attempts for a trial that failed, within one launch
    hang_timeout: float = setting(120.0, gt=0, le=86_400)  # seconds without a step until a trial counts as hung


def names() -> list[str]:
    """Every setting of the group under its dotted name."""
    return [f"compute.{f.name}" for f in dataclasses.fields(Compute)]


def read(values: Mapping[str, Any], problems: list[Problem]) -> Compute:
    """The composed group as Compute; a null `gpus_per_trial` becomes 1 where this machine has a GPU, else 0."""
    known = dict(values)
    if "gpus_per_trial" in known and known["gpus_per_trial"] is None:
        known["gpus_per_trial"] = 1.0 if known.get("address") is None and machine.gpu_memory() else 0.0
    compute = read_group("compute", Compute, known, problems)
    gpus = compute.gpus_per_trial
    if gpus > 1 and gpus != int(gpus):
        problems.append(Problem("compute.gpus_per_trial", "must be a share below 1 or a whole number", f"{gpus:g}"))
    return compute


def idle(compute: Compute, launcher: str) -> list[str]:
    """One line for each setting that does nothing, or harm, in this combination."""
    lines = []
    if launcher == "local":
        said = {"address": compute.address, "max_concurrent": compute.max_concurrent}
        lines += [f"compute.{k}: has no effect with launcher=local" for k, v in said.items() if v is not None]
    if compute.threads > compute.cpus_per_trial:
        lines.append(
            f"compute.threads: {compute.threads} threads of a trial share {words.count(compute.cpus_per_trial, 'core')}"
        )
    return lines

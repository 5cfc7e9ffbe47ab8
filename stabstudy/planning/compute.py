"""Compute settings: resources of a pack, no part of a trial's identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.planning import machine, words
from stabstudy.settings import Problem, read_group, setting, show

MOST = 128
"""Trials in a pack. Beyond it a step gains nothing on the largest GPU measured."""

RENAMED = {"gpus_per_trial": "gpus_per_pack", "cpus_per_trial": "cpus_per_pack"}
"""What settings were called while every process trained one trial."""


@dataclass(frozen=True)
class Compute:
    """Resources of a pack, which is a process, and how a launch treats its trials. Presets: `conf/compute/*.yaml`."""

    address: str | None = setting(None)  # Ray cluster to join; null: start one on this machine
    pack: int | str = setting("auto", ge=1, le=MOST)  # most trials of one shape trained together; auto: see packs.most
    gpus_per_pack: float = setting(0.0, ge=0, le=1)  # a share of one GPU: no process uses several
    cpus_per_pack: int = setting(1, ge=1, le=1024)  # cores that Ray sets aside for a pack
    threads: int = setting(1, ge=1, le=1024)  # torch threads of a pack
    max_concurrent: int | None = setting(None, ge=1, le=10**6)  # packs at once; null: as many as fit
    cache_dir: str | None = setting(None)  # folder of tokenized text; null: the user's cache folder
    keep_checkpoints: bool = setting(False)  # of finished trials
    retries: int = setting(1, ge=0, le=100)  # more attempts for a trial that failed, within one launch
    hang_timeout: float = setting(120.0, gt=0, le=86_400)  # seconds without a step until a trial counts as hung


def names() -> list[str]:
    """Every setting of the group under its dotted name."""
    return [f"compute.{f.name}" for f in dataclasses.fields(Compute)]


def read(values: Mapping[str, Any], problems: list[Problem]) -> Compute:
    """The composed group as Compute; a null `gpus_per_pack` becomes 1 where this machine has a GPU, else 0."""
    known = dict(values)
    if "gpus_per_pack" in known and known["gpus_per_pack"] is None:
        known["gpus_per_pack"] = 1.0 if known.get("address") is None and machine.gpu_memory() else 0.0
    for old in sorted(RENAMED.keys() & known.keys()):
        problems.append(Problem(f"compute.{old}", renamed(f"compute.{old}")))
        del known[old]
    pack = _pack(known.pop("pack", Compute.pack), problems)
    return dataclasses.replace(read_group("compute", Compute, known, problems), pack=pack)


def renamed(name: str) -> str:
    """What is wrong with the old name of a setting; "" for a name that is none."""
    new = RENAMED.get(name.removeprefix("compute."))
    return f"is now called compute.{new}" if new and name.startswith("compute.") else ""


def _pack(value: Any, problems: list[Problem]) -> int | str:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST):
        return value  # type: ignore[no-any-return]
    problems.append(Problem("compute.pack", f"must be auto or a whole number in [1, {MOST}]", show(value)))
    return Compute.pack


def idle(compute: Compute, launcher: str) -> list[str]:
    """One line for each setting that does nothing, or harm, in this combination."""
    lines = []
    if launcher == "local":
        said = {"address": compute.address, "max_concurrent": compute.max_concurrent}
        lines += [f"compute.{k}: has no effect with launcher=local" for k, v in said.items() if v is not None]
    if compute.threads > compute.cpus_per_pack:
        cores = words.count(compute.cpus_per_pack, "core")
        lines.append(f"compute.threads: {compute.threads} threads of a pack share {cores}")
    return lines

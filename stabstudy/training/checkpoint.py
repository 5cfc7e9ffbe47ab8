"""Checkpoints that execute nothing when read: safetensors plus JSON, each checked by sha256, the last two kept.

    checkpoint/step-00000500/  tensors.safetensors  state.json {format, trial_id, next_step, sha256}

Order matters (RELIABILITY D3): the caller fsyncs the records first, so a checkpoint with next_step S implies that every
row below S is durable. A folder appears whole, by rename, or not at all.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stabstudy import store
from stabstudy.trace import file_sha256, sync_file, sync_folder
from stabstudy.training.optim import Moments
from stabstudy.training.step import Stepper

FORMAT = 1
KEEP = 2
MOMENTS = tuple(f.name for f in dataclasses.fields(Moments))


class CheckpointError(Exception):
    """A checkpoint that must not be resumed from although its bytes are intact (not finite, another trial's)."""


def save(folder: Path, trial_id: str, stepper: Stepper, next_step: int) -> None:
    """Write the state after `next_step` updates, atomically, then drop all but the last two checkpoints."""
    target = folder / f"step-{next_step:08d}"
    tmp = folder / f"{target.name}.tmp"
    folder.mkdir(exist_ok=True)
    for leftover in (tmp, target):  # a rename onto a folder with files in it fails
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir()
    safetensors.torch.save_file(_tensors(stepper), tmp / "tensors.safetensors")
    sha = sync_file(tmp / "tensors.safetensors")
    body = {"format": FORMAT, "trial_id": trial_id, "next_step": next_step, "sha256": sha}
    store.write_json(tmp / "state.json", body)
    os.rename(tmp, target)
    sync_folder(folder)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, trial_id: str, stepper: Stepper, most: int) -> tuple[int, list[str]]:
    """Load the newest intact checkpoint with next_step <= `most` (the rows at hand).

    Returns (next_step, notes): next_step 0 and untouched weights where none can be used, a note for each one that
    was not used. Raises CheckpointError for a checkpoint of another trial or with weights that are not finite.
    """
    notes: list[str] = []
    for path in _newest_first(folder):
        try:
            body = store.read_json(path / "state.json")
            if body.get("format") != FORMAT or file_sha256(path / "tensors.safetensors") != body.get("sha256"):
                raise ValueError("wrong format or checksum")
            next_step = int(body["next_step"])
            tensors = safetensors.torch.load_file(path / "tensors.safetensors", device="cpu")
        except (store.StoreError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            notes.append(f"checkpoint {path.name} not used: {error}")
            continue
        if body["trial_id"] != trial_id:
            raise CheckpointError(f"checkpoint {path.name} belongs to trial {body['trial_id']}, not {trial_id}")
        if next_step > most:
            notes.append(f"checkpoint {path.name} not used: only {most} rows are recorded")
            continue
        _load(stepper, tensors, path.name)
        return next_step, notes
    return 0, notes


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _tensors(stepper: Stepper) -> dict[str, Tensor]:
    """Every tensor that the next step depends on. A tied matrix stands once, under its first name."""
    tensors = {
        "scaler/loss_scale": stepper.loss_scale,
        "scaler/good_steps": stepper.good_steps,
        "halted": stepper.halted,
        **_memories(stepper),
    }
    for name, parameter in stepper.model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        if parameter in stepper.optimizer.state:
            for key in MOMENTS:
                tensors[f"adam/{key}/{name}"] = getattr(stepper.optimizer.state[parameter], key)
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def _memories(stepper: Stepper) -> dict[str, Tensor]:
    """State of the settings' own mechanisms: tensors that are written in place."""
    owners = {"clip": stepper.clip_rule, "spike_skip": stepper.spike_skip, "muon": stepper.muon}
    return {f"{name}/{key}": x for name, owner in owners.items() if owner for key, x in owner.state.items()}


def _load(stepper: Stepper, tensors: dict[str, Tensor], label: str) -> None:
    named = dict(stepper.model.named_parameters())
    memories = _memories(stepper)
    expected = {"scaler/loss_scale", "scaler/good_steps", "halted", *memories}
    adam = {name: stepper.optimizer.state[p] for name, p in named.items() if p in stepper.optimizer.state}
    expected |= {f"model/{name}" for name in named} | {f"adam/{key}/{name}" for name in adam for key in MOMENTS}
    wrong = sorted(expected ^ set(tensors)) + [
        name for name, p in named.items() if f"model/{name}" in tensors and tensors[f"model/{name}"].shape != p.shape
    ]
    if wrong:
        raise CheckpointError(f"checkpoint {label} is of another model: {', '.join(wrong[:3])}")
    if not all(bool(torch.isfinite(t).all()) for k, t in tensors.items() if k.startswith("model/")):
        raise CheckpointError(f"nonfinite checkpoint {label}")
    device = stepper.device
    stepper.loss_scale = tensors["scaler/loss_scale"].to(device)
    stepper.good_steps = tensors["scaler/good_steps"].to(device)
    stepper.halted = tensors["halted"].to(device)
    for key, tensor in memories.items():
        tensor.copy_(tensors[key])
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model/{name}"])
        for name, moments in adam.items():
            for key in MOMENTS:
                getattr(moments, key).copy_(tensors[f"adam/{key}/{name}"])

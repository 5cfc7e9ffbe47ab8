"""Checkpoints that execute nothing when read: safetensors plus JSON, each checked by sha256, the last two kept.

    checkpoint/step-00000500/  tensors.safetensors  state.json {format, trial_id, next_step, sha256, content_sha256}
    checkpoint/final/          likewise, the weights alone: of a finished trial that keeps its checkpoints

Order matters (RELIABILITY D3): the caller fsyncs the records first, so a checkpoint with next_step S implies that every
row below S is durable. A folder appears whole, by rename, or not at all. The tensors are those of one trial, whatever
pack it was trained in, so it may go on in any other.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from stabstudy import failpoints, store
from stabstudy.disk import file_sha256, sync_file, sync_folder

FORMAT = 1
KEEP = 2
WATCHED = ("clip/", "spike_skip/")
"""What the names begin with of what clip rules and spike_skip remember: of norms and losses, whatever those were."""


class CheckpointError(Exception):
    """A checkpoint that must not be resumed from although its bytes are intact (not finite, another trial's)."""


def save(folder: Path, trial_id: str, tensors: Mapping[str, Tensor], next_step: int) -> None:
    """Write the state after `next_step` updates, atomically, then drop all but the last two checkpoints.

    Raises OSError where the disk refuses, and leaves nothing half written on it.
    """
    _write(folder / f"step-{next_step:08d}", trial_id, tensors, next_step)
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
        failpoints.hit("checkpoint.removed")


def save_final(folder: Path, trial_id: str, tensors: Mapping[str, Tensor], steps: int) -> None:
    """Write the trained weights, of all the state of the trial after its last step, for others to start from."""
    prefix = "model/"
    weights = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    _write(folder / "final", trial_id, weights, steps)


def _write(target: Path, trial_id: str, tensors: Mapping[str, Tensor], next_step: int) -> None:
    folder = target.parent
    tmp = folder / f"{target.name}.tmp"
    folder.mkdir(exist_ok=True)
    for leftover in (tmp, target):  # a rename onto a folder with files in it fails
        shutil.rmtree(leftover, ignore_errors=True)
    tmp.mkdir()
    try:
        _fill(tmp, trial_id, tensors, next_step)
        os.rename(tmp, target)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    failpoints.hit("checkpoint.named")
    sync_folder(folder)
    failpoints.hit("checkpoint.durable")


def _fill(folder: Path, trial_id: str, tensors: Mapping[str, Tensor], next_step: int) -> None:
    failpoints.hit("checkpoint.begun")
    apart = {name: x.contiguous().clone() for name, x in tensors.items()}  # safetensors takes no shared memory
    file = folder / "tensors.safetensors"
    try:
        safetensors.torch.save_file(apart, file)
    except SafetensorError as error:
        if (code := re.search(r"(?:os error|code:) (\d+)", str(error))) is None:  # the second: before 0.7
            raise
        number = int(code[1])  # by which a full disk is known
        raise OSError(number, os.strerror(number), str(file)) from error
    failpoints.hit("checkpoint.tensors_written")
    sha = sync_file(file)
    failpoints.hit("checkpoint.tensors_synced")
    body = {"format": FORMAT, "trial_id": trial_id, "next_step": next_step, "sha256": sha}
    store.write_sealed(folder / "state.json", body)


def restore(
    folder: Path, trial_id: str, shapes: Mapping[str, torch.Size], most: int
) -> tuple[int, dict[str, Tensor], list[str]]:
    """The newest intact checkpoint with next_step <= `most` (the rows at hand).

    Returns (next_step, tensors, notes): next_step 0 and no tensors where none can be used, a note for each one that
    was not used. Raises CheckpointError for a checkpoint of a newer version, of another trial, of other `shapes`, or
    with weights that are not finite or another tensor that holds NaN.
    """
    notes: list[str] = []
    for path in _newest_first(folder):
        try:
            next_step, owner = _described(path)
            tensors = safetensors.torch.load_file(path / "tensors.safetensors", device="cpu")
        except store.NewerFormatError as error:
            raise CheckpointError(f"checkpoint {path.name}: {error}") from error  # a later save would remove it
        except (store.StoreError, OSError, ValueError, SafetensorError) as error:
            notes.append(f"checkpoint {path.name} not used: {error}")
            continue
        if owner != trial_id:
            raise CheckpointError(f"checkpoint {path.name} belongs to trial {owner}, not {trial_id}")
        if next_step > most:
            notes.append(f"checkpoint {path.name} not used: only {most} rows are recorded")
            continue
        _check(tensors, shapes, path.name)
        return next_step, tensors, notes
    return 0, {}, notes


def _described(path: Path) -> tuple[int, Any]:
    """(next_step, trial_id) of a checkpoint whose tensors are those that were saved. Raises StoreError, ValueError."""
    body = store.read_sealed(path / "state.json", FORMAT)
    if file_sha256(path / "tensors.safetensors") != body.get("sha256"):
        raise ValueError("wrong checksum")
    if type(body.get("next_step")) is not int or f"step-{body['next_step']:08d}" != path.name:
        raise ValueError(f"its folder's name is not that of next_step {body.get('next_step')}")
    return body["next_step"], body.get("trial_id")


class Saver:
    """Writes checkpoints one after another, in a thread if asked to; a failure is raised at the next call."""

    def __init__(self, in_background: bool):
        self._thread = ThreadPoolExecutor(max_workers=1) if in_background else None
        self._last: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Write, once what was submitted before is written."""
        self.wait()
        if self._thread is None:
            write()
        else:
            self._last = self._thread.submit(write)

    def wait(self) -> None:
        """Until nothing is left to be written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], label: str) -> None:
    wrong = sorted(set(shapes) ^ set(tensors))
    wrong += [name for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if wrong:
        raise CheckpointError(f"checkpoint {label} is of another model: {', '.join(wrong[:3])}")
    # the square of a huge gradient may be infinite, and training goes on; a moment that is NaN never recovers
    bad = [k for k, t in tensors.items() if k.startswith("model/") and not bool(t.isfinite().all())]
    bad += [k for k, t in tensors.items() if not k.startswith(("model/", *WATCHED)) and bool(t.isnan().any())]
    if bad:
        raise CheckpointError(f"nonfinite checkpoint {label}: {', '.join(bad[:3])}")

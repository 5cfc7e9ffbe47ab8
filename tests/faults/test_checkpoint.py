"""Checkpoints whose writer is killed, and checkpoints that are damaged: the newest intact one is used, no other."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faults import children
from faults.campaign import Part
from faults.killer import killed
from stabstudy import failpoints
from stabstudy.training import checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
TRIAL = "0123456789"
SHAPES = {name: x.shape for name, x in children.tensors_at(0).items()}
POINTS = [name for name in failpoints.POINTS if name.startswith("checkpoint.")]


def restored(folder: Path) -> tuple[int, list[str]]:
    """(step, violations) of the newest checkpoint that can be used."""
    step, tensors, _ = checkpoint.restore(folder, TRIAL, SHAPES, most=10**9)
    right = children.tensors_at(step)
    wrong = [name for name in tensors if not torch.equal(tensors[name], right[name])]
    return step, [f"I5 {name} of step {step} has other values" for name in wrong]


def test_there_is_always_one_to_go_on_from(part: Begin, tmp_path: Path) -> None:
    folder, last = tmp_path / "checkpoint", 0
    with part("checkpoint") as running:
        for rng in running.injections():
            point = f"{rng.choice(POINTS)}:kill@{rng.randint(1, 4)}" if rng.random() < 0.5 else ""
            child = killed(children.save_checkpoints, folder, TRIAL, last + 1, rng=rng, seconds=0.06, point=point)
            acks = child.end()
            running.count(child.was_killed)
            committed = int(acks[-1]) if acks else last
            step, broken = restored(folder)
            running.add(broken)
            running.check(committed <= step <= committed + 1, f"I1 step {step}, {committed} acknowledged")
            names = [p.name for p in folder.glob("*")]
            # a whole save removes all that others left; the one that was killed adds its folder, under one of two names
            running.check(not acks or len(names) <= checkpoint.KEEP + 1, f"I2 left: {', '.join(names)}")
            last = step
        children.tensors_at(last + 1)
        checkpoint.save(folder, TRIAL, children.tensors_at(last + 1), last + 1)
        names = sorted(p.name for p in folder.iterdir())
        running.check(names == [f"step-{last:08d}", f"step-{last + 1:08d}"], f"I2 left: {', '.join(names)}")


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def add(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 99))


def edit(data: bytes, rng: random.Random) -> bytes:
    """A number or a name of the JSON changed, by someone who wants to go back."""
    body = json.loads(data)
    body["next_step"] = rng.choice([5, 0, -1, 10**12, "20", None, 5.5, True])
    return json.dumps(body).encode()


def test_a_damaged_one_is_never_used(part: Begin, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for step in (10, 20):
        checkpoint.save(whole, TRIAL, children.tensors_at(step), step)
    with part("checkpoint damage") as running:
        for rng in running.injections():
            folder = children.copied(whole, tmp_path / "checkpoint")
            newest = folder / "step-00000020"
            name = rng.choice(["tensors.safetensors", "state.json"])
            act = rng.choice([flip, cut, add, *([edit, edit] if name == "state.json" else [])])
            before = (newest / name).read_bytes()
            (newest / name).write_bytes(act(before, rng))
            label = f"{act.__name__} of {name}"
            try:
                step, broken = restored(folder)
            except checkpoint.CheckpointError:
                continue  # refused in words
            except Exception as error:
                running.add([f"{label}: {type(error).__name__}: {error}"])
                continue
            running.add([f"{label}: {line}" for line in broken])
            running.check(step in (10, 20), f"{label}: goes on from step {step}")
            if step == 20 and name == "tensors.safetensors":
                running.add([f"{label}: goes on from the damaged one"])


def test_without_the_checksum_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, TRIAL, children.tensors_at(20), 20)
    file = folder / "step-00000020" / "tensors.safetensors"
    sha = json.loads((file.parent / "state.json").read_text())["sha256"]
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert restored(folder) == (0, [])
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: sha)
    step, broken = restored(folder)
    assert step == 20 and len(broken) == 1
    shutil.rmtree(folder)

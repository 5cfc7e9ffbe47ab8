"""Packs: the trials to do, grouped into those that are trained together as one stacked model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabstudy import shape, wording
from stabstudy.config import TrialConfig, setting_names
from stabstudy.planning import estimate
from stabstudy.planning.compute import MOST, Compute
from stabstudy.planning.trials import PlannedTrial

Pack = tuple[PlannedTrial, ...]

ASSUMED_GPU_BYTES = 16e9
"""Memory of a cluster's GPU, which is not known here: a small one. Training halves what does not fit."""


def packs(trials: Sequence[PlannedTrial], resources: Compute, launcher: str) -> list[Pack]:
    """Every trial in one pack; packs, and the trials in each, in the order of the trials.

    A pack holds trials of one shape, at most `most(...)` of them, and the packs of a shape are of even size. With
    `compute.pack: auto` there are as many of them as keep all slots busy. Seeds of a cell stay together unless the
    even size cuts between them.
    """
    places = {trial.trial_id: place for place, trial in enumerate(trials)}
    shapes = by_shape(trials)
    counts = [-(-len(members) // most(members[0].config, resources)) for members in shapes]
    if resources.pack == "auto":
        counts = _for_all_slots(shapes, counts, estimate.slots(resources, launcher) or 1)
    made = [pack for members, count in zip(shapes, counts, strict=True) for pack in _even(members, count)]
    ordered = [tuple(sorted(pack, key=lambda trial: places[trial.trial_id])) for pack in made]
    return sorted(ordered, key=lambda pack: places[pack[0].trial_id])


def by_shape(trials: Sequence[PlannedTrial]) -> list[list[PlannedTrial]]:
    """The trials of each shape, in order."""
    found: dict[tuple[object, ...], list[PlannedTrial]] = {}
    for trial in trials:
        found.setdefault(tuple(shape.shape(trial.config).values()), []).append(trial)
    return list(found.values())


def most(config: TrialConfig, resources: Compute) -> int:
    """Trials of this one's shape that a pack may hold: compute.pack, or what fits into its share of a GPU's memory."""
    if resources.pack != "auto":
        return int(resources.pack)
    if not resources.gpus_per_pack:
        return 1
    there = estimate.room(resources) or ASSUMED_GPU_BYTES * resources.gpus_per_pack
    each = estimate.memory(config) + estimate.checkpoint_bytes(config)  # the copy from which a ring can be run again
    return max(1, min(MOST, int((there - estimate.PROCESS_BYTES) / each)))


def in_words(packed: Sequence[Pack]) -> str:
    """'36 trials in 3 packs of 12: a pack holds trials of one shape, these differ in model.depth'."""
    sizes = sorted({len(pack) for pack in packed})
    between = " or " if sizes[-1] - sizes[0] == 1 else " to "
    size = between.join(str(s) for s in dict.fromkeys((sizes[0], sizes[-1])))
    trials = wording.count(sum(len(pack) for pack in packed), "trial", ",")
    text = f"{trials} in {wording.count(len(packed), 'pack', ',')} of {size}"
    splitting = _splitting([pack[0].config for pack in packed])
    return f"{text}: a pack holds trials of one shape, these differ in {', '.join(splitting)}" if splitting else text


def _splitting(configs: Sequence[TrialConfig]) -> list[str]:
    """The settings that keep these trials from being one pack."""
    found = {name for other in configs[1:] for name in shape.differing(configs[0], other)}
    return [name for name in setting_names() if name in found]


def _for_all_slots(shapes: Sequence[Sequence[PlannedTrial]], counts: Sequence[int], slots: int) -> list[int]:
    """The numbers of packs raised, where work for a pack is greatest, until their sum is a multiple of the slots."""
    raised = list(counts)
    work = [sum(estimate.flops(trial.config) for trial in members) for members in shapes]
    while sum(raised) % slots:
        divisible = [i for i, members in enumerate(shapes) if raised[i] < len(members)]
        if not divisible:
            break
        raised[max(divisible, key=lambda i: work[i] / raised[i])] += 1
    return raised


def _even(members: Sequence[PlannedTrial], count: int) -> list[list[PlannedTrial]]:
    """The members in `count` parts whose sizes differ by at most one, cells in order, each with its seeds."""
    cells: dict[str, list[PlannedTrial]] = {}
    for trial in members:
        cells.setdefault(trial.cell_id, []).append(trial)
    ordered = [trial for seeds in cells.values() for trial in seeds]
    size = len(ordered) / count
    return [ordered[math.floor(i * size + 1e-9) : math.floor((i + 1) * size + 1e-9)] for i in range(count)]

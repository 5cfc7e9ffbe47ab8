"""The preview of a plan (`--dry-run`): trials done, to do and damaged, costs, what this machine lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabstudy import disk, extras, store, wording
from stabstudy.config import TrialConfig
from stabstudy.data import sources
from stabstudy.planning import compute, estimate
from stabstudy.planning.budget import hours_spent
from stabstudy.planning.plan import Plan, PlannedTrial
from stabstudy.planning.trials import Pack, packs, packs_in_words
from stabstudy.settings import safe
from stabstudy.state import is_over

SHOWN = 40
"""Cells listed before the rest is counted."""


DAMAGED = "damaged"
"""In the place of the state of a trial whose files cannot be trusted."""


@dataclass(frozen=True)
class Start:
    """The one trial of a sweep from whose trained weights a plan's trials start; `done`: it is trained."""

    sweep: str
    trial_id: str
    done: bool


@dataclass(frozen=True)
class Cell:
    """Trials that differ in their seed alone: how many, and how many of them are done."""

    cell_id: str
    case: str | None
    values: tuple[Any, ...]  # on each axis of the plan
    trials: int
    done: int


@dataclass(frozen=True)
class Preview:
    """What a launch of the plan would find here and do."""

    plan: Plan
    states: dict[str, str]  # of each trial, by its id; or DAMAGED
    damage: tuple[str, ...]  # a line for each trial that is left alone
    starts: tuple[Start, ...]  # none where nothing is to do
    packed: tuple[Pack, ...]
    cost: estimate.Cost | None  # None where nothing is to do
    notes: tuple[str, ...]
    obstacles: tuple[str, ...]  # why this machine cannot start it
    hours_spent: float | None = None  # by the study's trials; None where the budget has no hours

    @property
    def stopped(self) -> int:
        """Trials that a rule has ended early and that stay so."""
        return sum(state == "stopped" and is_over(state, self.plan.stop) for state in self.states.values())

    @property
    def done(self) -> int:
        return sum(is_over(state, self.plan.stop) for state in self.states.values())

    @property
    def to_do(self) -> int:
        return len(self.states) - self.done - len(self.damage)

    @property
    def packs_differ(self) -> bool:
        """Whether what runs at once is not simply a trial on each core."""
        return bool(self.plan.compute.gpus_per_pack) or len(self.packed) < self.to_do

    @property
    def cells(self) -> list[Cell]:
        """In the order of the plan."""
        members: dict[str, list[PlannedTrial]] = {}
        for trial in self.plan.trials:
            members.setdefault(trial.cell_id, []).append(trial)
        done = {name: sum(self.states[t.trial_id] == "done" for t in trials) for name, trials in members.items()}
        return [
            Cell(name, trials[0].case, tuple(self.plan.values(trials[0])), len(trials), done[name])
            for name, trials in members.items()
        ]


def look(plan: Plan) -> Preview:
    """The plan held against the study's folder and this machine. Raises as `intact`."""
    study = store.StudyFolder(plan.folder)
    whole, damage = intact(plan, study)
    read = {t.trial_id: study.trial(t.trial_id).read_state().status for t in whole.trials}
    todo = [t for t in whole.trials if read[t.trial_id] != "done"]
    packed = packs(todo, plan.compute, plan.launcher) if todo else []
    rate = estimate.measured_rate(study) if todo else None
    return Preview(
        plan,
        {t.trial_id: read.get(t.trial_id, DAMAGED) for t in plan.trials},
        tuple(damage),
        tuple(_start(source) for source in plan.first if todo),
        tuple(packed),
        estimate.cost(_configs(packed), plan.compute, plan.launcher, rate) if todo else None,
        tuple(filter(None, [estimate.timescales([t.config for t in plan.trials])])),
        tuple(why_not_here(plan)),
        None if plan.budget.hours is None else hours_spent(study),
    )


def _start(source: Plan) -> Start:
    is_done = not waiting(source, store.StudyFolder(source.folder))
    return Start(source.study, source.trials[0].trial_id, is_done)


def show(preview: Preview) -> None:
    """Print it: axes and cells, trials done and to do, tokens, arithmetic, time and disk."""
    plan, cells = preview.plan, preview.cells
    print(f"{plan.study}: {plan.question}")
    for axis in plan.axes:
        print(f"  {axis.name}: {', '.join('null' if v is None else str(v) for v in axis.values)}")
    if plan.planner is not None:
        print(f"searched: {plan.planner.aim}; the trials asked for so far:")
    _show_cells(plan, cells)
    for start in preview.starts:
        how = "done" if start.done else "to be launched first"
        print(f"starts from the trained weights of sweep={start.sweep} ({start.trial_id}, {how})")
    size = f"{wording.count(len(plan.trials), 'trial', ',')} of {wording.count(len(cells), 'cell', ',')}"
    early = f" ({preview.stopped} of them stopped early)" if preview.stopped else ""
    left = f", {len(preview.damage)} damaged" if preview.damage else ""
    print(f"{size}: {preview.done} done{early}, {preview.to_do} to do{left} in {plan.folder}")
    for line in preview.damage:
        print(f"damaged: {safe(line)}")
    if preview.cost:
        if preview.packs_differ:
            print(packs_in_words(preview.packed))
        print(_cost(preview.cost, preview.packs_differ))
    if plan.budget.hours is not None and (spent := preview.hours_spent) is not None:
        unspent = max(0.0, plan.budget.hours - spent)
        print(f"budget of {plan.budget.hours:g} h: {spent:.3g} h spent, {unspent:.3g} h left")
    for note in preview.notes:
        print(note)
    for reason in preview.obstacles:
        print(f"this machine cannot start it: {reason}")


def _configs(packed: Sequence[Pack]) -> list[list[TrialConfig]]:
    return [[trial.config for trial in pack] for pack in packed]


def _show_cells(plan: Plan, cells: Sequence[Cell]) -> None:
    rows = [
        [c.cell_id, c.case or "", *("null" if v is None else str(v) for v in c.values), str(c.trials), str(c.done)]
        for c in cells
    ]
    columns = ["cell", "case", *(axis.name for axis in plan.axes), "trials", "done"]
    if not any(row[1] for row in rows):
        columns, rows = [c for c in columns if c != "case"], [[row[0], *row[2:]] for row in rows]
    wording.table(columns, rows[:SHOWN])
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more cells")


def _cost(cost: estimate.Cost, packs_shown: bool) -> str:
    at_once = wording.count(cost.slots or 0, "pack", ",") if packs_shown else str(cost.slots)
    where = f"{at_once} at a time" if cost.slots else "on a cluster"
    time = wording.duration(cost.seconds if cost.wall_seconds is None else cost.wall_seconds)
    basis = "from this study's finished trials" if cost.measured else "a rule of thumb, right within a factor of 3"
    return (
        f"about {wording.amount(cost.tokens)} tokens, {wording.amount(cost.flops)}FLOP, "
        f"{time}, {where} ({basis}), {wording.amount(cost.disk)}B of disk"
    )


def check_machine(plan: Plan) -> None:
    """Raises NotReadyError, one line for each reason why this machine cannot start the plan."""
    if reasons := why_not_here(plan):
        raise compute.NotReadyError("\n".join(reasons))


def packages(plan: Plan) -> list[str]:
    """The optional packages that training the plan takes."""
    configs = [trial.config for trial in plan.trials]
    wanted = {name for data in {config.data for config in configs} for name in sources.packages(data)}
    wanted |= {"transformers"} if any(config.model.family != "lingua" for config in configs) else set()
    return ["torch", "safetensors", *(["ray"] if plan.launcher == "ray" else []), *sorted(wanted)]


def why_not_here(plan: Plan) -> list[str]:
    """What this machine lacks: packages, a folder to write, disk, a GPU, cores."""
    packed = packs(plan.trials, plan.compute, plan.launcher)
    needed = estimate.cost(_configs(packed), plan.compute, plan.launcher, None).disk
    reasons = extras.why_not(packages(plan))
    reasons += filter(None, [compute.why_not_folder(plan.folder, int(needed)), disk.study_obstacle(plan.folder)])
    gpus, cpus = plan.compute.gpus_per_pack, plan.compute.cpus_per_pack
    if plan.compute.address is None and gpus and not compute.gpu_memory():
        reasons.append(f"compute.gpus_per_pack={gpus:g}: this machine has no GPU; compute=cpu runs on its cores")
    if plan.compute.address is None and cpus > compute.cores():
        reasons.append(f"compute.cpus_per_pack={cpus}: this machine has {compute.cores()} cores")
    if plan.compute.address is None and any(t.config.train.compile == "on" for t in plan.trials):
        missing = compute.why_not_compile()
        reasons += [f"train.compile=on: {missing}; train.compile=off trains uncompiled"] if missing else []
    return reasons


def intact(plan: Plan, study: store.StudyFolder) -> tuple[Plan, list[str]]:
    """The plan without the trials whose files cannot be trusted, and a line for each of those, which are left alone.

    Raises store.NewerFormatError where a newer version wrote a file of the study: it would be written over.
    """
    for path in (study.provenance_file, *(study.trial(t.trial_id).config_file for t in plan.trials)):
        _refuse_newer(path)
    reasons = {trial.trial_id: _damage(study.trial(trial.trial_id)) for trial in plan.trials}
    trials = tuple(trial for trial in plan.trials if reasons[trial.trial_id] is None)
    return dataclasses.replace(plan, trials=trials), [reason for reason in reasons.values() if reason]


def waiting(plan: Plan, study: store.StudyFolder) -> list[PlannedTrial]:
    """The trials of an intact plan that are not over (`state.is_over`); all of them while there is no study yet."""
    return [t for t in plan.trials if not is_over(study.trial(t.trial_id).read_state().status, plan.stop)]


def _refuse_newer(path: Path) -> None:
    """Raises NewerFormatError for a file of a newer version. A broken one is no reason: it is written anew."""
    try:
        store.read_sealed(path)
    except store.NewerFormatError:
        raise
    except store.StoreError:
        return


def _damage(folder: store.TrialFolder) -> str | None:
    """Why nothing may be written into the trial's folder; None where it is as a launch left it, or not there yet.

    A config.json that was changed is no reason: the plan knows what it must be.
    """
    if wrong := disk.trial_obstacle(folder.path):
        return wrong
    try:
        folder.read_state()
    except store.NewerFormatError:
        raise
    except store.StoreError as error:
        return str(error)
    return None

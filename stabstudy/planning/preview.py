"""The output of `--dry-run`: what a launch would do, and roughly what it would cost. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence

from stabstudy import disk, extras, store
from stabstudy.config import TrialConfig
from stabstudy.data import sources
from stabstudy.planning import caveats, estimate, machine, packs, words
from stabstudy.planning.plan import Plan
from stabstudy.planning.standing import intact, waiting

SHOWN = 40
"""Cells listed before the rest is counted."""


def show(plan: Plan) -> None:
    """Print the plan: its axes and cells, trials done and to do, tokens, arithmetic, time and disk."""
    study = store.StudyFolder(plan.folder)
    whole, damaged = intact(plan, study)
    waits = {t.trial_id for t in waiting(whole, study)}
    done = {t.trial_id for t in whole.trials if t.trial_id not in waits}
    print(f"{plan.study}: {plan.question}")
    for axis in plan.axes:
        print(f"  {axis.name}: {', '.join('null' if v is None else str(v) for v in axis.values)}")
    _cells(plan, done)
    todo = [t for t in whole.trials if t.trial_id in waits]
    cells = len({t.cell_id for t in plan.trials})
    size = f"{words.count(len(plan.trials), 'trial')} of {words.count(cells, 'cell')}"
    left = f", {len(damaged)} damaged" if damaged else ""
    print(f"{size}: {len(done)} done, {len(todo)} to do{left} in {plan.folder}")
    for line in damaged:
        print(f"damaged: {words.safe(line)}")
    if todo:
        packed = packs.packs(todo, plan.compute, plan.launcher)
        shown = bool(plan.compute.gpus_per_pack) or len(packed) < len(todo)
        if shown:
            print(packs.in_words(packed))
        rate = estimate.measured_rate(study)
        print(_cost(estimate.cost(_configs(packed), plan.compute, plan.launcher, rate), shown))
    if timescales := caveats.timescales([t.config for t in plan.trials]):
        print(timescales)
    for reason in why_not_here(plan):
        print(f"this machine cannot start it: {reason}")


def _configs(packed: Sequence[packs.Pack]) -> list[list[TrialConfig]]:
    return [[trial.config for trial in pack] for pack in packed]


def _cells(plan: Plan, done: set[str]) -> None:
    cells: dict[str, list[str]] = {}
    labels: dict[str, list[str]] = {}
    for trial in plan.trials:
        cells.setdefault(trial.cell_id, []).append(trial.trial_id)
        values = plan.values(trial)
        labels.setdefault(trial.cell_id, [trial.case or "", *("null" if v is None else str(v) for v in values)])
    rows = [[cell, *labels[cell], str(len(ids)), str(sum(i in done for i in ids))] for cell, ids in cells.items()]
    columns = ["cell", "case", *(axis.name for axis in plan.axes), "trials", "done"]
    if not any(row[1] for row in rows):
        columns, rows = [c for c in columns if c != "case"], [[row[0], *row[2:]] for row in rows]
    words.table(columns, rows[:SHOWN])
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more cells")


def _cost(cost: estimate.Cost, packs_shown: bool) -> str:
    at_once = words.count(cost.slots or 0, "pack") if packs_shown else str(cost.slots)
    where = f"{at_once} at a time" if cost.slots else "on a cluster"
    time = words.duration(cost.seconds if cost.wall_seconds is None else cost.wall_seconds)
    basis = "from this study's finished trials" if cost.measured else "a rule of thumb, right within a factor of 3"
    return (
        f"about {words.amount(cost.tokens)} tokens, {words.amount(cost.flops)}FLOP, "
        f"{time}, {where} ({basis}), {words.amount(cost.disk)}B of disk"
    )


def check_machine(plan: Plan) -> None:
    """Raises NotReadyError, one line for each reason why this machine cannot start the plan."""
    if reasons := why_not_here(plan):
        raise machine.NotReadyError("\n".join(reasons))


def packages(plan: Plan) -> list[str]:
    """The optional packages that training the plan takes."""
    configs = [trial.config for trial in plan.trials]
    wanted = {name for data in {config.data for config in configs} for name in sources.packages(data)}
    wanted |= {"transformers"} if any(config.model.family != "lingua" for config in configs) else set()
    return ["torch", "safetensors", *(["ray"] if plan.launcher == "ray" else []), *sorted(wanted)]


def why_not_here(plan: Plan) -> list[str]:
    """What this machine lacks: packages, a folder to write, disk, a GPU, cores."""
    packed = packs.packs(plan.trials, plan.compute, plan.launcher)
    needed = estimate.cost(_configs(packed), plan.compute, plan.launcher, None).disk
    reasons = extras.why_not(packages(plan))
    reasons += filter(None, [machine.why_not_folder(plan.folder, int(needed)), disk.study_obstacle(plan.folder)])
    gpus, cpus = plan.compute.gpus_per_pack, plan.compute.cpus_per_pack
    if plan.compute.address is None and gpus and not machine.gpu_memory():
        reasons.append(f"compute.gpus_per_pack={gpus:g}: this machine has no GPU; compute=cpu runs on its cores")
    if plan.compute.address is None and cpus > machine.cores():
        reasons.append(f"compute.cpus_per_pack={cpus}: this machine has {machine.cores()} cores")
    if plan.compute.address is None and any(t.config.train.compile == "on" for t in plan.trials):
        missing = machine.why_not_compile()
        reasons += [f"train.compile=on: {missing}; train.compile=off trains uncompiled"] if missing else []
    return reasons

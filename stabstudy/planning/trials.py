"""Trials: complete cells times seeds, named by what they are; and packs of those that are trained together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stabstudy import config as cfg
from stabstudy import settings as st
from stabstudy import shape, wording
from stabstudy.config import GROUPS, DataConfig, ModelConfig, TrialConfig, from_dict, setting_names
from stabstudy.data import sources, tokenizer
from stabstudy.data.files import Memory
from stabstudy.data.weights import Weights
from stabstudy.expressions import Expression
from stabstudy.planning import compose, compute, estimate
from stabstudy.planning.axes import Choices, without_rivals
from stabstudy.planning.compose import PRESET_GROUPS, Base
from stabstudy.planning.compute import MOST, Compute
from stabstudy.planning.overrides import Request
from stabstudy.planning.sweepfile import SweepFile
from stabstudy.settings import ConfigError, DataError, Issues, Problem

ASSUMED_GPU_BYTES = 16e9
"""Memory of a cluster's GPU, which is not known here: a small one. Training halves what does not fit."""


@dataclass(frozen=True)
class Cell:
    """One combination of axis values, or a named case, with all its settings; `choices` names its presets."""

    config: TrialConfig
    choices: dict[str, str]
    case: str | None


class Sources(Protocol):
    """Where starting weights are looked up, and the plans of sweeps that are launched for them first."""

    @property
    def plans(self) -> dict[str, Any]:
        """By the sweep's name."""
        ...

    def of(self, text: str, family: str | None) -> Weights:
        """Those of an `objective.init_from`, and of `model.family` where that is typed."""
        ...


@dataclass(frozen=True)
class Composer:
    """Completes the cells of one sweep; composes once for each combination of presets."""

    sweep: SweepFile
    issues: Issues
    starts: Sources
    bases: dict[frozenset[tuple[str, str]], Base] = field(default_factory=dict)

    def cell(self, chosen: Choices, case: str | None) -> Cell | None:
        """The cell of these choices, presets composed and settings on top, or None with its problems noted."""
        base, settings = self._base(chosen), _settings(chosen)
        try:
            nested = compose.resolved(base.values, {name: c.value for name, c in settings.items()})
            nested = {k: v for k, v in nested.items() if k != "compute"}
            # Hydra drops a ??? that stands on top of a preset's value, so look in the sweep file itself
            open_in_file = [name for name in compose.missing(self.sweep.document.content) if name not in settings]
            if missing := {*open_in_file, *compose.missing(nested)}:
                raise ConfigError([Problem(name, "must be set: it is ??? here") for name in sorted(missing)])
            if (start := _start_of(nested)) is not None:
                self._begin_with(start, nested, self._typed(chosen, base, settings))
            elif nested.get("objective", {}).get("kind") == "kto":
                rule = "objective kto tunes a trained model: name its weights (for one on sums: sweep kto_start)"
                raise ConfigError([Problem("objective.init_from", rule, "null")])
            return Cell(from_dict(nested), {g: base.choices[g] for g in GROUPS}, case)
        except ConfigError as error:
            self._take(error.problems, settings, base)
            return None

    def _typed(self, chosen: Choices, base: Base, settings: Choices) -> set[str]:
        """Settings of model and data that somebody chose: here, in the sweep's file, or by a preset of the model."""
        content = self.sweep.document.content
        entries = [entry for entry in content.get("defaults") or [] if isinstance(entry, dict)]
        presets = {key for entry in entries for key in entry} | set(chosen)
        whole = "model" in presets or "override /model" in presets
        names = set(settings) | {f"model.{key}" for key in (base.values if whole else content).get("model") or {}}
        return names | {f"data.{key}" for key in content.get("data") or {}}

    def _begin_with(self, start: str, nested: dict[str, Any], typed: set[str]) -> None:
        """Fill in what starting weights fix. Raises ConfigError for settings, among the typed ones, that differ."""
        try:
            source = self.starts.of(start, nested["model"].get("family") if "model.family" in typed else None)
        except DataError as error:
            raise ConfigError(error.problem) from error
        problems = _other_model(source.model, start, nested["model"], typed)
        pin = nested["objective"].get("init_id")
        if pin not in (None, source.identity):
            rule = f"the weights at objective.init_from={start} are {source.identity}"
            problems.append(Problem("objective.init_id", rule, st.spelt(pin)))
        if source.tokenizer is not None and "data.tokenizer" not in typed:
            nested["data"]["tokenizer"] = source.tokenizer
        problems += _other_size(source, nested["data"].get("tokenizer", DataConfig.tokenizer))
        if problems:
            raise ConfigError(problems)
        free = {k: v for k, v in nested["model"].items() if f"model.{k}" in typed and k in CHANGEABLE}
        unknown = {k: v for k, v in nested["model"].items() if not hasattr(source.model, k)}  # refused with the rest
        nested["model"] = dataclasses.asdict(source.model) | free | unknown
        nested["objective"] |= {"init_from": source.place, "init_id": source.identity}

    def compute(self, request: Request) -> Compute:
        """The `compute` group: the same for every cell, so neither an axis nor a case may change it."""
        for name in request.axes:
            if name.partition(".")[0] == "compute":
                self.issues.refuse(name, "takes one value: where trials run cannot vary within a launch")
        pins = without_rivals(request.pins)
        base, settings = self._base(pins), _settings(pins)
        problems: list[Problem] = []
        try:
            own = {name: c.value for name, c in settings.items() if name.startswith("compute.")}
            return compute.read(compose.resolved(base.values, own)["compute"], problems)
        except ConfigError as error:
            problems += error.problems
            return Compute()
        finally:
            self._take(problems, settings, base)

    def _base(self, chosen: Choices) -> Base:
        presets = {name: str(c.value) for name, c in chosen.items() if name in PRESET_GROUPS}
        key = frozenset(presets.items())
        if key not in self.bases:
            self.bases[key] = compose.base(self.sweep.document, presets)
        return self.bases[key]

    def _take(self, problems: list[Problem], settings: Choices, base: Base) -> None:
        """Note the problems; of values that follow a wrong one (`${train.steps}`) only where nothing else is wrong."""
        own = [p for p in problems if not compose.follows(base, p.setting) or p.setting in settings]
        for problem in own or problems:
            self.issues.take([problem], self._origin(problem.setting, settings, base))

    def _origin(self, names: str, settings: Choices, base: Base) -> str:
        """Where the settings of a problem ('model.dim, model.n_heads') were written, each place once."""
        places: dict[str, None] = {}
        for name in names.split(", "):
            group = name.partition(".")[0]
            if name in settings:
                places[settings[name].origin] = None
            elif name in self.sweep.document.lines:
                places[self.sweep.document.where(name)] = None
            elif group in base.choices:
                places[f"conf/{group}/{base.choices[group]}.yaml"] = None
        return "; ".join(places)


CHANGEABLE = ("logit_softcap",)
"""Settings of the model that no weight depends on and that a trial may change: a remedy to study."""


def _start_of(nested: dict[str, Any]) -> str | None:
    """objective.init_from, where it is text and the groups that it fills in are there."""
    objective = nested.get("objective")
    others = all(isinstance(nested.get(group), dict) for group in ("model", "data"))
    start = objective.get("init_from") if isinstance(objective, dict) and others else None
    return start if isinstance(start, str) else None


def _other_model(own: ModelConfig, start: str, model: dict[str, Any], typed: set[str]) -> list[Problem]:
    """The typed settings of the model that are not those of the starting weights."""
    problems = []
    for key, wanted in dataclasses.asdict(own).items():
        value = model.get(key, wanted)
        grouped = key == "n_kv_heads" and (value or own.n_heads) == own.kv_heads  # null: as many as n_heads
        if f"model.{key}" in typed and key not in CHANGEABLE and value != wanted and not grouped:
            rule = f"the starting weights have {st.spelt(wanted)} (objective.init_from={start}): leave it out"
            problems.append(Problem(f"model.{key}", rule, st.spelt(value)))
    return problems


def _other_size(source: Weights, name: object) -> list[Problem]:
    """What is wrong with another tokenizer than the source's; what takes transformers to load is left to the launch."""
    if not isinstance(name, str) or (source.is_trial and name == source.tokenizer):
        return []
    try:
        if "transformers" in tokenizer.packages(name):
            return []
        own = source.vocab or _vocabulary(str(source.tokenizer))
        size = _vocabulary(name)
    except DataError as error:
        return [error.problem]
    rule = f"the starting weights have a vocabulary of {own}"
    return [] if size == own else [Problem("data.tokenizer", rule, f"{name} with {size}")]


@functools.cache
def _vocabulary(name: str) -> int:
    return tokenizer.load(name).vocab_size


def _settings(chosen: Choices) -> Choices:
    """The choices without presets: what is laid on top of them."""
    return {name: c for name, c in chosen.items() if name not in PRESET_GROUPS}


@dataclass(frozen=True)
class PlannedTrial:
    """A planned trial: its ids, what it is, the presets it was made of, and the named case if it is one."""

    trial_id: str
    cell_id: str
    config: TrialConfig
    choices: dict[str, str]
    case: str | None
    data_fingerprint: str


def fingerprints(configs: Iterable[DataConfig], cache: Path | None, issues: Issues) -> dict[DataConfig, str]:
    """The fingerprint of every distinct data setting. Each text is checked and hashed once: seq_len only cuts it.

    `cache`: the token cache, which remembers large files; None where there is none yet.
    """
    memory = None if cache is None else Memory(cache)
    of_text: dict[DataConfig, str] = {}
    known: dict[DataConfig, str] = {}
    for data in dict.fromkeys(configs):
        text = dataclasses.replace(data, seq_len=DataConfig.seq_len, validation_share=DataConfig.validation_share)
        try:
            if text not in of_text:
                sources.check(data)
                of_text[text] = sources.fingerprint(data, memory)
            known[data] = of_text[text]
        except DataError as error:
            issues.take([error.problem])
        if data.source in cfg.HUB and data.hub_revision is None:
            issues.warn(f"data.hub_revision: null pins no version of {data.path}: its text may change")
    return known


def planned(cells: Sequence[Cell], seeds: Sequence[int], known: dict[DataConfig, str]) -> list[PlannedTrial]:
    """Every trial, seed by seed, so that a study stopped half-way has every cell once before any cell twice."""
    trials = []
    for seed in seeds:
        for cell in cells:
            config, fingerprint = dataclasses.replace(cell.config, seed=seed), known[cell.config.data]
            ids = cfg.trial_id(config, fingerprint), cfg.cell_id(config, fingerprint)
            trials.append(PlannedTrial(*ids, config, cell.choices, cell.case, fingerprint))
    return trials


def distinct(trials: Sequence[PlannedTrial], issues: Issues) -> list[PlannedTrial]:
    """Every trial once; a cell of the grid that is also a named case goes by that name."""
    known: dict[str, PlannedTrial] = {}
    for trial in trials:
        first = known.setdefault(trial.trial_id, trial)
        if first is not trial:
            known[trial.trial_id] = dataclasses.replace(first, case=first.case or trial.case)
            issues.warn(
                f"{f'case {trial.case}' if trial.case else 'a cell'} equals another cell: {trial.cell_id} counts once"
            )
    return list(known.values())


def without_excluded(
    trials: Sequence[PlannedTrial], exclude: Sequence[Expression], chosen: Iterable[str], issues: Issues
) -> list[PlannedTrial]:
    """The trials that no condition names; cases stay. A condition that names none is warned about: a typing error?

    `chosen`: settings that the command line chose, which may well leave a condition without anything to exclude.
    """
    if not exclude:
        return list(trials)
    used: set[str] = set()
    kept = []
    for trial in trials:
        values = {**cfg.flat(trial.config), **trial.choices}
        try:
            naming = [e.text for e in exclude if trial.case is None and e.holds(values)]
        except ConfigError as error:
            issues.take(error.problems)
            return list(trials)
        used.update(naming)
        if not naming:
            kept.append(trial)
    for expression in exclude:
        if expression.text not in used and expression.names.isdisjoint(chosen):
            issues.warn(f"sweep.exclude: {expression.text!r} matches no cell")
    if not kept:
        issues.refuse("sweep.exclude", "leaves nothing to train")
    return kept


Pack = tuple[PlannedTrial, ...]


def packs(trials: Sequence[PlannedTrial], resources: Compute, launcher: str) -> list[Pack]:
    """Every trial in one pack; packs, and the trials in each, in the order of the trials.

    A pack holds trials of one shape, at most `most_per_pack(...)`, and the packs of a shape are of even size. With
    `compute.pack: auto` there are as many of them as keep all slots busy. Seeds of a cell stay together unless the
    even size cuts between them.
    """
    places = {trial.trial_id: place for place, trial in enumerate(trials)}
    shapes = by_shape(trials)
    counts = [-(-len(members) // most_per_pack(members[0].config, resources)) for members in shapes]
    if resources.pack == "auto":
        counts = _for_all_slots(shapes, counts, estimate.slots(resources, launcher) or 1)
    parts = [pack for members, count in zip(shapes, counts, strict=True) for pack in _even(members, count)]
    ordered = [tuple(sorted(pack, key=lambda trial: places[trial.trial_id])) for pack in parts]
    return sorted(ordered, key=lambda pack: places[pack[0].trial_id])


def by_shape(trials: Sequence[PlannedTrial]) -> list[list[PlannedTrial]]:
    """The trials of each shape, in order."""
    shapes: dict[tuple[object, ...], list[PlannedTrial]] = {}
    for trial in trials:
        shapes.setdefault(tuple(shape.shape(trial.config).values()), []).append(trial)
    return list(shapes.values())


def most_per_pack(config: TrialConfig, resources: Compute) -> int:
    """Trials of this one's shape that a pack may hold: compute.pack, or what fits into its share of a GPU's memory."""
    if resources.pack != "auto":
        return int(resources.pack)
    if not resources.gpus_per_pack:
        return 1
    there = estimate.room(resources) or ASSUMED_GPU_BYTES * resources.gpus_per_pack
    each = estimate.memory(config) + estimate.checkpoint_bytes(config)  # the copy from which a ring can be run again
    return max(1, min(MOST, int((there - estimate.PROCESS_BYTES) / each)))


def packs_in_words(packed: Sequence[Pack]) -> str:
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
    splitting = {name for other in configs[1:] for name in shape.differing(configs[0], other)}
    return [name for name in setting_names() if name in splitting]


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

"""The launch of a plan: prepare the data once, write the study's files, train what is not done.

Relaunching is resuming, because nothing but the files decides what is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.config import DataConfig
from stabstudy.data import tokens
from stabstudy.data.batches import open_batches
from stabstudy.data.errors import DataError
from stabstudy.data.supply import Supply
from stabstudy.planning import machine, packs
from stabstudy.planning.caveats import repetition
from stabstudy.planning.plan import Plan, PlannedTrial
from stabstudy.settings import ConfigError, Problem, show
from stabstudy.stability.rules import Rules
from stabstudy.sweeping.board import Board
from stabstudy.sweeping.preflight import preflight
from stabstudy.sweeping.provenance import provenance
from stabstudy.sweeping.rounds import Pack, Rounds, one_after_another
from stabstudy.sweeping.stopping import StopRequest, stop_on_signals
from stabstudy.sweeping.worker import PackFailed, train_pack


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: the exit code so far, and whether a signal ended it (its number)."""

    code: int
    signal: int | None = None


def launch(plan: Plan, say: Callable[[str], None] = print) -> Outcome:
    """Train every trial of the plan that is not done.

    Raises ConfigError for data that does not serve its trials and for models that fail their pre-flight, before
    anything is created; store.LockHeldError when the study is being worked on; machine.NotReadyError when Ray or the
    pre-flight does not start.
    """
    cache_dir = _cache_dir(plan.compute.cache_dir)
    prepare_data(plan, cache_dir, say)
    study = store.StudyFolder(plan.folder)
    preflight([t.config for t in _waiting(plan, study)], plan.compute, cache_dir, say)
    study.path.mkdir(parents=True, exist_ok=True)
    with store.lock(study.path):
        write_study(study, plan)
        todo = _waiting(plan, study)
        if not todo:
            say(f"nothing to train: all {len(plan.trials)} trials are done")
            return Outcome(0)
        return _train(plan, study, todo, cache_dir)


def _waiting(plan: Plan, study: store.StudyFolder) -> list[PlannedTrial]:
    """The trials that are not done; all of them while there is no study yet."""
    return [t for t in plan.trials if study.trial(t.trial_id).read_state().status != "done"]


def _cache_dir(named: str | None) -> Path:
    """Raises machine.NotReadyError where the folder that is named, there or in $STABSTUDY_CACHE, cannot be used."""
    try:
        return tokens.named_cache_dir(named) if named else tokens.default_cache_dir()
    except DataError as error:
        raise machine.NotReadyError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        rule = f"must be a folder that can be written ({reason})"
        raise machine.NotReadyError(str(Problem("compute.cache_dir", rule, show(named)))) from error


def prepare_data(plan: Plan, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Tokenize once what the trials read; check that it is enough for each. Raises ConfigError with all problems.

    Prints what is known of the training part only now: its size, its unigram entropy, and how often it repeats.
    """
    problems: dict[str, Problem] = {}
    supplies: dict[DataConfig, Supply] = {}
    configs = list(dict.fromkeys(dataclasses.replace(t.config, seed=0) for t in plan.trials))
    for config in configs:
        try:
            batches = open_batches(config, cache_dir, say)
            if config.data not in supplies:
                size, entropy = batches.training_tokens, batches.unigram_entropy
                say(f"data: {size:,} tokens to train on, unigram entropy {entropy:.3f} nat/token")
                supplies[config.data] = Supply(size, exact=True)
        except DataError as error:
            problems[str(error)] = error.problem
    if problems:
        raise ConfigError(list(problems.values()))
    for caveat in repetition(configs, [axis.name for axis in plan.axes], supplies):
        if caveat not in plan.warnings:
            say(f"warning: {caveat}")


def _train(plan: Plan, study: store.StudyFolder, todo: list[PlannedTrial], cache_dir: Path) -> Outcome:
    done_before = len(plan.trials) - len(todo)
    labels = {t.trial_id: label(t, plan) for t in todo}
    with stop_on_signals(study) as stop, Board(f"{plan.study}: {plan.question}", labels, done_before) as board:
        try:
            _run(plan, study, todo, cache_dir, board, stop)
        finally:
            _settle(study, labels)
    states = [study.trial(t.trial_id).read_state().status for t in plan.trials]
    if stop.number is not None:
        return Outcome(128 + stop.number, stop.number)
    return Outcome(0 if all(s == "done" for s in states) else 4 if "disk_full" in states else 3)


def _run(
    plan: Plan, study: store.StudyFolder, todo: list[PlannedTrial], cache_dir: Path, board: Board, stop: StopRequest
) -> None:
    packed = [tuple(t.trial_id for t in pack) for pack in packs.packs(todo, plan.compute, plan.launcher)]
    rounds = Rounds(study, packed, plan.compute.retries, board)
    shared: dict[str, Any] = {
        "study": str(study.path.resolve()),
        "engine": {
            "cache_dir": str(cache_dir.resolve()),
            "device": "cuda" if plan.compute.gpus_per_pack else "cpu",
            "threads": plan.compute.threads,
            "keep_checkpoints": plan.compute.keep_checkpoints,
            "compiler": machine.why_not_compile() is None,
        },
        "rules": Rules().to_json(),
    }
    if plan.launcher == "local":
        one_after_another(rounds, lambda pack: _train_here(pack, rounds, shared), lambda: stop.number is not None)
        return
    from stabstudy.sweeping import ray_backend

    ray_backend.run(rounds, study, shared, plan.compute, lambda: stop.number is not None)


def _train_here(pack: Pack, rounds: Rounds, shared: Mapping[str, Any]) -> None:
    with contextlib.suppress(PackFailed):
        train_pack(pack, shared, lambda report: rounds.progress(pack, report))


def write_study(study: store.StudyFolder, plan: Plan) -> None:
    """sweep.yaml, provenance.json and each trial's config.json; a file with the same content stays untouched."""
    store.write_text(study.sweep_file, plan.sweep_text)
    store.write_json(study.provenance_file, provenance(plan))
    for trial in plan.trials:
        folder = study.trial(trial.trial_id)
        folder.path.mkdir(parents=True, exist_ok=True)
        body = {
            "format": cfg.FORMAT_VERSION,
            "trial_id": trial.trial_id,
            "cell_id": trial.cell_id,
            "config": cfg.to_dict(trial.config),
            "choices": trial.choices,
            "case": trial.case,
            "data_fingerprint": trial.data_fingerprint,
        }
        if not folder.config_file.exists() or store.read_json(folder.config_file) != body:
            store.write_json(folder.config_file, body)


def _settle(study: store.StudyFolder, ids: Mapping[str, str]) -> None:
    """A trial whose process has vanished is `interrupted`, so that status and report name it rightly."""
    for trial_id in ids:
        folder = study.trial(trial_id)
        state = folder.read_state()
        if state.status == "lost":
            with contextlib.suppress(store.LockHeldError), store.lock(folder.path):
                folder.write_state(dataclasses.replace(state, status="interrupted"))


def label(trial: PlannedTrial, plan: Plan) -> str:
    """The trial's values on the plan's axes, e.g. 'depth=4 lr=0.01 clip=off seed=1'."""
    words = [trial.case] if trial.case else []
    for axis, value in zip(plan.axes, plan.values(trial), strict=True):
        shown = "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{axis.name.rsplit('.', 1)[-1]}={shown}")
    return " ".join([*words, f"seed={trial.config.seed}"])

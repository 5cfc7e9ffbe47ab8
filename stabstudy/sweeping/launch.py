"""From a plan to trained trials: prepare the data once, write the study's files, train what is not done.

Relaunching is resuming, because nothing but the files decides what is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.data import tokens
from stabstudy.stability.rules import rules_for
from stabstudy.sweeping.board import Board
from stabstudy.sweeping.plan import Plan, PlannedTrial
from stabstudy.sweeping.worker import STOP_FILE, TrialFailed, train_pack


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: the exit code so far, and whether a signal ended it (its number)."""

    code: int
    signal: int | None = None


def launch(plan: Plan, say: Callable[[str], None] = print) -> Outcome:
    """Train every trial of the plan that is not done.

    Raises data.sources.DataError before anything is created, store.LockHeldError when the study is being worked on,
    ray_backend.RayUnavailableError when Ray does not start.
    """
    cache_dir = Path(plan.compute.cache_dir) if plan.compute.cache_dir else tokens.default_cache_dir()
    for data in {t.config.data for t in plan.trials}:
        tokens.prepare(data, cache_dir, say)
    study = store.StudyFolder(plan.folder)
    study.path.mkdir(parents=True, exist_ok=True)
    with store.lock(study.path):
        (study.path / STOP_FILE).unlink(missing_ok=True)
        write_study(study, plan)
        todo = [t for t in plan.trials if study.trial(t.trial_id).read_state().status != "done"]
        if not todo:
            say(f"nothing to train: all {len(plan.trials)} trials are done")
            return Outcome(0)
        return _train(plan, study, todo, cache_dir)


def _train(plan: Plan, study: store.StudyFolder, todo: list[PlannedTrial], cache_dir: Path) -> Outcome:
    done_before = len(plan.trials) - len(todo)
    labels = {t.trial_id: label(t, plan) for t in todo}
    with stop_on_signals(study) as stop, Board(f"{plan.study}: {plan.question}", labels, done_before) as board:
        try:
            _run(plan, study, list(labels), cache_dir, board, stop)
        finally:
            _settle(study, labels)
    states = [study.trial(t.trial_id).read_state().status for t in plan.trials]
    if stop.number is not None:
        return Outcome(128 + stop.number, stop.number)
    return Outcome(0 if all(s == "done" for s in states) else 4 if "disk_full" in states else 3)


def _run(
    plan: Plan, study: store.StudyFolder, ids: list[str], cache_dir: Path, board: Board, stop: StopRequest
) -> None:
    gpus = _gpus(plan)
    shared: dict[str, Any] = {
        "study": str(study.path.resolve()),
        "gpus": gpus,
        "engine": {
            "cache_dir": str(cache_dir.resolve()),
            "device": "cuda" if gpus else "cpu",
            "threads": plan.compute.threads,
            "keep_checkpoints": plan.compute.keep_checkpoints,
        },
        "rules": rules_for(min(t.config.train.steps for t in plan.trials)).to_json(),
    }
    if plan.launcher == "local":
        _run_local(study, ids, shared, plan.compute.retries, board, stop)
        return
    from stabstudy.sweeping import ray_backend

    compute = dataclasses.replace(plan.compute, gpus_per_trial=gpus)
    ray_backend.run(ids, study, shared, compute, board, lambda: stop.number is not None)


def _run_local(
    study: store.StudyFolder,
    ids: list[str],
    shared: Mapping[str, Any],
    retries: int,
    board: Board,
    stop: StopRequest,
) -> None:
    """One trial after another in this process."""
    for trial_id in ids:
        for attempt in range(retries + 1):
            if stop.number is not None:
                return
            board.start(trial_id)
            with contextlib.suppress(TrialFailed):
                train_pack(trial_id, shared, lambda report, t=trial_id: board.progress(t, report))  # type: ignore[misc]
            state = study.trial(trial_id).read_state()
            if state.status == "interrupted":
                return
            if state.status in ("done", "oom") or attempt == retries:
                board.finish(trial_id, state)
                break
            board.forget(trial_id)


def _gpus(plan: Plan) -> float:
    """The GPU share of a trial; where the plan leaves it open: one GPU where this machine (or the cluster) has one."""
    if plan.compute.gpus_per_trial is not None:
        return plan.compute.gpus_per_trial
    return 1.0 if shutil.which("nvidia-smi") and _has_gpu() else 0.0


def _has_gpu() -> bool:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def write_study(study: store.StudyFolder, plan: Plan) -> None:
    """sweep.yaml, provenance.json and each trial's config.json; what already says the same stays untouched."""
    store.write_text(study.sweep_file, plan.sweep_text)
    store.write_json(study.provenance_file, _provenance(plan))
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


def _provenance(plan: Plan) -> dict[str, Any]:
    """What a reader needs to run it again: question, axes, command, versions, machine, code."""
    packages = ("stabstudy", "torch", "ray", "hydra-core", "numpy", "transformers")
    return {
        "format": cfg.FORMAT_VERSION,
        "study": plan.study,
        "question": plan.question,
        "axes": {axis.name: list(axis.values) for axis in plan.axes},
        "argv": list(plan.argv),
        "launcher": plan.launcher,
        "launched": store.now(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "processor": _processor()},
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git() -> dict[str, str] | None:
    """Commit of the code and a hash of what differs from it; None outside a checkout or without git."""
    import hashlib

    def ask(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        commit, patch = ask("rev-parse", "HEAD").strip(), ask("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    dirty = hashlib.sha256(patch.encode()).hexdigest()[:12] if patch else ""
    return {"commit": commit, "dirty_patch": dirty}


def _settle(study: store.StudyFolder, ids: Mapping[str, str]) -> None:
    """A trial whose process is gone without a word is `interrupted`, so that status and report name it rightly."""
    for trial_id in ids:
        folder = study.trial(trial_id)
        state = folder.read_state()
        if state.status == "lost":
            with contextlib.suppress(store.LockHeldError), store.lock(folder.path):
                folder.write_state(dataclasses.replace(state, status="interrupted"))


def label(trial: PlannedTrial, plan: Plan) -> str:
    """The trial's values on the plan's axes, e.g. 'depth=4 lr=0.01 clip=off seed=1'."""
    values = {**cfg.flat(trial.config), **trial.choices}
    words = []
    for axis in plan.axes:
        value = values.get(axis.name)
        shown = "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{axis.name.rsplit('.', 1)[-1]}={shown}")
    return " ".join([*words, f"seed={trial.config.seed}"])


@dataclass
class StopRequest:
    """The signal that asked for a stop, once one has."""

    number: int | None = None


@contextlib.contextmanager
def stop_on_signals(study: store.StudyFolder) -> Iterator[StopRequest]:
    """First Ctrl-C: trials checkpoint and end. A second one, SIGTERM or SIGHUP: stop at once (KeyboardInterrupt)."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        again = request.number is not None
        request.number = number
        (study.path / STOP_FILE).touch()
        if again or number != signal.SIGINT:
            raise KeyboardInterrupt
        print("\nstopping: running trials write a checkpoint (Ctrl-C again to stop at once)", file=sys.stderr)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield request
    except KeyboardInterrupt:
        if request.number is None:  # not ours
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (study.path / STOP_FILE).unlink(missing_ok=True)

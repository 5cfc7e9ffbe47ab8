"""The launch of a plan: prepare the data once, write the study's files and provenance, train what is not done.

Relaunching is resuming, because nothing but the files decides what is left to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from stabstudy import cli, disk, extras, store
from stabstudy import config as cfg
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.data import tokens, weights
from stabstudy.data.batches import Supply, open_batches
from stabstudy.planning import compute, trials
from stabstudy.planning.budget import hours_spent
from stabstudy.planning.estimate import repetition
from stabstudy.planning.plan import Plan, PlannedTrial
from stabstudy.planning.preview import intact, waiting
from stabstudy.settings import ConfigError, DataError, Problem, show
from stabstudy.stability.rules import Rules
from stabstudy.state import close_attempt, is_over
from stabstudy.sweeping import preflight
from stabstudy.sweeping.growth import Growth
from stabstudy.sweeping.progress import Board, settings_text
from stabstudy.sweeping.rounds import Pack, Rounds, one_after_another
from stabstudy.sweeping.worker import PackFailed, StopRequest, stop_on_signals, train_pack

SETTLE_SECONDS = 3.0
"""How long a launch that ends waits for the processes of its trials to be gone."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended: the exit code (`cli.EXIT_CODES`), and whether it ended before every trial had been tried.

    `reason`: what ended it, where that was not a signal.
    """

    code: int
    early: bool = False
    reason: str | None = field(default=None, compare=False)  # why it ended early, where no signal asked for it
    left: tuple[str, ...] = field(default=(), compare=False)  # trials that have not ended, and damaged ones

    @property
    def signal(self) -> int | None:
        """The number of the signal that ended it; None where none did."""
        return self.code - 128 if self.code > 128 else None


def launch(plan: Plan, say: Callable[[str], None] = print, console: Console | None = None) -> Outcome:
    """Train every trial of the plan that is not over. `console`: where progress is shown; None: on standard output.

    Raises ConfigError for data that does not serve its trials and for models that fail their pre-flight, and
    store.NewerFormatError for a study that a newer version wrote to, before anything is created;
    disk.LockHeldError when the study is being worked on; compute.NotReadyError when Ray or the pre-flight does not
    start, or no cluster at compute.address takes us.
    """
    cache_dir = _cache_dir(plan.compute.cache_dir)
    study = store.StudyFolder(plan.folder)
    whole, _ = intact(plan, study)
    todo = waiting(whole, study)
    for source in plan.first if todo else ():
        if (outcome := launch_first(source, say, console)) is not None:
            return outcome
    check_starts([t.config for t in todo])
    if plan.launcher == "ray" and plan.compute.address is not None:
        preflight.check_cluster(plan.compute.address)
    prepare_data(plan, cache_dir, say)
    preflight.check_models([t.config for t in todo], plan.compute, cache_dir, say)
    study.path.mkdir(parents=True, exist_ok=True)
    with disk.lock(study.path):
        whole, left_alone = intact(plan, study)
        for line in left_alone:
            say(f"damaged, left alone (remove its folder to train it again): {line}")
        write_study(study, whole, whole.trials, say)
        store.sweep_study(study, [t.trial_id for t in whole.trials], plan.compute.keep_checkpoints)
        outcome = _trained(whole, study, cache_dir, say, console)
    if not left_alone:
        return outcome
    damaged = {t.trial_id for t in plan.trials} - {t.trial_id for t in whole.trials}
    return dataclasses.replace(outcome, code=outcome.code or cli.PARTIAL, left=(*outcome.left, *sorted(damaged)))


def launch_first(plan: Plan, say: Callable[[str], None], console: Console | None) -> Outcome | None:
    """Train the one trial of a sweep from whose end others start, if it is not done; None where it is, and can be.

    Raises as `launch`.
    """
    if waiting(plan, store.StudyFolder(plan.folder)):
        say(f"first: sweep={plan.study}, from whose trained weights the trials of this launch start")
        outcome = launch(plan, say, console)
        if outcome.early:
            return outcome
        if outcome.code:
            failure = f"sweep={plan.study} failed, and the trials of this launch start from its weights"
            return Outcome(outcome.code, early=True, reason=failure)
    return None


def check_starts(configs: Sequence[TrialConfig]) -> None:
    """Raises ConfigError for starting weights that are not those of the plan, not finite, or of other vocabularies."""
    problems = []
    for config in dict.fromkeys(TrialConfig(c.model, objective=c.objective, data=c.data) for c in configs):
        try:
            weights.check(config)
        except DataError as error:
            problems.append(error.problem)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _trained(
    plan: Plan, study: store.StudyFolder, cache_dir: Path, say: Callable[[str], None], console: Console | None
) -> Outcome:
    todo = waiting(plan, study)
    if not todo and plan.planner is None:
        stopped = sum(study.trial(t.trial_id).read_state().status == "stopped" for t in plan.trials)
        early = f", {stopped} of them stopped early (stop=diverged trains these to their ends)" if stopped else ""
        say(f"nothing to train: all {len(plan.trials)} trials are done{early}" if plan.trials else "nothing to train")
        return Outcome(cli.OK)
    return _train(plan, study, todo, cache_dir, say, console)


def _cache_dir(named: str | None) -> Path:
    """Raises compute.NotReadyError where the folder that is named, there or in $STABSTUDY_CACHE, cannot be used."""
    try:
        return tokens.named_cache_dir(named) if named else tokens.default_cache_dir()
    except DataError as error:
        raise compute.NotReadyError(str(error)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        rule = f"must be a folder that can be written ({reason})"
        raise compute.NotReadyError(str(Problem("compute.cache_dir", rule, show(named)))) from error


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
                sequences = batches.training_windows * config.data.seq_len  # as trials count what they read
                supplies[config.data] = Supply(sequences, exact=True)
        except DataError as error:
            problems[str(error)] = error.problem
    if problems:
        raise ConfigError(list(problems.values()))
    for caveat in repetition(configs, [axis.name for axis in plan.axes], supplies):
        if caveat not in plan.warnings:
            say(f"warning: {caveat}")


def _train(
    plan: Plan,
    study: store.StudyFolder,
    todo: list[PlannedTrial],
    cache_dir: Path,
    say: Callable[[str], None],
    console: Console | None,
) -> Outcome:
    done_before = len(plan.trials) - len(todo)
    labels = {t.trial_id: label(t, plan) for t in todo}
    title = f"{plan.study}: {plan.question}"
    with stop_on_signals(study) as stop, Board(title, labels, done_before, plan.planner is not None, console) as board:

        def take(grown: Plan, new: Sequence[PlannedTrial]) -> None:
            prepare_data(dataclasses.replace(grown, trials=tuple(new)), cache_dir, lambda line: None)
            preflight.check_models([t.config for t in new], grown.compute, cache_dir, board.say)
            write_study(study, grown, new, board.say)
            board.labels |= {t.trial_id: label(t, grown) for t in new}

        growth = Growth(plan, study, take, board.say)
        spent = 0.0 if plan.budget.hours is None else hours_spent(study)
        with stop.after(plan.budget.hours, spent):
            if not stop.requested:
                _run(growth, todo, cache_dir, board, stop)
    return _ended(study, growth.plan, stop, say)


def _ended(study: store.StudyFolder, plan: Plan, stop: StopRequest, say: Callable[[str], None]) -> Outcome:
    """How the launch ended, by the states, which are settled first."""
    ids = [trial.trial_id for trial in plan.trials]
    _settle(study, ids)
    left = tuple(trial_id for trial_id in ids if not is_over(study.trial(trial_id).read_state().status, plan.stop))
    if stop.number is not None or stop.reason is not None:
        code = cli.ENVIRONMENT if stop.number is None else 128 + stop.number
        return Outcome(code, early=True, reason=stop.reason, left=left)
    if stop.spent is not None:
        ended = f"{len(ids) - len(left)} of {len(ids)} trials have ended"
        say(f"{stop.spent}: {ended}; launched with a larger one, it goes on")
        return Outcome(cli.OK)
    return Outcome(cli.PARTIAL if left else cli.OK, left=left)


def _run(growth: Growth, todo: list[PlannedTrial], cache_dir: Path, board: Board, stop: StopRequest) -> None:
    plan, study = growth.plan, growth.study
    packed = _ids(trials.packs(todo, plan.compute, plan.launcher)) if todo else []
    rounds = Rounds(study, packed, plan.compute.retries, board, stop, lambda slots: _ids(growth.more(slots)))
    shared: dict[str, Any] = {
        "study": str(study.path.resolve()),
        "engine": {
            "cache_dir": str(cache_dir.resolve()),
            "device": "cuda" if plan.compute.gpus_per_pack else "cpu",
            "threads": plan.compute.threads,
            "keep_checkpoints": plan.compute.keep_checkpoints,
            "compiler": compute.why_not_compile() is None,
            "stop": plan.stop,
        },
        "rules": Rules().to_json(),
    }
    if plan.launcher == "local":
        one_after_another(rounds, lambda pack: _train_here(pack, rounds, shared))
        return
    from stabstudy.sweeping import ray_backend

    ray_backend.run(rounds, study, shared, plan.compute, stop)


def _ids(packs: Sequence[trials.Pack]) -> list[Pack]:
    return [tuple(trial.trial_id for trial in pack) for pack in packs]


def _train_here(pack: Pack, rounds: Rounds, shared: Mapping[str, Any]) -> None:
    with contextlib.suppress(PackFailed):
        train_pack(pack, shared, lambda report: rounds.progress(pack, report))


def write_study(
    study: store.StudyFolder, plan: Plan, new: Sequence[PlannedTrial], say: Callable[[str], None] = print
) -> None:
    """sweep.yaml, provenance.json and the config.json of the new trials; one with the same content stays untouched."""
    store.write_text(study.sweep_file, plan.sweep_text)
    store.write_sealed(study.provenance_file, provenance(plan))
    for trial in new:
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
        try:
            if not folder.config_file.exists() or folder.read_own()[1] != body:
                store.write_sealed(folder.config_file, body)
        except store.StoreError as error:
            say(f"written anew: {error}")
            store.write_sealed(folder.config_file, body)


PACKAGES = ("stabstudy", "torch", "ray", "hydra-core", "numpy", "transformers")


def provenance(plan: Plan) -> dict[str, Any]:
    """The body of provenance.json, as of now."""
    return {
        "format": cfg.FORMAT_VERSION,
        "study": plan.study,
        "question": plan.question,
        "axes": {axis.name: list(axis.values) for axis in plan.axes},
        "conditions": None if plan.conditions is None else list(plan.conditions),
        "argv": list(plan.argv),
        "launcher": plan.launcher,
        "launched": disk.utc_now(),
        "versions": {"python": platform.python_version(), **{p: extras.installed(p) for p in PACKAGES}},
        "machine": {"platform": platform.platform(), "cores": compute.cores(), "processor": _processor()},
        "git": _git(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git() -> dict[str, str] | None:
    """Commit of the code and a hash of what differs from it; None outside a checkout or without git.

    Studies under results/ are not code: a change there is left out.
    """
    try:
        commit = _ask_git("rev-parse", "HEAD").strip()
        patch = _ask_git("diff", "HEAD", "--", ":(top)", ":(top,exclude)results")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty_patch": hashlib.sha256(patch.encode()).hexdigest()[:12] if patch else ""}


def _ask_git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def _settle(study: store.StudyFolder, ids: Sequence[str]) -> None:
    """A trial whose process has vanished is `interrupted`, so that status and report name it rightly."""
    folders = [study.trial(trial_id) for trial_id in ids]
    limit = time.monotonic() + SETTLE_SECONDS
    while any(disk.is_locked(folder.path) for folder in folders) and time.monotonic() < limit:
        time.sleep(0.05)
    for folder in folders:
        with contextlib.suppress(disk.LockHeldError, OSError):  # on a full disk it stays `running`, so `lost`
            state = folder.read_state()
            if state.status == "lost":
                with disk.lock(folder.path):
                    folder.write_state(close_attempt(state, "interrupted", seen=False))


def label(trial: PlannedTrial, plan: Plan) -> str:
    """The trial's values on the plan's axes, e.g. 'depth=4 lr=0.01 clip=off seed=1'."""
    names = [*(axis.name for axis in plan.axes), "seed"]
    settings = settings_text(names, [*plan.values(trial), trial.config.seed])
    return f"{trial.case} {settings}" if trial.case else settings

"""The Ray Tune backend: a fresh Tuner over what is left to do, quiet, fenced by a token, removed afterwards.

Ray is a scheduler here and nothing else. Its state is thrown away with its folder; `Tuner.restore` is never used (it
ignores an edited grid and unpickles what it finds). Facts behind the settings were measured on Ray 2.60.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabstudy import live, store, trace
from stabstudy.planning.compute import Compute
from stabstudy.planning.machine import NotReadyError, cores
from stabstudy.sweeping.board import Board
from stabstudy.sweeping.worker import tune_trial

START_TRIES = 3

LOOK_SECONDS = 5.0
"""Between two looks for trials that hang."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # telemetry is on by default
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON, TensorBoard copies
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that ends before its first heartbeat is no error
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: trials checkpoint first
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 silences the boxes
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # nothing from raylet or workers is printed here: trials have log.txt
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Stopped(Exception):  # noqa: N818 - not an error: it ends Tune's loop after a stop request
    """Every running trial has ended after a stop request."""


def run(
    trial_ids: Sequence[str],
    study: store.StudyFolder,
    shared: Mapping[str, Any],
    compute: Compute,
    board: Board,
    stopping: Callable[[], bool],
) -> None:
    """Train the trials through Ray Tune. Returns when none is left, or all running ones ended after a stop.

    Raises NotReadyError. A trial's own failure is no exception: it stands in the trial's state.
    """
    with _ray(compute, study) as (slots, storage):
        from ray import tune

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by the board, from our files
        callback = _watch(tune, study, board, stopping, compute)
        gpus = compute.gpus_per_trial
        tuner = tune.Tuner(
            tune.with_resources(tune_trial, {"cpu": compute.cpus_per_trial, "gpu": gpus}),
            param_space={"pack": tune.grid_search(list(trial_ids)), "shared": dict(shared)},
            tune_config=tune.TuneConfig(
                reuse_actors=gpus == 0,  # saves seconds a trial; on a GPU state would leak from trial to trial
                max_concurrent_trials=compute.max_concurrent or min(len(trial_ids), slots),
                trial_name_creator=lambda trial: str(trial.config["pack"]),
                trial_dirname_creator=lambda trial: str(trial.config["pack"]),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(storage),
                verbose=0,
                callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=compute.retries),
            ),
        )
        with contextlib.suppress(Stopped):
            tuner.fit()


@contextlib.contextmanager
def _ray(compute: Compute, study: store.StudyFolder) -> Iterator[tuple[int, Path]]:
    """A Ray of our own, or the cluster at compute.address. Yields (trials that fit at once, Tune's folder)."""
    os.environ.update(ENVIRONMENT)
    os.environ["OMP_NUM_THREADS"] = str(compute.threads)
    scratch = Path(tempfile.mkdtemp(prefix="stabstudy-"))  # short: a socket path must stay below 107 characters
    storage = study.path / ".ray"  # on a cluster the folder that every node sees
    shutil.rmtree(storage, ignore_errors=True)
    try:
        if compute.address is None and "ray" not in sys.modules:
            # before ray is imported: its core reads these once. Its ports listen on every interface, so the token is
            # the only fence
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_token_file()))
        import ray

        try:
            _start(compute, scratch)
            yield _slots(compute), storage
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(storage, ignore_errors=True)


def _token_file() -> Path:
    """A secret of this process, for every Ray that it starts; gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="stabstudy-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _start(compute: Compute, scratch: Path) -> None:
    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    if compute.address is not None:
        _check_reachable(compute.address)
        try:
            ray.init(address=compute.address, **settings)
        except Exception as error:
            raise NotReadyError(f"compute.address={compute.address}: {_first_line(error)}") from error
        return
    for tried in range(1, START_TRIES + 1):
        try:
            ray.init(num_cpus=cores(), include_dashboard=False, _temp_dir=str(scratch), **settings)
            return
        except Exception as error:
            ray.shutdown()
            if tried == START_TRIES:
                raise NotReadyError(f"Ray did not start in {START_TRIES} tries: {_first_line(error)}") from error


def _check_reachable(address: str) -> None:
    """Fail in seconds where Ray would try for minutes. `auto` and other names are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise NotReadyError(f"compute.address={address}: no Ray cluster answers ({error})") from error


def _slots(compute: Compute) -> int:
    """Trials that fit at once. Asking for what is not there would leave every trial pending for ever, silently."""
    import ray

    there = ray.cluster_resources()
    gpus = compute.gpus_per_trial
    cpus, cards = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if cpus < compute.cpus_per_trial:
        raise NotReadyError(f"compute.cpus_per_trial={compute.cpus_per_trial}: Ray has {cpus:g} cores")
    if cards < gpus:
        hint = "run on the CPU with compute.gpus_per_trial=0"
        raise NotReadyError(f"compute.gpus_per_trial={gpus:g}: Ray has {cards:g} GPUs; {hint}")
    fits = int(cpus // compute.cpus_per_trial)
    return min(fits, int(cards / gpus + 1e-9)) if gpus else fits


def _watch(tune: Any, study: store.StudyFolder, board: Board, stopping: Callable[[], bool], compute: Compute) -> Any:
    """Tune's callback that feeds the board, ends the loop after a stop, and kills a trial that hangs."""

    class Watch(tune.Callback):  # type: ignore[misc]  # its base exists only once ray is imported
        looked = 0.0

        def __reduce__(self) -> Any:
            return dict, ()  # Tune pickles its set-up for a restore that never happens; the board cannot be pickled

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            board.start(trial.config["pack"])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            board.progress(trial.config["pack"], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._ended(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._ended(trial)

        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            if stopping():
                if not any(store.is_locked(study.trial(t).path) for t in list(board.running)):
                    raise Stopped
                return
            if time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                kill_hung_trials(study, list(board.running), compute.hang_timeout)

        def _ended(self, trial: Any) -> None:
            folder = study.trial(trial.config["pack"])
            state = folder.read_state()
            if state.status != "interrupted" and state.attempts:
                board.finish(folder.trial_id, state)
            else:
                board.forget(folder.trial_id)

    return Watch()


def kill_hung_trials(study: store.StudyFolder, running: Sequence[str], limit: float) -> None:
    """SIGKILL trials of this host whose files have not changed for max(limit, 20 median steps) seconds.

    Tune then sees a dead actor and starts the trial again, from its checkpoint.
    """
    for trial_id in running:
        folder = study.trial(trial_id)
        record = folder.live(trace.TRACE)
        changed = [p.stat().st_mtime for p in (record, folder.state_file) if p.exists()]
        if not store.is_locked(folder.path) or not changed or time.time() - max(changed) <= limit:
            continue
        with contextlib.suppress(OSError, store.StoreError, trace.DamagedRecord):  # it is ending just now
            seconds = live.read(record, trace.TRACE)["seconds"]
            attempt = folder.read_state().attempts[-1]
            silent = time.time() - max(changed)
            if silent > 20 * np.median(seconds) and attempt.host == socket.gethostname():
                os.kill(attempt.pid, signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

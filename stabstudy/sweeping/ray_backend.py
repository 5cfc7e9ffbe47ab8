"""The Ray Tune backend: a fresh Tuner over each round of packs, quiet, fenced by a token, removed afterwards.

Ray is a scheduler here and nothing else. Its state is thrown away with its folder; `Tuner.restore` is never used (it
ignores an edited grid and unpickles what it finds). Facts behind the settings were measured on Ray 2.60.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
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

from stabstudy import store, trace
from stabstudy.planning.compute import Compute
from stabstudy.planning.machine import NotReadyError, cores
from stabstudy.sweeping.rounds import Pack, Rounds
from stabstudy.sweeping.worker import tune_pack

START_TRIES = 3

LOOK_SECONDS = 5.0
"""Between two looks for packs that hang."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # telemetry is on by default
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON, TensorBoard copies
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a pack that ends before its first heartbeat is no error
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: trials checkpoint first
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 silences the boxes
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # nothing from raylet or workers is printed here: trials have log.txt
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Stopped(Exception):  # noqa: N818 - not an error: it ends Tune's loop after a stop request
    """Every running pack has ended after a stop request."""


def run(
    rounds: Rounds, study: store.StudyFolder, shared: Mapping[str, Any], compute: Compute, stopping: Callable[[], bool]
) -> None:
    """Train the rounds through Ray Tune. Returns when none is left, or all running packs ended after a stop.

    Raises NotReadyError. A trial's own failure is no exception: it stands in the trial's state.
    """
    with _ray(compute, study) as (slots, storage):
        from ray import tune

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by the board, from our files
        while not stopping() and (packs := rounds.take()):
            tuner = _tuner(tune, packs, shared, compute, slots, storage, _watch(tune, study, rounds, stopping, compute))
            with contextlib.suppress(Stopped):
                tuner.fit()


def _tuner(
    tune: Any, packs: Sequence[Pack], shared: Mapping[str, Any], compute: Compute, slots: int, storage: Path, watch: Any
) -> Any:
    """A Tuner of one round: a trial of its own for each pack, tried once."""
    return tune.Tuner(
        tune.with_resources(tune_pack, {"cpu": compute.cpus_per_pack, "gpu": compute.gpus_per_pack}),
        param_space={"pack": tune.grid_search([list(pack) for pack in packs]), "shared": dict(shared)},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # imports, contexts and compiled code are kept from pack to pack
            max_concurrent_trials=compute.max_concurrent or min(len(packs), slots),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=0),  # a pack is tried again as halves, by the next round
        ),
    )


def _name(trial: Any) -> str:
    """A pack's name: no other pack of its round has its first member."""
    pack = trial.config["pack"]
    return f"{pack[0]}x{len(pack)}"


@contextlib.contextmanager
def _ray(compute: Compute, study: store.StudyFolder) -> Iterator[tuple[int, Path]]:
    """A Ray of our own, or the cluster at compute.address. Yields (packs that fit at once, Tune's folder)."""
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
    """Packs that fit at once. Asking for what is not there would leave every pack pending for ever, silently."""
    import ray

    there = ray.cluster_resources()
    gpus = compute.gpus_per_pack
    cpus, cards = there.get("CPU", 0.0), there.get("GPU", 0.0)
    if cpus < compute.cpus_per_pack:
        raise NotReadyError(f"compute.cpus_per_pack={compute.cpus_per_pack}: Ray has {cpus:g} cores")
    if cards < gpus:
        hint = "run on the CPU with compute.gpus_per_pack=0"
        raise NotReadyError(f"compute.gpus_per_pack={gpus:g}: Ray has {cards:g} GPUs; {hint}")
    fits = int(cpus // compute.cpus_per_pack)
    return min(fits, int(cards / gpus + 1e-9)) if gpus else fits


def _watch(tune: Any, study: store.StudyFolder, rounds: Rounds, stopping: Callable[[], bool], compute: Compute) -> Any:
    """Tune's callback that feeds the board, ends the loop after a stop, and kills a pack that hangs."""

    class Watch(tune.Callback):  # type: ignore[misc]  # its base exists only once ray is imported
        looked = 0.0
        running: dict[str, Pack] = {}

        def __reduce__(self) -> Any:
            return dict, ()  # Tune pickles its set-up for a restore that never happens; the board cannot be pickled

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.running = self.running | {trial.trial_id: tuple(trial.config["pack"])}
            rounds.start(self.running[trial.trial_id])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            rounds.progress(tuple(trial.config["pack"]), result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._ended(trial)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._ended(trial)

        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            packs = list(self.running.values())
            if stopping():
                if not any(store.is_locked(study.trial(t).path) for pack in packs for t in pack):
                    raise Stopped
                return
            if time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                kill_hung_packs(study, packs, compute.hang_timeout)

        def _ended(self, trial: Any) -> None:
            self.running = {name: pack for name, pack in self.running.items() if name != trial.trial_id}
            rounds.ended(tuple(trial.config["pack"]))

    return Watch()


def kill_hung_packs(study: store.StudyFolder, packs: Sequence[Pack], limit: float) -> None:
    """SIGKILL a process of this host that trains members of a pack of which none has written for too long.

    Too long is max(limit, 20 median steps) seconds. A process that has not recorded a step yet is left alone: it may
    be compiling. The next round tries its members again, from their checkpoints.
    """
    for pack in packs:
        with contextlib.suppress(OSError, store.StoreError, trace.DamagedRecord):  # it is ending just now
            for pid, folders in _processes(study, pack).items():
                files = [path for f in folders for path in (f.live(trace.TRACE), f.state_file) if path.exists()]
                silent = time.time() - max(path.stat().st_mtime for path in files)
                if silent > limit and silent > 20 * _median_step(folders):
                    os.kill(pid, signal.SIGKILL)


def _processes(study: store.StudyFolder, pack: Pack) -> dict[int, list[store.TrialFolder]]:
    """The running members of the pack by the process of this host that trains them: one, but for foreign locks."""
    found: dict[int, list[store.TrialFolder]] = {}
    for folder in map(study.trial, pack):
        state = folder.read_state() if store.is_locked(folder.path) else None
        if state and state.status == "running" and state.attempts[-1].host == socket.gethostname():
            found.setdefault(state.attempts[-1].pid, []).append(folder)
    return found


def _median_step(folders: Sequence[store.TrialFolder]) -> float:
    """Seconds of a step, from the first of the trials that has recorded one; infinite where none has."""
    for folder in folders:
        rows = folder.rows(trace.TRACE)
        if rows is not None and len(rows):
            return float(np.median(rows["seconds"]))
    return math.inf


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__

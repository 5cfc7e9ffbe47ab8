"""The process that talks to Ray: a fresh Tuner over each round of packs, quiet, fenced by a token.

It is a process of its own, in a session of its own, because Ray's core may wait for ever for a part of Ray that is
gone, and then neither threads nor signal handlers of its process go on. `ray_backend` starts it, tells it what to
train, and ends it with all that it has started.

Ray is a scheduler here and nothing else. Its state is thrown away with its folder; `Tuner.restore` is never used (it
ignores an edited grid and unpickles what it finds). Facts behind the settings were measured on Ray 2.60.

Messages are lines of JSON. In, on standard input: {"storage", "temporary", "shared", "compute"} first, then
{"packs": [...]} for each round; the end of input ends the process. Out, on the descriptor of its argument:
{"ready": [[name, host, port], ...]} or {"not_ready": why}, then {"start": pack}, {"progress": pack, "report": ...},
{"ended": pack}, {"over": true} at the end of a round.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import queue
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from stabstudy.planning.compute import Compute, NotReadyError, cores
from stabstudy.sweeping.worker import tune_pack
from stabstudy.wording import first_line

START_TRIES = 3
TUNE = "tune"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # telemetry is on by default
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths keep their meaning
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON, TensorBoard copies
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a pack that ends before its first heartbeat is no error
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "1000000",
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 silences the boxes
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # nothing from raylet or workers is printed here: trials have log.txt
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

ORDERLY_SECONDS = 5.0
"""After the end of input: where a round is at work, its launch was killed, and the round ends with it."""


def end_all() -> None:
    """SIGKILL this process and all of Ray that it has started: they are one process group."""
    os.killpg(0, signal.SIGKILL)


class Events:
    """Messages to the launch. A launch that is gone ends this process."""

    def __init__(self, descriptor: int):
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def tell(self, **message: Any) -> None:
        """Send one."""
        with self._lock:
            try:
                self._stream.write(json.dumps(message) + "\n")
                self._stream.flush()
            except BrokenPipeError:
                end_all()


def main() -> None:
    """See the module."""
    events, orders = Events(int(sys.argv[1])), _orders(sys.stdin)
    setup = orders.get()
    compute = Compute(**setup["compute"])
    try:
        with _ray(compute, setup) as slots:
            events.tell(ready=_services(), slots=slots)
            _rounds(orders, events, setup, compute, slots)
    except NotReadyError as error:
        events.tell(not_ready=str(error))


def _orders(stream: TextIO) -> queue.Queue[Any]:
    """The messages that come in, as they come; None, and soon the end of this process, where the launch has gone."""
    orders: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        for line in stream:
            orders.put(json.loads(line))
        orders.put(None)
        threading.Timer(ORDERLY_SECONDS, end_all).start()

    threading.Thread(target=read, daemon=True).start()
    return orders


def _rounds(orders: queue.Queue[Any], events: Events, setup: Mapping[str, Any], compute: Compute, slots: int) -> None:
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported by the board, from our files
    while (order := orders.get()) is not None:
        _tuner(tune, order["packs"], setup, compute, slots, _callback(tune, events)).fit()
        _forget(setup)
        events.tell(over=True)


def _forget(setup: Mapping[str, Any]) -> None:
    """Drop what Tune keeps of a round, in memory and in its folders: it would grow with the number of trials."""
    gc.collect()
    shutil.rmtree(Path(setup["storage"]) / TUNE, ignore_errors=True)
    for folder in Path(setup["temporary"]).glob("session_*/artifacts/*"):
        shutil.rmtree(folder, ignore_errors=True)


def _tuner(
    tune: Any, packs: Sequence[Sequence[str]], setup: Mapping[str, Any], compute: Compute, slots: int, callback: Any
) -> Any:
    """A Tuner of one round: a trial of its own for each pack, tried once."""
    return tune.Tuner(
        tune.with_resources(tune_pack, {"cpu": compute.cpus_per_pack, "gpu": compute.gpus_per_pack}),
        param_space={"pack": tune.grid_search([list(pack) for pack in packs]), "shared": dict(setup["shared"])},
        tune_config=tune.TuneConfig(
            reuse_actors=True,  # imports, contexts and compiled code are kept from pack to pack
            max_concurrent_trials=compute.max_concurrent or min(len(packs), slots),
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=setup["storage"],
            verbose=0,
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=0),  # a pack is tried again as halves, by the next round
        ),
    )


def _name(trial: Any) -> str:
    """A pack's name: no other pack of its round has its first member."""
    pack = trial.config["pack"]
    return f"{pack[0]}x{len(pack)}"


def _callback(tune: Any, events: Events) -> Any:
    """Tune's callback that tells the launch how packs go."""

    class Callback(tune.Callback):  # type: ignore[misc]  # its base exists only once ray is imported
        def __reduce__(self) -> Any:
            return dict, ()  # Tune pickles its set-up for a restore that never happens; a stream cannot be pickled

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            events.tell(start=trial.config["pack"])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            events.tell(progress=trial.config["pack"], report={"members": result.get("members", [])})

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            events.tell(ended=trial.config["pack"])

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            events.tell(ended=trial.config["pack"])

    return Callback()


@contextlib.contextmanager
def _ray(compute: Compute, setup: Mapping[str, Any]) -> Iterator[int]:
    """A Ray of our own, or the cluster at compute.address. Yields how many packs fit at once."""
    os.environ.update(ENVIRONMENT)
    os.environ["OMP_NUM_THREADS"] = str(compute.threads)
    if compute.address is None:
        # before ray is imported: its core reads these once. Its ports listen on every interface, so the token is the
        # only fence
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(_token_file(Path(setup["temporary"]))))
    import ray

    try:
        _start(compute, setup["temporary"])
        yield _slots(compute)
    finally:
        ray.shutdown()


def _token_file(folder: Path) -> Path:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def _start(compute: Compute, temporary: str) -> None:
    import ray

    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": True}
    if compute.address is not None:
        try:
            ray.init(address=compute.address, **settings)
        except Exception as error:
            raise NotReadyError(f"compute.address={compute.address}: {first_line(error)}") from error
        return
    for tried in range(1, START_TRIES + 1):
        try:
            ray.init(num_cpus=cores(), include_dashboard=False, _temp_dir=temporary, **settings)
            return
        except Exception as error:
            ray.shutdown()
            if tried == START_TRIES:
                raise NotReadyError(f"Ray did not start in {START_TRIES} tries: {first_line(error)}") from error


def _services() -> list[tuple[str, str, int]]:
    """The parts of Ray that a launch cannot do without: the control service, and the node manager of this host."""
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [
        ("control service (gcs_server)", host, int(port)),
        ("node manager (raylet)", here["NodeManagerAddress"], here["NodeManagerPort"]),
    ]


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


if __name__ == "__main__":
    # not main() of this file: run by -m it is `__main__`, and what Ray pickles of it would be a second copy
    from stabstudy.sweeping.ray_driver import main as imported_main

    imported_main()

"""Checks before a launch: foreign models exact under accumulation, a Ray cluster that answers and takes our token.

Each is a process of its own: one that may import torch, one whose Ray core may print its failures. What does not pass
is told in one line, before anything is created.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from stabstudy import config as cfg
from stabstudy.config import ModelConfig, TrialConfig
from stabstudy.planning.compute import Compute, NotReadyError
from stabstudy.settings import ConfigError, Problem
from stabstudy.sweeping.ray_driver import ENVIRONMENT

CONNECT_SECONDS = 10.0
LIMIT_SECONDS = 90.0
"""Ray itself gives up after twenty seconds, more on a loaded machine."""

REFUSED = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError")
"""In what Ray prints, over and over, where a cluster does not take the token."""

PROBE = (sys.executable, "-c", "import sys; from stabstudy.sweeping.preflight import connect; connect(sys.argv[1])")


def check_cluster(address: str, probe: Sequence[str] = PROBE) -> None:
    """Raises NotReadyError, in one line, unless a cluster at the address takes this machine as its driver.

    The probe is a process of its own: what Ray's core prints of its failures must not reach the terminal.
    """
    if rule := _malformed(address):
        raise NotReadyError(f"compute.address={address}: {rule}")
    _check_reachable(address)
    process = subprocess.Popen(
        [*probe, address],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | ENVIRONMENT,
    )
    timer = threading.Timer(LIMIT_SECONDS, process.kill)
    timer.start()
    last = ""
    try:
        assert process.stderr is not None
        for line in process.stderr:
            last = line.strip() or last
            if any(word in line for word in REFUSED):
                raise NotReadyError(
                    f"compute.address={address}: the cluster does not take this token, or wants one: set "
                    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
                )
        if process.wait() != 0:
            raise NotReadyError(f"compute.address={address}: no Ray cluster answers ({last[:200] or 'in time'})")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def connect(address: str) -> None:
    """In the probe's process: join the cluster and leave it. What went wrong is the last line of stderr."""
    import logging

    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        ray.shutdown()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
        os._exit(1)


def _check_reachable(address: str) -> None:
    """Fail in seconds where Ray would try for minutes. `auto` and other names are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise NotReadyError(f"compute.address={address}: no Ray cluster answers ({error})") from error


def _malformed(address: str) -> str | None:
    """Why the text cannot be an address, or None."""
    if not address or not address.isprintable() or any(c.isspace() for c in address):
        return "must be HOST:PORT or auto"
    host, colon, port = address.rpartition(":")
    if colon and not (host and port.isdigit() and 1 <= int(port[:6]) <= 65_535):
        return "must be HOST:PORT, with a port from 1 to 65535"
    return None


LOSS_APART, NORM_APART = 1e-5, 1e-4
"""Largest relative differences that are float summation order; what was measured is a hundredth of them."""


def check_models(configs: Sequence[TrialConfig], compute: Compute, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Measure each distinct model of a foreign family among the configs, in a process that may import torch.

    Raises ConfigError with every model that is not exact; NotReadyError where that cannot be found out.
    """
    foreign = foreign_models(configs)
    if not foreign:
        return
    say(f"pre-flight: checking gradient accumulation of {', '.join(_label(c.model) for c in foreign)}")
    problems = []
    for config, (loss, norm) in zip(foreign, _measured(foreign, compute, cache_dir), strict=True):
        apart = f"one batch whole and split, loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
        if loss <= LOSS_APART and norm <= NORM_APART:  # NaN is not
            say(f"pre-flight: {_label(config.model)} is exact: {apart}")
            continue
        rule = f"{_label(config.model)} is not exact under gradient accumulation: {apart}"
        problems.append(Problem("model.family", f"{rule} (at most {LOSS_APART:g} and {NORM_APART:g} are rounding)"))
    if problems:
        raise ConfigError(problems)


def _label(model: ModelConfig) -> str:
    return f"{model.family} {model.dim}x{model.depth}"


def foreign_models(configs: Sequence[TrialConfig]) -> list[TrialConfig]:
    """One config for each distinct model of a foreign family: that of the smallest batch."""
    by_model: dict[ModelConfig, TrialConfig] = {}
    for config in sorted(configs, key=lambda c: c.tokens_per_step):
        if config.model.family != "lingua":
            by_model.setdefault(config.model, config)
    return list(by_model.values())


def _measured(configs: Sequence[TrialConfig], compute: Compute, cache_dir: Path) -> list[tuple[float, float]]:
    """Of each config the relative differences of loss and gradient norm."""
    request = {
        "cache_dir": str(cache_dir.resolve()),
        "device": "cuda" if compute.gpus_per_pack and compute.address is None else "cpu",
        "threads": compute.threads,
        "configs": [cfg.to_dict(config) for config in configs],
    }
    command = [sys.executable, "-m", "stabstudy.training.probes"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    if process.returncode or len(lines) != len(configs):
        reason = last_line(process.stderr) or f"its process ended with {process.returncode}"
        raise NotReadyError(f"the pre-flight of model.family could not run: {reason}")
    return [tuple(json.loads(line)) for line in lines]


def last_line(output: str) -> str:
    """The last line of a process's output that is not blank, at most 300 characters; "" where there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""

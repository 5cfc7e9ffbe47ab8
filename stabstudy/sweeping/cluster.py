"""Pre-flight of `compute.address`: whether a Ray cluster answers there and takes our token, before anything is made."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from stabstudy.planning.compute import NotReadyError
from stabstudy.sweeping.ray_driver import ENVIRONMENT

CONNECT_SECONDS = 10.0
LIMIT_SECONDS = 90.0
"""Ray itself gives up after twenty seconds, more on a loaded machine."""

REFUSED = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError")
"""In what Ray prints, over and over, where a cluster does not take the token."""

PROBE = (sys.executable, "-c", "import sys; from stabstudy.sweeping.cluster import connect; connect(sys.argv[1])")


def check(address: str, probe: Sequence[str] = PROBE) -> None:
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

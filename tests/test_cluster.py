"""The pre-flight of compute.address: one line of ours for each way in which a cluster does not take us."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_launch import TINY, folder  # noqa: F401  # a fixture

from stabstudy import sweep
from stabstudy.planning.compute import NotReadyError
from stabstudy.sweeping import preflight

NOISE = "[2026-01-01 gcs_client.cc:210: Failed to get cluster ID"


def probe(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import sys, time\ndef say(x): print(x, file=sys.stderr, flush=True)\n{code}")


@pytest.mark.parametrize("address", ["a b", "", " ", "a\tb", "1.2.3.4:", ":6379", "h:0", "h:65536", "h:x", "h:1\n"])
def test_what_is_no_address_is_refused_at_once(address: str) -> None:
    with pytest.raises(NotReadyError, match="must be HOST:PORT") as caught:
        preflight.check_cluster(address, probe("raise SystemExit('must not be asked')"))
    assert "must not be asked" not in str(caught.value)


@pytest.mark.parametrize("line", ["Unauthenticated: RPC error: InvalidAuthToken", "AuthenticationError: no file"])
def test_a_token_that_is_not_taken_is_told_as_that_without_waiting(
    line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    with pytest.raises(NotReadyError, match="the cluster does not take this token, or wants one"):
        preflight.check_cluster("auto", probe(f"say({NOISE!r} + ' ' + {line!r}); time.sleep(60)"))
    assert time.monotonic() - begun < 30 and capfd.readouterr().err == ""


def test_no_answer_is_told_without_noise(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotReadyError, match=r"^compute.address=auto: no Ray cluster answers \(ConnectionError: x\)$"):
        preflight.check_cluster("auto", probe(f"say({NOISE!r}); say('ConnectionError: x'); raise SystemExit(1)"))
    assert capfd.readouterr().err == ""


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LIMIT_SECONDS", 0.5)
    with pytest.raises(NotReadyError, match="no Ray cluster answers"):
        preflight.check_cluster("auto", probe("time.sleep(60)"))


def test_an_answer_is_enough() -> None:
    preflight.check_cluster("auto", probe(f"say({NOISE!r})"))


def test_nothing_is_made_for_a_cluster_that_is_none(
    folder: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(folder.rglob("*"))
    assert sweep.main([*TINY, "compute.address='a b'"]) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: machine: compute.address=a b: must be HOST:PORT or auto"
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A Ray cluster on this machine that wants a token: its address, and the token's file."""
    token = tmp_path / "token"
    token.write_text("3" * 64)
    port = 20_000 + os.getpid() % 10_000
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", "--include-dashboard=false", f"--port={port}"]
    executable = str(Path(sys.executable).with_name("ray"))
    process = subprocess.Popen(
        [executable, *command[1:], "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "--block" in line:
            break
    yield f"127.0.0.1:{port}", token
    process.terminate()
    process.stdout.close()
    process.wait(60)


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_cluster_takes_its_own_token_and_no_other(
    head: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, token = head
    wrong = tmp_path / "wrong"
    wrong.write_text("4" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    preflight.check_cluster(address)
    for path in (wrong, tmp_path / "nowhere"):
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        with pytest.raises(NotReadyError, match="token"):
            preflight.check_cluster(address)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    with pytest.raises(NotReadyError, match="token"):
        preflight.check_cluster(address)

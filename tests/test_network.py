"""The hub: what cannot be reached is known within seconds, without a line from a library."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from stabstudy.data import tokenizer

NOWHERE = "http://127.0.0.1:9"


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """The address of a server that gives one answer to everybody; None: it takes calls and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while answer is not None:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", *tokenizer.OFFLINE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("status", ["200 OK", "403 Forbidden", "503 Service Unavailable"])
def test_a_server_that_answers_is_reached(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    with server(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert tokenizer.why_no_hub() == ""


def test_a_port_that_is_closed_and_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    assert tokenizer.why_no_hub() == f"{NOWHERE}: Connection refused"
    for address in ("http://name.invalid", "no address", "http://127.0.0.1:99999"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert address in tokenizer.why_no_hub()


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SECONDS", 0.5)
    with server(None) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        began = time.monotonic()
        assert address in tokenizer.why_no_hub()
        assert time.monotonic() - began < 3


def test_what_keeps_the_libraries_offline_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer.hub_forbidden() == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert tokenizer.hub_forbidden() == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert tokenizer.hub_forbidden() == "$HF_HUB_OFFLINE is set"


ASKED = {
    "tokenizer": "from stabstudy.data import tokenizer; tokenizer.load('nobody/nothing')",
    "data set": "from stabstudy.data import sources; next(sources.documents(DataConfig(source='hf', path='a/b')))",
}


@pytest.mark.parametrize("asked", ASKED)
def test_without_a_network_the_libraries_are_not_heard(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from stabstudy.config import DataConfig\nfrom stabstudy.settings import DataError\n"
    program += f"try:\n    {ASKED[asked]}\nexcept DataError as error:\n    print(error)\n"
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 20, "importing the library takes most of it; a try and its repetitions a minute"
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert "the hub cannot be reached (http://127.0.0.1:9: Connection refused)" in done.stdout

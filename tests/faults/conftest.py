"""What every part of the campaign needs: its counts, its seed, and where its row goes."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import studies
from faults.campaign import Part
from faults.counts import COUNTS


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The token cache of all studies here."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The study of 24 trials, never interrupted, one trial at a time."""
    return studies.trained(tmp_path_factory.mktemp("reference") / "study", cache, pack=1)


@pytest.fixture
def part(request: pytest.FixtureRequest) -> Callable[[str], Part]:
    """Begins a part by its name in the table of counts; use the answer as a context manager."""

    def begin(name: str) -> Part:
        count = COUNTS[name]
        wanted = count.full if request.config.getoption("--full") else count.sample
        if not wanted:
            pytest.skip("only under --full")
        seed = request.config.getoption("--fault-seed")
        seed = secrets.randbelow(10**9) if seed is None else seed
        rows, minutes = (request.config.getoption(option) for option in ("--rows", "--minutes"))
        return Part(name, wanted, seed, rows, minutes)

    return begin

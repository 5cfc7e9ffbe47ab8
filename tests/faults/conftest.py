"""What every part of the campaign needs: its counts, its seed, and where its row goes."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import pytest

from faults.campaign import Part
from faults.counts import COUNTS


@pytest.fixture
def part(request: pytest.FixtureRequest) -> Callable[[str], Part]:
    """Begins a part by its name in the table of counts; use the answer as a context manager."""

    def begin(name: str) -> Part:
        count = COUNTS[name]
        wanted = count.full if request.config.getoption("--full") else count.sample
        seed = request.config.getoption("--fault-seed")
        return Part(
            name, wanted, secrets.randbelow(10**9) if seed is None else seed, request.config.getoption("--rows")
        )

    return begin

"""Shared fixtures: where real data lies, and an environment that reaches no network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network; a hub call must fail at once, not hang
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a test process per core already
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")  # nor do a report's workers find an idle one: they only take time

from trials import cache, make  # noqa: E402, F401  # fixtures; they import torch, which reads the environment

ROOT = Path(__file__).resolve().parent.parent

# a loaded machine is no failure
settings.register_profile("sample", max_examples=100, deadline=None)
settings.register_profile("full", max_examples=10_000, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the whole campaign of faults; 10,000 examples of properties")
    parser.addoption("--rows", type=Path, help="append what each part of the campaign of faults found to this file")
    parser.addoption("--minutes", type=float, default=25, help="after which a part of it begins no further injection")
    parser.addoption("--fault-seed", type=int, help="repeat injections of faults: the seed that they printed")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("--full") else "sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """10,000 examples take longer than a test may; without `--full` the largest cases are left out."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("whole")]
    else:
        for item in items:
            if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
                item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether simulations run at their whole size: `pytest -m slow --full`."""
    return bool(request.config.getoption("--full"))


def whole(*values: object) -> object:
    """A parameter of a test that runs with `--full` alone."""
    return pytest.param(*values, marks=pytest.mark.whole)


@contextlib.contextmanager
def blank_figures() -> Iterator[None]:
    """Reports that are written inside have every figure, with its words and numbers, as an empty picture.

    To lay it out and draw it takes most of a report's time. For tests that read what a page says: that figures can be
    drawn, and what they show, is proved by `test_drawn.py`, `test_plots.py` and, for whole pages, `test_page.py`,
    `test_trial_page.py` and `test_several.py`.
    """
    from stabstudy.analysis.elements import Drawing
    from stabstudy.analysis.figures import style

    def blank(figure: Any, png: bool = True) -> Drawing:
        return Drawing(
            '<svg width="72pt" height="72pt" xmlns="http://www.w3.org/2000/svg"/>', b"no pixels" if png else None
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "draw", blank)
        yield


@pytest.fixture
def undrawn() -> Iterator[None]:
    """`blank_figures` around a test."""
    with blank_figures():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real text, a real BPE tokenizer and a real training log; skips where it is absent."""
    found = Path(os.environ.get("STABSTUDY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not found.is_dir():
        pytest.skip(f"no real data at {found}")
    return found

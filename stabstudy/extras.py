"""The optional packages: which extra installs each, the oldest release that serves, and what to say without it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

EXTRAS = {
    "train": ("torch", "safetensors", "transformers", "tokenizers"),
    "ray": ("ray",),
    "search": ("optuna", "scikit-learn"),
    "hf": ("datasets",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""Extra -> the packages that the program asks for before it starts what needs them. `all` is all but `wandb`."""

FLOORS = {"torch": (2, 10), "ray": (2, 59), "datasets": (4, 0), "optuna": (5, 0)}
"""Oldest releases that may run: older ones have known security holes, run a dataset's code, or lack what is used."""


def install(packages: Iterable[str]) -> str:
    """The command that installs the packages, by their extras."""
    needed = set(packages)
    return f"pip install 'stabstudy[{','.join(e for e, brought in EXTRAS.items() if needed & set(brought))}]'"


def installed(package: str) -> str:
    """The installed version, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def why_not(packages: Iterable[str]) -> list[str]:
    """One line for all the packages that are missing, with the command, and one for each that is too old."""
    have = {package: installed(package) for package in dict.fromkeys(packages)}
    missing = [package for package, release in have.items() if release == "none"]
    old = [p for p, release in have.items() if p not in missing and _numbers(release) < FLOORS.get(p, ())]
    lines = [f"needs {' and '.join(missing)}, not installed here: {install(missing)}"] if missing else []
    return lines + [f"needs {p} {'.'.join(map(str, FLOORS[p]))} or newer, found {have[p]}" for p in old]


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", release)[:2])

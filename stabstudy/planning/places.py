"""The locations of conf/ and sweeps/, and the sweeps that can be named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import stabstudy
from stabstudy import disk, store
from stabstudy.settings import ConfigError, Problem, nearest

HEAD = 64 * 1024
"""Characters of a sweep file that are read for its question."""

_PACKAGE = Path(stabstudy.__file__).resolve().parent


@dataclass(frozen=True)
class SweepPlace:
    """A sweep file and the question in its header."""

    name: str
    path: Path
    question: str


def conf_folder() -> Path:
    """The folder of the Hydra groups: inside an installed package, beside it in a checkout."""
    return _shipped("conf", "trial.yaml")


def sweep_folders(cwd: Path) -> list[Path]:
    """Where sweeps are looked for: the user's own ./sweeps first, then the shipped ones."""
    own, shipped = (cwd / "sweeps").resolve(), _shipped("sweeps", "quickstart.yaml")
    return [own, shipped] if own.is_dir() and own != shipped else [shipped]


def find_sweep(name: str, cwd: Path) -> Path:
    """The file of the sweep. Raises ConfigError with the nearest names."""
    found = _files(cwd)
    if name not in found:
        raise ConfigError(Problem("sweep", f"there is no such sweep{nearest(name, sorted(found))}", repr(name)))
    return found[name]


def sweeps(cwd: Path) -> list[SweepPlace]:
    """Every sweep that can be named from here, by name."""
    return [SweepPlace(name, path, question(_text(path))) for name, path in sorted(_files(cwd).items())]


def question(text: str) -> str:
    """The first comment of a sweep file that is no Hydra header, up to its first question mark or its first gap."""
    words: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and comment.startswith("@package"):
            continue
        if not line.startswith("#") or not comment:
            break
        words.append(comment)
        if comment.endswith("?"):
            break
    return " ".join(words).replace("${", "$ {")  # it is kept in sweep.yaml, where that would be an interpolation


def shown(path: Path, cwd: Path) -> str:
    """The path as messages name it: relative to where the user stands when it lies below."""
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def _shipped(folder: str, witness: str) -> Path:
    inside, beside = _PACKAGE / folder, _PACKAGE.parent / folder
    return inside if (inside / witness).is_file() else beside


def _files(cwd: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in reversed(sweep_folders(cwd)):
        found |= {path.stem: path for path in folder.glob("*.yaml") if store.check_name(path.stem) is None}
    return found


def _text(path: Path) -> str:
    """The beginning of a sweep file, where its question stands; empty where it cannot be read."""
    if disk.not_a_file(path):
        return ""
    try:
        with path.open(encoding="utf-8", errors="replace") as f:
            return f.read(HEAD)
    except OSError:
        return ""

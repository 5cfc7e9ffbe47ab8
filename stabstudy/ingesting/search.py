"""The search for training logs: which files are logs, which of them are one run, and the reader of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stabstudy import entries
from stabstudy.ingesting import events, lines, lingua, names, tabular, text, trainer
from stabstudy.ingesting.points import LogError, Raw

STATE, LOG, METRICS = "trainer_state.json", "trainer_log.jsonl", "metrics.jsonl"
LOOKED_FOR = f"{STATE}, {LOG}, {METRICS}, {events.PREFIX}*, *.csv, *.jsonl, *.parquet, *.log"

Kind = Literal["trainer", "lingua", "events", "table", "text"]
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Source:
    """The files of one run."""

    kind: Kind
    files: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where the run lies: settings are looked for here. That of a trainer's checkpoint is the folder above."""
        parent = self.files[0].parent
        return parent.parent if self.kind == "trainer" and _CHECKPOINT.fullmatch(parent.name) else parent

    @property
    def alone(self) -> bool:
        """Whether the folder belongs to this run: a table or a text may be one of several in it."""
        return self.kind not in ("table", "text")

    def read(self, given: Mapping[str, str]) -> Raw:
        """Raises LogError where nothing can be used, OSError where nothing can be read."""
        if self.kind == "table":
            return tabular.read(self.files[0], given)
        if self.kind == "text":
            return text.read(self.files[0], given)
        if self.kind == "events":
            return events.read(self.files, given)
        if self.kind == "lingua":
            return lingua.read(self.files[0])
        by_suffix = {path.suffix: path for path in self.files}
        return trainer.read(by_suffix.get(".json"), by_suffix.get(".jsonl"))


def sources(path: Path, given: Mapping[str, str]) -> list[Source]:
    """The runs at a path: the file itself, or what a folder holds. Raises LogError where that is nothing."""
    if path.is_dir():
        if found := list(_within(path, given)):
            return found
        raise LogError(f"holds no training log (looked for {LOOKED_FOR})")
    if not path.is_file():
        raise LogError("does not exist" if not path.exists() else "is not a file")
    return [_of_file(path)]


def _of_file(path: Path) -> Source:
    if path.name.startswith(events.PREFIX):
        return Source("events", (path,))
    if path.name == LOG or (path.suffix == ".jsonl" and "current_steps" in lines.keys(path)):
        return Source("trainer", (path, *_state_of(path.parent)))
    if path.suffix == ".json":
        return Source("trainer", (path,))
    if path.suffix == ".jsonl" and _is_lingua(path):
        return Source("lingua", (path,))
    if path.suffix in tabular.SUFFIXES:
        return Source("table", (path,))
    if text.is_named(path):
        return Source("text", (path,))
    raise LogError(f"is not known as a log by its name (known: {LOOKED_FOR})")


def _within(top: Path, given: Mapping[str, str]) -> Iterator[Source]:
    """Every run below a folder. The folder of a run is not searched further: what lies in it is the run's own."""
    for at, folders, files in os.walk(top):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        folder = Path(at)
        files = [f for f in files if not entries.not_a_file(folder / f)]  # a pipe would be waited for
        log = [folder / LOG] if LOG in files else []
        if trainer_files := (*log, *_state_of(folder)):
            folders.clear()
            yield Source("trainer", trainer_files)
        elif METRICS in files and _is_lingua(folder / METRICS):
            folders.clear()
            yield Source("lingua", (folder / METRICS,))
        elif written := tuple(folder / f for f in sorted(files) if f.startswith(events.PREFIX)):
            yield Source("events", written)
        else:
            paths = [path for f in sorted(files) if (path := folder / f).is_file()]  # a pipe would wait for ever
            tables = [path for path in paths if path.suffix in tabular.SUFFIXES and _is_table(path, given)]
            # what a run prints beside its table is the same run once more
            texts = [] if tables else [path for path in paths if _is_text(path)]
            yield from (Source("table", (path,)) for path in tables)
            yield from (Source("text", (path,)) for path in texts)


def _state_of(folder: Path) -> tuple[Path, ...]:
    """trainer_state.json in a run's folder; where there is none, that of its last checkpoint."""
    if (folder / STATE).is_file():
        return (folder / STATE,)
    numbered = ((_CHECKPOINT.fullmatch(p.parent.name), p) for p in folder.glob(f"checkpoint-*/{STATE}"))
    saved = [(int(m[1]), p) for m, p in numbered if m]
    return (max(saved)[1],) if saved else ()


def _is_lingua(path: Path) -> bool:
    try:
        return set(lines.keys(path)) >= {lingua.NAMES["step"], lingua.NAMES["grad_norm"]}
    except OSError:
        return path.name == METRICS  # reading it will show what is wrong


def _is_table(path: Path, given: Mapping[str, str]) -> bool:
    """Whether a table found in a folder is a log: by the names of its columns; others are passed over."""
    try:
        names.match(tabular.columns(path), given)
    except (LogError, OSError):
        return False
    return True


def _is_text(path: Path) -> bool:
    """Whether a file found in a folder is a text log: by its name and its first lines."""
    try:
        return text.is_named(path) and text.is_log(path)
    except OSError:
        return False

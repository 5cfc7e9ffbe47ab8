"""The search for training logs: which files are logs, which of them are one run, and the reader of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stabstudy import disk
from stabstudy.ingesting import choice, readers, several, text
from stabstudy.ingesting.points import LogError, Raw

STATE, LOG, METRICS = "trainer_state.json", "trainer_log.jsonl", "metrics.jsonl"
LOOKED_FOR = f"{STATE}, {LOG}, {METRICS}, {readers.EVENTS_PREFIX}*, *.csv, *.jsonl, *.parquet, *.log, *.txt"
MOST_SHOWN = 20
"""Tables that were passed over and are named."""

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
        """Whether the folder belongs to this run: a table or a text log may be one of several in it."""
        return self.kind not in ("table", "text")

    def read(self, given: Mapping[str, str]) -> list[Raw]:
        """Its runs. Raises LogError where nothing can be used, OSError where nothing can be read."""
        if self.kind == "table":
            return readers.read_table(self.files, given)
        if self.kind == "text":
            return text.read(self.files[0], given)
        if self.kind == "events":
            return [readers.read_events(self.files, given)]
        if self.kind == "lingua":
            return [readers.read_lingua(self.files[0])]
        by_suffix = {readers.log_suffix(path): path for path in self.files}
        return [readers.read_trainer(by_suffix.get(".json"), by_suffix.get(".jsonl"), given)]


@dataclass
class Search:
    """What a path holds: the runs, and a line for each table that has a step and was passed over."""

    sources: list[Source] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def search(path: Path, given: Mapping[str, str]) -> Search:
    """The runs at a path: the file itself, or what a folder holds. Raises LogError where that is nothing."""
    if path.is_dir():
        content = Search()
        content.sources += _within(path, given, content.passed_over)
        if content.sources:
            return content
        why = f"; {'; '.join(content.passed_over[:MOST_SHOWN])}" if content.passed_over else ""
        raise LogError(f"holds no training log (looked for {LOOKED_FOR}){why}")
    if not path.is_file():
        raise LogError("does not exist" if not path.exists() else "is not a file")
    return Search([_of_file(path)])


def join_charts(sources: Iterable[Source], given: Mapping[str, str]) -> list[Source]:
    """The sources, with the chart exports of one folder as one: each holds one metric of the same runs."""
    joined: dict[object, list[Source]] = {}
    for source in sources:
        joined.setdefault(source.folder if _is_chart(source, given) else source, []).append(source)
    return [Source(group[0].kind, tuple(file for s in group for file in s.files)) for group in joined.values()]


def _is_chart(source: Source, given: Mapping[str, str]) -> bool:
    try:
        columns = readers.table_columns(source.files[0]) if source.kind == "table" else []
    except (LogError, OSError):
        return False
    return several.is_chart(columns) and not set(given.values()) & set(columns)


def _of_file(path: Path) -> Source:
    suffix = readers.log_suffix(path)
    if path.name.startswith(readers.EVENTS_PREFIX):
        return Source("events", (path,))
    if path.name == LOG or (suffix == ".jsonl" and "current_steps" in readers.line_keys(path)):
        return Source("trainer", (path, *_state_of(path.parent)))
    if suffix == ".json":
        return Source("table" if _is_rows(path) else "trainer", (path,))
    if suffix == ".jsonl" and _is_lingua(path):
        return Source("lingua", (path,))
    if suffix in readers.TABLE_SUFFIXES:
        return Source("table", (path,))
    if text.is_named(path) or text.is_log(path):
        return Source("text", (path,))
    raise LogError(f"is not known as a log by its name (known: {LOOKED_FOR})")


def _is_rows(path: Path) -> bool:
    """Whether a .json file holds rows, as a list or a line each, and no state of a trainer."""
    with readers.open_log(path) as f:
        first, second = f.readline(2**20), f.readline(2**20)
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
        return True
    return readers.parse_line(first) is not None and readers.parse_line(second) is not None


def _within(top: Path, given: Mapping[str, str], passed_over: list[str]) -> Iterator[Source]:
    """Every run below a folder. The folder of a run is not searched further: what lies in it is the run's own."""
    for at, folders, files in os.walk(top):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        folder = Path(at)
        files = [f for f in files if not disk.not_a_file(folder / f)]  # a pipe would be waited for
        log = [folder / LOG] if LOG in files else []
        if trainer_files := (*log, *_state_of(folder)):
            folders.clear()
            source = Source("trainer", trainer_files)
        elif METRICS in files and _is_lingua(folder / METRICS):
            folders.clear()
            source = Source("lingua", (folder / METRICS,))
        elif written := tuple(folder / f for f in sorted(files) if f.startswith(readers.EVENTS_PREFIX)):
            source = Source("events", written)
        else:
            yield from _loose(folder, sorted(files), given, passed_over)
            continue
        passed_over += _tables_beside(source, [folder / f for f in sorted(files)], given)
        yield source


def _tables_beside(source: Source, paths: list[Path], given: Mapping[str, str]) -> list[str]:
    """Which tables are logs too, but the same run once more, or one that only the user knows of."""
    tables = (
        p for p in paths if readers.log_suffix(p) in readers.TABLE_SUFFIXES and p.name != LOG and p not in source.files
    )
    reason = f"it lies beside {source.files[0].name}; name the file itself to read it"
    return [f"{path} was passed over: {reason}" for path in tables if not _no_log(path, given)]


def _loose(folder: Path, files: list[str], given: Mapping[str, str], passed_over: list[str]) -> Iterator[Source]:
    """Tables of a folder; its text logs only where it has no table, which would hold the same rows."""
    paths = [path for f in files if (path := folder / f).is_file()]  # a pipe would wait for ever
    tables = []
    for path in (path for path in paths if readers.log_suffix(path) in readers.TABLE_SUFFIXES):
        if reason := _no_log(path, given):
            passed_over += [f"{path} was passed over: {reason}"] if reason != UNRELATED else []
        else:
            tables.append(Source("table", (path,)))
    yield from tables
    if not tables:
        yield from (Source("text", (path,)) for path in paths if text.is_named(path) and _is_text_log(path))


def _state_of(folder: Path) -> tuple[Path, ...]:
    """trainer_state.json in a run's folder; where there is none, that of its last checkpoint."""
    if (folder / STATE).is_file():
        return (folder / STATE,)
    numbered = ((_CHECKPOINT.fullmatch(p.parent.name), p) for p in folder.glob(f"checkpoint-*/{STATE}"))
    saved = [(int(m[1]), p) for m, p in numbered if m]
    return (max(saved)[1],) if saved else ()


def _is_lingua(path: Path) -> bool:
    try:
        return set(readers.line_keys(path)) >= {readers.LINGUA_NAMES["step"], readers.LINGUA_NAMES["grad_norm"]}
    except OSError:
        return path.name == METRICS  # reading it will show what is wrong


UNRELATED = "unrelated"


def _no_log(path: Path, given: Mapping[str, str]) -> str:
    """Why a table found in a folder is no log by the names of its columns; empty: it is one."""
    try:
        columns = readers.table_columns(path)
    except (LogError, OSError):
        return UNRELATED
    if choice.is_log([*columns, *given]) and set(given.values()) <= set(columns):
        return ""
    if not any(map(choice.looks_like_step, columns)):
        return UNRELATED
    if absent := set(given.values()) - set(columns):
        return f"it has no column {', '.join(sorted(absent))} (it has: {choice.listed(columns)})"
    return choice.unknown(columns)


def _is_text_log(path: Path) -> bool:
    try:
        return text.is_log(path)
    except OSError:
        return False

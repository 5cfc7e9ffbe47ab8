"""TensorBoard event files of trials: a folder each, which grows by whole commits.

    <out>/<trial_id>/events.out.tfevents.<time>.<trial_id>     for `tensorboard --logdir <out>`
    <out>/<trial_id>/stabstudy.json                            how far it is: bytes, last steps, whether it is over

A commit is written and durable before stabstudy.json says so. What lies behind the bytes named there was left by a
process that was killed, and is cut off: no step stands twice, and none is missing.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stabstudy.exporting.exported import Ending, Exported, Point, Value
from stabstudy.store import StoreError, read_json, write_json

STATE_FILE = "stabstudy.json"
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """What is committed of a trial."""

    format: int = FORMAT
    file: str = ""
    bytes: int = 0
    trace: int = -1  # last step
    probes: int = -1
    over: bool = False


class EventFiles:
    """Event files of trials below one folder."""

    def __init__(self, out: Path):
        self._out = out

    def is_over(self, trial_id: str) -> bool:
        """Whether nothing is left to write of the trial."""
        return read_progress(self._out / trial_id).over

    def write(self, trial: Exported) -> int:
        """Write what is new of the trial; returns how many steps. Raises StoreError, see `read_progress`."""
        folder = self._out / trial.trial_id
        before = read_progress(folder)
        if before.over:
            return 0
        steps, probes = list(trial.trace_points(before.trace)), list(trial.probe_points(before.probes))
        ending = trial.ending()
        if not steps and not probes and ending is None:
            return 0
        after = replace(before, over=ending is not None, file=before.file or _name(trial))
        after = replace(after, trace=_last(steps, before.trace), probes=_last(probes, before.probes))
        folder.mkdir(parents=True, exist_ok=True)
        events = itertools.chain(
            [] if before.bytes else _head(trial), _merged(steps, probes), _end(trial, ending, after)
        )
        write_json(
            folder / STATE_FILE, asdict(replace(after, bytes=_append(folder / after.file, before.bytes, events)))
        )
        return len(steps)

    def close(self) -> None:
        """Nothing stays open between two commits."""

    def hint(self) -> str:
        """How to look at it."""
        return f"tensorboard --logdir {self._out}"


def read_progress(folder: Path) -> Progress:
    """What is committed. Raises StoreError for a state file that is none of ours, or of a newer version."""
    path = folder / STATE_FILE
    if not path.exists():
        return Progress()
    body = read_json(path)
    if body.get("format") != FORMAT or set(body) != set(asdict(Progress())):
        raise StoreError(f"{path}: is not the state of an export of this version; remove its folder to export anew")
    return Progress(**body)


def _append(path: Path, committed: int, events: Iterable[Any]) -> int:
    """Write events behind the committed bytes, durably; returns the bytes then."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as f:
        if f.seek(0, os.SEEK_END) < committed:
            raise StoreError(f"{path}: is shorter than {STATE_FILE} says; remove its folder to export anew")
        f.truncate(committed)
        f.seek(committed)
        writer = RecordWriter(f)
        for event in events:
            writer.write(event.SerializeToString())
        f.flush()
        os.fsync(f.fileno())
        size = f.tell()
    return size


def _name(trial: Exported) -> str:
    """TensorBoard reads files with `tfevents` in their name, in the order of their names."""
    return f"events.out.tfevents.{int(trial.began):010d}.{trial.trial_id}"


def _last(points: list[Point], before: int) -> int:
    return points[-1].step if points else before


def _merged(steps: list[Point], probes: list[Point]) -> Iterator[Any]:
    """An event for each step, with what was probed at it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    ordered = heapq.merge(steps, probes, key=lambda point: point.step)
    for step, points in itertools.groupby(ordered, key=lambda point: point.step):
        (first, *_) = own = list(points)
        values = [Summary.Value(tag=t, simple_value=v) for point in own for t, v in point.scalars.items()]
        yield Event(wall_time=first.time, step=step, summary=Summary(value=values))


def _head(trial: Exported) -> Iterator[Any]:
    """The events that a file begins with: its version, and the settings as hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    yield Event(wall_time=trial.began, file_version="brain.Event:2")
    start = SessionStartInfo(group_name=trial.trial_id, start_time_secs=trial.began)
    for name, value in trial.settings.items():
        _set(start.hparams[name], value)
    data = HParamsPluginData(session_start_info=start)
    yield _hparams(SESSION_START_INFO_TAG, data, trial.began)


def _end(trial: Exported, ending: Ending | None, after: Progress) -> Iterator[Any]:
    """The judgement: its numbers, its sentence, and that the session is over."""
    if ending is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    step, time = max(after.trace, after.probes, 0), trial.ended
    text = TensorProto(
        dtype=DT_STRING,
        string_val=[f"{ending.verdict}. {ending.outcome}".encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    of_text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    values = [Summary.Value(tag=t, simple_value=v) for t, v in ending.scalars.items()]
    values.append(Summary.Value(tag="summary/verdict", metadata=of_text, tensor=text))
    yield Event(wall_time=time, step=step, summary=Summary(value=values))
    over = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time)
    yield _hparams(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=over), time)


def _set(field: Any, value: Value) -> None:
    if isinstance(value, bool):
        field.bool_value = value
    elif isinstance(value, int | float):
        field.number_value = value
    else:
        field.string_value = value


def _hparams(name: str, data: Any, time: float) -> Any:
    """An event of the plugin that shows hyperparameters."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

    value = Summary.Value(tag=name, metadata=create_summary_metadata(data), tensor=NULL_TENSOR)
    return Event(wall_time=time, summary=Summary(value=[value]))

"""TensorBoard event files, through TensorBoard's own reader (the extra `tensorboard`)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabstudy import extras
from stabstudy.ingesting import several
from stabstudy.ingesting.points import LogError, Raw

PREFIX = "events.out.tfevents."
STEP = "step"


class ReaderMissingError(LogError):
    """TensorBoard is not installed."""


def read(paths: Sequence[Path], given: Mapping[str, str]) -> Raw:
    """The scalars of one run, whose files continue each other, a row per step. `given`: ours -> the tag."""
    raw = Raw("tensorboard")
    rows: list[dict[str, Any]] = []
    for path in paths:
        for step, tag, value in _scalars(path):
            if not rows or rows[-1][STEP] != step or tag in rows[-1]:
                rows.append({STEP: step})
            rows[-1][tag] = value
    if not rows:
        raise LogError("holds no scalar")
    raw.rows += rows
    return several.one(raw, {**given, "step": STEP})


def _scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) in the order of the file, up to where it is torn."""
    try:
        # beside TensorFlow the package logs to the terminal when it is imported
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ReaderMissingError(f"needs TensorBoard's reader: {extras.install(['tensorboard'])}") from error
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            with contextlib.suppress(ValueError, TypeError):  # text, images
                number = tensor_util.make_ndarray(value.tensor)
                if number.ndim == 0 and number.dtype.kind in "fiu":
                    yield int(event.step), value.tag, float(number)

"""Cost of recording, in microseconds for each step of each trial, on one core.

    python benchmarks/recording.py [--members 128] [--steps 1000] [--depth 6]

`encode`: columns of a block of steps of all members become records. `write`: append, checksum, one write per flush.
`compact`: the trace becomes Parquet; `compact_probes` likewise, for the steps of the trial (a probe every 10 steps).
`sync`: the fsyncs of both in wall time, which is the disk's and not the core's; they are not part of `compact`. Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import finished, live
from stabstudy.trace import PROBES, TRACE, Schema, no_rows, widths

BLOCK = 32
PROBE_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("members", 128), ("steps", 1000), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    said = parser.parse_args()
    figures = encode_and_write(said.members, said.steps, said.depth)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({**vars(said), **{k: round(v, 3) for k, v in figures.items()}, "machine": machine}))


def encode_and_write(K: int = 128, steps: int = 1000, depth: int = 6) -> dict[str, float]:
    """Microseconds per trial-step of CPU time (`sync`: of wall time), by what they are spent on."""
    spent = dict.fromkeys(("encode", "write", "compact", "compact_probes", "sync"), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        finished.write(no_rows(TRACE), Path(folder) / "first.parquet", {})  # imports pyarrow
        traces = _record(TRACE, Path(folder), K, steps, depth, BLOCK, spent)
        probes = _record(PROBES, Path(folder), K, max(1, steps // PROBE_EVERY), depth, 1, dict(spent))
        for what, schema, paths in (("compact", TRACE, traces), ("compact_probes", PROBES, probes)):
            with _syncs_apart(spent, what), _timed(spent, what):
                for path in paths:
                    finished.compact(path, path.with_suffix(".parquet"), schema, {"trial_id": "0123456789"})
    return {what: 1e6 * seconds / (K * steps) for what, seconds in spent.items()}


def _record(
    schema: Schema, folder: Path, K: int, steps: int, depth: int, block: int, spent: dict[str, float]
) -> list[Path]:
    """Write the records of K members, a block of steps of all at a time."""
    rng, sizes = np.random.default_rng(0), widths(depth)
    with ExitStack() as files:
        paths = [folder / f"{k}.{schema.name}.live" for k in range(K)]
        writers = [live.Writer(path, schema, sizes) for path in paths]
        for writer in writers:
            files.callback(writer.close)
        for first in range(0, steps, block):
            columns, nulls = _columns(schema, K, np.arange(first, min(steps, first + block)), depth, rng)
            with _timed(spent, "encode"):
                table = live.records(schema, sizes, columns, nulls)
            with _timed(spent, "write"):
                for writer, rows in zip(writers, table, strict=True):
                    writer.append(rows)
        with _timed(spent, "write"):
            for writer in writers:
                writer.flush()
    return paths


def _columns(
    schema: Schema, K: int, step: NDArray[np.int64], depth: int, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns of a block, [K, n], as a device would give them: float32 in float64."""
    shape, sizes = (K, len(step)), widths(depth)
    columns: dict[str, Any] = {"step": step}
    for column in schema.columns[1:]:
        entries = (sizes[column.name],) if column.kind == "floats" else ()
        columns[column.name] = np.exp(rng.standard_normal((*shape, *entries), np.float32)).astype(np.float64)
    if schema is TRACE:
        columns |= {"tokens": 512 * (step + 1), "lr": 1e-3, "seconds": 0.003, "clip_scale": 1.0, "skip": 0}
        del columns["loss_scale"]
        return columns, {"skip": np.ones(shape, bool)}
    return columns, {}


@contextmanager
def _timed(spent: dict[str, float], what: str, clock: Callable[[], float] = time.process_time) -> Iterator[None]:
    start = clock()
    yield
    spent[what] += clock() - start


@contextmanager
def _syncs_apart(spent: dict[str, float], what: str) -> Iterator[None]:
    fsync = os.fsync

    def timed(fd: int) -> None:
        start = time.process_time()
        with _timed(spent, "sync", time.perf_counter):
            fsync(fd)
        spent[what] -= time.process_time() - start

    os.fsync = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = fsync


if __name__ == "__main__":
    main()

"""The record of a trial: exact round trips, torn and damaged files, a full disk, and a writer that is killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabstudy import finished, trace
from stabstudy.trace import PROBES, TRACE, Column, DamagedRecord, Rows, RowWriter, Schema

TINY = Schema("tiny", (Column("step", "int", "", ""), Column("x", "float", "", "", True)), contiguous=True)
ODD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.nan, math.inf, -math.inf, None]


def row(step: int, **changes: Any) -> dict[str, Any]:
    plain = {"step": step, "tokens": 256 * (step + 1), "seconds": 0.01, "lr": 1e-3, "loss": 2.0, "grad_norm": 1.5}
    return {**dict.fromkeys(TRACE.names), **plain, "layer_grad_norm": [1.0, 0.5, 0.25], **changes}


def write(path: Path, rows: list[dict[str, Any]], schema: Schema = TRACE) -> Path:
    writer = RowWriter(path, schema)
    for r in rows:
        writer.append(r)
    writer.close()
    return path


def cells(rows: Rows) -> list[list[str]]:
    """Every cell as text that tells NaN from null and 0.0 from -0.0, and floats by their bits."""
    table = []
    for name in rows.schema.names:
        for value, null in zip(rows[name].tolist(), rows.is_null(name).tolist(), strict=True):
            numbers = value if isinstance(value, list) else [value]
            table.append([name, "null" if null else " ".join(v.hex() if type(v) is float else str(v) for v in numbers)])
    return table


# --- round trips ---


def test_probes_of_an_older_version_read_with_the_later_columns_null(tmp_path):
    old = [n for n in PROBES.names if not n.startswith("noise_")]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({**dict.fromkeys(old), "step": s, "param_norm": 3.0}) + "\n" for s in (0, 10)))
    read = trace.read_jsonl(path, PROBES)
    assert read["param_norm"].tolist() == [3.0, 3.0] and not read.has("noise_scale") and not read.has("noise_g2")
    schema = dataclasses.replace(PROBES, columns=tuple(c for c in PROBES.columns if c.name in old))
    finished.compact(path, tmp_path / "p.parquet", schema, {})
    assert cells(finished.read_parquet(tmp_path / "p.parquet", PROBES)) == cells(read)


def test_null_nan_and_infinity_are_four_answers_in_both_forms(tmp_path: Path) -> None:
    rows = [row(i, loss=v, clip_scale=ODD[-1 - i], skip="amp" if v is None else None) for i, v in enumerate(ODD)]
    live = trace.read_jsonl(write(tmp_path / "trace.jsonl", rows), TRACE)
    assert [v.hex() for v in live["loss"][:-1].tolist()] == [v.hex() for v in ODD[:-1] if v is not None]
    assert live.is_null("loss").tolist() == [False] * 8 + [True]
    assert math.isnan(live["loss"][-1]) and math.isnan(live["loss"][5])
    assert live["skip"].tolist() == [None] * 8 + ["amp"] and live["step"].dtype == np.int64
    n, sha = finished.compact(tmp_path / "trace.jsonl", tmp_path / "trace.parquet", TRACE, {})
    done = finished.read_parquet(tmp_path / "trace.parquet", TRACE, sha)
    assert n == len(rows) and cells(done) == cells(live)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.none() | st.floats(), max_size=20), width=st.integers(1, 4))
def test_every_float_survives_both_forms(tmp_path: Path, values: list[float | None], width: int) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    lists = [None if v is None else [v] * width for v in values]
    rows = [row(i, loss=v, layer_grad_norm=lists[i]) for i, v in enumerate(values)]
    live = trace.read_jsonl(write(tmp_path / "t.jsonl", rows), TRACE)
    for i, v in enumerate(values):
        assert live.is_null("loss")[i] == live.is_null("layer_grad_norm")[i] == (v is None)
        if v is not None:
            assert (
                live["loss"][i].hex() == v.hex() and [x.hex() for x in live["layer_grad_norm"][i]] == [v.hex()] * width
            )
    _, sha = finished.compact(tmp_path / "t.jsonl", tmp_path / "t.parquet", TRACE, {})
    assert cells(finished.read_parquet(tmp_path / "t.parquet", TRACE, sha)) == cells(live)


def test_probes_may_have_gaps(tmp_path: Path) -> None:
    empty = dict.fromkeys(PROBES.names)
    rows = [{**empty, "step": s, "attn_logit_max": [float(s), 2.0]} for s in (0, 10, 25)]
    read = trace.read_jsonl(write(tmp_path / "p.jsonl", rows, PROBES), PROBES)
    assert read["step"].tolist() == [0, 10, 25] and read["attn_logit_max"].shape == (3, 2)
    assert read.has("attn_logit_max") and not read.has("param_norm")
    finished.compact(tmp_path / "p.jsonl", tmp_path / "p.parquet", PROBES, {})
    assert cells(finished.read_parquet(tmp_path / "p.parquet", PROBES)) == cells(read)


def test_no_rows(tmp_path: Path) -> None:
    read = trace.read_jsonl(write(tmp_path / "t.jsonl", []), TRACE)
    assert len(read) == 0 and not read.note and not read.has("loss")
    assert finished.compact(tmp_path / "t.jsonl", tmp_path / "t.parquet", TRACE, {})[0] == 0
    assert len(finished.read_parquet(tmp_path / "t.parquet", TRACE)) == 0


def test_a_row_must_have_every_column(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "t.jsonl", TRACE)
    with pytest.raises(KeyError, match="lr"):
        writer.append({k: v for k, v in row(0).items() if k != "lr"})
    writer.close()
    assert (tmp_path / "t.jsonl").read_bytes() == b""


def test_lines_are_as_long_as_promised(tmp_path: Path) -> None:
    """At most 350 bytes and 22 for each group, with numbers of full length."""
    full = {n: -1.2345678901234567e-123 for n in ("seconds", "lr", "loss", "grad_norm", "clip_scale", "logit_absmax")}
    groups = [1.2345678901234567e-12] * 14
    path = write(tmp_path / "t.jsonl", [row(0, **full, logz_mean=full["lr"], layer_grad_norm=groups)])
    assert path.stat().st_size <= 350 + 14 * 23  # 22 digits and a comma


# --- torn, damaged, older ---


def test_a_tail_torn_at_any_byte_costs_that_line_only(tmp_path: Path) -> None:
    values = [0.1, math.nan, None, -math.inf]
    whole = write(tmp_path / "t.jsonl", [row(i, loss=v) for i, v in enumerate(values)]).read_bytes()
    expected = cells(trace.read_jsonl(tmp_path / "t.jsonl", TRACE))
    torn = tmp_path / "torn.jsonl"
    for size in range(len(whole) + 1):
        torn.write_bytes(whole[:size])
        read = trace.read_jsonl(torn, TRACE)
        complete = whole[:size].count(b"\n")
        assert len(read) == complete and bool(read.note) == (not whole[:size].endswith(b"\n") and size > 0)
        assert cells(read) == [c for i, c in enumerate(expected) if i % len(values) < complete]


@pytest.mark.parametrize("junk", [b"\0" * 4096, b"\0\0\n\0", b"\xff\xfe{", b"[" * 100_000, b'{"step":9e999', b"null\n"])
def test_what_a_power_cut_leaves_at_the_end_is_left_out(tmp_path: Path, junk: bytes) -> None:
    path = write(tmp_path / "t.jsonl", [row(0), row(1)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + junk)
    read = trace.read_jsonl(path, TRACE)
    assert len(read) == 2 and str(len(junk)) in read.note
    assert trace.cut(path, TRACE, 2) == (0, len(junk)) and path.stat().st_size == size


@pytest.mark.parametrize("bad", [b"\n", b"{}\n", b"[1]\n", b"12\n", b"\xff\n", b'{"step":1\n', b"\0\0\n", b"NaN\n"])
def test_a_bad_line_with_rows_after_it_is_damage(tmp_path: Path, bad: bytes) -> None:
    lines = write(tmp_path / "t.jsonl", [row(i) for i in range(3)]).read_bytes().splitlines(keepends=True)
    damaged = tmp_path / "d.jsonl"
    damaged.write_bytes(lines[0] + bad + lines[1] + lines[2])
    before = damaged.read_bytes()
    with pytest.raises(DamagedRecord, match="rows after it"):
        trace.read_jsonl(damaged, TRACE)
    with pytest.raises(DamagedRecord, match="rows after it"):
        trace.cut(damaged, TRACE, 3)
    assert damaged.read_bytes() == before


@pytest.mark.parametrize("steps", [[1], [0, 0], [0, 2], [0, 1, 0], [0, 1, 2, 2], [-1, 0]])
def test_a_repeated_missing_or_decreasing_step_is_damage(tmp_path: Path, steps: list[int]) -> None:
    path = write(tmp_path / "t.jsonl", [row(s) for s in steps])
    with pytest.raises(DamagedRecord, match="step"):
        trace.read_jsonl(path, TRACE)


@pytest.mark.parametrize("steps", [[0, 0], [5, 3], [-1, 4]])
def test_probes_must_increase(tmp_path: Path, steps: list[int]) -> None:
    path = write(tmp_path / "p.jsonl", [{**dict.fromkeys(PROBES.names), "step": s} for s in steps], PROBES)
    with pytest.raises(DamagedRecord, match="step"):
        trace.read_jsonl(path, PROBES)


@pytest.mark.parametrize(
    ("column", "value"),
    [("step", "1"), ("step", 1.0), ("step", True), ("step", None), ("tokens", 2**63), ("lr", None), ("lr", "NaN")]
    + [("loss", True), ("loss", [1.0]), ("loss", 10**400), ("layer_grad_norm", 1.0), ("layer_grad_norm", [None])]
    + [("layer_grad_norm", [10**400]), ("skip", 1)],
)
def test_a_value_of_the_wrong_type_makes_a_bad_line(tmp_path: Path, column: str, value: Any) -> None:
    path = write(tmp_path / "t.jsonl", [row(0), {**row(1), column: value}, row(2)])
    with pytest.raises(DamagedRecord):
        trace.read_jsonl(path, TRACE)


def test_lists_of_different_lengths_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0), row(1, layer_grad_norm=[1.0])])
    with pytest.raises(DamagedRecord, match="lengths"):
        trace.read_jsonl(path, TRACE)


@pytest.mark.parametrize("flips", [600, pytest.param(5_000, marks=pytest.mark.faults)])
def test_a_flipped_bit_raises_nothing_foreign(tmp_path: Path, flips: int) -> None:
    """Live lines carry no checksum: a flip may go unseen. Finished ones do, and the state's sha256 sees every flip."""
    path = write(tmp_path / "t.jsonl", [row(i, loss=2.0 + i) for i in range(40)])
    _, sha = finished.compact(path, tmp_path / "t.parquet", TRACE, {})
    rng = random.Random(7)
    for source, read in ((path, trace.read_jsonl), (tmp_path / "t.parquet", finished.read_parquet)):
        whole, hurt = source.read_bytes(), tmp_path / "hurt"
        for _ in range(flips):
            changed = bytearray(whole)
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            hurt.write_bytes(changed)
            try:
                read(hurt, TRACE)
            except DamagedRecord as error:
                assert "\n" not in str(error)
            if source.suffix == ".parquet":
                with pytest.raises(DamagedRecord, match="sha256"):
                    finished.read_parquet(hurt, TRACE, sha)


def test_a_parquet_cut_at_any_byte_is_damage(tmp_path: Path) -> None:
    finished.compact(write(tmp_path / "t.jsonl", [row(0)], TRACE), tmp_path / "t.parquet", TRACE, {})
    whole = (tmp_path / "t.parquet").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(DamagedRecord):
            finished.read_parquet(tmp_path / "cut.parquet", TRACE)


OLDER = Schema("trace", tuple(c for c in TRACE.columns if c.name not in ("logz_mean", "layer_grad_norm")), True)
OTHER = Schema("trace", tuple(c for c in TRACE.columns if c.name != "lr"), True)


def test_a_record_of_an_older_version_lacks_columns_that_may_be_null(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0), row(1)], OLDER)
    finished.compact(path, tmp_path / "t.parquet", OLDER, {})
    for read in (trace.read_jsonl(path, TRACE), finished.read_parquet(tmp_path / "t.parquet", TRACE)):
        assert read.is_null("logz_mean").all() and read.is_null("layer_grad_norm").all()
        assert read["loss"].tolist() == [2.0, 2.0] and read["layer_grad_norm"].shape == (2, 0)


def test_a_record_without_a_required_column_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0), row(1)], OTHER)
    finished.compact(path, tmp_path / "t.parquet", OTHER, {})
    with pytest.raises(DamagedRecord):
        trace.read_jsonl(path, TRACE)
    with pytest.raises(DamagedRecord, match="lr"):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


@pytest.mark.parametrize("changed", [Column("loss", "text", "", "", True), Column("lr", "float", "", "", True)])
def test_a_record_with_a_column_of_another_type_or_a_null_is_damage(tmp_path: Path, changed: Column) -> None:
    """A flipped bit in the footer can change a type, and no page checksum covers the footer."""
    schema = Schema("trace", tuple(changed if c.name == changed.name else c for c in TRACE.columns), True)
    path = write(tmp_path / "t.jsonl", [{**row(0), changed.name: None}], schema)
    finished.compact(path, tmp_path / "t.parquet", schema, {})
    with pytest.raises(DamagedRecord, match=changed.name):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    finished.compact(write(tmp_path / "t.jsonl", [row(0)]), tmp_path / "t.parquet", TRACE, {})
    read = finished.read_parquet(tmp_path / "t.parquet", TRACE, columns=["loss"])
    assert set(read.columns) == {"step", "loss"} and read["loss"].tolist() == [2.0]


# --- compaction ---


def test_a_resumed_record_compacts_to_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(i, loss=ODD[i % len(ODD)]) for i in range(50)]
    whole = write(tmp_path / "a.jsonl", rows)
    broken = write(tmp_path / "b.jsonl", rows[:33])
    broken.write_bytes(broken.read_bytes() + b'{"step":33,"tok')
    size = broken.stat().st_size
    dropped, cut_bytes = trace.cut(broken, TRACE, 20)
    assert dropped == 13 and broken.stat().st_size == size - cut_bytes
    write(broken, rows[20:])
    assert broken.read_bytes() == whole.read_bytes()
    shas = {finished.compact(p, p.with_suffix(".parquet"), TRACE, {"trial_id": "x"})[1] for p in (whole, broken)}
    assert len(shas) == 1 and whole.exists()


@pytest.mark.parametrize("next_step", [0, 3, 6, 40])
def test_cut_at_any_byte_and_step_then_continued_is_the_unbroken_record(tmp_path: Path, next_step: int) -> None:
    rows = [{"step": i, "x": i / 8} for i in range(6)]
    whole = write(tmp_path / "a.jsonl", rows, TINY).read_bytes()
    path = tmp_path / "b.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        kept = min(complete, next_step)
        dropped, cut_bytes = trace.cut(path, TINY, next_step)
        assert (dropped, path.stat().st_size) == (complete - kept, size - cut_bytes)
        write(path, rows[kept:], TINY)
        assert path.read_bytes() == whole


def test_nothing_to_cut(tmp_path: Path) -> None:
    assert trace.cut(tmp_path / "none.jsonl", TRACE, 0) == (0, 0)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_torn_record_is_not_compacted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0)])
    path.write_bytes(path.read_bytes() + b"{")
    with pytest.raises(DamagedRecord, match="torn"):
        finished.compact(path, tmp_path / "t.parquet", TRACE, {})
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_compaction_that_was_killed_is_done_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [row(0)])
    (tmp_path / "t.parquet.tmp").write_bytes(b"half")
    (tmp_path / "t.parquet").write_bytes(b"of another attempt")
    _, sha = finished.compact(path, tmp_path / "t.parquet", TRACE, {})
    assert len(finished.read_parquet(tmp_path / "t.parquet", TRACE, sha)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl", "t.parquet"]


def test_the_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.jsonl", [row(0)])
    done: list[str] = []
    rename, sync_file, sync_folder = Path.replace, trace.sync_file, trace.sync_folder

    def note_file(p: Path) -> str:
        done.append(f"sync {p.name}")
        return sync_file(p)

    def note_rename(p: Path, to: Path) -> Path:
        done.append(f"rename {p.name}")
        return rename(p, to)

    def note_folder(p: Path) -> None:
        done.append("sync folder")
        sync_folder(p)

    monkeypatch.setattr(finished, "sync_file", note_file)
    monkeypatch.setattr(finished, "sync_folder", note_folder)
    monkeypatch.setattr(Path, "replace", note_rename)
    finished.compact(path, tmp_path / "t.parquet", TRACE, {})
    assert done == ["sync t.parquet.tmp", "rename t.parquet.tmp", "sync folder"]


def test_metadata_is_kept_and_a_newer_format_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    path = write(tmp_path / "t.jsonl", [row(0)])
    finished.compact(path, tmp_path / "t.parquet", TRACE, {"trial_id": "0123456789"})
    assert pq.read_schema(tmp_path / "t.parquet").metadata[b"trial_id"] == b"0123456789"
    with pytest.raises(DamagedRecord, match="holds trace, not probes"):
        finished.read_parquet(tmp_path / "t.parquet", PROBES)
    monkeypatch.setattr(finished, "FORMAT", 2)
    finished.compact(path, tmp_path / "newer.parquet", TRACE, {})
    monkeypatch.undo()
    with pytest.raises(DamagedRecord, match="format 2, this version reads up to 1"):
        finished.read_parquet(tmp_path / "newer.parquet", TRACE)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DamagedRecord):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


# --- the writer ---


class Writes:
    """Stands in for os.write: keeps what was written, and can write less than asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.blocks: list[bytes] = []
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd: int, block: bytes) -> int:
        self.blocks.append(block)
        return self._write(fd, block if self.room is None else block[: self.room])


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_write_of_whole_lines_each_second_and_at_once_when_urgent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, clock = Writes(monkeypatch), Clock()
    writer = RowWriter(tmp_path / "t.jsonl", TINY, clock)
    for step in range(10):
        writer.append({"step": step, "x": 1.0})
    assert writes.blocks == []
    clock.now = 0.999
    writer.append({"step": 10, "x": 1.0})
    assert writes.blocks == []
    clock.now = 1.0
    writer.append({"step": 11, "x": 1.0})
    assert [b.count(b"\n") for b in writes.blocks] == [12]
    writer.append({"step": 12, "x": math.nan}, urgent=True)
    writer.append({"step": 13, "x": 1.0})
    assert [b.count(b"\n") for b in writes.blocks] == [12, 1]
    writer.close()
    assert [b.count(b"\n") for b in writes.blocks] == [12, 1, 1]
    assert all(b.endswith(b"\n") for b in writes.blocks)


def test_no_write_is_larger_than_64_kib_and_no_line_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    writer = RowWriter(tmp_path / "t.jsonl", TRACE, Clock())
    for step in range(1000):
        writer.append(row(step))
    writer.close()
    assert max(map(len, writes.blocks)) <= 64 * 1024 and all(b.endswith(b"\n") for b in writes.blocks)
    assert 2 <= len(writes.blocks) <= 2 + sum(map(len, writes.blocks)) // (60 * 1024)


def test_a_flush_with_nothing_queued_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    writer = RowWriter(tmp_path / "t.jsonl", TINY)
    writer.flush()
    writer.close()
    writer.close()
    assert writes.blocks == []


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    writer = RowWriter(tmp_path / "t.jsonl", TINY)
    writer.append({"step": 0, "x": 1.0}, urgent=True)
    assert synced == []
    writer.flush(sync=True)
    assert len(synced) == 1
    writer.close()
    assert len(synced) == 2


def test_a_child_process_does_not_inherit_the_file(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path / "t.jsonl", TINY)
    listing = "import os; print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])"
    child = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=60, close_fds=False)
    writer.close()
    assert "/dev/null" in child.stdout or "pipe" in child.stdout
    assert "t.jsonl" not in child.stdout


@pytest.mark.parametrize("room", [0, 1, 17, 33])
def test_a_short_write_leaves_whole_lines_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    writes, path = Writes(monkeypatch), tmp_path / "t.jsonl"
    writer = RowWriter(path, TINY, Clock())
    writer.append({"step": 0, "x": 1.0}, urgent=True)
    first = path.read_bytes()
    writes.room = room
    writer.append({"step": 1, "x": 1.0})
    with pytest.raises(OSError, match="short write"):
        writer.append({"step": 2, "x": 1.0}, urgent=True)
    assert path.read_bytes() == first
    writes.room = None  # there is room again: what was queued follows, once
    writer.append({"step": 3, "x": 1.0}, urgent=True)
    writer.close()
    assert trace.read_jsonl(path, TINY)["step"].tolist() == [0, 1, 2, 3]


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from stabstudy.trace import PROBES, RowWriter, read_jsonl
path, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
writer, acked, refused = RowWriter(path, PROBES), 0, 0
for step in range(60):
    try:
        writer.append({**dict.fromkeys(PROBES.names), "step": step}, urgent=step % 3 == 2)
        acked = step + 1 if step % 3 == 2 else acked
    except OSError:
        refused += 1
        whole = read_jsonl(path, PROBES)
        assert len(whole) == acked and not whole.note, (len(whole), acked, whole.note)
        if refused == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.close()
print(json.dumps([refused, read_jsonl(path, PROBES)["step"].tolist()]))
"""


@pytest.mark.parametrize("limit", [0, 1, 700, 1111, 3000])
def test_a_full_disk_that_is_freed_again(tmp_path: Path, limit: int) -> None:
    """A file size limit gives a real short write, then EFBIG. Whole lines stay; nothing is lost or doubled."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "p.jsonl"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused, steps = json.loads(done.stdout)
    assert refused == 3 and steps == list(range(60))


KILLS = """
import json, os, random, signal, sys
from pathlib import Path
from stabstudy.trace import TRACE, RowWriter, cut, read_jsonl

def row(step):
    known = {"step": step, "tokens": step, "seconds": 0.5, "lr": 1e-3, "loss": 1 / (step + 1)}
    return {**dict.fromkeys(TRACE.names), **known}

def work(path, start, acks, seed):
    rng, writer = random.Random(seed), RowWriter(path, TRACE)
    for step in range(start, 10**9):
        writer.append(row(step))
        if rng.random() < 0.1:
            writer.flush()
            os.write(acks, (step + 1).to_bytes(8, "little"))

path, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
torn = lost = acked = 0
for attempt in range(kills):
    cut(path, TRACE, 10**9)
    start = len(read_jsonl(path, TRACE)) if path.exists() else 0
    rows, acks = os.pipe()
    child = os.fork()
    if child == 0:
        work(path, start, acks, attempt)
    os.close(acks)
    seen = b""
    for _ in range(rng.randrange(1, 20)):
        seen = os.read(rows, 8)
    for _ in range(rng.randrange(3000)):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while rest := os.read(rows, 8):
        seen = rest
    os.close(rows)
    acked = int.from_bytes(seen, "little")
    read = read_jsonl(path, TRACE)
    torn += bool(read.note)
    lost += max(0, acked - len(read))
cut(path, TRACE, 10**9)
read = read_jsonl(path, TRACE)
right = read["loss"].tolist() == [1 / (step + 1) for step in range(len(read))]
print(json.dumps({"lost": lost, "torn": torn, "rows": len(read), "acked": acked, "right": right}))
"""


@pytest.mark.parametrize("records", [1, pytest.param(40, marks=pytest.mark.faults)])
def test_no_row_that_was_written_is_lost_to_a_kill(tmp_path: Path, records: int) -> None:
    """25 kills for each record: its writer is killed and started again, cuts the torn tail and continues."""
    for seed in range(records):
        command = [sys.executable, "-c", KILLS, str(tmp_path / f"{seed}.jsonl"), "25", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["lost"] == 0 and found["right"] and found["rows"] >= found["acked"] > 25, (seed, found)

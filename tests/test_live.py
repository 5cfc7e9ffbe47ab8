"""The live record: its writer, torn and damaged files, a full disk, and a writer that is killed."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from live_rows import entries, table, write
from test_trace import ODD, TINY, cells, row

from stabstudy import encodings, live, trace
from stabstudy.live import Writer
from stabstudy.trace import PROBES, TRACE, Column, DamagedRecord, Schema

ROWS = [row(i, loss=ODD[i % len(ODD)], skip=(None, "amp", "spike")[i % 3]) for i in range(200)]


def tiny(*steps: int) -> Any:
    return table([{"step": s, "x": 1.0} for s in steps], TINY)


# --- records ---


def test_the_bytes_of_a_file_are_as_described(tmp_path: Path) -> None:
    """Read with struct alone: a header with its checksum, then a block with two."""
    data = write(tmp_path / "t.live", [{"step": 0, "x": None}, {"step": 1, "x": 0.5}], TINY).read_bytes()
    magic, length, crc = struct.unpack_from("<8sII", data)
    text = data[16 : 16 + length]
    assert magic == b"STABLIVE" and crc == crc32(data[:12] + text)
    said = json.loads(text)
    assert said["format"] == 1 and said["record"] == "tiny"
    assert [(c["name"], c["kind"], c["entries"]) for c in said["columns"]] == [("step", "int", 1), ("x", "float", 1)]
    block = data[16 + length :]
    marker, count, of_rows, of_start = struct.unpack_from("<4sIII", block)
    assert (marker, count, of_start) == (b"BLK\xff", 2, crc32(block[:12])) and of_rows == crc32(block[16:])
    assert block[16:] == struct.pack("<IqdIqd", 2, 0, 0.0, 0, 1, 0.5)


def test_columns_of_a_pack_become_records_at_once() -> None:
    K, n = 3, 4
    loss, norms = np.arange(12.0).reshape(K, n), np.arange(24.0).reshape(K, n, 2)
    columns = {"step": np.arange(n), "tokens": 7, "seconds": 0.5, "lr": np.array([[1.0], [2.0], [3.0]]), "loss": loss}
    columns |= {"layer_grad_norm": norms, "skip": np.uint8(2), "clip_scale": math.nan}
    nulls = {"skip": np.arange(n) != 1, "layer_grad_norm": loss > 10}
    packed = live.records(TRACE, {"layer_grad_norm": 2}, columns, nulls)
    assert packed.shape == (K, n) and packed.dtype == live.record_type(TRACE, {"layer_grad_norm": 2})
    for k in range(K):
        rows = live.to_rows(packed[k], encodings.layout(TRACE, {"layer_grad_norm": 2}), TRACE)
        assert rows["loss"].tolist() == loss[k].tolist() and set(rows["lr"]) == {k + 1.0}
        assert rows["skip"].tolist() == [None, "spike", None, None] and not rows.has("grad_norm")
        assert not rows.is_null("clip_scale").any() and np.isnan(rows["clip_scale"]).all()
        null = rows.is_null("layer_grad_norm")
        assert null.tolist() == (loss[k] > 10).tolist() and (rows["layer_grad_norm"][~null] == norms[k][~null]).all()


def test_records_that_cannot_be_are_refused() -> None:
    known = {"step": np.arange(2), "tokens": 1, "seconds": 0.5, "lr": 1e-3}
    with pytest.raises(ValueError, match="lr must not be null"):
        live.records(TRACE, trace.widths(1), {n: v for n, v in known.items() if n != "lr"}, {})
    with pytest.raises(ValueError, match="lr must not be null"):
        live.records(TRACE, trace.widths(1), known, {"lr": np.array([False, True])})
    with pytest.raises(ValueError, match="no column los"):
        live.records(TRACE, trace.widths(1), {**known, "los": 1.0}, {})
    with pytest.raises(ValueError, match="entries for layer_grad_norm"):
        live.record_type(TRACE, {})
    with pytest.raises(ValueError):
        live.records(TRACE, trace.widths(1), {**known, "layer_grad_norm": np.ones((2, 4))}, {})


def test_lists_may_have_no_entries(tmp_path: Path) -> None:
    read = live.read(write(tmp_path / "t.live", [row(i, layer_grad_norm=[]) for i in range(3)]), TRACE)
    assert read["layer_grad_norm"].shape == (3, 0) and read.has("layer_grad_norm")


def test_a_null_leaves_no_trace_of_its_value() -> None:
    known = {"step": np.arange(2), "x": np.array([3.0, 4.0])}
    packed = live.records(TINY, {}, known, {"x": np.array([True, False])})
    assert packed.tobytes() == struct.pack("<IqdIqd", 2, 0, 0.0, 0, 1, 4.0)


# --- torn and damaged ---


def ends(data: bytes) -> list[tuple[int, int]]:
    """(bytes, rows) after the header and after each block."""
    _, length, _ = struct.unpack_from("<8sII", data)
    found, at = [(16 + length, 0)], 16 + length
    size = live.record_type(TRACE, entries(ROWS)).itemsize
    while at < len(data):
        count = struct.unpack_from("<I", data, at + 4)[0]
        at += 16 + count * size
        found.append((at, found[-1][1] + count))
    return found


def test_a_record_cut_at_any_byte_has_the_rows_of_its_whole_blocks(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.live", ROWS, per_block=7).read_bytes()
    expected, marks = cells(live.read(tmp_path / "t.live", TRACE)), ends(whole)
    path = tmp_path / "torn.live"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        good, rows = max(((b, n) for b, n in marks if b <= size), default=(0, 0))
        read = live.read(path, TRACE)
        assert len(read) == rows and bool(read.note) == (size > good) and live.last_step(path) == rows - 1
        if size % 50 == 0:
            assert cells(read) == [c for i, c in enumerate(expected) if i % len(ROWS) < rows]
            assert live.cut(path, TRACE, 10**6) == (0, size - good) and path.read_bytes() == whole[:good]


@pytest.mark.parametrize("per_block", [7, 200])
def test_no_flipped_bit_changes_a_value(tmp_path: Path, per_block: int) -> None:
    """Each flip is an error, or costs the last block and says so."""
    whole = write(tmp_path / "t.live", ROWS, per_block=per_block).read_bytes()
    right, rng = cells(live.read(tmp_path / "t.live", TRACE)), random.Random(7)
    last = ends(whole)[-2][0]
    path, torn = tmp_path / "hurt.live", 0
    header = [(byte, 1 << bit) for byte in range(ends(whole)[0][0] + 16) for bit in range(8)]
    for byte, bit in [(rng.randrange(len(whole)), 1 << rng.randrange(8)) for _ in range(1_000)] + header:
        changed = bytearray(whole)
        changed[byte] ^= bit
        path.write_bytes(changed)
        try:
            read = live.read(path, TRACE)
        except DamagedRecord as error:
            assert "\n" not in str(error) and (byte < last)
            continue
        torn += 1
        kept = 200 - 4 if per_block == 7 else 0
        assert byte >= last and read.note and len(read) == kept
        assert cells(read) == [c for i, c in enumerate(right) if i % 200 < kept]
    assert torn


@pytest.mark.parametrize("junk", [b"\0" * 4096, b"\xff\xfe{", b"BLK\xff", b"BLK\xff" * 1000, b"[" * 100_000, b"\0B"])
def test_what_a_power_cut_leaves_at_the_end_is_left_out(tmp_path: Path, junk: bytes) -> None:
    path = write(tmp_path / "t.live", ROWS[:2])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + junk)
    read = live.read(path, TRACE)
    assert len(read) == 2 and str(len(junk)) in read.note and live.last_step(path) == 1
    assert live.cut(path, TRACE, 2) == (0, len(junk)) and path.stat().st_size == size


@pytest.mark.parametrize("zeros", [1, 100, 5000])
def test_a_last_block_with_zeros_in_it_is_torn(tmp_path: Path, zeros: int) -> None:
    whole = write(tmp_path / "t.live", ROWS[:60], per_block=30).read_bytes()
    (tmp_path / "t.live").write_bytes(whole[:-200] + bytes(200 + zeros))
    read = live.read(tmp_path / "t.live", TRACE)
    assert len(read) == 30 and "torn" in read.note


@pytest.mark.parametrize("gap", [b"\0", b"\0" * 4096, b"BLK\xff\1\0\0\0", b"x"])
def test_bad_bytes_with_rows_after_them_are_damage(tmp_path: Path, gap: bytes) -> None:
    data = write(tmp_path / "t.live", ROWS[:30], per_block=10).read_bytes()
    for at, _ in ends(data)[:-1]:
        path = tmp_path / "d.live"
        path.write_bytes(data[:at] + gap + data[at:])
        for act in (lambda p=path: live.read(p, TRACE), lambda p=path: live.cut(p, TRACE, 30)):
            with pytest.raises(DamagedRecord, match="with rows after them"):
                act()
        assert path.read_bytes() == data[:at] + gap + data[at:]


@pytest.mark.parametrize("steps", [[1], [0, 0], [0, 2], [0, 1, 0], [0, 1, 2, 2], [-1, 0]])
def test_a_repeated_missing_or_decreasing_step_is_damage(tmp_path: Path, steps: list[int]) -> None:
    path = write(tmp_path / "t.live", [row(s) for s in steps], per_block=2)
    with pytest.raises(DamagedRecord, match=r"t\.live: trace: step"):
        live.read(path, TRACE)


@pytest.mark.parametrize("steps", [[0, 0], [5, 3], [-1, 4]])
def test_probes_must_increase(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(DamagedRecord, match="step"):
        live.read(write(tmp_path / "p.live", [{"step": s} for s in steps], PROBES), PROBES)


def test_a_newer_format_another_record_and_another_type_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(encodings, "FORMAT", 2)
        patch.setattr(encodings, "_layout", encodings._layout.__wrapped__)  # not one of format 1 that is kept
        path = write(tmp_path / "t.live", ROWS[:3])
    acts = (lambda: live.read(path, TRACE), lambda: live.cut(path, TRACE, 1), lambda: live.last_step(path))
    for act in (*acts, lambda: Writer(path, TRACE, entries(ROWS))):
        with pytest.raises(DamagedRecord, match="format 2, this version reads up to 1"):
            act()
    with pytest.raises(DamagedRecord, match="holds trace, not probes"):
        live.read(write(tmp_path / "a.live", ROWS[:3]), PROBES)
    other = Schema(
        "trace", tuple(Column("loss", "int", "", "") if c.name == "loss" else c for c in TRACE.columns), True
    )
    with pytest.raises(DamagedRecord, match="loss is int, not float"):
        live.read(write(tmp_path / "b.live", [row(0, loss=1)], other), TRACE)


def test_a_code_without_a_text_is_damage(tmp_path: Path) -> None:
    block = table([row(0, skip="amp")])
    block["skip"] = 4
    with Closing(Writer(tmp_path / "t.live", TRACE, entries(ROWS))) as writer:
        writer.append(block)
    with pytest.raises(DamagedRecord, match="skip: a code without a text"):
        live.read(tmp_path / "t.live", TRACE)


def test_a_record_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "none.live"
    assert live.cut(path, TRACE, 0) == (0, 0) and live.last_step(path) == -1 and live.find(path) is None
    with pytest.raises(FileNotFoundError):
        live.read(path, TRACE)
    assert not list(tmp_path.iterdir())


# --- cut and continued ---


@pytest.mark.parametrize("next_step", [0, 3, 4, 6, 40])
def test_cut_at_any_byte_and_step_then_continued_is_the_unbroken_record(tmp_path: Path, next_step: int) -> None:
    rows = [{"step": i, "x": i / 8} for i in range(6)]
    whole = write(tmp_path / "a.live", rows, TINY, per_block=2).read_bytes()
    expected, path = cells(live.read(tmp_path / "a.live", TINY)), tmp_path / "b.live"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = len(live.read(path, TINY))
        kept = min(complete, next_step)
        dropped, cut_bytes = live.cut(path, TINY, next_step)
        assert (dropped, path.stat().st_size) == (complete - kept, size - cut_bytes)
        assert not live.read(path, TINY).note and live.last_step(path) == kept - 1
        write(path, rows[kept:], TINY)
        assert cells(live.read(path, TINY)) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.live", "b.live"]


def test_a_cut_within_a_block_keeps_the_old_file_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.live", ROWS[:30])
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        live.cut(path, TRACE, 12)
    assert path.read_bytes() == before


def test_rows_of_other_widths_are_not_appended(tmp_path: Path) -> None:
    path = write(tmp_path / "t.live", ROWS[:3])
    with pytest.raises(DamagedRecord, match="other columns"):
        Writer(path, TRACE, trace.widths(6))
    with Closing(Writer(path, TRACE, entries(ROWS))) as writer, pytest.raises(ValueError, match="record_type"):
        writer.append(table([row(3, layer_grad_norm=[1.0])]))


# --- the writer ---


class Closing:
    def __init__(self, writer: Writer):
        self.writer = writer

    def __enter__(self) -> Writer:
        return self.writer

    def __exit__(self, *error: object) -> None:
        self.writer.close()


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

    @property
    def counts(self) -> list[int]:
        """Rows in each write, which is one whole block."""
        return [struct.unpack_from("<I", b, b.index(b"BLK\xff") + 4)[0] for b in self.blocks]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_write_of_one_block_each_second_and_at_once_when_urgent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, clock = Writes(monkeypatch), Clock()
    writer = Writer(tmp_path / "t.live", TINY, {}, clock)
    writer.append(tiny(0, 1, 2))
    writer.append(tiny(3))
    assert writes.blocks == []
    clock.now = 0.999
    writer.append(tiny(4))
    assert writes.blocks == []
    clock.now = 1.0
    writer.append(tiny(5))
    assert writes.counts == [6]
    writer.append(tiny(6, 7), urgent=True)
    writer.append(tiny(8))
    assert writes.counts == [6, 2]
    writer.close()
    assert writes.counts == [6, 2, 1]
    assert [b.startswith(b"STABLIVE") for b in writes.blocks] == [True, False, False]
    assert live.read(tmp_path / "t.live", TINY)["step"].tolist() == list(range(9))


@pytest.mark.parametrize("size", [1, 32, 438, 439, 440, 5000])
def test_no_write_is_larger_than_64_kib_and_no_row_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    writes, rows = Writes(monkeypatch), table([row(i, layer_grad_norm=[1.0] * 8) for i in range(5000)])
    with Closing(Writer(tmp_path / "t.live", TRACE, trace.widths(6), Clock())) as writer:
        for start in range(0, 5000, size):
            writer.append(rows[start : start + size])
    assert max(map(len, writes.blocks)) <= 64 * 1024 and sum(writes.counts) == 5000
    assert len(writes.blocks) <= (14 if size < 400 else 24)
    assert live.read(tmp_path / "t.live", TRACE)["step"].tolist() == list(range(5000))


def test_rows_are_copied_when_they_are_appended(tmp_path: Path) -> None:
    pack = np.stack([tiny(0, 1), tiny(0, 1)], axis=1)  # [n, K]: a member's rows are not contiguous
    with Closing(Writer(tmp_path / "t.live", TINY, {})) as writer:
        writer.append(pack[:, 1])
        pack["x"] = 7.0
    assert live.read(tmp_path / "t.live", TINY)["x"].tolist() == [1.0, 1.0]


def test_a_flush_with_nothing_queued_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes(monkeypatch)
    writer = Writer(tmp_path / "t.live", TINY, {})
    writer.append(tiny())
    writer.flush()
    writer.close()
    writer.close()
    writer.sync()
    assert writes.blocks == [] and (tmp_path / "t.live").read_bytes() == b""
    assert len(live.read(tmp_path / "t.live", TINY)) == 0


def test_sync_reaches_the_disk_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(threading.get_ident()))
    writer = Writer(tmp_path / "t.live", TINY, {})
    writer.append(tiny(0), urgent=True)
    assert synced == []
    writer.flush(sync=True)
    assert len(synced) == 1
    thread = threading.Thread(target=writer.sync)
    thread.start()
    thread.join()
    assert len(synced) == 2 and synced[1] != threading.get_ident()
    writer.close()
    assert len(synced) == 3


def test_a_child_process_does_not_inherit_the_file(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "t.live", TINY, {})
    listing = "import os; print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])"
    child = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, timeout=60, close_fds=False)
    writer.close()
    assert "/dev/null" in child.stdout or "pipe" in child.stdout
    assert "t.live" not in child.stdout


@pytest.mark.parametrize("room", [0, 1, 16, 33])
def test_a_short_write_leaves_whole_blocks_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    writes, path = Writes(monkeypatch), tmp_path / "t.live"
    writer = Writer(path, TINY, {}, Clock())
    writer.append(tiny(0), urgent=True)
    first = path.read_bytes()
    writes.room = room
    writer.append(tiny(1))
    with pytest.raises(OSError, match="short write"):
        writer.append(tiny(2), urgent=True)
    assert path.read_bytes() == first
    writes.room = None  # there is room again: what was queued follows, once
    writer.append(tiny(3), urgent=True)
    writer.close()
    assert live.read(path, TINY)["step"].tolist() == [0, 1, 2, 3]


def test_of_a_flush_of_several_blocks_those_before_a_short_write_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, path = Writes(monkeypatch), tmp_path / "t.live"
    rows = table([{"step": i, "x": 1.0} for i in range(10_000)], TINY)
    writer = Writer(path, TINY, {}, Clock())
    writes.room = 65_500  # a whole write is at most that long, so the header's makes the first one shorter
    monkeypatch.setattr(live, "MAX_WRITE", 65_500)
    writer.append(rows)
    original, calls = writes._write, []

    def third_fails(fd: int, block: bytes) -> int:
        calls.append(len(block))
        return original(fd, block[:100] if len(calls) == 3 else block)

    writes._write = third_fails
    with pytest.raises(OSError, match="short write"):
        writer.flush()
    kept = live.read(path, TINY)
    assert 6_000 < len(kept) < 7_000 and not kept.note
    writes._write = original
    writer.close()
    assert live.read(path, TINY)["step"].tolist() == list(range(10_000))


FULL_DISK = """
import json, resource, sys
from pathlib import Path
import numpy as np
from stabstudy.live import Writer, read, records
from stabstudy.trace import PROBES, widths
path, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
writer, acked, refused = Writer(path, PROBES, widths(2)), 0, 0
for step in range(60):
    try:
        writer.append(records(PROBES, widths(2), {"step": np.array([step])}, {}), urgent=step % 3 == 2)
        acked = step + 1 if step % 3 == 2 else acked
    except OSError:
        refused += 1
        whole = read(path, PROBES)
        assert len(whole) == acked and not whole.note, (len(whole), acked, whole.note)
        if refused == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.close()
print(json.dumps([refused, read(path, PROBES)["step"].tolist()]))
"""


@pytest.mark.parametrize("limit", [0, 1, 700, 1111, 3000])
def test_a_full_disk_that_is_freed_again(tmp_path: Path, limit: int) -> None:
    """A file size limit gives a real short write, then EFBIG. Whole blocks stay; nothing is lost or doubled."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "p.live"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    refused, steps = json.loads(done.stdout)
    assert refused == 3 and steps == list(range(60))


KILLS = """
import json, os, random, signal, sys
from pathlib import Path
import numpy as np
from stabstudy.live import Writer, cut, read, records
from stabstudy.trace import TRACE, widths

def rows(step, n):
    steps = np.arange(step, step + n)
    known = {"step": steps, "tokens": steps, "seconds": 0.5, "lr": 1e-3, "loss": 1 / (steps + 1)}
    return records(TRACE, widths(2), known, {})

def work(path, start, acks, seed):
    rng, writer, step = random.Random(seed), Writer(path, TRACE, widths(2)), start
    while True:
        n = rng.randrange(1, 40)
        writer.append(rows(step, n))
        step += n
        if rng.random() < 0.3:
            writer.flush()
            os.write(acks, step.to_bytes(8, "little"))

path, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
torn = lost = acked = 0
for attempt in range(kills):
    cut(path, TRACE, 10**9)
    start = len(read(path, TRACE)) if path.exists() else 0
    ready, acks = os.pipe()
    child = os.fork()
    if child == 0:
        work(path, start, acks, attempt)
    os.close(acks)
    seen = b""
    for _ in range(rng.randrange(1, 20)):
        seen = os.read(ready, 8)
    for _ in range(rng.randrange(3000)):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while rest := os.read(ready, 8):
        seen = rest
    os.close(ready)
    acked = int.from_bytes(seen, "little")
    found = read(path, TRACE)
    torn += bool(found.note)
    lost += max(0, acked - len(found))
cut(path, TRACE, 10**9)
found = read(path, TRACE)
right = found["loss"].tolist() == [1 / (step + 1) for step in range(len(found))]
print(json.dumps({"lost": lost, "torn": torn, "rows": len(found), "acked": acked, "right": right}))
"""


@pytest.mark.parametrize("kills", [200, pytest.param(1000, marks=pytest.mark.faults)])
def test_no_row_that_was_written_is_lost_to_a_kill(tmp_path: Path, kills: int) -> None:
    """The writer is killed and started again, cuts the torn tail and continues; a new record every 25 kills."""
    for seed in range(kills // 25):
        command = [sys.executable, "-c", KILLS, str(tmp_path / f"{seed}.live"), "25", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["lost"] == 0 and found["right"] and found["rows"] >= found["acked"] > 25, (seed, found)

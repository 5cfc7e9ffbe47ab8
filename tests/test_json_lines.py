"""Live records of older studies: JSON lines are read, cut, and rewritten as binary records whatever kills it."""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from live_rows import entries, write, write_json_lines
from test_trace import ODD, TINY, cells, row

from stabstudy import encodings, live, trace
from stabstudy.trace import PROBES, TRACE, DamagedRecord

OLD = ROOT / "tests" / "data" / "unfinished" / "trials" / "8ebdecba34"


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_json_lines(path, rows)


def test_a_tail_torn_at_any_byte_costs_that_line_only(tmp_path: Path) -> None:
    values = [0.1, math.nan, None, -math.inf]
    whole = lines(tmp_path / "t.jsonl", [row(i, loss=v) for i, v in enumerate(values)]).read_bytes()
    expected = cells(encodings.read_json_lines(tmp_path / "t.jsonl", TRACE))
    torn = tmp_path / "torn.jsonl"
    for size in range(len(whole) + 1):
        torn.write_bytes(whole[:size])
        read = encodings.read_json_lines(torn, TRACE)
        complete = whole[:size].count(b"\n")
        assert len(read) == complete and bool(read.note) == (not whole[:size].endswith(b"\n") and size > 0)
        assert cells(read) == [c for i, c in enumerate(expected) if i % len(values) < complete]


@pytest.mark.parametrize("junk", [b"\0" * 4096, b"\0\0\n\0", b"\xff\xfe{", b"[" * 100_000, b'{"step":9e999', b"null\n"])
def test_what_a_power_cut_leaves_at_the_end_is_left_out(tmp_path: Path, junk: bytes) -> None:
    path = lines(tmp_path / "t.jsonl", [row(0), row(1)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + junk)
    read = encodings.read_json_lines(path, TRACE)
    assert len(read) == 2 and str(len(junk)) in read.note
    assert encodings.cut_json_lines(path, TRACE, 2) == (0, len(junk)) and path.stat().st_size == size


@pytest.mark.parametrize("bad", [b"\n", b"{}\n", b"[1]\n", b"12\n", b"\xff\n", b'{"step":1\n', b"\0\0\n", b"NaN\n"])
def test_a_bad_line_with_rows_after_it_is_damage(tmp_path: Path, bad: bytes) -> None:
    parts = lines(tmp_path / "t.jsonl", [row(i) for i in range(3)]).read_bytes().splitlines(keepends=True)
    damaged = tmp_path / "d.jsonl"
    damaged.write_bytes(parts[0] + bad + parts[1] + parts[2])
    before = damaged.read_bytes()
    with pytest.raises(DamagedRecord, match="rows after it"):
        encodings.read_json_lines(damaged, TRACE)
    with pytest.raises(DamagedRecord, match="rows after it"):
        encodings.cut_json_lines(damaged, TRACE, 3)
    assert damaged.read_bytes() == before


@pytest.mark.parametrize("steps", [[1], [0, 0], [0, 2], [0, 1, 0], [0, 1, 2, 2], [-1, 0]])
def test_a_repeated_missing_or_decreasing_step_is_damage(tmp_path: Path, steps: list[int]) -> None:
    path = lines(tmp_path / "t.jsonl", [row(s) for s in steps])
    with pytest.raises(DamagedRecord, match="step"):
        encodings.read_json_lines(path, TRACE)


@pytest.mark.parametrize("steps", [[0, 0], [5, 3], [-1, 4]])
def test_probes_must_increase(tmp_path: Path, steps: list[int]) -> None:
    path = lines(tmp_path / "p.jsonl", [{**dict.fromkeys(PROBES.names), "step": s} for s in steps])
    with pytest.raises(DamagedRecord, match="step"):
        encodings.read_json_lines(path, PROBES)


@pytest.mark.parametrize(
    ("column", "value"),
    [("step", "1"), ("step", 1.0), ("step", True), ("step", None), ("tokens", 2**63), ("lr", None), ("lr", "NaN")]
    + [("loss", True), ("loss", [1.0]), ("loss", 10**400), ("layer_grad_norm", 1.0), ("layer_grad_norm", [None])]
    + [("layer_grad_norm", [10**400]), ("skip", 1)],
)
def test_a_value_of_the_wrong_type_makes_a_bad_line(tmp_path: Path, column: str, value: Any) -> None:
    path = lines(tmp_path / "t.jsonl", [row(0), {**row(1), column: value}, row(2)])
    with pytest.raises(DamagedRecord):
        encodings.read_json_lines(path, TRACE)


def test_lists_of_different_lengths_are_damage(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [row(0), row(1, layer_grad_norm=[1.0])])
    with pytest.raises(DamagedRecord, match="lengths"):
        encodings.read_json_lines(path, TRACE)


@pytest.mark.parametrize("flips", [1_000, pytest.param(5_000, marks=pytest.mark.faults)])
def test_a_flipped_bit_raises_nothing_foreign(tmp_path: Path, flips: int) -> None:
    """JSON lines carry no checksum: a flip may go unseen."""
    whole = lines(tmp_path / "t.jsonl", [row(i, loss=2.0 + i) for i in range(40)]).read_bytes()
    rng, hurt = random.Random(7), tmp_path / "hurt.jsonl"
    for _ in range(flips):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        hurt.write_bytes(changed)
        with contextlib.suppress(DamagedRecord):
            encodings.read_json_lines(hurt, TRACE)


@pytest.mark.parametrize("next_step", [0, 3, 6, 40])
def test_cut_at_any_byte_and_step(tmp_path: Path, next_step: int) -> None:
    whole = lines(tmp_path / "a.jsonl", [{"step": i, "x": i / 8} for i in range(6)]).read_bytes()
    path = tmp_path / "b.jsonl"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = whole[:size].count(b"\n")
        kept = min(complete, next_step)
        dropped, cut_bytes = live.cut(path.with_suffix(".live"), TINY, next_step)
        assert (dropped, path.stat().st_size) == (complete - kept, size - cut_bytes)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
        assert live.last_step(path.with_suffix(".live")) == kept - 1


# --- upgrade ---


@pytest.mark.parametrize("schema", [TRACE, PROBES], ids=lambda s: s.name)
def test_a_record_that_an_older_version_left_is_upgraded(tmp_path: Path, schema: trace.Schema) -> None:
    shutil.copy(OLD / f"{schema.name}.jsonl", tmp_path)
    path = tmp_path / f"{schema.name}.live"
    old = encodings.read_json_lines(path.with_suffix(".jsonl"), schema)
    assert cells(live.read(path, schema)) == cells(old) and live.last_step(path) == old["step"][-1]
    widths = trace.widths(1)
    with pytest.raises(DamagedRecord, match="must be upgraded"):
        live.Writer(path, schema, widths)
    assert live.upgrade(path, schema, widths) and not live.upgrade(path, schema, widths)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert cells(live.read(path, schema)) == cells(old) and live.last_step(path) == old["step"][-1]
    live.Writer(path, schema, widths).close()


def test_every_value_survives_the_upgrade(tmp_path: Path) -> None:
    rows = [row(i, loss=v, clip_scale=ODD[-1 - i], skip="amp" if v is None else None) for i, v in enumerate(ODD)]
    path = lines(tmp_path / "t.jsonl", rows)
    old = encodings.read_json_lines(path, TRACE)
    path.write_bytes(path.read_bytes() + b'{"step":')
    live.upgrade(tmp_path / "t.live", TRACE, entries(rows))
    assert cells(live.read(tmp_path / "t.live", TRACE)) == cells(old)


def test_an_upgrade_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    lines(tmp_path / "t.jsonl", [row(0)])
    with pytest.raises(DamagedRecord, match="3 entries where 8"):
        live.upgrade(tmp_path / "t.live", TRACE, trace.widths(6))
    lines(tmp_path / "t.jsonl", [row(0, skip="whim")])
    with pytest.raises(DamagedRecord, match="'whim' is none of amp"):
        live.upgrade(tmp_path / "t.live", TRACE, entries([row(0)]))
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_of_two_records_the_older_goes_only_when_the_newer_has_its_rows(tmp_path: Path) -> None:
    rows, path = [row(i) for i in range(4)], tmp_path / "t.live"
    write(path, rows[:3])
    lines(tmp_path / "t.jsonl", rows)
    for act in (lambda: live.upgrade(path, TRACE, entries(rows)), lambda: live.cut(path, TRACE, 2)):
        with pytest.raises(DamagedRecord, match="lacks rows that t.jsonl has"):
            act()
    lines(tmp_path / "t.jsonl", [row(0, loss=math.nan)])
    with pytest.raises(DamagedRecord, match="lacks rows"):
        live.upgrade(path, TRACE, entries(rows))
    lines(tmp_path / "t.jsonl", rows[:3])
    assert live.cut(path, TRACE, 2)[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["t.live"] and len(live.read(path, TRACE)) == 2


def test_a_record_gets_the_columns_of_a_later_version(tmp_path: Path) -> None:
    older = trace.Schema("trace", tuple(c for c in TRACE.columns if c.name != "logz_mean"), True)
    path, rows = tmp_path / "t.live", [row(i) for i in range(4)]
    write(path, rows, older)
    with pytest.raises(DamagedRecord, match="other columns"):
        live.Writer(path, TRACE, entries(rows))
    before = cells(live.read(path, TRACE))
    assert live.upgrade(path, TRACE, entries(rows))
    assert cells(live.read(path, TRACE)) == before
    assert len(live.read(write(path, [row(4)]), TRACE)) == 5


def test_no_row_is_lost_by_a_kill_at_any_arrow_of_an_upgrade(tmp_path: Path) -> None:
    """Killed before each call that reaches the disk, then begun again."""
    rows, kills = [row(i, loss=ODD[i % len(ODD)]) for i in range(30)], 0
    for arrow in range(20):
        folder = tmp_path / str(arrow)
        folder.mkdir()
        expected = cells(encodings.read_json_lines(lines(folder / "t.jsonl", rows), TRACE))
        path = folder / "t.live"
        if not killed(arrow, lambda path=path: live.upgrade(path, TRACE, entries(rows))):
            break
        kills += 1
        assert cells(live.read(path, TRACE)) == expected
        live.upgrade(path, TRACE, entries(rows))
        (folder / "t.live.tmp").unlink(missing_ok=True)  # `store.sweep_leftovers`
        assert [p.name for p in folder.iterdir()] == ["t.live"] and cells(live.read(path, TRACE)) == expected
    assert kills >= 6  # open, fsync, rename, fsync of the folder, unlink, fsync of the folder


def killed(arrow: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that gets SIGKILL before its call number `arrow` to the file system."""
    child = os.fork()
    if child == 0:
        left = [arrow]

        def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
            def guard(*args: Any, **named: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return call(*args, **named)

            return guard

        os.fsync = guarded(os.fsync)
        for name in ("open", "replace", "unlink"):
            setattr(Path, name, guarded(getattr(Path, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

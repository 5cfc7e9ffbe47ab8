"""The record of a trial: exact round trips through both forms, and the finished form."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
from pathlib import Path
from typing import Any

import live_rows
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_rows import compact, write

from stabstudy import encodings, finished, live
from stabstudy.trace import PROBES, TRACE, Column, DamagedRecord, Rows, Schema, check_steps

TINY = Schema("tiny", (Column("step", "int", "", ""), Column("x", "float", "", "", True)), contiguous=True)
ODD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, math.nan, math.inf, -math.inf, None]


def row(step: int, **changes: Any) -> dict[str, Any]:
    plain = {"step": step, "tokens": 256 * (step + 1), "seconds": 0.01, "lr": 1e-3, "loss": 2.0, "grad_norm": 1.5}
    return {**dict.fromkeys(TRACE.names), **plain, "layer_grad_norm": [1.0, 0.5, 0.25], **changes}


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
    old = dataclasses.replace(PROBES, columns=tuple(c for c in PROBES.columns if not c.name.startswith("noise_")))
    path = write(tmp_path / "p.live", [{"step": s, "param_norm": 3.0} for s in (0, 10)], old)
    read = live.read(path, PROBES)
    assert read["param_norm"].tolist() == [3.0, 3.0] and not read.has("noise_scale") and not read.has("noise_g2")
    compact(path, tmp_path / "p.parquet", old, {})
    assert cells(finished.read_parquet(tmp_path / "p.parquet", PROBES)) == cells(read)


def test_null_nan_and_infinity_are_four_answers_in_both_forms(tmp_path: Path) -> None:
    rows = [row(i, loss=v, clip_scale=ODD[-1 - i], skip="amp" if v is None else None) for i, v in enumerate(ODD)]
    read = live.read(write(tmp_path / "trace.live", rows), TRACE)
    assert [v.hex() for v in read["loss"][:-1].tolist()] == [v.hex() for v in ODD[:-1] if v is not None]
    assert read.is_null("loss").tolist() == [False] * 8 + [True]
    assert math.isnan(read["loss"][-1]) and math.isnan(read["loss"][5])
    assert read["skip"].tolist() == [None] * 8 + ["amp"] and read["step"].dtype == np.int64
    n, sha = compact(tmp_path / "trace.live", tmp_path / "trace.parquet", TRACE, {})
    done = finished.read_parquet(tmp_path / "trace.parquet", TRACE, sha)
    assert n == len(rows) and cells(done) == cells(read)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.none() | st.floats(), max_size=20), width=st.integers(1, 4))
def test_every_float_survives_both_forms(tmp_path: Path, values: list[float | None], width: int) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    lists = [None if v is None else [v] * width for v in values]
    rows = [row(i, loss=v, layer_grad_norm=lists[i]) for i, v in enumerate(values)]
    read = live.read(write(tmp_path / "t.live", rows), TRACE)
    for i, v in enumerate(values):
        assert read.is_null("loss")[i] == read.is_null("layer_grad_norm")[i] == (v is None)
        if v is not None:
            assert (
                read["loss"][i].hex() == v.hex() and [x.hex() for x in read["layer_grad_norm"][i]] == [v.hex()] * width
            )
    _, sha = compact(tmp_path / "t.live", tmp_path / "t.parquet", TRACE, {})
    assert cells(finished.read_parquet(tmp_path / "t.parquet", TRACE, sha)) == cells(read)


def test_probes_may_have_gaps(tmp_path: Path) -> None:
    empty = dict.fromkeys(PROBES.names)
    rows = [{**empty, "step": s, "attn_logit_max": [float(s), 2.0]} for s in (0, 10, 25)]
    read = live.read(write(tmp_path / "p.live", rows, PROBES), PROBES)
    assert read["step"].tolist() == [0, 10, 25] and read["attn_logit_max"].shape == (3, 2)
    assert read.has("attn_logit_max") and not read.has("param_norm")
    compact(tmp_path / "p.live", tmp_path / "p.parquet", PROBES, {})
    assert cells(finished.read_parquet(tmp_path / "p.parquet", PROBES)) == cells(read)


def test_no_rows(tmp_path: Path) -> None:
    read = live.read(write(tmp_path / "t.live", []), TRACE)
    assert len(read) == 0 and not read.note and not read.has("loss")
    assert compact(tmp_path / "t.live", tmp_path / "t.parquet", TRACE, {})[0] == 0
    assert len(finished.read_parquet(tmp_path / "t.parquet", TRACE)) == 0


# --- damaged, older ---


@pytest.mark.parametrize("flips", [1_000, pytest.param(5_000, marks=pytest.mark.faults)])
def test_no_flipped_bit_goes_unseen_in_a_finished_record(tmp_path: Path, flips: int) -> None:
    """The state's sha256 sees every flip; without it nothing foreign is raised."""
    path = write(tmp_path / "t.live", [row(i, loss=2.0 + i) for i in range(40)])
    _, sha = compact(path, tmp_path / "t.parquet", TRACE, {})
    whole, hurt, rng = (tmp_path / "t.parquet").read_bytes(), tmp_path / "hurt", random.Random(7)
    for _ in range(flips):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        hurt.write_bytes(changed)
        with contextlib.suppress(DamagedRecord):
            finished.read_parquet(hurt, TRACE)
        with pytest.raises(DamagedRecord, match="sha256"):
            finished.read_parquet(hurt, TRACE, sha)


def test_a_parquet_cut_at_any_byte_is_damage(tmp_path: Path) -> None:
    compact(write(tmp_path / "t.live", [row(0)], TRACE), tmp_path / "t.parquet", TRACE, {})
    whole = (tmp_path / "t.parquet").read_bytes()
    for size in range(0, len(whole), 7):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(DamagedRecord):
            finished.read_parquet(tmp_path / "cut.parquet", TRACE)


OLDER = Schema("trace", tuple(c for c in TRACE.columns if c.name not in ("logz_mean", "layer_grad_norm")), True)
OTHER = Schema("trace", tuple(c for c in TRACE.columns if c.name != "lr"), True)


def test_a_record_of_an_older_version_lacks_columns_that_may_be_null(tmp_path: Path) -> None:
    path = write(tmp_path / "t.live", [row(0), row(1)], OLDER)
    compact(path, tmp_path / "t.parquet", OLDER, {})
    for read in (live.read(path, TRACE), finished.read_parquet(tmp_path / "t.parquet", TRACE)):
        assert read.is_null("logz_mean").all() and read.is_null("layer_grad_norm").all()
        assert read["loss"].tolist() == [2.0, 2.0] and read["layer_grad_norm"].shape == (2, 0)


def test_a_record_without_a_required_column_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "t.live", [row(0), row(1)], OTHER)
    compact(path, tmp_path / "t.parquet", OTHER, {})
    with pytest.raises(DamagedRecord, match="lr"):
        live.read(path, TRACE)
    with pytest.raises(DamagedRecord, match="lr"):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


@pytest.mark.parametrize("changed", [Column("loss", "text", "", "", True), Column("lr", "float", "", "", True)])
def test_a_record_with_a_column_of_another_type_or_a_null_is_damage(tmp_path: Path, changed: Column) -> None:
    """A flipped bit in the footer can change a type, and no page checksum covers the footer."""
    schema = Schema("trace", tuple(changed if c.name == changed.name else c for c in TRACE.columns), True)
    path = write(tmp_path / "t.live", [{**row(0), changed.name: None}], schema)
    compact(path, tmp_path / "t.parquet", schema, {})
    with pytest.raises(DamagedRecord, match=changed.name):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


def test_columns_may_be_chosen(tmp_path: Path) -> None:
    compact(write(tmp_path / "t.live", [row(0)]), tmp_path / "t.parquet", TRACE, {})
    read = finished.read_parquet(tmp_path / "t.parquet", TRACE, columns=["loss"])
    assert set(read.columns) == {"step", "loss"} and read["loss"].tolist() == [2.0]


# --- compaction ---


def test_a_resumed_record_compacts_to_the_same_bytes(tmp_path: Path) -> None:
    rows = [row(i, loss=ODD[i % len(ODD)]) for i in range(50)]
    whole = write(tmp_path / "a.live", rows)
    widths = live_rows.entries(rows)
    broken = write(tmp_path / "b.live", rows[:33], widths=widths, per_block=8)
    broken.write_bytes(broken.read_bytes() + encodings.MARKER + b"\1")
    size = broken.stat().st_size
    dropped, cut_bytes = live.cut(broken, TRACE, 20)
    assert dropped == 13 and broken.stat().st_size == size - cut_bytes
    write(broken, rows[20:], widths=widths)
    assert cells(live.read(broken, TRACE)) == cells(live.read(whole, TRACE))
    shas = {compact(p, p.with_suffix(".parquet"), TRACE, {"trial_id": "x"})[1] for p in (whole, broken)}
    assert len(shas) == 1 and whole.exists()


def test_a_torn_record_is_not_compacted(tmp_path: Path) -> None:
    path = write(tmp_path / "t.live", [row(0)])
    path.write_bytes(path.read_bytes() + b"BLK")
    with pytest.raises(DamagedRecord, match="torn"):
        compact(path, tmp_path / "t.parquet", TRACE, {})
    assert [p.name for p in tmp_path.iterdir()] == ["t.live"]


def test_a_compaction_that_was_killed_is_done_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.live", [row(0)])
    (tmp_path / "t.parquet.tmp").write_bytes(b"half")
    (tmp_path / "t.parquet").write_bytes(b"of another attempt")
    _, sha = compact(path, tmp_path / "t.parquet", TRACE, {})
    assert len(finished.read_parquet(tmp_path / "t.parquet", TRACE, sha)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.live", "t.parquet"]


def test_the_file_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.live", [row(0)])
    done: list[str] = []
    rename, fsync = Path.replace, os.fsync

    def note_fsync(fd: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def note_rename(p: Path, to: Path) -> Path:
        done.append(f"rename {p.name}")
        return rename(p, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    compact(path, tmp_path / "t.parquet", TRACE, {})
    assert done == ["sync t.parquet.tmp", "rename t.parquet.tmp", f"sync {tmp_path.name}"]


def test_metadata_is_kept_and_a_newer_format_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    path = write(tmp_path / "t.live", [row(0)])
    compact(path, tmp_path / "t.parquet", TRACE, {"trial_id": "0123456789"})
    assert pq.read_schema(tmp_path / "t.parquet").metadata[b"trial_id"] == b"0123456789"
    with pytest.raises(DamagedRecord, match="holds trace, not probes"):
        finished.read_parquet(tmp_path / "t.parquet", PROBES)
    monkeypatch.setattr(finished, "FORMAT", 2)
    compact(path, tmp_path / "newer.parquet", TRACE, {})
    monkeypatch.undo()
    with pytest.raises(DamagedRecord, match="format 2, this version reads up to 1"):
        finished.read_parquet(tmp_path / "newer.parquet", TRACE)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_file_that_is_no_parquet_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DamagedRecord):
        finished.read_parquet(tmp_path / "t.parquet", TRACE)


@pytest.mark.parametrize("steps", [[-1, 2], [3, 3], [5, 4], [2**63 - 1, 4]])
def test_steps_that_do_not_increase_are_damage_also_at_the_end_of_int64(steps: list[int]) -> None:
    check_steps(np.array([0, 7, 2**63 - 1]), PROBES)
    with pytest.raises(DamagedRecord, match=r"probes: step -?\d+ where \d+ was expected"):
        check_steps(np.array(steps), PROBES)

"""Where things lie: names, atomic writes, states, locks between processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import live_rows
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config, disk, store, trace
from stabstudy.disk import LockHeldError
from stabstudy.state import STATUSES, Attempt, State
from stabstudy.store import StoreError, StudyFolder, TrialFolder

LIMIT = 30.0  # seconds that a process may take to start on a loaded machine


@pytest.fixture
def folder(tmp_path: Path) -> TrialFolder:
    path = tmp_path / "results" / "study" / "trials" / "0123456789"
    path.mkdir(parents=True)
    return TrialFolder(path)


# --- names ---


@pytest.mark.parametrize("name", ["a", "depth_lr", "Lingua-52", "0", "a.b", "x" * 64, "console", "con-1"])
def test_names_of_studies(name: str) -> None:
    assert store.check_name(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../etc",
        "/etc",
        "a/b",
        "a\\b",
        "x" * 65,
        "x" * 300,
        "a\0b",
        "a\nb",
        "a\n",
        "study \N{ROCKET}",
        "CON",
        "con.txt",
    ]
    + [
        "-rf",
        ".hidden",
        "..",
        "a..b",
        "a.",
        "a b",
        "a:b",
        "a*",
        "~",
        "$HOME",
        "nul",
        "Lpt1",
        "é",
        "١",
        "<script>",
        "_x",
    ],
)
def test_names_that_are_refused_with_a_reason(name: str) -> None:
    why = store.check_name(name)
    assert why and "\n" not in why


@given(st.text(max_size=70))
def test_a_good_name_stays_inside_its_folder(name: str) -> None:
    if store.check_name(name) is None:
        path = Path("/results") / name
        assert path.parent == Path("/results") and path.name == name and os.path.normpath(path) == str(path)


# --- atomic writes ---


@pytest.mark.parametrize("stage", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "state.json"
    store.write_json(path, {"step": 1})

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if stage == "fsync" else Path, stage, refuse)
    with pytest.raises(OSError, match="space"):
        store.write_json(path, {"step": 2})
    monkeypatch.undo()
    assert store.read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


KILLED = """
import os, signal, sys
from pathlib import Path
from stabstudy import store
stage, path = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if stage == "fsync":
    os.fsync = die
elif stage == "replace":
    Path.replace = die
else:
    store.disk.sync_folder = die
store.write_json(path, {"step": 2})
"""


@pytest.mark.parametrize(("stage", "step"), [("fsync", 1), ("replace", 1), ("folder", 2)])
def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path, stage: str, step: int) -> None:
    path = tmp_path / "state.json"
    store.write_json(path, {"step": 1})
    done = subprocess.run([sys.executable, "-c", KILLED, stage, str(path)], capture_output=True, timeout=LIMIT)
    assert done.returncode == -signal.SIGKILL
    assert store.read_json(path) == {"step": step}
    assert len(store.sweep_leftovers(tmp_path)) == (1 if step == 1 else 0)


def test_the_text_is_durable_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def note_fsync(fd: int) -> None:
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def note_rename(p: Path, to: Path) -> Path:
        done.append(f"rename to {to.name}")
        return rename(p, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_rename)
    store.write_text(tmp_path / "a.txt", "text")
    assert done == [f"fsync a.txt.{os.getpid()}.tmp", "rename to a.txt", f"fsync {tmp_path.name}"]


def test_sweeping_leaves_everything_else(tmp_path: Path) -> None:
    for name in ("a.tmp", "b.json", "c.json.1.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tmp").mkdir()
    assert store.sweep_leftovers(tmp_path) == ["a.tmp", "c.json.1.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "folder.tmp"]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(tmp_path / "a.json", {"x": math.nan})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"12"])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"state\.json") as caught:
        store.read_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match=r"none\.json"):
        store.read_json(tmp_path / "none.json")


# --- states ---

FULL = State(
    "0123456789",
    "done",
    500,
    (
        Attempt("host", 12, "2026-01-02T03:04:05+00:00", ended="2026-01-02T04:04:05+00:00", status="lost"),
        Attempt("host", 13, "2026-01-02T05:04:05+00:00", 250, 3, 17, None, "done", None, {"torch": "2.13"}),
    ),
    "complete",
    "spiky",
    "ok",
    3,
    5.5,
    2.25,
    "e" * 16,
    {"trace": {"rows": 500, "sha256": "a" * 64}},
)


def test_a_trial_never_started_is_pending(folder: TrialFolder) -> None:
    assert folder.read_state() == State("0123456789") and folder.read_state().status == "pending"


def test_a_state_survives_its_file(folder: TrialFolder) -> None:
    folder.write_state(FULL)
    assert folder.read_state() == FULL


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (None, None), (0.1, 0.1)]
)
def test_losses_that_are_not_finite_are_text(folder: TrialFolder, value: float | None, text: Any) -> None:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    folder.write_state(replace(FULL, init_loss=value, final_loss=value, growth_act=value, growth_grad=value))
    body = json.loads(folder.state_file.read_text(), parse_constant=refuse)
    assert body["init_loss"] == body["final_loss"] == body["growth_act"] == body["growth_grad"] == text
    read = folder.read_state()
    assert (
        repr(read.init_loss) == repr(read.final_loss) == repr(read.growth_act) == repr(read.growth_grad) == repr(value)
    )


def edited(folder: TrialFolder, **changes: Any) -> TrialFolder:
    folder.write_state(FULL)
    body = json.loads(folder.state_file.read_text())
    folder.state_file.write_text(json.dumps(store.sealed({**body, **changes})))  # as a later version might write it
    return folder


def test_a_newer_format_is_refused_with_both_versions(folder: TrialFolder) -> None:
    newer = config.FORMAT_VERSION + 1
    with pytest.raises(StoreError, match=f"format {newer}, this version reads up to {config.FORMAT_VERSION}"):
        edited(folder, format=newer).read_state()


@pytest.mark.parametrize(
    "changes",
    [{"format": None}, {"format": "1"}, {"status": "asleep"}, {"status": None}, {"attempts": [1]}, {"attempts": [{}]}]
    + [{"attempts": 3}, {"init_loss": "much"}, {"final_loss": [1]}],
)
def test_a_broken_state_is_named(folder: TrialFolder, changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"state\.json") as caught:
        edited(folder, **changes).read_state()
    assert "\n" not in str(caught.value)


def test_fields_of_a_later_version_of_this_format_are_passed_over(folder: TrialFolder) -> None:
    attempts = [{"host": "h", "pid": 1, "started": "s", "colour": "red"}]
    read = edited(folder, weather="fine", attempts=attempts).read_state()
    assert read == replace(FULL, attempts=(Attempt("h", 1, "s"),))


def test_running_with_a_free_lock_is_lost(folder: TrialFolder) -> None:
    folder.write_state(replace(FULL, status="running"))
    assert folder.read_state().status == "lost"
    with disk.lock(folder.path):
        assert folder.read_state().status == "running"
    assert folder.read_state().status == "lost"
    assert store.read_json(folder.state_file)["status"] == "running"


def test_every_other_status_is_as_written(folder: TrialFolder) -> None:
    for status in set(STATUSES) - {"running"}:
        folder.write_state(replace(FULL, status=status))
        assert folder.read_state().status == status


# --- locks ---

HOLDER = """
import sys
from pathlib import Path
from stabstudy import disk
with disk.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.kill()
    process.wait(LIMIT)


def test_a_lock_excludes_another_process_and_names_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert disk.is_locked(tmp_path)
    begun = time.monotonic()
    with pytest.raises(LockHeldError, match=rf"locked by pid {holder.pid} on .+ since 20\d\d-"), disk.lock(tmp_path):
        pass
    assert time.monotonic() - begun < 2


def test_a_lock_is_free_the_moment_its_holder_is_killed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(LIMIT)
    assert not disk.is_locked(tmp_path)
    with disk.lock(tmp_path):
        assert disk.is_locked(tmp_path)
    assert not disk.is_locked(tmp_path) and (tmp_path / ".lock").exists()


def test_a_lock_excludes_its_own_process_too(tmp_path: Path) -> None:
    with disk.lock(tmp_path):
        with pytest.raises(LockHeldError, match=f"pid {os.getpid()}"), disk.lock(tmp_path):
            pass
        assert disk.is_locked(tmp_path)


def test_a_lock_is_released_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), disk.lock(tmp_path):
        raise RuntimeError
    assert not disk.is_locked(tmp_path)


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with disk.lock(tmp_path):
        wait = "import sys; sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, close_fds=False)
    end = time.monotonic() + LIMIT
    while disk.is_locked(tmp_path) and time.monotonic() < end:
        pass  # the kernel wakes the parent just before it closes the child's copies
    assert child.poll() is None and not disk.is_locked(tmp_path)
    child.communicate(timeout=LIMIT)


def test_looking_at_a_lock_is_no_launch(tmp_path: Path) -> None:
    """`is_locked` takes the lock for a moment; a launch that comes just then must not be turned away."""
    (tmp_path / ".lock").touch()
    look = "import sys; from pathlib import Path; from stabstudy import disk; print(flush=True)\n"
    look += "while True: disk.is_locked(Path(sys.argv[1]))"
    watchers = [
        subprocess.Popen([sys.executable, "-c", look, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for watcher in watchers:
            assert watcher.stdout is not None and watcher.stdout.readline() == "\n"
        for _ in range(300):
            with disk.lock(tmp_path):
                pass
    finally:
        for watcher in watchers:
            watcher.kill()
            watcher.communicate(timeout=LIMIT)


def test_no_lock_file_is_no_lock_and_looking_makes_none(tmp_path: Path) -> None:
    assert not disk.is_locked(tmp_path) and not disk.is_locked(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_can_be_seen_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    open_ = os.open

    def note(path: Path, flags: int) -> int:
        opened.append(flags)
        return open_(path, flags)

    with disk.lock(tmp_path):
        monkeypatch.setattr(os, "open", note)
        assert disk.is_locked(tmp_path)
    assert [flags & os.O_ACCMODE for flags in opened] == [os.O_RDONLY]


# --- records and studies ---


def live_record(folder: TrialFolder, rows: int) -> None:
    known = {"tokens": 1, "seconds": 0.1, "lr": 1e-3}
    live_rows.write(folder.live(trace.TRACE), [{**known, "step": step} for step in range(rows)])


def compacted(folder: TrialFolder) -> State:
    rows, sha = live_rows.compact(folder.live(trace.TRACE), folder.finished(trace.TRACE), trace.TRACE, {})
    return replace(FULL, records={"trace": {"rows": rows, "sha256": sha}})


def test_the_record_is_live_until_the_state_knows_the_finished_one(folder: TrialFolder) -> None:
    assert folder.rows(trace.TRACE) is None
    live_record(folder, 3)
    state = compacted(folder)
    live_record(folder, 0)
    folder.finished(trace.TRACE).write_bytes(b"not yet known to the state: compact again")
    read = folder.rows(trace.TRACE)
    assert read is not None and len(read) == 3
    assert compacted(folder) == state
    folder.write_state(state)
    folder.live(trace.TRACE).unlink()
    read = folder.rows(trace.TRACE)
    assert read is not None and len(read) == 3


def test_the_record_of_an_older_version_is_read_where_it_lies(folder: TrialFolder) -> None:
    rows = [{"tokens": 1, "seconds": 0.1, "lr": 1e-3, "step": step} for step in range(3)]
    live_rows.write_json_lines(folder.path / "trace.jsonl", rows)
    read = folder.rows(trace.TRACE)
    assert read is not None and read["step"].tolist() == [0, 1, 2]


def test_a_finished_record_with_another_checksum_is_damaged(folder: TrialFolder) -> None:
    live_record(folder, 3)
    state = compacted(folder)
    folder.finished(trace.TRACE).write_bytes(folder.finished(trace.TRACE).read_bytes() + b"\0")
    with pytest.raises(trace.DamagedRecord, match="sha256"):
        folder.rows(trace.TRACE, state)


def test_a_record_known_to_the_state_but_gone_is_damaged(folder: TrialFolder) -> None:
    live_record(folder, 3)
    folder.write_state(compacted(folder))
    folder.live(trace.TRACE).unlink()
    folder.finished(trace.TRACE).unlink()
    with pytest.raises(trace.DamagedRecord, match="missing"):
        folder.rows(trace.TRACE)


def test_the_trials_of_a_study(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "study")
    for trial_id in ("b" * 10, "a" * 10, "c" * 10):
        study.trial(trial_id).path.mkdir(parents=True)
    for trial_id in ("b" * 10, "a" * 10):
        store.write_json(study.trial(trial_id).config_file, {})
    assert [t.trial_id for t in study.trials()] == ["a" * 10, "b" * 10]
    assert store.open_study(study.path) == study and study.name == "study"


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="is not a study"):
            store.open_study(path)
    (tmp_path / "sweep.yaml").touch()
    assert store.open_study(tmp_path).trials() == []


def test_now_is_utc() -> None:
    assert disk.utc_now().endswith("+00:00")

"""The journal of a search: what optuna-dashboard opens, whatever a killed process or an editor left of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import searched
from searched import Disk, Planner, without_files

from stabstudy.analysis import searches
from stabstudy.analysis.searches import Suggestion
from stabstudy.search import journal
from stabstudy.search.optuna_search import OptunaSearch

optuna = pytest.importorskip("optuna")

SEARCH = searched.search(constraints=["verdict == stable"], minimize=["final_loss", "severity"])


def suggestion(number: int, state: str = "done", **changed: Any) -> Suggestion:
    values: Any = {
        "optim.lr": 1e-3 * (1 + number),
        "optim.warmup_steps": 5 + number,
        "optim.clip": None,
        "data": "pysrc",
    }
    result: dict[str, Any] = {"objectives": (2.5 + number, 0.0), "violations": (-1.0, 0.5)} if state == "done" else {}
    return Suggestion(f"cell{number}", trial_ids=(), state=state, **({"values": values} | result | changed))


def opened(path: Path) -> Any:
    """As optuna-dashboard opens it: by its own storage, with Optuna's own lock."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return optuna.load_study(study_name="mine", storage=storage)


def content(path: Path) -> list[Any]:
    trials = opened(path).trials
    return [(t.user_attrs["cell_id"], t.state.name, t.params, t.values, t.constraints) for t in trials]


def expected(suggestions: list[Suggestion]) -> list[Any]:
    states = {"done": "COMPLETE", "running": "RUNNING", "failed": "FAIL"}
    return [
        (s.cell_id, states[s.state], dict(s.values), list(s.objectives) or None, searches.constraints(s, SEARCH))
        for s in suggestions
    ]


def write(path: Path, suggestions: list[Suggestion]) -> str | None:
    return journal.write(path, "mine", SEARCH, suggestions)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "optuna.journal"


def test_it_says_what_the_trials_say_and_grows(path: Path):
    first = [suggestion(0), suggestion(1, "running"), suggestion(2, "failed"), suggestion(3, "running")]
    assert write(path, first) is None and content(path) == expected(first)
    before = path.read_bytes()
    assert write(path, first) is None and path.read_bytes() == before, "nothing new, nothing written"
    then = [first[0], suggestion(1), first[2], suggestion(3, "failed"), suggestion(4)]
    assert write(path, then) is None and content(path) == expected(then)
    assert path.read_bytes().startswith(before), "an open dashboard reads on from where it was"
    study = opened(path)
    assert [d.name for d in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["optuna.journal"]


def test_a_failed_trial_that_is_tried_again_has_a_new_entry(path: Path):
    write(path, [suggestion(0, "failed")])
    write(path, [suggestion(0, "running")])
    assert write(path, [suggestion(0)]) is None
    assert [entry[1] for entry in content(path)] == ["FAIL", "COMPLETE"]


def test_a_suggestion_that_was_never_begun_ends_as_failed(path: Path):
    write(path, [suggestion(0), suggestion(1, "running")])
    assert write(path, [suggestion(0), suggestion(2, "running")]) is None
    assert [entry[:2] for entry in content(path)] == [("cell0", "COMPLETE"), ("cell1", "FAIL"), ("cell2", "RUNNING")]


def torn_at(path: Path, end: int, whole: bytes) -> None:
    path.write_bytes(whole[:end])


def test_a_journal_torn_anywhere_is_made_anew(path: Path):
    """Every byte offset around each end of a line, and a sample of the others."""
    before, after = [suggestion(0), suggestion(1, "running")], [suggestion(0), suggestion(1), suggestion(2, "running")]
    write(path, before)
    write(path, [*before, suggestion(2, "running")])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    offsets = {0, *ends, *(e - 1 for e in ends), *(e + 1 for e in ends[:-1]), *range(7, len(whole), 997)}
    for end in sorted(offsets):
        torn_at(path, end, whole)
        assert write(path, after) is None, end
        assert content(path) == expected(after), end
        assert write(path, [*after[:2], suggestion(2)]) is None
        assert content(path)[2][1] == "COMPLETE", f"after {end} bytes nothing can be written"


def test_optuna_alone_cannot_write_behind_a_torn_end(path: Path):
    """The hazard, and that the test above tears what matters."""
    write(path, [suggestion(0)])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises((ValueError, KeyError, AttributeError)):
        study = opened(path)
        study.add_trial(searches.frozen(suggestion(1), SEARCH))
        study.add_trial(searches.frozen(suggestion(2), SEARCH))


@pytest.mark.parametrize(
    "text",
    [b"", b"\n", b"not json\n", b"[1]\n", b"{}\n", b'{"op_code": 99, "worker_id": "x"}\n', b"\xff\xfe\n", b"\0" * 100],
)
def test_anything_else_in_its_place_is_put_aside(text: bytes, path: Path):
    path.write_bytes(text)
    assert write(path, [suggestion(0)]) is None and content(path) == expected([suggestion(0)])
    assert path.with_name("optuna.journal.damaged").read_bytes() == text


@pytest.mark.parametrize(
    "others",
    [
        [suggestion(0, objectives=(9.0, 0.0))],
        [suggestion(0, violations=(-1.0, -1.0))],
        [suggestion(0, values=suggestion(1).values)],
        [suggestion(0), suggestion(5)],
    ],
)
def test_a_journal_that_says_something_else_is_made_anew(others: list[Suggestion], path: Path):
    """It was edited, or belongs to other trials."""
    write(path, others)
    assert write(path, [suggestion(0)]) is None and content(path) == expected([suggestion(0)])
    assert path.with_name("optuna.journal.damaged").exists()


def test_another_search_of_the_study_makes_it_anew(path: Path):
    other = searched.search(maximize=["final_loss"], minimize=[])
    journal.write(path, "mine", other, [suggestion(0, objectives=(1.0,), violations=(-1.0,))])
    assert write(path, [suggestion(0)]) is None and content(path) == expected([suggestion(0)])


def test_a_penalty_may_change(path: Path):
    """It is the worst value so far: what was told before stays told."""
    bad = {"penalised": True, "violations": (1.0, 1.0)}
    write(path, [suggestion(0, **bad)])
    before = path.read_bytes()
    assert write(path, [suggestion(0, **bad, objectives=(7.0, 7.0))]) is None and path.read_bytes() == before


def test_what_is_no_file_is_left_alone_with_a_line(path: Path):
    path.mkdir()
    assert "is a folder, not a file" in (write(path, [suggestion(0)]) or "")
    assert path.is_dir()
    path.rmdir()
    os.mkfifo(path)
    assert "not a file" in (write(path, [suggestion(0)]) or "")


def test_a_folder_that_cannot_be_written_is_a_line_and_no_error(tmp_path: Path):
    line = write(tmp_path / "gone" / "optuna.journal", [suggestion(0)])
    assert line is not None and "cannot be written (FileNotFoundError" in line and "\n" not in line


@pytest.mark.slow
def test_a_lock_that_a_killed_process_left_costs_seconds(path: Path):
    write(path, [suggestion(0)])
    path.with_name("optuna.journal.lock").touch()
    start = time.monotonic()
    assert write(path, [suggestion(0), suggestion(1)]) is None
    assert content(path) == expected([suggestion(0), suggestion(1)])
    assert 2 < time.monotonic() - start < 8
    assert not path.with_name("optuna.journal.lock").exists()


def test_the_search_does_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gone, or full of other results: what is asked next is the same."""
    without_files(monkeypatch, writes=True)
    disk = Disk(tmp_path)
    search = searched.search(sampler="NSGA-II", trials=12)
    strategy = OptunaSearch(Planner(), search)
    for _ in range(3):
        disk.train(*strategy.next(disk, 3, ()))  # type: ignore[arg-type]
    asked = strategy.next(disk, 3, ())  # type: ignore[arg-type]
    assert len(opened(disk.journal).trials) == 12
    disk.journal.unlink()
    assert OptunaSearch(Planner(), search).next(disk, 3, ()) == asked  # type: ignore[arg-type]
    records = disk.journal.read_text().replace("COMPLETE", "FAIL").replace("2.", "7.")
    disk.journal.write_text(records)
    assert OptunaSearch(Planner(), search).next(disk, 3, ()) == asked  # type: ignore[arg-type]
    assert strategy.note == ""


def test_nothing_in_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Optuna keeps CMA-ES as a pickle, in hex, in its own storage: never in ours."""
    pytest.importorskip("cmaes")
    without_files(monkeypatch, writes=True)
    disk = Disk(tmp_path)
    strategy = OptunaSearch(Planner(), searched.search(sampler="CMA-ES", trials=16))
    while trials := strategy.next(disk, 4, ()):  # type: ignore[arg-type]
        disk.train(*trials)
    text = disk.journal.read_text()
    assert "optimizer" not in text and len(text.splitlines()) >= 16
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())

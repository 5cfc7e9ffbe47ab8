"""Rounds of packs: a bad member is found by halving and the others end, whatever it does to its process."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from stabstudy import disk, store
from stabstudy.state import Attempt
from stabstudy.sweeping.progress import Board
from stabstudy.sweeping.rounds import Pack, Rounds, one_after_another
from stabstudy.sweeping.worker import StopRequest

IDS = tuple(f"{i:010x}" for i in range(8))


class Work:
    """A study of eight trials and a stand-in for training, which records who was trained with whom."""

    def __init__(self, folder: Path):
        self.study = store.StudyFolder(folder)
        for trial_id in IDS:
            self.study.trial(trial_id).path.mkdir(parents=True)
        self.text = io.StringIO()
        self.board = Board("study", dict.fromkeys(IDS, ""), 0, console=Console(file=self.text, width=200))
        self.trained: list[Pack] = []
        self.stop = StopRequest(self.study)

    def rounds(self, packs: Sequence[Pack], retries: int = 1) -> Rounds:
        return Rounds(self.study, packs, retries, self.board, self.stop)

    def write(self, trial_id: str, status: str, begin: bool = True) -> None:
        folder = self.study.trial(trial_id)
        state = folder.read_state()
        attempt = Attempt("here", 1, disk.utc_now(), status=status)
        attempts = (*state.attempts, attempt) if begin else state.attempts
        error = {"kind": "OSError", "message": "no space left: here", "step": 0} if status == "disk_full" else None
        records = {"trace": {"rows": 1, "sha256": "0" * 64}} if status == "done" else {}
        changes = {"status": status, "attempts": attempts, "records": records, "error": error}
        folder.write_state(dataclasses.replace(state, **changes))

    def status(self, trial_id: str) -> str:
        return self.study.trial(trial_id).read_state().status

    def statuses(self) -> dict[str, str]:
        return {t: self.status(t) for t in IDS}

    def trainer(self, ends: dict[str, str], dies: str | None = None) -> Callable[[Pack], None]:
        """Members end as told, else done. With `dies` in it, the whole process is gone: `running`, and no lock."""

        def train(pack: Pack) -> None:
            self.trained.append(pack)
            for trial_id in pack:
                if self.status(trial_id) != "done":
                    self.write(trial_id, "running" if dies in pack else ends.get(trial_id, "done"))

        return train


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


@pytest.mark.parametrize("bad", range(8))
def test_a_member_that_takes_its_process_with_it_is_found_alone(work: Work, bad: int) -> None:
    one_after_another(work.rounds([IDS]), work.trainer({}, dies=IDS[bad]))
    assert work.statuses() == {t: "lost" if t == IDS[bad] else "done" for t in IDS}
    with_bad = [len(pack) for pack in work.trained if IDS[bad] in pack]
    assert with_bad == [8, 4, 2, 1, 1], "halved down to one, which has one retry"
    assert len(work.board.finished) == 8 and not work.board.running


def test_control_without_halves_the_bad_member_takes_the_others(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def again_as_it_was(self: Rounds, pack: Pack) -> None:
        if len(work.trained) < 20:
            self.waiting.append(pack)

    monkeypatch.setattr(Rounds, "ended", again_as_it_was)
    one_after_another(work.rounds([IDS]), work.trainer({}, dies=IDS[3]))
    assert set(work.statuses().values()) == {"lost"}


def test_two_bad_members(work: Work) -> None:
    def both(pack: Pack) -> None:
        (work.trainer({}, dies=IDS[0]) if IDS[0] in pack else work.trainer({}, dies=IDS[7]))(pack)

    one_after_another(work.rounds([IDS], retries=0), both)
    assert [t for t, s in work.statuses().items() if s != "done"] == [IDS[0], IDS[7]]
    assert [len(p) for p in work.trained if IDS[7] in p] == [8, 4, 2, 1]


@pytest.mark.parametrize(("retries", "attempts"), [(0, 1), (1, 2), (3, 4)])
def test_a_member_that_fails_alone_is_tried_as_often_as_told(work: Work, retries: int, attempts: int) -> None:
    one_after_another(work.rounds([IDS], retries), work.trainer({IDS[2]: "failed"}))
    assert work.trained == [IDS, *[(IDS[2],)] * (attempts - 1)]
    assert len(work.study.trial(IDS[2]).read_state().attempts) == attempts


def test_memory_that_did_not_suffice_is_not_tried_again(work: Work) -> None:
    one_after_another(work.rounds([IDS]), work.trainer({IDS[2]: "oom"}))
    assert work.trained == [IDS] and work.board.finished[IDS[2]] == "oom"


def test_an_older_state_says_nothing_of_this_launch(work: Work) -> None:
    """A process that dies before its members have begun leaves the `oom` and `interrupted` of a launch before."""
    for trial_id, status in zip(IDS, ("oom", "interrupted"), strict=False):
        work.write(trial_id, status)
    packs: list[Pack] = []

    def train(pack: Pack) -> None:
        packs.append(pack)
        if len(packs) > 1:
            work.trainer({})(pack)

    one_after_another(work.rounds([IDS]), train)
    assert packs == [IDS, IDS[:4], IDS[4:]] and set(work.statuses().values()) == {"done"}


def test_a_full_disk_ends_the_launch(work: Work) -> None:
    one_after_another(work.rounds([IDS[:4], IDS[4:]], retries=3), work.trainer({IDS[1]: "disk_full"}))
    assert work.trained == [IDS[:4]], "it would fill for the others too"
    assert work.stop.reason == "no space left: here" and work.board.finished[IDS[1]] == "disk_full"


def test_a_full_disk_on_which_no_state_could_be_written_ends_the_launch(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 4096)
    one_after_another(work.rounds([IDS[:4], IDS[4:]]), work.trainer({}, dies=IDS[0]))
    assert work.trained == [IDS[:4]]
    assert work.stop.reason == f"no space left on device: {work.study.path} (4096 bytes free there)"


def test_a_member_whose_process_hung_is_timed_out_told_of_and_tried_again(work: Work) -> None:
    rounds = work.rounds([IDS[:1]], retries=1)

    def train(pack: Pack) -> None:
        work.trainer({}, dies=IDS[0])(pack)
        rounds.hung({IDS[0]: "nothing was recorded for 130 s"})

    one_after_another(rounds, train)
    state = work.study.trial(IDS[0]).read_state()
    assert work.trained == [IDS[:1], IDS[:1]]
    assert state.status == "timeout" and state.error == {
        "kind": "Timeout", "message": "nothing was recorded for 130 s", "step": 0,
    }  # fmt: skip
    assert state.attempts[-1].status == "timeout" and state.attempts[-1].ended is not None
    text = work.text.getvalue()
    assert f"{IDS[0]} hung: nothing was recorded for 130 s; it goes on from its last checkpoint" in text
    assert "timeout: nothing was recorded for 130 s" in text.splitlines()[-1]


def test_done_and_locked_members_are_left_alone(work: Work) -> None:
    with disk.lock(work.study.trial(IDS[1]).path):
        one_after_another(work.rounds([IDS[:2]]), lambda pack: work.trainer({})(pack[:1]))
        assert work.board.finished == {IDS[0]: "not judged"} and not work.board.running
        assert work.trained == [IDS[:1]]


def test_a_stop_ends_between_packs(work: Work) -> None:
    def train(pack: Pack) -> None:
        work.trainer({})(pack)
        work.stop.end("enough")

    one_after_another(work.rounds([IDS[:4], IDS[4:]]), train)
    assert work.trained == [IDS[:4]]


def test_interrupted_members_wait_for_the_next_launch(work: Work) -> None:
    one_after_another(work.rounds([IDS]), work.trainer(dict.fromkeys(IDS, "interrupted")))
    assert work.trained == [IDS] and not work.board.finished and not work.board.running


def test_the_board_shows_members_and_their_end_at_once(work: Work) -> None:
    rounds = work.rounds([IDS[:3]])
    rounds.start(IDS[:3])
    assert list(work.board.running) == list(IDS[:3])
    work.write(IDS[0], "done")
    told = {"step": 5, "steps": 10, "loss": 1.0, "grad_norm": 0.5, "spike_events": 0, "tokens_per_second": 7.0}
    rounds.progress(IDS[:3], {"members": [told | {"trial_id": t} for t in IDS[1:3]]})
    assert list(work.board.running) == list(IDS[1:3]) and work.board.running[IDS[1]].step == 5
    rounds.ended(IDS[:1])
    assert work.text.getvalue().count(IDS[0]) == 1, "told once"


def test_a_member_that_a_rule_has_stopped_is_not_tried_again_unless_an_older_launch_did(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.write(IDS[1], "stopped")  # by an older launch: here it is to go on
    rounds = work.rounds([IDS[:3]])
    (pack,) = rounds.take()
    rounds.start(pack)
    rounds.progress(pack, {"members": [{"trial_id": IDS[2]}]})
    assert not work.board.finished
    work.write(IDS[0], "stopped")
    rounds.progress(pack, {"members": [{"trial_id": IDS[2]}]})
    assert work.board.finished == {IDS[0]: "stopped"}
    work.write(IDS[2], "done")
    rounds.ended(pack)
    assert rounds.take() == [(IDS[1],)]

"""Drivers that are killed, many launches of one study at once, and reports that are not finished."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults import children, launches
from faults.campaign import Part
from faults.invariants import of_interrupted_trial, of_tables, tree_hash, violations
from faults.killer import Child, killed
from stabstudy import disk, failpoints, store

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
OF_DRIVERS = [name for name in failpoints.POINTS if name not in ("live.truncate",) and not name.startswith("cut")]
OF_REPORTS = [name for name in OF_DRIVERS if name.split(".")[0] in ("table", "file")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a study that was launched once and never interrupted."""
    folder = launches.folder(tmp_path_factory.mktemp("whole"))
    child = launches.local(folder, cache)
    child.end(300)
    assert child.code == 0, launches.log(folder)
    return folder


def test_a_driver(part: Begin, tmp_path: Path, whole: Path, cache: Path) -> None:
    """Wherever it was killed, the same command goes on, and ends with the same study, tables included."""
    folder, other = launches.folder(tmp_path), tree_hash(whole)
    study, reference = (store.StudyFolder(launches.study(f)) for f in (folder, whole))
    with part("driver") as running:
        for rng in running.injections():
            words = (children.sweep, launches.words(cache), folder / "log.txt")
            point = f"{rng.choice(OF_DRIVERS)}:kill@{rng.choice([1, 2, 3, 5, 8])}" if rng.random() < 0.4 else ""
            child = killed(*words, rng=rng, seconds=8, point=point, cwd=folder)
            committed = launches.acknowledged(child.end())
            running.count(child.was_killed)
            for trial in study.trials():
                running.add(of_interrupted_trial(trial, committed.get(trial.trial_id, 0)))
            if not child.was_killed:
                running.check(child.code == 0, f"exit {child.code}")
                running.add(compared(study.path, reference.path, {whole: other}))
                folder = launches.folder(tmp_path / str(running.tried))
                study = store.StudyFolder(launches.study(folder))
        child = launches.local(folder, cache)
        child.end(300)
        running.check(child.code == 0, f"exit {child.code}: {launches.log(folder)[-300:]}")
        running.add(compared(study.path, reference.path, {whole: other}))
    assert "Traceback" not in launches.log(folder)


def compared(study: Path, reference: Path, others: dict[Path, str]) -> list[str]:
    names = [{p.relative_to(of).as_posix() for p in of.glob("report/**/*")} for of in (study, reference)]
    broken = violations(study, reference, others) + of_tables(study, reference)
    return broken + [f"I2 report/: {name}" for name in sorted(names[0] ^ names[1])]


def test_one_launch_of_many_wins(part: Begin, tmp_path: Path, cache: Path) -> None:
    with part("launches") as running:
        at_once, longest = min(20, running.wanted), 0.0
        for rng in running.injections():
            folder = launches.folder(tmp_path / f"{running.tried}")
            go = folder / "go"
            words = [*launches.words(cache, steps=1_000_000), f"seeds=[{rng.randrange(1000)}]"]
            racers = [Child(children.sweep, words, folder / f"log{i}.txt", go, cwd=folder) for i in range(at_once)]
            for racer in racers:
                racer.wait_for_acks(1)
            go.touch()
            began = time.monotonic()
            losers = launches.ended(racers, at_once - 1, seconds=90)
            longest = max(longest, time.monotonic() - began)
            winners = [racer for racer in racers if racer not in losers]
            running.check(len(winners) == 1, f"{len(winners)} launches work on one study")
            for i, racer in enumerate(racers):
                text = (folder / f"log{i}.txt").read_text()
                right = f"locked by pid {winners[0].process.pid} on " in text if winners else False
                if racer in losers:
                    running.check(racer.code == 4 and right, f"a loser: exit {racer.code}: {text[-200:]}")
            for winner in winners:
                winner.kill()
            began = time.monotonic()
            while disk.is_locked(launches.study(folder)) and time.monotonic() - began < 10:
                time.sleep(0.01)
            running.check(time.monotonic() - began < 1, "the lock outlives its holder")
            running.n += at_once - 1
            running.check("Traceback" not in "".join(p.read_text() for p in folder.glob("log*")), "a traceback")
        print(f"the last of {at_once - 1} losers ended within {longest:.1f} s")


def test_without_the_lock_more_would_win(tmp_path: Path, cache: Path) -> None:
    """Negative control."""
    folder = launches.folder(tmp_path)
    words = launches.words(cache, steps=1_000_000)
    racers = [Child(children.sweep_without_a_lock, words, folder / f"log{i}", cwd=folder) for i in range(3)]
    losers = launches.ended(racers, 2, seconds=6)
    for racer in racers:
        racer.kill() if racer not in losers else None
    assert len(losers) < 2


def test_a_report(part: Begin, tmp_path: Path, whole: Path) -> None:
    """Killed while it is written: each file is the old or the new one, and the next report is as if nothing was."""
    study = launches.study(whole)
    expected = {k: v for k, v in children.files(study).items() if k.startswith("report/")}
    with part("report") as running:
        for rng in running.injections():
            target = children.copied(study, tmp_path / "check")
            if rng.random() < 0.5:
                shutil.rmtree(target / "report")
                (target / "trials.parquet").unlink()
            before = children.files(target)
            point = f"{rng.choice(OF_REPORTS)}:kill@{rng.randint(1, 9)}" if rng.random() < 0.6 else ""
            child = killed(children.report, target, rng=rng, seconds=4, point=point)
            child.end()
            running.count(child.was_killed)
            for name, data in children.files(target).items():
                if name.startswith("report/") and not name.endswith(".tmp"):
                    running.check(data in (before.get(name), expected.get(name)), f"I2 {name} is torn")
                if name.startswith("trials/"):
                    running.check(data == before.get(name), f"I1 {name} was written by a report")
            Child(children.report, target).end()
            after = {k: v for k, v in children.files(target).items() if k.startswith("report/")}
            differ = sorted(name for name in {*after, *expected} if after.get(name) != expected.get(name))
            running.check(not differ, f"I5 differs: {', '.join(differ)}")

"""Failpoints: what the variable may say, what each action does, and that every point is reached."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trials import BASE, Make

from stabstudy import failpoints, live, report, store, trace
from stabstudy.failpoints import FailpointError, Fault
from stabstudy.planning.plan import make_plan
from stabstudy.stability.rules import Rules
from stabstudy.state import State
from stabstudy.sweeping.launch import launch
from stabstudy.training.loop import Progress
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine, Trial

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_the_text_of_the_variable() -> None:
    text = "state.written:kill@3, live.write:enospc@2+ ,trace.synced:sleep=0.5,live.written:eio"
    assert failpoints.parse(text) == {
        "state.written": Fault("kill", 3, False, 60),
        "live.write": Fault("enospc", 2, True, 60),
        "trace.synced": Fault("sleep", 1, False, 0.5),
        "live.written": Fault("eio", 1, False, 60),
    }
    assert failpoints.parse("") == failpoints.parse(" , ") == {}


@pytest.mark.parametrize(
    "text", ["state.written", "state.written:stop", "state.written:kill@0", "state.written:kill@", "live.write:sleep=x"]
)
def test_what_the_variable_may_not_say(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape("must be POINT:ACTION[@N[+]], ACTION kill, raise, enospc, eio or")):
        failpoints.parse(text)


def test_an_unknown_name_is_one_line_and_nothing_runs(tmp_path: Path) -> None:
    environment = os.environ | {failpoints.VARIABLE: "state.writen:kill", "PYTHONPATH": str(ROOT)}
    for command in (["stabstudy.sweep", "--list"], ["stabstudy.report", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(
            "error: STABSTUDY_FAILPOINT: 'state.writen' is no failpoint; they are live.write,"
        )


def test_each_action_at_its_time() -> None:
    failpoints.arm("live.write:enospc@2,live.written:eio@1+,live.synced:raise,live.truncate:sleep=0")
    failpoints.hit("live.write")
    with pytest.raises(OSError) as full:
        failpoints.hit("live.write")
    failpoints.hit("live.write")
    assert full.value.errno == errno.ENOSPC and full.value.filename == "live.write"
    for _ in range(3):
        with pytest.raises(OSError) as broken:
            failpoints.hit("live.written")
        assert broken.value.errno == errno.EIO
    with pytest.raises(FailpointError, match=r"live\.synced"):
        failpoints.hit("live.synced")
    failpoints.hit("live.truncate")
    failpoints.hit("cut.truncate")
    assert failpoints.reached() == {"live.write": 3, "live.written": 3, "live.synced": 1, "live.truncate": 1}


def test_kill_is_sigkill() -> None:
    code = (
        "from stabstudy import failpoints\nfailpoints.hit('live.write')\nfailpoints.hit('live.write')\nprint('alive')"
    )
    environment = os.environ | {failpoints.VARIABLE: "live.write:kill@2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_an_unarmed_point_costs_less_than_a_microsecond() -> None:
    """A step reaches none; a block of rows reaches three."""
    best = min(timeit.repeat(lambda: failpoints.hit("live.write"), number=10_000, repeat=5)) / 10_000
    assert best < 1e-6


def test_a_short_write_is_cut_back(tmp_path: Path) -> None:
    schema = trace.PROBES
    row = dict.fromkeys(schema.names) | {"step": 0}
    table = live.from_rows(trace.from_dicts([row], schema), trace.widths(2))
    writer = live.Writer(tmp_path / "probes.live", schema, trace.widths(2))
    writer.append(table, urgent=True)
    size = writer.path.stat().st_size
    failpoints.arm("live.short_write:enospc,live.truncate:sleep=0")
    table = table.copy()
    table["step"] = 1
    with pytest.raises(OSError, match="No space left"):
        writer.append(table, urgent=True)
    assert writer.path.stat().st_size == size and failpoints.reached()["live.truncate"] == 1
    writer.close()
    assert live.read(writer.path, schema)["step"].tolist() == [0, 1], "what was queued stays queued"


@pytest.fixture
def run(cache: Path) -> Callable[..., State]:
    def train(folder: store.TrialFolder, stop: int | None = None) -> State:
        def heartbeat(members: list[Progress]) -> bool:
            return stop is not None and members[0].step >= stop

        return run_pack([folder], Engine(cache), Rules(), heartbeat)[0]

    return train


def to_json_lines(folder: store.TrialFolder) -> None:
    """The records as an older version would have left them."""
    for schema in (trace.TRACE, trace.PROBES):
        rows = live.read(folder.live(schema), schema)
        columns = {n: (rows[n].tolist(), rows.is_null(n)) for n in schema.names}
        whole = [{n: None if null[i] else of[i] for n, (of, null) in columns.items()} for i in range(len(rows))]
        text = "".join(json.dumps(row) + "\n" for row in whole)
        folder.live(schema).with_suffix(".jsonl").write_text(text)
        folder.live(schema).unlink()


def test_every_point_is_reached(
    make: Make, run: Callable[..., State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that is stopped, resumed, and ends; one with the records of an older version; a launch and its report."""
    failpoints.arm(",".join(f"{name}:sleep=0@1+" for name in failpoints.POINTS))
    folder, older = make(BASE), make(BASE, "older")
    assert run(folder, stop=10).status == run(older, stop=6).status == "interrupted"
    to_json_lines(older)
    assert run(folder).status == run(older).status == "done"
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "check.yaml").write_text("# @package _global_\n# Is every point reached?\nsweep: {}\n")
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ["data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2"]
    words += ["model.depth=2", "train.batch_size=4", "train.steps=8", "optim.warmup_steps=3", "train.eval_sequences=8"]
    made = make_plan(["sweep=check", "launcher=local", "seeds=1", *words], tmp_path)
    assert launch(made, lambda line: None).code == 0
    report.write_report(made.folder, lambda line: None)
    monkeypatch.setattr(Trial, "checks", (8,))
    monkeypatch.setattr(Trial, "hopeless", lambda self: "for a test")
    assert run(make(BASE, "hopeless")).status == "stopped"
    reached = set(failpoints.reached())
    failpoints.arm("live.short_write:enospc,live.truncate:sleep=0")
    assert run(make(BASE, "full")).status == "disk_full"
    assert reached | set(failpoints.reached()) == set(failpoints.POINTS)

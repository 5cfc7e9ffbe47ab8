"""The batch script for Slurm, with stand-ins for srun and scontrol: its endings, and two real nodes of Ray."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stabstudy import live, store, trace
from stabstudy.state import State

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "slurm.sbatch"
MARK = "STABSTUDY_TEST_SLURM"

# the options of srun and then what it runs, here; srun passes its input on
SRUN = """
while [[ $1 == --* ]]; do shift; done
exec setsid -w "$@"
"""
SCONTROL = """
echo "$@" >> "$STABSTUDY_SHARED/scontrol"
"""
RAY = """
trap 'exit 0' TERM
[ "$2" != --head ] || echo "INFO   ray start --address='10.0.0.1:4711'"
while :; do sleep 0.05; done
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch script that runs here as if on nodes of its own."""

    process: subprocess.Popen[str]
    shared: Path
    local: Path
    mark: str

    def end(self, seconds: float = 150) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def alive(self) -> dict[int, str]:
        """Every process of the job: pid -> name."""
        names = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.mark}\0".encode() in (path / "environ").read_bytes()
                if marked and (path / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    names[int(path.name)] = (path / "comm").read_text().strip()
            except OSError:
                continue
        return names

    def left(self) -> list[str]:
        """What the script should have taken away: processes, temporary folders, the token, Ray's log."""
        limit = time.monotonic() + 10
        while self.alive() and time.monotonic() < limit:
            time.sleep(0.1)
        files = [*self.local.iterdir(), *self.shared.glob(".ray*"), *self.shared.glob("ray-*")]
        return [*self.alive().values(), *(path.name for path in files)]

    def wait_until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < limit, "waited too long"
            time.sleep(0.05)


Submit = Callable[..., Job]


@pytest.fixture
def submit(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Submit]:
    """Run the script with these words after it; `commands` are stand-ins by name, other names are variables."""
    jobs: list[Job] = []
    with tempfile.TemporaryDirectory(prefix="s-") as local:  # short: sockets lie below it

        def begin(*words: str, commands: dict[str, str] | None = None, job: int = 77, **variables: str) -> Job:
            programs = tmp_path / f"bin{len(jobs)}"
            programs.mkdir()
            for name, text in {"srun": SRUN, "scontrol": SCONTROL, **(commands or {})}.items():
                (programs / name).write_text(f"#!/bin/bash\n{text}")
                (programs / name).chmod(0o755)
            mark = f"{request.node.name}-{os.getpid()}-{len(jobs)}"
            slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
            settings = {"STABSTUDY_SHARED": str(tmp_path / "shared"), "STABSTUDY_LOCAL": local, MARK: mark}
            path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
            kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_", "STABSTUDY_"))}
            process = subprocess.Popen(
                ["bash", SCRIPT, *words],
                cwd=tmp_path,
                env=kept | slurm | settings | {"PATH": path, "PYTHONPATH": str(SCRIPT.parent.parent)} | variables,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            jobs.append(Job(process, tmp_path / "shared", Path(local), mark))
            return jobs[-1]

        yield begin
        for job in jobs:
            for pid in job.alive():
                os.kill(pid, signal.SIGKILL)
            job.process.communicate()


# the script alone


def launches(body: str) -> dict[str, str]:
    """Stand-ins for Ray and Python: nodes that join at once, and a launch that does this."""
    return {"ray": RAY, "python": f'[ "$1" = -m ] || exit 0\nshift 2\n{body}'}


def test_the_script_is_one_and_knows_rays_options() -> None:
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    text = SCRIPT.read_text()
    code = "from ray.scripts.scripts import start; print(*(o for p in start.params for o in p.opts))"
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    started = re.findall(r"^ray start.*|^options=\(.*\)$|^ *worker .*", text, re.MULTILINE)
    used = {flag for line in started for flag in re.findall(r"--[a-z-]+", line)}
    assert len(started) == 3 and len(used) >= 9 and used <= set(known)


def defaults(script: str) -> dict[str, str]:
    """What a user may set, option of sbatch or variable, and its default."""
    options = dict(re.findall(r"^#SBATCH (--[a-z-]+)=(.+)$", script, re.MULTILINE))
    return options | dict(re.findall(r"=\$\{(STABSTUDY_\w+):-([^}]*)\}", script))


def test_the_page_names_every_setting_and_its_default() -> None:
    page = SCRIPT.with_suffix(".md").read_text()
    told = dict(re.findall(r"^\| `(\S+?)`(?:, `--signal`)? \| (.+?) \|", page, re.MULTILINE))
    wanted = defaults(SCRIPT.read_text())
    fixed = {"--job-name", "--ntasks-per-node", "--open-mode", "--signal", "STABSTUDY_CACHE"}
    assert {name: value.strip("`") for name, value in told.items() if name in wanted} == {
        **{name: wanted[name] for name in wanted if name not in fixed},
        "STABSTUDY_SHARED": "~/stabstudy",
        "STABSTUDY_HEAD_IP": "as Ray finds it",
        "--time": f"4 hours, `{wanted['--signal']}",
    }
    assert wanted["--time"] == "04:00:00" and wanted["STABSTUDY_SHARED"] == "$HOME/stabstudy"


@pytest.mark.parametrize("code", [0, 2, 3])
def test_the_code_is_that_of_the_launch(submit: Submit, code: int) -> None:
    job = submit("sweep=x y='a b'", commands=launches(f'echo "$RAY_ADDRESS" "$@"; exit {code}'))
    ended, out, err = job.end(18)  # no part of Ray had to be ended by force
    results = f"results_dir={job.shared}/results"
    assert (ended, err) == (code, "") and job.left() == []
    assert out.split() == ["10.0.0.1:4711", results, "compute=cpu", "compute.address=auto", "sweep=x", "y='a", "b'"]


def test_with_gpus_a_pack_takes_one(submit: Submit) -> None:
    job = submit("sweep=x", commands=launches('echo "$@"'), SLURM_GPUS_ON_NODE="8", SLURM_JOB_NUM_NODES="1")
    assert job.end()[1].split()[1:] == ["compute=cluster", "sweep=x"] and job.left() == []


STOPPED = 'trap "exit 138" USR1; trap "exit 9" TERM INT; touch "$STABSTUDY_SHARED/up"; while :; do sleep 0.05; done'


@pytest.mark.parametrize(
    ("number", "requeue", "words"),
    [
        (signal.SIGUSR1, "1", "requeue 77\n"),
        (signal.SIGUSR1, "0", ""),
        (signal.SIGTERM, "1", ""),  # whoever cancels a job wants it to be gone
    ],
)
def test_every_signal_asks_the_launch_for_checkpoints(
    submit: Submit, number: signal.Signals, requeue: str, words: str
) -> None:
    job = submit(commands=launches(STOPPED), STABSTUDY_REQUEUE=requeue)
    job.wait_until((job.shared / "up").exists)
    token = job.shared / ".ray-token-77"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    assert [p.stat().st_mode & 0o777 for p in job.local.iterdir()] == [0o700]
    job.process.send_signal(number)
    code, _, err = job.end()
    assert code == 138 and job.left() == []
    asked = job.shared / "scontrol"
    assert (asked.read_text() if asked.exists() else "") == words
    last = "it goes back into the queue, and goes on from there" if words else "the same sbatch command resumes"
    assert err.count("\n") == 1 and last in err


def test_a_launch_that_finishes_all_the_same_has_its_own_code(submit: Submit) -> None:
    body = STOPPED.replace("exit 138", "sleep 0.5; exit 0")
    job = submit(commands=launches(body), STABSTUDY_REQUEUE="1")
    job.wait_until((job.shared / "up").exists)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 0 and job.left() == [] and not (job.shared / "scontrol").exists()


@pytest.mark.parametrize(
    ("commands", "settings", "reason"),
    [
        ({"ray": "echo RuntimeError; exit 1"}, {}, r"Ray did not start on \S+, see \S+/ray-77.log"),
        ({"ray": "exec sleep 60"}, {"STABSTUDY_JOIN_SECONDS": "1"}, r"Ray did not start on \S+ within 1 s, see \S+"),
        ({}, {"STABSTUDY_SHARED": "/proc/x"}, r"/proc/x cannot be written \(STABSTUDY_SHARED: .*"),
        ({}, {"STABSTUDY_LOCAL": "/proc/x"}, r"/proc/x cannot be written \(STABSTUDY_LOCAL\)"),
    ],
)
def test_a_start_that_fails_is_one_line(
    submit: Submit, commands: dict[str, str], settings: dict[str, str], reason: str
) -> None:
    job = submit(commands=launches("exit 0") | commands, **settings)
    code, out, err = job.end()
    assert code == 4 and out == "" and re.fullmatch(f"error: machine: {reason}\n", err)
    assert [name for name in job.left() if name != "ray-77.log"] == []


# two nodes of Ray

TINY = [
    "sweep=quickstart", "study=s", "optim.lr=1e-3,1e-2", "optim.clip=1.0", "seeds=1", "data=synthetic",
    "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2", "model.depth=1",
    "train.batch_size=4", "optim.warmup_steps=3", "train.checkpoint_every=100000", "train.eval_sequences=8",
]  # fmt: skip


def states(job: Job) -> list[State]:
    return [trial.read_state() for trial in store.StudyFolder(job.shared / "results" / "s").trials()]


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_on_two_nodes_stops_in_time_and_the_same_job_resumes_it(submit: Submit) -> None:
    job = submit(*TINY, "train.steps=2000")
    job.wait_until(lambda: [s.status for s in states(job)].count("running") == 2)  # one core each: on both nodes
    assert list(job.alive().values()).count("raylet") == 2
    folder = store.StudyFolder(job.shared / "results" / "s")
    job.wait_until(lambda: all(live.last_step(t.live(trace.TRACE)) > 20 for t in folder.trials()))
    job.process.send_signal(signal.SIGUSR1)
    began = time.monotonic()
    code, _, err = job.end()
    assert code == 138 and time.monotonic() - began < 60, err
    assert err.splitlines()[-1] == "stopped; the same sbatch command resumes"
    assert job.left() == []
    stopped = {s.trial_id: s for s in states(job)}
    assert {s.status for s in stopped.values()} == {"interrupted"} and all(s.step > 0 for s in stopped.values())
    for trial in folder.trials():
        assert [p.name for p in trial.checkpoints.iterdir()] == [f"step-{stopped[trial.trial_id].step:08d}"]
    again = submit(*TINY, "train.steps=2000", job=78)
    code, out, err = again.end(240)
    assert code == 0, err
    assert again.left() == [] and "index.html" in out
    for state in states(again):
        assert state.status == "done" and state.attempts[-1].from_step == stopped[state.trial_id].step


@pytest.mark.ray
@pytest.mark.slow
def test_two_jobs_share_a_node(submit: Submit) -> None:
    alone = {"SLURM_JOB_NUM_NODES": "1"}
    jobs = [submit(*TINY, "train.steps=70", f"results_dir=r{n}", job=n, **alone) for n in (77, 78)]
    for job in jobs:
        code, _, err = job.end()
        assert code == 0, err
    assert jobs[-1].left() == jobs[0].left() == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("srun", "reason"),
    [
        ("exit 1", r"a node could not join the Ray cluster \(1 of 2 have\), see \S+/ray-77.log"),
    ],
)
def test_a_node_that_does_not_join_is_one_line(submit: Submit, srun: str, reason: str) -> None:
    job = submit(*TINY, commands={"srun": srun}, STABSTUDY_JOIN_SECONDS="25")
    code, out, err = job.end()
    assert code == 4 and out == "" and re.fullmatch(f"error: machine: {reason}\n", err)
    assert job.left() == ["ray-77.log"] and not (job.shared / "results").exists()

"""Runs of trials at W&B: a run each, whose id is the trial's, in a group that is the study.

    <out>/<trial_id>.json      how far it is: last steps, whether it is over, and the sessions that it is made of
    <out>/wandb/               W&B's own files; of one that is offline `offline-run-<time>-<trial_id>` for each session

A session is what this process writes of a run. It counts once it has ended; a process that was killed leaves one that
does not. Offline its folder is then removed and its steps are written again; online the server says at which step it
is, and takes none twice.
"""

from __future__ import annotations

import heapq
import itertools
import netrc
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stabstudy.exporting.exported import Exported, Point, Scalars
from stabstudy.store import StoreError, read_json, write_json

FORMAT = 1
SERVER = "https://api.wandb.ai"


@dataclass(frozen=True)
class Progress:
    """What is committed of a trial."""

    format: int = FORMAT
    step: int = -1  # last
    over: bool = False
    sessions: tuple[str, ...] = ()  # names of folders in wandb/


@dataclass
class Session:
    """A run that is open, and the last step that was logged in it."""

    run: Any
    step: int


class WandbRuns:
    """Runs in one project."""

    def __init__(self, out: Path, study: str, project: str):
        self._out, self._study, self._project = out, study, project
        self.mode = mode()
        self._open: dict[str, Session] = {}

    def is_over(self, trial_id: str) -> bool:
        """Whether nothing is left to write of the trial."""
        return self._progress(trial_id).over

    def write(self, trial: Exported) -> int:
        """Write what is new of the trial; returns how many steps. Raises StoreError for a state file of others."""
        session = self._open.get(trial.trial_id)
        points = list(_rows(trial, self._progress(trial.trial_id).step if session is None else session.step))
        if not points and not trial.is_over:
            return 0
        session = self._open[trial.trial_id] = session or self._begin(trial)
        new = [point for point in points if point[0] > session.step]
        for step, scalars in new:
            session.run.log(scalars, step=step)
            session.step = step
        if ending := trial.ending():
            summary = {"verdict": ending.verdict, "outcome": ending.outcome}
            session.run.summary.update(summary | {t.partition("/")[2]: v for t, v in ending.scalars.items()})
            self._end(trial.trial_id, over=True)
        return len(new)

    def close(self) -> None:
        """End the runs that are open: their trials are not done, and a later export goes on with them."""
        for trial_id in list(self._open):
            self._end(trial_id, over=False)

    def hint(self) -> str:
        """How to look at it."""
        if self.mode == "offline":
            return f"W&B is offline; to upload: wandb sync {self._out}/wandb/offline-run-*"
        return f"W&B, project {self._project}, group {self._study} ({self.mode})"

    def _progress(self, trial_id: str) -> Progress:
        path = self._out / f"{trial_id}.json"
        if not path.exists():
            return Progress()
        body = read_json(path)
        if body.get("format") != FORMAT or set(body) != set(asdict(Progress())):
            raise StoreError(f"{path}: is not the state of an export of this version; remove it to export anew")
        return Progress(**body | {"sessions": tuple(body["sessions"])})

    def _begin(self, trial: Exported) -> Session:
        """A new session of the trial's run, behind the steps that are committed."""
        import wandb

        committed = self._progress(trial.trial_id)
        self._remove_unended(trial.trial_id, committed)
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, save_code=False, disable_git=True)
        run = wandb.init(
            project=self._project,
            group=self._study,
            id=trial.trial_id,
            name=trial.name or trial.trial_id,
            config=dict(trial.settings),
            dir=str(self._out),
            resume="allow",
            reinit="create_new",
            mode=self.mode,
            settings=settings,
        )
        at_server = run.starting_step - 1 if self.mode == "online" else -1
        return Session(run, max(committed.step, at_server))

    def _end(self, trial_id: str, over: bool) -> None:
        """End the session; from then on it counts."""
        session, before = self._open.pop(trial_id), self._progress(trial_id)
        folder = Path(session.run.settings.sync_dir).name
        session.run.finish()
        after = replace(before, step=session.step, over=over, sessions=(*before.sessions, folder))
        write_json(self._out / f"{trial_id}.json", asdict(after))

    def _remove_unended(self, trial_id: str, committed: Progress) -> None:
        """Remove what killed processes left of sessions of this trial."""
        if self.mode == "offline":
            for folder in (self._out / "wandb").glob(f"offline-run-*-{trial_id}"):
                if folder.name not in committed.sessions:
                    shutil.rmtree(folder, ignore_errors=True)


def mode() -> str:
    """What $WANDB_MODE says; else `online` where a login is at hand, and `offline` where there is none."""
    return os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")


def _has_login() -> bool:
    """Whether the environment, or the netrc file to which `wandb login` writes, has a key for W&B's server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER).hostname or ""
    with suppress(OSError, netrc.NetrcParseError, RuntimeError):
        return netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host) is not None
    return False


def _rows(trial: Exported, after: int) -> Iterator[tuple[int, Scalars]]:
    """Each step above `after` with all its scalars: W&B takes a step once.

    While the trial goes on, steps at which a probe may still be missing are held back.
    """
    end = None if trial.is_over or trial.config is None else _next_probe(trial)
    points = heapq.merge(trial.trace_points(after), trial.probe_points(after), key=lambda point: point.step)
    for step, own in itertools.groupby(points, key=_step):
        if end is not None and step >= end:
            return
        scalars = {t: v for point in own for t, v in point.scalars.items()}
        if scalars:
            yield step, scalars


def _step(point: Point) -> int:
    return point.step


def _next_probe(trial: Exported) -> int:
    """The first step at which a probe is due that is not on record."""
    assert trial.config is not None
    last = -1 if trial.probes is None or not len(trial.probes) else int(trial.probes["step"][-1])
    train = trial.config.train
    return min((last // every + 1) * every for every in (train.probe_every, train.eval_every))

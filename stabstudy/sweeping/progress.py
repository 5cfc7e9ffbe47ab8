"""Progress of a study: the live table of a launch, and `--status` from the files alone.

`--status` works while the study runs, after it, and from another shell.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stabstudy import disk, live, store, trace, wording
from stabstudy.config import CURRENT_NAMES
from stabstudy.planning.axes import rank
from stabstudy.settings import renamed, renamed_below, safe
from stabstudy.state import STATUSES, State
from stabstudy.store import TrialFolder
from stabstudy.wording import command, count, duration, short_value

PLAIN_SECONDS = 15.0
"""Off a terminal and a notebook: at least this long between two progress lines."""

NOTEBOOK_SECONDS = 1.0
NOTEBOOK_COLUMNS = 110

ROWS = 16


@dataclass
class Running:
    """A trial that is being trained, as of its last heartbeat."""

    began: float
    step: int = 0
    steps: int = 0
    loss: float = math.nan
    grad_norm: float = math.nan
    spike_events: int = 0
    tokens_per_second: float = 0.0

    def fields(self) -> tuple[str, ...]:
        """Step, loss, gradient norm, spikes, tokens per second; before the first step how long it has been starting."""
        if not self.step:
            return (f"starting, {duration(time.monotonic() - self.began)}",)
        numbers = (f"{self.loss:.3f}", f"{self.grad_norm:.3g}", str(self.spike_events))
        return (f"{self.step}/{self.steps}", *numbers, f"{self.tokens_per_second:,.0f}")


class Board:
    """Counts and shows; use as a context manager. `labels` maps each trial to do to its axis values in words.

    `grows`: further trials may be added to the labels, and nobody knows how many.
    """

    def __init__(
        self,
        title: str,
        labels: Mapping[str, str],
        already_done: int,
        grows: bool = False,
        console: Console | None = None,
    ):
        self.title, self.labels, self.already_done, self.grows = title, dict(labels), already_done, grows
        self.console = console or Console(file=sys.stdout, highlight=False)
        self.running: dict[str, Running] = {}
        self.finished: dict[str, str] = {}
        self.latest = ""  # the last trial to end, in a sentence
        self._live: Live | None = None
        self._area: Area | None = None
        self._started = self._spoke = time.monotonic()
        self._waiting: tuple[str, float] | None = None

    def __enter__(self) -> Board:
        if self.console.is_jupyter:
            self._area = Area()
        elif self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=2, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)
        if self._area is not None:
            self._area.show(Text(self.summary()))

    def say(self, line: str) -> None:
        """A line of its own, above the table of a terminal, below that of a notebook."""
        if self._area is not None:
            print(safe(line), flush=True)  # rich would make an output of each line
        else:
            self.console.print(Text(safe(line)), soft_wrap=True)

    @contextlib.contextmanager
    def waiting(self, what: str, log: bool = True) -> Iterator[None]:
        """While this lasts the table says what is waited for, and how long already; a log has a line of it, if any."""
        self._waiting = (what, time.monotonic())
        if self._area is not None:
            self._area.show(self)
        elif log and self._live is None:
            self.say(what)
        try:
            yield
        finally:
            self._waiting = None

    def start(self, trial_id: str) -> None:
        """A process takes the trial up; the clock starts with the first one, after the start of the scheduler."""
        if not self.running and not self.finished:
            self._started = self._spoke = time.monotonic()
        self.running[trial_id] = Running(time.monotonic())

    def progress(self, trial_id: str, report: Mapping[str, Any]) -> None:
        """Take a heartbeat: the fields of training.loop.Progress."""
        row = self.running.setdefault(trial_id, Running(time.monotonic()))
        for name in ("step", "steps", "loss", "grad_norm", "spike_events", "tokens_per_second"):
            if name in report:
                setattr(row, name, report[name])
        self._speak_now_and_then()

    def finish(self, trial_id: str, state: State) -> None:
        """A trial has ended (or will not be tried again): count it and print its outcome."""
        began = self.running.pop(trial_id, None)
        outcome = verdict_words(state) if state.status == "done" else state.status
        self.finished[trial_id] = outcome
        took = f", {time.monotonic() - began.began:.1f} s" if began else ""
        why = f" ({state.verdict_code})" if state.verdict == "diverged" else ""
        why = f": {state.error['message']}" if state.error and state.status != "done" else why
        why = f" at step {state.step} ({state.stop_reason})" if state.status == "stopped" else why
        if state.outcome:
            self.latest = f"{self.labels.get(trial_id, trial_id)}: {state.outcome}"
        spikes = "" if state.spike_events is None else f", {count(state.spike_events, 'spike', ',')}"
        number = f"[{len(self.finished)}/{len(self.labels)}]"
        self.say(f"{number} {trial_id}  {self.labels.get(trial_id, '')}: {outcome}{why}{spikes}{took}")

    def forget(self, trial_id: str) -> None:
        """An attempt ended and another will follow."""
        self.running.pop(trial_id, None)

    def seconds_left(self) -> float | None:
        """From the trials finished so far, running ones in part; None before anything is known."""
        parts = [r.step / r.steps for r in self.running.values() if r.steps]
        done = len(self.finished) + sum(parts)
        if done < 0.5 or self.grows:
            return None
        return (time.monotonic() - self._started) * (len(self.labels) - done) / done

    def summary(self) -> str:
        counts = Counter(self.finished.values())
        left = self.seconds_left()
        parts = [f"{len(self.finished)} of {len(self.labels)} trials ended"]
        running = [f"{row.step}/{row.steps}" for row in self.running.values() if row.steps]
        if running and self._live is None and self._area is None:
            parts.append(f"{len(running)} running (step {', '.join(running[:4])}{', ...' if len(running) > 4 else ''})")
        if self.already_done:
            parts.append(f"{self.already_done} done before")
        parts += [f"{n} {outcome}" for outcome, n in sorted(counts.items())]
        if left is not None and len(self.finished) < len(self.labels):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def __rich__(self) -> Group:
        """The question, the counts, what is waited for, the trials that run, and how the last one ended."""
        lines = [Text(self.title, style="bold"), Text(self.summary())]
        if self._waiting is not None:
            what, began = self._waiting
            lines.append(Text(f"{what}, {duration(time.monotonic() - began)}"))
        elif not self.running and not self.finished:
            lines.append(Text("the first trials start"))
        tables = [self._table()] if self.running else []
        return Group(*lines, *tables, Text(safe(self.latest), style="dim"))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "settings", "step", "loss", "grad norm", "spikes", "tokens/s"):
            table.add_column(name, justify="left" if name in ("trial", "settings") else "right", no_wrap=True)
        for trial_id, row in list(self.running.items())[:ROWS]:
            table.add_row(trial_id, Text(self.labels.get(trial_id, "")), *row.fields())
        if len(self.running) > ROWS:
            table.add_row("...", f"and {len(self.running) - ROWS} more")
        return table

    def _speak_now_and_then(self) -> None:
        every = PLAIN_SECONDS if self._area is None else NOTEBOOK_SECONDS
        if self._live is not None or time.monotonic() - self._spoke < every:
            return
        self._spoke = time.monotonic()
        if self._area is None:
            self.say(self.summary())
        else:
            self._area.show(self)


class Area:
    """A place in the output of a notebook's cell, which shows one thing after another. It needs no widgets."""

    def __init__(self) -> None:
        from IPython.display import display

        show: Any = display  # it has no types
        self._handle = show({"text/plain": ""}, raw=True, display_id=True)

    def show(self, renderable: RenderableType) -> None:
        """Show this in place of what was shown before."""
        text = io.StringIO()
        plain = Console(file=text, width=NOTEBOOK_COLUMNS, color_system=None, force_jupyter=False, force_terminal=False)
        plain.print(renderable)
        self._handle.update({"text/plain": text.getvalue().rstrip()}, raw=True)


UNKNOWN = "?"


@dataclass(frozen=True)
class Listed:
    """A trial on disk: its state, and its settings in config.json ({} where that cannot be read)."""

    folder: TrialFolder
    state: State
    settings: dict[str, Any]
    choices: dict[str, Any]
    cell: str | None  # its cell's id and its case, both None where they cannot be read, or there is none
    case: str | None
    elsewhere: bool  # trained by another program, and ingested

    def value(self, name: str) -> Any:
        """Of a setting, by its dotted name, or of a group choice; UNKNOWN where it cannot be read."""
        return _at(self.settings if "." in name or name == "seed" else self.choices, name)

    def values(self, axes: Sequence[str]) -> list[Any]:
        """Its value on each axis, and its seed."""
        return [self.value(name) for name in (*axes, "seed")]

    @property
    def step(self) -> int:
        """Updates that are on record, also those since the state was written."""
        live_rows = _live_steps(self.folder) if self.state.status in ("running", "lost") else 0
        return max(self.state.step, live_rows)


@dataclass(frozen=True)
class Standing:
    """Where a study stands, from its files alone."""

    study: store.StudyFolder
    question: str
    axes: dict[str, list[Any]]  # of the last launch
    trials: tuple[Listed, ...]  # in the order of their values
    launch_running: bool

    def counts(self) -> Counter[str]:
        """How many trials are in each state."""
        return Counter(trial.state.status for trial in self.trials)


def standing(folder: Path) -> Standing:
    """The study's trials and whether it is worked on. Raises StoreError for what is not a study."""
    study = store.open_study(folder)
    question, axes = _asked(study)
    trials = sorted(map(_listed, study.trials()), key=lambda trial: [rank(v) for v in trial.values(list(axes))])
    return Standing(study, question, axes, tuple(trials), disk.is_locked(study.path))


def show_status(now: Standing) -> None:
    """Print the trials and their counts."""
    if now.trials:
        rows = [_row(trial, list(now.axes)) for trial in now.trials]
        wording.table(("trial", "settings", "status", "step", "verdict", "spikes"), rows)
    print(summary(now))
    if any(trial.elsewhere for trial in now.trials):
        judged = command([str(now.study.path)], "stabstudy.report")
        print(f"runs trained elsewhere are judged in the report: {judged}")


def summary(now: Standing) -> str:
    """'depth_lr: 24 trials: 20 done (18 stable, 2 spiky), 4 running; a launch is running'."""
    return f"{tally(now)}; {'a launch is running' if now.launch_running else 'no launch is running'}"


def tally(now: Standing) -> str:
    """'depth_lr: 24 trials: 20 done (18 stable, 2 spiky), 4 interrupted'."""
    counts = now.counts()
    verdicts = Counter(verdict_words(trial.state) for trial in now.trials if trial.state.status == "done")
    judged = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    parts = [f"{counts[s]} {s}" + (f" ({judged})" if s == "done" else "") for s in STATUSES if counts[s]]
    size = wording.count(len(now.trials), "trial", ",")
    return f"{now.study.name}: {size}: {', '.join(parts) or 'none begun'}"


def verdict_words(state: State) -> str:
    """The verdict of a done trial in words, or why it has none."""
    reasons = {
        "too_short": "too short to judge",
        "no_gradient_norm": "no gradient norm",
        "norm_after_clipping": "norms after clipping alone",
        "all_zero": "loss and norm are 0 throughout",
        None: "not judged",
    }
    return state.verdict or reasons.get(state.verdict_reason, str(state.verdict_reason))


def _asked(study: store.StudyFolder) -> tuple[str, dict[str, list[Any]]]:
    """The question of the last launch, and its axes; empty where it cannot be read."""
    try:
        body = store.read_sealed(study.provenance_file)
    except store.StoreError:
        return "", {}
    axes = body["axes"] if isinstance(body.get("axes"), dict) else {}
    lists = {name: values for name, values in axes.items() if isinstance(values, list)}
    return str(body.get("question") or ""), renamed(lists, CURRENT_NAMES)


def _listed(folder: TrialFolder) -> Listed:
    """The trial; one whose state cannot be read counts as failed, with the reason."""
    try:
        if wrong := disk.trial_obstacle(folder.path, links=True):
            raise store.StoreError(wrong)
        state = folder.read_state()
    except store.StoreError as error:
        state = State(folder.trial_id, status="failed", error={"kind": "StoreError", "message": str(error)})
    try:
        body = folder.read_config()
    except store.StoreError:
        body = {}
    settings, choices = (x if isinstance(x := body.get(name), dict) else {} for name in ("config", "choices"))
    cell, case = (x if isinstance(x := body.get(name), str) else None for name in ("cell_id", "case"))
    return Listed(folder, state, renamed_below(settings, CURRENT_NAMES), choices, cell, case, "external" in body)


def _row(trial: Listed, axes: Sequence[str]) -> list[str]:
    state = trial.state
    verdict = verdict_words(state) if state.status == "done" else str((state.error or {}).get("message", ""))
    if state.status == "stopped":
        verdict = f"{state.stop_reason} ({state.verdict} so far)" if state.verdict else str(state.stop_reason)
    spikes = "" if state.spike_events is None else str(state.spike_events)
    steps = f"{trial.step}/{short_value(trial.value('train.steps'))}"
    settings = settings_text((*axes, "seed"), trial.values(axes))
    return [trial.folder.trial_id, settings, state.status, steps, verdict, spikes]


def _at(nested: Any, dotted: str) -> Any:
    """The value under the dotted name, UNKNOWN where there is none."""
    for key in dotted.split("."):
        nested = nested.get(key, UNKNOWN) if isinstance(nested, dict) else UNKNOWN
    return nested


def settings_text(names: Sequence[str], values: Sequence[Any]) -> str:
    """'depth=4 lr=0.01 clip=off seed=1', of dotted names; null is off."""
    pairs = zip(names, values, strict=True)
    return " ".join(f"{name.rpartition('.')[2]}={short_value(value)}" for name, value in pairs)


def _live_steps(trial: TrialFolder) -> int:
    """Steps in the live trace, from its last whole row; 0 where there is none or it cannot be read."""
    try:
        return live.last_step(trial.live(trace.TRACE)) + 1
    except (OSError, trace.DamagedRecord):
        return 0

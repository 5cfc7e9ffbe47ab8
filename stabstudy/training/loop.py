"""The training loop of a pack: rings of steps, and between them what is due (ends, early ends, checkpoint, heartbeat).

A ring is a stretch of steps that stay on the device until one copy brings their numbers over. It ends where a member
has made its last step, so the state behind it is what that member ends with. Where a trial diverges inside a ring, the
weights have gone on meanwhile: the ring is run again from the state before it, pausing where trials ended, and the last
loss and the last probe are those of the step that ended them, as if every step had been looked at.

It reaches the scheduler that runs it only through the `heartbeat` it is given.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.training import probes
from stabstudy.training.driver import Driver, Due, Tick
from stabstudy.training.record import Recorder
from stabstudy.training.schedule import schedule
from stabstudy.training.step import Stepper

RING_SECONDS, SLOW_STEP = 1.0, 0.05
"""That a ring lasts at most; of a step, from which on each is a ring of its own."""


@dataclass(frozen=True)
class Progress:
    """The content of a heartbeat, of one trial: updates recorded, the last loss and norm, grad spikes so far, speed."""

    trial_id: str
    step: int
    steps: int
    loss: float
    grad_norm: float
    spike_events: int
    tokens_per_second: float


Heartbeat = Callable[[Sequence[Progress]], bool]
"""Called after every ring with the progress of the trials that go on; returns True to stop them (resumable)."""


@dataclass(frozen=True)
class End:
    """How a member's training ended."""

    reason: str  # complete | diverged
    final_loss: float
    probe: NDArray[np.float64]  # of the last state, with its validation loss


class Crew(Protocol):
    """Whoever keeps the members' files."""

    def save(self, next_steps: dict[int, int]) -> None:
        """Write a checkpoint of these members; their rows are written."""

    def ended(self, member: int, end: End) -> None:
        """A member has made its last step; its rows are written."""

    def hopeless(self, members: Sequence[int]) -> dict[int, str]:
        """Which of these members are to be ended now, and why; their rows are written."""

    def stopped(self, reasons: Mapping[int, str]) -> None:
        """These members are ended before their last step, resumably; their rows are written."""


@dataclass(frozen=True)
class Plan:
    """What a loop trains. Members are numbered as the recorder's are."""

    places: tuple[int, ...]  # the member of each row of the stepper
    configs: tuple[TrialConfig, ...]  # of every member
    trial_ids: tuple[str, ...]
    ring: int
    checkpoint_seconds: float  # at least so long between two checkpoints
    setup_seconds: float  # that another stepper, with fewer members, would take
    checks: tuple[tuple[int, ...], ...]  # of every member, the numbers of steps after which it may be ended early


class Rates:
    """The learning rates of one member, some thousand steps of it at hand."""

    AHEAD = 4096

    def __init__(self, config: TrialConfig):
        self._peak, self._steps = config.peak_lr, config.train.steps
        self._factor = schedule(config.optim, config.train.steps)
        self._first, self._held = 0, list[float]()

    def of(self, step: int, n: int) -> list[float]:
        """Those of n steps; behind the last step of the trial that of the last one."""
        if not self._first <= step <= step + n <= self._first + len(self._held):
            last = self._steps - 1
            until = max(step + n, min(step + self.AHEAD, self._steps))
            self._first = step
            self._held = [self._peak * self._factor(min(i, last)) for i in range(step, until)]
        return self._held[step - self._first : step - self._first + n]


class Loop:
    """One attempt at some trials, until all have ended, are stopped, or too few are left for this stepper."""

    def __init__(
        self,
        plan: Plan,
        stepper: Stepper,
        driver: Driver,
        recorder: Recorder,
        evaluation_KBT: Tensor,
        final_KBT: Tensor,
        crew: Crew,
        heartbeat: Heartbeat,
    ):
        self.plan, self.stepper, self.driver, self.recorder = plan, stepper, driver, recorder
        self.evaluation, self.final, self.crew, self.heartbeat = evaluation_KBT, final_KBT, crew, heartbeat
        self.live = set(plan.places)
        self.tick = 0
        self._rates = [Rates(config) for config in plan.configs]
        self._saved = time.monotonic()

    def run(self) -> str:
        """Train; returns `ended` (all of them), `stopped` (by the heartbeat) or `few` (are left)."""
        try:
            self._stop_hopeless()  # also a trial that was killed between the step and its end
            while self.live:
                self._ring(self._ticks())
                self._stop_hopeless()
                if self.live and self.heartbeat(self.progress()):
                    self._save()
                    return "stopped"
                if self._few():
                    return "few"
            return "ended"
        finally:
            self.recorder.write()

    def progress(self) -> list[Progress]:
        """Of the members that go on."""
        r, configs = self.recorder, self.plan.configs
        return [
            Progress(
                self.plan.trial_ids[k],
                int(r.rows[k]),
                configs[k].train.steps,
                float(r.loss[k]),
                float(r.grad_norm[k]),
                int(r.spikes.spike_events[k]),
                configs[k].tokens_per_step / max(r.seconds, 1e-9),
            )
            for k in sorted(self.live)
        ]

    def _ring(self, ticks: list[Tick]) -> None:
        before = None if len(ticks) == 1 else {name: x.clone() for name, x in self.stepper.state().items()}
        began = time.perf_counter()
        try:
            self.driver.run(ticks)
        except BaseException:
            self._salvage(ticks, began)
            raise
        if self.stepper.device.type != "cpu":
            self.recorder.write()  # rows of the ring before, while the device works
        taken = self.driver.take()
        seconds = (time.perf_counter() - began) / len(ticks)
        diverged = self.recorder.judge(self.plan.places, ticks, taken, seconds)
        self.tick += len(ticks)
        complete = [k for k in self.live if k not in diverged and self._left(k) == 0]
        if diverged or complete or (self.recorder.due and self.stepper.device.type == "cpu"):
            self.recorder.write()
        last = len(ticks) - 1
        if any(i < last for i in diverged.values()):
            assert before is not None
            self._again(ticks, before, diverged)
        self._end([k for k, i in diverged.items() if i == last], "diverged")
        self._end(complete, "complete")
        if self.live and self._checkpoint_due():
            self._save()

    def _again(self, ticks: list[Tick], before: dict[str, Tensor], diverged: dict[int, int]) -> None:
        """Run a ring once more from the state before it, and measure the members that diverged inside it."""
        for name, x in self.stepper.state().items():
            x.copy_(before[name])
        first = 0
        for stop in sorted({i for i in diverged.values() if i < len(ticks) - 1}):
            self.driver.run(self._of_live(ticks[first : stop + 1]))
            self._end([k for k, i in diverged.items() if i == stop], "diverged")
            first = stop + 1
        if self.live:
            self.driver.run(self._of_live(ticks[first:]))

    def _of_live(self, ticks: Sequence[Tick]) -> list[Tick]:
        live = tuple(k in self.live for k in self.plan.places)
        return [replace(tick, live=live) for tick in ticks]

    def _end(self, members: Sequence[int], reason: str) -> None:
        """Measure the last state of these members; they make no update any more."""
        if not members:
            return
        losses = self.stepper.loss_on(self.final).tolist()
        measured = probes.probe(self.stepper, self.evaluation, evaluate=True).cpu().numpy()
        for k in members:
            self.live.discard(k)
            row = self.plan.places.index(k)
            self.crew.ended(k, End(reason, losses[row], measured[row]))

    def _ticks(self) -> list[Tick]:
        """The next ring."""
        n = min(self.plan.ring, *(self._to_check(k) for k in self.live))
        if self.recorder.seconds > SLOW_STEP:  # waiting for each costs nothing, and the copy of a ring's start would
            n = 1
        elif self.recorder.seconds > 0:  # rows are on disk, and a stop is obeyed, within a second
            n = min(n, max(1, int(RING_SECONDS / self.recorder.seconds)))
        if self._may_save():
            n = min(n, *(self._every(k) - self._at(k) % self._every(k) for k in self.live))
        live = tuple(k in self.live for k in self.plan.places)
        rates = zip(*(self._rates[k].of(self._at(k), n) for k in self.plan.places), strict=True)
        due = self._due(n)
        return [Tick(self.tick + i, lr, live, due[i]) for i, lr in enumerate(rates)]

    def _due(self, n: int) -> list[Due]:
        """What the members that go on want measured after the next n steps. The last state is measured at the end."""
        due = [Due.NOTHING] * n
        for k in self.live:
            train, at = self.plan.configs[k].train, self._at(k)
            for every, kind in ((train.probe_every, Due.PROBE), (train.eval_every, Due.EVALUATION)):
                for i in range(every - 1 - at % every, n, every):
                    if at + i + 1 < train.steps:
                        due[i] = max(due[i], kind)
            if self._left(k) == n:
                due[-1] = max(due[-1], Due.NOISE)
        return due

    def _at(self, k: int) -> int:
        """The next step of a member that goes on."""
        return int(self.recorder.rows[k])

    def _left(self, k: int) -> int:
        return self.plan.configs[k].train.steps - self._at(k)

    def _every(self, k: int) -> int:
        return self.plan.configs[k].train.checkpoint_every

    def _to_check(self, k: int) -> int:
        """Steps until it may be ended early, or else until its end."""
        return min((n - self._at(k) for n in self.plan.checks[k] if n > self._at(k)), default=self._left(k))

    def _stop_hopeless(self) -> None:
        """End the members that are due to be judged and have no hope. A ring never passes such a step."""
        due = [k for k in sorted(self.live) if self._at(k) in self.plan.checks[k]]
        if not due:
            return
        self.recorder.write()
        if reasons := self.crew.hopeless(due):
            self.live -= set(reasons)
            self.crew.stopped(reasons)

    def _few(self) -> bool:
        """Whether half of the members or more have ended, and a smaller stepper would save more than it takes."""
        K, left = len(self.plan.places), len(self.live)
        if not 0 < 2 * left <= K:
            return False
        remaining = max(self._left(k) for k in self.live) * self.recorder.seconds
        return remaining * (1 - left / K) > self.plan.setup_seconds

    def _may_save(self) -> bool:
        return time.monotonic() - self._saved >= self.plan.checkpoint_seconds

    def _checkpoint_due(self) -> bool:
        return self._may_save() and any(self._at(k) % self._every(k) == 0 for k in self.live)

    def _save(self) -> None:
        self.recorder.write()
        self._saved = time.monotonic()
        self.crew.save({k: self._at(k) for k in self.live})

    def _salvage(self, ticks: list[Tick], began: float) -> None:
        """After a step that raised: the steps before it were made, so they are recorded."""
        with contextlib.suppress(Exception):
            taken = self.driver.take()
            if n := len(taken.steps):
                self.recorder.judge(self.plan.places, ticks[:n], taken, (time.perf_counter() - began) / n)

"""The training loop: steps, and between them what is due (evaluation, probe, checkpoint, heartbeat).

It reaches the scheduler that runs it only through the `heartbeat` it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stabstudy.config import TrialConfig
from stabstudy.data.batches import Batches
from stabstudy.trace import RowWriter
from stabstudy.training.noise_scale import NoiseMeans
from stabstudy.training.probes import probe
from stabstudy.training.record import Recorder
from stabstudy.training.schedule import schedule
from stabstudy.training.step import Stepper


@dataclass(frozen=True)
class Progress:
    """The content of a heartbeat: updates recorded so far, the last loss and norm, grad spikes so far, speed."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    spike_events: int
    tokens_per_second: float
    trial_id: str = ""


Heartbeat = Callable[[Progress], bool]
"""Called after every step with the progress; returns True to stop the trial (resumable)."""


class Loop:
    """One attempt at a trial: from `start` to the end, a divergence, or the heartbeat's stop."""

    def __init__(
        self,
        config: TrialConfig,
        stepper: Stepper,
        batches: Batches,
        recorder: Recorder,
        probes: RowWriter,
        checkpoint: Callable[[int], None],
        heartbeat: Heartbeat,
    ):
        self.config, self.stepper, self.batches = config, stepper, batches
        self.recorder, self.probes = recorder, probes
        self.checkpoint, self.heartbeat = checkpoint, heartbeat
        self.evaluation = batches.evaluation()
        self.noise = NoiseMeans()
        self.measured: int | None = None  # updates made when the last probes row was written

    def run(self, start: int) -> str:
        """Train from step `start` on. Returns 'complete', 'diverged' or 'interrupted'."""
        config, recorder = self.config, self.recorder
        factor = schedule(config.optim, config.train.steps)
        for step in range(start, config.train.steps):
            windows = self.batches.batch(step)
            lr = config.peak_lr * factor(step)
            self.stepper.measure_noise = self._due(step + 1) or step + 1 == config.train.steps
            recorder.start_clock()
            recorder.add(step, lr, self.stepper.step(windows, lr))
            done = step + 1
            if self._due(done):
                recorder.drain()
                if recorder.monitor.code is None:
                    self.measure(done)
            if recorder.monitor.code is not None:
                return "diverged"
            stop = self.heartbeat(self.progress(done))
            if done < config.train.steps and (stop or done % config.train.checkpoint_every == 0):
                self._save(done)
                if stop:
                    return "interrupted"
        return "complete"

    def measure(self, done: int, evaluate: bool = False) -> None:
        """Append the probes row for the state after `done` updates, with a validation loss where due or requested."""
        self.measured = done
        row = probe(self.stepper, self.evaluation, done)
        due = evaluate or done % self.config.train.eval_every == 0
        val_loss = self.stepper.loss_on(self.evaluation) if due else None
        row |= {"val_loss": val_loss, **self.noise.row(self.stepper.noise)}
        weights = row["param_norm"]
        self.probes.append(row, urgent=not math.isfinite(weights))
        if not math.isfinite(weights):
            self.recorder.monitor.weights_not_finite(max(0, done - 1))

    def progress(self, done: int) -> Progress:
        recorder = self.recorder
        return Progress(
            done,
            self.config.train.steps,
            recorder.loss,
            recorder.grad_norm,
            recorder.spikes.spike_events,
            recorder.tokens_per_second,
        )

    def _due(self, done: int) -> bool:
        """Whether a probe or evaluation comes after `done` updates. The last state is measured at the end anyway."""
        train = self.config.train
        return done < train.steps and (done % train.probe_every == 0 or done % train.eval_every == 0)

    def _save(self, done: int) -> None:
        """The records become durable before the checkpoint that implies them."""
        self.recorder.drain()
        if self.recorder.monitor.code is None:
            self.recorder.writer.flush(sync=True)
            self.probes.flush(sync=True)
            self.checkpoint(done)

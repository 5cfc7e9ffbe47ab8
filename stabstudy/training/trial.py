"""One trial in its folder, from whatever state it was left in to `done`: what its pack does to its files.

Divergence is a result: the trial is done, with that verdict. A crash, a full disk, too little memory or an
interruption is a status, and the next attempt continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabstudy import config as cfg
from stabstudy import disk, failpoints, finished, live, store, trace
from stabstudy.data.batches import Batches, open_batches
from stabstudy.stability.detectors import measured
from stabstudy.stability.explain import outcome
from stabstudy.stability.hopeless import HOPELESS, STOPS, checks, signs, why_not
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Source, judge_trial, write_summary
from stabstudy.stability.verdict import MonitorFacts
from stabstudy.state import Attempt, State, close_attempt
from stabstudy.training import checkpoint
from stabstudy.training.clipping import NoiseMeans
from stabstudy.training.record import Recorded


@dataclass(frozen=True)
class Engine:
    """Where and how trials run; never part of their identity."""

    cache_dir: Path
    device: str = "cpu"
    threads: int = 1
    keep_checkpoints: bool = False
    compiler: bool = True  # this launch found a C++ compiler; false: train.compile=auto is off in all its trials
    ring: int | None = None  # steps kept back on the device; None: 32 on CUDA, 1 on a CPU
    checkpoint_seconds: float | None = None  # at least between two checkpoints; None: 60 on CUDA, 0 on a CPU
    captured: bool | None = None  # whether steps are captured (driver.py); None: on CUDA only
    stop: str = STOPS[0]  # which trials are ended early


AS_JUDGED = dict.fromkeys(("stop_reason", "verdict", "verdict_code", "verdict_reason", "spike_events", "outcome"))
"""What an early stop wrote of a trial: void once it goes on."""


class Trial:
    """A member of a pack, in its folder, whose lock is held. Every change of `state` is on disk."""

    def __init__(self, folder: store.TrialFolder, engine: Engine, rules: Rules):
        self.folder, self.engine, self.rules = folder, engine, rules
        self.state = folder.read_state()
        self.open_files = contextlib.ExitStack()
        self._has_begun = False
        self.config: cfg.TrialConfig
        self.batches: Batches
        self._probes: live.Writer

    @property
    def ended(self) -> bool:
        """Whether this attempt has ended, in whatever state."""
        return self.state.status != "running"

    def begin(self) -> None:
        """Read the settings, and open a new attempt."""
        store.sweep_leftovers(self.folder.path)
        failpoints.hit("resume.swept")
        attempt = Attempt(socket.gethostname(), os.getpid(), disk.utc_now())
        self._write(**AS_JUDGED, status="running", error=None, attempts=(*self.state.attempts, attempt))
        self._has_begun = True
        self.folder.reserve()  # after the attempt, which takes less: a disk without this room is then told as full
        stored, described = self.folder.read_own()
        self.config = cfg.from_dict(cfg.to_dict(stored))  # which holds it to the rules between settings too
        self._fingerprint = described["data_fingerprint"]

    def compiles(self) -> bool:
        """Whether this attempt compiles. The first attempt chose for all of them: a trial never changes its engine."""
        if self.config.train.compile == "auto" and len(self.state.attempts) > 1:
            return bool(self.state.attempts[0].engine.get("compiled"))
        return self.config.compiled and (self.engine.compiler or self.config.train.compile == "on")

    def open_data(self) -> None:
        """Raises DataError where the data are not those that the trial was planned with."""
        self.batches = open_batches(self.config, self.engine.cache_dir, expected=self._fingerprint)

    def note_engine(self, engine: Mapping[str, Any]) -> None:
        """Record what this attempt runs on; it reaches the disk with the next change."""
        self.state = self._with_attempt(engine=dict(engine))

    @property
    def knows_its_start(self) -> bool:
        """Whether what is measured of the initial weights is known, on the evaluation set that there is now."""
        return self.state.init_loss is not None and self.state.eval_hash == self.batches.eval_hash

    def measure_start(self, init_loss: float, growth_act: float | None, growth_grad: float | None) -> None:
        """Keep what was measured of the initial weights; once for each evaluation set."""
        self._write(
            init_loss=init_loss,
            growth_act=growth_act,
            growth_grad=growth_grad,
            eval_hash=self.batches.eval_hash,
            eval_tokens=int((self.batches.final_evaluation()[:, 1 : self.batches.seq_len + 1] >= 0).sum()),
        )

    def resume(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The tensors of the newest usable checkpoint ({}: none). Both records are cut to it: each step stands once."""
        recorded = self.folder.live(trace.TRACE)
        rows = len(self._recorded(trace.TRACE))
        start, tensors, notes = checkpoint.restore(self.folder.checkpoints, self.state.trial_id, shapes, rows)
        for note in notes:
            self.say(note)
        failpoints.hit("resume.chosen")
        dropped, cut_bytes = live.cut(recorded, trace.TRACE, start)
        failpoints.hit("resume.cut")
        # a probes row describes the state after `step` updates: the one at `start` was written before the checkpoint
        live.cut(self.folder.live(trace.PROBES), trace.PROBES, start + 1 if start else 0)
        failpoints.hit("resume.ready")
        for schema in self._schemas:  # of a study that an older version began
            live.upgrade(self.folder.live(schema), schema, self._widths)
        self.state = self._with_attempt(from_step=start, dropped_rows=dropped, cut_bytes=cut_bytes)
        # asked for here: a trial that an older version began has its first loss, and not these
        entropy, tokens = self.batches.unigram_entropy, self.batches.training_tokens
        self._write(step=start, unigram_entropy=entropy, train_tokens=tokens)
        return tensors

    def open_records(self) -> tuple[Recorded, trace.Rows]:
        """What the recorder needs, and the rows that are there."""
        rows, probed = (self._recorded(schema) for schema in self._schemas)
        noise = NoiseMeans()
        noise.replay(probed["noise_g2"], probed["noise_s"])
        writers = []
        for schema in self._schemas:
            writers.append(live.Writer(self.folder.live(schema), schema, self._widths))
            self.open_files.callback(writers[-1].close)
        failpoints.hit("resume.append")
        return Recorded(self.config, writers[0], writers[1], self._facts, noise, len(rows)), rows

    def save(self, tensors: Mapping[str, Tensor], next_step: int) -> None:
        """Write a checkpoint; the records are durable."""
        checkpoint.save(self.folder.checkpoints, self.state.trial_id, tensors, next_step)

    def save_final(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Write the trained weights, which stay in the folder."""
        checkpoint.save_final(self.folder.checkpoints, self.state.trial_id, tensors, steps)

    def finish(self, stop_reason: str, step: int, final_loss: float) -> None:
        """Compact both records, judge the trial, and only then call it done and remove the live files (D2).

        Raises RuntimeError where a complete trial lacks rows.
        """
        self.open_files.close()
        failpoints.hit("finish.begun")
        state = replace(self.state, step=step, stop_reason=stop_reason, final_loss=final_loss)
        rows, probes = (finished.read_whole(self.folder.live(schema), schema) for schema in self._schemas)
        records: dict[str, Any] = {}
        for table in (rows, probes):
            path, note = self.folder.finished(table.schema), {"trial_id": state.trial_id}
            # the folder once, with both names in it
            sha = finished.write(table, path, note, synced="folder" if table is probes else "file")
            values = finished.values_sha256(table)
            records[table.schema.name] = {"rows": len(table), "sha256": sha, "values_sha256": values}
        if stop_reason == "complete" and records["trace"]["rows"] != self.config.train.steps:
            raise RuntimeError(f"{records['trace']['rows']} rows of {self.config.train.steps} steps were recorded")
        state = replace(state, status="done", error=None, records=records)
        source = Source(self.config, state)
        summary = judge_trial(rows, probes, source, self.rules)
        write_summary(self.folder, summary, source, self.rules)
        self.state = state
        self._judged(summary.columns)
        self._end()
        failpoints.hit("finish.done")
        for schema in self._schemas:
            self.folder.live(schema).unlink(missing_ok=True)
            failpoints.hit("finish.unlinked")
        failpoints.hit("finish.checkpoints")
        if not self.engine.keep_checkpoints:
            shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        self.say(f"done: {self.state.stop_reason} after {self.state.step} steps. {self.state.outcome}")

    @property
    def checks(self) -> tuple[int, ...]:
        """The numbers of steps after which it may be ended early."""
        if self.engine.stop != HOPELESS or why_not(self.config.objective.kind, self.config.tokens_per_step):
            return ()
        return checks(self.config.train.steps)

    def hopeless(self) -> str | None:
        """Why it is to be ended now, from all its rows, which are written; None where it goes on."""
        rows = self._recorded(self._schemas[0])
        return signs(measured(rows, "grad_norm"), measured(rows, "loss"), self._facts, self.rules).reason(self._facts)

    def stop(self, step: int, reason: str) -> None:
        """Ended early, after a checkpoint; judged as far as it ran. Its records stay live: it may go on."""
        self.open_files.close()
        self.state = replace(self.state, status="stopped", stop_reason=self.engine.stop, step=step)
        rows, probes = (self._recorded(schema) for schema in self._schemas)
        columns = judge_trial(rows, probes, Source(self.config, self.state), self.rules).columns
        self._judged(columns)
        of = f"Stopped at step {step} of {self.config.train.steps} by the rule {self.engine.stop}"
        self.state = replace(self.state, outcome=f"{of}: {reason}.")
        failpoints.hit("stop.judged")
        self._end()
        self.say(str(self.state.outcome))

    def interrupt(self, step: int) -> None:
        """Stopped on request, after a checkpoint."""
        self.open_files.close()
        self.state = replace(self.state, status="interrupted", step=step)
        self._end()

    def fail(self, error: BaseException) -> None:
        """The attempt raised."""
        with contextlib.suppress(OSError):  # the disk may be what failed
            self.open_files.close()
        step = self.state.step
        with contextlib.suppress(trace.DamagedRecord, OSError):
            step = len(self._recorded(trace.TRACE))
        message = disk.describe(error) if isinstance(error, OSError) else str(error)
        message = (message or type(error).__name__).splitlines()[0][:500]
        described = {"kind": type(error).__name__, "message": message, "step": step}
        self.state = replace(self.state, status=status_of(error), step=step, error=described)
        with contextlib.suppress(OSError):  # then it stays `running` on the disk, without a lock: `lost`
            self._end()
        with contextlib.suppress(OSError):
            self.say(f"{self.state.status}: {error}\n{''.join(traceback.format_exception(error))}")

    def say(self, line: str) -> None:
        """A line in the trial's log."""
        with self.folder.log_file.open("a", encoding="utf-8") as f:
            f.write(f"{disk.utc_now()} {line}\n")

    @property
    def _schemas(self) -> tuple[trace.Schema, trace.Schema]:
        """Of its records."""
        return trace.of_objective(self.config.objective.kind), trace.PROBES

    def _recorded(self, schema: trace.Schema) -> trace.Rows:
        path = self.folder.live(schema)
        return live.read(path, schema) if live.find(path) else trace.no_rows(schema)

    @property
    def _widths(self) -> dict[str, int]:
        return trace.widths(self.config.model.depth)

    def _judged(self, columns: Mapping[str, Any]) -> None:
        """Take over the verdict."""
        kept = {name: columns[name] for name in ("verdict", "verdict_code", "verdict_reason", "spike_events")}
        self.state = replace(self.state, **kept, outcome=outcome(columns, self.rules))

    @property
    def _facts(self) -> MonitorFacts:
        return MonitorFacts(
            self.config.train.steps,
            self.config.warmup_steps,
            self.state.init_loss,
            self.state.unigram_entropy,
            objective=self.config.objective.kind,
        )

    def _end(self) -> None:
        if self._has_begun:
            self.state = close_attempt(self.state, self.state.status, self.state.error)
            self._write()
            self.folder.release()

    def _with_attempt(self, **changes: Any) -> State:
        attempt = replace(self.state.attempts[-1], **changes)
        return replace(self.state, attempts=(*self.state.attempts[:-1], attempt))

    def _write(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self.folder.write_state(self.state)


def status_of(error: BaseException) -> str:
    """The status of a trial whose attempt raised this."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "oom"
    if disk.is_full(error):
        return "disk_full"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # the CPU allocator has no exception type of its own
    return "oom" if isinstance(error, RuntimeError) and "not enough memory" in str(error) else "failed"

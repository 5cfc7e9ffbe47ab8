"""One trial in its folder, from whatever state it was left in to `done`: lock, resume, train, compact, judge.

Divergence is a result: the trial is done, with that verdict. A crash, a full disk, too little memory or an
interruption is a status, and the next attempt continues from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stabstudy import config as cfg
from stabstudy import finished, store, trace
from stabstudy.data.batches import Batches, open_batches
from stabstudy.stability.explain import outcome
from stabstudy.stability.judgement import Source, judge_trial, write_summary
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import LiveSpikes
from stabstudy.stability.verdict import DivergenceMonitor
from stabstudy.training import checkpoint, hf
from stabstudy.training.allocation import keep_freed_memory
from stabstudy.training.compiling import keep_compiled
from stabstudy.training.growth import growth
from stabstudy.training.loop import Heartbeat, Loop, Progress
from stabstudy.training.record import Recorder
from stabstudy.training.step import Stepper

RECORDS = (trace.TRACE, trace.PROBES)


@dataclass(frozen=True)
class Engine:
    """Where and how a trial runs; never part of its identity."""

    cache_dir: Path
    device: str = "cpu"
    threads: int = 1
    keep_checkpoints: bool = False
    compiler: bool = True  # this launch found a C++ compiler; false: train.compile=auto is off in all its trials


def run_trial(folder: store.TrialFolder, engine: Engine, rules: Rules, heartbeat: Heartbeat) -> store.State:
    """Bring the trial to its end, or as far as this attempt gets; the state returned is the one on disk.

    Raises LockHeldError when another process works on it. Every failure of the trial itself ends in the state, not in
    an exception, except KeyboardInterrupt and SystemExit, which are recorded and raised again.
    """
    with store.lock(folder.path):
        state = folder.read_state()
        if state.status == "done":
            return state
        store.sweep_leftovers(folder.path)
        say = _logger(folder.log_file)
        try:
            return _attempt(folder, state, engine, rules, heartbeat, say)
        except BaseException as error:
            ended = _failed(folder, error)
            say(f"{ended.status}: {error}\n{traceback.format_exc()}")
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            return ended


def run_pack(
    folders: Sequence[store.TrialFolder],
    engine: Engine,
    rules: Rules,
    heartbeat: Callable[[Sequence[Progress]], bool],
) -> list[store.State]:
    """Run one member after another; returns their states as on disk. A member that is locked elsewhere is skipped."""
    for folder in folders:

        def beat(progress: Progress, trial_id: str = folder.trial_id) -> bool:
            return heartbeat([replace(progress, trial_id=trial_id)])

        with contextlib.suppress(store.LockHeldError):
            if run_trial(folder, engine, rules, beat).status == "interrupted":
                break
    return [folder.read_state() for folder in folders]


def _attempt(
    folder: store.TrialFolder,
    state: store.State,
    engine: Engine,
    rules: Rules,
    heartbeat: Heartbeat,
    say: Callable[[str], None],
) -> store.State:
    described = folder.read_config()
    config = cfg.from_dict(described["config"])
    compiled = _compiled(config, state, engine)
    state = _begin(folder, state, config, engine, compiled)
    batches = open_batches(config, engine.cache_dir, expected=described["data_fingerprint"])
    stepper = _build(config, batches, engine, compiled)
    state = _initial_loss(folder, state, stepper, batches)
    start, state = _resume(folder, state, stepper, say)
    with contextlib.ExitStack() as open_files:
        writers = {s.name: trace.RowWriter(folder.live(s), s) for s in RECORDS}
        for writer in writers.values():
            open_files.callback(writer.close)
        recorder = _recorder(folder, config, state, stepper, writers["trace"], rules)
        loop = Loop(
            config,
            stepper,
            batches,
            recorder,
            writers["probes"],
            lambda step: checkpoint.save(folder.checkpoints, state.trial_id, stepper, step),
            heartbeat,
        )
        probed = trace.read_jsonl(folder.live(trace.PROBES), trace.PROBES)
        loop.noise.replay(probed["noise_g2"], probed["noise_s"])
        if start == 0:
            loop.measure(0)
        say(f"attempt {len(state.attempts)}: from step {start} of {config.train.steps} on {stepper.device}")
        stop_reason = loop.run(start)
        if stop_reason == "interrupted":
            return _end(folder, replace(state, status="interrupted", step=recorder.rows))
        final_loss = stepper.loss_on(batches.final_evaluation())
        if loop.measured != recorder.rows:  # else the probe that found weights not finite has just written this row
            loop.measure(recorder.rows, evaluate=True)
    state = replace(state, step=recorder.rows, stop_reason=stop_reason, final_loss=final_loss)
    state = _finish(folder, config, state, rules)
    if not engine.keep_checkpoints:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    say(f"done: {state.stop_reason} after {state.step} steps. {state.outcome}")
    return state


def _compiled(config: cfg.TrialConfig, state: store.State, engine: Engine) -> bool:
    """Whether this attempt compiles. The first attempt chose for all of them: a trial never changes its engine."""
    if config.train.compile == "auto" and state.attempts:
        return bool(state.attempts[0].engine["compiled"])
    return config.compiled and (engine.compiler or config.train.compile == "on")


def _begin(
    folder: store.TrialFolder, state: store.State, config: cfg.TrialConfig, engine: Engine, compiled: bool
) -> store.State:
    versions = {"torch": torch.__version__, "device": engine.device, "threads": engine.threads}
    versions |= {"precision": config.train.precision, "attention": "sdpa", "compiled": compiled}
    if engine.device.startswith("cuda"):
        versions["gpu"] = torch.cuda.get_device_name()
    attempt = store.Attempt(socket.gethostname(), os.getpid(), store.now(), engine=versions)
    state = replace(state, status="running", error=None, attempts=(*state.attempts, attempt))
    folder.write_state(state)
    return state


def _build(config: cfg.TrialConfig, batches: Batches, engine: Engine, compiled: bool) -> Stepper:
    """Model and optimizer, with the settings that make equal configurations give equal numbers."""
    torch.set_num_threads(engine.threads)
    keep_freed_memory()
    device = torch.device(engine.device)
    if device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = hf.build(config.model, batches.corpus.vocab_size, config.data.seq_len, config.seed)
    if compiled:
        keep_compiled(engine.cache_dir)
    return Stepper(config, model.to(device), device, compiled)


def _resume(
    folder: store.TrialFolder, state: store.State, stepper: Stepper, say: Callable[[str], None]
) -> tuple[int, store.State]:
    """Load the newest usable checkpoint and cut both records to it, so that each step will stand once."""
    live = folder.live(trace.TRACE)
    rows = len(trace.read_jsonl(live, trace.TRACE)) if live.exists() else 0
    start, notes = checkpoint.restore(folder.checkpoints, state.trial_id, stepper, rows)
    for note in notes:
        say(note)
    dropped, cut_bytes = trace.cut(live, trace.TRACE, start)
    # a probes row describes the state after `step` updates: the one at `start` was written before the checkpoint
    trace.cut(folder.live(trace.PROBES), trace.PROBES, start + 1 if start else 0)
    attempt = replace(state.attempts[-1], from_step=start, dropped_rows=dropped, cut_bytes=cut_bytes)
    state = replace(state, step=start, attempts=(*state.attempts[:-1], attempt))
    folder.write_state(state)
    return start, state


def _initial_loss(folder: store.TrialFolder, state: store.State, stepper: Stepper, batches: Batches) -> store.State:
    """What is measured of the initial weights, which the stepper still has; once for each evaluation set."""
    if state.init_loss is None or state.eval_hash != batches.eval_hash:
        act, grad = growth(stepper, batches.evaluation())
        final = batches.final_evaluation()
        state = replace(state, init_loss=stepper.loss_on(final), growth_act=act, growth_grad=grad)
        state = replace(state, eval_hash=batches.eval_hash, eval_tokens=final[:, 1:].size)
        folder.write_state(state)
    if state.unigram_entropy is None:  # apart: a trial that an older version began has its first loss already
        state = replace(state, unigram_entropy=batches.unigram_entropy, train_tokens=batches.training_tokens)
        folder.write_state(state)
    return state


def _recorder(
    folder: store.TrialFolder,
    config: cfg.TrialConfig,
    state: store.State,
    stepper: Stepper,
    writer: trace.RowWriter,
    rules: Rules,
) -> Recorder:
    warmup, steps = config.warmup_steps, config.train.steps
    assert state.init_loss is not None
    monitor = DivergenceMonitor(rules, steps, warmup, state.init_loss, state.unigram_entropy)
    recorder = Recorder(
        config,
        stepper.layer_index,
        writer,
        monitor,
        LiveSpikes(rules),
        on_device=stepper.device.type != "cpu",
    )
    kept = trace.read_jsonl(folder.live(trace.TRACE), trace.TRACE)
    recorder.replay(kept)
    recorder.rows = len(kept)
    return recorder


def _finish(folder: store.TrialFolder, config: cfg.TrialConfig, state: store.State, rules: Rules) -> store.State:
    """Compact both records, judge the trial, and only then call it done and remove the live files (RELIABILITY D2)."""
    records: dict[str, Any] = {}
    for schema in RECORDS:
        meta = {"trial_id": state.trial_id}
        count, sha = finished.compact(folder.live(schema), folder.finished(schema), schema, meta)
        records[schema.name] = {"rows": count, "sha256": sha}
    rows, probes = (finished.read_parquet(folder.finished(s), s) for s in RECORDS)
    state = replace(state, status="done", error=None, records=records)
    source = Source(config, state)
    summary = judge_trial(rows, probes, source, rules)
    write_summary(folder, summary, source, rules)
    found = summary.columns
    verdict, code, reason = (found[name] for name in ("verdict", "verdict_code", "verdict_reason"))
    assert isinstance(verdict, str | None) and isinstance(code, str | None) and isinstance(reason, str | None)
    assert isinstance(events := found["spike_events"], int | None)
    state = replace(state, verdict=verdict, verdict_code=code, verdict_reason=reason, spike_events=events)
    state = replace(state, outcome=outcome(found, rules))
    state = _end(folder, state)
    for schema in RECORDS:
        folder.live(schema).unlink(missing_ok=True)
    return state


def _end(folder: store.TrialFolder, state: store.State) -> store.State:
    attempt = replace(state.attempts[-1], ended=store.now(), status=state.status, error=state.error)
    state = replace(state, attempts=(*state.attempts[:-1], attempt))
    folder.write_state(state)
    return state


def _failed(folder: store.TrialFolder, error: BaseException) -> store.State:
    """The state after an attempt that raised."""
    state = replace(folder.read_state(), status=_status_of(error))
    live = folder.live(trace.TRACE)
    with contextlib.suppress(trace.DamagedRecord, OSError):
        state = replace(state, step=len(trace.read_jsonl(live, trace.TRACE)))
    message = (str(error) or type(error).__name__).splitlines()[0][:500]
    state = replace(state, error={"kind": type(error).__name__, "message": message, "step": state.step})
    return _end(folder, state) if state.attempts else state


def _status_of(error: BaseException) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "disk_full"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    # the CPU allocator has no exception type of its own
    return "oom" if isinstance(error, RuntimeError) and "not enough memory" in str(error) else "failed"


def _logger(path: Path) -> Callable[[str], None]:
    def say(line: str) -> None:
        with path.open("a", encoding="utf-8") as f:
            f.write(f"{store.now()} {line}\n")

    return say

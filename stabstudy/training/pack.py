"""A pack: trials of one shape trained together, from whatever states they were left in to their ends.

Every member keeps its own folder, lock, state, records, checkpoints and verdict, and may be at a step of its own, so a
pack that was killed goes on in any other grouping. A member that fails alone (its data, its folder) leaves the others
to go on. A pack that does not fit into memory is halved. When half of a pack have ended, it is made anew without them,
where that saves more time than it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy import disk, store
from stabstudy.config import TrialConfig
from stabstudy.shape import shape
from stabstudy.stability.rules import Rules
from stabstudy.state import State, is_over
from stabstudy.training import families, probes
from stabstudy.training.checkpoint import Saver
from stabstudy.training.driver import Captured, Driver, Eager, feed
from stabstudy.training.loop import End, Heartbeat, Loop, Plan
from stabstudy.training.probes import growth_exponents
from stabstudy.training.record import Recorder
from stabstudy.training.step import Stepper, keep_compiled, stacked
from stabstudy.training.trial import Engine, Trial, status_of
from stabstudy.wording import first_line

RING = 32
"""Steps kept back on CUDA, for one copy."""

CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints of a pack on CUDA: 128 members every 100 steps would be 20 GB in a minute."""


def run_pack(folders: Sequence[store.TrialFolder], engine: Engine, rules: Rules, heartbeat: Heartbeat) -> list[State]:
    """Bring trials of one shape to their ends, or as far as this attempt gets; the states returned are those on disk.

    A trial that is over, or that another process works on, is left alone. Every failure ends in the states, not in an
    exception, except KeyboardInterrupt and SystemExit, which are recorded and raised again. `heartbeat` stops all.
    """
    with contextlib.ExitStack() as held:
        members = []
        for folder in folders:
            with contextlib.suppress(disk.LockHeldError):
                held.enter_context(disk.lock(folder.path))
                if not is_over(folder.read_state().status, engine.stop):
                    members.append(Trial(folder, engine, rules))
        _run(members, engine, rules, heartbeat)
    return [folder.read_state() for folder in folders]


def _run(members: Sequence[Trial], engine: Engine, rules: Rules, heartbeat: Heartbeat) -> None:
    ready = [member for member in members if _each(member, member.begin) and _each(member, member.open_data)]
    for compiled in (False, True):
        if group := [member for member in ready if member.compiles() is compiled]:
            _train(group, engine, rules, heartbeat, compiled)


def _each(member: Trial, action: Callable[[], None]) -> bool:
    """Do what concerns one member; False where it failed, which ends its attempt and no other's."""
    try:
        action()
    except Exception as error:
        member.fail(error)
        return False
    except BaseException as error:
        member.fail(error)
        raise
    return True


def _train(members: list[Trial], engine: Engine, rules: Rules, heartbeat: Heartbeat, compiled: bool) -> None:
    """Train as one pack; without those whose files keep them from going on, and in parts where memory does not do."""
    outcome = _attempt(members, engine, rules, heartbeat, compiled)
    going = [member for member in members if not member.ended]
    if not going or outcome == "over":
        return
    parts = [going]
    if outcome == "too large":  # only now: while an exception is handled, its frames hold what did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (len(going) + 1) // 2
        parts = [going[:half], going[half:]]
        for member in going:
            part = parts[0] if member in parts[0] else parts[1]
            member.say(f"a pack of {len(members)} did not fit into memory: going on with {len(part)}")
    for part in parts:
        if part:
            _train(part, engine, rules, heartbeat, compiled)


def _attempt(members: list[Trial], engine: Engine, rules: Rules, heartbeat: Heartbeat, compiled: bool) -> str:
    """One attempt at these: "over", "fewer" (some cannot go on, and the others have not begun) or "too large"."""
    run = PackRun(members, engine, rules, heartbeat, compiled)
    try:
        with run.files():
            return "over" if run.train() else "fewer"
    except BaseException as error:
        going = [member for member in members if not member.ended]
        if status_of(error) == "oom" and len(going) > 1:
            return "too large"
        for member in going:
            member.fail(error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "over"


class PackRun:
    """One attempt at the members of a pack."""

    def __init__(self, members: list[Trial], engine: Engine, rules: Rules, heartbeat: Heartbeat, compiled: bool):
        self.members, self.engine, self.rules, self.heartbeat = members, engine, rules, heartbeat
        self.compiled = compiled
        self.device = torch.device(engine.device)
        on_cpu = self.device.type == "cpu"
        self.ring = engine.ring or (1 if on_cpu else RING)
        self.captured = not on_cpu if engine.captured is None else engine.captured
        seconds = 0.0 if on_cpu else CHECKPOINT_SECONDS
        self.checkpoint_seconds = seconds if engine.checkpoint_seconds is None else engine.checkpoint_seconds
        self.stepper: Stepper
        self.recorder: Recorder
        self.places: tuple[int, ...]  # the member of each row of the stepper
        self._saver = Saver(in_background=not on_cpu)

    @contextlib.contextmanager
    def files(self) -> Iterator[None]:
        """While this lasts, the members' records are open and checkpoints are written."""
        try:
            yield
        finally:
            self._saver.wait()
            for member in self.members:
                member.open_files.close()

    def train(self) -> bool:
        """All of it; False, before the first step, where a member's files keep it from going on and the others wait."""
        self._check_shapes()
        began = time.monotonic()
        self._prepare_process()
        self.places = tuple(range(len(self.members)))
        self.stepper = self._build()
        for member in self.members:
            member.note_engine(self._described())
        self._measure_start()
        self._resume()
        if any(member.ended for member in self.members):
            return False
        starts = [member.state.step for member in self.members]
        opened = [member.open_records() for member in self.members]
        self.recorder = Recorder(
            [recorded for recorded, _ in opened], self.stepper.columns, self.stepper.layer_index, self.rules
        )
        self.recorder.replay([rows for _, rows in opened])
        self._probe_start([k for k, start in enumerate(starts) if start == 0])
        for member, start in zip(self.members, starts, strict=True):
            where = f"on {self.device}" + (f", one of {len(self.members)}" if len(self.members) > 1 else "")
            member.say(
                f"attempt {len(member.state.attempts)}: from step {start} of {member.config.train.steps} {where}"
            )
        while True:
            loop = self._loop(time.monotonic() - began)
            ended = loop.run()
            if ended == "stopped":
                self._saver.wait()
                for k in sorted(loop.live):
                    self.members[k].interrupt(int(self.recorder.rows[k]))
            if ended != "few":
                return True
            began, left = time.monotonic(), sorted(loop.live)
            del loop  # which holds the stepper and its graphs
            self._shrink(left)

    def save(self, next_steps: dict[int, int]) -> None:
        """Checkpoints of these members: their state now; what is written may be written later."""
        rows = {k: self.places.index(k) for k in next_steps}
        copies = {name: x.detach().cpu().clone() for name, x in self.stepper.state().items()}
        for k in next_steps:
            self.recorder.members[k].trace.flush()
            self.recorder.members[k].probes.flush()

        def write() -> None:
            for k, next_step in next_steps.items():
                self.recorder.members[k].trace.sync()
                self.recorder.members[k].probes.sync()
                self.members[k].save({name: x[rows[k]] for name, x in copies.items()}, next_step)

        self._saver.submit(write)

    def ended(self, member: int, end: End) -> None:
        """Finish a member whose last step is recorded."""
        self._saver.wait()
        rows, trial = int(self.recorder.rows[member]), self.members[member]
        if self.recorder.probed[member] != rows:  # else the probe that found weights not finite has written this row
            self.recorder.add_probe(member, rows, end.probe, evaluated=True)

        def finish() -> None:
            if end.reason == "complete" and self.engine.keep_checkpoints:
                row = self.places.index(member)
                trial.save_final({name: x[row].detach().cpu() for name, x in self.stepper.state().items()}, rows)
            trial.finish(end.reason, rows, end.final_loss)

        _each(trial, finish)

    def hopeless(self, members: Sequence[int]) -> dict[int, str]:
        """Which of these members are to be ended now, and why; their rows are written."""
        reasons = {}
        for k in members:
            self.recorder.members[k].trace.flush()
            if reason := self.members[k].hopeless():
                reasons[k] = reason
        return reasons

    def stopped(self, reasons: Mapping[int, str]) -> None:
        """End these members early; they may go on from here."""
        self.save({k: int(self.recorder.rows[k]) for k in reasons})
        self._saver.wait()
        for k, reason in reasons.items():
            _each(self.members[k], partial(self.members[k].stop, int(self.recorder.rows[k]), reason))

    @property
    def _running(self) -> list[Trial]:
        return [self.members[k] for k in self.places]

    def _check_shapes(self) -> None:
        shapes = [shape(member.config) for member in self.members]
        wrong = [name for name in shapes[0] if any(s[name] != shapes[0][name] for s in shapes)]
        vocabularies = {member.batches.corpus.vocab_size for member in self.members}
        if wrong or len(vocabularies) > 1:
            raise ValueError(f"trials of one pack must agree in {', '.join(wrong) or 'the size of the vocabulary'}")

    def _prepare_process(self) -> None:
        """Settings that make equal configurations give equal numbers."""
        torch.set_num_threads(self.engine.threads)
        keep_freed_memory()
        if self.device.type == "cuda":
            choose_kernels()
        if self.compiled:
            keep_compiled(self.engine.cache_dir, self.device)

    def _build(self) -> Stepper:
        """The stepper of the members in `places`, with their initial weights."""
        vocab = self.members[0].batches.corpus.vocab_size
        configs = [member.config for member in self._running]
        # members of one seed, or one source, begin with the same weights
        initial = lru_cache(maxsize=8)(families.initial)
        models = (initial(c.model, vocab, c.data.seq_len, *_beginning(c)) for c in configs)
        return Stepper(configs, models, self.device, self.compiled)

    def _described(self) -> dict[str, Any]:
        """The engine, as an attempt records it."""
        described: dict[str, Any] = {"torch": torch.__version__, "device": self.engine.device}
        described |= {"threads": self.engine.threads, "precision": self.members[0].config.train.precision}
        described |= {"attention": "sdpa", "compiled": self.compiled, "pack": len(self.members)}
        if self.device.type == "cuda":
            described |= {"gpu": torch.cuda.get_device_name(), "graph": self.captured}
        return described

    def _windows(self, of: Callable[[Trial], NDArray[np.int64]]) -> Tensor:
        return stacked([of(member) for member in self._running], self.device)

    def _measure_start(self) -> None:
        """What is measured of the initial weights, which the stepper still has."""
        if all(member.knows_its_start for member in self.members):
            return
        exponents = growth_exponents(self.stepper, self._windows(lambda m: m.batches.evaluation()))
        losses = self.stepper.loss_on(self._windows(lambda m: m.batches.final_evaluation())).tolist()
        for member, loss, (act, grad) in zip(self.members, losses, exponents, strict=True):
            if not member.knows_its_start:
                member.measure_start(loss, act, grad)

    def _resume(self) -> None:
        """Load each member's newest checkpoint, and cut its records to it."""
        state = self.stepper.state()
        shapes = {name: x.shape[1:] for name, x in state.items()}

        def load(k: int, member: Trial) -> None:
            for name, tensor in member.resume(shapes).items():
                state[name][k].copy_(tensor)

        for k, member in enumerate(self.members):
            _each(member, partial(load, k, member))

    def _probe_start(self, fresh: Sequence[int]) -> None:
        if fresh:
            evaluation = self._windows(lambda m: m.batches.evaluation())
            vectors = probes.probe(self.stepper, evaluation, evaluate=True).cpu().numpy()
            for k in fresh:
                self.recorder.add_probe(k, 0, vectors[k], evaluated=True)

    def _loop(self, setup_seconds: float) -> Loop:
        """The loop of the members in `places`."""
        running = self._running
        starts = [int(self.recorder.rows[k]) for k in self.places]
        steps = [member.config.train.steps for member in running]
        windows = feed([member.batches for member in running], starts, steps, self.device)
        evaluation = self._windows(lambda m: m.batches.evaluation())
        driver: Driver = Eager(self.stepper, windows, evaluation)
        if self.captured:
            try:
                driver = Captured(self.stepper, windows, evaluation, self.ring)
            except RuntimeError as error:
                if status_of(error) == "oom":
                    raise
                self.captured = False
                for member in running:
                    member.note_engine(self._described())
                    member.say(f"steps are not captured, they run eagerly: {first_line(error)}")
        plan = Plan(
            self.places,
            tuple(member.config for member in self.members),
            tuple(member.folder.trial_id for member in self.members),
            self.ring,
            self.checkpoint_seconds,
            setup_seconds,
            tuple(member.checks for member in self.members),
        )
        final = self._windows(lambda m: m.batches.final_evaluation())
        return Loop(plan, self.stepper, driver, self.recorder, evaluation, final, self, self.heartbeat)

    def _shrink(self, members: Sequence[int]) -> None:
        """Go on with a stepper of these members only."""
        rows = torch.tensor([self.places.index(k) for k in members])
        kept = {name: x.detach().cpu()[rows] for name, x in self.stepper.state().items()}
        del self.stepper
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.places = tuple(members)
        self.stepper = self._build()
        for name, x in self.stepper.state().items():
            x.copy_(kept[name])


def _beginning(config: TrialConfig) -> tuple[int, str | None, str | None]:
    """Seed and place and identity of the initial weights; the seed is 0 where they are there, and it does not count."""
    o = config.objective
    return (config.seed if o.init_from is None else 0), o.init_from, o.init_id


def choose_kernels(deterministic: bool = True) -> None:
    """Kernels on CUDA that `vmap` knows and that give equal numbers for equal inputs.

    What the latter cost is in benchmarks/README.md. With `warn_only` attention would not be deterministic. Memory that
    nothing has written is not filled: torch does so by default, in a kernel for each tensor.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # no batching rule
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # chosen under vmap it has no gradient, see causal_attention
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of two options in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Never return freed memory to the system, for the rest of this process; False where there is no glibc.

    By default glibc gives large blocks back as soon as they are freed and asks for them again a moment later: thousands
    of page faults a step, each filling 4 kB with zeros. No value changes, only where it lies.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return False

"""Drivers of a pack: windows fed to the device, steps run eagerly or replayed as captured CUDA graphs.

Members have batches of their own; at tick t of a pack, member k is at its step start_k + t. A member that has ended
gets its last batch again: its row is computed and makes no update.

Both drivers leave a step's vector, and a probe's, on the device until `take` brings all of them over in one copy. A
captured step reads its windows, learning rates and who is live from tables on the device, at a place that it counts up
itself, so that the host does nothing between two replays. There is a graph for each kind of step: a plain one, one that
a probe belongs to, and one with a validation loss too. All of them run once before the capture, as torch asks for; what
that changed is put back. On a CPU the captured driver calls the same functions without a graph, which is how its tables
are tested.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.data.batches import Batches
from stabstudy.training import probes
from stabstudy.training.objective import IGNORE
from stabstudy.training.step import Stepper

RESIDENT_BYTES = 4e9
"""Of tokens, at most, that are kept on a device."""


class Due(enum.IntEnum):
    """What is measured after a step."""

    NOTHING = 0
    NOISE = 1  # in the step itself
    PROBE = 2  # and the noise
    EVALUATION = 3  # a probe with a validation loss


@dataclass(frozen=True)
class Tick:
    """One step of a pack."""

    tick: int  # from where the pack began
    lr: tuple[float, ...]  # [K]
    live: tuple[bool, ...]  # [K]
    due: Due = Due.NOTHING


@dataclass(frozen=True)
class Taken:
    """What some ticks in a row measured, on the host."""

    steps: NDArray[np.float64]  # [ticks, K, columns]
    probes: dict[int, NDArray[np.float64]]  # of ticks with a probe, by their place: [K, columns]


class Feed(Protocol):
    """Where a driver gets windows [K, B, T+1] from."""

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        """Those of one tick, and whether any target in them may be IGNORE."""

    def fill(self, tick: int, count: int) -> None:
        """Have those of so many ticks at hand, from `tick` on. Raises RuntimeError for masks that only some have."""

    def prepare(self, tick: int, count: int) -> None:
        """The next `fill` is likely to be this one: called while the device is busy."""

    def at(self, slot: Tensor) -> Tensor:
        """Those of tick number `slot` (int64 [1], on the device) of the last `fill`; what a captured step reads."""


class HostFeed:
    """Windows cut on the host; a thread prepares the next `fill`."""

    def __init__(self, batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device):
        self.batches, self.starts, self.steps, self.device = batches, starts, steps, device
        self._masked = any(b.masked for b in batches)
        self._held: Tensor | None = None  # [ticks, K, B, T+1]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, int, Future[Tensor]] | None = None

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        values = self._cut(tick)
        return torch.from_numpy(values).to(self.device), self._masked or bool((values == IGNORE).any())

    def fill(self, tick: int, count: int) -> None:
        ready = self._next[2].result() if self._next and self._next[:2] == (tick, count) else self._pinned(tick, count)
        if self._held is None or len(self._held) < count:
            self._held = ready.to(self.device)
        else:
            self._held[:count].copy_(ready, non_blocking=True)

    def prepare(self, tick: int, count: int) -> None:
        self._next = (tick, count, self._thread.submit(self._pinned, tick, count))

    def at(self, slot: Tensor) -> Tensor:
        assert self._held is not None
        return self._held.index_select(0, slot)[0]

    def _cut(self, tick: int) -> NDArray[np.int64]:
        steps = _steps_at(tick, self.starts, self.steps)
        return np.stack([batches.batch(step) for batches, step in zip(self.batches, steps, strict=True)])

    def _pinned(self, tick: int, count: int) -> Tensor:
        values = torch.from_numpy(np.stack([self._cut(tick + i) for i in range(count)]))
        if not self._masked and bool((values == IGNORE).any()):
            raise RuntimeError("padded batches are not captured")
        return values.pin_memory() if self.device.type == "cuda" else values


class ResidentFeed:
    """Corpora kept on the device; a step is told only where its sequences begin."""

    def __init__(self, batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device):
        self.batches, self.starts, self.steps, self.device = batches, starts, steps, device
        self._masked = any(b.masked for b in batches)
        layouts = {_text(b): b.layout for b in batches}
        flat = [layout.flat() for layout in layouts.values()]
        offsets = np.cumsum([0, *map(len, flat)])
        first = dict(zip(layouts, offsets.tolist(), strict=False))
        self._offsets = [first[_text(b)] for b in batches]
        most = 2**15 + (IGNORE if self._masked else 0)  # hidden tokens lie below IGNORE
        dtype: Any = np.int16 if max(b.corpus.vocab_size for b in batches) <= most else np.int32
        tokens = [torch.from_numpy(np.asarray(numbers).astype(dtype)) for numbers in flat]
        self._tokens = torch.cat(tokens).to(device)
        self._span = torch.arange(batches[0].layout.width, device=device)
        self._held: Tensor | None = None  # [ticks, K, B]: position of each sequence's first token
        self._next: tuple[int, int, Tensor] | None = None

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        return self._gathered(torch.from_numpy(self._places(tick)).to(self.device)), self._masked

    def fill(self, tick: int, count: int) -> None:
        places = self._next[2] if self._next and self._next[:2] == (tick, count) else self._table(tick, count)
        if self._held is None or len(self._held) < count:
            self._held = places.to(self.device)
        else:
            self._held[:count].copy_(places)

    def prepare(self, tick: int, count: int) -> None:
        # no thread: the host has nothing else to do, and 128 members' places take 20 ms of it
        self._next = (tick, count, self._table(tick, count))

    def at(self, slot: Tensor) -> Tensor:
        assert self._held is not None
        return self._gathered(self._held.index_select(0, slot)[0])

    def _table(self, tick: int, count: int) -> Tensor:
        return torch.from_numpy(np.stack([self._places(tick + i) for i in range(count)]))

    def _places(self, tick: int) -> NDArray[np.int64]:
        members = zip(self.batches, self._offsets, _steps_at(tick, self.starts, self.steps), strict=True)
        return np.stack([batches.positions(step) + offset for batches, offset, step in members])

    def _gathered(self, places_KB: Tensor) -> Tensor:
        return self._tokens[places_KB[..., None] + self._span].long()


def _steps_at(tick: int, starts: Sequence[int], steps: Sequence[int]) -> list[int]:
    """The step of each member; of one that has ended its last."""
    return [min(start + tick, last - 1) for start, last in zip(starts, steps, strict=True)]


def _text(batches: Batches) -> tuple[str, str]:
    """What two members of one pack read alike."""
    return batches.corpus.fingerprint, batches.layout.name


def _numbers(batches: Batches) -> int:
    """Of the batches' layout, without laying it out."""
    padded = batches.layout.name == "padded"
    return batches.layout.count * batches.layout.width if padded else len(batches.corpus.tokens)


def feed(batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device) -> Feed:
    """The feed of a device: on a CPU from the host; else resident, where the corpora are small enough."""
    size = sum({_text(b): 4.0 * _numbers(b) for b in batches}.values())
    kind = HostFeed if device.type == "cpu" or size > RESIDENT_BYTES else ResidentFeed
    return kind(batches, starts, steps, device)


class Driver(Protocol):
    """Runs ticks; `stepper` is then at the state behind the last one."""

    def run(self, ticks: Sequence[Tick]) -> None:
        """Begin these, after those begun before."""

    def take(self) -> Taken:
        """Wait for the ticks of the last `run`."""


class Eager:
    """Calls each step from the host."""

    def __init__(self, stepper: Stepper, feed: Feed, evaluation_KBT: Tensor):
        self.stepper, self.feed, self.evaluation = stepper, feed, evaluation_KBT
        self._live: dict[tuple[bool, ...], Tensor] = {}
        self._steps: list[Tensor] = []
        self._probes: dict[int, Tensor] = {}

    def run(self, ticks: Sequence[Tick]) -> None:
        self._steps, self._probes = [], {}
        for place, tick in enumerate(ticks):
            windows, masked = self.feed.windows(tick.tick)
            noise = tick.due >= Due.NOISE
            self._steps.append(self.stepper.step(windows, tick.lr, self._of(tick.live), masked, noise))
            if tick.due >= Due.PROBE:
                self._probes[place] = probes.probe(self.stepper, self.evaluation, tick.due == Due.EVALUATION)

    def take(self) -> Taken:
        steps = self._steps[0][None] if len(self._steps) == 1 else torch.stack(self._steps)
        return Taken(steps.cpu().double().numpy(), {i: p.cpu().numpy() for i, p in self._probes.items()})

    def _of(self, live: tuple[bool, ...]) -> Tensor:
        if live not in self._live:
            self._live = {live: torch.tensor(live, dtype=torch.float32, device=self.stepper.device)}
        return self._live[live]


KINDS = (Due.NOTHING, Due.PROBE, Due.EVALUATION)
"""Of captured steps, see `Captured._kind`."""


class Captured:
    """Replays captured steps, at most `ring` of them between two `take`s."""

    def __init__(self, stepper: Stepper, feed: Feed, evaluation_KBT: Tensor, ring: int):
        """Raises RuntimeError where the device cannot capture a step."""
        self.stepper, self.feed, self.evaluation = stepper, feed, evaluation_KBT
        device, K = stepper.device, stepper.K
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._lr = torch.zeros(ring, K, dtype=torch.float64, device=device)  # as a number would be
        self._live = torch.zeros(ring, K, device=device)
        columns = len(stepper.columns) + len(stepper.stack.names)
        self._steps = torch.zeros(ring, K, columns, device=device)
        self._probes = torch.zeros(ring, K, probes.width(stepper), dtype=torch.float64, device=device)
        self._ticks: Sequence[Tick] = ()
        self._places = torch.arange(ring, device=device)
        feed.fill(0, ring)
        before = {name: x.clone() for name, x in stepper.state().items()}
        try:
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # what one frees serves the next
            self._replays = {kind: Replay(partial(self._step, kind), stepper, pool) for kind in KINDS}
        finally:  # eager steps may follow
            for name, x in stepper.state().items():
                x.copy_(before[name])

    def run(self, ticks: Sequence[Tick]) -> None:
        self._ticks, n = ticks, len(ticks)
        self._lr[:n].copy_(torch.tensor([t.lr for t in ticks], dtype=self._lr.dtype))
        self._live[:n].copy_(torch.tensor([t.live for t in ticks], dtype=torch.float32))
        self.feed.fill(ticks[0].tick, n)
        self._slot.zero_()
        for tick in ticks:
            self._replays[self._kind(tick.due)]()
        self.feed.prepare(ticks[-1].tick + 1, n)

    def take(self) -> Taken:
        n = len(self._ticks)
        steps = self._steps[:n].cpu().double().numpy()  # waits
        due = [i for i, tick in enumerate(self._ticks) if tick.due >= Due.PROBE]
        measured = self._probes[:n].cpu().numpy() if due else None
        return Taken(steps, {} if measured is None else {i: measured[i] for i in due})

    def _kind(self, due: Due) -> Due:
        """The kind of step that is captured for this: one for the noise alone would serve a single step."""
        if due == Due.NOISE:
            return Due.PROBE if self.stepper.micro_batches > 1 else Due.NOTHING
        return due

    def _step(self, kind: Due) -> None:
        """One tick; reads and writes tables of the device only."""
        lr, live = (table.index_select(0, self._slot)[0] for table in (self._lr, self._live))
        vector = self.stepper.step(self.feed.at(self._slot), lr, live, self.stepper.masked, kind >= Due.NOISE)
        # chosen, not indexed: with deterministic kernels index_copy looks at its index on the host
        here = (self._places == self._slot)[:, None, None]
        torch.where(here, vector, self._steps, out=self._steps)
        if kind >= Due.PROBE:
            measured = probes.probe(self.stepper, self.evaluation, kind == Due.EVALUATION)
            torch.where(here, measured, self._probes, out=self._probes)
        self._slot.add_(1)


class Replay:
    """A captured function of a stepper. After a call, `grads` and `noise` of the stepper are those of this function."""

    def __init__(self, function: Callable[[], None], stepper: Stepper, pool: Any):
        self._stepper = stepper
        self._play = function if stepper.device.type != "cuda" else _capture(function, pool)
        self._grads, self._noise = stepper.grads, stepper.noise

    def __call__(self) -> None:
        self._play()
        if self._stepper.device.type == "cuda":
            self._stepper.grads, self._stepper.noise = self._grads, self._noise


WARM_RUNS = 2


def _capture(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """The function as a graph. It runs a few times first, on a stream of its own: libraries set themselves up there."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    replay: Callable[[], None] = graph.replay
    return replay

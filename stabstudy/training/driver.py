"""What runs the steps of a pack: eagerly, or as replays of captured CUDA graphs.

Both leave a step's vector, and a probe's, on the device until `take` brings all of them over in one copy. A captured
step reads its windows, learning rates and who is live from tables on the device, at a place that it counts up itself,
so that the host does nothing between two replays. There is a graph for each kind of step: a plain one, one that a probe
belongs to, and one with a validation loss too. All of them run once before the capture, as torch asks for; what that
changed is put back.

On a CPU the captured driver calls the same functions without a graph, which is how its tables are tested.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.training import probes
from stabstudy.training.feed import Feed
from stabstudy.training.step import Stepper

WARM_RUNS = 2


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
        # the fused kernel of CUDA takes a float32 rate, that of a CPU the same double as a number would be
        self._lr = torch.zeros(ring, K, dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
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
        vector = self.stepper.step(self.feed.at(self._slot), lr, live, measure_noise=kind >= Due.NOISE)
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

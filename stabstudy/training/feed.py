"""The windows of a pack on its device: whole corpora kept there, or a few steps' windows at a time from the host.

Members have batches of their own; at tick t of a pack, member k is at its step start_k + t. A member that has ended
gets its last batch again: its row is computed and makes no update.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabstudy.data.batches import Batches
from stabstudy.training.objective import IGNORE

RESIDENT_BYTES = 4e9
"""Of tokens, at most, that are kept on a device."""


class Feed(Protocol):
    """Where a driver gets windows [K, B, T+1] from."""

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        """Those of one tick, and whether any target in them is IGNORE."""

    def fill(self, tick: int, count: int) -> None:
        """Have those of so many ticks at hand, from `tick` on. Raises RuntimeError for padded ones."""

    def at(self, slot: Tensor) -> Tensor:
        """Those of tick number `slot` (int64 [1], on the device) of the last `fill`; what a captured step reads."""


class HostFeed:
    """Windows cut on the host. After a `fill` a thread prepares the same number of ticks that follow."""

    def __init__(self, batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device):
        self.batches, self.starts, self.steps, self.device = batches, starts, steps, device
        self._held: Tensor | None = None  # [ticks, K, B, T+1]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, int, Future[Tensor]] | None = None

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        values = self._cut(tick)
        return torch.from_numpy(values).to(self.device), bool((values == IGNORE).any())

    def fill(self, tick: int, count: int) -> None:
        ready = self._next[2].result() if self._next and self._next[:2] == (tick, count) else self._pinned(tick, count)
        if self._held is None or len(self._held) < count:
            self._held = ready.to(self.device)
        else:
            self._held[:count].copy_(ready, non_blocking=True)
        self._next = (tick + count, count, self._thread.submit(self._pinned, tick + count, count))

    def at(self, slot: Tensor) -> Tensor:
        assert self._held is not None
        return self._held.index_select(0, slot)[0]

    def _cut(self, tick: int) -> NDArray[np.int64]:
        at = [min(start + tick, steps - 1) for start, steps in zip(self.starts, self.steps, strict=True)]
        return np.stack([batches.batch(step) for batches, step in zip(self.batches, at, strict=True)])

    def _pinned(self, tick: int, count: int) -> Tensor:
        values = torch.from_numpy(np.stack([self._cut(tick + i) for i in range(count)]))
        if bool((values == IGNORE).any()):
            raise RuntimeError("padded batches are not captured")
        return values.pin_memory() if self.device.type == "cuda" else values


class ResidentFeed:
    """Corpora kept on the device; a step is told only where its sequences begin."""

    def __init__(self, batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device):
        self.batches, self.starts, self.steps, self.device = batches, starts, steps, device
        corpora = {b.corpus.fingerprint: b.corpus for b in batches}
        offsets = np.cumsum([0, *(len(c.tokens) for c in corpora.values())])
        first = dict(zip(corpora, offsets.tolist(), strict=False))
        self._offsets = [first[b.corpus.fingerprint] for b in batches]
        dtype: Any = np.int16 if max(c.vocab_size for c in corpora.values()) <= 2**15 else np.int32
        tokens = [torch.from_numpy(np.asarray(c.tokens).astype(dtype)) for c in corpora.values()]
        self._tokens = torch.cat(tokens).to(device)
        self._span = torch.arange(batches[0].seq_len + 1, device=device)
        self._held: Tensor | None = None  # [ticks, K, B]: position of each sequence's first token

    def windows(self, tick: int) -> tuple[Tensor, bool]:
        return self._gathered(torch.from_numpy(self._places(tick)).to(self.device)), False

    def fill(self, tick: int, count: int) -> None:
        places = torch.from_numpy(np.stack([self._places(tick + i) for i in range(count)]))
        if self._held is None or len(self._held) < count:
            self._held = places.to(self.device)
        else:
            self._held[:count].copy_(places)

    def at(self, slot: Tensor) -> Tensor:
        assert self._held is not None
        return self._gathered(self._held.index_select(0, slot)[0])

    def _places(self, tick: int) -> NDArray[np.int64]:
        at = [min(start + tick, steps - 1) for start, steps in zip(self.starts, self.steps, strict=True)]
        members = zip(self.batches, self._offsets, at, strict=True)
        return np.stack([batches.positions(step) + offset for batches, offset, step in members])

    def _gathered(self, places_KB: Tensor) -> Tensor:
        return self._tokens[places_KB[..., None] + self._span].long()


def feed(batches: Sequence[Batches], starts: Sequence[int], steps: Sequence[int], device: torch.device) -> Feed:
    """The feed of a device: on a CPU from the host; else resident, where the corpora are small enough."""
    size = sum({b.corpus.fingerprint: 4.0 * len(b.corpus.tokens) for b in batches}.values())
    kind = HostFeed if device.type == "cpu" or size > RESIDENT_BYTES else ResidentFeed
    return kind(batches, starts, steps, device)

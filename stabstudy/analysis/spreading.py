"""Work on many trials, spread over processes where that pays.

They are loky's and not multiprocessing's: those run the caller's script again, which a notebook, or a script without a
`__main__` guard, does not survive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from typing import TypeVar

MOST = 16
"""Workers: each holds a Python of its own (about 150 MB), and disks do not get faster by more of them."""

WORTH_S = 4.0
"""Seconds of work from which on workers pay: to start them takes one to two."""

_PARTS = 4
"""Parts for each worker, so that the last to finish is not long alone."""

_IDLE_S = 30

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(
    do: Callable[[list[Item]], list[Result]],
    items: Sequence[Item],
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """`do(items)`, a result for each item in their order, by several processes where that pays.

    `seconds` is what one process would need, roughly. `do` must give each item the same result in any company, and it,
    the items and the results must pickle. What it raises is raised here. A worker that dies (of memory, say) costs
    time and no result: this process then does everything. `progress` is told how many of how many items are done.
    """
    items = list(items)
    tell = progress or (lambda done, of: None)
    n = min(_cores(), MOST, len(items)) if seconds >= WORTH_S else 1
    if n < 2:
        return _in_turn(do, items, max(1, math.ceil(len(items) / max(1.0, seconds))), tell)
    from loky import get_reusable_executor

    parts = min(len(items), _PARTS * n)
    results: list[Result | None] = [None] * len(items)
    try:
        executor = get_reusable_executor(max_workers=n, timeout=_IDLE_S, env={"OMP_NUM_THREADS": "1"})
        for start, done in enumerate(executor.map(do, [items[i::parts] for i in range(parts)])):
            results[start::parts] = done
            tell(sum(len(range(i, len(items), parts)) for i in range(start + 1)), len(items))
    except (BrokenExecutor, OSError):
        return _in_turn(do, items, max(1, len(items) // parts), tell)
    return results  # type: ignore[return-value]


def _in_turn(
    do: Callable[[list[Item]], list[Result]], items: list[Item], size: int, tell: Callable[[int, int], None]
) -> list[Result]:
    """`do(items)`, so many of them at a time."""
    results: list[Result] = []
    for start in range(0, len(items), size):
        results += do(items[start : start + size])
        tell(len(results), len(items))
    return results


def _cores() -> int:
    """Those that this process may use: affinity and the limits of a container count."""
    from loky import cpu_count

    return int(cpu_count())

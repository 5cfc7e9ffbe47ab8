"""torch.compile for the loss function: forward and backward of a micro-batch; the optimizer is not compiled.

Every micro-batch of a pack has one shape, so it compiles once. Evaluation and probes, whose shapes differ, are eager
in both modes: a loss is measured the same way whatever trained the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FOLDER = "compiled"
"""Below the cache folder: compiled kernels, of which trials of equal shape make use together."""


def keep_compiled(cache_dir: Path) -> None:
    """Keep kernels in the cache folder, unless the user's environment names another. Call before the first compile."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / FOLDER))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each trial starts a process per core


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """The function compiled for the shapes that it is called with.

    What a process compiled before is forgotten: packs of other shapes would count as recompilations, at whose limit
    the compiler runs the function eagerly without a word. Reaching it is an error.
    """
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    fast: Callable[..., T] = torch.compile(function, dynamic=False)
    return fast

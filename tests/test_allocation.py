"""Freed memory stays in the process: counted in page faults, in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from stabstudy.training.pack import keep_freed_memory
import numpy as np
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    blocks = [np.ones(10_000_000) for _ in range(4)]  # 80 MB each: above any threshold that malloc adapts to
    del blocks
before = faults()
for _ in range(3):
    blocks = [np.ones(10_000_000) for _ in range(4)]
    del blocks
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")
def test_a_block_used_again_costs_no_page_fault() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", COUNT, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "not")
    )
    assert kept < 100 < given_back

"""Random numbers that are functions: splitmix64 of a key and a counter, in exact 64-bit integers.

No state to save, no order of calls to keep, the same on every machine and with every version of every library: what a
stored study means may not depend on how NumPy draws this year. Draw n of key k is output n of the published splitmix64
generator started at k (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, made odd: the counter's stride
_MASK = 2**64 - 1


def mix64(x: U64) -> U64:
    """The output function of splitmix64, elementwise: a bijection of the 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(key: U64 | np.uint64, counter: U64) -> U64:
    """Draw number `counter` (from 0) of `key`, broadcast against each other: uniform 64-bit integers."""
    return mix64(key + (counter + np.uint64(1)) * np.uint64(GOLDEN))


def key_of(*parts: int) -> int:
    """One key from several integers, their order counting: the keys of (1, 2), (2, 1) and (1, 2, 0) are unrelated."""
    key = len(parts)
    for part in parts:
        key = int(mix64(np.array([(key + GOLDEN & _MASK) ^ (part & _MASK)], np.uint64))[0])
    return key


def chosen(draw: U64, share: int, of: int) -> NDArray[np.bool_]:
    """True with probability share / of (below 2^31), by the upper 32 bits of each draw."""
    return (draw >> np.uint64(32)) * np.uint64(of) < np.uint64(share << 32)

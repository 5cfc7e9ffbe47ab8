"""Counter-based random numbers and permutations: functions of a key and an index, in exact 64-bit integers.

No state to save, no order of calls to keep, the same on every machine and with every version of every library: what a
stored study means may not depend on how NumPy draws this year. Draw n of key k is output n of the published splitmix64
generator started at k (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).

A keyed permutation of 0..n-1 answers for any index alone, so shuffling needs no list. A Feistel network permutes the
numbers of a fixed count of bits; an image outside 0..n-1 is sent through again until it falls inside (cycle walking:
Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9), which keeps it a permutation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, made odd: the counter's stride
_MASK = 2**64 - 1

ROUNDS = 8  # even: the halves differ by a bit where the count of bits is odd, and end where they began
SMALLEST = 6  # bits: on fewer, a Feistel network reaches some permutations visibly more often than others


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


def permuted(index: U64, size: int, key: U64) -> U64:
    """[k] the image of each index in 0..size-1 under the permutation of its key ([k], same shape)."""
    bits = max(SMALLEST, (size - 1).bit_length())
    image, outside = index.copy(), np.ones(index.shape, np.bool_)
    while outside.any():
        image[outside] = _feistel(image[outside], bits, key[outside])
        outside = image >= np.uint64(size)
    return image


def _feistel(x: U64, bits: int, key: U64) -> U64:
    """A permutation of 0 .. 2^bits - 1, elementwise."""
    low, high = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(low), x & np.uint64((1 << low) - 1)
    for r, round_key in enumerate(draws(key, np.arange(ROUNDS, dtype=np.uint64)[:, None])):
        mask = np.uint64((1 << (low if r % 2 else high)) - 1)  # of the half that is changed now
        left, right = right, left ^ (mix64(round_key + right) & mask)
    return left << np.uint64(low) | right

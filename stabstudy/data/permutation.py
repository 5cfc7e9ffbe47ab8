"""A keyed permutation of 0..n-1 that answers for any index alone: shuffling without a list.

A Feistel network permutes the numbers of a fixed count of bits; an image outside 0..n-1 is sent through again until it
falls inside (cycle walking: Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9), which keeps it a permutation.
"""

from __future__ import annotations

import numpy as np

from stabstudy.data.counter import U64, draws, mix64

ROUNDS = 8  # even: the halves differ by a bit where the count of bits is odd, and end where they began

SMALLEST = 6  # bits: on fewer, a Feistel network reaches some permutations visibly more often than others


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

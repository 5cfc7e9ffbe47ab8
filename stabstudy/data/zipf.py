"""Zipf's law and powers of two in exact integers, so that a distribution is the same table on every machine.

Fixed point throughout: a number x stands as the integer x * 2^32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

FRACTION = 32
"""Bits behind the point."""

TABLE_BITS = 20
"""A lookup table of 2^20 entries stands for a distribution; outcomes rarer than that may have no entry."""


def zipf_table(size: int, exponent_milli: int) -> Int:
    """[2^20] the rank, from 0, that each of 2^20 equally likely outcomes means: P(rank k) ~ (k+1)^(-exponent)."""
    scaled = log2(np.arange(1, size + 1, dtype=np.int64)) * exponent_milli // 1000
    total = np.cumsum(exp2((27 << FRACTION) - scaled))  # at most 2^16 weights of at most 2^27
    ranks: Int = np.searchsorted(total, np.arange(1 << TABLE_BITS) * total[-1] >> TABLE_BITS, side="right")
    return ranks


def log2(x: Int) -> Int:
    """log2 of integers in [1, 2^31), fixed point, at most 2^-30 too small: one bit per squaring of the mantissa."""
    whole = np.zeros_like(x)
    for bit in (16, 8, 4, 2, 1):
        whole += bit * (x >> (whole + bit) > 0)
    mantissa, fraction = x.astype(np.uint64) << (31 - whole).astype(np.uint64), np.zeros_like(x)
    for _ in range(FRACTION):
        mantissa = mantissa * mantissa >> np.uint64(31)  # in [2^31, 2^33)
        carry = mantissa >> np.uint64(32)
        mantissa >>= carry
        fraction = fraction << 1 | carry.astype(np.int64)
    return whole << FRACTION | fraction


def exp2(x: Int) -> Int:
    """2^x for fixed-point x below 31, rounded down (2^x itself is at most 2^-26 of it too small).

    A product of the roots 2^-1/2, 2^-1/4, 2^-1/8, ...
    """
    whole = -(-x >> FRACTION)
    missing = (whole << FRACTION) - x  # 2^x = 2^whole * 2^-missing, missing in [0, 1)
    result, root = np.full(x.shape, 1 << 32, np.uint64), 1 << 32
    for i in range(1, FRACTION + 1):
        root = math.isqrt(root << 31) if i == 1 else math.isqrt(root << 32)  # 2^32 * 2^-(2^-i)
        taken = (missing >> (FRACTION - i) & 1).astype(np.bool_)
        result = np.where(taken, result * np.uint64(root) >> np.uint64(32), result)
    rounded: Int = (result >> np.clip(32 - whole, 0, 63).astype(np.uint64)).astype(np.int64)
    return rounded

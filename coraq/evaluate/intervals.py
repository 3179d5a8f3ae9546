"""Confidence intervals and tests for counts of right answers: pure functions of integers.

Sources: E. B. Wilson 1927 (score interval); R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10
(difference of paired proportions); Q. McNemar 1947, in its exact binomial form.
"""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(successes: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion, as fractions: all p with |p̂ − p| ≤ z·√(p(1 − p)/count).

    Raises:
        ValueError: unless 0 ≤ successes ≤ count and count ≥ 1.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count}")
    share = successes / count
    spread = 1 + z * z / count
    centre = (share + z * z / (2 * count)) / spread
    half = z / spread * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the interval closes exactly; rounding must not leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == count else min(1.0, centre + half)
    return low, high


def paired_difference(
    both: int, only_first: int, only_second: int, neither: int, z: float = Z95
) -> tuple[float, float]:
    """Newcombe's interval (method 10) of first − second proportion on the same items, as fractions.

    Each proportion's Wilson limits are combined by square-and-add, with their correlation φ shrunk by a
    continuity correction. Unlike Wald's interval it stays in [−1, 1] and has width when no item differs.
    """
    count = both + only_first + only_second + neither
    first, second = both + only_first, both + only_second
    low_first, high_first = wilson(first, count, z)
    low_second, high_second = wilson(second, count, z)
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - count / 2, 0.0)
    margins = first * (count - first) * second * (count - second)
    phi = product / math.sqrt(margins) if margins else 0.0
    down, up = first / count - low_first, high_first - first / count
    other_up, other_down = high_second - second / count, second / count - low_second
    difference = (only_first - only_second) / count
    low = difference - math.sqrt(max(0.0, down * down - 2 * phi * down * other_up + other_up * other_up))
    high = difference + math.sqrt(max(0.0, up * up - 2 * phi * up * other_down + other_down * other_down))
    return low, high


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p value of "items that differ fall either way alike": 2·P(Bin(n, ½) ≤ min), at most 1."""
    total = only_first + only_second
    ways = tail = 1  # C(total, 0)
    for index in range(min(only_first, only_second)):
        ways = ways * (total - index) // (index + 1)  # C(total, index + 1), exactly
        tail += ways
    return min(1.0, 2 * tail / 2**total)  # integers divide with correct rounding however large they are

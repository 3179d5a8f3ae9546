"""Which of many things take part, so that any number of them is spread over all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def spread_out(count: int) -> list[int]:
    """0 … count − 1 in an order of which every beginning is spread over all (bit-reversed, van der Corput)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: int(f"{index:0{bits}b}"[::-1], 2))


def spread_subset(sizes: Sequence[int], images: int) -> list[int]:
    """The fewest micro-batches, spread over all, that hold so many images; all where there are not so many."""
    order = spread_out(len(sizes))
    held = accumulate(sizes[index] for index in order)
    return order[: next((count for count, seen in enumerate(held, 1) if seen >= images), len(order))]

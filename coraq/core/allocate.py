"""Spending a byte budget over layers: each takes one of its own choices, and the sum of losses is to be least.

The relaxation `min Σ loss + λ Σ bytes` is solved exactly for every λ at once: each layer's choices are reduced to
the lower convex hull of (bytes, loss), and all steps along all hulls are taken in order of loss saved for each byte
(Everett 1963; Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Where a step no
longer fits, later, smaller ones are still tried, so no more than one step's bytes are left over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """One way to store a layer, as the budget sees it."""

    size: float  # bytes, or any unit of cost
    loss: float


@dataclass(frozen=True)
class _Step:
    layer: int
    before: int  # index of the choice that the step leaves
    after: int
    size: float
    rate: float  # loss saved for each byte


def lower_hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the choices on the lower convex hull, from the smallest to the one of least loss."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i].size, choices[i].loss))
    hull: list[int] = []
    for index in order:
        size, loss = choices[index]
        if hull and loss >= choices[hull[-1]].loss:
            continue  # dearer and no better
        while hull and choices[hull[-1]].size == size:
            hull.pop()
        while len(hull) >= 2:
            (s0, l0), (s1, l1) = choices[hull[-2]], choices[hull[-1]]
            if (l0 - l1) * (size - s1) > (l1 - loss) * (s1 - s0):
                break
            hull.pop()
        hull.append(index)
    return hull


def allocate(layers: Sequence[Sequence[Choice]], budget: float) -> list[int]:
    """The index of each layer's choice; the sizes' sum is at most `budget`.

    Raises:
        ValueError: a layer has no choice, or even the smallest choices exceed the budget.
    """
    hulls = [lower_hull(choices) for choices in layers]
    if not all(hulls):
        raise ValueError("a layer has no choice")
    taken = [hull[0] for hull in hulls]
    left = budget - sum(layers[i][taken[i]].size for i in range(len(layers)))
    if left < 0:
        raise ValueError(f"the smallest choices exceed the budget by {-left:,.0f}")
    steps = [step for i, hull in enumerate(hulls) for step in _steps(i, layers[i], hull)]
    for step in sorted(steps, key=lambda step: -step.rate):
        if step.size <= left and taken[step.layer] == step.before:
            taken[step.layer] = step.after
            left -= step.size
    return taken


def _steps(layer: int, choices: Sequence[Choice], hull: Sequence[int]) -> list[_Step]:
    steps = []
    for before, after in pairwise(hull):
        size = choices[after].size - choices[before].size
        steps.append(_Step(layer, before, after, size, (choices[before].loss - choices[after].loss) / size))
    return steps

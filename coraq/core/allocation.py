"""Spending a budget over layers or tensors: each takes one of its own options, and the sum of losses is to be least.

The relaxation `min Σ loss + λ Σ bytes` is solved exactly for every λ at once: each layer's choices are reduced to
the lower convex hull of (bytes, loss), and all steps along all hulls are taken in order of loss saved for each byte
(Everett 1963; Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Where a step no
longer fits, later, smaller ones are still tried, so no more than one step's bytes are left over.

That may be many: a classifier of a third of all weights stays a bit below where it should be if its step misses by a
byte. So the layers of the largest steps are also held at each of the choices around, and the best outcome is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

HELD, AROUND = 4, 2  # layers that are held, and steps up and down
BUDGETS = 1.0, 0.995, 0.99, 0.98  # of two costs: shares of the bits that are tried
HALVINGS = 24  # and weights between the two


class LayerOption(NamedTuple):
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


def lower_hull(choices: Sequence[LayerOption]) -> list[int]:
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


def allocate_bits(layers: Sequence[Sequence[LayerOption]], budget: float) -> list[int]:
    """The index of each layer's choice; the sizes' sum is at most `budget`.

    Raises:
        ValueError: a layer has no choice, or even the smallest choices exceed the budget.
    """
    hulls = [lower_hull(choices) for choices in layers]
    if not all(hulls):
        raise ValueError("a layer has no choice")
    steps = [step for i, hull in enumerate(hulls) for step in _steps(i, layers[i], hull)]
    steps.sort(key=lambda step: -step.rate)

    def loss(taken: Sequence[int]) -> float:
        return sum(layers[i][choice].loss for i, choice in enumerate(taken))

    best = _greedy(layers, hulls, steps, budget, {})
    if best is None:
        least = sum(layers[i][hull[0]].size for i, hull in enumerate(hulls))
        raise ValueError(f"the smallest choices exceed the budget by {least - budget:,.0f}")
    largest = {step.layer: step.size for step in sorted(steps, key=lambda step: step.size)}
    for layer in sorted(largest, key=lambda layer: -largest[layer])[:HELD]:
        hull = hulls[layer]
        place = hull.index(best[layer])
        for choice in hull[max(0, place - AROUND) : place + AROUND + 1]:
            other = _greedy(layers, hulls, steps, budget, {layer: choice})
            if other is not None and loss(other) < loss(best):
                best = other
    return best


def allocate_under_costs(
    losses: Mapping[str, Mapping[int, float]], costs: Sequence[Mapping[str, float]], bits: int
) -> tuple[dict[str, int], float]:
    """Bits of little loss, and their loss, that cost no more than `bits` each in any of one or two `costs`.

    Of two costs, a weighted sum is kept to for many weights (Lagrange's method); the best that keeps to both is taken.
    The same bits for all are one of the candidates, so that nothing is lost where there are few tensors to choose for.
    """
    totals = [sum(cost.values()) for cost in costs]
    shares = [{name: cost[name] / total for name in losses} for cost, total in zip(costs, totals, strict=True)]

    def taken(weight: float, budget: float) -> dict[str, int]:
        prices = {name: weight * shares[0][name] + (1 - weight) * shares[-1][name] for name in losses}
        choices = [
            [LayerOption(prices[name] * width, loss) for width, loss in own.items()] for name, own in losses.items()
        ]
        picked = allocate_bits(choices, budget)
        return {name: list(own)[index] for (name, own), index in zip(losses.items(), picked, strict=True)}

    def average(found: Mapping[str, int], share: Mapping[str, float]) -> float:
        return sum(share[name] * width for name, width in found.items())

    def loss(found: Mapping[str, int]) -> float:
        return sum(losses[name][width] for name, width in found.items())

    candidates = [dict.fromkeys(losses, bits)]
    if len(costs) == 1:
        candidates.append(taken(1.0, bits))
    else:
        for budget in BUDGETS:
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                weight = (low + high) / 2
                candidates.append(taken(weight, budget * bits))
                low, high = (weight, high) if average(candidates[-1], shares[0]) > bits else (low, weight)
    best = min((c for c in candidates if all(average(c, share) <= bits + 1e-9 for share in shares)), key=loss)
    return best, loss(best)


def _greedy(
    layers: Sequence[Sequence[LayerOption]],
    hulls: Sequence[Sequence[int]],
    steps: Sequence[_Step],
    budget: float,
    held: Mapping[int, int],
) -> list[int] | None:
    """All steps in order, those of `held` layers (by their number: a choice) left out. None if that does not fit."""
    taken = [held.get(i, hull[0]) for i, hull in enumerate(hulls)]
    left = budget - sum(layers[i][choice].size for i, choice in enumerate(taken))
    if left < 0:
        return None
    for step in steps:
        if step.size <= left and step.layer not in held and taken[step.layer] == step.before:
            taken[step.layer] = step.after
            left -= step.size
    return taken


def _steps(layer: int, choices: Sequence[LayerOption], hull: Sequence[int]) -> list[_Step]:
    steps = []
    for before, after in pairwise(hull):
        size = choices[after].size - choices[before].size
        steps.append(_Step(layer, before, after, size, (choices[before].loss - choices[after].loss) / size))
    return steps

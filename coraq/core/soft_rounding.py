"""Learned rounding (AdaRound's rectified sigmoid, arXiv 2004.10568) and learned activation steps (LSQ, 1902.08153).

A weight's code is one of two neighbours, `floor + h`, h from 0 to 1 while it is learned and 0 or 1 in the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from coraq.core.draws import uniform_like
from coraq.core.fake_quantize import fake_quantize
from coraq.core.grid import Grid
from coraq.core.tensors import ActivationGrid

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to this range and clipped, so that 0 and 1 are reached
EDGE = 0.01  # no rounding variable starts nearer than this to 0 or 1, where it could not move


class SoftRounding:
    """One layer's rounding variables.

    Args:
        weight: float weight [groups, out, in].
        grid: where its levels lie.
        codes: base codes of the same shape, or None for the nearest. The two candidates of each weight are its base
            code and the neighbour towards the float weight.
        trust: 0 starts from the float weight (BRECQ); towards 1, nearer to the base codes.

    Attributes:
        alpha: the variables; h = clip(σ(alpha)·(ζ − γ) + γ, 0, 1).
        floor: the lower candidate of every code.
    """

    def __init__(self, weight: Tensor, grid: Grid, codes: Tensor | None = None, trust: float = 0.0) -> None:
        self.grid = grid
        unit = grid.position(weight)
        base = grid.codes(weight) if codes is None else codes.to(unit.dtype)
        lower = torch.where(unit >= base, base, base - 1) if codes is not None else unit.floor()
        self.floor = lower.clamp(0, grid.top - 1)
        # a base code may lie further from the float weight than its neighbour: the start is between the candidates
        part = (1 - trust) * unit.clamp(base - 1, base + 1) + trust * base - self.floor
        part = part.clamp(EDGE, 1 - EDGE)
        self.alpha = torch.logit((part - GAMMA) / (ZETA - GAMMA)).requires_grad_(True)

    def share(self) -> Tensor:
        """h: how far each weight is on the way from its lower to its upper candidate."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def weight(self) -> Tensor:
        """The soft weight [groups, out, in], differentiable in alpha."""
        return self.grid.values(self.floor + self.share())

    def codes(self) -> Tensor:
        """The final codes: up where alpha ≥ 0."""
        return self.floor + (self.alpha.detach() >= 0).to(self.floor.dtype)

    def undecided(self, beta: float) -> Tensor:
        """The regulariser Σ (1 − |2h − 1|^β)."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()


class LearnedGrid:
    """An activation grid whose step is learned; stands where a grid stands.

    The step is `scale · exp(log_factor)`, so it stays positive; its gradient is scaled by 1/√(elements · levels).

    Args:
        drop: share of the elements that keep their float value in a call (QDrop, arXiv 2203.05740).
        generator: of the draws.
    """

    def __init__(self, grid: ActivationGrid, drop: float = 0.0, generator: torch.Generator | None = None) -> None:
        self.grid, self.drop, self.generator = grid, drop, generator
        self.log_factor = torch.zeros((), requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        step, factors = self.grid.scale * self.log_factor.exp(), self.grid.factors
        scaled = x if factors is None else x * factors
        rounded: Tensor = _LearnedStep.apply(scaled, step, self.grid)
        rounded = rounded if factors is None else rounded / factors
        if not self.drop:
            return rounded
        keep = uniform_like(x, self.generator) < self.drop
        return torch.where(keep, x, rounded)

    def result(self) -> ActivationGrid:
        """The grid with the step as learned, exact in float32."""
        return self.grid.scaled(math.exp(float(self.log_factor.detach())))


class _LearnedStep(torch.autograd.Function):
    """Rounding on a grid: the identity's gradient inside the range for x, LSQ's for the step."""

    @staticmethod
    def forward(context: Any, x: Tensor, step: Tensor, grid: ActivationGrid) -> Tensor:
        values = x.to(step.dtype)  # of half precision where products are
        rounded = fake_quantize(values, float(step), grid.zero_point, grid.low, grid.high).to(x.dtype)
        context.save_for_backward(x, rounded, step)
        context.bounds = grid.low - grid.zero_point, grid.high - grid.zero_point
        return rounded

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, rounded, step = context.saved_tensors
        low, high = context.bounds
        inside = torch.ops.aten.hardtanh_backward(gradient, x, (low - 0.5) * float(step), (high + 0.5) * float(step))
        # step · ∂rounded/∂step is rounded − x inside the range and rounded outside
        slope = (gradient * rounded).addcmul_(inside, x, value=-1).sum() / step
        return inside, slope / math.sqrt(x.numel() * max(high, 1)), None


def squared_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Σ (got − wanted)², float32; differences, and gradients with them, in the type of `got`."""
    total: Tensor = _SquaredError.apply(got, wanted)
    return total


class _SquaredError(torch.autograd.Function):
    """Three visits to an activation, one backward; torch's own takes six where types differ."""

    @staticmethod
    def forward(context: Any, got: Tensor, wanted: Tensor) -> Tensor:
        difference = got - wanted.to(got.dtype)
        context.save_for_backward(difference)
        return torch.linalg.vector_norm(difference.float()).square()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = context.saved_tensors
        return difference * (2 * float(gradient)), None


def beta_at(progress: float, start: float = 20.0, end: float = 2.0) -> float:
    """The regulariser's exponent, falling linearly while `progress` goes from 0 to 1."""
    return end + (start - end) * max(0.0, 1 - progress)

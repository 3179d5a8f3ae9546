"""Codes by a second-order model of a unit's error: coordinate descent that knows what later layers make of a layer.

In one layer's weight, all others fixed, a unit's squared error is nearly `E + ⟨G, δ⟩ + Σ_o S_o · δ_o H δ_oᵀ` (Gauss
and Newton, as in BRECQ's own analysis, arXiv 2102.05426, section 3.1): G its gradient, H the Gram of the layer's
inputs and S_o how strongly the unit's output answers to output channel o. Two things are left out: that a change in
several channels, or in neighbouring positions, may add up or cancel further on. So steps are tried at several
dampings, and measured. Where S is a number for each channel, a row's optimum `δ_o = −G_o H⁻¹ / 2 S_o` is a target for
COMQ's sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coraq.core.columns import divided, gram_for_divided
from coraq.core.gram import Moments, regress, shrunk
from coraq.core.grid import Grid
from coraq.core.rounding import Rounding, descend, prepare, reassess

RIDGE = 1e-2  # of the Gram's mean diagonal, at least, in the Newton step
INSENSITIVE = 1e-3  # no channel counts as less sensitive than this share of the mean: its step would be without bound
SWEEPS, TOLERANCE = 4, 1e-3


@dataclass(frozen=True)
class Expansion:
    """A unit's squared error about one layer's weight, per row (output position) of that layer.

    Attributes:
        gradient: float64 [groups, out, in]. bias_gradient: float64 [groups, out].
        sensitivity: float64 [groups, out], S: sum over the unit's outputs of squared derivatives by the layer's.
        moments: of the layer's inputs.
    """

    gradient: Tensor
    bias_gradient: Tensor
    sensitivity: Tensor
    moments: Moments


@dataclass(frozen=True)
class QuadraticModel:
    """The expansion as a rounding problem; `centred`: the bias takes up what a change does to the mean.

    Attributes:
        gram: float64 [groups, in, in], shrunk.
        step: float64 [groups, out, in], to the model's minimum.
        bias_step: float64 [groups, out], the bias's own.
        mean: float64 [groups, in] where centred.
    """

    gram: Tensor
    step: Tensor
    bias_step: Tensor
    mean: Tensor | None

    @classmethod
    def of(cls, expansion: Expansion, centred: bool) -> QuadraticModel:
        moments, gradient = expansion.moments, expansion.gradient
        mean = moments.mean if centred else None
        gram = moments.gram.clone()
        if mean is not None:
            gram -= mean[:, :, None] * mean[:, None, :]
            gradient = gradient - expansion.bias_gradient[:, :, None] * mean[:, None, :]
        sensitivity = expansion.sensitivity
        sensitivity = sensitivity.clamp(min=max(INSENSITIVE * float(sensitivity.mean()), 1e-30))
        gram.diagonal(dim1=1, dim2=2).clamp_(min=0)
        step = -regress(gradient / (2 * sensitivity[:, :, None]), gram, moments.count, RIDGE)
        bias_step = torch.zeros_like(sensitivity) if mean is None else -expansion.bias_gradient / (2 * sensitivity)
        return cls(shrunk(gram, moments.count), step, bias_step, mean)

    def solve(self, grid: Grid, codes: Tensor, damping: float) -> tuple[Grid, Tensor, Tensor]:
        """Grid (its scale refitted), codes [groups, out, in] and change of the bias [groups, out], one step further.

        Args:
            codes: where the weight stands. damping: the step is divided by it.
        """
        groups, out, _ = codes.shape
        now = grid.values(codes)
        target = (now.double() + self.step / damping).to(now.dtype)
        problem = prepare(divided(target, grid.columns), gram_for_divided(self.gram, grid.columns))
        order = problem.order.unsqueeze(1).expand_as(codes)
        levels = (codes - grid.zero).gather(2, order).mT.contiguous()
        low, high = ((bound - grid.zero).mT.to(now.dtype).contiguous() for bound in (0, grid.top))
        scale = grid.scale.mT.contiguous()
        error = torch.zeros(groups, 1, out, dtype=torch.float64, device=codes.device)
        start = reassess(problem, Rounding(levels, scale, low, high, error, whole=grid.fraction == 0))
        best = descend(problem, start, SWEEPS, tolerance=TOLERANCE)
        moved = torch.empty_like(levels).scatter_(1, order.mT, best.levels).mT
        better = replace(grid, scale=best.scale.mT.contiguous())
        codes = moved + grid.zero
        shift = self.bias_step / damping
        if self.mean is not None:
            shift = shift - torch.einsum("goi,gi->go", (better.values(codes) - now).double(), self.mean)
        return better, codes, shift

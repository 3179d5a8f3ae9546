"""Where an activation's grid lies: from its extremes and a sample of its values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from coraq.core.grid import TINY
from coraq.core.tensors import ActivationGrid

SAMPLE = 1 << 17  # values that a range is chosen on
NORM = 2.4  # power of the error, as BRECQ takes it (arXiv 2102.05426)
SHRINKS = 60
LEAST_SHRINK = 0.03  # two bits on a heavy tail want a range far inside the extremes

Range = Literal["mse", "percentile"]


@dataclass
class RangeSample:
    """Extremes of all values, and some of the values, of a tensor seen micro-batch by micro-batch.

    Args:
        count: micro-batches that will come.
        factors: that the tensor is multiplied by before it is rounded.
    """

    count: int
    factors: Tensor | None = None
    low: float = 0.0
    high: float = 0.0
    _values: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Take in one micro-batch; positions are drawn, the same on every run."""
        x = x if self.factors is None else x * self.factors
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        flat = x.detach().permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 else x.detach().reshape(-1)
        wanted = min(flat.numel(), SAMPLE // self.count + 1)
        generator = torch.Generator().manual_seed(len(self._values))
        index = torch.randint(flat.numel(), (wanted,), generator=generator)
        self._values.append(flat[index.to(flat.device)].float().cpu())

    def grid(self, bits: int, kind: Range = "mse", percentile: float = 99.99) -> ActivationGrid:
        """The grid; unsigned where no value was negative."""
        grid = activation_grid(torch.cat(self._values), self.low, self.high, bits, kind, percentile)
        return replace(grid, factors=self.factors)


def activation_grid(
    values: Tensor, low: float, high: float, bits: int, kind: Range = "mse", percentile: float = 99.99
) -> ActivationGrid:
    """The grid of a tensor with extremes `low` ≤ 0 ≤ `high` and some of its `values` [n].

    "mse": least `Σ |x − round(x)|^2.4` among ranges shrunk from the extremes, both ends apart where there are two.
    "percentile": from the (100 − p)-th to the p-th percentile, within the extremes.
    """
    if kind == "percentile":
        share = percentile / 100
        shares = torch.tensor([1 - share, share], dtype=torch.float64, device=values.device)
        ends = torch.quantile(values.double()[: 1 << 23], shares)
        least = min(0.0, float(ends[0])) if low < 0 else 0.0
        return grid_between(least, max(float(ends[1]), 0.0), bits, low < 0)
    shrinks = torch.logspace(0, torch.log10(torch.tensor(LEAST_SHRINK)).item(), SHRINKS).tolist()

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        losses = [_loss(values, grid_between(a, b, bits, low < 0)) for a, b in candidates]
        return candidates[losses.index(min(losses))]

    if low >= 0:
        return grid_between(*best([(0.0, high * s) for s in shrinks]), bits, False)
    ends_now = best([(low * s, high * s) for s in shrinks])
    for _ in range(2):  # one end at a time
        ends_now = best([ends_now, *((low * s, ends_now[1]) for s in shrinks)])
        ends_now = best([ends_now, *((ends_now[0], high * s) for s in shrinks)])
    return grid_between(*ends_now, bits, True)


def grid_between(low: float, high: float, bits: int, signed: bool) -> ActivationGrid:
    """The grid that covers [low, high], low ≤ 0 ≤ high; zero is exactly on it. An empty range gets the scale 1."""
    scale = float(torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32))
    if scale < TINY:
        return ActivationGrid(1.0, 0, bits, signed)
    bottom = -(2 ** (bits - 1)) if signed else 0
    zero = min(max(bottom + round(-low / scale), bottom), bottom + 2**bits - 1)
    return ActivationGrid(scale, zero, bits, signed)


def _loss(values: Tensor, grid: ActivationGrid) -> float:
    return float(grid.round(values).sub_(values).abs_().pow_(NORM).sum(dtype=torch.float64))

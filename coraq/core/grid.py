"""Quantization grids: where the levels lie, and the nearest level to a weight.

Weights are [groups, out, in]. A grid is `(scale, zero_point)` as in `QTensor`: one per output channel
([groups, out, 1]) or per tensor ([1, 1, 1]); zero_point None means symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coraq.core.columns import divided, multiplied
from coraq.core.tensors import QTensor

TINY = 1e-30  # a range below this is no range: its reciprocal would leave float32
CACHED = 1 << 15  # elements of a strip of channels that the search for a range keeps in cache
SHIFTED_SCALES = (0.8, 0.9, 1.0, 1.1)  # factors on the scale that a moved zero point is tried with


@dataclass(frozen=True)
class Grid:
    """Levels `scale · (k − zero)` for codes `k = 0 … 2**bits − 1`, times `columns` if there are any.

    `zero` is float, a whole number of codes or, with a `fraction`, of `2**−fraction` codes. Then no level need be zero.
    `columns` are factors of the input channels as in `QTensor`.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    symmetric: bool
    fraction: int = 0
    columns: Tensor | None = None

    @classmethod
    def of(cls, stored: QTensor) -> Grid:
        """The grid of uniform codes as stored."""
        symmetric = stored.zero_point is None
        return cls(stored.scale, stored.zero, stored.bits, symmetric, stored.fraction, stored.columns)

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes as floats; a channel whose scale is 0 gets one code everywhere, at the zero point."""
        codes = torch.round(self.position(weight)).clamp_(0, self.top)
        return torch.where(self.scale == 0, self.zero.floor(), codes)

    def position(self, weight: Tensor) -> Tensor:
        """Where a weight lies, in codes that are not rounded."""
        safe = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        return divided(weight, self.columns) / safe + self.zero

    def values(self, codes: Tensor) -> Tensor:
        return multiplied((codes - self.zero) * self.scale, self.columns)

    def round(self, weight: Tensor) -> Tensor:
        """The nearest levels to `weight`."""
        return self.values(self.codes(weight))

    def scaled(self, factor: float) -> Grid:
        """The same codes for weights `factor` times as large."""
        return replace(self, scale=self.scale * factor)

    def shifted(self, by: float) -> Grid:
        """The levels moved by steps (an affine grid's range slides; a symmetric grid stays)."""
        return self if self.symmetric else replace(self, zero=(self.zero + by).clamp(0, self.top))

    def pack(self, codes: Tensor) -> QTensor:
        """A QTensor from integral codes of any dtype."""
        dtype = torch.uint8 if self.bits <= 8 else torch.int32
        zero = None if self.symmetric else (self.zero * 2**self.fraction).to(dtype).contiguous()
        codes = codes.to(dtype).contiguous()
        scale = self.scale.float().contiguous()
        return QTensor(codes, scale, self.bits, zero, fraction=self.fraction, columns=self.columns)


@dataclass(frozen=True)
class Codebook:
    """Levels `scale · table[k]` for codes `k`: any ascending `table` [2**bits] with a zero in it, the same for all."""

    scale: Tensor
    table: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of the nearest levels, int64; a channel whose scale is 0 gets the zero level."""
        safe = torch.where(self.scale == 0, torch.ones_like(self.scale), self.scale)
        unit = torch.where(self.scale == 0, torch.zeros_like(weight), weight / safe)
        return nearest_entries(unit, self.table)

    def values(self, codes: Tensor) -> Tensor:
        return self.table[codes] * self.scale

    def round(self, weight: Tensor) -> Tensor:
        """The nearest levels to `weight`."""
        return self.values(self.codes(weight))

    def scaled(self, factor: float) -> Codebook:
        """The same codes for weights `factor` times as large."""
        return replace(self, scale=self.scale * factor)

    def pack(self, codes: Tensor) -> QTensor:
        """A QTensor from integral codes of any dtype."""
        dtype = torch.uint8 if self.bits <= 8 else torch.int32
        codes = codes.to(dtype).contiguous()
        return QTensor(codes, self.scale.float().contiguous(), self.bits, codebook=self.table.float())


def nearest_entries(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of ascending `table` nearest to each value, int64."""
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2)


def _extremes(weight: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Least and greatest weight per channel or tensor, widened to contain zero."""
    dims = (-1,) if granularity == "channel" else (0, 1, 2)
    low = weight.amin(dims, keepdim=True).clamp(max=0)
    high = weight.amax(dims, keepdim=True).clamp(min=0)
    return low, high


def grid_from_range(low: Tensor, high: Tensor, bits: int, symmetric: bool, fraction: int = 0) -> Grid:
    """The grid that covers [low, high] (low ≤ 0 ≤ high): without a `fraction` the zero level is exactly on it.

    Where the range is empty (a channel of zeros) the scale is 1: every weight there gets the zero level.
    """
    top = 2**bits - 1
    if symmetric:
        # codes −2^(b−1) … 2^(b−1)−1: the positive side has one level fewer and decides
        scale = torch.maximum(-low / 2 ** (bits - 1), high / (2 ** (bits - 1) - 1))
        scale = torch.where(scale < TINY, 1.0, scale)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (high - low) / top
        scale = torch.where(scale < TINY, 1.0, scale)
        zero = torch.round(-low / scale * 2**fraction).div_(2**fraction).clamp_(0, top)
    return Grid(scale, zero, bits, symmetric, 0 if symmetric else fraction)


def minmax_grid(
    weight: Tensor, bits: int, symmetric: bool = True, granularity: str = "channel", fraction: int = 0
) -> Grid:
    """The grid that just holds every weight. `fraction`: bits of a zero point between codes (Scheme.fraction)."""
    return grid_from_range(*_extremes(weight, granularity), bits, symmetric, fraction)


def sigma_grid(
    weight: Tensor,
    bits: int,
    symmetric: bool = True,
    granularity: str = "channel",
    k: float = 5.0,
    fraction: int = 0,
) -> Grid:
    """The grid over μ ± kσ (CoRa, arXiv 2408.00923), within the weights' own extremes."""
    dims = (-1,) if granularity == "channel" else (0, 1, 2)
    low, high = _extremes(weight, granularity)
    mean = weight.mean(dims, keepdim=True)
    deviation = weight.std(dims, keepdim=True, unbiased=False)
    low = torch.maximum(low, mean - k * deviation).clamp(max=0)
    high = torch.minimum(high, mean + k * deviation).clamp(min=0)
    return grid_from_range(low, high, bits, symmetric, fraction)


def mse_grid(
    weight: Tensor,
    bits: int,
    symmetric: bool = True,
    granularity: str = "channel",
    norm: float = 2.0,
    steps: int = 80,
    floor: float = 0.2,
    fraction: int = 0,
) -> Grid:
    """The grid of least `Σ |w − round(w)|^norm` among `steps` shrunk ranges (1 down to `floor` of min-max).

    With a `fraction`, zero points within a step of where the range puts them are tried, too. BRECQ (arXiv 2102.05426)
    uses norm 2.4 and 80 steps.
    """
    widest = minmax_grid(weight, bits, symmetric, granularity, fraction)
    shrinks = torch.linspace(1, floor, steps).tolist()
    if granularity == "tensor":
        found = [_least_error(weight.reshape(1, -1), _some(widest, slice(None)), shrinks, norm)]
    else:
        rows = weight.flatten(0, 1)
        strip = max(1, CACHED // max(1, rows.shape[1]))
        strips = (slice(i, i + strip) for i in range(0, len(rows), strip))
        found = [_least_error(rows[part], _some(widest, part), shrinks, norm) for part in strips]
    scale, zero = (torch.cat([getattr(grid, key) for grid in found]) for key in ("scale", "zero"))
    return replace(widest, scale=scale.reshape(widest.scale.shape), zero=zero.reshape(widest.zero.shape))


def _some(grid: Grid, part: slice) -> Grid:
    """The grid of some channels: scale and zero point [channels, 1]."""
    return replace(grid, scale=grid.scale.flatten(0, 1)[part], zero=grid.zero.flatten(0, 1)[part])


def _least_error(rows: Tensor, widest: Grid, shrinks: list[float], norm: float) -> Grid:
    """The grid of least `Σ |row − round(row)|^norm` for each of rows [rows, in].

    The range's ends say where the zero point lies; between codes, its neighbours are tried, too: a far end would else
    move all levels.
    """
    best, loss = _shrunk(rows, widest, shrinks, norm)
    start = best
    for by in shifts(widest.fraction):
        moved, found = _shrunk(rows, start.shifted(by), SHIFTED_SCALES, norm)
        better = found < loss
        loss = torch.where(better, found, loss)
        scale, zero = (torch.where(better, *pair) for pair in ((moved.scale, best.scale), (moved.zero, best.zero)))
        best = replace(best, scale=scale, zero=zero)
    return best


def shifts(fraction: int) -> list[float]:
    """The ways in which a zero point with such a fraction can move by less than a step."""
    parts = 2**fraction
    return [part / parts for part in range(1 - parts, parts) if part]


def _shrunk(rows: Tensor, widest: Grid, shrinks: Sequence[float], norm: float) -> tuple[Grid, Tensor]:
    """`widest` shrunk to least error by each row [rows, in], and that error [rows, 1]."""
    low, high = -widest.zero, widest.top - widest.zero
    best = torch.full_like(widest.scale, shrinks[0])
    best_loss = torch.full_like(best, float("inf"))
    unit = rows / widest.scale
    for shrink in shrinks:  # in units of the shrunk scale: round, clamp, compare
        steps = unit / shrink
        nearest = steps.sub(low).round_().add_(low) if widest.fraction else steps.round()
        rest = torch.clamp(nearest, low, high).sub_(steps)
        power = rest.square_() if norm == 2 else rest.abs_().pow_(norm)
        loss = power.sum(-1, keepdim=True) * shrink**norm
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, shrink, best)
    return replace(widest, scale=widest.scale * best), best_loss * widest.scale**norm


def best_shrink(
    weight: Tensor,
    bits: int,
    symmetric: bool,
    granularity: str,
    loss: Callable[[Tensor], Tensor],
    steps: int = 80,
    floor: float = 0.2,
    fraction: int = 0,
) -> Grid:
    """Among `steps` ranges shrunk from min-max, the grid of least `loss(rounded weight)`, per channel or tensor.

    `loss` maps the rounded weight [groups, out, in] to the shape of a scale.
    """
    low, high = _extremes(weight, granularity)
    best = grid_from_range(low, high, bits, symmetric, fraction)
    best_loss = loss(best.round(weight))
    for step in range(1, steps):
        shrink = 1 - (1 - floor) * step / (steps - 1)
        grid = grid_from_range(low * shrink, high * shrink, bits, symmetric, fraction)
        now = loss(grid.round(weight))
        better = now < best_loss
        best_loss = torch.where(better, now, best_loss)
        scale = torch.where(better, grid.scale, best.scale)
        best = replace(best, scale=scale, zero=torch.where(better, grid.zero, best.zero))
    return best

"""n-hot powers of two: every level is a sum of at most n signed powers of two, so that a product is n shifts.

One power is the logarithmic grid of INQ (arXiv 1702.03044), two are additive powers of two (APoT, arXiv 1909.13144).
Their training is replaced by what coraq has: a scale per channel searched on the output error, GPTQ's feedback, and
coordinate descent on the same codebook. Without data the scale is that of least weight error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from coraq.api import Field, LayerView, LeastSquares, MethodConfig, QuantizedLayer, Scheme, Task
from coraq.core.grid import Codebook
from coraq.core.rounding import descend, factorise, feedbacks, nearest, pack, prepare, search

DEEPEST = 24  # smallest power is 2**-24 of the largest: sums of four are still exact in float32


class NHotPowersOfTwo:
    """Minimises ‖XW − XQ‖² (‖W − Q‖² without data) over codes and scales, levels being sums of n powers of two."""

    name: ClassVar[str] = "npot"
    summary: ClassVar[str] = "levels are sums of n signed powers of two: multiplication by shifts"
    version: ClassVar[str] = "2"
    needs_data: ClassVar[bool] = False

    class Config(MethodConfig):
        hot: int | None = Field(default=None, ge=1, le=4, description="powers in a sum; empty: one for every two bits")
        candidates: int = Field(default=12, ge=1, description="scales tried per channel")
        sweeps: int = Field(default=4, ge=0, description="visits to every code after GPTQ's rounding (with data)")

        def column_scales(self) -> bool:
            return True

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: Task) -> None:
        for layer in task.layers:
            if task.has_data:
                squares = task.least_squares(layer.name)
            else:  # white inputs: the output error is the weight error
                white = torch.eye(layer.weight.shape[-1]).double().expand(len(layer.weight), -1, -1)
                squares = LeastSquares(layer.weight, white)
            quantized, error = self.solve(layer, squares, task.scheme, task.has_data)
            task.commit(layer.name, quantized, error=error)

    def solve(
        self, layer: LayerView, squares: LeastSquares, scheme: Scheme, feed_back: bool
    ) -> tuple[QuantizedLayer, float]:
        """Codes and scales for a layer, and the relative error."""
        columns = layer.columns(scheme)
        squares = squares.scaled(columns)
        weight, gram = squares.weight, squares.gram
        table = powers_of_two(layer.bits, self.config.hot or max(1, min(4, layer.bits // 2)))
        dims = (-1,) if scheme.granularity == "channel" else (0, 1, 2)
        widest = weight.abs().amax(dims, keepdim=True) / table.abs().max()
        factors = torch.linspace(1.0, 0.35, self.config.candidates).tolist()
        grids = [Codebook(widest * factor, table, layer.bits) for factor in factors]
        problem = prepare(weight, gram)
        if feed_back:
            factor = factorise(problem, gram)
            best = search(problem, feedbacks(problem, factor, grids))
            best = descend(problem, best, self.config.sweeps, tolerance=1e-3)
        else:
            best = search(problem, (nearest(problem, grid) for grid in grids))
        error = float(best.error.sum()) / max(float(problem.energy().sum()), 1e-30)
        return QuantizedLayer(replace(pack(problem, best, grids[0]), columns=columns)), error


@cache
def powers_of_two(bits: int, hot: int) -> Tensor:
    """2**bits ascending levels, float32, each a sum of at most `hot` signed powers of two; zero is among them.

    All sums over as many powers as give no more than 2**bits levels; the places left over go to the sums with one
    power more that are farthest from the rest. (Past 2**-24 the last level is repeated: one power cannot fill 8 bits.)
    """
    size, deep = 2**bits, 0
    while deep < DEEPEST and len(_sums(deep + 1, hot)) <= size:
        deep += 1
    levels = [2 * level for level in _sums(deep, hot)]  # in units of the next smaller power, 2**-(deep + 1)
    spare = set(_sums(deep + 1, hot)) - set(levels)
    while len(levels) < size and spare:
        found = max(spare, key=lambda new: (min(abs(new - old) for old in levels), -abs(new), -new))
        levels.append(found)
        spare.remove(found)
    levels = sorted(levels) + [max(levels)] * (size - len(levels))
    return torch.tensor(levels, dtype=torch.float64).mul(0.5 ** (deep + 1)).float()


def _sums(deep: int, hot: int) -> list[int]:
    """All sums of at most `hot` terms from ±2**0 … ±2**deep (that is, the powers 1 … 2**-deep, times 2**deep)."""
    terms = [sign * 2**exponent for exponent in range(deep + 1) for sign in (-1, 1)]
    sums = {0}
    for _ in range(hot):
        sums |= {total + term for total in sums for term in terms}
    return sorted(sums)


METHODS = [NHotPowersOfTwo]

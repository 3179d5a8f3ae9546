"""n-hot powers of two: every level is a sum of at most n signed powers of two, so that a product is n shifts.

One power is the logarithmic grid of INQ (arXiv 1702.03044), two are additive powers of two (APoT, arXiv 1909.13144).
Their training is replaced by what coraq has: a scale per channel searched on the output error, GPTQ's feedback, and
coordinate descent on the same codebook. Without data the scale is that of least weight error.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from coraq.api import Codebook, Field, LayerMethod, LayerProblem, MethodConfig, QuantizedLayer
from coraq.core.rounding import descend, factorise, feedbacks, nearest, pack, prepare, search

DEEPEST = 24  # smallest power is 2**-24 of the largest: sums of four are still exact in float32


class NHotPowersOfTwo(LayerMethod):
    """Minimises ‖XW − XQ‖² (‖W − Q‖² without data) over codes and scales, levels being sums of n powers of two."""

    name: ClassVar[str] = "npot"
    summary: ClassVar[str] = "levels are sums of n signed powers of two: multiplication by shifts"
    version: ClassVar[str] = "2"
    needs_data: ClassVar[bool] = False

    class Config(MethodConfig):
        hot: int | None = Field(default=None, ge=1, le=4, description="powers in a sum; empty: one for every two bits")
        candidates: int = Field(default=12, ge=1, description="scales tried per channel")
        sweeps: int = Field(default=4, ge=0, description="visits to every code after GPTQ's rounding (with data)")

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        squares, spec = problem.least_squares, problem.grid_spec
        table = powers_of_two(spec.bits, self.config.hot or max(1, min(4, spec.bits // 2)))
        dims = (-1,) if spec.granularity == "channel" else (0, 1, 2)
        widest = squares.weight.abs().amax(dims, keepdim=True) / table.abs().max()
        factors = torch.linspace(1.0, 0.35, self.config.candidates).tolist()
        grids = [Codebook(widest * factor, table, spec.bits) for factor in factors]
        rounding = prepare(squares.weight, squares.gram)
        if problem.has_inputs:
            factor = factorise(rounding, squares.gram)
            best = search(rounding, feedbacks(rounding, factor, grids))
            best = descend(rounding, best, self.config.sweeps, tolerance=1e-3)
        else:
            best = search(rounding, (nearest(rounding, grid) for grid in grids))
        error = float(best.error.sum()) / max(float(rounding.energy().sum()), 1e-30)
        return QuantizedLayer(pack(rounding, best, grids[0]), metrics={"error": error})


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

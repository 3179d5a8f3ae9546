"""GPTQ (arXiv 2210.17323): round input by input, each rounding error fed to the inputs still to come.

The paper's form: a min-max grid per channel, 1 % of the mean diagonal added to the Gram, inputs by falling H_ii
(the authors' activation order). Beyond it, channels that nearest rounding serves better get that (`-o guard=false`
leaves them). `-o grid=mse` is their option for a range of least weight error.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from coraq.api import Field, LayerMethod, LayerProblem, MethodConfig, QuantizedLayer
from coraq.core.rounding import Order, factorise, feedback, nearest, pack, prepare, reassess


class GPTQ(LayerMethod):
    """Minimises ‖XW − XQ‖² over codes, greedily in one pass (Babai's nearest plane), on a fixed grid."""

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "column-wise rounding with error feedback (OBQ / GPTQ)"
    version: ClassVar[str] = "3"
    needs_data: ClassVar[bool] = True

    class Config(MethodConfig):
        grid: Literal["minmax", "mse"] = Field(
            default="minmax", description="range of each channel: the weights' extremes, or least weight error"
        )
        act_order: bool = Field(default=True, description="visit inputs by falling energy instead of as they come")
        damping: float = Field(default=0.01, ge=0, description="share of the mean diagonal added to the Gram")
        guard: bool = Field(
            default=True, description="take nearest rounding for channels where it is better (not in the paper)"
        )

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        squares, spec = problem.least_squares, problem.grid_spec
        order: Order = "curvature" if self.config.act_order else "cyclic"
        grid = spec.mse(squares.weight) if self.config.grid == "mse" else spec.minmax(squares.weight)
        rounding = prepare(squares.weight, squares.gram, order)
        factor = factorise(rounding, squares.gram, self.config.damping)
        result = reassess(rounding, feedback(rounding, factor, grid))
        if self.config.guard:  # greedy rounding has no bound on ill-conditioned Grams
            result = result.better(nearest(rounding, grid))
        error = float(result.error.sum()) / max(float(rounding.energy().sum()), 1e-30)
        metrics = {"error": error, "damping": float(factor.damping.max())}
        return QuantizedLayer(pack(rounding, result, grid), metrics=metrics)


METHODS = [GPTQ]

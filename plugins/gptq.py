"""GPTQ (arXiv 2210.17323): round input by input, each rounding error fed to the inputs still to come.

The paper's form: a min-max grid per channel, 1 % of the mean diagonal added to the Gram, inputs by falling H_ii
(the authors' activation order). Beyond it, channels that nearest rounding serves better get that (`-o guard=false`
leaves them). `-o grid=mse` is their option for a range of least weight error.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from coraq.api import Field, MethodConfig, QuantizedLayer, Task, minmax_grid, mse_grid
from coraq.core.rounding import Order, factorise, feedback, nearest, pack, prepare, reassess


class GPTQ:
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

        def column_scales(self) -> bool:
            return True

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: Task) -> None:
        scheme = task.scheme
        order: Order = "curvature" if self.config.act_order else "cyclic"
        make = mse_grid if self.config.grid == "mse" else minmax_grid
        for layer in task.layers:
            squares = task.least_squares(layer.name)
            columns = layer.columns(scheme)
            squares = squares.scaled(columns)
            fraction = scheme.fraction(layer.bits, searched=self.config.grid == "mse")
            grid = make(squares.weight, layer.bits, scheme.symmetric, scheme.granularity, fraction=fraction)
            problem = prepare(squares.weight, squares.gram, order)
            factor = factorise(problem, squares.gram, self.config.damping)
            result = reassess(problem, feedback(problem, factor, grid))
            if self.config.guard:  # greedy rounding has no bound on ill-conditioned Grams
                result = result.better(nearest(problem, grid))
            metrics = {
                "error": float(result.error.sum()) / max(float(problem.energy().sum()), 1e-30),
                "damping": float(factor.damping.max()),
            }
            task.commit(layer.name, QuantizedLayer(replace(pack(problem, result, grid), columns=columns)), **metrics)


METHODS = [GPTQ]

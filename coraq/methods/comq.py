"""COMQ (arXiv 2403.07134): least output error by coordinate descent over codes and scales, from the Gram alone.

The paper's form is `-o preset=paper`: min-max ranges, codes starting from the unrounded weights as in the authors'
released routine, sweeps of one coordinate at a time, scales in closed form between them (in the paper; the released
routine keeps them). The default differs where measurement says so: the range of every channel is searched on the
output error, with GPTQ's rounding on each range tried, and the best of them is where the descent starts; and a layer
undoes half of what earlier ones lost (`correction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from coraq.api import Field, Grid, LayerMethod, LayerProblem, LeastSquares, MethodConfig, QuantizedLayer
from coraq.core.grid import SHIFTED_SCALES, shifts
from coraq.core.rounding import Problem, Rounding, descend, factorise, feedbacks, nearest, pack, prepare, search

PAPER = {
    "grid": "minmax",
    "initial_codes": "float",
    "order": "cyclic",
    "sweeps": 3,
    "tolerance": 0.0,
    "guard": False,
    "correction": 0.0,
    "shrinkage": 0.0,
}
SPAN = (1.25, 0.65)  # scales tried, as shares of that of least weight error: wider gained nothing
FEW_INPUTS = 64  # up to here (depthwise layers) a range costs nothing to try, and four times as many are


class COMQ(LayerMethod):
    """Minimises ‖XW − XQ‖² of each layer over codes and scales, to a local optimum."""

    name: ClassVar[str] = "comq"
    summary: ClassVar[str] = "coordinate descent over codes and scales on each layer's output error"
    version: ClassVar[str] = "5"
    needs_data: ClassVar[bool] = True

    class Config(MethodConfig):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
        renamed: ClassVar[Mapping[str, str]] = {"start": "initial_codes"}

        preset: Literal["default", "paper"] = Field(
            default="default", description="what the other options default to: coraq's choice, or the paper's"
        )
        grid: Literal["search", "mse", "minmax"] = Field(
            default="search",
            description="range of each channel: searched on the output error, least weight error, or the extremes",
        )
        candidates: int = Field(
            default=9, ge=1, description="search: number of ranges tried, four times as many where inputs are few"
        )
        initial_codes: Literal["gptq", "nearest", "float"] = Field(
            default="gptq",
            description="codes before the first sweep: GPTQ's, the nearest, or unrounded (first sweep only)",
        )
        sweeps: int = Field(default=4, ge=0, description="at most so many visits to every code")
        scales: bool = Field(default=True, description="refit the scales in closed form between sweeps")
        order: Literal["common", "cyclic", "greedy"] = Field(
            default="common",
            description="order of a sweep: by ‖x‖·mean|w| for all channels at once, as they come, or by ‖x‖·|w| "
            "channel by channel (the paper's greedy order; slow)",
        )
        correction: float = Field(
            default=0.5,
            ge=0,
            le=1,
            description="share of the earlier layers' errors that a layer's target undoes: 0 matches the layer's own "
            "outputs with float weights (the paper), 1 the float network's as nearly as the inputs allow",
        )
        shrinkage: float = Field(
            default=1.0,
            ge=0,
            description="what is added to the Gram's diagonal, in units of its mean times inputs over rows: few images "
            "say little of many inputs",
        )
        damping: float = Field(default=0.01, ge=0, description="gptq: share of the mean diagonal added to the Gram")
        tolerance: float = Field(default=1e-3, ge=0, lt=1, description="stop when a sweep gains less than this share")
        guard: bool = Field(default=True, description="take nearest rounding for channels where it is better")

        def column_scales(self) -> bool:
            return self.preset == "default"

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        """Codes and scales for one layer; its output errors are relative to the output's energy, by the shrunk Gram."""
        config, spec = self.config, problem.grid_spec
        squares = problem.least_squares.shrunk(config.shrinkage)
        if config.grid == "minmax":
            spec = replace(spec, fraction=spec.minmax_fraction)
        rounding = prepare(
            squares.weight, squares.gram, "common" if config.order == "common" else "cyclic", rows=squares.rows
        )
        by_weight = spec.mse(squares.weight)
        baseline = nearest(rounding, by_weight)
        grid = spec.minmax(squares.weight) if config.grid == "minmax" else by_weight
        best = descend(
            rounding,
            self._start(rounding, squares, grid),
            config.sweeps,
            scales=config.scales,
            greedy=config.order == "greedy",
            from_float=config.initial_codes == "float",
            tolerance=config.tolerance,
        )
        if config.guard:
            best = best.better(baseline)
        energy = max(float(rounding.energy().sum()), 1e-30)
        metrics = {"error": float(best.error.sum()) / energy, "rtn_error": float(baseline.error.sum()) / energy}
        return QuantizedLayer(pack(rounding, best, grid), metrics=metrics)

    def _start(self, problem: Problem, squares: LeastSquares, grid: Grid) -> Rounding:
        """Where the descent begins: the best of the candidate ranges, each rounded as `initial_codes` says."""
        config = self.config
        if config.initial_codes != "gptq":
            return search(problem, (nearest(problem, grid) for grid in self._grids(grid, problem)))
        factor = factorise(problem, squares.gram, config.damping)
        return search(problem, feedbacks(problem, factor, self._grids(grid, problem)))

    def _grids(self, grid: Grid, problem: Problem) -> list[Grid]:
        """The ranges to try; on an affine grid also with the zero point up to one step up and down."""
        count = self.config.candidates
        if self.config.grid != "search" or count == 1:
            return [grid]
        if problem.weight.shape[1] <= FEW_INPUTS:
            count *= 4
        high, low = SPAN
        ranges = [grid.scaled(high + (low - high) * i / (count - 1)) for i in range(count)]
        if not grid.symmetric:
            ranges += [grid.shifted(by).scaled(factor) for by in (-1, 1) for factor in (0.9, 1.0, 1.1)]
            ranges += [grid.shifted(by).scaled(factor) for by in shifts(grid.fraction) for factor in SHIFTED_SCALES]
        return ranges

"""Nearest rounding: each weight goes to the nearest level, no data needed. The baseline that all others must beat."""

from __future__ import annotations

from typing import ClassVar, Literal

from coraq.api import Field, Grid, LayerMethod, LayerProblem, MethodConfig, QuantizedLayer


class RoundToNearest(LayerMethod):
    """Minimises the weight error |w − q| over codes, exactly, on a grid whose range `clip` decides."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "nearest rounding, range by min-max, least squared error, or standard deviations"
    version: ClassVar[str] = "2"
    needs_data: ClassVar[bool] = False

    class Config(MethodConfig):
        clip: Literal["mse", "minmax", "sigma"] = Field(
            default="mse",
            description="range of the grid: least weight error (mse), the weights' extremes (minmax), or mean ± k "
            "standard deviations (sigma, as in CoRa)",
        )
        norm: float = Field(default=2.0, gt=0, le=8, description="mse: power of the error (BRECQ uses 2.4)")
        steps: int = Field(default=80, ge=1, description="mse: number of ranges tried")
        k: float = Field(default=5.0, gt=0, description="sigma: standard deviations on either side of the mean")

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        grid = self._grid(problem)
        return QuantizedLayer(grid.pack(grid.codes(problem.weight)))

    def _grid(self, problem: LayerProblem) -> Grid:
        config, spec = self.config, problem.grid_spec
        if config.clip == "minmax":
            return spec.minmax(problem.weight)
        if config.clip == "sigma":
            return spec.sigma(problem.weight, config.k)
        return spec.mse(problem.weight, config.norm, config.steps)

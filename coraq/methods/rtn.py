"""Nearest rounding: each weight goes to the nearest level, no data needed. The baseline that all others must beat."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor

from coraq.api import (
    Field,
    Grid,
    MethodConfig,
    QuantizedLayer,
    Scheme,
    Task,
    divided,
    minmax_grid,
    mse_grid,
    sigma_grid,
)


class RoundToNearest:
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

        def column_scales(self) -> bool:
            return True

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: Task) -> None:
        for layer in task.layers:
            columns = layer.columns(task.scheme)
            grid = replace(self.grid(divided(layer.weight, columns), layer.bits, task.scheme), columns=columns)
            task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))

    def grid(self, weight: Tensor, bits: int, scheme: Scheme) -> Grid:
        """The grid for a weight [groups, out, in]."""
        config = self.config
        fraction = scheme.fraction(bits, searched=config.clip == "mse")
        if config.clip == "minmax":
            return minmax_grid(weight, bits, scheme.symmetric, scheme.granularity, fraction)
        if config.clip == "sigma":
            return sigma_grid(weight, bits, scheme.symmetric, scheme.granularity, config.k, fraction)
        norm, steps = config.norm, config.steps
        return mse_grid(weight, bits, scheme.symmetric, scheme.granularity, norm, steps, fraction=fraction)

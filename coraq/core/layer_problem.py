"""What a method of scope `layer` is given: one layer's weight to be rounded, and the grid that it may be rounded on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

from torch import Tensor

from coraq.core.columns import divided
from coraq.core.grid import Grid, minmax_grid, mse_grid, sigma_grid
from coraq.core.least_squares import LeastSquares
from coraq.core.tensors import QuantizedLayer

Granularity = Literal["channel", "tensor"]


@dataclass(frozen=True)
class GridSpec:
    """What the grid of a layer's weight must be like.

    Attributes:
        bits: of a code.
        symmetric: the zero point is the middle code.
        granularity: one scale for each output channel, or one for the whole weight.
        fraction: bits of the zero point behind the binary point, for a grid whose range is searched for least error.
        minmax_fraction: the same for a grid whose range is given by the weights' extremes.
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = "channel"
    fraction: int = 0
    minmax_fraction: int = 0

    def minmax(self, weight: Tensor) -> Grid:
        """The grid that just holds every weight of [groups, out, in]."""
        return minmax_grid(weight, self.bits, self.symmetric, self.granularity, self.minmax_fraction)

    def mse(self, weight: Tensor, norm: float = 2.0, steps: int = 80) -> Grid:
        """The grid of least `Σ |w − round(w)|^norm` among so many ranges (BRECQ, arXiv 2102.05426)."""
        return mse_grid(weight, self.bits, self.symmetric, self.granularity, norm, steps, fraction=self.fraction)

    def sigma(self, weight: Tensor, k: float = 5.0) -> Grid:
        """The grid over μ ± kσ (CoRa, arXiv 2408.00923)."""
        return sigma_grid(weight, self.bits, self.symmetric, self.granularity, k, self.minmax_fraction)


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be rounded: `min over Q of Σ_g tr[(W_g − Q_g) H_g (W_g − Q_g)ᵀ]`, Q on a grid.

    Where the scheme has column scales they are applied already: weights are divided and inputs multiplied by them, and
    `restore` puts them into the result.

    Attributes:
        name: of the layer.
        weight: the float weight, float32 [groups, out, in].
        grid_spec: what the grid must be like.
        columns: the column scales, float32 [groups, 1, channels], or None.
        has_inputs: whether anything is known of the layer's inputs: whether there are calibration images.
        pose: makes the least-squares problem of the undivided weight.
    """

    name: str
    weight: Tensor
    grid_spec: GridSpec
    columns: Tensor | None
    has_inputs: bool
    pose: Callable[[], LeastSquares]

    @classmethod
    def of(
        cls,
        name: str,
        weight: Tensor,
        grid_spec: GridSpec,
        columns: Tensor | None = None,
        pose: Callable[[], LeastSquares] | None = None,
    ) -> LayerProblem:
        """The problem of a float weight [groups, out, in] that is not yet divided by its column scales.

        Args:
            pose: makes the least-squares problem from the layer's inputs; None where nothing is known of them.
        """
        white = partial(LeastSquares.of_weight, weight)
        return cls(name, divided(weight, columns), grid_spec, columns, pose is not None, pose or white)

    @cached_property
    def least_squares(self) -> LeastSquares:
        """The problem under the Gram of the layer's inputs; under the weight error where nothing is known of them."""
        return self.pose().scaled(self.columns)

    def restore(self, layer: QuantizedLayer) -> QuantizedLayer:
        """A result for the problem as a result for the layer: with its column scales."""
        if self.columns is None:
            return layer
        return replace(layer, weight=replace(layer.weight, columns=self.columns))

"""What is done with a layer while the engine stands at it: its problem is posed, its result corrected and installed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coraq.calibration.lockstep import LayerInputs
from coraq.calibration.statistics import LayerStats, LeastSquares, spread
from coraq.config import Scheme
from coraq.core.gram import regress
from coraq.core.tensors import QuantizedLayer
from coraq.errors import OVERFLOW_HINT, CoraqError
from coraq.network.layers import LayerView, install

ROWS_PER_INPUT = 64
MOST_GAIN = 2.0  # factor on a channel's scale that matches its variance; more would be a channel beyond repair


class LayerSolver:
    """A network, or a unit of one, whose layers are quantized one after another.

    Args:
        scheme: what every layer gets.
        views: the layers in execution order.
        clock: where seconds are added up, by activity.
        rows_per_input: patches for every input of a layer that second moments are estimated from (0: all).
    """

    def __init__(
        self,
        scheme: Scheme,
        views: dict[str, LayerView],
        clock: dict[str, float],
        rows_per_input: int = ROWS_PER_INPUT,
    ) -> None:
        self.scheme = scheme
        self.clock = clock
        self._views = views
        self.rows_per_input = rows_per_input
        self._squares: dict[float, LeastSquares] = {}  # of the layer that the engine stands at, by correction
        self._outputs: list[Tensor] | None = None  # of the last corrected layer, if known
        self._blocks: dict[str, int] = {}  # of each layer whose Gram is taken in several

    @property
    def has_data(self) -> bool:
        raise NotImplementedError

    def stats(self, name: str) -> LayerStats:
        raise NotImplementedError

    def note(self, message: str) -> None:
        raise NotImplementedError

    def _module(self, name: str) -> nn.Module:
        """The layer in the network being quantized."""
        raise NotImplementedError

    def _view(self, name: str) -> LayerView:
        return self._views[name]

    def _stats_at(self, layer_inputs: LayerInputs, name: str) -> LayerStats:
        """Statistics of the layer that the engine has arrived at."""
        blocks = partial(self._in_blocks, name)
        module: Any = self._module(name)
        return LayerStats(module, self._views[name].weight, layer_inputs, self.clock, self.rows_per_input, blocks)

    def _in_blocks(self, name: str, blocks: int) -> None:
        """A layer's Gram is taken in blocks: say so, once."""
        if name not in self._blocks:
            inputs = self._view(name).weight.shape[2]
            self.note(
                f"layer {name} has {inputs:,} inputs: its Gram is taken in {blocks} blocks of them, without the "
                "correlations between blocks"
            )
        self._blocks[name] = blocks

    @torch.no_grad()
    def least_squares(self, name: str, correction: float = 0.5) -> LeastSquares:
        """See `coraq.api.Task.least_squares`. The regression is damped: see `regress`."""
        stats = self.stats(name)
        if correction not in self._squares:  # a method and the base that it asks for codes pose the same problem
            self._squares[correction] = self._pose(name, stats, correction)
        return self._squares[correction]

    def _pose(self, name: str, stats: LayerStats, correction: float) -> LeastSquares:
        weight, centred = self._view(name).weight, self.scheme.bias != "keep"
        # the mismatch before the Gram: it takes that along on its visit
        mismatch = correction * stats.input_mismatch_moment(weight, centred) if correction else None
        gram = stats.covariance if centred else stats.gram
        self._check_finite(name, gram, *(() if mismatch is None else (mismatch,)))
        squares = LeastSquares(weight, gram, stats.rows(centred), stats.count)
        if mismatch is None:
            return squares
        # W C (H + λ)⁻¹ written as a change of W, so that strong damping leads back to W
        change = squares.join(regress(mismatch, gram, stats.input_mismatch_rows))
        return replace(squares, weight=(weight.double() + change).float())

    def apply_corrections(self, view: LayerView, layer: QuantizedLayer) -> QuantizedLayer:
        """The layer with gain and bias as the scheme says, now in the network being quantized."""
        self._outputs = None
        if layer.bias is None and self.has_data:
            layer = self._gain(view, layer)
        layer = replace(layer, bias=self._bias(view, layer))
        self._check_finite(view.name, layer.weight.scale, *(() if layer.bias is None else (layer.bias,)))
        self._put(view.name, layer)
        return layer

    def _gain(self, view: LayerView, layer: QuantizedLayer) -> QuantizedLayer:
        """The layer with its scales such that every output channel varies as in the float network.

        Codes of least squared error shrink what they stand for, as any regression does, and the shrinkage compounds
        from layer to layer. Re-estimating BatchNorm's variances would undo it; here the norm is folded, and the
        channel's scale takes the factor, at no cost in bytes.
        """
        if self.scheme.gain == "keep" or self.scheme.granularity == "tensor" or layer.weight.scale.numel() == 1:
            return layer
        stats = self.stats(view.name)
        outputs = stats.outputs(layer.dequantize())
        wanted, found = stats.wanted_spread.variance, spread(outputs).variance
        alive = (wanted > 0) & (found > 0) & torch.isfinite(wanted) & torch.isfinite(found)
        ratio = torch.where(alive, wanted / torch.where(alive, found, 1.0), 1.0)
        factor = ratio.sqrt().clamp(1 / MOST_GAIN, MOST_GAIN).float()
        self._outputs = [piece.mul_(factor) for piece in outputs]
        return layer.scaled(factor.reshape(*view.shape[:2], 1))

    def _bias(self, view: LayerView, layer: QuantizedLayer) -> Tensor | None:
        """The committed bias: the method's own, or the one that makes the mean output right."""
        if layer.bias is not None or self.scheme.bias == "keep" or not self.has_data:
            return layer.bias if layer.bias is not None else view.bias
        stats = self.stats(view.name)
        weight, effective = view.weight.double(), layer.dequantize().double()
        mean = stats.mean
        wanted = stats.teacher_mean if self.scheme.bias == "float" else mean
        shift = torch.einsum("goi,gi->go", weight, wanted) - torch.einsum("goi,gi->go", effective, mean)
        bias = shift.reshape(-1) if view.bias is None else view.bias.double() + shift.reshape(-1)
        return bias.float()

    @torch.no_grad()
    def _put(self, name: str, layer: QuantizedLayer) -> None:
        device = self._view(name).weight.device
        bias = None if layer.bias is None else layer.bias.to(device)
        install(self._module(name), layer.dequantize().to(device), bias)

    def _check_finite(self, name: str, *values: Tensor) -> None:
        """Raise if what was measured of a layer's inputs or outputs overflowed: no method can work on that."""
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise CoraqError(
                f"the inputs or outputs of {name} are not finite, or too large for their squares to be",
                OVERFLOW_HINT,
            )

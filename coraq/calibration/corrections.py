"""What every committed layer gets: its scales and its bias corrected as the scheme says."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from coraq.calibration.layer_pass import LayerPass, check_finite
from coraq.calibration.statistics import LayerStats, spread
from coraq.config import Scheme
from coraq.core.tensors import QuantizedLayer
from coraq.network.layers import LayerView, install

MOST_GAIN = 2.0  # factor on a channel's scale that matches its variance; more would be a channel beyond repair


class Corrected(NamedTuple):
    """A layer with its corrections, and its outputs on `LayerStats.paired` where they are known, without bias."""

    layer: QuantizedLayer
    outputs: list[Tensor] | None


@torch.no_grad()
def apply_corrections(layer_pass: LayerPass, scheme: Scheme, view: LayerView, layer: QuantizedLayer) -> Corrected:
    """Correct a layer's scales and bias as the scheme says, and install it in what is being quantized.

    Raises:
        CoraqError: the layer's inputs or outputs overflow.
    """
    outputs: list[Tensor] | None = None
    known = layer_pass.has_data
    if layer.bias is None and known and _has_scale_correction(scheme, layer):
        layer, outputs = correct_scale(layer, view, layer_pass.stats(view.name))
    layer = replace(layer, weight=layer.weight.with_stored_scale())
    if layer.bias is None:
        corrected = known and scheme.corrections.bias != "off"
        bias = correct_bias(layer, view, layer_pass.stats(view.name), scheme) if corrected else view.bias
        layer = replace(layer, bias=bias)
    check_finite(view.name, layer.weight.scale, *(() if layer.bias is None else (layer.bias,)))
    device = view.weight.device
    install(
        layer_pass.module(view.name),
        layer.dequantize().to(device),
        None if layer.bias is None else layer.bias.to(device),
    )
    return Corrected(layer, outputs)


def _has_scale_correction(scheme: Scheme, layer: QuantizedLayer) -> bool:
    return (
        scheme.corrections.scale != "off" and scheme.weights.granularity != "tensor" and layer.weight.scale.numel() > 1
    )


def correct_scale(layer: QuantizedLayer, view: LayerView, stats: LayerStats) -> Corrected:
    """The layer with its scales such that every output channel varies as in the float network.

    Codes of least squared error shrink what they stand for, as any regression does, and the shrinkage compounds
    from layer to layer. Re-estimating BatchNorm's variances would undo it; here the norm is folded, and the
    channel's scale takes the factor, at no cost in bytes.
    """
    outputs = stats.outputs(layer.dequantize())
    wanted, found = stats.wanted_spread.variance, spread(outputs).variance
    alive = (wanted > 0) & (found > 0) & torch.isfinite(wanted) & torch.isfinite(found)
    ratio = torch.where(alive, wanted / torch.where(alive, found, 1.0), 1.0)
    factor = ratio.sqrt().clamp(1 / MOST_GAIN, MOST_GAIN).float()
    return Corrected(layer.scaled(factor.reshape(*view.shape[:2], 1)), [piece.mul_(factor) for piece in outputs])


def correct_bias(layer: QuantizedLayer, view: LayerView, stats: LayerStats, scheme: Scheme) -> Tensor:
    """The bias, float32 [groups · out], that makes the layer's mean output what the scheme says."""
    weight, effective = view.weight.double(), layer.dequantize().double()
    mean = stats.mean
    wanted = stats.teacher_mean if scheme.corrections.bias == "network" else mean
    shift = torch.einsum("goi,gi->go", weight, wanted) - torch.einsum("goi,gi->go", effective, mean)
    bias = shift.reshape(-1) if view.bias is None else view.bias.double() + shift.reshape(-1)
    return bias.float()

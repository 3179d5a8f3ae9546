"""What each layer's rounding costs the whole network: what bits and ranks are allocated by.

A first pass goes through the network on a base method's codes. Nearest rounding would tell without a pass, but not how
layers compare: a better method's codes leave a twenty-fifth of its error for a depthwise layer, and a half for a
classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coraq.calibration.statistics import LayerStats
from coraq.config import Scheme
from coraq.core.least_squares import LeastSquares
from coraq.core.sensitivity import kl_of_errors, kl_of_errors_by_channel
from coraq.core.tensors import QuantizedLayer
from coraq.errors import OVERFLOW_HINT, CoraqError
from coraq.network.layers import LayerView

EIGHT_BITS = 8  # at which a layer's KL is taken where fewer bits say too little, and the most that a layer may get
FISHER_IMAGES = 128
CHANNEL_FISHER_IMAGES = 64  # for single channels, whose costs are blended with their layer's
MEASURED_IMAGES = 256  # of the first pass


@dataclass(frozen=True)
class MeasuredLayer:
    """What the first pass shows of a layer. It holds the layer's statistics: keep only what is needed of it.

    Attributes:
        squares: the layer's problem.
        stats: of the layer's inputs.
        codes: the base's.
        installed: the same with scales and bias corrected.
        error: what codes of `error_bits` leave of the weight, [groups, out, in]: what the layer's KL is taken from.
    """

    layer: LayerView
    squares: LeastSquares
    stats: LayerStats
    codes: QuantizedLayer
    installed: QuantizedLayer
    error: Tensor
    error_bits: int


def measure_layers(
    task: Any, codes_of: Callable[[LayerView], QuantizedLayer], correction: float = 0.5
) -> Iterator[MeasuredLayer]:
    """The whole network on a base's codes, layer by layer, on some of the images; nothing is committed.

    A layer of one row an image (a classifier, a squeeze-excite layer) is judged by nearest rounding at 8 bits: the
    base's codes are fitted to these very rows, fewer of them than the layer has inputs, and say next to nothing of
    others.

    Args:
        task: a `coraq.api.NetworkTask`.
        codes_of: the base's codes for a layer that the engine stands at.
        correction: of the layers' problems, see `coraq.api.LayerTask.least_squares`.
    """
    with (
        task.calibration_subset(MEASURED_IMAGES) as images,
        task.stage("measure what each layer costs", len(task.layers)) as measuring,
    ):
        for number, layer in enumerate(task.layers):
            measuring.advance(number, layer.name)
            squares = task.least_squares(layer.name, correction)
            codes = codes_of(layer)
            installed = task.preview(layer.name, codes)
            bits, error = layer.bits, squares.weight - codes.weight.dequantize()
            if squares.count is not None and squares.count <= images:
                bits, error = EIGHT_BITS, nearest_error(task, layer, EIGHT_BITS)
            yield MeasuredLayer(layer, squares, task.stats(layer.name), codes, installed, error, bits)


def allowed_widths(layer: LayerView, scheme: Scheme, keep_first_last: bool, least: int | None = None) -> Sequence[int]:
    """The bits that an allocation may give a layer, up to 8.

    By default from one below the scheme's, so that some layers can pay for others. A layer with an override keeps its
    own bits, and so does one whose bits differ from the scheme's where `keep_first_last` says so.

    Args:
        least: the fewest bits, in place of that.
    """
    own, common = layer.bits, scheme.weights.bits
    if scheme.overrides_layer(layer.name) or (own != common and keep_first_last):
        return [own]
    return range(max(2, min(own, common) - 1) if least is None else least, EIGHT_BITS + 1)


def predict_kl(task: Any, errors: Mapping[str, Tensor]) -> dict[str, float]:
    """The KL in nats that each layer's weight error alone adds to the network's output, to second order.

    Args:
        task: a `coraq.api.NetworkTask`.
        errors: by a layer's name, [groups, out, in].

    Raises:
        CoraqError: the network overflows on the calibration images.
    """
    teacher: nn.Module = task.teacher
    try:
        return kl_of_errors(teacher, errors, _first_images(task, FISHER_IMAGES), task.rng)
    except ValueError as error:
        raise CoraqError(str(error), OVERFLOW_HINT) from None


def predict_kl_by_channel(task: Any, errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `predict_kl`, of each output channel's weight error alone: float64 [groups, out] by a layer's name."""
    teacher: nn.Module = task.teacher
    try:
        images = _first_images(task, CHANNEL_FISHER_IMAGES)
        found = kl_of_errors_by_channel(teacher, errors, images, task.rng)
    except ValueError as error:
        raise CoraqError(str(error), OVERFLOW_HINT) from None
    return {name: found[name].reshape(errors[name].shape[:2]) for name in errors}


def error_by_bits(task: Any, layer: LayerView, widths: Sequence[int], at: int) -> dict[int, float]:
    """The squared error of nearest rounding to so many bits, over that at `at` bits: how a layer's KL falls with bits.

    By four for a bit where the range holds all weights, by less at 2 and 3 bits, by more with nine weights a scale.
    """
    error = {bits: float(nearest_error(task, layer, bits).square().sum()) for bits in {*widths, layer.bits, at}}
    return {bits: value / max(error[at], 1e-30) for bits, value in error.items()}


def nearest_error(task: Any, layer: LayerView, bits: int) -> Tensor:
    """What nearest rounding to so many bits leaves of a weight, [groups, out, in]."""
    with torch.no_grad():
        nearest: Tensor = task.quantize_with(layer.name, "rtn", bits=bits).dequantize()
        return layer.weight - nearest


def _first_images(task: Any, count: int) -> Iterator[Tensor]:
    """The first calibration images, at least `count` of them if there are as many; tells how many are done with."""
    seen = 0
    with task.stage("measure sensitivities", min(count, sum(map(len, task.batches())))) as measuring:
        for batch in task.batches():
            yield batch
            seen += len(batch)
            measuring.advance(seen)
            if seen >= count:
                break

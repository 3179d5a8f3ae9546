"""A layer's problem, posed while the engine stands at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from coraq.calibration.layer_pass import LayerPass, check_finite
from coraq.calibration.statistics import LayerStats
from coraq.config import Scheme
from coraq.core.gram import regress
from coraq.core.layer_problem import GridSpec, LayerProblem
from coraq.core.least_squares import LeastSquares
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.network.layers import LayerView


class LayerMethod(Protocol):
    """A method of scope `layer`, as far as the engine needs it (see `coraq.api.LayerMethod`)."""

    needs_data: ClassVar[bool]

    @property
    def correction(self) -> float: ...

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer: ...


def need_images(method: LayerMethod, there_are: bool) -> None:
    """Raise CoraqError if a method needs calibration images and there are none."""
    if method.needs_data and not there_are:
        raise CoraqError("this method needs calibration images and there are none", "Give --data-dir or --calib-dir.")


@torch.no_grad()
def least_squares(layer_pass: LayerPass, scheme: Scheme, name: str, correction: float = 0.5) -> LeastSquares:
    """The problem `min ‖(W − Q)·H^½‖²` of a layer; see `coraq.api.LayerTask.least_squares`.

    What has been posed of a layer stays until the engine moves on: a method and its base may pose the same problem.

    Raises:
        CoraqError: the layer's inputs overflow, or there are no images.
    """
    stats = layer_pass.stats(name)
    if correction not in stats.posed:
        stats.posed[correction] = _pose(layer_pass.views[name], stats, scheme.corrections.bias != "off", correction)
    return stats.posed[correction]


def _pose(view: LayerView, stats: LayerStats, centred: bool, correction: float) -> LeastSquares:
    weight = view.weight
    # the mismatch before the Gram: it takes that along on its visit
    mismatch = correction * stats.input_mismatch_moment(weight, centred) if correction else None
    gram = stats.covariance if centred else stats.gram
    check_finite(view.name, gram, *(() if mismatch is None else (mismatch,)))
    squares = LeastSquares(weight, gram, stats.rows(centred), stats.count)
    if mismatch is None:
        return squares
    # W C (H + λ)⁻¹ written as a change of W, so that strong damping leads back to W
    change = squares.join(regress(mismatch, gram, stats.input_mismatch_rows))
    return replace(squares, weight=(weight.double() + change).float())


def layer_problem(
    layer_pass: LayerPass,
    scheme: Scheme,
    view: LayerView,
    correction: float,
    grid_spec: GridSpec | None = None,
    subtract: Tensor | None = None,
) -> LayerProblem:
    """What a method of scope `layer` is given for a layer.

    Args:
        view: the layer as the method is to see it: its bits may differ from the pass's own view.
        correction: share of the earlier layers' errors that the target undoes.
        grid_spec: instead of the view's own.
        subtract: [groups, out, in], taken off the weight and the target.
    """
    pose: Callable[[], LeastSquares] | None = None
    if layer_pass.has_data:
        pose = partial(_less, layer_pass, scheme, view.name, correction, subtract)
    if subtract is not None:
        view = replace(view, weight=view.weight - subtract)
    spec = view.grid_spec(scheme) if grid_spec is None else grid_spec
    return LayerProblem.of(view.name, view.weight, spec, view.columns(scheme), pose)


def _less(layer_pass: LayerPass, scheme: Scheme, name: str, correction: float, subtract: Tensor | None) -> LeastSquares:
    squares = least_squares(layer_pass, scheme, name, correction)
    return squares if subtract is None else replace(squares, weight=squares.weight - subtract)

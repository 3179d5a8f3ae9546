"""Rate–distortion-optimised codes: the size of the entropy-coded codes counts, and what they cost the network.

A width of b bits wastes levels and cannot be 2.6. Here every output channel has a step of its own and codes from −127
to 127, an entropy coder stores them at what they are worth, and one multiplier c for the whole network sets rate
against distortion (`coraq.core.rate_distortion`). So bits a weight follow, layer by layer and channel by channel:

1. What a unit of squared output error of a channel costs in nats of KL: the Fisher information along the error of 4-bit
   nearest rounding, over that error under the Gram of the layer's inputs. Single channels are measured noisily, so
   each is taken half-way, geometrically, between its own and its layer's, and all of a layer's such that together they
   cost what was measured.
2. A pass over the float network finds how many bytes each layer takes for every c.
3. A second pass rounds layer by layer on what is quantized so far. c is such that the bytes left and the prediction
   for the layers left agree; the last layer's is searched on its real bytes, so that the budget is met.

Related: CERWU (arXiv 2505.18758), WaterSIC (arXiv 2603.04956), DeepCABAC (arXiv 1907.11900).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from coraq.api import (
    Field,
    LayerView,
    LeastSquares,
    MethodConfig,
    NetworkTask,
    QTensor,
    QuantizedLayer,
    Scope,
    UsageError,
    minmax_grid,
    predict_kl_by_channel,
)
from coraq.core.entropy_coding import entropy_bits
from coraq.core.rate_distortion import (
    RateProblem,
    column_factors,
    in_layer_order,
    pack_levels,
    predicted_levels,
    round_with_rate,
)
from coraq.core.rounding import factorise, prepare

MEASURED_BITS = 4  # of the nearest rounding whose error says what a channel costs
MEASURED_IMAGES = 256  # of the first pass
MOST_RATIO = 1e3  # that a channel's cost may differ from its layer's by, before they are blended
LEAST_SHARE = 1e-4  # of the least cost of other layers: what a layer gets that costs nothing on these images
EXPONENTS = range(-56, 1)  # log2 of the multipliers that bytes are predicted for
PREDICTED_WEIGHTS = 1 << 16  # of a layer, that its bytes are predicted from
PRIOR = 0.05  # share of all bytes that the prediction counts as confirmed at the start
SEARCHES = 12  # of the last layer's multiplier
WITHIN = 0.002  # of the whole budget may be left over


class RDOQ:
    """Minimises the predicted KL to the float network under a budget of entropy-coded bytes."""

    name: ClassVar[str] = "rdoq"
    summary: ClassVar[str] = "rate-distortion-optimised codes, entropy-coded, under one byte budget"
    version: ClassVar[str] = "1"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "network"
    granularities: ClassVar[Sequence[str]] = ("channel",)
    chooses_bits: ClassVar[bool] = True
    budget_coding: ClassVar[str] = "ans"

    class Config(MethodConfig):
        bits_per_weight: float | None = Field(
            default=None,
            gt=0,
            le=8,
            description="bytes of all layers, in bits a weight, scales included; any number from about 0.3 up "
            "(default: --bits)",
        )
        rounds: int = Field(default=3, ge=1, description="of feedback rounding, each priced by the codes of the last")
        sweeps: int = Field(default=1, ge=0, description="of coordinate descent on error and bits afterwards")
        columns: bool = Field(default=False, description="a factor for every input channel, one byte each")
        blend: float = Field(
            default=0.5,
            ge=0,
            le=1,
            description="weight of a channel's own measured cost against its layer's (geometric mean)",
        )
        correction: float = Field(
            default=0.5,
            ge=0,
            le=1,
            description="share of the earlier layers' errors that a layer's target undoes",
        )
        shrinkage: float = Field(
            default=1.0,
            ge=0,
            description="what is added to the Gram's diagonal, in units of its mean times inputs over rows",
        )
        damping: float = Field(default=0.01, ge=0, description="share of the mean diagonal added to the Gram")

        def column_scales(self) -> bool:
            return False

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: NetworkTask) -> None:
        weights = {layer.name: layer.weight.numel() for layer in task.layers}
        plan: dict[str, Any] = task.decide_once(
            "rates of layers", lambda: self._plan(task, weights), lambda kept: _is_plan(kept, task.layers)
        )
        budget, predicted = plan["budget"], plan["bytes"]
        while task.layers:
            layer, names = task.layers[0], [layer.name for layer in task.layers]
            left = budget - task.committed_bytes()
            multiplier = _multiplier(predicted, names, left, budget)
            sensitivity = torch.tensor(plan["sensitivity"][layer.name], dtype=torch.float64).reshape(layer.shape[:2])
            problem, columns = self._problem(layer, self._squares(task, layer), sensitivity)
            if len(names) == 1:
                codes = self._fill(problem, columns, multiplier, left, WITHIN * budget)
            else:
                codes = self._round(problem, columns, multiplier)
            bits = 8 * codes.size_bytes() / codes.codes.numel()
            task.commit(layer.name, QuantizedLayer(codes), bits_per_weight=bits, multiplier=multiplier)

    # -- the plan

    def _plan(self, task: NetworkTask, weights: Mapping[str, int]) -> dict[str, Any]:
        """Each channel's sensitivity, each layer's bytes for every multiplier, and the budget of all in bytes."""
        errors = {layer.name: layer.weight - _nearest(layer.weight) for layer in task.layers}
        kl = predict_kl_by_channel(task, errors)
        energy: dict[str, Tensor] = {}
        pivots: dict[str, Tensor] = {}
        with (
            task.calibration_subset(MEASURED_IMAGES),
            task.stage("predict bytes", len(task.layers)) as measuring,
        ):
            for number, layer in enumerate(task.layers):
                measuring.advance(number, layer.name)
                squares = task.least_squares(layer.name, 0.0)
                energy[layer.name] = squares.error(squares.weight - errors[layer.name])
                shrunk = squares.shrunk(self.config.shrinkage)
                problem = prepare(shrunk.weight, shrunk.gram)
                factor = factorise(problem, shrunk.gram, self.config.damping)
                pivots[layer.name] = in_layer_order(problem, factor.curvature)
        sensitivity = _blended(kl, energy, self.config.blend)
        sizes = {layer.name: self._predict(layer, pivots[layer.name], sensitivity[layer.name]) for layer in task.layers}
        total = sum(weights.values())
        budget = (self.config.bits_per_weight or task.scheme.weights.bits) * total / 8
        if task.budget_bytes is not None and self.config.bits_per_weight is None:
            budget = float(task.budget_bytes)
        least = sum(own[-1] for own in sizes.values())
        if budget < least:
            raise UsageError(
                f"the layers may take {budget:,.0f} bytes, {8 * budget / total:.2f} bits a weight, and their scales "
                f"and tables alone take {least:,.0f}",
                f"Give a budget of at least {8 * least / total:.2f} bits a weight, {least - budget:,.0f} bytes more.",
            )
        return {
            "budget": budget,
            "bytes": sizes,
            "sensitivity": {name: own.flatten().tolist() for name, own in sensitivity.items()},
        }

    def _predict(self, layer: LayerView, pivots: Tensor, sensitivity: Tensor) -> list[float]:
        """Bytes of a layer for multipliers of all EXPONENTS, from some of its output channels."""
        groups, out, inputs = layer.shape
        columns = self._columns(layer, pivots)
        taps = layer.kernel[0] * layer.kernel[1]
        factors = torch.ones(1) if columns is None else columns.repeat_interleave(taps, 2)
        weight, own = layer.weight / factors, pivots * factors.reshape(-1, inputs if columns is not None else 1) ** 2
        every = max(1, layer.weight.numel() // PREDICTED_WEIGHTS)
        if out > 1:
            weight, sensitivity = weight[:, ::every], sensitivity[:, ::every]
        else:
            weight, sensitivity, own = weight[::every], sensitivity[::every], own[::every]
        problem = prepare(weight, torch.diag_embed(own.double()), "cyclic")
        rate_problem = RateProblem(
            problem, factorise(problem, torch.diag_embed(own.double()), 0.0), _as_row(sensitivity, weight)
        )
        fixed = 2 * groups * out + (0 if columns is None else columns.numel())
        share = layer.weight.numel() / weight.numel()
        sizes = []
        for exponent in EXPONENTS:
            levels = predicted_levels(rate_problem, 2.0**exponent)
            table = int(levels.max() - levels.min()) + 8
            sizes.append(fixed + table + share * entropy_bits(levels) / 8)
        return sizes

    # -- one layer

    def _squares(self, task: NetworkTask, layer: LayerView) -> LeastSquares:
        return task.least_squares(layer.name, self.config.correction).shrunk(self.config.shrinkage)

    def _problem(
        self, layer: LayerView, squares: LeastSquares, sensitivity: Tensor
    ) -> tuple[RateProblem, Tensor | None]:
        """A layer's problem, and its column factors, which are applied."""
        columns = layer.input_scales
        if columns is None and self.config.columns and layer.channels > 1:
            problem = prepare(squares.weight, squares.gram)
            pivots = factorise(problem, squares.gram, self.config.damping).curvature
            columns = self._columns(layer, in_layer_order(problem, pivots))
        squares = squares.scaled(columns)
        problem = prepare(squares.weight, squares.gram, rows=squares.rows)
        factor = factorise(problem, squares.gram, self.config.damping)
        return RateProblem(problem, factor, _as_row(sensitivity, squares.weight)), columns

    def _columns(self, layer: LayerView, pivots: Tensor) -> Tensor | None:
        """Column factors of a layer: those that its input asks for, those by its pivots, or none."""
        if layer.input_scales is not None:
            return layer.input_scales
        if not self.config.columns or layer.channels <= 1:
            return None
        return column_factors(pivots, layer.kernel[0] * layer.kernel[1])

    def _round(self, problem: RateProblem, columns: Tensor | None, multiplier: float) -> QTensor:
        """Codes for the multiplier, as they are stored."""
        rounding = round_with_rate(problem, multiplier, self.config.rounds, self.config.sweeps)
        stored = pack_levels(problem.problem, rounding, columns)
        return replace(stored, coding="ans", scale_type="bfloat16").with_stored_scale()

    def _fill(
        self, problem: RateProblem, columns: Tensor | None, multiplier: float, budget: float, slack: float
    ) -> QTensor:
        """The last layer's codes: of at most so many bytes, and no more than `slack` below, where that is possible."""
        best: QTensor | None = None
        low, high = math.log2(multiplier), math.log2(multiplier)  # too large, and small enough, once they are known
        over = under = False
        trial = low
        for _ in range(SEARCHES):
            codes = self._round(problem, columns, 2.0**trial)
            left = budget - codes.size_bytes()
            if left >= 0:
                high, under = trial, True
                if best is None or codes.size_bytes() > best.size_bytes():
                    best = codes
                if left <= slack:
                    break
            else:
                low, over = trial, True
            if over and under:
                trial = (low + high) / 2
            else:  # a bit a weight is a factor of four in the multiplier
                trial += max(0.02, 2 * 8 * abs(left) / codes.codes.numel()) * (1 if left < 0 else -1) * 1.1
        return best if best is not None else self._round(problem, columns, 2.0 ** EXPONENTS[-1])


def _nearest(weight: Tensor) -> Tensor:
    return minmax_grid(weight, MEASURED_BITS).round(weight)


def _as_row(sensitivity: Tensor, weight: Tensor) -> Tensor:
    """[groups, out] in the layout of a problem, [groups, 1, out]."""
    return sensitivity.unsqueeze(1).to(weight)


def _blended(kl: Mapping[str, Tensor], energy: Mapping[str, Tensor], blend: float) -> dict[str, Tensor]:
    """Nats for a unit of squared output error of each channel, float64 [groups, out]."""
    layers = {name: float(kl[name].sum()) / max(float(energy[name].sum()), 1e-300) for name in kl}
    alive = [cost for cost in layers.values() if math.isfinite(cost) and cost > 0]
    least = LEAST_SHARE * min(alive, default=1.0)
    found = {}
    for name, cost in layers.items():
        cost = cost if math.isfinite(cost) and cost > least else least
        ratio = kl[name] / energy[name].to(kl[name]).clamp(min=1e-300) / cost
        known = (kl[name] > 0) & (energy[name].to(kl[name]) > 0) & torch.isfinite(ratio)
        ratio = torch.where(known, ratio, 1.0).clamp(1 / MOST_RATIO, MOST_RATIO)
        blended = cost * ratio**blend
        # a geometric mean of noisy costs is too low, by more the noisier they are: the layer's sum is what is known
        together = float((blended * energy[name]).sum())
        found[name] = blended * (cost * float(energy[name].sum()) / together if together > 0 else 1.0)
    return found


def _size(sizes: Sequence[float], exponent: float) -> float:
    """Bytes between those predicted for whole exponents."""
    place = min(max(exponent - EXPONENTS[0], 0.0), len(sizes) - 1.0)
    first = min(int(place), len(sizes) - 2)
    return sizes[first] + (place - first) * (sizes[first + 1] - sizes[first])


def _multiplier(predicted: Mapping[str, Sequence[float]], names: Sequence[str], left: float, budget: float) -> float:
    """The multiplier for which the layers of these names are predicted to take the bytes that are left.

    The prediction is scaled by what it was wrong by so far.
    """
    done = [sizes for name, sizes in predicted.items() if name not in set(names)]

    def solve(sizes: Sequence[Sequence[float]], wanted: float) -> float:
        low, high = float(EXPONENTS[0]), float(EXPONENTS[-1])
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(_size(own, middle) for own in sizes) > wanted else (low, middle)
        return high

    start = solve(list(predicted.values()), budget)
    expected = sum(_size(sizes, start) for sizes in done)
    ratio = (budget - left + PRIOR * budget) / (expected + PRIOR * budget)
    return 2.0 ** solve([predicted[name] for name in names], left / ratio)


def _is_plan(kept: object, layers: Sequence[LayerView]) -> bool:
    """Whether this is a plan for these layers."""
    if not isinstance(kept, dict) or not isinstance(kept.get("budget"), (int, float)) or not kept["budget"] > 0:
        return False
    sizes, sensitivity = kept.get("bytes"), kept.get("sensitivity")
    if not isinstance(sizes, dict) or not isinstance(sensitivity, dict):
        return False
    return all(
        _are_positive(sizes.get(layer.name), len(EXPONENTS))
        and _are_positive(sensitivity.get(layer.name), layer.shape[0] * layer.shape[1])
        for layer in layers
    )


def _are_positive(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, float) and 0 < value < math.inf for value in values)
    )

"""CoRa (arXiv 2408.00923): low-rank adapters for what rounding left, their ranks searched instead of the weights.

The published form is `-o preset=paper`: a per-tensor grid over μ ± 5σ, the plain SVD of the residual, a cutoff for each
layer learned on the KL to the float network through a Butterworth relaxation, a budget of 5 % in adapter parameters,
ranks rounded up. No labels are used (the released code feeds them). By default adapters and bits compete for the bytes
of uniform codes, layer by layer, so that a comparison with the base is at equal bytes: at equal bytes a bit more in a
sensitive layer is the adapter's real rival. `-o widths=fixed` with a budget allows adapters only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from coraq.api import (
    Base,
    Directions,
    Field,
    LayerOption,
    LayerView,
    MeasuredLayer,
    MethodConfig,
    NetworkTask,
    QuantizedLayer,
    Scheme,
    Scope,
    SearchLayer,
    adapter_bytes,
    allocate_bits,
    allowed_widths,
    alternate,
    can_pay,
    directions,
    error_by_bits,
    low_rank,
    measure_layers,
    predict_kl,
    search_cutoffs,
)

PAPER: dict[str, Any] = {
    "base": "rtn",
    "base_options": {"clip": "sigma", "k": 5.0},
    "base_granularity": "tensor",
    "budget": 0.05,
    "widths": "fixed",
    "first_last": "keep",
    "form": "plain",
    "initial_cutoffs": "uniform",
    "iterations": 250,
    "rounding": "up",
    "rounds": 0,
    "correction": 0.0,
}
MAX_PREDICTED_KL_SHARE = 0.8  # of the KL of uniform codes, for a plan to be followed: see coraq.methods.mixed


@dataclass
class _Seen:
    """What the first pass keeps of a layer: its weight and bias on the base's codes, and what these leave."""

    layer: LayerView
    weight: Tensor | None  # for a search
    bias: Tensor | None
    mean: Tensor
    found: Directions | None
    error_bits: int


class CoRa:
    """Minimises the KL to the float network over the ranks (and bits) of all layers, under a budget of bytes."""

    name: ClassVar[str] = "cora"
    summary: ClassVar[str] = "low-rank adapters of searched ranks, competing with bits for the bytes of uniform codes"
    version: ClassVar[str] = "9"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "network"
    chooses_bits: ClassVar[bool] = True
    compare_with: ClassVar[Sequence[str]] = ("mixed",)  # the same bytes without adapters

    class Config(MethodConfig):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
        renamed: ClassVar[Mapping[str, str]] = {
            "edges": "first_last",
            "granularity": "base_granularity",
            "spend": "widths",
            "start": "initial_cutoffs",
        }

        preset: Literal["default", "paper"] = Field(
            default="default", description="what the other options default to: coraq's choice, or the paper's"
        )
        base: str = Field(default="comq", description="method that makes the codes, of scope layer")
        base_options: dict[str, Any] = Field(default_factory=dict, description="that method's own options")
        base_granularity: Literal["scheme", "tensor"] = Field(
            default="scheme", description="of the base's grid: as the scheme says, or one scale per tensor (the paper)"
        )
        budget: float = Field(
            default=0.0,
            ge=0,
            le=1,
            description="bytes for each weight of the network beyond those of uniform codes; 0: the same size (the "
            "paper: 0.05)",
        )
        widths: Literal["free", "fixed"] = Field(
            default="free",
            description="bits of layers: they compete with adapters for the bytes, or stay as the scheme has them, so "
            "that the budget buys adapters only (the paper)",
        )
        first_last: Literal["share", "keep"] = Field(
            default="share",
            description="first and last layer: their bytes are allocated like all others', or they keep the bits of "
            "the scheme (a layer with an --override always does)",
        )
        form: Literal["exact", "approximate", "plain"] = Field(
            default="exact",
            description="adapters from the residual weighted by the inputs' autocorrelation: in full, its diagonal, or "
            "not at all (the paper's SVD)",
        )
        initial_cutoffs: Literal["closed", "uniform"] = Field(
            default="closed", description="cutoffs before the search: from the closed-form allocation, or all 0.9"
        )
        iterations: int = Field(
            default=0,
            ge=0,
            le=250,
            description="steps of the search for ranks, with widths=fixed; 0: the closed-form allocation as it is",
        )
        rounding: Literal["nearest", "up"] = Field(
            default="nearest",
            description="ranks from cutoffs: nearest, in their proportions, to fill the budget; or up and as they are "
            "(the paper)",
        )
        rounds: int = Field(default=0, ge=0, description="more rounds of quantizing W − BA and decomposing W − Q")
        adapter_bits: int = Field(default=8, ge=2, le=8, description="bits of the adapters' codes")
        correction: float = Field(
            default=0.5, ge=0, le=1, description="share of the earlier layers' errors that an adapter undoes; 0: none"
        )
        gamma: float = Field(default=1.0, ge=0, description="search: weight of the budget's penalty")
        rate: float = Field(default=0.01, gt=0, description="search: Adam's learning rate")

        def column_scales(self) -> bool:
            return self.preset == "default"

        def bases(self) -> Sequence[Base]:
            return (Base(self.base, self.base_options), Base("rtn", option=""))

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: NetworkTask) -> None:
        plan: dict[str, list[int]] = task.decide_once(
            "bits and ranks", lambda: self._plan(task), lambda kept: _is_plan(kept, task.layers)
        )
        self._describe(task, plan)
        for layer in task.layers:
            bits, rank = plan[layer.name]
            squares = task.least_squares(layer.name, self.config.correction)
            quantized, errors = alternate(
                squares.weight,
                squares.error,
                partial(self._codes, task, layer, bits),
                partial(low_rank, squares.inputs(self.config.form), rank, self.config.adapter_bits),
                self.config.rounds if rank else 0,
            )
            task.commit(layer.name, quantized, error=errors[-1] / max(squares.energy(), 1e-30), rounds=len(errors))

    def _codes(self, task: NetworkTask, layer: LayerView, bits: int, subtract: Tensor | None = None) -> QuantizedLayer:
        config = self.config
        # a zero point of the last layer lies at a code where the plan has changed its bits: see coraq.methods.mixed
        whole = (
            bits != layer.bits
            and layer.name == task.layers[-1].name
            and task.scheme.weights.zero_point_fraction == "auto"
        )
        return task.quantize_with(
            layer.name,
            config.base,
            config.base_options,
            bits=bits,
            granularity="tensor" if config.base_granularity == "tensor" else None,
            zero_point_fraction=0 if whole else None,
            subtract=subtract,
        )

    def _describe(self, task: NetworkTask, plan: Mapping[str, Sequence[int]]) -> None:
        """Say how many layers have an adapter, and what the adapters cost."""
        taken = [layer for layer in task.layers if plan[layer.name][1]]
        if not taken:
            task.note("no layer takes an adapter: their bytes are worth more as bits")
            return
        ranks = [plan[layer.name][1] for layer in taken]
        size = sum(
            adapter_bytes(layer.shape, rank, self.config.adapter_bits) for layer, rank in zip(taken, ranks, strict=True)
        )
        macs = sum(_adapter_macs(layer, rank) for layer, rank in zip(taken, ranks, strict=True))
        share = 100 * macs / max(1, sum(layer.macs for layer in task.layers))
        task.note(
            f"{len(taken)} of {len(task.layers)} layers take an adapter, of rank {min(ranks)} to {max(ranks)}: "
            f"{size:,} bytes, and {share:.1f} % more multiplications where the adapter is not merged into the weight"
        )

    # -- the plan: bits and ranks of all layers

    def _plan(self, task: NetworkTask) -> dict[str, list[int]]:
        if not self.config.budget and all(min(self._widths(layer, task.scheme)) == layer.bits for layer in task.layers):
            task.note(
                "no layer has bytes to give to others here (-o budget=0.05 allows more bytes): the codes are the base's"
            )
            return _uniform(task)
        seen, errors = [], {}
        for measured in measure_layers(
            task, lambda layer: self._codes(task, layer, layer.bits), self.config.correction
        ):
            seen.append(self._keep(measured))
            errors[measured.layer.name] = measured.error
        plan = self._allocate(task, seen, predict_kl(task, errors))
        return self._search(task, seen, plan) if self._searches else plan

    @property
    def _searches(self) -> bool:
        return self.config.widths == "fixed" and self.config.iterations > 0

    def _keep(self, measured: MeasuredLayer) -> _Seen:
        layer, squares = measured.layer, measured.squares
        # the search goes on from the network as it stands; the scale correction in it tells of the errors before a
        # layer, which a share of the bytes for this layer does not mend
        codes = measured.installed if self._searches else measured.codes
        weight = codes.weight.dequantize()
        pays = can_pay(layer.shape, layer.bits, self.config.adapter_bits)
        found = directions(squares.weight - weight, squares.inputs(self.config.form)) if pays else None
        mean = measured.stats.mean.float()
        bias = measured.installed.bias
        return _Seen(layer, weight if self._searches else None, bias, mean, found, measured.error_bits)

    def _allocate(self, task: NetworkTask, seen: Sequence[_Seen], kl: Mapping[str, float]) -> dict[str, list[int]]:
        """Bits and ranks of least predicted KL under the budget: each layer's own KL, scaled by what would be left."""
        config = self.config
        pairs, options, uniform = [], [], 0.0
        for s in seen:
            # what 8-bit codes leave says nothing of what fewer would, but for its size
            layer, own = s.layer, s.found if s.layer.bits == task.scheme.weights.bits else None
            widths = self._widths(layer, task.scheme)
            fall = error_by_bits(task, layer, widths, s.error_bits)
            uniform += kl[layer.name] * fall[layer.bits]
            left = torch.ones(1, dtype=torch.float64) if own is None else own.left()
            share = (left / left[0].clamp(min=1e-30)).tolist()
            pairs.append([(bits, rank) for bits in widths for rank in range(len(share))])
            options.append(
                [
                    LayerOption(
                        task.bytes_of(layer.name, bits) + adapter_bytes(layer.shape, rank, config.adapter_bits),
                        kl[layer.name] * fall[bits] * share[rank],
                    )
                    for bits, rank in pairs[-1]
                ]
            )
        weights = sum(layer.weight.numel() for layer in task.layers)
        budget = sum(task.bytes_of(layer.name) for layer in task.layers) + config.budget * weights
        taken = allocate_bits(options, budget)
        predicted = sum(own[i].loss for own, i in zip(options, taken, strict=True))
        if not config.budget and predicted > MAX_PREDICTED_KL_SHARE * uniform:
            task.note(
                f"allocating bits and ranks is predicted to leave {predicted / uniform:.2f} of uniform codes' KL: "
                "too little gain to rely on (-o budget=0.05 allows more bytes), the codes are the base's"
            )
            return _uniform(task)
        return {layer.name: list(own[i]) for layer, own, i in zip(task.layers, pairs, taken, strict=True)}

    def _widths(self, layer: LayerView, scheme: Scheme) -> Sequence[int]:
        """The bits that a layer may get: its own alone where the budget buys adapters only."""
        if self.config.widths == "fixed":
            return [layer.bits]
        return allowed_widths(layer, scheme, self.config.first_last == "keep")

    def _search(self, task: NetworkTask, seen: Sequence[_Seen], plan: dict[str, list[int]]) -> dict[str, list[int]]:
        """The paper's search, from cutoffs of the plan's ranks or 0.9."""
        config = self.config
        weights = sum(s.layer.weight.numel() for s in seen)
        layers = {}
        for s in seen:
            if s.found is not None and s.weight is not None:
                groups, out, inputs = s.layer.shape
                full = groups * (out + inputs) * s.found.energy.shape[1]
                layers[s.layer.name] = SearchLayer(s.weight, s.bias, s.mean, s.found, full / weights)
        if not layers:
            return plan
        counts = {name: layer.found.energy.shape[1] for name, layer in layers.items()}
        start = [
            0.9 if config.initial_cutoffs == "uniform" else max(plan[name][1], 1) / counts[name] for name in layers
        ]
        with torch.no_grad():
            batches = [(x, task.teacher(x)) for x in task.batches()]

        with task.stage("search for ranks", config.iterations) as searching:

            def report(step: int, kl: float, spent: float) -> None:
                task.log("kl", kl, step)
                task.log("budget", spent, step)
                searching.advance(step + 1, f"KL {kl:.3g}")

            cutoffs = search_cutoffs(
                task.student,
                layers,
                start,
                batches,
                config.iterations,
                config.budget,
                rate=config.rate,
                gamma=config.gamma,
                on_step=report,
            )
        ranks = {name: counts[name] * c for name, c in zip(layers, cutoffs, strict=True)}
        if config.rounding == "up":
            whole = {name: max(1, math.ceil(rank)) for name, rank in ranks.items()}
        else:
            whole = _within(ranks, {s.layer.name: s.layer for s in seen}, config.budget * weights, config.adapter_bits)
        return {name: [bits, whole.get(name, 0)] for name, (bits, _) in plan.items()}


def _uniform(task: NetworkTask) -> dict[str, list[int]]:
    """The plan that changes nothing: each layer's own bits, and no adapters."""
    return {layer.name: [layer.bits, 0] for layer in task.layers}


def _is_plan(kept: object, layers: Sequence[LayerView]) -> bool:
    """Whether there are bits and a rank for each of these layers."""
    return isinstance(kept, dict) and all(
        isinstance(pair := kept.get(layer.name), list)
        and [type(value) for value in pair] == [int, int]
        and 2 <= pair[0] <= 8
        and 0 <= pair[1] <= min(layer.shape[1:])
        for layer in layers
    )


def _within(ranks: Mapping[str, float], layers: Mapping[str, LayerView], allowed: float, bits: int) -> dict[str, int]:
    """Whole ranks in the proportions of these, as large as `allowed` bytes hold.

    The search's own budget is one of relaxed parameters, which whole ranks miss on either side: on mobilenetv1_075 at 2
    bits they left 60 % of the bytes unspent.
    """
    shapes = {name: layers[name].shape for name in ranks}

    def whole(times: float) -> dict[str, int]:
        return {name: min(round(times * rank), min(shapes[name][1:])) for name, rank in ranks.items()}

    def fits(times: float) -> bool:
        return sum(adapter_bytes(shapes[name], rank, bits) for name, rank in whole(times).items()) <= allowed

    low, high = 0.0, 2.0 * max(min(shape[1:]) for shape in shapes.values()) / max(min(ranks.values()), 1e-3)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return whole(low)


def _adapter_macs(layer: LayerView, rank: int) -> int:
    """Multiply-accumulates of an adapter for one image, kept apart from the weight."""
    groups, out, inputs = layer.shape
    return layer.macs * rank * (out + inputs) // (out * inputs) if groups else 0

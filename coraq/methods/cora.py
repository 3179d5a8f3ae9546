"""CoRa (arXiv 2408.00923): low-rank adapters for what rounding left, their ranks searched instead of the weights.

The published form is `-o preset=paper`: a per-tensor grid over μ ± 5σ, the plain SVD of the residual, a cutoff for each
layer learned on the KL to the float network through a Butterworth relaxation, a budget of 5 % in adapter parameters,
ranks rounded up. No labels are used (the released code feeds them). The default differs where measurement says so:
see `Config` and the README's table. Bits and ranks may compete for the same bytes (`spend`), since at equal bytes a
bit more in a sensitive layer is the adapter's real rival; where it was measured, bits alone do as well, and are the
default. What a layer costs is seen in a first pass over the whole network on the base's codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from coraq.api import (
    Choice,
    CoraqError,
    Directions,
    Field,
    LayerView,
    MethodConfig,
    QuantizedLayer,
    Scheme,
    SearchLayer,
    Task,
    adapter_bytes,
    allocate,
    alternate,
    can_pay,
    directions,
    kl_of_errors,
    low_rank,
    search_cutoffs,
    stored_bytes,
)
from coraq.errors import OVERFLOW_HINT

PAPER: dict[str, Any] = {
    "base": "rtn",
    "base_options": {"clip": "sigma", "k": 5.0},
    "granularity": "tensor",
    "budget": 0.05,
    "spend": "ranks",
    "edges": "keep",
    "form": "plain",
    "start": "uniform",
    "iterations": 250,
    "rounding": "up",
    "rounds": 0,
    "correction": 0.0,
}
FULL = 8  # bits at which a layer's KL is taken where fewer say too little, and the most that a layer may get
ENTRY = 110  # bytes that one more tensor takes in a file's header: name, type, shape, place
FISHER_IMAGES = 128
# Images of the first pass. 1,000 take twice as long and plan no better: KL at 4, 3 and 2 bits .0031, .0082 and .0162
# for .0031, .0069 and .0162 (mobilenetv2_100), .0092, .0207 and .0715 for .0107, .0224 and .0474 (mobilenetv1_075).
# A quarter of the rows, too, is 5 s less of 80, and mobilenetv1_075 has .0265 at 3 bits.
LOOK_IMAGES = 256
# The KL that a plan is predicted to leave, of that of uniform codes, for it to be worth more than the prediction's own
# error. resnet18_cifar10 at 2 bits, whose edges have no bytes to give: predicted 0.93 (from nearest rounding), and the
# measured KL was 1.04 of uniform codes'. Where a plan pays, 0.01 to 0.05 is predicted.
WORTH = 0.8


@dataclass
class _Seen:
    """What the first pass keeps of a layer: its weight and bias on the base's codes, and what these leave."""

    layer: LayerView
    weight: Tensor | None  # for a search
    bias: Tensor | None
    mean: Tensor
    found: Directions | None
    error: Tensor  # what the layer's KL is taken from,
    bits: int  # with codes of so many bits


class CoRa:
    """Minimises the KL to the float network over the ranks (and bits) of all layers, under a budget of bytes."""

    name: ClassVar[str] = "cora"
    summary: ClassVar[str] = "bits or adapter ranks of all layers shared out under one byte budget, on any codes"
    version: ClassVar[str] = "8"
    needs_data: ClassVar[bool] = True
    chooses_bits: ClassVar[bool] = True

    class Config(MethodConfig):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

        preset: Literal["default", "paper"] = Field(
            default="default", description="what the other options default to: coraq's choice, or the paper's"
        )
        base: str = Field(default="comq", description="method that makes the codes")
        base_options: dict[str, Any] = Field(default_factory=dict, description="that method's own options")
        granularity: Literal["scheme", "tensor"] = Field(
            default="scheme", description="of the base's grid: as the scheme says, or one scale per tensor (the paper)"
        )
        budget: float = Field(
            default=0.0,
            ge=0,
            le=1,
            description="bytes for each weight of the network, beyond those of uniform codes; 0: the same size, shared "
            "out better (the paper: 0.05)",
        )
        spend: Literal["auto", "ranks", "bits"] = Field(
            default="bits",
            description="what the budget buys: adapters (ranks, the paper), more bits for the most sensitive layers "
            "(bits), or whichever saves more for its bytes, layer by layer (auto; little gain)",
        )
        edges: Literal["share", "keep"] = Field(
            default="share",
            description="first and last layer: their bytes are shared out like all others', or they keep their bits "
            "(a layer with an --override always does)",
        )
        form: Literal["exact", "approximate", "plain"] = Field(
            default="exact",
            description="adapters from the residual weighted by the inputs' autocorrelation: in full, its diagonal, or "
            "not at all (the paper's SVD)",
        )
        start: Literal["closed", "uniform"] = Field(
            default="closed", description="cutoffs before the search: from the closed-form allocation, or all 0.9"
        )
        iterations: int = Field(
            default=0, ge=0, le=250, description="steps of the search for ranks; 0: the closed form as it is"
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

        def bases(self) -> Sequence[str]:
            return (self.base,)

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: Task) -> None:
        plan: dict[str, list[int]] = task.remember(
            "bits and ranks", lambda: self._plan(task), lambda kept: _is_plan(kept, task.layers)
        )
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

    def _codes(self, task: Task, layer: LayerView, bits: int, less: Tensor | None = None) -> QuantizedLayer:
        config, changes = self.config, dict[str, Any]()
        if config.granularity == "tensor":
            changes["granularity"] = "tensor"
        given = bits != layer.bits  # by the plan: else the codes are the base's
        if given and layer.name == task.layers[-1].name and task.scheme.zero_point == "auto":
            # Between codes, zero points lower this layer's squared error, too, but not the KL, which large logits
            # decide: a zero at a code leaves two of four levels to one side. mobilenetv2's classifier at 2 bits, comq,
            # 1,000 images: squared error .049 and .056, KL .016 and .013 (256 images: .061 and .070, .023 and .018)
            changes["zero_point"] = "whole"
        scheme = task.scheme.model_copy(update=changes) if changes else None
        return task.codes(layer.name, config.base, config.base_options, bits=bits, less=less, scheme=scheme)

    # -- the plan: bits and ranks of all layers

    def _plan(self, task: Task) -> dict[str, list[int]]:
        if not self.config.budget and all(min(self._widths(layer, task.scheme)) == layer.bits for layer in task.layers):
            task.note("cora has no bytes to share out here (-o budget=0.05 gives it some): the codes are the base's")
            return _uniform(task)
        seen = self._look(task)
        plan = self._closed_form(task, seen)
        if self._searches:
            plan = self._search(task, seen, plan)
        return plan

    @property
    def _searches(self) -> bool:
        return self.config.spend == "ranks" and self.config.iterations > 0

    def _look(self, task: Task) -> list[_Seen]:
        """The whole network on the base's codes alone; what each layer's codes leave.

        Nearest rounding would tell without a pass, but not how layers compare: what a better method makes of it is a
        twenty-fifth for a depthwise layer, and a half for a classifier. (mobilenetv1_075's had 3 bits of 4 by that, a
        KL of .0216, of which .018 were its own; by what `comq` leaves it has 5, for .0092.)
        """
        seen = []
        with (
            task.calibration_subset(LOOK_IMAGES) as images,
            task.stage("look at all layers", len(task.layers)) as looking,
        ):
            for number, layer in enumerate(task.layers):
                looking.advance(number, layer.name)
                seen.append(self._look_at(task, layer, images))
        return seen

    def _look_at(self, task: Task, layer: LayerView, images: int) -> _Seen:
        squares = task.least_squares(layer.name, self.config.correction)
        codes = self._codes(task, layer, layer.bits)
        installed = task.preview(layer.name, codes)
        # the search goes on from the network as it stands; the gain in it tells of the errors before a layer,
        # which a share of the bytes for this layer does not mend
        left = squares.weight - (installed if self._searches else codes).weight.dequantize()
        ranked = self.config.spend != "bits" and can_pay(layer.shape, layer.bits, self.config.adapter_bits)
        found = directions(left, squares.inputs(self.config.form)) if ranked else None
        mean = task.stats(layer.name).mean.float()
        bits, error = layer.bits, squares.weight - codes.weight.dequantize()
        if squares.count is not None and squares.count <= images:
            bits, error = FULL, _nearest_error(task, layer, FULL)
        weight = installed.weight.dequantize() if self._searches else None
        return _Seen(layer, weight, installed.bias, mean, found, error, bits)

    def _closed_form(self, task: Task, seen: Sequence[_Seen]) -> dict[str, list[int]]:
        """Bits and ranks of least predicted KL under the budget: each layer's own KL, scaled by what would be left."""
        config = self.config
        errors = {s.layer.name: s.error for s in seen}
        try:
            kl = kl_of_errors(task.teacher, errors, _first(task, FISHER_IMAGES, "see what each costs"), task.rng)
        except ValueError as error:
            raise CoraqError(str(error), OVERFLOW_HINT) from None
        pairs, layers, uniform = [], [], 0.0
        for s in seen:
            # what 8-bit codes leave says nothing of what fewer would, but for its size
            layer, own = s.layer, s.found if s.layer.bits == task.scheme.bits else None
            fall = _fall(task, layer, self._widths(layer, task.scheme), s.bits)
            uniform += kl[layer.name] * fall[layer.bits]
            left = torch.ones(1, dtype=torch.float64) if own is None else own.left()
            share = (left / left[0].clamp(min=1e-30)).tolist()
            options = [(bits, rank) for bits in self._widths(layer, task.scheme) for rank in range(len(share))]
            pairs.append(options)
            layers.append(
                [
                    Choice(
                        _code_bytes(layer, bits, task.scheme) + adapter_bytes(layer.shape, rank, config.adapter_bits),
                        kl[layer.name] * fall[bits] * share[rank],
                    )
                    for bits, rank in options
                ]
            )
        weights = sum(layer.weight.numel() for layer in task.layers)
        budget = sum(_code_bytes(layer, layer.bits, task.scheme) for layer in task.layers) + config.budget * weights
        taken = allocate(layers, budget)
        predicted = sum(c[i].loss for c, i in zip(layers, taken, strict=True))
        if not config.budget and predicted > WORTH * uniform:
            task.note(
                f"sharing the bytes out is predicted to leave {predicted / uniform:.2f} of the KL of uniform "
                "codes, too little to tell from none (-o budget=0.05 gives it more bytes): the codes are the base's"
            )
            return _uniform(task)
        return {layer.name: list(options[i]) for layer, options, i in zip(task.layers, pairs, taken, strict=True)}

    def _widths(self, layer: LayerView, scheme: Scheme) -> Sequence[int]:
        """The bits that a layer may get: from one below the scheme's, so that some can pay for others, up to 8."""
        own = layer.bits
        keeps = scheme.overrides_layer(layer.name) or (own != scheme.bits and self.config.edges == "keep")
        if self.config.spend == "ranks" or keeps:
            return [own]
        return range(max(2, min(own, scheme.bits) - 1), FULL + 1)

    def _search(self, task: Task, seen: Sequence[_Seen], plan: dict[str, list[int]]) -> dict[str, list[int]]:
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
        start = [0.9 if config.start == "uniform" else max(plan[name][1], 1) / counts[name] for name in layers]
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


def _uniform(task: Task) -> dict[str, list[int]]:
    """The plan that changes nothing: each layer's own bits, and no adapters."""
    return {layer.name: [layer.bits, 0] for layer in task.layers}


def _code_bytes(layer: LayerView, bits: int, scheme: Scheme) -> int:
    """Bytes of codes of so many bits, and of the column scales that come with them; other scales a layer has anyway."""
    codes = stored_bytes(layer.shape, bits, 0, 0)
    has_columns = replace(layer, bits=bits).has_columns(scheme)
    return codes + layer.column_bytes + ENTRY if has_columns else codes


def _nearest_error(task: Task, layer: LayerView, bits: int) -> Tensor:
    """What nearest rounding to so many bits leaves of a weight.

    At 8 bits it is what the KL of a layer of one row an image is taken from. The base's own error is fitted to these
    very rows, fewer of them than the layer has inputs, and says next to nothing of others. mobilenetv2's classifier,
    1,280 inputs and 1,000 images, took 3 bits of a 4-bit budget by that, for a KL of .0046, .0035 of them its own; by
    this it takes 4, for one of .0031.
    """
    return layer.weight - task.codes(layer.name, "rtn", bits=bits).dequantize()


def _fall(task: Task, layer: LayerView, widths: Sequence[int], at: int) -> dict[int, float]:
    """The squared error of nearest rounding to so many bits, over that at `at` bits: how a layer's KL falls with bits.

    By four for a bit where the range holds all weights, by less at 2 and 3 bits, by more with nine weights a scale.
    """
    error = {bits: float(_nearest_error(task, layer, bits).square().sum()) for bits in {*widths, layer.bits, at}}
    return {bits: value / max(error[at], 1e-30) for bits, value in error.items()}


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


def _first(task: Task, count: int, doing: str) -> Iterator[Tensor]:
    """The first calibration images, at least `count` of them if there are as many; tells how many are done with."""
    seen = 0
    with task.stage(doing, min(count, sum(map(len, task.batches())))) as going:
        for batch in task.batches():
            yield batch
            seen += len(batch)
            going.advance(seen)
            if seen >= count:
                break

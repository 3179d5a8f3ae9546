"""Mixed precision: the bits of every layer, allocated under a budget of bytes, with any method's codes.

Minimises the predicted KL divergence to the float network over the bits of all layers, 2 to 8 each, in the bytes that
uniform codes take (or `budget` more). A layer's KL is predicted to second order from what a base method's codes leave
of its weight (coraq.core.sensitivity), as HAWQ (arXiv 1911.03852) does for the loss, and how it falls with bits from
nearest rounding. The allocation is Lagrangian (coraq.core.allocation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from coraq.api import (
    Base,
    Field,
    LayerOption,
    LayerView,
    MethodConfig,
    NetworkTask,
    Scope,
    UsageError,
    allocate_bits,
    allowed_widths,
    error_by_bits,
    measure_layers,
    predict_kl,
)

MAX_BITS = 8
# A plan is followed if it is predicted to leave at most this share of the KL of uniform codes: the prediction's own
# error is about as large as what a plan beyond it could gain.
MAX_PREDICTED_KL_SHARE = 0.8


class Mixed:
    """Minimises the predicted KL to the float network over the bits of all layers, under a budget of bytes."""

    name: ClassVar[str] = "mixed"
    summary: ClassVar[str] = "bits of all layers allocated under one byte budget, on any method's codes"
    version: ClassVar[str] = "1"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "network"
    chooses_bits: ClassVar[bool] = True
    budget_coding: ClassVar[str] = "packed"

    class Config(MethodConfig):
        base: str = Field(default="comq", description="method that makes the codes, of scope layer or block")
        base_options: dict[str, Any] = Field(default_factory=dict, description="that method's own options")
        budget: float = Field(
            default=0.0,
            ge=0,
            le=1,
            description="bytes for each weight of the network beyond those of uniform codes; 0: the same size",
        )
        first_last: Literal["share", "keep"] = Field(
            default="share",
            description="first and last layer: their bytes are allocated like all others', or they keep the bits of "
            "the scheme (a layer with an --override always does)",
        )
        measured_with: str | None = Field(
            default=None,
            description="method of scope layer whose codes say what each layer costs; default: the base, or comq for a "
            "base that works block by block",
        )

        def column_scales(self) -> bool:
            return True

        def bases(self) -> Sequence[Base]:
            measured_with = Base(self.measured_with or "comq", option="measured_with")
            return (
                Base(self.base, self.base_options, scopes=("layer", "block")),
                measured_with,
                Base("rtn", option=""),
            )

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: NetworkTask) -> None:
        names = [layer.name for layer in task.layers]
        own = {layer.name: layer.bits for layer in task.layers}
        bits: dict[str, int] = task.decide_once(
            "bits of layers", lambda: self._plan(task), lambda kept: _are_bits(kept, task.layers)
        )
        # Zero points between codes lower the last layer's squared error but not its KL, which large logits decide: a
        # zero point at a code leaves one level more to one side.
        last = [
            name for name in names[-1:] if task.scheme.weights.zero_point_fraction == "auto" and bits[name] != own[name]
        ]
        task.delegate(self.config.base, self.config.base_options, bits=bits, whole_zero_points=last)

    def _plan(self, task: NetworkTask) -> dict[str, int]:
        """Bits of least predicted KL under the budget, or the scheme's where a plan has nothing to gain."""
        uniform = {layer.name: layer.bits for layer in task.layers}
        free = not self.config.budget and task.budget_bytes is None
        if free and all(min(self._widths(layer, task)) == layer.bits for layer in task.layers):
            task.note(
                "no layer has bytes to give to others here (-o budget=0.05 allows more bytes): every layer keeps "
                "the bits of the scheme"
            )
            return uniform
        method, options = self._measured_with(task)
        errors, error_bits = {}, {}
        for seen in measure_layers(task, lambda layer: task.quantize_with(layer.name, method, options)):
            errors[seen.layer.name], error_bits[seen.layer.name] = seen.error, seen.error_bits
        kl = predict_kl(task, errors)
        options_of, uniform_kl = [], 0.0
        for layer in task.layers:
            widths = self._widths(layer, task)
            share = error_by_bits(task, layer, widths, error_bits[layer.name])
            uniform_kl += kl[layer.name] * share[layer.bits]
            options_of.append(
                [LayerOption(task.bytes_of(layer.name, bits), kl[layer.name] * share[bits]) for bits in widths]
            )
        weights = sum(layer.weight.numel() for layer in task.layers)
        budget = sum(task.bytes_of(layer.name) for layer in task.layers) + self.config.budget * weights
        if task.budget_bytes is not None:
            budget = task.budget_bytes
        try:
            taken = allocate_bits(options_of, budget)
        except ValueError:
            least = sum(min(option.size for option in options) for options in options_of)
            raise UsageError(
                f"the layers may take {budget:,.0f} bytes, and the fewest bits that they may have take {least:,.0f}",
                f"Give a budget of at least {8 * least / weights:.2f} bits a weight, {least - budget:,.0f} bytes more.",
            ) from None
        predicted = sum(options[i].loss for options, i in zip(options_of, taken, strict=True))
        if free and predicted > MAX_PREDICTED_KL_SHARE * uniform_kl:
            task.note(
                f"allocating bits is predicted to leave {predicted / uniform_kl:.2f} of the KL of uniform codes, too "
                "little gain to rely on (-o budget=0.05 allows more bytes): every layer keeps the bits of the scheme"
            )
            return uniform
        return {layer.name: list(self._widths(layer, task))[i] for layer, i in zip(task.layers, taken, strict=True)}

    def _measured_with(self, task: NetworkTask) -> tuple[str, dict[str, Any]]:
        """The method whose codes say what each layer costs, and its options."""
        config = self.config
        if config.measured_with is not None:
            return config.measured_with, {}
        return (config.base, config.base_options) if task.scope_of(config.base) == "layer" else ("comq", {})

    def _widths(self, layer: LayerView, task: NetworkTask) -> Sequence[int]:
        """The bits that a layer may get; under a budget that the user names, from 2."""
        least = None if task.budget_bytes is None else 2
        return allowed_widths(layer, task.scheme, self.config.first_last == "keep", least)


def _are_bits(kept: object, layers: Sequence[LayerView]) -> bool:
    """Whether there are bits for each of these layers."""
    return isinstance(kept, dict) and all(
        type(bits := kept.get(layer.name)) is int and 2 <= bits <= MAX_BITS for layer in layers
    )

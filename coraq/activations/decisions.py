"""What is decided of the layers' inputs before the first layer is solved: their scales and their bits."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coraq.activations.allocation import (
    FISHER_IMAGES,
    SAMPLED_IMAGES,
    allocate_activation_bits,
    image_subset,
    point_scales,
    sample_inputs,
    tried_grids,
)
from coraq.activations.points import QuantizationPoint
from coraq.activations.records import spread_over
from coraq.config import MAX_BITS, MIN_BITS, Scheme
from coraq.core.tensors import ActivationGrid
from coraq.network.layers import LayerView

DecideOnce = Callable[[str, Callable[[], Any], Callable[[Any], bool]], Any]


@dataclass(frozen=True)
class InputDecisions:
    """Decides scales and bits of inputs from the float network on some calibration images.

    Attributes:
        teacher: the folded float network.
        views: all layers, by name.
        batches: calibration micro-batches; may be empty.
        seed: of the labels that are drawn.
        decide_once: keeps a decision for a resumed run (`coraq.api.NetworkTask.decide_once`).
        report: told what is being done.
        note: told what a person should know.
    """

    teacher: nn.Module
    views: Mapping[str, LayerView]
    batches: Sequence[Tensor]
    scheme: Scheme
    seed: int
    decide_once: DecideOnce
    report: Callable[[str], None]
    note: Callable[[str], None]

    def decide(
        self, points: Sequence[QuantizationPoint], mixed: Container[str]
    ) -> tuple[list[QuantizationPoint], dict[str, Tensor]]:
        """The points with their bits, and the column scales of the layers that read those which are scaled.

        Args:
            mixed: layers whose inputs' bits are to be shared out.
        """
        free = [point for point in points if point.readers and all(name in mixed for name in point.readers)]
        if free and free[0].bits in (MIN_BITS, MAX_BITS):
            own = free[0].bits
            self.note(f"inputs of {own} bits on average all have {own} bits: there are only {MIN_BITS} to {MAX_BITS}")
            free = []
        chosen = [point for point in points if point.scaled or point in free]
        columns: dict[str, Tensor] = {}
        if not chosen or not self.batches:
            return list(points), columns
        images = image_subset(self.batches, SAMPLED_IMAGES)
        samples = sample_inputs(self.teacher, chosen, self.views, images, self.report)
        for point in chosen:
            if point.scaled:
                self.report(f"scale of {point.name}")
                columns |= point_scales(point, self.views, samples[point.name])
        bits = {point.name: point.bits for point in points}
        if free:
            bits |= self.decide_once(
                "bits of inputs", lambda: self._allocate(free, samples, columns), lambda kept: _are_widths(kept, free)
            )
        decided = [
            replace(point, bits=bits[point.name], scaled=point.scaled and self.scheme.scales_inputs(bits[point.name]))
            for point in points
        ]
        scaled = {name for point in decided if point.scaled for name in point.readers}
        return decided, {name: own for name, own in columns.items() if name in scaled}

    def _allocate(
        self, points: Sequence[QuantizationPoint], samples: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """The bits of each of these points, `act_bits` on average."""
        activations = self.scheme.activations
        assert activations is not None
        grids: dict[str, dict[int, ActivationGrid]] = {}
        for point in points:
            self.report(f"grids of {point.name}")
            scales, module = columns.get(point.readers[0]), self.teacher.get_submodule(point.readers[0])
            factors = None if scales is None else spread_over(scales, module)
            grids[point.name] = tried_grids(samples[point.name], self.scheme, factors)
        values = {point.name: point.values for point in points}
        macs = {point.name: sum(self.views[name].macs for name in point.readers) for point in points}
        shares = allocate_activation_bits(
            self.teacher,
            grids,
            {point.name: point.readers for point in points},
            {"memory": [values], "bitops": [macs], "both": [values, macs]}[activations.allocation],
            points[0].bits,
            image_subset(self.batches, FISHER_IMAGES),
            torch.Generator().manual_seed(self.seed),
            self.report,
        )
        own, least, most = points[0].bits, min(shares.bits.values()), max(shares.bits.values())
        if least == most:
            self.note(f"the inputs keep {own} bits each: sharing them out is predicted to gain nothing")
        else:
            self.note(
                f"{len(points)} inputs have {least} to {most} bits, predicted to cost a KL of "
                f"{shares.kl:.3g} nats where {own} bits each would cost {shares.uniform_kl:.3g}"
            )
        return shares.bits


def _are_widths(kept: object, points: Sequence[QuantizationPoint]) -> bool:
    """Whether there are bits for each of these points."""
    return isinstance(kept, dict) and all(
        type(bits := kept.get(point.name)) is int and MIN_BITS <= bits <= MAX_BITS for point in points
    )

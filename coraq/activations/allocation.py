"""What is decided of the layers' inputs before the first layer, from the float network on some images.

Input scales (`coraq.core.smoothing`), and mixed precision: what bits each tensor gets, at the same average as if all
had the same. What rounding costs differs by orders of magnitude from tensor to tensor, and more so for each value: of
mobilenetv2's, the narrow ones that expanding layers read want 5 to 7 bits where the depthwise layers' wide ones do with
3. The cost is the KL divergence to the float network, to second order, as the loss is for HAWQ (arXiv 1911.03852) and
the KL for the weights of `coraq.methods.mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coraq.activations.points import QuantizationPoint
from coraq.config import MAX_BITS, MIN_BITS, Scheme
from coraq.core.allocation import allocate_under_costs
from coraq.core.ranges import activation_grid
from coraq.core.sensitivity import AT_ONCE, kl_of_rounding
from coraq.core.smoothing import DEPTHWISE, SHARED, input_scales
from coraq.core.subsets import spread_subset
from coraq.core.tensors import ActivationGrid
from coraq.errors import OVERFLOW_HINT, CoraqError
from coraq.network.layers import LayerView, kernel_axes

SAMPLED_IMAGES = 256
CHANNEL_SAMPLE, SAMPLES = 4096, 2**26  # values of each channel, and of all together
FISHER_IMAGES = 128
GRID_SAMPLE = 1 << 13  # values that a grid which is only tried is chosen on
WIDER = 1  # bits fewer and more that are tried; for each bit beyond, a quarter of the cost is left

Report = Callable[[str], None]


def image_subset(batches: Sequence[Tensor], images: int) -> list[Tensor]:
    """The fewest micro-batches, spread over all, that hold so many images; all if there are no more."""
    return [batches[index] for index in spread_subset([len(batch) for batch in batches], images)]


@torch.no_grad()
def sample_inputs(
    network: nn.Module,
    points: Sequence[QuantizationPoint],
    views: Mapping[str, LayerView],
    batches: Sequence[Tensor],
    report: Report,
) -> dict[str, Tensor]:
    """Some values of each tensor's channels, float32 [channels, n], by point."""
    samples: dict[str, list[Tensor]] = {point.name: [] for point in points}
    channels = sum(view.shape[0] * view.channels for view in (views[point.readers[0]] for point in points))
    wanted = max(1, min(CHANNEL_SAMPLE, SAMPLES // channels) // len(batches))

    def take(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            last = x.movedim(-1 - kernel_axes(module), -1)  # a view of images that are channels-last, and no copy
            rows = last.reshape(-1, last.shape[-1])
            generator = torch.Generator().manual_seed(len(samples[name]))
            index = torch.randint(len(rows), (wanted,), generator=generator)
            samples[name].append(rows[index.to(x.device)].float().t())

        return hook

    handles = [
        network.get_submodule(point.readers[0]).register_forward_pre_hook(take(point.name), with_kwargs=True)
        for point in points
    ]
    try:
        for done, images in enumerate(batches):
            report(f"images, {done} of {len(batches)} micro-batches")
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(samples.pop(name), 1) for name in list(samples)}


def point_scales(point: QuantizationPoint, views: Mapping[str, LayerView], values: Tensor) -> dict[str, Tensor]:
    """The column scales, float32 [groups, 1, channels], of the layers that read a tensor, from `values` of it."""
    readers = [views[name] for name in point.readers]
    power = DEPTHWISE if all(view.channels == 1 for view in readers) else SHARED
    factors = input_scales(values, point.bits, power)
    return {view.name: factors.reshape(view.shape[0], 1, view.channels) for view in readers}


def tried_grids(values: Tensor, scheme: Scheme, factors: Tensor | None) -> dict[int, ActivationGrid]:
    """Grids of about `scheme.act_bits`, by their bits, of a tensor that some `values` [channels, n] are known of.

    Args:
        factors: its input scales, in a shape that spreads over it, if it has any where its bits are few.
    """
    activations = scheme.activations
    assert activations is not None
    grids = {}
    for bits in range(max(MIN_BITS, activations.bits - WIDER), min(MAX_BITS, activations.bits + WIDER) + 1):
        own = factors if scheme.scales_inputs(bits) else None
        scaled = (values if own is None else values * own.reshape(-1, 1)).reshape(-1)
        few = scaled[:: -(-len(scaled) // GRID_SAMPLE)].cpu()
        low, high = min(0.0, float(scaled.min())), max(0.0, float(scaled.max()))
        grid = activation_grid(few, low, high, bits, activations.range, activations.percentile)
        grids[bits] = replace(grid, factors=own)
    return grids


class Shares(NamedTuple):
    """Bits by tensor, the KL in nats that their rounding is predicted to cost, and that of the same bits for all."""

    bits: dict[str, int]
    kl: float
    uniform_kl: float


def allocate_activation_bits(
    network: nn.Module,
    grids: Mapping[str, Mapping[int, ActivationGrid]],
    readers: Mapping[str, Sequence[str]],
    costs: Sequence[Mapping[str, float]],
    bits: int,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    report: Report,
) -> Shares:
    """Bits of least predicted KL for tensors that may have `bits` on average, weighted by each of `costs`.

    Args:
        network: the folded float network.
        grids: by a tensor's name and bits.
        readers: by a tensor's name, the layers that read it.
        costs: of a bit of each tensor, in one or two currencies: neither may cost more than with `bits` each.
        batches: images.
        generator: draws labels.

    Raises:
        CoraqError: the network overflows on these images.
    """
    parts = [part for images in batches for part in images.split(AT_ONCE)]

    def passing() -> Iterator[Tensor]:
        for done, part in enumerate(parts):
            report(f"sensitivities, {done} of {len(parts)} micro-batches")
            yield part

    try:
        found = kl_of_rounding(network, grids, readers, passing(), generator)
    except ValueError as error:
        raise CoraqError(str(error), OVERFLOW_HINT) from None
    for kl in found.values():
        last = max(kl)
        kl |= {width: kl[last] / 4 ** (width - last) for width in range(last + 1, MAX_BITS + 1)}
    widths, predicted = allocate_under_costs(found, costs, bits)
    return Shares(widths, predicted, sum(kl[bits] for kl in found.values()))

"""How much each layer's rounding error matters to the network's output, without labels.

For a small change δy of a layer's output the KL divergence of the softmax grows by `½ E (g·δy)²`, g the gradient of
log p(label) with the label drawn from the network's own softmax (the Fisher information). The inner product is taken
image by image along the error that the layer really makes, so correlations over positions and channels count.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def kl_of_errors(
    network: nn.Module, deltas: Mapping[str, Tensor], batches: Iterable[Tensor], generator: torch.Generator
) -> dict[str, float]:
    """The KL in nats that each layer's weight error alone adds to the network's softmax, to second order.

    Cost: a forward and backward pass, and a second run of every layer.

    Args:
        network: in eval mode; its output is logits [n, classes].
        deltas: weight errors by layer name, in the shape of the layer's own weight or [groups, out, in].
        batches: images [n, channels, height, width].
        generator: draws the labels.

    Raises:
        ValueError: the network overflows on these images; names the first layer where that shows.
    """
    total = dict.fromkeys(deltas, 0.0)
    count = 0
    shadows: dict[str, Any] = {}
    for name, delta in deltas.items():
        module: Any = network.get_submodule(name)
        shadows[name] = shadow = copy.deepcopy(module).requires_grad_(False)
        shadow.weight.copy_(delta.reshape(shadow.weight.shape))
        shadow.bias = None
    taken: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # a probe is added because the next module may overwrite the output itself, and its gradient with it
            probe = torch.zeros_like(output, requires_grad=True)
            with torch.no_grad():
                error = shadows[name].forward(args[0])
            taken[name] = (probe, error)
            return output + probe

        return hook

    handles = [network.get_submodule(name).register_forward_hook(watch(name)) for name in deltas]
    try:
        for images in batches:
            taken.clear()
            with torch.enable_grad():
                log_p = network(images).log_softmax(-1)
                if not bool(torch.isfinite(log_p).all()):
                    shows = (name for name, (_, error) in taken.items() if not bool(torch.isfinite(error).all()))
                    where = next(shows, next(reversed(taken), "the network"))
                    raise ValueError(f"the inputs or outputs of {where} are not finite")
                label = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                names = list(taken)
                slopes = torch.autograd.grad(
                    log_p.gather(-1, label).sum(), [taken[name][0] for name in names], allow_unused=True
                )
            count += len(images)
            for name, slope in zip(names, slopes, strict=True):
                if slope is not None:
                    total[name] += _square_of_products(slope, taken[name][1], len(images))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / (2 * max(count, 1)) for name, value in total.items()}


def _square_of_products(slope: Tensor, error: Tensor, images: int) -> float:
    """Σ over images of (g·δy)², the error's mean taken out of every channel, since the bias absorbs it."""
    linear = slope.dim() != 4
    rest = tuple(range(error.dim() - 1)) if linear else (0, 2, 3)
    centred = error - error.mean(rest, keepdim=True)
    return float((slope * centred).reshape(images, -1).sum(1).double().square().sum())

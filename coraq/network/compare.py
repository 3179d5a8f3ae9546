"""Whether two networks compute the same, and where they begin to differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coraq.network.dataflow import tensors_in

TOLERANCE = 1e-3  # relative; the same weights in the same order of summation differ by nothing


@torch.no_grad()
def first_difference(network: nn.Module, other: nn.Module, images: Tensor) -> str | None:
    """The first module whose output differs, in order of return; None where both compute the same.

    Args:
        images: [n, channels, height, width].
    """
    wanted, wanted_output = _outputs(network, images)
    try:
        found, found_output = _outputs(other, images)
    except RuntimeError:
        return "a tensor's shape"
    if _same(wanted_output, found_output):
        return None
    for (name, left), (other_name, right) in zip(wanted, found, strict=False):
        if name != other_name:
            return f"module {name!r} (in its place runs {other_name!r})"
        if not _same(left, right):
            return f"module {name!r}"
    return "what the network does with its modules' outputs"


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    if len(left) != len(right):
        return False
    return all(
        a.shape == b.shape and float((a.double() - b.double()).norm()) <= TOLERANCE * float(a.double().norm())
        for a, b in zip(left, right, strict=True)
    )


def _outputs(network: nn.Module, images: Tensor) -> tuple[list[tuple[str, list[Tensor]]], list[Tensor]]:
    """What every module returned, copied, by time of return; and what the network returned."""
    seen: list[tuple[str, list[Tensor]]] = []
    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, name=name: seen.append((name, [t.clone() for t in tensors_in(output)]))
        )
        for name, module in network.named_modules()
        if name
    ]
    try:
        output = network(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen, list(tensors_in(output))

"""Slow and obvious answers to hold fast ones against."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def state_digest(module: nn.Module) -> str:
    """A hash over every parameter and buffer, bit by bit."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hook_count(module: nn.Module) -> int:
    """Forward hooks on a network and all its modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@torch.no_grad()
def plain_inputs(model: nn.Module, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What each named module receives at its first call in an ordinary forward pass (copies)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, args[0].clone())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def linear_part(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`weight * x` in float64 by the module's own forward, without its bias; `weight` is [groups, out, in].

    Returns:
        [groups · out, positions of all images].
    """
    import copy

    own: Any = copy.deepcopy(module).double()
    own._forward_pre_hooks.clear()
    own._forward_hooks.clear()
    own.bias = None
    own.weight.copy_(weight.reshape(own.weight.shape))
    out: Tensor = own(x.double())
    return out.reshape(-1, out.shape[-1]).t() if isinstance(module, nn.Linear) else out.transpose(0, 1).flatten(1)


def mean_output_error(module: nn.Module, inputs: Sequence[Tensor], delta: Tensor, centred: bool) -> Tensor:
    """`E‖Δ x‖²` of each output channel over all positions, mean taken out if `centred`: float64 [groups, out]."""
    error = torch.cat([linear_part(module, x, delta) for x in inputs], 1)
    if centred:
        error = error - error.mean(1, keepdim=True)
    return error.square().mean(1).reshape(delta.shape[:2])

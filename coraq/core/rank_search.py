"""CoRa's search (arXiv 2408.00923, algorithm 1): one cutoff a layer, learned on the KL to the float network.

Each layer runs as one convolution with the weight `Ŵ + U diag(T²(c)) Uᵀ D`: the same function as the paper's three,
at nearly the cost of the float network. U, D and Ŵ are constants; gradients reach the cutoffs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from coraq.core.lowrank import ORDER, Directions, butterworth

NEGLIGIBLE = 1e-4  # a gain: its direction would change the layer's output by less than rounding A and B does


@dataclass(frozen=True)
class SearchLayer:
    """A layer of the search.

    Attributes:
        weight: [groups, out, in], Ŵ: what its codes stand for.
        bias: [out] or None.
        mean: [groups, in], of its inputs; the bias absorbs what the adapter does to it.
        found: the directions of what its codes leave.
        price: ω of the budget: adapter parameters at full rank over all weights of the network.
    """

    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    found: Directions
    price: float

    def effective(self, cutoff: Tensor, order: int, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Weight in the module's own shape, and bias, at a cutoff (differentiable)."""
        gains = butterworth(cutoff, self.found.basis.shape[-1], order)
        # gains fall with the rank, and at a budget of some percent nearly all of them are nothing
        added = self.found.keep(gains[: max(1, int((gains.detach() > NEGLIGIBLE).sum()))])
        bias = self.bias
        if bias is not None:
            bias = bias - (added @ self.mean[..., None]).reshape(-1)
        weight = (self.weight + added).reshape(shape)
        return weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight, bias


def budget_of(layers: Mapping[str, SearchLayer], cutoffs: Tensor) -> Tensor:
    """ρ(c) = Σ ω_l c_l (equation 9)."""
    prices = torch.tensor([layer.price for layer in layers.values()], dtype=cutoffs.dtype, device=cutoffs.device)
    return (prices * cutoffs).sum()


def relaxed_loss(
    network: nn.Module,
    layers: Mapping[str, SearchLayer],
    cutoffs: Tensor,
    images: Tensor,
    target: Tensor,
    budget: float,
    gamma: float = 1.0,
    order: int = ORDER,
) -> tuple[Tensor, Tensor]:
    """`KL + γ exp(relu(ρ(c) − ρ*))`, and the KL alone, in nats; differentiable in `cutoffs` [layers].

    Args:
        network: the network whose layers' weights are replaced; all else in it is used as it is.
        images, target: [n, channels, height, width] and the float network's logits of them.
    """
    replaced: dict[str, Tensor] = {}
    for cutoff, (name, layer) in zip(cutoffs, layers.items(), strict=True):
        shape = network.get_parameter(f"{name}.weight").shape
        weight, bias = layer.effective(cutoff, order, shape)
        replaced[f"{name}.weight"] = weight
        if bias is not None:
            replaced[f"{name}.bias"] = bias
    logits = functional_call(network, replaced, (images,))
    kl = functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    over = torch.relu(budget_of(layers, cutoffs) - budget)
    return kl + gamma * torch.exp(over), kl


def search_cutoffs(
    network: nn.Module,
    layers: Mapping[str, SearchLayer],
    start: Sequence[float],
    batches: Sequence[tuple[Tensor, Tensor]],
    iterations: int,
    budget: float,
    *,
    rate: float = 0.01,
    clip: float = 0.2,
    gamma: float = 1.0,
    order: int = ORDER,
    on_step: Callable[[int, float, float], None] | None = None,
) -> list[float]:
    """The cutoffs after `iterations` steps of Adam over `batches` of (images, float logits), in turn.

    After each step the cutoffs are projected to [1/R, 1]. `on_step` gets the step's number, its KL and its budget.
    """
    floors = torch.tensor([1 / layer.found.basis.shape[-1] for layer in layers.values()])
    cutoffs = torch.tensor(list(start), dtype=torch.float32).clamp_(min=floors, max=torch.ones(())).requires_grad_()
    optimizer = torch.optim.Adam([cutoffs], lr=rate)
    for step in range(iterations):
        images, target = batches[step % len(batches)]
        with torch.enable_grad():
            on_device = cutoffs.to(images.device)
            loss, kl = relaxed_loss(network, layers, on_device, images, target, budget, gamma, order)
            (slope,) = torch.autograd.grad(loss, cutoffs)
        cutoffs.grad = slope.nan_to_num(0.0).clamp(-clip, clip)
        spent = float(budget_of(layers, cutoffs.detach()))
        optimizer.step()
        with torch.no_grad():
            cutoffs.clamp_(min=floors, max=torch.ones(()))
        if on_step is not None:
            on_step(step, float(kl.detach()), spent)
    return [float(c) for c in cutoffs.detach()]

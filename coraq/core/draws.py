"""Random draws for tensors that may lie on any device, from a generator on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform draws from [0, 1) with the shape, strides, type and device of `x`.

    A generator fills only tensors of its own device, so the draws are made there and moved: on every device they are
    the CPU's for the same seed.
    """
    drawn_on = x.device if generator is None else generator.device
    return torch.empty_like(x, device=drawn_on).uniform_(generator=generator).to(x.device)

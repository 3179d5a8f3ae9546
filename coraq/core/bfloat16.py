"""Products of bfloat16 numbers, summed in float32 from a bias in float32, and rounded to bfloat16 once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

AXES: dict[Callable[..., Tensor], int] = {functional.conv1d: 1, functional.conv2d: 2}  # behind an input's channels


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are the device's own (twice as fast), not emulated (slower than float)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and known is not None and bool(known())


def convolve(
    kind: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`functional.conv1d` or `conv2d` (`kind`) of bfloat16 tensors and a float32 bias, in bfloat16."""
    axes = AXES[kind]
    if not _ONEDNN or x.device.type != "cpu" or isinstance(padding, str) or x.dim() != axes + 2:
        return kind(x.float(), weight.float(), bias, stride, padding, dilation, groups).to(torch.bfloat16)
    stride, padding, dilation = (_each(value, axes) for value in (stride, padding, dilation))
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, "none", [], ""
    )
    return result


def multiply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`functional.linear` of bfloat16 tensors and a float32 bias, in bfloat16."""
    if not _ONEDNN or x.device.type != "cpu" or x.dim() < 2:
        return functional.linear(x.float(), weight.float(), bias).to(torch.bfloat16)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def clip(x: Tensor, top: float = math.inf) -> Tensor:
    """`x.clamp_(0, top)` in place, in a quarter of torch's time, which goes by float32 and back.

    The bits of positive numbers, as integers, have the numbers' order, and those of negative numbers are negative. So
    does a NaN of either sign have an order: what it becomes is 0, `top` or, without a top, NaN.
    """
    bits = x.view(torch.int16)
    if top == math.inf:
        bits.clamp_(min=0)
    else:
        bits.clamp_(0, int(torch.tensor(top, dtype=torch.bfloat16).view(torch.int16)))
    return x


def _each(value: Any, axes: int) -> Sequence[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _onednn_works() -> bool:
    """Whether oneDNN's products can be called: torch's own take no bias but one rounded to bfloat16.

    The operators are what torch.compile calls, not documented; so they are tried once, and float32 does without them.
    """
    try:
        x, weight, bias = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3, dtype=torch.bfloat16), torch.rand(4)
        wanted = (bias + 3).to(torch.bfloat16).expand(2, 4)
        linear = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        image, kernel = x[..., None, None], weight[..., None, None]
        convolution = torch.ops.mkldnn._convolution_pointwise(
            image, kernel, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], ""
        )
        return bool(torch.equal(linear, wanted) and torch.equal(convolution[..., 0, 0], wanted))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


_ONEDNN = _onednn_works()

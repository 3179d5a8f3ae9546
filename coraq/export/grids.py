"""Activation grids of a network on their way into an ONNX graph: each becomes Quantize → [Clip] → Dequantize.

A grid is `torch.fake_quantize_per_tensor_affine` in the network's forward pass, wherever it stands. torch's exporter
has no translation of it, so while a network is exported every call goes to an operator of ours that has one. Codes
are stored unsigned (signed ones shifted by 128, which changes no value): integer kernels are fastest so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHIFT = 128  # from signed to unsigned codes of 8 bits


@torch.library.custom_op("coraq::grid", mutates_args=())
def grid_op(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """`x` rounded to the levels `scale · (code − zero_point)`, codes low … high."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)


@grid_op.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


class GridsAsOperator(TorchFunctionMode):
    """While this is on, `torch.fake_quantize_per_tensor_affine` is `replacement`."""

    def __init__(self, replacement: Callable[..., Tensor] = torch.ops.coraq.grid) -> None:
        super().__init__()
        self.replacement = replacement

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.fake_quantize_per_tensor_affine:
            return self.replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def translation() -> dict[Any, Any]:
    """For torch.onnx.export: what our operator is in ONNX."""
    from onnx import numpy_helper
    from onnxscript import opset18 as op

    def integer(value: int) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(value, np.uint8)))

    def grid(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
        shift = SHIFT if low < 0 else 0
        step, zero = op.Constant(value_float=scale), integer(zero_point + shift)
        quantize: Any = op.QuantizeLinear
        codes = quantize(x, step, zero)
        if (low + shift, high + shift) != (0, 255):
            codes = op.Clip(codes, integer(low + shift), integer(high + shift))
        dequantize: Any = op.DequantizeLinear
        return dequantize(codes, step, zero)

    return {torch.ops.coraq.grid.default: grid}

"""Calibration passes in bfloat16: half of the time and memory of float32 where the processor multiplies it.

Rounded to bfloat16, a weight is off by up to 2⁻⁸ of itself, the same for all images, and so is a bias. Over
mobilenetv2's layers these shifts add up to a KL divergence of 0.007 nats, as much as weights of 3 bits cost with
`coraq.methods.mixed`. So sums start at biases in float32, and what the rounding of a weight moves the mean output by is
taken off its bias; what is left, rounding errors that differ from value to value, costs a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from coraq.config import Scheme
from coraq.core.bfloat16 import AXES, clip, convolve, multiplies_bfloat16, multiply
from coraq.network.layers import as_matrices, groups_of

COARSE = 4  # bits of weights whose own error is far larger
Precision = Literal["float32", "bfloat16"]


def resolve_precision(asked: Literal["auto", "float32", "bfloat16"], scheme: Scheme, device: torch.device) -> Precision:
    """What `auto` is for a scheme on a device: bfloat16 where it is fast and does not show.

    Beside weights of 8 bits it would show: mobilenetv2's KL rose from 0.0002 to 0.0006 nats (`comq`). With activations
    of 4 bits, too: other codes are other errors of a whole step, and the KL rose by 3 to 8 %.
    """
    if asked != "auto":
        return asked
    coarse = scheme.weights.bits <= COARSE and scheme.act_bits is None
    return "bfloat16" if coarse and device.type == "cpu" and multiplies_bfloat16(device) else "float32"


class _Rounded(NamedTuple):
    weight: Tensor  # bfloat16
    bias: Tensor  # float32


class BFloat16Pass(TorchFunctionMode):
    """While it is entered, networks run in bfloat16.

    Layers that were taken do as above; one that was not multiplies in float32. All else is as torch's autocast has it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._autocast = torch.autocast(device.type, torch.bfloat16)
        self._float = torch.autocast(device.type, enabled=False)
        self._taken: dict[int, _Rounded] = {}  # by the identity of the module's own weight

    def take(self, module: Any, mean: Tensor) -> None:
        """Let a layer run in bfloat16 from now on, with the weight and bias that it has now.

        Args:
            mean: of its inputs, float64 [groups, in].
        """
        weight = module.weight.detach()
        rounded = weight.to(torch.bfloat16)
        lost = as_matrices(weight.double() - rounded.double(), groups_of(module))
        shift = torch.einsum("goi,gi->go", lost, mean).reshape(-1)
        bias = shift if module.bias is None else module.bias.detach().double() + shift
        self._taken[id(module.weight)] = _Rounded(rounded, bias.float())

    def __enter__(self) -> BFloat16Pass:
        self._autocast.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._autocast.__exit__(kind, error, traceback)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear or func in AXES:
            return self._product(func, *args, **given)
        return CLIPPING.get(func, func)(*args, **given)

    def _product(
        self,
        func: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *more: Any,
        **by: Any,
    ) -> Tensor:
        taken = self._taken.get(id(weight))
        with self._float:
            if taken is None:
                return func(input.float(), weight.float(), bias, *more, **by).to(torch.bfloat16)
            x = input.to(torch.bfloat16)
            if func in AXES:
                return convolve(func, x, *taken, *more, **by)
            return multiply(x, *taken)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    if input.dtype != torch.bfloat16:
        return functional.relu(input, inplace)
    return clip(input if inplace else input.clone())


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    if input.dtype != torch.bfloat16 or min_val != 0:
        return functional.hardtanh(input, min_val, max_val, inplace)
    return clip(input if inplace else input.clone(), max_val)


CLIPPING: dict[Callable[..., Any], Callable[..., Tensor]] = {functional.relu: _relu, functional.hardtanh: _hardtanh}

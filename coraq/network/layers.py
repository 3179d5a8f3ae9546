"""Quantizable layers seen as batches of matrices, whatever kind of convolution they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding
from torch import Tensor, nn
from torch.nn import functional

from coraq.config import Scheme
from coraq.core.columns import column_scales
from coraq.core.layer_problem import GridSpec
from coraq.core.patches import Geometry

QUANTIZABLE = (nn.Conv2d, nn.Conv1d, nn.Linear)


@dataclass(frozen=True)
class LayerView:
    """One quantizable layer of the float network, BatchNorm folded.

    Attributes:
        name: module path in the network.
        weight: float32 [groups, out/groups, in/groups·kh·kw].
        bias: float32 [out] or None.
        bits: of its weight codes, as the Scheme resolves them.
        rank: of its adapter, where the Scheme says one.
        kind: "conv", "depthwise" or "linear".
        kernel: (kh, kw); (1, 1) for Linear.
        macs: multiply-accumulates for one image.
        act_bits: of its input, None where that is float.
        input_scales: column scales that the grid of its input asks for, float32 [groups, 1, channels], or None.
        zero_point_fraction: of its own zero points, instead of what the Scheme says; None: as the Scheme says.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    bits: int
    rank: int | None
    kind: str
    kernel: tuple[int, int]
    macs: int
    act_bits: int | None = None
    input_scales: Tensor | None = None
    zero_point_fraction: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        groups, out, inputs = self.weight.shape
        return groups, out, inputs

    @property
    def channels(self) -> int:
        """Input channels of a group."""
        return self.weight.shape[2] // (self.kernel[0] * self.kernel[1])

    @property
    def column_bytes(self) -> int:
        """Bytes of column scales, where there are any: one each."""
        return self.weight.shape[0] * self.channels

    def columns(self, scheme: Scheme) -> Tensor | None:
        """Column scales as the Scheme says, float32 [groups, 1, channels], or None."""
        if self.input_scales is not None or not self.has_columns(scheme):
            return self.input_scales
        return column_scales(self.weight, self.kernel[0] * self.kernel[1])

    def has_columns(self, scheme: Scheme) -> bool:
        """Whether there are `columns`."""
        return self.input_scales is not None or scheme.scales_columns(self.bits, self.channels)

    def grid_spec(self, scheme: Scheme) -> GridSpec:
        """What the grid of its weight must be like."""
        own, bits = self.zero_point_fraction, self.bits
        fractions = [scheme.fraction(bits, searched) if own is None else own for searched in (True, False)]
        return GridSpec(bits, scheme.weights.symmetric, scheme.weights.granularity, *fractions)

    def summary(self) -> dict[str, Any]:
        """The layer as plain values, without its tensors."""
        values = {"name": self.name, "kind": self.kind, "shape": list(self.shape), "bits": self.bits, "macs": self.macs}
        return values if self.act_bits is None else {**values, "act_bits": self.act_bits}


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` is a convolution or Linear layer whose function is its weight's (transposed ones are not)."""
    return isinstance(module, QUANTIZABLE) and not isinstance(module, nn.modules.conv._ConvTransposeNd)


def groups_of(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def as_matrices(weight: Tensor, groups: int) -> Tensor:
    """[out, in/groups, kh, kw] (or [out, in], or [out, in/groups, k]) → [groups, out/groups, in/groups·kh·kw]."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def kind_of(module: Any) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    groups = groups_of(module)
    return "depthwise" if groups > 1 and groups == module.in_channels else "conv"


def kernel_of(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return 1, 1
    size = module.kernel_size
    return (1, int(size[0])) if len(size) == 1 else (int(size[0]), int(size[1]))


def kernel_axes(module: Any) -> int:
    """Axes behind the channels of a layer's input: 0 of a Linear, 1 of a Conv1d, 2 of a Conv2d."""
    return 0 if isinstance(module, nn.Linear) else len(module.kernel_size)


def as_images(module: nn.Module, x: Tensor) -> tuple[Tensor, Geometry]:
    """A layer's input as [n, channels, height, width] with the geometry of its im2col patches.

    Linear inputs [..., in] become [1, in, 1, rows] without a copy (rows stay contiguous), Conv1d inputs
    [n, c, length] become [n, c, 1, length]. Padding that is not zeros is applied here.
    """
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows.t()[None, :, None, :], Geometry((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, module.in_features)
    assert isinstance(module, (nn.Conv2d, nn.Conv1d))
    one_d = isinstance(module, nn.Conv1d)
    if x.dim() == (2 if one_d else 3):  # an unbatched input
        x = x[None]
    if one_d:
        x = x[:, :, None, :]
    kernel, stride, dilation = kernel_of(module), _pair(module.stride), _pair(module.dilation)
    padding = _padding(module, x, kernel, stride, dilation)
    if module.padding_mode != "zeros":
        top, bottom, left, right = padding
        pads = (left, right, top, bottom)
        x = functional.pad(x, pads, mode=module.padding_mode)
        padding = (0, 0, 0, 0)
    return x, Geometry(kernel, stride, padding, dilation, module.groups, module.in_channels)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return (1, int(value[0])) if len(value) == 1 else (int(value[0]), int(value[1]))


def _padding(
    module: nn.Conv2d | nn.Conv1d,
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of zeros around an input."""
    if isinstance(module, Conv2dSame):
        total = [get_same_padding(x.shape[2 + axis], kernel[axis], stride[axis], dilation[axis]) for axis in (0, 1)]
    elif module.padding == "valid":
        total = [0, 0]
    elif module.padding == "same":
        total = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    else:
        pads = tuple(int(p) for p in module.padding)
        high, wide = (0, pads[0]) if len(pads) == 1 else pads
        return high, high, wide, wide
    top, left = total[0] // 2, total[1] // 2
    return top, total[0] - top, left, total[1] - left


@torch.no_grad()
def install(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Put an effective weight [groups, out, in] and a bias into a layer of the student."""
    module.weight.copy_(weight.reshape(module.weight.shape))
    if bias is not None:
        if module.bias is None:
            module.bias = nn.Parameter(bias.clone(), requires_grad=False)
        else:
            module.bias.copy_(bias)

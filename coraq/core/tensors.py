"""What a method returns for a layer: integer codes on a grid, perhaps a low-rank adapter and a new bias.

Everywhere in coraq a layer's weight is a batch of matrices `[groups, out, in]`: `out` output channels of one
group, `in = channels/groups · kh · kw` inputs of each (a Linear layer has one group and no kernel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from coraq.core.columns import multiplied, rounded
from coraq.core.entropy_coding import stream_bytes
from coraq.core.fake_quantize import fake_quantize

Coding = Literal["packed", "ans"]  # so many bits a code, or an entropy-coded stream of them
ScaleType = Literal["float32", "bfloat16"]
MAX_CORE_BITS = 16  # the numerics work up to here, so that tests can approach the float limit


@dataclass(frozen=True)
class QTensor:
    """Codes on a grid: `scale · (codes − zero_point)`, or `scale · codebook[codes]`, times `columns` if there are any.

    Attributes:
        codes: [groups, out, in], uint8 (int32 above 8 bits), in `0 … 2**bits − 1`.
        scale: float32, [groups, out, 1] for a scale per output channel, [1, 1, 1] for one per tensor.
        bits: width of a code.
        zero_point: same dtype as the codes, same shape as `scale`; None stands for the middle code `2**(bits−1)`
            (a symmetric grid), which costs no bytes.
        codebook: float32 [2**bits] levels of a non-uniform grid (then there is no zero point).
        fraction: bits of the zero point behind the point: it counts in `2**−fraction` of a code.
        columns: float32 [groups, 1, channels], a factor for each input channel of a group (`coraq.core.columns`).
        coding: how the codes are stored (`coraq.core.packing`, `coraq.core.entropy_coding`).
        scale_type: how the scales are stored; they are representable in it.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    zero_point: Tensor | None = None
    codebook: Tensor | None = None
    fraction: int = 0
    columns: Tensor | None = None
    coding: Coding = "packed"
    scale_type: ScaleType = "float32"

    @property
    def zero(self) -> Tensor:
        """The zero point in codes, float32 in the scale's shape; the middle code on a symmetric grid."""
        if self.zero_point is None:
            return torch.full_like(self.scale, 2 ** (self.bits - 1))
        return self.zero_point.float() / 2**self.fraction

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for: float32 [groups, out, in]. Deterministic to the last bit."""
        if self.codebook is not None:
            weight = self.codebook[self.codes.long()] * self.scale
        else:
            weight = (self.codes.float() - self.zero) * self.scale
        return multiplied(weight, self.columns)

    def coded(self, coding: Coding | Literal["auto"]) -> QTensor:
        """The same codes, stored in this way; `auto`: in the smaller one. Codes above 8 bits stay packed."""
        if self.bits > 8:
            return replace(self, coding="packed")
        if coding != "auto":
            return replace(self, coding=coding)
        packed, ans = replace(self, coding="packed"), replace(self, coding="ans")
        return ans if ans.size_bytes() < packed.size_bytes() else packed

    def with_stored_scale(self) -> QTensor:
        """The same codes with scales that are representable in `scale_type`."""
        if self.scale_type == "float32":
            return self
        return replace(self, scale=self.scale.bfloat16().float())

    def whole(self) -> QTensor:
        """The same weight, bit for bit, with a zero point that is a code: of `bits + fraction` bits.

        Integer formats know no other. A zero point in quarters makes 2-bit codes 4-bit ones, 0, 4, 8 and 12.
        """
        if not self.fraction:
            return self
        codes, scale = self.codes << self.fraction, self.scale / 2**self.fraction
        return replace(self, codes=codes, scale=scale, bits=self.bits + self.fraction, fraction=0)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless this is a finite, in-range quantization of a weight of `shape`."""
        groups, out, _ = shape
        if not 1 <= self.bits <= MAX_CORE_BITS:
            raise ValueError(f"bits is {self.bits}, not in 1 … {MAX_CORE_BITS}")
        if tuple(self.codes.shape) != tuple(shape):
            raise ValueError(f"codes have shape {list(self.codes.shape)}, the layer's weight {list(shape)}")
        wanted = torch.uint8 if self.bits <= 8 else torch.int32
        if self.codes.dtype != wanted:
            raise ValueError(f"codes are {self.codes.dtype}, {self.bits}-bit codes must be {wanted}")
        if self.codes.numel() and not 0 <= int(self.codes.min()) <= int(self.codes.max()) < 2**self.bits:
            raise ValueError(f"codes leave 0 … {2**self.bits - 1}")
        if tuple(self.scale.shape) not in ((groups, out, 1), (1, 1, 1)):
            raise ValueError(f"scale has shape {list(self.scale.shape)}, not {[groups, out, 1]} or [1, 1, 1]")
        if self.scale.dtype != torch.float32 or not bool(torch.isfinite(self.scale).all()):
            raise ValueError("scale must be finite float32")
        if self.coding == "ans" and self.bits > 8:
            raise ValueError(f"codes of {self.bits} bits cannot be entropy-coded; 8 bits can")
        if self.scale_type != "float32" and not torch.equal(self.scale, self.scale.bfloat16().float()):
            raise ValueError("scale is not representable in bfloat16")
        if self.zero_point is not None:
            if self.codebook is not None:
                raise ValueError("a codebook has no zero point")
            if self.zero_point.shape != self.scale.shape or self.zero_point.dtype != self.codes.dtype:
                raise ValueError("zero point must have the scale's shape and the codes' type")
        if self.fraction and (self.zero_point is None or self.fraction < 0 or self.bits + self.fraction > 8):
            raise ValueError(f"{self.bits} bits leave no room for a zero point with {self.fraction} bits of fraction")
        if self.codebook is not None:
            if tuple(self.codebook.shape) != (2**self.bits,) or self.codebook.dtype != torch.float32:
                raise ValueError(f"codebook must be float32 [{2**self.bits}]")
            if not bool(torch.isfinite(self.codebook).all()):
                raise ValueError("codebook must be finite")
        if self.columns is not None:
            self._check_columns(*shape)

    def _check_columns(self, groups: int, out: int, inputs: int) -> None:
        assert self.columns is not None
        found = tuple(self.columns.shape)
        if len(found) != 3 or found[:2] != (groups, 1) or not found[2] or inputs % found[2]:
            raise ValueError(f"column scales have shape {list(found)}, not [{groups}, 1, a divisor of {inputs}]")
        if self.columns.dtype != torch.float32 or not torch.equal(self.columns, rounded(self.columns)):
            raise ValueError("column scales must be positive numbers of 8 bits, as float32")

    def size_bytes(self) -> int:
        """Bytes on disk: codes (packed, each output channel padded to a byte), scales, zero points, codebook, column
        scales.
        """
        groups, out, inputs = self.codes.shape
        zero_bytes = 0 if self.zero_point is None else self.zero_point.element_size()
        size = stored_bytes((groups, out, inputs), self.bits, self.scale.numel(), zero_bytes)
        if self.coding == "ans":
            size += stream_bytes(self.codes) - stored_bytes((groups, out, inputs), self.bits, 0, 0)
        size -= 2 * self.scale.numel() if self.scale_type == "bfloat16" else 0
        size += 0 if self.columns is None else self.columns.numel()
        return size if self.codebook is None else size + 4 * self.codebook.numel()


def stored_bytes(shape: tuple[int, int, int], bits: int, scales: int, zero_bytes: int) -> int:
    """Bytes on disk of codes [groups, out, in] with so many scales, each with a zero point of `zero_bytes` or none."""
    groups, out, inputs = shape
    return groups * out * -(-inputs * bits // 8) + scales * (4 + zero_bytes)


@dataclass(frozen=True)
class LowRank:
    """A low-rank adapter: the layer's weight is `dequantize(weight) + b @ a`.

    Attributes:
        b: [groups, out, rank]; a: [groups, rank, in]. Codes and scales (per row of `a`, per row of `b`).
    """

    b: QTensor
    a: QTensor

    def dequantize(self) -> Tensor:
        """`b @ a`, float32 [groups, out, in]."""
        return self.b.dequantize() @ self.a.dequantize()

    @property
    def rank(self) -> int:
        return int(self.a.codes.shape[1])

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the factors multiply to `shape` and are valid themselves."""
        groups, out, inputs = shape
        self.b.check((groups, out, self.rank))
        self.a.check((groups, self.rank, inputs))

    def size_bytes(self) -> int:
        return self.b.size_bytes() + self.a.size_bytes()


@dataclass(frozen=True)
class ActivationGrid:
    """The grid of one activation tensor, shared by all that read it: `scale · (code − zero_point)`.

    Attributes:
        scale: positive, exactly representable in float32.
        zero_point: the code of zero.
        bits: width of a code.
        signed: codes run from −2**(bits−1) to 2**(bits−1) − 1 instead of from 0 to 2**bits − 1.
        factors: the tensor is multiplied by them before it is rounded, and divided after: the column scales of the
            layers that read it, in a shape that spreads over it (`coraq.core.smoothing`). None: it is rounded as it is.
    """

    scale: float
    zero_point: int
    bits: int
    signed: bool
    factors: Tensor | None = field(default=None, compare=False)

    @property
    def low(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The greatest code."""
        return self.low + 2**self.bits - 1

    def scaled(self, factor: float) -> ActivationGrid:
        """The same codes for values `factor` times as large; the scale exact in float32."""
        return replace(self, scale=float(torch.tensor(self.scale * factor, dtype=torch.float32)))

    def round(self, x: Tensor) -> Tensor:
        """The nearest levels to `x`, in a new tensor of the same shape; rounding twice changes nothing."""
        if self.factors is not None:
            return replace(self, factors=None).round(x * self.factors).div_(self.factors)
        return fake_quantize(x, self.scale, self.zero_point, self.low, self.high)

    __call__ = round  # a grid stands wherever a function of a tensor can

    def codes(self, x: Tensor) -> Tensor:
        """The nearest codes to `x`, int32."""
        if self.factors is not None:
            return replace(self, factors=None).codes(x * self.factors)
        return torch.round(self.round(x) / self.scale).int() + self.zero_point

    def check(self) -> None:
        """Raise ValueError unless this is a grid."""
        if not 1 <= self.bits <= MAX_CORE_BITS:
            raise ValueError(f"bits of an activation grid are {self.bits}, not in 1 … {MAX_CORE_BITS}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale of an activation grid is {self.scale}, not positive and finite")
        if not self.low <= self.zero_point <= self.high:
            raise ValueError(f"zero point of an activation grid is {self.zero_point}, no code")


@dataclass(frozen=True)
class QuantizedLayer:
    """All that a method says about one layer.

    Attributes:
        weight: the codes.
        adapter: optional low-rank correction of the weight.
        bias: float32 [groups · out]; None leaves the bias to `Task.commit` (bias correction as the Scheme says).
        input: grid of the tensor that the layer reads; None leaves it to the engine, which has calibrated one if the
            Scheme quantizes activations.
        metrics: what the method measured of it, for the report (`error` is relative to the output's energy).
    """

    weight: QTensor
    adapter: LowRank | None = None
    bias: Tensor | None = None
    input: ActivationGrid | None = None
    metrics: Mapping[str, float | int | str] = field(default_factory=dict, compare=False)

    def dequantize(self) -> Tensor:
        """The effective weight, float32 [groups, out, in]."""
        weight = self.weight.dequantize()
        return weight if self.adapter is None else weight + self.adapter.dequantize()

    def whole(self) -> QuantizedLayer:
        """The same layer with a zero point that is a code, see `QTensor.whole`."""
        return replace(self, weight=self.weight.whole())

    def scaled(self, factor: Tensor) -> QuantizedLayer:
        """The layer with its codes' scale times `factor` [groups, out, 1]; adapter and bias as they are."""
        scale = self.weight.scale * factor.to(self.weight.scale.device)
        return replace(self, weight=replace(self.weight, scale=scale).with_stored_scale())

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless everything fits a weight of `shape` and is finite."""
        self.weight.check(shape)
        if self.adapter is not None:
            self.adapter.check(shape)
        if self.bias is not None:
            if tuple(self.bias.shape) != (shape[0] * shape[1],):
                raise ValueError(f"bias has shape {list(self.bias.shape)}, not {[shape[0] * shape[1]]}")
            if self.bias.dtype != torch.float32 or not bool(torch.isfinite(self.bias).all()):
                raise ValueError("bias must be finite float32")
        if self.input is not None:
            self.input.check()

    def size_bytes(self) -> int:
        """Bytes of codes, scales, zero points and adapter (not of the bias, which the float network has too)."""
        return self.weight.size_bytes() + (0 if self.adapter is None else self.adapter.size_bytes())

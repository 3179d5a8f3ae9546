"""Quantizable layers seen as batches of matrices, whatever kind of convolution they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

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
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    bits: int
    rank: int | None
    kind: str
    kernel: tuple[int, int]
    macs: int

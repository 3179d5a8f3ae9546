"""The least-squares problem that rounding one layer's weight is: output error under the Gram of the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from coraq.core.columns import divided, gram_for_divided, multiplied
from coraq.core.gram import shrunk


@dataclass(frozen=True)
class LeastSquares:
    """`min over Q of Σ_g tr[(W_g − Q_g) H_g (W_g − Q_g)ᵀ]`.

    A layer of very many inputs has a block-diagonal H: each block for so many consecutive inputs, correlations from
    one block to another left out. `split` and `coraq.core.rounding` know how to work with that.

    Attributes:
        weight: float32 [groups, out, in], the unconstrained optimum W.
        gram: float64 [groups · blocks, in/blocks, in/blocks], H: symmetric, positive semi-definite, per row of im2col
            patches (a mean, not a sum); centred where the bias absorbs the mean. `blocks` is nearly always 1.
        rows: with several blocks, some inputs [groups, rows, in], centred alike: what they say of a rounding has all
            correlations in it. None otherwise.
        count: rows that H is a mean of; None: not known, or H is exact.
    """

    weight: Tensor
    gram: Tensor
    rows: Tensor | None = None
    count: int | None = None

    @classmethod
    def of_weight(cls, weight: Tensor) -> LeastSquares:
        """The problem for white inputs, H the identity: the output error is the weight error."""
        identity = torch.eye(weight.shape[2], dtype=torch.float64, device=weight.device)
        return cls(weight, identity.expand(len(weight), -1, -1))

    @property
    def blocks(self) -> int:
        return self.gram.shape[0] // self.weight.shape[0]

    def shrunk(self, share: float = 1.0) -> LeastSquares:
        """The same problem with H as `coraq.core.gram.shrunk` makes it."""
        if not share or self.count is None:
            return self
        return replace(self, gram=shrunk(self.gram, self.count, share))

    def scaled(self, columns: Tensor | None) -> LeastSquares:
        """The same problem with weights divided, and inputs multiplied, by column scales [groups, 1, channels]."""
        if columns is None:
            return self
        rows = None if self.rows is None else multiplied(self.rows, columns)
        gram = gram_for_divided(self.gram, columns)
        return replace(self, weight=divided(self.weight, columns), gram=gram, rows=rows)

    def split(self, weight: Tensor) -> Tensor:
        """[groups, out, in] as one matrix for each block of `gram`: [groups · blocks, out, in/blocks]."""
        return weight if self.blocks == 1 else weight.unflatten(2, (self.blocks, -1)).transpose(1, 2).flatten(0, 1)

    def join(self, parts: Tensor) -> Tensor:
        """The inverse of `split`."""
        return parts if self.blocks == 1 else parts.unflatten(0, (-1, self.blocks)).transpose(1, 2).flatten(2)

    def error(self, candidate: Tensor) -> Tensor:
        """The objective per output channel, float64 [groups, out], of a candidate weight [groups, out, in]."""
        delta = self.split((self.weight - candidate).double())
        error = ((delta @ self.gram) * delta).sum(-1).clamp(min=0)
        return error.unflatten(0, (-1, self.blocks)).sum(1)

    def energy(self) -> float:
        """`tr[W H Wᵀ]`, all groups together: what an error is relative to."""
        return float(self.error(torch.zeros_like(self.weight)).sum())

    def inputs(self, form: Literal["exact", "approximate", "plain"]) -> Tensor | None:
        """H in full, its diagonal [groups, in], or None for the identity: what a decomposition is weighted by."""
        if form == "exact":
            return self.gram
        return self.gram.diagonal(dim1=1, dim2=2).reshape(len(self.weight), -1) if form == "approximate" else None

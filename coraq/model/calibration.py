"""Calibration statistics and the concrete Task (draft of the types; the engine follows)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LeastSquares:
    """`min over Q of Σ_g tr[(W_g − Q_g) H_g (W_g − Q_g)ᵀ]`.

    Attributes:
        weight: float32 [groups, out, in], the unconstrained optimum W.
        gram: float64 [groups, in, in], H: symmetric, positive semi-definite, per row of im2col patches (a mean,
            not a sum); centred where the bias absorbs the mean.
    """

    weight: Tensor
    gram: Tensor

    def error(self, candidate: Tensor) -> Tensor:
        """The objective per output channel, float64 [groups, out], of a candidate weight [groups, out, in]."""
        delta = (self.weight - candidate).double()
        return ((delta @ self.gram) * delta).sum(-1).clamp(min=0)


class LayerStats:
    """Statistics of one layer's inputs."""

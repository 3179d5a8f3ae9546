"""Codes and adapter of one layer in turns: quantize W − BA, decompose W − Q, as long as the error falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from coraq.core.tensors import LowRank, QuantizedLayer


def alternate(
    target: Tensor,
    error_of: Callable[[Tensor], Tensor],
    quantize: Callable[[Tensor | None], QuantizedLayer],
    decompose: Callable[[Tensor], LowRank | None],
    rounds: int = 0,
) -> tuple[QuantizedLayer, list[float]]:
    """Codes with an adapter for `target`, and the error `tr[(W − Q − BA) G (W − Q − BA)ᵀ]` after each round.

    The errors never rise: the first round that gains nothing ends it and is thrown away.

    Args:
        target: [groups, out, in], W.
        error_of: the error of a weight [groups, out, in] by channel, `LeastSquares.error`.
        quantize: codes for W minus a matrix (None: for W).
        decompose: the adapter for a residual [groups, out, in]; None: no adapter.
        rounds: at most so many beyond the first.
    """
    best: QuantizedLayer | None = None
    errors: list[float] = []
    subtract: Tensor | None = None
    for _ in range(rounds + 1):
        codes = quantize(subtract)
        delta = target - codes.dequantize()
        found = decompose(delta)
        layer = replace(codes, adapter=found)
        subtract = None if found is None else found.dequantize()
        error = float(error_of(layer.dequantize()).sum())
        if best is not None and not error < errors[-1]:
            break
        best = layer
        errors.append(error)
        if found is None:
            break
    assert best is not None
    return best, errors

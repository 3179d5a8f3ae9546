"""Column scales: a factor for every input channel of a layer, beside the scale of every output channel.

Codes of few bits waste levels on an input channel whose weights are all small beside the others'. Divided by a factor
of its own, it uses the range like any other, and the factor is multiplied back with the scale (SINQ, arXiv 2509.22944:
two scales an entry, by Sinkhorn's iteration). How fine the factors are hardly matters, as codes are chosen for them as
they are: each is a number of 8 bits (float8_e4m3fn), one byte an input channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORED = torch.float8_e4m3fn
LEAST, MOST = 2.0**-6, 256.0  # normal numbers of that type
ROUNDS = 8  # of Sinkhorn's iteration: what still moves then are channels that are all but dead
DEAD = 1e-6  # rows and columns with less than this share of the root mean square are none


def column_scales(weight: Tensor, taps: int) -> Tensor:
    """Factors of the input channels of a weight [groups, out, channels · taps]: float32 [groups, 1, channels].

    Divided by them, and by a scale for each output channel, all rows and columns of the weight have the same root mean
    square, as nearly as 8 bits say it. The geometric mean of each group's factors is about 1, or less where channels
    that are all but dead would else push the others' beyond what can be stored.
    """
    square = weight.double().unflatten(2, (-1, taps)).square().mean(3)
    square = square / square.mean((1, 2), keepdim=True).clamp(min=1e-300)
    factor = torch.ones_like(square[:, :1])
    for _ in range(ROUNDS):
        left = square / factor
        rows = left.mean(2, keepdim=True)
        columns = (left / torch.where(rows > DEAD**2, rows, 1.0)).mean(1, keepdim=True)
        factor = factor * torch.where(columns > DEAD**2, columns, 1.0)
    factor = factor.sqrt()
    factor = factor / factor.log().mean(2, keepdim=True).exp()
    factor = factor / (factor.amax(2, keepdim=True) / MOST).clamp(min=1)
    return rounded(factor)


def rounded(factors: Tensor) -> Tensor:
    """The nearest factors that can be stored, float32."""
    return factors.float().clamp(LEAST, MOST).to(STORED).float()


def spread_columns(columns: Tensor, inputs: int) -> Tensor:
    """Factors [groups, 1, channels] for each of so many inputs, channels before taps: [groups, 1, inputs]."""
    return columns.repeat_interleave(inputs // columns.shape[2], 2)


def divided(weight: Tensor, columns: Tensor | None) -> Tensor:
    """A weight [groups, out, in] without its factors, if there are any: what codes are chosen for."""
    return weight if columns is None else weight / spread_columns(columns, weight.shape[2])


def multiplied(weight: Tensor, columns: Tensor | None) -> Tensor:
    """The inverse of `divided`; so are inputs [groups, rows, in] scaled where their weight is divided."""
    return weight if columns is None else weight * spread_columns(columns, weight.shape[2])


def gram_for_divided(gram: Tensor, columns: Tensor | None) -> Tensor:
    """The Gram of inputs that are `multiplied`; it may be in blocks: [groups · blocks, in/blocks, in/blocks]."""
    if columns is None:
        return gram
    factors = spread_columns(columns, gram.shape[0] // columns.shape[0] * gram.shape[2]).reshape(len(gram), 1, -1)
    return gram * (factors.mT * factors)

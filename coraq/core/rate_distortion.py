"""Rounding that weighs what a code costs: rate and distortion under one multiplier for the whole network.

With `H + damping = R Rᵀ` (visiting order) and `k_o` the nats of KL that a unit of output channel o's squared output
error costs, GPTQ's feedback makes the network's loss `Σ k_o R_ii² (target_i − q_i)²`. Codes are stored at their
entropy, so at high rate every weight should carry the same loss c/12 ("reverse water-filling", Cover and Thomas,
Elements of Information Theory, 10.3.3):

    Δ²_oi = c / (k_o R_ii²): a factor for each row, one for each column, and one number c for the whole network.

A code is then chosen for the least `k_o R_ii² Δ² (t − q)² + λ bits(q)` with `λ = c · ln 2 / 6`, which is what a bit is
worth on that curve: the loss c/12 of a weight falls by a factor of 4 with each bit. That is entropy-constrained scalar
quantization (Chou, Lookabaugh, Gray 1989), here with feedback as CERWU (arXiv 2505.18758) has it; `bits` come from the
layer's own histogram of the round before.

Layout as in `coraq.core.rounding`: [groups, in, out], inputs in visiting order; levels are whole steps, −127 … 127.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coraq.core.columns import rounded
from coraq.core.rounding import Choose, Factor, Problem, Rounding, in_blocks, reassess, sweep
from coraq.core.tensors import QTensor

LARGEST = 127  # codes go from −127 to 127: plain signed bytes, which every integer runtime takes
CODE_BITS = 8
BIT_PRICE = math.log(2) / 6  # of a bit, in units of c
UNSEEN = 0.5  # what the histogram counts for a code that did not occur
_TINY = 1e-30


@dataclass(frozen=True)
class RateProblem:
    """What a layer's rounding costs the network, in the layout and order of its `Problem`.

    Attributes:
        problem: the layer's problem.
        factor: its Cholesky factor.
        sensitivity: k, nats for a unit of squared output error of each channel, positive, [groups, 1, out].
    """

    problem: Problem
    factor: Factor
    sensitivity: Tensor

    def row_steps(self, multiplier: float) -> Tensor:
        """The steps of all output channels for the multiplier c: [groups, 1, out].

        Where one step serves inputs of unequal R_ii², it is that of their mean: then `Σ_i k R_ii² Δ²/12 + λ Σ bits` is
        least. No step is so small that a weight would need a code beyond the largest.
        """
        mean = self.factor.curvature.double().mean(1, keepdim=True)
        step = (multiplier / (self.sensitivity.double() * mean).clamp(min=_TINY)).sqrt()
        least = self.problem.weight.abs().amax(1, keepdim=True).double() / LARGEST
        return step.maximum(least).clamp(min=_TINY).to(self.problem.weight.dtype)

    def prices(self, steps: Tensor, multiplier: float, curvature: Tensor) -> Tensor:
        """What a bit is worth in squared steps: `λ / (k h Δ²)` for a curvature h [groups, in, 1]: [groups, in, out]."""
        loss = self.sensitivity * steps.square() * curvature
        return BIT_PRICE * multiplier / loss.clamp(min=_TINY)


def column_factors(pivots: Tensor, taps: int) -> Tensor:
    """Factors of the input channels that make all R_ii alike, as they are stored: float32 [groups, 1, channels].

    Args:
        pivots: R_ii² of each input in the layer's own order, [groups, in]; a channel's taps, that share its factor,
            stand together.
    """
    mean = pivots.double().unflatten(1, (-1, taps)).mean(2)
    factor = mean.clamp(min=_TINY).rsqrt()
    return rounded(factor / factor.log().mean(1, keepdim=True).exp()).unsqueeze(1)


def in_layer_order(problem: Problem, values: Tensor) -> Tensor:
    """Values [groups, in, 1] in visiting order as [groups, in] in the layer's own."""
    flat = values.squeeze(2)
    return torch.empty_like(flat).scatter_(1, problem.order, flat)


def code_lengths(levels: Tensor) -> Tensor:
    """Bits of every code from −127 to 127 by the histogram of `levels`: float [255]."""
    counts = torch.bincount(levels.reshape(-1).long() + LARGEST, minlength=2 * LARGEST + 1).double()
    return (counts.sum().clamp(min=1.0) / counts.clamp(min=UNSEEN)).log2().to(levels.dtype)


def nearest_levels(weight: Tensor, steps: Tensor) -> Tensor:
    """The levels nearest to a weight, without any price of bits."""
    return (weight / steps).round_().clamp_(-LARGEST, LARGEST)


def priced_levels(targets: Tensor, prices: Tensor, lengths: Tensor) -> Tensor:
    """Of the nearest level, the one beside it nearer to zero, and zero: that of least `(t − q)² + price · bits(q)`.

    Args:
        targets: in steps, any shape.
        prices: spread over that shape.
        lengths: `code_lengths`.
    """
    nearest = targets.round().clamp_(-LARGEST, LARGEST)
    levels = torch.stack([nearest, nearest - nearest.sign(), torch.zeros_like(nearest)])
    costs = (levels - targets).square_().addcmul_(prices.expand_as(targets), lengths[levels.long() + LARGEST])
    return levels.gather(0, costs.argmin(0, keepdim=True)).squeeze(0)


def predicted_levels(rate_problem: RateProblem, multiplier: float, rounds: int = 2) -> Tensor:
    """Levels with priced bits but without feedback: hardly other in entropy than the real ones, at once."""
    steps = rate_problem.row_steps(multiplier)
    targets = rate_problem.problem.weight / steps
    levels = nearest_levels(rate_problem.problem.weight, steps)
    prices = rate_problem.prices(steps, multiplier, rate_problem.factor.curvature)
    for _ in range(rounds):
        levels = priced_levels(targets, prices, code_lengths(levels))
    return levels


def round_with_rate(rate_problem: RateProblem, multiplier: float, rounds: int = 3, sweeps: int = 0) -> Rounding:
    """Levels and steps for the multiplier c: feedback rounding with priced bits, then perhaps coordinate descent.

    Args:
        multiplier: c; 0.. would be infinitely fine steps, so it must be positive.
        rounds: of feedback rounding, each with the histogram of the one before; the first's is that of the nearest
            levels.
        sweeps: of coordinate descent on error and rate afterwards, each visiting every code once.

    Raises:
        ValueError: the multiplier is not positive.
    """
    if not multiplier > 0:
        raise ValueError(f"the multiplier of rate and distortion must be positive, not {multiplier}")
    problem, factor = rate_problem.problem, rate_problem.factor
    steps = rate_problem.row_steps(multiplier)
    unrounded = problem.weight / steps
    levels = nearest_levels(problem.weight, steps)
    prices = rate_problem.prices(steps, multiplier, factor.curvature)
    for _ in range(rounds):
        lengths, targets, levels = code_lengths(levels), unrounded.clone(), unrounded.clone()
        _priced_sweep(targets, levels, factor.pull, prices, lengths, onward=True)
    if sweeps:
        prices = rate_problem.prices(steps, multiplier, problem.curvature)
        targets = problem.targets(levels, steps)
        for _ in range(sweeps):
            _priced_sweep(targets, levels, problem.pull, prices, code_lengths(levels), onward=False)
    bound = torch.full_like(steps, float(LARGEST))
    return reassess(problem, Rounding(levels, steps, -bound, bound, torch.zeros(())))


def cost(rate_problem: RateProblem, rounding: Rounding, multiplier: float, lengths: Tensor) -> float:
    """`Σ k · error + λ · bits`: what coordinate descent lowers, for fixed code lengths."""
    loss = float((rate_problem.sensitivity.double() * rounding.error).sum())
    bits = float(lengths.double()[rounding.levels.long() + LARGEST].sum())
    return loss + BIT_PRICE * multiplier * bits


def pack_levels(problem: Problem, rounding: Rounding, columns: Tensor | None = None) -> QTensor:
    """Levels −127 … 127 as stored: a symmetric 8-bit QTensor, in the layer's own order."""
    levels = torch.empty_like(rounding.levels)
    levels = levels.scatter_(1, problem.order.unsqueeze(-1).expand_as(levels), rounding.levels).mT
    codes = (levels + 2 ** (CODE_BITS - 1)).to(torch.uint8).contiguous()
    return QTensor(codes, rounding.scale.mT.float().contiguous(), CODE_BITS, columns=columns)


def _priced_sweep(
    targets: Tensor, levels: Tensor, pull: Tensor, prices: Tensor, lengths: Tensor, *, onward: bool
) -> None:
    """Visit every input once and choose its level by error and bits; in place."""
    by_block = in_blocks(prices.contiguous(), pull)

    def rule(strip: slice) -> Choose:
        ours = by_block[..., strip]

        def choose(i: int, wanted: Tensor, code: Tensor) -> None:
            code.copy_(priced_levels(wanted, ours[:, i], lengths))

        return choose

    sweep(targets, levels, pull, rule, onward=onward)

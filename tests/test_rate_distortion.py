"""Rounding with a rate term against closed forms: scalar quantization of a Gaussian, water-filling, nearest levels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coraq.core.entropy_coding import entropy_bits
from coraq.core.least_squares import LeastSquares
from coraq.core.rate_distortion import (
    LARGEST,
    RateProblem,
    code_lengths,
    column_factors,
    cost,
    in_layer_order,
    nearest_levels,
    pack_levels,
    predicted_levels,
    priced_levels,
    round_with_rate,
)
from coraq.core.rounding import factorise, prepare

RATES = [0.5, 1.0, 2.0, 3.0, 4.5]


def _rate_problem(weight: Tensor, gram: Tensor, sensitivity: Tensor | None = None, damping: float = 0.0) -> RateProblem:
    """A layer's problem; sensitivity [groups, out], 1 for all if not given."""
    problem = prepare(weight, gram, "common")
    k = torch.ones(weight.shape[:2]) if sensitivity is None else sensitivity
    return RateProblem(problem, factorise(problem, gram, damping), k.unsqueeze(1).to(problem.weight))


def _white(out: int, inputs: int, seed: int = 0) -> RateProblem:
    weight = torch.randn(1, out, inputs, generator=torch.Generator().manual_seed(seed))
    weight = weight / weight.square().mean().sqrt()
    return _rate_problem(weight, torch.eye(inputs, dtype=torch.float64)[None])


def _correlated(
    out: int = 48, inputs: int = 32, groups: int = 1, seed: int = 0, spread: float = 1.5
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, out, inputs, generator=generator)
    mixing = torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    mixing = mixing * torch.logspace(0, spread, inputs, dtype=torch.float64)
    return weight, mixing.mT @ mixing / inputs


def _multiplier_for(problem: RateProblem, rate: float) -> float:
    """The multiplier whose real levels take so many bits a weight."""
    low, high = 1e-4, 1e2
    for _ in range(22):
        middle = math.sqrt(low * high)
        bits = entropy_bits(round_with_rate(problem, middle).levels) / problem.problem.weight.numel()
        low, high = (middle, high) if bits > rate else (low, middle)
    return math.sqrt(low * high)


def _scalar_quantization(step: float, threshold: float) -> tuple[float, float]:
    """Rate in bits and distortion of a unit Gaussian on whole steps, cells moved outwards, in closed form.

    Level q > 0 begins at (q − ½ + (2q − 1) · threshold) steps: an ideal code for a Gaussian gives it (2q − 1) times
    as many bits more than the level before as the first has more than zero.
    """
    q = torch.arange(1, 400, dtype=torch.float64)
    edges = torch.cat([q - 0.5 + (2 * q - 1) * threshold, torch.tensor([800.0], dtype=torch.float64)]) * step
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    cdf, pdf = normal.cdf(edges), normal.log_prob(edges).exp()
    mass = (cdf[1:] - cdf[:-1]).clamp(min=1e-300)
    first = pdf[:-1] - pdf[1:]  # ∫ x p
    second = mass + edges[:-1] * pdf[:-1] - edges[1:] * pdf[1:]  # ∫ x² p
    zero = 2 * normal.cdf(edges[0]) - 1
    zero_second = zero - 2 * edges[0] * pdf[0]
    level = q * step
    distortion = 2 * (second - 2 * level * first + level**2 * mass).sum() + zero_second
    rate = -2 * (mass * mass.log2()).sum() - zero * zero.log2()
    return float(rate), float(distortion)


def _least_distortion(rate: float) -> float:
    """Of all steps and thresholds at this rate."""
    best = math.inf
    for threshold in torch.linspace(0, 0.3, 31).tolist():
        low, high = 1e-3, 20.0
        for _ in range(40):
            step = math.sqrt(low * high)
            low, high = (step, high) if _scalar_quantization(step, threshold)[0] > rate else (low, step)
        best = min(best, _scalar_quantization(low, threshold)[1])
    return best


@pytest.mark.parametrize("rate", RATES)
def test_a_gaussian_source_reaches_entropy_constrained_scalar_quantization(rate: float) -> None:
    problem = _white(2000, 32)
    rounding = round_with_rate(problem, _multiplier_for(problem, rate))
    distortion = float(rounding.error.sum()) / problem.problem.weight.numel()
    shannon = 2.0 ** (-2 * rate)
    assert distortion == pytest.approx(_least_distortion(rate), rel=0.025)
    assert shannon < distortion < math.pi * math.e / 6 * shannon * 1.015


def test_with_a_known_gram_the_total_is_a_quarter_bit_from_the_limit() -> None:
    """WaterSIC (arXiv 2603.04956): steps by columns lose ½ log2(πe/6) = 0.2546 bit to any code, whatever the Gram.

    Its rate is that of every column by itself.
    """
    weight, gram = _correlated(4000, 24, spread=0.5)
    pivots = _rate_problem(weight, gram)
    columns = column_factors(in_layer_order(pivots.problem, pivots.factor.curvature), 1)
    squares = LeastSquares(weight, gram)
    gaps = {}
    for name, factors in (("columns", columns), ("rows alone", None)):
        scaled = squares.scaled(factors)
        problem = _rate_problem(scaled.weight, scaled.gram)
        rounding = round_with_rate(problem, _multiplier_for(problem, 5.0))
        loss = float(squares.error(pack_levels(problem.problem, rounding, factors).dequantize()).sum())
        mean = loss / weight.numel()
        determinant = float(torch.linalg.slogdet(gram)[1]) / 24
        limit = 0.5 * (determinant + math.log(float(weight.square().mean()) / mean)) / math.log(2)
        rate = sum(entropy_bits(column) for column in rounding.levels.unbind(1)) / weight.numel()
        gaps[name] = rate - limit
    assert 0.2 < gaps["columns"] < 0.2546 + 0.03
    assert gaps["rows alone"] > gaps["columns"] + 0.03


def test_free_bits_give_nearest_rounding() -> None:
    problem = _white(40, 16)
    rounding = round_with_rate(problem, 1e-12)
    steps = problem.problem.weight.abs().amax(1, keepdim=True) / LARGEST
    assert torch.equal(rounding.levels, nearest_levels(problem.problem.weight, steps))


def test_dear_bits_give_zeros() -> None:
    assert not round_with_rate(_white(40, 16), 1e6).levels.any()


def test_a_price_of_zero_is_nearest_rounding_and_a_price_moves_towards_zero() -> None:
    targets = torch.linspace(-5, 5, 201)
    lengths = code_lengths(torch.randn(10_000, generator=torch.Generator().manual_seed(0)).mul(2).round())
    assert torch.equal(priced_levels(targets, torch.zeros(()), lengths), targets.round())
    priced = priced_levels(targets, torch.tensor(0.3), lengths)
    assert bool((priced.abs() <= targets.round().abs()).all())
    assert bool((priced != targets.round()).any())


def test_of_its_candidates_the_cheapest_level_is_taken() -> None:
    lengths = torch.full((2 * LARGEST + 1,), 10.0)
    lengths[LARGEST], lengths[LARGEST + 2] = 1.0, 4.0  # codes 0 and 2
    target = torch.tensor([2.6])
    assert float(priced_levels(target, torch.tensor(0.01), lengths)) == 3  # .16 + .10 against .36 + .04
    assert float(priced_levels(target, torch.tensor(0.05), lengths)) == 2  # .66 against .56 and 6.81
    assert float(priced_levels(target, torch.tensor(5.0), lengths)) == 0


def test_every_weight_carries_the_same_loss_at_high_rate() -> None:
    """A channel four times as sensitive gets half the step, so that all lose c/12 a weight."""
    weight, gram = _correlated(8, 400)[0], torch.eye(400, dtype=torch.float64)[None]
    sensitivity = torch.tensor([[1.0, 4.0, 16.0, 1.0, 0.25, 1.0, 9.0, 36.0]])
    problem = _rate_problem(weight, gram, sensitivity)
    steps = problem.row_steps(0.3).flatten()
    assert torch.allclose(steps[0] / steps, sensitivity[0].sqrt(), rtol=1e-5)
    loss = problem.sensitivity * round_with_rate(problem, 0.3).error / 400
    assert torch.allclose(loss.flatten(), torch.full((8,), 0.3 / 12, dtype=torch.float64), rtol=0.3)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("multiplier", [0.01, 1.0, 30.0])
def test_descent_never_raises_error_and_bits_together(groups: int, multiplier: float) -> None:
    problem = _rate_problem(*_correlated(groups=groups), damping=0.01)
    start = round_with_rate(problem, multiplier, sweeps=0)
    end = round_with_rate(problem, multiplier, sweeps=1)
    lengths = code_lengths(start.levels)
    before, after = (cost(problem, rounding, multiplier, lengths) for rounding in (start, end))
    assert after <= before * (1 + 1e-6)
    assert not torch.equal(start.levels, end.levels)


def test_feedback_and_prices_beat_nearest_rounding_at_equal_bits() -> None:
    problem = _rate_problem(*_correlated(64, 64), damping=0.01)
    rounding = round_with_rate(problem, _multiplier_for(problem, 2.0))
    steps = rounding.scale
    low, high = 0.1, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        nearest = nearest_levels(problem.problem.weight, steps * middle)
        low, high = (middle, high) if entropy_bits(nearest) > 2.0 * nearest.numel() else (low, middle)
    rest = problem.problem.weight - nearest * steps * high
    gram_rest = problem.problem.targets(nearest, steps * high) - nearest
    error = (rest * problem.problem.curvature * gram_rest * steps * high).sum()
    assert float(rounding.error.sum()) < 0.6 * float(error)


@pytest.mark.parametrize("multiplier", [0.01, 0.3, 10.0])
def test_the_prediction_without_feedback_has_nearly_the_real_entropy(multiplier: float) -> None:
    problem = _rate_problem(*_correlated(64, 64), damping=0.01)
    real = entropy_bits(round_with_rate(problem, multiplier).levels)
    assert entropy_bits(predicted_levels(problem, multiplier)) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_stored_has_the_error_that_was_minimised(groups: int) -> None:
    weight, gram = _correlated(groups=groups)
    problem = _rate_problem(weight, gram)
    rounding = round_with_rate(problem, 1.0)
    stored = pack_levels(problem.problem, rounding)
    stored.check((groups, 48, 32))
    error = LeastSquares(weight, gram).error(stored.dequantize())
    assert torch.allclose(error, rounding.error.squeeze(1), rtol=1e-3)


def test_column_factors_make_all_inputs_cost_alike() -> None:
    pivots = torch.tensor([[1.0, 1.0, 16.0, 16.0, 4.0, 4.0]])
    factors = column_factors(pivots, taps=2)
    assert factors.shape == (1, 1, 3)
    assert torch.allclose(factors.flatten() ** 2 * torch.tensor([1.0, 16.0, 4.0]), torch.tensor(4.0), rtol=0.15)


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.nan])
def test_a_multiplier_must_be_positive(multiplier: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        round_with_rate(_white(2, 2), multiplier)

"""Claims about quantization grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from coraq.config import Scheme
from coraq.core.grid import Codebook, Grid, best_shrink, grid_from_range, minmax_grid, mse_grid, sigma_grid

BITS = (2, 3, 4, 8)


def random_weight(seed: int = 0, groups: int = 2, out: int = 5, inputs: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, out, inputs, generator=generator) * torch.rand(groups, out, 1, generator=generator)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", BITS)
def test_minmax_grid_holds_every_weight(bits: int, granularity: str, symmetric: bool) -> None:
    weight = random_weight() + 0.3
    grid = minmax_grid(weight, bits, symmetric, granularity)
    # half a step for rounding; on an affine grid the rounded zero point can cost another half at the ends
    bound = grid.scale * (0.5 if symmetric else 1.0) * (1 + 1e-5)
    assert bool(((weight - grid.round(weight)).abs() <= bound).all())
    shape = (2, 5, 1) if granularity == "channel" else (1, 1, 1)
    assert tuple(grid.scale.shape) == tuple(grid.zero.shape) == shape


@pytest.mark.parametrize(("symmetric", "fraction"), [(True, 0), (False, 0), (False, 1), (False, 3)])
@pytest.mark.parametrize("bits", BITS)
def test_rounding_takes_the_nearest_of_all_levels(bits: int, symmetric: bool, fraction: int) -> None:
    weight = random_weight(1)
    grid = mse_grid(weight, bits, symmetric, fraction=fraction)
    levels = grid.values(torch.arange(2.0**bits).expand(2, 5, -1))  # [groups, out, levels]
    distance = (weight.unsqueeze(-1) - levels.unsqueeze(2)).abs().amin(-1)
    # codes near a tie may fall either way: float32 division
    assert torch.allclose((weight - grid.round(weight)).abs(), distance, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_exactly_a_level(symmetric: bool) -> None:
    weight = random_weight(2) + 0.1
    weight[..., 0] = 0
    for grid in (minmax_grid(weight, 3, symmetric), mse_grid(weight, 3, symmetric), sigma_grid(weight, 3, symmetric)):
        assert bool((grid.round(weight)[..., 0] == 0).all())


@pytest.mark.parametrize(("symmetric", "fraction"), [(True, 0), (False, 0), (False, 1), (False, 2), (False, 3)])
def test_packed_codes_stand_for_the_rounded_weight(symmetric: bool, fraction: int) -> None:
    weight = random_weight(3)
    grid = mse_grid(weight, 3, symmetric, fraction=fraction)
    packed = grid.pack(grid.codes(weight))
    packed.check((2, 5, 40))
    assert torch.equal(packed.dequantize(), grid.round(weight))
    assert (packed.zero_point is None) == symmetric
    again = Grid.of(packed)
    assert torch.equal(again.zero, grid.zero)
    assert again.fraction == grid.fraction == packed.fraction == fraction


@pytest.mark.parametrize("make", [minmax_grid, mse_grid, sigma_grid])
@pytest.mark.parametrize("fraction", [1, 2, 3])
def test_a_zero_point_between_codes_lies_in_steps_of_its_fraction(make: Any, fraction: int) -> None:
    grid = make(random_weight(12, out=40), 2, False, fraction=fraction)
    steps = grid.zero * 2**fraction
    assert torch.equal(steps, steps.round())
    assert bool((steps % 2 == 1).any())  # it needs all of its fraction
    assert 0 <= float(grid.zero.min()) <= float(grid.zero.max()) <= 3
    assert make(random_weight(12), 2, True, fraction=fraction).fraction == 0  # a symmetric grid has none


def test_a_finer_zero_point_centres_two_bits_on_weights_without_a_bias() -> None:
    """Gaussian weights want the levels ±½, ±1½, which no zero point at a code gives: Max 1960, distortion .1188."""
    weight = torch.randn(1, 64, 4096, generator=torch.Generator().manual_seed(0))

    def distortion(fraction: int) -> float:
        low = torch.full((1, 64, 1), -1.4935)  # outermost levels of the optimal uniform quantizer of four levels
        grid = grid_from_range(low, -low, 2, False, fraction)
        return float((weight - grid.round(weight)).square().mean())

    assert abs(distortion(1) - 0.1188) < 0.001
    assert distortion(0) > 1.2 * distortion(1)


@pytest.mark.parametrize("fraction", [1, 2])
def test_a_finer_zero_point_of_least_error_is_near_the_best_of_all(fraction: int) -> None:
    weight = torch.randn(1, 24, 60, generator=torch.Generator().manual_seed(1))
    weight[..., 0] = 3.5 * torch.linspace(-1, 1, 24)  # ends of the range that say little of the middle
    grid = mse_grid(weight, 2, False, fraction=fraction)

    def loss(candidate: Grid) -> torch.Tensor:
        return (weight - candidate.round(weight)).square().sum(-1, keepdim=True)

    best = torch.full((1, 24, 1), float("inf"))
    for zero in range(3 * 2**fraction + 1):
        for scale in torch.linspace(0.3, 2.5, 221).tolist():
            ones = torch.ones(1, 24, 1)
            best = torch.minimum(best, loss(Grid(scale * ones, zero / 2**fraction * ones, 2, False, fraction)))
    assert float((loss(grid) / best).mean()) < 1.01
    assert float((loss(grid) / best).max()) < 1.1


@pytest.mark.parametrize(("bits", "fraction"), [(2, 1), (2, 2), (2, 3), (3, 3), (4, 2), (5, 3), (7, 1)])
def test_a_wider_grid_with_a_whole_zero_point_holds_the_same_weight_bit_for_bit(bits: int, fraction: int) -> None:
    weight = random_weight(13)
    grid = mse_grid(weight, bits, False, fraction=fraction)
    packed = grid.pack(grid.codes(weight))
    whole = packed.whole()
    whole.check((2, 5, 40))
    assert (whole.bits, whole.fraction) == (bits + fraction, 0)
    assert torch.equal(whole.dequantize(), packed.dequantize())
    assert whole.size_bytes() > packed.size_bytes()
    with pytest.raises(ValueError, match="leave no room"):
        replace(packed, fraction=9 - bits).check((2, 5, 40))


@pytest.mark.parametrize("norm", [2.0, 2.4])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_grid_is_the_best_of_its_ranges(symmetric: bool, granularity: str, norm: float) -> None:
    weight = random_weight(4)
    dims = (-1,) if granularity == "channel" else (0, 1, 2)

    def loss(rounded: torch.Tensor) -> torch.Tensor:
        return (weight - rounded).abs().pow(norm).sum(dims, keepdim=True)

    fast = loss(mse_grid(weight, 3, symmetric, granularity, norm, steps=30).round(weight))
    slow = loss(best_shrink(weight, 3, symmetric, granularity, loss, steps=30).round(weight))
    assert torch.allclose(fast, slow, rtol=1e-4)
    assert bool((fast <= loss(minmax_grid(weight, 3, symmetric, granularity).round(weight)) * (1 + 1e-5)).all())


def test_sigma_grid_clips_at_k_deviations_and_never_past_the_extremes() -> None:
    weight = random_weight(5)
    weight[0, 0, 0] = 100.0
    clipped, wide = sigma_grid(weight, 4, k=3.0), sigma_grid(weight, 4, k=1e6)
    assert float(clipped.scale[0, 0, 0]) * 7 < 100 * 0.99
    assert torch.allclose(wide.scale, minmax_grid(weight, 4).scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("make", [minmax_grid, mse_grid, sigma_grid])
def test_a_channel_of_zeros_gets_zero_codes_and_a_finite_scale(make, symmetric: bool) -> None:
    weight = random_weight(6)
    weight[1, 2] = 0
    grid = make(weight, 4, symmetric)
    packed = grid.pack(grid.codes(weight))
    packed.check((2, 5, 40))
    assert bool((packed.dequantize()[1, 2] == 0).all())
    assert float(grid.scale[1, 2]) == 1.0


def test_a_scale_of_zero_gives_the_zero_code() -> None:
    grid = Grid(torch.zeros(1, 1, 1), torch.full((1, 1, 1), 8.0), 4, True)
    assert grid.codes(torch.randn(1, 3, 5)).unique().tolist() == [8.0]


def test_sixteen_bits_are_nearly_float() -> None:
    weight = random_weight(7)
    error = (weight - minmax_grid(weight, 16, False).round(weight)).norm() / weight.norm()
    assert float(error) < 1e-4  # a step is 2^-16 of a range of about six deviations


def test_a_shifted_affine_grid_slides_and_a_symmetric_one_stays() -> None:
    affine = grid_from_range(torch.full((1, 1, 1), -1.0), torch.ones(1, 1, 1), 3, False)
    assert float(affine.shifted(1).zero) == float(affine.zero) + 1
    assert float(affine.shifted(100).zero) == affine.top
    symmetric = minmax_grid(random_weight(8), 3)
    assert symmetric.shifted(1) is symmetric


def test_a_codebook_rounds_to_its_nearest_entry_and_packs() -> None:
    weight = random_weight(9)
    table = torch.tensor([-1.0, -0.25, 0.0, 0.5])
    grid = Codebook(weight.abs().amax(-1, keepdim=True), table, 2)
    distance = (weight.unsqueeze(-1) - grid.scale.unsqueeze(-1) * table).abs().amin(-1)
    assert torch.allclose((weight - grid.round(weight)).abs(), distance, atol=1e-6)
    packed = grid.pack(grid.codes(weight))
    packed.check((2, 5, 40))
    assert torch.equal(packed.dequantize(), grid.round(weight))
    assert torch.equal(grid.scaled(2.0).codes(2 * weight), grid.codes(weight))


def test_zero_points_lie_between_codes_at_two_bits_unless_told_otherwise() -> None:
    """Two bits and quarters are the 4 bits that a code has in other tools' files at the least."""
    assert [Scheme().fraction(bits) for bits in range(2, 9)] == [2, 0, 0, 0, 0, 0, 0]
    assert {Scheme().fraction(bits, searched=False) for bits in range(2, 9)} == {0}
    assert Scheme.of(zero_point_fraction=1).fraction(2, searched=False) == 1
    assert {Scheme.of(symmetric=True).fraction(bits) for bits in range(2, 9)} == {0}
    assert [Scheme.of(zero_point_fraction=3).fraction(bits) for bits in range(2, 9)] == [3, 3, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("make", [minmax_grid, sigma_grid])
def test_a_finer_zero_point_pays_where_the_range_is_searched_and_not_at_the_extremes(make: Any) -> None:
    weight = random_weight(3, out=60, inputs=300)

    def error(make: Any, fraction: int) -> float:
        return float((weight - make(weight, 2, False, fraction=fraction).round(weight)).square().sum())

    assert error(mse_grid, 2) < 0.95 * error(mse_grid, 0)
    assert error(make, 2) > error(make, 0)

"""Claims about rounding on the Gram, against slow readable twins and exhaustive search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coraq.core import rounding
from coraq.core.grid import Codebook, Grid, minmax_grid, mse_grid
from coraq.core.rounding import descend, factorise, feedback, feedbacks, nearest, pack, prepare, reassess, search


def layer(
    seed: int, groups: int = 1, out: int = 3, inputs: int = 12, rows: int = 200, mean: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Weight [groups, out, in], float32, and the Gram of `rows` correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, out, inputs, generator=generator)
    mix = torch.randn(groups, inputs, inputs, generator=generator).double() / inputs**0.5
    x = torch.randn(groups, rows, inputs, generator=generator).double() @ (mix + torch.eye(inputs)) + mean
    return weight, x.mT @ x / rows


def output_error(weight: Tensor, gram: Tensor, quantized: Tensor) -> Tensor:
    """tr[(W − Q) H (W − Q)ᵀ] per channel, in float64 [groups, out]."""
    delta = weight.double() - quantized.double()
    return torch.einsum("goi,gij,goj->go", delta, gram, delta)


def slow_descent(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor, sweeps: int, refit: bool) -> Tensor:
    """COMQ for one group in plain loops, float64, cyclic: the twin of `descend`. Returns the quantized weight."""
    weight, gram, scale = weight[0].double(), gram[0], grid.scale[0].double().clone()
    zero = grid.zero[0].double()
    codes = codes[0].double().clone()
    for _ in range(sweeps):
        for channel in range(weight.shape[0]):
            if refit:
                k = codes[channel] - zero[channel]
                scale[channel] = (k @ gram @ weight[channel]) / (k @ gram @ k)
            for i in range(weight.shape[1]):
                others = weight[channel] - scale[channel] * (codes[channel] - zero[channel])
                others[i] = 0
                best = weight[channel, i] + (others @ gram[:, i]) / gram[i, i]
                codes[channel, i] = (best / scale[channel] + zero[channel]).round().clamp(0, grid.top)
    if refit:
        for channel in range(weight.shape[0]):
            k = codes[channel] - zero[channel]
            scale[channel] = (k @ gram @ weight[channel]) / (k @ gram @ k)
    return (scale * (codes - zero)).unsqueeze(0)


def textbook_obq(weight: Tensor, gram: Tensor, grid: Grid, damping: float) -> Tensor:
    """OBQ in a fixed order with the inverse Hessian updated by elimination, no Cholesky: the twin of `feedback`."""
    left = weight[0].double().clone()
    hessian = gram[0].double().clone()
    hessian += torch.eye(len(hessian)) * damping * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    result = torch.zeros_like(left)
    for i in range(left.shape[1]):
        result[:, i] = grid.round(left.unsqueeze(0))[0, :, i]
        error = (left[:, i] - result[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i, :]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i, :]) / inverse[i, i]
    return result.unsqueeze(0)


def affine64(weight: Tensor, bits: int, symmetric: bool = False) -> Grid:
    grid = minmax_grid(weight, bits, symmetric)
    return Grid(grid.scale.double(), grid.zero.double(), bits, symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refit", [True, False])
def test_descent_equals_its_slow_twin(refit: bool, symmetric: bool) -> None:
    weight, gram = layer(1, out=5, inputs=150)  # more than two blocks of 64
    grid = affine64(weight, 3, symmetric)
    problem = prepare(weight, gram, "cyclic", torch.float64)
    fast = descend(problem, nearest(problem, grid), 3, scales=refit)
    slow = slow_descent(weight, gram, grid, grid.codes(weight.double()), 3, refit)
    assert torch.allclose(pack(problem, fast, grid).dequantize().double(), slow, atol=1e-5)
    assert torch.allclose(fast.error[:, 0], output_error(weight, gram, slow), rtol=1e-9)


def test_released_start_equals_a_slow_first_sweep_from_the_unrounded_weight() -> None:
    weight, gram = layer(2, out=4, inputs=70)
    grid = affine64(weight, 2)
    problem = prepare(weight, gram, "cyclic", torch.float64)
    fast = descend(problem, nearest(problem, grid), 1, scales=False, from_float=True)
    unrounded = weight.double() / grid.scale + grid.zero
    slow = slow_descent(weight, gram, grid, unrounded, 1, refit=False)
    assert torch.allclose(pack(problem, fast, grid).dequantize().double(), slow, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_feedback_equals_textbook_obq(damping: float, groups: int) -> None:
    weight, gram = layer(3, groups=groups, out=4, inputs=100)
    grid = affine64(weight, 3)
    problem = prepare(weight, gram, "cyclic", torch.float64)
    result = feedback(problem, factorise(problem, gram, damping), grid)
    fast = pack(problem, result, grid).dequantize().double()
    for g in range(groups):
        own = Grid(grid.scale[g : g + 1], grid.zero[g : g + 1], 3, False)
        slow = textbook_obq(weight[g : g + 1], gram[g : g + 1], own, damping)
        assert torch.allclose(fast[g], slow[0], atol=1e-5)
    if damping == 0:  # the pivots' sum is the true error
        assert torch.allclose(result.error, reassess(problem, result).error, rtol=1e-8)


@pytest.mark.parametrize("order", ["common", "curvature"])
def test_visiting_order_permutes_and_nothing_else(order: str) -> None:
    weight, gram = layer(4, groups=2, inputs=80)
    ordered = prepare(weight, gram, order, torch.float64)  # type: ignore[arg-type]
    index = ordered.order[0]
    strength = gram[0].diagonal().sqrt() * (weight[0].abs().mean(0) if order == "common" else 1)
    assert torch.equal(index, strength.argsort(descending=True))
    grid = affine64(weight, 3)
    result = descend(ordered, nearest(ordered, grid), 2)
    quantized = pack(ordered, result, grid).dequantize()[:1]
    by_hand = prepare(weight[:1, :, index], gram[:1, index][:, :, index], "cyclic", torch.float64)
    own = Grid(grid.scale[:1], grid.zero[:1], 3, False)
    expected = pack(by_hand, descend(by_hand, nearest(by_hand, own), 2), own).dequantize()
    assert torch.allclose(quantized[..., index], expected, atol=1e-6)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4])
def test_no_sweep_raises_the_error(bits: int, granularity: str, greedy: bool) -> None:
    weight, gram = layer(5, groups=2, out=4, inputs=70, rows=90)
    problem = prepare(weight, gram, dtype=torch.float64)
    now = nearest(problem, minmax_grid(weight, bits, False, granularity))
    for _ in range(6):
        # one sweep at a time, without the guard's help: `better` would hide a rise
        levels, targets = now.levels.clone(), problem.targets(now.levels, now.scale)
        scale = rounding.refit_scale(problem, levels, targets, now.scale)
        refitted = problem.error(levels, scale, targets)
        assert float(refitted.sum()) <= float(now.error.sum()) * (1 + 1e-12)
        if greedy:
            rounding._greedy_sweep(problem, targets, levels, now)
        else:
            rounding._sweep(targets, levels, problem.pull, now, onward=False)
        swept = problem.error(levels, scale, targets)
        assert bool((swept <= refitted * (1 + 1e-12)).all())
        now = reassess(problem, replace(now, levels=levels, scale=scale))
        assert torch.allclose(now.error, swept, rtol=1e-9)  # targets kept up with every change


@pytest.mark.parametrize("fraction", [0, 2])
@pytest.mark.parametrize("greedy", [False, True])
def test_no_single_code_can_be_improved_after_convergence(greedy: bool, fraction: int) -> None:
    weight, gram = layer(6, groups=2, out=3, inputs=70)
    grid = minmax_grid(weight, 3, False, fraction=fraction)
    problem = prepare(weight, gram, dtype=torch.float64)
    end = descend(problem, nearest(problem, grid), 100, scales=False, greedy=greedy)
    packed = pack(problem, end, grid)
    codes = packed.codes.double()
    error = output_error(weight, gram, grid.values(codes))
    for i, step in itertools.product(range(70), (-1, 1)):
        moved = codes.clone()
        moved[..., i] = (moved[..., i] + step).clamp(0, grid.top)
        assert bool((output_error(weight, gram, grid.values(moved)) >= error * (1 - 1e-6)).all())


@pytest.mark.parametrize(("symmetric", "fraction"), [(True, 0), (False, 0), (False, 1), (False, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_optimum_below_descent_below_start(seed: int, symmetric: bool, fraction: int) -> None:
    weight, gram = layer(seed, out=3, inputs=6)
    grid = minmax_grid(weight, 2, symmetric, fraction=fraction)
    problem = prepare(weight, gram, dtype=torch.float64)
    start = nearest(problem, grid)
    end = descend(problem, start, 20, scales=False)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)  # [4096, 6]
    for channel in range(3):
        values = (every - grid.zero[0, channel]) * grid.scale[0, channel]
        optimum = float(output_error(weight[:, channel : channel + 1], gram, values.unsqueeze(0)).min())
        assert optimum * (1 - 1e-9) <= float(end.error[0, 0, channel]) <= float(start.error[0, 0, channel])
        assert float(end.error[0, 0, channel]) <= 2 * optimum + 1e-9  # measured: at most 1.5


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_refitted_scales_are_optimal(granularity: str) -> None:
    weight, gram = layer(8, groups=2, out=3, inputs=20)
    grid = minmax_grid(weight, 3, False, granularity)
    problem = prepare(weight, gram, dtype=torch.float64)
    start = nearest(problem, grid)
    targets = problem.targets(start.levels, start.scale)
    scale = rounding.refit_scale(problem, start.levels, targets, start.scale)
    assert scale.shape == start.scale.shape
    assert torch.allclose(targets, problem.targets(start.levels, scale))

    def total(factor: float) -> float:
        return float(reassess(problem, replace(start, scale=scale * factor)).error.sum())

    assert total(1.0) < total(1 + 1e-4)
    assert total(1.0) < total(1 - 1e-4)
    assert total(1.0) <= float(start.error.sum())


def test_groups_at_once_equal_one_group_at_a_time() -> None:
    weight, gram = layer(9, groups=7, out=2, inputs=9)
    grid = mse_grid(weight, 3)
    whole = prepare(weight, gram)
    both = descend(
        whole, search(whole, (feedback(whole, factorise(whole, gram), g) for g in (grid, grid.scaled(0.8)))), 4
    )
    for g in range(7):
        own = Grid(grid.scale[g : g + 1], grid.zero[g : g + 1], 3, True)
        one = prepare(weight[g : g + 1], gram[g : g + 1])
        factor = factorise(one, gram[g : g + 1])
        alone = descend(one, search(one, (feedback(one, factor, c) for c in (own, own.scaled(0.8)))), 4)
        assert torch.allclose(
            pack(whole, both, grid).dequantize()[g], pack(one, alone, own).dequantize()[0], rtol=1e-4, atol=1e-5
        )


def test_strips_of_channels_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = layer(10, out=11, inputs=70)
    grid = mse_grid(weight, 3, False)
    problem = prepare(weight, gram, dtype=torch.float64)
    whole = descend(problem, nearest(problem, grid), 3)
    monkeypatch.setattr(rounding, "STRIP", 4)
    monkeypatch.setattr(rounding, "BLOCK", 9)
    pieces = descend(problem, nearest(problem, grid), 3)
    assert torch.equal(whole.levels, pieces.levels)


@pytest.mark.parametrize("strip", [4, 40, 4096])
@pytest.mark.parametrize(("groups", "granularity"), [(1, "channel"), (3, "channel"), (1, "tensor")])
def test_ranges_side_by_side_are_rounded_as_one_after_another(
    groups: int, granularity: str, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = layer(13, groups=groups, out=5, inputs=37)
    grid = mse_grid(weight, 3, False, granularity)
    problem = prepare(weight, gram, dtype=torch.float64)
    factor = factorise(problem, gram)
    grids = [grid.scaled(1.2 - 0.1 * i) for i in range(6)] + [grid.shifted(1), grid.shifted(-1)]
    monkeypatch.setattr(rounding, "STRIP", 2)
    alone = [feedback(problem, factor, grid) for grid in grids]
    monkeypatch.setattr(rounding, "STRIP", strip)
    for one, other in zip(alone, feedbacks(problem, factor, grids), strict=True):
        for name in ("levels", "scale", "low", "high"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert torch.allclose(one.error, other.error, rtol=1e-9, atol=0)
    assert len({float(one.error.sum()) for one in alone}) == len(grids)


def test_dead_inputs_keep_nearest_rounding() -> None:
    weight, gram = layer(11, out=4, inputs=30)
    dead = [0, 7, 29]
    gram[:, dead] = 0
    gram[:, :, dead] = 0
    grid = mse_grid(weight, 4, False)
    problem = prepare(weight, gram)
    factor = factorise(problem, gram)
    for result in (feedback(problem, factor, grid), descend(problem, nearest(problem, grid), 5, scales=False)):
        packed = pack(problem, result, grid)
        assert torch.equal(packed.codes[..., dead], grid.codes(weight)[..., dead].to(torch.uint8))
        assert bool(torch.isfinite(result.error).all())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("symmetric", "fraction"), [(True, 0), (False, 0), (False, 2)])
def test_zero_channels_keep_zero_codes(symmetric: bool, fraction: int, granularity: str) -> None:
    weight, gram = layer(12, out=4, inputs=30)
    weight[:, 2] = 0
    grid = minmax_grid(weight, 3, symmetric, granularity, fraction)
    if fraction and granularity == "tensor":
        pytest.skip("one zero point between codes for the tensor: no level of a channel of zeros is zero")
    if granularity == "channel":
        grid = replace(grid, scale=grid.scale * torch.tensor([1.0, 1.0, 0.0, 1.0])[None, :, None])
    problem = prepare(weight, gram)
    result = descend(problem, search(problem, [feedback(problem, factorise(problem, gram), grid)]), 4)
    packed = pack(problem, result, grid)
    packed.check((1, 4, 30))
    assert bool((packed.dequantize()[:, 2] == 0).all())


@pytest.mark.parametrize("kind", ["duplicates", "few rows", "zero", "constant", "one input"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_singular_grams_give_finite_codes_no_worse_than_nearest(kind: str, symmetric: bool) -> None:
    weight, gram = layer(13, groups=2, out=4, inputs=40)
    if kind == "duplicates":
        pick = torch.arange(40) % 10
        gram = gram[:, pick][:, :, pick]
    elif kind == "few rows":
        weight, gram = layer(13, groups=2, out=4, inputs=40, rows=5)
    elif kind == "zero":
        gram = torch.zeros_like(gram)
    elif kind == "constant":
        gram = torch.ones_like(gram)
    else:
        gram = torch.zeros_like(gram)
        gram[:, 3, 3] = 2.0
    grid = mse_grid(weight, 3, symmetric)
    problem = prepare(weight, gram)
    start = nearest(problem, grid)
    fed = search(problem, [feedback(problem, factorise(problem, gram, damping), grid) for damping in (0.0, 0.01)])
    for result in (descend(problem, fed, 5).better(start), descend(problem, start, 5)):
        packed = pack(problem, result, grid)
        packed.check((2, 4, 40))
        true = output_error(weight, gram, packed.dequantize())
        scale = output_error(weight, gram, torch.zeros_like(weight))
        assert bool((true <= output_error(weight, gram, grid.round(weight)) + 1e-5 * scale).all())


def test_damping_that_does_not_suffice_is_raised_and_recorded() -> None:
    weight, gram = layer(14, groups=2, inputs=40)
    gram[1] -= 0.5 * torch.eye(40)  # indefinite: no Gram, but what rounding can make of one
    problem = prepare(weight, gram)
    factor = factorise(problem, gram, 1e-4)
    assert float(factor.damping[0]) == pytest.approx(1e-4)
    assert float(factor.damping[1]) > 1e-4
    assert bool(torch.isfinite(factor.pull).all())


def test_many_bits_approach_float() -> None:
    weight, gram = layer(15, out=6, inputs=60)
    grid = minmax_grid(weight, 16, False)
    problem = prepare(weight, gram)
    for result in (nearest(problem, grid), feedback(problem, factorise(problem, gram), grid)):
        packed = pack(problem, descend(problem, result, 2), grid)
        relative = output_error(weight, gram, packed.dequantize()) / output_error(
            weight, gram, torch.zeros_like(weight)
        )
        assert float(relative.max()) < 1e-7  # (2⁻¹⁶ · 6 deviations)² / 12, and float32


def test_float32_agrees_with_float64_on_an_ill_conditioned_gram() -> None:
    weight, gram = layer(16, out=8, inputs=200, rows=120, mean=10.0)  # mean-dominated and rank-deficient
    grid = mse_grid(weight, 4)
    errors = []
    for dtype in (torch.float32, torch.float64):
        problem = prepare(weight, gram, dtype=dtype)
        end = descend(problem, search(problem, [feedback(problem, factorise(problem, gram), grid)]), 4)
        errors.append(output_error(weight, gram, pack(problem, end, grid).dequantize()).sum())
    assert float(errors[0]) <= 1.15 * float(errors[1])  # other ties, another local optimum, the same quality


def test_reported_error_is_the_true_error() -> None:
    weight, gram = layer(17, groups=2, out=5, inputs=70)
    grid = mse_grid(weight, 3, False)
    problem = prepare(weight, gram)
    end = descend(problem, nearest(problem, grid), 3)
    true = output_error(weight, gram, pack(problem, end, grid).dequantize())
    assert torch.allclose(end.error[:, 0], true, rtol=1e-4)
    assert torch.allclose(problem.energy()[:, 0], output_error(weight, gram, torch.zeros_like(weight)), rtol=1e-5)


def test_codebook_descent_is_locally_optimal_and_never_worsens() -> None:
    weight, gram = layer(18, out=4, inputs=30)
    table = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])
    grid = Codebook(weight.abs().amax(-1, keepdim=True) / 2, table, 3)
    problem = prepare(weight, gram, dtype=torch.float64)
    start = nearest(problem, grid)
    assert torch.allclose(pack(problem, start, grid).dequantize(), grid.round(weight))
    end = descend(problem, start, 50, scales=False)
    codes = pack(problem, end, grid).codes.long()
    error = output_error(weight, gram, grid.values(codes))
    assert bool((error <= output_error(weight, gram, grid.round(weight))).all())
    for i, level in itertools.product(range(30), range(8)):
        moved = codes.clone()
        moved[..., i] = level
        assert bool((output_error(weight, gram, grid.values(moved)) >= error * (1 - 1e-6)).all())

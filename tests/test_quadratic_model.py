"""Newton steps over codes, against closed forms and the errors that they promise."""

from __future__ import annotations

import pytest
import torch
from support.tasks import make_task
from torch import nn

from coraq.calibration.block_data import BlockData
from coraq.config import Scheme
from coraq.core.gram import Moments
from coraq.core.grid import Grid, minmax_grid
from coraq.core.quadratic_model import Expansion, QuadraticModel
from coraq.network.fold import fold
from coraq.testing import random_images


class Chain(nn.Module):
    """Two convolutions without anything between them: a unit's error is quadratic in either's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.chain = Chain()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.chain(x)).flatten(1))


def unit() -> BlockData:
    """The chain, its first weight off by a known amount."""
    model = Head().eval()
    batches = list(random_images(48, 8, seed=3).split(16))
    task = make_task(model, Scheme.of(bits=3), batches, found=fold(model, random_images(2, 8)))
    blocks = {block.module: block for block in task.partition("block", "chain")}
    data = task.block_io(blocks["chain"])
    torch.manual_seed(5)
    for name in ("chain.first", "chain.second"):
        layer = data.layer(name)
        layer.weight.data += 0.1 * torch.randn_like(layer.weight)
        layer.bias.data += 0.1
    return data


def squared_error(data: BlockData) -> float:
    """Per output position."""
    with torch.no_grad():
        error = (data.module(data.student_input) - data.teacher_output).square().sum(dtype=torch.float64)
    return float(error) / (data.teacher_output.numel() / data.teacher_output.shape[1])


def test_the_sensitivity_is_the_squared_norm_of_what_follows() -> None:
    """Of the chain's first layer: the columns of the second's weight; of its last layer: 1."""
    data = unit()
    found = [data.expand(name, 8, data.rows, torch.Generator().manual_seed(0)) for name in data.block.layers]
    wanted = data.layer("chain.second").weight.flatten(1).square().sum(0)
    assert torch.allclose(found[0].sensitivity[0], wanted.double(), rtol=0.1)
    assert torch.allclose(found[1].sensitivity, torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["chain.first", "chain.second"])
def test_the_gradient_is_the_error_s(name: str) -> None:
    data = unit()
    expansion = data.expand(name, 16, data.rows, torch.Generator().manual_seed(0))
    layer, change = data.layer(name), 1e-2
    for index in [(0, 0), (2, 1)]:
        errors = []
        for sign in (1, -1):
            layer.weight.data[(*index, 0, 0)] += sign * change
            errors.append(squared_error(data))
            layer.weight.data[(*index, 0, 0)] -= sign * change
        slope = (errors[0] - errors[1]) / (2 * change)
        assert float(expansion.gradient[(0, *index)]) == pytest.approx(slope, rel=1e-3, abs=1e-4)
    layer.bias.data[1] += change
    up = squared_error(data)
    layer.bias.data[1] -= 2 * change
    slope = (up - squared_error(data)) / (2 * change)
    assert float(expansion.bias_gradient[0, 1]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_the_step_of_a_last_layer_reaches_the_least_squares_solution(centred: bool) -> None:
    """There the model is exact: many fine codes take the error where ordinary regression takes it."""
    data = unit()
    layer = data.layer("chain.second")
    expansion = data.expand("chain.second", 16, data.rows, torch.Generator().manual_seed(0))
    model = QuadraticModel.of(expansion, centred)
    weight = layer.weight.detach().reshape(1, 4, 6)
    fine = minmax_grid(1.5 * weight, 8, symmetric=False)
    fine = Grid(fine.scale / 16, fine.zero * 16, 12, fine.symmetric)  # nearly no rounding at all
    grid, codes, shift = model.solve(fine, fine.codes(weight), 1.0)
    before = squared_error(data)
    layer.weight.data = grid.values(codes).reshape(layer.weight.shape)
    layer.bias.data += shift.reshape(-1).float()
    rows = data.student_input.permute(0, 2, 3, 1).flatten(0, 2)
    with torch.no_grad():
        hidden = data.layer("chain.first")(data.student_input).permute(0, 2, 3, 1).flatten(0, 2).double()
    wanted = data.teacher_output.permute(0, 2, 3, 1).flatten(0, 2).double()
    if centred:
        hidden = torch.cat((hidden, torch.ones(len(rows), 1, dtype=torch.float64)), 1)
    else:
        wanted = wanted - layer.bias.detach().double()
    least = (hidden @ torch.linalg.lstsq(hidden, wanted, driver="gelsd").solution - wanted).square().sum() / len(rows)
    # a hundredth of the diagonal damps the step, so a small part of the way is left
    assert squared_error(data) - float(least) < 0.05 * (before - float(least))


def test_damping_shortens_the_step_and_dead_inputs_stay() -> None:
    torch.manual_seed(0)
    gram = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)).unsqueeze(0)
    moments = Moments(10_000, torch.zeros(1, 3, dtype=torch.float64), gram)
    gradient = torch.tensor([[[2.0, -4.0, 1.0]]], dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    model = QuadraticModel.of(Expansion(gradient, 0 * ones, ones, moments), centred=True)
    assert torch.allclose(model.step, torch.tensor([[[-1.0, 1.0, 0.0]]], dtype=torch.float64), rtol=0.02)
    grid = Grid(torch.full((1, 1, 1), 0.25), torch.full((1, 1, 1), 8.0), 4, False)
    codes = torch.full((1, 1, 3), 8.0)
    between = Grid(grid.scale, grid.zero - 0.5, 4, False, fraction=1)
    shifted, moved, _ = model.solve(between, codes, 1.0)  # from an eighth above zero to −7/8 and 9/8
    assert torch.equal(shifted.zero, between.zero)
    assert torch.equal(moved, moved.round())
    assert torch.allclose(shifted.values(moved)[0, 0, :2], torch.tensor([-0.875, 1.125]), atol=0.2)
    near, far = (model.solve(grid, codes, damping) for damping in (4.0, 1.0))
    assert torch.allclose(far[0].values(far[1])[0, 0], torch.tensor([-1.0, 1.0, 0.0]), atol=0.03)
    assert torch.allclose(near[0].values(near[1])[0, 0], torch.tensor([-0.25, 0.25, 0.0]), atol=0.03)

"""Claims about moments from some positions: all give the exact ones, and some give them nearly."""

from __future__ import annotations

import pytest
import torch

from coraq.core.gram import GramAccumulator
from coraq.core.patches import Geometry, channels_first, patches, taps_first
from coraq.core.sampling import (
    MIN_ROWS,
    SampledMoments,
    grid_step,
    paired_positions,
    positions_needed,
    sampled_patches,
    sampled_windows,
    window_products,
)

GEOMETRIES = [
    Geometry((1, 1), in_channels=6),
    Geometry((3, 3), padding=(1, 1, 1, 1), in_channels=6),
    Geometry((3, 3), stride=(2, 2), padding=(0, 1, 0, 1), in_channels=6),
    Geometry((3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), groups=2, in_channels=6),
    Geometry((5, 3), stride=(1, 2), padding=(2, 2, 1, 1), groups=6, in_channels=6),
]


def maps(seed: int, n: int = 4, size: int = 9) -> torch.Tensor:
    """Smooth, positive maps [n, 6, size, size], as after a ReLU."""
    noise = torch.randn(n, 6, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 5, 1).mul_(5).add_(1).relu_()


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_all_positions_give_the_exact_moments(geometry: Geometry) -> None:
    weight = torch.randn(geometry.groups, 4, geometry.inputs, generator=torch.Generator().manual_seed(1))
    sampled, exact = SampledMoments(geometry, 10**6, project=weight), GramAccumulator(geometry)
    rows = []
    for seed in (0, 1):
        student, teacher = maps(seed), maps(seed + 10)
        sampled.add(student, teacher)
        exact.add(student)
        rows.append([patches(x, geometry).double() for x in (teacher, student)])
    # float32 products of a few hundred rows, centred: far below 1e-5 of the whole
    torch.testing.assert_close(sampled.result().gram, exact.result().gram, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sampled.result().mean, exact.result().mean, rtol=1e-5, atol=1e-6)
    teachers, students = (torch.cat(x, 1) for x in zip(*rows, strict=True))
    moved = (teachers - students) @ weight.double().mT
    for centred in (True, False):
        left, right = (x - x.mean(1, keepdim=True) if centred else x for x in (moved, students))
        wanted = left.mT @ right / students.shape[1]
        torch.testing.assert_close(sampled.input_mismatch_moment(centred), wanted, rtol=1e-5, atol=1e-4)
    assert sampled.result().count == exact.result().count


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_some_positions_are_patches_of_the_input(geometry: Geometry) -> None:
    """Every sampled row is one of the im2col patches, none twice."""
    x = maps(3, n=1)
    sampled = channels_first(sampled_patches(x, geometry, 6, 0), geometry.kernel[0] * geometry.kernel[1])
    rows, all_rows = sampled, patches(x, geometry)
    distances = torch.cdist(rows.double(), all_rows.double())
    nearest = distances.min(-1)
    assert float(nearest.values.max()) < 1e-6
    if geometry.groups == 1:
        assert len(nearest.indices[0].unique()) == rows.shape[1]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_of_windows_are_those_of_patches(geometry: Geometry) -> None:
    """In float64, where both ways agree to its rounding; and the two orders of a weight's inputs undo each other."""
    x, taps = maps(5).double(), geometry.kernel[0] * geometry.kernel[1]
    rows = channels_first(sampled_patches(x, geometry, 20, 3), taps)
    weight = torch.randn(geometry.groups, 4, geometry.inputs, dtype=torch.float64)
    wanted = (rows @ weight.mT).transpose(0, 1).flatten(1)
    torch.testing.assert_close(window_products([sampled_windows(x, geometry, 20, 3)], weight)[0], wanted)
    assert torch.equal(channels_first(taps_first(weight, taps), taps), weight)


def test_the_phase_reaches_every_position() -> None:
    geometry = Geometry((1, 1), in_channels=1)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    seen: set[int] = set()
    for turn in range(4):
        seen |= set(sampled_patches(x, geometry, 16, turn)[0, :, 0].int().tolist())
    assert seen == set(range(64))


def test_sampled_moments_come_near_the_exact_ones() -> None:
    geometry = GEOMETRIES[1]
    sampled, exact = SampledMoments(geometry, 25), GramAccumulator(geometry)
    for seed in range(20):
        x = maps(seed, n=8, size=14)
        sampled.add(x)
        exact.add(x)
    error = (sampled.result().gram - exact.result().gram).norm() / exact.result().gram.norm()
    assert float(error) < 0.05
    assert sampled.result().count < exact.result().count / 4


@pytest.mark.parametrize(
    ("out", "positions"), [((56, 56), 36), ((7, 7), 49), ((7, 7), 100), ((1, 1), 5), ((14, 3), 10)]
)
def test_a_grid_has_enough_positions_and_not_many_more(out: tuple[int, int], positions: int) -> None:
    step = grid_step(out, positions)
    fewest = (out[0] // step[0]) * (out[1] // step[1])
    assert fewest >= min(positions, out[0] * out[1])
    assert fewest <= max(4 * positions, 1)


def test_layers_with_few_inputs_get_a_minimum_of_rows() -> None:
    depthwise = Geometry((3, 3), groups=8, in_channels=8)
    assert positions_needed(depthwise, 64, 64) * 64 == positions_needed(depthwise, 256, 64) * 256 == MIN_ROWS
    assert positions_needed(Geometry((1, 1), in_channels=960), 1024, 64) == 60


def test_of_more_images_fewer_rows_are_taken() -> None:
    depthwise = Geometry((3, 3), groups=8, in_channels=8)
    images = (64, 256, 1024, 4096)
    for rows in (
        [count * positions_needed(depthwise, count, 64) for count in images],
        [count * paired_positions(depthwise, count) for count in images],
    ):
        assert rows == [MIN_ROWS, MIN_ROWS, MIN_ROWS // 2, MIN_ROWS // 4]
    assert positions_needed(Geometry((3, 3), in_channels=512), 4096, 64) == 64 * 9 * 512 // 4096  # for each input 64


def test_the_drift_needs_the_teacher() -> None:
    sampled = SampledMoments(GEOMETRIES[0], 4, project=torch.ones(1, 1, 6))
    with pytest.raises(ValueError, match="teacher"):
        sampled.add(maps(0))
    with pytest.raises(ValueError, match="positions"):
        SampledMoments(GEOMETRIES[0], 0)

"""Second moments of a layer's inputs from some output positions of each image.

A layer with `in` inputs has far more patches than its Gram needs: neighbouring patches say nearly the same. Here a
regular grid of positions stands for all of them; its phase moves from one micro-batch to the next, so that every
position counts. Where all positions are wanted, `coraq.core.gram` gives exact moments for less.

A Gram grows with the square of the inputs: 25,088 of them (VGG's first classifier layer) would take 5 GB, and a
solver several times that. Past `GRAM_ENTRIES` the inputs are divided into blocks of consecutive ones, and correlations
from one block to another are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coraq.core.gram import CrossMoments, Geometry, Moments, product

MIN_ROWS = 16_384  # for layers with few inputs: a depthwise 3×3 has nine, and they matter
# Of a layer's Gram: 0.5 GiB in float64, or 8,192 inputs in one piece; a solver needs six to eight of that size. No
# share of the memory that is free: a run must give the same bytes wherever and whenever it runs.
GRAM_ENTRIES = 2**26
KEPT_ROWS = 1024  # of a layer whose Gram is in blocks, to take errors from with all correlations in them


class SampledMoments:
    """Moments of the student's patches and, if the teacher's come along, joint moments at the same positions.

    Args:
        geometry: of the layer.
        positions: about how many output positions of each image to keep.
        device: of the inputs.
        blocks: how many blocks each group's Gram has; must divide the inputs. Moments are then
            [groups · blocks, in/blocks, …], and the first `KEPT_ROWS` patches are kept.
    """

    def __init__(self, geometry: Geometry, positions: int, device: torch.device | str = "cpu", blocks: int = 1) -> None:
        if positions < 1:
            raise ValueError(f"positions is {positions}, must be at least 1")
        if geometry.inputs % blocks:
            raise ValueError(f"{geometry.inputs} inputs do not divide into {blocks} blocks")
        self.geometry, self.positions, self.device = geometry, positions, torch.device(device)
        self.blocks = blocks
        self.count, self._batches = 0, 0
        self._kept: list[Tensor] = []
        shape = (geometry.groups * blocks, geometry.inputs // blocks)
        # of inputs less a fixed shift, which removes most of the mean that a Gram would otherwise drown in
        self._shifts: list[Tensor] = []
        self._sums = torch.zeros(2, *shape, dtype=torch.float64, device=self.device)
        self._gram = torch.zeros(*shape, shape[1], dtype=torch.float64, device=self.device)
        self._cross: Tensor | None = None

    def add(self, student: Tensor, teacher: Tensor | None = None) -> None:
        """Take in images [N, C, H, W] float32 of the student, and of the teacher in the same order."""
        streams = [student] if teacher is None else [student, teacher]
        rows = [sampled_patches(x, self.geometry, self.positions, self._batches) for x in streams]
        if self.blocks > 1:
            room = max(0, KEPT_ROWS - self.count)
            self._kept += [rows[0][:, :room].clone()] if room else []
            rows = [_in_blocks(x, self.blocks) for x in rows]
        if not self._shifts:
            self._shifts = [x.mean(1, keepdim=True) for x in rows]
        rows = [x.sub_(shift) for x, shift in zip(rows, self._shifts, strict=True)]
        for index, x in enumerate(rows):
            self._sums[index] += x.sum(1, dtype=torch.float64)
        self._gram += product(rows[0], rows[0])
        if len(rows) == 2:
            joint = product(rows[1], rows[0])
            self._cross = joint.double() if self._cross is None else self._cross.add_(joint)
        self.count += rows[0].shape[1]
        self._batches += 1

    def result(self) -> Moments:
        """Moments of the student's patches."""
        _, mean, centred_mean = self._means(0)
        gram = self._gram / self.count - _outer(centred_mean, centred_mean)
        return Moments(self.count, mean, (gram + gram.transpose(1, 2)) / 2 + _outer(mean, mean))

    def rows(self) -> Tensor | None:
        """The first of the student's patches, float32 [groups, rows, in], if there are several blocks."""
        return torch.cat(self._kept, 1) if self._kept else None

    def joint(self) -> CrossMoments:
        """Joint moments; ValueError if the teacher's inputs were not given."""
        if self._cross is None:
            raise ValueError("the teacher's inputs were not given")
        (_, student, s), (_, teacher, t) = self._means(0), self._means(1)
        cross = self._cross / self.count - _outer(t, s) + _outer(teacher, student)
        return CrossMoments(self.count, teacher, student, cross)

    def _means(self, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, mean, and mean less shift: float64 [groups, in]."""
        shift = self._shifts[stream][:, 0].double()
        centred = self._sums[stream] / self.count
        return shift, shift + centred, centred


def sampled_patches(x: Tensor, geometry: Geometry, positions: int, turn: int) -> Tensor:
    """Patches [groups, rows, in] of images [N, C, H, W] on a regular grid of about `positions` output positions each.

    `turn`, the number of the micro-batch, moves the grid. Inputs stand in the order of the weight matrix.
    """
    height, width = x.shape[2], x.shape[3]
    out = geometry.output_size(height, width)
    step = grid_step(out, positions)
    phase = turn % step[0], turn // step[0] % step[1]
    y = torch.arange(phase[0] % out[0], out[0], step[0], device=x.device) * geometry.stride[0] - geometry.padding[0]
    z = torch.arange(phase[1] % out[1], out[1], step[1], device=x.device) * geometry.stride[1] - geometry.padding[2]
    frame = x.permute(0, 2, 3, 1)
    taps = []
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            rows, columns = (y + i * geometry.dilation[0])[:, None], z + j * geometry.dilation[1]
            tap = frame[:, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            taps.append(tap * inside[..., None] if not bool(inside.all()) else tap)
    patches = torch.stack(taps, -1) if len(taps) > 1 else taps[0][..., None]  # N, py, px, C, taps
    return patches.reshape(-1, geometry.groups, geometry.inputs).transpose(0, 1).contiguous()


class OutputVariance:
    """Variance of a layer's outputs per channel, from some positions of each image.

    Args:
        geometry: of the layer.
        weight: [groups, out, in].
        positions: about how many output positions of each image to keep.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, positions: int) -> None:
        self._geometry, self._weight, self._positions = geometry, weight, max(1, positions)
        self._count, self._turn = 0, 0
        self._shift: Tensor | None = None
        self._sums = torch.zeros(2, *weight.shape[:2], dtype=torch.float64, device=weight.device)

    def add(self, images: Tensor) -> None:
        """Take in a micro-batch [N, C, H, W] float32 of the layer's inputs."""
        rows = sampled_patches(images, self._geometry, self._positions, self._turn)
        y = rows @ self._weight.mT  # [groups, rows, out]
        if self._shift is None:  # a mean much larger than the deviation would drown it
            self._shift = y.mean(1, keepdim=True)
        y -= self._shift
        self._sums[0] += y.sum(1, dtype=torch.float64)
        self._sums[1] += y.square_().sum(1, dtype=torch.float64)
        self._count += y.shape[1]
        self._turn += 1

    def result(self) -> Tensor:
        """Variance, float64 [groups, out]."""
        mean, square = self._sums / max(1, self._count)
        return (square - mean.square()).clamp(min=0)


def grid_step(out: tuple[int, int], positions: int) -> tuple[int, int]:
    """Steps of a regular grid with at least `positions` points (or all), whatever its phase, and not many more."""
    step = [1, 1]
    while True:
        axis = 0 if out[0] // step[0] >= out[1] // step[1] else 1
        step[axis] += 1
        if (out[0] // step[0]) * (out[1] // step[1]) < positions:
            step[axis] -= 1
            return step[0], step[1]


def positions_needed(geometry: Geometry, images: int, rows_per_input: int) -> int:
    """Positions of each of `images` images that give `rows_per_input` patches for every input of a layer."""
    return math.ceil(max(rows_per_input * geometry.inputs, MIN_ROWS) / images)


def blocks_needed(geometry: Geometry) -> int:
    """The least number of equal blocks of a group's inputs that keeps the Gram within `GRAM_ENTRIES`."""
    inputs = geometry.inputs
    sizes = (size for size in range(inputs, 0, -1) if inputs % size == 0)
    return next((inputs // size for size in sizes if geometry.groups * inputs * size <= GRAM_ENTRIES), inputs)


def _in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """[groups, rows, in] → [groups · blocks, rows, in/blocks], contiguous."""
    groups, count, inputs = rows.shape
    parts = rows.reshape(groups, count, blocks, inputs // blocks).transpose(1, 2)
    return parts.reshape(groups * blocks, count, inputs // blocks)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]

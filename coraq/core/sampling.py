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
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from coraq.core.gram import Moments
from coraq.core.patches import (
    CACHE_BYTES,
    Geometry,
    add_upper,
    channels_first,
    gram_channels_first,
    mirrored,
    product,
    rows_times,
    sum_of_rows,
    taps_first,
)

# For layers with few inputs: a depthwise 3×3 has nine, and they matter. A quarter of these rows, here and in pairs, was
# a third faster on 256 images, and cost mobilenetv2 at 2 bits a fifth of its KL (cora: 0.244 against 0.206). Rows of
# other images say more than others of the same: with 1,000, a half costs nothing that shows (comq at 4, 3 and 2 bits:
# 0.0488, 0.203, 0.939 for 0.0504, 0.205, 0.929; mobilenetv1_075 0.0515, 0.158, 0.596 for 0.0506, 0.158, 0.629).
MIN_ROWS, FEW_IMAGES = 16_384, 256
# Of a layer's Gram: 0.5 GiB in float64, or 8,192 inputs in one piece; a solver needs six to eight of that size. No
# share of the memory that is free: a run must give the same bytes wherever and whenever it runs.
GRAM_ENTRIES = 2**26
# Rows of both networks that outputs are compared on. The variances of a float and a quantized output rise and fall
# together, but a gain's error is multiplied from layer to layer.
PAIRED_ROWS, PAIRED_ENTRIES = 16_384, 2**25
STRIP = 256  # rows of a matrix turned over at once
DEPTHWISE_TAPS = 49  # of a layer with one input channel a group, at most, whose Grams are taken without matrices
KEPT_ROWS = 1024  # of a layer whose Gram is in blocks, to take errors from with all correlations in them


class SampledMoments:
    """Moments of the student's patches and, if the teacher's come along, how its outputs differ at the same positions.

    Args:
        geometry: of the layer.
        positions: about how many output positions of each image to keep.
        device: of the inputs.
        blocks: how many blocks each group's Gram has; must divide the inputs. Moments are then
            [groups · blocks, in/blocks, …], and the first `KEPT_ROWS` patches are kept.
        project: [groups, k, in], what `input_mismatch_moment` looks at the difference of the networks through.
        gram: False where the input-mismatch moment alone is wanted.
    """

    def __init__(
        self,
        geometry: Geometry,
        positions: int,
        device: torch.device | str = "cpu",
        blocks: int = 1,
        project: Tensor | None = None,
        gram: bool = True,
    ) -> None:
        if positions < 1:
            raise ValueError(f"positions is {positions}, must be at least 1")
        if geometry.inputs % blocks:
            raise ValueError(f"{geometry.inputs} inputs do not divide into {blocks} blocks")
        self.geometry, self.positions, self.device = geometry, positions, torch.device(device)
        self.blocks = blocks
        self.count, self._batches = 0, 0
        self._kept: list[Tensor] = []
        groups, inputs = geometry.groups * blocks, geometry.inputs // blocks
        # of inputs less a fixed shift, which removes most of the mean that a Gram would otherwise drown in
        self._shift: Tensor | None = None
        self._sum = torch.zeros(groups, inputs, dtype=torch.float64, device=self.device)
        size = inputs if gram else 0
        self._gram = torch.zeros(groups, size, size, dtype=torch.float64, device=self.device)
        # patches have their taps first, but where they are cut into blocks of a weight's consecutive inputs
        self._taps = math.prod(geometry.kernel) if blocks == 1 else 1
        few = math.prod(geometry.kernel) <= DEPTHWISE_TAPS
        self._depthwise = few and 1 < geometry.groups == geometry.in_channels and blocks == 1
        self._project = None if project is None else _in_blocks(taps_first(project, self._taps), blocks)
        k = 0 if project is None else project.shape[1]
        # looked through once, at the end, and not at every row: less work where it has more rows than half its columns
        self._at_end = not self._depthwise and 2 * k > inputs
        k = inputs if self._at_end else k
        self._drift_sum = torch.zeros(groups, k, dtype=torch.float64, device=self.device)
        self._mismatch = torch.zeros(groups, k, inputs, dtype=torch.float64, device=self.device)

    def add(self, student: Tensor, teacher: Tensor | None = None) -> None:
        """Take in images [N, C, H, W] of the student, and of the teacher in the same order if `project`."""
        if self._project is not None and teacher is None:
            raise ValueError("the teacher's inputs were not given")
        add = self._add_depthwise if self._depthwise else self._add_rows
        self.count += add(student, teacher)
        self._batches += 1

    def _add_rows(self, student: Tensor, teacher: Tensor | None) -> int:
        rows = self._rows(student)
        if self.blocks > 1:
            room = max(0, KEPT_ROWS - self.count)
            self._kept += [rows[:, :room].clone()] if room else []
        rows = _in_blocks(rows, self.blocks)
        difference = None
        if self._project is not None and teacher is not None:
            difference = _in_blocks(self._rows(teacher), self.blocks).sub_(rows)
            if not self._at_end:
                difference = rows_times(difference, self._project)
        if self._shift is None:
            self._shift = rows.mean(1, keepdim=True)
        rows.sub_(self._shift)
        self._sum += rows.sum(1, dtype=torch.float64)
        if self._gram.numel():
            add_upper(self._gram, rows)
        if difference is not None:
            self._drift_sum += difference.sum(1, dtype=torch.float64)
            self._mismatch += product(difference, rows)
        return rows.shape[1]

    def _add_depthwise(self, student: Tensor, teacher: Tensor | None) -> int:
        """The same for one channel a group, by products of taps with the channels side by side as they lie.

        The matrices, small ones and one for each channel, would have to be turned over first: twice the time.
        """
        rows = sampled_windows(student, self.geometry, self.positions, self._batches)
        count, taps, channels = rows.shape
        if self._shift is None:
            self._shift = rows.mean(0).t()[:, None]
        shift, at_once = self._shift[:, 0].t(), max(1, 2 * CACHE_BYTES // (4 * taps * channels))
        total, gram = self._sum.t(), self._gram.permute(1, 2, 0)  # views with the channels last
        apart, project = rows, rows.new_empty(0)
        if self._project is not None and teacher is not None:
            apart = sampled_windows(teacher, self.geometry, self.positions, self._batches)
            project = self._project.permute(1, 2, 0).contiguous()  # [k, taps, C]
        for start in range(0, count, at_once):
            here = slice(start, start + at_once)
            part = rows[here]
            if len(project):
                apart[here] -= part
            moved = [_windows_times(apart[here], kernel) for kernel in project]
            part.sub_(shift)
            total += sum_of_rows(part)
            for tap in range(taps if len(gram) else 0):
                gram[tap, tap:] += sum_of_rows(part[:, tap, None] * part[:, tap:])
            for k, output in enumerate(moved):
                self._drift_sum[:, k] += sum_of_rows(output)
                self._mismatch[:, k] += sum_of_rows(part * output[:, None]).t()
        return count

    def _rows(self, x: Tensor) -> Tensor:
        rows = sampled_patches(x, self.geometry, self.positions, self._batches)
        return rows if self.blocks == 1 else channels_first(rows, math.prod(self.geometry.kernel))

    def result(self) -> Moments:
        """Moments of the student's patches."""
        mean, centred = self._means()
        gram = mirrored(self._gram) / self.count - _outer(centred, centred) + _outer(mean, mean)
        return Moments(self.count, channels_first(mean, self._taps), gram_channels_first(gram, self._taps))

    def rows(self) -> Tensor | None:
        """The first of the student's patches, float32 [groups, rows, in], if there are several blocks."""
        return torch.cat(self._kept, 1) if self._kept else None

    def input_mismatch_moment(self, centred: bool) -> Tensor:
        """`E[P (x_teacher − x_student) x_studentᵀ]`, float64 [groups · blocks, k, in/blocks]; `centred`: less means."""
        mean, less = self._means()
        moved = self._drift_sum / self.count
        moment = self._mismatch / self.count - _outer(moved, less) + (0.0 if centred else _outer(moved, mean))
        if self._at_end and self._project is not None:
            moment = self._project.double() @ moment
        return channels_first(moment, self._taps)

    def _means(self) -> tuple[Tensor, Tensor]:
        """Mean, and mean less the shift: float64 [groups · blocks, in/blocks]."""
        if self._shift is None:
            raise ValueError("no inputs were added")
        centred = self._sum / self.count
        return self._shift[:, 0].double() + centred, centred


def sampled_patches(x: Tensor, geometry: Geometry, positions: int, turn: int) -> Tensor:
    """`sampled_windows` by group, as matrices [groups, rows, in] with taps before channels (`taps_first`).

    Of a depthwise layer it is a view whose rows, and not its inputs, lie side by side.
    """
    windows = sampled_windows(x, geometry, positions, turn)
    if geometry.groups == 1:
        return windows.reshape(1, -1, geometry.inputs)
    taps = windows.shape[1]
    if geometry.groups == geometry.in_channels:
        return _turned(windows.flatten(1)).unflatten(0, (taps, -1)).permute(1, 2, 0)
    grouped = windows.unflatten(2, (geometry.groups, -1))
    return grouped.permute(2, 0, 1, 3).reshape(geometry.groups, -1, geometry.inputs)


def window_products(pieces: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    """What a weight [groups, out, in] makes of windows [rows, taps, C], piece by piece: [rows, groups · out]."""
    groups, out, _ = weight.shape
    taps = pieces[0].shape[1]
    if groups == 1:
        matrix = taps_first(weight[0], taps)
        return [rows_times(windows.flatten(1), matrix) for windows in pieces]
    # a matrix for each group is slow to make and, with one input channel each, to multiply by
    kernel = weight.reshape(groups * out, -1, taps, 1)
    images = (windows.unsqueeze(2).permute(0, 3, 1, 2) for windows in pieces)
    return [functional.conv2d(image, kernel, groups=groups).flatten(1) for image in images]


def sampled_windows(x: Tensor, geometry: Geometry, positions: int, turn: int) -> Tensor:
    """What a kernel sees of images [N, C, H, W] at about `positions` output positions each: [rows, taps, C].

    The positions are a regular grid that `turn`, the number of the micro-batch, moves. The tensor is the caller's own.
    """
    height, width = x.shape[2], x.shape[3]
    out = geometry.output_size(height, width)
    step = grid_step(out, positions)
    phase = (turn % step[0] % out[0], turn // step[0] % step[1] % out[1])
    count = [len(range(first, size, by)) for first, size, by in zip(phase, out, step, strict=True)]
    jump = [by * stride for by, stride in zip(step, geometry.stride, strict=True)]
    start = [first * stride for first, stride in zip(phase, geometry.stride, strict=True)]
    (kh, kw), (top, _, left, _) = geometry.kernel, geometry.padding
    frame = x.permute(0, 2, 3, 1)
    kind = torch.promote_types(x.dtype, torch.float32)
    patches = x.new_empty(x.shape[0], *count, kh * kw, geometry.in_channels, dtype=kind)
    for i in range(kh):
        rows, y = _inside(start[0] + i * geometry.dilation[0] - top, jump[0], count[0], height)
        for j in range(kw):
            columns, z = _inside(start[1] + j * geometry.dilation[1] - left, jump[1], count[1], width)
            tap = patches[..., i * kw + j, :]
            if (rows.start, columns.start, rows.stop, columns.stop) != (0, 0, *count):
                tap.zero_()
            tap[:, rows, columns] = frame[:, y, z]
    return patches.flatten(0, 2)


def _windows_times(windows: Tensor, kernel: Tensor) -> Tensor:
    """Windows [rows, taps, C] under one kernel a channel [taps, C]: [rows, C].

    Tap by tap: the products of all taps at once, and their sums, took several times as long.
    """
    out = windows[:, 0] * kernel[0]
    for tap in range(1, len(kernel)):
        out.addcmul_(windows[:, tap], kernel[tap])
    return out


def _turned(matrix: Tensor) -> Tensor:
    """The transpose, contiguous: strip by strip, so that what is read stays in the cache until it is all written."""
    out = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    for i in range(0, len(matrix), STRIP):
        out[:, i : i + STRIP] = matrix[i : i + STRIP].t()
    return out


def _inside(first: int, step: int, count: int, size: int) -> tuple[slice, slice]:
    """Which of `count` positions first, first + step, … lie in 0 … size, and where: slices of both sequences."""
    low = min(count, max(0, -(first // step)))
    high = max(low, min(count, (size - 1 - first) // step + 1))
    return slice(low, high), slice(first + low * step, first + high * step, step) if high > low else slice(0, 0)


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
    return math.ceil(max(rows_per_input * geometry.inputs, _least(MIN_ROWS, images)) / images)


def paired_positions(geometry: Geometry, images: int) -> int:
    """Positions of each of `images` images at which the outputs of both networks are compared."""
    most = max(1, PAIRED_ENTRIES // (geometry.groups * geometry.inputs))
    return math.ceil(min(_least(PAIRED_ROWS, images), most) / images)


def _least(rows: int, images: int) -> int:
    """How many rows of more than `FEW_IMAGES` images are as good as so many of these."""
    return math.ceil(rows * math.sqrt(min(1.0, FEW_IMAGES / images)))


def blocks_needed(geometry: Geometry) -> int:
    """The least number of equal blocks of a group's inputs that keeps the Gram within `GRAM_ENTRIES`."""
    inputs = geometry.inputs
    sizes = (size for size in range(inputs, 0, -1) if inputs % size == 0)
    return next((inputs // size for size in sizes if geometry.groups * inputs * size <= GRAM_ENTRIES), inputs)


def _in_blocks(rows: Tensor, blocks: int) -> Tensor:
    """[groups, rows, in] → [groups · blocks, rows, in/blocks], contiguous."""
    if blocks == 1:
        return rows
    groups, count, inputs = rows.shape
    parts = rows.reshape(groups, count, blocks, inputs // blocks).transpose(1, 2)
    return parts.reshape(groups * blocks, count, inputs // blocks)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[:, :, None] * right[:, None, :]

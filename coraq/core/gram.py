"""Second moments of a layer's inputs: `E[x xᵀ]` over the im2col patches of a convolution, without the patches.

The Gram `[groups, in, in]` is all that the output error `Σ δ G δᵀ` of a changed weight needs. Three exact ways to it,
chosen by their cost for each image size:
- `_Im2col`: the patches, a chunk at a time, and one product. 1 × 1 kernels need no copy.
- `coraq.core.autocorrelation`: from the autocorrelation of the image at the few shifts between taps.
- `_Depthwise`: one channel a group has nothing to multiply matrices of; products of the shifted image, summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coraq.core.autocorrelation import AutocorrelationGram, Plan
from coraq.core.patches import (
    CACHE_BYTES,
    SPLIT,
    Geometry,
    MeanAccumulator,
    Totals,
    add_upper,
    channels_first,
    check_images,
    gram_channels_first,
    mirrored,
    pad_frame,
    windows_of,
)

DAMPING = 1e-3  # of a Gram's mean diagonal, at least, in a regression on inputs
PATCH_BYTES = 16 << 20  # patches made at once (larger blocks are fresh pages each time, which is slow)


@dataclass(frozen=True)
class Moments:
    """Uncentred moments of the patches.

    Attributes:
        count: number of rows they are the mean of.
        mean: float64 [groups, in].
        gram: float64 [groups, in, in], the mean of x xᵀ.
    """

    count: int
    mean: Tensor
    gram: Tensor


def shrunk(gram: Tensor, count: int, share: float = 1.0) -> Tensor:
    """A Gram [blocks, in, in], mean of `count` rows, with `share · in / count` of its mean diagonal on its diagonal.

    Of fewer rows than inputs a Gram says nothing in most directions, and a rounding that is fitted to it puts its
    errors there: on other images they show. A classifier has one row an image. (Ledoit and Wolf, 2004, estimate such
    a share; in over rows is its order, and needs no fourth moments.)
    """
    gram = gram.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += share * gram.shape[2] / count * diagonal.mean(1, keepdim=True)
    return gram


def regress(target: Tensor, gram: Tensor, rows: int, least: float = DAMPING) -> Tensor:
    """`target (gram + λ)⁻¹` of [blocks, k, in] and [blocks, in, in], both means over so many rows.

    λ is inputs over rows, and at least `least`, of the mean diagonal. With about as many rows as inputs a regression
    fits its own noise, and less so with few rows or with many ("double descent"): resnet18_cifar10 at 2 bits, whose
    last layers have 4,608 inputs, was best with 128 or 1,024 calibration images and worst with the 512 that give
    4,608 rows (KL .084); so damped it is .046 there. What is damped away is left to the float weight.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    damping = max(least, gram.shape[2] / rows) * torch.where(mean > 0, mean, 1.0)
    # an input that never varies tells nothing; what rounding left of its column would be blown up without bound
    target = torch.where((diagonal > 0)[:, None, :], target, 0.0)
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):  # no Gram, strictly: rounding made it indefinite by more than the damping
        return torch.linalg.solve(damped, target, left=False)
    return torch.cholesky_solve(target.mT, lower).mT


class _Way(Protocol):
    """One way of summing x xᵀ over the patches of images of one size."""

    def add(self, frame: Tensor) -> None:
        """Take in images [N, H, W, C]."""

    def totals(self) -> Totals:
        """What everything added comes to, its shift undone."""


class GramAccumulator:
    """Mean and Gram of a layer's input patches over any number of micro-batches.

    Sums are float32 within a chunk and float64 across chunks. Each channel's mean in the first micro-batch is
    taken off before and restored in float64 after, so the Gram can be centred (`gram − mean meanᵀ`) without
    cancellation: relative error of the centred Gram about 1e-6 in Frobenius norm.

    Memory: until `result`, one Gram (by patches) or one block of C/G · phases squared for each of a few shifts,
    plus PATCH_BYTES and a block per frequency in a piece, or SPECTRA_BYTES and twice the micro-batch; and one
    float64 image. `result` needs three Grams in float64 at its peak.

    Args:
        geometry: how the layer reads its input.
        device: where sums are kept and inputs are moved to.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self._shift: Tensor | None = None
        self._ways: dict[tuple[int, int], _Way] = {}  # one for each image size

    def add(self, x: Tensor) -> None:
        """Take in images [N, C, H, W] float32; fastest when channels-last in memory."""
        check_images(x, self.geometry)
        if not x.shape[0]:
            return
        frame = x.detach().to(self.device, torch.float32).permute(0, 2, 3, 1)
        if self._shift is None:
            self._shift = frame.mean((0, 1, 2))
        size = (frame.shape[1], frame.shape[2])
        if size not in self._ways:
            self._ways[size] = _choose(self.geometry, size, self._shift)
        self._ways[size].add(frame)

    def result(self) -> Moments:
        """The moments of everything added so far, channels before taps as in a weight."""
        if not self._ways:
            raise ValueError("no inputs were added")
        parts = [way.totals() for way in self._ways.values()]
        count, total, gram = sum(part.count for part in parts), parts[0].sum, parts[0].gram
        for part in parts[1:]:
            total, gram = total + part.sum, gram.add_(part.gram)
        taps = math.prod(self.geometry.kernel)
        return Moments(count, channels_first(total, taps) / count, gram_channels_first(gram, taps).div_(count))


def _choose(geometry: Geometry, size: tuple[int, int], shift: Tensor) -> _Way:
    """The cheapest way for images of this size."""
    if math.prod(geometry.kernel) > 1 and geometry.in_channels == geometry.groups:
        return _Depthwise(geometry, size, shift.device)
    plan = _cheaper_plan(geometry, size)
    return _Im2col(geometry, size, shift) if plan is None else AutocorrelationGram(plan, shift)


def _cheaper_plan(geometry: Geometry, size: tuple[int, int]) -> Plan | None:
    """By lags, where a kernel is large and dense enough for that to cost less than its patches."""
    if math.prod(geometry.kernel) == 1 or geometry.in_channels == geometry.groups:
        return None
    plan = Plan(geometry, size)
    return plan if plan.cost() < _im2col_cost(geometry, size) else None


def exact_cost(geometry: Geometry, size: tuple[int, int]) -> float:
    """Multiplications per image of a Gram over all positions, by the cheapest way for this image size."""
    plan = _cheaper_plan(geometry, size)
    return _im2col_cost(geometry, size) if plan is None else plan.cost()


def sampled_cost(geometry: Geometry, positions: int) -> float:
    """The same of a Gram over some positions, patch by patch; an entry of a patch is worth about a hundred."""
    share = 1.0 if geometry.inputs < 2 * SPLIT else 0.6
    return positions * geometry.groups * (geometry.inputs**2 * share + 100.0 * geometry.inputs)


def _im2col_cost(geometry: Geometry, size: tuple[int, int]) -> float:
    return sampled_cost(geometry, math.prod(geometry.output_size(*size)))


class _Im2col:
    """Patches, a chunk at a time, and their product.

    Patches are taken of x − shift with the padding shifted too, so undoing it is `(z + c)(z + c)ᵀ` expanded.
    """

    def __init__(self, geometry: Geometry, size: tuple[int, int], shift: Tensor) -> None:
        self.geometry, self.shift = geometry, shift
        self.out = geometry.output_size(*size)
        shape = (geometry.groups, geometry.inputs)
        self.gram = torch.zeros(*shape, geometry.inputs, dtype=torch.float64, device=shift.device)
        self.sum = torch.zeros(*shape, dtype=torch.float64, device=shift.device)
        self.count = 0

    def add(self, frame: Tensor) -> None:
        images, rows = _pieces(frame.shape[0], self.out[0], 4 * self._row_entries(), self._limit())
        for i in range(0, frame.shape[0], images):
            windows = self._windows(frame[i : i + images])
            for y in range(0, self.out[0], rows):
                self._add_rows(_by_group(windows[:, y : y + rows], self.geometry.groups))

    def _limit(self) -> int:
        """Bytes of patches to make at once: small enough for the cache, but many rows for each update of the Gram."""
        return min(PATCH_BYTES, max(CACHE_BYTES, 32 * self.geometry.groups * self.geometry.inputs**2))

    def _row_entries(self) -> int:
        return self.out[1] * self.geometry.inputs * self.geometry.groups

    def _windows(self, frame: Tensor) -> Tensor:
        if any(self.geometry.padding):
            return windows_of(pad_frame(frame, self.geometry).sub_(self.shift), self.geometry)
        return windows_of(frame - self.shift, self.geometry)

    def _add_rows(self, rows: Tensor) -> None:
        self.count += rows.shape[1]
        self.sum += (torch.ones(1, rows.shape[1], device=rows.device) @ rows)[:, 0]
        add_upper(self.gram, rows)

    def totals(self) -> Totals:
        taps = math.prod(self.geometry.kernel)
        c = self.shift.double().reshape(self.geometry.groups, 1, -1).repeat(1, taps, 1).flatten(1)
        total = self.sum + self.count * c
        left, right = torch.stack((self.sum, c), 2), torch.stack((c, total), 1)
        return Totals(self.count, total, mirrored(torch.baddbmm(self.gram, left, right)))  # + z cᵀ + c xᵀ


def _pieces(images: int, rows: int, row_bytes: int, limit: int) -> tuple[int, int]:
    """How many images, and how many of their rows, to take at once so as to stay below `limit` bytes."""
    if rows * row_bytes <= limit:
        return max(1, min(images, limit // max(1, rows * row_bytes))), rows
    return 1, max(1, limit // row_bytes)


def _by_group(windows: Tensor, groups: int) -> Tensor:
    """Windows [N, Ho, Wo, kh, kw, C] as [G, N · Ho · Wo, kh · kw · C/G]."""
    n, rows, columns, kh, kw, channels = windows.shape
    split = (
        windows.reshape(n, rows, columns, kh, kw, groups, channels // groups) if groups > 1 else windows[..., None, :]
    )
    return split.permute(5, 0, 1, 2, 3, 4, 6).reshape(groups, n * rows * columns, -1)


def _window_sums(product: Tensor, starts: list[int], length: int) -> Tensor:
    """Sums over images and over columns start … start + length of [rows, N, columns, C]: [len(starts), rows, C].

    The whole is summed once; each window is what remains without the thin strips outside.
    """
    image = product.sum(1) if product.shape[1] > 1 else product[:, 0]
    whole = image.sum(1)
    sums = []
    for start in starts:
        window = whole
        if start:
            window = window - image[:, :start].sum(1)
        if start + length < image.shape[1]:
            window = window - image[:, start + length :].sum(1)
        sums.append(window)
    return torch.stack(sums)


@dataclass(frozen=True)
class _PairClass:
    """Pairs of taps of one axis, the second `shift` pixels after the first, whose first taps share a phase.

    pairs: (first tap, second tap, start): its window is start … start + out of the positions
    `first + stride · t`, t = 0 … extent.
    """

    shift: int
    first: int
    extent: int
    pairs: list[tuple[int, int, int]]


def _pair_classes(kernel: int, stride: int, dilation: int, out: int) -> list[_PairClass]:
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(kernel):
        for j in range(kernel):
            found.setdefault(((j - i) * dilation, i * dilation % stride), []).append((i, j))
    classes = []
    for (shift, _), pairs in found.items():
        first = pairs[0][0] * dilation
        starts = [(i, j, (i * dilation - first) // stride) for i, j in pairs]
        classes.append(_PairClass(shift, first, starts[-1][2] + out, starts))
    return classes


class _Depthwise:
    """One channel a group: each pair of taps is a product of the image with itself, shifted and summed.

    Pairs with the same shift share the product and differ in what their windows leave out.
    """

    def __init__(self, geometry: Geometry, size: tuple[int, int], device: torch.device) -> None:
        self.geometry = geometry
        self.out = geometry.output_size(*size)
        axes = [
            _pair_classes(*axis)
            for axis in zip(geometry.kernel, geometry.stride, geometry.dilation, self.out, strict=True)
        ]
        self.classes = [(y, x) for y in axes[0] for x in axes[1] if y.shift > 0 or (y.shift == 0 and x.shift >= 0)]
        self.sums: list[Tensor] = []  # of each class float64 [pairs of x, extent of y, C]
        self.mean = MeanAccumulator(geometry, device)

    def add(self, frame: Tensor) -> None:
        top, bottom, left, right = self.geometry.padding
        n, height, width, channels = frame.shape
        height, width = height + top + bottom, width + left + right
        images, rows = _pieces(n, height, 4 * width * channels, CACHE_BYTES)
        padded = frame.new_zeros(height, images, width, channels)
        scratch = frame.new_empty(rows * images * width * channels)
        sums: list[Tensor] = []
        for i in range(0, n, images):
            z = self._embed(frame[i : i + images], padded)
            parts = [self._class_sums(z, y, x, rows, scratch) for y, x in self.classes]
            sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
        if not self.sums:
            self.sums = [torch.zeros_like(total, dtype=torch.float64) for total in sums]
        for total, part in zip(self.sums, sums, strict=True):
            total += part
        self.mean.add_frame(frame)

    def _embed(self, frame: Tensor, padded: Tensor) -> Tensor:
        """Copy a frame into one padded with zeros whose rows come first: [H + padding, N, W + padding, C]."""
        n, height, width, _ = frame.shape
        top, _, left, _ = self.geometry.padding
        padded[top : top + height, :n, left : left + width] = frame.transpose(0, 1)
        return padded[:, :n]

    def _class_sums(self, z: Tensor, y: _PairClass, x: _PairClass, rows: int, scratch: Tensor) -> Tensor:
        """Products of one class of pairs, some rows at a time so that they stay in the cache: [pairs, rows, C]."""
        a = self._view(z, y.first, x.first, y.extent, x.extent)
        b = self._view(z, y.first + y.shift, x.first + x.shift, y.extent, x.extent)
        starts = [start for _, _, start in x.pairs]
        bands = []
        for r in range(0, y.extent, rows):
            left, right = a[r : r + rows], b[r : r + rows]
            product = scratch[: left.numel()].view(left.shape)
            bands.append(_window_sums(torch.mul(left, right, out=product), starts, self.out[1]))
        return torch.cat(bands, 1)

    def _view(self, frame: Tensor, y: int, x: int, rows: int, columns: int) -> Tensor:
        sy, sx = self.geometry.stride
        return frame[y : y + (rows - 1) * sy + 1 : sy, :, x : x + (columns - 1) * sx + 1 : sx]

    def totals(self) -> Totals:
        kw = self.geometry.kernel[1]
        taps = self.geometry.inputs
        count, mean = self.mean.result()
        gram = torch.zeros(self.geometry.groups, taps, taps, dtype=torch.float64, device=mean.device)
        for (y, x), sums in zip(self.classes, self.sums, strict=True):
            for i1, i2, start in y.pairs:
                blocks = sums[:, start : start + self.out[0]].sum(1)
                for (j1, j2, _), block in zip(x.pairs, blocks, strict=True):
                    gram[:, i1 * kw + j1, i2 * kw + j2] = block
                    gram[:, i2 * kw + j2, i1 * kw + j1] = block
        return Totals(count, mean * count, gram)

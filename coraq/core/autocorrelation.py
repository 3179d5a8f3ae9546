"""The Gram of a dense convolution's inputs, from the autocorrelation of the images at a few shifts.

The block of two taps depends only on the shift between them, up to the borders, so the Gram follows from the
autocorrelation of the image at 13 shifts for a 3 × 3 kernel, against 45 pairs of taps. That comes from one Fourier
transform an image and one small product a frequency; thin strips along the borders are then taken off. A stride is
turned into more channels first (one for each phase). It takes fewer multiplications than the convolution itself.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from coraq.core.patches import (
    CACHE_BYTES,
    Geometry,
    MeanAccumulator,
    Totals,
    mirrored,
    pad_frame,
    product,
    windows_of,
    write_products,
)

_Key = TypeVar("_Key")

SPECTRA_BYTES = 62 << 20  # spectra kept at once
FLUSHES = 8  # products of spectra summed in float32 before they go to float64
SPECTRA_IMAGES = 64  # images whose spectra wait for one product: short products are slow


class _Axis:
    """One axis of a convolution, its stride turned into phases: pixel `phase + stride · r` is entry r of the phase.

    Attributes:
        taps: of each tap the index of its phase and the entry that output 0 reads (negative in the padding).
        lengths: entries of each phase that the image has and some tap reads; `length` is the longest.
        shifts: all differences of two taps' entries.
        edges: entries (phase, entry) that some pair of taps leaves out, before and after the windows.
    """

    def __init__(self, size: int, kernel: int, stride: int, dilation: int, before: int, out: int) -> None:
        offsets = [i * dilation - before for i in range(kernel)]
        self.stride, self.out = stride, out
        self.phases = sorted({offset % stride for offset in offsets})
        self.taps = [(self.phases.index(offset % stride), offset // stride) for offset in offsets]
        self.lengths = []
        for k, phase in enumerate(self.phases):
            read = max(start + out for index, start in self.taps if index == k)
            self.lengths.append(max(0, min(-(-(size - phase) // stride), read)))
        self.length = max(1, *self.lengths)
        self.shifts = sorted({b - a for _, a in self.taps for _, b in self.taps})
        self.transform = _transform_length(self.length, self.shifts[-1])
        self.edges: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for i in range(kernel):
            for j in range(kernel):
                for side, pairs in enumerate(self.left_out(i, j)):
                    for entry in (entry for pair in pairs for entry in pair):
                        if entry not in self.edges[side]:
                            self.edges[side].append(entry)

    def shift(self, i: int, j: int) -> int:
        """Entries from tap i to tap j."""
        return self.taps[j][1] - self.taps[i][1]

    def left_out(self, i: int, j: int) -> list[list[tuple[tuple[int, int], tuple[int, int]]]]:
        """Pairs of entries that the two phases have but the window of taps (i, j) does not: before it, after it."""
        (p, start), (q, _) = self.taps[i], self.taps[j]
        shift = self.shift(i, j)
        low, high = max(0, -shift), min(self.lengths[p], self.lengths[q] - shift)
        before, after = range(low, min(high, start)), range(max(low, start + self.out), high)
        return [[((p, r), (q, r + shift)) for r in side] for side in (before, after)]

    def embed(self, phase: int) -> slice:
        """The pixels that are the entries of a phase."""
        first = self.phases[phase]
        return slice(first, first + self.stride * (self.lengths[phase] - 1) + 1, self.stride)


def _transform_length(length: int, shift: int) -> int:
    """The shortest transform in which a shift does not wrap round, and odd, which saves `_waves` a special case."""
    return (length + shift) // 2 * 2 + 1


class Plan:
    """What `AutocorrelationGram` will do for images of one size: shifts, border strips, and its cost."""

    def __init__(self, geometry: Geometry, size: tuple[int, int]) -> None:
        self.geometry, self.size = geometry, size
        top, _, left, _ = geometry.padding
        out = geometry.output_size(*size)
        self.y = _Axis(size[0], geometry.kernel[0], geometry.stride[0], geometry.dilation[0], top, out[0])
        self.x = _Axis(size[1], geometry.kernel[1], geometry.stride[1], geometry.dilation[1], left, out[1])
        # the others are these, transposed
        self.shifts = [(sy, sx) for sy in self.y.shifts for sx in self.x.shifts if sy > 0 or (sy == 0 and sx >= 0)]
        self.channels = geometry.in_channels // geometry.groups
        self.phases = len(self.y.phases) * len(self.x.phases)
        rows, columns = self.y.transform // 2, self.x.transform // 2
        self.frequencies = (rows + 1) * (columns + 1) + rows * columns
        self.width = self.phases * self.channels

    def line_shifts(self, axis: _Axis) -> list[int]:
        """Shifts along a strip; the negative ones are these, transposed."""
        return [shift for shift in axis.shifts if shift >= 0]

    def cost(self) -> float:
        """Multiplications per image, in the units of `_im2col_cost`; the constants are fitted to measured times."""
        per_frequency = 3 + len(self.shifts) * 2.0 / SPECTRA_IMAGES
        total = self.frequencies * (per_frequency * max(self.width, 48) ** 2 + 700.0 * self.width)
        for across, along in ((self.y, self.x), (self.x, self.y)):
            for edge in across.edges:
                width = len(edge) * len(along.phases) * self.channels
                total += len(self.line_shifts(along)) * along.length * max(width, 24) ** 2
        for edge_y in self.y.edges:
            for edge_x in self.x.edges:
                total += max(len(edge_y) * len(edge_x) * self.channels, 24) ** 2
        return 1.5 * total * self.geometry.groups


class AutocorrelationGram:
    """The Gram from the image's autocorrelation at the shifts between taps, less what the borders leave out.

    With S[s] = Σ_p z[p] z[p + s]ᵀ over a whole image, zero outside, the block of taps (o1, o2) is S[o2 − o1] less
    the pairs of pixels outside the window of o1. Those lie in a few rows and columns along the border, whose own
    autocorrelations along the border are summed too; where a row and a column cross, they were taken off twice.
    """

    def __init__(self, plan: Plan, shift: Tensor) -> None:
        self.plan, self.shift = plan, shift
        self.device = shift.device
        self.mean = MeanAccumulator(plan.geometry, self.device)
        self.spectra = _Spectra(plan, self.device)
        self.strips: dict[tuple[str, int], Tensor] = {}  # (axis across, side): float64 [shifts along, G, P, P]
        self.lags = torch.empty(0)  # S[s] of everything added, from `totals` on
        self.corners: dict[tuple[int, int], Tensor] = {}  # (side of y, side of x): float64 [G, P, P]

    def add(self, frame: Tensor) -> None:
        limit = max(1, SPECTRA_BYTES // (16 * self.plan.frequencies * self.plan.width * self.plan.geometry.groups))
        for part in frame.split(limit):
            z = self._embed(part)
            self.spectra.add(z)
            self._add_borders(z)
        self.mean.add_frame(frame)

    def _embed(self, frame: Tensor) -> Tensor:
        """Frame [N, H, W, C] less the shift, as [G, N, y, x, phases of y, phases of x, C/G]."""
        plan = self.plan
        groups, y, x = plan.geometry.groups, plan.y, plan.x
        if plan.phases == 1 and groups == 1 and not plan.y.phases[0] and not plan.x.phases[0]:
            return (frame[:, y.embed(0), x.embed(0)] - self.shift)[None, :, :, :, None, None]
        shape = (groups, frame.shape[0], y.length, x.length, len(y.phases), len(x.phases), plan.channels)
        out = torch.zeros(shape, device=self.device)
        split = frame.unflatten(3, (groups, plan.channels)).permute(3, 0, 1, 2, 4)
        by_group = self.shift.reshape(groups, 1, 1, 1, plan.channels)
        for p, rows in enumerate(y.lengths):
            for q, columns in enumerate(x.lengths):
                if rows and columns:
                    torch.sub(split[:, :, y.embed(p), x.embed(q)], by_group, out=out[:, :, :rows, :columns, p, q])
        return out

    def _add_borders(self, z: Tensor) -> None:
        plan = self.plan
        for name, across, along in (("y", plan.y, plan.x), ("x", plan.x, plan.y)):
            for side in range(2):
                if across.edges[side]:
                    part = self._strip(z, name, across.edges[side], plan.line_shifts(along))
                    _accumulate(self.strips, (name, side), part)
        for i, edge_y in enumerate(plan.y.edges):
            for j, edge_x in enumerate(plan.x.edges):
                if edge_y and edge_x:
                    pixels = _corner(z, edge_y, edge_x)
                    _accumulate(self.corners, (i, j), product(pixels, pixels))

    def _strip(self, z: Tensor, name: str, edge: list[tuple[int, int]], shifts: list[int]) -> Tensor:
        """Autocorrelation along a strip: [shifts, G, P, P] with P = entries · phases along · C/G."""
        lines = _lines(z, name, edge)
        length, products = lines.shape[2], []
        for shift in shifts:
            if shift >= length:
                products.append(torch.zeros(lines.shape[0], lines.shape[3], lines.shape[3], device=lines.device))
                continue
            left = lines[:, :, : length - shift].flatten(1, 2)
            right = lines[:, :, shift:].flatten(1, 2) if shift else left
            products.append(product(left, right))
        return torch.stack(products)

    def totals(self) -> Totals:
        plan = self.plan
        groups, kw = plan.geometry.groups, plan.geometry.kernel[1]
        taps, channels = math.prod(plan.geometry.kernel), plan.channels
        self.lags = self.spectra.lags()
        restore = _Restore(plan.geometry, plan.size, self.mean, self.shift)
        gram = torch.empty(groups, taps, channels, taps, channels, dtype=torch.float64, device=self.device)
        for o1 in range(taps):
            for o2 in range(o1, taps):
                block = restore.add(self._block(*divmod(o1, kw), *divmod(o2, kw)), o1, o2)
                gram[:, o1, :, o2] = mirrored(block) if o1 == o2 else block
                if o1 != o2:
                    gram[:, o2, :, o1] = block.transpose(1, 2)
        total = self.mean.patch_sum().reshape(taps, groups, channels).transpose(0, 1).flatten(1)
        return Totals(self.mean.count, total, gram.reshape(groups, taps * channels, taps * channels))

    def _block(self, i1: int, j1: int, i2: int, j2: int) -> Tensor:
        """The block of z of taps (i1, j1) and (i2, j2): [G, C/G, C/G]."""
        y, x = self.plan.y, self.plan.x
        (py1, _), (py2, _), (px1, _), (px2, _) = y.taps[i1], y.taps[i2], x.taps[j1], x.taps[j2]
        sy, sx = y.shift(i1, i2), x.shift(j1, j2)
        columns = len(x.phases)
        total = self._lag((sy, sx), py1 * columns + px1, py2 * columns + px2).clone()
        out_y, out_x = y.left_out(i1, i2), x.left_out(j1, j2)
        for side in range(2):
            for a, b in out_y[side]:
                total -= self._line("y", side, sx, x, (y.edges[side].index(a), px1), (y.edges[side].index(b), px2))
            for a, b in out_x[side]:
                total -= self._line("x", side, sy, y, (x.edges[side].index(a), py1), (x.edges[side].index(b), py2))
            for other in range(2):
                for a, b in out_y[side]:
                    for c, d in out_x[other]:
                        total += self._corner(side, other, (a, c), (b, d))
        return total

    def _lag(self, shift: tuple[int, int], p: int, q: int) -> Tensor:
        if shift in self.plan.shifts:
            return self._part(self.lags[self.plan.shifts.index(shift)], p, q)
        return self._lag((-shift[0], -shift[1]), q, p).transpose(1, 2)

    def _line(self, name: str, side: int, shift: int, along: _Axis, a: tuple[int, int], b: tuple[int, int]) -> Tensor:
        shifts = self.plan.line_shifts(along)
        if shift not in shifts:
            return self._line(name, side, -shift, along, b, a).transpose(1, 2)
        phases = len(along.phases)
        return self._part(self.strips[name, side][shifts.index(shift)], a[0] * phases + a[1], b[0] * phases + b[1])

    def _corner(
        self,
        side_y: int,
        side_x: int,
        a: tuple[tuple[int, int], tuple[int, int]],
        b: tuple[tuple[int, int], tuple[int, int]],
    ) -> Tensor:
        edge_y, edge_x = self.plan.y.edges[side_y], self.plan.x.edges[side_x]
        p, q = (edge_y.index(entry[0]) * len(edge_x) + edge_x.index(entry[1]) for entry in (a, b))
        return self._part(self.corners[side_y, side_x], p, q)

    def _part(self, matrix: Tensor, p: int, q: int) -> Tensor:
        """Block (p, q) of [G, P · C/G, P · C/G]."""
        c = self.plan.channels
        return matrix[:, p * c : (p + 1) * c, q * c : (q + 1) * c]


def _accumulate(store: dict[_Key, Tensor], key: _Key, part: Tensor) -> None:
    store[key] = store[key].add_(part) if key in store else part.double()


def _lines(z: Tensor, name: str, edge: list[tuple[int, int]]) -> Tensor:
    """The border's rows ("y") or columns ("x") as images of one line: [G, N, length, entries · phases · C/G]."""
    if name == "y":
        lines = [z[:, :, entry, :, phase] for phase, entry in edge]
    else:
        lines = [z[:, :, :, entry, :, phase] for phase, entry in edge]
    return torch.stack(lines, 3).flatten(3)


def _corner(z: Tensor, edge_y: list[tuple[int, int]], edge_x: list[tuple[int, int]]) -> Tensor:
    """The pixels where border rows and columns cross: [G, N, entries · C/G]."""
    pixels = [z[:, :, row, column, p, q] for p, row in edge_y for q, column in edge_x]
    return torch.stack(pixels, 2).flatten(2)


class _Spectra:
    """Autocorrelations S[s] of whole images through their Fourier transforms: S[s] = Re Σ_f conj(Z) Zᵀ e^{−ifs}.

    The transform is a product with cosines and sines along each axis, which at the sizes of feature maps is
    quicker than a fast one. It is longer than the image by the largest shift, so that nothing wraps round; images
    are real, so one of each pair of opposite frequencies suffices. Spectra wait until there are enough images for
    an efficient product a frequency.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        groups, width = plan.geometry.groups, plan.width
        self.capacity = max(1, min(SPECTRA_IMAGES, SPECTRA_BYTES // (8 * plan.frequencies * groups * width)))
        self.along_y, self.along_x = _transform(plan.y, device), _transform(plan.x, device)
        self.cosines, self.sines = _waves(plan, device)
        self.waiting: Tensor | None = None  # real and imaginary parts [F, G, 2, capacity, width]
        self.filled = 0
        self.flushes = 0
        self.step = min(plan.frequencies, max(8, CACHE_BYTES // (4 * groups * width**2)))
        # sums that go with the cosines and with the sines: float32 over a few flushes, float64 over all
        self.recent = torch.zeros(2, len(plan.shifts), groups * width**2, device=device)
        self.sums: Tensor | None = None

    def add(self, z: Tensor) -> None:
        """Take in embedded images [G, N, y, x, …]."""
        groups = self.plan.geometry.groups
        if self.waiting is None:
            shape = (self.plan.frequencies, groups, 2, self.capacity, self.plan.width)
            self.waiting = torch.empty(shape, device=self.device)
        done, piece = 0, max(1, CACHE_BYTES // (8 * self.plan.frequencies * groups * self.plan.width))
        while done < z.shape[1]:
            take = min(self.capacity - self.filled, z.shape[1] - done, piece)
            into = self.waiting[:, :, :, self.filled : self.filled + take]
            self._transform(z[:, done : done + take].flatten(4), into)
            self.filled += take
            done += take
            if self.filled == self.capacity:
                self.flush()

    def _transform(self, z: Tensor, out: Tensor) -> None:
        """Write the spectra of z [G, N, y, x, P] to `out` [F, G, 2, N, P]."""
        rows, columns = self.along_y.shape[0] // 2, self.along_x.shape[0] // 2
        part = self.along_x @ z
        part = (self.along_y @ part.flatten(3)).unflatten(3, part.shape[3:])
        waves = part.unflatten(3, (2, columns)).unflatten(2, (2, rows)).permute(2, 4, 3, 5, 0, 1, 6)
        (cos_cos, cos_sin), (sin_cos, sin_sin) = waves  # along y, then along x: each [rows, columns, G, N, P]
        plus = out[: rows * columns].unflatten(0, (rows, columns))
        torch.sub(cos_cos, sin_sin, out=plus[:, :, :, 0])
        torch.add(sin_cos, cos_sin, out=plus[:, :, :, 1])
        if rows > 1 and columns > 1:  # the frequencies (−f_y, f_x); for f_y or f_x = 0 that is no new one
            minus = out[rows * columns :].unflatten(0, (rows - 1, columns - 1))
            torch.add(cos_cos[1:, 1:], sin_sin[1:, 1:], out=minus[:, :, :, 0])
            torch.sub(cos_sin[1:, 1:], sin_cos[1:, 1:], out=minus[:, :, :, 1])

    def flush(self) -> None:
        """Turn the waiting spectra into products, and these back into shifts, some frequencies at a time."""
        if self.waiting is None or not self.filled:
            return
        images = self.waiting[:, :, :, : self.filled].contiguous()
        groups, width = self.plan.geometry.groups, self.plan.width
        scratch = torch.empty(2, self.step, groups, width, width, device=self.device)
        for f in range(0, self.plan.frequencies, self.step):
            piece = images[f : f + self.step]
            products = scratch[:, : piece.shape[0]]
            _power_spectrum(piece, products)
            flat = products.flatten(2)
            self.recent[0].addmm_(self.cosines[:, f : f + self.step], flat[0])
            self.recent[1].addmm_(self.sines[:, f : f + self.step], flat[1])
        self.filled = 0
        self.flushes += 1
        if self.flushes % FLUSHES == 0:
            self._flush()

    def _flush(self) -> None:
        self.sums = self.recent.double() if self.sums is None else self.sums.add_(self.recent)
        self.recent.zero_()

    def lags(self) -> Tensor:
        """S[s] for the plan's shifts, float64 [shifts, G, P, P]."""
        self.flush()
        sums = self.recent.double() if self.sums is None else self.sums + self.recent
        even, odd = sums.unflatten(2, (self.plan.geometry.groups, self.plan.width, self.plan.width))
        return (even + odd).sub_(odd.transpose(2, 3))


def _power_spectrum(z: Tensor, out: Tensor) -> None:
    """Of spectra [F, G, 2, N, P]: the real part of Σ conj(z) zᵀ, and B, whose B − Bᵀ is the imaginary part."""
    both = z.flatten(2, 3)
    write_products(both, both, out[0])
    write_products(z[:, :, 0], z[:, :, 1], out[1])


def _transform(axis: _Axis, device: torch.device) -> Tensor:
    """Cosines, then sines, of the frequencies 0 … transform / 2 at each entry: float32 [2 · frequencies, length]."""
    frequencies = torch.arange(axis.transform // 2 + 1, dtype=torch.float64)
    angles = 2 * math.pi / axis.transform * frequencies[:, None] * torch.arange(axis.length, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin())).float().to(device)


def _waves(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of f · shift, times 2 for the opposite frequency: float32 [shifts, F], in the spectra's order."""
    size_y, size_x = plan.y.transform, plan.x.transform
    f_y, f_x = (torch.arange(size // 2 + 1, dtype=torch.float64) for size in (size_y, size_x))
    half = torch.cartesian_prod(f_y, f_x)
    other = torch.cartesian_prod(-f_y[1:], f_x[1:]).reshape(-1, 2)
    frequencies = torch.cat((half, other)) * (2 * math.pi) / torch.tensor([size_y, size_x])
    weight = torch.full((frequencies.shape[0],), 2.0, dtype=torch.float64) / (size_y * size_x)
    weight[0] /= 2  # lengths are odd, so frequency 0 alone is its own opposite
    angles = torch.tensor(plan.shifts, dtype=torch.float64) @ frequencies.T
    return (angles.cos() * weight).float().to(device), (angles.sin() * weight).float().to(device)


class _Restore:
    """What `z = x − c` inside the image, 0 outside, leaves out of x xᵀ; from the sums of the images by position.

    With m(o) = 1 where tap o is inside the image: x_o1 x_o2ᵀ = z_o1 z_o2ᵀ + z_o1 m(o2) cᵀ + c m(o1) z_o2ᵀ + m m c cᵀ.
    """

    def __init__(self, geometry: Geometry, size: tuple[int, int], mean: MeanAccumulator, shift: Tensor) -> None:
        self.shift = shift.double().reshape(geometry.groups, -1)
        ones = torch.ones(1, *size, 1, dtype=torch.float64, device=shift.device)
        masks = windows_of(pad_frame(ones, geometry), geometry).flatten(0, 2).flatten(1)  # rows, taps
        images = mean.images(size)
        self.both_inside = images * (masks.T @ masks)
        self.partial = _masked_sums(mean.sum_of(size) - images * shift.double(), masks, geometry)

    def add(self, block: Tensor, o1: int, o2: int) -> Tensor:
        """The block of x, given that of z: [G, C/G, C/G]."""
        c = self.shift
        left = torch.stack((self.partial[o1, o2] + self.both_inside[o1, o2] * c, c), 2)
        return torch.baddbmm(block, left, torch.stack((c, self.partial[o2, o1]), 1))


def _masked_sums(image: Tensor, masks: Tensor, geometry: Geometry) -> Tensor:
    """Σ over rows of tap o1's pixel where tap o2 is inside: [taps, taps, G, C/G] of a sum of images [H, W, C]."""
    kh, kw = geometry.kernel
    windows = windows_of(pad_frame(image[None], geometry), geometry)[0]
    taps = [windows[:, :, i, j].flatten(0, 1) for i in range(kh) for j in range(kw)]
    return torch.stack([masks.T @ tap for tap in taps]).unflatten(2, (geometry.groups, -1))

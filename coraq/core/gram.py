"""Second moments of a layer's inputs: `E[x xᵀ]` over the im2col patches of a convolution, without the patches.

A layer's weight is `[groups, out, in]` with `in = channels/groups · kh · kw`; its inputs are the patches
`[groups, rows, in]`, a row being one output position of one image. The Gram `[groups, in, in]` is all that the
output error `Σ δ G δᵀ` of a changed weight needs.

Three exact ways to it, chosen by their cost for each image size:
- `_Im2col`: the patches, a chunk at a time, and one product. 1 × 1 kernels need no copy.
- `_Lags`: the block of two taps depends only on the shift between them, up to the borders, so the Gram follows
  from the autocorrelation of the image at a few shifts (13 for 3 × 3, against 45 pairs of taps). That comes from
  one Fourier transform an image and one small product a frequency; thin strips along the borders are then taken
  off. A stride is turned into more channels first (one for each phase). It takes fewer multiplications than
  the convolution itself.
- `_Depthwise`: one channel a group has nothing to multiply matrices of; products of the shifted image, summed.

Inside, taps come first and channels last (kh, kw, C), because the engine's activations are channels-last in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_Key = TypeVar("_Key")

PATCH_BYTES = 16 << 20  # patches made at once (larger blocks are fresh pages each time, which is slow)
SPECTRA_BYTES = 62 << 20  # spectra kept at once
SPLIT = 256  # columns of a block of a Gram; blocks below the diagonal are mirrored
CACHE_BYTES = 2 << 20  # elementwise work goes in pieces of this size
FLUSHES = 8  # products of spectra summed in float32 before they go to float64
SPECTRA_IMAGES = 64  # images whose spectra wait for one product: short products are slow


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input: all of a convolution but its weights.

    Attributes:
        kernel, stride, dilation: (rows, columns).
        padding: zeros at (top, bottom, left, right).
        groups: number of groups.
        in_channels: channels of the input, all groups together.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_channels: int = 1

    def __post_init__(self) -> None:
        if self.in_channels % self.groups:
            raise ValueError(f"{self.in_channels} channels do not divide into {self.groups} groups")
        if min(*self.kernel, *self.stride, *self.dilation, self.groups, self.in_channels) < 1:
            raise ValueError(f"kernel, stride, dilation, groups and channels must be positive: {self}")
        if min(self.padding) < 0:
            raise ValueError(f"padding must not be negative: {self.padding}")

    @classmethod
    def linear(cls, in_features: int) -> Geometry:
        """The geometry of `nn.Linear`; `linear_input` gives its inputs the right shape."""
        return cls(kernel=(1, 1), in_channels=in_features)

    @property
    def inputs(self) -> int:
        """Inputs of one output channel: channels/groups · kh · kw."""
        return self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of `height` × `width`; ValueError where there are none."""
        top, bottom, left, right = self.padding
        rows = (height + top + bottom - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        columns = (width + left + right - self.dilation[1] * (self.kernel[1] - 1) - 1) // self.stride[1] + 1
        if rows < 1 or columns < 1:
            raise ValueError(f"an input of {height} × {width} is smaller than the kernel of {self}")
        return rows, columns


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


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """All patches of images [N, C, H, W] as [groups, rows, in], in the order of `weight.reshape(groups, out, in)`.

    The readable form, for tests and small layers: it takes kh · kw times the memory of `x`.
    """
    n = x.shape[0]
    windows = _windows(_pad(x.permute(0, 2, 3, 1), geometry), geometry)  # N, Ho, Wo, kh, kw, C
    per_group = windows.reshape(*windows.shape[:5], geometry.groups, -1)
    rows = n * windows.shape[1] * windows.shape[2]
    return per_group.permute(5, 0, 1, 2, 6, 3, 4).reshape(geometry.groups, rows, geometry.inputs)


def _pad(frame: Tensor, geometry: Geometry) -> Tensor:
    """A frame [N, H, W, C] with the geometry's zeros around it; itself where there are none."""
    top, bottom, left, right = geometry.padding
    return F.pad(frame, (0, 0, left, right, top, bottom)) if any(geometry.padding) else frame


def _windows(frame: Tensor, geometry: Geometry) -> Tensor:
    """The view [N, Ho, Wo, kh, kw, C] of a padded frame: entry (y, x, i, j) is the pixel under tap (i, j)."""
    (kh, kw), (sy, sx), (dy, dx) = geometry.kernel, geometry.stride, geometry.dilation
    n, height, width, channels = frame.shape
    rows = (height - dy * (kh - 1) - 1) // sy + 1
    columns = (width - dx * (kw - 1) - 1) // sx + 1
    s = frame.stride()
    return frame.as_strided(
        (n, rows, columns, kh, kw, channels),
        (s[0], s[1] * sy, s[2] * sx, s[1] * dy, s[2] * dx, s[3]),
        frame.storage_offset(),
    )


def _check(x: Tensor, geometry: Geometry) -> None:
    """Raise ValueError unless `x` is images of the right number of channels, large enough for the kernel."""
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"inputs have shape {list(x.shape)}, not [N, {geometry.in_channels}, H, W]")
    geometry.output_size(x.shape[2], x.shape[3])


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of [G, K, P] and [G, K, Q], float32."""
    out = torch.empty(a.shape[0], a.shape[2], b.shape[2], device=a.device)
    _products(a, b, out)
    return out


def _products(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write aᵀ b of [..., K, P] and [..., K, Q] to `out`, float32 and contiguous in all but the first axes."""
    same = a is b
    a, b, out = a.flatten(0, -3), b.flatten(0, -3), out.flatten(0, -3)
    least = 96 if a.shape[0] == 1 else 192  # in a batch, MKL's small products have less overhead
    if _ONEDNN and a.device.type == "cpu" and min(a.shape[2], b.shape[2]) >= least:
        for i in range(a.shape[0]):
            left = a[i]
            out[i] = _onednnproduct(left, left if same else b[i])
    else:
        torch.bmm(a.transpose(1, 2), b, out=out)


def _onednnproduct(a: Tensor, b: Tensor) -> Tensor:
    left = _dense_transpose(a)
    right = left if a is b else _dense_transpose(b)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return out


def _dense_transpose(a: Tensor) -> Tensor:
    """aᵀ in a layout that oneDNN is fast at: it takes a thousand times as long on rows with gaps between them."""
    return a.contiguous().T if a.shape[1] >= 256 else a.T.contiguous()


def _onednn_works() -> bool:
    """Whether oneDNN's product can be called: twice as fast as `@` on AMD, where MKL leaves AVX-512 unused.

    The operator is what torch.compile calls, not documented; so it is tried once, and `@` does without it.
    """
    try:
        a = torch.arange(12.0).reshape(4, 3)
        b = torch.arange(8.0).reshape(4, 2)
        out = torch.ops.mkldnn._linear_pointwise(a.T, b.T, None, "none", [], "")
        return bool(torch.equal(out, a.T @ b))
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


_ONEDNN = _onednn_works()


class MeanAccumulator:
    """The mean patch alone, in O(C·H·W) per image: what bias correction needs and the Gram is too dear for.

    The images are summed position by position; the patches of that one sum give the mean patch, exactly.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self.count = 0
        self._sums: dict[tuple[int, int], Tensor] = {}  # by image size: float64 [H, W, C]
        self._images: dict[tuple[int, int], int] = {}

    def add(self, x: Tensor) -> None:
        """Take in images [N, C, H, W]; the size may differ from call to call."""
        _check(x, self.geometry)
        if x.shape[0]:
            self.add_frame(x.detach().to(self.device, torch.float32).permute(0, 2, 3, 1))

    def add_frame(self, frame: Tensor) -> None:
        """Take in images [N, H, W, C] float32."""
        images, height, width, _ = frame.shape
        # a product with ones: torch.sum over the first axis takes several times as long
        ones = torch.ones(1, images, device=frame.device)
        total = (ones @ frame.reshape(images, -1)).reshape(frame.shape[1:]).double()
        size = (height, width)
        self._sums[size] = self._sums[size].add_(total) if size in self._sums else total
        self._images[size] = self.images(size) + images
        self.count += images * math.prod(self.geometry.output_size(height, width))

    def images(self, size: tuple[int, int]) -> int:
        """Number of images of one size."""
        return self._images.get(size, 0)

    def sum_of(self, size: tuple[int, int]) -> Tensor:
        """Sum of the images of one size, float64 [H, W, C]."""
        return self._sums[size]

    def patch_sum(self) -> Tensor:
        """Sum of all patches, float64 [taps, C]: tap by tap, so that no patches are made."""
        kh, kw = self.geometry.kernel
        total = torch.zeros(kh * kw, self.geometry.in_channels, dtype=torch.float64, device=self.device)
        for image in self._sums.values():
            windows = _windows(_pad(image[None], self.geometry), self.geometry)[0]
            total += torch.stack([windows[:, :, i, j].sum((0, 1)) for i in range(kh) for j in range(kw)])
        return total

    def result(self) -> tuple[int, Tensor]:
        """Number of rows, and their mean: float64 [groups, in]."""
        if not self.count:
            raise ValueError("no inputs were added")
        return self.count, self.patch_sum().T.reshape(self.geometry.groups, -1) / self.count


@dataclass(frozen=True)
class _Totals:
    """Sums over all rows, float64, taps before channels: [G, taps · C/G] and [G, taps · C/G, taps · C/G]."""

    count: int
    sum: Tensor
    gram: Tensor


class _Way(Protocol):
    """One way of summing x xᵀ over the patches of images of one size."""

    def add(self, frame: Tensor) -> None:
        """Take in images [N, H, W, C]."""

    def totals(self) -> _Totals:
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
        _check(x, self.geometry)
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
        return Moments(count, self._order(total) / count, self._order_gram(gram).div_(count))

    def _order(self, total: Tensor) -> Tensor:
        taps = math.prod(self.geometry.kernel)
        return total.reshape(total.shape[0], taps, -1).transpose(1, 2).reshape(total.shape)

    def _order_gram(self, gram: Tensor) -> Tensor:
        taps = math.prod(self.geometry.kernel)
        channels = gram.shape[1] // taps
        blocks = gram.reshape(-1, taps, channels, taps, channels)
        return blocks.permute(0, 2, 1, 4, 3).reshape(gram.shape)


def _choose(geometry: Geometry, size: tuple[int, int], shift: Tensor) -> _Way:
    """The cheapest way for images of this size."""
    if math.prod(geometry.kernel) > 1:
        if geometry.in_channels == geometry.groups:
            return _Depthwise(geometry, size, shift.device)
        plan = _Plan(geometry, size)
        if plan.cost() < _im2col_cost(geometry, size):
            return _Lags(plan, shift)
    return _Im2col(geometry, size, shift)


def exact_cost(geometry: Geometry, size: tuple[int, int]) -> float:
    """Multiplications per image of a Gram over all positions, by the cheapest way for images of this size."""
    cost = _im2col_cost(geometry, size)
    lags = math.prod(geometry.kernel) > 1 and geometry.in_channels > geometry.groups
    return min(cost, _Plan(geometry, size).cost()) if lags else cost


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
            return _windows(_pad(frame, self.geometry).sub_(self.shift), self.geometry)
        return _windows(frame - self.shift, self.geometry)

    def _add_rows(self, rows: Tensor) -> None:
        self.count += rows.shape[1]
        self.sum += (torch.ones(1, rows.shape[1], device=rows.device) @ rows)[:, 0]
        add_upper(self.gram, rows)

    def totals(self) -> _Totals:
        taps = math.prod(self.geometry.kernel)
        c = self.shift.double().reshape(self.geometry.groups, 1, -1).repeat(1, taps, 1).flatten(1)
        total = self.sum + self.count * c
        left, right = torch.stack((self.sum, c), 2), torch.stack((c, total), 1)
        return _Totals(self.count, total, mirrored(torch.baddbmm(self.gram, left, right)))  # + z cᵀ + c xᵀ


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


def add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows of [G, K, P] to the blocks on and above the diagonal of `gram` [G, P, P]; see `mirrored`."""
    for i in range(0, rows.shape[2], SPLIT):
        right = rows[..., i:]
        left = right if right.shape[2] <= SPLIT else right[..., :SPLIT]
        gram[:, i : i + SPLIT, i:] += product(left, right)


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrices of which the upper triangle is given."""
    return gram.triu().add_(gram.triu(1).transpose(1, 2))


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

    def totals(self) -> _Totals:
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
        return _Totals(count, mean * count, gram)


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


class _Plan:
    """What `_Lags` will do for images of one size: shifts, border strips, and its cost."""

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


class _Lags:
    """The Gram from the image's autocorrelation at the shifts between taps, less what the borders leave out.

    With S[s] = Σ_p z[p] z[p + s]ᵀ over a whole image, zero outside, the block of taps (o1, o2) is S[o2 − o1] less
    the pairs of pixels outside the window of o1. Those lie in a few rows and columns along the border, whose own
    autocorrelations along the border are summed too; where a row and a column cross, they were taken off twice.
    """

    def __init__(self, plan: _Plan, shift: Tensor) -> None:
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

    def totals(self) -> _Totals:
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
        return _Totals(self.mean.count, total, gram.reshape(groups, taps * channels, taps * channels))

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

    def __init__(self, plan: _Plan, device: torch.device) -> None:
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
            self._settle()

    def _settle(self) -> None:
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
    _products(both, both, out[0])
    _products(z[:, :, 0], z[:, :, 1], out[1])


def _transform(axis: _Axis, device: torch.device) -> Tensor:
    """Cosines, then sines, of the frequencies 0 … transform / 2 at each entry: float32 [2 · frequencies, length]."""
    frequencies = torch.arange(axis.transform // 2 + 1, dtype=torch.float64)
    angles = 2 * math.pi / axis.transform * frequencies[:, None] * torch.arange(axis.length, dtype=torch.float64)
    return torch.cat((angles.cos(), angles.sin())).float().to(device)


def _waves(plan: _Plan, device: torch.device) -> tuple[Tensor, Tensor]:
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
        masks = _windows(_pad(ones, geometry), geometry).flatten(0, 2).flatten(1)  # rows, taps
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
    windows = _windows(_pad(image[None], geometry), geometry)[0]
    taps = [windows[:, :, i, j].flatten(0, 1) for i in range(kh) for j in range(kw)]
    return torch.stack([masks.T @ tap for tap in taps]).unflatten(2, (geometry.groups, -1))

"""A layer's inputs as patches: where a convolution reads, products of patches, and their mean.

A layer's weight is `[groups, out, in]` with `in = channels/groups · kh · kw`; its inputs are the im2col patches
`[groups, rows, in]`, a row being one output position of one image.

Inside, taps come first and channels last (kh, kw, C), because the engine's activations are channels-last in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CACHE_BYTES = 2 << 20  # elementwise work goes in pieces of this size
SPLIT = 256  # columns of a block of a Gram; blocks below the diagonal are mirrored
LEAST_WEIGHT = 2048  # entries of a matrix that oneDNN multiplies rows by faster than MKL does


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


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """All patches of images [N, C, H, W] as [groups, rows, in], in the order of `weight.reshape(groups, out, in)`.

    The readable form, for tests and small layers: it takes kh · kw times the memory of `x`.
    """
    n = x.shape[0]
    windows = windows_of(pad_frame(x.permute(0, 2, 3, 1), geometry), geometry)  # N, Ho, Wo, kh, kw, C
    per_group = windows.reshape(*windows.shape[:5], geometry.groups, -1)
    rows = n * windows.shape[1] * windows.shape[2]
    return per_group.permute(5, 0, 1, 2, 6, 3, 4).reshape(geometry.groups, rows, geometry.inputs)


def pad_frame(frame: Tensor, geometry: Geometry) -> Tensor:
    """A frame [N, H, W, C] with the geometry's zeros around it; itself where there are none."""
    top, bottom, left, right = geometry.padding
    return F.pad(frame, (0, 0, left, right, top, bottom)) if any(geometry.padding) else frame


def windows_of(frame: Tensor, geometry: Geometry) -> Tensor:
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


def check_images(x: Tensor, geometry: Geometry) -> None:
    """Raise ValueError unless `x` is images of the right number of channels, large enough for the kernel."""
    if x.dim() != 4 or x.shape[1] != geometry.in_channels:
        raise ValueError(f"inputs have shape {list(x.shape)}, not [N, {geometry.in_channels}, H, W]")
    geometry.output_size(x.shape[2], x.shape[3])


def product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b of [G, K, P] and [G, K, Q], float32."""
    out = torch.empty(a.shape[0], a.shape[2], b.shape[2], device=a.device)
    write_products(a, b, out)
    return out


def write_products(a: Tensor, b: Tensor, out: Tensor) -> None:
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


def rows_times(rows: Tensor, weight: Tensor) -> Tensor:
    """rows weightᵀ of [G, K, P] and [G, Q, P], or of [K, P] and [Q, P], float32."""
    known = _ONEDNN and rows.device.type == "cpu" and rows.dtype == torch.float32
    if known and rows.shape[:-2].numel() == 1 and weight.numel() >= LEAST_WEIGHT:
        left, right = rows.flatten(0, -2).contiguous(), weight.flatten(0, -2).contiguous()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return out.view(*rows.shape[:-1], len(right))
    return rows @ weight.mT


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


def sum_of_rows(x: Tensor) -> Tensor:
    """Of a float32 tensor over its first axis, float64; a product with ones: torch.sum takes several times as long."""
    return (x.new_ones(1, len(x)) @ x.flatten(1)).reshape(x.shape[1:]).double()


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
        check_images(x, self.geometry)
        if x.shape[0]:
            self.add_frame(x.detach().to(self.device).permute(0, 2, 3, 1))

    def add_frame(self, frame: Tensor) -> None:
        """Take in images [N, H, W, C]; what is not float32 becomes it piece by piece, in the cache."""
        images, height, width, _ = frame.shape
        pieces = frame.reshape(images, -1).split(max(1, CACHE_BYTES // (2 * images)), 1)
        total = torch.cat([sum_of_rows(piece.float()) for piece in pieces]).reshape(frame.shape[1:])
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
            windows = windows_of(pad_frame(image[None], self.geometry), self.geometry)[0]
            total += torch.stack([windows[:, :, i, j].sum((0, 1)) for i in range(kh) for j in range(kw)])
        return total

    def result(self) -> tuple[int, Tensor]:
        """Number of rows, and their mean: float64 [groups, in]."""
        if not self.count:
            raise ValueError("no inputs were added")
        return self.count, self.patch_sum().T.reshape(self.geometry.groups, -1) / self.count


def add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows of [G, K, P] to the blocks on and above the diagonal of `gram` [G, P, P]; see `mirrored`."""
    for i in range(0, rows.shape[2], SPLIT):
        right = rows[..., i:]
        left = right if right.shape[2] <= SPLIT else right[..., :SPLIT]
        gram[:, i : i + SPLIT, i:] += product(left, right)


def channels_first(x: Tensor, taps: int) -> Tensor:
    """The last axis, taps before channels, in the order of a weight matrix: channels before taps."""
    return x.unflatten(-1, (taps, -1)).transpose(-1, -2).flatten(-2)


def taps_first(x: Tensor, taps: int) -> Tensor:
    """The inverse of `channels_first`."""
    return x.unflatten(-1, (-1, taps)).transpose(-1, -2).flatten(-2)


def gram_channels_first(gram: Tensor, taps: int) -> Tensor:
    """`channels_first` of rows and columns of [groups, in, in], in one copy."""
    channels = gram.shape[1] // taps
    blocks = gram.reshape(-1, taps, channels, taps, channels)
    return blocks.permute(0, 2, 1, 4, 3).reshape(gram.shape)


def mirrored(gram: Tensor) -> Tensor:
    """The symmetric matrices of which the upper triangle is given."""
    return gram.triu().add_(gram.triu(1).transpose(1, 2))


@dataclass(frozen=True)
class Totals:
    """Sums over all rows, float64, taps before channels: [G, taps · C/G] and [G, taps · C/G, taps · C/G]."""

    count: int
    sum: Tensor
    gram: Tensor

"""Second moments of a layer's inputs: `E[x xᵀ]` over the im2col patches of a convolution, without the patches.

A layer's weight is `[groups, out, in]` with `in = channels/groups · kh · kw`; its inputs are the patches
`[groups, rows, in]`, a row being one output position of one image. The Gram `[groups, in, in]` is all that the
output error `Σ δ G δᵀ` of a changed weight needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 64 << 20  # temporary patches are at most so large (or one image's, if that is more)


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


@dataclass(frozen=True)
class CrossMoments:
    """Uncentred joint moments of the teacher's and the student's patches at the same positions.

    Attributes:
        count: number of rows they are the mean of.
        teacher_mean, student_mean: float64 [groups, in].
        gram: float64 [groups, in, in], the mean of x_teacher x_studentᵀ.
    """

    count: int
    teacher_mean: Tensor
    student_mean: Tensor
    gram: Tensor


def linear_input(x: Tensor) -> Tensor:
    """View inputs [..., in] of a Linear layer as images [N, in, H, W] in channels-last memory, without a copy."""
    if x.dim() == 2:
        return x[:, :, None, None]
    if x.dim() == 3:
        return x.permute(0, 2, 1)[:, :, None, :]
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2)
    return x.reshape(-1, x.shape[-1])[:, :, None, None]


def conv1d_input(x: Tensor) -> Tensor:
    """View inputs [N, C, L] of a Conv1d as images [N, C, 1, L]."""
    return x[:, :, None, :]


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """All patches of images [N, C, H, W] as [groups, rows, in], in the order of `weight.reshape(groups, out, in)`.

    The readable form, for tests and small layers: it takes kh · kw times the memory of `x`.
    """
    n = x.shape[0]
    windows = _windows(_padded(x, geometry), geometry)  # N, Ho, Wo, kh, kw, C
    per_group = windows.reshape(*windows.shape[:5], geometry.groups, -1)
    rows = n * windows.shape[1] * windows.shape[2]
    return per_group.permute(5, 0, 1, 2, 6, 3, 4).reshape(geometry.groups, rows, geometry.inputs)


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    """Images [N, C, H, W] as a channels-last frame [N, H + padding, W + padding, C]; a view where nothing is added."""
    top, bottom, left, right = geometry.padding
    frame = x.permute(0, 2, 3, 1)
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


def _images_per_chunk(x: Tensor, geometry: Geometry) -> int:
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    one = 4 * rows * columns * geometry.inputs * geometry.groups
    return max(1, CHUNK_BYTES // one)


class MeanAccumulator:
    """The mean patch alone, in O(C·H·W) per image: what bias correction needs and the Gram is too dear for.

    The images are summed position by position; the patches of that one sum give the mean patch, exactly.
    """

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu") -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self.count = 0
        self._maps: dict[tuple[int, int], Tensor] = {}  # by image size: float64 [C, H, W]

    def add(self, x: Tensor) -> None:
        """Take in images [N, C, H, W]; the size may differ from call to call."""
        _check(x, self.geometry)
        size = (x.shape[2], x.shape[3])
        rows, columns = self.geometry.output_size(*size)
        total = x.to(self.device).sum(0).double()
        self._maps[size] = total if size not in self._maps else self._maps[size] + total
        self.count += x.shape[0] * rows * columns

    def result(self) -> tuple[int, Tensor]:
        """Number of rows, and their mean: float64 [groups, in]."""
        if not self.count:
            raise ValueError("no inputs were added")
        total = torch.zeros(self.geometry.groups, self.geometry.inputs, dtype=torch.float64, device=self.device)
        for image in self._maps.values():
            total += _patch_sum(image, self.geometry)
        return self.count, total / self.count


def _patch_sum(image: Tensor, geometry: Geometry) -> Tensor:
    """Sum of all patches of one image [C, H, W]: [groups, in], tap by tap, so that no patches are made."""
    windows = _windows(_padded(image[None], geometry), geometry)[0]
    kh, kw = geometry.kernel
    taps = [windows[:, :, i, j].sum((0, 1)) for i in range(kh) for j in range(kw)]
    return torch.stack(taps, 1).reshape(geometry.groups, geometry.inputs)


class GramAccumulator:
    """Mean and Gram of a layer's input patches over any number of micro-batches."""

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu", positions: int | None = None) -> None:
        self._cross = CrossGramAccumulator(geometry, device, positions)

    def add(self, x: Tensor) -> None:
        """Take in images [N, C, H, W] float32."""
        self._cross.add(x, x)

    def result(self) -> Moments:
        """The moments of everything added so far."""
        cross = self._cross.result()
        return Moments(cross.count, cross.student_mean, cross.gram)


class CrossGramAccumulator:
    """Means and cross-Gram of the teacher's and the student's patches at the same positions."""

    def __init__(self, geometry: Geometry, device: torch.device | str = "cpu", positions: int | None = None) -> None:
        self.geometry = geometry
        self.device = torch.device(device)
        self.positions = positions
        self._teacher = MeanAccumulator(geometry, device)
        self._student = MeanAccumulator(geometry, device)
        self._gram = torch.zeros(
            geometry.groups, geometry.inputs, geometry.inputs, dtype=torch.float64, device=self.device
        )

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Take in images [N, C, H, W] float32 of both networks, in the same order."""
        self._teacher.add(teacher)
        self._student.add(student)
        step = _images_per_chunk(teacher, self.geometry)
        for t, s in zip(teacher.split(step), student.split(step), strict=True):
            a = patches(t.to(self.device), self.geometry)
            b = a if t is s else patches(s.to(self.device), self.geometry)
            self._gram += a.transpose(1, 2) @ b

    def result(self) -> CrossMoments:
        """The moments of everything added so far."""
        count, teacher = self._teacher.result()
        _, student = self._student.result()
        return CrossMoments(count, teacher, student, self._gram / count)

"""What a method learns of a layer's inputs: moments in both networks, and the least-squares problem they make."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from coraq.calibration.lockstep import LayerInputs
from coraq.core.gram import GramAccumulator, Moments, exact_cost, sampled_cost
from coraq.core.least_squares import LeastSquares
from coraq.core.patches import Geometry, MeanAccumulator
from coraq.core.sampling import (
    SampledMoments,
    blocks_needed,
    paired_positions,
    positions_needed,
    sampled_windows,
    window_products,
)
from coraq.errors import CoraqError
from coraq.network.layers import as_images, groups_of

TEACHER, STUDENT = 0, 1
PATCHES = 2**23  # entries of patches made at once where all positions of many images are wanted
CONSTANT = 1e-12  # an input whose variance is a smaller share of its mean square is constant but for float32 rounding
SQUARED = 2**18  # entries whose squares are summed in float32, before float64
T = TypeVar("T")


class _Seen(NamedTuple):
    """Second moments of the student's inputs, and some of these where the Gram is in blocks."""

    student: Moments
    rows: Tensor | None


class Paired(NamedTuple):
    """What the layer's kernel sees at some positions, in both networks: float32 [rows, taps, C], of one micro-batch."""

    teacher: Tensor
    student: Tensor


class _Common(NamedTuple):
    """What settling any layer takes: a sample of its inputs, and their means in both networks, [groups, in]."""

    paired: list[Paired]
    teacher: Tensor
    student: Tensor


class Spread(NamedTuple):
    """Mean and (uncorrected) variance of each output channel, float64 [groups · out]."""

    mean: Tensor
    variance: Tensor

    def mean_square(self, offset: Tensor) -> float:
        """Mean square of the channels, an offset added to each, summed over channels."""
        return float((self.variance + (self.mean + offset).square()).sum())


def spread(pieces: Sequence[Tensor]) -> Spread:
    """Mean and variance over all rows of float32 [rows, channels] tensors.

    By products with ones: torch's own reductions over rows take ten times as long.
    """
    count = sum(map(len, pieces))
    ones = [piece.new_ones(len(piece)) for piece in pieces]
    mean = torch.stack([(one @ piece).double() for one, piece in zip(ones, pieces, strict=True)]).sum(0) / count
    centre = mean.to(pieces[0].dtype)
    squares = [(one @ (piece - centre).square_()).double() for one, piece in zip(ones, pieces, strict=True)]
    variance = torch.stack(squares).sum(0) / count - (mean - centre.double()).square()
    return Spread(mean, variance.clamp(min=0))


def _square(x: Tensor) -> float:
    """Sum of squares of all entries; NaN or Inf anywhere is not lost."""
    return math.fsum(float(part @ part) for part in x.flatten().split(SQUARED))


class _Plan(NamedTuple):
    """How a layer's patches are visited: so many positions of an image, and so many images at a time."""

    geometry: Geometry
    positions: int
    blocks: int
    at_once: int
    sampled: bool


class LayerStats:
    """Statistics of one layer's inputs in both networks, each computed when first read.

    They can be read while the engine stands at the layer: until the next layer is asked for. What has been read
    stays. Rows are im2col patches (output positions of all images). Means are over all rows. Second moments are
    over some positions of each image where there are many more than `rows_per_input` rows for every input (0: over
    all) and some cost less than all; they are centred with those rows' own means.

    `weight` is the float layer's, [groups, out, in]. `input_mismatch_rows` is the number of rows that the last
    `input_mismatch_moment` was taken from.

    A layer of very many inputs has its second moments in blocks of consecutive inputs; `on_blocks` is told how many.
    """

    def __init__(
        self,
        module: nn.Module,
        weight: Tensor,
        layer_inputs: LayerInputs,
        clock: dict[str, float],
        rows_per_input: int = 0,
        on_blocks: Callable[[int], None] | None = None,
    ) -> None:
        self._module: Any = module
        self._weight = weight
        self._layer_inputs, self._clock, self._rows_per_input = layer_inputs, clock, rows_per_input
        self._on_blocks = on_blocks
        self._seen: _Seen | None = None
        self._common: _Common | None = None
        self.input_mismatch_rows = 0
        self.current = True
        self.posed: dict[float, LeastSquares] = {}  # problems made of them (coraq.calibration.problems)

    def leave(self) -> None:
        """The engine moves on: nothing more can be read of the inputs."""
        self.current = False
        self.posed.clear()

    def _timed(self, compute: Callable[[], T]) -> T:
        if not self.current:
            raise CoraqError(
                f"the statistics of layer {self._layer_inputs.name} are gone: the engine has moved on",
                "A method must read a layer's statistics before it asks for the next layer's.",
            )
        start = time.perf_counter()
        result = compute()
        self._clock["statistics"] += time.perf_counter() - start
        return result

    def _plan(self) -> _Plan:
        for x in self._layer_inputs.inputs(STUDENT):  # looked at inside the loop: a spilled input is gone after it
            images, geometry = as_images(self._module, x)
            blocks = blocks_needed(geometry)
            every = math.prod(geometry.output_size(images.shape[2], images.shape[3]))
            needed = self._layer_inputs.batch_size * positions_needed(
                geometry, self._layer_inputs.images, self._rows_per_input
            )
            # by the leading axis and not by image: a Linear layer's inputs come as one image of many rows
            wanted = -(-needed // images.shape[0])
            positions = wanted if self._rows_per_input and 2 * wanted < every else every
            # all positions of a large kernel cost less than some: patches overlap, and the exact way uses that
            sampled = blocks > 1 or (
                positions < every
                and sampled_cost(geometry, positions) < exact_cost(geometry, (images.shape[2], images.shape[3]))
            )
            at_once = max(1, PATCHES // (positions * geometry.groups * geometry.inputs))
            return _Plan(geometry, positions, blocks, at_once, sampled)
        raise AssertionError("a pass has at least one micro-batch")

    def _visit(self, moments: bool = False, project: Tensor | None = None) -> SampledMoments | None:
        """One visit to all inputs, which takes along what has not been taken yet of what every layer needs.

        Inputs are read from memory, or from a file, at every visit: so there should be one.

        Args:
            moments: of the student's inputs, too, if they are not known.
            project: what `input_mismatch_moment` looks through; what has seen it is returned.
        """
        plan, device = self._plan(), self._module.weight.device
        wanted = (moments or project is not None) and self._seen is None
        if wanted and plan.blocks > 1 and self._on_blocks is not None:
            self._on_blocks(plan.blocks)
        exact = GramAccumulator(plan.geometry, device) if wanted and not plan.sampled else None
        rows, sampler = wanted and plan.sampled, None
        if rows or project is not None:
            sampler = SampledMoments(plan.geometry, plan.positions, device, plan.blocks, project, gram=rows)
        first = self._common is None
        means = [MeanAccumulator(plan.geometry, device) for _ in (TEACHER, STUDENT)] if first else []
        paired: list[Paired] = []
        for x, y in self._layer_inputs.pairs():
            teacher, student = as_images(self._module, x)[0], as_images(self._module, y)[0]
            if first:
                paired.append(self._sample(plan.geometry, teacher, student, len(paired)))
                for mean, images in zip(means, (teacher, student), strict=True):
                    mean.add(images)
            if exact is not None:
                exact.add(student)
            if sampler is not None:
                for i in range(0, len(student), plan.at_once):
                    part = slice(i, i + plan.at_once)
                    sampler.add(student[part], None if project is None else teacher[part])
        if first:
            self._common = _Common(paired, *(mean.result()[1] for mean in means))
        if exact is not None:
            self._seen = _Seen(exact.result(), None)
        elif rows and sampler is not None:
            self._seen = _Seen(sampler.result(), sampler.rows())
        return sampler

    def _sample(self, geometry: Geometry, teacher: Tensor, student: Tensor, turn: int) -> Paired:
        wanted = self._layer_inputs.batch_size * paired_positions(geometry, self._layer_inputs.images)
        positions = -(-wanted // student.shape[0])
        return Paired(*(sampled_windows(z, geometry, positions, turn) for z in (teacher, student)))

    @property
    def _student(self) -> _Seen:
        if self._seen is None:
            self._timed(lambda: self._visit(moments=True))
        assert self._seen is not None
        return self._seen

    def input_mismatch_moment(self, project: Tensor, centred: bool = True) -> Tensor:
        """`E[P (x_teacher − x_student) x_studentᵀ]`, float64 [groups · blocks, k, in/blocks]; `centred`: less means.

        P is [groups, k, in]. With the float weight for P it is what a layer's outputs have moved by through its inputs
        alone, against these inputs: the right-hand side of the asymmetric objective, for the price of `k` rows and
        not of a second Gram. The identity gives the cross-Gram (`cross_gram`).
        """
        sampler = self._timed(lambda: self._visit(project=project))
        assert sampler is not None
        self.input_mismatch_rows = sampler.count
        return sampler.input_mismatch_moment(centred)

    @property
    def _shared(self) -> _Common:
        if self._common is None:
            self._timed(self._visit)
        assert self._common is not None
        return self._common

    @property
    def paired(self) -> list[Paired]:
        """The same sample of both networks' inputs, from all images, micro-batch by micro-batch."""
        return self._shared.paired

    @cached_property
    def input_error(self) -> float:
        """Relative Frobenius error of the student's patches."""
        paired = self.paired

        def compute() -> float:
            noise = math.fsum(_square(student - teacher) for teacher, student in paired)
            return math.sqrt(noise / max(math.fsum(_square(teacher) for teacher, _ in paired), 1e-60))

        return self._timed(compute)

    @cached_property
    def wanted(self) -> list[Tensor]:
        """The float layer's outputs on `paired`, without bias: float32 [rows, groups · out] each."""
        paired = self.paired
        return self._timed(lambda: window_products([teacher for teacher, _ in paired], self._weight))

    @cached_property
    def wanted_spread(self) -> Spread:
        """Mean and variance of each output channel of `wanted`."""
        wanted = self.wanted
        return self._timed(lambda: spread(wanted))

    def outputs(self, weight: Tensor) -> list[Tensor]:
        """What a quantized weight [groups, out, in] makes of the student's inputs, as `wanted`."""
        paired, weight = self.paired, weight.to(self._weight.device)
        return self._timed(lambda: window_products([student for _, student in paired], weight))

    def output_error(self, found: list[Tensor], bias: Tensor | None, float_bias: Tensor | None) -> float:
        """Relative Frobenius error of what `outputs` gave, which it overwrites; biases [groups · out] included."""
        wanted, scale = self.wanted, self.wanted_spread

        def compute() -> float:
            noise = spread([y.sub_(z) for y, z in zip(found, wanted, strict=True)])
            none = torch.zeros_like(scale.mean)
            offset = none if float_bias is None else float_bias.double()
            change = (none if bias is None else bias.double()) - offset
            return math.sqrt(noise.mean_square(change) / max(scale.mean_square(offset), 1e-60))

        return self._timed(compute)

    @property
    def mean(self) -> Tensor:
        """Mean student input, float64 [groups, in]."""
        return self._shared.student

    @property
    def teacher_mean(self) -> Tensor:
        """Mean teacher input, float64 [groups, in]."""
        return self._shared.teacher

    @property
    def count(self) -> int:
        """Rows that the Gram is a mean of."""
        return self._student.student.count

    @property
    def gram(self) -> Tensor:
        """`E[x xᵀ]` of the student's inputs, float64 [groups · blocks, in/blocks, in/blocks]."""
        return self._student.student.gram

    @property
    def covariance(self) -> Tensor:
        """The Gram of the student's inputs less their mean. Rows and columns of constant inputs are exactly zero."""
        moments = self._student.student
        centred = moments.gram - moments.mean[:, :, None] * moments.mean[:, None, :]
        constant = centred.diagonal(dim1=1, dim2=2) <= CONSTANT * moments.gram.diagonal(dim1=1, dim2=2)
        if bool(constant.any()):  # else rounding would leave small variances of either sign
            centred.masked_fill_(constant[:, :, None] | constant[:, None, :], 0.0)
        return centred

    @cached_property
    def cross_gram(self) -> Tensor:
        """`E[x_teacher x_studentᵀ]`, float64 [groups · blocks, in/blocks, in/blocks]."""
        size, inputs = self.gram.shape[-1], self._module.weight[0].numel()
        identity = torch.eye(size, device=self.gram.device).repeat(groups_of(self._module), 1, inputs // size)
        return self.input_mismatch_moment(identity, centred=False) + self.gram

    def rows(self, centred: bool) -> Tensor | None:
        """With several blocks, the student's first inputs, float32 [groups, rows, in], less the mean if `centred`."""
        moments, rows = self._student.student, self._student.rows
        if rows is None or not centred:
            return rows
        return rows - moments.mean.reshape(rows.shape[0], 1, -1).float()

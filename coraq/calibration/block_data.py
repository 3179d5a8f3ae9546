"""What a method that reconstructs block by block gets: one unit cut out, with its inputs and the wanted outputs."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coraq.activations.fake_quant import set_fake_quant
from coraq.activations.grids import ActivationGrids
from coraq.activations.points import QuantizationPoint
from coraq.calibration.layer_pass import ROWS_PER_INPUT, check_finite
from coraq.calibration.traversal import Traversal
from coraq.core.gram import GramAccumulator, Moments
from coraq.core.quadratic_model import Expansion
from coraq.core.sampling import SampledMoments, positions_needed
from coraq.core.tensors import ActivationGrid
from coraq.network.blocks import Block
from coraq.network.layers import as_images, as_matrices, groups_of

PROBED = 3  # micro-batches that sensitivities are estimated on
CALIBRATED_ON = 64  # rows (images) that the grids inside a unit are calibrated on


@dataclass
class BlockData:
    """One unit in front of which the engine stands.

    Attributes:
        block: its name and layers.
        module: a copy of the unit in the student: float weights, the student's grids, nothing in place, no hooks.
        student_input, teacher_input, teacher_output: [rows, …], rows are images (windows, in some networks).
        points: tensors with a grid that layers of the unit read, whose grid the unit may choose.
        grids: grids of those points as calibrated on the student's input with float weights, by point name.
    """

    block: Block
    module: nn.Module
    student_input: Tensor
    teacher_input: Tensor
    teacher_output: Tensor
    points: list[QuantizationPoint] = field(default_factory=list)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def rows(self) -> int:
        return int(self.student_input.shape[0])

    @property
    def held_bytes(self) -> int:
        """Memory that inputs and outputs take; none where they wait in a file."""
        held = () if self._folder is not None else (self.student_input, self.teacher_input, self.teacher_output)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def layer(self, name: str) -> Any:
        """A layer of the copy, by its name in the network."""
        return self.module.get_submodule(self.block.inner(name))

    def readers(self, point: QuantizationPoint) -> list[Any]:
        """The layers of the copy that read a point."""
        return [self.layer(name) for name in point.readers if name in self.block.layers]

    @torch.no_grad()
    def moments(self, batch: int) -> dict[str, Moments]:
        """Moments of what each layer reads in the copy as it is now."""
        with self._gathering(self.block.layers, self.rows) as taken:
            for start in range(0, self.rows, batch):
                self.module(self.student_input[start : start + batch].clone())
        return {name: moments.result() for name, moments in taken.items()}

    @contextmanager
    def _gathering(self, names: Sequence[str], rows: int) -> Iterator[dict[str, SampledMoments | GramAccumulator]]:
        """Moments of what some layers read while the copy runs on so many rows in all."""
        taken: dict[str, SampledMoments | GramAccumulator] = {}

        def take(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                images, geometry = as_images(module, args[0])
                if name not in taken:
                    wanted = positions_needed(geometry, rows, ROWS_PER_INPUT)
                    height, width = geometry.output_size(images.shape[2], images.shape[3])
                    sampled = 0 < 2 * wanted < height * width
                    taken[name] = (
                        SampledMoments(geometry, wanted, images.device)
                        if sampled
                        else GramAccumulator(geometry, images.device)
                    )
                with torch.no_grad():
                    taken[name].add(images)

            return hook

        handles = [self.layer(name).register_forward_pre_hook(take(name)) for name in names]
        try:
            yield taken
        finally:
            for handle in handles:
                handle.remove()

    def expand(self, name: str, batch: int, rows: int, generator: torch.Generator) -> Expansion:
        """The unit's squared error about a layer's weight as it is in the copy now, from the first `rows` rows.

        A forward and a backward pass, and a backward pass of random signs over the first `PROBED` micro-batches for the
        sensitivities (Hutchinson: E (vᵀJ)² = Σ J²).
        """
        module, seen = self.layer(name), list[Tensor]()

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.retain_grad()
            seen[:] = [output]

        parameters = [module.weight, module.bias]
        squares, probed, counted = torch.zeros(len(module.weight), dtype=torch.float64), 0, 0
        squares = squares.to(module.weight.device)
        handle = module.register_forward_hook(keep)
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with self._gathering([name], rows) as taken:
                for index, start in enumerate(range(0, rows, batch)):
                    part = slice(start, min(rows, start + batch))
                    with torch.enable_grad():
                        got = self.module(self.student_input[part].clone())
                        if index < PROBED:
                            signs = torch.randint(0, 2, got.shape, generator=generator).to(got) * 2 - 1
                            (slope,) = torch.autograd.grad((signs * got).sum(), seen[0], retain_graph=True)
                        (got - self.teacher_output[part]).square().sum().backward()
                    counted += seen[0].numel() // len(module.weight)
                    if index < PROBED:
                        channels = slope.ndim - 1 if isinstance(module, nn.Linear) else 1
                        others = [axis for axis in range(slope.ndim) if axis != channels]
                        squares += slope.square().sum(others, dtype=torch.float64)
                        probed = counted
            gradient, bias_gradient = (parameter.grad.double() / counted for parameter in parameters)
        finally:
            handle.remove()
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        groups = groups_of(module)
        return Expansion(
            as_matrices(gradient, groups),
            bias_gradient.reshape(groups, -1),
            (squares / probed).reshape(groups, -1),
            taken[name].result(),
        )

    def close(self) -> None:
        """Give the memory, or the files, back."""
        self.student_input = self.teacher_input = self.teacher_output = torch.empty(0)
        if self._folder is not None:
            self._folder.cleanup()


@torch.no_grad()
def collect_block(traversal: Traversal, block: Block, note: Callable[[str], None]) -> BlockData:
    """Advance to a block, and cut it out with its inputs and outputs; see `coraq.api.BlockTask.block_io`."""
    waiting = traversal.go_to_block(block.module)
    start = time.perf_counter()
    collector = Collector(waiting.images, traversal.memory_bound, traversal.settings.folder)
    teacher = traversal.teacher.get_submodule(block.module)
    for size, (x, y) in zip(waiting.sizes, waiting.pairs(raw=True), strict=True):
        x, y = x.float(), y.float()
        # the block's own forward, past its hooks, on a copy: it may work in place
        output = teacher.forward(x.clone())
        check_finite(block.module, y, output)
        collector.add([y, x, output], size)
    if collector.folder is not None:
        note(f"the inputs and outputs of {block.module} exceed the memory bound and wait in a file")
    module, grids = cut_out(traversal.student, block), traversal.grids
    y, x, wanted = collector.result()
    inside = [s for s in grids.points if set(s.readers) & set(block.layers) and s.producer is None]
    data = BlockData(block, module, y, x, wanted, inside, _folder=collector.folder)
    for point in inside:
        grid = grids.grid(point)
        if grid is not None:
            data.grids[point.name] = grid
    data.points = [point for point in inside if not grids.is_final(point)]
    prefix = block.module + "."
    outputs = [s for s in grids.points if (s.producer or "").startswith(prefix)]
    calibrate_inside(data, outputs, grids)
    traversal.clock["block data"] += time.perf_counter() - start
    return data


def fisher(traversal: Traversal, block: Block, generator: torch.Generator) -> Tensor:
    """Squared gradients of the float network's own log-likelihood; see `coraq.api.BlockTask.fisher`."""
    module, found = traversal.teacher.get_submodule(block.module), []
    leaf: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf[:] = [output.detach().clone().requires_grad_(True)]
        return leaf[0].clone()  # what follows may work in place

    handle = module.register_forward_hook(cut)
    try:
        here = traversal.layer_inputs if traversal.at == block.module else None
        for index in here.taken if here else range(len(traversal.batches)):
            images = traversal.batches[index]
            with torch.enable_grad():
                scores = traversal.teacher(images).log_softmax(-1)
                drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
                (gradient,) = torch.autograd.grad(scores.gather(1, drawn).sum(), leaf[0])
            found.append(gradient.square_())
    finally:
        handle.remove()
    return torch.cat(found)


def cut_out(student: nn.Module, block: Block) -> nn.Module:
    """A copy of the unit that can be run and trained by itself."""
    module = copy.deepcopy(student.get_submodule(block.module))
    for part in module.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
        if getattr(part, "inplace", False):
            part.inplace = False  # type: ignore[assignment]
    return module.requires_grad_(False).eval()


@torch.no_grad()
def calibrate_inside(data: BlockData, outputs: Sequence[QuantizationPoint], grids: ActivationGrids) -> None:
    """Calibrate the grids inside a unit's copy, each on values that have passed the earlier ones, and set them."""
    by_module: dict[nn.Module, tuple[QuantizationPoint, str]] = {}
    for point in data.points:
        if point.name not in data.grids:
            for reader in data.readers(point)[:1]:
                by_module[reader] = (point, "input")
    handles: list[Any] = []

    def at_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        point = by_module[module][0]
        data.grids[point.name] = grids.choose(point, [args[0]], 1)
        for reader in data.readers(point):
            set_fake_quant(reader, "input", data.grids[point.name])

    def at_output(point: QuantizationPoint) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            grid = grids.choose(point, [output], 1)
            set_fake_quant(module, "output", grid)
            return grid.round(output)

        return hook

    for module in by_module:
        handles.append(module.register_forward_pre_hook(at_input))
    for point in outputs:
        assert point.producer is not None
        inner = data.module.get_submodule(data.block.inner(point.producer))
        handles.append(inner.register_forward_hook(at_output(point)))
    try:
        data.module(data.student_input[:CALIBRATED_ON].clone())
    finally:
        for handle in handles:
            handle.remove()


class Collector:
    """Rows of several tensors, micro-batch by micro-batch, in memory or, past the bound, in files."""

    def __init__(self, images: int, memory_bytes: int | None, folder: Path | None) -> None:
        self._images, self._bound, self._parent = images, memory_bytes, folder
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self._stores: list[Tensor] = []
        self._filled = 0

    def add(self, tensors: Sequence[Tensor], images: int) -> None:
        """The next rows of every tensor, which belong to `images` images."""
        if not self._stores:
            self._stores = list(self._allocate([t[:1] for t in tensors], len(tensors[0]) * self._images // images))
        stop = self._filled + len(tensors[0])
        for store, tensor in zip(self._stores, tensors, strict=True):
            store[self._filled : stop] = tensor
        self._filled = stop

    def result(self) -> list[Tensor]:
        return [store[: self._filled] for store in self._stores]

    def _allocate(self, rows: Sequence[Tensor], count: int) -> Iterator[Tensor]:
        needed = count * sum(row.numel() * row.element_size() for row in rows)
        # a file holds the host's memory: on another device the block's data stay there
        if self._bound is not None and needed > self._bound and rows[0].device.type == "cpu":
            self.folder = tempfile.TemporaryDirectory(prefix="coraq-block-", dir=self._parent)
        for index, row in enumerate(rows):
            last = row.dim() == 4 and row.is_contiguous(memory_format=torch.channels_last)
            shape = [count, *(row.permute(0, 2, 3, 1) if last else row).shape[1:]]
            if self.folder is None:
                store = torch.empty(shape, dtype=row.dtype, device=row.device)
            else:
                path = str(Path(self.folder.name) / f"{index}")
                size = count * row.numel()
                store = torch.from_file(path, shared=True, size=size, dtype=row.dtype).reshape(shape)
            yield store.permute(0, 3, 1, 2) if last else store

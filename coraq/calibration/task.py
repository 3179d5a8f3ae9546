"""The concrete Task: what a method sees of a network, fed by the calibration engine."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coraq import events
from coraq.activations.allocation import (
    FISHER_IMAGES,
    SAMPLED_IMAGES,
    allocate_activation_bits,
    image_subset,
    point_scales,
    sample_inputs,
    tried_grids,
)
from coraq.activations.grids import ActivationGrids
from coraq.activations.points import QuantizationPoint, find_quantization_points
from coraq.activations.records import ActivationRecord, spread_over
from coraq.calibration.bfloat16_pass import BFloat16Pass
from coraq.calibration.block_data import BlockData, Collector, calibrate_inside, cut_out
from coraq.calibration.corrections import ROWS_PER_INPUT, LayerSolver
from coraq.calibration.delegate import OneLayer, OneUnit
from coraq.calibration.lockstep import LayerInputs, LockStep, live_bytes
from coraq.calibration.releasable import releasable_inputs
from coraq.calibration.schedule import Schedule
from coraq.calibration.statistics import LayerStats
from coraq.config import MAX_BITS, MIN_BITS, Scheme
from coraq.core.subsets import spread_subset
from coraq.core.tensors import ActivationGrid, QuantizedLayer
from coraq.errors import CoraqError, MethodError
from coraq.events import QUANTIZE, LayerCommitted, Metric, Note, Sink, StageAdvanced, null_sink
from coraq.network.blocks import Block, Granularity, partition
from coraq.network.fold import Trace
from coraq.network.layers import LayerView, as_matrices, groups_of, install, kernel_of, kind_of

Metrics = dict[str, float | int | str]


class CalibrationTask(LayerSolver):
    """One network to quantize under one Scheme; implements `coraq.api.Task`.

    Args:
        teacher: the folded float network in eval mode.
        found: what tracing it showed (execution order, output positions).
        scheme: what every layer gets.
        batches: calibration micro-batches [n, channels, height, width] on the teacher's device; may be empty.
        seed: of `rng`.
        sink: takes the events.
        done: layers that a resumed run has already committed, with the metrics of then.
        on_commit: called with number, name, codes and metrics of every new layer before it counts as committed.
        memory_bytes, folder: bound on live activations, and where the overflow goes. Of a method that works unit by
            unit, the passes that wait in front of a unit get half, the unit's inputs and outputs the other half.
        rows_per_input: patches for every input of a layer that second moments are estimated from (0: all).
        early_images: that take part from the start; the others join as activations shrink, see `Schedule` (0: all do).
        find_method: makes a method from its name and options, for `codes`.
        memory: what `remember` keeps beyond this process; a mapping of JSON-able values.
        bfloat16: calibration passes are in bfloat16; what is measured of them and solved stays float32 and float64.
    """

    def __init__(
        self,
        teacher: nn.Module,
        found: Trace,
        scheme: Scheme,
        batches: Sequence[Tensor],
        seed: int = 0,
        sink: Sink = null_sink,
        done: Mapping[str, tuple[QuantizedLayer, Metrics]] | None = None,
        on_commit: Callable[[int, str, QuantizedLayer, Metrics], None] | None = None,
        memory_bytes: int | None = None,
        folder: Path | None = None,
        rows_per_input: int = ROWS_PER_INPUT,
        early_images: int = 0,
        find_method: Callable[[str, dict[str, Any]], Any] | None = None,
        memory: MutableMapping[str, Any] | None = None,
        bfloat16: bool = False,
    ) -> None:
        self._find_method, self._bases = find_method, dict[str, Any]()
        self._memory: MutableMapping[str, Any] = {} if memory is None else memory
        self._resumed = bool(done)
        self.teacher = teacher.requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        super().__init__(scheme, self._describe(found, scheme), defaultdict(float), rows_per_input)
        self.method = "the method"  # what errors call it
        self.committed: dict[str, tuple[QuantizedLayer, Metrics]] = {}
        self.spilled = 0
        self.passes = 0
        self.float_pass_s: float | None = None  # of the last pass
        self._found = found
        self._entries: list[str] = []  # modules, no layers, in front of which the engine must stop
        self._by_units = False
        self._batches = list(batches)
        self._early_images = early_images
        self._release: list[str] | None = None
        self._only: list[int] | None = None  # the micro-batches that take part in a pass; None: all
        self._schedules: dict[tuple[str, ...], Schedule] = {}  # by the modules, no layers, that the pass stops at
        self._seed, self._sink, self._on_commit = seed, sink, on_commit
        self.grids = self._find_grids(found)
        self.memory_bytes, self.folder = memory_bytes, folder
        self._bfloat16 = BFloat16Pass(batches[0].device) if bfloat16 and batches else None
        self._engine: LockStep | None = None
        self._stats: LayerStats | None = None
        self._at: str | None = None
        self._layer_inputs: LayerInputs | None = None
        self._passed: set[str] = set()
        for name, (layer, metrics) in (done or {}).items():
            if not self._fits(name, layer):
                self.note(
                    f"what was saved of layer {name!r} is not of this run: it and those after it are solved again"
                )
                break
            self._put(name, layer)
            self.grids.restore(name, layer.input)
            self.committed[name] = (layer, metrics)
            sink(LayerCommitted(name, len(self.committed), len(self._views), metrics, resumed=True))
        self.layers: list[LayerView] = [view for name, view in self._views.items() if name not in self.committed]
        self._reseed()

    def _fits(self, name: str, layer: QuantizedLayer) -> bool:
        view = self._views.get(name)
        return view is not None and name not in self.committed and layer.weight.codes.shape == view.weight.shape

    def _find_grids(self, found: Trace) -> ActivationGrids:
        points, lost = find_quantization_points(self.teacher, found.order, found.flow, self.scheme)
        if lost:
            self.note(f"{len(lost)} tensors stay float where a grid was wanted, first {lost[0]}")
        points, columns = self._decide_inputs(points, self.scheme.mixes(found.order))
        grids = ActivationGrids(self.student, points, self.scheme, columns)
        for name, view in self._views.items():
            read = grids.point_of(name)
            act_bits = None if read is None else read.bits
            self._views[name] = replace(view, act_bits=act_bits, input_scales=columns.get(name))
        return grids

    def _decide_inputs(
        self, points: Sequence[QuantizationPoint], mixed: Container[str]
    ) -> tuple[list[QuantizationPoint], dict[str, Tensor]]:
        """The points with their bits, and the column scales of the layers that read those which are scaled.

        Args:
            mixed: layers whose inputs' bits are to be shared out.
        """
        free = [point for point in points if point.readers and all(name in mixed for name in point.readers)]
        if free and free[0].bits in (MIN_BITS, MAX_BITS):
            own = free[0].bits
            self.note(f"inputs of {own} bits on average all have {own} bits: there are only {MIN_BITS} to {MAX_BITS}")
            free = []
        chosen = [point for point in points if point.scaled or point in free]
        columns: dict[str, Tensor] = {}
        if not chosen or not self._batches:
            return list(points), columns
        start = time.perf_counter()
        images = image_subset(self._batches, SAMPLED_IMAGES)
        samples = sample_inputs(self.teacher, chosen, self._views, images, self._report)
        for point in chosen:
            if point.scaled:
                self._report(f"scale of {point.name}")
                columns |= point_scales(point, self._views, samples[point.name])
        bits = {point.name: point.bits for point in points}
        if free:
            bits |= self.remember(
                "bits of inputs",
                lambda: self._allocate_bits(free, samples, columns),
                lambda kept: _is_widths(kept, free),
            )
        self.clock["input scales and bits"] += time.perf_counter() - start
        decided = [
            replace(point, bits=bits[point.name], scaled=point.scaled and self.scheme.scales_inputs(bits[point.name]))
            for point in points
        ]
        scaled = {name for point in decided if point.scaled for name in point.readers}
        return decided, {name: own for name, own in columns.items() if name in scaled}

    def _allocate_bits(
        self, points: Sequence[QuantizationPoint], samples: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """The bits of each of these points, `scheme.act_bits` on average."""
        grids: dict[str, dict[int, ActivationGrid]] = {}
        for point in points:
            self._report(f"grids of {point.name}")
            scales, module = columns.get(point.readers[0]), self.teacher.get_submodule(point.readers[0])
            factors = None if scales is None else spread_over(scales, module)
            grids[point.name] = tried_grids(samples[point.name], self.scheme, factors)
        values = {point.name: point.values for point in points}
        macs = {point.name: sum(self._views[name].macs for name in point.readers) for point in points}
        shares = allocate_activation_bits(
            self.teacher,
            grids,
            {point.name: point.readers for point in points},
            {"values": [values], "macs": [macs], "both": [values, macs]}[self.scheme.act_mixed],
            points[0].bits,
            image_subset(self._batches, FISHER_IMAGES),
            torch.Generator().manual_seed(self._seed),
            self._report,
        )
        own, least, most = points[0].bits, min(shares.bits.values()), max(shares.bits.values())
        if least == most:
            self.note(f"the inputs keep {own} bits each: sharing them out is predicted to gain nothing")
        else:
            self.note(
                f"{len(points)} inputs have {least} to {most} bits, predicted to cost a KL of "
                f"{shares.kl:.3g} nats where {own} bits each would cost {shares.uniform_kl:.3g}"
            )
        return shares.bits

    def _report(self, doing: str) -> None:
        self._sink(StageAdvanced(QUANTIZE, 0, f"inputs: {doing}"))

    @property
    def activations(self) -> dict[str, ActivationRecord]:
        """The calibrated activation grids, by point."""
        return self.grids.records

    def _describe(self, found: Trace, scheme: Scheme) -> dict[str, LayerView]:
        own = scheme.resolve(found.order)
        views = {}
        for name in found.order:
            module: Any = self.teacher.get_submodule(name)
            weight = as_matrices(module.weight.detach(), groups_of(module))
            views[name] = LayerView(
                name=name,
                weight=weight,
                bias=None if module.bias is None else module.bias.detach(),
                bits=own[name].bits,
                rank=own[name].rank,
                kind=kind_of(module),
                kernel=kernel_of(module),
                macs=found.outputs[name] * weight.numel(),
            )
        return views

    @property
    def has_data(self) -> bool:
        return bool(self._batches)

    def batches(self) -> Iterator[Tensor]:
        yield from self._batches

    @property
    def quantized(self) -> dict[str, QuantizedLayer]:
        """The committed layers in execution order."""
        return {name: self.committed[name][0] for name in self._views if name in self.committed}

    @property
    def all_layers(self) -> list[LayerView]:
        """All quantizable layers in execution order, committed or not."""
        return list(self._views.values())

    def stats(self, name: str) -> LayerStats:
        """Advance the engine to a layer; see `coraq.api.Task.stats`.

        Raises:
            CoraqError: there are no calibration images, or no such layer.
        """
        self._view(name)
        self._need_images()
        if self._stats is not None and self._at == name:
            return self._stats
        if self._engine is None or name in self._passed or name in self.committed:
            self._start_pass()
        while self._at != name:
            self._step(name)
        assert self._stats is not None
        return self._stats

    @property
    def blocks(self) -> list[Block]:
        """See `coraq.api.Task.blocks`."""
        return self.partition()

    def partition(self, granularity: Granularity = "block", override: str | None = None) -> list[Block]:
        """See `coraq.api.Task.partition`."""
        units = partition(self.teacher, list(self._views), self._found.flow, granularity, override)
        self.close()
        self._entries, self._by_units = [], True
        left = []
        for unit in units:
            done = [name for name in unit.layers if name in self.committed]
            if len(done) == len(unit.layers):
                continue
            self._reopen(done)
            left.append(unit)
            if unit.module not in self._views:
                self._entries.append(unit.module)
        return left

    @torch.no_grad()
    def _reopen(self, names: Sequence[str]) -> None:
        """Forget what was committed of a unit whose other layers a kill has cut off: a unit is solved as a whole."""
        if not names:
            return
        for name in names:
            del self.committed[name]
            view = self._view(name)
            install(self.student.get_submodule(name), view.weight, view.bias)
        self.grids.reopen(names)
        self.layers = [view for name, view in self._views.items() if name not in self.committed]
        self._reseed()

    @torch.no_grad()
    def block_io(self, block: Block) -> BlockData:
        """See `coraq.api.Task.block_io`."""
        self._need_images()
        if block.module not in self._views and block.module not in self._entries:
            raise CoraqError(f"{block.module} is no unit of the partition", "Take units from task.partition().")
        if self._engine is None or block.module in self._passed:
            self._start_pass()
        while self._at != block.module:
            self._step(block.module)
        assert self._layer_inputs is not None
        start = time.perf_counter()
        collector = Collector(self._layer_inputs.images, self._bound, self.folder)
        teacher = self.teacher.get_submodule(block.module)
        for size, (x, y) in zip(self._layer_inputs.sizes, self._layer_inputs.pairs(raw=True), strict=True):
            x, y = x.float(), y.float()
            # the unit's own forward, past its hooks, on a copy: it may work in place
            output = teacher.forward(x.clone())
            self._check_finite(block.module, y, output)
            collector.add([y, x, output], size)
        if collector.folder is not None:
            self.note(f"the inputs and outputs of {block.module} exceed the memory bound and wait in a file")
        module = cut_out(self.student, block)
        y, x, wanted = collector.result()
        inside = [s for s in self.grids.points if set(s.readers) & set(block.layers) and s.producer is None]
        data = BlockData(block, module, y, x, wanted, inside, _folder=collector.folder)
        for point in inside:
            grid = self.grids.grid(point)
            if grid is not None:
                data.grids[point.name] = grid
        data.points = [point for point in inside if not self.grids.is_final(point)]
        prefix = block.module + "."
        outputs = [s for s in self.grids.points if (s.producer or "").startswith(prefix)]
        calibrate_inside(data, outputs, self.grids)
        self.clock["block data"] += time.perf_counter() - start
        return data

    def fisher(self, block: Block) -> Tensor:
        """See `coraq.api.Task.fisher`."""
        module, found = self.teacher.get_submodule(block.module), []
        leaf: list[Tensor] = []

        def cut(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            leaf[:] = [output.detach().clone().requires_grad_(True)]
            return leaf[0].clone()  # what follows may work in place

        handle = module.register_forward_hook(cut)
        try:
            here = self._layer_inputs if self._at == block.module else None
            for index in here.taken if here else range(len(self._batches)):
                images = self._batches[index]
                with torch.enable_grad():
                    scores = self.teacher(images).log_softmax(-1)
                    drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=self.rng).to(scores.device)
                    (gradient,) = torch.autograd.grad(scores.gather(1, drawn).sum(), leaf[0])
                found.append(gradient.square_())
        finally:
            handle.remove()
        return torch.cat(found)

    def _need_images(self) -> None:
        if not self._batches:
            raise CoraqError(
                "this method needs calibration images and there are none", "Give --data-dir or --calib-dir."
            )

    @property
    def _bound(self) -> int | None:
        """On live activations of the pass, and on the data of a unit."""
        return None if self.memory_bytes is None else self.memory_bytes // (2 if self._by_units else 1)

    def _start_pass(self) -> None:
        self.close()
        self._passed.clear()
        self.float_pass_s = 0.0
        # in bfloat16 the means of all layers' inputs are needed, also of those that were committed before
        own = [name for name in self._views if self._bfloat16 or name not in self.committed]
        stops = own + self.grids.begin() + self._entries
        streams = [self.teacher, self.student]
        if self._release is None:
            self._release = releasable_inputs(self.teacher, self._batches[0][:2])
        schedule, rewrite = self._schedule(self._release), self.grids.rewrite
        self._engine = LockStep(
            streams, self._batches, stops, self._bound, self.folder, rewrite, schedule, self._release, self._bfloat16
        )
        self.spilled = max(self.spilled, self._engine.spilled)
        self.passes += 1
        if self._engine.spilled and self.passes == 1:
            self.note(
                f"live activations need {self._engine.live_bytes_needed / 1e6:,.0f} MB, more than the bound of "
                f"{(self._bound or 0) / 1e6:,.0f} MB: {self._engine.spilled} of "
                f"{2 * len(self._batches)} micro-batches wait in a temporary file"
            )

    def _schedule(self, release: Sequence[str]) -> Schedule | None:
        """When which micro-batches join: over all stops, so that a resumed run has the same. None: all are there."""
        sizes = list(map(len, self._batches))
        early = self._early_images if self._early_images < sum(sizes) else 0
        if not early and self._only is None:
            return None
        key = tuple(self._entries)
        if key not in self._schedules:
            stops = [*self._views, *self.grids.stops, *self._entries]
            live = live_bytes(self.teacher, self._batches[0], stops, release, self._bfloat16)
            self._schedules[key] = schedule = Schedule.plan(live, sizes, early)
            fewer = [count for name, count in schedule.present.items() if name in self._views and count < len(sizes)]
            if fewer:
                first = sum(sizes[index] for index in schedule.order[: fewer[0]])
                self.note(
                    f"the first {len(fewer)} layers, of the largest activations, are calibrated on fewer of the "
                    f"{sum(sizes)} images, {first} of them at first"
                )
        schedule = self._schedules[key]
        return schedule if self._only is None else schedule.limited(self._only)

    @contextmanager
    def calibration_subset(self, count: int) -> Iterator[int]:
        """See `coraq.api.Task.calibration_subset`."""
        sizes = list(map(len, self._batches))
        only = spread_subset(sizes, count)
        self.close()
        self._only = only if len(only) < len(sizes) else None
        try:
            yield sum(sizes[index] for index in only)
        finally:
            self._only = None
            self.close()

    def _step(self, wanted: str) -> None:
        assert self._engine is not None
        if self._at is not None:
            self._passed.add(self._at)
        if self._stats is not None:
            if self._bfloat16 is not None and self._at is not None:
                self._bfloat16.take(self.teacher.get_submodule(self._at), self._stats.teacher_mean)
                self._bfloat16.take(self.student.get_submodule(self._at), self._stats.mean)
            self._stats.current = False
        self._stats = None
        self._squares.clear()
        marks = [time.perf_counter()]
        layer_inputs = self._engine.advance(lambda stream: marks.append(time.perf_counter()))
        self.clock["float pass"] += marks[1] - marks[0]
        self.float_pass_s = (self.float_pass_s or 0.0) + marks[1] - marks[0]
        self.clock["student pass"] += marks[2] - marks[1]
        if layer_inputs is None:
            raise CoraqError(
                f"the calibration pass ended without reaching layer {wanted}", "Please report the architecture."
            )
        self._at, self._layer_inputs = layer_inputs.name, layer_inputs
        start = time.perf_counter()
        self.grids.arrive(layer_inputs)
        self.clock["activation grids"] += time.perf_counter() - start
        if layer_inputs.name in self._views:
            self._stats = self._stats_at(layer_inputs, layer_inputs.name)

    @torch.no_grad()
    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        """See `coraq.api.Task.commit`.

        Raises:
            CoraqError: the layer does not exist, has been committed, or the codes do not fit it.
        """
        view = self._view(name)
        if name in self.committed:
            raise MethodError(f"{self.method}: layer {name} was committed twice")
        try:
            layer.check(view.shape)
        except (ValueError, TypeError, AttributeError) as error:  # what is no tensor has no shape
            raise MethodError(f"{self.method}: its result for layer {name} is invalid: {error}") from None
        given, asked = layer.weight.columns, view.input_scales
        if given is None and replace(view, bits=layer.weight.bits).has_columns(self.scheme):
            raise CoraqError(
                f"{self.method} knows no column scales",
                f"Leave out --column-scale {self.scheme.column_scale}, or take a method that has them, such as comq.",
            )
        if given is not None and asked is not None and not torch.equal(given.cpu(), asked.cpu()):
            raise MethodError(f"{self.method}: the column scales of layer {name} are not those of its input")
        layer = self.apply_corrections(view, replace(layer, input=self._input_grid(name, layer)))
        numbers: Metrics = {**self._measure(view, layer), **metrics}
        errors = (numbers.get(key, 0.0) for key in ("input_error", "output_error"))
        self._check_finite(name, *(torch.tensor(error) for error in errors if isinstance(error, float)))
        if self._on_commit is not None:
            self._on_commit(len(self.committed), name, layer, numbers)
        self.committed[name] = (layer, numbers)
        self._reseed()
        self._sink(LayerCommitted(name, len(self.committed), len(self._views), numbers))

    @torch.no_grad()
    def preview(self, name: str, layer: QuantizedLayer) -> QuantizedLayer:
        """See `coraq.api.Task.preview`."""
        view = self._view(name)
        if name in self.committed:
            raise CoraqError(f"layer {name} is committed already", "Only layers of task.layers can be previewed.")
        return self.apply_corrections(view, layer)

    def codes(
        self,
        name: str,
        method: str,
        options: Mapping[str, Any] | None = None,
        *,
        bits: int | None = None,
        less: Tensor | None = None,
        scheme: Scheme | None = None,
    ) -> QuantizedLayer:
        """See `coraq.api.Task.codes`."""
        view = self._view(name)
        if bits is not None:
            view = replace(view, bits=bits)
        part = OneLayer(self, view, less, scheme or self.scheme)
        self._base(method, options).quantize(part)
        if part.result is None:
            raise CoraqError(f"method {method} made no codes for layer {name}", "It cannot serve as a base.")
        return part.result

    def quantize_block_with(
        self, data: BlockData, method: str, options: Mapping[str, Any] | None = None
    ) -> dict[str, QuantizedLayer]:
        """See `coraq.api.Task.quantize_block_with`."""
        teacher = cut_out(self.teacher, data.block)
        views = {name: self._view(name) for name in data.block.layers}
        batch = max(1, data.rows * max(map(len, self._batches)) // sum(map(len, self._batches)))
        unit = OneUnit(self, teacher, data, views, batch)
        try:
            self._base(method, options).quantize(unit)
        finally:
            unit.close()
        missing = [name for name in views if name not in unit.result]
        if missing:
            raise CoraqError(f"method {method} made no codes for layer {missing[0]}", "It cannot serve as a base.")
        return unit.result

    def _base(self, method: str, options: Mapping[str, Any] | None) -> Any:
        """A method that makes codes for another."""
        if self._find_method is None:
            raise CoraqError(
                f"there is no method {method!r} to make codes with",
                "Give CalibrationTask a find_method (coraq.registry).",
            )
        key = f"{method} {sorted((options or {}).items())}"
        if key not in self._bases:
            self._bases[key] = self._find_method(method, dict(options or {}))
        return self._bases[key]

    def remember(self, key: str, compute: Callable[[], Any], valid: Callable[[Any], bool] | None = None) -> Any:
        """See `coraq.api.Task.remember`.

        Raises:
            CoraqError: layers have been committed, but what they were committed under is lost, or is none.
        """
        if key in self._memory:
            if valid is None or valid(self._memory[key]):
                return self._memory[key]
            raise CoraqError(f"the decision {key!r} of this run does not fit it", "Run it afresh with --force.")
        if self.committed or self._resumed:
            raise CoraqError(
                f"this run has finished layers but lost the decision {key!r} that they rest on",
                "Run it afresh with --force.",
            )
        self._memory[key] = compute()
        return self._memory[key]

    def _input_grid(self, name: str, layer: QuantizedLayer) -> ActivationGrid | None:
        """The grid of the layer's input: the method's own or the calibrated one."""
        if layer.input is None and self.grids.point_of(name) is not None and self.grids.grid_of(name) is None:
            self.stats(name)  # the engine calibrates it on the way
        return self.grids.commit(name, layer.input)

    def _measure(self, view: LayerView, layer: QuantizedLayer) -> Metrics:
        """Weight error, and relative error of some inputs and outputs against the float network."""
        weight = view.weight.double()
        signal = float((weight**2).sum())
        noise = float(((weight - layer.dequantize().double()) ** 2).sum())
        numbers: Metrics = {"bits": layer.weight.bits, "bytes": layer.size_bytes()}
        if layer.input is not None:
            numbers["act_bits"] = layer.input.bits
        if signal > 0 and noise > 0:
            numbers["weight_sqnr_db"] = 10 * math.log10(signal / noise)
        if view.name in self._blocks:
            numbers["gram_blocks"] = self._blocks[view.name]
        if layer.adapter is not None:
            numbers["rank"] = layer.adapter.rank
        if self.has_data:
            stats = self.stats(view.name)
            if self._layer_inputs is not None and len(self._layer_inputs.taken) < len(self._batches):
                numbers["images"] = self._layer_inputs.images
            numbers["input_error"] = stats.input_error
            outputs, self._outputs = self._outputs, None
            outputs = stats.outputs(layer.dequantize()) if outputs is None else outputs
            numbers["output_error"] = stats.output_error(outputs, layer.bias, view.bias)
        return numbers

    def log(self, metric: str, value: float, step: int) -> None:
        self._sink(Metric(metric, value, step))

    def stage(self, name: str, total: int = 0) -> events.stage:
        """See `coraq.api.Task.stage`."""
        return events.stage(self._sink, name, total)

    def note(self, message: str) -> None:
        self._sink(Note(message))

    def _module(self, name: str) -> nn.Module:
        return self.student.get_submodule(name)

    def _reseed(self) -> None:
        # a function of the seed and of what is committed, so that a resumed run draws what a straight run draws
        self.rng = torch.Generator().manual_seed(self._seed * 1_000_003 + len(self.committed))

    def _view(self, name: str) -> LayerView:
        try:
            return self._views[name]
        except (KeyError, TypeError):
            raise MethodError(f"{self.method}: there is no layer {name!r}") from None

    def finish(self, method: str) -> None:
        """End the pass. Raises CoraqError if the method forgot a layer."""
        missing = [name for name in self._views if name not in self.committed]
        if missing:
            raise MethodError(
                f"method {method} left {len(missing)} of {len(self._views)} layers unquantized, first {missing[0]}"
            )
        if self.grids.missing:  # outputs that no layer was asked for behind, or a run that was killed at its end
            if self._engine is None:
                self._start_pass()
            while self.grids.missing:
                self._step(self.grids.missing[0])
        self.close()

    def release(self) -> None:
        """Free the calibration images and the student; what was committed and measured stays."""
        self.close()
        self._batches.clear()
        self.student = nn.Module()
        self._bfloat16 = None

    def close(self) -> None:
        """Leave the running pass, if any."""
        if self._stats is not None:
            self._stats.current = False
        self._squares.clear()
        self._stats, self._at, self._layer_inputs = None, None, None
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _is_widths(kept: object, points: Sequence[QuantizationPoint]) -> bool:
    """Whether there are bits for each of these points."""
    return isinstance(kept, dict) and all(
        type(bits := kept.get(point.name)) is int and MIN_BITS <= bits <= MAX_BITS for point in points
    )

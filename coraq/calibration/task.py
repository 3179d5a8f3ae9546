"""The task that a method works on: one network under one scheme.

A thin front for its parts: the traversal (which layer, which images, which pass), the activation grids, and the log of
commits and decisions.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coraq import events
from coraq.activations.decisions import InputDecisions
from coraq.activations.grids import ActivationGrids
from coraq.activations.points import find_quantization_points
from coraq.activations.records import ActivationRecord
from coraq.calibration.block_data import BlockData, collect_block, cut_out, fisher
from coraq.calibration.block_pass import BlockPass
from coraq.calibration.commit_log import CommitLog, Metrics
from coraq.calibration.corrections import apply_corrections
from coraq.calibration.layer_pass import check_finite
from coraq.calibration.problems import LayerMethod, layer_problem, least_squares, need_images
from coraq.calibration.scopes import ScopedTask
from coraq.calibration.statistics import LayerStats
from coraq.calibration.traversal import PassSettings, Traversal
from coraq.config import Scheme
from coraq.core.layer_problem import Granularity, LayerProblem
from coraq.core.least_squares import LeastSquares
from coraq.core.tensors import ActivationGrid, Coding, QuantizedLayer, stored_bytes
from coraq.errors import CoraqError, MethodError
from coraq.events import QUANTIZE, LayerCommitted, Metric, Note, Sink, StageAdvanced, null_sink
from coraq.network.blocks import Block, ReconstructionUnit, partition
from coraq.network.fold import Trace
from coraq.network.layers import LayerView, as_matrices, groups_of, install, kernel_of, kind_of

TENSOR_HEADER_BYTES = 110  # that one more tensor takes in a file's header: name, type, shape, place


class CalibrationTask:
    """One network to quantize under one Scheme; implements `coraq.api.NetworkTask`.

    Args:
        teacher: the folded float network in eval mode.
        found: what tracing it showed (execution order, output positions).
        scheme: what every layer gets.
        batches: calibration micro-batches [n, channels, height, width] on the teacher's device; may be empty.
        seed: of `rng`.
        sink: takes the events.
        log: what earlier attempts have committed and decided, and where new commits are saved.
        settings: how calibration passes are made.
        find_method: makes a method from its name and options, for methods that use others.
        coding: how all codes are stored; None: as the method says.
    """

    def __init__(
        self,
        teacher: nn.Module,
        found: Trace,
        scheme: Scheme,
        batches: Sequence[Tensor],
        seed: int = 0,
        sink: Sink = null_sink,
        log: CommitLog | None = None,
        settings: PassSettings | None = None,
        find_method: Callable[[str, dict[str, Any]], Any] | None = None,
        coding: Coding | Literal["auto"] | None = None,
    ) -> None:
        self.scheme = scheme
        self.coding = coding
        self.budget_bytes: int | None = None  # see `coraq.api.NetworkTask.budget_bytes`
        self.teacher = teacher.requires_grad_(False)
        self.student = copy.deepcopy(self.teacher)
        self.clock: dict[str, float] = defaultdict(float)
        self.method = "the method"  # what errors call it
        self.commits = CommitLog() if log is None else log
        self._found, self._seed, self._sink = found, seed, sink
        self._find_method, self._bases = find_method, dict[str, Any]()
        self._views = _describe(self.teacher, found, scheme)
        self.grids = self._find_grids(batches)
        self.traversal = Traversal(
            self.teacher,
            self.student,
            self._views,
            batches,
            self.grids,
            self.commits,
            settings or PassSettings(),
            self.clock,
            self.note,
        )
        if found.computed:
            weights = (getattr(teacher.get_submodule(name), "weight", None) for name in found.computed)
            size = sum(w.numel() * w.element_size() for w in weights if isinstance(w, Tensor))
            self.note(
                f"{len(found.computed)} layers stay float ({size:,} bytes), because their weights are computed from "
                f"the images: {', '.join(found.computed[:5])}"
            )
        repeated = [n for n in self._views if found.flow is not None and len(found.flow.calls_of(n)) > 1]
        if repeated:
            self.note(
                f"{len(repeated)} layers run more than once: their weights are solved for the inputs of their first "
                f"call, their input grids for those of all calls: {', '.join(repeated[:5])}"
            )
        if found.structure.untied:
            self.note(
                f"layers that shared a weight with another are quantized and stored each for itself: "
                f"{', '.join(found.structure.untied[:5])}"
            )
        self._restore()
        self._reseed()

    def _find_grids(self, batches: Sequence[Tensor]) -> ActivationGrids:
        points, lost = find_quantization_points(self.teacher, self._found.order, self._found.flow, self.scheme)
        if lost:
            self.note(f"{len(lost)} tensors stay float where a grid was wanted, first {lost[0]}")
        decisions = InputDecisions(
            self.teacher, self._views, batches, self.scheme, self._seed, self.decide_once, self._report, self.note
        )
        start = time.perf_counter()
        points, columns = decisions.decide(points, self.scheme.mixes(self._found.order))
        if columns:
            self.clock["input scales and bits"] += time.perf_counter() - start
        grids = ActivationGrids(self.student, points, self.scheme, columns)
        for name, view in self._views.items():
            read = grids.point_of(name)
            act_bits = None if read is None else read.bits
            self._views[name] = replace(view, act_bits=act_bits, input_scales=columns.get(name))
        return grids

    def _restore(self) -> None:
        """Install what earlier attempts have committed, as far as it is of this network."""
        for name, (layer, metrics) in self.commits.done.items():
            view = self._views.get(name)
            if view is None or name in self.commits or layer.weight.codes.shape != view.weight.shape:
                self.note(
                    f"what was saved of layer {name!r} is not of this run: it and those after it are solved again"
                )
                break
            device = view.weight.device
            bias = None if layer.bias is None else layer.bias.to(device)
            install(self.student.get_submodule(name), layer.dequantize().to(device), bias)
            self.grids.restore(name, layer.input)
            self.commits.restore(name, layer, metrics)
            self._sink(LayerCommitted(name, len(self.commits), len(self._views), metrics, resumed=True))

    def scoped(self, method: Any) -> ScopedTask:
        """The task as a method of its scope sees it."""
        return ScopedTask(self, method.scope, method.name)

    # -- scope `layer`

    @property
    def layers(self) -> list[LayerView]:
        """See `coraq.api.LayerTask.layers`."""
        return [view for name, view in self._views.items() if name not in self.commits]

    @property
    def has_data(self) -> bool:
        return self.traversal.has_data

    def stats(self, name: str) -> LayerStats:
        """See `coraq.api.LayerTask.stats`.

        Raises:
            CoraqError: there are no calibration images, or no such layer.
        """
        return self.traversal.stats(self._view(name).name)

    def least_squares(self, name: str, correction: float = 0.5) -> LeastSquares:
        """See `coraq.api.LayerTask.least_squares`."""
        return least_squares(self.traversal, self.scheme, self._view(name).name, correction)

    def problem(self, name: str, correction: float = 0.5) -> LayerProblem:
        """See `coraq.api.LayerTask.problem`."""
        return layer_problem(self.traversal, self.scheme, self._view(name), correction)

    @torch.no_grad()
    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        """See `coraq.api.LayerTask.commit`.

        Raises:
            CoraqError: the layer does not exist, has been committed, or the codes do not fit it.
        """
        view = self._view(name)
        if name in self.commits:
            raise MethodError(f"{self.method}: layer {name} was committed twice")
        try:
            layer.check(view.shape)
        except (ValueError, TypeError, AttributeError) as error:  # what is no tensor has no shape
            raise MethodError(f"{self.method}: its result for layer {name} is invalid: {error}") from None
        given, asked = layer.weight.columns, view.input_scales
        if given is None and replace(view, bits=layer.weight.bits).has_columns(self.scheme):
            raise CoraqError(
                f"{self.method} does not support column scales",
                f"Omit --column-scale {self.scheme.weights.column_scale}, or use a method that supports them: comq.",
            )
        if given is not None and asked is not None and not torch.equal(given.cpu(), asked.cpu()):
            raise MethodError(f"{self.method}: the column scales of layer {name} are not those of its input")
        layer = replace(layer, input=self._input_grid(name, layer))
        layer, outputs = apply_corrections(self.traversal, self.scheme, view, layer)
        if self.coding is not None:
            layer = replace(layer, weight=layer.weight.coded(self.coding))
        numbers: Metrics = {**self._measure(view, layer, outputs), **layer.metrics, **metrics}
        errors = (numbers.get(key, 0.0) for key in ("input_error", "output_error"))
        check_finite(name, *(torch.tensor(error) for error in errors if isinstance(error, float)))
        self.commits.add(name, layer, numbers)
        self._reseed()
        self._sink(LayerCommitted(name, len(self.commits), len(self._views), numbers))

    def log(self, metric: str, value: float, step: int) -> None:
        self._sink(Metric(metric, value, step))

    def stage(self, name: str, total: int = 0) -> events.stage:
        """See `coraq.api.LayerTask.stage`."""
        return events.stage(self._sink, name, total)

    def note(self, message: str) -> None:
        self._sink(Note(message))

    def bytes_of(self, name: str, bits: int | None = None) -> int:
        """See `coraq.api.LayerTask.bytes_of`."""
        view = self._view(name)
        view = view if bits is None else replace(view, bits=bits)
        scales = view.shape[0] * view.shape[1] if self.scheme.weights.granularity == "channel" else 1
        codes = stored_bytes(view.shape, view.bits, scales, 0 if self.scheme.weights.symmetric else 1)
        return codes + (view.column_bytes + TENSOR_HEADER_BYTES if view.has_columns(self.scheme) else 0)

    # -- scope `block`

    def partition(self, unit: ReconstructionUnit = "block", override: str | None = None) -> list[Block]:
        """See `coraq.api.BlockTask.partition`."""
        left = []
        for block in partition(self.teacher, list(self._views), self._found.flow, unit, override):
            done = [name for name in block.layers if name in self.commits]
            if len(done) == len(block.layers):
                continue
            self._reopen(done)
            left.append(block)
        self.traversal.stop_at_blocks([block.module for block in left])
        return left

    @torch.no_grad()
    def _reopen(self, names: Sequence[str]) -> None:
        """Forget what was committed of a block whose other layers a kill has cut off: it is solved as a whole."""
        if not names:
            return
        self.commits.reopen(names)
        for name in names:
            view = self._view(name)
            install(self.student.get_submodule(name), view.weight, view.bias)
        self.grids.reopen(names)
        self._reseed()

    def block_io(self, block: Block) -> BlockData:
        """See `coraq.api.BlockTask.block_io`."""
        return collect_block(self.traversal, block, self.note)

    def fisher(self, block: Block) -> Tensor:
        """See `coraq.api.BlockTask.fisher`."""
        return fisher(self.traversal, block, self.rng)

    def quantize_block_with(
        self, data: BlockData, method: str, options: Mapping[str, Any] | None = None
    ) -> dict[str, QuantizedLayer]:
        """See `coraq.api.BlockTask.quantize_block_with`."""
        base = self._layer_method(method, options)
        views = {name: self._view(name) for name in data.block.layers}
        sizes = self.traversal.sizes
        batch = max(1, data.rows * max(sizes) // sum(sizes))
        settings = self.traversal.settings
        teacher = cut_out(self.teacher, data.block)
        block_pass = BlockPass(teacher, data, views, batch, settings, self.clock, self.note)
        result = {}
        try:
            for name, view in views.items():
                layer = _solve(base, layer_problem(block_pass, self.scheme, view, base.correction))
                result[name] = apply_corrections(block_pass, self.scheme, view, layer).layer
        finally:
            block_pass.close()
        return result

    # -- scope `network`

    def batches(self) -> Iterator[Tensor]:
        yield from self.traversal.batches

    def calibration_subset(self, count: int) -> AbstractContextManager[int]:
        """See `coraq.api.NetworkTask.calibration_subset`."""
        return self.traversal.subset(count)

    def preview(self, name: str, layer: QuantizedLayer) -> QuantizedLayer:
        """See `coraq.api.NetworkTask.preview`."""
        view = self._view(name)
        if name in self.commits:
            raise CoraqError(f"layer {name} is committed already", "Only layers of task.layers can be previewed.")
        return apply_corrections(self.traversal, self.scheme, view, layer).layer

    def quantize_with(
        self,
        name: str,
        method: str,
        options: Mapping[str, Any] | None = None,
        *,
        bits: int | None = None,
        granularity: Granularity | None = None,
        zero_point_fraction: int | None = None,
        subtract: Tensor | None = None,
    ) -> QuantizedLayer:
        """See `coraq.api.NetworkTask.quantize_with`."""
        base, view = self._layer_method(method, options), self._view(name)
        need_images(base, self.has_data)
        if bits is not None:
            view = replace(view, bits=bits)
        if zero_point_fraction is not None:
            view = replace(view, zero_point_fraction=zero_point_fraction)
        spec = view.grid_spec(self.scheme)
        spec = spec if granularity is None else replace(spec, granularity=granularity)
        return _solve(base, layer_problem(self.traversal, self.scheme, view, base.correction, spec, subtract))

    def delegate(
        self,
        method: str,
        options: Mapping[str, Any] | None = None,
        *,
        bits: Mapping[str, int],
        whole_zero_points: Sequence[str] = (),
    ) -> None:
        """See `coraq.api.NetworkTask.delegate`."""
        for name, own in bits.items():
            fraction = 0 if name in whole_zero_points else None
            self._views[name] = replace(self._view(name), bits=own, zero_point_fraction=fraction)
        base = self._base(method, options)
        base.quantize(self.scoped(base))

    def scope_of(self, method: str) -> str:
        """See `coraq.api.NetworkTask.scope_of`."""
        return str(self._base(method, None).scope)

    def committed_bytes(self) -> int:
        """See `coraq.api.NetworkTask.committed_bytes`."""
        return sum(layer.size_bytes() for layer, _ in self.committed.values())

    def decide_once(self, key: str, compute: Callable[[], Any], valid: Callable[[Any], bool] | None = None) -> Any:
        """See `coraq.api.NetworkTask.decide_once`."""
        return self.commits.decide_once(key, compute, valid)

    def _layer_method(self, method: str, options: Mapping[str, Any] | None) -> LayerMethod:
        """A method that rounds single layers for another."""
        base = self._base(method, options)
        if not hasattr(base, "quantize_layer"):
            raise CoraqError(
                f"method {method} cannot round single layers for another method: it has scope {base.scope!r}",
                "Take a base of scope 'layer', such as comq, gptq or rtn.",
            )
        found: LayerMethod = base
        return found

    def _base(self, method: str, options: Mapping[str, Any] | None) -> Any:
        """A method that works for another."""
        if self._find_method is None:
            raise CoraqError(
                f"there is no method {method!r} to make codes with",
                "Give CalibrationTask a find_method (coraq.registry).",
            )
        key = f"{method} {sorted((options or {}).items())}"
        if key not in self._bases:
            self._bases[key] = self._find_method(method, dict(options or {}))
        return self._bases[key]

    # -- for who runs the method

    @property
    def activations(self) -> dict[str, ActivationRecord]:
        """The calibrated activation grids, by point."""
        return self.grids.records

    @property
    def committed(self) -> dict[str, tuple[QuantizedLayer, Metrics]]:
        """The committed layers and what was measured of them, in the order of their commits."""
        return self.commits.committed

    @property
    def quantized(self) -> dict[str, QuantizedLayer]:
        """The committed layers in execution order."""
        return {name: self.committed[name][0] for name in self._views if name in self.committed}

    @property
    def all_layers(self) -> list[LayerView]:
        """All quantizable layers in execution order, committed or not."""
        return list(self._views.values())

    def finish(self, method: str) -> None:
        """End the pass. Raises CoraqError if the method forgot a layer."""
        missing = [name for name in self._views if name not in self.commits]
        if missing:
            raise MethodError(
                f"method {method} left {len(missing)} of {len(self._views)} layers unquantized, first {missing[0]}"
            )
        self.traversal.finish()

    def close(self) -> None:
        """Leave the running pass, if any."""
        self.traversal.close()

    def release(self) -> None:
        """Free the calibration images and the student; what was committed and measured stays."""
        self.traversal.release()
        self.student = nn.Module()

    def _input_grid(self, name: str, layer: QuantizedLayer) -> ActivationGrid | None:
        """The grid of the layer's input: the method's own or the calibrated one."""
        if layer.input is None and self.grids.point_of(name) is not None and self.grids.grid_of(name) is None:
            self.stats(name)  # the engine calibrates it on the way
        return self.grids.commit(name, layer.input)

    def _measure(self, view: LayerView, layer: QuantizedLayer, outputs: list[Tensor] | None) -> Metrics:
        """Weight error, and relative error of some inputs and outputs against the float network."""
        weight = view.weight.double()
        signal = float((weight**2).sum())
        noise = float(((weight - layer.dequantize().double()) ** 2).sum())
        numbers: Metrics = {"bits": layer.weight.bits, "bytes": layer.size_bytes()}
        if layer.input is not None:
            numbers["act_bits"] = layer.input.bits
        if signal > 0 and noise > 0:
            numbers["weight_sqnr_db"] = 10 * math.log10(signal / noise)
        if view.name in self.traversal.gram_blocks:
            numbers["gram_blocks"] = self.traversal.gram_blocks[view.name]
        if layer.adapter is not None:
            numbers["rank"] = layer.adapter.rank
        if self.has_data:
            stats = self.stats(view.name)
            waiting = self.traversal.layer_inputs
            if waiting is not None and len(waiting.taken) < len(self.traversal.batches):
                numbers["images"] = waiting.images
            numbers["input_error"] = stats.input_error
            outputs = stats.outputs(layer.dequantize()) if outputs is None else outputs
            numbers["output_error"] = stats.output_error(outputs, layer.bias, view.bias)
        return numbers

    def _report(self, doing: str) -> None:
        self._sink(StageAdvanced(QUANTIZE, 0, f"inputs: {doing}"))

    def _reseed(self) -> None:
        # a function of the seed and of what is committed, so that a resumed run draws what a straight run draws
        self.rng = torch.Generator().manual_seed(self._seed * 1_000_003 + len(self.commits))

    def _view(self, name: str) -> LayerView:
        try:
            return self._views[name]
        except (KeyError, TypeError):
            raise MethodError(f"{self.method}: there is no layer {name!r}") from None


def _describe(teacher: nn.Module, found: Trace, scheme: Scheme) -> dict[str, LayerView]:
    """All layers of the network in execution order, with what the scheme says of each."""
    own = scheme.resolve(found.order)
    views = {}
    for name in found.order:
        module: Any = teacher.get_submodule(name)
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


def _solve(method: LayerMethod, problem: LayerProblem) -> QuantizedLayer:
    """What a method makes of a layer, with the layer's column scales."""
    return problem.restore(method.quantize_layer(problem))

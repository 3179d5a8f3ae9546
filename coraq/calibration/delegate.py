"""One layer or one unit as a task of its own, so that a method can have codes made by any other method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coraq import events
from coraq.activations.fake_quant import fake_quant_of
from coraq.calibration.block_data import BlockData
from coraq.calibration.corrections import LayerSolver
from coraq.calibration.lockstep import LayerInputs, LockStep
from coraq.calibration.statistics import STUDENT, LayerStats, LeastSquares
from coraq.config import Scheme
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.network.layers import LayerView

if TYPE_CHECKING:
    from coraq.calibration.task import CalibrationTask


class Part:
    """What the tasks of a part have in common: what they hand on to the whole task, and what they keep from it."""

    _task: CalibrationTask

    @property
    def rng(self) -> torch.Generator:
        return self._task.rng

    def batches(self) -> Iterator[Tensor]:
        return self._task.batches()

    def partition(self, granularity: str = "block", override: str | None = None) -> Sequence[Any]:
        raise CoraqError(
            "a method that works on blocks cannot make codes for a part of a network",
            "Take a base method that works layer by layer, such as comq.",
        )

    def log(self, metric: str, value: float, step: int) -> None:
        pass  # it would be one curve for each part and round; the outer method reports its own

    def calibration_subset(self, count: int) -> AbstractContextManager[int]:
        return nullcontext(sum(map(len, self.batches())))  # the whole task's pass goes on

    def stage(self, name: str, total: int = 0) -> events.stage:
        return events.stage(events.null_sink, name, total)  # the outer method shows how far it is

    def note(self, message: str) -> None:
        self._task.note(message)

    def remember(self, key: str, compute: Any, valid: Any = None) -> Any:
        return compute()


class OneLayer(Part):
    """A `coraq.api.Task` that holds one layer, perhaps with a matrix taken off its weight; commits go to `result`.

    Args:
        task: the whole task.
        view: the layer as the other method is to see it.
        less: [groups, out, in], taken off every target.
        scheme: the other method's.
    """

    def __init__(self, task: CalibrationTask, view: LayerView, less: Tensor | None, scheme: Scheme) -> None:
        self._task, self._less = task, less
        if less is not None:
            view = replace(view, weight=view.weight - less)
        self.layers: Sequence[LayerView] = [view]
        self.scheme = scheme
        self.result: QuantizedLayer | None = None

    @property
    def teacher(self) -> nn.Module:
        return self._task.teacher

    @property
    def student(self) -> nn.Module:
        return self._task.student

    @property
    def has_data(self) -> bool:
        return self._task.has_data

    def stats(self, name: str) -> LayerStats:
        return self._task.stats(name)

    def least_squares(self, name: str, correction: float = 0.5) -> LeastSquares:
        squares = self._task.least_squares(name, correction)
        return squares if self._less is None else replace(squares, weight=squares.weight - self._less)

    def commit(self, name: str, layer: QuantizedLayer, **metrics: Any) -> None:
        self.result = layer


class OneUnit(Part, LayerSolver):
    """A `coraq.api.Task` that holds one unit's layers, each read behind the unit's own earlier ones as quantized.

    The unit's copy is the network being quantized: what is committed goes into it, with gain and bias as the scheme
    says, and into `result`. Layers must be committed in order, as the pass goes through the unit once.

    Args:
        task: the whole task.
        teacher: a copy of the float unit, without hooks.
        data: of the unit.
        views: its layers.
        batch: rows in a micro-batch.
    """

    def __init__(
        self, task: CalibrationTask, teacher: nn.Module, data: BlockData, views: dict[str, LayerView], batch: int
    ) -> None:
        super().__init__(task.scheme, views, task.clock, task.rows_per_input)
        self._task, self._data = task, data
        self.layers: Sequence[LayerView] = list(views.values())
        self.teacher, self.student = teacher, data.module
        self.result: dict[str, QuantizedLayer] = {}
        pairs = list(zip(data.teacher_input.split(batch), data.student_input.split(batch), strict=True))
        self._names = {data.block.inner(name): name for name in views}
        streams = [teacher, data.module]
        # what the unit's data holds is held once more by the passes that wait in front of the unit
        memory = None if task.memory_bytes is None else max(0, task.memory_bytes - 2 * data.held_bytes)
        self._engine = LockStep(streams, pairs, list(self._names), memory, task.folder)
        self._layer_inputs: LayerInputs | None = None
        self._stats: LayerStats | None = None

    @property
    def has_data(self) -> bool:
        return True

    def stats(self, name: str) -> LayerStats:
        """Advance to a layer, over those that are not asked for."""
        while self._layer_inputs is None or self._names[self._layer_inputs.name] != name:
            self._squares.clear()
            layer_inputs = self._engine.advance()
            if layer_inputs is None:
                raise CoraqError(
                    f"the unit {self._data.block.module} has no layer {name}, or it has been passed",
                    "A base method must take the layers in the order of task.layers.",
                )
            grid = fake_quant_of(self._data.layer(self._names[layer_inputs.name])).input
            if grid is not None:
                layer_inputs.transforms[STUDENT] = grid  # what the layer will really see
            if self._stats is not None:
                self._stats.current = False
            self._layer_inputs, self._stats = layer_inputs, self._stats_at(layer_inputs, self._names[layer_inputs.name])
        assert self._stats is not None
        return self._stats

    def commit(self, name: str, layer: QuantizedLayer, **metrics: Any) -> None:
        with torch.no_grad():
            self.result[name] = self.apply_corrections(self._views[name], layer)

    def _module(self, name: str) -> nn.Module:
        return self._data.layer(name)

    def close(self) -> None:
        """Leave the pass, and what was sampled of the last layer."""
        if self._stats is not None:
            self._stats.current = False
        # statistics refer back to their task: a circle, which would hold samples of every unit until it is collected
        self._stats, self._layer_inputs, self._outputs = None, None, None
        self._squares.clear()
        self._engine.close()

"""One layer as a task of its own, so that a method can have codes made by any other method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coraq.config import Scheme
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.model.layers import LayerView

if TYPE_CHECKING:
    from coraq.model.calibration import CalibrationTask, LayerStats, LeastSquares


class OneLayer:
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
    def rng(self) -> torch.Generator:
        return self._task.rng

    @property
    def has_data(self) -> bool:
        return self._task.has_data

    def stats(self, name: str) -> LayerStats:
        return self._task.stats(name)

    def least_squares(self, name: str, correction: float = 0.5) -> LeastSquares:
        squares = self._task.least_squares(name, correction)
        return squares if self._less is None else replace(squares, weight=squares.weight - self._less)

    def batches(self) -> Iterator[Tensor]:
        return self._task.batches()

    def partition(self, granularity: str = "block", override: str | None = None) -> Sequence[Any]:
        raise CoraqError(
            "a method that works on blocks cannot make codes for a single layer",
            "Take a base method that works layer by layer, such as comq.",
        )

    def commit(self, name: str, layer: QuantizedLayer, **metrics: Any) -> None:
        self.result = layer

    def log(self, metric: str, value: float, step: int) -> None:
        pass  # it would be one curve for each layer and round; the outer method reports its own

    def note(self, message: str) -> None:
        self._task.note(message)

    def remember(self, key: str, compute: Any, valid: Any = None) -> Any:
        return compute()

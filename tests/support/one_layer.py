"""The part of a task that methods of scope `layer` use, for one layer with ReLU-like correlated inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coraq.api import LayerProblem, LayerView, LeastSquares, QuantizedLayer
from coraq.config import Scheme

SHAPES = {"conv": (1, 16, 72), "depthwise": (24, 1, 9), "grouped": (4, 6, 27), "linear": (1, 10, 33)}


class OneLayerTask:
    """A task that holds one layer whose problem is known."""

    def __init__(self, squares: LeastSquares, scheme: Scheme, taps: int = 1) -> None:
        self.squares, self.scheme = squares, scheme
        self.layers = [LayerView("layer", squares.weight, None, scheme.weights.bits, None, "conv", (1, taps), 0)]
        self.has_data = True
        self.posed: list[float] = []  # with which correction the problem was posed, each time
        self.committed: dict[str, tuple[QuantizedLayer, dict[str, Any]]] = {}

    @classmethod
    def random(cls, shape: tuple[int, int, int], bits: int = 3, seed: int = 0, **scheme: Any) -> OneLayerTask:
        groups, out, inputs = shape
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(shape, generator=generator) * (0.2 + torch.rand(groups, out, 1, generator=generator))
        mix = torch.randn(groups, inputs, inputs, generator=generator).double() / inputs**0.5
        x = (torch.randn(groups, 400, inputs, generator=generator).double() @ mix).relu()
        x -= x.mean(1, keepdim=True)
        return cls(LeastSquares(weight, x.mT @ x / 400), Scheme.of(bits=bits, **scheme))

    def problem(self, name: str, correction: float = 0.5) -> LayerProblem:
        def pose() -> LeastSquares:
            self.posed.append(correction)
            return self.squares

        (view,) = self.layers
        spec, columns = view.grid_spec(self.scheme), view.columns(self.scheme)
        return LayerProblem.of(name, view.weight, spec, columns, pose if self.has_data else None)

    def commit(self, name: str, layer: QuantizedLayer, **metrics: Any) -> None:
        assert name not in self.committed
        layer.check(self.layers[0].shape)
        self.committed[name] = layer, {**layer.metrics, **metrics}

    @property
    def layer(self) -> QuantizedLayer:
        return self.committed["layer"][0]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.committed["layer"][1]

    def error(self, quantized: Tensor | None = None) -> float:
        """The output error of a weight, by default the committed one, relative to the output's energy."""
        weight = self.layer.dequantize() if quantized is None else quantized
        return float(self.squares.error(weight).sum()) / self.squares.energy()


def run(method: type, task: OneLayerTask, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """The quantized weight and the metrics."""
    method(method.Config(**options)).quantize(task)
    return task.layer.dequantize(), task.metrics

"""The variables of one block: codes, biases and activation steps, as they act in the block's copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coraq.activations.fake_quant import set_fake_quant
from coraq.activations.points import QuantizationPoint
from coraq.calibration.block_data import BlockData
from coraq.core.grid import Grid
from coraq.core.soft_rounding import LearnedGrid, SoftRounding
from coraq.core.tensors import ActivationGrid
from coraq.network.layers import LayerView


@dataclass
class LayerState:
    """One layer's variables."""

    view: LayerView
    rounding: SoftRounding
    base: Tensor  # codes
    bias: Tensor
    start_bias: Tensor
    shape: torch.Size

    def at(self, grid: Grid, codes: Tensor, bias: Tensor, trust: float) -> LayerState:
        """The same layer with another start."""
        rounding = SoftRounding(self.view.weight, grid, codes, trust)
        learned = bias.clone().requires_grad_(self.bias.requires_grad)
        return LayerState(self.view, rounding, codes, learned, bias, self.shape)


@dataclass
class BlockState:
    """What a block's copy is made of, and how well its output is preserved.

    Attributes:
        data: the block, its inputs and the wanted outputs.
        judged_from: the first of the rows that errors are measured on; rows before it are learned on.
        batch: rows that go through together.
        layers: the layers' variables, by name.
        steps: activation steps that are being learned, by point.
        final: codes and bias of each layer, of the best result so far.
        grids: activation grids of the best result so far, by point.
    """

    data: BlockData
    judged_from: int
    batch: int
    layers: dict[str, LayerState] = field(default_factory=dict)
    steps: dict[str, LearnedGrid] = field(default_factory=dict)
    final: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)

    @torch.no_grad()
    def error(self) -> float:
        """Squared error of the copy's output as it is, over the energy of the wanted output about its mean.

        On the rows that nothing is learned on, if there are any.
        """
        data, error, energy, total, count = self.data, 0.0, 0.0, 0.0, 0
        for start in range(self.judged_from, data.rows, self.batch):
            part = slice(start, start + self.batch)
            wanted = data.teacher_output[part]
            error += float((data.module(data.student_input[part].clone()) - wanted).square().sum(dtype=torch.float64))
            energy += float(wanted.square().sum(dtype=torch.float64))
            total += float(wanted.sum(dtype=torch.float64))
            count += wanted.numel()
        return error / max(energy - total**2 / count, 1e-30)

    def keep_start(self) -> None:
        """The start is the result."""
        self.final = {name: (layer.base, layer.start_bias) for name, layer in self.layers.items()}
        self.grids = {point.name: self.data.grids[point.name] for point in self.data.points}

    def install(self, final: Mapping[str, tuple[Tensor, Tensor]], grids: Mapping[str, ActivationGrid]) -> None:
        """Codes, biases and activation grids into the copy."""
        for name, (codes, bias) in final.items():
            self.put(name, codes, bias)
        self.set_grids(grids)

    @torch.no_grad()
    def put(self, name: str, codes: Tensor, bias: Tensor) -> None:
        """Codes and bias of one layer into the copy."""
        layer, module = self.layers[name], self.data.layer(name)
        module.weight.copy_(layer.rounding.grid.values(codes).reshape(layer.shape))
        module.bias.copy_(bias)

    def set_grids(self, grids: Mapping[str, ActivationGrid | LearnedGrid]) -> None:
        for point in self.data.points:
            self.set_grid(point, grids[point.name])

    def set_grid(self, point: QuantizationPoint, grid: ActivationGrid | LearnedGrid) -> None:
        for reader in self.data.readers(point):
            set_fake_quant(reader, "input", grid)

    def use_learned_grids(self) -> None:
        """The copy's activation steps are the ones being learned."""
        self.set_grids(self.steps)

    def soft_parameters(self) -> dict[str, Tensor]:
        """Parameters of the copy as they are being learned, by the names that the copy knows them by."""
        return self._parameters({name: (x.rounding.weight(), x.bias) for name, x in self.layers.items()})

    def hard_parameters(self) -> dict[str, Tensor]:
        """Parameters of the copy on the codes of the result, by the names that the copy knows them by."""
        grids = {name: layer.rounding.grid for name, layer in self.layers.items()}
        return self._parameters({name: (grids[name].values(codes), bias) for name, (codes, bias) in self.final.items()})

    def _parameters(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        parameters = {}
        for name, (weight, bias) in found.items():
            inner = self.data.block.inner(name)
            path = inner + "." if inner else ""
            parameters[path + "weight"] = weight.reshape(self.layers[name].shape)
            parameters[path + "bias"] = bias
        return parameters

    @property
    def views(self) -> Sequence[LayerView]:
        return [layer.view for layer in self.layers.values()]

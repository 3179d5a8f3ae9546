"""Reconstruction of one block: codes, scales, biases and activation steps of least error of the block's output.

A block starts from the codes that a method of scope `layer` gives its layers one after another; sweeps on a
second-order model of the block's error (`coraq.core.quadratic_model`) take them further; roundings may then be learned
(`coraq.calibration.block_learning`). Images that nothing is fitted to judge every step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coraq.calibration.block_data import BlockData
from coraq.calibration.block_learning import RoundingLearner
from coraq.calibration.block_options import BlockSolverConfig
from coraq.calibration.block_state import BlockState, LayerState
from coraq.core.columns import divided
from coraq.core.grid import Grid
from coraq.core.quadratic_model import QuadraticModel
from coraq.core.soft_rounding import LearnedGrid, SoftRounding
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.network.layers import LayerView

NORM = 2.4  # of the nearest start's range search, as published (BRECQ)
FINE = 8  # bits at which a nearest code is as good as any
STEP_FACTORS = (0.7, 0.85, 1.15, 1.3)  # that an activation step is tried at
DAMPINGS = (1.0, 2.0, 4.0)  # that a Newton step is tried with
MOST_INPUTS = 8192  # of a layer that descent works on: its Gram must fit


class BlockSolver:
    """One block's problem.

    Args:
        config: the options.
        task: a `coraq.api.BlockTask`.
        data: the block, from `task.block_io`.
        views: its layers in execution order.
    """

    def __init__(self, config: BlockSolverConfig, task: Any, data: BlockData, views: list[LayerView]) -> None:
        self.config, self.task, self.data, self.views = config, task, data, views
        learned_on = min(data.rows, max(1, round(data.rows * (1 - config.holdout))))
        self.state = BlockState(data, learned_on if learned_on < data.rows else 0, config.batch)
        self.learner = RoundingLearner(config, self.state, learned_on, task.rng)

    def solve(self) -> tuple[dict[str, QuantizedLayer], dict[str, float]]:
        """The block's layers, and how well its output is preserved: errors relative to the output's energy."""
        config, state = self.config, self.state
        self._aim()
        self.start()
        before = state.error()
        if not config.eight_bit_blocks and not state.steps and all(view.bits >= FINE for view in self.views):
            return self._result(), {"block_error": before, "block_start_error": before, "iterations": 0, "moves": 0}
        rounding, steps = config.learn == "all", config.learn != "none"
        fisher = self.task.fisher(self.data.block) if steps and config.loss == "fisher" else None
        moves, error = self._descend(before)
        state.keep_start()
        taken = 0
        if rounding:
            taken, error = self.learner.learn(fisher, error, weights=True, steps=config.joint)
        if state.steps and steps and not (rounding and config.joint):
            more, error = self.learner.learn(fisher, error, weights=False, steps=True)
            taken += more
        metrics = {"block_error": error, "block_start_error": before, "iterations": taken, "moves": moves}
        return self._result(), metrics

    @torch.no_grad()
    def _aim(self) -> None:
        """The wanted outputs, as far from what the float unit makes of the student's input as `correction` says."""
        data, share = self.data, self.config.correction
        if share == 1:
            return
        teacher = self.task.teacher.get_submodule(data.block.module)
        for start in range(0, data.rows, self.config.batch):
            part = slice(start, start + self.config.batch)
            own = teacher.forward(data.student_input[part].clone())
            data.teacher_output[part].mul_(share).add_(own, alpha=1 - share)

    def start(self) -> None:
        """Base codes, biases and grids into the copy; the variables that are learned start there."""
        config, data = self.config, self.data
        base = self._nearest() if config.initial_codes == "nearest" else self._from_method()
        for view in self.views:
            grid, codes, bias = base[view.name]
            learned = self.task.scheme.corrections.bias != "off" and config.bias_lr > 0
            self.state.layers[view.name] = LayerState(
                view,
                SoftRounding(view.weight, grid, codes, config.trust),
                codes,
                bias.clone().requires_grad_(learned),
                bias,
                data.layer(view.name).weight.shape,
            )
            data.layer(view.name).bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
        self.state.keep_start()
        self.state.install(self.state.final, self.state.grids)
        for point in data.points:
            self.state.steps[point.name] = LearnedGrid(data.grids[point.name], config.drop, self.task.rng)

    def _descend(self, error: float) -> tuple[int, float]:
        """Codes, scales and biases by Newton steps on one layer after another; they become the start.

        Returns the number of steps taken, and the error that is reached.

        Each is tried at several dampings, and stays if it lowers the error on the images that judge.
        """
        config, data, taken = self.config, self.data, 0
        centred = self.task.scheme.corrections.bias != "off"
        for number in range(config.rounds):
            moves, error = self._search_steps(error)
            taken += moves
            for name, layer in self.state.layers.items():
                if layer.base.shape[2] > MOST_INPUTS:
                    if not number:
                        self.task.note(f"layer {name} has {layer.base.shape[2]:,} inputs: its codes stay the start's")
                    continue
                model = QuadraticModel.of(
                    data.expand(name, config.batch, self.learner.learned_on, self.task.rng), centred
                )
                best = None
                for damping in DAMPINGS:
                    grid, codes, shift = model.solve(layer.rounding.grid, layer.base, damping)
                    tried = layer.at(grid, codes, layer.start_bias + shift.reshape(-1).float(), config.trust)
                    self.state.layers[name] = tried
                    self.state.put(name, codes, tried.start_bias)
                    found = self.state.error()
                    if found < error:
                        best, error = tried, found
                taken += best is not None
                self.state.layers[name] = layer if best is None else best
                self.state.put(name, self.state.layers[name].base, self.state.layers[name].start_bias)
        return taken, error

    def _search_steps(self, error: float) -> tuple[int, float]:
        """Activation steps, one after another, by trial on the images that judge: one number needs no gradient.

        Returns the number of steps changed, and the error that is reached.
        """
        data, changed = self.data, 0
        for point in data.points:
            best = None
            for factor in STEP_FACTORS:
                tried = data.grids[point.name].scaled(factor)
                self.state.set_grid(point, tried)
                found = self.state.error()
                if found < error:
                    best, error = tried, found
            changed += best is not None
            data.grids[point.name] = best or data.grids[point.name]
            self.state.set_grid(point, data.grids[point.name])
            self.state.steps[point.name] = LearnedGrid(data.grids[point.name], self.config.drop, self.task.rng)
        return changed, error

    def _nearest(self) -> dict[str, tuple[Grid, Tensor, Tensor]]:
        """Grid, nearest codes and bias of each layer; the bias absorbs the mean of the rounding errors."""
        scheme, found = self.task.scheme, {}
        moments = self.data.moments(self.config.batch)
        for view in self.views:
            columns = view.columns(scheme)
            grid = view.grid_spec(scheme).mse(divided(view.weight, columns), NORM)
            grid = replace(grid, columns=columns)
            codes, bias = grid.codes(view.weight), _bias_of(view)
            if scheme.corrections.bias != "off":
                rest = (view.weight - grid.values(codes)).double()
                bias += torch.einsum("goi,gi->go", rest, moments[view.name].mean).reshape(-1).float()
            found[view.name] = grid, codes, bias
        return found

    def _from_method(self) -> dict[str, tuple[Grid, Tensor, Tensor]]:
        """The same as another method gives it, with gain and bias as the scheme says."""
        found = {}
        for name, layer in self.task.quantize_block_with(self.data, self.config.initial_codes).items():
            weight, view = layer.weight, next(view for view in self.views if view.name == name)
            if layer.adapter is not None or weight.codebook is not None:
                raise CoraqError(
                    f"{self.config.initial_codes} gives layer {name} no codes on a uniform grid",
                    "Give -o initial_codes= a method that does, such as comq, gptq or rtn.",
                )
            bias = _bias_of(view) if layer.bias is None else layer.bias.clone()
            found[name] = Grid.of(weight), weight.codes.float(), bias.to(view.weight.device)
        return found

    def _result(self) -> dict[str, QuantizedLayer]:
        # biases that were not learned are set as the scheme says, and the scales with them, behind the layers before
        given = self.task.scheme.corrections.bias != "off" and self.config.bias_lr > 0
        inputs = {reader: self.state.grids[point.name] for point in self.data.points for reader in point.readers}
        layers = {}
        for name, (codes, bias) in self.state.final.items():
            weight = self.state.layers[name].rounding.grid.pack(codes)
            layers[name] = QuantizedLayer(weight, bias=bias.contiguous() if given else None, input=inputs.get(name))
        return layers


def _bias_of(view: LayerView) -> Tensor:
    """A layer's float bias [groups · out], zeros if it has none; the caller's own."""
    out = view.shape[0] * view.shape[1]
    return torch.zeros(out, device=view.weight.device) if view.bias is None else view.bias.clone()

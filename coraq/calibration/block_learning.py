"""Learned rounding of a block: gradient descent on soft roundings, biases and activation steps.

AdaRound's rectified sigmoid over a block's output error (BRECQ, arXiv 2102.05426), with QDrop's activations that stay
float at random (arXiv 2203.05740). Images that nothing is learned on judge what is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from coraq.calibration.block_options import BlockSolverConfig, Precision
from coraq.calibration.block_state import BlockState
from coraq.core.bfloat16 import multiplies_bfloat16
from coraq.core.draws import uniform_like
from coraq.core.soft_rounding import beta_at, squared_error

TRAVEL = 20.0  # learning rate times steps, as published
MOST_LR = 0.1
FEWEST = 4  # images in a step, however large their maps
LOOKS = 2  # in a row that show no gain, and learning ends


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether products are in bfloat16 while learning."""
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))


@dataclass
class RoundingLearner:
    """Gradient descent on a block's variables.

    Attributes:
        config: the options of learned rounding.
        state: the block's variables; the best that a look shows becomes its result.
        learned_on: rows that are learned on, the first so many.
        rng: draws batches and what stays float.
    """

    config: BlockSolverConfig
    state: BlockState
    learned_on: int
    rng: torch.Generator

    @property
    def lr(self) -> float:
        return self.config.lr or min(MOST_LR, TRAVEL / self.config.iterations)

    @property
    def batch(self) -> int:
        """Rows in a step."""
        config, most = self.config, min(self.config.batch, self.learned_on)
        if not config.positions:
            return most
        fit = math.ceil(config.positions / math.prod(self.state.data.teacher_output.shape[2:]))
        return min(most, max(FEWEST, fit))

    def learn(self, fisher: Tensor | None, error: float, weights: bool, steps: bool) -> tuple[int, float]:
        """Gradient descent, from a result of this error; the best that a look shows becomes the result.

        Returns the steps taken, and the error that is reached. Without `guard` the result so far does not compete.
        """
        config = self.config
        groups: list[dict[str, Any]] = []
        if weights:
            groups.append({"params": [layer.rounding.alpha for layer in self.state.layers.values()], "lr": self.lr})
            for layer in self.state.layers.values():
                if layer.bias.requires_grad:
                    spread = float(layer.start_bias.std(unbiased=False)) + 1e-3
                    groups.append({"params": [layer.bias], "lr": config.bias_lr * spread})
        steps = steps and bool(self.state.steps) and config.act_lr > 0
        if steps:
            groups.append({"params": [step.log_factor for step in self.state.steps.values()], "lr": config.act_lr})
            self.state.use_learned_grids()
        if not groups:
            return 0, error
        adam = torch.optim.Adam(groups)
        total = config.iterations
        warm = int(config.warmup * total)
        weigh = None if fisher is None else fisher / fisher.mean().clamp(min=1e-30)
        best, idle, taken = error if config.guard else math.inf, 0, 0
        while taken < total and idle < LOOKS:
            beta = beta_at((taken - warm) / max(1, total - warm)) if weights and taken >= warm else None
            self.step(adam, weights, beta, weigh)
            taken += 1
            if taken == total or (config.patience and taken % config.patience == 0):
                found = self.look(weights, best)
                if found < best:  # NaN is no gain
                    best, idle = found, 0
                else:
                    idle += 1
                if steps:
                    self.state.use_learned_grids()
        return taken, best if best < math.inf else error

    def look(self, weights: bool, best: float) -> float:
        """The error of what has been learned, roundings made hard; it becomes the result if it is below `best`."""
        final = self.state.final
        if weights:
            final = {name: (x.rounding.codes(), x.bias.detach().clone()) for name, x in self.state.layers.items()}
        grids = {name: step.result() for name, step in self.state.steps.items()}
        self.state.install(final, grids)
        error = self.state.error()
        if error < best:
            self.state.final, self.state.grids = final, grids
        return error

    def step(self, adam: torch.optim.Optimizer, weights: bool, beta: float | None, weigh: Tensor | None) -> float:
        """One step on a fresh batch, with the regulariser if `beta` is given; returns the loss without it."""
        config, data = self.config, self.state.data
        rows = torch.randperm(self.learned_on, generator=self.rng)[: self.batch].to(data.student_input.device)
        x, wanted = data.student_input[rows], data.teacher_output[rows]
        if config.drop:
            keep = uniform_like(x, self.rng) < config.drop
            x = torch.where(keep, data.teacher_input[rows], x)
        half = uses_bfloat16(config.precision, x.device)
        x = x.to(torch.bfloat16) if half else x  # or what is added to it would be made float32 again
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            got = functional_call(
                data.module, self.state.soft_parameters() if weights else self.state.hard_parameters(), (x,)
            )
        if weigh is None:
            loss = squared_error(got, wanted)
        else:
            loss = (mse_loss(got.float(), wanted, reduction="none") * weigh[rows]).sum()
        loss = loss / (wanted.numel() / wanted.shape[1])  # a sum over channels, as published
        found = float(loss.detach())
        if beta is not None:
            loss = loss + config.rounding_penalty * sum(
                layer.rounding.undecided(beta) for layer in self.state.layers.values()
            )
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return found

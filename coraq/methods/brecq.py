"""BRECQ (arXiv 2102.05426) and QDrop (arXiv 2203.05740): least error of a block's output over its weights' codes.

Minimises `Σ (block(x̂) − y)²` over the codes and scales of a block's weights and its activation steps; x̂ comes from
the quantized prefix, y from the float network. The paper learns up or down for every weight by gradient descent
(AdaRound's rectified sigmoid): `-o preset=paper`, in hours. The default differs where measurement says so: a unit
starts from the codes and scales that COMQ gives its layers one after another, COMQ's sweeps on a second-order
model of the whole unit's error take them further (`coraq.core.quadratic_model`), activation steps are searched, and
images that nothing was learned on judge every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import mse_loss

from coraq.activations.points import QuantizationPoint
from coraq.api import (
    ActivationGrid,
    BlockData,
    CoraqError,
    Field,
    Granularity,
    Grid,
    LayerView,
    MethodConfig,
    QuantizedLayer,
    Task,
    divided,
    mse_grid,
    set_fake_quant,
)
from coraq.core.bfloat16 import multiplies_bfloat16
from coraq.core.quadratic_model import Model
from coraq.core.soft_rounding import LearnedGrid, SoftRounding, beta_at, squared_error

PAPER = {
    "start": "nearest",
    "rounds": 0,
    "learn": "all",
    "trust": 0.0,
    "weight": 0.01,
    "iterations": 20000,
    "lr": 1e-3,
    "act_lr": 4e-5,
    "patience": 0,
    "joint": False,
    "precision": "float32",
    "guard": False,
    "holdout": 0.0,
    "correction": 1.0,
    "positions": 0,
    "edges": True,
}
TRAVEL = 20.0  # learning rate times steps, as published
MOST_LR = 0.1
NORM = 2.4  # of the nearest start's range search, as published
FEWEST = 4  # images in a step, however large their maps
FINE = 8  # bits at which a nearest code is as good as any
STEP_FACTORS = (0.7, 0.85, 1.15, 1.3)  # that an activation step is tried at
LOOKS = 2  # in a row that show no gain, and learning ends
DAMPINGS = (1.0, 2.0, 4.0)  # that a Newton step is tried with
MOST_INPUTS = 8192  # of a layer that descent works on: its Gram must fit


class BRECQ:
    """Minimises each block's output error over codes, scales and activation steps."""

    name: ClassVar[str] = "brecq"
    summary: ClassVar[str] = "codes that preserve each block's output, by descent or learned; activation steps learned"
    version: ClassVar[str] = "6"
    needs_data: ClassVar[bool] = True

    class Config(MethodConfig):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}

        preset: Literal["default", "paper"] = Field(
            default="default", description="what the other options default to: coraq's choice, or the paper's"
        )
        granularity: Granularity = Field(default="block", description="unit whose output is preserved")
        blocks: str | None = Field(
            default=None, description="regular expression over module paths: those that match are units (see --dry-run)"
        )
        start: str = Field(
            default="comq",
            description="base codes and scales: those of a method that works layer by layer, or the nearest",
        )
        rounds: int = Field(
            default=1,
            ge=0,
            description="visits to every layer of a unit by coordinate descent on a second-order model of its error",
        )
        learn: Literal["none", "steps", "all"] = Field(
            default="none",
            description="what gradient descent then learns: nothing, activation steps, or roundings, too (the paper)",
        )
        trust: float = Field(
            default=0.75,
            ge=0,
            le=1,
            description="where a rounding starts, from the float weight (0, the paper) to its base code (1)",
        )
        iterations: int = Field(default=400, ge=1, description="at most so many steps for a unit")
        batch: int = Field(default=32, ge=1, description="images in a step")
        positions: int = Field(
            default=32 * 28 * 28,
            ge=0,
            description="output positions in a step, at most: of large maps fewer images, down to 4; 0: no bound",
        )
        lr: float | None = Field(
            default=None,
            gt=0,
            description="learning rate of the rounding variables (Adam); default: 20 over the number of steps, as in "
            "the paper, and at most 0.1: a variable needs the way to be decided, however few the steps",
        )
        bias_lr: float = Field(
            default=0.0,
            ge=0,
            description="learning rate of biases, as a share of their spread; 0: biases and gains are what "
            "the scheme says, as for every method",
        )
        act_lr: float = Field(default=2e-3, ge=0, description="learning rate of the logarithms of activation steps")
        loss: Literal["mse", "fisher"] = Field(
            default="mse", description="plain squared error, or weighted by the Fisher information at the output"
        )
        weight: float = Field(
            default=0.1, ge=0, description="weight of the regulariser (paper: 0.01, 0.1 on MobileNetV2)"
        )
        warmup: float = Field(default=0.2, ge=0, lt=1, description="share of the steps before the regulariser acts")
        patience: int = Field(
            default=40,
            ge=0,
            description="every so many steps the roundings are made hard and judged; the best stay, and learning ends "
            "at the second look in a row that gains nothing; 0: judged in the end alone",
        )
        joint: bool = Field(
            default=True, description="learn roundings and activation steps together, or the steps afterwards"
        )
        drop: float = Field(
            default=0.0,
            ge=0,
            lt=1,
            description="share of activation elements and of block inputs that stay float in a step (QDrop: 0.5)",
        )
        precision: Literal["auto", "float32", "bfloat16"] = Field(
            default="auto",
            description="of the products while learning (what is learned stays float32); auto: bfloat16 where the "
            "device multiplies it itself (AVX-512 BF16, CUDA from 8.0)",
        )
        correction: float = Field(
            default=0.5,
            ge=0,
            le=1,
            description="share of the earlier units' errors that a unit's target undoes: 1 is the float network's "
            "output (the paper), 0 what the float unit makes of the quantized network's input",
        )
        guard: bool = Field(default=True, description="keep the base codes of a unit where they are better")
        holdout: float = Field(
            default=0.125,
            ge=0,
            le=0.5,
            description="share of the images that nothing is learned on and `guard` judges by; 0: it judges by all",
        )
        edges: bool = Field(default=False, description="learn units whose layers all have 8 bits, too")

        def column_scales(self) -> bool:
            return self.preset == "default"

        def bases(self) -> Sequence[str]:
            return () if self.start == "nearest" else (self.start,)

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: Task) -> None:
        views = {view.name: view for view in task.layers}
        if self.config.precision == "auto" and self.config.learn == "all" and views:
            half = uses_bfloat16(self.config, next(iter(views.values())).weight.device)
            task.note(f"roundings are learned in {'bfloat16' if half else 'float32'} here (-o precision=auto)")
        for unit in task.partition(self.config.granularity, self.config.blocks):
            views |= {view.name: view for view in task.layers}  # a unit cut off by a kill comes back whole
            data = task.block_io(unit)
            try:
                layers, metrics = Unit(self.config, task, data, [views[name] for name in unit.layers]).solve()
            finally:
                data.close()
            for name, layer in layers.items():
                task.commit(name, layer, **metrics)


class QDrop(BRECQ):
    """BRECQ with roundings and activation steps learned together while half of the activations stay float."""

    name: ClassVar[str] = "qdrop"
    summary: ClassVar[str] = "learned rounding as brecq, half of the activations dropped to float while learning"
    version: ClassVar[str] = "6"

    class Config(BRECQ.Config):
        # QDrop's own paper learns roundings and steps together
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {**PAPER, "joint": True}}

        learn: Literal["none", "steps", "all"] = Field(
            default="all", description="what gradient descent learns: nothing, activation steps, or roundings, too"
        )
        drop: float = Field(
            default=0.5,
            ge=0,
            lt=1,
            description="share of activation elements and of block inputs that stay float in a step",
        )


def uses_bfloat16(config: BRECQ.Config, device: torch.device) -> bool:
    """Whether products are in bfloat16 while learning."""
    return config.precision == "bfloat16" or (config.precision == "auto" and multiplies_bfloat16(device))


@dataclass
class _Layer:
    """One layer's variables."""

    view: LayerView
    rounding: SoftRounding
    base: Tensor  # codes
    bias: Tensor
    start_bias: Tensor
    shape: torch.Size

    def at(self, grid: Grid, codes: Tensor, bias: Tensor, trust: float) -> _Layer:
        """The same layer with another start."""
        rounding = SoftRounding(self.view.weight, grid, codes, trust)
        learned = bias.clone().requires_grad_(self.bias.requires_grad)
        return _Layer(self.view, rounding, codes, learned, bias, self.shape)


@dataclass
class Unit:
    """One unit's problem."""

    config: BRECQ.Config
    task: Task
    data: BlockData
    views: list[LayerView]
    layers: dict[str, _Layer] = field(default_factory=dict)
    steps: dict[str, LearnedGrid] = field(default_factory=dict)
    final: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # codes and bias
    grids: dict[str, ActivationGrid] = field(default_factory=dict)

    def solve(self) -> tuple[dict[str, QuantizedLayer], dict[str, float]]:
        """The unit's layers, and how well its output is preserved: errors relative to the output's energy."""
        self._aim()
        self.start()
        before = self._error()
        if not self.config.edges and not self.steps and all(view.bits >= FINE for view in self.views):
            return self._result(), {"block_error": before, "block_start_error": before, "iterations": 0, "moves": 0}
        rounding, steps = self.config.learn == "all", self.config.learn != "none"
        fisher = self.task.fisher(self.data.block) if steps and self.config.loss == "fisher" else None
        moves, error = self._descend(before)
        self._keep_start()
        taken = 0
        if rounding:
            taken, error = self._learn(fisher, error, weights=True, steps=self.config.joint)
        if self.steps and steps and not (rounding and self.config.joint):
            more, error = self._learn(fisher, error, weights=False, steps=True)
            taken += more
        metrics = {"block_error": error, "block_start_error": before, "iterations": taken, "moves": moves}
        return self._result(), metrics

    @property
    def lr(self) -> float:
        return self.config.lr or min(MOST_LR, TRAVEL / self.config.iterations)

    @property
    def learned_on(self) -> int:
        """Rows that are learned on, the first so many; the others judge."""
        rows = self.data.rows
        return min(rows, max(1, round(rows * (1 - self.config.holdout))))

    @property
    def batch(self) -> int:
        """Rows in a step."""
        config, most = self.config, min(self.config.batch, self.learned_on)
        if not config.positions:
            return most
        fit = math.ceil(config.positions / math.prod(self.data.teacher_output.shape[2:]))
        return min(most, max(FEWEST, fit))

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
        base = self._nearest() if config.start == "nearest" else self._from_method()
        for view in self.views:
            grid, codes, bias = base[view.name]
            learned = self.task.scheme.bias != "keep" and config.bias_lr > 0
            self.layers[view.name] = _Layer(
                view,
                SoftRounding(view.weight, grid, codes, config.trust),
                codes,
                bias.clone().requires_grad_(learned),
                bias,
                data.layer(view.name).weight.shape,
            )
            data.layer(view.name).bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
        self._keep_start()
        self._install(self.final, self.grids)
        for point in data.points:
            self.steps[point.name] = LearnedGrid(data.grids[point.name], config.drop, self.task.rng)

    def _descend(self, error: float) -> tuple[int, float]:
        """Codes, scales and biases by Newton steps on one layer after another; they become the start.

        Returns the number of steps taken, and the error that is reached.

        Each is tried at several dampings, and stays if it lowers the error on the images that judge.
        """
        config, data, taken = self.config, self.data, 0
        centred = self.task.scheme.bias != "keep"
        for number in range(config.rounds):
            moves, error = self._search_steps(error)
            taken += moves
            for name, layer in self.layers.items():
                if layer.base.shape[2] > MOST_INPUTS:
                    if not number:
                        self.task.note(f"layer {name} has {layer.base.shape[2]:,} inputs: its codes stay the start's")
                    continue
                model = Model.of(data.expand(name, config.batch, self.learned_on, self.task.rng), centred)
                best = None
                for damping in DAMPINGS:
                    grid, codes, shift = model.solve(layer.rounding.grid, layer.base, damping)
                    tried = layer.at(grid, codes, layer.start_bias + shift.reshape(-1).float(), config.trust)
                    self.layers[name] = tried
                    self._put(name, codes, tried.start_bias)
                    found = self._error()
                    if found < error:
                        best, error = tried, found
                taken += best is not None
                self.layers[name] = layer if best is None else best
                self._put(name, self.layers[name].base, self.layers[name].start_bias)
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
                self._set_grid(point, tried)
                found = self._error()
                if found < error:
                    best, error = tried, found
            changed += best is not None
            data.grids[point.name] = best or data.grids[point.name]
            self._set_grid(point, data.grids[point.name])
            self.steps[point.name] = LearnedGrid(data.grids[point.name], self.config.drop, self.task.rng)
        return changed, error

    def _set_grid(self, point: QuantizationPoint, grid: ActivationGrid | LearnedGrid) -> None:
        for reader in self.data.readers(point):
            set_fake_quant(reader, "input", grid)

    def _nearest(self) -> dict[str, tuple[Grid, Tensor, Tensor]]:
        """Grid, nearest codes and bias of each layer; the bias absorbs the mean of the rounding errors."""
        scheme, found = self.task.scheme, {}
        moments = self.data.moments(self.config.batch)
        for view in self.views:
            fraction = scheme.fraction(view.bits)
            columns = view.columns(scheme)
            weight = divided(view.weight, columns)
            grid = mse_grid(weight, view.bits, scheme.symmetric, scheme.granularity, NORM, fraction=fraction)
            grid = replace(grid, columns=columns)
            codes, bias = grid.codes(view.weight), _bias_of(view)
            if scheme.bias != "keep":
                rest = (view.weight - grid.values(codes)).double()
                bias += torch.einsum("goi,gi->go", rest, moments[view.name].mean).reshape(-1).float()
            found[view.name] = grid, codes, bias
        return found

    def _from_method(self) -> dict[str, tuple[Grid, Tensor, Tensor]]:
        """The same as another method gives it, with gain and bias as the scheme says."""
        found = {}
        for name, layer in self.task.quantize_block_with(self.data, self.config.start).items():
            weight, view = layer.weight, next(view for view in self.views if view.name == name)
            if layer.adapter is not None or weight.codebook is not None:
                raise CoraqError(
                    f"{self.config.start} gives layer {name} no codes on a uniform grid",
                    "Give -o start= a method that does, such as comq, gptq or rtn.",
                )
            bias = _bias_of(view) if layer.bias is None else layer.bias.clone()
            found[name] = Grid.of(weight), weight.codes.float(), bias.to(view.weight.device)
        return found

    def _install(self, final: Mapping[str, tuple[Tensor, Tensor]], grids: Mapping[str, ActivationGrid]) -> None:
        """Codes, biases and activation grids into the copy."""
        for name, (codes, bias) in final.items():
            self._put(name, codes, bias)
        self._set_grids(grids)

    @torch.no_grad()
    def _put(self, name: str, codes: Tensor, bias: Tensor) -> None:
        layer, module = self.layers[name], self.data.layer(name)
        module.weight.copy_(layer.rounding.grid.values(codes).reshape(layer.shape))
        module.bias.copy_(bias)

    def _set_grids(self, grids: Mapping[str, ActivationGrid | LearnedGrid]) -> None:
        for point in self.data.points:
            self._set_grid(point, grids[point.name])

    def use_learned_grids(self) -> None:
        """The copy's activation steps are the ones being learned."""
        self._set_grids(self.steps)

    @torch.no_grad()
    def _error(self) -> float:
        """Squared error of the copy's output as it is, over the energy of the wanted output about its mean.

        On the images that nothing is learned on, if there are any.
        """
        data, error, energy, total, count = self.data, 0.0, 0.0, 0.0, 0
        first = self.learned_on if self.learned_on < data.rows else 0
        for start in range(first, data.rows, self.config.batch):
            part = slice(start, start + self.config.batch)
            wanted = data.teacher_output[part]
            error += float((data.module(data.student_input[part].clone()) - wanted).square().sum(dtype=torch.float64))
            energy += float(wanted.square().sum(dtype=torch.float64))
            total += float(wanted.sum(dtype=torch.float64))
            count += wanted.numel()
        return error / max(energy - total**2 / count, 1e-30)

    def _learn(self, fisher: Tensor | None, error: float, weights: bool, steps: bool) -> tuple[int, float]:
        """Gradient descent, from a result of this error; the best that a look shows becomes the result.

        Returns the steps taken, and the error that is reached. Without `guard` the result so far does not compete.
        """
        config = self.config
        groups: list[dict[str, Any]] = []
        if weights:
            groups.append({"params": [layer.rounding.alpha for layer in self.layers.values()], "lr": self.lr})
            for layer in self.layers.values():
                if layer.bias.requires_grad:
                    spread = float(layer.start_bias.std(unbiased=False)) + 1e-3
                    groups.append({"params": [layer.bias], "lr": config.bias_lr * spread})
        steps = steps and bool(self.steps) and config.act_lr > 0
        if steps:
            groups.append({"params": [step.log_factor for step in self.steps.values()], "lr": config.act_lr})
            self.use_learned_grids()
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
                found = self._look(weights, best)
                if found < best:  # NaN is no gain
                    best, idle = found, 0
                else:
                    idle += 1
                if steps:
                    self.use_learned_grids()
        return taken, best if best < math.inf else error

    def _look(self, weights: bool, best: float) -> float:
        """The error of what has been learned, roundings made hard; it becomes the result if it is below `best`."""
        final = self.final
        if weights:
            final = {name: (x.rounding.codes(), x.bias.detach().clone()) for name, x in self.layers.items()}
        grids = {name: step.result() for name, step in self.steps.items()}
        self._install(final, grids)
        error = self._error()
        if error < best:
            self.final, self.grids = final, grids
        return error

    def step(self, adam: torch.optim.Optimizer, weights: bool, beta: float | None, weigh: Tensor | None) -> float:
        """One step on a fresh batch, with the regulariser if `beta` is given; returns the loss without it."""
        config, data = self.config, self.data
        rows = torch.randperm(self.learned_on, generator=self.task.rng)[: self.batch]
        x, wanted = data.student_input[rows], data.teacher_output[rows]
        if config.drop:
            keep = torch.empty_like(x).uniform_(generator=self.task.rng) < config.drop
            x = torch.where(keep, data.teacher_input[rows], x)
        half = uses_bfloat16(config, x.device)
        x = x.to(torch.bfloat16) if half else x  # or what is added to it would be made float32 again
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            got = functional_call(data.module, self._soft() if weights else self._hard(), (x,))
        if weigh is None:
            loss = squared_error(got, wanted)
        else:
            loss = (mse_loss(got.float(), wanted, reduction="none") * weigh[rows]).sum()
        loss = loss / (wanted.numel() / wanted.shape[1])  # a sum over channels, as published
        found = float(loss.detach())
        if beta is not None:
            loss = loss + config.weight * sum(layer.rounding.undecided(beta) for layer in self.layers.values())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return found

    def _soft(self) -> dict[str, Tensor]:
        """Parameters of the copy as they are being learned."""
        return self._parameters({name: (x.rounding.weight(), x.bias) for name, x in self.layers.items()})

    def _hard(self) -> dict[str, Tensor]:
        """Parameters of the copy on the codes of the result."""
        grids = {name: layer.rounding.grid for name, layer in self.layers.items()}
        return self._parameters({name: (grids[name].values(codes), bias) for name, (codes, bias) in self.final.items()})

    def _parameters(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Each layer's weight [groups, out, in] and bias, by the names that the copy knows them by."""
        parameters = {}
        for name, (weight, bias) in found.items():
            inner = self.data.block.inner(name)
            path = inner + "." if inner else ""
            parameters[path + "weight"] = weight.reshape(self.layers[name].shape)
            parameters[path + "bias"] = bias
        return parameters

    def _keep_start(self) -> None:
        """The start is the result."""
        self.final = {name: (layer.base, layer.start_bias) for name, layer in self.layers.items()}
        self.grids = {point.name: self.data.grids[point.name] for point in self.data.points}

    def _result(self) -> dict[str, QuantizedLayer]:
        # biases that were not learned are set as the scheme says, and the gain with them, behind the layers before
        given = self.task.scheme.bias != "keep" and self.config.bias_lr > 0
        inputs = {reader: self.grids[point.name] for point in self.data.points for reader in point.readers}
        layers = {}
        for name, (codes, bias) in self.final.items():
            weight = self.layers[name].rounding.grid.pack(codes)
            layers[name] = QuantizedLayer(weight, bias=bias.contiguous() if given else None, input=inputs.get(name))
        return layers


def _bias_of(view: LayerView) -> Tensor:
    """A layer's float bias [groups · out], zeros if it has none; the caller's own."""
    out = view.shape[0] * view.shape[1]
    return torch.zeros(out, device=view.weight.device) if view.bias is None else view.bias.clone()

"""BRECQ (arXiv 2102.05426) and QDrop (arXiv 2203.05740): least error of a block's output over its weights' codes.

Minimises `Σ (block(x̂) − y)²` over the codes and scales of a block's weights and its activation steps; x̂ comes from
the quantized prefix, y from the float network. The paper learns up or down for every weight by gradient descent
(AdaRound's rectified sigmoid): `-o preset=paper`, in hours. The default differs where measurement says so: a block
starts from the codes and scales that COMQ gives its layers one after another, COMQ's sweeps on a second-order
model of the whole block's error take them further, activation steps are searched, and images that nothing was
learned on judge every step. See `coraq.calibration.block_solver`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from coraq.api import (
    Base,
    BlockSolver,
    BlockSolverConfig,
    BlockTask,
    Field,
    MethodConfig,
    ReconstructionUnit,
    Scope,
    uses_bfloat16,
)

PAPER = {
    "initial_codes": "nearest",
    "rounds": 0,
    "learn": "all",
    "trust": 0.0,
    "rounding_penalty": 0.01,
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
    "eight_bit_blocks": True,
}


class BRECQ:
    """Minimises each block's output error over codes, scales and activation steps."""

    name: ClassVar[str] = "brecq"
    summary: ClassVar[str] = "codes that preserve each block's output, by descent or learned; activation steps learned"
    version: ClassVar[str] = "6"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "block"

    class Config(MethodConfig, BlockSolverConfig):
        presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": PAPER}
        renamed: ClassVar[Mapping[str, str]] = {
            "start": "initial_codes",
            "granularity": "reconstruction_unit",
            "weight": "rounding_penalty",
            "edges": "eight_bit_blocks",
        }

        preset: Literal["default", "paper"] = Field(
            default="default", description="what the other options default to: coraq's choice, or the paper's"
        )
        reconstruction_unit: ReconstructionUnit = Field(
            default="block", description="part of the network whose output is preserved"
        )
        blocks: str | None = Field(
            default=None,
            description="regular expression over module paths: those that match are blocks (see --dry-run)",
        )

        def column_scales(self) -> bool:
            return self.preset == "default"

        def bases(self) -> Sequence[Base]:
            return () if self.initial_codes == "nearest" else (Base(self.initial_codes, option="initial_codes"),)

        def reconstruction_blocks(self) -> tuple[ReconstructionUnit, str | None]:
            return self.reconstruction_unit, self.blocks

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: BlockTask) -> None:
        views = {view.name: view for view in task.layers}
        if self.config.precision == "auto" and self.config.learn == "all" and views:
            half = uses_bfloat16(self.config.precision, next(iter(views.values())).weight.device)
            task.note(f"roundings are learned in {'bfloat16' if half else 'float32'} here (-o precision=auto)")
        for block in task.partition(self.config.reconstruction_unit, self.config.blocks):
            views |= {view.name: view for view in task.layers}  # a block cut off by a kill comes back whole
            data = task.block_io(block)
            try:
                layers, metrics = BlockSolver(self.config, task, data, [views[name] for name in block.layers]).solve()
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

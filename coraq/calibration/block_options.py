"""The options of block reconstruction."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coraq.config import Frozen

Precision = Literal["auto", "float32", "bfloat16"]


class BlockSolverConfig(Frozen):
    """The options of block reconstruction; methods of scope `block` inherit them."""

    initial_codes: str = Field(
        default="comq",
        description="base codes and scales: those of a method of scope layer, or the nearest",
    )
    rounds: int = Field(
        default=1,
        ge=0,
        description="visits to every layer of a block by coordinate descent on a second-order model of its error",
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
    iterations: int = Field(default=400, ge=1, description="at most so many steps for a block")
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
    rounding_penalty: float = Field(
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
        description="share of the earlier blocks' errors that a block's target undoes: 1 is the float network's "
        "output (the paper), 0 what the float block makes of the quantized network's input",
    )
    guard: bool = Field(default=True, description="keep the base codes of a block where they are better")
    holdout: float = Field(
        default=0.125,
        ge=0,
        le=0.5,
        description="share of the images that nothing is learned on and `guard` judges by; 0: it judges by all",
    )
    eight_bit_blocks: bool = Field(default=False, description="learn blocks whose layers all have 8 bits, too")

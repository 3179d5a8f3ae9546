"""What a method implements, and what a task offers to each scope of methods.

| scope     | a task offers                                                     | methods            |
|-----------|-------------------------------------------------------------------|--------------------|
| `layer`   | layers, problems, statistics, commit                              | rtn, comq          |
| `block`   | and blocks with inputs and outputs, a layer method on a block     | brecq, qdrop       |
| `network` | and both networks, images, previews, decisions, other methods     | mixed, cora, qera  |

A method that asks for what its scope lacks gets a UsageError that names both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from pydantic import model_validator
from torch import Tensor, nn

from coraq import events
from coraq.calibration.block_data import BlockData
from coraq.calibration.problems import need_images
from coraq.calibration.scopes import Scope
from coraq.calibration.statistics import LayerStats
from coraq.config import Frozen, Scheme
from coraq.core.layer_problem import Granularity, LayerProblem
from coraq.core.least_squares import LeastSquares
from coraq.core.tensors import QuantizedLayer
from coraq.network.blocks import Block, ReconstructionUnit
from coraq.network.layers import LayerView


class Base(NamedTuple):
    """Another method that a method uses.

    Attributes:
        method: its name.
        options: its own options.
        scopes: the scopes that it may have; a base of another is a usage error before any image is read.
        option: the option of the using method that names it, for messages; "" where the user has no choice.
    """

    method: str
    options: Mapping[str, Any] = {}
    scopes: tuple[Scope, ...] = ("layer",)
    option: str = "base"


class MethodConfig(Frozen):
    """Base of a method's options: frozen, unknown keys refused; a field's description is its help.

    A method with a field `preset` names in `presets` what the other options then default to; options that are given
    beside a preset win.

    Attributes:
        presets: by a preset's name, the options that it sets.
        renamed: options that once had another name, by that name: who types it is told the new one.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        chosen = values.get("preset") if isinstance(values, dict) else None
        return {**cls.presets[chosen], **values} if isinstance(chosen, str) and chosen in cls.presets else values

    def column_scales(self) -> bool | None:
        """Whether a scheme that leaves column scales to the method (`auto`) has them.

        None: as the method's scope has it. A method with `quantize_layer` has them, as they are applied for it; another
        has none, since it must commit what `LayerView.columns` says.
        """
        return None

    def edge_bits(self) -> int | None:
        """Bits of the first and last layer where the user says none; None: as all others. Papers keep 8."""
        return 8 if getattr(self, "preset", None) == "paper" else None

    def bases(self) -> Sequence[Base]:
        """Other methods that these options use; their versions and options are part of the run's identity."""
        return ()

    def reconstruction_blocks(self) -> tuple[ReconstructionUnit, str | None] | None:
        """What a method of scope `block` hands to `BlockTask.partition`, for `--dry-run` to show; None: nothing."""
        return None


class LayerTask(Protocol):
    """One network to quantize under one Scheme, as a method of scope `layer` sees it.

    Ask for layers in the order of `layers`: the calibration engine advances all images together, so a layer's
    statistics exist while it is the current one. Going back is possible and costs another pass.
    """

    @property
    def layers(self) -> Sequence[LayerView]:
        """All quantizable layers that are not committed, in execution order."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def rng(self) -> torch.Generator:
        """The only source of randomness, seeded by the run."""

    @property
    def has_data(self) -> bool:
        """Whether there are calibration images (a method with needs_data = False may run without)."""

    def stats(self, name: str) -> LayerStats:
        """Statistics of the layer's inputs in both networks; each is computed when first read."""

    def least_squares(self, name: str, correction: float = 0.5) -> LeastSquares:
        """The problem `min ‖(W − Q)·H^½‖²` of a layer, its inputs' mean taken out where the bias absorbs it.

        H is of the student's inputs. correction 0: W are the float weights (the papers' objective). 1: W gives the
        float network's outputs on the student's inputs as nearly as any weight can, so it also undoes what earlier
        layers lost, but shrinks the signal as every regression on noisy inputs does. Between: part of the way.

        A layer of more than some 8,000 inputs has H in blocks, which is noted; see `LeastSquares`.
        """

    def problem(self, name: str, correction: float = 0.5) -> LayerProblem:
        """The layer as `LayerMethod.quantize_layer` gets it: column scales are applied already."""

    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        """Install, save and report one layer. Each layer is committed exactly once."""

    def bytes_of(self, name: str, bits: int | None = None) -> int:
        """What a layer's codes, scales, zero points and column scales take on disk with so many bits (its own)."""

    def log(self, metric: str, value: float, step: int) -> None:
        """Report a scalar while working (a loss, a budget)."""

    def stage(self, name: str, total: int = 0) -> events.stage:
        """A context manager around work that commits no layer; its `advance(done, detail)` shows how far it is.

        Args:
            total: what `done` goes up to; 0: not known.
        """

    def note(self, message: str) -> None:
        """Report something a person should know, such as a fallback taken."""


class BlockTask(LayerTask, Protocol):
    """The task as a method of scope `block` sees it."""

    @property
    def teacher(self) -> nn.Module:
        """The float network, BatchNorm folded. Never change it."""

    def partition(self, unit: ReconstructionUnit = "block", override: str | None = None) -> Sequence[Block]:
        """Blocks in execution order, every layer in exactly one, those left out that are committed as a whole.

        Call it once, first: the engine then stops in front of every block. `override` is a regular expression over
        module paths; a module that it matches becomes a block.
        """

    def block_io(self, block: Block) -> BlockData:
        """A block cut out, with its inputs in both networks and the float network's outputs, for the images there.

        Ask for blocks in order and commit all layers of one before the next. The float network runs once more, block
        by block; nothing else is computed twice. A network's first blocks have fewer images.
        """

    def fisher(self, block: Block) -> Tensor:
        """Squared gradients of the float network's own log-likelihood at a block's output, [rows, …]: the diagonal of
        the Fisher information, for the images of `block_io`. One forward pass and a backward pass down to the block;
        needs to hold all of it."""

    def quantize_block_with(
        self, data: BlockData, method: str, options: Mapping[str, Any] | None = None
    ) -> dict[str, QuantizedLayer]:
        """What a method of scope `layer` makes of a block, each layer behind those before it as quantized.

        The layers, with scales and biases corrected as the scheme says, are then in `data.module`; nothing is
        committed.
        """


class NetworkTask(BlockTask, Protocol):
    """The task as a method of scope `network` sees it."""

    @property
    def student(self) -> nn.Module:
        """The network being quantized. Only `commit` and `preview` change it."""

    def batches(self) -> Iterator[Tensor]:
        """The calibration images in micro-batches [n, channels, height, width], in the network's units."""

    def calibration_subset(self, count: int) -> AbstractContextManager[int]:
        """Within it, passes go through `count` of the calibration images, spread over all, and not through all.

        Gives how many these are, a few more than `count` where micro-batches do not end there. A pass ends where this
        begins, and where it ends.
        """

    def preview(self, name: str, layer: QuantizedLayer) -> QuantizedLayer:
        """Install a layer as `commit` would, but for now: it is not saved, and must still be committed.

        For methods that look at the whole quantized network before they decide. Returns the layer as installed,
        with its scales and bias corrected.
        """

    def decide_once(self, key: str, compute: Callable[[], Any], valid: Callable[[Any], bool] | None = None) -> Any:
        """A decision, JSON-able, that the layers' commits rest on: computed once, kept for a resumed run.

        Args:
            valid: what a kept one must satisfy to be used: its file may be anybody's.
        """

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
        """What a method of scope `layer` makes of one layer; nothing is committed.

        Args:
            bits, granularity, zero_point_fraction: instead of the layer's own.
            subtract: [groups, out, in], taken off the weight before it is quantized.
        """

    @property
    def budget_bytes(self) -> int | None:
        """Bytes that all layers together may take on disk, where the user has named a size; only methods with a class
        attribute `budget_coding` are given one."""

    def committed_bytes(self) -> int:
        """What the layers that are committed take on disk: codes, scales, zero points, adapters."""

    def scope_of(self, method: str) -> Scope:
        """The scope of another method."""

    def delegate(
        self,
        method: str,
        options: Mapping[str, Any] | None = None,
        *,
        bits: Mapping[str, int],
        whole_zero_points: Sequence[str] = (),
    ) -> None:
        """Let a method of scope `layer` or `block` quantize the whole network with these bits of every layer.

        Args:
            bits: by a layer's name.
            whole_zero_points: layers whose zero points lie at codes, whatever the scheme says.
        """


@runtime_checkable
class Quantizer(Protocol):
    """What every method implements, built-in or a stranger's plugin.

    `version` is part of the run's identity: raise it whenever the method's results change. A method that gives
    layers other bits than `layer.bits` says so with a class attribute `chooses_bits = True`; one that can keep to
    `task.budget_bytes` has a `budget_coding`, "packed" or "ans": how its codes are stored then. A class attribute
    `compare_with` names methods that a comparison of it should show beside it, and `granularities` what it has scales
    for, where it does not know both "channel" and "tensor".
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str]
    needs_data: ClassVar[bool]
    scope: ClassVar[Scope]
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any) -> None: ...

    def quantize(self, task: Any) -> None: ...


class LayerMethod:
    """Base of a method that rounds one layer after another: implement `quantize_layer`, a pure function.

    So it serves as the base of other methods, too.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool]
    scope: ClassVar[Scope] = "layer"

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def correction(self) -> float:
        """Share of the earlier layers' errors that a layer's target undoes, see `LayerTask.least_squares`."""
        return float(getattr(self.config, "correction", 0.5))

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        """Codes and scales for a layer; what was measured of them goes into `QuantizedLayer.metrics`."""
        raise NotImplementedError

    def quantize(self, task: LayerTask) -> None:
        """Round and commit all layers in order.

        Raises:
            CoraqError: the method needs calibration images and there are none.
        """
        need_images(self, task.has_data)
        for layer in task.layers:
            problem = task.problem(layer.name, self.correction)
            task.commit(layer.name, problem.restore(self.quantize_layer(problem)))

"""All that a method may import: the protocol, and the types and numerics it is written with.

A method is one file:

    class RoundToNearest:
        name = "my-rtn"
        summary = "nearest rounding on a min-max grid"
        version = "1"
        needs_data = False

        class Config(MethodConfig):
            shrink: float = Field(default=1.0, gt=0, description="factor on the range")

        def __init__(self, config):
            self.config = config

        def quantize(self, task):
            for layer in task.layers:
                grid = minmax_grid(layer.weight * self.config.shrink, layer.bits, task.scheme.symmetric)
                task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))

It returns data, not modules: `task.commit` installs the layer in the student network, saves it to the run
folder, and reports progress; so sequential calibration and resuming come for free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coraq import events
from coraq.activations.fake_quant import set_fake_quant
from coraq.calibration.block_data import BlockData
from coraq.calibration.statistics import LayerStats, LeastSquares
from coraq.config import Frozen, LayerScheme, Scheme
from coraq.core.allocation import Choice, allocate
from coraq.core.alternate import alternate
from coraq.core.columns import divided
from coraq.core.grid import Grid, best_shrink, grid_from_range, minmax_grid, mse_grid, sigma_grid
from coraq.core.lowrank import Directions, adapter, adapter_bytes, can_pay, directions, low_rank
from coraq.core.rank_search import SearchLayer, search_cutoffs
from coraq.core.sensitivity import kl_of_errors
from coraq.core.tensors import ActivationGrid, LowRank, QTensor, QuantizedLayer, stored_bytes
from coraq.errors import CoraqError, UsageError
from coraq.network.blocks import Block, Granularity
from coraq.network.layers import LayerView

__all__ = [
    "ActivationGrid",
    "Block",
    "BlockData",
    "Choice",
    "CoraqError",
    "Directions",
    "Field",
    "Granularity",
    "Grid",
    "LayerScheme",
    "LayerStats",
    "LayerView",
    "LeastSquares",
    "LowRank",
    "MethodConfig",
    "QTensor",
    "QuantizedLayer",
    "Quantizer",
    "Scheme",
    "SearchLayer",
    "Task",
    "UsageError",
    "adapter",
    "adapter_bytes",
    "allocate",
    "alternate",
    "best_shrink",
    "can_pay",
    "directions",
    "divided",
    "grid_from_range",
    "kl_of_errors",
    "low_rank",
    "minmax_grid",
    "mse_grid",
    "search_cutoffs",
    "set_fake_quant",
    "sigma_grid",
    "stored_bytes",
]


class MethodConfig(Frozen):
    """Base of a method's options: frozen, unknown keys refused; a field's description is its help.

    A method with a field `preset` names in `presets` what the other options then default to; options that are given
    beside a preset win.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        chosen = values.get("preset") if isinstance(values, dict) else None
        return {**cls.presets[chosen], **values} if isinstance(chosen, str) and chosen in cls.presets else values

    def column_scales(self) -> bool:
        """Whether a scheme that leaves column scales to the method (`auto`) has them.

        True for a method that commits what `LayerView.columns` says. The bases must say so, too.
        """
        return False

    def bases(self) -> Sequence[str]:
        """Other methods that these options use (`Task.codes`); their versions are part of the run's identity."""
        return ()


class Task(Protocol):
    """One network to quantize under one Scheme, as a method sees it.

    Ask for layers in the order of `layers`: the calibration engine advances all images together, so a layer's
    statistics exist while it is the current one. Going back is possible and costs another pass.
    """

    @property
    def layers(self) -> Sequence[LayerView]:
        """All quantizable layers in execution order, those that a resumed run has already committed left out."""

    @property
    def scheme(self) -> Scheme: ...

    @property
    def teacher(self) -> nn.Module:
        """The float network, BatchNorm folded. Never change it."""

    @property
    def student(self) -> nn.Module:
        """The network being quantized. Only `commit` changes it."""

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

    @property
    def blocks(self) -> Sequence[Block]:
        """The network's units of reconstruction in execution order; see `partition`."""

    def partition(self, granularity: Granularity = "block", override: str | None = None) -> Sequence[Block]:
        """Units in execution order, every layer in exactly one, those left out that are committed as a whole.

        Call it once, first: the engine then stops in front of every unit. `override` is a regular expression over
        module paths; a module that it matches becomes a unit. A method with options named `granularity` and `blocks`
        hands them on here, and `--dry-run` shows what they give.
        """

    def block_io(self, block: Block) -> BlockData:
        """A unit cut out, with its inputs in both networks and the float network's outputs, for the images there.

        Ask for units in order and commit all layers of one before the next. The float network runs once more, unit
        by unit; nothing else is computed twice. A network's first units have fewer images (`DataConfig.calib_early`).
        """

    def fisher(self, block: Block) -> Tensor:
        """Squared gradients of the float network's own log-likelihood at a unit's output, [rows, …]: the diagonal of
        the Fisher information, for the images of `block_io`. One forward pass and a backward pass down to the unit;
        needs to hold all of it."""

    def batches(self) -> Iterator[Tensor]:
        """The calibration images in micro-batches [n, channels, height, width], in the network's units."""

    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        """Install, save and report one layer. Each layer is committed exactly once."""

    def calibration_subset(self, count: int) -> AbstractContextManager[int]:
        """Within it, passes go through `count` of the calibration images, spread over all, and not through all.

        Gives how many these are, a few more than `count` where micro-batches do not end there. A pass ends where this
        begins, and where it ends.
        """

    def preview(self, name: str, layer: QuantizedLayer) -> QuantizedLayer:
        """Install a layer as `commit` would, but for now: it is not saved, and must still be committed.

        For methods that look at the whole quantized network before they decide. Returns the layer as installed,
        with its bias and gain.
        """

    def codes(
        self,
        name: str,
        method: str,
        options: Mapping[str, Any] | None = None,
        *,
        bits: int | None = None,
        less: Tensor | None = None,
        scheme: Scheme | None = None,
    ) -> QuantizedLayer:
        """The codes that another method gives a layer; nothing is committed.

        Args:
            bits: instead of the layer's own. scheme: instead of the task's.
            less: [groups, out, in], taken off the weight before it is quantized.
        """

    def quantize_block_with(
        self, data: BlockData, method: str, options: Mapping[str, Any] | None = None
    ) -> dict[str, QuantizedLayer]:
        """What a method that works layer by layer makes of a unit, each layer behind those before it as quantized.

        The layers, with their gain and bias as the scheme says, are then in `data.module`; nothing is committed.
        """

    def remember(self, key: str, compute: Callable[[], Any], valid: Callable[[Any], bool] | None = None) -> Any:
        """A decision, JSON-able, that the layers' commits rest on: computed once, kept for a resumed run.

        Args:
            valid: what a kept one must satisfy to be used: its file may be anybody's.
        """

    def log(self, metric: str, value: float, step: int) -> None:
        """Report a scalar while working (a loss, a budget)."""

    def stage(self, name: str, total: int = 0) -> events.stage:
        """A context manager around work that commits no layer; its `advance(done, detail)` shows how far it is.

        Args:
            total: what `done` goes up to; 0: not known.
        """

    def note(self, message: str) -> None:
        """Report something a person should know, such as a fallback taken."""


@runtime_checkable
class Quantizer(Protocol):
    """What every method implements, built-in or a stranger's plugin.

    `version` is part of the run's identity: raise it whenever the method's results change. A method that gives
    layers other bits than `layer.bits` says so with a class attribute `chooses_bits = True`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[str]
    needs_data: ClassVar[bool]
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any) -> None: ...

    def quantize(self, task: Task) -> None: ...

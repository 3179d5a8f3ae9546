"""A pass of the engine that stops at layers: what problems are posed and corrected from, whatever it goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from coraq.calibration.lockstep import LayerInputs
from coraq.calibration.statistics import LayerStats
from coraq.errors import OVERFLOW_HINT, CoraqError
from coraq.network.layers import LayerView

ROWS_PER_INPUT = 64


class LayerPass:
    """A pass through a network, or through one block of it, whose layers are quantized one after another.

    Args:
        student: what is being quantized.
        views: its layers in execution order, by name.
        clock: where seconds are added up, by activity.
        rows_per_input: patches for every input of a layer that second moments are estimated from (0: all).
        note: reports something that a person should know.

    Attributes:
        gram_blocks: into how many blocks the Gram of a layer of very many inputs is divided, by its name.
    """

    def __init__(
        self,
        student: nn.Module,
        views: Mapping[str, LayerView],
        clock: dict[str, float],
        rows_per_input: int,
        note: Callable[[str], None],
    ) -> None:
        self.student, self.views, self.clock, self.rows_per_input = student, views, clock, rows_per_input
        self.gram_blocks: dict[str, int] = {}
        self._note = note

    @property
    def has_data(self) -> bool:
        """Whether there are images to go through with."""
        raise NotImplementedError

    def stats(self, name: str) -> LayerStats:
        """Advance to a layer; the statistics of its inputs."""
        raise NotImplementedError

    def module(self, name: str) -> Any:
        """A layer in what is being quantized."""
        raise NotImplementedError

    def _stats_of(self, layer_inputs: LayerInputs, name: str) -> LayerStats:
        """Statistics of the layer that the engine stands at."""
        on_blocks = partial(self._in_blocks, name)
        weight = self.views[name].weight
        return LayerStats(self.module(name), weight, layer_inputs, self.clock, self.rows_per_input, on_blocks)

    def _in_blocks(self, name: str, blocks: int) -> None:
        """A layer's Gram is taken in blocks: say so, once."""
        if name not in self.gram_blocks:
            inputs = self.views[name].weight.shape[2]
            self._note(
                f"layer {name} has {inputs:,} inputs: its Gram is taken in {blocks} blocks of them, without the "
                "correlations between blocks"
            )
        self.gram_blocks[name] = blocks


def check_finite(name: str, *values: Tensor) -> None:
    """Raise CoraqError if what was measured of a layer's inputs or outputs overflowed: no method can work on that."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise CoraqError(
            f"the inputs or outputs of {name} are not finite, or too large for their squares to be",
            OVERFLOW_HINT,
        )

"""The pass through one block: its layers one after another, each behind the block's own earlier ones as quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from coraq.activations.fake_quant import fake_quant_of
from coraq.calibration.block_data import BlockData
from coraq.calibration.layer_pass import LayerPass
from coraq.calibration.lockstep import LayerInputs, LockStep
from coraq.calibration.statistics import STUDENT, LayerStats
from coraq.calibration.traversal import PassSettings
from coraq.errors import CoraqError
from coraq.network.layers import LayerView


class BlockPass(LayerPass):
    """Goes once through a block's copy and a copy of the float block; layers must be asked for in order.

    Args:
        teacher: a copy of the float block, without hooks.
        data: of the block; its copy is what is being quantized.
        views: the block's layers in execution order, by name.
        batch: rows in a micro-batch.
        settings: as of the pass that stands in front of the block; what the block's data holds is within its bound.
    """

    def __init__(
        self,
        teacher: nn.Module,
        data: BlockData,
        views: Mapping[str, LayerView],
        batch: int,
        settings: PassSettings,
        clock: dict[str, float],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(data.module, views, clock, settings.rows_per_input, note)
        self._data = data
        pairs = list(zip(data.teacher_input.split(batch), data.student_input.split(batch), strict=True))
        self._names = {data.block.inner(name): name for name in views}
        # what the block's data holds is held once more by the passes that wait in front of the block
        bound = settings.memory_bytes
        memory = None if bound is None else max(0, bound - 2 * data.held_bytes)
        self._engine = LockStep([teacher, data.module], pairs, list(self._names), memory, settings.folder)
        self._layer_inputs: LayerInputs | None = None
        self._stats: LayerStats | None = None

    @property
    def has_data(self) -> bool:
        return True

    def module(self, name: str) -> Any:
        return self._data.layer(name)

    def stats(self, name: str) -> LayerStats:
        """Advance to a layer, over those that are not asked for.

        Raises:
            CoraqError: the block has no such layer, or it has been passed.
        """
        while self._layer_inputs is None or self._names[self._layer_inputs.name] != name:
            if self._stats is not None:
                self._stats.leave()
            arrived = self._engine.advance()
            if arrived is None:
                raise CoraqError(
                    f"the block {self._data.block.module} has no layer {name}, or it has been passed",
                    "A base method must take the layers in the order of the block.",
                )
            layer = self._names[arrived.name]
            grid = fake_quant_of(self._data.layer(layer)).input
            if grid is not None:
                arrived.transforms[STUDENT] = grid  # what the layer will really see
            self._layer_inputs, self._stats = arrived, self._stats_of(arrived, layer)
        assert self._stats is not None
        return self._stats

    def close(self) -> None:
        """Leave the pass, and what was sampled of the last layer."""
        if self._stats is not None:
            self._stats.leave()
        # statistics refer back to their pass: a circle, which would hold samples of every block until it is collected
        self._stats, self._layer_inputs = None, None
        self._engine.close()

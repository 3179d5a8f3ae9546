"""The pass through the whole network: which layer it stands at, which images take part, and when it starts again."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coraq.activations.grids import ActivationGrids
from coraq.calibration.bfloat16_pass import BFloat16Pass
from coraq.calibration.layer_pass import ROWS_PER_INPUT, LayerPass
from coraq.calibration.lockstep import LayerInputs, LockStep, live_bytes
from coraq.calibration.releasable import releasable_inputs
from coraq.calibration.schedule import Schedule
from coraq.calibration.statistics import LayerStats
from coraq.core.subsets import spread_subset
from coraq.errors import CoraqError
from coraq.network.layers import LayerView


@dataclass(frozen=True)
class PassSettings:
    """How calibration passes are made.

    Attributes:
        memory_bytes: bound on live activations; None: no bound. Of a method that works block by block, the passes that
            wait in front of a block get half, the block's inputs and outputs the other half.
        folder: where activations beyond the bound wait; None: the system's temporary folder.
        rows_per_input: patches for every input of a layer that second moments are estimated from (0: all).
        early_images: images that take part from the start; the others join as activations shrink, see `Schedule`
            (0: all do).
        bfloat16: networks run in bfloat16; what is measured of them and solved stays float32 and float64.
    """

    memory_bytes: int | None = None
    folder: Path | None = None
    rows_per_input: int = ROWS_PER_INPUT
    early_images: int = 0
    bfloat16: bool = False


class Traversal(LayerPass):
    """Goes through the float network and the network quantized so far, with all calibration images, layer by layer.

    Args:
        teacher: the folded float network in eval mode.
        student: the network being quantized.
        views: all layers in execution order, by name.
        batches: calibration micro-batches [n, channels, height, width] on the networks' device; may be empty.
        grids: activation grids, calibrated as the pass goes.
        committed: names of the layers whose result is final.
        settings: how passes are made.
        clock: where seconds are added up, by activity.
        note: reports something that a person should know.

    Attributes:
        at: the stop that the pass stands at: a layer, a block's module, or an output; None before the first.
        passes: passes that have been started.
        spilled: micro-batches that waited in a file, at most.
        float_pass_s: seconds of the float network in the last pass.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        views: Mapping[str, LayerView],
        batches: Sequence[Tensor],
        grids: ActivationGrids,
        committed: Container[str],
        settings: PassSettings,
        clock: dict[str, float],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(student, views, clock, settings.rows_per_input, note)
        self.teacher, self.batches, self.grids, self.settings = teacher, list(batches), grids, settings
        self.spilled = 0
        self.passes = 0
        self.float_pass_s: float | None = None
        self.at: str | None = None
        self.layer_inputs: LayerInputs | None = None
        self.block_entries: list[str] = []  # modules, no layers, in front of which the pass must stop
        self._by_blocks = False
        self._committed = committed
        self._bfloat16 = BFloat16Pass(batches[0].device) if settings.bfloat16 and batches else None
        self._release: list[str] | None = None
        self._only: list[int] | None = None  # the micro-batches that take part in a pass; None: all
        self._schedules: dict[tuple[str, ...], Schedule] = {}  # by the modules, no layers, that the pass stops at
        self._engine: LockStep | None = None
        self._stats: LayerStats | None = None
        self._passed: set[str] = set()

    @property
    def has_data(self) -> bool:
        return bool(self.batches)

    @property
    def sizes(self) -> list[int]:
        """Images in each micro-batch."""
        return [len(batch) for batch in self.batches]

    @property
    def memory_bound(self) -> int | None:
        """Bytes for the live activations of the pass, and for the data of a block."""
        bound = self.settings.memory_bytes
        return None if bound is None else bound // (2 if self._by_blocks else 1)

    def module(self, name: str) -> Any:
        return self.student.get_submodule(name)

    def stats(self, name: str) -> LayerStats:
        """Advance to a layer; see `coraq.api.LayerTask.stats`.

        Raises:
            CoraqError: there are no calibration images.
        """
        self._need_images()
        if self._stats is not None and self.at == name:
            return self._stats
        if self._engine is None or name in self._passed or name in self._committed:
            self._start()
        while self.at != name:
            self._step(name)
        assert self._stats is not None
        return self._stats

    def go_to_block(self, module: str) -> LayerInputs:
        """Advance to the front of a block; what waits there.

        Raises:
            CoraqError: there are no calibration images, or the pass does not stop at the module.
        """
        self._need_images()
        if module not in self.views and module not in self.block_entries:
            raise CoraqError(f"{module} is not a block of the partition", "Take blocks from task.partition().")
        if self._engine is None or module in self._passed:
            self._start()
        while self.at != module:
            self._step(module)
        assert self.layer_inputs is not None
        return self.layer_inputs

    def stop_at_blocks(self, modules: Sequence[str]) -> None:
        """From now on every pass also stops in front of these modules, and shares its memory with their data."""
        self.close()
        self._by_blocks = True
        self.block_entries = [module for module in modules if module not in self.views]

    def finish(self) -> None:
        """Go on until every activation grid is calibrated, and end the pass."""
        if self.grids.missing:  # outputs that no layer was asked for behind, or a run that was killed at its end
            if self._engine is None:
                self._start()
            while self.grids.missing:
                self._step(self.grids.missing[0])
        self.close()

    @contextmanager
    def subset(self, count: int) -> Iterator[int]:
        """Within it, passes go through `count` images or a few more, spread over all; gives how many these are."""
        only = spread_subset(self.sizes, count)
        self.close()
        self._only = only if len(only) < len(self.sizes) else None
        try:
            yield sum(self.sizes[index] for index in only)
        finally:
            self._only = None
            self.close()

    def close(self) -> None:
        """Leave the running pass, if any."""
        if self._stats is not None:
            self._stats.leave()
        self._stats, self.at, self.layer_inputs = None, None, None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def release(self) -> None:
        """Free the calibration images and the student."""
        self.close()
        self.batches.clear()
        self.student = nn.Module()
        self._bfloat16 = None

    def _need_images(self) -> None:
        if not self.batches:
            raise CoraqError(
                "this method needs calibration images and there are none", "Give --data-dir or --calib-dir."
            )

    def _start(self) -> None:
        self.close()
        self._passed.clear()
        self.float_pass_s = 0.0
        # in bfloat16 the means of all layers' inputs are needed, also of those that were committed before
        own = [name for name in self.views if self._bfloat16 or name not in self._committed]
        stops = own + self.grids.begin() + self.block_entries
        streams = [self.teacher, self.student]
        if self._release is None:
            self._release = releasable_inputs(self.teacher, self.batches[0][:2])
        self._engine = LockStep(
            streams,
            self.batches,
            stops,
            self.memory_bound,
            self.settings.folder,
            self.grids.rewrite,
            self._schedule(self._release),
            self._release,
            self._bfloat16,
        )
        self.spilled = max(self.spilled, self._engine.spilled)
        self.passes += 1
        if self._engine.spilled and self.passes == 1:
            self._note(
                f"live activations need {self._engine.live_bytes_needed / 1e6:,.0f} MB, more than the bound of "
                f"{(self.memory_bound or 0) / 1e6:,.0f} MB: {self._engine.spilled} of "
                f"{2 * len(self.batches)} micro-batches wait in a temporary file"
            )

    def _schedule(self, release: Sequence[str]) -> Schedule | None:
        """When which micro-batches join: over all stops, so that a resumed run has the same. None: all are there."""
        sizes = self.sizes
        early = self.settings.early_images if self.settings.early_images < sum(sizes) else 0
        if not early and self._only is None:
            return None
        key = tuple(self.block_entries)
        if key not in self._schedules:
            stops = [*self.views, *self.grids.stops, *self.block_entries]
            live = live_bytes(self.teacher, self.batches[0], stops, release, self._bfloat16)
            self._schedules[key] = schedule = Schedule.plan(live, sizes, early)
            fewer = [count for name, count in schedule.present.items() if name in self.views and count < len(sizes)]
            if fewer:
                first = sum(sizes[index] for index in schedule.order[: fewer[0]])
                self._note(
                    f"the first {len(fewer)} layers, of the largest activations, are calibrated on fewer of the "
                    f"{sum(sizes)} images, {first} of them at first"
                )
        schedule = self._schedules[key]
        return schedule if self._only is None else schedule.limited(self._only)

    def _step(self, wanted: str) -> None:
        assert self._engine is not None
        if self.at is not None:
            self._passed.add(self.at)
        if self._stats is not None:
            if self._bfloat16 is not None and self.at is not None:
                self._bfloat16.take(self.teacher.get_submodule(self.at), self._stats.teacher_mean)
                self._bfloat16.take(self.student.get_submodule(self.at), self._stats.mean)
            self._stats.leave()
        self._stats = None
        marks = [time.perf_counter()]
        arrived = self._engine.advance(lambda stream: marks.append(time.perf_counter()))
        self.clock["float pass"] += marks[1] - marks[0]
        self.float_pass_s = (self.float_pass_s or 0.0) + marks[1] - marks[0]
        self.clock["student pass"] += marks[2] - marks[1]
        if arrived is None:
            raise CoraqError(
                f"the calibration pass ended without reaching layer {wanted}", "Please report the architecture."
            )
        self.at, self.layer_inputs = arrived.name, arrived
        start = time.perf_counter()
        with torch.no_grad():
            self.grids.arrive(arrived)
        self.clock["activation grids"] += time.perf_counter() - start
        if arrived.name in self.views:
            self._stats = self._stats_of(arrived, arrived.name)

"""The student's activation grids, calibrated while the engine passes.

A grid is calibrated on the student's own tensor when the engine gets there: all earlier layers and grids are final by
then, so one pass does, and each layer's weights are solved for the quantized inputs that they will meet. (Papers
calibrate after all weights; the tensor that a grid sees is the same but for the weights of the layers behind it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from coraq.activations.fake_quant import make_fake_quant, set_fake_quant
from coraq.activations.points import QuantizationPoint, output_stop
from coraq.activations.records import ActivationRecord, spread_over
from coraq.config import Scheme
from coraq.core.ranges import RangeSample
from coraq.core.tensors import ActivationGrid
from coraq.errors import MethodError

STUDENT = 1  # the second of the engine's two streams


class StopInputs(Protocol):
    """What waits at a stop of the engine, as far as grids need it (see `coraq.calibration.lockstep.LayerInputs`)."""

    name: str
    taken: Sequence[int]
    transforms: dict[int, Callable[[Tensor], Tensor]]

    def inputs(self, stream: int) -> Iterator[Tensor]: ...

    def all_calls(self, stream: int, modules: Sequence[str]) -> Iterator[Tensor]: ...


class ActivationGrids:
    """The student's grids, calibrated as the engine passes.

    A grid is final once a layer has been committed after its calibration; until then every pass calibrates it afresh.

    Args:
        student: the network that the grids act in.
        points: from `find_quantization_points`.
        columns: the column scales of the layers that read tensors that are `scaled`.
    """

    def __init__(
        self,
        student: nn.Module,
        points: Sequence[QuantizationPoint],
        scheme: Scheme,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.student, self.points, self._scheme = student, list(points), scheme
        self._factors = {
            point.name: spread_over(columns[point.readers[0]], student.get_submodule(point.readers[0]))
            for point in points
            if columns and point.scaled
        }
        self._of = {reader: point for point in points for reader in point.readers}
        self._grids: dict[str, ActivationGrid] = {}
        self._final: set[str] = set()
        for point in points:
            for target in [point.producer] if point.producer else point.readers:
                make_fake_quant(student.get_submodule(target))

    def point_of(self, layer: str) -> QuantizationPoint | None:
        """The point of the tensor that a layer reads."""
        return self._of.get(layer)

    def grid_of(self, layer: str) -> ActivationGrid | None:
        point = self._of.get(layer)
        return None if point is None else self._grids.get(point.name)

    def grid(self, point: QuantizationPoint) -> ActivationGrid | None:
        return self._grids.get(point.name)

    @property
    def stops(self) -> list[str]:
        """All stops at outputs."""
        return [output_stop(point.producer) for point in self.points if point.producer is not None]

    @property
    def missing(self) -> list[str]:
        """Points without a grid."""
        return [point.name for point in self.points if point.name not in self._grids]

    @property
    def records(self) -> dict[str, ActivationRecord]:
        """All calibrated points, by name."""
        found = {}
        for point in self.points:
            grid = self._grids.get(point.name)
            if grid is not None:
                found[point.name] = ActivationRecord(
                    scale=grid.scale,
                    zero_point=grid.zero_point,
                    bits=grid.bits,
                    signed=grid.signed,
                    readers=list(point.readers),
                    producer=point.producer,
                    scaled=point.name in self._factors,
                )
        return found

    def begin(self) -> list[str]:
        """A pass begins: forget what is not final; returns the stops at outputs that the pass must make."""
        for point in self.points:
            if point.name not in self._final:
                self._set(point, None)
        return [output_stop(s.producer) for s in self.points if s.producer is not None and s.name not in self._final]

    def arrive(self, layer_inputs: StopInputs) -> None:
        """The engine stands at a layer's input or at an output: calibrate the tensor's grid if it has none."""
        point = self._at(layer_inputs.name)
        if point is None:
            return
        if point.name not in self._grids:
            inputs, count = layer_inputs.inputs(STUDENT), len(layer_inputs.taken)
            if point.tensors > 1 and point.producer is None:
                inputs = layer_inputs.all_calls(STUDENT, point.readers)
                count *= point.tensors
            self._set(point, self.choose(point, inputs, count))
        grid = self._grids[point.name]
        if point.producer is None:
            layer_inputs.transforms[STUDENT] = grid.round  # what the layer will really see

    def choose(self, point: QuantizationPoint, inputs: Iterable[Tensor], count: int) -> ActivationGrid:
        """The grid that suits a point's tensor, seen in so many micro-batches; sets nothing."""
        sample = RangeSample(count, self._factors.get(point.name))
        for x in inputs:
            sample.add(x)
        scheme = self._scheme.activations
        assert scheme is not None  # or there would be no point
        return sample.grid(point.bits, scheme.range, scheme.percentile)

    def _at(self, stop: str) -> QuantizationPoint | None:
        for point in self.points:
            if point.producer is not None and stop == output_stop(point.producer):
                return point
        return self._of.get(stop)

    def rewrite(self, stream: int, stop: str, output: Tensor) -> Tensor:
        """What passes on from a stop at an output: the student's quantized, the teacher's as it is."""
        point = self._at(stop) if stream == STUDENT else None
        return output if point is None else self._grids[point.name].round(output)

    def commit(self, layer: str, given: ActivationGrid | None) -> ActivationGrid | None:
        """The final grid of a layer's input; `given` is the method's own and serves all readers of the tensor.

        Raises:
            CoraqError: the method gives a grid where there can be none, or another one than before.
        """
        point = self._of.get(layer)
        if given is not None:
            fault = (
                "the scheme leaves this tensor float"
                if point is None
                else f"the scheme says {point.bits} bits and not {given.bits}"
                if point.bits != given.bits
                else "it is made by an earlier module and has its grid there"
                if point.producer is not None and given != self._grids.get(point.name)
                else "another layer that reads the same tensor has been committed with another grid"
                if point.name in self._final and given != self._grids.get(point.name)
                else ""
            )
            if fault:
                raise MethodError(f"layer {layer} cannot get this input grid: {fault}")
            assert point is not None
            self._set(point, given)
        self._final |= self._grids.keys()
        return None if point is None else self._grids.get(point.name)

    def restore(self, layer: str, grid: ActivationGrid | None) -> None:
        """A resumed run had committed a layer with this grid."""
        point = self._of.get(layer)
        if point is not None and grid is not None:
            self._set(point, grid)
            self._final.add(point.name)

    def reopen(self, layers: Sequence[str]) -> None:
        """These layers are no longer committed: grids of tensors that they alone read may change again."""
        for point in self.points:
            if point.readers and set(point.readers) <= set(layers):
                self._final.discard(point.name)

    def is_final(self, point: QuantizationPoint) -> bool:
        return point.name in self._final

    def _set(self, point: QuantizationPoint, grid: ActivationGrid | None) -> None:
        if grid is None:
            self._grids.pop(point.name, None)
        else:
            scale = float(torch.tensor(grid.scale, dtype=torch.float32))
            grid = replace(grid, scale=scale, factors=self._factors.get(point.name))
            self._grids[point.name] = grid
        for target in [point.producer] if point.producer else point.readers:
            set_fake_quant(self.student.get_submodule(target), "output" if point.producer else "input", grid)

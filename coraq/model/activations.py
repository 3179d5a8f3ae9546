"""Activation grids: which tensors get one, where it acts, and its calibration as the engine passes.

A grid belongs to a tensor: layers that read the same tensor share it. With placement "inputs" it acts where quantized
layers read; with "integer" also on what layers put out (behind the activation, if the output goes into one), on sums
and on products, at the module that returns the tensor, so that every reader gets the quantized one. Operations that
only move values (reshaping, max pooling) hand the grid on.

A grid is calibrated on the student's own tensor when the engine gets there: all earlier layers and grids are final by
then, so one pass does, and each layer's weights are solved for the quantized inputs that they will meet. (Papers
calibrate after all weights; the tensor that a grid sees is the same but for the weights of the layers behind it.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from coraq.config import Frozen, Scheme
from coraq.core.ranges import RangeSample
from coraq.core.tensors import ActivationGrid, QuantizedLayer
from coraq.errors import CoraqError, MethodError
from coraq.model.dataflow import Dataflow
from coraq.model.engine import Arrival, output_stop
from coraq.model.gridded import make_gridded, set_grid
from coraq.model.layers import groups_of, is_quantizable, kernel_axes

STUDENT = 1
SUMS = {"add", "sub", "mul", "rsub", "iadd", "isub", "imul", "radd", "rmul"}  # less underscores
# These hand on values that are on a grid already.
MOVES = {"flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "max_pool2d"}
MOVES |= {"chunk", "split", "getitem", "narrow", "unbind", "movedim", "t", "clone", "channel_shuffle"}
ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "mish", "elu", "leaky_relu"}
ACTIVATIONS |= {"hardtanh", "clamp", "tanh", "celu", "selu"}


@dataclass(frozen=True)
class Site:
    """One tensor with a grid.

    Attributes:
        name: stable: "MODULE.input" of the first layer that reads it, or "MODULE.output" of the module it comes from.
        readers: quantized layers that read it.
        producer: the module at whose output the grid acts; None: it acts at the readers' inputs.
        bits: of a code.
        scaled: its channels get factors before they are rounded: its readers' column scales.
        values: of one image that its readers read.
    """

    name: str
    readers: tuple[str, ...]
    producer: str | None
    bits: int
    scaled: bool = False
    values: int = 0


class ActivationRecord(Frozen):
    """A calibrated site as the checkpoint's metadata hold it."""

    scale: float = Field(gt=0)
    zero_point: int
    bits: int = Field(ge=1)
    signed: bool
    readers: list[str] = Field(default_factory=list, description="quantized layers that read the tensor")
    producer: str | None = Field(default=None, description="module whose output it is; none: it acts at the readers")
    scaled: bool = Field(
        default=False, description="it is multiplied by its readers' column scales before it is rounded"
    )

    @property
    def grid(self) -> ActivationGrid:
        """The grid, of a tensor that is `scaled` without its factors."""
        return ActivationGrid(self.scale, self.zero_point, self.bits, self.signed)


def install_grids(
    model: nn.Module, records: Mapping[str, ActivationRecord], layers: Mapping[str, QuantizedLayer]
) -> None:
    """Put the grids of a checkpoint into a network.

    Raises:
        CoraqError: the network has no such module, or a grid is none.
    """
    modules = dict(model.named_modules())
    for name, record in records.items():
        try:
            record.grid.check()
            for target in [record.producer] if record.producer else record.readers:
                grid = record.grid
                if record.scaled:
                    columns = layers[target].weight.columns
                    if columns is None or record.producer:
                        raise ValueError("it has no column scales to be multiplied by")
                    grid = replace(grid, factors=spread_over(columns, modules[target]))
                set_grid(modules[target], "output" if record.producer else "input", grid)
        except (KeyError, ValueError) as error:
            raise CoraqError(
                f"activation grid {name} does not fit the network: {error}", "Was the file changed, or timm?"
            ) from None


def spread_over(columns: Tensor, module: nn.Module) -> Tensor:
    """Column scales [groups, 1, channels] of a layer in a shape that spreads over its input."""
    return columns.reshape(-1, *[1] * kernel_axes(module))


def find_sites(
    model: nn.Module, order: Sequence[str], flow: Dataflow | None, scheme: Scheme
) -> tuple[list[Site], list[str]]:
    """The sites of a folded network under a Scheme, and what kept tensors from getting a grid.

    Args:
        order: quantized layers in execution order.
        flow: a forward pass of the folded network.

    Raises:
        CoraqError: activations are to be quantized, and no forward pass was watched.
    """
    if scheme.act_bits is None:
        return [], []
    if flow is None:
        raise CoraqError("the network's dataflow was not watched", "Take the Trace from coraq.model.fold.fold.")
    return _Finder(model, order, flow, scheme).find()


class _Finder:
    def __init__(self, model: nn.Module, order: Sequence[str], flow: Dataflow, scheme: Scheme) -> None:
        self.model, self.order, self.flow, self.scheme = model, list(order), flow, scheme
        self.integer = scheme.act_placement == "integer"
        self.bits = {name: own.act_bits for name, own in scheme.resolve(self.order).items()}
        self.calls = {name: flow.calls_of(name) for name in self.order}
        self.made_by = {tensor: op for op in flow.ops for tensor in op.outputs}
        self.readers: dict[int, list[Any]] = {}
        for op in flow.ops:
            for tensor in op.inputs:
                self.readers.setdefault(tensor, []).append(op)
        self.counts: dict[str, int] = {}
        for call in flow.calls:
            self.counts[call.module] = self.counts.get(call.module, 0) + 1
        self._elementwise: dict[str, bool] = {}

    def find(self) -> tuple[list[Site], list[str]]:
        groups = self._groups()
        reading = {reader for _, readers in groups for reader in readers}
        constant = [f"{name}: reads nothing that comes from the images" for name in self.order if name not in reading]
        producers = self._producers() if self.integer else {}
        sites, lost, taken = [], constant, set()
        for tensors, readers in groups:
            places = {producers[t] for t in tensors if t in producers}
            producer = next(iter(places)) if len(tensors) == 1 and places and None not in places else None
            taken |= tensors
            first = readers[0]
            name = f"{producer}.output" if producer else f"{first}.input"
            bits = max(self.bits[reader] or 8 for reader in readers)
            scaled = producer is None and self._scaled(readers, bits)
            sites.append(Site(name, tuple(readers), producer, bits, scaled, self._values(readers)))
            if producer is None and places - {None}:
                lost.append(f"{first}: reads several tensors, so that other readers of them get float values")
        for tensor, producer in producers.items():
            if tensor in taken:
                continue
            if producer is None:
                op = self.made_by[tensor]
                lost.append(f"{op.where or 'the network'}: no module returns what {op.name} makes")
            else:
                sites.append(Site(f"{producer}.output", (), producer, self.scheme.act_bits or 8))
        return sites, lost

    def _scaled(self, readers: Sequence[str], bits: int) -> bool:
        """Whether a tensor's channels get factors: they must be the same for all who read it."""
        modules: list[Any] = [self.model.get_submodule(name) for name in readers]
        alike = (
            len({(isinstance(m, nn.Linear), m.weight.dim(), m.weight.shape[1] * groups_of(m)) for m in modules}) == 1
        )
        return self.scheme.scales_inputs(bits) and alike

    def _values(self, readers: Sequence[str]) -> int:
        """The values of one image in the tensors that these layers read, each tensor once."""
        sizes = {c.inputs[0]: math.prod(c.input_shape) for name in readers for c in self.calls[name] if c.inputs}
        return sum(sizes.values()) // self.flow.count

    def _source(self, tensor: int) -> int:
        """Back past operations that only move values."""
        while self.integer and tensor in self.made_by:
            op = self.made_by[tensor]
            if op.name.strip("_") not in MOVES or len(op.inputs) != 1:
                break
            tensor = op.inputs[0]
        return tensor

    def _groups(self) -> list[tuple[set[int], list[str]]]:
        """Tensors that layers read, with their layers; a layer that runs twice ties its tensors together."""
        groups: list[tuple[set[int], list[str]]] = []
        for name in self.order:
            tensors = {self._source(call.inputs[0]) for call in self.calls[name] if call.inputs}
            readers = [name]
            apart = []
            for group in groups:
                if group[0] & tensors:
                    tensors |= group[0]
                    readers = group[1] + readers
                else:
                    apart.append(group)
            groups = [*apart, (tensors, readers)]
        position = {name: index for index, name in enumerate(self.order)}
        ordered = [(tensors, sorted(readers, key=position.__getitem__)) for tensors, readers in groups if tensors]
        return sorted(ordered, key=lambda group: position[group[1][0]])

    def _producers(self) -> dict[int, str | None]:
        """Tensors that need a grid where they are made, and the module that returns each (None: there is none)."""
        wanted = []
        for name in self.order:
            wanted += [self._settle(call.outputs[0]) for call in self.calls[name] if len(call.outputs) == 1]
        for op in self.flow.ops:
            inside = op.name.strip("_") in SUMS and len(op.inputs) > 1 and len(op.outputs) == 1
            if inside and op.where not in self.calls:
                wanted.append(self._settle(op.outputs[0]))
        found: dict[int, str | None] = {}
        for tensor in map(self._source, wanted):
            others = [op for op in self._final_readers(tensor) if op.where not in self.calls]
            if tensor in self.flow.output or tensor == self.flow.images or not others:
                continue  # logits stay float; what only layers read has its grid at their inputs
            found[tensor] = self._producer(tensor)
        return found

    def _final_readers(self, tensor: int) -> list[Any]:
        """Who reads a tensor, past operations that only move values."""
        found = []
        for op in self.readers.get(tensor, []):
            moved = op.name.strip("_") in MOVES and len(op.inputs) == 1 and op.where not in self.calls
            found += [reader for out in op.outputs for reader in self._final_readers(out)] if moved else [op]
        return found

    def _settle(self, tensor: int) -> int:
        """Forward past an activation that alone reads a tensor: integer kernels round behind it."""
        while True:
            readers = self.readers.get(tensor, [])
            if len(readers) == 1 and readers[0].name.strip("_") in ACTIVATIONS and len(readers[0].outputs) == 1:
                tensor = readers[0].outputs[0]
                continue
            inner = {op.where for op in readers}
            if len(inner) == 1 and self._is_elementwise(next(iter(inner))):
                call = self.flow.calls_of(next(iter(inner)))[0]
                if call.inputs == (tensor,) and len(call.outputs) == 1 and call.outputs[0] != tensor:
                    tensor = call.outputs[0]
                    continue
            return tensor

    @torch.no_grad()
    def _is_elementwise(self, name: str) -> bool:
        """Whether a module maps each value by itself: then shuffled values give shuffled results."""
        if name not in self._elementwise:
            module = self.model.get_submodule(name) if name else self.model
            plain = not any(True for _ in module.children()) and not is_quantizable(module)
            known = False
            if plain and self.counts.get(name, 0) == 1 and not any(True for _ in module.parameters()):
                shape = self.flow.calls_of(name)[0].input_shape
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(1, *shape[1:], generator=generator)
                shuffle = torch.randperm(x.numel(), generator=generator)
                forward = copy.deepcopy(module).cpu()
                y = forward(x.clone())
                if isinstance(y, Tensor) and y.shape == x.shape:
                    moved = forward(x.reshape(-1)[shuffle].reshape(x.shape))
                    known = torch.equal(moved.reshape(-1), y.reshape(-1)[shuffle])
            self._elementwise[name] = known
        return self._elementwise[name]

    def _producer(self, tensor: int) -> str | None:
        """The innermost module that makes and returns a tensor, and before whose return no layer reads it."""
        for call in self.flow.calls:
            if call.outputs == (tensor,) and tensor not in call.inputs:
                early = [op for op in self.readers.get(tensor, []) if call.start < op.at < call.stop]
                return call.module if self.counts[call.module] == 1 and not early else None
        return None


class ActivationGrids:
    """The student's grids, calibrated as the engine passes.

    A grid is final once a layer has been committed after its calibration; until then every pass calibrates it afresh.

    Args:
        student: the network that the grids act in.
        sites: from `find_sites`.
        columns: the column scales of the layers that read tensors that are `scaled`.
    """

    def __init__(
        self,
        student: nn.Module,
        sites: Sequence[Site],
        scheme: Scheme,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.student, self.sites, self._scheme = student, list(sites), scheme
        self._factors = {
            site.name: spread_over(columns[site.readers[0]], student.get_submodule(site.readers[0]))
            for site in sites
            if columns and site.scaled
        }
        self._of = {reader: site for site in sites for reader in site.readers}
        self._grids: dict[str, ActivationGrid] = {}
        self._final: set[str] = set()
        for site in sites:
            for target in [site.producer] if site.producer else site.readers:
                make_gridded(student.get_submodule(target))

    def site_of(self, layer: str) -> Site | None:
        """The site of the tensor that a layer reads."""
        return self._of.get(layer)

    def grid_of(self, layer: str) -> ActivationGrid | None:
        site = self._of.get(layer)
        return None if site is None else self._grids.get(site.name)

    def grid(self, site: Site) -> ActivationGrid | None:
        return self._grids.get(site.name)

    @property
    def stops(self) -> list[str]:
        """All stops at outputs."""
        return [output_stop(site.producer) for site in self.sites if site.producer is not None]

    @property
    def missing(self) -> list[str]:
        """Sites without a grid."""
        return [site.name for site in self.sites if site.name not in self._grids]

    @property
    def records(self) -> dict[str, ActivationRecord]:
        """All calibrated sites, by name."""
        found = {}
        for site in self.sites:
            grid = self._grids.get(site.name)
            if grid is not None:
                found[site.name] = ActivationRecord(
                    scale=grid.scale,
                    zero_point=grid.zero_point,
                    bits=grid.bits,
                    signed=grid.signed,
                    readers=list(site.readers),
                    producer=site.producer,
                    scaled=site.name in self._factors,
                )
        return found

    def begin(self) -> list[str]:
        """A pass begins: forget what is not final; returns the stops at outputs that the pass must make."""
        for site in self.sites:
            if site.name not in self._final:
                self._set(site, None)
        return [output_stop(s.producer) for s in self.sites if s.producer is not None and s.name not in self._final]

    def arrive(self, arrival: Arrival) -> None:
        """The engine stands at a layer's input or at an output: calibrate the tensor's grid if it has none."""
        site = self._at(arrival.name)
        if site is None:
            return
        if site.name not in self._grids:
            self._set(site, self.choose(site, arrival.inputs(STUDENT), len(arrival.taken)))
        grid = self._grids[site.name]
        if site.producer is None:
            arrival.transforms[STUDENT] = grid.round  # what the layer will really see

    def choose(self, site: Site, inputs: Iterable[Tensor], count: int) -> ActivationGrid:
        """The grid that suits a site's tensor, seen in so many micro-batches; sets nothing."""
        sample = RangeSample(count, self._factors.get(site.name))
        for x in inputs:
            sample.add(x)
        return sample.grid(site.bits, self._scheme.act_range, self._scheme.act_percentile)

    def _at(self, stop: str) -> Site | None:
        for site in self.sites:
            if site.producer is not None and stop == output_stop(site.producer):
                return site
        return self._of.get(stop)

    def rewrite(self, stream: int, stop: str, output: Tensor) -> Tensor:
        """What passes on from a stop at an output: the student's quantized, the teacher's as it is."""
        site = self._at(stop) if stream == STUDENT else None
        return output if site is None else self._grids[site.name].round(output)

    def commit(self, layer: str, given: ActivationGrid | None) -> ActivationGrid | None:
        """The final grid of a layer's input; `given` is the method's own and serves all readers of the tensor.

        Raises:
            CoraqError: the method gives a grid where there can be none, or another one than before.
        """
        site = self._of.get(layer)
        if given is not None:
            fault = (
                "the scheme leaves this tensor float"
                if site is None
                else f"the scheme says {site.bits} bits and not {given.bits}"
                if site.bits != given.bits
                else "it is made by an earlier module and has its grid there"
                if site.producer is not None and given != self._grids.get(site.name)
                else "another layer that reads the same tensor has been committed with another grid"
                if site.name in self._final and given != self._grids.get(site.name)
                else ""
            )
            if fault:
                raise MethodError(f"layer {layer} cannot get this input grid: {fault}")
            assert site is not None
            self._set(site, given)
        self._final |= self._grids.keys()
        return None if site is None else self._grids.get(site.name)

    def restore(self, layer: str, grid: ActivationGrid | None) -> None:
        """A resumed run had committed a layer with this grid."""
        site = self._of.get(layer)
        if site is not None and grid is not None:
            self._set(site, grid)
            self._final.add(site.name)

    def reopen(self, layers: Sequence[str]) -> None:
        """These layers are no longer committed: grids of tensors that they alone read may change again."""
        for site in self.sites:
            if site.readers and set(site.readers) <= set(layers):
                self._final.discard(site.name)

    def is_final(self, site: Site) -> bool:
        return site.name in self._final

    def _set(self, site: Site, grid: ActivationGrid | None) -> None:
        if grid is None:
            self._grids.pop(site.name, None)
        else:
            scale = float(torch.tensor(grid.scale, dtype=torch.float32))
            grid = replace(grid, scale=scale, factors=self._factors.get(site.name))
            self._grids[site.name] = grid
        for target in [site.producer] if site.producer else site.readers:
            set_grid(self.student.get_submodule(target), "output" if site.producer else "input", grid)

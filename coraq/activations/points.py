"""Which tensors get an activation grid, and where it acts.

A grid belongs to a tensor: layers that read the same tensor share it. With placement "inputs" it acts where quantized
layers read; with "integer" also on what layers put out (behind the activation, if the output goes into one), on sums
and on products, at the module that returns the tensor, so that every reader gets the quantized one. Operations that
only move values (reshaping, max pooling) hand the grid on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coraq.config import Scheme
from coraq.errors import CoraqError
from coraq.network.dataflow import Dataflow
from coraq.network.layers import groups_of, is_quantizable

OUTPUT = ":output"  # no module's path has a colon in it
SUMS = {"add", "sub", "mul", "rsub", "iadd", "isub", "imul", "radd", "rmul"}  # less underscores
# These hand on values that are on a grid already.
MOVES = {"flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "max_pool2d"}
MOVES |= {"chunk", "split", "getitem", "narrow", "unbind", "movedim", "t", "clone", "channel_shuffle"}
ACTIVATIONS = {"relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "mish", "elu", "leaky_relu"}
ACTIVATIONS |= {"hardtanh", "clamp", "tanh", "celu", "selu"}


def output_stop(module: str) -> str:
    """The name of the stop behind a module, where its output waits; a module's own name is the stop in front of it."""
    return module + OUTPUT


@dataclass(frozen=True)
class QuantizationPoint:
    """One tensor with a grid.

    Attributes:
        name: stable: "MODULE.input" of the first layer that reads it, or "MODULE.output" of the module it comes from.
        readers: quantized layers that read it.
        producer: the module at whose output the grid acts; None: it acts at the readers' inputs.
        bits: of a code.
        scaled: its channels get factors before they are rounded: its readers' column scales.
        values: of one image that its readers read.
        tensors: that share the grid, because one layer reads several of them in one pass.
    """

    name: str
    readers: tuple[str, ...]
    producer: str | None
    bits: int
    scaled: bool = False
    values: int = 0
    tensors: int = 1


def find_quantization_points(
    model: nn.Module, order: Sequence[str], flow: Dataflow | None, scheme: Scheme
) -> tuple[list[QuantizationPoint], list[str]]:
    """The points of a folded network under a Scheme, and what kept tensors from getting a grid.

    Args:
        order: quantized layers in execution order.
        flow: a forward pass of the folded network.

    Raises:
        CoraqError: activations are to be quantized, and no forward pass was watched.
    """
    if scheme.activations is None:
        return [], []
    if flow is None:
        raise CoraqError("the network's dataflow was not watched", "Take the Trace from coraq.network.fold.fold.")
    return _Finder(model, order, flow, scheme).find()


class _Finder:
    def __init__(self, model: nn.Module, order: Sequence[str], flow: Dataflow, scheme: Scheme) -> None:
        self.model, self.order, self.flow, self.scheme = model, list(order), flow, scheme
        self.integer = scheme.activations is not None and scheme.activations.placement == "integer"
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

    def find(self) -> tuple[list[QuantizationPoint], list[str]]:
        groups = self._groups()
        reading = {reader for _, readers in groups for reader in readers}
        constant = [f"{name}: reads nothing that comes from the images" for name in self.order if name not in reading]
        producers = self._producers() if self.integer else {}
        points, lost, taken = [], constant, set()
        for tensors, readers in groups:
            places = {producers[t] for t in tensors if t in producers}
            producer = next(iter(places)) if len(tensors) == 1 and places and None not in places else None
            taken |= tensors
            first = readers[0]
            name = f"{producer}.output" if producer else f"{first}.input"
            bits = max(self.bits[reader] or 8 for reader in readers)
            scaled = producer is None and self._scaled(readers, bits)
            points.append(
                QuantizationPoint(name, tuple(readers), producer, bits, scaled, self._values(readers), len(tensors))
            )
            if producer is None and places - {None}:
                lost.append(f"{first}: reads several tensors, so that other readers of them get float values")
        for tensor, producer in producers.items():
            if tensor in taken:
                continue
            if producer is None:
                op = self.made_by[tensor]
                lost.append(f"{op.where or 'the network'}: no module returns what {op.name} makes")
            else:
                points.append(QuantizationPoint(f"{producer}.output", (), producer, self.scheme.act_bits or 8))
        return points, lost

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
            wanted += [self._behind_activation(call.outputs[0]) for call in self.calls[name] if len(call.outputs) == 1]
        for op in self.flow.ops:
            inside = op.name.strip("_") in SUMS and len(op.inputs) > 1 and len(op.outputs) == 1
            if inside and op.where not in self.calls:
                wanted.append(self._behind_activation(op.outputs[0]))
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

    def _behind_activation(self, tensor: int) -> int:
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

"""The network cut into units that can be reconstructed one by one, for networks never seen before.

timm's `group_matcher` proposes groups of layers. A group becomes a unit where one module holds exactly its layers,
ran once, took one tensor and returned one, and read nothing else that comes from the images; all of it observed, never
guessed from a class. Where that fails, the largest modules inside that do pass become units, then single layers.
Every layer ends up in exactly one unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from coraq.errors import CoraqError, UsageError
from coraq.network.dataflow import Call, Dataflow

MAX_LAYERS = 24  # of a unit that nobody proposed by name: a whole stage learns slowly and needs memory
ReconstructionUnit = Literal["layer", "block", "stage"]


@dataclass(frozen=True)
class Block:
    """One unit of reconstruction.

    Attributes:
        module: path of the module that is the unit: its input and its output are one tensor each.
        layers: quantized layers in it, in execution order.
    """

    module: str
    layers: tuple[str, ...]

    def inner(self, layer: str) -> str:
        """A layer's path inside the unit's module; "" if it is that module."""
        return layer.removeprefix(self.module).removeprefix(".") if self.module else layer


def partition(
    model: nn.Module,
    order: Sequence[str],
    flow: Dataflow | None,
    unit: ReconstructionUnit = "block",
    override: str | None = None,
) -> list[Block]:
    """Units in execution order.

    Args:
        order: quantized layers in execution order.
        flow: a forward pass of the folded network.
        override: regular expression over module paths: a module that it matches wholly becomes a unit first.

    Raises:
        UsageError: `override` is no expression, matches nothing, or a module that cannot be a unit.
        CoraqError: no forward pass was watched.
    """
    if flow is None:
        raise CoraqError("the network's dataflow was not watched", "Take the Trace from coraq.network.fold.fold.")
    cutter = _Cutter(model, order, flow)
    units = cutter.matching(override) if override else []
    rest = [name for name in order if not any(name in unit.layers for unit in units)]
    if unit == "layer":
        units += [Block(name, (name,)) for name in rest]
    else:
        for group in _groups(model, rest, coarse=unit == "stage"):
            units += cutter.cut(group, limit=None if unit == "stage" else MAX_LAYERS)
    units.sort(key=lambda unit: order.index(unit.layers[0]))
    held = [name for unit in units for name in unit.layers]
    assert sorted(held) == sorted(order), "every layer must be in exactly one unit"
    return units


class _Cutter:
    def __init__(self, model: nn.Module, order: Sequence[str], flow: Dataflow) -> None:
        self.order, self.flow = list(order), flow
        self.paths = [name for name, _ in model.named_modules() if name]
        self.calls: dict[str, list[Call]] = {}
        for call in flow.calls:
            self.calls.setdefault(call.module, []).append(call)
        self.made_at = {tensor: op.at for op in flow.ops for tensor in op.outputs}

    def inside(self, module: str) -> list[str]:
        """The quantized layers in a module, itself included."""
        return [name for name in self.order if name == module or name.startswith(module + ".")]

    def closed(self, module: str) -> bool:
        """Whether a module ran once, on one tensor to one tensor, and read nothing else from the images."""
        calls = self.calls.get(module, [])
        if len(calls) != 1 or not calls[0].bare or len(calls[0].inputs) != 1 or len(calls[0].outputs) != 1:
            return False
        call = calls[0]
        for op in self.flow.ops:
            if call.start < op.at < call.stop:
                for tensor in op.inputs:
                    # older versions of what an in-place operation changed were made inside as well
                    if tensor not in call.inputs and self.made_at.get(tensor, -1) < call.start:
                        return False
        own = self.inside(module)
        strangers = (name for name in self.order if name not in own)  # a module held elsewhere and called in here
        if any(call.start < other.start < call.stop for name in strangers for other in self.calls.get(name, [])):
            return False
        return all(len(self.calls.get(name, [])) == 1 for name in own)

    def cut(self, group: Sequence[str], limit: int | None) -> Iterator[Block]:
        """The largest closed modules that hold layers of the group and no others."""
        left = list(group)
        for module in self.paths:  # outer modules come before inner ones
            layers = self.inside(module)
            fits = layers and set(layers) <= set(left) and (limit is None or len(layers) <= limit)
            if fits and module not in self.order and self.closed(module):
                yield Block(module, tuple(layers))
                left = [name for name in left if name not in layers]
        for name in left:
            yield Block(name, (name,))

    def matching(self, pattern: str) -> list[Block]:
        try:
            found = [path for path in self.paths if re.fullmatch(pattern, path) and self.inside(path)]
        except re.error as error:
            raise UsageError(f"{pattern!r} is not a regular expression: {error}", "It names modules.") from None
        if not found:
            raise UsageError(f"no module with quantized layers matches {pattern!r}", "`--dry-run` lists the units.")
        units: list[Block] = []
        for path in found:
            layers = tuple(self.inside(path))
            if any(set(layers) & set(unit.layers) for unit in units):
                continue  # inside one that matched already
            if path not in self.order and not self.closed(path):
                raise UsageError(
                    f"{path} cannot be a unit: it does not take one tensor and return one, once", "Name smaller ones."
                )
            units.append(Block(path, layers))
        return units


def _groups(model: Any, layers: Sequence[str], coarse: bool) -> list[list[str]]:
    """Layers by timm's own grouping; without one, all together."""
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        return [list(layers)]
    from timm.models._manipulate import group_with_matcher

    try:
        weights = {f"{name}.weight": name for name in layers}
        found = group_with_matcher(((key, None) for key in weights), matcher(coarse=coarse), reverse=True)
    except Exception:  # timm's own grouping of this architecture does not work
        return [list(layers)]
    groups: dict[Any, list[str]] = {}
    for key, group in found.items():
        if key in weights:
            groups.setdefault(group, []).append(weights[key])
    return list(groups.values())

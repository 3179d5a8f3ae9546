"""Modules that quantize what they read or return.

A module keeps its class's name, parameters and state_dict; its class becomes a subclass whose `forward` rounds the
input before, and the output after, the original's. So copies, pickles, device moves and `isinstance` work as before,
and no hook can be lost or left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

Quantize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Grids:
    """What acts on a module's first input and on its output."""

    input: Quantize | None = None
    output: Quantize | None = None


class FakeQuantModule:
    """The part of a gridded module's class that is not its original class."""

    coraq_fake_quant = Grids()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        grids = self.coraq_fake_quant
        if grids.input is not None:
            if args:
                args = (grids.input(args[0]), *args[1:])
            else:
                first = next(iter(kwargs))
                kwargs = {**kwargs, first: grids.input(kwargs[first])}
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return output if grids.output is None else grids.output(output)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (original_class(self),), dict(self.__dict__)


_classes: dict[type, type] = {}


def _fake_quant_class(original: type) -> type:
    if original not in _classes:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        _classes[original] = type(original.__name__, (FakeQuantModule, original), names)
    return _classes[original]


def _empty(original: type) -> Any:
    made: Any = _fake_quant_class(original)
    return made.__new__(made)


def original_class(module: Any) -> type:
    """The class that a module had before it got a grid."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FakeQuantModule) else kind


def make_fake_quant(module: nn.Module) -> None:
    """Let a module be able to take grids.

    Not while it runs: a call that has begun looks its `forward` up before its hooks.
    """
    if not isinstance(module, FakeQuantModule):
        module.__class__ = _fake_quant_class(type(module))


def set_fake_quant(module: nn.Module, side: Literal["input", "output"], grid: Quantize | None) -> None:
    """Let a module round its input or its output on `grid`; None: it stays as it comes."""
    make_fake_quant(module)
    module.__dict__["coraq_fake_quant"] = replace(fake_quant_of(module), **{side: grid})


def fake_quant_of(module: nn.Module) -> Grids:
    """What acts on a module's input and output."""
    return module.coraq_fake_quant if isinstance(module, FakeQuantModule) else Grids()

"""Which tensors a forward pass makes and who reads them, by the tensors' identity, never by class names.

A tensor is an object at a version: an in-place activation makes a new tensor of the same object. From this follow
where activation grids belong (`coraq.activations.points`) and which modules can be cut out as blocks
(`coraq.network.blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coraq.config import Frozen

# Reading a property is not reading the values.
METADATA = {"__get__", "size", "dim", "numel", "stride", "is_floating_point", "element_size", "ndimension", "__len__"}


class Call(Frozen):
    """One call of a module. `inputs` and `outputs` are tensors computed from the images, in order of appearance."""

    module: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_shape: tuple[int, ...]
    bare: bool = True  # the first argument is a tensor itself, not a list that holds one (DenseNet's layers)
    start: int
    stop: int


class Op(Frozen):
    """One torch function, called directly in the module `where` at the time `at`."""

    name: str
    where: str
    at: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Dataflow(Frozen):
    """One forward pass. Tensors are numbers; times count calls and operations together.

    Attributes:
        calls: of all modules, by time of return (an inner module before its outer one).
        ops: by time.
        images, output: the network's input, and what it returned.
        count: of images.
    """

    calls: tuple[Call, ...]
    ops: tuple[Op, ...]
    images: int
    output: tuple[int, ...]
    count: int

    def readers(self, tensor: int) -> list[Op]:
        """The operations that read a tensor."""
        return [op for op in self.ops if tensor in op.inputs]

    def calls_of(self, module: str) -> list[Call]:
        return [call for call in self.calls if call.module == module]


class _Watcher(TorchFunctionMode):
    """Numbers tensors, and writes down operations on those that come from the images."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ops: list[Op] = []
        self.time = 0
        self._numbers: dict[tuple[int, int], int] = {}
        self._last: dict[int, int] = {}  # the newest number of each object
        self._keep: list[Tensor] = []  # while kept, no other tensor can get the same id

    def name(self, tensor: Tensor) -> int:
        """The number of a tensor, a new one if need be."""
        key = (id(tensor), tensor._version)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            self._keep.append(tensor)
        self._last[id(tensor)] = self._numbers[key]
        return self._numbers[key]

    def known(self, value: Any) -> tuple[int, ...]:
        """Numbers of the tensors in `value` that come from the images."""
        # a view changed in place bumps the version of all its siblings: they are the images' as before
        return tuple(dict.fromkeys(self.name(t) for t in tensors_in(value) if id(t) in self._last))

    def tick(self) -> int:
        self.time += 1
        return self.time

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = () if name in METADATA else self.known((args, kwargs))
        result = func(*args, **kwargs)
        if inputs:
            outputs = tuple(self.name(t) for t in tensors_in(result))
            if outputs and set(outputs) <= set(inputs):  # handed back as it came: contiguous() of what is contiguous
                return result
            where = self.stack[-1] if self.stack else ""
            self.ops.append(Op(name=name, where=where, at=self.tick(), inputs=inputs, outputs=outputs))
        return result


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@torch.no_grad()
def watch(model: nn.Module, images: Tensor) -> tuple[Any, Dataflow]:
    """`model(images)`, and what was seen on the way."""
    watcher = _Watcher()
    calls: list[Call] = []
    entered: list[tuple[tuple[int, ...], tuple[int, ...], bool, int]] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(iter(tensors_in((args, kwargs))), None)
            shape = () if first is None else tuple(first.shape)
            bare = isinstance(args[0] if args else next(iter(kwargs.values()), None), Tensor)
            entered.append((watcher.known((args, kwargs)), shape, bare, watcher.tick()))
            watcher.stack.append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            watcher.stack.pop()
            inputs, shape, bare, start = entered.pop()
            outputs = watcher.known(output)
            calls.append(
                Call(
                    module=name,
                    inputs=inputs,
                    outputs=outputs,
                    input_shape=shape,
                    bare=bare,
                    start=start,
                    stop=watcher.tick(),
                )
            )

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
    try:
        number = watcher.name(images)
        with watcher:
            output = model(images)
        flow = Dataflow(
            calls=tuple(calls),
            ops=tuple(watcher.ops),
            images=number,
            output=watcher.known(output),
            count=len(images),
        )
    finally:
        for handle in handles:
            handle.remove()
    return output, flow

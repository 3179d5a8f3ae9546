"""Inputs that nobody reads any more, let go of while a pass waits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class ReleaseHooks:
    """Hooks that let go of the input of an `nn.Sequential` when its first child has returned.

    Who calls a Sequential holds on to its input until that returns: a network whose blocks are one Sequential keeps
    the first block's input, its largest activation, alive to the end. Where nobody reads it again, which
    `releasable_inputs` has tried, its tensor is emptied; who did read it would fail on its shape. Only passes of the
    engine do this.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._handles: list[Any] = []
        for name in names:
            outer: Any = model.get_submodule(name)
            inner = next(outer.children())
            self._handles += [
                outer.register_forward_pre_hook(partial(self._note, name)),
                inner.register_forward_hook(partial(self._empty, name)),
            ]

    @staticmethod
    def _note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        held = getattr(getcurrent(), "coraq_held", None)
        if held is not None and args and isinstance(args[0], Tensor):
            held[name] = args[0]

    @staticmethod
    def _empty(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        me = getcurrent()
        held = getattr(me, "coraq_held", {}).pop(name, None)
        if held is not None and held is not me.coraq_images and held is not output:
            held.data = held.new_empty(0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def releasable_inputs(model: nn.Module, images: Tensor) -> list[str]:
    """The `nn.Sequential`s whose input nobody reads behind their first child, found by trying: see `ReleaseHooks`."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Sequential) and len(module) > 1]

    def result(of: Sequence[str]) -> list[Any] | None:
        hooks, run = ReleaseHooks(model, of), watched_pass(model, images)
        try:
            return tree_leaves(run.switch())
        except Exception:  # whatever reading an emptied tensor leads to
            return None
        finally:
            hooks.remove()

    def same(of: Sequence[str]) -> bool:
        found = result(of)
        return found is not None and all(map(torch.equal, found, expected))

    with torch.no_grad():
        expected = tree_leaves(model(images))
        if same(names):
            return names
        names = [name for name in names if same([name])]
        return names if same(names) else []


def watched_pass(model: nn.Module, images: Tensor, shared: bool = True) -> greenlet:
    """A forward pass that stops at stops, and in which `ReleaseHooks` acts; of a copy of images that are not shared."""
    run = greenlet(lambda: model(images if shared else images.clone()))
    run.coraq_seen, run.coraq_held, run.coraq_images = set(), {}, images
    return run

"""Importing torch, torchvision and timm: seconds, so whoever waits is told, and without torch's compiler."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

from rich.console import Console

COMPILER = "torch._dynamo"


def load_networks(quiet: bool = False) -> None:
    """Import what a command on networks needs, with a word on the terminal unless `quiet`."""
    if "timm" in sys.modules:
        return
    with nullcontext() if quiet else Console(stderr=True).status("loading torch and timm"):
        importlib.import_module("torch")  # where it has the compiler already, that stays
        try:
            with compiler_left_out():
                importlib.import_module("timm.data")
        except Exception:  # versions that ask more of the compiler; what fails without stand-ins, too, raises below
            importlib.import_module("timm.data")


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """While torchvision and timm are imported, stand-ins for the two functions that they want of torch's compiler.

    The compiler is 3 of 8 seconds of a command's start, and no command compiles networks. Whoever imports it
    afterwards gets the real one. For a process of our own only: functions that timm keeps from the compiler by a
    decorator (in its vision transformers) are not kept from it any more.
    """
    if COMPILER in sys.modules:
        yield
        return
    package, utils = ModuleType(COMPILER), ModuleType(f"{COMPILER}.utils")
    package.__dict__.update(__path__=[], utils=utils, disable=_undecorated)
    utils.__dict__.update(is_compile_supported=_is_compile_supported)
    stand_ins = {module.__name__: module for module in (package, utils)}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _undecorated(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """`torch._dynamo.disable`, also as a decorator with arguments, where nothing is compiled."""
    return _undecorated if function is None else function


def _is_compile_supported(device: Any) -> Any:
    """`torch._dynamo.utils.is_compile_supported`: the real one, imported when called."""
    return importlib.import_module(f"{COMPILER}.utils").is_compile_supported(device)

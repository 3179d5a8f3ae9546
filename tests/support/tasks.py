"""One factory for calibration tasks, and how a method is run on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from coraq import registry
from coraq.api import LayerView, QuantizedLayer, minmax_grid
from coraq.calibration.commit_log import CommitLog
from coraq.calibration.task import CalibrationTask
from coraq.calibration.traversal import PassSettings
from coraq.config import Scheme
from coraq.network.fold import Trace, fold
from coraq.testing import random_images, small_network

SETTINGS = {field.name for field in fields(PassSettings)}
LOG = {"done", "save", "decisions"}


def make_task(
    network: nn.Module,
    scheme: Scheme | None = None,
    batches: Sequence[Tensor] = (),
    found: Trace | None = None,
    example: Tensor | None = None,
    kind: type[CalibrationTask] = CalibrationTask,
    **more: Any,
) -> CalibrationTask:
    """A task on a network, which is folded unless `found` says what folding it has shown.

    Args:
        example: images that the network is folded with; default: the first two of the first batch.
        kind: a class that watches what a method does.
        more: fields of `PassSettings`, arguments of `CommitLog`, and arguments of `CalibrationTask`.
    """
    if found is None:
        found = fold(network, batches[0][:2] if example is None else example)
    settings = PassSettings(**{key: more.pop(key) for key in list(more) if key in SETTINGS})
    log = CommitLog(**{key: more.pop(key) for key in list(more) if key in LOG})
    more = {"find_method": registry.make, **more}
    return kind(network, found, scheme or Scheme(), batches, log=log, settings=settings, **more)


def run_method(task: CalibrationTask, method: str | type, options: dict[str, Any] | None = None) -> CalibrationTask:
    """Run a method over all layers of a task, as a command does."""
    found = registry.load(method) if isinstance(method, str) else method
    task.method = found.name
    found(registry.configure(found, options or {})).quantize(task.scoped(found))
    task.finish(found.name)
    return task


def small_task(**arguments: Any) -> CalibrationTask:
    """A task on the small network at 3 bits, with seven random images in micro-batches of three."""
    network = small_network()
    found = fold(network, random_images(2))
    batches = arguments.pop("batches", list(random_images(7, seed=1).split(3)))
    return make_task(network, arguments.pop("scheme", Scheme.of(bits=3)), batches, found=found, **arguments)


def rounded(layer: LayerView) -> QuantizedLayer:
    """A layer by round-to-nearest on its min-max grid."""
    grid = minmax_grid(layer.weight, layer.bits)
    return QuantizedLayer(grid.pack(grid.codes(layer.weight)))


def extra_bytes(layers: dict[str, QuantizedLayer], base: dict[str, QuantizedLayer]) -> int:
    """Bytes of layers beyond those of others of the same names."""
    return sum(layer.size_bytes() - base[name].size_bytes() for name, layer in layers.items())


def error_of(one: CalibrationTask) -> float:
    """Relative squared error of the student's logits on the task's own images."""
    with torch.no_grad():
        pairs = [(one.teacher(x), one.student(x)) for x in one.batches()]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)

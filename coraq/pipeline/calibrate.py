"""The method over all layers of a prepared network; its faults are named as its own."""

from __future__ import annotations

import dataclasses
import errno
import traceback
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from coraq import registry
from coraq.api import QuantizedLayer
from coraq.calibration.commit_log import CommitLog, Metrics
from coraq.calibration.task import CalibrationTask
from coraq.calibration.traversal import PassSettings
from coraq.data import Images, ImageSet, synthetic_images
from coraq.data.usable import uninformative
from coraq.errors import CoraqError, MethodError
from coraq.events import QUANTIZE, Event, LayerCommitted, Note, Sink, stage
from coraq.pipeline.budget import layers_budget
from coraq.pipeline.prepare import Prepared
from coraq.runtime.system import default_memory_bound


def calibrate(
    prepared: Prepared,
    sink: Sink,
    done: dict[str, tuple[QuantizedLayer, Metrics]] | None = None,
    save: Callable[[int, str, QuantizedLayer, Metrics], None] | None = None,
    decisions: MutableMapping[str, Any] | None = None,
) -> CalibrationTask:
    """Run the method over all layers; returns the finished task with the quantized student in it."""
    config = prepared.config
    batches = _load_batches(prepared.images.calibration, prepared.device, sink)
    wrong = uninformative(batches)
    if wrong:
        batches = _synthetic_instead(prepared, batches, wrong, sink)
    with stage(sink, QUANTIZE, len(prepared.found.order)) as quantizing:
        task = CalibrationTask(
            prepared.teacher,
            prepared.found,
            prepared.scheme,
            batches,
            config.seed,
            _with_progress(sink, quantizing),
            CommitLog(done, save, decisions),
            PassSettings(
                memory_bytes=config.calib_memory or default_memory_bound(prepared.device),
                rows_per_input=config.data.calib_rows_per_input,
                early_images=config.data.calib_early_images,
                bfloat16=config.data.calib_precision == "bfloat16",
            ),
            registry.make,
            config.coding,
        )
        task.budget_bytes = layers_budget(prepared, task)
        task.method = f"method {config.method} ({prepared.method_source})"
        try:
            prepared.method(prepared.options).quantize(task.scoped(prepared.method))
            task.finish(config.method)
        except (Exception, SystemExit) as error:
            blamed = _blamed(error, task.method, prepared.method_source)
            if blamed is error:
                raise
            raise blamed from error
        finally:
            task.close()
    passes = task.traversal.passes
    if passes > 2:  # two are a plan's: a look at all layers, then the work
        sink(Note(f"the method went back to earlier layers: {passes} calibration passes instead of one or two"))
    return task


def _load_batches(images: ImageSet, device: torch.device, sink: Sink) -> list[Tensor]:
    """The calibration images, decoded once, channels last."""
    batches: list[Tensor] = []
    with stage(sink, "read calibration images", images.count) as reading:
        seen = 0
        for pixels, _ in images.batches():
            batches.append(pixels.to(device, memory_format=torch.channels_last))
            seen += len(pixels)
            reading.advance(seen)
    if not batches:
        raise CoraqError(
            f"no image of {images.description} can be read", "Check the folder; `file` tells what they are."
        )
    return batches


def _synthetic_instead(prepared: Prepared, batches: list[Tensor], wrong: str, sink: Sink) -> list[Tensor]:
    """Synthetic images for images that say nothing: calibrated on those, a layer does worse than rounded to nearest."""
    count, (channels, height, width) = sum(map(len, batches)), batches[0].shape[1:]
    preprocess = dataclasses.replace(prepared.preprocess, input_size=(channels, height, width))
    sink(Note(f"{wrong}, which says nothing of the network's inputs: synthetic images are used instead", "warning"))
    config = prepared.config
    images = synthetic_images(count, preprocess, config.seed, config.data.batch_size)
    prepared.images = Images(images, prepared.images.evaluation)
    return _load_batches(images, prepared.device, sink)


def _with_progress(sink: Sink, quantizing: stage) -> Sink:
    def send(event: Event) -> None:
        sink(event)
        if isinstance(event, LayerCommitted):
            quantizing.advance(event.index, event.name)

    return send


def _blamed(error: BaseException, method: str, source: str) -> BaseException:
    """The error to raise for one that a method let out: a stranger's own fault is named as such, with its place."""
    ours = source == "built-in" and not isinstance(error, SystemExit)
    if ours or isinstance(error, CoraqError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1]
    return MethodError(f"{method} failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})")

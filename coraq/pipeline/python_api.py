"""`coraq.quantize` and `coraq.load`: from Python, without a run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coraq import registry
from coraq.artifact import load_checkpoint, write_checkpoint
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.data import Images, Preprocess, tensor_images
from coraq.data.usable import not_normalised
from coraq.errors import CoraqError, UsageError
from coraq.events import Note, Sink, null_sink, tee
from coraq.network.compare import first_difference
from coraq.network.fold import fold
from coraq.network.load import copy_of, load_model
from coraq.pipeline.calibrate import calibrate
from coraq.pipeline.measure import measure
from coraq.pipeline.prepare import Prepared, open_images, state_bytes, with_precision
from coraq.pipeline.run_result import Recorder, checkpoint_info, run_result
from coraq.results import RunResult

DEFAULT_METHOD: str = RunConfig.model_fields["method"].default


class Quantized(NamedTuple):
    """What `coraq.quantize` returns: the quantized module, and the result with every layer's numbers."""

    module: nn.Module
    result: RunResult


def quantize(
    model: nn.Module | str,
    method: str = DEFAULT_METHOD,
    bits: int = 4,
    data: Tensor | Iterable[Any] | None = None,
    *,
    scheme: Scheme | None = None,
    options: dict[str, Any] | None = None,
    calib_size: int = 1024,
    seed: int = 0,
    path: str | Path | None = None,
    sink: Sink = null_sink,
) -> Quantized:
    """Quantize a network from Python.

    Args:
        model: a timm module (it is left alone: a copy is quantized) or any name that `coraq quantize` takes.
        method: name of a registered method.
        bits: of the weights; ignored where `scheme` is given.
        data: calibration images: a DataLoader, an iterable of batches, or a tensor [n, channels, height, width];
            already normalised as the network expects. None: synthetic images.
        scheme: everything about the grid, instead of `bits`.
        options: the method's own.
        calib_size: at most so many images.
        path: where to write the checkpoint (`coraq.load` opens it); None writes nothing.

    Returns:
        the quantized module (dequantized weights on the grid), and the result.

    Raises:
        CoraqError: whatever a person can mend.
    """
    started = time.perf_counter()
    recorder = Recorder()
    sink = tee(sink, recorder)
    chosen, source = registry.find(method)
    config = RunConfig(
        model=model if isinstance(model, str) else type(model).__name__,
        method=method,
        options=options or {},
        scheme=scheme or Scheme.of(bits=bits),
        seed=seed,
        data=DataConfig(calib_size=calib_size),
    )
    configured = registry.configure(chosen, config.options)
    registry.import_plugins()
    float_model = load_model(config) if isinstance(model, str) else copy_of(model)
    if path is not None and not float_model.architecture:
        raise UsageError(
            "only timm networks can be written to a checkpoint", "Use the returned module, with path=None."
        )
    float_bytes = state_bytes(float_model.module)
    teacher = float_model.module.to(memory_format=torch.channels_last)
    preprocess = Preprocess.resolve(teacher, config.data)
    images = Images(tensor_images(data, limit=calib_size), None) if data is not None else None
    if images is not None:
        given = next(images.calibration.batches())[0]
        shape = given.shape[1:]
        preprocess = dataclasses.replace(preprocess, input_size=(int(shape[0]), int(shape[1]), int(shape[2])))
        warning = not_normalised(given, preprocess) if given.shape[1] == len(preprocess.mean) else None
        if warning:
            sink(Note(warning, "warning"))
    else:
        images = Images(open_images(config, preprocess, float_model, sink).calibration, None)
    example = next(images.calibration.batches(2))[0].to(next(teacher.parameters()).device)
    found = fold(teacher, example.contiguous(memory_format=torch.channels_last))
    config = with_precision(config, next(teacher.parameters()).device)
    prepared = Prepared(config, float_model, found, preprocess, images, chosen, source, configured, float_bytes)
    task = calibrate(prepared, sink)
    file_bytes = 0
    if path is not None:
        file_bytes = _write_checked(Path(path), prepared, task, example)
    measured = measure(teacher, task.student, prepared.images, prepared.device, sink)
    return Quantized(task.student, run_result(prepared, task, measured, file_bytes, recorder, started))


def _write_checked(path: Path, prepared: Prepared, task: CalibrationTask, example: Tensor) -> int:
    """Write a checkpoint, reopen it and compare it with the network, and only then give it its name.

    Raises:
        CoraqError: what the file opens as is another network; names the first module that differs.
    """
    draft = path.with_name(f".{path.name}.unchecked")
    try:
        size = write_checkpoint(draft, task.student, task.quantized, checkpoint_info(prepared, task))
        try:
            reopened = load_checkpoint(draft).module.to(example.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            differs = first_difference(task.student, reopened, example)
        except CoraqError as error:
            raise CoraqError(
                f"the network cannot be written: timm's {prepared.float_model.architecture} does not open with its "
                f"weights ({error})",
                "It was changed after timm made it. Make it with arguments of timm.create_model, or use path=None.",
            ) from error
        if differs is not None:
            raise CoraqError(
                f"the network cannot be written: it was changed after timm made it, and {differs} differs from that "
                f"of timm's {prepared.float_model.architecture}",
                "Make it with arguments of timm.create_model, or use path=None and keep the returned module.",
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return size


def load(path: str | Path) -> nn.Module:
    """The network of a checkpoint or a run folder: a timm module with dequantized weights, in eval mode.

    Raises:
        CoraqError: see `coraq.artifact.load_checkpoint`.
    """
    registry.import_plugins()
    return load_checkpoint(path).module

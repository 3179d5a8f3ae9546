"""Accuracy of a run or of an exported file, measured again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from coraq.artifact import load_checkpoint, read_result
from coraq.config import DataConfig, RunConfig
from coraq.data import Preprocess, run_images
from coraq.errors import CoraqError, UsageError
from coraq.evaluate.accuracy import evaluate_network
from coraq.evaluate.chance import top1_at_chance
from coraq.events import Note, Sink, null_sink, stage, tee
from coraq.export.export_result import FileAccuracy
from coraq.export.onnx_file import read_metadata
from coraq.export.runtimes import OnnxRuntime, RuntimeNetwork
from coraq.pipeline.measure import measure
from coraq.pipeline.prepare import import_plugins, load_float, open_images
from coraq.pipeline.run_result import Recorder
from coraq.results import RunResult
from coraq.runtime.system import machine, open_device


def evaluate_run(run_path: Path, data: DataConfig | None = None, *, sink: Sink = null_sink) -> RunResult:
    """Measure a finished run's checkpoint again, on its own evaluation images or on `data`'s.

    The float network is loaded again as the run loaded it. Nothing is written.

    Raises:
        CoraqError: the run is unfinished, damaged, or there are no evaluation images.
    """
    result = read_result(run_path)
    config = result.config if data is None else result.config.model_copy(update={"data": data})
    recorder = Recorder()
    sink = tee(sink, recorder)
    device = open_device(config.device)
    import_plugins(sink)
    with stage(sink, "load network"):
        float_model = load_float(config, device)
        teacher = float_model.module
    with stage(sink, "reload checkpoint"):
        checkpoint = load_checkpoint(run_path)
        student = checkpoint.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if data is None:
        preprocess = Preprocess.from_dict(checkpoint.info.preprocess)
    else:
        preprocess = Preprocess.resolve(teacher, config.data)
    images = open_images(config, preprocess, float_model, sink)
    measured = measure(teacher, student, images, device, sink)
    notes = [*result.notes, *recorder.notes]
    return result.model_copy(update={**vars(measured), "config": config, "machine": machine(device), "notes": notes})


def evaluate_file(path: Path, data: DataConfig | None = None, *, sink: Sink = null_sink) -> FileAccuracy:
    """Accuracy of an ONNX file that `coraq export` wrote, through ONNX Runtime.

    Args:
        data: the images; None: those of the run that the file lies in. Preprocessing is the file's own, under what
            `data` overrides.

    Raises:
        CoraqError: not coraq's file, the runtime is missing or refuses it, or there are no evaluation images.
    """
    with stage(sink, "open file"):
        runtime = OnnxRuntime(path, torch.get_num_threads())
        facts = read_metadata(runtime.metadata)
    provenance, labels = facts.get("provenance"), facts.get("labels")
    if "preprocess" not in facts or not isinstance(provenance, dict) or not isinstance(labels, list | None):
        raise CoraqError(f"{path} does not say how images are prepared", "Files that `coraq export` wrote do.")
    preprocess = Preprocess.from_dict(facts["preprocess"])
    config = None
    if data is None:
        try:
            config = read_result(path.parent).config
        except CoraqError:
            raise UsageError(f"{path} lies in no run folder", "Give the images: --data-dir FOLDER") from None
    else:
        config = RunConfig(model=str(provenance.get("model", "")), data=data)
        preprocess = _overridden(preprocess, data)
    images = run_images(config, preprocess, len(labels) if labels else None, sink).evaluation
    if images is None:
        raise UsageError("there are no images to evaluate on", "Give them: --data-dir FOLDER")
    accuracy = evaluate_network(RuntimeNetwork(runtime), images.batches(), "cpu", sink, images.count)
    warning = top1_at_chance(accuracy.top1, accuracy.num_classes) if accuracy.top1 else None
    if warning:
        sink(Note(warning.replace("float network", "file"), "warning"))
    label = str(facts.get("label", "unknown"))
    return FileAccuracy(
        path=str(path), runtime=runtime.name, label=label, evaluation_data=images.description, accuracy=accuracy
    )


def _overridden(preprocess: Preprocess, data: DataConfig) -> Preprocess:
    """A file's preprocessing under what `data` says; the size is fixed in the file."""
    if data.img_size not in (None, preprocess.input_size[-1]):
        raise UsageError(
            f"--img-size {data.img_size}: the file is for {preprocess.input_size[-1]} pixels", "Leave --img-size out."
        )
    given = {key: getattr(data, key) for key in ("crop_pct", "mean", "std", "interpolation")}
    return dataclasses.replace(preprocess, **{key: value for key, value in given.items() if value is not None})

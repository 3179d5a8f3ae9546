"""Accuracy of a run or of an exported file, measured again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from coraq.artifact import load_checkpoint, read_result
from coraq.config import DataConfig, RunConfig
from coraq.data import Images, Preprocess, open_evaluation, run_images
from coraq.errors import CoraqError, UsageError
from coraq.evaluate.accuracy import evaluate_network
from coraq.evaluate.chance import top1_at_chance
from coraq.events import Note, Sink, null_sink, stage, tee
from coraq.export.export_result import FileAccuracy
from coraq.export.onnx_file import read_metadata
from coraq.export.runtimes import OnnxRuntime, RuntimeNetwork
from coraq.network.load import names_of
from coraq.pipeline.measure import measure
from coraq.pipeline.prepare import import_plugins, load_float
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
    images = _images(config, result.config, preprocess, float_model.num_classes, float_model.label_names, sink)
    measured = measure(teacher, student, images, device, sink)
    notes = [*result.notes, *recorder.notes]
    return result.model_copy(update={**vars(measured), "config": config, "machine": machine(device), "notes": notes})


def evaluate_file(path: Path, data: DataConfig | None = None, *, sink: Sink = null_sink) -> FileAccuracy:
    """Accuracy of one file: an ONNX file that `coraq export` wrote, through ONNX Runtime, or a checkpoint of coraq's.

    Args:
        data: the images; None: those of the run that the file lies in. Preprocessing is the file's own, under what
            `data` overrides.

    Raises:
        CoraqError: not coraq's file, the runtime is missing or refuses it, or there are no evaluation images.
    """
    with stage(sink, "open file"):
        opened = _open_checkpoint(path) if path.suffix == ".safetensors" else _open_onnx(path)
    provenance, preprocess = opened.provenance, opened.preprocess
    run = run_of(path)
    if data is None:
        if run is None:
            raise UsageError(f"{path} is not in a run folder", "Give the images: --data-dir FOLDER")
        config = run
    else:
        seed = provenance.get("seed", 0)
        alone = RunConfig(model=str(provenance.get("model", "")), seed=seed if isinstance(seed, int) else 0)
        config = (run or alone).model_copy(update={"data": data})
        preprocess = _overridden(preprocess, data)
    images = _images(config, run, preprocess, opened.num_classes, opened.names, sink).evaluation
    if images is None:
        raise UsageError("there are no images to evaluate on", "Give them: --data-dir FOLDER")
    accuracy = evaluate_network(opened.network, images.batches(), "cpu", sink, images.count)
    warning = top1_at_chance(accuracy.top1, accuracy.num_classes) if accuracy.top1 else None
    if warning:
        sink(Note(warning.replace("float network", "file"), "warning"))
    return FileAccuracy(
        path=str(path), runtime=opened.runtime, label=opened.label, evaluation_data=images.counted(), accuracy=accuracy
    )


class _File(NamedTuple):
    """A file's network, and what it says about itself."""

    network: nn.Module
    runtime: str
    label: str
    preprocess: Preprocess
    provenance: dict[str, Any]
    num_classes: int
    names: list[str]


def _open_onnx(path: Path) -> _File:
    runtime = OnnxRuntime(path, torch.get_num_threads())
    facts = read_metadata(runtime.metadata)
    provenance, names = facts.get("provenance"), facts.get("labels")
    if "preprocess" not in facts or not isinstance(provenance, dict) or not isinstance(names, list | None):
        raise CoraqError(f"{path} does not say how images are prepared", "Files that `coraq export` wrote do.")
    preprocess, label = Preprocess.from_dict(facts["preprocess"]), str(facts.get("label", "unknown"))
    names = [str(name) for name in names or []]
    return _File(RuntimeNetwork(runtime), runtime.name, label, preprocess, provenance, len(names), names)


def _open_checkpoint(path: Path) -> _File:
    checkpoint = load_checkpoint(path)
    info, network = checkpoint.info, checkpoint.module.to(memory_format=torch.channels_last)
    classes = int(getattr(network, "num_classes", 0))
    preprocess, names = Preprocess.from_dict(info.preprocess), names_of(info.pretrained_cfg, classes)
    runtime = f"torch {torch.__version__}"
    return _File(network, runtime, info.scheme.describe(), preprocess, info.provenance, classes, names)


def run_of(path: Path) -> RunConfig | None:
    """The configuration of the finished run whose folder a file lies in; None if it lies in none."""
    try:
        return read_result(path.parent).config
    except CoraqError:
        return None


def _images(
    config: RunConfig,
    run: RunConfig | None,
    preprocess: Preprocess,
    num_classes: int,
    label_names: list[str],
    sink: Sink,
) -> Images:
    """The images to evaluate on: those that `config` names but for those that `run`, if known, was calibrated on."""
    named = config.data.data_dir or config.data.dataset
    if not named or (run is not None and run.data == config.data):
        return run_images(config, preprocess, num_classes or None, sink, label_names)
    calibrated = None if run is None else run.data
    images = open_evaluation(config.data, calibrated, preprocess, num_classes or None, config.seed, sink, label_names)
    return Images(images, images)


def _overridden(preprocess: Preprocess, data: DataConfig) -> Preprocess:
    """A file's preprocessing under what `data` says; the size is fixed in the file."""
    if data.img_size not in (None, preprocess.input_size[-1]):
        raise UsageError(
            f"--img-size {data.img_size}: the file is for {preprocess.input_size[-1]} pixels", "Leave --img-size out."
        )
    given = {key: getattr(data, key) for key in ("crop_pct", "mean", "std", "interpolation")}
    return dataclasses.replace(preprocess, **{key: value for key, value in given.items() if value is not None})

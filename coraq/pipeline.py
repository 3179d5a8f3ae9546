"""The flow: load → fold → calibrate and commit layer by layer → write → reload → evaluate → report.

Accuracy is measured on what was read back from disk, never on the object in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

import coraq
from coraq import registry
from coraq.api import LayerView, MethodConfig, QuantizedLayer, Quantizer
from coraq.artifact import (
    Predictions,
    RunFolder,
    load_checkpoint,
    read_result,
    weight_histogram,
    write_checkpoint,
    write_histograms,
    write_predictions,
)
from coraq.artifact import newest_run as newest_run
from coraq.artifact.checkpoint import CheckpointInfo
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core.tensors import stored_bytes
from coraq.data import Images, ImageSet, Preprocess, run_images, tensor_images
from coraq.errors import CoraqError, MethodError, UsageError
from coraq.evaluate.accuracy import FloatLogits, compare_networks, evaluate_network
from coraq.events import Event, JsonLinesSink, LayerCommitted, Note, Sink, StageFinished, null_sink, stage, tee
from coraq.export.onnx_file import read_metadata
from coraq.export.record import FileAccuracy
from coraq.export.runtimes import OnnxRuntime, RuntimeNetwork
from coraq.model.calibration import CalibrationTask, Metrics
from coraq.model.fold import Trace, fold
from coraq.model.load import FloatModel, copy_of, load_model
from coraq.plainfiles import append_traceback
from coraq.report.html import PLOTTED_LAYERS
from coraq.report.render import complete_report, write_report
from coraq.report.summary import worst_layers
from coraq.results import (
    CalibrationInfo,
    Comparison,
    CostInfo,
    LayerResult,
    RunResult,
    SizeInfo,
)
from coraq.sharing import Shared, content_of
from coraq.system import default_memory_bound, machine, open_device, peak_memory, reset_peak_memory, versions

SLOW_REPORT_S = 1.0  # rendering that takes longer is said
FIDELITY_IMAGES = 256  # without evaluation data, fidelity to the float network is measured on so many


class Plan(BaseModel):
    """What `--dry-run` shows: everything that would be done, and nothing done."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    run_dir: str
    method: str
    scheme_line: str
    calibration: str
    evaluation: str | None
    layers: list[dict[str, Any]]
    resume_at: str | None
    finished: bool
    float_bytes: int
    estimated_bytes: int


@dataclass
class _Prepared:
    """A network and its images, ready to be quantized."""

    config: RunConfig
    float_model: FloatModel
    found: Trace
    preprocess: Preprocess
    images: Images
    method: type[Quantizer]
    method_source: str
    options: MethodConfig
    float_bytes: int
    float_sha256: str | None = None
    logits: FloatLogits | None = None

    @property
    def teacher(self) -> nn.Module:
        return self.float_model.module

    @property
    def device(self) -> torch.device:
        return next(self.teacher.parameters()).device

    def folder(self, runs_dir: Path) -> RunFolder:
        """Where the run lives: a name that people can read, and a hash of all that decides the result."""
        config, calibration = self.config, self.images.calibration
        versions = {f"{name}_version": registry.load(name).version for name in self.options.bases()}
        digest = config.digest(calibration=calibration.fingerprint, method_version=self.method.version, **versions)
        name = re.sub(r"[^A-Za-z0-9._]+", "-", Path(config.model.split(":")[-1]).name or config.model)
        bits = f"w{config.scheme.bits}" + (f"a{config.scheme.act_bits}" if config.scheme.act_bits else "")
        return RunFolder(runs_dir / f"{name}-{config.method}-{bits}-{digest}")


class _Recorder:
    """Keeps what the report needs from the events: notes, and seconds by stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.message)
        elif isinstance(event, StageFinished):
            self.stages[event.stage] = self.stages.get(event.stage, 0.0) + event.time_s


def run(
    config: RunConfig,
    *,
    runs_dir: Path,
    sink: Sink = null_sink,
    force: bool = False,
    command: list[str] | None = None,
    shared: Shared | None = None,
) -> RunResult:
    """Quantize, write, reload, evaluate and report, in a run folder under `runs_dir`.

    A finished run of the same configuration is returned as it is, an unfinished one goes on at its first
    uncommitted layer; `force` starts over. Runs of one process that are given the same `shared` load, decode and
    evaluate what they have in common once.

    Raises:
        CoraqError: whatever a person can mend; other exceptions carry the run folder in `run_dir`.
    """
    started = time.perf_counter()
    reset_peak_memory()
    recorder = _Recorder()
    sink = tee(sink, recorder)
    shared = shared or Shared()
    shared.begin(sink)
    prepared = _prepare(config, sink, shared)
    content = content_of(prepared.teacher) if shared.keep_bytes is not None else None
    folder = prepared.folder(runs_dir)
    folder.open()
    try:
        if folder.finished and not force:
            sink(Note(f"{folder.path} is finished already: this is its result (--force runs it again)"))
            result = read_result(folder.path)
            complete_report(result, folder.path)
            return result
        if force:
            folder.clear()
        folder.write_config(config)
        with contextlib.closing(JsonLinesSink(folder.path / "events.jsonl")) as log:
            return _work(prepared, folder, tee(sink, log), recorder, started, command or [])
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            error.run_dir = folder.path  # type: ignore[attr-defined]
        if isinstance(error, MethodError) and error.__cause__ is not None:
            with contextlib.suppress(OSError):
                append_traceback(folder.path / "log.txt", error.__cause__)
                error.hint += f" The traceback is in {folder.path / 'log.txt'}"
        raise
    finally:
        folder.close()
        if content is not None and content_of(prepared.teacher) != content:
            shared.forget()
            sink(Note(f"method {config.method} changed the float network: it is loaded again", "warning"))


def folder_name(config: RunConfig, shared: Shared) -> str:
    """The name of the folder that `run` would use: the network is loaded and the images are opened for its hash."""
    shared.begin(null_sink)
    return _prepare(config, null_sink, shared).folder(Path()).path.name


def plan(config: RunConfig, *, runs_dir: Path, sink: Sink = null_sink) -> Plan:
    """What `run` would do. Loads and folds the network, opens the images, writes nothing."""
    shared = Shared()
    shared.begin(sink)
    prepared = _prepare(config, sink, shared)
    folder = prepared.folder(runs_dir)
    task = CalibrationTask(prepared.teacher, prepared.found, config.scheme, [], config.seed)
    views, options = task.all_layers, prepared.options
    units: dict[str, str] = {}
    if hasattr(options, "granularity"):  # a method that works on units: see coraq.api.Task.partition
        for unit in task.partition(options.granularity, getattr(options, "blocks", None)):
            units |= dict.fromkeys(unit.layers, unit.module)
    committed = folder.committed()
    waiting = [view.name for view in views if view.name not in committed]
    per_channel, zero_bytes = config.scheme.granularity == "channel", 0 if config.scheme.symmetric else 1
    codes = sum(stored_bytes(v.shape, v.bits, v.shape[0] * v.shape[1] if per_channel else 1, zero_bytes) for v in views)
    quantized = sum(v.weight.numel() for v in views)
    evaluation = prepared.images.evaluation
    return Plan(
        run_dir=str(folder.path),
        method=config.method,
        scheme_line=config.scheme.describe(),
        calibration=prepared.images.calibration.description,
        evaluation=None if evaluation is None else evaluation.description,
        layers=[v.summary() | ({"unit": units[v.name]} if units else {}) for v in views],
        resume_at=waiting[0] if committed and waiting else None,
        finished=folder.finished,
        float_bytes=prepared.float_bytes,
        estimated_bytes=codes + _state_bytes(prepared.teacher) - 4 * quantized,
    )


def _prepare(config: RunConfig, sink: Sink, shared: Shared) -> _Prepared:
    """Check everything that can be checked, the cheap things first, and load the network."""
    method, source = registry.find(config.method)
    options = registry.configure(method, config.options)
    device = open_device(config.device)
    _check_paths(config.data)
    _import_plugins(sink)
    # what decides the folded network and how its images are prepared
    own = config.model_dump_json(include={"model", "checkpoint", "num_classes", "model_kwargs", "device"})
    shape = config.data.model_dump_json(include={"img_size", "crop_pct", "mean", "std", "interpolation"})
    with stage(sink, "load network"):
        network = shared.recall("network", (own, shape), lambda sink: _load_network(config, device))
    if not network.found.order:
        raise CoraqError(f"{config.model} has no convolution or Linear layer", "There is nothing to quantize.")
    for pattern in config.scheme.unmatched(network.found.order):
        sink(Note(f"no layer matches the override {pattern!r} (--dry-run lists their names)", "warning"))
    images = shared.recall(
        "images",
        (own, config.data.model_dump_json(), config.seed),
        shared.images(lambda sink: _open_images(config, network.preprocess, network.float_model, sink)),
    )
    measured_on = images.evaluation or images.calibration
    key = (own, shape, config.data.batch_size, measured_on.fingerprint)
    logits = shared.recall("logits", key, lambda sink: FloatLogits()) if shared.keep_bytes is not None else None
    return _Prepared(
        config,
        network.float_model,
        network.found,
        network.preprocess,
        images,
        method,
        source,
        options,
        network.size_bytes,
        network.sha256,
        logits,
    )


def _import_plugins(sink: Sink) -> None:
    """Plugins may register the network's architecture; broken ones are noted."""
    for line in registry.import_plugins():
        sink(Note(line, "warning"))


class _Network(NamedTuple):
    """A float network, folded, and how its images are prepared."""

    float_model: FloatModel
    found: Trace
    preprocess: Preprocess
    size_bytes: int
    sha256: str


def _load_float(config: RunConfig, device: torch.device) -> FloatModel:
    float_model = load_model(config)
    float_model.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return float_model


def _load_network(config: RunConfig, device: torch.device) -> _Network:
    float_model = _load_float(config, device)
    size_bytes, sha256 = _state_bytes(float_model.module), _weights_sha256(float_model.module)
    preprocess = Preprocess.resolve(float_model.module, config.data)
    found = fold(float_model.module, _example(preprocess, device))
    return _Network(float_model, found, preprocess, size_bytes, sha256)


def _open_images(config: RunConfig, preprocess: Preprocess, float_model: FloatModel, sink: Sink) -> Images:
    return run_images(config, preprocess, float_model.num_classes or None, sink)


def _work(
    prepared: _Prepared, folder: RunFolder, sink: Sink, recorder: _Recorder, started: float, command: list[str]
) -> RunResult:
    config, device = prepared.config, prepared.device
    done = folder.committed()
    task = _calibrate(prepared, sink, done, folder.save_layer, folder.decisions)
    with stage(sink, "write checkpoint"):
        dtype = getattr(torch, config.float_dtype)
        file_bytes = write_checkpoint(folder.checkpoint, task.student, task.quantized, _info(prepared, task), dtype)
        folder.supersede()
    task.release()
    with stage(sink, "reload checkpoint"):
        student = load_checkpoint(folder.checkpoint).module
        student = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    choices = _Choices()
    measured = _measure(prepared.teacher, student, prepared.images, device, sink, prepared.logits, choices)
    measured_on = prepared.images.evaluation or prepared.images.calibration
    write_predictions(folder.path, choices.predictions(measured_on.fingerprint))
    result = _result(prepared, task, measured, file_bytes, recorder, started)
    # a resumed run has not seen the whole float pass, so its time says nothing
    float_pass_s = None if done else result.float_pass_s
    evaluation = prepared.images.evaluation
    about = {
        "command": command,
        "run_dir": str(folder.path),
        "float_pass_s": float_pass_s,
        "resumed_layers": len(done),
        "float_sha256": prepared.float_sha256,
        "checkpoint_sha256": hashlib.sha256(folder.checkpoint.read_bytes()).hexdigest(),
        "evaluation_fingerprint": None if evaluation is None else evaluation.fingerprint,
    }
    result = result.model_copy(update=about)
    worst = {layer.name for layer, _ in worst_layers(result, PLOTTED_LAYERS)[1]}
    views = [view for view in task.all_layers if view.name in worst]
    write_histograms(folder.path, [weight_histogram(v.name, v.weight, task.committed[v.name][0]) for v in views])
    with stage(sink, "write report") as writing:
        write_report(result, folder.path)
    if writing.time_s > SLOW_REPORT_S:
        sink(Note(f"rendering the report took {writing.time_s:.1f} s"))
    return result


def _calibrate(
    prepared: _Prepared,
    sink: Sink,
    done: dict[str, tuple[QuantizedLayer, Metrics]] | None = None,
    save: Callable[[int, str, QuantizedLayer, Metrics], None] | None = None,
    memory: MutableMapping[str, Any] | None = None,
) -> CalibrationTask:
    """Run the method over all layers; returns the finished task with the quantized student in it."""
    config = prepared.config
    batches = _load_batches(prepared.images.calibration, prepared.device, sink)
    with stage(sink, "quantize", len(prepared.found.order)) as quantizing:
        task = CalibrationTask(
            prepared.teacher,
            prepared.found,
            config.scheme,
            batches,
            config.seed,
            _with_progress(sink, quantizing),
            done,
            save,
            config.calib_memory or default_memory_bound(),
            rows_per_input=config.data.calib_rows,
            find_method=registry.make,
            memory=memory,
        )
        task.method = f"method {config.method} ({prepared.method_source})"
        try:
            prepared.method(prepared.options).quantize(task)
            task.finish(config.method)
        except (Exception, SystemExit) as error:
            blamed = _blamed(error, task.method, prepared.method_source)
            if blamed is error:
                raise
            raise blamed from error
        finally:
            task.close()
    if task.passes > 1:
        sink(Note(f"the method went back to earlier layers: {task.passes} calibration passes instead of one"))
    return task


def _blamed(error: BaseException, method: str, source: str) -> BaseException:
    """The error to raise for one that a method let out: a stranger's own fault is named as such, with its place."""
    ours = source == "built-in" and not isinstance(error, SystemExit)
    if ours or isinstance(error, CoraqError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return error
    place = traceback.extract_tb(error.__traceback__)[-1]
    return MethodError(f"{method} failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})")


def _with_progress(sink: Sink, quantizing: stage) -> Sink:
    def send(event: Event) -> None:
        sink(event)
        if isinstance(event, LayerCommitted):
            quantizing.advance(event.index, event.name)

    return send


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


@dataclass(frozen=True)
class _Measured:
    """Accuracy on evaluation images or, without any, fidelity to the float network on calibration images."""

    comparison: Comparison | None = None
    evaluation_data: str | None = None
    fidelity: Comparison | None = None
    fidelity_data: str | None = None


class _Choices:
    """Collects both networks' first choices, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        self._rows.append((expected.topk(1, dim=1).indices[:, 0], actual.topk(1, dim=1).indices[:, 0], labels))

    def predictions(self, images: str) -> Predictions:
        float_choice, quantized_choice, label = (torch.cat(column) for column in zip(*self._rows, strict=True))
        return Predictions(float_choice, quantized_choice, label, images)


def _measure(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    device: torch.device,
    sink: Sink,
    known: FloatLogits | None = None,
    on_batch: _Choices | None = None,
) -> _Measured:
    more: dict[str, Any] = {"known": known, "on_batch": on_batch}
    if images.evaluation is not None:
        evaluation = images.evaluation
        batches = _channels_last(evaluation.batches())
        comparison = compare_networks(teacher, student, batches, device, sink, evaluation.count, **more)
        return _Measured(comparison, evaluation.description)
    calibration = images.calibration
    unlabelled = ((x, torch.full_like(y, -1)) for x, y in calibration.batches())
    total = min(FIDELITY_IMAGES, calibration.count)
    limited = _channels_last(_limit(unlabelled, total))
    fidelity = compare_networks(teacher, student, limited, device, sink, total, **more)
    return _Measured(None, None, fidelity, f"{total} of the calibration images ({calibration.description})")


def _channels_last(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in batches:
        yield pixels.contiguous(memory_format=torch.channels_last), labels


def _limit(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in batches:
        yield pixels[:count], labels[:count]
        count -= len(pixels)
        if count <= 0:
            return


def evaluate_run(run_path: Path, data: DataConfig | None = None, *, sink: Sink = null_sink) -> RunResult:
    """Measure a finished run's checkpoint again, on its own evaluation images or on `data`'s.

    The float network is loaded again as the run loaded it. Nothing is written.

    Raises:
        CoraqError: the run is unfinished, damaged, or there are no evaluation images.
    """
    result = read_result(run_path)
    config = result.config if data is None else result.config.model_copy(update={"data": data})
    recorder = _Recorder()
    sink = tee(sink, recorder)
    device = open_device(config.device)
    _import_plugins(sink)
    with stage(sink, "load network"):
        float_model = _load_float(config, device)
        teacher = float_model.module
    with stage(sink, "reload checkpoint"):
        checkpoint = load_checkpoint(run_path)
        student = checkpoint.module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if data is None:
        preprocess = Preprocess.from_dict(checkpoint.info.preprocess)
    else:
        preprocess = Preprocess.resolve(teacher, config.data)
    images = _open_images(config, preprocess, float_model, sink)
    measured = _measure(teacher, student, images, device, sink)
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


class Quantized(NamedTuple):
    """What `coraq.quantize` returns: the quantized module, and the result with every layer's numbers."""

    module: nn.Module
    result: RunResult


def quantize(
    model: nn.Module | str,
    method: str = "cora",
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
    recorder = _Recorder()
    sink = tee(sink, recorder)
    chosen, source = registry.find(method)
    config = RunConfig(
        model=model if isinstance(model, str) else type(model).__name__,
        method=method,
        options=options or {},
        scheme=scheme or Scheme(bits=bits),
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
    float_bytes = _state_bytes(float_model.module)
    teacher = float_model.module.to(memory_format=torch.channels_last)
    preprocess = Preprocess.resolve(teacher, config.data)
    images = Images(tensor_images(data, limit=calib_size), None) if data is not None else None
    if images is None:
        images = Images(_open_images(config, preprocess, float_model, sink).calibration, None)
    example = next(images.calibration.batches(2))[0].to(next(teacher.parameters()).device)
    found = fold(teacher, example.contiguous(memory_format=torch.channels_last))
    prepared = _Prepared(config, float_model, found, preprocess, images, chosen, source, configured, float_bytes)
    task = _calibrate(prepared, sink)
    file_bytes = 0
    if path is not None:
        file_bytes = write_checkpoint(Path(path), task.student, task.quantized, _info(prepared, task))
    measured = _measure(teacher, task.student, images, prepared.device, sink)
    return Quantized(task.student, _result(prepared, task, measured, file_bytes, recorder, started))


def load(path: str | Path) -> nn.Module:
    """The network of a checkpoint or a run folder: a timm module with dequantized weights, in eval mode.

    Raises:
        CoraqError: see `coraq.artifact.load_checkpoint`.
    """
    registry.import_plugins()
    return load_checkpoint(path).module


def _check_paths(data: DataConfig) -> None:
    """Folders and files that are named must exist, before anything slow begins."""
    for option, path in (
        ("--data-dir", data.data_dir),
        ("--calib-dir", data.calib_dir),
        ("--class-map", data.class_map),
    ):
        if path is not None and not Path(path).exists() and not (option == "--data-dir" and data.dataset):
            raise UsageError(f"{option} {path} does not exist", "Check the path; it is relative to the current folder.")


def _example(preprocess: Preprocess, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *preprocess.input_size, generator=generator)
    return images.to(device, memory_format=torch.channels_last)


def _info(prepared: _Prepared, task: CalibrationTask) -> CheckpointInfo:
    config = prepared.config
    return CheckpointInfo(
        architecture=prepared.float_model.architecture,
        model_args=prepared.float_model.model_args,
        pretrained_cfg=prepared.float_model.pretrained_cfg,
        preprocess=prepared.preprocess.as_dict(),
        structure=prepared.found.structure,
        scheme=config.scheme,
        activations=task.activations,
        provenance={
            "coraq": coraq.__version__,
            "model": config.model,
            "method": config.method,
            "method_version": prepared.method.version,
            "options": config.options,
            "seed": config.seed,
            "calibration": prepared.images.calibration.description,
            "calibration_fingerprint": prepared.images.calibration.fingerprint,
            "versions": versions(),
        },
    )


def _result(
    prepared: _Prepared,
    task: CalibrationTask,
    measured: _Measured,
    file_bytes: int,
    recorder: _Recorder,
    started: float,
) -> RunResult:
    config, calibration = prepared.config, prepared.images.calibration
    views = task.all_layers
    return RunResult(
        coraq_version=coraq.__version__,
        command=[],
        versions=versions(),
        machine=machine(prepared.device),
        seed=config.seed,
        config=config,
        method=config.method,
        method_version=prepared.method.version,
        method_source=prepared.method_source,
        scheme_line=config.scheme.describe(),
        calibration=CalibrationInfo(
            description=calibration.description,
            count=calibration.count - len(calibration.skipped),
            fingerprint=calibration.fingerprint,
            synthetic=calibration.synthetic,
        ),
        **vars(measured),
        size=_size(task, file_bytes, prepared.float_bytes),
        cost=CostInfo(
            macs=sum(v.macs for v in views),
            bitops=sum(v.macs * task.committed[v.name][0].weight.bits * (v.act_bits or 32) for v in views),
        ),
        stages={**recorder.stages, **{f"quantize: {part}": seconds for part, seconds in task.clock.items()}},
        total_s=time.perf_counter() - started,
        float_pass_s=task.clock.get("float pass"),
        peak_memory_bytes=peak_memory(),
        memory_bound_bytes=task.memory_bytes,
        layers=[_layer_result(view, *task.committed[view.name]) for view in views],
        notes=recorder.notes,
        run_dir="",
    )


def _state_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _weights_sha256(module: nn.Module) -> str:
    """Of names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        data = value.detach().cpu().contiguous()
        digest.update(f"{key} {data.dtype} {list(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _size(task: CalibrationTask, file_bytes: int, float_bytes: int) -> SizeInfo:
    layers = task.quantized.values()
    weights = sum(layer.weight.codes.numel() for layer in layers)
    stored = sum(layer.size_bytes() for layer in layers)
    total = sum(p.numel() for p in task.teacher.parameters())
    return SizeInfo(
        float_bytes=float_bytes,
        file_bytes=file_bytes,
        effective_bits=8 * stored / weights,
        quantized_weights=weights,
        total_params=total,
        float_params=total - weights,
    )


def _layer_result(view: LayerView, layer: QuantizedLayer, numbers: Metrics) -> LayerResult:
    """The engine's own measures in their fields, whatever else the method measured under `metrics`."""
    own = {"rank", "weight_sqnr_db", "input_error", "output_error"}
    values: dict[str, Any] = {key: numbers[key] for key in own & numbers.keys()}
    return LayerResult(
        name=view.name,
        kind=view.kind,
        shape=view.shape,
        bits=layer.weight.bits,
        bytes=layer.size_bytes(),
        macs=view.macs,
        metrics={key: value for key, value in numbers.items() if key not in own},
        **values,
    )

"""One run: quantize, write, reload, evaluate and report, in a run folder that a killed run goes on in."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

import torch

from coraq.artifact import (
    RunFolder,
    load_checkpoint,
    read_result,
    weight_histogram,
    write_checkpoint,
    write_histograms,
    write_predictions,
)
from coraq.config import RunConfig
from coraq.errors import MethodError
from coraq.events import JsonLinesSink, Note, Sink, null_sink, stage, tee
from coraq.pipeline.cache import RunCache, weights_checksum
from coraq.pipeline.calibrate import calibrate
from coraq.pipeline.measure import Choices, measure
from coraq.pipeline.prepare import Prepared, prepare
from coraq.pipeline.run_result import Recorder, checkpoint_info, run_result
from coraq.report.html import PLOTTED_LAYERS
from coraq.report.render import complete_report, write_report
from coraq.report.summary import worst_layers
from coraq.results import RunResult
from coraq.runtime.memory import give_back
from coraq.runtime.safe_files import append_traceback
from coraq.runtime.system import reset_peak_memory

SLOW_REPORT_S = 1.0  # rendering that takes longer is said


def run(
    config: RunConfig,
    *,
    runs_dir: Path,
    sink: Sink = null_sink,
    force: bool = False,
    command: list[str] | None = None,
    shared: RunCache | None = None,
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
    recorder = Recorder()
    sink = tee(sink, recorder)
    shared = shared or RunCache()
    shared.begin(sink)
    prepared = prepare(config, sink, shared)
    content = weights_checksum(prepared.teacher) if shared.keep_bytes is not None else None
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
        folder.write_config(prepared.config)
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
        if content is not None and weights_checksum(prepared.teacher) != content:
            shared.forget()
            sink(Note(f"method {config.method} changed the float network, so it is loaded again", "warning"))


def folder_name(config: RunConfig, shared: RunCache) -> str:
    """The name of the folder that `run` would use: the network is loaded and the images are opened for its hash."""
    shared.begin(null_sink)
    return prepare(config, null_sink, shared).folder(Path()).path.name


def _work(
    prepared: Prepared, folder: RunFolder, sink: Sink, recorder: Recorder, started: float, command: list[str]
) -> RunResult:
    config, device = prepared.config, prepared.device
    done = folder.committed()
    task = calibrate(prepared, sink, done, folder.save_layer, folder.decisions)
    with stage(sink, "write checkpoint"):
        dtype = getattr(torch, config.float_dtype)
        file_bytes = write_checkpoint(
            folder.checkpoint, task.student, task.quantized, checkpoint_info(prepared, task), dtype
        )
        folder.supersede()
    task.release()
    give_back()  # evaluation needs little, and forks workers; the next run's bound is a share of what is free
    with stage(sink, "reload checkpoint"):
        student = load_checkpoint(folder.checkpoint).module
        student = student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    choices = Choices()
    measured = measure(prepared.teacher, student, prepared.images, device, sink, prepared.logits, choices)
    measured_on = prepared.images.evaluation or prepared.images.calibration
    write_predictions(folder.path, choices.predictions(measured_on.fingerprint))
    result = run_result(prepared, task, measured, file_bytes, recorder, started)
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

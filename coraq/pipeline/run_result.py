"""What a finished calibration says in a checkpoint's header and in metrics.json."""

from __future__ import annotations

import time
from typing import Any

import coraq
from coraq.api import LayerView, QuantizedLayer
from coraq.artifact.checkpoint import CheckpointInfo
from coraq.calibration.task import CalibrationTask, Metrics
from coraq.events import Event, Note, StageFinished
from coraq.pipeline.measure import Measured
from coraq.pipeline.prepare import Prepared
from coraq.results import CalibrationInfo, CostInfo, LayerResult, RunResult, SizeInfo
from coraq.runtime.system import machine, peak_memory, versions


class Recorder:
    """Keeps what the report needs from the events: notes, and seconds by stage."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.message)
        elif isinstance(event, StageFinished):
            self.stages[event.stage] = self.stages.get(event.stage, 0.0) + event.time_s


def checkpoint_info(prepared: Prepared, task: CalibrationTask) -> CheckpointInfo:
    """All that a checkpoint says beside its tensors."""
    config = prepared.config
    return CheckpointInfo(
        architecture=prepared.float_model.architecture,
        model_args=prepared.float_model.model_args,
        pretrained_cfg=prepared.float_model.pretrained_cfg,
        preprocess=prepared.preprocess.as_dict(),
        structure=prepared.found.structure,
        scheme=prepared.scheme,
        activations=task.activations,
        provenance={
            "coraq": coraq.__version__,
            "model": config.model,
            "method": config.method,
            "method_version": prepared.method.version,
            "options": config.options,
            "seed": config.seed,
            "calibration": prepared.images.calibration.counted(),
            "calibration_fingerprint": prepared.images.calibration.fingerprint,
            "versions": versions(),
        },
    )


def run_result(
    prepared: Prepared,
    task: CalibrationTask,
    measured: Measured,
    file_bytes: int,
    recorder: Recorder,
    started: float,
) -> RunResult:
    """All that metrics.json says but for what only a run folder has.

    Args:
        file_bytes: of the checkpoint; 0 if there is none.
        started: `time.perf_counter()` at the run's begin.
    """
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
        scheme_line=prepared.scheme.describe(
            {name: stored_bits(layer) for name, layer in task.quantized.items()}, config.budget_text
        ),
        calibration=CalibrationInfo(
            description=calibration.counted(),
            count=calibration.count - len(calibration.skipped),
            fingerprint=calibration.fingerprint,
            synthetic=calibration.synthetic,
        ),
        **vars(measured),
        size=_size(task, file_bytes, prepared.float_bytes),
        cost=_cost(task),
        stages={**recorder.stages, **{f"quantize: {part}": seconds for part, seconds in task.clock.items()}},
        total_s=time.perf_counter() - started,
        float_pass_s=task.traversal.float_pass_s,
        peak_memory_bytes=peak_memory(prepared.device),
        memory_bound_bytes=task.traversal.settings.memory_bytes,
        layers=[_layer_result(view, *task.committed[view.name]) for view in views],
        notes=recorder.notes,
        run_dir="",
    )


def stored_bits(layer: QuantizedLayer) -> float:
    """Bits that a weight of the layer takes: those of its code, or on average where codes are entropy-coded."""
    if layer.weight.coding == "packed":
        return layer.weight.bits
    return round(8 * layer.size_bytes() / max(1, layer.weight.codes.numel()), 2)


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


def _cost(task: CalibrationTask) -> CostInfo:
    views, points = task.all_layers, [point for point in task.grids.points if point.values]
    values = sum(point.values for point in points)
    return CostInfo(
        macs=sum(v.macs for v in views),
        bitops=sum(v.macs * task.committed[v.name][0].weight.bits * (v.act_bits or 32) for v in views),
        input_values=values or None,
        input_bits=sum(point.values * point.bits for point in points) / values if values else None,
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
        coding=layer.weight.coding,
        bytes=layer.size_bytes(),
        macs=view.macs,
        metrics={key: value for key, value in numbers.items() if key not in own},
        **values,
    )

"""What a run would do (`--dry-run`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from coraq.calibration.task import TENSOR_HEADER_BYTES, CalibrationTask
from coraq.config import RunConfig
from coraq.events import Sink, null_sink
from coraq.pipeline.cache import RunCache
from coraq.pipeline.prepare import prepare, state_bytes


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


def plan(config: RunConfig, *, runs_dir: Path, sink: Sink = null_sink) -> Plan:
    """What `run` would do. Loads and folds the network, opens the images, writes nothing."""
    shared = RunCache()
    shared.begin(sink)
    prepared = prepare(config, sink, shared)
    folder, scheme = prepared.folder(runs_dir), prepared.scheme
    task = CalibrationTask(prepared.teacher, prepared.found, scheme, [], config.seed)
    views, options = task.all_layers, prepared.options
    units: dict[str, str] = {}
    blocks = options.reconstruction_blocks()
    if blocks is not None:
        for block in task.partition(*blocks):
            units |= dict.fromkeys(block.layers, block.module)
    committed = folder.committed()
    waiting = [view.name for view in views if view.name not in committed]
    headers = TENSOR_HEADER_BYTES * sum(view.has_columns(scheme) for view in views)  # this estimate is of tensors
    codes = sum(task.bytes_of(view.name) for view in views) - headers
    quantized = sum(v.weight.numel() for v in views)
    evaluation = prepared.images.evaluation
    return Plan(
        run_dir=str(folder.path),
        method=config.method,
        scheme_line=scheme.describe(),
        calibration=prepared.images.calibration.description,
        evaluation=None if evaluation is None else evaluation.description,
        layers=[v.summary() | ({"unit": units[v.name]} if units else {}) for v in views],
        resume_at=waiting[0] if committed and waiting else None,
        finished=folder.finished,
        float_bytes=prepared.float_bytes,
        estimated_bytes=codes + state_bytes(prepared.teacher) - 4 * quantized,
    )

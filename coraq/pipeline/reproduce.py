"""Runs a finished run's exact configuration again, and says whether bytes and numbers agree."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import coraq
from coraq.artifact import read_result
from coraq.events import Note, Sink, null_sink
from coraq.pipeline.flow import run
from coraq.results import Difference, Reproduction, RunResult
from coraq.runtime import system

# Times, memory and places: no second run repeats them, and nothing depends on them. Notes may tell of free memory.
_OF_THE_OCCASION = {
    "command",
    "run_dir",
    "machine",
    "versions",
    "coraq_version",
    "method_source",
    "stages",
    "total_s",
    "resumed_layers",
    "float_pass_s",
    "peak_memory_bytes",
    "memory_bound_bytes",
    "notes",
}
_TIMES = {"float_s", "quantized_s"}
# Kept since reproduction exists; an older run has none to compare.
_MAY_BE_ABSENT = {"float_sha256", "checkpoint_sha256", "evaluation_fingerprint"}


def reproduce(run_path: Path, *, sink: Sink = null_sink) -> Reproduction:
    """Run again what made `run_path`, in a temporary folder, with as many threads as then.

    Raises:
        CoraqError: the run is unfinished or damaged, or its model or images are gone.
    """
    before = read_result(run_path)
    for line in _changes(before):
        sink(Note(line, "warning"))
    with tempfile.TemporaryDirectory(prefix="coraq-reproduce-") as folder, _threads(before.machine.threads):
        after = run(before.config, runs_dir=Path(folder), sink=sink)
        checkpoints = [_sha256(path / "model.safetensors") for path in (run_path, Path(after.run_dir))]
    differences = list(_differences(_numbers(before), _numbers(after)))
    return Reproduction(
        run_dir=str(run_path),
        same_checkpoint=checkpoints[0] == checkpoints[1],
        checkpoint_sha256=checkpoints[0],
        again_sha256=checkpoints[1] or "",
        differences=differences,
        changed=_changes(before),
    )


def _changes(before: RunResult) -> list[str]:
    """What is not as it was then, and may explain a difference."""
    now = {**system.versions(), "coraq": coraq.__version__}
    then = {**before.versions, "coraq": before.coraq_version}
    lines = [
        f"{name} was {then.get(name, 'absent')}, is {number}"
        for name, number in now.items()
        if then.get(name) != number
    ]
    machine = system.machine(before.config.device)
    if machine.cpu != before.machine.cpu:
        lines.append(f"the processor was {before.machine.cpu}, is {machine.cpu}")
    if machine.device != before.machine.device:
        lines.append(f"the device was {before.machine.device}, is {machine.device}")
    return lines


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the run had: another number changes the last bits of sums."""
    own = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _numbers(result: RunResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(result.model_dump_json(exclude=_OF_THE_OCCASION))
    return content


def _differences(before: Any, after: Any, place: str = "") -> Iterator[Difference]:
    """Every value that differs, by its place in metrics.json ("layers.3.output_error")."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if key in _TIMES or (key in _MAY_BE_ABSENT and before.get(key) is None):
                continue
            yield from _differences(before.get(key), after.get(key), f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _differences(one, other, f"{place}.{index}")
    elif before != after:
        yield Difference(place=place, before=json.dumps(before), after=json.dumps(after))

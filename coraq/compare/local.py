"""One cell after another, in this process, which loads what they share once."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

from coraq import pipeline
from coraq.compare.grid import Cell
from coraq.compare.run import Outcome, reason_of
from coraq.errors import CoraqError
from coraq.events import Event, Note, Sink, tee
from coraq.pipeline.cache import RunCache
from coraq.runtime import system
from coraq.runtime.safe_files import append_traceback


class LocalEngine:
    """Runs cells in order, in this process."""

    name = "local"

    def run(
        self, cells: Sequence[Cell], commands: Sequence[list[str]], *, runs_dir: Path, sink: Sink, force: bool
    ) -> Generator[tuple[int, Outcome]]:
        # an eighth of the free memory for each of the two sets: the bound on activations is half of what then is free
        shared = RunCache(keep_bytes=system.default_memory_bound() // 4)
        for index, (cell, command) in enumerate(zip(cells, commands, strict=True)):
            yield index, run_cell(cell, command, runs_dir=runs_dir, sink=sink, force=force, shared=shared)


def run_cell(
    cell: Cell, command: list[str], *, runs_dir: Path, sink: Sink, force: bool, shared: RunCache | None = None
) -> Outcome:
    """One cell; whatever it raises but an interrupt becomes its row's reason."""
    worked = _Worked()
    try:
        result = pipeline.run(
            cell.config, runs_dir=runs_dir, sink=tee(sink, worked), force=force, command=command, shared=shared
        )
    except Exception as error:  # a grid goes on where a single run would end: this is its edge
        reason, hint = reason_of(error)
        if not isinstance(error, CoraqError):  # whose message says all, or where more of it is
            _log(error)
        sink(Note(f"{cell.name} failed: {reason}", "warning"))
        return Outcome(reason=reason, hint=hint)
    return Outcome(result, reused=not worked.any)


class _Worked:
    """Whether a run did something: a finished one is returned before it reads its calibration images."""

    any = False

    def __call__(self, event: Event) -> None:
        self.any = self.any or getattr(event, "stage", "") == "write checkpoint"


def _log(error: Exception) -> None:
    run_dir = getattr(error, "run_dir", None)
    if run_dir is not None:
        with contextlib.suppress(OSError):
            append_traceback(Path(run_dir) / "log.txt", error)

"""Runs a grid on an engine and says what it found."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import coraq
from coraq.compare.grid import Cell
from coraq.compare.ranking import groups_of
from coraq.config import RunConfig
from coraq.errors import CoraqError, exception_text
from coraq.events import Sink, null_sink, stage
from coraq.results import CellResult, CompareResult, RunResult
from coraq.runtime import system


@dataclass(frozen=True)
class Outcome:
    """What became of one cell: a result, or the reason why there is none."""

    result: RunResult | None = None
    reason: str | None = None
    hint: str = ""
    reused: bool = False


class Engine(Protocol):
    """Where cells run. `name` says it in the report."""

    name: str

    def run(
        self, cells: Sequence[Cell], commands: Sequence[list[str]], *, runs_dir: Path, sink: Sink, force: bool
    ) -> Generator[tuple[int, Outcome]]:
        """Run the cells; yields number and outcome of each as it ends, in any order.

        A failing cell must not stop the others. Leaving the iterator early (an interrupt) cancels what runs;
        finished cells keep their folders.
        """


def compare(
    cells: Sequence[Cell],
    engine: Engine,
    *,
    runs_dir: Path,
    command_of: Callable[[RunConfig], list[str]],
    command: Sequence[str] = (),
    base: str | None = None,
    sink: Sink = null_sink,
    force: bool = False,
) -> CompareResult:
    """Run the cells that are not finished yet, and rank all.

    Args:
        command_of: the command line that runs one cell by itself; it stands in the cell's report.
        command: the comparison's own command line.
        base: the run that model, bits and data were taken from.

    Raises:
        CoraqError: the engine cannot be started. A cell that fails is a row with its reason.
    """
    started = time.perf_counter()
    commands = [command_of(cell.config) for cell in cells]
    outcomes: dict[int, Outcome] = {}
    with stage(sink, "compare", len(cells)) as comparing:
        running = engine.run(cells, commands, runs_dir=runs_dir, sink=sink, force=force)
        with contextlib.closing(running):
            for index, outcome in running:
                outcomes[index] = outcome
                comparing.advance(len(outcomes), cells[index].name)
    rows = [_row(cell, outcomes[index], commands[index]) for index, cell in enumerate(cells)]
    results = [outcome.result for _, outcome in sorted(outcomes.items()) if outcome.result is not None]
    first = results[0] if results else None
    return CompareResult(
        coraq_version=coraq.__version__,
        command=list(command),
        versions=system.versions(),
        machine=first.machine if first else system.machine(cells[0].config.device),
        engine=engine.name,
        base=base,
        scheme_line=cells[0].config.scheme.describe(),
        calibration=first.calibration.description if first else None,
        evaluation=(first.evaluation_data or first.fidelity_data) if first else None,
        cells=rows,
        groups=groups_of(rows),
        total_s=time.perf_counter() - started,
        ran_s=sum(row.total_s or 0 for row in rows if not row.reused),
        folder=str(runs_dir / f"compare-{_digest(cells)}"),
    )


def _digest(cells: Sequence[Cell]) -> str:
    """Six hex digits over all cells' configurations, failed ones included: the same grid has the same folder."""
    lines = [f"{cell.variant.label} {cell.config.digest()}\n" for cell in cells]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:6]


def _row(cell: Cell, outcome: Outcome, command: list[str]) -> CellResult:
    about = CellResult(
        model=cell.config.model,
        label=cell.variant.label,
        bits=cell.config.scheme.weights.bits,
        seed=cell.config.seed,
        command=command,
        reason=outcome.reason,
        hint=outcome.hint or None,
        reused=outcome.reused,
    )
    result = outcome.result
    if result is None:
        return about.model_copy(update={"reason": outcome.reason or "it did not run"})
    return about.model_copy(
        update={
            "run_dir": result.run_dir,
            "file_bytes": result.size.file_bytes,
            "float_bytes": result.size.float_bytes,
            "effective_bits": result.size.effective_bits,
            "comparison": result.best_comparison,
            "labelled": result.comparison is not None and result.comparison.labelled,
            "layer_errors": {x.name: x.output_error for x in result.layers if x.output_error is not None},
            "total_s": result.total_s,
            "resumed_layers": result.resumed_layers,
            "peak_memory_bytes": result.peak_memory_bytes,
        }
    )


def reason_of(error: BaseException) -> tuple[str, str]:
    """What a failed cell's row says, and what to do next; the traceback goes to the run's log by itself."""
    if isinstance(error, CoraqError):
        return error.message, error.hint
    run_dir = getattr(error, "run_dir", None)
    return exception_text(error), f"the traceback is in {Path(run_dir) / 'log.txt'}" if run_dir else ""

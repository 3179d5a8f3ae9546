"""Progress on stderr, drawn from events: bars on a terminal, a few plain lines in a log.

On a terminal a stage gets a bar once it has run for two seconds, with the current layer and the time left.
Elsewhere it gets a line when it starts, and then one at most every ten seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from coraq.events import (
    QUANTIZE,
    Event,
    LayerCommitted,
    Note,
    Sink,
    StageAdvanced,
    StageFinished,
    StageStarted,
    null_sink,
)
from coraq.report.summary import number_text, time_text

SHOWN_AFTER_S = 2.0
LINE_EVERY_S = 10.0


@contextmanager
def progress(quiet: bool, verbose: bool) -> Iterator[Sink]:
    """A sink that draws on stderr while the context lasts; silent with `quiet`."""
    if quiet:
        yield null_sink
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield PlainProgress(lambda line: print(line, file=sys.stderr, flush=True), verbose)
        return
    bars = _Bars(console)
    with bars:
        yield BarProgress(bars, verbose)


def layer_line(event: LayerCommitted) -> str:
    """One line for one layer: place, name, measures."""
    measures = [f"{key} {number_text(value)}" for key, value in event.metrics.items()]
    details = ", ".join([*(["done before"] if event.resumed else []), *measures])
    return f"  {event.index}/{event.total} {event.name}  {details}".rstrip()


class PlainProgress:
    """Lines for logs. `clock` gives seconds; tests replace it."""

    def __init__(
        self, write: Callable[[str], None], verbose: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._verbose, self._clock = write, verbose, clock
        self._stages: dict[str, tuple[float, int]] = {}  # running stages, innermost last: start, total
        self._last_line = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._stages[event.stage] = (self._clock(), event.total)
            self._line(f"{event.stage} ..." if not event.total else f"{event.stage} ({event.total}) ...")
        elif isinstance(event, StageAdvanced) and event.stage in self._stages:
            self._step(event.stage, event.done, self._stages[event.stage][1], event.detail)
        elif isinstance(event, StageFinished):
            self._stages.pop(event.stage, None)
            if QUANTIZE in self._stages:  # no layer took the time of a stage within, such as a look at all layers
                start, total = self._stages[QUANTIZE]
                self._stages[QUANTIZE] = (start + event.time_s, total)
            if event.time_s >= SHOWN_AFTER_S:
                self._line(f"{event.stage}: done in {time_text(event.time_s)}")
        elif isinstance(event, LayerCommitted):
            if self._verbose:
                self._line(layer_line(event))
            elif self._stages:
                self._step(next(reversed(self._stages)), event.index, event.total, event.name)
        elif isinstance(event, Note) and (self._verbose or event.level == "warning"):
            self._line(f"{event.level}: {event.message}")

    def _step(self, stage: str, done: int, total: int, detail: str) -> None:
        now = self._clock()
        if now - self._last_line < LINE_EVERY_S:
            return
        start, _ = self._stages[stage]
        left = ""
        if total and done:
            left = f", about {time_text((now - start) / done * max(total - done, 0))} left"
        self._line(f"{stage}: {done}/{total or '?'}{' ' + detail if detail else ''}{left}")

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        self._write(text)


class _Bars(Progress):
    """Rich's progress display that hides tasks of less than two seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn(
                "{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            console=console,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        shown: list[Task] = [task for task in self.tasks if (task.elapsed or 0.0) >= SHOWN_AFTER_S]
        yield self.make_tasks_table(shown)


class BarProgress:
    """Bars for terminals."""

    def __init__(self, bars: Progress, verbose: bool) -> None:
        self._bars, self._verbose = bars, verbose
        self._stages: dict[str, TaskID] = {}  # running stages, innermost last
        self._totals: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self._stages[event.stage] = self._bars.add_task(event.stage, total=event.total or None, detail="")
            self._totals[event.stage] = event.total
        elif isinstance(event, StageAdvanced) and event.stage in self._stages:
            self._bars.update(self._stages[event.stage], completed=event.done, detail=event.detail)
        elif isinstance(event, StageFinished) and event.stage in self._stages:
            self._finish(self._stages.pop(event.stage), event.time_s)
        elif isinstance(event, LayerCommitted):
            self._advance_layers(event)
            if self._verbose:
                self._bars.console.print(Text(layer_line(event)))
        elif isinstance(event, Note) and (self._verbose or event.level == "warning"):
            self._bars.console.print(Text(f"{event.level}: {event.message}"))

    def _advance_layers(self, event: LayerCommitted) -> None:
        if not self._stages:
            return
        stage, task = next(reversed(self._stages.items()))
        if self._totals[stage] in (0, event.total):  # the stage counts layers, or nothing
            self._bars.update(task, total=event.total, completed=event.index, detail=event.name)
        else:
            self._bars.update(task, detail=event.name)

    def _finish(self, task: TaskID, time_s: float) -> None:
        if time_s < SHOWN_AFTER_S:
            self._bars.remove_task(task)
            return
        row = next(row for row in self._bars.tasks if row.id == task)
        total = row.total or row.completed or 1
        self._bars.update(task, total=total, completed=total, detail="")

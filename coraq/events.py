"""Typed progress events, and the sinks that take them.

Library code never prints: it sends an `Event` to a `Sink`. The command line draws progress bars from
them, the run folder keeps them as JSON lines, and tests collect them in a list.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from coraq.errors import disk_error
from coraq.runtime.safe_files import append_plain

T = TypeVar("T")
QUANTIZE = "quantize"  # the stage that counts layers


@dataclasses.dataclass(frozen=True)
class Event:
    """Base of all events."""

    @property
    def kind(self) -> str:
        return type(self).__name__

    def as_dict(self) -> dict[str, object]:
        return {"event": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class StageStarted(Event):
    """A stage of the flow begins; `total` counts its steps, 0 where that is not known."""

    stage: str
    total: int = 0


@dataclasses.dataclass(frozen=True)
class StageAdvanced(Event):
    """`done` steps of the stage are finished; `detail` names the current item (a layer, a file)."""

    stage: str
    done: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class StageFinished(Event):
    """A stage ended after `time_s` seconds."""

    stage: str
    time_s: float


@dataclasses.dataclass(frozen=True)
class LayerCommitted(Event):
    """A layer got its final codes; `metrics` are the numbers that the method and the engine measured."""

    name: str
    index: int
    total: int
    metrics: dict[str, float | int | str]
    resumed: bool = False


@dataclasses.dataclass(frozen=True)
class Metric(Event):
    """A scalar that a method logs while it works (a loss, a budget)."""

    name: str
    value: float
    step: int


@dataclasses.dataclass(frozen=True)
class Note(Event):
    """Something a person should know: a fallback taken, an image skipped. Goes into the report.

    `level` is "info" or "warning".
    """

    message: str
    level: str = "info"


Sink = Callable[[Event], None]


def null_sink(event: Event) -> None:
    """Drop the event."""


class ListSink:
    """Keep events in `events`, for tests and for the report."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)


class JsonLinesSink:
    """Append each event, with a time stamp in seconds since the epoch, to a file of JSON lines.

    Raises:
        CoraqError: no room on the disk, or no permission.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = append_plain(path)  # unbuffered: what a full disk refused must not come up again
        except OSError as error:
            raise disk_error(path, error) from error

    def __call__(self, event: Event) -> None:
        if isinstance(event, StageAdvanced):  # too many to keep; they carry no result
            return
        line = json.dumps({"time": round(time.time(), 3), **event.as_dict()}) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            raise disk_error(self._path, error, len(line)) from error

    def close(self) -> None:
        self._file.close()


def tee(*sinks: Sink) -> Sink:
    """A sink that hands each event to all of `sinks`."""

    def send(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return send


class stage:
    """Context manager around a stage: sends its start and its end with the time it took."""

    def __init__(self, sink: Sink, name: str, total: int = 0) -> None:
        self.sink, self.name, self.total, self.time_s = sink, name, total, 0.0

    def __enter__(self) -> stage:
        self._start = time.perf_counter()
        self.sink(StageStarted(self.name, self.total))
        return self

    def advance(self, done: int, detail: str = "") -> None:
        self.sink(StageAdvanced(self.name, done, detail))

    def __exit__(self, kind: object, *exc: object) -> None:
        self.time_s = time.perf_counter() - self._start
        if kind is None:  # a stage that was interrupted has not finished
            self.sink(StageFinished(self.name, self.time_s))


def track(sink: Sink, name: str, items: Iterable[T], total: int = 0) -> Iterator[T]:
    """Yield `items` while sending the events of a stage named `name`."""
    with stage(sink, name, total) as current:
        for done, item in enumerate(items, 1):
            yield item
            current.advance(done)

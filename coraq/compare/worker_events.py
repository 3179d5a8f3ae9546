"""Where workers leave their events for the driver of a cluster.

The actor that holds it imports this module alone, and neither torch nor the networks: it is there in a second, while
workers that are busy already wait for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from coraq.events import Event


@dataclass(frozen=True)
class WorkerStarted(Event):
    """A worker took a cell. A second one for the same cell: the first worker was lost."""

    host: str
    pid: int


class EventQueue:
    """Becomes an actor: events wait here until the driver fetches them."""

    def __init__(self) -> None:
        self._events: list[tuple[int, Event]] = []

    def put(self, index: int, event: Event) -> None:
        self._events.append((index, event))

    def take(self) -> list[tuple[int, Event]]:
        events, self._events = self._events, []
        return events

"""When which micro-batches take part in a pass: all at the narrow layers, fewer where activations are largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from coraq.core.subsets import spread_out, spread_subset


class Schedule(NamedTuple):
    """When which micro-batches take part.

    Attributes:
        order: of the micro-batches that take part. Spread over all if some join late, or never: images may come sorted.
        present: stop → how many of these are there, in execution order. All are at the last.
        live: stop → bytes that one micro-batch keeps alive there.
    """

    order: list[int]
    present: dict[str, int]
    live: dict[str, int]

    @property
    def bytes_needed(self) -> int:
        """Live activations of one stream at its widest."""
        return max((count * self.live[stop] for stop, count in self.present.items()), default=0)

    @classmethod
    def plan(cls, live: Mapping[str, int], sizes: Sequence[int], early: int = 0) -> Schedule:
        """The others join as soon as all that are there take no more memory than the early ones at their widest.

        Args:
            live: stop → bytes that one micro-batch keeps alive there, in execution order.
            sizes: images in each micro-batch.
            early: images that are there from the start, at least; 0: all.
        """
        every = len(sizes)
        count = len(spread_subset(sizes, early)) if early else every
        room, widest, present = count * max(live.values(), default=0), 0, dict[str, int]()
        for stop, size in reversed(list(live.items())):
            widest = max(widest, size)
            present[stop] = min(every, room // max(1, widest)) if present else every
        late = any(there < every for there in present.values())
        return cls(spread_out(every) if late else list(range(every)), dict(reversed(present.items())), dict(live))

    def limited(self, order: list[int]) -> Schedule:
        """The same with these micro-batches alone."""
        present = {stop: min(there, len(order)) for stop, there in self.present.items()}
        return Schedule(order, present, self.live)

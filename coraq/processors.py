"""How this process shares the processors with others."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/cpu.max")


def processors() -> int:
    """Processors that this process may use: those that it may run on, and no more than a container's share of time."""
    count = _runnable()
    with contextlib.suppress(OSError, ValueError):  # "max 100000", or microseconds in a period: "200000 100000"
        quota, period = map(int, CGROUP.read_text().split())
        count = min(count, max(1, -(-quota // period)))
    return count


def share_processors() -> None:
    """Let threads that wait for each other leave the processor, and have no more of them than there is time for.

    By default they burn it: on two cores, one of which another program had, the demo took 3 min 40 s instead of 19 s.
    And a container's share of time does not show in the processors that torch counts when it starts threads. What the
    user's environment says stands. For a process that is coraq's own: call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if processors() < _runnable():
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))


def _runnable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""How this process shares the processors with others."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
QUOTAS = ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")  # of version 2 and of version 1


def processors() -> int:
    """Processors that this process may use: those that it may run on, and no more than a container's share of time."""
    count = _runnable()
    for names in QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # "max 100000", or microseconds in a period: "200000 100000"
            quota, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            if quota > 0 < period:  # -1: no limit
                count = min(count, max(1, -(-quota // period)))
    return count


def share_processors() -> None:
    """Let threads that wait for each other leave the processor soon, and have no more of them than there is time for.

    GNU's OpenMP, which torch comes with, has them burn it. On two cores, one of which four other programs shared, the
    demo took 235 s to calibrate, and 6.3 s with 1,000 turns of waiting; beside one program 10.0 and 5.7 s. With both
    cores free it is 3.4 and 4.0 s, the price (`examples/benchmarks/busy.py`). To leave at once costs more
    (OMP_WAIT_POLICY=PASSIVE): waking a thread takes longer than a small layer.

    A container's share of time does not show in the processors that torch counts when it starts threads. What the
    user's environment says stands. For a process that is coraq's own: call it before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    count = processors()
    if count < _runnable():
        os.environ.setdefault("OMP_NUM_THREADS", str(count))


def _runnable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

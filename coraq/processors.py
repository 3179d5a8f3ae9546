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
    """Let threads that wait for each other leave the processor soon, and have no more of them than there is time for.

    GNU's OpenMP, which torch comes with, has them burn it: on two cores, one of which another program had, `quantize
    demo` took 3 min 41 s. With 1,000 turns of waiting its calibration takes 5.3 s there, and 3.5 s where both cores are
    free (3.2 s without this). To leave at once (OMP_WAIT_POLICY=PASSIVE) costs 4.8 s on free cores: waking a thread
    takes longer than a small layer.

    A container's share of time does not show in the processors that torch counts when it starts threads. What the
    user's environment says stands. For a process that is coraq's own: call it before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if processors() < _runnable():
        os.environ.setdefault("OMP_NUM_THREADS", str(processors()))


def _runnable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Where a run runs: its memory, its device, and the versions that a result may depend on."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path

import timm
import torch

from coraq.errors import UsageError
from coraq.results import MachineInfo
from coraq.runtime.processors import CGROUP

# limit and use, of version 2 and of version 1
CGROUP_MEMORY = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def default_memory_bound(device: torch.device | str = "cpu") -> int:
    """Half of the memory that is free, in bytes: a CUDA device's own, else the host's.

    Of the host's, a container's limit and the process's own (ulimit -v) count.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return max(int(torch.cuda.mem_get_info(device)[0]) // 2, 64 << 20)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    for limited, used in CGROUP_MEMORY:
        with contextlib.suppress(OSError, ValueError):  # "max", or bytes; version 1 has a huge number for no limit
            limit = int((CGROUP / limited).read_text())
            free = min(free, limit - int((CGROUP / used).read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free = min(free, limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(free // 2, 64 << 20)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Most bytes that were in use since `reset_peak_memory`, or where that cannot be had ever: on a CUDA device those
    of its tensors, else this process's resident size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let the peak start again at what is in use now, so that a run's peak is its own (the host's: Linux only)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def open_device(name: str) -> torch.device:
    """The device of that name, which works; UsageError if it does not."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}", "Use --device cpu.") from None
    return device


def versions() -> dict[str, str]:
    """What a result may depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}


def machine(device: torch.device | str) -> MachineInfo:
    """Where this process runs."""
    device = torch.device(device)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return MachineInfo(cpu=cpu, threads=torch.get_num_threads(), device=name)

"""Freed memory stays with the process while it calibrates, and goes back to the system afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os
from pathlib import Path
from coraq.runtime.memory import give_back, reuse_freed_memory
reuse_freed_memory()
import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

start = resident()
held = [torch.ones(2**21) for _ in range(32)]  # 8 MiB each
last = torch.ones(2**18)  # above them in the heap, so that its end cannot simply move down
full = resident() - start
del held
kept = resident() - start
give_back()
print(full, kept, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these choices")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    full, kept, left = map(float, done.stdout.split())
    assert full > 250
    assert kept > 0.9 * full
    assert left < 0.1 * full

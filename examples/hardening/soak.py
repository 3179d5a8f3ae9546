"""Repeats `coraq compare` over the demo in one process, and watches memory, descriptors, threads and temporary files.

    python examples/hardening/soak.py --minutes 60 [--methods rtn,comq,cora] [--warm 5]

Every round is a fresh grid in a folder of its own, which is deleted. The first rounds are warm-up (caches of torch, of
matplotlib, of compiled kernels). After them, resident memory may grow by `--most-mb` in all, and by a slope over
rounds that is told; descriptors, threads and temporary files may not grow at all. Exit code 1 if something grows.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from coraq.cli.app import run


@dataclass(frozen=True)
class Reading:
    """What the process holds after a round."""

    rss_mb: float
    descriptors: int
    threads: int
    temporary: int
    seconds: float


def reading(folder: Path, seconds: float) -> Reading:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Reading(
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        sum(1 for _ in folder.rglob("*")),
        seconds,
    )


def one_round(number: int, methods: str, runs: Path) -> None:
    grid = ["compare", "demo", "--methods", methods, "--bits", "4,3", "--seeds", str(number), "--output", str(runs)]
    with contextlib.redirect_stdout(io.StringIO()):
        code = run([*grid, "--calib-size", "64", "--eval-size", "100", "-j", "0", "-q", "--json"])
    if code:
        raise SystemExit(f"round {number}: exit code {code}")
    shutil.rmtree(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--methods", default="rtn,comq,cora")
    parser.add_argument("--warm", type=int, default=5, help="rounds before the watch begins")
    parser.add_argument("--most-mb", type=float, default=50.0, help="growth of resident memory that is allowed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    readings: list[Reading] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coraq-soak-") as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        tempfile.tempdir = str(temporary)  # whatever is forgotten is found here
        while time.monotonic() - started < 60 * arguments.minutes or len(readings) < arguments.warm + 3:
            begun = time.monotonic()
            one_round(len(readings), arguments.methods, Path(folder) / "runs")
            readings.append(reading(temporary, time.monotonic() - begun))
            print(f"round {len(readings)}: {readings[-1]}", file=sys.stderr)
        tempfile.tempdir = None
    watched = readings[arguments.warm :]
    first, last = watched[0], watched[-1]
    rounds = list(range(len(watched)))
    slope = statistics.linear_regression(rounds, [one.rss_mb for one in watched]).slope
    print("| | after warm-up | at the end | most |\n|---|--:|--:|--:|")
    for name in ("rss_mb", "descriptors", "threads", "temporary"):
        values = [getattr(one, name) for one in watched]
        print(f"| {name} | {values[0]:.0f} | {values[-1]:.0f} | {max(values):.0f} |")
    cells = 2 * len(arguments.methods.split(","))
    print(f"\n{len(readings)} rounds of {cells} cells in {(time.monotonic() - started) / 60:.1f} min, ", end="")
    print(f"{arguments.warm} of them warm-up; resident memory {slope:+.3f} MB a round.")
    grown = [name for name in ("descriptors", "threads", "temporary") if getattr(last, name) > getattr(first, name)]
    grown += ["rss_mb"] if last.rss_mb > first.rss_mb + arguments.most_mb else []
    if grown:
        print(f"GROWN: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())

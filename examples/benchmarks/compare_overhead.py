"""Wall time of `coraq compare` over the sum of the single `coraq quantize` runs of its cells.

    python examples/benchmarks/compare_overhead.py [--methods rtn,comq] [--bits 4,3,2] [--repeat 2] [MODEL and options]

Each cell is run once by itself, as a process of its own, then all by one comparison, into two folders; then it is
checked that both wrote the same checkpoints. Two sums are given: of whole processes (with Python's imports), and of
the times that the runs themselves report (`total_s`, without imports and without rendering the report). The goal is a
comparison of at most 1.05 times the first sum; the stricter second ratio is printed beside it. With --engine ray, the
comparison runs on a Ray cluster of this machine; its cells have --cell-cpus threads, so set OMP_NUM_THREADS to the same
number for the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GOAL = 1.05


def timed(line: list[str]) -> tuple[float, dict[str, Any]]:
    """Wall seconds of one command, and the JSON object that it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "coraq", *line, "--json", "-q"], stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - start, json.loads(done.stdout)


def checkpoints(folder: Path) -> dict[str, str]:
    """Digest of each run's checkpoint."""
    found = folder.glob("*/model.safetensors")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="rtn,comq")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--repeat", type=int, default=2, help="the smallest time of so many is taken")
    parser.add_argument("--engine", default="local")
    parser.add_argument("--cell-cpus", default=None)
    arguments, shared = parser.parse_known_args()
    shared = shared or ["demo"]
    grid = [(method, bits) for bits in arguments.bits.split(",") for method in arguments.methods.split(",")]
    engine = ["--engine", arguments.engine]
    if arguments.cell_cpus is not None:
        engine += ["--cell-cpus", arguments.cell_cpus]
    processes, reported, together = [], [], []
    for _ in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as folder:
            alone, compared = Path(folder) / "alone", Path(folder) / "compared"
            singles = [
                timed(["quantize", *shared, "--method", method, "--bits", bits, "--output", str(alone)])
                for method, bits in grid
            ]
            processes.append(sum(wall for wall, _ in singles))
            reported.append(sum(result["total_s"] for _, result in singles))
            methods = ["--methods", arguments.methods, "--bits", arguments.bits]
            wall, _ = timed(["compare", *shared, *methods, *engine, "--output", str(compared)])
            together.append(wall)
            same = checkpoints(alone) == checkpoints(compared)
            print(
                f"{len(grid)} cells: single processes {processes[-1]:.1f} s (of which runs {reported[-1]:.1f} s), "
                f"compare {wall:.1f} s, checkpoints {'the same' if same else 'DIFFER'}",
                flush=True,
            )
            if not same and arguments.engine == "local":
                return 1
    ratio = min(together) / min(processes)
    print(f"compare / sum of single processes = {ratio:.3f} (goal: at most {GOAL})")
    print(f"compare / sum of the runs' own times = {min(together) / min(reported):.3f}")
    print(f"cells: {shlex.join([*shared, '--methods', arguments.methods, '--bits', arguments.bits])}")
    return 0 if ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

"""The demo beside programs that keep one core busy: as coraq has its threads wait, and as GNU's OpenMP has them.

    python examples/benchmarks/busy.py --rivals 0,1,4

Prints, for each number of rivals, the seconds of `quantize` (calibration alone; importing is left out) with
GOMP_SPINCOUNT as coraq sets it and with the 300,000 that libgomp takes by itself. Linux; as many threads as cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from coraq.artifact import read_result

OWN = "300000"  # libgomp's, where neither OMP_WAIT_POLICY nor GOMP_SPINCOUNT is set


def seconds(**setting: str) -> float:
    """Of the stage `quantize` of one run of the demo."""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in waiting} | setting
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coraq", "quantize", "demo", "-q", "--output", folder]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return read_result(next(Path(folder).iterdir())).stages["quantize"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", default="0,1,4", help="numbers of programs on one core")
    cores = os.sched_getaffinity(0)
    for count in map(int, parser.parse_args().rivals.split(",")):
        rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            for rival in rivals:
                os.sched_setaffinity(rival.pid, {min(cores)})
            ours, own = seconds(), seconds(GOMP_SPINCOUNT=OWN)
        finally:
            for rival in rivals:
                rival.kill()
                rival.wait()
        print(f"{count} rivals on one of {len(cores)} cores: {ours:.1f} s, libgomp's own {own:.1f} s", flush=True)


if __name__ == "__main__":
    main()

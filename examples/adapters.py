"""Do low-rank adapters pay at equal bytes? Networks × bits × methods, by one `coraq compare` for each network.

    python examples/adapters.py [--assets ../shared/assets] [--networks a,b] [--bits 4,3,2] [--calib-size 256]

Two groups of rows share their bytes: those of uniform codes (rtn, comq, cora), and 0.05 bytes a weight more (`more`),
spent on adapters in closed form (qera, cora with spend=ranks), on adapters of searched ranks (`--search STEPS`), on
more bits for the most sensitive layers without adapters (the control), or on whichever saves more (cora). Finished
cells are reused. Results: examples/results/adapters/NETWORK.csv and examples/results/adapters.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy import NETWORKS, RESULTS

SAME = ["rtn", "comq", "cora"]
MORE = [
    "qera:budget=0.05",
    "cora:budget=0.05:spend=ranks:edges=keep",
    "cora:budget=0.05:spend=bits:edges=keep",
    "cora:budget=0.05",
]
PAPER = "cora:preset=paper:iterations={steps}"
SEARCH = "cora:budget=0.05:spend=ranks:edges=keep:iterations={steps}"
COLUMNS = ["network", "bits", "method", "top-1 %", "agree %", "KL", "bits a weight", "file MB", "s"]


def compare(network: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole result of one `coraq compare`."""
    data = [part.format(assets=arguments.assets) for part in NETWORKS[network]]
    methods = [*SAME, *MORE]
    if arguments.search:
        methods += [SEARCH.format(steps=arguments.search), PAPER.format(steps=arguments.search)]
    line = [
        "coraq",
        "compare",
        f"local-dir:{arguments.assets}/models/{network}",
        "--plugins-dir",
        str(arguments.assets),
    ]
    line += [*data, "--calib-size", str(arguments.calib_size), "--bits", arguments.bits]
    done = subprocess.run(
        [*line, "--methods", ",".join(methods), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if not done.stdout:
        raise SystemExit(f"failed ({done.returncode}): {' '.join(line)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(network: str, cells: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each cell, failed ones with their reason."""
    lines = []
    for cell in cells:
        start = [network, str(cell["bits"]), f"`{cell['label']}`"]
        if cell["reason"]:
            lines.append([*start, f"failed: {cell['reason']}", "", "", "", "", ""])
            continue
        found, top1 = cell["comparison"], cell["comparison"]["quantized_top1"]
        lines.append(
            [
                *start,
                f"{top1['value_pct']:.2f} [{top1['low_pct']:.1f}, {top1['high_pct']:.1f}]",
                f"{found['agreement']['value_pct']:.1f}",
                f"{found['kl_nats']:.4f}",
                f"{cell['effective_bits']:.3f}",
                f"{cell['file_bytes'] / 1e6:.3f}",
                f"{cell['time_s']:.0f}",
            ]
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--calib-size", type=int, default=256)
    parser.add_argument(
        "--search", type=int, default=0, metavar="STEPS", help="also with searched ranks, and the paper"
    )
    arguments = parser.parse_args()
    folder = RESULTS / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    for network in arguments.networks.split(","):
        lines = rows_of(network, compare(network, arguments)["cells"])
        with (folder / f"{network}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *lines])
    write_table(folder)
    return 0


def write_table(folder: Path) -> None:
    """The table of every network that has been measured."""
    lines = []
    for network in NETWORKS:
        path = folder / f"{network}.csv"
        if path.exists():
            lines += list(csv.reader(path.open()))[1:]
    text = [
        "# Adapters, bits and bytes",
        "",
        "Written by `python examples/adapters.py`. Weights only, affine grid per channel, first and last layer at 8",
        "bits where a method does not choose, seed 0, the same calibration images for all. Top-1 with 95 % intervals;",
        "`agree` is the share of images with the float network's first choice; KL in nats. Compare rows of the same",
        "bits a weight.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]
    (folder.parent / "adapters.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())

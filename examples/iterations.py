"""What gradient steps buy: error against the number of steps that brecq learns roundings in, from two starts.

    python examples/iterations.py [--network demo] [--bits 2] [--iterations 250,500,1000,2000] [--calib-size 1024]
        [--assets ../shared/assets]

One `coraq compare`: comq and brecq without learning, then brecq learning so many steps a unit from where its descent
ends (`learn=all`, the start kept where images that nothing was learned on say so), and the paper's form, from nearest
rounding. Finished cells are reused, so numbers of steps may be added one by one. Results:
examples/results/iterations/NETWORK-wB.json and the table examples/results/iterations.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from activations import NETWORKS, RESULTS
from compare import measured, run

from coraq.report.markdown import table

LEARNED = "brecq:learn=all:patience=0:iterations={}"
PAPER = "brecq:preset=paper:iterations={}"
COLUMNS = ["network", "bits", "method", "steps a unit", "KL nats", "top-1 %", "agree %", "calibration images", "s"]


def compare(arguments: argparse.Namespace, steps: list[str]) -> dict[str, Any]:
    """The whole result of one `coraq compare`."""
    line = ["coraq", "compare"]
    if arguments.network == "demo":
        line += ["demo"]
    else:
        line += [f"local-dir:{arguments.assets}/models/{arguments.network}", "--plugins-dir", str(arguments.assets)]
        line += [part.format(assets=arguments.assets) for part in NETWORKS[arguments.network]]
    methods = ["comq", "brecq", *(form.format(count) for count in steps for form in (LEARNED, PAPER))]
    line += ["--calib-size", str(arguments.calib_size), "--bits", str(arguments.bits), "--methods", ",".join(methods)]
    line += ["--zero-point-fraction", "0"]  # the published grid, for the published form and what it is compared with
    return run(line)


def rows(path: Path) -> list[list[str]]:
    """The table's lines for one network and width."""
    network, lines = path.stem.rsplit("-w", 1)[0], []
    result = json.loads(path.read_text())
    for cell in sorted(result["cells"], key=lambda cell: "paper" in cell["label"]):  # one curve after the other
        label, _, steps = cell["label"].partition(":iterations=")
        start = [network, str(cell["bits"]), f"`{label}`", steps or "0"]
        if cell["reason"]:
            lines.append([*start, f"failed: {cell['reason']}", *[""] * 4])
            continue
        shown = measured(cell)
        lines.append([*start, *(shown[column] for column in ("KL", "top-1 %", "agree %"))])
        lines[-1] += [result["calibration"], shown["s"]]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--network", default="demo", choices=["demo", *NETWORKS])
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--iterations", default="250,500,1000,2000")
    parser.add_argument("--calib-size", type=int, default=1024)
    arguments = parser.parse_args()
    folder = RESULTS / "iterations"
    folder.mkdir(parents=True, exist_ok=True)
    result = compare(arguments, arguments.iterations.split(","))
    (folder / f"{arguments.network}-w{arguments.bits}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(folder)
    return 0


def write_table(folder: Path) -> None:
    """The table of every network that has been measured."""
    text = [
        "# Error against gradient steps",
        "",
        "Written by `python examples/iterations.py`. Only weights are quantized. The first and last layer have 8",
        "bits, zero points are whole codes, and the seed is 0. Top-1 has 95 % intervals. `comq` and `brecq` take",
        "no gradient steps: learning starts from their codes, and their codes are kept where learning does not",
        "improve on them.",
        "",
    ]
    text += [table(COLUMNS, [line for path in sorted(folder.glob("*.json")) for line in rows(path)]), ""]
    (folder.parent / "iterations.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())

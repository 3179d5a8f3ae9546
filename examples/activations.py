"""Weights and activations: networks × methods × W/A bits, one `coraq quantize` each.

    python examples/activations.py [--assets ../shared/assets] [--networks a,b] [--methods rtn,comq,brecq,qdrop]
        [--bits 4/8,4/4,2/4] [--placement inputs] [--calib-size 256] [--calib-memory 5G] [--eval-size N]
        [--allocation memory] [--zero-point-fraction 2] [--column-scale none] [-o brecq.iterations=1000]

Finished cells are reused (same run folder). Results go to examples/results/activations/NETWORK-METHOD-wBaB.json (the
run's metrics.json; with mixed bits of inputs, another number of calibration images than 256, finer zero points, or
column scales asked for or refused, it ends in that) and the table to examples/results/activations.md. `-o
METHOD.KEY=VALUE` is passed to that method.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from coraq.migration import upgrade_scheme
from coraq.report.markdown import table
from coraq.scheme import Scheme

RESULTS = Path(__file__).parent / "results"
IMAGENET = ["--split", "imagenet-val", "--calib-split", "imagenet-sample", "--class-map"]
NETWORKS: dict[str, list[str]] = {
    "mobilenetv2_100": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "mobilenetv1_075": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "resnet18_cifar10": ["--data-dir", "{assets}/cifar10", "--split", "test", "--calib-split", "train"],
}
USUAL = 256  # calibration images
COLUMNS = ["network", "method", "W/A", "zero point", "column scale", "placement", "float top-1 %", "quantized top-1 %"]
COLUMNS += ["difference, points", "KL nats", "file MB", "steps", "calibration images", "s", "peak GB"]


def command(arguments: argparse.Namespace, network: str, method: str, weights: str, activations: str) -> list[str]:
    """The command line of one cell; activations "32" are float."""
    assets = arguments.assets
    line = ["coraq", "quantize", f"local-dir:{assets}/models/{network}", "--plugins-dir", str(assets)]
    line += ["--method", method, "--bits", weights, "--calib-size", str(arguments.calib_size)]
    if activations != "32":
        line += ["--act-bits", activations, "--act-placement", arguments.placement]
        line += [] if arguments.allocation == "none" else ["--act-allocation", arguments.allocation]
    if arguments.zero_point_fraction != "auto":
        line += ["--zero-point-fraction", arguments.zero_point_fraction]
    if arguments.column_scale != "auto":
        line += ["--column-scale", arguments.column_scale]
    if arguments.calib_memory:
        line += ["--calib-memory", arguments.calib_memory]
    if arguments.eval_size:
        line += ["--eval-size", str(arguments.eval_size)]
    for option in arguments.option:
        owner, _, setting = option.partition(".")
        line += ["-o", setting] if owner == method else []
    return [*line, *(part.format(assets=assets) for part in NETWORKS[network])]


COLUMN_SCALES = {"column scales of inputs": "input", "column scales": "channel"}  # by what a scheme's line says


def row(network: str, result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    comparison = result["comparison"]
    scheme = Scheme.model_validate(upgrade_scheme(result["config"]["scheme"])).options()
    top1, difference = comparison["quantized_top1"], comparison["top1_difference"]
    # every layer of a unit carries the unit's numbers: one of each start error counts
    units = {
        x["metrics"]["block_start_error"]: x["metrics"]["iterations"]
        for x in result["layers"]
        if "iterations" in x["metrics"]
    }
    return [
        network,
        f"{result['method']} {result['method_version']}",
        f"{scheme['bits']}/{scheme['act_bits'] or 32}",
        str(scheme["zero_point_fraction"]),
        next((kind for words, kind in COLUMN_SCALES.items() if words in result["scheme_line"]), "none"),
        _placement(scheme),
        f"{comparison['float_top1']['value_pct']:.2f}",
        f"{top1['value_pct']:.2f} [{top1['low_pct']:.1f}, {top1['high_pct']:.1f}]",
        f"{difference['points']:+.2f} [{difference['low_points']:+.1f}, {difference['high_points']:+.1f}]",
        f"{comparison['kl_nats']:.4f}",
        f"{result['size']['file_bytes'] / 1e6:.3f}",
        str(sum(units.values())) if units else "–",
        str(result["calibration"]["count"]),
        f"{'≥ ' if result.get('resumed_layers') else ''}{result['total_s']:.0f}",
        f"{result['peak_memory_bytes'] / 1e9:.1f}",
    ]


def _placement(scheme: dict[str, Any]) -> str:
    if not scheme["act_bits"]:
        return "–"
    mixed = scheme["act_allocation"]
    return str(scheme["act_placement"]) + ("" if mixed == "none" else f", mixed by {mixed}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default="resnet18_cifar10,mobilenetv2_100")
    parser.add_argument("--methods", default="rtn,comq,brecq,qdrop")
    parser.add_argument("--bits", default="4/32,3/32,2/32,4/8,4/4,2/4", help="weight/activation bits; 32: float")
    parser.add_argument("--placement", default="inputs", choices=["inputs", "integer"])
    parser.add_argument(
        "--allocation", default="none", choices=["none", "memory", "bitops", "both"], help="bits of inputs"
    )
    parser.add_argument("--zero-point-fraction", default="auto", choices=["auto", "0", "1", "2", "3"])
    parser.add_argument("--column-scale", default="auto", choices=["auto", "none", "channel", "input"])
    parser.add_argument("--calib-size", type=int, default=USUAL)
    parser.add_argument("--calib-memory", default=None, help="of a run, where several run at once")
    parser.add_argument("--eval-size", type=int, default=None)
    parser.add_argument("--option", "-o", action="append", default=[], metavar="METHOD.KEY=VALUE")
    arguments = parser.parse_args()
    folder = RESULTS / "activations"
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for network in arguments.networks.split(","):
        for weights, _, activations in (pair.partition("/") for pair in arguments.bits.split(",")):
            for method in arguments.methods.split(","):
                line = command(arguments, network, method, weights, activations)
                done = subprocess.run([*line, "--json", "-q"], stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    failed += 1
                    print(f"failed ({done.returncode}): {' '.join(line)}", file=sys.stderr)
                    continue
                result = json.loads(done.stdout)
                place = "" if arguments.placement == "inputs" or activations == "32" else "-integer"
                images = "" if arguments.calib_size == USUAL else f"-{arguments.calib_size}"
                zero = "" if arguments.zero_point_fraction == "auto" else f"-{arguments.zero_point_fraction}"
                columns = {"auto": "", "none": "-no-columns", "channel": "-columns", "input": "-inputs"}[
                    arguments.column_scale
                ]
                mixed = (
                    "" if "none" in arguments.allocation or activations == "32" else f"-mixed-{arguments.allocation}"
                )
                name = f"{network}-{method}-w{weights}a{activations}{place}{mixed}{images}{zero}{columns}.json"
                (folder / name).write_text(json.dumps(result, indent=1) + "\n")
                print(*row(network, result), sep=" | ", flush=True)
    write_table(folder)
    return 1 if failed else 0


def write_table(folder: Path) -> None:
    """The tables of every cell that has been measured: today's defaults, and all else."""
    usual: list[list[str]] = []
    other: list[list[str]] = []
    for network in NETWORKS:
        for path in sorted(folder.glob(f"{network}-*.json"), key=_place):
            cell = row(network, json.loads(path.read_text()))
            (usual if len(path.stem.split("-")) == 3 else other).append(cell)
    text = ["# Accuracy with quantized weights and activations", ""]
    text += [
        "Written by `python examples/activations.py`. Every row is one `coraq quantize`, whose result is in",
        "`activations/`. Intervals are 95 %. `steps` are the gradient steps of all blocks together. Rows may be",
        "of earlier versions of a method; for float activations, `compare.md` and `accuracy.md` are newer. Rows",
        "of `cora` up to version 8 are what is `mixed` today.",
        "",
    ]
    text += [f"## Defaults, {USUAL} calibration images", "", table(COLUMNS, usual), ""]
    text += ["## Other settings, other numbers of images", "", table(COLUMNS, other), ""]
    (folder.parent / "activations.md").write_text("\n".join(text))


def _place(path: Path) -> tuple[str, list[str]]:
    """By the bits first, then the method and what is special, so that what compares stands together."""
    _, method, bits, *special = path.stem.split("-")
    return bits, [method, *special]


if __name__ == "__main__":
    sys.exit(main())

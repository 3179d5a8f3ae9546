"""The measured table: networks × methods × bits × what the first and last layer get, one `coraq quantize` each.

    python examples/accuracy.py [--assets ../shared/assets] [--networks a,b] [--methods rtn,comq,cora] [--bits 4,3,2]

Each cell is a process of its own, so that its peak memory is its own. Finished cells are reused (same run folder).
Results go to examples/results/accuracy/NETWORK-METHOD-wBITS[-all].json (the run's metrics.json), the table to
examples/results/accuracy.md, and its rows with 8-bit edges to the README, between its accuracy marks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from coraq.report.markdown import table

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
IN_README = ["network", "bits", "method", "quantized top-1 %", "difference, points", "KL nats", "bits a weight"]
IN_README += ["file MB", "s", "peak GB"]
COLUMNS = ["network", "method", "bits", "first and last layer", "float top-1 %", "quantized top-1 %"]
COLUMNS += ["difference, points", "KL nats", "logit SQNR dB", "layers at or below rtn's error", "bits a weight"]
COLUMNS += ["file MB", "s", "peak GB"]
IMAGENET = ["--split", "imagenet-val", "--calib-split", "imagenet-sample", "--class-map"]
SEED = ["--seed", "0"]
FEWER = ["--calib-size", "512"]  # as the committed rows have; all 1,000 images for the ImageNet networks
NETWORKS: dict[str, list[str]] = {
    "mobilenetv2_100": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "mobilenetv1_075": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "resnet18_cifar10": ["--data-dir", "{assets}/cifar10", "--split", "test", "--calib-split", "train", *FEWER],
}


def command(assets: Path, network: str, method: str, bits: int, everywhere: bool) -> list[str]:
    """The command line of one cell."""
    data = [part.format(assets=assets) for part in NETWORKS[network]]
    edges = ["--first-bits", str(bits), "--last-bits", str(bits)] if everywhere else []
    # the plugin folder registers mobilenetv1_075 with timm, which has no such name
    model = [f"local-dir:{assets}/models/{network}", "--plugins-dir", str(assets)]
    return ["coraq", "quantize", *model, "--method", method, "--bits", str(bits), *edges, *data, *SEED]


def row(name: str, everywhere: bool, result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    comparison, size, layers = result["comparison"], result["size"], result["layers"]
    top1, difference = comparison["quantized_top1"], comparison["top1_difference"]
    # the classifier and first layer at 8 bits are hardly quantized: the claim is about every layer
    pairs = [(x["metrics"]["error"], x["metrics"]["rtn_error"]) for x in layers if "rtn_error" in x["metrics"]]
    least = "≥ " if result.get("resumed_layers") else ""  # a run that was killed and went on
    return [
        name,
        f"{result['method']} {result['method_version']}",
        str(result["config"]["scheme"]["bits"]),
        "as all" if everywhere else "8 bits",
        f"{comparison['float_top1']['value_pct']:.2f}",
        f"{top1['value_pct']:.2f} [{top1['low_pct']:.1f}, {top1['high_pct']:.1f}]",
        f"{difference['points']:+.2f} [{difference['low_points']:+.1f}, {difference['high_points']:+.1f}]",
        f"{comparison['kl_nats']:.4f}",
        f"{comparison['sqnr_db']:.1f}",
        f"{sum(a <= b for a, b in pairs)}/{len(pairs)}" if pairs else "–",
        f"{size['effective_bits']:.2f}",
        f"{size['file_bytes'] / 1e6:.2f} of {size['float_bytes'] / 1e6:.1f}",
        f"{least}{result['total_s']:.0f}",
        f"{least}{result['peak_memory_bytes'] / 1e9:.1f}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default="rtn,comq,cora")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--edges", default="8,all", help="8: first and last layer at 8 bits; all: at the same bits")
    arguments = parser.parse_args()
    folder = RESULTS / "accuracy"
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for network in arguments.networks.split(","):
        for everywhere in [edge == "all" for edge in arguments.edges.split(",")]:
            for bits in map(int, arguments.bits.split(",")):
                for method in arguments.methods.split(","):
                    line = command(arguments.assets, network, method, bits, everywhere)
                    done = subprocess.run([*line, "--json", "-q"], stdout=subprocess.PIPE, text=True, check=False)
                    if done.returncode:
                        failed += 1
                        print(f"failed ({done.returncode}): {' '.join(line)}", file=sys.stderr)
                        continue
                    name = f"{network}-{method}-w{bits}{'-all' if everywhere else ''}.json"
                    (folder / name).write_text(json.dumps(json.loads(done.stdout), indent=1) + "\n")
                    print(*row(network, everywhere, json.loads(done.stdout)), sep=" | ", flush=True)
    write_table(folder)
    return 1 if failed else 0


def write_table(folder: Path) -> None:
    """The table of every cell that has been measured."""
    rows = []
    for network in NETWORKS:
        for suffix in ("", "-all"):
            for bits in (4, 3, 2):
                for path in sorted(folder.glob(f"{network}-*-w{bits}{suffix}.json"), reverse=True):
                    rows.append(row(network, bool(suffix), json.loads(path.read_text())))
    write_readme(rows)
    text = [
        "# Accuracy at 4, 3 and 2 bits, weights only",
        "",
        "Written by `python examples/accuracy.py`; every row is one `coraq quantize`, whose whole result stands beside",
        "this file in `accuracy/`. Intervals are 95 %; differences are paired, on the same images. Affine grid per",
        "channel, zero points and column scales as by default, bias and gain correction on for every method,",
        "activations float, seed 0. Calibration images and the precision of calibration's passes (`calib_precision`;",
        "where a result has none, float32) are in each result. `s` is the whole command but Python's",
        "imports: reading, calibration, writing, reloading and evaluating both networks. Bits a weight count scales",
        "and zero points. `cora` shares out the bytes of uniform codes, first and last layer included. The number",
        "behind a method is its version.",
        "",
        table(COLUMNS, rows),
        "",
    ]
    (folder.parent / "accuracy.md").write_text("\n".join(text))


def write_readme(rows: list[list[str]]) -> None:
    """The rows whose first and last layers have 8 bits, between the README's marks."""
    short = []
    for cells in (dict(zip(COLUMNS, found, strict=True)) for found in rows):
        if cells["first and last layer"] == "8 bits":
            cells["network"] += f" (float {cells['float top-1 %']})"
            short.append([cells[column] for column in IN_README])
    put_in_readme("accuracy", table(IN_README, short))


def put_in_readme(name: str, text: str) -> None:
    """Text between the README's marks of that name."""
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())

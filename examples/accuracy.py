"""The measured table: networks × methods × bits, one `coraq quantize` each, on the same images.

    python examples/accuracy.py [--assets ../shared/assets] [--networks a,b] [--methods rtn,comq,mixed] [--bits 4,3,2]

Every layer has the same bits or, with `mixed` and `cora`, shares out the bytes of that; `rdoq` gets the bytes of comq's
file as --size, so comq comes before it. Each cell is a process of its own, so that its peak memory is its own. Finished
cells are reused (same run folder). Results go to examples/results/accuracy/NETWORK-METHOD-wBITS.json (the run's
metrics.json), the table to examples/results/accuracy.md, and some rows to the README, between its accuracy marks.
`--table` only writes the tables again.
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
COLUMNS = ["network", "file MB", "bits a weight", "method", "budget", "KL nats", "quantized top-1 %"]
COLUMNS += ["difference, points", "logit SQNR dB", "s", "peak GB"]
IN_README = ["network", "file MB", "bits a weight", "method", "KL nats", "quantized top-1 %", "difference, points"]
README_METHODS = ("comq", "mixed", "rdoq")
README_BITS = (4, 3)
METHODS = ("rtn", "comq", "brecq", "mixed", "cora", "rdoq")
IMAGENET = ["--split", "imagenet-val", "--calib-split", "imagenet-sample", "--class-map"]
SEED = ["--seed", "0"]
NETWORKS: dict[str, list[str]] = {
    "mobilenetv2_100": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "mobilenetv1_075": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "tf_efficientnet_lite0": ["--data-dir", "{assets}", *IMAGENET, "{assets}/imagenet.class_map.txt"],
    "resnet18_cifar10": [
        *["--data-dir", "{assets}/cifar10", "--split", "test", "--calib-split", "train", "--calib-size", "512"]
    ],
}


def command(assets: Path, network: str, method: str, bits: int, folder: Path) -> list[str]:
    """The command line of one cell; `folder` has the results of others."""
    data = [part.format(assets=assets) for part in NETWORKS[network]]
    edges = ["--first-bits", "same", "--last-bits", "same"]
    # the plugin folder registers mobilenetv1_075 with timm, which has no such name
    model = [f"local-dir:{assets}/models/{network}", "--plugins-dir", str(assets)]
    budget = ["--bits", str(bits)]
    if method == "rdoq":
        uniform = json.loads((folder / f"{network}-comq-w{bits}.json").read_text())
        budget = ["--size", str(uniform["size"]["file_bytes"])]
    return ["coraq", "quantize", *model, "--method", method, *budget, *edges, *data, *SEED]


def row(name: str, bits: int, result: dict[str, Any]) -> dict[str, str]:
    """One line of the table, by column."""
    comparison, size = result["comparison"], result["size"]
    top1, difference = comparison["quantized_top1"], comparison["top1_difference"]
    least = "≥ " if result.get("resumed_layers") else ""  # a run that was killed and went on
    cells = [
        f"{name} (float {comparison['float_top1']['value_pct']:.2f})",
        f"{size['file_bytes'] / 1e6:.2f} of {size['float_bytes'] / 1e6:.1f}",
        f"{size['effective_bits']:.2f}",
        f"{result['method']} {result['method_version']}",
        f"W{bits}",
        f"{comparison['kl_nats']:.4f}",
        f"{top1['value_pct']:.2f} [{top1['low_pct']:.1f}, {top1['high_pct']:.1f}]",
        f"{difference['points']:+.2f} [{difference['low_points']:+.1f}, {difference['high_points']:+.1f}]",
        f"{comparison['sqnr_db']:.1f}",
        f"{least}{result['total_s']:.0f}",
        f"{least}{result['peak_memory_bytes'] / 1e9:.1f}",
    ]
    return dict(zip(COLUMNS, cells, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--table", action="store_true", help="write the tables of what has been measured, and leave")
    arguments = parser.parse_args()
    folder = RESULTS / "accuracy"
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    cells = [
        (network, bits, method)
        for network in arguments.networks.split(",")
        for bits in map(int, arguments.bits.split(","))
        for method in arguments.methods.split(",")
    ]
    for network, bits, method in [] if arguments.table else cells:
        line = command(arguments.assets, network, method, bits, folder)
        done = subprocess.run([*line, "--json", "-q"], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"failed ({done.returncode}): {' '.join(line)}", file=sys.stderr)
            continue
        result = json.loads(done.stdout)
        (folder / f"{network}-{method}-w{bits}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(*row(network, bits, result).values(), sep=" | ", flush=True)
    write_tables(folder)
    return 1 if failed else 0


def write_tables(folder: Path) -> None:
    """The table of every cell that has been measured, and the README's."""
    rows, short = [], []
    for network in NETWORKS:
        for bits in (4, 3, 2):
            for method in METHODS:
                path = folder / f"{network}-{method}-w{bits}.json"
                if path.is_file():
                    rows.append(row(network, bits, json.loads(path.read_text())))
                    if method in README_METHODS and bits in README_BITS:
                        short.append(rows[-1])
    put_in_readme("accuracy", table(IN_README, [[cells[name] for name in IN_README] for cells in short]))
    text = [
        "# Accuracy, weights only",
        "",
        "Written by `python examples/accuracy.py`; every row is one `coraq quantize`, whose whole result stands beside",
        "this file in `accuracy/`. `budget` is the width of uniform codes in every layer, first and last included; the",
        "methods `mixed` and `cora` share out the bytes of these codes, and `rdoq` has the file size of comq. File",
        "sizes are those of the whole file; bits a weight count codes, scales, zero points and adapters. Intervals are",
        "95 %; differences are paired, on the same images: 1,300 of ImageNet's validation images (easier than the full",
        "set: use differences), 3,000",
        "CIFAR-10 test images. Calibration: 1,000 ImageNet training images, 512 of CIFAR-10. Affine grid per channel,",
        "column scales, scale and bias correction as by default, activations float, seed 0. `s` is the whole command",
        "without Python's imports, on one thread beside other work: an upper bound. The number behind a method is its",
        "version.",
        "",
        table(COLUMNS, [list(cells.values()) for cells in rows]),
        "",
    ]
    (folder.parent / "accuracy.md").write_text("\n".join(text))


def put_in_readme(name: str, text: str) -> None:
    """Text between the README's marks of that name."""
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    before, rest = README.read_text().split(begin)
    after = rest.split(end)[1]
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())

"""Every method on the real networks at equal bytes, and whether adapters pay: one `coraq compare` for each network.

    python examples/compare.py [--assets ../shared/assets] [--networks a,b] [--bits 4,3,2] [--calib-size 256]
        [--groups same,more,search,blocks,learned]

The groups of methods:
- same: the bytes of uniform codes. rtn, gptq, npot, comq, mixed.
- more: 0.05 bytes a weight more, spent on adapters in closed form (qera, cora with widths=fixed), on more bits for the
  most sensitive layers (the control, mixed with first_last=keep), or for those of all layers (mixed).
- search: the same bytes as `more`, for adapters of searched ranks (100 steps); and the paper's form.
- blocks: the bytes of uniform codes again, block by block: brecq.
- learned: the same with roundings learned after that: qdrop. Slow.

Finished cells are reused, so groups may be added one by one; rows that were not asked for stay. Results:
examples/results/compare/NETWORK/ (the comparison's compare.json, compare.csv and report.html, each number from a
run's metrics.json) and examples/results/compare.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from accuracy import NETWORKS, RESULTS

from coraq.report.compare import csv_text, read_comparison
from coraq.report.html import compare_html
from coraq.report.markdown import table

SAME = ["rtn", "gptq", "npot", "comq", "mixed"]
MORE = [
    "qera:budget=0.05",
    "cora:budget=0.05:widths=fixed:first_last=keep",
    "mixed:budget=0.05:first_last=keep",
    "mixed:budget=0.05",
]
SEARCH = ["cora:budget=0.05:widths=fixed:first_last=keep:iterations=100", "cora:preset=paper:iterations=100"]
PLUGINS = Path(__file__).parent.parent / "plugins"
GROUPS = {"same": SAME, "more": MORE, "search": SEARCH, "blocks": ["brecq"], "learned": ["qdrop"]}
FORMER_LABELS = {  # results of up to version 8, when `mixed` was called `cora`, keep these labels
    "cora": "mixed",
    "cora:budget=0.05:spend=ranks:edges=keep": "cora:budget=0.05:widths=fixed:first_last=keep",
    "cora:budget=0.05:spend=ranks:edges=keep:iterations=100": (
        "cora:budget=0.05:widths=fixed:first_last=keep:iterations=100"
    ),
    "cora:budget=0.05:edges=keep": "mixed:budget=0.05:first_last=keep",
    "cora:budget=0.05": "mixed:budget=0.05",
}
SHORT_NAMES = {
    "rtn": "rtn",
    "gptq": "gptq",
    "npot": "npot",
    "comq": "comq",
    "brecq": "brecq",
    "qdrop": "qdrop",
    "mixed": "mixed",
    "qera:budget=0.05": "+ qera",
    "cora:budget=0.05:widths=fixed:first_last=keep": "+ ranks",
    "cora:budget=0.05:widths=fixed:first_last=keep:iterations=100": "+ search",
    "mixed:budget=0.05:first_last=keep": "+ bits, edges kept",
    "mixed:budget=0.05": "+ mixed",
    "cora:preset=paper:iterations=100": "paper",
}
COLUMNS = ["network", "bits", "method", "top-1 %", "agree %", "KL", "bits a weight", "file MB", "s"]


def compare(network: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole result of one `coraq compare`."""
    methods = [method for group in arguments.groups.split(",") for method in GROUPS[group]]
    line = ["coraq", "compare", f"local-dir:{arguments.assets}/models/{network}"]
    # plugins/ has gptq and npot; the networks' folder registers mobilenetv1_075 with timm
    line += ["--plugins-dir", str(PLUGINS), "--plugins-dir", str(arguments.assets)]
    line += [part.format(assets=arguments.assets) for part in NETWORKS[network]]
    line += ["--calib-size", str(arguments.calib_size), "--bits", arguments.bits, "--methods", ",".join(methods)]
    return run(line)


def keep(measured: Path, folder: Path) -> None:
    """Take a comparison's files over into `folder`, whose cells of other bits or methods stay."""
    found, earlier = read_comparison(measured), read_comparison(folder)
    assert found is not None
    bits, new = {cell.bits for cell in found.cells}, {(cell.bits, cell.label) for cell in found.cells}
    cells = [cell for cell in earlier.cells if (cell.bits, cell.label) not in new] if earlier else []
    groups = [group for group in earlier.groups if group.bits not in bits] if earlier else []
    update = {"cells": [*cells, *found.cells], "groups": [*groups, *found.groups], "folder": f"runs/{measured.name}"}
    merged = found.model_copy(update=update)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("compare.json", merged.model_dump_json(indent=1) + "\n"),
        ("compare.csv", csv_text(merged)),
        ("report.html", compare_html(merged)),
    ):
        (folder / name).write_text(text)


def run(line: list[str]) -> dict[str, Any]:
    """What a `coraq compare` command line says as JSON."""
    done = subprocess.run([*line, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if not done.stdout:
        raise SystemExit(f"failed ({done.returncode}): {' '.join(line)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(cell: dict[str, Any]) -> dict[str, str]:
    """A finished cell's numbers as a table shows them, by column."""
    found, top1 = cell["comparison"], cell["comparison"]["quantized_top1"]
    return {
        "top-1 %": f"{top1['value_pct']:.2f} [{top1['low_pct']:.1f}, {top1['high_pct']:.1f}]",
        "agree %": f"{found['agreement']['value_pct']:.1f}",
        "KL": f"{found['kl_nats']:.4f}",
        "s": f"{'≥ ' if cell.get('resumed_layers') else ''}{cell['total_s']:.0f}",
    }


def rows_of(network: str, cells: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each cell, failed ones with their reason."""
    lines = []
    for cell in cells:
        start = [network, str(cell["bits"]), f"`{cell['label']}`"]
        if cell["reason"]:
            lines.append([*start, f"failed: {cell['reason']}", "", "", "", "", ""])
            continue
        shown = measured(cell)
        lines.append(
            [
                *start,
                *(shown[column] for column in ("top-1 %", "agree %", "KL")),
                f"{cell['effective_bits']:.3f}",
                f"{cell['file_bytes'] / 1e6:.3f}",
                shown["s"],
            ]
        )
    return lines


def present(cell: dict[str, Any]) -> str:
    """The cell's label in today's names of methods and options."""
    return FORMER_LABELS.get(cell["label"], cell["label"])


def in_short(network: str, cells: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each number of bits: every method's KL."""
    found = {(cell["bits"], present(cell)): cell["comparison"]["kl_nats"] for cell in cells if not cell["reason"]}
    widths = sorted({bits for bits, _ in found}, reverse=True)
    return [
        [network, str(bits), *(f"{found[bits, m]:.4f}" if (bits, m) in found else "–" for m in SHORT_NAMES)]
        for bits in widths
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("../shared/assets"))
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--calib-size", type=int, default=256)
    parser.add_argument("--groups", default="same,more")
    arguments = parser.parse_args()
    for network in arguments.networks.split(","):
        result = compare(network, arguments)
        keep(Path(result["folder"]), RESULTS / "compare" / network)
    write_table(RESULTS / "compare")
    return 0


def write_table(folder: Path) -> None:
    """The table of every network that has been measured."""
    lines: list[list[str]] = []
    short: list[list[str]] = []
    for network in NETWORKS:
        path = folder / network / "compare.json"
        if path.exists():
            cells = json.loads(path.read_text())["cells"]
            order = list(SHORT_NAMES)
            cells.sort(
                key=lambda cell: (-cell["bits"], order.index(label) if (label := present(cell)) in order else 99)
            )
            lines += rows_of(network, cells)
            short += in_short(network, cells)
    text = [
        "# Every method at equal bytes",
        "",
        "Written by `python examples/compare.py`. Only weights are quantized, on an affine grid for each channel,",
        "with column scales except in the paper's form. The first and last layer have 8 bits unless the method",
        "chooses. All cells have seed 0 and the same calibration images. Top-1 has 95 % intervals. `agree` is the",
        "share of images with the same top-1 prediction as the float network. KL is in nats. Compare rows of the",
        "same bits a weight. Some cells ran beside other work, so seconds are upper bounds.",
        "",
        "Up to version 8 of `cora`, today's `mixed` was called `cora`, `widths=fixed` was `spend=ranks`, and",
        "`first_last` was `edges`; rows keep the labels that they were measured with. The rows of",
        "resnet18_cifar10 are of an earlier commit: `rtn` without column scales, `cora` 4.",
        "",
        table(COLUMNS, lines),
        "",
        "## KL in short",
        "",
        table(["network", "bits", *SHORT_NAMES.values()], short),
        "",
    ]
    (folder.parent / "compare.md").write_text("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())

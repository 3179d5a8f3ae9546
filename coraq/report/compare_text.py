"""The wording of a comparison, written once for terminal, Markdown, CSV and HTML. Pure strings, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coraq.report.summary import bytes_text, decibel_text, time_text
from coraq.results import CellResult, ComparedMethod, CompareResult, ComparisonGroup, MethodPair, Spread


def model_name(model: str) -> str:
    """The last part: the folder of local-dir:…, the name of hf-hub:…."""
    return model.split(":")[-1].rstrip("/").rsplit("/", 1)[-1] or model


def title(group: ComparisonGroup) -> str:
    """ "resnet18 at 4 bits: float top-1 79.87 % on 3000 images, 44.8 MB"."""
    parts = []
    if group.float_top1 is not None and group.measure == "top1_pct":
        parts.append(f"float top-1 {group.float_top1.value_pct:.2f} %")
    if group.images is not None:
        parts.append(f"{group.images} {'labelled ' if group.measure == 'top1_pct' else ''}images")
    if group.float_bytes:
        parts.append(f"float size {bytes_text(group.float_bytes)}")
    return f"{model_name(group.model)} at {group.bits} bits" + (f" ({', '.join(parts)})" if parts else "")


def cell_name(cell: CellResult) -> str:
    return f"{model_name(cell.model)} {cell.label} W{cell.bits} seed {cell.seed}"


def header(group: ComparisonGroup, narrow: bool = False) -> list[str]:
    """Columns of `rows`; `narrow` leaves out what does not fit 80 columns."""
    if group.measure == "top1_pct":
        quality = ["top-1 %", *([] if narrow else ["agree %"]), "KL"]
    else:
        quality = ["KL", "agree %", *([] if narrow else ["SQNR dB"])]
    size = ["size"] if narrow else ["seeds", "size", "Δ size"]
    return ["#", "method", *quality, "bits/w", *size, "time", "memory"]


def rows(group: ComparisonGroup, narrow: bool = False) -> list[list[str]]:
    """A row for each method, under `header`."""
    columns = header(group, narrow)
    cells = [_cells(method) for method in group.methods]
    return [[row.get(column, "") for column in columns] for row in cells]


def _cells(method: ComparedMethod) -> dict[str, str]:
    failed = f" ({method.failed} failed)" if method.failed else ""
    if not method.seeds:
        return {"#": "–", "method": f"{method.label}{failed}"}
    least = "≥ " if method.resumed else ""
    return {
        "#": str(method.rank or "≠"),
        "method": f"{method.label}{failed}",
        "top-1 %": spread_text(method.top1_pct, 2),
        "agree %": spread_text(method.agreement_pct, 2),
        "KL": number(method.kl_nats),
        "SQNR dB": spread_text(method.sqnr_db, 1),
        "seeds": str(len(method.seeds)),
        "bits/w": f"{method.effective_bits or 0:.2f}",
        "size": bytes_text(method.file_bytes or 0),
        "Δ size": difference(method),
        "time": least + time_text(method.total_s or 0),
        "memory": least + bytes_text(method.peak_memory_bytes or 0),
    }


def difference(method: ComparedMethod) -> str:
    """Against the reference size: "=" within 1 %, else the difference."""
    if method.bytes_difference_pct is None:
        return ""
    return "=" if method.equal_bytes else f"{method.bytes_difference_pct:+.1f} %"


def spread_text(spread: Spread | None, digits: int) -> str:
    """ "77.85", or over seeds "77.85 ±0.12"."""
    if spread is None:
        return ""
    mean = f"{spread.mean:.{digits}f}" if math.isfinite(spread.mean) else decibel_text(spread.mean)
    return mean if spread.deviation is None else f"{mean} ±{spread.deviation:.{digits}f}"


def number(spread: Spread | None) -> str:
    """Three digits, for measures that span decades."""
    return "" if spread is None else f"{spread.mean:.2g}" if spread.mean < 0.001 else f"{spread.mean:.3g}"


def pair_text(pair: MethodPair, labelled: bool) -> str:
    """ "comq over rtn: +2.53 points; only comq right 112, only rtn 36; McNemar p = 1.2e-09"."""
    if pair.difference_points is None or pair.p_value is None:
        return f"{pair.first} against {pair.second}: not paired, {pair.reason}"
    link = "over" if pair.difference_points else "against"
    first, second, sign = (pair.first, pair.second, 1) if pair.difference_points >= 0 else (pair.second, pair.first, -1)
    only_first = sum(seed.only_first if sign > 0 else seed.only_second for seed in pair.seeds)
    only_second = sum(seed.only_second if sign > 0 else seed.only_first for seed in pair.seeds)
    right = "right" if labelled else "like float"
    return (
        f"{first} {link} {second}: {sign * pair.difference_points:+.2f} points; only {first} {right} {only_first}, "
        f"only {second} {only_second}; McNemar p = {pair.p_value:.2g}"
    )


def pair_lines(group: ComparisonGroup, pairs: Sequence[MethodPair] | None = None) -> list[str]:
    """A line for each of a group's pairs, or for some of them."""
    return [pair_text(pair, group.measure == "top1_pct") for pair in (group.pairs if pairs is None else pairs)]


def notes(result: CompareResult) -> list[str]:
    """How to read the tables, and what was done."""
    reused = sum(cell.reused for cell in result.cells)
    ran = len(result.cells) - reused - len(result.failed)
    lines = [
        f"{len(result.cells)} cells: {ran} run, {reused} reused, {len(result.failed)} failed; "
        f"{time_text(result.total_s)} in all",
    ]
    if result.base is not None:
        lines.append(f"model, bits and data not given: those of {result.base}")
    unequal = [m for group in result.groups for m in group.methods if m.seeds and not m.equal_bytes]
    if unequal:
        lines.append(
            "≠ not ranked: the checkpoint's size differs by over 1 % from the one that most methods share ("
            + ", ".join(f"{m.label} {difference(m)}" for m in unequal)
            + ")"
        )
    if any(group.measure == "kl_nats" for group in result.groups):
        lines.append("no labelled images: ranked by KL divergence from the float network (lower is better)")
    if any(len(method.seeds) > 1 for group in result.groups for method in group.methods):
        lines.append("± is the standard deviation over seeds; a pair's p is the largest over seeds")
    return lines

"""The files of a comparison: compare.json, compare.csv, report.md and report.html in one folder."""

from __future__ import annotations

import csv
import io
import shlex
from pathlib import Path

from pydantic import ValidationError

from coraq.errors import CoraqError, disk_error
from coraq.report import compare_text, summary
from coraq.report.html import HTML_NAME, compare_html
from coraq.report.markdown import cell, facts, fenced, table
from coraq.results import CellResult, CompareResult
from coraq.runtime.safe_files import read_plain

COMPARE_NAME, CSV_NAME, REPORT_NAME = "compare.json", "compare.csv", "report.md"
CSV_COLUMNS = [
    "model",
    "method",
    "bits",
    "seed",
    "status",
    "reason",
    "images",
    "float_top1_pct",
    "top1_pct",
    "top1_low_pct",
    "top1_high_pct",
    "top5_pct",
    "agreement_pct",
    "kl_nats",
    "sqnr_db",
    "effective_bits",
    "file_bytes",
    "float_bytes",
    "time_s",
    "peak_memory_bytes",
    "resumed_layers",
    "run_dir",
    "command",
]


def write_comparison(result: CompareResult) -> Path:
    """Write all files into `result.folder`, each atomically; returns the path of the report to look at.

    Raises:
        CoraqError: the folder cannot be written to.
    """
    from coraq.artifact.files import write_atomic  # here: the package behind it imports torch

    folder = Path(result.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    write_atomic(folder / CSV_NAME, csv_text(result))
    write_atomic(folder / REPORT_NAME, compare_markdown(result))
    write_atomic(folder / COMPARE_NAME, result.model_dump_json(indent=1) + "\n")
    write_atomic(folder / HTML_NAME, compare_html(result))
    return folder / HTML_NAME


def read_comparison(folder: Path) -> CompareResult | None:
    """The comparison that lies in `folder`, wherever that is now; None where there is none.

    Raises:
        CoraqError: its compare.json is damaged.
    """
    path = folder / COMPARE_NAME
    if not path.exists():
        return None
    try:
        result = CompareResult.model_validate_json(read_plain(path))
    except (ValidationError, OSError) as error:
        raise CoraqError(
            f"{path} is damaged or of another version", "Run the same `coraq compare` again: finished cells are reused."
        ) from error
    return result.model_copy(update={"folder": str(folder)})


def csv_text(result: CompareResult) -> str:
    """One line a cell, failed ones with their reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_row(one) for one in result.cells)
    return text.getvalue()


def _csv_row(one: CellResult) -> list[object]:
    comparison = one.comparison
    top1 = comparison.quantized_top1 if comparison else None
    quality: list[object] = [None] * 9
    if comparison is not None:
        quality = [
            comparison.labelled_count or comparison.count,
            comparison.float_top1.value_pct if comparison.float_top1 else None,
            *((top1.value_pct, top1.low_pct, top1.high_pct) if top1 else (None, None, None)),
            comparison.quantized_top5.value_pct if comparison.quantized_top5 else None,
            comparison.agreement.value_pct,
            comparison.kl_nats,
            comparison.sqnr_db,
        ]
    status = "failed" if not one.finished else "reused" if one.reused else "run"
    about = [one.model, one.label, one.bits, one.seed, status, one.reason]
    cost = [one.effective_bits, one.file_bytes, one.float_bytes, one.total_s, one.peak_memory_bytes]
    return [*about, *quality, *cost, one.resumed_layers, one.run_dir, shlex.join(one.command)]


def compare_markdown(result: CompareResult) -> str:
    """The whole comparison as one Markdown text, rendered from `result` alone."""
    machine, versions = result.machine, {"coraq": result.coraq_version, **result.versions}
    sections = [
        "# Comparison",
        fenced(shlex.join(result.command), "sh"),
        facts(
            [
                ("scheme", result.scheme_line),
                ("calibration", result.calibration or "none finished"),
                ("images", result.evaluation or "none finished"),
                ("machine", f"{machine.cpu}, {summary.threads_text(machine.threads)}, device {machine.device}"),
                ("engine", result.engine),
                (
                    "versions",
                    ", ".join(f"{name} {number}" for name, number in versions.items()),
                ),
            ]
        ),
    ]
    for group in result.groups:
        lines = "\n".join(f"- {cell(line)}" for line in compare_text.pair_lines(group))
        sections += [
            f"## {compare_text.title(group)}",
            table(compare_text.header(group), compare_text.rows(group), right_from=2),
            lines,
        ]
    sections.append("\n".join(f"- {line}" for line in compare_text.notes(result)))
    if result.failed:
        rows = [(compare_text.cell_name(one), one.reason or "", one.hint or "") for one in result.failed]
        sections.append("## Failed\n\n" + table(["cell", "reason", "what to do"], rows))
    rows = [(compare_text.cell_name(one), f"`{shlex.join(one.command)}`", one.run_dir or "") for one in result.cells]
    sections.append("## Every cell by itself\n\n" + table(["cell", "command", "run"], rows))
    return "\n\n".join(section for section in sections if section) + "\n"

"""What a person reads on the terminal after a comparison: one table a model and number of bits."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coraq.cli.display import stdout
from coraq.report import compare_text
from coraq.results import CompareResult, ComparisonGroup

MOST_PAIRS = 6  # of four methods; of more, the best is compared with each of the others


def show_comparison(result: CompareResult, report: Path) -> None:
    """Ranked tables, paired tests, failures, and where the files are."""
    console = stdout()
    for group in result.groups:
        _show_group(console, group)
    for line in compare_text.notes(result):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for cell in result.failed:
        console.print(Text(f"failed: {compare_text.cell_name(cell)}: {cell.reason}", style="red"))
        if cell.hint:
            console.print(Text(f"  {cell.hint}", style="dim"))
    console.print(f"report: {report}", soft_wrap=True)


def _show_group(console: Console, group: ComparisonGroup) -> None:
    console.print()
    console.print(Text(compare_text.title(group), style="bold"))
    header, rows = compare_text.header(group, narrow=True), compare_text.rows(group, narrow=True)
    for cells in rows:
        cells[1] = cells[1].replace(":", "\n  ")  # a method's options below it: they would be broken anywhere
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(header, *rows, strict=True)
    ]
    while sum(widths) + 3 * len(widths) > console.width and len(widths) > len(header) - 2:  # memory, then time
        widths.pop()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, _ in zip(header, widths, strict=False):
        table.add_column(
            name, justify="left" if name == "method" else "right", overflow="fold", no_wrap=name != "method"
        )
    for method, cells in zip(group.methods, rows, strict=True):
        style = "bold" if method.rank == 1 else "" if method.seeds else "red"
        table.add_row(*(Text(cell) for cell in cells[: len(widths)]), style=style)
    console.print(table)
    best = next((method.label for method in group.methods if method.rank == 1), "")
    shown = [p for p in group.pairs if len(group.pairs) <= MOST_PAIRS or best in (p.first, p.second)]
    for line in compare_text.pair_lines(group, shown):
        console.print(Text(line), soft_wrap=True)
    if len(shown) < len(group.pairs):
        console.print(Text(f"the other {len(group.pairs) - len(shown)} pairs are in the report", style="dim"))

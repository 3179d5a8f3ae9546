"""What a person reads on the terminal after a run: made for 80 columns, printed on stdout."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coraq.cli import options
from coraq.config import MIN_BITS
from coraq.report import summary
from coraq.results import Comparison, RunResult

if TYPE_CHECKING:
    from coraq.pipeline import Plan


FEW_BITS = 4  # of inputs, where sharing them out has been seen to pay


def stdout() -> Console:
    """The console of results. Text is never taken for markup: a layer may be called [0]."""
    return Console(highlight=False, markup=False, emoji=False)


def show_result(
    result: RunResult, commands: Collection[str], notes: Iterable[str] = (), plugins_dirs: Iterable[Path] = ()
) -> None:
    """The closing tables of a run, its notes and other `notes`, then what to try next among the existing `commands`.

    Those that load its network again get its `plugins_dirs`: a plugin may be what registers the architecture.
    """
    console = stdout()
    console.print()
    console.print(Text(summary.title(result), style="bold"))
    console.print()
    _show_accuracy(console, result)
    method = f"{result.method} {result.method_version} ({result.method_source})"
    comparison = result.best_comparison
    facts = [
        *(summary.fidelity_facts(comparison) if comparison else []),
        *summary.size_facts(result)[:2],
        *summary.input_facts(result),
        *summary.time_facts(result),
        ("method", method),
        ("scheme", result.scheme_line),
        *summary.data_facts(result),
    ]
    console.print(facts_table(facts))
    _show_worst(console, result)
    for note in dict.fromkeys([*result.notes, *notes]):
        console.print(Text(f"note: {note}", style="yellow"))
    _show_next(console, result, commands, options.plugin_flags(plugins_dirs))


def _show_accuracy(console: Console, result: RunResult) -> None:
    comparison = result.comparison
    if comparison is None or not comparison.labelled:
        console.print(Text(f"accuracy: {summary.not_measured(result)}", style="yellow"), soft_wrap=True)
        console.print()
        return
    console.print(_accuracy_table(comparison))
    console.print(Text(summary.accuracy_note(comparison), style="dim"))
    console.print(Text("[ ] are 95 % intervals, differences are in points", style="dim"))
    console.print()


def _accuracy_table(comparison: Comparison) -> Table:
    """One row a network: side by side, two intervals and their difference would not fit 80 columns."""
    rows = summary.accuracy_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for measure, *_ in rows:
        table.add_column(measure, justify="right")
    for index, label in enumerate(("float", "quantized", "difference"), 1):
        table.add_row(label, *(row[index] for row in rows), style="bold" if label == "quantized" else "")
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Labels left, texts right, wrapping within their column."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts:
        table.add_row(label, Text(text))
    return table


def columns_table(header: Sequence[str], rows: Iterable[Sequence[Any]], right: Collection[str] = ()) -> Table:
    """A plain table; the columns named in `right` are aligned right, and long names fold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _show_worst(console: Console, result: RunResult) -> None:
    measure, worst = summary.worst_layers(result)
    if not worst:
        return
    rows = [
        (layer.name, layer.kind, f"{layer.stored_bits:g}", summary.bytes_text(layer.bytes), value)
        for layer, value in worst
    ]
    console.print(columns_table(["worst layers", "kind", "bits", "size", measure], rows, ("bits", "size", measure)))


def _show_next(console: Console, result: RunResult, commands: Collection[str], plugins: list[str]) -> None:
    run = result.run_dir
    lines = [("report", ["coraq", "report", run])]
    if result.comparison is None:
        lines.append(("evaluate", ["coraq", "evaluate", run, "--data-dir", "FOLDER", *plugins]))
    lines += [("compare", ["coraq", "compare", *plugins]), ("export", ["coraq", "export", run, *plugins])]
    activations = result.config.scheme.activations
    few = activations is not None and MIN_BITS < activations.bits <= FEW_BITS and activations.placement == "inputs"
    if few and activations is not None and activations.allocation == "none" and result.command:
        lines.append(("quantize", [*result.command, "--act-allocation", "both"]))
    console.print(Text("next:", style="dim"))
    for command, line in lines:
        if command in commands:
            console.print(f"  {shlex.join(line)}", soft_wrap=True)


def show_plan(plan: Plan) -> None:
    """What `--dry-run` prints: where, with what, and every layer with its bits."""
    console = stdout()
    facts = [
        ("run folder", plan.run_dir),
        ("method", plan.method),
        ("scheme", plan.scheme_line),
        ("calibration", plan.calibration),
        ("evaluation", plan.evaluation or summary.NOT_MEASURED),
        ("size", f"{summary.bytes_text(plan.estimated_bytes)} and a header, of {summary.bytes_text(plan.float_bytes)}"),
        ("starts at", "nothing to do: finished already" if plan.finished else plan.resume_at or "the first layer"),
    ]
    console.print(facts_table((label, str(text)) for label, text in facts))
    named = {"act_bits": "input bits", "unit": "solved with"}
    more = {key: name for key, name in named.items() if all(key in layer for layer in plan.layers)}
    rows = [
        (
            layer["name"],
            layer["kind"],
            "×".join(map(str, layer["shape"])),
            layer["bits"],
            summary.count_text(layer["macs"]),
            *(str(layer[key]) for key in more),
        )
        for layer in plan.layers
    ]
    header = ["layer", "kind", "shape", "bits", "MACs", *more.values()]
    console.print(columns_table(header, rows, ("bits", "MACs", "input bits")))
    console.print("nothing was computed; leave out --dry-run to run it")

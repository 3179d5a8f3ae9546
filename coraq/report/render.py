"""The report: everything that a RunResult holds, as Markdown, beside its JSON."""

from __future__ import annotations

import json
from pathlib import Path

from coraq.errors import disk_error
from coraq.report import summary
from coraq.report.html import HTML_NAME, logged_metrics, run_html
from coraq.report.markdown import facts, fenced, table
from coraq.results import LayerResult, RunResult

REPORT_NAME, METRICS_NAME = "report.md", "metrics.json"


def markdown(result: RunResult) -> str:
    """The whole report as one Markdown text, rendered from `result` alone."""
    sections = [
        f"# {summary.title(result)}",
        fenced(summary.command_line(result), "sh"),
        f"{result.scheme_line}",
        _accuracy(result),
        _fidelity(result),
        "## Size and cost\n\n" + facts(summary.size_facts(result) + summary.cost_facts(result)),
        "## Data\n\n" + facts([*summary.data_facts(result), ("fingerprint", f"`{result.calibration.fingerprint}`")]),
        _time(result),
        _layers(result),
        _notes(result),
        _reproduce(result),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(result: RunResult, folder: Path) -> Path:
    """Write report.md, metrics.json and report.html into `folder`, each atomically; returns the path of report.html.

    metrics.json is what makes a run finished: it comes after all that it is rendered from, and before the HTML, which
    `coraq report` can render again.

    Raises:
        CoraqError: the folder cannot be written to.
    """
    from coraq.artifact.files import write_atomic  # here: the package behind it imports torch

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from error
    write_atomic(folder / REPORT_NAME, markdown(result))
    write_atomic(folder / METRICS_NAME, result.model_dump_json(indent=2) + "\n")
    return _write_html(result, folder)


def complete_report(result: RunResult, folder: Path) -> bool:
    """Write report.html if a kill left none, or only an older run's, beside metrics.json; whether it did.

    Raises:
        CoraqError: the folder cannot be written to.
    """
    page, metrics = folder / HTML_NAME, folder / METRICS_NAME
    if page.is_file() and page.stat().st_mtime_ns >= metrics.stat().st_mtime_ns:
        return False
    _write_html(result, folder)
    return True


def _write_html(result: RunResult, folder: Path) -> Path:
    from coraq.artifact import read_histograms
    from coraq.artifact.files import write_atomic

    page = run_html(result, read_histograms(folder), logged_metrics(folder / "events.jsonl"))
    write_atomic(folder / HTML_NAME, page)
    return folder / HTML_NAME


# ---------------------------------------------------------------- sections


def _accuracy(result: RunResult) -> str:
    comparison = result.comparison
    if comparison is None or not comparison.labelled:
        return f"## Accuracy\n\nAccuracy: {summary.not_measured(result)}."
    rows = table(["", "float", "quantized", "difference in points"], summary.accuracy_rows(comparison))
    return f"## Accuracy\n\n{rows}\n\n{summary.accuracy_note(comparison)}. Intervals are 95 %."


def _fidelity(result: RunResult) -> str:
    comparison = result.best_comparison
    if comparison is None:
        return ""
    images = f"On {comparison.count} images: {result.evaluation_data if result.comparison else result.fidelity_data}."
    lines = [
        *summary.fidelity_facts(comparison),
        ("float forward", summary.time_text(comparison.float_s)),
        (
            "quantized forward",
            f"{summary.time_text(comparison.quantized_s)} (weights dequantized, not integer arithmetic)",
        ),
    ]
    return f"## Fidelity to the float network\n\n{images}\n\n{facts(lines)}"


def _time(result: RunResult) -> str:
    stages = table(["stage", "time"], [(name, summary.time_text(seconds)) for name, seconds in result.stages.items()])
    return "## Time and memory\n\n" + facts(summary.time_facts(result)) + ("\n\n" + stages if result.stages else "")


def _layers(result: RunResult) -> str:
    if not result.layers:
        return ""
    measure, worst = summary.worst_layers(result)
    named = ", ".join(f"`{layer.name}` ({value})" for layer, value in worst)
    has_rank = any(layer.rank is not None for layer in result.layers)
    extras = summary.own_measures(result.layers)
    header = ["layer", "kind", "shape", "bits", *(["rank"] if has_rank else []), "bytes", "MACs"]
    header += ["weight SQNR dB", "input error", "output error", *extras]
    rows = [_layer_row(layer, has_rank, extras) for layer in result.layers]
    intro = f"In execution order. Worst by {measure}: {named}.\n\n" if worst else "In execution order.\n\n"
    return "## Layers\n\n" + intro + table(header, rows, right_from=3)


def _layer_row(layer: LayerResult, has_rank: bool, extras: list[str]) -> list[str]:
    rank = [summary.number_text(layer.rank)] if has_rank else []
    errors = (layer.weight_sqnr_db, layer.input_error, layer.output_error)
    return [
        f"`{layer.name}`",
        layer.kind,
        "×".join(map(str, layer.shape)),
        f"{layer.stored_bits:g}",
        *rank,
        str(layer.bytes),
        summary.count_text(layer.macs),
        *(summary.number_text(value) for value in errors),
        *(summary.number_text(layer.metrics.get(key)) for key in extras),
    ]


def _notes(result: RunResult) -> str:
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in result.notes) if result.notes else ""


def _reproduce(result: RunResult) -> str:
    machine = result.machine
    lines = [
        ("coraq", result.coraq_version),
        ("method", f"{result.method} {result.method_version} ({result.method_source})"),
        ("seed", str(result.seed)),
        ("machine", f"{machine.cpu}, {summary.threads_text(machine.threads)}, device {machine.device}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("run", f"`{result.run_dir}`"),
    ]
    config = json.dumps(result.config.model_dump(mode="json"), indent=2)
    return "## Reproduce\n\n" + facts(lines) + "\n\n" + fenced(config, "json")

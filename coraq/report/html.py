"""The reports as one HTML file each: no script, font or picture comes from elsewhere; dark and light; phone and print.

jinja2 and matplotlib are imported when a report is rendered, not with this module.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coraq.events import QUANTIZE
from coraq.report import compare_text, plots, summary
from coraq.results import CompareResult, LayerResult, RunResult, WeightHistogram
from coraq.runtime.safe_files import read_plain

if TYPE_CHECKING:
    from jinja2 import Environment

HTML_NAME = "report.html"
PLOTTED_LAYERS = 4
MOST_EVENT_BYTES = 256 << 20


def run_html(result: RunResult, histograms: Sequence[WeightHistogram] = (), logged: plots.Curves | None = None) -> str:
    """A run's report.

    Args:
        histograms: of the worst layers' weights; absent where the run kept none.
        logged: what the method logged while it worked.
    """
    logged = logged or {}
    comparison = result.best_comparison
    measure, worst = summary.worst_layers(result)
    drawings = [
        (
            "Signal over noise, layer by layer",
            "higher is better; outputs carry the errors of all layers before them",
            plots.sqnr_by_layer(result.layers) if result.layers else "",
        ),
        (
            "Bits" + (" and rank" if any(layer.rank for layer in result.layers) else ""),
            "bits of a weight code",
            plots.bits_and_rank(result.layers) if result.layers else "",
        ),
        (
            "Weights on the grid: the worst layers",
            "line: float weights, bars: how many got each level; a pile at an end is clipping",
            plots.weight_histograms(histograms) if histograms else "",
        ),
        (
            "Logged by the method",
            f"the first {plots.MOST_CURVES} of {len(logged)} measures" if len(logged) > plots.MOST_CURVES else "",
            plots.curves(logged) if logged else "",
        ),
        (
            "Where the time went",
            "stages, and in lighter bars the parts of calibration",
            plots.time_by_stage(result) if result.stages else "",
        ),
    ]
    return _render(
        "run.html.j2",
        result=result,
        title=summary.title(result),
        command=summary.command_line(result),
        headline=_headline(result),
        accuracy=summary.accuracy_rows(comparison) if comparison and comparison.labelled else [],
        accuracy_note=summary.accuracy_note(comparison) if comparison and comparison.labelled else "",
        not_measured=summary.not_measured(result),
        fidelity=_fidelity(result),
        costs=[*summary.size_facts(result), *summary.cost_facts(result), *summary.time_facts(result)],
        data=[*summary.data_facts(result), ("calibration hash", result.calibration.fingerprint)],
        drawings=[drawing for drawing in drawings if drawing[2]],
        no_histograms=bool(result.layers) and not histograms,
        measure=measure,
        worst=worst,
        layers=_layer_table(result.layers),
        provenance=_provenance(result),
        config=json.dumps(result.config.model_dump(mode="json"), indent=2),
    )


def compare_html(result: CompareResult) -> str:
    """A comparison's report."""
    models = list(dict.fromkeys(group.model for group in result.groups))
    sections = []
    for number, model in enumerate(models):
        groups = [group for group in result.groups if group.model == model]
        finished = [group for group in groups if any(method.seeds for method in group.methods)]
        drawings = []
        if finished:
            caption = "a marker a number of bits; bars span the seeds" if len(result.cells) > len(groups) else ""
            drawings.append(("Quality against size", caption, plots.quality_against_size(finished, f"size{number}")))
        for group in finished:
            seed = min(cell.seed for cell in result.cells if cell.finished and cell.model == model)
            errors = {
                cell.label: cell.layer_errors
                for cell in result.cells
                if (cell.model, cell.bits, cell.seed) == (model, group.bits, seed) and cell.layer_errors
            }
            if errors:
                name = f"errors{number}w{group.bits}"
                drawings.append(
                    (
                        f"Output error by layer at {group.bits} bits",
                        f"relative to the float network's outputs, seed {seed}; lower is better",
                        plots.errors_by_layer(errors, name),
                    )
                )
        tables = [
            (
                compare_text.title(group),
                compare_text.header(group),
                list(zip(group.methods, compare_text.rows(group), strict=True)),
                compare_text.pair_lines(group),
            )
            for group in groups
        ]
        sections.append((compare_text.model_name(model), tables, drawings))
    machine, versions = result.machine, {"coraq": result.coraq_version, **result.versions}
    facts = [
        ("scheme", f"{result.scheme_line} (bits vary)" if len(result.groups) > 1 else result.scheme_line),
        ("calibration", result.calibration or "no cell finished"),
        ("images", result.evaluation or "no cell finished"),
        ("machine", f"{machine.cpu}, {summary.threads_text(machine.threads)}, device {machine.device}"),
        ("engine", result.engine),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]
    return _render(
        "compare.html.j2",
        result=result,
        title="Comparison of " + ", ".join(dict.fromkeys(cell.label for cell in result.cells)),
        command=shlex.join(result.command),
        facts=facts,
        sections=sections,
        notes=compare_text.notes(result),
        cells=[(compare_text.cell_name(cell), cell, shlex.join(cell.command)) for cell in result.cells],
    )


def logged_metrics(events: Path) -> plots.Curves:
    """The Metric events of a run's events.jsonl, by name; lines that cannot be read are left out."""
    found: plots.Curves = {}
    try:
        lines = read_plain(events, MOST_EVENT_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return found
    fresh = False  # an attempt has begun and has not yet shown whether it resumes an earlier one
    for line in lines:
        try:
            event = json.loads(line)
            kind = event["event"]
            if kind == "StageStarted" and event["stage"] == QUANTIZE:
                fresh = True
            elif kind == "LayerCommitted" and event["resumed"]:
                fresh = False
            elif kind in ("LayerCommitted", "Metric") and fresh:
                found.clear()  # --force: what was logged before is of another result
                fresh = False
            if kind == "Metric":
                points = found.setdefault(str(event["name"]), [])
                step, value = int(event["step"]), float(event["value"])
                if points and step <= points[-1][0]:
                    points.append((step, math.nan))  # another layer's curve begins: lift the pen
                points.append((step, value))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return found


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("coraq.report"),
        autoescape=True,  # layer names, commands and notes may hold anything
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["drawn"] = Markup  # for SVG of `plots` only: matplotlib has escaped its texts
    return environment


def _render(template: str, **content: Any) -> str:
    return _environment().get_template(template).render(**content)


def _headline(result: RunResult) -> list[tuple[str, str, str]]:
    """The four numbers that one wants first: (label, value, remark)."""
    comparison, size = result.best_comparison, result.size
    cards = []
    if comparison and comparison.quantized_top1 and comparison.float_top1 and comparison.top1_difference:
        top1, difference = comparison.quantized_top1, comparison.top1_difference
        cards.append(
            (
                "top-1",
                f"{top1.value_pct:.2f} %",
                f"float {comparison.float_top1.value_pct:.2f} %, {summary.difference_text(difference)} points",
            )
        )
    elif comparison:
        cards.append(("agreement with float", f"{comparison.agreement.value_pct:.2f} %", "accuracy was not measured"))
    if comparison:
        cards.append(("logits", summary.decibel_text(comparison.sqnr_db), f"KL {comparison.kl_nats:.3g} nats"))
    ratio = f"{size.float_bytes / size.file_bytes:.2f} times smaller" if size.file_bytes else ""
    cards.append(("on disk", summary.bytes_text(size.file_bytes), ratio))
    cards.append(("a weight", f"{size.effective_bits:.2f} bits", "scales and adapters included"))
    return cards


def _fidelity(result: RunResult) -> list[tuple[str, str]]:
    comparison = result.best_comparison
    if comparison is None:
        return []
    return [
        *summary.fidelity_facts(comparison),
        (
            "forward passes",
            f"float {summary.time_text(comparison.float_s)}, quantized {summary.time_text(comparison.quantized_s)} "
            "(weights dequantized, not integer arithmetic)",
        ),
    ]


def _layer_table(layers: Sequence[LayerResult]) -> dict[str, Any]:
    """Header and rows: every cell as (text, sort key)."""
    extras = summary.own_measures(layers)
    ranks = any(layer.rank is not None for layer in layers)
    header = ["#", "layer", "kind", "shape", "bits", *(["rank"] if ranks else []), "bytes", "MACs"]
    header += ["weight SQNR dB", "input error", "output error", *extras]
    rows = []
    for number, layer in enumerate(layers, 1):
        values: list[tuple[str, Any]] = [
            (str(number), number),
            (layer.name, layer.name),
            (layer.kind, layer.kind),
            ("×".join(map(str, layer.shape)), math.prod(layer.shape)),
            (f"{layer.stored_bits:g}", layer.stored_bits),
            *([(summary.number_text(layer.rank), layer.rank)] if ranks else []),
            (f"{layer.bytes:,}".replace(",", "\u202f"), layer.bytes),
            (summary.count_text(layer.macs), layer.macs),
        ]
        numbers = [layer.weight_sqnr_db, layer.input_error, layer.output_error]
        numbers += [layer.metrics.get(key) for key in extras]  # type: ignore[misc]
        values += [(summary.number_text(value), value) for value in numbers]
        rows.append([(text, "" if key is None else key) for text, key in values])
    return {"header": header, "rows": rows, "texts": 3}


def _provenance(result: RunResult) -> list[tuple[str, str]]:
    machine = result.machine
    versions = {"coraq": result.coraq_version, **result.versions}
    hashes = [
        ("float weights sha256", result.float_sha256),
        ("checkpoint sha256", result.checkpoint_sha256),
        ("calibration hash", result.calibration.fingerprint),
        ("evaluation hash", result.evaluation_fingerprint),
        ("configuration hash", result.config.digest()),
    ]
    return [
        ("method", f"{result.method} {result.method_version} ({result.method_source})"),
        ("seed", str(result.seed)),
        ("machine", f"{machine.cpu}, {summary.threads_text(machine.threads)}, device {machine.device}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("run", result.run_dir),
        *((label, value) for label, value in hashes if value),
        ("run it again", f"coraq reproduce {shlex.quote(result.run_dir)}"),
    ]

"""The wording of a result: numbers with their units, and the facts that both report and terminal show.

Written once here, so that Markdown and terminal never say different things. Pure strings, no torch.
Sizes are decimal: 1 MB = 10⁶ bytes. All intervals are 95 %.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable

from coraq.results import Comparison, LayerResult, PairedDifference, Proportion, RunResult
from coraq.scheme import chosen_bits

NOT_MEASURED = "not measured (no images given; --data-dir FOLDER)"
UNLABELLED = "not measured (the images have no labels: --data-dir FOLDER with a sub-folder for each class)"


def not_measured(result: RunResult) -> str:
    """Why a result has no accuracy."""
    given = result.comparison is not None or result.config.data.data_dir or result.config.data.dataset
    return UNLABELLED if given else NOT_MEASURED


def bytes_text(count: float) -> str:
    """1234567 → "1.23 MB"."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """1234567890 → "1.23 G"."""
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent: 1.23, 12.3, 123, 1230."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def time_text(seconds: float) -> str:
    """83.2 → "1 min 23 s"."""
    if seconds < 59.95:
        return f"{seconds:.2g} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decibel_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} dB" if math.isfinite(value) else ("exact" if value > 0 else "no signal")


def proportion_text(share: Proportion | None) -> str:
    """Percent with interval, or "" where there is nothing to say."""
    return f"{share.value_pct:.2f} % [{share.low_pct:.2f}, {share.high_pct:.2f}]" if share else ""


def difference_text(difference: PairedDifference) -> str:
    """Points with interval."""
    return f"{difference.points:+.2f} [{difference.low_points:+.2f}, {difference.high_points:+.2f}]"


def number_text(value: float | int | str | None) -> str:
    """A cell of a table: four significant digits for floats."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def title(result: RunResult) -> str:
    """ "resnet18 at 4 bits by comq", or with the budget and the range where a method chose the bits of layers."""
    scheme = result.config.scheme
    layer_bits = {layer.name: layer.stored_bits for layer in result.layers}
    budget = result.config.budget_text
    if scheme.overrides or not layer_bits or not chosen_bits(scheme, layer_bits, budget):
        return f"{result.config.model} at {scheme.weights.bits} bits by {result.method}"
    return f"{result.config.model} by {result.method}: {chosen_bits(scheme, layer_bits, budget)}"


def command_line(result: RunResult) -> str:
    """The command, quoted so that a shell takes it as it was."""
    return shlex.join(result.command)


def accuracy_rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """(measure, float, quantized, difference in points) for top-1 and top-5; empty without labels."""
    rows = []
    if comparison.float_top1 and comparison.quantized_top1 and comparison.top1_difference:
        rows.append(
            (
                "top-1",
                proportion_text(comparison.float_top1),
                proportion_text(comparison.quantized_top1),
                difference_text(comparison.top1_difference),
            )
        )
    if comparison.float_top5 and comparison.quantized_top5:
        points = comparison.quantized_top5.value_pct - comparison.float_top5.value_pct
        rows.append(
            (
                "top-5",
                proportion_text(comparison.float_top5),
                proportion_text(comparison.quantized_top5),
                f"{points:+.2f}",
            )
        )
    return rows


def accuracy_note(comparison: Comparison) -> str:
    """What stands behind the accuracies: the images, and how many of them changed sides."""
    difference = comparison.top1_difference
    if difference is None:
        return ""
    return (
        f"{comparison.labelled_count} labelled images; only float right {difference.only_float_right}, "
        f"only quantized {difference.only_quantized_right}; McNemar p = {difference.p_value:.3g}"
    )


def fidelity_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """How close the quantized network's answers are to the float one's."""
    return [
        ("agreement", f"{proportion_text(comparison.agreement)} same top-1 prediction"),
        ("logits", f"SQNR {decibel_text(comparison.sqnr_db)}, KL {comparison.kl_nats:.4g} nats"),
    ]


def size_facts(result: RunResult) -> list[tuple[str, str]]:
    size = result.size
    ratio = f", {size.float_bytes / size.file_bytes:.2f} times smaller" if size.file_bytes else ""
    share = f" ({100 * size.quantized_weights / size.total_params:.1f} %)" if size.total_params else ""
    return [
        ("size on disk", f"{bytes_text(size.file_bytes)} of {bytes_text(size.float_bytes)}{ratio}"),
        ("effective bits", f"{size.effective_bits:.3f} per quantized weight, scales and adapters included"),
        ("parameters", f"{size.quantized_weights} of {size.total_params} quantized{share}, {size.float_params} float"),
    ]


def cost_facts(result: RunResult) -> list[tuple[str, str]]:
    cost = result.cost
    arithmetic = f"{count_text(cost.macs)}MACs, {count_text(cost.bitops)}BitOps an image"
    return [("arithmetic", arithmetic), *input_facts(result)]


def input_facts(result: RunResult) -> list[tuple[str, str]]:
    """What the layers' inputs take, where they are quantized."""
    cost = result.cost
    if not cost.input_values or not cost.input_bits:
        return []
    return [("inputs", f"{cost.input_bits:.3f} bits on average, {count_text(cost.input_values)} values an image")]


def time_facts(result: RunResult) -> list[tuple[str, str]]:
    float_pass = ""
    if result.float_pass_s is not None:
        half = " in bfloat16" if result.config.data.calib_precision == "bfloat16" else ""
        float_pass = f"; one calibration pass of the float network{half}: {time_text(result.float_pass_s)}"
    least, without = "", ""
    if result.resumed_layers:
        least, without = "at least ", f", without the {result.resumed_layers} layers of an earlier attempt"
    bound = ""
    if result.memory_bound_bytes is not None:
        bound = f"; bound on calibration activations {bytes_text(result.memory_bound_bytes)}"
    return [
        ("time", f"{least}{time_text(result.total_s)}{without}{float_pass}"),
        ("peak memory", f"{least}{bytes_text(result.peak_memory_bytes)}{bound}"),
    ]


def data_facts(result: RunResult) -> list[tuple[str, str]]:
    calibration = result.calibration
    synthetic = " (synthetic: not real images)" if calibration.synthetic else ""
    # The description usually counts the images that were asked for; skipped ones make the two differ.
    count = "" if str(calibration.count) in calibration.description else f": {calibration.count} images"
    half = "; passes in bfloat16" if result.config.data.calib_precision == "bfloat16" else ""
    facts = [("calibration", f"{calibration.description}{count}{synthetic}{half}")]
    if result.evaluation_data:
        facts.append(("evaluation", result.evaluation_data))
    if result.fidelity_data:
        facts.append(("fidelity on", result.fidelity_data))
    return facts


def threads_text(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def own_measures(layers: Iterable[LayerResult]) -> list[str]:
    """What the method measured beside the engine's own columns, in the order of first appearance."""
    return list(dict.fromkeys(key for layer in layers for key in layer.metrics if key not in ("bits", "bytes")))


def worst_layers(result: RunResult, count: int = 3) -> tuple[str, list[tuple[LayerResult, str]]]:
    """The `count` layers that lose most: (the measure's name, [(layer, its value)]), worst first.

    By output error where a method with data measured it, else by the weights' SQNR; layers without either are
    left out.
    """
    by_output = [(layer.output_error, layer) for layer in result.layers if layer.output_error is not None]
    if by_output:
        by_output.sort(key=lambda pair: -pair[0])
        return "output error", [(layer, f"{error:.4f}") for error, layer in by_output[:count]]
    by_weight = [(layer.weight_sqnr_db, layer) for layer in result.layers if layer.weight_sqnr_db is not None]
    by_weight.sort(key=lambda pair: pair[0])
    return "weight SQNR", [(layer, decibel_text(sqnr)) for sqnr, layer in by_weight[:count]]

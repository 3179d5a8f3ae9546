"""The plots of both reports, each a function from results to one SVG element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coraq.report.svg import INK, LINE, MARKERS, SERIES, draw, printable
from coraq.results import ComparisonGroup, LayerResult, RunResult, WeightHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]  # metric -> (step, value)
MOST_CURVES = 8
_GAPS = {"hspace": 0.42, "wspace": 0.2}  # between panels, in panels


def _panels_height(rows: int) -> float:
    return 1.6 * rows + 0.75


def _number(value: float | None) -> float:
    """For matplotlib: a gap where there is no finite number."""
    return math.nan if value is None or not math.isfinite(value) else value


def _legend_above(axes: Axes, columns: int = 4) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, handlelength=1.2)


def _log_scale(axes: Axes) -> None:
    """Logarithmic, with plain numbers at the ticks: mathematical text would need matplotlib's own fonts."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = low > 0 and high / low < 100  # a decade or two: ticks at 1, 2, 5, too
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if narrow else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _layer_axis(axes: Axes, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.3, count + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("layer, in execution order")
    axes.grid(axis="x", visible=False)


def _decibel(error: float | None) -> float | None:
    """A relative error as signal over noise in dB; None where there is none to show."""
    return -20 * math.log10(error) if error is not None and error > 0 else None


def sqnr_by_layer(layers: Sequence[LayerResult]) -> str:
    """Signal over noise of each layer's weights, and of its outputs where they were measured."""
    numbers = range(1, len(layers) + 1)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        weights = [_number(layer.weight_sqnr_db) for layer in layers]
        axes.bar(numbers, weights, width=0.75, color=SERIES[0], alpha=0.55, label="weights")
        outputs = [_number(_decibel(x.output_error)) for x in layers]
        if not all(map(math.isnan, outputs)):
            axes.plot(numbers, outputs, "o-", color=SERIES[1], markersize=3, label="outputs")
            _legend_above(axes)
        axes.set_ylabel("SQNR, dB")
        _layer_axis(axes, len(layers))

    return draw("sqnr", paint)


def bits_and_rank(layers: Sequence[LayerResult]) -> str:
    """Bits of a weight code, and where there are adapters their rank."""
    numbers = range(1, len(layers) + 1)
    ranks = any(layer.rank for layer in layers)

    def paint(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        panels = figure.subplots(2 if ranks else 1, 1, squeeze=False, sharex=True)[:, 0]
        panels[0].bar(numbers, [layer.stored_bits for layer in layers], width=0.75, color=SERIES[0], alpha=0.55)
        panels[0].set_ylabel("bits")
        if ranks:
            panels[1].bar(numbers, [layer.rank or 0 for layer in layers], width=0.75, color=SERIES[1], alpha=0.7)
            panels[1].set_ylabel("rank")
        for axes in panels:
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            _layer_axis(axes, len(layers))
        for axes in panels[:-1]:
            axes.set_xlabel("")

    return draw("bits", paint, 3.6 if ranks else 2.7)


def weight_histograms(histograms: Sequence[WeightHistogram]) -> str:
    """Float weights along each layer's grid (line), and how many got each code (bars)."""
    rows = math.ceil(len(histograms) / 2)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, min(2, len(histograms)), squeeze=False, gridspec_kw=_GAPS).reshape(-1)
        for axes, one in zip(panels, histograms, strict=False):
            width = (one.high - one.low) / len(one.weights)
            total = sum(one.weights) or 1
            positions = [one.low + (index + 0.5) * width for index in range(len(one.weights))]
            step = (max(one.levels) - min(one.levels)) / max(len(one.levels) - 1, 1) or 1.0
            shares = [100 * count / total for count in one.codes]
            axes.bar(one.levels, shares, width=0.7 * step, color=SERIES[0], alpha=0.45)
            density = [100 * count / total * step / width for count in one.weights]
            axes.plot(positions, density, color=SERIES[1], linewidth=1.1)
            axes.set_title(_short(printable(one.name), 26), loc="left")
            axes.grid(axis="x", visible=False)
        for axes in panels[len(histograms) :]:
            axes.set_visible(False)
        figure.supylabel("% of weights a step", fontsize=9.5, x=0.01)
        figure.supxlabel("level of the grid", fontsize=9.5, y=0.01)

    return draw("histograms", paint, _panels_height(rows))


def curves(logged: Curves) -> str:
    """What the method logged while it worked, step by step; each metric in a panel of its own."""
    names = list(logged)[:MOST_CURVES]
    rows = math.ceil(len(names) / 2)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, min(2, len(names)), squeeze=False, gridspec_kw=_GAPS).reshape(-1)
        for axes, name in zip(panels, names, strict=False):
            steps, points = [step for step, _ in logged[name]], [_number(value) for _, value in logged[name]]
            axes.plot(steps, points, color=SERIES[0], marker="." if len(points) < 40 else "")
            values = [value for value in points if not math.isnan(value)]
            if values and min(values) > 0 and max(values) > 30 * min(values):
                _log_scale(axes)
            axes.set_title(_short(printable(name), 26), loc="left")
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=9.5, y=0.01)

    return draw("curves", paint, _panels_height(rows))


def time_by_stage(result: RunResult) -> str:
    """Seconds of each stage; parts of a stage ("quantize: …") stand below it, lighter."""
    stages = {name: seconds for name, seconds in result.stages.items() if ": " not in name}
    parts = {name: seconds for name, seconds in result.stages.items() if ": " in name}
    bars: list[tuple[str, float, bool]] = []
    for name, seconds in stages.items():
        bars.append((name, seconds, False))
        own = [(part.split(": ", 1)[1], s, True) for part, s in parts.items() if part.startswith(f"{name}: ")]
        rest = seconds - sum(s for _, s, _ in own)
        bars += [*own, *([("method and rest", rest, True)] if own and rest > 0 else [])]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(bars))
        for part, colour in ((False, SERIES[0]), (True, SERIES[2])):
            chosen = [index for index in places if bars[index][2] == part]
            axes.barh(chosen, [bars[index][1] for index in chosen], color=colour, alpha=0.7, height=0.7)
        axes.set_yticks(list(places), [("– " if part else "") + _short(printable(name), 30) for name, _, part in bars])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)

    longest = max(len(name) + 2 * part for name, _, part in bars)
    return draw("time", paint, 0.21 * max(len(bars), 3) + 0.6, left=0.15 + 0.072 * min(longest, 31), top=0.1)


def quality_against_size(groups: Sequence[ComparisonGroup], name: str) -> str:
    """One model: accuracy (or KL) over the checkpoint's size; a line a method, a marker a number of bits."""
    labelled = all(group.measure == "top1_pct" for group in groups)
    labels = list(dict.fromkeys(method.label for group in groups for method in group.methods))
    bits = sorted({group.bits for group in groups}, reverse=True)

    def paint(figure: Figure) -> None:
        from matplotlib.lines import Line2D

        axes = figure.subplots()
        for index, label in enumerate(labels):
            colour = SERIES[index % len(SERIES)]
            points = _points(groups, label, labelled)
            axes.plot([x for _, x, *_ in points], [y for _, _, y, *_ in points], color=colour, linewidth=1, alpha=0.6)
            for width, x, y, low, high in points:
                marker = MARKERS[bits.index(width) % len(MARKERS)]
                axes.errorbar(
                    [x], [y], [[y - low], [high - y]], fmt=marker, color=colour, markersize=5, capsize=2.5, elinewidth=1
                )
        shared = groups[0].float_top1
        handles: list[Any] = [
            Line2D([], [], color=SERIES[i % len(SERIES)], label=_short(printable(label), 24))
            for i, label in enumerate(labels)
        ]
        handles += [
            Line2D([], [], color=INK, marker=MARKERS[i % len(MARKERS)], linestyle="", markersize=4.5, label=f"{b} bits")
            for i, b in enumerate(bits)
        ]
        if labelled and shared is not None:
            handles.append(axes.axhline(shared.value_pct, color=LINE, linestyle="--", label="float"))
        if not labelled:
            _log_scale(axes)
        axes.set_xlabel("checkpoint, MB")
        axes.set_ylabel("top-1, %" if labelled else "KL from float, nats")
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, handlelength=1.2
        )
        axes.margins(0.08)

    rows = math.ceil((len(labels) + len(bits) + 1) / 3)
    return draw(name, paint, 3.0 + 0.18 * rows, top=0.12 + 0.18 * rows)


def _points(
    groups: Sequence[ComparisonGroup], label: str, labelled: bool
) -> list[tuple[int, float, float, float, float]]:
    """(bits, MB, mean, low, high) of one method, by size."""
    points = []
    for group in groups:
        for method in group.methods:
            spread = method.top1_pct if labelled else method.kl_nats
            if method.label == label and method.file_bytes and spread is not None and math.isfinite(spread.mean):
                points.append((group.bits, method.file_bytes / 1e6, spread.mean, spread.low, spread.high))
    return sorted(points, key=lambda point: point[1])


def errors_by_layer(errors: dict[str, dict[str, float]], name: str) -> str:
    """Relative output error of each layer in execution order; a line a method."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (label, own) in enumerate(errors.items()):
            values = [_number(100 * value if value else None) for value in own.values()]
            colour = SERIES[index % len(SERIES)]
            axes.plot(range(1, len(values) + 1), values, color=colour, label=_short(printable(label), 24))
        _log_scale(axes)
        axes.set_ylabel("output error, %")
        _layer_axis(axes, max(map(len, errors.values())))
        _legend_above(axes, 3)

    rows = math.ceil(len(errors) / 3)
    return draw(name, paint, 2.55 + 0.18 * rows, top=0.12 + 0.18 * rows)


def _short(text: str, most: int) -> str:
    """The end of a name tells layers apart."""
    return text if len(text) <= most else "…" + text[-most + 1 :]

"""From finished cells to groups: ranked at equal bytes, with spread over seeds and paired tests between methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

from coraq.artifact import Predictions, read_predictions
from coraq.evaluate.intervals import mcnemar_p
from coraq.results import CellResult, ComparedMethod, Comparison, ComparisonGroup, MethodPair, PairedSeed, Spread

EQUAL_BYTES_PCT = 1.0


def groups_of(cells: Sequence[CellResult]) -> list[ComparisonGroup]:
    """One group for each model and number of bits, in the cells' order; methods best first."""
    keys = list(dict.fromkeys((cell.model, cell.bits) for cell in cells))
    return [_group(*key, [cell for cell in cells if (cell.model, cell.bits) == key]) for key in keys]


def reference_bytes(sizes: Sequence[float]) -> float | None:
    """The size that most others lie within 1 % of; the first such."""
    return max(sizes, key=lambda size: sum(_near(other, size) for other in sizes), default=None)


def _near(size: float, reference: float) -> bool:
    return abs(size - reference) <= reference * EQUAL_BYTES_PCT / 100


def _group(model: str, bits: int, cells: list[CellResult]) -> ComparisonGroup:
    labels = list(dict.fromkeys(cell.label for cell in cells))
    finished = [cell for cell in cells if cell.finished]
    labelled = bool(finished) and all(cell.labelled for cell in finished)
    by_label = {label: [cell for cell in finished if cell.label == label] for label in labels}
    sizes = [fmean(c.file_bytes or 0 for c in own) for own in by_label.values() if own]
    reference = reference_bytes(sizes)
    failed = {label: sum(cell.label == label and not cell.finished for cell in cells) for label in labels}
    methods = [_method(label, by_label[label], failed[label], reference) for label in labels]
    first = finished[0].comparison if finished else None
    return ComparisonGroup(
        model=model,
        bits=bits,
        measure="top1_pct" if labelled else "kl_nats",
        images=None if first is None else first.labelled_count if labelled else first.count,
        float_top1=None if first is None else first.float_top1,
        float_bytes=finished[0].float_bytes if finished else None,
        reference_bytes=reference,
        methods=_ranked(methods, labelled),
        pairs=_pairs(by_label),
    )


def _method(label: str, cells: list[CellResult], failed: int, reference: float | None) -> ComparedMethod:
    if not cells or reference is None:
        return ComparedMethod(label=label, rank=None, seeds=[], failed=failed)
    size = fmean(cell.file_bytes or 0 for cell in cells)
    comparisons = [cell.comparison for cell in cells if cell.comparison is not None]
    return ComparedMethod(
        label=label,
        rank=None,
        seeds=[cell.seed for cell in cells],
        failed=failed,
        file_bytes=size,
        bytes_difference_pct=100 * (size - reference) / reference,
        equal_bytes=_near(size, reference),
        effective_bits=fmean(cell.effective_bits or 0 for cell in cells),
        top1_pct=_spread(comparisons, lambda c: c.quantized_top1.value_pct if c.quantized_top1 else None),
        agreement_pct=_spread(comparisons, lambda c: c.agreement.value_pct),
        kl_nats=_spread(comparisons, lambda c: c.kl_nats),
        sqnr_db=_spread(comparisons, lambda c: c.sqnr_db),
        total_s=fmean(cell.total_s or 0 for cell in cells),
        peak_memory_bytes=max(cell.peak_memory_bytes or 0 for cell in cells),
        resumed=any(cell.resumed_layers for cell in cells),
    )


def _spread(comparisons: Iterable[Comparison], measure: Callable[[Comparison], float | None]) -> Spread | None:
    values = [value for comparison in comparisons if (value := measure(comparison)) is not None]
    if not values:
        return None
    several = len(values) > 1 and all(map(math.isfinite, values))
    return Spread(
        mean=sum(values) / len(values),  # fmean refuses −∞ with +∞
        low=min(values),
        high=max(values),
        deviation=stdev(values) if several else None,
    )


def _ranked(methods: list[ComparedMethod], labelled: bool) -> list[ComparedMethod]:
    """Best first; methods of other sizes stand at their place without a rank, failed ones last."""

    def loss(method: ComparedMethod) -> tuple[float, float]:
        """Lower is better; equal accuracies are told apart by fidelity."""
        kl = method.kl_nats.mean if method.kl_nats else math.inf
        if not labelled:
            return kl, 0.0
        return (-method.top1_pct.mean if method.top1_pct else math.inf), kl

    ordered = sorted(methods, key=lambda method: (not method.seeds, *loss(method)))
    ranks = iter(range(1, len(ordered) + 1))
    return [
        method.model_copy(update={"rank": next(ranks)}) if method.equal_bytes and method.seeds else method
        for method in ordered
    ]


def _pairs(by_label: dict[str, list[CellResult]]) -> list[MethodPair]:
    kept = {
        label: {cell.seed: read_predictions(Path(cell.run_dir)) for cell in cells if cell.run_dir}
        for label, cells in by_label.items()
    }
    return [_pair(first, second, kept[first], kept[second]) for first, second in combinations(by_label, 2)]


def _pair(
    first: str, second: str, ones: dict[int, Predictions | None], others: dict[int, Predictions | None]
) -> MethodPair:
    both = sorted(ones.keys() & others.keys())
    paired: list[PairedSeed] = []
    reason = "no seed that both finished" if not both else None
    for seed in both:
        one, other = ones[seed], others[seed]
        if one is None or other is None:
            reason = f"the run of {first if one is None else second} kept no predictions; --force runs it again"
            continue
        if not one.same_images(other):
            reason = "the two runs saw other images"
            continue
        right, wrong = one.right, other.right
        only_first, only_second = int((right & ~wrong).sum()), int((wrong & ~right).sum())
        paired.append(
            PairedSeed(
                seed=seed,
                images=len(right),
                only_first=only_first,
                only_second=only_second,
                p_value=mcnemar_p(only_first, only_second),
            )
        )
    points = [100 * (pair.only_first - pair.only_second) / pair.images for pair in paired if pair.images]
    return MethodPair(
        first=first,
        second=second,
        difference_points=fmean(points) if points else None,
        p_value=max((pair.p_value for pair in paired), default=None),
        seeds=paired,
        reason=None if paired else reason,
    )

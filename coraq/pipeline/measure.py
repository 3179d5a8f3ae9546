"""Both networks over the evaluation images or, without any, over calibration images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coraq.artifact import Predictions
from coraq.data import Images, ImageSet
from coraq.evaluate.accuracy import FloatLogits, compare_networks
from coraq.evaluate.chance import Answers, answers_at_chance, top1_at_chance
from coraq.events import Note, Sink
from coraq.results import Comparison

FIDELITY_IMAGES = 256  # without evaluation data, fidelity to the float network is measured on so many


@dataclass(frozen=True)
class Measured:
    """Accuracy on evaluation images or, without any, fidelity to the float network on calibration images."""

    comparison: Comparison | None = None
    evaluation_data: str | None = None
    fidelity: Comparison | None = None
    fidelity_data: str | None = None


class Choices:
    """Collects both networks' top-1 predictions, batch by batch."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        self._rows.append((expected.topk(1, dim=1).indices[:, 0], actual.topk(1, dim=1).indices[:, 0], labels))

    def predictions(self, images: str) -> Predictions:
        float_choice, quantized_choice, label = (torch.cat(column) for column in zip(*self._rows, strict=True))
        return Predictions(float_choice, quantized_choice, label, images)


def measure(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    device: torch.device,
    sink: Sink,
    known: FloatLogits | None = None,
    on_batch: Choices | None = None,
) -> Measured:
    """Compare both networks.

    Args:
        known: the float network's logits, kept from one run of a process to the next.
        on_batch: sees both networks' logits and the labels, batch by batch.
    """
    answers = Answers()

    def see(expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        answers.add(expected)
        if on_batch is not None:
            on_batch(expected, actual, labels)

    more: dict[str, Any] = {"known": known, "on_batch": see}
    if images.evaluation is not None:
        evaluation = images.evaluation
        batches = _channels_last(evaluation.batches())
        comparison = compare_networks(teacher, student, batches, device, sink, evaluation.count, **more)
        _warn_of_chance(comparison, answers, evaluation, sink)
        return Measured(comparison, evaluation.counted())
    calibration = images.calibration
    unlabelled = ((x, torch.full_like(y, -1)) for x, y in calibration.batches())
    total = min(FIDELITY_IMAGES, calibration.count)
    limited = _channels_last(_limit(unlabelled, total))
    fidelity = compare_networks(teacher, student, limited, device, sink, total, **more)
    _warn_of_chance(fidelity, answers, calibration, sink)
    return Measured(None, None, fidelity, f"{fidelity.count} of the calibration images ({calibration.counted()})")


def _warn_of_chance(comparison: Comparison, answers: Answers, images: ImageSet, sink: Sink) -> None:
    """One warning where the float network only guesses. Networks may well be unsure of synthetic images."""
    if comparison.float_top1 is not None:
        warning = top1_at_chance(comparison.float_top1, comparison.num_classes)
    else:
        warning = None if images.synthetic else answers_at_chance(answers)
    if warning:
        sink(Note(warning, "warning"))


def _channels_last(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in batches:
        yield pixels.contiguous(memory_format=torch.channels_last), labels


def _limit(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in batches:
        yield pixels[:count], labels[:count]
        count -= len(pixels)
        if count <= 0:
            return

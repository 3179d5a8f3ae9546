"""Accuracy of a network, and how close a quantized network stays to its float original.

Error is measured as SQNR and KL divergence, never as cosine similarity, which is blind to scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coraq.errors import CoraqError
from coraq.evaluate.chance import two_classes
from coraq.evaluate.intervals import mcnemar_p, paired_difference, wilson
from coraq.events import Note, Sink, null_sink, stage
from coraq.results import Accuracy, Comparison, PairedDifference, Proportion

Batches = Iterable[tuple[Tensor, Tensor]]
UNLABELLED = -1
ONE_LOGIT = "the network has one logit: it is read as the log-odds of class 1 against class 0"
TOP5_FROM_CLASSES = 6  # with 5 classes or fewer every answer is in the top 5


def proportion(successes: int, count: int) -> Proportion:
    """`successes` of `count` in percent with its 95 % Wilson interval."""
    low, high = wilson(successes, count)
    return Proportion(value_pct=100 * successes / count, low_pct=100 * low, high_pct=100 * high, count=count)


def hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k largest logits. logits [n, classes], labels [n] → bool [n]."""
    return (logits.topk(k, dim=1).indices == labels[:, None]).any(1)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(reference) ‖ softmax(other)) of each row in nats, in float64. [n, classes] → [n]."""
    log_p, log_q = reference.double().log_softmax(1), other.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).clamp_min(0)  # rounding alone can make it −1e−17


def sqnr_db(signal_power: float, noise_power: float) -> float:
    """10·log10(signal/noise); +∞ without noise, −∞ where there is noise and no signal."""
    if noise_power == 0:
        return math.inf
    return 10 * math.log10(signal_power / noise_power) if signal_power > 0 else -math.inf


@contextmanager
def _evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own training flag is put back afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class _Hits:
    """Counts of one network over the labelled images."""

    top1: int = 0
    top5: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Count one batch; returns top-1 hits [n]."""
        right = hits(logits, labels, 1)
        self.top1 += int(right.sum())
        if logits.shape[1] >= TOP5_FROM_CLASSES:
            self.top5 += int(hits(logits, labels, 5).sum())
        return right

    def proportions(self, count: int, classes: int) -> tuple[Proportion | None, Proportion | None]:
        if count == 0:
            return None, None
        return proportion(self.top1, count), proportion(self.top5, count) if classes >= TOP5_FROM_CLASSES else None


@dataclass
class _Pairs:
    """Running sums of a comparison."""

    agreeing: int = 0
    only_float: int = 0
    only_quantized: int = 0
    both: int = 0
    kl: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    float_hits: _Hits = field(default_factory=_Hits)
    quantized_hits: _Hits = field(default_factory=_Hits)

    def add(self, expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        """Add one batch: logits of the float and of the quantized network [n, classes], labels [n]."""
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected.double() - actual.double()).square().sum())
        expected, actual = two_classes(expected), two_classes(actual)
        self.agreeing += int((hits(actual, expected.topk(1, dim=1).indices[:, 0], 1)).sum())
        self.kl += float(kl_divergence(expected, actual).sum())
        known = labels != UNLABELLED
        if known.any():
            float_right = self.float_hits.add(expected[known], labels[known])
            quantized_right = self.quantized_hits.add(actual[known], labels[known])
            self.both += int((float_right & quantized_right).sum())
            self.only_float += int((float_right & ~quantized_right).sum())
            self.only_quantized += int((quantized_right & ~float_right).sum())

    def difference(self, count: int) -> PairedDifference | None:
        if count == 0:
            return None
        neither = count - self.both - self.only_float - self.only_quantized
        low, high = paired_difference(self.both, self.only_quantized, self.only_float, neither)
        return PairedDifference(
            points=100 * (self.only_quantized - self.only_float) / count,
            low_points=100 * low,
            high_points=100 * high,
            only_float_right=self.only_float,
            only_quantized_right=self.only_quantized,
            p_value=mcnemar_p(self.only_quantized, self.only_float),
        )


def _logits(network: nn.Module, images: Tensor, who: str) -> tuple[Tensor, float]:
    """One forward pass: logits [n, classes] on the CPU and its seconds.

    Raises:
        CoraqError: the output is not [n, classes], or holds a value that is not finite.
    """
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    with torch.inference_mode():  # here and not around the loop: the images may outlive it in a cache
        output = network(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    time_s = time.perf_counter() - start
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != images.shape[0]:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CoraqError(
            f"the {who} network's output for {images.shape[0]} images has shape {shape}, not [images, classes]",
            "accuracy needs a classifier: check --model-kwargs",
        )
    output = output.float().cpu()
    finite = output.isfinite()
    if not finite.all():
        row, column = (int(index) for index in (~finite).nonzero()[0])
        broken = int((~finite).any(1).sum())
        raise CoraqError(
            f"the {who} network's logits are not finite for {broken} of {images.shape[0]} images of a batch "
            f"(image {row}, class {column}: {output[row, column].item()})",
            "try --float-dtype float32 and more --bits; if it is the float network, check its weights",
        )
    return output, time_s


def _check_labels(labels: Tensor, classes: int) -> Tensor:
    """Labels [n] on the CPU.

    Raises:
        CoraqError: a label that is neither a class of the network nor −1.
    """
    labels = labels.detach().cpu().long()
    wrong = (labels < UNLABELLED) | (labels >= classes)
    if wrong.any():
        raise CoraqError(
            f"label {int(labels[wrong][0])} with a network of {classes} classes",
            "check --class-map, and that the data's class folders are those of the network",
        )
    return labels


def _no_images() -> CoraqError:
    return CoraqError("no images to evaluate on", "check --data-dir, --split and --eval-size")


@dataclass
class FloatLogits:
    """The float network's logits on one list of batches: filled by the first comparison, read by those after it.

    Attributes:
        batches: [n, classes] each, on the CPU; empty until a comparison has reached the end of its images.
        time_s: seconds of the forward passes that they took.
    """

    batches: list[Tensor] = field(default_factory=list)
    time_s: float = 0.0


def compare_networks(
    teacher: nn.Module,
    student: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    sink: Sink = null_sink,
    total: int = 0,
    stage_name: str = "evaluate",
    known: FloatLogits | None = None,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Comparison:
    """Run both networks over the images once, and compare accuracy, decisions and logits.

    Args:
        teacher: the float network, on `device`.
        student: the quantized network, on `device`.
        batches: pairs of images [n, channels, height, width] and labels [n]; label −1 means unlabelled.
        device: where the images are moved to.
        sink: takes the events of a stage named `stage_name`, which advances image by image.
        total: number of images, for progress; 0 where not known.
        known: the teacher's logits on the same batches, if an earlier comparison has filled it; else filled here.
        on_batch: gets float logits [n, classes], quantized logits and labels [n] of every batch. One logit is
            given, and counted, as the two of its sigmoid: (0, logit).

    Raises:
        CoraqError: no images, logits that are not finite or not [n, classes], a label out of range.
    """
    pairs = _Pairs()
    measured: list[Tensor] = []
    count = labelled = classes = 0
    float_s = quantized_s = 0.0
    with _evaluation_mode(teacher, student), stage(sink, stage_name, total) as current:
        for images, labels in batches:
            images = images.to(device).contiguous(memory_format=torch.channels_last)
            if known is not None and known.batches:
                expected = known.batches[len(measured)]
            else:
                expected, time_s = _logits(teacher, images, "float")
                float_s += time_s
            measured.append(expected if known is not None else expected[:0])
            actual, time_s = _logits(student, images, "quantized")
            quantized_s += time_s
            if actual.shape != expected.shape:
                raise CoraqError(
                    f"the quantized network has {actual.shape[1]} classes and the float one {expected.shape[1]}"
                )
            if expected.shape[1] == 1 and count == 0:
                sink(Note(ONE_LOGIT))
            classes = max(expected.shape[1], 2)
            labels = _check_labels(labels, classes)
            pairs.add(expected, actual, labels)
            if on_batch is not None:
                on_batch(two_classes(expected), two_classes(actual), labels)
            count += len(labels)
            labelled += int((labels != UNLABELLED).sum())
            current.advance(count)
    if count == 0:
        raise _no_images()
    if known is not None:
        if not known.batches:
            known.batches, known.time_s = measured, float_s
        float_s = known.time_s
    float_top1, float_top5 = pairs.float_hits.proportions(labelled, classes)
    quantized_top1, quantized_top5 = pairs.quantized_hits.proportions(labelled, classes)
    return Comparison(
        count=count,
        labelled_count=labelled,
        num_classes=classes,
        float_top1=float_top1,
        float_top5=float_top5,
        quantized_top1=quantized_top1,
        quantized_top5=quantized_top5,
        top1_difference=pairs.difference(labelled),
        agreement=proportion(pairs.agreeing, count),
        kl_nats=pairs.kl / count,
        sqnr_db=sqnr_db(pairs.signal, pairs.noise),
        float_s=float_s,
        quantized_s=quantized_s,
    )


def evaluate_network(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    sink: Sink = null_sink,
    total: int = 0,
    stage_name: str = "evaluate",
) -> Accuracy:
    """Top-1 and top-5 of one network. Arguments and errors as for `compare_networks`."""
    counts = _Hits()
    count = labelled = classes = 0
    seconds = 0.0
    with _evaluation_mode(model), stage(sink, stage_name, total) as current:
        for images, labels in batches:
            logits, time_s = _logits(
                model, images.to(device).contiguous(memory_format=torch.channels_last), "evaluated"
            )
            seconds += time_s
            logits = two_classes(logits)
            classes = logits.shape[1]
            labels = _check_labels(labels, classes)
            known = labels != UNLABELLED
            if known.any():
                counts.add(logits[known], labels[known])
            count += len(labels)
            labelled += int(known.sum())
            current.advance(count)
    if count == 0:
        raise _no_images()
    top1, top5 = counts.proportions(labelled, classes)
    return Accuracy(count=count, labelled_count=labelled, num_classes=classes, top1=top1, top5=top5, time_s=seconds)

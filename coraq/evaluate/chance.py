"""Whether a float network does better than guessing: where it does not, its inputs or labels are most likely wrong."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coraq.results import Proportion

LEAST_IMAGES = 10  # fewer say nothing
NEAR = 1.5  # a top-1 of up to so many times chance, if it is not significantly above it, counts as chance
UNIFORM = 0.97  # share of the largest possible entropy from which answers count as uniform
LEAST_CLASSES = 10  # with fewer, all images may well be of one class
LEAST_ALIKE = 32  # images of which all get the same answer, before that is mentioned

ADVICE = (
    "check the order of the classes (--class-map), the preprocessing (--mean, --std, --crop-pct, --img-size; images "
    "given from Python must be normalised) and that the weights are trained"
)


class Answers:
    """What a network's logits say about the images, summed batch by batch."""

    def __init__(self) -> None:
        self.count = self.classes = 0
        self._entropy = 0.0
        self._chosen: set[int] = set()

    def add(self, logits: Tensor) -> None:
        """Add a batch of logits [n, classes]."""
        log_p = logits.double().log_softmax(1)
        self.count += len(logits)
        self.classes = logits.shape[1]
        self._entropy += float(-(log_p.exp() * log_p).sum())
        self._chosen.update(logits.topk(1, dim=1).indices[:, 0].tolist())

    @property
    def entropy_nats(self) -> float:
        """Mean over images of the entropy of the softmax."""
        return self._entropy / max(self.count, 1)

    @property
    def only(self) -> int | None:
        """The class that all images are given; None if there are several."""
        return next(iter(self._chosen)) if len(self._chosen) == 1 else None


def top1_at_chance(top1: Proportion, classes: int) -> str | None:
    """A warning if a measured top-1 is that of guessing among `classes` classes, else None."""
    chance = 100 / classes
    few = top1.value_pct * top1.count <= 100.5  # at most one image
    guesses = few or (top1.low_pct <= chance and top1.value_pct <= NEAR * chance)
    if top1.count < LEAST_IMAGES or not guesses:
        return None
    return (
        f"the float network's top-1, {top1.value_pct:.4g} % of {top1.count} images, is that of chance "
        f"({chance:.4g} % with {classes} classes): {ADVICE}"
    )


def answers_at_chance(answers: Answers) -> str | None:
    """A warning if answers to images without labels are uniform, or the same to all images; else None."""
    count, classes = answers.count, answers.classes
    if count < LEAST_IMAGES or classes < 2:
        return None
    if answers.entropy_nats >= UNIFORM * math.log(classes):
        return (
            f"the float network's answers to {count} images are those of chance (their entropy is "
            f"{answers.entropy_nats:.3g} nats, of {classes} equally likely classes {math.log(classes):.3g}): {ADVICE}"
        )
    if answers.only is not None and count >= LEAST_ALIKE and classes >= LEAST_CLASSES:
        return f"the float network answers class {answers.only} to all of {count} images: {ADVICE}"
    return None


def two_classes(logits: Tensor) -> Tensor:
    """One logit [n, 1] as the two logits (0, logit) of its sigmoid [n, 2]; others as they are."""
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits

"""Whether calibration images say anything about a network's inputs, and whether tensors look normalised for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coraq.data.preprocess import Preprocess

FLAT = 1e-2  # an image whose values range over less than this share of the largest is of one colour


def uninformative(batches: Sequence[Tensor]) -> str | None:
    """What is wrong with images [n, channels, height, width] that all are of one colour, or all the same; else None.

    A single image is not called the same as itself.
    """
    if all(bool(_of_one_colour(batch).all()) for batch in batches):
        return "each calibration image is of one colour"
    first = batches[0][:1]
    several = sum(len(batch) for batch in batches) > 1
    if several and all(torch.equal(batch, first.expand_as(batch)) for batch in batches):
        return "all calibration images are the same"
    return None


def _of_one_colour(images: Tensor) -> Tensor:
    """Whether each channel of each image is constant, bool [n]."""
    pixels = images.flatten(2)
    spread = pixels.amax(2) - pixels.amin(2)
    return (spread <= FLAT * pixels.abs().amax(2)).all(1)


def not_normalised(images: Tensor, preprocess: Preprocess) -> str | None:
    """A warning for images [n, channels, height, width] that the network's normalisation cannot have made; else None.

    Normalised pixels lie in (0 − mean)/std … (1 − mean)/std. Values far outside are those of pixels of 0 to 255; values
    that are never negative are those of pixels of 0 to 1.
    """
    low = min(-m / s for m, s in zip(preprocess.mean, preprocess.std, strict=True))
    high = max((1 - m) / s for m, s in zip(preprocess.mean, preprocess.std, strict=True))
    least, most = float(images.min()), float(images.max())
    found = f"the images given range over {least:.4g} to {most:.4g}, normalised ones over {low:.4g} to {high:.4g}"
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (preprocess.mean, preprocess.std))
    advice = f"scale pixels to 0…1, subtract the mean ({mean}) and divide by the deviation ({std})"
    beyond = most > 20 and most > 4 * high
    raw = low < -0.5 and least >= 0 and 0.5 < most <= 1
    return f"{found}: {advice}" if beyond or raw else None

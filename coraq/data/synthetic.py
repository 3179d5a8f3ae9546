"""Images made on the spot, for calibration where no photographs are at hand.

Dead leaves: opaque shapes of many sizes lie over each other, each with its own colour, shading and 1/f
texture. They share with photographs what a network's first layers respond to: sharp edges at every scale, a
power spectrum near 1/f², and colours that vary mostly in brightness.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from coraq.data.imageset import UNLABELLED, Batch, ImageSet, digest
from coraq.data.preprocess import Preprocess

LEAVES = 50  # shapes an image
TEXTURES = 24  # fields of noise that all leaves of a set share
# Mean of natural images, and the axes along which their pixels vary (rows: brightness, blue-yellow, red-green)
# with the deviation along each: the principal components of ImageNet's pixels (Krizhevsky et al. 2012).
MEAN_COLOUR = np.array([0.485, 0.456, 0.406], dtype=np.float32)
COLOUR_AXES = np.array([[0.5675, 0.5808, 0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]], np.float32)
COLOUR_STD = np.array([0.466, 0.137, 0.067], dtype=np.float32)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # PIL's weights of "L"


def synthetic_images(count: int, preprocess: Preprocess, seed: int, batch_size: int = 32) -> ImageSet:
    """`count` dead-leaves images, normalised like photographs. Made while they are read; none is kept.

    Image i depends on `seed` and i only, so a smaller set is the beginning of a larger one.
    """
    return _SyntheticImages(count, preprocess, seed, batch_size)


class _SyntheticImages(ImageSet):
    synthetic = True

    def __init__(self, count: int, preprocess: Preprocess, seed: int, batch_size: int) -> None:
        super().__init__(
            description=f"{count} synthetic images",
            count=count,
            fingerprint=digest("dead leaves 1", count, seed, preprocess.input_size),
            batch_size=batch_size,
            labelled=False,
        )
        self._preprocess, self._seed = preprocess, seed

    def _read(self, batch_size: int) -> Iterator[Batch]:
        channels, height, width = self._preprocess.input_size
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self._preprocess.mean, self._preprocess.std))
        textures = np.stack(
            [_texture(height, width, np.random.default_rng([self._seed, 1, k])) for k in range(TEXTURES)]
        )
        for start in range(0, self.count, batch_size):
            numbers = range(start, min(start + batch_size, self.count))
            pictures = [
                _dead_leaves(height, width, textures, np.random.default_rng([self._seed, 0, i])) for i in numbers
            ]
            pixels = torch.from_numpy(np.stack(pictures))  # uint8 [n, height, width, 3]
            yield (_channels(pixels, channels) - mean) / std, torch.full((len(numbers),), UNLABELLED)


def _channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 [n, h, w, 3] to float32 [n, channels, h, w] in 0…1; grey for one channel, repeated for more than three."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    if channels == 1:
        return (images * torch.from_numpy(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return images[:, torch.arange(channels) % 3].contiguous()


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Periodic noise, float32 [height, width], mean 0 and deviation 1, its amplitude falling as 1/f^a, a in 0.5…1.4."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    # Stretching one axis by up to three gives grain a direction, as wood, grass and fur have.
    stretch, angle = 3 ** rng.random(), rng.random() * np.pi
    along, across = np.cos(angle) * fx + np.sin(angle) * fy, np.cos(angle) * fy - np.sin(angle) * fx
    frequency = np.hypot(along * stretch, across / stretch)
    frequency[0, 0] = np.inf
    amplitude = frequency ** -(0.5 + 0.9 * rng.random())
    noise = np.fft.rfft2(rng.standard_normal((height, width)))
    field = np.fft.irfft2(noise * amplitude, s=(height, width))
    return np.asarray(field / max(field.std(), 1e-12), dtype=np.float32)


def _dead_leaves(height: int, width: int, textures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 [height, width, 3]."""
    owner = _leaf_map(height, width, rng)  # the leaf on top at each pixel; 0 is the background
    leaves = LEAVES + 1
    # Variances of the picture's, the leaf's and the texture's share add up to that of natural pixels.
    tint = rng.standard_normal(3).astype(np.float32) * COLOUR_STD * 0.45
    contrast = np.float32(0.5 + 0.8 * rng.random())
    colour = rng.standard_normal((leaves, 3)).astype(np.float32) * COLOUR_STD * contrast * 0.8 + tint
    strength = (rng.gamma(0.5, 0.35, leaves) * contrast).astype(np.float32)
    slope = (rng.standard_normal((2, leaves)) * 0.25 * contrast).astype(np.float32)

    y, x = np.mgrid[0:height, 0:width]
    shift_y, shift_x = rng.integers(0, height, leaves), rng.integers(0, width, leaves)
    kind = rng.integers(0, len(textures), leaves)
    grain = textures[kind[owner], (y + shift_y[owner]) % height, (x + shift_x[owner]) % width]
    light = slope[0][owner] * (y / height - 0.5).astype(np.float32) + slope[1][owner] * (x / width - 0.5).astype(
        np.float32
    )
    components = colour[owner]  # [height, width, 3] along the colour axes
    components[..., 0] += strength[owner] * grain + light
    picture = components @ COLOUR_AXES + MEAN_COLOUR

    # The lens: edges of photographs are never perfectly sharp.
    blur = np.float32(0.25 * rng.random())
    for axis in (0, 1):
        picture = (1 - 2 * blur) * picture + blur * (np.roll(picture, 1, axis) + np.roll(picture, -1, axis))
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(0.02 * rng.random())  # the sensor
    return np.asarray(np.clip(picture * 255 + 0.5, 0, 255), dtype=np.uint8)


def _leaf_map(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Which leaf shows at each pixel, int64 [height, width]: ellipses and rectangles, the larger rather below."""
    side = max(height, width)
    smallest, largest = 0.012, 0.6  # radius in sides
    radius = smallest * (largest / smallest) ** (rng.random(LEAVES) ** 1.2)
    radius = radius[np.argsort(-radius * np.exp(rng.standard_normal(LEAVES) * 0.5))] * side
    centre = rng.random((LEAVES, 2)) * (height, width)
    aspect, angle = np.exp(rng.standard_normal(LEAVES) * 0.4), rng.random(LEAVES) * np.pi
    boxy = rng.random(LEAVES) < 0.4
    owner = np.zeros((height, width), dtype=np.int64)
    for leaf in range(LEAVES):
        reach = radius[leaf] * max(aspect[leaf], 1 / aspect[leaf]) * (1.42 if boxy[leaf] else 1.0)
        top, left = (max(int(c - reach), 0) for c in centre[leaf])
        bottom, right = (int(c + reach) + 2 for c in centre[leaf])
        window = owner[top:bottom, left:right]
        dy = np.arange(top, top + window.shape[0])[:, None] - centre[leaf, 0]
        dx = np.arange(left, left + window.shape[1])[None] - centre[leaf, 1]
        cos, sin = np.cos(angle[leaf]), np.sin(angle[leaf])
        u = (dx * cos + dy * sin) / (radius[leaf] * aspect[leaf])
        v = (dy * cos - dx * sin) / (radius[leaf] / aspect[leaf])
        inside = np.maximum(np.abs(u), np.abs(v)) < 1 if boxy[leaf] else u * u + v * v < 1
        window[inside] = leaf + 1
    return owner

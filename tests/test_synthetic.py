"""Claims about the images made on the spot."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coraq.config import DataConfig
from coraq.data import ImageSet, Preprocess, open_images, synthetic_images

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess((3, 224, 224), "bicubic", 0.875, "center", MEAN, STD)


def everything(images: ImageSet) -> Tensor:
    return torch.cat([batch for batch, _ in images.batches()])


def spectrum_slope(images: Tensor) -> float:
    """Slope of log power over log spatial frequency, 0.015 to 0.4 cycles a pixel; [n, c, h, h]."""
    grey = images.mean(1)
    side = grey.shape[-1]
    window = torch.hann_window(side)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window[:, None] * window
    power = torch.fft.fft2(grey).abs().square().mean(0)
    axis = torch.fft.fftfreq(side)
    frequency = torch.hypot(axis[:, None], axis[None])
    edges = torch.logspace(math.log10(0.015), math.log10(0.4), 14).tolist()
    bands = [(frequency >= low) & (frequency < high) for low, high in pairwise(edges)]
    y = torch.stack([power[band].mean().log() for band in bands])
    x = torch.tensor([math.log(low * high) / 2 for low, high in pairwise(edges)])
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def test_same_seed_same_images_in_any_batching_and_a_smaller_set_begins_a_larger() -> None:
    preprocess = Preprocess((3, 40, 56), "bicubic", 1.0, "center", MEAN, STD)
    seven, three = (synthetic_images(count, preprocess, 5, batch_size=4) for count in (7, 3))
    images = everything(seven)
    assert images.shape == (7, 3, 40, 56)
    assert torch.equal(images, everything(seven))
    assert torch.equal(images, torch.cat([batch for batch, _ in seven.batches(3)]))
    assert torch.equal(images[:3], everything(three))
    assert not torch.equal(images[:3], everything(synthetic_images(3, preprocess, 6)))
    assert seven.fingerprint == synthetic_images(7, preprocess, 5, batch_size=2).fingerprint
    assert len({s.fingerprint for s in (seven, three, synthetic_images(7, preprocess, 6))}) == 3


def test_the_global_generators_are_left_alone() -> None:
    state = torch.random.get_rng_state()
    everything(synthetic_images(2, PREPROCESS, 0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_spectrum_and_pixels_are_like_photographs() -> None:
    # Natural images: power falls as 1/f^2, by most surveys between 1.6 and 2.8 for single sets; white noise has 0.
    images = everything(synthetic_images(32, PREPROCESS, 0))
    assert -2.9 < spectrum_slope(images) < -1.9
    assert images.mean().abs() < 0.3  # normalised with the statistics of photographs: mean 0, deviation 1
    assert 0.8 < images.std() < 1.2
    brightness, *colours = torch.linalg.svdvals(images.permute(0, 2, 3, 1).reshape(-1, 3)).tolist()
    assert all(colour < 0.5 * brightness for colour in colours)  # mostly grey, as the world is


def test_one_channel_and_other_normalisation() -> None:
    grey = everything(synthetic_images(2, Preprocess((1, 64, 64), "bicubic", 1.0, "center", (0.5,), (0.5,)), 0))
    assert grey.shape == (2, 1, 64, 64)
    assert grey.min() >= -1
    assert grey.max() <= 1


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs ../shared/assets")
def test_the_slope_is_within_a_half_of_real_photographs() -> None:
    data = DataConfig(calib_dir=str(ASSETS / "imagenet-sample"), calib_size=64, workers=0)
    real = everything(open_images(data, PREPROCESS, None, 0).calibration)
    assert abs(spectrum_slope(real) - spectrum_slope(everything(synthetic_images(32, PREPROCESS, 0)))) < 0.5

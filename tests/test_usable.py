"""Claims about calibration images that say nothing, and about images that are not normalised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import coraq
from coraq.config import DataConfig, RunConfig
from coraq.data import Preprocess, demo_images
from coraq.data.usable import not_normalised, uninformative
from coraq.events import ListSink, Note
from coraq.network.load import load_model

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGENET = Preprocess((3, 8, 8), "bicubic", 0.9, "center", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("images", "wrong"),
    [
        (torch.zeros(6, 3, 8, 8), "of one colour"),
        (IMAGES[:, :, :1, :1].expand_as(IMAGES), "of one colour"),
        (IMAGES[:1].expand_as(IMAGES), "are the same"),
        (IMAGES, None),
        (IMAGES[:1], None),
        (1e-6 * IMAGES, None),
        (torch.cat([torch.zeros(5, 3, 8, 8), IMAGES[:1]]), None),
    ],
)
def test_images_of_one_colour_or_all_the_same_say_nothing(images: Tensor, wrong: str | None) -> None:
    for size in (1, 4, 6):
        found = uninformative(images.split(size))
        assert (found is None) if wrong is None else wrong in (found or "")


@pytest.mark.parametrize("content", ["one digit", "zeros"])
@pytest.mark.parametrize("method", ["comq", "mixed"])
def test_images_that_say_nothing_are_replaced_and_do_no_worse_than_nearest_rounding(content: str, method: str) -> None:
    network = load_model(RunConfig(model="demo")).module
    evaluation = demo_images(Preprocess.resolve(network, DataConfig()), DataConfig(), 0).evaluation
    assert evaluation is not None
    images = torch.cat([batch for batch, _ in evaluation.batches()])
    data = images[:1].expand(32, -1, -1, -1) if content == "one digit" else torch.zeros_like(images[:32])
    expected = network(images).argmax(1)

    def agreement(name: str) -> float:
        sink = ListSink()
        module, result = coraq.quantize(network, name, 4, data, sink=sink)
        assert result.calibration.synthetic
        notes = [event.message for event in sink.events if isinstance(event, Note)]
        assert sum("says nothing of the network's inputs" in note for note in notes) == 1
        return float((module(images).argmax(1) == expected).float().mean())

    with torch.no_grad():
        assert agreement(method) >= agreement("rtn")


def test_pixels_that_are_not_normalised_are_told_from_those_that_are() -> None:
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    assert not_normalised((pixels - mean) / std, IMAGENET) is None
    assert "0.485, 0.456, 0.406" in (not_normalised(255 * pixels, IMAGENET) or "")
    assert not_normalised(pixels, IMAGENET) is not None
    plain = Preprocess((3, 8, 8), "bicubic", 0.9, "center", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert not_normalised(pixels, plain) is None
    assert not_normalised(255 * pixels, plain) is not None
    assert not_normalised(torch.randn(4, 3, 8, 8), IMAGENET) is None


def test_unnormalised_images_from_python_are_said_once() -> None:
    network = load_model(RunConfig(model="demo")).module
    size = Preprocess.resolve(network, DataConfig()).input_size
    sink = ListSink()
    coraq.quantize(network, "rtn", 8, 255 * torch.rand(40, *size), sink=sink)
    notes = [event.message for event in sink.events if isinstance(event, Note) and event.level == "warning"]
    assert sum("the images given range over" in note for note in notes) == 1

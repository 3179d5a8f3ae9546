"""Image files and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import coraq
from coraq.config import DataConfig
from coraq.data import Images, ImageSet, Preprocess, open_images
from coraq.events import ListSink

PREPROCESS = Preprocess((3, 32, 32), "bicubic", 0.875, "center", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def write_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder of small noise images, `classes[name]` of them in each sub-folder ("" for none)."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            size = rng.integers(33, 60, 2)
            pixels = rng.integers(0, 256, (size[0], size[1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.{'png' if index % 2 else 'jpg'}")
    return folder


def write_digits(folder: Path, each: int) -> None:
    """The demo's digits as files: `each` of every class."""
    with np.load(Path(coraq.__file__).parent / "demo" / "digits.npz") as archive:
        images, labels = archive["test_images"], archive["test_labels"]
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for index in np.flatnonzero(labels == digit)[:each]:
            Image.fromarray(images[index]).save(folder / str(digit) / f"{index}.png")


def opened(num_classes: int | None = None, seed: int = 0, sink: Any = None, **options: Any) -> Images:
    """Images under these fields of a `DataConfig`, prepared by `PREPROCESS`."""
    options = {"workers": 0, "batch_size": 4, **{key: _text(value) for key, value in options.items()}}
    return open_images(DataConfig(**options), PREPROCESS, num_classes, seed, sink or ListSink())


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def everything(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """All images [n, channels, height, width] and labels [n] of a set."""
    batches = list(images.batches())
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def evaluation(images: Images) -> ImageSet:
    """The evaluation images, which there must be."""
    assert images.evaluation is not None
    return images.evaluation

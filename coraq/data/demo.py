"""The digits that ship with coraq: enough to run everything on real images with no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from PIL import Image

from coraq.config import DataConfig, RunConfig
from coraq.data.images import CALIBRATION, balanced, open_images
from coraq.data.imageset import DecodedImages, Images, Source, digest
from coraq.data.preprocess import Preprocess
from coraq.events import Note, Sink, null_sink


class DigitSource(Source):
    """Grey pictures in memory: uint8 [n, 8, 8]."""

    def __init__(self, part: str, pixels: np.ndarray) -> None:
        self.part, self.pixels = part, pixels

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"demo {self.part} digit {index}"


def run_images(
    config: RunConfig,
    preprocess: Preprocess,
    num_classes: int | None,
    sink: Sink = null_sink,
    label_names: Sequence[str] | None = None,
) -> Images:
    """The images of a run: what its configuration names, or the demo's own digits for the demo without any."""
    data = config.data
    if config.model == "demo" and data.data_dir is None and data.calib_dir is None and not data.dataset:
        return demo_images(preprocess, data, config.seed, sink)
    return open_images(data, preprocess, num_classes, config.seed, sink, label_names or ())


def demo_images(preprocess: Preprocess, data: DataConfig, seed: int, sink: Sink = null_sink) -> Images:
    """The bundled digits: up to `calib_size` of 1,197 to calibrate on, all or `eval_size` of the other 600."""
    with (files("coraq") / "demo" / "digits.npz").open("rb") as file, np.load(file) as archive:
        digits = {name: archive[name] for name in archive.files}
    available = len(digits["train_labels"])
    if data.calib_size > available:
        sink(Note(f"the demo has only {available} calibration images; --calib-size is {data.calib_size}"))
    rng = np.random.default_rng([seed, CALIBRATION])
    chosen = balanced(digits["train_labels"], data.calib_size, rng)
    tested = np.arange(len(digits["test_labels"]))[: data.eval_size]  # shuffled when it was split
    return Images(_digits("train", digits, chosen, preprocess, data), _digits("test", digits, tested, preprocess, data))


def _digits(
    part: str, digits: dict[str, np.ndarray], chosen: np.ndarray, preprocess: Preprocess, data: DataConfig
) -> DecodedImages:
    pixels, labels = digits[f"{part}_images"], digits[f"{part}_labels"][chosen].astype(int).tolist()
    return DecodedImages.of_source(
        DigitSource(part, pixels),
        chosen.tolist(),
        labels,
        preprocess,
        description=f"{len(chosen)} handwritten digits of the demo's {part} split",
        fingerprint=digest(part, pixels[chosen].tobytes(), labels),
        batch_size=data.batch_size,
        class_names=[str(digit) for digit in range(10)],
        workers=0,  # 64 pixels are decoded faster than a process starts
    )

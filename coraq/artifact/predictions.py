"""First choices of both networks on every evaluated image, so that two runs can be compared image by image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coraq.artifact.codec import serialise
from coraq.artifact.files import write_atomic

PREDICTIONS_NAME = "predictions.safetensors"
UNLABELLED = -1


@dataclass(frozen=True)
class Predictions:
    """One row an image, in the evaluation set's order; unreadable images have none.

    Attributes:
        float_choice, quantized_choice: the class of the largest logit, int64 [n].
        label: int64 [n], −1 where unknown.
        images: fingerprint of the set; only runs of the same one can be paired.
    """

    float_choice: Tensor
    quantized_choice: Tensor
    label: Tensor
    images: str

    @property
    def right(self) -> Tensor:
        """bool [m]: the quantized network's hits on labelled images; without labels, where it agrees with float."""
        known = self.label != UNLABELLED
        if bool(known.any()):
            return self.quantized_choice[known] == self.label[known]
        return self.quantized_choice == self.float_choice

    def same_images(self, other: Predictions) -> bool:
        """Whether row i of both is the same image."""
        return self.images == other.images and torch.equal(self.label, other.label)


def write_predictions(folder: Path, predictions: Predictions) -> None:
    """Write them into a run folder atomically, two bytes a number where that is enough."""
    tensors = {name: getattr(predictions, name) for name in ("float_choice", "quantized_choice", "label")}
    largest = max((int(value.max()) for value in tensors.values() if value.numel()), default=0)
    dtype = torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
    small = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
    write_atomic(folder / PREDICTIONS_NAME, serialise(small, {"images": predictions.images}))


def read_predictions(folder: Path) -> Predictions | None:
    """A run's predictions; None where the run has none (coraq 0.1 did not keep them) or they are damaged."""
    path = folder / PREDICTIONS_NAME
    if not path.is_file():  # nor a pipe, which the library would wait for
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).long() for key in file.keys()}  # noqa: SIM118 (not a dict)
            found = Predictions(**tensors, images=(file.metadata() or {}).get("images", ""))
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError, MemoryError):
        return None
    rows = {tuple(value.shape) for value in tensors.values()}
    return found if len(rows) == 1 and len(rows.pop()) == 1 else None

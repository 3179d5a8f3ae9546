"""The checkpoint's logits and decisions beside another network's, over the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class Agreement:
    """Running sums over images: the checkpoint's logits, and another network's."""

    count: int = 0
    agreeing: int = 0
    labelled: int = 0
    checkpoint_right: int = 0
    exported_right: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        """Logits [n, classes] of both; labels [n], −1 for none."""
        first, other = expected.argmax(1), actual.argmax(1)
        known = labels >= 0
        self.count += len(labels)
        self.agreeing += int((first == other).sum())
        self.labelled += int(known.sum())
        self.checkpoint_right += int((first == labels)[known].sum())
        self.exported_right += int((other == labels)[known].sum())
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected.double() - actual.double()).square().sum())

    @property
    def error(self) -> float:
        return float((self.noise / max(self.signal, 1e-30)) ** 0.5)

    @property
    def agreement_pct(self) -> float:
        return 100 * self.agreeing / max(self.count, 1)


@dataclass
class Comparer:
    """Runs the checkpoint's network once over the images, and any number of others beside it."""

    network: nn.Module
    others: dict[str, Any]
    contiguous: bool = False
    found: dict[str, Agreement] = field(default_factory=dict)

    def run(self, batches: Batches) -> dict[str, Agreement]:
        self.found = {name: Agreement() for name in self.others}
        for images, labels in batches:
            with torch.inference_mode():
                layout = torch.contiguous_format if self.contiguous else torch.channels_last
                expected = self.network(images.contiguous(memory_format=layout)).float()
            pixels = images.contiguous().numpy()
            for name, run in self.others.items():
                self.found[name].add(expected, torch.from_numpy(np.asarray(run(pixels))), labels)
        return self.found

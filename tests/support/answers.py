"""Networks whose answers are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Lookup(nn.Module):
    """A network whose image is its index: answers row `index` of a table of logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0, 0, 0].long()
        return self.dropout(self.table[rows])  # type: ignore[index]


def batches_of(labels: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels [n] for a `Lookup`: image `i` asks for row `i`."""
    images = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 3, 2, 2)
    return list(zip(images.split(size), labels.split(size), strict=True))


def one_hot_table(answers: list[int], classes: int = 10) -> Tensor:
    """Logits [n, classes] that answer these classes."""
    return 3 * nn.functional.one_hot(torch.tensor(answers), classes).float()

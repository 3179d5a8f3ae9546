"""Checkpoints of the small network with random codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from coraq.api import LowRank, QTensor, QuantizedLayer, minmax_grid
from coraq.artifact import write_checkpoint
from coraq.artifact.checkpoint import CheckpointInfo
from coraq.config import LayerScheme, Scheme
from coraq.network.fold import Trace, fold
from coraq.network.layers import install
from coraq.testing import random_images, small_network
from coraq.testing.networks import ARCHITECTURE
from support.tasks import make_task


def random_layer(shape: tuple[int, int, int], bits: int, kind: str, seed: int = 0) -> QuantizedLayer:
    """Codes that use the whole range, on every kind of grid that a method can return."""
    g = torch.Generator().manual_seed(seed)
    groups, out, inputs = shape
    codes = torch.randint(0, 2**bits, shape, generator=g).to(torch.uint8)
    scales = (1, 1, 1) if kind == "tensor" else (groups, out, 1)
    scale = torch.rand(scales, generator=g) * 0.1 + 1e-3
    zero = torch.randint(0, 2**bits, scales, generator=g).to(torch.uint8) if kind == "affine" else None
    codebook = torch.randn(2**bits, generator=g) if kind == "codebook" else None
    fraction = min(3, 8 - bits) if kind == "finer" else 0
    if kind == "finer":
        zero = torch.randint(0, 2 ** (bits + fraction), scales, generator=g).to(torch.uint8)
    adapter = None
    if kind == "adapter":
        b = minmax_grid(torch.randn(groups, out, 3, generator=g), 8)
        a = minmax_grid(torch.randn(groups, 3, inputs, generator=g), 4)
        adapter = LowRank(
            b.pack(torch.randint(0, 256, (groups, out, 3), generator=g)),
            a.pack(torch.randint(0, 16, (groups, 3, inputs), generator=g)),
        )
    bias = torch.randn(groups * out, generator=g)
    return QuantizedLayer(QTensor(codes, scale, bits, zero, codebook, fraction), adapter, bias)


class Written:
    """A quantized small network, and the checkpoint that it was written to."""

    def __init__(self, path: Path, bits: int = 4, kind: str = "symmetric", dtype: torch.dtype = torch.float32) -> None:
        self.path = path
        self.student = small_network()
        self.found: Trace = fold(self.student, random_images(2))
        task = make_task(self.student, Scheme.of(bits=bits), [], found=self.found)
        self.layers = {
            view.name: random_layer(view.shape, bits, kind, index) for index, view in enumerate(task.all_layers)
        }
        for name, layer in self.layers.items():
            install(self.student.get_submodule(name), layer.dequantize(), layer.bias)
        self.info = CheckpointInfo(
            architecture=ARCHITECTURE,
            structure=self.found.structure,
            scheme=Scheme.of(bits=bits, overrides={"head": LayerScheme(bits=7)}),
            provenance={"note": "a text with μ and \n in it"},
        )
        self.size = write_checkpoint(path, self.student, self.layers, self.info, dtype)


def with_info(made: Written, **update: Any) -> Path:
    """The checkpoint with other metadata under a right checksum, where it was."""
    info = made.info.model_copy(update=update)
    write_checkpoint(made.path, made.student, made.layers, info)
    return made.path

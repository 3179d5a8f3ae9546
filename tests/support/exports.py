"""Checkpoints of the small network to export, and the verification of what they become."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import coraq
from coraq.artifact import Checkpoint, load_checkpoint, write_checkpoint
from coraq.config import Scheme
from coraq.core.grid import minmax_grid
from coraq.core.tensors import LowRank, QTensor, QuantizedLayer
from coraq.export import verify
from coraq.export.onnx_file import OnnxExport
from coraq.testing import random_images, small_network


def checkpoint_of(
    folder: Path, bits: int = 4, symmetric: bool = False, awkward: bool = False, **scheme_: Any
) -> Checkpoint:
    """The small network under nearest rounding, written and read back."""
    path = folder / "model.safetensors"
    scheme_ = {
        "bits": bits,
        "symmetric": symmetric,
        "bias_correction": "off",
        "zero_point_fraction": 0,
        "column_scale": "none",
        **scheme_,
    }
    scheme = Scheme.of(first_bits=8, last_bits=5, **scheme_)
    network = small_network(awkward=awkward)
    coraq.quantize(network, "rtn", data=random_images(8), scheme=scheme, path=path)
    return load_checkpoint(path)


def with_adapter(name: str, layer: QuantizedLayer) -> QuantizedLayer:
    """The layer with a random adapter of rank 2."""
    groups, out, inputs = layer.weight.codes.shape
    generator = torch.Generator().manual_seed(len(name))

    def factor(rows: int, columns: int) -> QTensor:
        value = 0.1 * torch.randn(groups, rows, columns, generator=generator)
        grid = minmax_grid(value, 8)
        return grid.pack(grid.codes(value))

    return dataclasses.replace(layer, adapter=LowRank(factor(out, 2), factor(2, inputs)))


def with_layers(checkpoint: Checkpoint, change: Any) -> Checkpoint:
    """The checkpoint with every layer changed by `change(name, layer)`, written and read back."""
    layers = {name: change(name, layer) for name, layer in checkpoint.layers.items()}
    for name, layer in layers.items():
        module = checkpoint.module.get_submodule(name)
        assert isinstance(module.weight, torch.Tensor)
        module.weight.copy_(layer.dequantize().reshape(module.weight.shape))
    write_checkpoint(checkpoint.path, checkpoint.module, layers, checkpoint.info)
    return load_checkpoint(checkpoint.path)


def of_every_width(folder: Path, symmetric: bool) -> Checkpoint:
    """The small network's seven layers at 2, 3, … 8 bits."""
    checkpoint = checkpoint_of(folder, 8, symmetric)
    widths = dict(zip(checkpoint.layers, [8, 3, 5, 6, 7, 4, 2], strict=True))

    def at_its_width(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        weight = layer.dequantize()
        grid = minmax_grid(weight, widths[name], symmetric)
        return QuantizedLayer(grid.pack(grid.codes(weight)), bias=layer.bias)

    return with_layers(checkpoint, at_its_width)


def check_random(checkpoint: Checkpoint, export: OnnxExport, content: bytes | None = None) -> verify.Check:
    """Verify an ONNX file, by default the one exported, on 16 random images without labels."""
    images = random_images(16, seed=5)
    batches = [(images, torch.full((16,), -1))]
    return verify.check_onnx(checkpoint, export, content or export.content, batches, "random", 1)

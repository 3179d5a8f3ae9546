"""Where a layer's float weights lie on its grid, and how often each code is used: kept for the report's plots."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from coraq.artifact.files import write_atomic
from coraq.core.columns import divided
from coraq.core.tensors import QuantizedLayer
from coraq.results import WeightHistogram
from coraq.runtime.safe_files import read_plain

HISTOGRAMS_NAME = "histograms.json"
_MOST_BINS = 96
_Histograms = TypeAdapter(list[WeightHistogram])


def weight_histogram(name: str, weight: Tensor, layer: QuantizedLayer) -> WeightHistogram:
    """Counts of float weights and of codes along the grid, in steps: level i of an even grid lies at i.

    Args:
        weight: float32 [groups, out, in]. What the codes stand for is this less the adapter, if there is one.
    """
    q = layer.weight
    rest = weight if layer.adapter is None else weight - layer.adapter.dequantize()
    scale = torch.where(q.scale == 0, torch.ones_like(q.scale), q.scale)
    rest = divided(rest, q.columns)
    if q.codebook is not None:
        levels = q.codebook.double()
        position = (rest / scale).double()
    else:
        levels = torch.arange(2**q.bits, dtype=torch.float64)
        position = (rest / scale + q.zero).double()
    step = float(levels.max() - levels.min()) / max(len(levels) - 1, 1) or 1.0
    low, high = float(levels.min()) - step, float(levels.max()) + step
    bins = min(4 * (len(levels) + 1), _MOST_BINS)
    return WeightHistogram(
        name=name,
        low=low,
        high=high,
        weights=[int(n) for n in torch.histc(position.clamp(low, high), bins, low, high)],  # beyond the ends: end bins
        levels=levels.tolist(),
        codes=torch.bincount(q.codes.reshape(-1).long(), minlength=len(levels)).tolist(),
    )


def write_histograms(folder: Path, histograms: list[WeightHistogram]) -> None:
    """Write histograms.json into a run folder, atomically."""
    write_atomic(folder / HISTOGRAMS_NAME, _Histograms.dump_json(histograms))


def read_histograms(folder: Path) -> list[WeightHistogram]:
    """A run's histograms; none where they are absent or damaged: only plots need them."""
    try:
        return _Histograms.validate_json(read_plain(folder / HISTOGRAMS_NAME))
    except (OSError, ValidationError):
        return []

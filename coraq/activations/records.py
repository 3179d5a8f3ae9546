"""Calibrated activation grids as a checkpoint holds them, and how they come back into a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from coraq.activations.fake_quant import set_fake_quant
from coraq.config import Frozen
from coraq.core.tensors import ActivationGrid, QuantizedLayer
from coraq.errors import CoraqError
from coraq.network.layers import kernel_axes


class ActivationRecord(Frozen):
    """A calibrated point as the checkpoint's metadata hold it."""

    scale: float = Field(gt=0)
    zero_point: int
    bits: int = Field(ge=1)
    signed: bool
    readers: list[str] = Field(default_factory=list, description="quantized layers that read the tensor")
    producer: str | None = Field(default=None, description="module whose output it is; none: it acts at the readers")
    scaled: bool = Field(
        default=False, description="it is multiplied by its readers' column scales before it is rounded"
    )

    @property
    def grid(self) -> ActivationGrid:
        """The grid, of a tensor that is `scaled` without its factors."""
        return ActivationGrid(self.scale, self.zero_point, self.bits, self.signed)


def install_grids(
    model: nn.Module, records: Mapping[str, ActivationRecord], layers: Mapping[str, QuantizedLayer]
) -> None:
    """Put the grids of a checkpoint into a network.

    Raises:
        CoraqError: the network has no such module, or a grid is none.
    """
    modules = dict(model.named_modules())
    for name, record in records.items():
        try:
            record.grid.check()
            for target in [record.producer] if record.producer else record.readers:
                grid = record.grid
                if record.scaled:
                    columns = layers[target].weight.columns
                    if columns is None or record.producer:
                        raise ValueError("it has no column scales to be multiplied by")
                    grid = replace(grid, factors=spread_over(columns, modules[target]))
                set_fake_quant(modules[target], "output" if record.producer else "input", grid)
        except (KeyError, ValueError) as error:
            raise CoraqError(
                f"activation grid {name} does not fit the network: {error}", "Was the file changed, or timm?"
            ) from None


def spread_over(columns: Tensor, module: nn.Module) -> Tensor:
    """Column scales [groups, 1, channels] of a layer in a shape that spreads over its input."""
    return columns.reshape(-1, *[1] * kernel_axes(module))

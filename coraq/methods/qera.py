"""QERA (arXiv 2410.06040): the rank-r correction of each layer's output error in closed form, on any method's codes.

Minimises `tr[(D − BA) G (D − BA)ᵀ]` over B, A of a rank, exactly (before the factors are rounded to codes), where D is
what the base's codes leave of the weight and G the autocorrelation of the layer's inputs. The paper's formula needs
G's square root and its inverse; here the optimum is the projection of D on the leading eigenvectors of `D G Dᵀ`, the
same matrix (see coraq.core.lowrank). A convolution's adapter is a convolution to r channels and a 1×1 one; grouped
layers get one of each group; where even rank 1 cannot pay (depthwise layers) there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from coraq.api import (
    Base,
    Field,
    LayerOption,
    LayerView,
    MethodConfig,
    NetworkTask,
    QuantizedLayer,
    Scope,
    adapter_bytes,
    allocate_bits,
    alternate,
    can_pay,
    directions,
    low_rank,
)


class QERA:
    """Minimises each layer's output error over adapters of a rank, exactly, on the codes of a base method."""

    name: ClassVar[str] = "qera"
    summary: ClassVar[str] = "closed-form low-rank correction of each layer's output error, on any method's codes"
    version: ClassVar[str] = "2"
    needs_data: ClassVar[bool] = True
    scope: ClassVar[Scope] = "network"

    class Config(MethodConfig):
        base: str = Field(default="comq", description="method that makes the codes")
        base_options: dict[str, Any] = Field(default_factory=dict, description="that method's own options")
        rank: int | None = Field(default=None, ge=0, description="rank of every adapter, instead of a budget")
        budget: float = Field(
            default=0.05,
            ge=0,
            le=1,
            description="adapter bytes for each weight of the network, shared out by error saved for each byte",
        )
        form: Literal["exact", "approximate", "plain"] = Field(
            default="exact",
            description="inputs' autocorrelation: in full, its diagonal, or left out (the weight's own SVD)",
        )
        rounds: int = Field(default=0, ge=0, description="more rounds of quantizing W − BA and decomposing W − Q")
        adapter_bits: int = Field(default=8, ge=2, le=8, description="bits of the adapters' codes")
        correction: float = Field(
            default=0.5, ge=0, le=1, description="share of the earlier layers' errors that an adapter undoes; 0: none"
        )

        def column_scales(self) -> bool:
            return True

        def bases(self) -> Sequence[Base]:
            return (Base(self.base, self.base_options),)

    def __init__(self, config: Config) -> None:
        self.config = config

    def quantize(self, task: NetworkTask) -> None:
        if self.config.rank is None:
            ranks = task.decide_once("ranks", lambda: self._share_out(task), lambda kept: _are_ranks(kept, task.layers))
        else:
            ranks = {layer.name: self._capped(layer, self.config.rank) for layer in task.layers}
        for layer in task.layers:
            rank = ranks[layer.name] if layer.rank is None else self._capped(layer, layer.rank)
            squares = task.least_squares(layer.name, self.config.correction)
            quantized, errors = alternate(
                squares.weight,
                squares.error,
                partial(self._codes, task, layer.name),
                partial(low_rank, squares.inputs(self.config.form), rank, self.config.adapter_bits),
                self.config.rounds if rank else 0,
            )
            task.commit(layer.name, quantized, error=errors[-1] / max(squares.energy(), 1e-30), rounds=len(errors))

    def _codes(self, task: NetworkTask, name: str, subtract: Tensor | None = None) -> QuantizedLayer:
        return task.quantize_with(name, self.config.base, self.config.base_options, subtract=subtract)

    def _capped(self, layer: LayerView, rank: int) -> int:
        """The rank, or what the matrix has; 0 where even rank 1 cannot pay."""
        pays = can_pay(layer.shape, layer.bits, self.config.adapter_bits)
        return min(rank, *layer.shape[1:]) if pays else 0

    def _share_out(self, task: NetworkTask) -> dict[str, int]:
        """Ranks by layer: a first pass sees what every layer's codes leave, relative to the layer's output."""
        choices: dict[str, list[LayerOption]] = {}
        weights = sum(layer.weight.numel() for layer in task.layers)
        for layer in task.layers:
            squares = task.least_squares(layer.name, self.config.correction)
            codes = task.preview(layer.name, self._codes(task, layer.name))
            most = self._capped(layer, max(layer.shape))
            found = directions(squares.weight - codes.weight.dequantize(), squares.inputs(self.config.form), limit=most)
            left = found.left() / max(squares.energy(), 1e-30)
            sizes = (adapter_bytes(layer.shape, rank, self.config.adapter_bits) for rank in range(most + 1))
            choices[layer.name] = [
                LayerOption(size, float(loss)) for size, loss in zip(sizes, left[: most + 1], strict=True)
            ]
        taken = allocate_bits(list(choices.values()), self.config.budget * weights)
        return dict(zip(choices, taken, strict=True))


def _are_ranks(kept: object, layers: Sequence[LayerView]) -> bool:
    """Whether there is a rank for each of these layers."""
    return isinstance(kept, dict) and all(
        type(rank := kept.get(layer.name)) is int and 0 <= rank <= min(layer.shape[1:]) for layer in layers
    )

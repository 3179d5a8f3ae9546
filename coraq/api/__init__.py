"""All that a method may import: the protocols, and the types and numerics it is written with.

A method is one file. Most round one layer after another, and implement one function:

    class RoundToNearest(LayerMethod):
        name = "my-rtn"
        summary = "nearest rounding on a min-max grid"
        version = "1"
        needs_data = False

        class Config(MethodConfig):
            shrink: float = Field(default=1.0, gt=0, description="factor on the range")

        def quantize_layer(self, problem):
            grid = problem.grid_spec.minmax(problem.weight).scaled(self.config.shrink)
            return QuantizedLayer(grid.pack(grid.codes(problem.weight)))

Others declare a wider `scope` and implement `quantize(task)`; `coraq.api.protocols` says what each scope offers. A
method returns data, not modules: a committed layer is installed in the network being quantized, saved to the run
folder, and reported; so sequential calibration and resuming come for free.
"""

from __future__ import annotations

from pydantic import Field

from coraq.activations.fake_quant import set_fake_quant
from coraq.activations.points import QuantizationPoint
from coraq.api.protocols import (
    Base,
    BlockTask,
    LayerMethod,
    LayerTask,
    MethodConfig,
    NetworkTask,
    Quantizer,
)
from coraq.calibration.block_data import BlockData
from coraq.calibration.block_learning import uses_bfloat16
from coraq.calibration.block_options import BlockSolverConfig
from coraq.calibration.block_solver import BlockSolver
from coraq.calibration.layer_costs import (
    MeasuredLayer,
    allowed_widths,
    error_by_bits,
    measure_layers,
    predict_kl,
    predict_kl_by_channel,
)
from coraq.calibration.scopes import Scope
from coraq.calibration.statistics import LayerStats
from coraq.config import Frozen, LayerScheme, Scheme
from coraq.core.allocation import LayerOption, allocate_bits
from coraq.core.alternate import alternate
from coraq.core.columns import divided
from coraq.core.grid import Codebook, Grid, best_shrink, grid_from_range, minmax_grid, mse_grid, sigma_grid
from coraq.core.layer_problem import GridSpec, LayerProblem
from coraq.core.least_squares import LeastSquares
from coraq.core.lowrank import Directions, adapter, adapter_bytes, can_pay, directions, low_rank
from coraq.core.rank_search import SearchLayer, search_cutoffs
from coraq.core.sensitivity import kl_of_errors
from coraq.core.tensors import ActivationGrid, LowRank, QTensor, QuantizedLayer, stored_bytes
from coraq.errors import CoraqError, UsageError
from coraq.network.blocks import Block, ReconstructionUnit
from coraq.network.layers import LayerView

__all__ = [
    "ActivationGrid",
    "Base",
    "Block",
    "BlockData",
    "BlockSolver",
    "BlockSolverConfig",
    "BlockTask",
    "Codebook",
    "CoraqError",
    "Directions",
    "Field",
    "Frozen",
    "Grid",
    "GridSpec",
    "LayerMethod",
    "LayerOption",
    "LayerProblem",
    "LayerScheme",
    "LayerStats",
    "LayerTask",
    "LayerView",
    "LeastSquares",
    "LowRank",
    "MeasuredLayer",
    "MethodConfig",
    "NetworkTask",
    "QTensor",
    "QuantizationPoint",
    "QuantizedLayer",
    "Quantizer",
    "ReconstructionUnit",
    "Scheme",
    "Scope",
    "SearchLayer",
    "UsageError",
    "adapter",
    "adapter_bytes",
    "allocate_bits",
    "allowed_widths",
    "alternate",
    "best_shrink",
    "can_pay",
    "directions",
    "divided",
    "error_by_bits",
    "grid_from_range",
    "kl_of_errors",
    "low_rank",
    "measure_layers",
    "minmax_grid",
    "mse_grid",
    "predict_kl",
    "predict_kl_by_channel",
    "search_cutoffs",
    "set_fake_quant",
    "sigma_grid",
    "stored_bytes",
    "uses_bfloat16",
]

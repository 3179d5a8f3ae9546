"""A budget that the user names for the whole file, as bytes for the layers' codes."""

from __future__ import annotations

import torch

from coraq.artifact.checkpoint import bytes_besides_layers
from coraq.calibration.task import CalibrationTask
from coraq.errors import UsageError
from coraq.pipeline.prepare import Prepared
from coraq.pipeline.run_result import checkpoint_info

BYTES_OF_AN_ACTIVATION = 200  # what the header says of a grid that is not calibrated yet


def layers_budget(prepared: Prepared, task: CalibrationTask) -> int | None:
    """Bytes for codes, scales and zero points of all layers; None where the user has named no budget.

    Raises:
        UsageError: what else is in the file is larger than it may be.
    """
    config = prepared.config
    if config.budget is None:
        return None
    if config.budget_bits is not None:
        return int(config.budget_bits * sum(view.weight.numel() for view in task.all_layers) / 8)
    whole = config.size if config.size is not None else int(prepared.float_bytes / (config.ratio or 1.0))
    coding = prepared.method.budget_coding  # type: ignore[attr-defined]  # check_budget has seen that there is one
    rest = bytes_besides_layers(
        task.student,
        {view.name: view.shape for view in task.all_layers},
        checkpoint_info(prepared, task),
        getattr(torch, config.float_dtype),
        coding,
        zero_points=coding == "packed" and not prepared.scheme.weights.symmetric,
    )
    rest += BYTES_OF_AN_ACTIVATION * len(task.grids.points)
    if whole <= rest:
        raise UsageError(
            f"{config.budget} is impossible: names, biases and the float rest alone take {rest:,} bytes",
            "Give a larger budget, or --float-dtype float16.",
        )
    return whole - rest

"""Results of runs and of comparisons, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coraq.compare.ranking import groups_of
from coraq.config import DataConfig, LayerScheme, RunConfig, Scheme
from coraq.results import (
    CalibrationInfo,
    CellResult,
    CompareResult,
    Comparison,
    CostInfo,
    LayerResult,
    MachineInfo,
    PairedDifference,
    Proportion,
    RunResult,
    SizeInfo,
)

HOSTILE_NAME = '<script>alert("x")</script>&$x_1^{$\x07 a very long name of a layer'
TIMES = ("total_s", "float_pass_s", "stages", "peak_memory_bytes", "memory_bound_bytes", "run_dir", "command")


def comparison(labelled: bool = True) -> Comparison:
    """What an evaluation on 1000 images finds; without labels, no accuracy."""

    def share(value: float) -> Proportion:
        return Proportion(value_pct=value, low_pct=value - 2.5, high_pct=value + 2.25, count=1000)

    return Comparison(
        count=1000,
        labelled_count=1000 if labelled else 0,
        num_classes=10,
        float_top1=share(71.25) if labelled else None,
        float_top5=share(90.5) if labelled else None,
        quantized_top1=share(70.0) if labelled else None,
        quantized_top5=share(89.25) if labelled else None,
        top1_difference=PairedDifference(
            points=-1.25, low_points=-3.75, high_points=1.5, only_float_right=41, only_quantized_right=28, p_value=0.148
        )
        if labelled
        else None,
        agreement=share(88.5),
        kl_nats=0.03125,
        sqnr_db=21.5,
        float_s=12.5,
        quantized_s=13.75,
    )


def run_result(**changes: Any) -> RunResult:
    """A run of four layers with every part of a result, but for `changes`."""
    layers = [
        LayerResult(
            name=f"layer{index}.conv",
            kind="convolution",
            shape=(16, 8, 3, 3),
            bits=bits,
            bytes=700 + index,
            macs=1_152_000,
            weight_sqnr_db=sqnr,
            input_error=0.01 * index,
            output_error=error,
            metrics={"sweeps": 3 + index, "gain": 0.12345},
        )
        for index, (bits, sqnr, error) in enumerate(
            [(8, 45.0, 0.002), (4, 19.0, 0.11), (4, 17.0, 0.09), (8, 44.0, 0.12)]
        )
    ]
    content: dict[str, Any] = {
        "coraq_version": "0.1.0",
        "command": ["coraq", "quantize", "resnet18", "--model-kwargs", "head=(a b)"],
        "versions": {"python": "3.11.9", "torch": "2.15.0", "timm": "1.0.20"},
        "machine": MachineInfo(cpu="Testor 9000", threads=2, device="cpu"),
        "seed": 7,
        "config": RunConfig(
            model="resnet18",
            scheme=Scheme.of(bits=4, overrides={"a|b": LayerScheme(bits=3)}),
            data=DataConfig(calib_size=64),
        ),
        "method": "comq",
        "method_version": "3",
        "method_source": "built-in",
        "scheme_line": "W4A32, first/last layer 8/8 bits",
        "calibration": CalibrationInfo(description="folder cal", count=64, fingerprint="abc123def", synthetic=False),
        "evaluation_data": "folder val, split validation",
        "comparison": comparison(),
        "size": SizeInfo(
            float_bytes=46_800_000,
            file_bytes=6_240_000,
            effective_bits=4.125,
            quantized_weights=11_600_000,
            total_params=11_700_000,
            float_params=100_000,
        ),
        "cost": CostInfo(macs=1_820_000_000, bitops=58_240_000_000),
        "stages": {"load": 0.5, "quantize": 70.0, "evaluate": 26.25},
        "total_s": 96.75,
        "float_pass_s": 18.0,
        "peak_memory_bytes": 1_250_000_000,
        "memory_bound_bytes": 2_000_000_000,
        "layers": layers,
        "notes": ["3 corrupt images skipped"],
        "run_dir": "runs/resnet18-comq-w4-3f9a1c",
    }
    return RunResult.model_validate({**content, **changes})


def unmeasured() -> RunResult:
    """A run without evaluation images."""
    return run_result(
        evaluation_data=None, comparison=None, fidelity_data="256 synthetic images", fidelity=comparison(labelled=False)
    )


def cell_result(
    label: str, seed: int, top1: float, size: int, run_dir: Path | None = None, **changes: Any
) -> CellResult:
    """A cell of a comparison, of a method's label and a seed, with this top-1 accuracy in percent and size in bytes."""
    measured = comparison()
    assert measured.quantized_top1 is not None
    share = measured.quantized_top1.model_copy(update={"value_pct": top1})
    content: dict[str, Any] = {
        "model": "net",
        "label": label,
        "bits": 4,
        "seed": seed,
        "run_dir": None if run_dir is None else str(run_dir),
        "file_bytes": size,
        "float_bytes": 8 * size,
        "effective_bits": 4.1,
        "comparison": measured.model_copy(update={"quantized_top1": share}),
        "labelled": True,
        "total_s": 2.0,
        "peak_memory_bytes": 1000,
    }
    return CellResult(**{**content, **changes})


def compare_result(**changes: Any) -> CompareResult:
    """Four methods, one of a hostile name, at three widths with two seeds, and a cell that failed."""
    cells = [
        cell_result(
            label,
            seed,
            70 + 3 * bits + seed + len(label) / 10,
            1000 * bits * (3 if label == HOSTILE_NAME else 2),
            bits=bits,
        )
        for label in ("comq", "rtn", "cora:preset=paper:rank=4", HOSTILE_NAME)
        for bits in (4, 3, 2)
        for seed in (0, 1)
    ]
    errors = {f"layer{index}": 0.001 * 1.1**index for index in range(53)}
    cells = [one.model_copy(update={"layer_errors": errors, "command": ["coraq", "quantize", "net"]}) for one in cells]
    cells.append(cell_result("broken", 0, 0.0, 1000, reason=f"it failed: {HOSTILE_NAME}", hint="try again"))
    content: dict[str, Any] = {
        "coraq_version": "0.1.0",
        "command": ["coraq", "compare", HOSTILE_NAME],
        "versions": {"torch": "2.15.0"},
        "machine": MachineInfo(cpu="Testor 9000", threads=2, device="cpu"),
        "engine": "local",
        "scheme_line": "W4A32",
        "cells": cells,
        "groups": groups_of(cells),
        "total_s": 100.0,
        "ran_s": 99.0,
        "folder": "runs/compare-123456",
    }
    return CompareResult(**{**content, **changes})


def without_times(result: RunResult) -> dict[str, Any]:
    """All of a result but times, memory and places: what two runs of one configuration share."""
    content = json.loads(result.model_dump_json())
    for name in TIMES:
        content.pop(name)
    for comparison in (content["comparison"], content["fidelity"]):
        if comparison:
            comparison.pop("float_s"), comparison.pop("quantized_s")
    return content

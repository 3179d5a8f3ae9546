"""What a run found, as data: frozen models that metrics.json holds and that reports and the command line read.

Nothing here imports torch. Numbers carry their unit in their name; `None` means not measured, never zero.
Infinite values (the SQNR of an unchanged layer) are written to JSON as the string "Infinity".
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from coraq.config import RunConfig
from coraq.migration import upgrade_config

# metrics.json may come from a stranger: integers of any length, or a time that is not a number, cannot be reported
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Result(BaseModel):
    """A frozen model that refuses unknown keys and survives a JSON round trip with infinite values in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Proportion(Result):
    """A share of `count` images in percent, with its 95 % Wilson score interval."""

    value_pct: float
    low_pct: float
    high_pct: float
    count: Count = Field(description="images that the share is taken over")


class PairedDifference(Result):
    """Top-1 of the quantized network less that of the float one, in points, on the same images."""

    points: float
    low_points: float = Field(description="lower end of Newcombe's 95 % interval for paired proportions")
    high_points: float = Field(description="upper end of the same interval")
    only_float_right: Count = Field(description="images that only the float network gets right")
    only_quantized_right: Count = Field(description="images that only the quantized network gets right")
    p_value: float = Field(description="exact two-sided McNemar test of: no difference")


class Comparison(Result):
    """Float against quantized network on the same images; accuracies are None where no image has a label."""

    count: Count = Field(description="images")
    labelled_count: Count = Field(description="images with a label: those that accuracies are measured on")
    num_classes: Count
    float_top1: Proportion | None
    float_top5: Proportion | None = Field(description="None below 6 classes, too")
    quantized_top1: Proportion | None
    quantized_top5: Proportion | None
    top1_difference: PairedDifference | None
    agreement: Proportion = Field(description="share of all images with the same top-1 prediction from both networks")
    kl_nats: float = Field(description="mean over images of KL(float ‖ quantized) of the softmax")
    sqnr_db: float = Field(description="10·log10(Σ float² / Σ (float − quantized)²) over all logits of all images")
    float_s: Seconds = Field(description="time of the float network's forward passes")
    quantized_s: Seconds = Field(description="time of the quantized network's forward passes (weights dequantized)")

    @property
    def labelled(self) -> bool:
        return self.labelled_count > 0


class Accuracy(Result):
    """One network's accuracy; None where no image has a label (top-5 below 6 classes, too)."""

    count: Count
    labelled_count: Count
    num_classes: Count
    top1: Proportion | None
    top5: Proportion | None
    time_s: Seconds


class MachineInfo(Result):
    """Where the run ran."""

    cpu: str = Field(description="model of the processor")
    threads: Count = Field(description="torch's threads")
    device: str = Field(description="torch device, with the accelerator's name if it is one")


class CalibrationInfo(Result):
    """The images that the method saw."""

    description: str
    count: Count
    fingerprint: str = Field(description="hash of the images' content, part of the run's identity")
    synthetic: bool = Field(description="made on the spot, not real images")


class SizeInfo(Result):
    """Bytes on disk and what they consist of."""

    float_bytes: Count = Field(description="size of the float network's parameters and buffers")
    file_bytes: Count = Field(description="size of the checkpoint on disk, all included")
    effective_bits: float = Field(description="bits per quantized weight, with scales, zero points and adapters")
    quantized_weights: Count = Field(description="number of weights stored as codes")
    total_params: Count
    float_params: Count = Field(description="parameters that stay in floating point")


class CostInfo(Result):
    """Arithmetic for one image."""

    macs: Count = Field(description="multiply-accumulates of the quantized layers")
    bitops: Count = Field(description="Σ over layers of MACs · weight bits · activation bits")
    input_values: Count | None = Field(
        default=None, description="values of one image in the tensors with a grid that quantized layers read"
    )
    input_bits: float | None = Field(default=None, description="mean bits of these values")


class LayerResult(Result):
    """One quantized layer."""

    name: str
    kind: str = Field(description="what the layer is: convolution, depthwise, linear, …")
    shape: tuple[Count, ...] = Field(description="shape of the weight")
    bits: Count = Field(description="width of a code")
    coding: Literal["packed", "ans"] = Field(default="packed", description="how the codes are stored")
    rank: Count | None = None
    bytes: Count = Field(description="bytes on disk: codes, scales, zero points, adapter")
    macs: Count
    weight_sqnr_db: float | None = Field(default=None, description="10·log10(‖W‖² / ‖W − Ŵ‖²), adapter included")
    input_error: float | None = Field(default=None, description="relative error of the layer's inputs, ‖x − x̂‖/‖x‖")
    output_error: float | None = Field(default=None, description="relative error of the layer's outputs, ‖y − ŷ‖/‖y‖")
    metrics: dict[str, float | Integer | str] = Field(default_factory=dict, description="what else the method measured")

    @property
    def stored_bits(self) -> float:
        """Bits that a weight takes: those of its code, or on average where codes are entropy-coded."""
        if self.coding == "packed":
            return self.bits
        return round(8 * self.bytes / max(1, math.prod(self.shape)), 2)


class RunResult(Result):
    """Everything that one run found. Saved as metrics.json; the report is rendered from it alone."""

    version: Literal[1] = 1
    coraq_version: str
    command: list[str] = Field(description="the command line, ready to run again")
    versions: dict[str, str] = Field(description="python, torch, timm, …")
    machine: MachineInfo
    seed: int
    config: RunConfig
    method: str
    method_version: str
    method_source: str = Field(description="built-in, the entry point's distribution, or the plugin's file")
    scheme_line: str = Field(description="Scheme.describe(): all that decides whether a number reproduces")
    calibration: CalibrationInfo
    evaluation_data: str | None = Field(default=None, description="the evaluation images; None: accuracy not measured")
    evaluation_fingerprint: str | None = Field(default=None, description="hash of the evaluation images' content")
    float_sha256: str | None = Field(default=None, description="hash of the float network's weights, as loaded")
    checkpoint_sha256: str | None = Field(default=None, description="hash of the checkpoint file")
    comparison: Comparison | None = Field(default=None, description="float against quantized on the evaluation images")
    fidelity_data: str | None = Field(default=None, description="images of `fidelity`")
    fidelity: Comparison | None = Field(default=None, description="unlabelled comparison where nothing was evaluated")
    size: SizeInfo
    cost: CostInfo
    stages: dict[str, Seconds] = Field(description="seconds of each stage, in order")
    total_s: Seconds
    resumed_layers: Count = Field(
        default=0,
        description="layers that an earlier attempt had finished: times and peak leave out their cost",
    )
    float_pass_s: Seconds | None = Field(default=None, description="one float pass over the calibration images")
    peak_memory_bytes: Count
    memory_bound_bytes: Count | None = Field(default=None, description="bound on live calibration activations")
    layers: list[LayerResult] = Field(description="in execution order")
    notes: list[str] = Field(default_factory=list, description="fallbacks taken and other things to know")
    run_dir: str

    @field_validator("config", mode="before")
    @classmethod
    def _upgrade(cls, config: Any) -> Any:
        return upgrade_config(config)

    @property
    def best_comparison(self) -> Comparison | None:
        """The comparison on evaluation images, or else that on unlabelled ones."""
        return self.comparison or self.fidelity


class WeightHistogram(Result):
    """A layer's float weights along its grid, in the grid's own units, and how often each code is used."""

    name: str
    low: float = Field(description="lower end of the first bin")
    high: float = Field(description="upper end of the last bin")
    weights: list[Count] = Field(description="float weights in each of the equal bins; those beyond count in the last")
    levels: list[float] = Field(description="where the grid's levels lie")
    codes: list[Count] = Field(description="weights that got each level")


class Difference(Result):
    """A value of metrics.json that came out differently; both as JSON."""

    place: str = Field(description='where, for example "layers.3.output_error"')
    before: str
    after: str


class Reproduction(Result):
    """Whether a run's checkpoint and numbers came out again."""

    run_dir: str
    same_checkpoint: bool
    checkpoint_sha256: str | None = Field(description="None: the checkpoint is gone")
    again_sha256: str
    differences: list[Difference]
    changed: list[str] = Field(description="versions, processor and device that are not as they were")

    @property
    def reproduced(self) -> bool:
        return self.same_checkpoint and not self.differences


# ---------------------------------------------------------------- comparisons


class CellResult(Result):
    """One cell of a comparison: a finished run's main numbers, or the reason why there is none."""

    model: str
    label: str = Field(description="the method with its options, as the user wrote it")
    bits: Count
    seed: int
    reason: str | None = Field(default=None, description="why the run failed; None: it finished")
    hint: str | None = None
    reused: bool = Field(default=False, description="it had been finished before")
    run_dir: str | None = None
    command: list[str] = Field(default_factory=list, description="the single run's command line")
    file_bytes: Count | None = None
    float_bytes: Count | None = None
    effective_bits: float | None = None
    comparison: Comparison | None = None
    labelled: bool = Field(default=False, description="accuracy was measured; else only fidelity to the float network")
    layer_errors: dict[str, float] = Field(default_factory=dict, description="relative output error of each layer")
    total_s: Seconds | None = None
    resumed_layers: Count = Field(default=0, description="time and memory leave out these, of an earlier attempt")
    peak_memory_bytes: Count | None = None

    @property
    def finished(self) -> bool:
        return self.reason is None


class Spread(Result):
    """A measure over seeds."""

    mean: float
    low: float = Field(description="the smallest")
    high: float = Field(description="the largest")
    deviation: float | None = Field(description="sample standard deviation; None for a single seed")


class ComparedMethod(Result):
    """One method of a group: its cells over all seeds."""

    label: str
    rank: Count | None = Field(description="1 is best; None: its bytes differ, or nothing finished")
    seeds: list[int] = Field(description="those that finished")
    failed: Count = 0
    file_bytes: float | None = Field(default=None, description="mean size of the checkpoints")
    bytes_difference_pct: float | None = Field(default=None, description="against the group's reference size")
    equal_bytes: bool = Field(default=False, description="within 1 % of the reference size")
    effective_bits: float | None = None
    top1_pct: Spread | None = None
    agreement_pct: Spread | None = None
    kl_nats: Spread | None = None
    sqnr_db: Spread | None = None
    total_s: Seconds | None = Field(default=None, description="mean time of one run")
    peak_memory_bytes: Count | None = Field(default=None, description="largest")
    resumed: bool = Field(default=False, description="a run went on from an earlier attempt: both are at least this")


class PairedSeed(Result):
    """Two methods on the same images with the same seed."""

    seed: int
    images: Count
    only_first: Count = Field(description="images that only the first gets right")
    only_second: Count
    p_value: float = Field(description="exact two-sided McNemar test")


class MethodPair(Result):
    """Two methods of a group, image by image. Without labels "right" means: the float network's first choice."""

    first: str
    second: str
    difference_points: float | None = Field(description="mean over seeds of first less second")
    p_value: float | None = Field(description="the largest over seeds: what every seed supports")
    seeds: list[PairedSeed] = Field(default_factory=list)
    reason: str | None = Field(default=None, description="why nothing could be paired")


class ComparisonGroup(Result):
    """The methods at one model and one number of bits, best first."""

    model: str
    bits: Count
    measure: Literal["top1_pct", "kl_nats"] = Field(description="what ranks: accuracy, or without labels KL")
    images: Count | None = Field(description="evaluated images")
    float_top1: Proportion | None
    float_bytes: Count | None
    reference_bytes: float | None = Field(description="the size that most methods share within 1 %")
    methods: list[ComparedMethod]
    pairs: list[MethodPair]


class CompareResult(Result):
    """A whole comparison. Saved as compare.json; its report is rendered from it alone."""

    version: Literal[1] = 1
    coraq_version: str
    command: list[str]
    versions: dict[str, str]
    machine: MachineInfo
    engine: str
    base: str | None = Field(default=None, description="the run whose model, bits and data were taken, if none given")
    scheme_line: str = Field(description="of the first bits; only these differ")
    calibration: str | None = Field(default=None, description="of the first finished cell")
    evaluation: str | None = None
    cells: list[CellResult]
    groups: list[ComparisonGroup]
    total_s: Seconds = Field(description="wall time of the comparison")
    ran_s: Seconds = Field(description="sum of the times of the cells that ran now")
    folder: str

    @property
    def failed(self) -> list[CellResult]:
        return [cell for cell in self.cells if not cell.finished]

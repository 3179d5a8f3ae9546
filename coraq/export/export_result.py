"""What an export wrote and what its verification found: `export.json` in the run folder, and the terminal's table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from coraq.results import Accuracy, Result


class Latency(Result):
    """One batch through the exported and the float network, interleaved in one process."""

    batch: int
    exported_ms: float = Field(description="median over the repeats")
    float_ms: float = Field(description="the same graph with float weights, in the same runtime")
    repeats: int
    threads: int

    @property
    def ratio(self) -> float:
        return self.exported_ms / self.float_ms


class Check(Result):
    """An exported file run in one runtime against the checkpoint."""

    runtime: str = Field(description="name and version")
    images: str
    count: int
    logits_error: float | None = Field(
        description="‖exported − checkpoint‖ / ‖checkpoint‖ over all logits; null: the runtime refuses the file"
    )
    float_error: float | None = Field(
        default=None, description="the same for the float export: what the runtime's rounding alone does"
    )
    agreeing: int = Field(description="images with the same top-1 prediction as the checkpoint")
    labelled: int = 0
    checkpoint_right: int | None = Field(default=None, description="top-1 hits of the checkpoint on labelled images")
    exported_right: int | None = Field(default=None, description="top-1 hits of the exported file")
    codes_exact: bool | None = Field(
        default=None,
        description="codes, scales and zero points read back from the file are the checkpoint's (raised scales aside)",
    )
    weights_exact: bool | None = Field(
        default=None,
        description="the weights that the runtime makes of them are the checkpoint's, bit for bit but in `inexact`",
    )
    layers: int | None = Field(default=None, description="quantized layers")
    inexact: dict[str, str] = Field(
        default_factory=dict,
        description="layers whose weights are knowingly not the checkpoint's to the bit, and why",
    )
    quantized_convolutions: int | None = Field(default=None, description="convolutions that have codes and grids")
    integer_convolutions: int | None = Field(default=None, description="of the runtime's optimised graph")
    quantized_products: int | None = Field(default=None, description="Linear layers written for integer MatMul kernels")
    integer_products: int | None = Field(default=None, description="of the runtime's optimised graph")
    largest_step: int | None = Field(
        default=None, description="largest difference of one integer layer to the literal graph, in output codes"
    )
    precisions: dict[str, int] = Field(
        default_factory=dict, description="convolutions by the precision that they really ran in"
    )
    latency: list[Latency] = Field(default_factory=list)
    failures: list[str] = Field(default_factory=list, description="what is out of tolerance; empty: verified")

    @property
    def agreement_pct(self) -> float:
        return 100 * self.agreeing / max(self.count, 1)

    @property
    def top1_pct(self) -> float | None:
        return None if not self.labelled or self.exported_right is None else 100 * self.exported_right / self.labelled

    @property
    def checkpoint_top1_pct(self) -> float | None:
        hits = self.checkpoint_right
        return None if not self.labelled or hits is None else 100 * hits / self.labelled


class ExportResult(Result):
    """One artefact of one run."""

    version: Literal[1] = 1
    coraq_version: str
    format: str
    form: str
    label: str = Field(description="what the runtime will do with it")
    source: str = Field(description="the run folder or checkpoint")
    path: str
    size_bytes: int
    float_bytes: int = Field(description="the same artefact with float weights")
    nominal_bytes: int = Field(description="packed codes, scales, zero points and the float rest, nothing else")
    graph_bytes: int | None = Field(
        default=None, description="of an ONNX file: operators, names, shapes and metadata; the rest is what is nominal"
    )
    opset: int | None = None
    verified: bool | None = Field(description="None: not verified, at the user's wish")
    checks: list[Check] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class FileAccuracy(Result):
    """Accuracy of an exported file through its runtime."""

    path: str
    runtime: str
    label: str
    evaluation_data: str
    accuracy: Accuracy

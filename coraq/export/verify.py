"""An exported file against its checkpoint: read back, run on images, timed. Out of tolerance is a failure."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coraq.artifact import Checkpoint
from coraq.errors import CoraqError, exception_text
from coraq.export.agreement import Agreement, Batches, Comparer
from coraq.export.export_result import Check, Latency
from coraq.export.integer_check import largest_step
from coraq.export.onnx_file import OnnxExport
from coraq.export.readback import as_written, codes_exact, inexact_layers, weights_exact
from coraq.export.runtimes import OnnxRuntime, OpenVino, Runtime, time_pair

LOGITS_TOLERANCE = 1e-3  # relative; the exporter and other kernels alone were measured at 5e-5 and below
CONTROL_FACTOR = 3.0  # a badly conditioned network amplifies rounding: then the float export is the measure
AGREEMENT_PCT = 99.0
HITS_TOLERANCE = 0.003  # of the labelled images: 0.3 points
INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger")
BATCHES_TIMED = (1, 16)


def check_onnx(
    checkpoint: Checkpoint, export: OnnxExport, content: bytes, batches: Batches, images: str, threads: int
) -> Check:
    """Verify a file in ONNX Runtime.

    Args:
        content: the file's bytes as read back from disk.
        images: what `batches` are, in words.

    Raises:
        CoraqError: the runtime refuses the file.
    """
    exported, reference = OnnxRuntime(content, threads), OnnxRuntime(export.float_content, threads)
    checkpoint = as_written(checkpoint, export)
    exact, where = codes_exact(checkpoint, export, content)
    weights, worst = weights_exact(checkpoint, export, content)
    check = compare(checkpoint, exported, reference, batches, images, threads, export.has_grids)
    failures = [*check.failures]
    if not exact:
        failures.append(f"what is in the file is not the checkpoint's: {where}")
    if not weights:
        failures.append(f"the runtime makes another weight of {worst}")
    inexact = inexact_layers(checkpoint, export)
    facts: dict[str, Any] = {"codes_exact": exact, "weights_exact": weights}
    facts |= {"layers": len(checkpoint.layers), "inexact": inexact}
    if export.has_grids:
        kernels, expected = exported.kernels(), len(export.integer_layers("Conv"))
        facts["quantized_convolutions"] = export.convolutions
        facts["integer_convolutions"] = found = sum(kernels[kind] for kind in INTEGER_CONVOLUTIONS)
        if found != expected:
            failures.append(f"{found} convolutions run on integer kernels, {expected} were written for them")
        if export.wants_integer and found < export.convolutions:
            failures.append(f"{found} of {export.convolutions} quantized convolutions run on integer kernels")
        facts["quantized_products"] = products = len(export.integer_layers("MatMul"))
        facts["integer_products"] = running = sum(kernels[kind] for kind in INTEGER_PRODUCTS)
        if running < products:  # products of activations with each other may be integer, too (SHViT's attention)
            failures.append(f"{running} matrix products run on integer kernels, {products} were written for them")
        facts["largest_step"] = step = largest_step(export, content, threads)
        if step > 1:
            failures.append(f"a layer's integer kernel differs by {step} output steps from the literal graph")
    return check.model_copy(update={**facts, "failures": failures})


def check_openvino(
    checkpoint: Checkpoint, export: OnnxExport, content: bytes, batches: Batches, images: str, threads: int
) -> Check:
    """Verify the same file in OpenVINO at its default settings, its float export (often bf16 there) being the control.

    Integer kernels are counted and stated, and not demanded: OpenVINO runs affine weights in float.
    """
    exported, reference = OpenVino(content, threads), OpenVino(export.float_content, threads)
    check = compare(checkpoint, exported, reference, batches, images, threads, export.has_grids)
    precisions = exported.precisions()
    facts: dict[str, Any] = {"precisions": precisions}
    if export.has_grids:
        facts["quantized_convolutions"] = export.convolutions
        facts["integer_convolutions"] = sum(count for kind, count in precisions.items() if kind in ("i8", "u8"))
    return check.model_copy(update=facts)


def refused(runtime: str, images: str, error: Exception) -> Check:
    """The check of a file that its runtime does not open or run."""
    if isinstance(error, CoraqError):
        reason = f"{error.message} ({error.hint})" if error.hint else error.message
    else:
        reason = exception_text(error)
    return Check(runtime=runtime, images=images, count=0, logits_error=None, agreeing=0, failures=[reason])


def check_torch(
    checkpoint: Checkpoint,
    opened: nn.Module,
    runtime: str,
    batches: Batches,
    images: str,
    *,
    codes_exact: bool | None = None,
    weights_exact: bool | None = None,
) -> Check:
    """Verify what torch opens: logits within rounding of the checkpoint's; what was read back must be exact."""

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            # the checkpoint's own memory format: kernels of another one sum in another order
            return opened(torch.from_numpy(pixels)).float().numpy()

    network = checkpoint.module.to(memory_format=torch.contiguous_format)
    found = Comparer(network, {"exported": run}, contiguous=True).run(batches)["exported"]
    failures = [] if found.error <= LOGITS_TOLERANCE else [f"logits are off by {found.error:.1e} (relative)"]
    if codes_exact is False or weights_exact is False:
        failures.append("what was read back is not the checkpoint's")
    return Check(
        runtime=runtime,
        images=images,
        count=found.count,
        logits_error=found.error,
        agreeing=found.agreeing,
        labelled=found.labelled,
        checkpoint_right=found.checkpoint_right if found.labelled else None,
        exported_right=found.exported_right if found.labelled else None,
        codes_exact=codes_exact,
        weights_exact=weights_exact,
        failures=failures,
    )


def compare(
    checkpoint: Checkpoint,
    exported: Runtime,
    reference: Runtime,
    batches: Batches,
    images: str,
    threads: int,
    grids: bool = False,
) -> Check:
    """Logits, decisions and time of an exported file, with the float export beside it.

    grids: there are activation grids: a rounding that falls the other way is carried on, so logits have no tolerance
    (0.02 to 0.07 of their spread was measured between two correct executions) and hits have one.
    """
    first: list[Tensor] = []

    def kept() -> Batches:
        for pixels, labels in batches:
            if not first:
                first.append(pixels)
            yield pixels, labels

    network = checkpoint.module.to(memory_format=torch.channels_last)
    found = Comparer(network, {"exported": exported.run, "float": reference.run}).run(kept())
    ours, control = found["exported"], found["float"]
    return Check(
        runtime=exported.name,
        images=images,
        count=ours.count,
        logits_error=ours.error,
        float_error=None if grids else control.error,
        agreeing=ours.agreeing,
        labelled=ours.labelled,
        checkpoint_right=ours.checkpoint_right if ours.labelled else None,
        exported_right=ours.exported_right if ours.labelled else None,
        latency=time_batches(exported, reference, first[0], threads),
        failures=hits_lost(ours) if grids else tolerances(ours, control),
    )


def tolerances(ours: Agreement, control: Agreement) -> list[str]:
    """What is wrong with a file whose arithmetic is float, the float export being the control."""
    allowed = max(LOGITS_TOLERANCE, CONTROL_FACTOR * control.error)
    failures = []
    if not ours.error <= allowed:  # NaN fails, too
        failures.append(f"logits are off by {ours.error:.1e} (relative), more than {allowed:.1e}")
    least = min(AGREEMENT_PCT, control.agreement_pct)
    if ours.agreement_pct < least:
        failures.append(f"top-1 predictions agree on {ours.agreement_pct:.2f} % of the images, less than {least:.2f} %")
    return failures


def hits_lost(ours: Agreement) -> list[str]:
    """What is wrong with a file whose arithmetic is integer: hits that it loses, beyond what chance explains."""
    if not np.isfinite(ours.noise):
        return ["logits are not finite"]
    lost = ours.checkpoint_right - ours.exported_right
    chance = 2 * (ours.count - ours.agreeing) ** 0.5  # two deviations, if every disagreement falls either way alike
    if ours.labelled and lost > max(HITS_TOLERANCE * ours.labelled, chance):
        return [f"{lost} of {ours.labelled} images are lost that the checkpoint gets right"]
    return []


def time_batches(exported: Runtime, reference: Runtime, pixels: Tensor, threads: int) -> list[Latency]:
    """Latency at each batch size, on real images (repeated where there are fewer)."""
    timed = []
    for size in BATCHES_TIMED:
        images = pixels[torch.arange(size) % len(pixels)].contiguous().numpy()
        timed.append(time_pair(exported.run, reference.run, images, threads))
    return timed

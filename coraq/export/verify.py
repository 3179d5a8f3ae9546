"""An exported file against its checkpoint: read back, run on images, timed. Out of tolerance is a failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coraq.artifact import Checkpoint
from coraq.core.tensors import QTensor
from coraq.export.onnx_file import OnnxExport
from coraq.export.record import Check
from coraq.export.runtimes import OnnxRuntime, Runtime, time_pair
from coraq.export.weights import stored_bits, unplane

Batches = Iterable[tuple[Tensor, Tensor]]

LOGITS_TOLERANCE = 1e-3  # relative; the exporter and other kernels alone were measured at 5e-5 and below
CONTROL_FACTOR = 3.0  # a badly conditioned network amplifies rounding: then the float export is the measure
AGREEMENT_PCT = 99.0
ADAPTER_TOLERANCE = 1e-5  # relative, of B·A: the runtime multiplies the factors in another order than torch
BATCHES_TIMED = (1, 16)


@dataclass
class Agreement:
    """Running sums over images: the checkpoint's logits, and another network's."""

    count: int = 0
    agreeing: int = 0
    labelled: int = 0
    checkpoint_right: int = 0
    exported_right: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, actual: Tensor, labels: Tensor) -> None:
        """Logits [n, classes] of both; labels [n], −1 for none."""
        first, other = expected.argmax(1), actual.argmax(1)
        known = labels >= 0
        self.count += len(labels)
        self.agreeing += int((first == other).sum())
        self.labelled += int(known.sum())
        self.checkpoint_right += int((first == labels)[known].sum())
        self.exported_right += int((other == labels)[known].sum())
        self.signal += float(expected.double().square().sum())
        self.noise += float((expected.double() - actual.double()).square().sum())

    @property
    def error(self) -> float:
        return float((self.noise / max(self.signal, 1e-30)) ** 0.5)

    @property
    def agreement_pct(self) -> float:
        return 100 * self.agreeing / max(self.count, 1)


@dataclass
class Comparer:
    """Runs the checkpoint's network once over the images, and any number of others beside it."""

    network: nn.Module
    others: dict[str, Any]
    found: dict[str, Agreement] = field(default_factory=dict)

    def run(self, batches: Batches) -> dict[str, Agreement]:
        self.found = {name: Agreement() for name in self.others}
        for images, labels in batches:
            with torch.inference_mode():
                expected = self.network(images.contiguous(memory_format=torch.channels_last)).float()
            pixels = images.contiguous().numpy()
            for name, run in self.others.items():
                self.found[name].add(expected, torch.from_numpy(np.asarray(run(pixels))), labels)
        return self.found


def check_onnx(
    checkpoint: Checkpoint, export: OnnxExport, content: bytes, batches: Batches, images: str, threads: int
) -> Check:
    """Verify a weight-only file in ONNX Runtime.

    Args:
        content: the file's bytes as read back from disk.
        images: what `batches` are, in words.
    """
    exact, where = codes_exact(checkpoint, export, content)
    weights, worst = weights_exact(checkpoint, export, content)
    exported = OnnxRuntime(content, threads)
    reference = OnnxRuntime(export.float_content, threads)
    check = compare(checkpoint, exported, reference, batches, images, threads)
    failures = [*check.failures]
    if not exact:
        failures.append(f"what is in the file is not the checkpoint's: {where}")
    if not weights:
        failures.append(f"the runtime makes another weight of {worst}")
    return check.model_copy(update={"codes_exact": exact, "weights_exact": weights, "failures": failures})


def compare(
    checkpoint: Checkpoint, exported: Runtime, reference: Runtime, batches: Batches, images: str, threads: int
) -> Check:
    """Logits, decisions and time of an exported file, with the float export beside it."""
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
        float_error=control.error,
        agreeing=ours.agreeing,
        labelled=ours.labelled,
        checkpoint_right=ours.checkpoint_right if ours.labelled else None,
        exported_right=ours.exported_right if ours.labelled else None,
        latency=time_batches(exported, reference, first[0], threads),
        failures=tolerances(ours, control),
    )


def tolerances(ours: Agreement, control: Agreement) -> list[str]:
    """What is wrong with a file whose arithmetic is float, the float export being the control."""
    allowed = max(LOGITS_TOLERANCE, CONTROL_FACTOR * control.error)
    failures = []
    if not ours.error <= allowed:  # NaN fails, too
        failures.append(f"logits are off by {ours.error:.1e} (relative), more than {allowed:.1e}")
    least = min(AGREEMENT_PCT, control.agreement_pct)
    if ours.agreement_pct < least:
        failures.append(f"first choices agree on {ours.agreement_pct:.2f} % of the images, less than {least:.2f} %")
    return failures


def time_batches(exported: Runtime, reference: Runtime, pixels: Tensor, threads: int) -> list[Any]:
    """Latency at each batch size, on real images (repeated where there are fewer)."""
    timed = []
    for size in BATCHES_TIMED:
        images = pixels[torch.arange(size) % len(pixels)].contiguous().numpy()
        timed.append(time_pair(exported.run, reference.run, images, threads))
    return timed


def codes_exact(checkpoint: Checkpoint, export: OnnxExport, content: bytes) -> tuple[bool, str]:
    """Whether every code, scale, zero point and codebook in the file is the checkpoint's; else where not."""
    import onnx
    from onnx import numpy_helper

    stored = {i.name: i for i in onnx.load_from_string(content).graph.initializer}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(stored[name])

    for name, layer in checkpoint.layers.items():
        tensors = {f"{export.written[name]}.weight": (layer.weight, export.form)}
        if layer.adapter is not None:
            prefix = f"{export.written[name]}.adapter"
            tensors |= {f"{prefix}_b": (layer.adapter.b, "cast"), f"{prefix}_a": (layer.adapter.a, "cast")}
        for prefix, (q, form) in tensors.items():
            try:
                codes = read_codes(array(f"{prefix}_codes"), q, form == "packed")
                same = np.array_equal(codes, q.codes.numpy().reshape(-1))
                same &= np.array_equal(array(f"{prefix}_scale").reshape(-1), q.scale.numpy().reshape(-1))
                if q.zero_point is not None:
                    zero = array(f"{prefix}_zero_point").reshape(-1).astype(np.int64)
                    same &= np.array_equal(zero, q.zero_point.numpy().reshape(-1))
                if q.codebook is not None:
                    same &= np.array_equal(array(f"{prefix}_codebook"), q.codebook.numpy())
            except KeyError as missing:
                return False, f"{missing} is missing"
            if not same:
                return False, prefix
    return True, ""


def read_codes(stored: np.ndarray, q: QTensor, packed: bool) -> np.ndarray:
    """Unsigned codes [n] from the array of a file, whatever type holds them."""
    count = q.codes.numel()
    bits = stored_bits(q.bits, "packed", True)
    if packed and bits < 8:
        return unplane(stored, bits, count, interleaved=False)
    values = stored.reshape(-1).astype(np.int16)
    if np.dtype(stored.dtype).name.startswith("int"):
        values = values + 2 ** (q.bits - 1)
    return values.astype(np.uint8)


def weights_exact(checkpoint: Checkpoint, export: OnnxExport, content: bytes) -> tuple[bool, str]:
    """Whether the runtime, given nothing but the file's weight nodes, makes the checkpoint's weights of them."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(content)
    targets = dict.fromkeys(place.initializer for place in export.graph.places.values())
    needed = set(targets)
    nodes: list[Any] = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in targets]
    kept = [initializer for initializer in model.graph.initializer if initializer.name in needed]
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    alone.graph.CopyFrom(helper.make_graph(nodes, "weights", [], outputs, kept))
    made = dict(zip(targets, _run_all(alone.SerializeToString()), strict=True))
    modules: dict[str, Any] = dict(checkpoint.module.named_modules())
    for name, place in export.graph.places.items():
        wanted = modules[name].weight.numpy()
        wanted = wanted.reshape(wanted.shape[0], -1).T if place.transposed else wanted.reshape(place.dims)
        got = made[place.initializer]
        if checkpoint.layers[name].adapter is None:
            good = np.array_equal(got, wanted)
        else:
            good = bool(np.linalg.norm(got - wanted) <= ADAPTER_TOLERANCE * np.linalg.norm(wanted))
        if not good:
            return False, name
    return True, ""


def _run_all(content: bytes) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {})]

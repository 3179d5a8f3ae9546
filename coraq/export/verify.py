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
from coraq.export.graph import Walk
from coraq.export.onnx_file import OnnxExport
from coraq.export.record import Check
from coraq.export.runtimes import OnnxRuntime, OpenVino, Runtime, run_all, time_pair
from coraq.export.weights import bit_planes, stored_bits, unplane

Batches = Iterable[tuple[Tensor, Tensor]]

LOGITS_TOLERANCE = 1e-3  # relative; the exporter and other kernels alone were measured at 5e-5 and below
CONTROL_FACTOR = 3.0  # a badly conditioned network amplifies rounding: then the float export is the measure
AGREEMENT_PCT = 99.0
ADAPTER_TOLERANCE = 1e-5  # relative, of B·A: the runtime multiplies the factors in another order than torch
HITS_TOLERANCE = 0.003  # of the labelled images: 0.3 points
INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")
INT8_TOLERANCE = 0.02  # relative, of a weight with an adapter between grids; 0.007 was measured
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
    contiguous: bool = False
    found: dict[str, Agreement] = field(default_factory=dict)

    def run(self, batches: Batches) -> dict[str, Agreement]:
        self.found = {name: Agreement() for name in self.others}
        for images, labels in batches:
            with torch.inference_mode():
                layout = torch.contiguous_format if self.contiguous else torch.channels_last
                expected = self.network(images.contiguous(memory_format=layout)).float()
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
    check = compare(checkpoint, exported, reference, batches, images, threads, export.has_grids)
    failures = [*check.failures]
    if not exact:
        failures.append(f"what is in the file is not the checkpoint's: {where}")
    if not weights:
        failures.append(f"the runtime makes another weight of {worst}")
    facts: dict[str, Any] = {"codes_exact": exact, "weights_exact": weights}
    if export.has_grids:
        kernels, expected = exported.kernels(), len(export.integer_convolutions)
        facts["quantized_convolutions"] = export.convolutions
        facts["integer_convolutions"] = found = sum(kernels[kind] for kind in INTEGER_CONVOLUTIONS)
        if found != expected:
            failures.append(f"{found} convolutions run on integer kernels, {expected} were written for them")
        if export.wants_integer and found < export.convolutions:
            failures.append(f"{found} of {export.convolutions} quantized convolutions run on integer kernels")
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
        failures.append(f"first choices agree on {ours.agreement_pct:.2f} % of the images, less than {least:.2f} %")
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


def largest_step(export: OnnxExport, content: bytes, threads: int) -> int:
    """The largest difference of any integer layer's output, in codes, between integer kernel and literal execution.

    The literal run executes every operator as it stands in the file. Each layer then gets the literal run's own input
    codes, so that differences do not add up over layers.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(content)
    walk = Walk(model.graph)
    pieces: dict[int, Any] = {}
    sources: list[str] = []
    results: list[str] = []
    for node in list(model.graph.node):
        if node.op_type != "Conv" or (quantize := walk.quantized_behind(node.output[0])) is None:
            continue
        source = walk.grid_before(node.input[0])
        if source is None:
            continue
        sources.append(source.input[0])
        results.append(quantize.output[0])
        waiting = [*quantize.input]
        pieces[id(quantize)] = quantize
        while waiting:
            name = waiting.pop()
            made = walk.producer.get(name)
            if made is None or name == source.input[0] or id(made) in pieces:
                continue
            pieces[id(made)] = made
            waiting += list(made.input)
    sources = list(dict.fromkeys(sources))
    results = list(dict.fromkeys(results))
    if not results:
        return 0
    nodes = [node for node in model.graph.node if id(node) in pieces]

    def codes(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.UINT8, None)

    literal = onnx.ModelProto()
    literal.CopyFrom(model)
    literal.graph.output.extend(codes(name) for name in dict.fromkeys(sources + results))
    image = model.graph.input[0]
    size = [2, *[dim.dim_value for dim in image.type.tensor_type.shape.dim][1:]]
    images = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    names = list(dict.fromkeys(sources + results))
    seen = dict(zip(names, run_all(literal.SerializeToString(), {image.name: images}, False)[1:], strict=True))
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    graph = helper.make_graph(
        nodes,
        "layers",
        [codes(f"{name}__in") for name in sources],
        [codes(name) for name in results],
        list(model.graph.initializer),
    )
    alone.graph.CopyFrom(graph)
    renamed = {name: f"{name}__in" for name in sources}
    for node in alone.graph.node:
        if node.op_type == "DequantizeLinear":
            node.input[:] = [renamed.get(name, name) for name in node.input]
    feeds = {f"{name}__in": seen[name] for name in sources}
    found = run_all(alone.SerializeToString(), feeds, True)
    worst = 0
    for name, got in zip(results, found, strict=True):
        worst = max(worst, int(np.abs(got.astype(np.int32) - seen[name].astype(np.int32)).max()))
    return worst


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
        turned = export.graph.places[name].transposed and name in export.integer and layer.adapter is None
        for prefix, (q, form) in tensors.items():
            try:
                stored_codes = array(f"{prefix}_codes")
                if turned and prefix == f"{name}.weight":
                    stored_codes = _turned(stored_codes, q, form == "packed")
                codes = read_codes(stored_codes, q, form == "packed")
                same = np.array_equal(codes, q.codes.numpy().reshape(-1))
                scale = export.raised.get(name) if prefix == f"{name}.weight" else None
                wanted = q.scale.numpy().reshape(-1) if scale is None else scale
                same &= np.array_equal(array(f"{prefix}_scale").reshape(-1), wanted)
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


def _turned(stored: np.ndarray, q: QTensor, packed: bool) -> np.ndarray:
    """Codes of an [in, out] matrix as those of [out, in]."""
    _, out, inputs = q.codes.shape
    if packed and q.bits < 8:
        codes = unplane(stored, stored_bits(q.bits, "packed", True), q.codes.numel(), interleaved=False)
        return bit_planes(codes.reshape(inputs, out).T.reshape(-1), stored_bits(q.bits, "packed", True), False)
    return stored.reshape(inputs, out).T


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
    made = dict(zip(targets, run_all(alone.SerializeToString(), {}, True), strict=True))
    modules: dict[str, Any] = dict(checkpoint.module.named_modules())
    for name, place in export.graph.places.items():
        wanted = modules[name].weight.numpy()
        wanted = wanted.reshape(wanted.shape[0], -1).T if place.transposed else wanted.reshape(place.dims)
        got = made[place.initializer]
        if checkpoint.layers[name].adapter is None:
            good = np.array_equal(got, wanted) or name in export.raised
        elif name in export.integer:  # rounded to int8 per channel at load, half a step of 1/127 of the largest
            good = bool(np.linalg.norm(got - wanted) <= INT8_TOLERANCE * np.linalg.norm(wanted))
        else:
            good = bool(np.linalg.norm(got - wanted) <= ADAPTER_TOLERANCE * np.linalg.norm(wanted))
        if not good:
            return False, name
    return True, ""

"""One checkpoint as one ONNX file: the float graph of the folded student with the checkpoint's codes in it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch

from coraq.artifact import Checkpoint
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.export.float_graph import FloatGraph, export_float
from coraq.export.graph import without_grids
from coraq.export.integer import IntegerLayer, emit_integer_layer, find_integer_layers, is_rounded
from coraq.export.onnx_rewrites import (
    complete_grids,
    complete_sigmoids,
    grid_pieces,
    name_pools,
    write_out_hard_swishes,
)
from coraq.export.requirements import require
from coraq.export.weights import Form, Parts, as_stored, emit_weight, typed_bits
from coraq.version import __version__

OPSETS: dict[Form, int] = {"cast": 21, "dq": 21, "packed": 18}
TWO_BIT_OPSET = 25
WIDER = (
    "have zero points between codes, which integer kernels and DequantizeLinear do not know: their codes are stored "
    "wider, for the same weights to the bit (quantize with --zero-point-fraction 0 to avoid it)"
)
PREFIX = "coraq."  # of all our metadata keys


@dataclass(frozen=True)
class OnnxExport:
    """What was written, in memory.

    Attributes:
        content: the file's bytes; `float_content` those of the same graph with float weights.
        label: what a runtime will do with it, for the file's metadata and for people.
        notes: what a person should know.
        nominal_bytes: packed codes, scales, zero points and the float rest: what the file cannot do without.
        graph_bytes: of the content, what is neither codes, scales, zero points nor the float rest: operators, names,
            shapes, metadata.
        graph: the float graph, with each layer's place in it.
        written: layer -> the layer under whose name its codes stand (another one's where both share a weight).
        integer: the layers that are written for integer kernels.
        convolutions: convolutions with codes in the graph.
        has_grids: there are activation grids.
        wants_integer: they were placed for integer kernels.
        raised: scales that differ from the checkpoint's, see `raise_scales`.
    """

    content: bytes
    float_content: bytes
    label: str
    form: Form
    opset: int
    notes: list[str]
    nominal_bytes: int
    graph_bytes: int
    graph: FloatGraph
    written: dict[str, str]
    integer: dict[str, IntegerLayer]
    raised: dict[str, np.ndarray]
    convolutions: int
    has_grids: bool
    wants_integer: bool

    def integer_layers(self, kind: str) -> list[str]:
        """Layers written for integer kernels that are a Conv, MatMul or Gemm; one that runs twice stands here twice."""
        return [name for name, layer in self.integer.items() for node, _ in layer.uses if node.op_type == kind]


def build_onnx(
    checkpoint: Checkpoint, form: Form = "cast", labels: list[str] | None = None, calibration: np.ndarray | None = None
) -> OnnxExport:
    """Export a checkpoint.

    Args:
        form: see `coraq.export.weights`.
        labels: class names in index order, where the checkpoint has none.
        calibration: images [n, channels, height, width]; with them, a network whose grids are placed for integer
            kernels gets those that ONNX Runtime needs besides, see `coraq.export.onnx_rewrites`.

    Raises:
        CoraqError: a package is missing, or torch cannot export the network.
    """
    onnx = require("onnx")
    layers, notes = checkpoint.layers, []
    opset = OPSETS[form]
    graph = export_float(checkpoint.module, layers, example_images(checkpoint), opset)
    activations = checkpoint.info.scheme.activations
    wants_integer = (
        activations is not None
        and activations.placement == "integer"
        and any(node.op_type == "QuantizeLinear" for node in graph.model.graph.node)
    )
    if wants_integer:
        grid_pieces(graph.model)
    if wants_integer and calibration is not None:
        added = complete_grids(graph.model, graph.places, calibration)
        if added:
            notes.append(
                f"{added} convolutions go into activations that no integer kernel takes in: their outputs got 8-bit "
                f"grids of their own here, from {len(calibration)} calibration images; "
                "the checkpoint rounds behind only"
            )
    if wants_integer:
        name_pools(graph.model)
        sigmoids = complete_sigmoids(graph.model)
        if sigmoids:
            notes.append(
                f"{sigmoids} sigmoids between grids got one of their own here, 255 steps from 0 to 1, so that a SiLU "
                "is computed on codes; the checkpoint has them in float"
            )
    float_content = without_grids(graph.model).SerializeToString()
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    swishes = write_out_hard_swishes(model) if wants_integer else 0
    if swishes:
        notes.append(
            f"{swishes} hard swishes between grids are computed on codes here, their gates in 255 steps from 0 to 1; "
            "the checkpoint has them in float"
        )
    integer = find_integer_layers(model.graph, graph.places, layers)
    layers = {name: as_stored(layer, name in integer, form) for name, layer in layers.items()}
    if wider := sum(layer.weight.bits > checkpoint.layers[name].weight.bits for name, layer in layers.items()):
        notes.append(f"{wider} layers {WIDER}")
    checkpoint = replace(checkpoint, layers=layers)
    two_bits = form != "packed" and any(layer.weight.bits == 2 for layer in layers.values()) and takes_two_bits()
    if two_bits:
        opset = TWO_BIT_OPSET
    parts = Parts()
    modules: dict[str, Any] = dict(checkpoint.module.named_modules())
    replaced: dict[str, str] = {}
    raised: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        place, shape = graph.places[name], tuple(modules[name].weight.shape)
        if place.initializer in replaced:  # two layers of one and the same weight
            continue
        replaced[place.initializer] = name
        if name in integer:
            scales = emit_integer_layer(parts, integer[name], layer, shape, place, model.graph, (form, two_bits))
            if scales is not None:
                raised[name] = scales
        else:
            emit_weight(parts, name, layer, shape, place, form, two_bits)
    read = {name for node in model.graph.node for name in node.input}
    gone = {i.name for i in model.graph.initializer if i.name not in read} | replaced.keys()
    kept = [initializer for initializer in model.graph.initializer if initializer.name not in gone]
    rest = [i for i in graph.model.graph.initializer if i.name not in replaced]  # biases count as float, as they were
    nominal = sum(layer.size_bytes() for layer in layers.values()) + sum(stored_bytes(i) for i in rest)
    nodes = [*parts.nodes, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend([*kept, *parts.initializers])
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # a runtime infers shapes; here they would be a percent of a small file
    shorten(model, set(replaced))
    written = {name: replaced[graph.places[name].initializer] for name in layers}
    notes += _notes(checkpoint, form, two_bits, [layers[name] for name in integer])
    if raised:
        notes.append(_raised_note(checkpoint, raised))
    rounded = sorted(name for name in integer if is_rounded(layers[name], form))
    if adapted := [name for name in rounded if layers[name].adapter is not None]:
        notes.append(
            f"{', '.join(adapted)}: codes and adapter are rounded together to 8 bits, by about 0.7 % of the weight"
        )
    if affine := [name for name in rounded if layers[name].adapter is None]:
        notes.append(
            f"{', '.join(affine)}: affine codes of 8 bits are rounded to symmetric ones, as integer kernels take them, "
            "by about 0.5 % of the weight (quantize with --symmetric to avoid it)"
        )
    quantized = {place.initializer for place in graph.places.values()}
    convolutions = sum(node.op_type == "Conv" and node.input[1] in quantized for node in graph.model.graph.node)
    has_grids = any(node.op_type == "QuantizeLinear" for node in graph.model.graph.node)
    running = sum(node.op_type == "Conv" for layer in integer.values() for node, _ in layer.uses)
    label = "integer kernels" if running and running == convolutions else label_of(checkpoint)
    finish(model, checkpoint, opset, label, form, labels)
    content = model.SerializeToString()
    small = set(parts.constants.values())  # shapes, shifts and the like
    graph_bytes = len(content) - sum(stored_bytes(i) for i in model.graph.initializer if i.name not in small)
    return OnnxExport(
        content=content,
        float_content=float_content,
        label=label,
        form=form,
        opset=opset,
        notes=notes,
        nominal_bytes=nominal,
        graph_bytes=graph_bytes,
        graph=graph,
        written=written,
        integer=integer,
        raised=raised,
        convolutions=convolutions,
        has_grids=has_grids,
        wants_integer=wants_integer,
    )


def example_images(checkpoint: Checkpoint, count: int = 2) -> torch.Tensor:
    """Random images [count, channels, height, width] of the network's size."""
    size = checkpoint.info.preprocess.get("input_size") or checkpoint.info.pretrained_cfg.get("input_size")
    if not size:
        raise CoraqError(f"{checkpoint.path} does not say its input size", "Was it written by an older coraq?")
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def label_of(checkpoint: Checkpoint) -> str:
    """What any runtime does with weights alone on a grid: they are multiplied out when the file is loaded."""
    widths = sorted({layer.weight.bits for layer in checkpoint.layers.values()})
    # one width, or one and that of the first and last layer; more of them were chosen layer by layer
    codes = f"{widths[0]}-bit" if len(widths) <= 2 else f"{widths[0]}- to {widths[-1]}-bit"
    return f"{codes} on disk, float in memory"


def takes_two_bits() -> bool:
    """Whether the onnx and ONNX Runtime installed here know INT2; where there is no runtime, onnx decides."""
    from onnx import TensorProto, defs, helper

    if not hasattr(TensorProto, "INT2") or defs.onnx_opset_version() < TWO_BIT_OPSET:
        return False
    try:
        import onnxruntime
    except ImportError:
        return True
    parts = Parts()
    parts.integers("codes", np.array([-2, 1]), 2, True)
    node = helper.make_node("Cast", ["codes"], ["values"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("values", TensorProto.FLOAT, [2])
    graph = helper.make_graph([node], "probe", [], [output], parts.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", TWO_BIT_OPSET)])
    set_opset(model, TWO_BIT_OPSET)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return bool(np.array_equal(session.run(None, {})[0], [-2, 1]))
    except Exception:  # a runtime's own errors, of many kinds: it does not take the type
        return False


def set_opset(model: Any, opset: int) -> None:
    """Declare the opset and the oldest file version that has its types."""
    del model.opset_import[:]
    model.opset_import.add(domain="", version=opset)
    model.ir_version = {18: 8, 21: 10}.get(opset, 13)


def shorten(model: Any, keep: set[str]) -> None:
    """Give values in between short names: on a small network they are a percent of the file."""
    names: dict[str, str] = {}
    keep = keep | {value.name for value in model.graph.output}
    taken = keep | {value.name for value in (*model.graph.input, *model.graph.initializer)}
    free = (name for name in (f"_{number:x}" for number in count()) if name not in taken)
    for node in model.graph.node:
        for output in node.output:
            if output and output not in keep:
                names[output] = next(free)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def finish(model: Any, checkpoint: Checkpoint, opset: int, label: str, form: Form, labels: list[str] | None) -> None:
    """Opset, producer, and the metadata that lets anyone use and trace the file."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.name = ""
    foreign = [entry for entry in model.opset_import if entry.domain not in ("", "ai.onnx")]
    set_opset(model, opset)
    used = {node.domain for node in model.graph.node}
    model.opset_import.extend(entry for entry in foreign if entry.domain in used)
    del model.functions[:], model.metadata_props[:]
    model.producer_name, model.producer_version = "coraq", __version__
    info = checkpoint.info
    names = info.pretrained_cfg.get("label_names") or labels
    facts: dict[str, Any] = {
        "format": 1,
        "label": label,
        "form": form,
        "architecture": info.architecture,
        "model_args": info.model_args,
        "preprocess": info.preprocess,
        "labels": names,
        "scheme": info.scheme.model_dump(mode="json"),
        "scheme_line": info.scheme.describe({name: layer.weight.bits for name, layer in checkpoint.layers.items()}),
        "provenance": info.provenance,
        "layers": {
            name: {"bits": layer.weight.bits, "rank": layer.adapter.rank if layer.adapter else None}
            for name, layer in checkpoint.layers.items()
        },
    }
    for key, value in facts.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            model.metadata_props.add(key=PREFIX + key, value=text)


def read_metadata(entries: dict[str, str]) -> dict[str, Any]:
    """The facts that `finish` wrote, from a runtime's or a ModelProto's metadata map."""
    facts: dict[str, Any] = {}
    for key, text in entries.items():
        if key.startswith(PREFIX):
            try:
                facts[key.removeprefix(PREFIX)] = json.loads(text)
            except json.JSONDecodeError:
                facts[key.removeprefix(PREFIX)] = text
    return facts


def _raised_note(checkpoint: Checkpoint, raised: dict[str, np.ndarray]) -> str:
    counts = []
    for name, scale in raised.items():
        changed = int((scale != checkpoint.layers[name].weight.scale.numpy().reshape(-1)).sum())
        counts.append(f"{name} ({changed} of {scale.size})")
    return (
        f"scales of nearly dead channels are raised so that the bias fits 32 bits: {', '.join(counts)}; "
        "the codes are the checkpoint's, these channels' weights are not"
    )


def _notes(checkpoint: Checkpoint, form: Form, two_bits: bool, integer: list[QuantizedLayer]) -> list[str]:
    layers = checkpoint.layers.values()
    notes = []
    stored = {layer.weight.bits: typed_bits(layer.weight.bits, form, two_bits) for layer in layers}
    if wider := [f"{bits} in {held}" for bits, held in sorted(stored.items()) if held is not None and held > bits]:
        notes.append(f"codes stand in the next type that ONNX has, bits {', '.join(wider)}: --npu has no packed form")
    if any(layer.weight.bits == 8 or layer.adapter is not None for layer in integer):
        notes.append("8-bit weights: on x86 processors without VNNI, ONNX Runtime's integer kernels may saturate")
    if any(layer.adapter is not None for layer in layers):
        notes.append("adapters are stored as codes and folded into the weights at load, never run as a branch")
    if any(layer.weight.codebook is not None for layer in layers):
        notes.append("codebook grids: levels are looked up at load; no integer kernel can run them")
    if form == "dq":
        notes.append("DequantizeLinear(INT4): for NPU compilers; CPU runtimes run it up to 3 times slower than float")
    return notes


def stored_bytes(initializer: Any) -> int:
    """Bytes of an initializer's values in the file."""
    from onnx import numpy_helper

    return len(initializer.raw_data) or int(numpy_helper.to_array(initializer).nbytes)

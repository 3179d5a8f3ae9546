"""What is in an exported file, and what the runtime makes of it, number by number against the checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from coraq.artifact import Checkpoint
from coraq.core.tensors import QTensor, QuantizedLayer
from coraq.export.bitplanes import from_blob
from coraq.export.integer import is_rounded
from coraq.export.onnx_file import TWO_BIT_OPSET, OnnxExport
from coraq.export.runtimes import run_all
from coraq.export.weights import Form, adapter_form, as_stored, is_centred, middle, typed_bits

ADAPTER_TOLERANCE = 1e-5  # relative, of B·A: the runtime multiplies the factors in another order than torch
INT8_TOLERANCE = 0.02  # relative, of a weight with an adapter between grids; 0.007 was measured


def as_written(checkpoint: Checkpoint, export: OnnxExport) -> Checkpoint:
    """The checkpoint with each layer as the file must hold it, see `coraq.export.weights.as_stored`."""

    def stored(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        return as_stored(layer, export.written[name] in export.integer, export.form)

    return dataclasses.replace(checkpoint, layers={k: stored(k, layer) for k, layer in checkpoint.layers.items()})


def inexact_layers(checkpoint: Checkpoint, export: OnnxExport) -> dict[str, str]:
    """Layers whose weights in the runtime are, on purpose, not the checkpoint's bit for bit, and why."""
    found: dict[str, str] = {}
    for name, layer in checkpoint.layers.items():
        if is_int8(export, name, layer):
            extra = [] if layer.weight.columns is None else ["column scales"]
            extra += [] if layer.adapter is None else ["adapter"]
            what = " and ".join(["codes", *extra])
            found[name] = f"{what} rounded to symmetric 8 bits at load"
        elif layer.adapter is not None:
            found[name] = f"adapter multiplied out by the runtime, within {ADAPTER_TOLERANCE:.0e}"
        elif (raised := raised_channels(checkpoint, export, name)) is not None and raised.any():
            found[name] = f"scale raised in {int(raised.sum())} of {raised.size} channels, nearly dead ones"
    return found


def is_int8(export: OnnxExport, name: str, layer: QuantizedLayer) -> bool:
    """Whether the file makes 8-bit integers of a layer's weight, other ones than its codes."""
    return export.written[name] in export.integer and is_rounded(layer, export.form)


def raised_channels(checkpoint: Checkpoint, export: OnnxExport, name: str) -> np.ndarray | None:
    """Channels (or the one grid of all) whose scale in the file is not the checkpoint's, bool; None: no layer has."""
    scale = export.raised.get(export.written[name])
    return None if scale is None else scale != checkpoint.layers[name].weight.scale.numpy().reshape(-1)


def codes_exact(checkpoint: Checkpoint, export: OnnxExport, content: bytes) -> tuple[bool, str]:
    """Whether every code, scale, zero point and codebook in the file is the checkpoint's; else where not.

    Scales that the export says to be raised must be as it says.
    """
    import onnx
    from onnx import numpy_helper

    stored = {i.name: i for i in onnx.load_from_string(content).graph.initializer}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(stored[name])

    two_bits = export.opset == TWO_BIT_OPSET
    for name, layer in checkpoint.layers.items():
        owner = export.written[name]
        integer = owner in export.integer and not is_int8(export, name, layer)
        form = adapter_form(export.form) if owner in export.integer and not integer else export.form
        tensors: dict[str, tuple[QTensor, Form]] = {f"{owner}.weight": (layer.weight, form)}
        if layer.adapter is not None:
            factors = {"b": layer.adapter.b, "a": layer.adapter.a}
            tensors |= {f"{owner}.adapter_{key}": (q, adapter_form(export.form)) for key, q in factors.items()}
        for prefix, (q, form) in tensors.items():
            own = prefix == f"{owner}.weight"
            turned = own and integer and export.graph.places[name].transposed
            try:
                codes = read_codes(array(f"{prefix}_codes"), q, form, two_bits, own and integer, turned)
                same = np.array_equal(codes, q.codes.numpy().reshape(-1))
                raised = export.raised.get(owner) if own else None
                wanted = q.scale.numpy().reshape(-1) if raised is None else raised
                same &= np.array_equal(array(f"{prefix}_scale").reshape(-1), wanted)
                if q.zero_point is not None:
                    value = array(f"{prefix}_zero_point").reshape(-1)
                    zero = value.astype(np.int64) + (middle(q) if value.dtype == np.int8 else 0)
                    same &= np.array_equal(zero, q.zero_point.numpy().reshape(-1))
                if q.columns is not None:
                    columns = array(f"{prefix}_column_scale").astype(np.float32)
                    same &= np.array_equal(columns.reshape(-1), q.columns.numpy().reshape(-1))
                if q.codebook is not None:
                    same &= np.array_equal(array(f"{prefix}_codebook"), q.codebook.numpy())
            except KeyError as missing:
                return False, f"{missing} is missing"
            if not same:
                return False, prefix
    return True, ""


def read_codes(stored: np.ndarray, q: QTensor, form: Form, two_bits: bool, integer: bool, turned: bool) -> np.ndarray:
    """Unsigned codes [n] from the array of a file, whatever holds them.

    integer: written for an integer kernel. turned: as an [in, out] matrix.
    """
    if typed_bits(q.bits, form, two_bits) is None:
        values = from_blob(stored, q.codes.numel()).astype(np.int16)
        if is_centred(q, form, integer):  # in two's complement, less the middle: only the highest bit is another
            values ^= middle(q)
    else:
        values = stored.reshape(-1).astype(np.int16)
        if np.dtype(stored.dtype).name.startswith("int"):
            values = values + middle(q)
    if turned:
        values = values.reshape(q.codes.shape[2], q.codes.shape[1]).T.reshape(-1)
    return values.astype(np.uint8)


def weights_exact(checkpoint: Checkpoint, export: OnnxExport, content: bytes) -> tuple[bool, str]:
    """Whether the runtime, given nothing but the file's weight nodes, makes the checkpoint's weights of them.

    Every channel whose scale is not raised must be equal bit for bit; layers with an adapter within a tolerance.
    """
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
        if (raised := raised_channels(checkpoint, export, name)) is not None:
            wanted = wanted.copy()  # these channels' own codes, times the raised scale
            which = np.broadcast_to(raised, len(wanted))
            wanted[which] = with_scale(checkpoint, name, export.raised[export.written[name]])[which]
        wanted = wanted.reshape(wanted.shape[0], -1).T if place.transposed else wanted.reshape(place.dims)
        got = made[place.initializer]
        if is_int8(export, name, checkpoint.layers[name]):  # half a step of 1/127 of the largest weight
            good = bool(np.linalg.norm(got - wanted) <= INT8_TOLERANCE * np.linalg.norm(wanted))
        elif checkpoint.layers[name].adapter is None:
            good = np.array_equal(got, wanted)
        else:
            good = bool(np.linalg.norm(got - wanted) <= ADAPTER_TOLERANCE * np.linalg.norm(wanted))
        if not good:
            return False, name
    return True, ""


def with_scale(checkpoint: Checkpoint, name: str, scale: np.ndarray) -> np.ndarray:
    """A layer's weight in its module's shape, had its channels these scales [out]."""
    q = checkpoint.layers[name].weight
    changed = dataclasses.replace(q, scale=torch.from_numpy(scale).reshape(q.scale.shape))
    weight = checkpoint.module.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return changed.dequantize().reshape(weight.shape).numpy()

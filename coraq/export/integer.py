"""The integer pattern: layers between activation grids, written so that runtimes run them on int8 kernels.

Codes made int8 at load (Cast of an INT4, or a blob) → DequantizeLinear for the weight, int32 codes on the grid
x_scale·w_scale for the bias (any other scale loses the fusion in silence), the checkpoint's own grids around. Only a
layer whose input comes from a grid and whose output goes into one (perhaps through a Relu or Clip) is written so, and a
MatMul (a Linear layer within ConvNeXt's blocks) whatever it goes into;
others keep the form that is multiplied out at load, because a runtime would requantize a float weight between grids to
8 bits per tensor without a word.

An affine grid's zero points are taken off the codes at load: ONNX Runtime before 1.25 takes one zero point for all
channels, OpenVINO runs weights with zero points in float, and differences of codes of up to 7 bits are int8 anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coraq.core.tensors import QTensor, QuantizedLayer
from coraq.errors import CoraqError
from coraq.export.float_graph import Place
from coraq.export.graph import Walk
from coraq.export.weights import (
    INT8_TOP,
    Form,
    Parts,
    adapter_form,
    codes_of,
    emit_adapter,
    emit_codes,
    emit_qtensor,
    is_centred,
    made_at_load,
    middle,
    signed_codes,
    typed_bits,
)

Style = tuple[Form, bool]  # and whether 2-bit codes may stand in 2 bits
WEIGHTED = ("Conv", "Gemm", "MatMul")
INT8, INT32 = 3, 6  # onnx.TensorProto's, without importing onnx
BIAS_LIMIT = 2.0**30  # |bias code|: half of int32, so that the sum of products still has room


@dataclass(frozen=True)
class IntegerLayer:
    """A layer that integer kernels can run.

    Attributes:
        uses: each Conv, Gemm or MatMul that reads its weight, with the name and value of the scale of its input's grid.
            They are several where a layer runs twice, or where the exporter merged equal weights.
    """

    name: str
    uses: list[tuple[Any, tuple[str, float]]]


def find_integer_layers(
    graph: Any, places: dict[str, Place], layers: dict[str, QuantizedLayer]
) -> dict[str, IntegerLayer]:
    """Layers, by name, whose input comes from a grid and whose output goes into one, if their kernel asks for that.

    Raises:
        CoraqError: a weight that is no integer times a scale stands between grids, or one without any codes.
    """
    from onnx import numpy_helper

    walk = Walk(graph)
    owner: dict[str, str] = {}
    for name, place in places.items():
        owner.setdefault(place.initializer, name)  # of equal weights the first layer's is written
    found: dict[str, IntegerLayer] = {}
    for node in graph.node:
        source = walk.grid_before(node.input[0]) if node.op_type in WEIGHTED else None
        if source is None:
            continue
        # a MatMul's integer kernel also puts out float numbers (but not the graph's own output, which is not fused)
        enough = node.op_type == "MatMul" and node.output[0] not in walk.outputs
        if (not enough and walk.quantized_behind(node.output[0]) is None) or node.input[1] in walk.producer:
            continue
        if node.input[1] not in owner:
            raise CoraqError(
                f"the weight {node.input[1]} stands between activation grids and has no codes",
                "A runtime would quantize it in silence, per tensor; export the run without --act-bits.",
            )
        name = owner[node.input[1]]
        if layers[name].weight.codebook is not None:
            raise CoraqError(
                f"layer {name} has a codebook grid: no integer kernel multiplies by its levels",
                "Export a run of this method without --act-bits, or another method's with them.",
            )
        scale = source.input[1]
        value = float(numpy_helper.to_array(walk.initializers[scale]))
        found.setdefault(name, IntegerLayer(name, [])).uses.append((node, (scale, value)))
    return found


def emit_integer_layer(
    parts: Parts,
    layer: IntegerLayer,
    q: QuantizedLayer,
    shape: tuple[int, ...],
    place: Place,
    graph: Any,
    style: Style,
) -> np.ndarray | None:
    """Write weight and bias of a layer; returns the scales that were raised for the bias's sake (None: none were).

    The weight comes out under the name of the initializer that it replaces, the bias under a name of its own.
    """
    prefix, name = f"{layer.name}.weight", place.initializer
    biases = [(node, source, bias) for node, source in layer.uses if (bias := _bias_of(node, graph)) is not None]
    out, axis = shape[0], 1 if place.transposed else 0
    raised = None

    def fitting(scale: np.ndarray) -> np.ndarray:
        for _, source, bias in biases:
            more = raise_scales(scale, bias, source[1])
            scale = scale if more is None else more
        return scale

    if is_rounded(q, style[0]):
        scales = _emit_rounded(parts, layer.name, q, shape, place, axis, style, fitting)
    else:
        own = q.weight.scale.numpy().reshape(-1)
        written = fitting(own)
        raised = None if written is own else written
        scales = parts.array(f"{prefix}_scale", written if written.size > 1 else written.reshape(()))
        codes, zero = _emit_codes(parts, prefix, q.weight, shape, place.transposed, style)
        parts.node("DequantizeLinear", [codes, scales, *zero], name, axis=axis)
    for k, (node, source, bias) in enumerate(biases):
        step = parts.node("Mul", [scales, source[0]])  # folded at load: a stored one would cost 4 bytes each
        values = _read(parts, scales).reshape(-1).astype(np.float64) * source[1]
        integers = np.clip(np.rint(bias / values), -(2**31), 2**31 - 1).astype(np.int32)
        again = f"_{k}" if k else ""
        stored = parts.array(f"{layer.name}.bias_codes{again}", integers)
        if values.size == 1:
            step = parts.node("Expand", [step, parts.constant(np.array([out], np.int64))])
        node.input[2] = parts.node("DequantizeLinear", [stored, step], f"{layer.name}.bias_value{again}", axis=0)
    return raised


def raise_scales(scale: np.ndarray, bias: np.ndarray, input_scale: float) -> np.ndarray | None:
    """Scales at which every bias fits 32 bits; None if all fit already.

    A channel that is all but dead has a scale far below its bias. Raised, its codes are as they were, and its weights
    stay below 1e-5 of the bias for each input: nothing that 8 bits of output could show.
    """
    least = np.abs(bias).astype(np.float64) / (BIAS_LIMIT * input_scale)
    least = least.max(keepdims=True) if scale.size == 1 else least
    magnitude = np.abs(scale).astype(np.float64)
    if bool((magnitude >= least).all()) and bool((magnitude > 0).all()):
        return None
    least = np.maximum(least, np.finfo(np.float32).tiny / input_scale)
    sign = np.where(scale < 0, -1.0, 1.0)
    return np.where(magnitude >= least, scale, sign * least * (1 + 1e-6)).astype(np.float32)


def _emit_codes(
    parts: Parts, prefix: str, q: QTensor, shape: tuple[int, ...], transposed: bool, style: Style
) -> tuple[str, list[str]]:
    """What DequantizeLinear takes beside the scales: codes, and a zero point unless they are signed.

    They are 8-bit integers, made at load of the bits in which they are stored, less the zero points where these differ;
    in the form "dq" they stay as stored.
    """
    form, two_bits = style
    centred = is_centred(q, form, True)
    zero = q.zero.numpy().astype(np.int64)
    zero = zero.reshape(-1) if zero.size > 1 else zero.reshape(())
    if form == "dq":
        bits = typed_bits(q.bits, form, two_bits) or q.bits
        values = signed_codes(q, shape) if centred else codes_of(q, shape)
        codes = parts.integers(f"{prefix}_codes", values.T if transposed else values, bits, centred)
        return codes, [] if centred else [parts.integers(f"{prefix}_zero_point", zero, bits, False)]
    stored = (zero - middle(q)).astype(np.int8) if centred else zero.astype(np.uint8)
    if zeros_differ(q):
        codes = emit_codes(parts, prefix, q, shape, form, two_bits, "INT32", transposed, integer=True)
        dims = (1, -1) if transposed else (-1, *[1] * (len(shape) - 1))
        zeros = parts.node("Cast", [parts.array(f"{prefix}_zero_point", stored.reshape(dims))], to=INT32)
        return parts.node("Cast", [parts.node("Sub", [codes, zeros])], to=INT8), []
    kind = "INT8" if centred else "UINT8"
    codes = emit_codes(parts, prefix, q, shape, form, two_bits, kind, transposed, integer=True)
    if q.zero_point is None:
        return codes, []
    return codes, [parts.array(f"{prefix}_zero_point", stored)]


def zeros_differ(q: QTensor) -> bool:
    """Whether channels have zero points of their own, which not every integer kernel takes."""
    return q.zero_point is not None and int(q.zero_point.min()) < int(q.zero_point.max())


def is_rounded(q: QuantizedLayer, form: Form) -> bool:
    """Whether a layer's weight between grids is one of 8 bits that is made of the checkpoint's at load.

    With an adapter or column scales, or where codes less their own zero point are no int8 (affine codes of 8 bits).
    """
    if made_at_load(q):
        return True
    if form == "dq" or not zeros_differ(q.weight):
        return False
    assert q.weight.zero_point is not None
    less = q.weight.codes.long() - q.weight.zero_point.long()
    return int(less.min()) < -INT8_TOP or int(less.max()) > INT8_TOP


def _emit_rounded(
    parts: Parts,
    name: str,
    q: QuantizedLayer,
    shape: tuple[int, ...],
    place: Place,
    axis: int,
    style: Style,
    fitting: Callable[[np.ndarray], np.ndarray],
) -> str:
    """Codes and adapter multiplied out and rounded to int8 per channel, at load; returns the int8 grid's scales."""
    form, two_bits = adapter_form(style[0]), style[1]
    value = emit_qtensor(parts, f"{name}.weight", q.weight, shape, "", form, two_bits)
    if q.adapter is not None:
        value = parts.node("Add", [value, emit_adapter(parts, name, q, shape, form, two_bits)])
    if place.transposed:
        value = parts.node("Transpose", [value], perm=[1, 0])
    effective = q.dequantize().reshape(shape[0], -1).abs().amax(1).numpy()
    steps = fitting(np.where(effective > 0, effective / INT8_TOP, 1.0).astype(np.float32))
    bits8 = parts.array(f"{name}.weight_int8_scale", steps)
    zero = parts.constant(np.zeros(shape[0], np.int8))
    codes = parts.node("QuantizeLinear", [value, bits8, zero], axis=axis)
    parts.node("DequantizeLinear", [codes, bits8, zero], place.initializer, axis=axis)
    return bits8


def _bias_of(node: Any, graph: Any) -> np.ndarray | None:
    """The float bias [out] of a Conv or Gemm (float64), None without."""
    from onnx import numpy_helper

    if len(node.input) < 3 or not node.input[2]:
        return None
    stored = {initializer.name: initializer for initializer in graph.initializer}
    if node.input[2] not in stored:
        return None
    return np.asarray(numpy_helper.to_array(stored[node.input[2]]), dtype=np.float64)


def _read(parts: Parts, name: str) -> np.ndarray:
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(next(i for i in parts.initializers if i.name == name)))

"""A layer's own codes and scales as ONNX initializers, with the few operators that make the weight of them.

Every form is folded to a constant when a runtime loads the file: nothing of it is left at run time. All give the
checkpoint's `(code − zero) · scale` bit for bit:

- cast: Cast(INT4 → FLOAT) [− zero] · scale. Codes of a width without an ONNX type stand in a blob, see `blob`.
- packed: the same with every code of fewer than 8 bits in a blob: opset 18, for old runtimes.
- dq: DequantizeLinear(INT4), what NPU compilers look for; CPU runtimes run it slowly. It needs a type: codes of 3 bits
  stand in 4, of 5 to 7 in 8.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from coraq.core.tensors import QTensor, QuantizedLayer
from coraq.export.bitplanes import LANES, bit_weights, to_blob
from coraq.export.float_graph import Place

Form = Literal["cast", "packed", "dq"]
NEXT_TYPE = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # for codes that must have an ONNX type
INT8_TOP = 127


@dataclass
class Parts:
    """Initializers and nodes to put before a graph's own. Names of values in between are short: a name costs bytes."""

    initializers: list[Any] = field(default_factory=list)
    nodes: list[Any] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its output."""
        from onnx import helper

        output = output or f"_q{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: np.ndarray) -> str:
        """A small array; equal ones are stored once."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = self.array(f"_c{len(self.constants)}", value)
        return self.constants[key]

    def array(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def integers(self, name: str, value: np.ndarray, bits: int, signed: bool) -> str:
        """Integers of `bits` (2, 4 or 8) each, really in so many bits."""
        from onnx import TensorProto, helper

        kinds = {2: (TensorProto.UINT2, TensorProto.INT2), 4: (TensorProto.UINT4, TensorProto.INT4)}
        if bits == 8:
            return self.array(name, value.astype(np.int8 if signed else np.uint8))
        raw = packed_type(value.reshape(-1), bits)
        self.initializers.append(helper.make_tensor(name, kinds[bits][signed], value.shape, raw.tobytes(), raw=True))
        return name


def packed_type(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [n] of 2 or 4 bits as ONNX packs them, the first lowest in its byte: uint8 [⌈n·bits/8⌉]."""
    share = 8 // bits
    padded = np.zeros(-(-values.size // share) * share, dtype=np.uint8)
    padded[: values.size] = values.astype(np.int64) & (2**bits - 1)
    return np.bitwise_or.reduce(padded.reshape(-1, share) << (bits * np.arange(share, dtype=np.uint8)), axis=1)


def typed_bits(bits: int, form: Form, two_bits: bool) -> int | None:
    """Bits of the ONNX type that holds a code of `bits` bits; None: a blob does.

    two_bits: the file may hold INT2 (opset 25).
    """
    if bits == 8 or (form != "packed" and (bits == 4 or (bits == 2 and two_bits))):
        return bits
    return NEXT_TYPE[bits] if form == "dq" else None


def is_centred(q: QTensor, form: Form, integer: bool) -> bool:
    """Whether codes are stored less the middle one, as signed integers.

    A symmetric grid's always are. An affine grid's are where an integer kernel reads them: products of unsigned
    activations by signed weights are what x86 processors have instructions for; unsigned by unsigned takes twice the
    time (resnet18 at 112 pixels on one thread with VNNI: 7.0 against 3.7 ms). Not where a zero point lies so far out
    that it is no int8.
    """
    if q.codebook is not None:
        return False
    if q.zero_point is None:
        return True
    return integer and form != "dq" and int(q.zero_point.max()) - middle(q) <= INT8_TOP


def middle(q: QTensor) -> int:
    """The middle code, the zero point of a symmetric grid."""
    return 2 ** (q.bits - 1)


def adapter_form(form: Form) -> Form:
    """The form of an adapter's factors: they are multiplied out at load, which DequantizeLinear is not made for."""
    return "packed" if form == "packed" else "cast"


def as_stored(layer: QuantizedLayer, integer: bool, form: Form) -> QuantizedLayer:
    """The layer as the file holds it: integer kernels and DequantizeLinear know no zero points between codes.

    Where a kernel's weights are made of codes and something else at load, the codes can stay as they are.
    """
    made = integer and form != "dq" and made_at_load(layer)
    return layer.whole() if (integer or form == "dq") and not made else layer


def made_at_load(layer: QuantizedLayer) -> bool:
    """Whether an integer kernel's weights must be made of the codes and something else."""
    return layer.adapter is not None or layer.weight.columns is not None


def emit_weight(
    parts: Parts, name: str, layer: QuantizedLayer, shape: tuple[int, ...], place: Place, form: Form, two_bits: bool
) -> None:
    """Write a layer so that its effective weight comes out under the name of the initializer that it replaces.

    Args:
        shape: of the module's weight, [out, in/groups, …].
        two_bits: 2-bit codes may be stored as INT2.
    """
    prefix = f"{name}.weight"
    weight = layer.weight
    final = place.initializer
    natural = place.dims == shape and not place.transposed
    direct = natural and layer.adapter is None
    value = emit_qtensor(parts, prefix, weight, shape, final if direct else "", form, two_bits)
    if layer.adapter is not None:
        product = emit_adapter(parts, name, layer, shape, form, two_bits)
        value = parts.node("Add", [value, product], final if natural else "")
    if place.transposed:
        parts.node("Transpose", [_as_matrix(parts, value, shape)], final, perm=[1, 0])
    elif not natural:
        parts.node("Reshape", [value, _shape(parts, place.dims)], final)


def emit_adapter(
    parts: Parts, name: str, layer: QuantizedLayer, shape: tuple[int, ...], form: Form, two_bits: bool
) -> str:
    """`B·A` of an adapter's codes, in the shape of the weight: folded at load, never a branch of its own."""
    assert layer.adapter is not None
    factors = [
        emit_qtensor(
            parts, f"{name}.adapter_{key}", factor, tuple(factor.codes.shape), "", adapter_form(form), two_bits
        )
        for key, factor in (("b", layer.adapter.b), ("a", layer.adapter.a))
    ]
    return parts.node("Reshape", [parts.node("MatMul", factors), _shape(parts, shape)])


def emit_qtensor(
    parts: Parts,
    prefix: str,
    q: QTensor,
    shape: tuple[int, ...],
    output: str = "",
    form: Form = "cast",
    two_bits: bool = False,
) -> str:
    """Codes on their grid as float32 of `shape`; the codes are initializer `prefix + "_codes"`."""
    if q.columns is not None:
        value = emit_qtensor(parts, prefix, replace(q, columns=None), shape, "", form, two_bits)
        return emit_columns(parts, prefix, q, shape, value, output)
    scale, zero = grid_arrays(q, shape)
    if q.codebook is not None:
        codes = emit_codes(parts, prefix, q, shape, adapter_form(form), two_bits, "INT32")
        levels = parts.node("Gather", [parts.array(f"{prefix}_codebook", q.codebook.numpy()), codes])
        return parts.node("Mul", [levels, parts.array(f"{prefix}_scale", scale)], output)
    if form == "dq" and _standard(q):
        return emit_dequantize(parts, prefix, q, shape, output, two_bits)
    codes = emit_codes(parts, prefix, q, shape, form, two_bits, "FLOAT")
    scaled = parts.array(f"{prefix}_scale", scale)
    if q.zero_point is None:
        return parts.node("Mul", [codes, scaled], output)
    stored = parts.array(f"{prefix}_zero_point", zero.astype(np.uint8))
    zero_name = parts.node("Cast", [stored], to=_type("FLOAT"))
    if q.fraction:
        zero_name = parts.node("Mul", [zero_name, parts.constant(np.array(2.0**-q.fraction, np.float32))])
    return parts.node("Mul", [parts.node("Sub", [codes, zero_name]), scaled], output)


def emit_columns(parts: Parts, prefix: str, q: QTensor, shape: tuple[int, ...], value: str, output: str) -> str:
    """`value` times the column scales, which are stored as float16: no narrower type is known to all runtimes."""
    assert q.columns is not None
    groups, _, channels = q.columns.shape
    dims = (groups, 1, channels, 1)
    stored = parts.array(f"{prefix}_column_scale", q.columns.numpy().astype(np.float16).reshape(dims))
    factors = parts.node("Cast", [stored], to=_type("FLOAT"))
    split = (groups, q.codes.shape[1], channels, q.codes.shape[2] // channels)
    scaled = parts.node("Mul", [parts.node("Reshape", [value, _shape(parts, split)]), factors])
    return parts.node("Reshape", [scaled, _shape(parts, shape)], output)


def emit_dequantize(
    parts: Parts, prefix: str, q: QTensor, shape: tuple[int, ...], output: str, two_bits: bool = False
) -> str:
    """DequantizeLinear of the codes as they are stored, one scale a channel."""
    bits, signed = typed_bits(q.bits, "dq", two_bits) or q.bits, q.zero_point is None
    scale, zero = grid_arrays(q, shape)
    values = signed_codes(q, shape) if signed else codes_of(q, shape)
    inputs = [
        parts.integers(f"{prefix}_codes", values, bits, signed),
        parts.array(f"{prefix}_scale", scale.reshape(-1) if scale.size > 1 else scale.reshape(())),
    ]
    if not signed:
        zeros = zero.reshape(-1) if scale.size > 1 else zero.reshape(())
        inputs.append(parts.integers(f"{prefix}_zero_point", zeros, bits, False))
    return parts.node("DequantizeLinear", inputs, output, axis=0)


def emit_codes(
    parts: Parts,
    prefix: str,
    q: QTensor,
    shape: tuple[int, ...],
    form: Form,
    two_bits: bool,
    to: str,
    transposed: bool = False,
    integer: bool = False,
) -> str:
    """The codes in ONNX type `to` and in `shape`, less the middle one where `is_centred`.

    transposed: as the [in, out] matrix of a Linear layer.
    """
    signed = is_centred(q, form, integer)
    values = signed_codes(q, shape) if signed else codes_of(q, shape)
    values = values.T if transposed else values
    bits = typed_bits(q.bits, form, two_bits)
    if bits is None:
        return _emit_blob(parts, prefix, values, q.bits, signed, to)
    stored = parts.integers(f"{prefix}_codes", values, bits, signed)
    if bits == 8 and to == ("INT8" if signed else "UINT8"):
        return stored
    return parts.node("Cast", [stored], to=_type(to))


def _emit_blob(parts: Parts, prefix: str, values: np.ndarray, bits: int, signed: bool, to: str) -> str:
    """Integers in a blob and the operators that take it apart, see `coraq.export.bitplanes`."""
    blob = parts.array(f"{prefix}_codes", to_blob(values.reshape(-1), bits))
    shifts = parts.constant(np.arange(LANES, dtype=np.uint8).reshape(-1, 1, 1))
    value = parts.node("BitShift", [blob, shifts], direction="RIGHT")
    value = parts.node("BitwiseAnd", [value, parts.constant(np.array(1, np.uint8))])
    value = parts.node("MatMulInteger", [value, parts.constant(bit_weights(bits, signed))])
    if values.size % LANES:
        value = parts.node("Reshape", [value, _shape(parts, (-1,))])
        bounds = [parts.constant(np.array([number], np.int64)) for number in (0, values.size)]
        value = parts.node("Slice", [value, *bounds])
    value = parts.node("Reshape", [value, _shape(parts, values.shape)])
    return value if to == "INT32" else parts.node("Cast", [value], to=_type(to))


def codes_of(q: QTensor, shape: tuple[int, ...]) -> np.ndarray:
    """The unsigned codes in the weight's shape."""
    return np.asarray(q.codes.numpy().reshape(shape))


def signed_codes(q: QTensor, shape: tuple[int, ...]) -> np.ndarray:
    """The codes less the middle one: int8."""
    return (codes_of(q, shape).astype(np.int16) - middle(q)).astype(np.int8)


def grid_arrays(q: QTensor, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int64, in steps of its fraction), [out, 1, …] or all ones, to broadcast."""
    if tuple(q.codes.shape) == shape:  # an adapter's factor [groups, rows, columns]
        dims = tuple(q.scale.shape)
    else:
        dims = (q.scale.numel(), *[1] * (len(shape) - 1))
    zero = q.zero if q.zero_point is None else q.zero_point
    return q.scale.numpy().reshape(dims), zero.numpy().reshape(dims).astype(np.int64)


def _standard(q: QTensor) -> bool:
    """Whether DequantizeLinear can say it: a zero point must be of the codes' own type, scales positive by custom."""
    return q.codebook is None and (q.zero_point is None or int(q.zero_point.max()) < 2**q.bits)


def _as_matrix(parts: Parts, value: str, shape: tuple[int, ...]) -> str:
    return value if len(shape) == 2 else parts.node("Reshape", [value, _shape(parts, (shape[0], -1))])


def _shape(parts: Parts, dims: tuple[int, ...]) -> str:
    return parts.constant(np.array(dims, dtype=np.int64))


def _type(name: str) -> int:
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name))

"""A layer's own codes and scales as ONNX initializers, with the few operators that make the weight of them.

Every form is folded to a constant when a runtime loads the file: nothing of it is left at run time. All give the
checkpoint's `(code − zero) · scale` bit for bit:

- cast: Cast(INT4 → FLOAT) [− zero] · scale. Codes of 3 bits stand in 4, of 5 to 8 in 8.
- packed: the same from a uint8 blob that BitShift and BitwiseAnd take apart: opset 18, for old runtimes.
- dq: DequantizeLinear(INT4), what NPU compilers look for; CPU runtimes run it slowly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from coraq.core.tensors import QTensor, QuantizedLayer
from coraq.export.float_graph import Place

Form = Literal["cast", "packed", "dq"]
STORED = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits of a code in the file; 2 in 2 where opset 25 is taken


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
        raw = bit_planes(value.reshape(-1).astype(np.int64) & (2**bits - 1), bits, interleaved=True)
        self.initializers.append(helper.make_tensor(name, kinds[bits][signed], value.shape, raw.tobytes(), raw=True))
        return name


def bit_planes(codes: np.ndarray, bits: int, interleaved: bool) -> np.ndarray:
    """Codes [n] of 2, 4 or 8 bits packed into uint8 [⌈n·bits/8⌉], the first code lowest.

    interleaved: neighbours share a byte (ONNX's own packing); else byte j holds codes j, j + m, j + 2m, … of the
    m bytes, so that a shift of the whole blob gives a run of codes.
    """
    share = 8 // bits
    count = -(-len(codes) // share)
    padded = np.zeros(count * share, dtype=np.uint8)
    padded[: len(codes)] = codes
    lanes = padded.reshape(count, share).T if interleaved else padded.reshape(share, count)
    out = np.zeros(count, dtype=np.uint8)
    for lane, values in enumerate(lanes):
        out |= values << np.uint8(lane * bits)
    return out


def unplane(blob: np.ndarray, bits: int, count: int, interleaved: bool) -> np.ndarray:
    """The inverse of `bit_planes`: uint8 [count]."""
    lanes = np.stack([(blob >> np.uint8(lane * bits)) & np.uint8(2**bits - 1) for lane in range(8 // bits)])
    return (lanes.T if interleaved else lanes).reshape(-1)[:count]


def stored_bits(bits: int, form: Form, two_bits: bool) -> int:
    """Bits that a code takes in the file. `two_bits`: the file may hold INT2 (opset 25)."""
    return 2 if bits == 2 and (two_bits or form == "packed") else STORED[bits]


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
        product = emit_adapter(parts, name, layer, shape)
        value = parts.node("Add", [value, product], final if natural else "")
    if place.transposed:
        parts.node("Transpose", [_as_matrix(parts, value, shape)], final, perm=[1, 0])
    elif not natural:
        parts.node("Reshape", [value, _shape(parts, place.dims)], final)


def emit_adapter(parts: Parts, name: str, layer: QuantizedLayer, shape: tuple[int, ...]) -> str:
    """`B·A` of an adapter's codes, in the shape of the weight: folded at load, never a branch of its own."""
    assert layer.adapter is not None
    factors = [
        emit_qtensor(parts, f"{name}.adapter_{key}", factor, tuple(factor.codes.shape))
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
    scale, zero = grid_arrays(q, shape)
    if q.codebook is not None:
        codes = emit_codes(parts, prefix, q, shape, form if form == "packed" else "cast", two_bits, "INT32")
        levels = parts.node("Gather", [parts.array(f"{prefix}_codebook", q.codebook.numpy()), codes])
        return parts.node("Mul", [levels, parts.array(f"{prefix}_scale", scale)], output)
    if form == "dq" and _standard(q):
        return emit_dequantize(parts, prefix, q, shape, output, two_bits)
    codes = emit_codes(parts, prefix, q, shape, form, two_bits, "FLOAT")
    scaled = parts.array(f"{prefix}_scale", scale)
    offset = code_offset(q, form)
    if q.zero_point is None and not offset:
        return parts.node("Mul", [codes, scaled], output)
    if q.zero_point is None:
        zero_name = parts.constant(np.array(offset, np.float32))
    else:
        stored = parts.array(f"{prefix}_zero_point", zero.astype(np.uint8))
        zero_name = parts.node("Cast", [stored], to=_type("FLOAT"))
    return parts.node("Mul", [parts.node("Sub", [codes, zero_name]), scaled], output)


def emit_dequantize(
    parts: Parts, prefix: str, q: QTensor, shape: tuple[int, ...], output: str, two_bits: bool = False
) -> str:
    """DequantizeLinear of the codes as they are stored, one scale a channel."""
    bits, signed = stored_bits(q.bits, "dq", two_bits), q.zero_point is None
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
) -> str:
    """The codes in ONNX type `to` and in `shape`: signed if the grid is symmetric and the form has signs.

    transposed: as the [in, out] matrix of a Linear layer.
    """
    bits = stored_bits(q.bits, form, two_bits)
    if form == "packed" and bits < 8:
        return _emit_packed(parts, prefix, q, shape, bits, to, transposed)
    signed = q.zero_point is None and q.codebook is None and form != "packed"
    values = signed_codes(q, shape) if signed else codes_of(q, shape)
    stored = parts.integers(f"{prefix}_codes", values.T if transposed else values, bits, signed)
    if bits == 8 and to == ("INT8" if signed else "UINT8"):
        return stored
    return parts.node("Cast", [stored], to=_type(to))


def _emit_packed(
    parts: Parts, prefix: str, q: QTensor, shape: tuple[int, ...], bits: int, to: str, transposed: bool
) -> str:
    """Unpack a blob of bit planes: one And and one shift for each of a byte's codes."""
    values = codes_of(q, shape)
    values = values.T if transposed else values
    codes = values.reshape(-1)
    blob = parts.array(f"{prefix}_codes", bit_planes(codes, bits, interleaved=False))
    mask = parts.constant(np.array(2**bits - 1, np.uint8))
    lanes = []
    for lane in range(8 // bits):
        value = blob
        if lane:
            value = parts.node("BitShift", [value, parts.constant(np.array(lane * bits, np.uint8))], direction="RIGHT")
        lanes.append(parts.node("BitwiseAnd", [value, mask]))
    value = parts.node("Concat", lanes, axis=0)
    if codes.size % (8 // bits):
        bounds = [parts.constant(np.array([number], np.int64)) for number in (0, codes.size)]
        value = parts.node("Slice", [value, *bounds])
    value = parts.node("Reshape", [value, _shape(parts, values.shape)])
    return value if to == "UINT8" else parts.node("Cast", [value], to=_type(to))


def codes_of(q: QTensor, shape: tuple[int, ...]) -> np.ndarray:
    """The unsigned codes in the weight's shape."""
    return np.asarray(q.codes.numpy().reshape(shape))


def signed_codes(q: QTensor, shape: tuple[int, ...]) -> np.ndarray:
    """A symmetric grid's codes less the middle one: int8."""
    return (codes_of(q, shape).astype(np.int16) - 2 ** (q.bits - 1)).astype(np.int8)


def code_offset(q: QTensor, form: Form) -> int:
    """What a symmetric grid's stored codes still have to lose: the middle code where they are stored unsigned."""
    return 2 ** (q.bits - 1) if form == "packed" and q.zero_point is None and q.codebook is None else 0


def grid_arrays(q: QTensor, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int64), [out, 1, …] or all ones, to broadcast over the weight's shape."""
    if tuple(q.codes.shape) == shape:  # an adapter's factor [groups, rows, columns]
        dims = tuple(q.scale.shape)
    else:
        dims = (q.scale.numel(), *[1] * (len(shape) - 1))
    zero = np.full(dims, 2 ** (q.bits - 1)) if q.zero_point is None else q.zero_point.numpy().reshape(dims)
    return q.scale.numpy().reshape(dims), zero.astype(np.int64)


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

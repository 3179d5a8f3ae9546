"""What integer kernels need and a checkpoint has not, around an activation that does more than clip.

A checkpoint's grid stands behind the activation. Runtimes fuse a Relu or Clip into an integer convolution, but no SiLU,
GELU or hard swish: there the convolution must put out codes itself. Its grid is made here, 8 bits from least to
greatest value on calibration images, and the export says so: it is one rounding more than the checkpoint has.

A SiLU then stands between grids, `x · sigmoid(x)`. With a grid behind its sigmoid, too, ONNX Runtime takes both steps
on codes (a table of 256 entries and an integer product). In float they took longer than all convolutions together:
efficientnet_b0 needed 1.1 of the float network's time, and 0.6 so. A hard swish is written out likewise, as an integer
sum, whose codes end where the clipping does, and an integer product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coraq.export.float_graph import Place
from coraq.export.graph import Walk
from coraq.export.runtimes import run_all

TOP = 255
SIGMOID = (1 / TOP, 0)  # scale and zero point of what lies between 0 and 1; 1 is exact, where most of a SiLU lies


def complete_grids(model: Any, places: dict[str, Place], images: np.ndarray) -> int:
    """Put a grid behind every quantized convolution that reads from one and has none behind it; returns how many.

    Args:
        model: the graph as exported, weights float; changed in place.
        images: calibration images [n, channels, height, width].
    """
    from onnx import TensorProto, helper

    walk = Walk(model.graph)
    weights = {place.initializer for place in places.values()}
    bare = [
        node
        for node in model.graph.node
        if node.op_type == "Conv"
        and node.input[1] in weights
        and node.output[0] not in walk.outputs
        and walk.grid_before(node.input[0]) is not None
        and walk.quantized_behind(node.output[0]) is None
    ]
    if not bare:
        return 0
    names = [node.output[0] for node in bare]
    probe = type(model).FromString(model.SerializeToString())
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    low, high = np.zeros(len(names)), np.zeros(len(names))
    for start in range(0, len(images), 4):  # all of these tensors at once: few images at a time
        values = run_all(probe.SerializeToString(), {model.graph.input[0].name: images[start : start + 4]}, False)[1:]
        low = np.minimum(low, [value.min() for value in values])
        high = np.maximum(high, [value.max() for value in values])
    grids: dict[str, list[str]] = {}
    for name, least, greatest in zip(names, low, high, strict=True):
        step = max(greatest - least, 1e-12) / TOP
        grids[name] = _grid(model.graph, name, step, round(-least / float(np.float32(step))))
    _insert(model.graph, grids)
    return len(names)


def complete_sigmoids(model: Any) -> int:
    """Put a grid behind every sigmoid between grids that does nothing but multiply; returns how many.

    Call it after `complete_grids`, whose grids count.
    """
    walk = Walk(model.graph)

    def multiplies(node: Any, factor: str) -> bool:
        others = [name for name in node.input if name != factor]
        return (
            node.op_type == "Mul"
            and len(others) == 1
            and walk.is_made_by(others[0], "DequantizeLinear")
            and walk.quantized_behind(node.output[0]) is not None
        )

    found = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Sigmoid"
        and node.output[0] not in walk.outputs
        and walk.is_made_by(node.input[0], "DequantizeLinear")
        and (readers := walk.readers.get(node.output[0], []))
        and all(multiplies(reader, node.output[0]) for reader in readers)
    ]
    _insert(model.graph, {name: _grid(model.graph, name, *SIGMOID) for name in found})
    return len(found)


def write_out_hard_swishes(model: Any) -> int:
    """Write every hard swish between grids, `x · relu6(x + 3) / 6`, as a sum and a product; returns how many.

    ONNX Runtime has no integer kernel for the operator, but it has both of these. The sum's grid runs from 0 to 6, so
    that its codes clip as relu6 does; read back on a grid from 0 to 1, the same codes are divided by 6.
    """
    from onnx import TensorProto, helper, numpy_helper

    walk = Walk(model.graph)

    def is_unsigned(grid: Any) -> bool:  # an integer sum takes codes of one kind only
        zero = walk.initializers.get(grid.input[2]) if len(grid.input) > 2 else None
        return zero is not None and bool(zero.data_type == TensorProto.UINT8)

    found = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "HardSwish"
        and walk.is_made_by(node.input[0], "DequantizeLinear")
        and (behind := walk.quantized_behind(node.output[0])) is not None
        and is_unsigned(walk.producer[node.input[0]])
        and is_unsigned(behind)
    }
    if not found:
        return 0
    three, clip, gate = (_grid(model.graph, f"hard_swish_{most}", most / TOP, 0) for most in (3, 6, 1))
    model.graph.initializer.append(numpy_helper.from_array(np.array(TOP, np.uint8), "hard_swish_top"))
    nodes = [helper.make_node("DequantizeLinear", ["hard_swish_top", *three], ["hard_swish_three"])]
    for node in model.graph.node:
        y = node.output[0]
        if y not in found:
            nodes.append(node)
            continue
        nodes += [
            helper.make_node("Add", [found[y], "hard_swish_three"], [f"{y}__sum"]),
            helper.make_node("QuantizeLinear", [f"{y}__sum", *clip], [f"{y}__sum_codes"]),
            helper.make_node("DequantizeLinear", [f"{y}__sum_codes", *gate], [f"{y}__gate"]),
            helper.make_node("Mul", [found[y], f"{y}__gate"], [y]),
        ]
    _replace(model.graph, nodes)
    return len(found)


def grid_pieces(model: Any) -> int:
    """Put the grid of a tensor behind each piece that it is split into, too (MixNet); returns how many pieces.

    It changes no value. Runtimes move codes through a Split only where every piece is quantized behind it.
    """
    walk = Walk(model.graph)
    grids: dict[str, list[str]] = {}
    for node in model.graph.node:
        source = walk.grid_before(node.input[0]) if node.op_type == "Split" else None
        if source is not None:
            pieces = [name for name in node.output if name in walk.readers and name not in walk.outputs]
            grids |= {name: list(source.input[1:]) for name in pieces}
    _insert(model.graph, grids)
    return len(grids)


def name_pools(model: Any) -> int:
    """Write the mean over rows and columns of images as the pooling that it is; returns how many there were.

    torch exports it as a ReduceMean, which ONNX Runtime has in float alone; of a GlobalAveragePool it has both, and the
    float one is no slower.
    """
    from onnx import helper, numpy_helper

    walk = Walk(model.graph)
    images = {v.name for v in model.graph.value_info if len(v.type.tensor_type.shape.dim) == 4}
    nodes, count = [], 0
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[0] not in images:
            continue
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        axes = walk.initializers.get(node.input[1])
        if keeps and axes is not None and sorted(numpy_helper.to_array(axes) % 4) == [2, 3]:
            nodes[-1] = helper.make_node("GlobalAveragePool", [node.input[0]], [node.output[0]], node.name)
            count += 1
    _replace(model.graph, nodes)
    return count


def _grid(graph: Any, name: str, step: float, zero: int) -> list[str]:
    """A grid of unsigned 8-bit codes for a value: the names of its scale and zero point."""
    from onnx import numpy_helper

    pair = [f"{name}__scale", f"{name}__zero"]
    graph.initializer.append(numpy_helper.from_array(np.array(step, np.float32), pair[0]))
    graph.initializer.append(numpy_helper.from_array(np.array(np.clip(zero, 0, TOP), np.uint8), pair[1]))
    return pair


def _insert(graph: Any, grids: Mapping[str, Sequence[str]]) -> None:
    """Put a grid, the names of its scale and zero point, behind each of these values."""
    from onnx import helper

    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        for k, name in enumerate(node.output):
            if name in grids:
                node.output[k] = f"{name}__float"
                nodes.append(helper.make_node("QuantizeLinear", [node.output[k], *grids[name]], [f"{name}__codes"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}__codes", *grids[name]], [name]))
    _replace(graph, nodes)


def _replace(graph: Any, nodes: Sequence[Any]) -> None:
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)

"""Grids that integer kernels need and a checkpoint has not: before an activation that does more than clip.

A checkpoint's grid stands behind the activation. Runtimes fuse a Relu or Clip into an integer convolution, but no SiLU,
GELU or hard swish: there the convolution must put out codes itself. Its grid is made here, 8 bits from least to
greatest value on calibration images, and the export says so: it is one rounding more than the checkpoint has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from coraq.export.float_graph import Place
from coraq.export.graph import Walk
from coraq.export.runtimes import run_all

TOP = 255


def complete_grids(model: Any, places: dict[str, Place], images: np.ndarray) -> int:
    """Put a grid behind every quantized convolution that reads from one and has none behind it; returns how many.

    Args:
        model: the graph as exported, weights float; changed in place.
        images: calibration images [n, channels, height, width].
    """
    from onnx import TensorProto, helper, numpy_helper

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
    nodes: list[Any] = []
    grids = {name: (low[k], high[k]) for k, name in enumerate(names)}
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "Conv" or node.output[0] not in grids:
            continue
        name = node.output[0]
        least, greatest = grids[name]
        step = np.float32(max(greatest - least, 1e-12) / TOP)
        zero = np.uint8(np.clip(round(-least / float(step)), 0, TOP))
        pair = [f"{name}__scale", f"{name}__zero"]
        model.graph.initializer.append(numpy_helper.from_array(np.array(step), pair[0]))
        model.graph.initializer.append(numpy_helper.from_array(np.array(zero), pair[1]))
        node.output[0] = f"{name}__float"
        nodes.append(helper.make_node("QuantizeLinear", [node.output[0], *pair], [f"{name}__codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}__codes", *pair], [name]))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return len(names)

"""Integer kernels against the same graph executed operator by operator, layer by layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from coraq.export.graph import Walk
from coraq.export.onnx_file import OnnxExport
from coraq.export.runtimes import run_all


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

"""An ONNX graph as something that can be walked: who makes a value, who reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLIPPING = ("Relu", "Clip")  # a runtime fuses these into an integer convolution
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # values stay on their grid


@dataclass
class Walk:
    """Producers and readers in a GraphProto as it stands."""

    graph: Any

    def __post_init__(self) -> None:
        self.producer: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in self.graph.output}
        self.initializers = {initializer.name: initializer for initializer in self.graph.initializer}

    def grid_before(self, value: str) -> Any | None:
        """The DequantizeLinear that a value comes from, past operators that only move values."""
        while value in self.producer:
            node = self.producer[value]
            if node.op_type not in MOVING:
                return node if node.op_type == "DequantizeLinear" else None
            value = node.input[0]
        return None

    def is_made_by(self, value: str, kind: str) -> bool:
        return value in self.producer and self.producer[value].op_type == kind

    def sole_reader(self, value: str) -> Any | None:
        """The one node that reads a value, if there is just one and the value is no output of the graph."""
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def quantized_behind(self, value: str) -> Any | None:
        """The QuantizeLinear that reads a value, perhaps behind a Relu or Clip that alone reads it."""
        reader = self.sole_reader(value)
        if reader is not None and reader.op_type in CLIPPING:
            value = reader.output[0]
            reader = self.sole_reader(value)
        readers = self.readers.get(value, []) if value not in self.outputs else []
        if readers and all(node.op_type == "QuantizeLinear" for node in readers):
            return readers[0]
        return None


def without_grids(model: Any) -> Any:
    """A copy of a model in which every Quantize → [Clip] → Dequantize of an activation is gone: the float network."""
    import onnx

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    walk = Walk(plain.graph)
    alias: dict[str, str] = {}
    gone: list[Any] = []
    for node in plain.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in walk.initializers:
            continue
        chain = [node]
        for reader in walk.readers.get(node.output[0], []):
            chain.append(reader)
            if reader.op_type == "Clip":
                chain += walk.readers.get(reader.output[0], [])
        gone += chain
        for last in chain:
            if last.op_type == "DequantizeLinear":
                alias[last.output[0]] = node.input[0]
    kept = [node for node in plain.graph.node if not any(node is other for other in gone)]
    for node in kept:
        for index, name in enumerate(node.input):
            while name in alias:
                name = alias[name]
            node.input[index] = name
    copies = [type(node).FromString(node.SerializeToString()) for node in kept]
    del plain.graph.node[:]
    plain.graph.node.extend(copies)
    used = {name for node in copies for name in node.input}
    for initializer in [i for i in plain.graph.initializer if i.name not in used]:
        plain.graph.initializer.remove(initializer)
    return plain

"""The ONNX graph of the folded student, float but for activation grids, and where in it each layer's weight lies."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.export.grids import GridsAsOperator, translation
from coraq.export.requirements import require

INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True)
class Place:
    """Where a layer's effective weight stands in the graph.

    Attributes:
        initializer: its name there.
        dims: its shape there.
        transposed: the initializer is [in, out], the layer's weight [out, in].
    """

    initializer: str
    dims: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class FloatGraph:
    """`model` is an onnx.ModelProto; `places` has every quantized layer's weight (two layers may share one)."""

    model: Any
    places: dict[str, Place]


def export_float(network: nn.Module, layers: dict[str, QuantizedLayer], example: Tensor, opset: int) -> FloatGraph:
    """Export `network`, whose layers hold their dequantized weights, with a dynamic batch.

    The exporter may merge a norm into a convolution that coraq could not fold; then the codes no longer stand for
    the weight in the graph, and it is exported again without the exporter's optimizer.

    Args:
        example: images [2, channels, height, width]; height and width are fixed in the graph.
        opset: 18 to 21.

    Raises:
        CoraqError: torch cannot export the network, or a quantized weight is not in the graph.
    """
    require("onnx")
    require("onnxscript")
    missing = ""
    for optimize in (True, False):
        model = _export(network, example, opset, optimize)
        places, missing = locate(model, network, layers)
        if not missing:
            return FloatGraph(model, places)
    raise CoraqError(
        f"the exported graph has no initializer that holds the weight of layer {missing}, bit for bit",
        "torch's exporter changed it in a way that coraq does not know; please report the architecture.",
    )


def _export(network: nn.Module, example: Tensor, opset: int, optimize: bool) -> Any:
    with quiet(), GridsAsOperator():
        try:
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                custom_translation_table=translation(),
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                optimize=optimize,
                verbose=False,
            )
        except Exception as error:  # torch's exporter raises whatever its passes raise
            raise CoraqError(f"torch.onnx.export fails on this network: {_first_line(error)}", _REPORT) from error
    assert program is not None
    model = program.model_proto
    # stack traces and the like are larger than a small network
    for node in model.graph.node:
        for entry in [entry for entry in node.metadata_props if entry.key != SCOPES]:
            node.metadata_props.remove(entry)
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note of the modules that a node was called in
_REPORT = "Try another --format; `coraq export --format pt2` uses torch.export alone."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch's exporters print and log: results go to stdout, and only results."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def locate(model: Any, network: nn.Module, layers: dict[str, QuantizedLayer]) -> tuple[dict[str, Place], str]:
    """Each layer's place, and the first layer that has none ("" if all have).

    By the parameter's name first, then by content: an initializer that equals the weight, or its transpose, bit for
    bit. A name alone proves nothing: what stands there must be the weight.
    """
    from onnx import numpy_helper

    arrays = {i.name: i for i in model.graph.initializer}
    by_size: dict[int, list[str]] = {}
    for name, proto in arrays.items():
        by_size.setdefault(int(np.prod(proto.dims, dtype=np.int64)), []).append(name)
    read: dict[str, np.ndarray] = {}

    def values(name: str) -> np.ndarray:
        if name not in read:
            read[name] = numpy_helper.to_array(arrays[name])
        return read[name]

    places: dict[str, Place] = {}
    taken: set[str] = set()
    modules: dict[str, Any] = dict(network.named_modules())
    for layer in layers:
        weight = modules[layer].weight.detach().cpu().numpy()
        same_size = by_size.get(weight.size, [])
        named = f"{layer}.weight"
        # an initializer that another layer has is the last resort: two layers of equal weights may share it
        order = sorted(same_size, key=lambda name: (name != named, name in taken))
        place = next((found for name in order if (found := _match(name, values(name), weight))), None)
        if place is None:
            return places, layer
        places[layer] = place
        taken.add(place.initializer)
    return places, ""


def _match(name: str, value: np.ndarray, weight: np.ndarray) -> Place | None:
    if value.dtype != weight.dtype:
        return None
    if same_bits(value.reshape(-1), weight.reshape(-1)):
        return Place(name, value.shape)
    matrix = weight.reshape(weight.shape[0], -1)
    if value.ndim == 2 and value.shape == matrix.T.shape and same_bits(value, matrix.T):
        return Place(name, value.shape, transposed=True)
    return None


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal, +0 and −0 alike (a code has one zero)."""
    return a.shape == b.shape and bool(np.array_equal(a, b))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

"""ONNX files in the runtimes that people use, one interface: images in, logits out."""

from __future__ import annotations

import collections
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from coraq.errors import CoraqError
from coraq.export.export_result import Latency
from coraq.export.requirements import require

WARM_UP, MOST_REPEATS, FEWEST_REPEATS = 2, 40, 5
TIME_S = 3.0  # spent on the repeats of one batch size


class Runtime(Protocol):
    """One opened file."""

    name: str
    metadata: dict[str, str]

    def run(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, channels, height, width] → float32 [n, classes]."""


class OnnxRuntime:
    """A session of ONNX Runtime on the CPU, with all its optimisations; `optimised` is the graph that it runs.

    Raises:
        CoraqError: the package is missing, or the runtime refuses the file.
    """

    def __init__(self, content: bytes | Path, threads: int, optimise: bool = True) -> None:
        ort = require("onnxruntime")
        self.name = f"ONNX Runtime {ort.__version__}"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(optimised)
            source = str(content) if isinstance(content, Path) else content
            try:
                self._session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # the runtime's own errors, of many kinds
                raise CoraqError(
                    f"{self.name} does not open the file: {_first_line(error)}",
                    "INT4 needs ONNX Runtime 1.23 or later; --portable writes a file for 1.17 and later.",
                ) from error
            self.optimised = optimised.read_bytes() if optimised.exists() else b""
        self._input = self._session.get_inputs()[0].name
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, images: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self._session.run(None, {self._input: images})[0])
        except Exception as error:  # the runtime's own errors, of many kinds
            raise CoraqError(f"{self.name} does not run the file: {_first_line(error)}", "") from error

    def kernels(self) -> collections.Counter[str]:
        """Operators of the optimised graph."""
        import onnx

        return collections.Counter(node.op_type for node in onnx.load_from_string(self.optimised).graph.node)


class OpenVino:
    """A model compiled by OpenVINO for the CPU, at its defaults (where the processor has bf16, float means bf16).

    Raises:
        CoraqError: the package is missing, or it refuses the file.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        openvino = require("openvino")
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self.metadata: dict[str, str] = {}
        core = openvino.Core()
        try:
            model = core.read_model(content)
            self._model = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        except Exception as error:  # the runtime's own errors, of many kinds
            raise CoraqError(
                f"{self.name} does not open the file: {_first_line(error)}",
                "It takes no 2-bit codes; --portable writes them in a form that it takes.",
            ) from error

    def run(self, images: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(self._model([images])[0])
        except Exception as error:  # the runtime's own errors, of many kinds
            raise CoraqError(f"{self.name} does not run the file: {_first_line(error)}", "") from error

    def precisions(self) -> dict[str, int]:
        """Convolutions by the precision that they really run in."""
        found: collections.Counter[str] = collections.Counter()
        for operation in self._model.get_runtime_model().get_ops():
            info = operation.get_rt_info()
            if "layerType" in info and str(_plain(info["layerType"])) == "Convolution":
                found[str(_plain(info["runtimePrecision"]))] += 1
        return dict(found)


def _plain(value: Any) -> Any:
    """The value of one of OpenVINO's any-objects."""
    return value.value if hasattr(value, "value") else value


class RuntimeNetwork(nn.Module):
    """A runtime as a network of torch's, so that what measures networks measures it."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.runtime.run(images.contiguous().cpu().numpy()))


def run_all(content: bytes, feeds: dict[str, np.ndarray], optimise: bool) -> list[np.ndarray]:
    """All outputs of a graph in ONNX Runtime, optimised or literally as it stands."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def time_pair(
    exported: Callable[[np.ndarray], Any], reference: Callable[[np.ndarray], Any], images: np.ndarray, threads: int
) -> Latency:
    """Median times of both on one batch, one after the other, each first in turn: what drifts hits both alike."""
    for _ in range(WARM_UP):
        exported(images)
        reference(images)
    times: dict[int, list[float]] = {0: [], 1: []}
    start = time.perf_counter()
    for repeat in range(MOST_REPEATS):
        for which in (0, 1) if repeat % 2 else (1, 0):
            begin = time.perf_counter()
            (exported, reference)[which](images)
            times[which].append(time.perf_counter() - begin)
        if repeat + 1 >= FEWEST_REPEATS and time.perf_counter() - start > TIME_S:
            break
    return Latency(
        batch=len(images),
        exported_ms=1e3 * statistics.median(times[0]),
        float_ms=1e3 * statistics.median(times[1]),
        repeats=len(times[0]),
        threads=threads,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__

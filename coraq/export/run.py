"""`coraq export`: one run's checkpoint in another tool's format, verified, with its record beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from coraq import registry
from coraq.artifact import Checkpoint, RunFolder, load_checkpoint, read_result
from coraq.artifact.files import disk_error, write_atomic
from coraq.config import RunConfig
from coraq.data import Images, ImageSet, Preprocess, run_images, synthetic_images
from coraq.errors import CoraqError
from coraq.events import Note, Sink, null_sink, stage
from coraq.export.export_result import Check, ExportResult
from coraq.export.onnx_file import build_onnx, example_images, label_of
from coraq.export.pt2 import build_pt2, codes_exact, open_pt2
from coraq.export.requirements import require
from coraq.export.timm_folder import weights_on_grid, write_timm_folder
from coraq.export.verify import check_onnx, check_openvino, check_torch, refused
from coraq.export.weights import Form
from coraq.network.load import names_of, open_folder
from coraq.runtime.safe_files import append_traceback, read_plain
from coraq.version import __version__

Format = Literal["onnx", "timm", "pt2"]
UNVERIFIED = ".unverified"
SUFFIX: dict[Form, str] = {"cast": "", "packed": ".portable", "dq": ".npu"}
VERIFY_IMAGES = 512
CALIBRATION_IMAGES = 32  # for the grids that are added


@dataclass(frozen=True)
class Request:
    """What to export and how to verify it.

    Attributes:
        form: of an ONNX file's weights.
        verify: False writes the file and records that nobody looked at it.
        images: verify on at most so many.
        threads: of the runtime; None: torch's own number.
        openvino: open, verify and time an ONNX file in OpenVINO, too.
    """

    format: Format = "onnx"
    form: Form = "cast"
    verify: bool = True
    images: int = VERIFY_IMAGES
    threads: int | None = None
    openvino: bool = False

    @property
    def worker_threads(self) -> int:
        return self.threads or torch.get_num_threads()


def export_run(source: Path, request: Request, sink: Sink = null_sink) -> ExportResult:
    """Export a run folder, or a checkpoint file, and verify it on the run's own images (synthetic ones without a run).

    The artefact lies beside the checkpoint, and its record in `export.json` there. A failed verification is in the
    result (`verified` is False) and the artefact's name ends in `.unverified`.

    Raises:
        CoraqError: an optional package is missing, the checkpoint is damaged, torch cannot export the network, or
            another process is working in the folder.
    """
    for line in registry.import_plugins():
        sink(Note(line, "warning"))
    if not source.is_dir():
        return _export(source, request, sink)
    read_result(source)  # an unfinished run is said to be that, whoever works in it
    with RunFolder(source).locked():  # one export at a time, and none while the checkpoint is being replaced
        return _export(source, request, sink)


def _export(source: Path, request: Request, sink: Sink) -> ExportResult:
    with stage(sink, "load checkpoint"):
        checkpoint = load_checkpoint(source)
    config = read_result(source).config if source.is_dir() else None
    found = _open(checkpoint, config, request, sink)
    images = (found.evaluation or found.calibration) if request.verify else None
    result = export_checkpoint(checkpoint, request, images, sink, found.calibration)
    result = result.model_copy(update={"source": str(source)})
    _record(result, checkpoint.path.parent / "export.json")
    return result


def export_checkpoint(
    checkpoint: Checkpoint,
    request: Request,
    images: ImageSet | None,
    sink: Sink = null_sink,
    calibration: ImageSet | None = None,
) -> ExportResult:
    """Write one artefact beside the checkpoint; verify it on `images` (None: do not).

    Args:
        calibration: images for grids that an ONNX runtime needs beside the checkpoint's, if there are any grids.
    """
    if request.format == "timm":
        return _export_timm(checkpoint, request, images, sink)
    if request.format == "pt2":
        return _export_pt2(checkpoint, request, images, sink)
    return _export_onnx(checkpoint, request, images, sink, calibration)


def _export_timm(checkpoint: Checkpoint, request: Request, images: ImageSet | None, sink: Sink) -> ExportResult:
    path = checkpoint.path.with_name("timm")
    unverified = path.with_name(path.name + UNVERIFIED)
    shutil.rmtree(unverified, ignore_errors=True)
    with stage(sink, "write timm folder"):
        size = write_timm_folder(checkpoint, unverified)
    checks: list[Check] = []
    if images is not None:
        runtime, words = f"timm {version('timm')}", images.description
        with _verifying(sink, runtime, images, request, checks, path) as current:
            opened = open_folder(unverified)
            exact = weights_on_grid(checkpoint, unverified)
            batches = limited(images, request.images, current)
            checks.append(check_torch(checkpoint, opened, runtime, batches, words, weights_exact=exact))
    return ExportResult(
        coraq_version=__version__,
        format="timm",
        form="dequantized weights",
        label="float",
        source=str(checkpoint.path),
        path=str(publish(path, unverified, checks)),
        size_bytes=size,
        float_bytes=float_bytes(checkpoint),
        nominal_bytes=float_bytes(checkpoint),
        verified=verdict(checks),
        checks=checks,
        notes=["float weights on the grid: as large and as fast as the float network; ready for the hub as it is"],
    )


def _export_pt2(checkpoint: Checkpoint, request: Request, images: ImageSet | None, sink: Sink) -> ExportResult:
    path = checkpoint.path.with_suffix(".pt2")
    unverified = path.with_name(path.name + UNVERIFIED)
    with stage(sink, "export with torch.export"):
        content = build_pt2(checkpoint, example_images(checkpoint))
    write_atomic(unverified, content)
    checks: list[Check] = []
    if images is not None:
        runtime, words = f"torch {torch.__version__}", images.description
        with _verifying(sink, runtime, images, request, checks, path) as current:
            opened = open_pt2(unverified.read_bytes())
            exact = codes_exact(checkpoint, opened)
            batches = limited(images, request.images, current)
            checks.append(check_torch(checkpoint, opened, runtime, batches, words, codes_exact=exact))
    packed = sum(layer.size_bytes() for layer in checkpoint.layers.values())
    weights = sum(4 * layer.weight.codes.numel() for layer in checkpoint.layers.values())
    return ExportResult(
        coraq_version=__version__,
        format="pt2",
        form="codes in int32 words",
        label=label_of(checkpoint),
        source=str(checkpoint.path),
        path=str(publish(path, unverified, checks)),
        size_bytes=len(content),
        float_bytes=float_bytes(checkpoint),
        nominal_bytes=float_bytes(checkpoint) - weights + packed,
        verified=verdict(checks),
        checks=checks,
        notes=["codes are multiplied out at every call: in eager mode slower than the float network"],
    )


def float_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the folded float network's parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in checkpoint.module.state_dict().values())


def _export_onnx(
    checkpoint: Checkpoint, request: Request, images: ImageSet | None, sink: Sink, calibration: ImageSet | None
) -> ExportResult:
    if request.verify:  # before the slow step
        require("onnxruntime")
        if request.openvino:
            require("openvino")
    with stage(sink, "export to ONNX"):
        pixels = None
        if calibration is not None and checkpoint.info.scheme.activations is not None:
            pixels = next(iter(calibration.batches(CALIBRATION_IMAGES)))[0].contiguous().numpy()
        export = build_onnx(checkpoint, request.form, images.class_names if images else None, pixels)
    path = checkpoint.path.with_name(f"{checkpoint.path.stem}{SUFFIX[request.form]}.onnx")
    unverified = path.with_name(path.name + UNVERIFIED)
    write_atomic(unverified, export.content)
    checks: list[Check] = []
    verifiers = [("ONNX Runtime", check_onnx), ("OpenVINO", check_openvino)] if images is not None else []
    for runtime, verify in verifiers[: 2 if request.openvino else 1]:
        assert images is not None
        with _verifying(sink, runtime, images, request, checks, path) as current:
            batches, content = limited(images, request.images, current), unverified.read_bytes()
            checks.append(verify(checkpoint, export, content, batches, images.description, request.worker_threads))
    return ExportResult(
        coraq_version=__version__,
        format="onnx",
        form=request.form,
        label=export.label,
        source=str(checkpoint.path),
        path=str(publish(path, unverified, checks)),
        size_bytes=len(export.content),
        float_bytes=len(export.float_content),
        nominal_bytes=export.nominal_bytes,
        graph_bytes=export.graph_bytes,
        opset=export.opset,
        verified=verdict(checks),
        checks=checks,
        notes=export.notes,
    )


@contextlib.contextmanager
def _verifying(
    sink: Sink, runtime: str, images: ImageSet, request: Request, checks: list[Check], path: Path
) -> Iterator[stage]:
    """A stage whose failure is a failed check: the artefact stays unverified, and its record says why.

    The traceback of what only a programmer can mend goes into log.txt beside `path`.
    """
    try:
        with stage(sink, f"verify in {runtime}", min(request.images, images.count)) as current:
            yield current
    except Exception as error:
        if not isinstance(error, CoraqError):
            with contextlib.suppress(OSError):
                append_traceback(path.with_name("log.txt"), error)
        checks.append(refused(runtime, images.description, error))


def verdict(checks: list[Check]) -> bool | None:
    """None without any check, else whether all passed."""
    return all(not check.failures for check in checks) if checks else None


def publish(path: Path, unverified: Path, checks: list[Check]) -> Path:
    """Give an artefact (a file or a folder) its name: only what did not fail loses `.unverified`.

    After a failure an older artefact of that name goes: it would be taken for the new one.
    """
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if verdict(checks) is False:
            return unverified
        os.replace(unverified, path)
    except OSError as error:
        raise disk_error(path, error) from error
    return path


def limited(images: ImageSet, count: int, current: stage) -> Iterator[tuple[Tensor, Tensor]]:
    """At most `count` images in batches of 16 or fewer, with progress."""
    seen = 0
    for pixels, labels in images.batches(min(16, images.batch_size)):
        yield pixels[: count - seen], labels[: count - seen]
        seen += len(pixels)
        current.advance(min(seen, count))
        if seen >= count:
            return


def _open(checkpoint: Checkpoint, config: RunConfig | None, request: Request, sink: Sink) -> Images:
    """The run's images, or else synthetic ones."""
    preprocess = Preprocess.from_dict(checkpoint.info.preprocess)
    if config is not None:
        classes = int(getattr(checkpoint.module, "num_classes", 0)) or None
        try:
            return run_images(
                config, preprocess, classes, null_sink, names_of(checkpoint.info.pretrained_cfg, classes or 0)
            )
        except CoraqError as error:
            sink(Note(f"verified on synthetic images, the run's own cannot be read: {error.message}", "warning"))
    return Images(synthetic_images(request.images, preprocess, 0), None)


def _record(result: ExportResult, path: Path) -> None:
    """Put a result into export.json under its artefact's name, beside the folder's other exports."""
    exports: dict[str, object] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for name, old in json.loads(read_plain(path))["exports"].items():
            exports[name] = ExportResult.model_validate(old).model_dump(mode="json")
    name = Path(result.path).name
    exports.pop(name.removesuffix(UNVERIFIED), None)
    exports.pop(f"{name}{UNVERIFIED}", None)
    exports[name] = json.loads(result.model_dump_json())
    write_atomic(path, json.dumps({"version": 1, "exports": exports}, indent=1, ensure_ascii=False) + "\n")

"""The run folder: everything that a run leaves behind, and what a killed run resumes from.

config.json  events.jsonl  decisions.json  layers/0000.safetensors …  model.safetensors  predictions.safetensors
histograms.json  metrics.json  report.md  report.html  log.txt
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coraq.artifact.codec import LayerRecord, content_digest, decode, encode, serialise
from coraq.artifact.files import write_atomic
from coraq.config import RunConfig
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError, disk_error
from coraq.results import RunResult
from coraq.runtime.safe_files import append_plain, read_plain

Metrics = dict[str, float | int | str]
_Metrics = TypeAdapter(Metrics)


class RunFolder:
    """One run's folder. `open()` creates and locks it; the lock goes with the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    @property
    def checkpoint(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def decisions(self) -> Decisions:
        """What the method decided before it committed layers."""
        return Decisions(self.path / "decisions.json")

    @property
    def finished(self) -> bool:
        """metrics.json is written last, atomically."""
        return self.metrics.is_file() and self.checkpoint.is_file()

    def open(self) -> None:
        """Create the folder and lock it for this process.

        Raises:
            CoraqError: it cannot be written, another process works in it, or a link in it leads elsewhere.
        """
        self._refuse_links()
        try:
            (self.path / "layers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.path / "layers", error) from error
        self._take_lock()
        for left_by_a_kill in self.path.rglob(".*.tmp"):  # the lock is ours: nobody is writing them
            left_by_a_kill.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        try:
            self._lock = append_plain(self.path / ".lock")
        except OSError as error:
            raise disk_error(self.path / ".lock", error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise CoraqError(
                f"another process is working in {self.path}", "Wait for it, or give another --output."
            ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else works in the folder meanwhile; it must be there.

        Raises:
            CoraqError: as `open`.
        """
        self._refuse_links()
        self._take_lock()
        try:
            yield
        finally:
            self.close()

    def _refuse_links(self) -> None:
        """What is written into a run folder stays in it. (The folder itself may be reached by a link.)"""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(self.path):
                if entry.is_symlink():
                    raise CoraqError(
                        f"{entry.path}: {entry.name} is a link, and a run is not written through links",
                        "Remove the link, or give another --output.",
                    )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Forget layers and decisions of earlier attempts (`--force`). A finished result stays until `supersede`."""
        shutil.rmtree(self.path / "layers", ignore_errors=True)
        for file in ("decisions.json", "events.jsonl"):
            (self.path / file).unlink(missing_ok=True)
        (self.path / "layers").mkdir(parents=True, exist_ok=True)

    def supersede(self) -> None:
        """A new checkpoint has replaced the old one: the old metrics would be wrong beside it."""
        self.metrics.unlink(missing_ok=True)

    def write_config(self, config: RunConfig) -> None:
        write_atomic(self.path / "config.json", config.model_dump_json(indent=1))

    def save_layer(self, index: int, name: str, layer: QuantizedLayer, metrics: Metrics) -> None:
        """Save a committed layer; the file exists whole or not at all."""
        tensors, record = encode(name, layer)
        about = _signed(tensors, name=name, record=record.model_dump_json(), metrics=json.dumps(metrics))
        write_atomic(self.path / "layers" / f"{index:04d}.safetensors", serialise(tensors, about))

    def committed(self) -> dict[str, tuple[QuantizedLayer, Metrics]]:
        """The layers that earlier attempts have committed, in order, up to the first gap or damaged file."""
        found: dict[str, tuple[QuantizedLayer, Metrics]] = {}
        for index in range(100_000):
            path = self.path / "layers" / f"{index:04d}.safetensors"
            if not path.is_file():  # nor a pipe, which the library would wait for
                break
            try:
                with safe_open(path, "pt") as file:
                    about = file.metadata() or {}
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                name, record = about["name"], LayerRecord.model_validate_json(about["record"])
                if about != _signed(tensors, name=name, record=about["record"], metrics=about["metrics"]):
                    break
                layer, metrics = decode(name, record, tensors), _Metrics.validate_json(about["metrics"])
                if not bool(torch.isfinite(layer.dequantize()).all()):  # finite scales can still overflow
                    break
                found[name] = layer, metrics
            except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, MemoryError, CoraqError):
                break
        return found


def _signed(tensors: dict[str, Tensor], **texts: str) -> dict[str, str]:
    """A layer file's metadata with a checksum over all that is in the file."""
    return {**texts, "sha256": content_digest(tensors, json.dumps(sorted(texts.items())))}


class Decisions(MutableMapping[str, Any]):
    """What a method decided before its first commit (JSON-able values), kept in one file of the run folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(read_plain(self._path))
            kept, digest = content["decisions"], content["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return kept if isinstance(kept, dict) and digest == content_digest({}, json.dumps(kept)) else {}

    def _write(self, kept: dict[str, Any]) -> None:
        kept = json.loads(json.dumps(kept))  # as it will be read
        write_atomic(self._path, json.dumps({"decisions": kept, "sha256": content_digest({}, json.dumps(kept))}))

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._write({**self._read(), key: value})

    def __delitem__(self, key: str) -> None:
        content = self._read()
        del content[key]
        self._write(content)

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def read_result(run: Path) -> RunResult:
    """The result of a finished run.

    Raises:
        CoraqError: the run is unfinished or its metrics.json damaged.
    """
    path = run / "metrics.json"
    try:
        return RunResult.model_validate_json(read_plain(path))
    except FileNotFoundError:
        raise CoraqError(
            f"{run} is not a finished run (no metrics.json)", "Run the same `coraq quantize` again: it resumes."
        ) from None
    except (ValidationError, OSError) as error:
        raise CoraqError(
            f"{path} is damaged or of another version", "Run the same `coraq quantize` with --force."
        ) from error


def newest_run(runs: Path) -> Path:
    """The finished run that was written last.

    Raises:
        CoraqError: there is none.
    """
    finished: dict[Path, int] = {}
    for path in runs.glob("*/metrics.json"):
        with contextlib.suppress(OSError):  # a run that starts over takes its old result away
            finished[path.parent] = path.stat().st_mtime_ns
    if not finished:
        raise CoraqError(f"there is no finished run in {runs}", "Start with: coraq quantize demo")
    return max(finished, key=finished.__getitem__)

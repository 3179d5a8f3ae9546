"""Cells as tasks of a Ray cluster, on this machine or on many: an existing engine does the scheduling.

What travels is a cell's configuration, so every machine needs coraq, the model and the images under the same names; a
machine that does not see the driver's run folder sends the finished one back. Bits depend on the number of threads:
cells with as many threads as a local run have write the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coraq import pipeline
from coraq.artifact import read_result
from coraq.artifact.files import write_atomic
from coraq.compare.grid import Cell
from coraq.compare.local import run_cell
from coraq.compare.run import Outcome
from coraq.compare.worker_events import EventQueue, WorkerStarted
from coraq.errors import CoraqError, UsageError
from coraq.events import Event, LayerCommitted, Note, Sink, StageAdvanced, StageFinished, StageStarted, null_sink
from coraq.pipeline.cache import RunCache
from coraq.report import write_report
from coraq.runtime import system
from coraq.runtime.memory import reuse_freed_memory

RETRIES = 3  # of a cell whose worker is lost
POLL_S = 0.2
_LEFT_BEHIND = ("layers", ".lock")  # of a folder that is sent: what only resuming needs
_shared: RunCache | None = None  # of this worker process: what its cells have in common


@dataclass(frozen=True)
class Order:
    """All that a worker needs for one cell.

    Attributes:
        marker: a file in the driver's run folder: who sees it, writes there.
        finished: names of the run folders that the driver has.
    """

    index: int
    cell: Cell
    command: list[str]
    cwd: str
    runs_dir: str
    marker: str
    finished: frozenset[str]
    force: bool
    threads: int


@dataclass(frozen=True)
class Delivery:
    """What a worker answers: an outcome, and the run folder's files if it could not write to the driver's."""

    outcome: Outcome
    folder: str | None = None
    files: dict[str, bytes] | None = None
    have_it: str | None = None  # the driver's own finished folder


def work(order: Order, send: Sink = null_sink) -> Delivery:
    """Run one cell in this process, wherever that is."""
    global _shared
    _shared = _shared or RunCache(system.default_memory_bound() // 8)
    torch.set_num_threads(order.threads)
    if Path(order.cwd).is_dir():
        os.chdir(order.cwd)
    cell = order.cell
    if Path(order.marker).exists():
        runs_dir = Path(order.runs_dir)
        return Delivery(run_cell(cell, order.command, runs_dir=runs_dir, sink=send, force=order.force, shared=_shared))
    with tempfile.TemporaryDirectory(prefix="coraq-cell-") as folder:
        if order.finished and not order.force:
            with contextlib.suppress(Exception):  # the run itself says what is wrong
                name = pipeline.folder_name(cell.config, _shared)
                if name in order.finished:
                    return Delivery(Outcome(), have_it=name)
        outcome = run_cell(cell, order.command, runs_dir=Path(folder), sink=send, force=False, shared=_shared)
        if outcome.result is None:
            return Delivery(outcome)
        path = Path(outcome.result.run_dir)
        files = {one.name: one.read_bytes() for one in path.iterdir() if one.name not in _LEFT_BEHIND}
        return Delivery(outcome, path.name, files)


def received(delivery: Delivery, runs_dir: Path) -> Outcome:
    """Write what a worker sent into the driver's run folder, whole files only; metrics.json last but the HTML."""
    result = delivery.outcome.result
    if delivery.have_it is not None:
        return Outcome(read_result(runs_dir / delivery.have_it), reused=True)
    if result is None or delivery.folder is None or delivery.files is None:
        return delivery.outcome
    folder = runs_dir / delivery.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in delivery.files.items():
        if name != "metrics.json":
            write_atomic(folder / name, content)
    result = result.model_copy(update={"run_dir": str(folder)})
    write_report(result, folder)
    return dataclasses.replace(delivery.outcome, result=result)


class RayEngine:
    """Runs cells as Ray tasks.

    Args:
        address: of an existing cluster ("auto", "ray://host:10001"); None starts one on this machine.
        cell_cpus: CPUs that a cell reserves, and its threads. A cell on an accelerator reserves one GPU, too.
    """

    def __init__(self, address: str | None = None, cell_cpus: int = 1) -> None:
        self.address, self.cell_cpus = address, cell_cpus
        self.name = f"ray ({address or 'this machine'}, {cell_cpus} CPU{'' if cell_cpus == 1 else 's'} a cell)"

    def run(
        self, cells: Sequence[Cell], commands: Sequence[list[str]], *, runs_dir: Path, sink: Sink, force: bool
    ) -> Generator[tuple[int, Outcome]]:
        """See `Engine.run`.

        Raises:
            UsageError: a cell names a certain GPU.
            CoraqError: Ray is not installed, the cluster cannot be reached, or has too little for one cell.
        """
        devices = {torch.device(cell.config.device) for cell in cells}
        for device in devices:
            if device.index is not None:
                raise UsageError(
                    f"--device {device} with --engine ray", f"Ray deals out the GPUs: --device {device.type}"
                )
        gpus = int(any(device.type != "cpu" for device in devices))
        ray = _import_ray()
        started_here = not ray.is_initialized()
        if started_here:
            self._start(ray)
        runs_dir.mkdir(parents=True, exist_ok=True)
        marker = runs_dir / f".driver-{uuid.uuid4().hex}"
        marker.touch()
        try:
            self._check_room(ray, gpus)
            orders = self._orders(cells, commands, runs_dir, marker, force)
            yield from self._collect(ray, orders, runs_dir, sink, gpus)
        finally:
            marker.unlink(missing_ok=True)
            if started_here:
                ray.shutdown()

    def _start(self, ray: Any) -> None:
        passed_on = {name: os.environ[name] for name in ("CORAQ_PLUGINS",) if os.environ.get(name)}
        try:
            ray.init(
                address=self.address,
                include_dashboard=None if self.address else False,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": passed_on} if passed_on else None,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = f"the Ray cluster {self.address}" if self.address else "a Ray cluster on this machine"
            raise CoraqError(f"cannot reach {where}: {error}", "Check --ray-address, or use --engine local.") from error

    def _check_room(self, ray: Any, gpus: int) -> None:
        """A task that fits no machine would wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= self.cell_cpus and node.get("GPU", 0) >= gpus for node in nodes):
            most = max((node.get("CPU", 0) for node in nodes), default=0)
            raise CoraqError(
                f"no machine of the Ray cluster has {self.cell_cpus} CPUs" + (f" and {gpus} GPU" if gpus else ""),
                f"The largest has {most:g} CPUs; fewer --cell-cpus, or --device cpu.",
            )

    def _orders(
        self, cells: Sequence[Cell], commands: Sequence[list[str]], runs_dir: Path, marker: Path, force: bool
    ) -> list[Order]:
        finished = frozenset(path.parent.name for path in runs_dir.glob("*/metrics.json"))
        return [
            Order(
                index=index,
                cell=cell,
                command=command,
                cwd=os.getcwd(),
                runs_dir=str(runs_dir),
                marker=str(marker),
                finished=finished,
                force=force,
                threads=self.cell_cpus,
            )
            for index, (cell, command) in enumerate(zip(cells, commands, strict=True))
        ]

    def _collect(
        self, ray: Any, orders: list[Order], runs_dir: Path, sink: Sink, gpus: int
    ) -> Generator[tuple[int, Outcome]]:
        mailbox = ray.remote(num_cpus=0)(EventQueue).remote()
        remote = ray.remote(num_cpus=self.cell_cpus, num_gpus=gpus, max_retries=RETRIES)(_task)
        waiting = {remote.remote(order, mailbox): order for order in orders}
        view = _View(sink)
        try:
            while waiting:
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
                for index, event in ray.get(mailbox.take.remote()):
                    view.show(orders[index].cell.name, event)
                for reference in done:
                    order = waiting.pop(reference)
                    outcome = _outcome(ray, reference, runs_dir)
                    view.close(order.cell.name)
                    if outcome.reason is not None:
                        sink(Note(f"{order.cell.name} failed: {outcome.reason}", "warning"))
                    yield order.index, outcome
        finally:
            for reference in waiting:  # an interrupt: runs are safe to kill, and resume
                with contextlib.suppress(Exception):
                    ray.cancel(reference, force=True)


def _task(order: Order, mailbox: Any) -> Delivery:
    """What a Ray worker does. Its events are in the mailbox before it answers: nothing that it said comes too late."""
    reuse_freed_memory()
    ray, last, sent = _import_ray(), 0.0, None

    def send(event: Event) -> None:
        nonlocal last, sent
        if isinstance(event, StageAdvanced):
            if time.monotonic() - last < POLL_S:
                return
            last = time.monotonic()
        if not isinstance(event, LayerCommitted):
            sent = mailbox.put.remote(order.index, event)

    send(WorkerStarted(socket.gethostname(), os.getpid()))
    delivery = work(order, send)
    ray.get(sent)  # of one sender, an actor takes calls in their order
    return delivery


def _outcome(ray: Any, reference: Any, runs_dir: Path) -> Outcome:
    try:
        return received(ray.get(reference), runs_dir)
    except CoraqError as error:
        return Outcome(reason=error.message, hint=error.hint)
    except ray.exceptions.RayTaskError as error:
        return Outcome(reason=f"on its worker: {str(error.cause or error).strip().splitlines()[-1]}")
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        return Outcome(reason=f"its worker was lost {RETRIES + 1} times: {first}", hint="killed, or out of memory?")


class _View:
    """Events of many workers as those of one process: every stage is named after its cell."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._running: dict[str, set[str]] = {}

    def show(self, cell: str, event: Event) -> None:
        running = self._running.setdefault(cell, set())
        if isinstance(event, WorkerStarted):
            if "" in running:
                self.close(cell)
                self._sink(Note(f"{cell}: its worker was lost; another goes on with it", "warning"))
                running = self._running.setdefault(cell, set())
            running.add("")
            self._sink(Note(f"{cell}: process {event.pid} on {event.host}"))
        elif isinstance(event, (StageStarted, StageAdvanced, StageFinished)):
            name = f"{cell}: {event.stage}"
            (running.discard if isinstance(event, StageFinished) else running.add)(name)
            self._sink(dataclasses.replace(event, stage=name))
        elif isinstance(event, Note):
            self._sink(dataclasses.replace(event, message=f"{cell}: {event.message}"))

    def close(self, cell: str) -> None:
        """End the stages that a worker left open."""
        for name in self._running.pop(cell, set()) - {""}:
            self._sink(StageFinished(name, 0.0))


def _import_ray() -> Any:
    # Ray's own defaults phone home and warn; a comparison does neither
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise CoraqError("--engine ray needs Ray, which is not installed", "pip install 'coraq[ray]'") from None
    return ray

"""Cells as Ray tasks write what local cells write; a lost worker's cell is finished by another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.results import without_times

from coraq import pipeline
from coraq.artifact import read_result
from coraq.compare import Cell, LocalEngine, Variant, compare, expand, parse_variants
from coraq.compare.cluster import Delivery, Order, RayEngine, received, work
from coraq.config import DataConfig, RunConfig
from coraq.errors import CoraqError, UsageError
from coraq.events import Event, ListSink, Note, StageStarted
from coraq.results import CompareResult

DEMO = RunConfig(model="demo", data=DataConfig(calib_size=16, eval_size=32))


def cells(text: str = "rtn,comq", base: RunConfig = DEMO, bits: tuple[int, ...] = (4, 3)) -> list[Cell]:
    import json

    return expand(base, [base.model], parse_variants(text, json.loads), bits, [0])


def on(engine: Any, runs_dir: Path, grid: list[Cell], sink: Any = None) -> CompareResult:
    return compare(grid, engine, runs_dir=runs_dir, command_of=lambda config: ["coraq"], sink=sink or ListSink())


# ---------------------------------------------------------------- without a cluster


def order(cell: Cell, runs_dir: Path, **changes: Any) -> Order:
    content: dict[str, Any] = {
        "index": 0,
        "cell": cell,
        "command": ["coraq"],
        "cwd": os.getcwd(),
        "runs_dir": str(runs_dir),
        "marker": str(runs_dir / "nobody-sees-it"),
        "finished": frozenset(),
        "force": False,
        "threads": torch.get_num_threads(),
    }
    return Order(**{**content, **changes})


def test_a_machine_that_does_not_see_the_folder_sends_the_finished_run(tmp_path: Path) -> None:
    (cell,) = cells("rtn", bits=(4,))
    delivery = work(order(cell, tmp_path / "driver"))
    assert not (tmp_path / "driver").exists()
    outcome = received(delivery, tmp_path / "driver")
    alone = pipeline.run(cell.config, runs_dir=tmp_path / "alone")
    assert outcome.result is not None
    sent, own = Path(outcome.result.run_dir), Path(alone.run_dir)
    assert sent == tmp_path / "driver" / own.name
    assert without_times(read_result(sent)) == without_times(alone)
    assert read_result(sent).run_dir == str(sent)
    assert {path.name for path in sent.iterdir()} == {p.name for p in own.iterdir()} - {"layers", ".lock"}
    for name in ("model.safetensors", "predictions.safetensors", "config.json"):
        assert (sent / name).read_bytes() == (own / name).read_bytes()
    # the driver's finished run is known to such a machine by its name
    again = work(order(cell, tmp_path / "driver", finished=frozenset({own.name})))
    assert again == Delivery(again.outcome, have_it=own.name)
    reused = received(again, tmp_path / "driver")
    assert reused.reused
    assert reused.result == outcome.result


def test_a_cell_that_fails_elsewhere_is_a_reason(tmp_path: Path) -> None:
    config = DEMO.model_copy(update={"model": "local-dir:/nowhere"})
    outcome = received(work(order(Cell(Variant("rtn", "rtn", {}), config), tmp_path)), tmp_path)
    assert outcome.result is None
    assert "no config.json" in (outcome.reason or "")


def test_a_certain_gpu_cannot_be_named_on_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cuda:1"):
        on(RayEngine(), tmp_path, cells(base=DEMO.model_copy(update={"device": "cuda:1"})))


# ---------------------------------------------------------------- a real cluster of two workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'coraq[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_the_mailbox_is_light() -> None:
    """Its process starts while workers are busy: with torch to import it came when they had finished."""
    heavy = "{'torch', 'timm', 'coraq.pipeline'} & sys.modules.keys()"
    program = f"import sys, coraq.compare.worker_events; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.slow
def test_two_workers_write_what_one_process_writes(cluster: Any, tmp_path: Path) -> None:
    heard = ListSink()
    far = on(RayEngine(cell_cpus=1), tmp_path / "ray", cells(), heard)
    near = on(LocalEngine(), tmp_path / "local", cells())
    assert far.failed == []
    for one, other in zip(far.cells, near.cells, strict=True):
        assert Path(one.run_dir or "").name == Path(other.run_dir or "").name
        assert without_times(read_result(Path(one.run_dir or ""))) == without_times(
            read_result(Path(other.run_dir or ""))
        )
        a, b = (Path(row.run_dir or "") / "model.safetensors" for row in (one, other))
        assert a.read_bytes() == b.read_bytes()
    processes = {
        e.message.split("process ")[1] for e in heard.events if isinstance(e, Note) and "process " in e.message
    }
    assert len(processes) == 2
    assert any(isinstance(e, StageStarted) and e.stage == "demo comq W4 seed 0: quantize" for e in heard.events)
    again = on(RayEngine(), tmp_path / "ray", cells())
    assert all(cell.reused for cell in again.cells)
    assert not list((tmp_path / "ray").glob(".driver-*"))


@pytest.mark.slow
def test_a_killed_workers_cell_is_finished_by_another_and_resumes(cluster: Any, tmp_path: Path) -> None:
    events: list[Event] = []
    killed: list[int] = []
    slow = DEMO.model_copy(update={"data": DataConfig(calib_size=512, eval_size=32)})
    grid = cells("rtn,comq", slow, bits=(4,))

    def sink(event: Event) -> None:
        events.append(event)
        if (
            isinstance(event, Note)
            and event.message.startswith("demo comq")
            and "process " in event.message
            and not killed
        ):
            killed.append(int(event.message.split("process ")[1].split()[0]))
            threading.Thread(target=_kill_when_working, args=(killed[0], tmp_path), daemon=True).start()

    result = on(RayEngine(), tmp_path, grid, sink)
    assert killed
    assert result.failed == []
    assert any(isinstance(event, Note) and "its worker was lost" in event.message for event in events)
    (comq,) = (cell for cell in result.cells if cell.label == "comq")
    alone = pipeline.run(grid[1].config, runs_dir=tmp_path / "alone")
    kept = Path(comq.run_dir or "") / "model.safetensors"
    assert kept.read_bytes() == (Path(alone.run_dir) / "model.safetensors").read_bytes()
    resumed = (Path(comq.run_dir or "") / "events.jsonl").read_text().count('"resumed": true')
    assert 0 < resumed < len(alone.layers)


def _kill_when_working(pid: int, runs_dir: Path) -> None:
    """Kill a worker once it has committed a few layers."""
    for _ in range(3000):
        if len(list(runs_dir.glob("demo-comq*/layers/*.safetensors"))) >= 4:
            break
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_cell_that_no_machine_can_take_is_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(CoraqError, match="has 3 CPUs"):
        on(RayEngine(cell_cpus=3), tmp_path, cells())


@pytest.mark.slow
def test_an_interrupt_cancels_what_runs_and_keeps_what_is_finished(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'coraq[ray]'")
    line = [sys.executable, "-m", "coraq", "compare", "--engine", "ray", "--methods", "rtn,comq", "--eval-size", "32"]
    program = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(1200):
        if list(tmp_path.glob("runs/demo-rtn*/metrics.json")) and list(tmp_path.glob("runs/demo-comq*/layers/*")):
            break
        time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 130
    assert "finished cells are kept" in errors
    assert list(tmp_path.glob("runs/demo-rtn*/metrics.json"))
    committed = len(list(tmp_path.glob("runs/demo-comq*/layers/*.safetensors")))
    time.sleep(3)
    assert len(list(tmp_path.glob("runs/demo-comq*/layers/*.safetensors"))) == committed  # nobody works on

"""Little of everything: disk, descriptors, memory, network. Two lines and nothing lost, or a slower run."""

from __future__ import annotations

import errno
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from coraq import pipeline
from coraq.cli.app import run
from coraq.config import DataConfig, RunConfig
from coraq.errors import CoraqError
from coraq.network.load import load_model
from coraq.runtime import system
from coraq.runtime.processors import processors, share_processors

CONFIG = RunConfig(model="demo", method="comq", data=DataConfig(calib_size=8, eval_size=10, workers=0))
PROGRAM = str(Path(sys.executable).with_name("coraq"))
DEMO = ["quantize", "demo", "--method", "rtn", "--calib-size", "8", "--eval-size", "10", "-q"]


def limited(arguments: list[str], folder: Path, **limits: int) -> subprocess.CompletedProcess[str]:
    """Run the command with resource limits, named as in the resource module."""

    def restrict() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pipeline.__file__).parents[2])}
    return subprocess.run(
        [PROGRAM, *arguments],
        cwd=folder,
        env=environment,
        preexec_fn=restrict,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def two_lines(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("error: "), done.stderr
    assert lines[-1].startswith("hint: "), done.stderr
    assert "this should not happen" not in lines[-1], done.stderr
    assert "Traceback" not in done.stderr
    return lines[-2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB; skips where this process may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


# ---------------------------------------------------------------- disks


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    for size in ("100k", "200k", "300k"):  # full at a layer, at the checkpoint, at the report
        remount(small_disk, f"size={size}")
        with pytest.raises(CoraqError, match="no room on the disk"):
            pipeline.run(CONFIG, runs_dir=small_disk)
        (folder,) = small_disk.iterdir()
        assert not (folder / "metrics.json").exists()
        assert not list(folder.rglob("*.tmp"))
    layers = len(list((folder / "layers").iterdir()))
    remount(small_disk, "size=8m")
    result = pipeline.run(CONFIG, runs_dir=small_disk)
    alone = pipeline.run(CONFIG, runs_dir=tmp_path / "alone")
    assert result.checkpoint_sha256 == alone.checkpoint_sha256
    events = [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text(errors="replace").splitlines()
        if line[-1] == "}"
    ]
    assert sum(event.get("resumed", False) for event in events) >= layers > 10


def test_a_read_only_disk_is_said_at_once_and_a_result_on_it_can_be_measured(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    remount(small_disk, "size=8m")
    assert run(DEMO) == 0
    (folder,) = (small_disk / "runs").iterdir()
    remount(small_disk, "ro")
    capsys.readouterr()
    for command in (["quantize", "demo", "--method", "npot", "-q"], ["report"], ["export", "--format", "timm", "-q"]):
        assert run(command) == 1
        shown = capsys.readouterr().err
        assert "cannot write" in shown
        assert "this should not happen" not in shown
    assert run(["evaluate", str(folder), "-q", "--json"]) == 0


@pytest.mark.parametrize("place", ["/proc/coraq", "/dev/null/runs", "file/runs"])
def test_a_place_that_cannot_be_written_is_named(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert run([*DEMO, "--output", place]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert "cannot write" in lines[-2]
    assert "--output" in lines[-1]


def test_a_limit_on_the_size_of_files_is_a_failed_write(tmp_path: Path) -> None:
    done = limited(DEMO, tmp_path, FSIZE=4096)
    assert done.returncode == 1
    assert "File too large" in two_lines(done)
    assert not list(tmp_path.rglob("metrics.json"))
    assert not list(tmp_path.rglob("*.tmp"))


# ---------------------------------------------------------------- descriptors and memory


@pytest.mark.parametrize("files", [20, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 12, 32))])
def test_few_descriptors_are_enough_or_are_said(files: int, tmp_path: Path) -> None:
    done = limited([*DEMO, "-j", "2", "-b", "4"], tmp_path, NOFILE=files)
    if done.returncode:
        assert "open files" in two_lines(done)
    else:
        assert list(tmp_path.rglob("metrics.json"))


def test_the_bound_on_activations_knows_the_process_s_own_limit(tmp_path: Path) -> None:
    program = (
        "import resource, os; from pathlib import Path; from coraq.runtime import system\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)\n"
        "print(system.default_memory_bound() >> 20)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 150 <= int(done.stdout) <= 200


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_said_with_ways_out(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coraq.pipeline.flow.calibrate", fail)
    assert run(DEMO) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2].startswith("error: out of memory")
    assert "--calib-memory" in lines[-1]


def test_a_small_bound_on_activations_is_slower_and_gives_the_same_bytes(tmp_path: Path) -> None:
    usual = pipeline.run(CONFIG, runs_dir=tmp_path / "usual")
    tight = pipeline.run(CONFIG.model_copy(update={"calib_memory": 1 << 16}), runs_dir=tmp_path / "tight")
    assert any("wait in a temporary file" in note for note in tight.notes)
    assert tight.checkpoint_sha256 == usual.checkpoint_sha256


def test_one_thread_is_enough(tmp_path: Path) -> None:
    own, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(cores)})
        assert pipeline.run(CONFIG, runs_dir=tmp_path).machine.threads == 1
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(own)


@pytest.mark.parametrize(
    ("share", "found"), [("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("900000 100000", 8), ("?", 8)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_share_of_time_limits_the_processors(
    share: str, found: int, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version == 2:
        (tmp_path / "cpu.max").write_text(share + "\n")
    else:
        (tmp_path / "cpu").mkdir()
        for name, part in zip(("quota", "period"), (share.replace("max", "-1") + " 0").split(), strict=False):
            (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(part + "\n")
    monkeypatch.setattr("coraq.runtime.processors.CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is set meanwhile
        monkeypatch.delenv(name)
    assert processors() == found
    share_processors()
    assert os.environ.get("OMP_NUM_THREADS") == (str(found) if found < 8 else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    share_processors()
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_no_container_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coraq.runtime.processors.CGROUP", tmp_path)
    assert processors() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("names", system.CGROUP_MEMORY)
def test_a_container_s_memory_bounds_a_run(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in zip(names, (3 << 30, 1 << 30), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{size}\n")
    monkeypatch.setattr("coraq.runtime.system.CGROUP", tmp_path)
    assert system.default_memory_bound() == 1 << 30  # half of the 2 GiB that are free


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
        socket.gaierror(-3, "Temporary failure in name resolution"),
        urllib.error.URLError("no route to host"),
        http.client.IncompleteRead(b"half", 1000),
        RuntimeError('invalid hash value (expected "a", got "b")'),
        OSError("Consistency check failed: file should be of size 10 but has size 5"),
        EOFError("Ran out of input"),
    ],
)
def test_weights_that_stop_arriving_are_an_error_with_ways_out(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", interrupted)
    with pytest.raises(CoraqError, match="resnet18") as caught:
        load_model(RunConfig(model="resnet18"))
    assert "--checkpoint" in caught.value.hint

"""Fixtures of several test modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import Written

from coraq.cli.app import run

torch.set_num_threads(1)  # the networks here are too small to share among threads


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real networks and images beside the checkout; skips where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"the real networks and images of {folder} are not on this machine")
    return folder


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """A checkpoint of the small network with random 4-bit codes, and what it was written from."""
    return Written(tmp_path / "model.safetensors")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifications of exported files do not measure how fast these run."""
    monkeypatch.setattr("coraq.export.verify.BATCHES_TIMED", (2,))
    monkeypatch.setattr("coraq.export.runtimes.MOST_REPEATS", 2)


@pytest.fixture(scope="module")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `coraq quantize demo` has run, by nearest rounding."""
    folder = tmp_path_factory.mktemp("demo")
    runs = str(folder / "runs")
    command = ["quantize", "demo", "--method", "rtn", "--calib-size", "32", "--eval-size", "64", "-O", runs, "-q"]
    assert run(command) == 0
    return folder

"""A run made again has the same bytes and numbers, and where it has not, that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from coraq import pipeline
from coraq.cli.app import run
from coraq.config import DataConfig, RunConfig
from coraq.pipeline.reproduce import reproduce

SMALL = RunConfig(model="demo", method="comq", data=DataConfig(calib_size=16, eval_size=32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run, made with another number of threads than the tests have."""
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        folder = tmp_path_factory.mktemp("runs")
        return pipeline.run(SMALL, runs_dir=folder).run_dir
    finally:
        torch.set_num_threads(own)


def copied(made: str, target: Path) -> Path:
    target.mkdir()
    for file in Path(made).glob("*.*"):
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_run_is_reproduced_with_its_own_number_of_threads(made: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(made).rglob("*")}
    outcome = reproduce(Path(made))
    assert outcome.reproduced
    assert outcome.changed == []
    assert torch.get_num_threads() == 1
    assert {path: path.stat().st_mtime_ns for path in Path(made).rglob("*")} == before  # the run is left alone


def test_what_differs_is_named(made: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(made, tmp_path / "changed")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["layers"][3]["output_error"] *= 2
    metrics["versions"]["timm"] = "0.1"
    metrics["total_s"] = 1e6  # a time: no difference
    (folder / "metrics.json").write_text(json.dumps(metrics))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(content))
    assert run(["reproduce", str(folder), "--json", "-q"]) == 1
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert [one["place"] for one in outcome["differences"]] == ["layers.3.output_error"]
    assert not outcome["same_checkpoint"]
    assert any("timm was 0.1" in line for line in outcome["changed"])
    assert "was not reproduced" in captured.err


def test_the_command_says_that_it_was_reproduced(made: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", made, "-q"]) == 0
    out = capsys.readouterr().out
    assert "checkpoint: the same bytes" in out
    assert "metrics: all agree" in out


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", str(tmp_path)]) == 1
    assert "not a finished run" in capsys.readouterr().err

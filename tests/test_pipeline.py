"""Claims about the flow as a whole, on the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import coraq
from coraq import pipeline
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.events import ListSink, Note

DATA = DataConfig(calib_size=32, eval_size=40, batch_size=16)


def demo(**more: Any) -> RunConfig:
    return RunConfig(**{"model": "demo", "method": "rtn", "data": DATA, **more})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_dry_run_s_estimate_is_the_size_of_what_is_written(symmetric: bool, granularity: str, tmp_path: Path) -> None:
    scheme = Scheme.of(bits=3, symmetric=symmetric, granularity=granularity)  # type: ignore[arg-type]
    plan = pipeline.plan(demo(scheme=scheme), runs_dir=tmp_path)
    result = pipeline.run(demo(scheme=scheme), runs_dir=tmp_path)
    assert plan.run_dir == result.run_dir
    written = load_file(Path(result.run_dir) / "model.safetensors").values()
    assert plan.estimated_bytes == sum(value.numel() * value.element_size() for value in written)


def test_evaluating_again_measures_the_same(tmp_path: Path) -> None:
    result = pipeline.run(demo(), runs_dir=tmp_path)
    again = pipeline.evaluate_run(Path(result.run_dir))
    assert again.comparison is not None
    assert result.comparison is not None
    assert again.comparison.quantized_top1 == result.comparison.quantized_top1
    assert again.comparison.agreement == result.comparison.agreement
    # the run's float network is folded, this one is not: the same function to a relative 1e-6
    assert again.comparison.sqnr_db == pytest.approx(result.comparison.sqnr_db, abs=1e-3)
    fewer = pipeline.evaluate_run(Path(result.run_dir), DATA.model_copy(update={"eval_size": 20}))
    assert fewer.comparison is not None
    assert fewer.comparison.count == 20


def test_a_broken_plugin_is_noted_when_a_run_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = pipeline.run(demo(), runs_dir=tmp_path / "runs")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    monkeypatch.setenv("CORAQ_PLUGINS", str(tmp_path))
    sink = ListSink()
    pipeline.evaluate_run(Path(result.run_dir), sink=sink)
    assert any("broken.py is broken" in event.message for event in sink.events if isinstance(event, Note))


def test_two_batches_of_images_are_two_batches_and_not_images_with_labels() -> None:
    """`data=(a, b)`: fewer calibration images, or other images, would give other codes."""
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = [coraq.quantize("demo", "rtn", data=data).result for data in ((images[:8], images[8:]), images)]
    assert [result.calibration.count for result in found] == [12, 12]
    assert found[0].calibration.fingerprint == found[1].calibration.fingerprint

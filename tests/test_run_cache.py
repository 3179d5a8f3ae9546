"""Runs that share a network, images and logits find what runs of their own find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.results import without_times

from coraq import pipeline, registry
from coraq.api import MethodConfig, QuantizedLayer, minmax_grid
from coraq.artifact import Predictions, read_predictions, write_predictions
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.errors import CoraqError
from coraq.events import ListSink, Note
from coraq.pipeline.cache import RunCache
from coraq.runtime import system

DEMO = RunConfig(model="demo", data=DataConfig(calib_size=32, eval_size=64))
KEEP_BYTES = 1 << 30


def configs(base: RunConfig = DEMO) -> list[RunConfig]:
    return [
        base.model_copy(update={"method": method, "scheme": Scheme.of(bits=bits), "seed": seed})
        for method, bits, seed in (("rtn", 4, 0), ("comq", 3, 0), ("rtn", 4, 1))
    ]


def test_shared_runs_write_what_single_runs_write(tmp_path: Path) -> None:
    shared = RunCache(KEEP_BYTES)
    for config in configs():
        together = pipeline.run(config, runs_dir=tmp_path / "together", shared=shared)
        alone = pipeline.run(config, runs_dir=tmp_path / "alone")
        assert Path(together.run_dir).name == Path(alone.run_dir).name
        assert without_times(together) == without_times(alone)
        for name in ("model.safetensors", "predictions.safetensors"):
            assert (Path(together.run_dir) / name).read_bytes() == (Path(alone.run_dir) / name).read_bytes(), name


def test_notes_of_unreadable_images_stand_in_every_cell(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(0, 255, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index:02d}.png")
    (tmp_path / "05.png").write_bytes(b"no image")
    data = DataConfig(calib_dir=str(tmp_path), calib_size=12, workers=0)
    base = DEMO.model_copy(update={"data": data})
    shared = RunCache(KEEP_BYTES)
    for config in configs(base)[:2]:
        together = pipeline.run(config, runs_dir=tmp_path / "together", shared=shared)
        assert any("05.png" in note for note in together.notes)
        assert without_times(together) == without_times(pipeline.run(config, runs_dir=tmp_path / "alone"))


def test_images_beyond_the_memory_kept_are_read_again_with_the_same_result(tmp_path: Path) -> None:
    shared = RunCache(1000)
    for config in configs()[:2]:
        together = pipeline.run(config, runs_dir=tmp_path / "together", shared=shared)
        assert together.stages["read calibration images"] > 0
        assert without_times(together) == without_times(pipeline.run(config, runs_dir=tmp_path / "alone"))


def test_the_float_network_is_evaluated_once(tmp_path: Path) -> None:
    shared = RunCache(KEEP_BYTES)
    results = [pipeline.run(config, runs_dir=tmp_path, shared=shared) for config in configs()[:2]]
    compared = [result.comparison for result in results if result.comparison is not None]
    # a time measured twice would come out differently, as that of the quantized networks does
    assert (len({one.float_s for one in compared}), len({one.quantized_s for one in compared})) == (1, 2)


class Vandal:
    """Rounds, and overwrites the float network's first weight."""

    name, summary, version, needs_data = "vandal", "changes the teacher", "1", False
    scope = "network"
    Config = MethodConfig

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def quantize(self, task: Any) -> None:
        with torch.no_grad():
            next(task.teacher.parameters()).data.zero_()
        for layer in task.layers:
            grid = minmax_grid(layer.weight, layer.bits)
            task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))


def test_a_method_that_changes_the_float_network_spoils_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = registry.find
    monkeypatch.setattr(registry, "find", lambda name: (Vandal, "test") if name == "vandal" else plain(name))
    shared, heard = RunCache(KEEP_BYTES), ListSink()
    pipeline.run(DEMO.model_copy(update={"method": "vandal"}), runs_dir=tmp_path, sink=heard, shared=shared)
    assert any(isinstance(event, Note) and "changed the float network" in event.message for event in heard.events)
    rtn = DEMO.model_copy(update={"method": "rtn"})
    after = pipeline.run(rtn, runs_dir=tmp_path / "after", shared=shared)
    assert without_times(after) == without_times(pipeline.run(rtn, runs_dir=tmp_path / "alone"))


def test_a_network_that_cannot_be_loaded_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("coraq.pipeline.prepare.load_model", _refusing(tried))
    shared = RunCache(KEEP_BYTES)
    for config in configs()[:2]:
        with pytest.raises(CoraqError, match="no such weights"):
            pipeline.run(config, runs_dir=tmp_path, shared=shared)
    assert len(tried) == 1


def _refusing(tried: list[str]) -> Any:
    def refuse(config: RunConfig) -> None:
        tried.append(config.model)
        raise CoraqError("no such weights")

    return refuse


def test_peak_memory_starts_again_with_every_run() -> None:
    system.reset_peak_memory()
    before = system.peak_memory()
    ballast = torch.ones(300_000_000, dtype=torch.uint8)
    del ballast
    assert system.peak_memory() - before > 250_000_000
    system.reset_peak_memory()
    assert system.peak_memory() - before < 100_000_000


def test_predictions_survive_writing_and_say_which_images_they_are_of(tmp_path: Path) -> None:
    labels = torch.tensor([1, 2, -1, 40_000])
    predictions = Predictions(torch.tensor([1, 0, 5, 7]), torch.tensor([1, 2, 5, 40_000]), labels, "abc")
    write_predictions(tmp_path, predictions)
    read = read_predictions(tmp_path)
    assert read is not None
    assert read.right.tolist() == [True, True, True]  # the unlabelled image does not count
    assert read.same_images(predictions)
    assert not read.same_images(Predictions(labels, labels, labels, "def"))
    unlabelled = Predictions(torch.tensor([1, 0]), torch.tensor([1, 2]), torch.tensor([-1, -1]), "abc")
    assert unlabelled.right.tolist() == [True, False]  # agreement with the float network
    (tmp_path / "predictions.safetensors").write_bytes(b"cut short")
    assert read_predictions(tmp_path) is None


def test_a_run_keeps_its_predictions_and_they_count_up_to_its_accuracy(tmp_path: Path) -> None:
    result = pipeline.run(DEMO, runs_dir=tmp_path)
    predictions = read_predictions(Path(result.run_dir))
    assert predictions is not None
    assert result.comparison is not None
    assert result.comparison.quantized_top1 is not None
    assert 100 * predictions.right.double().mean() == pytest.approx(result.comparison.quantized_top1.value_pct)
    assert predictions.images == result.evaluation_fingerprint

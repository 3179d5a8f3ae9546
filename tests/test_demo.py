"""Claims about the network and digits that ship with coraq."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import coraq
from coraq.config import DataConfig
from coraq.data import Images, Preprocess, demo_images
from coraq.events import ListSink

FOLDER = Path(coraq.__file__).parent / "demo"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network: nn.Module = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    return network


def opened(model: nn.Module, seed: int = 0, **options: int) -> Images:
    data = DataConfig(**options)
    return demo_images(Preprocess.resolve(model, data), data, seed, ListSink())


@torch.no_grad()
def top1_pct(model: nn.Module, images: Images) -> float:
    assert images.evaluation is not None
    right = total = 0
    for x, y in images.evaluation.batches(100):
        right, total = right + int((model(x).argmax(1) == y).sum()), total + len(y)
    assert total == images.evaluation.count
    return 100 * right / total


def test_the_demo_network_reads_digits_it_never_saw(model: nn.Module) -> None:
    assert top1_pct(model, opened(model)) >= 97.5


def test_the_demo_network_has_what_quantization_must_handle(model: nn.Module) -> None:
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert any(conv.groups == 1 and conv.kernel_size == (3, 3) for conv in convolutions)
    assert any(conv.groups == conv.in_channels > 1 for conv in convolutions)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    means, spreads = [], []
    for norm in norms:  # trained: fresh ones are close to the identity, which hides folding errors
        assert norm.running_mean is not None
        assert norm.running_var is not None
        deviation = norm.running_var.sqrt()
        scale = (norm.weight.detach() / deviation).abs()
        means.append(float((norm.running_mean.abs() / deviation).max()))
        spreads.append(float(scale.max() / scale.min()))
    assert min(spreads) > 1.4
    assert sorted(means)[len(means) // 2] > 0.3


def test_calibration_and_evaluation_are_apart_balanced_and_seeded(model: nn.Module) -> None:
    images = opened(model, calib_size=200, eval_size=50)
    assert images.evaluation is not None
    calibration = torch.cat([x for x, _ in images.calibration.batches()])
    assert len(calibration) == images.calibration.count == 200
    tested = {x.numpy().tobytes() for batch, _ in images.evaluation.batches() for x in batch}
    assert len(tested) == 50
    assert tested.isdisjoint({x.numpy().tobytes() for x in calibration})
    labels = torch.cat([y for _, y in images.calibration.batches()])
    assert torch.bincount(labels, minlength=10).tolist() == [20] * 10
    assert images.calibration.fingerprint == opened(model, calib_size=200).calibration.fingerprint
    assert images.calibration.fingerprint != opened(model, seed=1, calib_size=200).calibration.fingerprint


def test_asking_for_more_digits_than_there_are_is_noted(model: nn.Module) -> None:
    sink = ListSink()
    data = DataConfig(calib_size=5000)
    assert demo_images(Preprocess.resolve(model, data), data, 0, sink).calibration.count == 1197
    assert len(sink.events) == 1


def test_the_package_data_stays_under_a_megabyte_and_says_where_it_is_from() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 1_000_000
    note = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in note
    assert "Alpaydin" in note

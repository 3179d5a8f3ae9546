"""Input scales: what they are, that the grid acts on the product, and that everybody means the same by them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tasks import make_task
from torch import Tensor, nn

import coraq
from coraq.activations.fake_quant import fake_quant_of
from coraq.activations.records import install_grids
from coraq.artifact import load_checkpoint
from coraq.calibration.task import CalibrationTask
from coraq.cli.progress import PlainProgress
from coraq.config import Scheme
from coraq.core.ranges import RangeSample, activation_grid
from coraq.core.smoothing import channel_ranges, input_scales
from coraq.core.soft_rounding import LearnedGrid
from coraq.core.tensors import ActivationGrid, QuantizedLayer
from coraq.errors import CoraqError, MethodError
from coraq.events import QUANTIZE, ListSink, Sink, StageStarted, null_sink
from coraq.methods.rtn import RoundToNearest
from coraq.network.fold import fold
from coraq.testing.networks import random_images, small_network

W4A4 = Scheme.of(bits=4, act_bits=4, column_scale="input")


def uneven(channels: int = 6, count: int = 4000, signed: bool = False) -> Tensor:
    """[channels, count], each channel four times as large as the next."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(channels, count, generator=generator) * 4.0 ** -torch.arange(channels)[:, None]
    return values if signed else values.relu()


@pytest.mark.parametrize("signed", [False, True])
def test_channels_that_differ_by_powers_of_two_get_them_as_factors(signed: bool) -> None:
    shape = uneven(1, signed=signed)
    values = (shape * 4.0 ** -torch.arange(4)[:, None]).float()  # the same values in all, so that ranges are alike
    assert torch.equal(input_scales(values, 4, 1.0), 4.0 ** torch.arange(4))
    assert torch.equal(input_scales(values, 4, 0.5), 2.0 ** torch.arange(4))
    assert torch.equal(input_scales(values, 4, 0.0), torch.ones(4))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_channel_s_range_is_the_best_of_many(bits: int) -> None:
    """Against a search by brute force over a hundred times as many ranges."""
    values = uneven(3)
    found = channel_ranges(values, bits)

    def error(channel: Tensor, top: float) -> float:
        step = top / (2**bits - 1)
        return float(((channel / step).round().clamp(0, 2**bits - 1) * step - channel).abs().pow(2.4).sum())

    for channel, top in zip(values, found, strict=True):
        best = min(error(channel, float(channel.max()) * k / 4000) for k in range(100, 4001))
        assert error(channel, float(top)) <= 1.05 * best


def test_dead_channels_and_dead_tensors_have_factors_that_can_be_stored() -> None:
    values = uneven(3)
    values[1] = 0
    factors = input_scales(values, 4, 1.0)
    assert bool(torch.isfinite(factors).all())
    assert float(factors[1]) > 128
    assert torch.equal(input_scales(torch.zeros(3, 10), 4, 1.0), torch.ones(3))


def test_a_grid_with_factors_is_a_grid_for_each_channel() -> None:
    values, factors = uneven(), 4.0 ** torch.arange(6)
    x = values.reshape(6, 10, 20, 20).transpose(0, 1)
    grid = ActivationGrid(0.125, 3, 4, True, factors.reshape(6, 1, 1))
    for c in range(6):
        own = ActivationGrid(0.125 / float(factors[c]), 3, 4, True)
        assert torch.equal(grid.round(x)[:, c], own.round(x[:, c]))
        assert torch.equal(grid.codes(x)[:, c], own.codes(x[:, c]))
    assert torch.equal(grid.round(grid.round(x)), grid.round(x))
    assert torch.equal(grid.scaled(2.0).round(x), dataclasses.replace(grid, scale=0.25).round(x))


def test_the_range_is_that_of_the_product() -> None:
    x = uneven().reshape(6, 10, 20, 20).transpose(0, 1)
    factors = (4.0 ** torch.arange(6)).reshape(6, 1, 1)
    sample, other = RangeSample(1, factors), RangeSample(1)
    sample.add(x)
    other.add(x * factors)
    found = sample.grid(4)
    assert found == other.grid(4)
    assert found.factors is factors
    plain = activation_grid(x.flatten(), 0.0, float(x.max()), 4)

    def relative(rounded: Tensor) -> Tensor:
        return ((rounded - x).square().sum((0, 2, 3)) / x.square().sum((0, 2, 3))).sqrt()

    assert float(relative(found.round(x)).max()) < 0.15  # as 15 levels can, in every channel
    assert float(relative(plain.round(x)).max()) == 1.0  # the smallest are all zero without


def test_a_learned_step_sees_the_product() -> None:
    """Twin implementation: the grid on the product, divided; and its gradient."""
    x = uneven().reshape(6, 10, 20, 20).transpose(0, 1)
    factors = (4.0 ** torch.arange(6)).reshape(6, 1, 1)
    grid = ActivationGrid(0.2, 0, 4, False)
    with_factors, plain = LearnedGrid(dataclasses.replace(grid, factors=factors)), LearnedGrid(grid)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = with_factors(x), plain(x * factors) / factors
    assert torch.equal(found, wanted)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert with_factors.log_factor.grad is not None
    assert torch.allclose(with_factors.log_factor.grad, plain.log_factor.grad)  # type: ignore[arg-type]
    assert with_factors.result().factors is factors


def stretched() -> nn.Module:
    """A folded network whose first activation has channels of very different size, its function as it was."""
    model = small_network()
    fold(model, random_images(4))
    factors = 4.0 ** -torch.arange(8.0)
    with torch.no_grad():
        model.stem.weight.mul_(factors.reshape(-1, 1, 1, 1))
        model.stem.bias.mul_(factors)
        spread = factors.reshape(4, 1, 2, 1, 1).expand(4, 4, 2, 1, 1).reshape(16, 2, 1, 1)
        model.grouped.weight.div_(spread)
    return model


def quantized(method: str, kind: str, path: Path | None = None, model: nn.Module | None = None, **more: Any) -> Any:
    scheme = Scheme.of(bits=4, act_bits=4, column_scale=kind, **more)  # type: ignore[arg-type]
    return coraq.quantize(model or small_network(), method, data=random_images(32), scheme=scheme, path=path)


def test_what_the_task_says_is_what_the_layers_have_and_the_file_means(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    made = quantized("comq", "input", path)
    checkpoint = load_checkpoint(path)
    images = random_images(8, seed=3)
    assert torch.equal(checkpoint.module(images), made.module(images))
    scaled = {name for record in checkpoint.info.activations.values() if record.scaled for name in record.readers}
    assert scaled == {"grouped", "depthwise", "pointwise", "dense", "hidden"}  # 8-bit edges are not
    for name, layer in checkpoint.layers.items():
        grid = fake_quant_of(checkpoint.module.get_submodule(name)).input
        assert isinstance(grid, ActivationGrid)
        assert (layer.weight.columns is not None) == (grid.factors is not None) == (name in scaled)
        if layer.weight.columns is not None:
            assert grid.factors is not None
            assert torch.equal(layer.weight.columns.flatten(), grid.factors.flatten())
            assert grid.factors.dim() == (1 if name == "hidden" else 3)
    assert made.result.scheme_line.count("column scales of inputs") == 1


@pytest.mark.parametrize("method", ["rtn", "comq", "gptq", "brecq"])
def test_uneven_channels_are_rounded_better(method: str) -> None:
    """A network that differs from an even one by the size of its channels alone."""
    images = random_images(64, seed=5)
    wanted = stretched()(images)
    errors = [
        float((quantized(method, kind, model=stretched()).module(images) - wanted).square().mean())
        for kind in ("none", "input")
    ]
    assert errors[1] < 0.9 * errors[0]


def task_of(scheme: Scheme, model: nn.Module | None = None, sink: Sink = null_sink) -> CalibrationTask:
    images = random_images(32)
    model = model or small_network()
    return make_task(model, scheme, list(images.split(8)), found=fold(model, images[:4]), sink=sink)


def test_what_is_done_before_the_first_layer_is_shown() -> None:
    sink, lines, now = ListSink(), list[str](), iter(range(0, 10_000, 11))
    task_of(W4A4, sink=sink)
    plain = PlainProgress(lines.append, verbose=False, clock=lambda: next(now))
    for event in [StageStarted(QUANTIZE, 7), *sink.events]:
        plain(event)
    assert lines[1] == "quantize: 0/7 inputs: images, 0 of 4 micro-batches"
    assert lines[-1] == "quantize: 0/7 inputs: scale of hidden.input"
    assert len(lines) == 1 + 4 + 5  # a line for each micro-batch and each tensor, had each taken ten seconds


def test_factors_are_the_float_network_s_and_the_same_every_time() -> None:
    one, other = ({v.name: v.input_scales for v in task_of(W4A4).layers} for _ in range(2))
    for name, scales in one.items():
        again = other[name]
        assert (scales is None) == (again is None) == (name in ("stem", "head"))
        if scales is not None and again is not None:
            assert torch.equal(scales, again)
            assert float(scales.min()) >= 1


def test_grids_inside_a_unit_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10).eval()
    images = random_images(16, 64)
    task = make_task(model, W4A4, list(images.split(8)), found=fold(model, images[:4]))
    views = {view.name: view for view in task.layers}
    seen = set()
    for block in task.partition()[:4]:
        data = task.block_io(block)
        for point in data.points:
            grid, scales = data.grids[point.name], views[point.readers[0]].input_scales
            assert (grid.factors is None) == (scales is None)
            if grid.factors is None or scales is None:
                continue
            assert torch.equal(grid.factors.flatten(), scales.flatten())
            if task.grids.grid(point) is not None:  # which the engine has calibrated, micro-batch by micro-batch
                continue
            reader, inputs = data.readers(point)[0], list[Tensor]()
            handle = reader.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
            data.module(data.student_input[:64].clone())
            handle.remove()
            sample = RangeSample(1, grid.factors)
            sample.add(inputs[0])
            assert sample.grid(4).scale == pytest.approx(grid.scale, rel=1e-6)
            seen.add(point.name)
        for name in block.layers:
            view = views[name]
            columns = view.columns(W4A4)
            made = view.grid_spec(W4A4).mse(view.weight)
            made = dataclasses.replace(made, columns=columns)
            task.commit(name, QuantizedLayer(made.pack(made.codes(view.weight))))
    assert seen


def test_other_scales_than_the_input_s_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_its_own(self: RoundToNearest, task: Any) -> None:
        for layer in task.layers:
            columns = layer.columns(task.scheme)
            grid = layer.grid_spec(task.scheme).mse(layer.weight)
            if columns is not None:
                grid = dataclasses.replace(grid, columns=torch.full_like(columns, 2.0))
            task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))

    monkeypatch.setattr(RoundToNearest, "quantize", of_its_own)
    with pytest.raises(MethodError, match="the column scales of layer grouped are not those of its input"):
        quantized("rtn", "input")


@pytest.mark.parametrize("given", [{}, {"act_bits": 4, "act_placement": "integer"}])
def test_there_must_be_inputs_to_scale(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="column scales of inputs need --act-bits"):
        Scheme.of(column_scale="input", **given)


def test_a_record_without_its_column_scales_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    quantized("rtn", "input", path)
    checkpoint = load_checkpoint(path)
    bare = {
        name: dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, columns=None))
        for name, layer in checkpoint.layers.items()
    }
    with pytest.raises(CoraqError, match="does not fit the network: it has no column scales"):
        install_grids(checkpoint.module, checkpoint.info.activations, bare)

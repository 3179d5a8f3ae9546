"""Column scales: what they are, that they are invisible but for the rounding, and that every file holds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_layer import OneLayerTask
from torch import Tensor

import coraq
from coraq.api import QTensor, QuantizedLayer
from coraq.artifact import load_checkpoint
from coraq.artifact.codec import decode, encode
from coraq.cli.app import run
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core.columns import LEAST, MOST, column_scales, rounded, spread_columns
from coraq.core.grid import Grid, mse_grid
from coraq.core.least_squares import LeastSquares
from coraq.core.quadratic_model import QuadraticModel
from coraq.errors import CoraqError, MethodError
from coraq.methods.comq import COMQ
from coraq.methods.rtn import RoundToNearest
from coraq.results import RunResult
from coraq.testing import random_images, small_network

CHANNEL = Scheme.of(bits=2, column_scale="channel")
CHANNELS = {"stem": 3, "grouped": 2, "depthwise": 1, "pointwise": 16, "dense": 16, "hidden": 24, "head": 16}
METHODS = ["rtn", "comq", "gptq", "npot", "qera", "cora", "brecq"]


def uneven(shape: tuple[int, int, int], taps: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight whose input channels differ by up to 2**4, and by what."""
    groups, out, inputs = shape
    generator = torch.Generator().manual_seed(seed)
    channels = 2.0 ** (4 * torch.rand(groups, 1, inputs // taps, generator=generator) - 2)
    rows = 2.0 ** (2 * torch.randn(groups, out, 1, generator=generator))
    return torch.randn(shape, generator=generator) * spread_columns(channels, inputs) * rows, channels


def squares_of(weight: Tensor, blocks: int = 1, seed: int = 1) -> LeastSquares:
    groups, _, inputs = weight.shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups * blocks, 300, inputs // blocks, generator=generator).double()
    x = (x @ torch.randn(x.shape[0], x.shape[2], x.shape[2], generator=generator).double()).relu()
    rows = torch.randn(groups, 7, inputs, generator=generator) if blocks > 1 else None
    return LeastSquares(weight, x.mT @ x / 300, rows)


@pytest.mark.parametrize(("shape", "taps"), [((1, 64, 40), 1), ((1, 48, 90), 9), ((4, 32, 36), 9)])
def test_rows_and_columns_end_up_alike(shape: tuple[int, int, int], taps: int) -> None:
    weight, channels = uneven(shape, taps)
    found = column_scales(weight, taps)
    assert found.shape == channels.shape
    left = (weight / spread_columns(found, shape[2])).unflatten(2, (-1, taps)).square().mean(3)
    columns = (left / left.mean(2, keepdim=True)).mean(1).sqrt()
    assert float((columns.log() - columns.log().mean(1, keepdim=True)).abs().max()) < 0.07  # 8 bits: ± 1/16
    # which undoes what was put in, up to chance and one factor for all
    ratio = (found / channels).log()
    assert float((ratio - ratio.mean(2, keepdim=True)).abs().max()) < 0.5
    assert torch.equal(rounded(found), found)
    assert float(found.log().mean().abs()) < 0.05


def test_signs_alone_are_scaled_exactly() -> None:
    """A weight ± r_o c_i with powers of two for c has those very factors."""
    signs = torch.randn(1, 24, 8).sign()
    columns = torch.tensor([0.25, 4, 1, 2, 0.5, 1, 0.5, 2]).reshape(1, 1, 8)
    found = column_scales(signs * torch.rand(1, 24, 1).add(0.1) * columns, 1)
    assert torch.equal(found, columns)


def test_dead_and_extreme_channels_have_factors_that_can_be_stored() -> None:
    weight = torch.randn(2, 6, 8)
    weight[0, :, 2] = 0
    weight[0, :, 3] *= 1e-12
    weight[1, 4] = 0
    weight[1, :, 5] *= 1e9
    for value in (weight, torch.zeros(1, 3, 4)):
        found = column_scales(value, 1)
        assert bool(torch.isfinite(found).all())
        assert LEAST <= float(found.min()) <= float(found.max()) <= MOST
        QTensor(torch.zeros_like(value, dtype=torch.uint8), torch.ones(1, 1, 1), 2, columns=found).check(value.shape)


def test_channels_that_are_all_but_dead_do_not_level_the_others() -> None:
    signs = torch.randn(1, 24, 8).sign()
    columns = torch.tensor([0.25, 1, 4, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5]).reshape(1, 1, 8)
    found = column_scales(signs * columns, 1)
    assert torch.equal(found[..., :3], torch.tensor([[[16.0, 64, 256]]]))
    assert torch.equal(found[..., 3:], torch.full((1, 1, 5), LEAST))


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_scaled_problem_is_the_same_problem(blocks: int) -> None:
    weight, channels = uneven((2, 5, 18), 3)
    squares, columns = squares_of(weight, blocks), rounded(channels)
    factors = spread_columns(columns, 18)
    scaled, other = squares.scaled(columns), torch.randn(2, 5, 18)
    torch.testing.assert_close(scaled.error(other / factors), squares.error(other), rtol=1e-5, atol=0)
    if blocks > 1:
        assert scaled.rows is not None
        assert squares.rows is not None
        outputs = torch.einsum("gri,goi->gro", squares.rows, weight)
        torch.testing.assert_close(torch.einsum("gri,goi->gro", scaled.rows, scaled.weight), outputs)
    assert squares.scaled(None) is squares


def solved(method: Any, weight: Tensor, taps: int, **scheme: Any) -> OneLayerTask:
    task = OneLayerTask(squares_of(weight), Scheme.of(**scheme), taps)
    method(method.Config()).quantize(task)
    return task


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("shape", "taps"), [((1, 32, 24), 1), ((1, 24, 54), 9), ((2, 16, 18), 9)])
def test_uneven_channels_lose_less(shape: tuple[int, int, int], taps: int, bits: int) -> None:
    weight, _ = uneven(shape, taps)
    plain = solved(COMQ, weight, taps, bits=bits)
    with_columns = solved(COMQ, weight, taps, bits=bits, column_scale="channel")
    assert with_columns.error() < 0.8 * plain.error()
    stored = with_columns.layer.weight
    assert stored.columns is not None
    assert stored.size_bytes() == plain.layer.weight.size_bytes() + shape[0] * shape[2] // taps
    assert stored.fraction == CHANNEL.fraction(bits)


def test_the_error_that_is_reported_is_that_of_the_weight_as_stored() -> None:
    task = solved(COMQ, uneven((2, 16, 18), 9)[0], 9, bits=2, column_scale="channel")
    assert task.metrics["error"] == pytest.approx(task.error(), rel=1e-3)


def test_codes_are_those_of_the_divided_weight_on_multiplied_inputs() -> None:
    weight, _ = uneven((1, 12, 20))
    squares, columns = squares_of(weight), column_scales(weight, 1)
    one = OneLayerTask(squares, CHANNEL)
    COMQ(COMQ.Config()).quantize(one)
    other = OneLayerTask(squares.scaled(columns), Scheme.of(bits=2))
    COMQ(COMQ.Config()).quantize(other)
    assert torch.equal(one.layer.weight.codes, other.layer.weight.codes)
    assert torch.equal(one.layer.dequantize(), other.layer.dequantize() * columns)


def test_a_grid_with_columns_rounds_packs_and_comes_back() -> None:
    weight, channels = uneven((2, 6, 12), 3)
    columns = rounded(channels)
    scaled = weight / spread_columns(columns, 12)
    plain = mse_grid(scaled, 3, symmetric=False)
    grid = dataclasses.replace(plain, columns=columns)
    assert torch.equal(grid.codes(weight), plain.codes(scaled))
    stored = grid.pack(grid.codes(weight))
    torch.testing.assert_close(stored.dequantize(), grid.round(weight))
    again = Grid.of(stored)
    assert torch.equal(again.round(weight), stored.dequantize())
    assert again.columns is not None


def test_a_newton_step_with_columns_is_one_in_the_divided_weight() -> None:
    weight, channels = uneven((1, 8, 10))
    columns = rounded(channels)
    gram = squares_of(weight).gram
    step = 0.1 * torch.randn(1, 8, 10).double()
    bias_step = torch.zeros(1, 8).double()
    plain = mse_grid(weight / columns, 3, symmetric=False)
    codes = plain.codes(weight / columns)
    factors = columns.double()
    one = QuadraticModel(gram, step, bias_step, None).solve(dataclasses.replace(plain, columns=columns), codes, 1.0)
    other = QuadraticModel(gram * factors.mT * factors, step / factors, bias_step, None).solve(plain, codes, 1.0)
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[0].scale, other[0].scale, rtol=1e-5, atol=0)
    assert not torch.equal(one[1], codes)  # a step was taken


Fault = Callable[[Tensor], Any]
FAULTS: dict[str, Fault] = {
    "more channels than inputs divide by": lambda c: torch.ones(1, 1, 5),
    "of another group": lambda c: c.repeat(2, 1, 1),
    "none": lambda c: c[:, :, :0],
    "between two that can be stored": lambda c: c * 1.001,
    "negative": lambda c: -c,
    "zero": lambda c: 0 * c,
    "not finite": lambda c: c * float("nan"),
    "of another type": lambda c: c.double(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_are_no_column_scales_is_refused(fault: str) -> None:
    weight, _ = uneven((1, 4, 12), 3)
    columns = column_scales(weight, 3)
    sound = QTensor(torch.zeros(1, 4, 12, dtype=torch.uint8), torch.ones(1, 4, 1), 2, columns=columns)
    sound.check((1, 4, 12))
    with pytest.raises(ValueError, match="column scales"):
        dataclasses.replace(sound, columns=FAULTS[fault](columns)).check((1, 4, 12))


def test_an_encoding_holds_them_in_a_byte_each_and_refuses_another_type() -> None:
    weight, channels = uneven((3, 4, 18), 9)
    grid = dataclasses.replace(mse_grid(weight, 3, symmetric=False), columns=rounded(channels))
    layer = QuantizedLayer(grid.pack(grid.codes(weight)))
    tensors, record = encode("layer", layer)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == layer.size_bytes()
    damaged = {**tensors, "layer.weight_column_scale": tensors["layer.weight_column_scale"].float()}
    again = decode("layer", record, tensors)
    assert torch.equal(again.dequantize(), layer.dequantize())
    with pytest.raises(CoraqError, match="float8"):
        decode("layer", record, damaged)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_them_and_the_file_gives_the_same_outputs(method: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    network = small_network(awkward=True)
    coraq.quantize(network, method, data=random_images(16), scheme=CHANNEL, path=path)
    checkpoint = load_checkpoint(path)
    found = {name: layer.weight for name, layer in checkpoint.layers.items()}
    wanted = {name: CHANNELS[name] if q.bits <= 4 and name != "depthwise" else 0 for name, q in found.items()}
    assert {name: 0 if q.columns is None else q.columns.shape[2] for name, q in found.items()} == wanted
    assert sum(wanted.values()) > 0
    for name, layer in checkpoint.layers.items():
        module: Any = checkpoint.module.get_submodule(name)
        assert torch.equal(module.weight, layer.dequantize().reshape(module.weight.shape))


def test_learned_rounding_has_them_too(tmp_path: Path) -> None:
    options = {"initial_codes": "nearest", "learn": "all", "iterations": 4, "guard": False}
    path = tmp_path / "model.safetensors"
    coraq.quantize(small_network(), "brecq", options=options, data=random_images(16), scheme=CHANNEL, path=path)
    checkpoint = load_checkpoint(path)
    assert checkpoint.layers["dense"].weight.columns is not None
    assert "column scales" in checkpoint.info.scheme.describe()


def test_a_method_that_knows_none_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def ignores(self: RoundToNearest, task: Any) -> None:
        for layer in task.layers:
            grid = layer.grid_spec(task.scheme).mse(layer.weight)
            task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))

    monkeypatch.setattr(RoundToNearest, "quantize", ignores)
    with pytest.raises(CoraqError, match="does not support column scales") as found:
        coraq.quantize(small_network(), "rtn", data=random_images(8), scheme=CHANNEL)
    assert found.value.hint.startswith("Omit --column-scale")
    assert not isinstance(found.value, MethodError)  # which would send the user to the method's author


def test_what_is_left_to_the_method_suits_it_and_the_scheme(tmp_path: Path) -> None:
    """By default all have them but the papers' forms, of the kind that suits the grid and the activations."""

    def columns(method: str, options: dict[str, Any] | None = None, **scheme: Any) -> bool:
        path = tmp_path / "model.safetensors"
        chosen = Scheme.of(bits=3, **scheme)
        found = coraq.quantize(
            small_network(), method, data=random_images(16), scheme=chosen, options=options, path=path
        )
        checkpoint = load_checkpoint(path)
        held = {layer.weight.columns is not None for layer in checkpoint.layers.values()}
        assert held != {True}  # 8-bit edges have none
        assert ("column scales" in found.result.scheme_line) == (True in held)
        inputs = (chosen.act_bits or 8) <= 4
        assert checkpoint.info.scheme.weights.column_scale == (
            "none" if True not in held else "input" if inputs else "channel"
        )
        assert found.result.config.scheme == chosen  # what was asked for
        return True in held

    assert all(columns(method) for method in METHODS)
    assert columns("qera", {"base": "gptq"})
    assert not columns("cora", {"preset": "paper", "iterations": 1})
    assert not columns("qera", {"base": "comq", "base_options": {"preset": "paper"}})  # which must want them, too
    assert not columns("comq", {"preset": "paper"})
    assert not columns("comq", symmetric=True)
    assert not columns("comq", granularity="tensor", scale_correction="off")
    assert not columns("comq", act_bits=8)
    assert not columns("comq", column_scale="none")
    assert columns("comq", act_bits=8, column_scale="channel")
    assert columns("comq", act_bits=4)
    assert columns("comq", act_bits=4, symmetric=True)
    assert not columns("comq", act_bits=4, act_placement="integer")
    assert not columns("comq", act_bits=4, granularity="tensor", scale_correction="off")
    assert not columns("comq", {"preset": "paper"}, act_bits=4)


def test_left_to_the_method_is_the_same_run_as_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder is named after what it does: comq's default is `channel`, that of the paper's form `none`."""
    for preset, kind in (("default", "channel"), ("paper", "none")):
        line = ["quantize", "demo", "--method", "comq", "-o", f"preset={preset}", "--calib-size", "8"]
        line += ["--dry-run", "--json", "-O", str(tmp_path)]
        found = []
        for more in ([], ["--column-scale", kind], ["--column-scale", "channel" if kind == "none" else "none"]):
            assert run([*line, *more]) == 0
            found.append(json.loads(capsys.readouterr().out)["run_dir"])
        assert found[0] == found[1] != found[2]


def test_a_run_without_them_keeps_its_folder_s_name() -> None:
    digests = {RunConfig(model="demo", scheme=Scheme.of(column_scale=kind)).digest() for kind in ("none", "channel")}
    assert len(digests) == 2
    settled = Scheme().resolve_auto(False)
    assert RunConfig(model="demo", scheme=settled).digest() in digests
    assert settled == Scheme.of(column_scale="none") != Scheme().resolve_auto(True) == Scheme.of(column_scale="channel")


def test_a_result_that_does_not_say_had_none() -> None:
    """Results of before are read as what they were, not as what the same command does now."""
    path = Path(__file__).parent / "data/format_1/comq/metrics.json"
    content = json.loads(path.read_text())
    for key in ("column_scale", "zero_point"):
        content["config"]["scheme"].pop(key, None)
    content["config"]["data"].pop("calib_early", None)
    config = RunResult.model_validate_json(json.dumps(content)).config
    assert (
        config.scheme.weights.column_scale,
        config.scheme.weights.zero_point_fraction,
        config.data.calib_early_images,
    ) == ("none", 0, 0)
    assert Scheme().weights.column_scale == "auto"
    assert DataConfig().calib_early_images > 0

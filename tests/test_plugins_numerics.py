"""Claims about the plugins gptq and npot, loaded as outsiders' files are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.one_layer import SHAPES, OneLayerTask, run

from coraq.api import MethodConfig, Quantizer
from coraq.core.grid import mse_grid
from coraq.methods.comq import COMQ

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"plugin_under_test_{name}", PLUGINS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gptq, npot = load("gptq"), load("npot")
METHODS = {method.name: method for module in (gptq, npot) for method in module.METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_plugin_satisfies_the_protocol(name: str) -> None:
    method = METHODS[name]
    assert isinstance(method(method.Config()), Quantizer)
    assert issubclass(method.Config, MethodConfig)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_plugin_works_on_every_kind_and_reports_its_true_error(
    name: str, kind: str, symmetric: bool, granularity: str
) -> None:
    task = OneLayerTask.random(SHAPES[kind], 4, symmetric=symmetric, granularity=granularity)
    quantized, metrics = run(METHODS[name], task)
    assert metrics["error"] == pytest.approx(task.error(quantized), rel=1e-3)


def test_gptq_is_between_nearest_rounding_and_comq() -> None:
    for seed in range(3):
        task = OneLayerTask.random((1, 16, 72), 3, seed)
        error = run(METHODS["gptq"], task, grid="mse")[1]["error"]
        weight = task.squares.weight
        assert error < task.error(mse_grid(weight, 3).round(weight))
        assert run(COMQ, OneLayerTask.random((1, 16, 72), 3, seed))[1]["error"] < error


@pytest.mark.parametrize("option", [{"grid": "mse"}, {"act_order": False}, {"damping": 0.5}], ids=str)
def test_no_gptq_option_is_dead(option: dict) -> None:
    usual, _ = run(METHODS["gptq"], OneLayerTask.random((1, 16, 72), 3))
    assert not torch.equal(usual, run(METHODS["gptq"], OneLayerTask.random((1, 16, 72), 3), **option)[0])


def sums_by_hand(hot: int, deepest: int) -> set[float]:
    """All sums of at most `hot` signed powers 1 … 2**-deepest, the slow way."""
    found = {0.0}
    for _ in range(hot):
        found |= {level + sign * 2.0**-power for level in found for sign in (-1, 1) for power in range(deepest + 1)}
    return found


@pytest.mark.parametrize(("bits", "hot"), [(2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (5, 2), (6, 3)])
def test_npot_levels_are_distinct_sums_of_n_powers_of_two(bits: int, hot: int) -> None:
    levels = npot.powers_of_two(bits, hot).tolist()
    assert len(set(levels)) == 2**bits
    assert levels == sorted(levels)
    assert 0.0 in levels
    assert set(levels) <= sums_by_hand(hot, 16)


def test_one_hot_levels_are_the_logarithmic_grid() -> None:
    levels = npot.powers_of_two(3, 1)
    assert set(levels.tolist()) >= {0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25}


def test_npot_stores_codes_of_its_codebook() -> None:
    task = OneLayerTask.random((1, 8, 30), 4)
    quantized, _ = run(METHODS["npot"], task)
    layer, _ = task.committed["layer"]
    assert layer.weight.codebook is not None
    assert layer.weight.zero_point is None
    unit = (quantized / layer.weight.scale).flatten().tolist()
    table = layer.weight.codebook
    assert max(float((table - value).abs().min()) for value in unit) < 1e-6


def test_npot_uses_data_where_there_is_some() -> None:
    blind, seeing = OneLayerTask.random((1, 16, 72), 4), OneLayerTask.random((1, 16, 72), 4)
    blind.has_data = False
    without, _ = run(METHODS["npot"], blind)
    assert not blind.posed
    with_data, _ = run(METHODS["npot"], seeing)
    assert seeing.error(with_data) < 0.8 * seeing.error(without)
    weight = blind.layers[0].weight
    scales = blind.committed["layer"][0].weight.scale
    for factor in (0.9, 1.1):  # among the scales near it, that of least weight error
        table = npot.powers_of_two(4, 2)
        other = npot.Codebook(scales * factor, table, 4).round(weight)
        assert float((weight - without).square().sum()) < float((weight - other).square().sum())


@pytest.mark.parametrize("option", [{"hot": 1}, {"candidates": 2}, {"sweeps": 0}], ids=str)
def test_no_npot_option_is_dead(option: dict) -> None:
    usual, _ = run(METHODS["npot"], OneLayerTask.random((1, 16, 72), 4))
    assert not torch.equal(usual, run(METHODS["npot"], OneLayerTask.random((1, 16, 72), 4), **option)[0])

"""Claims about the method mixed on a small network and the demo, through the real calibration task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tasks import error_of, extra_bytes, make_task, run_method

import coraq
from coraq import registry
from coraq.api import QuantizedLayer
from coraq.calibration import layer_costs
from coraq.calibration.task import CalibrationTask
from coraq.config import LayerScheme, RunConfig, Scheme
from coraq.core.grid import mse_grid
from coraq.core.sensitivity import kl_of_errors
from coraq.errors import UsageError
from coraq.events import ListSink, Note
from coraq.methods import mixed
from coraq.methods.mixed import Mixed
from coraq.pipeline import folder_name, plan
from coraq.pipeline.cache import RunCache
from coraq.pipeline.prepare import prepare
from coraq.testing.networks import random_images, small_network

BATCHES = list(random_images(96, seed=1).split(32))


def task(**arguments: Any) -> CalibrationTask:
    return make_task(small_network(), arguments.pop("scheme", Scheme.of(bits=3)), BATCHES, **arguments)


def run(one: CalibrationTask, method: Any, **options: Any) -> dict[str, QuantizedLayer]:
    return run_method(one, method, options).quantized


def test_a_budget_is_held_and_buys_bits_where_they_help() -> None:
    plain, one = task(), task()
    base, layers = run(plain, registry.load("comq")), run(one, Mixed, budget=0.2)
    weights = sum(layer.weight.codes.numel() for layer in layers.values())
    assert 0 < extra_bytes(layers, base) <= 0.2 * weights
    assert error_of(one) < error_of(plain)
    assert all(layer.adapter is None for layer in layers.values())


def test_a_method_that_works_block_by_block_is_a_base() -> None:
    """Its codes at the bits of the plan are those that it gives under these bits as overrides."""
    one = task()
    layers = run(one, Mixed, base="brecq", budget=0.1)
    bits = {name: layer.weight.bits for name, layer in layers.items()}
    assert len(set(bits.values())) > 1
    overrides = {name.replace(".", "[.]"): LayerScheme(bits=own) for name, own in bits.items()}
    alone = run(task(scheme=Scheme.of(bits=3, overrides=overrides)), "brecq")
    last = list(layers)[-1]  # its zero point lies at a code
    for name, layer in layers.items():
        assert torch.equal(layer.weight.codes, alone[name].weight.codes) or name == last, name


@pytest.mark.parametrize("method", ["mixed", "cora", "brecq"])
def test_a_base_whose_scope_does_not_fit_is_a_usage_error_before_images_are_read(method: str) -> None:
    option = {"mixed": "base", "cora": "base", "brecq": "initial_codes"}[method]
    config = RunConfig(model="demo", method=method, options={option: "qera"})
    with pytest.raises(UsageError) as caught:
        prepare(config, lambda event: pytest.fail(f"work began: {event}"), RunCache())
    assert method in caught.value.message
    assert "qera has scope network" in caught.value.message
    assert "comq" in caught.value.hint


@pytest.mark.parametrize("bits", [4, 3])
def test_a_file_of_shared_out_bits_is_as_large_as_its_base_s(bits: int, tmp_path: Path) -> None:
    """To a tenth of a percent: layers that get more than 4 bits give up their column scales, and others get some."""
    sizes = {}
    for method in ("comq", "mixed"):
        path = tmp_path / f"{method}.safetensors"
        result = coraq.quantize("demo", method, bits, calib_size=128, path=path).result
        sizes[method] = path.stat().st_size
        assert len({layer.bits for layer in result.layers if layer.name != "classifier"}) > (method == "mixed")
    assert sizes["mixed"] == pytest.approx(sizes["comq"], rel=1e-3)


def test_shares_of_bits_come_from_what_the_base_leaves_but_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes fitted to one row an image seem free of cost on these very images: there nearest rounding tells."""
    seen: dict[str, torch.Tensor] = {}
    alone = run(task(), registry.load("comq"))
    whole = kl_of_errors

    def keep(network: Any, deltas: dict[str, torch.Tensor], *more: Any) -> dict[str, float]:
        seen.update(deltas)
        return whole(network, deltas, *more)

    monkeypatch.setattr(layer_costs, "kl_of_errors", keep)
    one = task()
    layers = run(one, Mixed)
    assert one.traversal.passes == 2
    assert len({layer.weight.bits for layer in layers.values()}) > 1
    views = {view.name: view for view in one.all_layers}
    for name in ("hidden", "head"):  # behind the mean over an image
        weight = views[name].weight
        nearest = weight - mse_grid(weight, 8, one.scheme.weights.symmetric).round(weight)
        assert torch.equal(seen[name], nearest), name
    dense = float(seen["dense"].square().sum())
    assert dense == pytest.approx(float((views["dense"].weight - alone["dense"].dequantize()).square().sum()), rel=0.5)
    first = next(iter(views))  # no layer before it, whose errors its target would undo
    torch.testing.assert_close(seen[first], views[first].weight - alone[first].weight.dequantize(), atol=0.02, rtol=0.1)


def test_a_plan_that_promises_less_than_its_own_error_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    base = run(task(), registry.load("comq"))
    shared = run(task(), Mixed)
    assert {layer.weight.bits for layer in shared.values()} != {layer.weight.bits for layer in base.values()}
    monkeypatch.setattr(mixed, "MAX_PREDICTED_KL_SHARE", 1e-3)
    sink = ListSink()
    kept = run(task(sink=sink), Mixed)
    assert all(torch.equal(kept[name].weight.codes, layer.weight.codes) for name, layer in base.items())
    assert any("too little gain to rely on" in e.message for e in sink.events if isinstance(e, Note))
    more = run(task(), Mixed, budget=0.2)  # bytes that were asked for are spent
    assert extra_bytes(more, base) > 0


@pytest.mark.parametrize(
    ("last_bits", "zero_point", "fraction"), [(8, "auto", 0), (2, "auto", 2), (8, 2, 2), (2, 0, 0)]
)
def test_a_classifier_that_a_plan_gives_two_bits_keeps_its_zero_point_at_a_code(
    last_bits: int, zero_point: Any, fraction: int
) -> None:
    """Unless the user says where it lies; a classifier that has two bits anyway is the base's."""
    one = task(scheme=Scheme.of(bits=2, last_bits=last_bits, zero_point_fraction=zero_point))
    last = one.layers[-1].name
    one.commits.decide_once("bits of layers", lambda: {layer.name: 2 for layer in one.layers})
    found = {name: layer.weight.fraction for name, layer in run(one, Mixed).items()}
    assert found.pop(last) == fraction
    assert set(found.values()) == {0 if zero_point == 0 else 2}


@pytest.mark.parametrize(("method", "by_blocks"), [("cora", False), ("mixed", False), ("brecq", True)])
def test_a_dry_run_shows_blocks_of_methods_that_work_on_blocks_alone(
    method: str, by_blocks: bool, tmp_path: Path
) -> None:
    shown = plan(RunConfig(model="demo", method=method), runs_dir=tmp_path).layers
    assert {"unit" in layer for layer in shown} == {by_blocks}


@pytest.mark.parametrize("method", ["mixed", "cora"])
def test_the_versions_of_all_methods_that_are_used_are_in_a_run_s_identity(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base of the codes, and of nearest rounding, which says how a layer's KL falls with bits."""
    config = RunConfig(model="demo", method=method)
    names = {folder_name(config, RunCache())}
    for base in ("comq", "rtn"):
        with monkeypatch.context() as patch:
            patch.setattr(registry.load(base), "version", "another")
            names.add(folder_name(config, RunCache()))
    assert len(names) == 3

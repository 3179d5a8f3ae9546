"""Claims about the methods qera and cora on a small network, through the real calibration task."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import coraq
from coraq import registry
from coraq.api import LowRank, QuantizedLayer, minmax_grid
from coraq.artifact import RunFolder
from coraq.calibration.task import CalibrationTask
from coraq.config import LayerScheme, Scheme
from coraq.core.alternate import alternate
from coraq.core.grid import mse_grid
from coraq.core.lowrank import adapter, adapter_bytes, can_pay, directions
from coraq.core.sensitivity import kl_of_errors
from coraq.events import ListSink, Metric, Note, StageAdvanced, StageFinished, StageStarted
from coraq.methods import cora
from coraq.methods.cora import PAPER, CoRa
from coraq.methods.qera import QERA
from coraq.network.fold import fold
from coraq.testing.networks import random_images, small_network

BATCHES = list(random_images(96, seed=1).split(32))


def task(**arguments: Any) -> CalibrationTask:
    network = small_network()
    found = fold(network, random_images(2))
    scheme = arguments.pop("scheme", Scheme(bits=3))
    return CalibrationTask(network, found, scheme, BATCHES, find_method=registry.make, **arguments)


@pytest.fixture
def made() -> Iterator[CalibrationTask]:
    one = task()
    yield one
    one.close()


def run(one: CalibrationTask, method: Any, **options: Any) -> dict[str, QuantizedLayer]:
    method(method.Config(**options)).quantize(one)
    one.finish(method.name)
    return one.quantized


def extra_bytes(layers: dict[str, QuantizedLayer], base: dict[str, QuantizedLayer]) -> int:
    return sum(layer.size_bytes() - base[name].size_bytes() for name, layer in layers.items())


def error_of(one: CalibrationTask) -> float:
    """Relative squared error of the logits."""
    with torch.no_grad():
        pairs = [(one.teacher(x), one.student(x)) for x in BATCHES]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


# -- qera


def test_qera_with_rank_0_is_its_base_bit_for_bit() -> None:
    alone, adapted = run(task(), registry.load("comq")), run(task(), QERA, rank=0)
    for name, layer in adapted.items():
        assert layer.adapter is None
        assert torch.equal(layer.weight.codes, alone[name].weight.codes), name
        assert torch.equal(layer.weight.scale, alone[name].weight.scale), name


@pytest.mark.parametrize("base", ["rtn", "comq", "gptq"])
def test_qera_at_full_rank_is_the_float_network_but_for_the_adapters_own_codes(base: str) -> None:
    """On any base; layers too small for an adapter are left at 8 bits."""
    small = "depthwise|grouped|pointwise|hidden"
    one = task(scheme=Scheme(bits=2, overrides={small: LayerScheme(bits=8)}))
    layers = run(one, QERA, base=base, rank=10**6)
    assert layers["depthwise"].adapter is None
    assert all(layer.adapter is not None for name, layer in layers.items() if name in ("stem", "dense"))
    assert error_of(one) < 2e-3  # 8-bit factors


def test_qera_s_budget_is_held_and_spent_and_lowers_the_error() -> None:
    plain = task()
    base = run(plain, registry.load("comq"))
    errors = [error_of(plain)]
    for budget in (0.1, 0.3):
        one = task()
        layers = run(one, QERA, budget=budget)
        weights = sum(layer.weight.codes.numel() for layer in layers.values())
        used = extra_bytes(layers, base)
        assert used <= budget * weights
        assert used > 0.5 * budget * weights
        errors.append(error_of(one))
    assert errors[2] < errors[1] < errors[0]


def test_the_three_forms_differ_and_the_exact_one_has_the_least_error(made: CalibrationTask) -> None:
    squares = made.least_squares("dense")
    delta = squares.weight - made.codes("dense", "rtn").dequantize()
    left = {}
    for form in ("exact", "approximate", "plain"):
        found = directions(delta, squares.inputs(form), limit=3)  # type: ignore[arg-type]
        left[form] = float(squares.error(squares.weight - delta + found.truncate(3)).sum())
    assert left["exact"] < min(left["approximate"], left["plain"])
    assert left["approximate"] != left["plain"]


def test_alternation_is_monotone_and_ends_at_the_best(made: CalibrationTask) -> None:
    squares = made.least_squares("dense")

    def decompose(delta: Tensor) -> LowRank:
        return adapter(directions(delta, squares.gram, limit=4), delta, 4)

    layer, errors = alternate(
        squares.weight, squares.error, lambda less: made.codes("dense", "rtn", less=less), decompose, rounds=8
    )
    assert errors == sorted(errors, reverse=True)
    assert len(errors) > 1, "the second round gained nothing: this test needs a layer where it does"
    assert float(squares.error(layer.dequantize()).sum()) == pytest.approx(errors[-1], rel=1e-4)


def test_a_rank_of_the_scheme_s_own_is_taken() -> None:
    layers = run(task(scheme=Scheme(bits=3, overrides={"dense": LayerScheme(bits=3, rank=2)})), QERA, rank=1)
    assert layers["dense"].adapter is not None
    assert layers["dense"].adapter.rank == 2


# -- cora


@pytest.mark.parametrize("spend", ["auto", "ranks", "bits"])
def test_cora_holds_its_budget_and_beats_its_base(spend: str) -> None:
    plain = task()
    base = run(plain, registry.load("comq"))
    one = task()
    layers = run(one, CoRa, spend=spend, budget=0.2)
    weights = sum(layer.weight.codes.numel() for layer in layers.values())
    # scales and zero points are the base's; packed rows end at whole bytes, in both
    assert 0 < extra_bytes(layers, base) <= 0.2 * weights
    assert error_of(one) < error_of(plain)
    assert any(layer.adapter is not None for layer in layers.values()) or spend != "ranks"
    assert any(layer.weight.bits != base[name].weight.bits for name, layer in layers.items()) == (spend == "bits") or (
        spend == "auto"
    )


@pytest.mark.parametrize("bits", [4, 3])
def test_a_file_of_shared_out_bits_is_as_large_as_its_base_s(bits: int, tmp_path: Path) -> None:
    """To a tenth of a percent: layers that get more than 4 bits give up their column scales, and others get some."""
    sizes = {}
    for method in ("comq", "cora"):
        path = tmp_path / f"{method}.safetensors"
        result = coraq.quantize("demo", method, bits, calib_size=128, path=path).result
        sizes[method] = path.stat().st_size
        assert len({layer.bits for layer in result.layers if layer.name != "classifier"}) > (method == "cora")
    assert sizes["cora"] == pytest.approx(sizes["comq"], rel=1e-3)


def test_shares_of_bits_come_from_what_the_base_leaves_but_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes fitted to one row an image seem free of cost on these very images: there nearest rounding tells."""
    seen: dict[str, torch.Tensor] = {}
    alone = run(task(), registry.load("comq"))
    whole = kl_of_errors

    def keep(network: Any, deltas: dict[str, torch.Tensor], *more: Any) -> dict[str, float]:
        seen.update(deltas)
        return whole(network, deltas, *more)

    monkeypatch.setattr(cora, "kl_of_errors", keep)
    one = task()
    layers = run(one, CoRa)
    assert one.passes == 2
    assert len({layer.weight.bits for layer in layers.values()}) > 1
    views = {view.name: view for view in one.all_layers}
    for name in ("hidden", "head"):  # behind the mean over an image
        weight = views[name].weight
        nearest = weight - mse_grid(weight, 8, one.scheme.symmetric).round(weight)
        assert torch.equal(seen[name], nearest), name
    dense = float(seen["dense"].square().sum())
    assert dense == pytest.approx(float((views["dense"].weight - alone["dense"].dequantize()).square().sum()), rel=0.5)
    first = next(iter(views))  # no layer before it, whose errors its target would undo
    torch.testing.assert_close(seen[first], views[first].weight - alone[first].weight.dequantize(), atol=0.02, rtol=0.1)


def test_a_plan_that_promises_less_than_its_own_error_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    base = run(task(), registry.load("comq"))
    shared = run(task(), CoRa)
    assert {layer.weight.bits for layer in shared.values()} != {layer.weight.bits for layer in base.values()}
    monkeypatch.setattr(cora, "WORTH", 1e-3)
    sink = ListSink()
    kept = run(task(sink=sink), CoRa)
    assert all(torch.equal(kept[name].weight.codes, layer.weight.codes) for name, layer in base.items())
    assert any("too little to tell from none" in e.message for e in sink.events if isinstance(e, Note))
    more = run(task(), CoRa, budget=0.2)  # bytes that were asked for are spent
    assert extra_bytes(more, base) > 0


@pytest.mark.parametrize(
    ("last_bits", "zero_point", "fraction"), [(8, "auto", 0), (2, "auto", 2), (8, "quarter", 2), (2, "whole", 0)]
)
def test_a_classifier_that_a_plan_gives_two_bits_keeps_its_zero_point_at_a_code(
    last_bits: int, zero_point: Any, fraction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says where it lies; a classifier that has two bits anyway is the base's."""
    one = task(scheme=Scheme(bits=2, last_bits=last_bits, zero_point=zero_point))
    last = one.layers[-1].name
    monkeypatch.setattr(CoRa, "_plan", lambda self, task: {layer.name: [2, 0] for layer in task.layers})
    found = {name: layer.weight.fraction for name, layer in run(one, CoRa).items()}
    assert found.pop(last) == fraction
    assert set(found.values()) == {0 if zero_point == "whole" else 2}


@pytest.mark.parametrize("rounding", ["nearest", "up"])
def test_the_search_logs_its_loss_and_budget_and_whole_ranks_hold_it(rounding: str) -> None:
    sink = ListSink()
    one = task(sink=sink)
    base = run(task(), registry.load("comq"))
    layers = run(one, CoRa, spend="ranks", iterations=12, start="uniform", budget=0.2, rounding=rounding)
    logged = {
        name: [e.step for e in sink.events if isinstance(e, Metric) and e.name == name] for name in ("kl", "budget")
    }
    assert logged == {"kl": list(range(12)), "budget": list(range(12))}
    weights = sum(layer.weight.codes.numel() for layer in layers.values())
    within = extra_bytes(layers, base) <= 0.2 * weights
    # twelve steps of 0.01 from 0.9 are far over any budget: only whole ranks within the budget bring the bytes down
    assert within == (rounding == "nearest")


@pytest.mark.parametrize("spent", [0.05, 0.7, 1.0, 5.0])
def test_searched_ranks_fill_the_budget_in_their_proportions(spent: float) -> None:
    views = {layer.name: layer for layer in task().layers if can_pay(layer.shape, layer.bits)}
    generator = torch.Generator().manual_seed(0)
    most = {name: min(view.shape[1:]) for name, view in views.items()}

    def size(ranks: dict[str, int]) -> int:
        return sum(adapter_bytes(views[name].shape, rank, 8) for name, rank in ranks.items())

    allowed = 0.3 * size(most)
    for _ in range(20):
        share = torch.rand(len(most), generator=generator).tolist()
        ranks = {name: spent * 0.3 * full * x for (name, full), x in zip(most.items(), share, strict=True)}
        got = cora._within(ranks, views, allowed, 8)
        assert size(got) <= allowed
        # one step further in the same proportions, and the bytes are too many
        times = min((got[name] + 0.5) / rank for name, rank in ranks.items() if got[name] < most[name])
        after = {name: min(round(times * (1 + 1e-9) * rank), most[name]) for name, rank in ranks.items()}
        assert size(after) > allowed
        assert all(after[name] >= rank for name, rank in got.items())


def test_the_paper_s_preset_is_what_the_paper_says_and_can_be_varied() -> None:
    config = CoRa.Config(preset="paper")  # type: ignore[call-arg]
    assert {key: getattr(config, key) for key in PAPER} == PAPER
    assert CoRa.Config(preset="paper", iterations=3).iterations == 3  # type: ignore[call-arg]
    layers = run(task(), CoRa, preset="paper", iterations=2)
    assert all(layer.weight.scale.numel() == 1 for layer in layers.values())
    assert all(layers[name].adapter is not None for name in ("stem", "dense", "head"))
    assert layers["depthwise"].adapter is None
    with pytest.raises(ValidationError):
        CoRa.Config(iterations=251)  # type: ignore[call-arg]


def test_the_first_pass_and_the_search_show_how_far_they_are() -> None:
    sink = ListSink()
    made = task(sink=sink)
    run(made, CoRa, spend="ranks", budget=0.3, iterations=3)
    totals = {event.stage: event.total for event in sink.events if isinstance(event, StageStarted)}
    images = sum(map(len, made.batches()))
    assert totals == {"look at all layers": 7, "see what each costs": images, "search for ranks": 3}
    reached: dict[str, int] = {}
    for event in sink.events:
        if isinstance(event, StageAdvanced):
            assert event.done >= reached.get(event.stage, 0)
            reached[event.stage] = event.done
    assert reached == {"look at all layers": 6, "see what each costs": images, "search for ranks": 3}
    assert {event.stage for event in sink.events if isinstance(event, StageFinished)} == set(totals)


# -- what the task offers to such methods


def test_a_preview_is_what_a_commit_would_install_and_leaves_the_layer_to_be_committed(made: CalibrationTask) -> None:
    layer = made.layers[0]
    grid = minmax_grid(layer.weight, 3)
    quantized = QuantizedLayer(grid.pack(grid.codes(layer.weight)))
    installed = made.preview(layer.name, quantized)
    shown = copy.deepcopy(made.student.get_submodule(layer.name).state_dict())
    assert made.committed == {}
    made.commit(layer.name, quantized)
    after = made.student.get_submodule(layer.name).state_dict()
    assert all(torch.equal(shown[key], after[key]) for key in after)
    assert torch.equal(installed.weight.scale, made.committed[layer.name][0].weight.scale)
    with pytest.raises(Exception, match="committed already"):
        made.preview(layer.name, quantized)


def test_codes_of_another_method_are_those_it_would_commit(made: CalibrationTask) -> None:
    codes = made.codes("stem", "comq", {"sweeps": 2}, bits=5)
    assert codes.weight.bits == 5
    other = task(scheme=Scheme(bits=5, first_bits=5, gain="keep"))
    registry.make("comq", {"sweeps": 2}).quantize(other)
    assert torch.equal(codes.weight.codes, other.quantized["stem"].weight.codes)
    less = torch.ones_like(made.layers[0].weight)
    shifted = made.codes("stem", "rtn", bits=8, less=less).dequantize()
    torch.testing.assert_close(shifted, made.layers[0].weight - 1, rtol=0, atol=0.02)
    with pytest.raises(Exception, match="unknown method"):
        made.codes("stem", "nonesuch")


def test_a_decision_is_made_once_and_survives_in_the_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    asked: list[int] = []

    def decide() -> dict[str, list[int]]:
        asked.append(1)
        return {"layer": [4, 2]}

    for _ in range(2):
        one = task(memory=folder.decisions)
        assert one.remember("ranks", decide) == {"layer": [4, 2]}
        one.close()
    assert asked == [1]
    (tmp_path / "layers").mkdir()
    folder.clear()
    assert "ranks" not in folder.decisions


def test_a_lost_decision_under_committed_layers_is_an_error_and_not_another_result() -> None:
    first = task()
    layers = run(first, QERA)
    done = {name: first.committed[name] for name in list(layers)[:2]}
    resumed = task(done=done)
    with pytest.raises(Exception, match="lost the decision"):
        QERA(QERA.Config()).quantize(resumed)
    resumed.close()

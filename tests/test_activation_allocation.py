"""Mixed precision of inputs: what rounding a tensor costs, how bits are shared out, and that everybody keeps to it."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.tasks import make_task
from torch import Tensor, nn
from torch.nn import functional

import coraq
from coraq.activations.allocation import allocate_activation_bits
from coraq.artifact import load_checkpoint
from coraq.calibration.task import CalibrationTask
from coraq.config import DataConfig, LayerScheme, RunConfig, Scheme
from coraq.core.allocation import allocate_under_costs
from coraq.core.sensitivity import _by_probability, _by_slope, kl_of_rounding
from coraq.core.tensors import ActivationGrid
from coraq.errors import CoraqError
from coraq.events import ListSink, Note
from coraq.network.fold import fold
from coraq.pipeline import run
from coraq.testing.networks import random_images, small_network

MIXED = Scheme.of(bits=4, act_bits=4, column_scale="input", act_allocation="memory")


class Forked(nn.Module):
    """`fork` is read by two layers, one of which is in front of an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.first(x))
        left, right = self.left(x), self.right(x)
        x += left  # after both have read it
        return self.head((x + right).relu().mean((2, 3)))  # type: ignore[no-any-return]


def forked() -> Forked:
    torch.manual_seed(3)
    return Forked().eval().requires_grad_(False).double()


def rounded(step: float, x: Tensor) -> Tensor:
    return (x / step).round() * step


def test_the_predicted_kl_of_rounding_is_the_measured_one_for_small_steps() -> None:
    """Against the true KL with that tensor alone rounded, its mean error taken out; many draws of labels."""
    network, generator = forked(), torch.Generator().manual_seed(1)
    x = torch.randn(256, 3, 6, 6, generator=generator, dtype=torch.float64)
    readers = {"fork": ["left", "right"], "pooled": ["head"]}
    steps = {8: 0.05, 4: 0.1}
    roundings = {name: {bits: partial(rounded, step) for bits, step in steps.items()} for name in readers}
    predicted = kl_of_rounding(network, roundings, readers, [x] * 12, generator)
    target = network(x)
    for name, layers in readers.items():
        for bits, step in steps.items():

            def enter(module: nn.Module, args: tuple[Any, ...], step: float = step) -> tuple[Tensor]:
                error = rounded(step, args[0]) - args[0]
                return (args[0] + error - error.mean((0, 2, 3) if error.dim() == 4 else (0,), keepdim=True),)

            handles = [network.get_submodule(layer).register_forward_pre_hook(enter) for layer in layers]
            logits = network(x)
            for handle in handles:
                handle.remove()
            kl = functional.kl_div(
                logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            assert predicted[name][bits] == pytest.approx(float(kl), rel=0.15), (name, bits)


def test_labels_that_are_hardly_ever_drawn_count_as_they_should() -> None:
    """Weighted slopes against the exact sum over all labels, of a network that is sure; and one that is wholly so."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 10, generator=generator, dtype=torch.float64) + 8 * torch.eye(10, dtype=torch.float64)[:1]
    direction, log_p = torch.randn(10, generator=generator, dtype=torch.float64), logits.log_softmax(-1)
    p = log_p.exp()[0]
    slopes = (torch.eye(10, dtype=torch.float64) - p) @ direction  # of log p(label), along the direction
    exact = float((p * slopes**2).sum())
    label, weight = _by_slope(log_p.expand(1000, -1), generator)
    drawn = (weight * slopes[label[:, 0]]) ** 2
    assert float(drawn.mean()) == pytest.approx(exact, rel=0.1)
    plain, ones = _by_probability(log_p.expand(1000, -1), generator)
    assert float((ones * slopes[plain[:, 0]] ** 2).std()) > 5 * float(drawn.std())
    label, weight = _by_slope(torch.tensor([[0.0, -torch.inf]]), generator)
    assert (label.item(), weight.item()) == (0, 1)


def test_the_network_is_left_as_it_was_even_by_an_error() -> None:
    network = forked()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    before = network(x)

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    for rounding in (partial(rounded, 0.1), fails):
        try:
            kl_of_rounding(network, {"a": {4: rounding}}, {"a": ["head"]}, [x], torch.Generator().manual_seed(0))
        except RuntimeError:
            assert rounding is fails
    assert torch.equal(network(x), before)
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_an_overflow_is_named() -> None:
    network = forked()
    network.left.weight.fill_(float("inf"))
    grids = {"pooled": {4: ActivationGrid(0.1, 0, 4, False)}}
    with pytest.raises(CoraqError, match="pooled are not finite"):
        allocate_activation_bits(
            network,
            grids,
            {"pooled": ["head"]},
            [{"pooled": 1.0}],
            4,
            [torch.randn(4, 3, 6, 6, dtype=torch.float64)],
            torch.Generator(),
            lambda text: None,
        )


def test_bits_go_where_they_save_most_at_the_same_average() -> None:
    """Two tensors of equal use, one of them nine times as large to store: the small one gets more."""
    network = forked()
    x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grids = {n: {b: ActivationGrid(4 / 2**b, 0, b, True) for b in (3, 4, 5)} for n in ("fork", "pooled")}
    readers = {"fork": ["left", "right"], "pooled": ["head"]}

    def bits(costs: dict[str, float]) -> dict[str, int]:
        generator = torch.Generator().manual_seed(0)
        shares = allocate_activation_bits(network, grids, readers, [costs], 4, [x], generator, lambda text: None)
        assert shares.kl <= shares.uniform_kl
        assert sum(costs[name] * bits for name, bits in shares.bits.items()) <= 4 * sum(costs.values())
        return shares.bits

    one, other = bits({"fork": 9.0, "pooled": 1.0}), bits({"fork": 1.0, "pooled": 9.0})
    assert one["pooled"] > other["pooled"]
    assert one["fork"] < other["fork"]


def test_two_costs_are_kept_to_and_little_is_lost_to_the_best_there_is() -> None:
    """Against every choice of bits for seven tensors."""
    generator = torch.Generator().manual_seed(0)
    widths, names = (3, 4, 5, 6), [str(i) for i in range(7)]
    for _ in range(5):
        scale = (torch.rand(7, generator=generator) * 6).exp().tolist()
        losses = {n: {w: s * 4.0**-w for w in widths} for n, s in zip(names, scale, strict=True)}
        costs = [
            dict(zip(names, (torch.rand(7, generator=generator) * 2).exp().tolist(), strict=True)) for _ in range(2)
        ]
        found, loss = allocate_under_costs(losses, costs, 4)
        best = float("inf")
        for own in itertools.product(widths, repeat=7):
            if all(sum(c[n] * w for n, w in zip(names, own, strict=True)) <= 4 * sum(c.values()) for c in costs):
                best = min(best, sum(losses[n][w] for n, w in zip(names, own, strict=True)))
        assert all(sum(c[n] * w for n, w in found.items()) <= 4 * sum(c.values()) * (1 + 1e-9) for c in costs)
        assert loss == pytest.approx(sum(losses[n][w] for n, w in found.items()))
        assert best <= loss * (1 + 1e-9)
        assert loss <= 1.35 * best
        assert loss < 0.9 * sum(own[4] for own in losses.values())


# -- in a run


def task_of(scheme: Scheme, **more: Any) -> CalibrationTask:
    images, model = random_images(32), small_network()
    return make_task(model, scheme, list(images.split(8)), found=fold(model, images[:4]), **more)


@pytest.mark.parametrize("by", ["memory", "bitops", "both"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_average_is_kept_over_what_is_shared_out(by: str, bits: int) -> None:
    scheme = MIXED.replace(act_bits=bits, act_allocation=by)
    sink = ListSink()
    task = task_of(scheme, sink=sink)
    uniform = task_of(scheme.replace(act_allocation="none"))
    macs = {view.name: view.macs for view in task.all_layers}
    free = [point for point in task.grids.points if point.readers[0] not in ("stem", "head")]
    values = {point.name: point.values for point in free}
    products = {point.name: sum(macs[name] for name in point.readers) for point in free}
    differ = len({point.bits for point in free}) > 1
    assert differ or by == "both"  # which leaves five tensors little to choose
    for cost in {"memory": [values], "bitops": [products], "both": [values, products]}[by]:
        assert sum(cost[point.name] * point.bits for point in free) <= bits * sum(cost.values()) * (1 + 1e-9)
    assert {point.bits for point in task.grids.points if point not in free} == {8}
    assert [point.name for point in task.grids.points] == [point.name for point in uniform.grids.points]
    said = "predicted to cost a KL" if differ else "predicted to gain nothing"
    assert any(said in event.message for event in sink.events if isinstance(event, Note))
    for view in task.all_layers:  # wide inputs are rounded as they are, and their weights take no scales off
        assert (view.input_scales is not None) == (view.act_bits is not None and view.act_bits <= 4), view.name


def test_the_values_are_those_that_the_layers_read() -> None:
    task, seen = task_of(MIXED), dict[str, int]()
    for point in task.grids.points:

        def look(module: nn.Module, args: tuple[Any, ...], name: str = point.name) -> None:
            seen[name] = args[0][0].numel()

        task.teacher.get_submodule(point.readers[0]).register_forward_pre_hook(look)
    task.teacher(next(task.batches()))
    assert {point.name: point.values for point in task.grids.points} == seen


def test_overrides_and_edges_keep_their_own() -> None:
    names = ["stem", "hidden", "other", "head"]
    assert MIXED.mixes(names) == {"hidden", "other"}
    assert MIXED.replace(act_first_bits=None).mixes(names) == {"stem", "hidden", "other"}
    own = {"hid.*": LayerScheme(bits=4, act_bits=5), "oth.*": LayerScheme(bits=3)}
    assert MIXED.replace(overrides=own).mixes(names) == {"other"}
    assert not MIXED.replace(act_allocation="none").mixes(names)
    fixed = task_of(MIXED.replace(**{"overrides": {"hidden": LayerScheme(bits=4, act_bits=7)}}))
    assert {view.name: view.act_bits for view in fixed.all_layers}["hidden"] == 7


@pytest.mark.parametrize("bits", [2, 8])
def test_where_none_can_pay_or_gain_all_have_the_same(bits: int) -> None:
    sink = ListSink()
    task = task_of(MIXED.replace(act_bits=bits), sink=sink)
    assert {point.bits for point in task.grids.points} == {bits, 8}
    assert [event.message for event in sink.events if isinstance(event, Note)] == [
        f"inputs of {bits} bits on average all have {bits} bits: there are only 2 to 8"
    ]


def test_it_is_the_same_every_time_and_is_not_decided_twice() -> None:
    memory: dict[str, Any] = {}
    first = task_of(MIXED, decisions=memory)
    bits = {point.name: point.bits for point in first.grids.points}
    assert {point.name: point.bits for point in task_of(MIXED).grids.points} == bits
    changed = {name: 8 if kept == 3 else kept for name, kept in memory["bits of inputs"].items()}
    again = task_of(MIXED, decisions={"bits of inputs": changed})
    assert {point.name: point.bits for point in again.grids.points} == bits | changed
    for wrong in (None, [], {}, dict.fromkeys(changed, 9), dict.fromkeys(changed, "4"), dict.fromkeys(changed, True)):
        with pytest.raises(CoraqError, match="does not fit it"):
            task_of(MIXED, decisions={"bits of inputs": wrong})


def test_a_resumed_run_that_lost_the_decision_says_so() -> None:
    done: Any = {"stem": (None, {})}  # not looked at before the decision
    with pytest.raises(CoraqError, match="lost the decision"):
        task_of(MIXED, done=done)


def test_the_file_has_the_bits_and_gives_the_same_outputs(tmp_path: Path) -> None:
    path, x = tmp_path / "mixed.safetensors", random_images(16)
    scheme = MIXED.replace(act_bits=5)
    module, result = coraq.quantize(small_network(), "comq", data=random_images(64), scheme=scheme, path=path)
    points = load_checkpoint(path).info.activations
    stored = {name: record.bits for record in points.values() for name in record.readers}
    assert len(set(stored.values())) > 2
    assert {layer.name: layer.metrics["act_bits"] for layer in result.layers} == stored
    assert torch.equal(coraq.load(path)(x), module(x))


def test_the_demo_loses_less_by_it_at_the_same_average(tmp_path: Path) -> None:
    """As a user runs it: 3-bit inputs and 8-bit weights, so that inputs are what costs."""
    kl, bits = {}, {}
    for mixed in ("none", "memory"):
        scheme = Scheme.of(bits=8, act_bits=3, act_allocation=mixed)
        config = RunConfig(model="demo", method="rtn", scheme=scheme, data=DataConfig(calib_size=128))
        result = run(config, runs_dir=tmp_path)
        assert result.comparison is not None
        kl[mixed], bits[mixed] = result.comparison.kl_nats, result.cost.input_bits
    assert bits["memory"] == pytest.approx(bits["none"], abs=0.02)
    assert kl["memory"] < 0.5 * kl["none"]


# -- configuration


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"act_allocation": "bitops", "act_bits": 8, "act_placement": "integer"}, "leave out --act-placement"),
        ({"act_allocation": "elements", "act_bits": 4}, "activations.allocation"),
    ],
)
def test_what_has_no_bits_to_share_out_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Scheme.of(**values)


def test_it_is_said_in_the_scheme_and_is_part_of_a_run_s_identity() -> None:
    assert "mixed, 4 bits a value on average" in MIXED.describe()
    assert "mixed, 4 bits a multiplication on average" in MIXED.replace(act_allocation="bitops").describe()
    assert "mixed" not in Scheme.of(act_bits=4).describe()
    digests = {
        RunConfig(model="demo", scheme=MIXED.replace(act_allocation=by)).digest()
        for by in ("none", "memory", "bitops", "both")
    }
    assert len(digests) == 4
